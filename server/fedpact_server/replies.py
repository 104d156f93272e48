"""One reply: read, attributed, admitted or rejected, and entered in the log with the operator's receipt."""

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract import merkle
from fedpact_contract.errors import FaultError, InputError, RejectedError
from fedpact_contract.log import Body, Countersignature, ReplyMissed, UpdateDecided, UpdateRefused
from fedpact_contract.messages import Head, Receipt, Refusal, Reply, Update
from fedpact_contract.parties import opened
from fedpact_contract.record import Envelope, sign
from fedpact_server import db, leaving, logbook, mirror, noise_floor, pool
from fedpact_server.admission import Expected, admit, open_update
from fedpact_server.run_state import RunContext, record_outcome, write_array

EMPTY_HEAD = Head(size=0, root=merkle.EMPTY_ROOT.hex())
"""What a refusal names that countersigns nothing."""


def take(
    connection: Connection,
    context: RunContext,
    current: sa.Row[tuple[object, ...]],
    participant: str,
    head: Head,
    data: bytes,
    array: bytes,
    *,
    parameters: int,
    last_chance: bool,
) -> tuple[str, str]:
    """Decide one reply, enter it in the log, and keep its countersignature; returns (kind, code).

    A reply that its participant did not sign is nobody's word: "unreadable", and nothing is logged, unless this was
    the last chance; then it is logged as missed, with the code. So is one whose key is revoked by now.
    """
    number, contract = int(current.round), context.contract
    said = leaving.standing(connection, context.contract_id).get(participant)
    if said is not None and said.revoked is not None:
        return miss(connection, context.contract_id, number, participant, leaving.KEY_REVOKED)
    earlier = noise_floor.pool_size(contract, parameters) - 1
    expected = Expected(
        contract=contract,
        contract_id=context.contract_id,
        round=number,
        participant=participant,
        run_key=context.run_keys[participant],
        base_digest=str(current.base_digest),
        head=head,
        parameters=parameters,
        known_digests=_known_digests(connection, context.contract_id),
        spares_used=mirror.spares_used(connection, context.contract_id, participant),
        ledger_heads=mirror.ledger_heads(connection, context.contract_id, participant),
        ratios=pool.ratios(connection, contract, context.arrays, participant, earlier),
        accept_test_noise=context.accept_test_noise,
    )
    update: Update | None = None
    attempts: int | None = None
    try:
        reply = Reply.from_bytes(data)
        if reply.countersignature is not None:
            _keep_countersignature(connection, reply.countersignature, expected)
        countersigned = reply.countersignature is not None
        if reply.refusal is not None:
            kind, code, body, attempts = _refused(reply.refusal, expected, countersigned=countersigned)
        else:
            assert reply.update is not None  # noqa: S101 - Reply has one of the two
            kind, code, body, update = _decided(reply.update, array, expected, context, countersigned=countersigned)
            attempts = update.attempt if update.is_of(context.contract_id, number) else None
    except (InputError, FaultError, RejectedError) as err:
        if not last_chance:
            return "unreadable", err.code
        return miss(connection, context.contract_id, number, participant, err.code)
    record_outcome(
        connection,
        context.contract_id,
        number,
        participant,
        kind=kind,
        code=code,
        body=body,
        update_digest=None if update is None else update.update_digest,
        attempts=attempts,
    )
    return kind, code


def miss(connection: Connection, contract_id: str, number: int, participant: str, code: str) -> tuple[str, str]:
    """Log that no reply of this participant counts in the round; (kind, code)."""
    body = ReplyMissed(round=number, participant=participant, code=code)
    record_outcome(connection, contract_id, number, participant, kind="missed", code=code, body=body)
    return "missed", code


def _decided(
    envelope: Envelope[Update], array: bytes, expected: Expected, context: RunContext, *, countersigned: bool
) -> tuple[str, str, Body, Update]:
    update = open_update(envelope, expected)
    if not countersigned:
        raise RejectedError("REPLY_NOT_COUNTERSIGNED", "An update comes without a countersignature.")
    try:
        admit(update, array, expected)
    except RejectedError as err:
        kind, code = "rejected", err.code
    else:
        kind, code = "admitted", "ADMITTED"
    if code in pool.KEPT:
        write_array(context.arrays / f"{update.update_digest}.f4", array)
    receipt = Receipt(
        contract_id=expected.contract_id,
        round=expected.round,
        attempt=update.attempt,
        participant=expected.participant,
        update_digest=update.update_digest,
        decision="admitted" if kind == "admitted" else "rejected",
        code=code,
    )
    body = UpdateDecided(
        round=expected.round,
        participant=expected.participant,
        update=envelope.plain(),
        receipt=sign(receipt, context.run_key).plain(),
    )
    return kind, code, body, update


def _refused(envelope: Envelope[Refusal], expected: Expected, *, countersigned: bool) -> tuple[str, str, Body, int]:
    refusal = opened(envelope, Refusal, expected.run_key)
    place = (refusal.contract_id, refusal.round, refusal.participant)
    if place != (expected.contract_id, expected.round, expected.participant):
        raise RejectedError("REFUSAL_PLACE", "The refusal names another contract, round or participant.")
    if refusal.head not in (expected.head, EMPTY_HEAD):  # in the log it would make everybody's evidence look forged
        raise RejectedError("REFUSAL_HEAD", "The refusal names another head than the one shown, or none.")
    if refusal.head == expected.head and not countersigned:
        raise RejectedError("REPLY_NOT_COUNTERSIGNED", "A refusal names the head shown, and does not countersign it.")
    left = expected.contract.privacy.spare_attempts - expected.spares_used
    if refusal.attempts > 1 + left:
        raise RejectedError("REFUSAL_ATTEMPTS", "The refusal names more attempts than the contract has left.")
    if refusal.attempts and refusal.ledger_head in expected.ledger_heads:
        raise RejectedError("REFUSAL_LEDGER_HEAD", "The refusal names attempts, and a ledger head of before them.")
    body = UpdateRefused(round=expected.round, participant=expected.participant, refusal=envelope.plain())
    return "refused", refusal.code, body, refusal.attempts


def _keep_countersignature(connection: Connection, envelope: Envelope[Countersignature], expected: Expected) -> None:
    record = opened(envelope, Countersignature, expected.run_key)
    if (record.origin, record.size, record.root, record.participant) != (
        expected.contract_id,
        expected.head.size,
        expected.head.root,
        expected.participant,
    ):
        raise RejectedError("COUNTERSIGNATURE_HEAD", "The countersignature is on another head than the one shown.")
    logbook.add_countersignature(connection, expected.contract_id, envelope, record)


def _known_digests(connection: Connection, contract_id: str) -> frozenset[str]:
    table = db.outcomes.c
    rows = connection.execute(
        sa.select(table.update_digest).where(table.contract_id == contract_id, table.update_digest.is_not(None))
    )
    return frozenset(str(digest) for digest in rows.scalars())
