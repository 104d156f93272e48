"""The metric of a contract's task, from what the log has of a model: its losses on the validation rows, and counts.

Classes: accuracy, the part of the rows that is classified rightly. Numbers: the root of the mean squared error, in the
label's unit, which follows from the loss alone.
"""

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from fedpact_contract.contract import ClassLabel, Contract
from fedpact_contract.errors import FaultError
from fedpact_contract.record import ratio_text

UNIT = 10**9
"""Losses are integers of so many to one."""

NAMES = {"classification": "accuracy", "regression": "root mean squared error"}
"""By task."""


def loss_unit(loss: str) -> str:
    """The unit of a contract's loss: that of squared errors has none, the label being scaled."""
    return "" if loss == "squared-error" else "nat"


def metric_name(contract: Contract) -> str:
    """What the metric is called."""
    return NAMES[contract.data.label.TASK]


def metric_text(contract: Contract, losses: Sequence[int], correct: int | None) -> str:
    """One model's metric as a decimal string.

    Args:
        contract: The contract.
        losses: The model's losses on each slice of the validation set, in 1e-9.
        correct: What was counted of it (`RoundScores.correct`).

    Raises:
        FaultError: SCORES_CORRECT, nothing was counted though the metric is a count.
    """
    label, rows = contract.data.label, sum(part.count for part in contract.contribution.validation.slices)
    if isinstance(label, ClassLabel):
        if correct is None:
            raise FaultError("SCORES_CORRECT", "No right answers are counted, and the label has classes.")
        return ratio_text(Fraction(correct, rows))
    square = Fraction(2 * sum(losses), rows * UNIT) * (Fraction(label.high - label.low) / 2) ** 2
    return ratio_text(Fraction((Decimal(square.numerator) / Decimal(square.denominator)).sqrt()))
