"""What participants release outside the rounds: their statistics and baselines, checked, logged, and scored."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from fedpact_contract.arrays import update_digest
from fedpact_contract.contract import Contract, MeasurementKind
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.log import BaselineLoss, MeasurementTaken
from fedpact_contract.messages import Measurement, measurement_event
from fedpact_contract.parties import opened
from fedpact_contract.record import Envelope, read_envelope
from fedpact_contract.statistics import can_be_noised, total_cells
from fedpact_models.evaluate import evaluate_coalitions
from fedpact_models.features import Examples
from fedpact_models.registry import parameter_count
from fedpact_models.tasks import task_of
from fedpact_server import db, logbook, mirror, noise_floor
from fedpact_server.admission import norm_bound
from fedpact_server.home import OperatorHome
from fedpact_server.pool import load_update
from fedpact_server.run_state import load_model, run_row, sign_between_rounds, write_array

BASELINE_PARAMETERS = 150_000
"""A baseline travels in one request of the operator's API, which takes 2**20 bytes."""


def taken(connection: Connection, contract_id: str) -> dict[tuple[str, MeasurementKind], Measurement]:
    """By participant and kind, what the log has."""
    table = db.entries.c
    query = sa.select(table.position).where(table.contract_id == contract_id, table.type == MeasurementTaken.TYPE)
    found: dict[tuple[str, MeasurementKind], Measurement] = {}
    for position in connection.execute(query.order_by(table.position)).scalars():
        body = logbook.read_entry(connection, contract_id, int(position)).body
        record = Measurement.from_bytes(read_envelope(body["measurement"]).body)
        found[record.participant, record.kind] = record
    return found


def take(
    home: OperatorHome,
    connection: Connection,
    contract: Contract,
    participant: str,
    run_key: str,
    value: dict[str, Any],
) -> MeasurementKind:
    """Take one measurement into the log; the same one again changes nothing.

    Args:
        home: Where arrays are kept; its run key signs the checkpoint.
        connection: A write transaction.
        contract: The signed contract.
        participant: Who sends it.
        run_key: Its delegated key.
        value: {"measurement": envelope, "array": base64}.

    Raises:
        InputError: BODY_FORM, MEASUREMENT_*.
        RefusedError: MEASUREMENT_TAKEN, another one of this kind; RUN_ENDED.
        FaultError: not signed by the participant's run key.
    """
    envelope, array = _form(value)
    record: Measurement = opened(envelope, Measurement, run_key)
    known = taken(connection, contract.id).get((participant, record.kind))
    if known == record:
        return record.kind
    if known is not None:
        raise RefusedError("MEASUREMENT_TAKEN", f"The log has this participant's {record.kind} already.")
    run = run_row(connection, contract.id)
    if run is not None and run.phase != "running":
        raise RefusedError("RUN_ENDED", "The run has ended; nothing more is taken.")
    check(record, array, contract, participant)
    if record.ledger_head in mirror.ledger_heads(connection, contract.id, participant):
        raise _wrong("LEDGER_HEAD", "names the ledger head of an earlier message: its charge is not in the ledger")
    if record.kind == "baseline":
        write_array(_folder(home.path, contract) / f"{record.array_digest}.f4", array)
    text = base64.b64encode(array).decode() if record.kind == "statistics" else None
    body = MeasurementTaken(participant=participant, measurement=envelope.plain(), array=text)
    logbook.append(connection, contract.id, [body])
    sign_between_rounds(connection, contract.id, home.run_key(contract.id))
    return record.kind


def check(record: Measurement, array: bytes, contract: Contract, participant: str) -> None:
    """Raise unless the measurement is the contracted one.

    Raises:
        InputError: MEASUREMENT_PLACE, MEASUREMENT_NOT_PLANNED, MEASUREMENT_EVENT, MEASUREMENT_TEST_NOISE,
            MEASUREMENT_DIGEST, MEASUREMENT_SHAPE, MEASUREMENT_NOT_FINITE, MEASUREMENT_NORM, MEASUREMENT_NOISE_FLOOR.
    """
    if (record.contract_id, record.participant) != (contract.id, participant):
        raise _wrong("PLACE", "names another contract or participant")
    event = measurement_event(contract, record.kind)
    rows = contract.participant(participant).num_examples
    if (record.privacy_event, record.num_examples) != (event, rows):
        raise _wrong("EVENT", "claims another privacy event or number of examples than contracted")
    if record.noise != "csprng":
        raise _wrong("TEST_NOISE", "was made with test noise")
    if update_digest(array) != record.array_digest:
        raise _wrong("DIGEST", "is not the one that was signed")
    if len(array) != 4 * cells(contract, record.kind):
        raise _wrong("SHAPE", f"has {len(array)} bytes where {4 * cells(contract, record.kind)} are due")
    numbers = np.frombuffer(array, "<f4").astype(np.float64)
    if not np.isfinite(numbers).all():
        raise _wrong("NOT_FINITE", "holds a NaN or an infinity")
    if record.kind == "baseline":
        bound = norm_bound(contract, rows, len(numbers), steps=event.steps)
    else:  # each sum is of at most one per row, and noise six deviations out
        bound = float(np.sqrt(len(numbers))) * (rows + 6 * float(event.noise_multiplier))
    if float(np.linalg.norm(numbers)) > bound:
        raise _wrong("NORM", f"is larger than {bound:.3g}, the most that was contracted")
    _check_noise(numbers, contract, record.kind, rows)


def _check_noise(numbers: NDArray[np.float64], contract: Contract, kind: MeasurementKind, rows: int) -> None:
    """There is noise in it, as far as the numbers can tell: against misconfiguration, not malice."""
    if not numbers.any():
        raise _wrong("NOISE_FLOOR", "is zero throughout, which noise does not make")
    if kind == "statistics":
        if not can_be_noised(contract, numbers.tolist()):
            raise _wrong("NOISE_FLOOR", "counts whole rows throughout, which noise does not make")
        return
    steps = measurement_event(contract, kind).steps
    ratio = noise_floor.energy_ratio(numbers, contract, rows, steps)
    found = noise_floor.pooled([ratio], contract, len(numbers), steps)
    if found.outcome == "failed":
        told = f"{found.ratio:.3f} of the energy that the contracted noise alone brings; {found.floor:.3f} are due"
        raise _wrong("NOISE_FLOOR", f"has {told}")


def cells(contract: Contract, kind: MeasurementKind) -> int:
    """How many numbers a measurement has."""
    return parameter_count(contract.model, contract.data) if kind == "baseline" else total_cells(contract)


def baseline_losses(home: Path, connection: Connection, contract: Contract, examples: Examples) -> list[BaselineLoss]:
    """Every baseline that came, on the validation rows, by participant."""
    initial = load_model(home, contract.model.initial_digest)
    counts = [s.count for s in contract.contribution.validation.slices]
    lines = []
    for (participant, kind), record in sorted(taken(connection, contract.id).items()):
        if kind != "baseline":
            continue
        step = load_update(_folder(home, contract), record.array_digest).astype(np.float64)
        found = evaluate_coalitions(contract.model, contract.data, initial, step[None], examples, counts, [1])
        right, pairs = found.correct.get(1), task_of(contract.data.label).pairs(examples.y)
        lines.append(BaselineLoss(participant=participant, losses=found.losses[0], correct=right, pairs=pairs))
    return lines


def _folder(home: Path, contract: Contract) -> Path:
    return home / "arrays" / contract.id


def _form(value: dict[str, Any]) -> tuple[Envelope[Measurement], bytes]:
    if set(value) != {"measurement", "array"} or not isinstance(value["array"], str):
        raise InputError("BODY_FORM", "The body is {measurement, array}.")
    try:
        return read_envelope(value["measurement"]), base64.b64decode(value["array"], validate=True)
    except ValueError as err:
        raise InputError("BODY_FORM", "The array is not base64.", field="array") from err


def _wrong(code: str, what: str) -> InputError:
    return InputError(f"MEASUREMENT_{code}", f"The measurement {what}.", field="measurement")
