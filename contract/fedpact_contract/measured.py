"""What a log says of the measurements outside its rounds: the noised sums, their answers, and the baselines."""

import base64
import struct
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from itertools import islice
from typing import Any

from fedpact_contract.contract import Contract
from fedpact_contract.contribution import validation_rows
from fedpact_contract.log import BaselinesScored, Body, MeasurementTaken
from fedpact_contract.metric import metric_text
from fedpact_contract.record import decimal_text
from fedpact_contract.statistics import cell_count, results

_WIDE = Context(prec=1000)
"""Holds every digit of a float."""


def sums_of(body: MeasurementTaken) -> bytes | None:
    """The noised sums in an entry, little-endian float32; None where there are none that can be read."""
    try:
        return None if body.array is None else base64.b64decode(body.array, validate=True)
    except ValueError:
        return None


def statistics(bodies: Iterable[Body], contract: Contract) -> dict[str, Any] | None:
    """The answers to the contract's queries, as JSON; None where it asks none. The log was checked before.

    `noise` is the standard deviation of the noise on each sum, `interval` what the ends mean, `participants` are those
    whose answers came, in the contract's order, `queries` are as in `statistics.results`, numbers as text with the
    digits that the noise allows.
    """
    if contract.statistics is None:
        return None
    sums: dict[str, Sequence[Sequence[float]]] = {}
    for body in bodies:
        data = sums_of(body) if isinstance(body, MeasurementTaken) else None
        if isinstance(body, MeasurementTaken) and data is not None:
            numbers = iter(struct.unpack(f"<{len(data) // 4}f", data))
            counts = [cell_count(contract, query) for query in contract.statistics.queries]
            sums[body.participant] = [list(islice(numbers, count)) for count in counts]
    found = results(contract, sums) if sums else []
    for query in found:
        for answer in query["answers"].values():
            _round(answer)
    return {
        "noise": decimal_text(contract.statistics.noise_multiplier),
        "interval": {"level": "0.95", "covers": "the noise alone, each value by itself; not sampling"},
        "participants": [{"id": p.id, "name": p.name} for p in contract.participants if p.id in sums],
        "queries": found,
    }


def _round(answer: dict[str, Any]) -> None:
    """Numbers as text: down to the second digit of the noise's standard deviation, or of half the interval.

    What is finer says nothing. An error is rounded up, an interval outward.
    """
    texts: dict[str, list[str]] = {"values": [], "low": [], "high": []}
    error = answer["error"]
    for value, low, high in zip(answer["values"], answer["low"], answer["high"], strict=True):
        size = Decimal(error if error is not None else (high - low) / 2)
        step = Decimal(1).scaleb(size.adjusted() - 1)
        for key, number, way in (
            ("values", value, ROUND_HALF_EVEN),
            ("low", low, ROUND_FLOOR),
            ("high", high, ROUND_CEILING),
        ):
            texts[key].append(_text(number, step, way))
        answer["error"] = None if error is None else _text(error, step, ROUND_CEILING)
    answer |= texts


def _text(number: float, step: Decimal, way: str) -> str:
    """A multiple of `step`; what is off it by less than any float's rounding counts as on it."""
    rounded = Decimal(number).quantize(step.scaleb(-6), context=_WIDE).quantize(step, way, _WIDE)
    return format(rounded if rounded else abs(rounded), "f")


def baselines(bodies: Iterable[Body], contract: Contract) -> list[dict[str, str]] | None:
    """How the models that participants trained alone do on the validation rows; None until that is stated.

    `metric` is the task's, `loss` the mean loss, both on all validation rows; in the contract's order.
    """
    scored = next((body for body in bodies if isinstance(body, BaselinesScored)), None)
    if scored is None:
        return None
    rows = validation_rows(contract)
    lines = {line.participant: line for line in scored.lines}
    return [
        {
            "id": party.id,
            "name": party.name,
            "metric": metric_text(contract, line.losses, line.correct, line.pairs),
            "loss": f"{sum(line.losses) / rows / 1e9:.6f}",
        }
        for party in contract.participants
        if (line := lines.get(party.id)) is not None
    ]
