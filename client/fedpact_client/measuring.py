"""Measurements outside the rounds: what a contract asks this agent to release once, its statistics and its baseline.

As for a round: policy, no more copies among the rows than allowed, then budget (one attempt, charged whatever becomes
of it), then data, then the outbox, and only then the operator. What was sent is sent again, byte for byte, until the
operator's log has it.
"""

import base64
import binascii
from collections.abc import Callable

import structlog

from fedpact_client.answer import BEFORE_ROWS, Desk, Trained, TrainerLostError, TrainingFailedError
from fedpact_client.api import OperatorClient, contract_path
from fedpact_client.store import EgressKind, Ready
from fedpact_contract.arrays import model_digest, update_digest
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract, MeasurementKind
from fedpact_contract.errors import FedpactError, InputError, RefusedError
from fedpact_contract.messages import Measurement, measurement_base, measurement_event
from fedpact_contract.record import read_envelope, sign

log = structlog.get_logger()

LATER = {"POLICY_TERM", "POLICY_HOURS", "PARTICIPANT_PAUSED", *BEFORE_ROWS}
"""Refusals of what is only too early, or paused, and a database that does not answer: it is tried again."""

Measure = Callable[[Contract, MeasurementKind, bytes], Trained]
"""Measures once: the contract, what, and the initial model (empty for statistics), little-endian float64."""


def measure(desk: Desk, client: OperatorClient, run: Measure) -> bool:
    """Release what the contract asks for and the operator's log does not have yet.

    Returns:
        Whether nothing is left to do: all is taken, or cannot be given (an alarm says why).

    Raises:
        ServiceError: the operator does not answer.
        AnsweredInputError, AnsweredRefusedError: the operator takes nothing now.
    """
    kinds = desk.contract.measurements
    if not kinds:
        return True
    path = contract_path(desk.contract_id) + "/measurements"
    state = client.get(path, contract_id=desk.contract_id)
    taken = state.get("taken")
    done = True
    for kind in kinds:
        if isinstance(taken, list) and kind in taken:
            continue
        try:
            ready = _ready(desk, client, kind, run)
        except (RefusedError, InputError) as err:
            if err.code in LATER:
                log.info("measurement waits", contract=desk.contract_id, kind=kind, code=err.code)
                done = False
            else:
                _alarm(desk, err)
            continue
        if ready is None:
            continue
        envelope = read_envelope(ready.reply)
        body = {"measurement": envelope.plain(), "array": base64.b64encode(ready.array).decode()}
        client.post(path, body, EgressKind.MEASUREMENT, contract_id=desk.contract_id)
        log.info("measurement sent", contract=desk.contract_id, kind=kind)
    return done


def _ready(desk: Desk, client: OperatorClient, kind: MeasurementKind, run: Measure) -> Ready | None:
    """What may leave; None where the attempt came to nothing.

    Raises:
        RefusedError: the policy, the data set's rules or the budget say no, or the one attempt was made and lost.
        InputError: DATA_DUPLICATES.
    """
    desk.check_allowed(0, kind)
    desk.check_use(0, kind)
    desk.own_rows()
    base = _initial_model(desk, client) if kind == "baseline" else b""
    digest = measurement_base(desk.contract, kind)
    reserved = desk.store.reserve(desk.contract_id, 0, digest, desk.run_key, kind=kind)
    if isinstance(reserved, Ready):
        return reserved if reserved.kind == "update" else None
    try:
        trained = run(desk.contract, kind, base)
        desk.know_again(trained)
    except TrainerLostError as err:
        _alarm(desk, err)
        return None
    except (TrainingFailedError, RefusedError, InputError) as err:
        _alarm(desk, err)
        code = err.code
        desk.store.fail(reserved, code, lambda _row: canonical_bytes({"failed": code}), desk.run_key)
        return None
    array_digest = update_digest(trained.update)

    def build(ledger_head: str) -> tuple[bytes, bytes]:
        record = Measurement(
            contract_id=desk.contract_id,
            participant=desk.participant,
            kind=kind,
            array_digest=array_digest,
            num_examples=desk.contract.participant(desk.participant).num_examples,
            privacy_event=measurement_event(desk.contract, kind),
            noise="csprng" if trained.noise == "csprng" else "test",
            ledger_head=ledger_head,
        )
        return sign(record, desk.run_key).to_bytes(), trained.update

    return desk.store.complete(reserved, build, array_digest, desk.run_key)


def _initial_model(desk: Desk, client: OperatorClient) -> bytes:
    """The contract's initial model, by its digest.

    Raises:
        RefusedError: BASE_MODEL_MISMATCH.
    """
    answer = client.get(contract_path(desk.contract_id) + "/initial-model", contract_id=desk.contract_id)
    try:
        model = base64.b64decode(str(answer.get("model")), validate=True)
    except binascii.Error:
        model = b""
    if model_digest(model) != desk.contract.model.initial_digest:
        raise RefusedError(
            "BASE_MODEL_MISMATCH", "The operator's initial model is not the one that the contract names."
        )
    return model


def _alarm(desk: Desk, err: FedpactError) -> None:
    """Keep why nothing was released, once."""
    log.warning("not measured", contract=desk.contract_id, code=err.code, reason=str(err))
    if all((a.code, a.contract_id) != (err.code, desk.contract_id) for a in desk.store.alarms()):
        desk.store.add_alarm(err.code, desk.contract_id, str(err))
