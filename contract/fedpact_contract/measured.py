"""What a log says of the measurements outside its rounds: the noised sums, their answers, and the baselines."""

import base64
import struct
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from fedpact_contract.contract import Contract
from fedpact_contract.contribution import validation_rows
from fedpact_contract.log import BaselinesScored, Body, MeasurementTaken
from fedpact_contract.record import decimal_text
from fedpact_contract.statistics import cell_count, results


def sums_of(body: MeasurementTaken) -> bytes | None:
    """The noised sums in an entry, little-endian float32; None where there are none that can be read."""
    try:
        return None if body.array is None else base64.b64decode(body.array, validate=True)
    except ValueError:
        return None


def statistics(bodies: Iterable[Body], contract: Contract) -> dict[str, Any] | None:
    """The answers to the contract's queries, as JSON; None where it asks none. The log was checked before.

    `noise` is the standard deviation of the noise on each sum, `participants` are those whose answers came, `queries`
    are as in `statistics.results`, numbers as text of six digits.
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
            answer["values"] = [f"{value:.6g}" for value in answer["values"]]
            answer["error"] = None if answer["error"] is None else f"{answer['error']:.6g}"
    return {
        "noise": decimal_text(contract.statistics.noise_multiplier),
        "participants": [{"id": p, "name": contract.participant(p).name} for p in sorted(sums)],
        "queries": found,
    }


def baselines(bodies: Iterable[Body], contract: Contract) -> list[dict[str, str]] | None:
    """How the models that participants trained alone do on the validation rows; None until that is stated.

    `metric` is the accuracy, `loss` the mean loss in nat, both on all validation rows.
    """
    scored = next((body for body in bodies if isinstance(body, BaselinesScored)), None)
    if scored is None:
        return None
    rows = validation_rows(contract)
    return [
        {
            "id": line.participant,
            "name": contract.participant(line.participant).name,
            "metric": f"{line.correct / rows:.6f}",
            "loss": f"{sum(line.losses) / rows / 1e9:.6f}",
        }
        for line in scored.lines
    ]
