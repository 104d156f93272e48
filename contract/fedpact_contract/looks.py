"""Which detectors speak after which round: public, so that whoever replays a log finds one that was silenced.

What they say is the operator's statement (an auditor makes it again); that they spoke, and of participants, is not.
"""

from collections.abc import Mapping
from fractions import Fraction

from fedpact_contract.contract import Contract
from fedpact_contract.log import Finding, Findings

WRECKER, NEAR_COPY = "WRECKER", "NEAR_COPY"
"""Codes that something follows from: an exclusion, a union."""

CODES = (
    WRECKER,
    "SIGNAL_ENERGY",
    "DIRECTION",
    "REPLAY",
    "DISPERSION",
    "VALUE_PER_ROW",
    "WITHOUT_VALUE",
    NEAR_COPY,
    "NEGATIVE_VALUE",
    "SLICE_VALUE",
    "NEGATIVES",
)
"""Every detector, in the order in which they speak."""

OF_UPDATES = ("SIGNAL_ENERGY", "DIRECTION", "REPLAY", "DISPERSION", NEAR_COPY)
"""Those that look at updates alone. What the others find unusual in a value is so in the fixed-weight game."""


def looks(rounds: int) -> tuple[int, ...]:
    """After which rounds the tests look: 3, 6, 12, ... and the last."""
    return tuple(sorted({3 * 2**k for k in range(rounds.bit_length()) if 3 * 2**k <= rounds} | {rounds}))


def due(contract: Contract, number: int) -> tuple[str, ...]:
    """The detectors that speak after a round; between two looks only that of wreckers does."""
    codes = CODES if number in looks(contract.training.rounds) else (WRECKER,)
    return tuple(c for c in codes if contract.contribution.game != "re-normalised" or c in OF_UPDATES)


def malformed(said: Findings, contract: Contract, number: int) -> str | None:
    """What is wrong with the findings of a round, as far as anybody can tell; None where nothing is."""
    if said.round != number or any(line.round != number for line in said.lines):
        return "they are another round's"
    if tuple(line.code for line in said.lines) != due(contract, number):
        return "not every detector that looks after this round speaks, once, in the order of all"
    for line in said.lines:
        if not {*line.participants} <= contract.by_id().keys() or len({*line.participants}) != len(line.participants):
            return f"{line.code} is of somebody who is no participant"
        numbers = _numbers(line)
        if numbers is None:
            return f"{line.code} has a statistic or threshold that is no number"
        if line.outcome == "alarm" and not numbers[0] > numbers[1]:
            return f"{line.code} is an alarm below its threshold"
    return None


def wreckers(said: Findings) -> set[str]:
    """Whom these findings call a wrecker."""
    return {p for line in said.lines if line.code == WRECKER and line.outcome == "alarm" for p in line.participants}


def refuted(participant: str, number: int, values: Mapping[int, Mapping[str, Fraction]]) -> bool:
    """Whether the opened values say that somebody is no wrecker after a round: not negative in it and the one before.

    Args:
        participant: Who was called one.
        number: The round.
        values: Round -> each participant's value (`contribution.round_values`).
    """
    return any(values.get(k, {}).get(participant, Fraction(0)) >= 0 for k in (number - 1, number))


def _numbers(line: Finding) -> tuple[float, float] | None:
    try:
        statistic, threshold = float(line.statistic), float(line.threshold)
    except ValueError:
        return None
    return None if statistic != statistic or threshold != threshold else (statistic, threshold)
