"""The log of the guard and of its executor: JSON lines on stderr. Results go to stdout, and nothing else does."""

import sys

import structlog


def log_to_stderr() -> None:
    """One JSON object a line, with level and UTC time."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # whatever it is by then
    )
