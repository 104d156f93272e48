"""What participants say of their own taking part: notices, revoked run keys, and what was destroyed at a withdrawal.

Each is appended inside a transaction that the caller opened. It holds from its entry on: an order that went out before
is answered by a refusal, or not at all.
"""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract
from fedpact_contract.errors import RefusedError
from fedpact_contract.leaving import KINDS, Standing, standings
from fedpact_contract.log import (
    Body,
    DestructionStated,
    KeyRevoked,
    NoticeTaken,
    RoundAggregated,
    RoundDiscarded,
    affected_models,
)
from fedpact_contract.messages import DestructionReceipt, Held, KeyRevocation, Notice, RoundDigest
from fedpact_contract.parties import opened
from fedpact_contract.record import Envelope, sign
from fedpact_contract.replay_leaving import check_notice, check_revocation
from fedpact_server import db, logbook
from fedpact_server.run_state import run_keys, run_row, sign_between_rounds, signed_contract

EVIDENCE = "SCORES_AND_REEVALUATION"
"""Why admitted updates are kept: scores, which pay the participant, and an auditor's re-evaluation rest on them."""
LEDGER = "SIGNED_EVIDENCE"
KEY_REVOKED = "KEY_REVOKED"
"""The code of a reply that came, or was due, when its key was revoked already."""


def standing(connection: Connection, contract_id: str) -> dict[str, Standing]:
    """Where the participants stand that said anything of it."""
    return standings(logbook.entries_of(connection, contract_id, KINDS))


def signing_key(connection: Connection, contract: Contract, participant: str) -> str:
    """What a participant signs with beside its replies: its run key, once that is revoked its contract key."""
    found = standing(connection, contract.id).get(participant)
    if found is not None and found.revoked is not None:
        return contract.participant(participant).key
    return run_keys(signed_contract(connection, contract.id), contract)[participant]


def check_not_gone(connection: Connection, contract: Contract, participant: str) -> None:
    """Nothing new is taken of a participant that withdrew or revoked its run key.

    Raises:
        RefusedError: PARTICIPANT_GONE.
    """
    found = standing(connection, contract.id).get(participant)
    if found is not None and found.gone:
        raise RefusedError("PARTICIPANT_GONE", f"{contract.participant(participant).name}: {found.shown}.")


def take_notice(
    connection: Connection,
    contract: Contract,
    key: Ed25519PrivateKey,
    participant: str,
    envelope: Envelope[Notice],
    arrays: Path,
) -> int:
    """Log a notice, and at a withdrawal what is destroyed here; the index. What is said already is not said twice.

    Args:
        connection: A write transaction.
        contract: The contract.
        key: The operator's run key.
        participant: Who sends it.
        envelope: The signed notice.
        arrays: Where the contract's updates lie.

    Raises:
        InputError: CONTRACT_NOT_SIGNED.
        RefusedError: RUN_CLOSED; NOTICE_MISMATCH, NOTICE_OLD, NOTICE_WITHDRAWN.
        FaultError: not signed by the participant's key that counts now.
    """
    notice = opened(envelope, Notice, signing_key(connection, contract, participant))
    known = standing(connection, contract.id).get(participant)
    last = None if known is None else known.notice
    if last is not None and last.state == notice.state and notice.is_of(contract.id, participant):
        assert known is not None and known.index is not None  # noqa: PT018, S101 - it stands beside the notice
        return known.index
    _still_open(connection, contract.id)
    check_notice(notice, contract.id, participant, last)
    bodies: list[Body] = [NoticeTaken(participant=participant, notice=envelope.plain())]
    if notice.state == "withdrawn":
        receipt = sign(_destroy(connection, contract, participant, arrays), key)
        bodies.append(DestructionStated(participant=participant, receipt=receipt.plain()))
    index, *_ = logbook.append(connection, contract.id, bodies)
    sign_between_rounds(connection, contract.id, key)
    return index


def take_revocation(
    connection: Connection,
    contract: Contract,
    key: Ed25519PrivateKey,
    participant: str,
    envelope: Envelope[KeyRevocation],
) -> int:
    """Log that a run key signs nothing any more, by its contract key; the index. Again changes nothing.

    Raises:
        InputError: CONTRACT_NOT_SIGNED.
        RefusedError: RUN_CLOSED, REVOCATION_MISMATCH.
        FaultError: not signed by the contract key.
    """
    record = opened(envelope, KeyRevocation, contract.participant(participant).key)
    keys = run_keys(signed_contract(connection, contract.id), contract)
    check_revocation(record, contract, participant, keys[participant])
    known = standing(connection, contract.id).get(participant)
    if known is not None and known.revoked is not None:
        return known.revoked
    _still_open(connection, contract.id)
    body = KeyRevoked(participant=participant, revocation=envelope.plain())
    (index,) = logbook.append(connection, contract.id, [body])
    sign_between_rounds(connection, contract.id, key)
    return index


def take_receipt(
    connection: Connection,
    contract: Contract,
    key: Ed25519PrivateKey,
    participant: str,
    envelope: Envelope[DestructionReceipt],
) -> int | None:
    """Log what a participant that has withdrawn destroyed at its side; the index, None where it was logged before.

    Raises:
        InputError: CONTRACT_NOT_SIGNED.
        RefusedError: RUN_CLOSED, RECEIPT_MISMATCH.
        FaultError: not signed by the participant's key that counts now.
    """
    record = opened(envelope, DestructionReceipt, signing_key(connection, contract, participant))
    known = standing(connection, contract.id).get(participant)
    place = (record.contract_id, record.participant, record.by)
    if known is None or not known.withdrawn or place != (contract.id, participant, "participant"):
        raise RefusedError(
            "RECEIPT_MISMATCH", "The receipt is of another contract or participant, or of one that has not withdrawn."
        )
    if any(receipt.by == "participant" for receipt in known.receipts):
        return None
    _still_open(connection, contract.id)
    body = DestructionStated(participant=participant, receipt=envelope.plain())
    (index,) = logbook.append(connection, contract.id, [body])
    sign_between_rounds(connection, contract.id, key)
    return index


def models_with(connection: Connection, contract_id: str, participant: str) -> list[RoundDigest]:
    """Every model version from the first round on that an update of the participant's entered."""
    bodies = logbook.bodies_of(connection, contract_id, (RoundAggregated, RoundDiscarded))
    return [RoundDigest(round=r.round, digest=r.model_digest) for r in affected_models(bodies, participant)]


def receipts(connection: Connection, contract_id: str, participant: str) -> list[dict[str, Any]]:
    """The signed receipts of what was destroyed at a participant's withdrawal, as they stand in the log."""
    bodies = logbook.bodies_of(connection, contract_id, (DestructionStated,))
    return [b.receipt for b in bodies if isinstance(b, DestructionStated) and b.participant == participant]


def _destroy(connection: Connection, contract: Contract, participant: str, arrays: Path) -> DestructionReceipt:
    """Delete the updates that entered no model, and say what is kept and why."""
    table = db.outcomes.c
    rows = connection.execute(
        sa.select(table.round, table.kind, table.update_digest)
        .where(table.contract_id == contract.id, table.participant == participant, table.update_digest.is_not(None))
        .order_by(table.round)
    ).all()
    admitted = tuple(RoundDigest(round=int(r.round), digest=str(r.update_digest)) for r in rows if r.kind == "admitted")
    refused = {str(r.update_digest) for r in rows} - {update.digest for update in admitted}
    files = [path for digest in sorted(refused) if (path := arrays / f"{digest}.f4").exists()]
    for path in files:
        path.unlink()
    return DestructionReceipt(
        contract_id=contract.id,
        participant=participant,
        by="operator",
        destroyed=(Held(kind="updates-rejected", count=len(files)),),
        kept=(
            Held(kind="updates-admitted", count=len(admitted), reason=EVIDENCE),
            Held(kind="replies-in-the-log", count=len(rows), reason=LEDGER),
        ),
        updates=admitted,
        models=tuple(models_with(connection, contract.id, participant)),
    )


def _still_open(connection: Connection, contract_id: str) -> None:
    run = run_row(connection, contract_id)
    if run is not None and run.phase in ("closing", "closed"):
        raise RefusedError("RUN_CLOSED", "The contract's run is closed: its log takes nothing more.")
