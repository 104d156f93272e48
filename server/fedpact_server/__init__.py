"""The operator: round loop, admission, aggregation, contribution, log, settlement, reports."""
