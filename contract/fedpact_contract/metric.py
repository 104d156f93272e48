"""The metric of a contract's task, from what the log has of a model: its losses on the validation rows, and counts.

Classes: accuracy, the part of the rows that is classified rightly. Numbers: the root of the mean squared error, in the
label's unit, which follows from the loss alone. Survival: Harrell's concordance, the part of the pairs of rows whose
events are known to have come one after the other that the model puts in this order, ties half.
"""

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from fedpact_contract.contract import ClassLabel, Contract, NumberLabel
from fedpact_contract.errors import FaultError
from fedpact_contract.record import ratio_text

UNIT = 10**9
"""Losses are integers of so many to one."""

NAMES = {"classification": "accuracy", "regression": "root mean squared error", "survival": "concordance"}
"""By task."""


def loss_unit(loss: str) -> str:
    """The unit of a contract's loss: that of squared errors has none, the label being scaled."""
    return "" if loss == "squared-error" else "nat"


def metric_name(contract: Contract) -> str:
    """What the metric is called."""
    return NAMES[contract.data.label.TASK]


def metric_text(contract: Contract, losses: Sequence[int], correct: int | None, pairs: int | None) -> str:
    """One model's metric as a decimal string.

    Args:
        contract: The contract.
        losses: The model's losses on each slice of the validation set, in 1e-9.
        correct: What was counted of it (`RoundScores.correct`).
        pairs: Out of how many, if not the rows (`RoundScores.pairs`).

    Raises:
        FaultError: SCORES_CORRECT, nothing was counted though the metric is a count.
    """
    label, rows = contract.data.label, sum(part.count for part in contract.contribution.validation.slices)
    if not isinstance(label, NumberLabel):
        whole = rows if isinstance(label, ClassLabel) else 2 * (pairs or 0)
        if correct is None or not whole:
            raise FaultError("SCORES_CORRECT", "No right answers are counted, or out of none.")
        return ratio_text(Fraction(correct, whole))
    square = Fraction(2 * sum(losses), rows * UNIT) * (Fraction(label.high - label.low) / 2) ** 2
    return ratio_text(Fraction((Decimal(square.numerator) / Decimal(square.denominator)).sqrt()))
