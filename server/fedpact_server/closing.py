"""Closing a period: openings, settlement, the closing checkpoint, and who countersigned it.

`close` is final for a participant's line when that participant has countersigned the closing checkpoint; the line of
one that has not is held, the others are paid (trust.md, "Closing").
"""

from dataclasses import dataclass

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, InputError, RejectedError
from fedpact_contract.log import (
    Body,
    Countersignature,
    MomentsOpened,
    PeriodClosing,
    PeriodSettled,
    RevenueRecorded,
    ScoresOpened,
    SettledLine,
)
from fedpact_contract.parties import opened
from fedpact_contract.record import Envelope
from fedpact_contract.settlement import PeriodResult, settle_period
from fedpact_server import db, logbook, scoring
from fedpact_server.run_state import run_row

PERIOD = 1
"""The spine settles a whole run as one period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosingState:
    """Where the close stands: the closing checkpoint's size, who signed it, whose line is still held."""

    size: int
    signed: tuple[str, ...]
    held: tuple[str, ...]


def preview(connection: Connection, contract: Contract, revenue_fen: int, fees_fen: int) -> PeriodResult:
    """What the settlement of a completed run would be.

    Raises:
        InputError: the run is not completed (a stopped one never will be), or the fees exceed the revenue.
    """
    run = run_row(connection, contract.id)
    if run is None or run.phase not in ("completed", "closing", "closed"):
        where = "was never started" if run is None else f"is {run.phase}"
        why = f" ({run.detail})" if run is not None and run.phase == "stopped" and run.detail else ""
        raise InputError(
            "SETTLE_RUN_NOT_COMPLETED",
            f"The run {where}{why}: only a completed run can be settled.",
            remedy="`fedpact run status` says where it stands; a run that was stopped stays unsettled.",
        )
    rounds = [scores for _, scores in scoring.all_scores(connection, contract.id)]
    moments = scoring.opened_moments(connection, contract.id)
    if moments is None:
        raise FailedError("MOMENTS_MISSING", "The completed run has no second moments; restore a backup.")
    return settle_period(contract, rounds, moments[1], revenue_fen, fees_fen)


def settle(
    connection: Connection, contract: Contract, key: Ed25519PrivateKey, revenue_fen: int, fees_fen: int
) -> PeriodResult:
    """Open every commitment, record revenue and settlement, and sign the closing checkpoint, as one transaction.

    The same amounts again change nothing: whoever was cut off while waiting for countersignatures may ask again.

    Raises:
        InputError: not completed, or settled before with other amounts.
    """
    result = preview(connection, contract, revenue_fen, fees_fen)
    run = run_row(connection, contract.id)
    if run is None or run.phase != "completed":
        settled = _settled(connection, contract.id)
        if (settled.revenue_fen, settled.fees_fen) != (revenue_fen, fees_fen):
            raise InputError(
                "SETTLE_TWICE",
                "This period is settled already, with other amounts; a correction is an entry of the next period.",
                rule="one settlement for a period",
                remedy="`fedpact settle statement` shows what was settled.",
            )
        return result
    moments = scoring.opened_moments(connection, contract.id)
    assert moments is not None  # noqa: S101 - `preview` has checked it
    opened = [
        ScoresOpened(round=scores.round, salt=salt.hex(), scores=scores)
        for salt, scores in scoring.all_scores(connection, contract.id)
    ]
    bodies = [
        *opened,
        MomentsOpened(salt=moments[0].hex(), moments=moments[1]),
        RevenueRecorded(period=PERIOD, revenue_fen=revenue_fen, fees_fen=fees_fen),
        PeriodSettled(
            period=PERIOD,
            pool_fen=result.pool_fen,
            basis=result.basis,
            lines=tuple(SettledLine(participant=line.participant, fen=line.fen) for line in result.lines),
        ),
        PeriodClosing(period=PERIOD),
    ]
    logbook.append(connection, contract.id, bodies)
    logbook.checkpoint(connection, contract.id, key)
    connection.execute(db.runs.update().where(db.runs.c.contract_id == contract.id).values(phase="closing"))
    return result


def countersign(
    connection: Connection, contract: Contract, run_keys: dict[str, str], envelope: Envelope[Countersignature]
) -> ClosingState:
    """Take a participant's countersignature on the closing checkpoint.

    Raises:
        InputError: the run is not closing.
        FaultError: not signed by that participant's run key, once, and by nobody else.
        RejectedError: in another's name, or on another head than the closing one.
    """
    record = Countersignature.from_bytes(envelope.body)
    if record.participant not in run_keys:
        raise RejectedError(
            "CLOSING_PARTY", "The countersignature is in another participant's name.", party=record.participant
        )
    opened(envelope, Countersignature, run_keys[record.participant])
    hashes = logbook.leaves(connection, contract.id)
    if (record.origin, record.size, record.root) != (contract.id, len(hashes), logbook.root_of(hashes)):
        raise RejectedError(
            "CLOSING_HEAD", "The countersignature is not on the closing checkpoint.", party=record.participant
        )
    logbook.add_countersignature(connection, contract.id, envelope, record)
    state = closing_state(connection, contract)
    if not state.held:
        connection.execute(db.runs.update().where(db.runs.c.contract_id == contract.id).values(phase="closed"))
    return state


def closing_state(connection: Connection, contract: Contract) -> ClosingState:
    """Who has countersigned the closing checkpoint.

    Raises:
        InputError: the run is not closing.
    """
    run = run_row(connection, contract.id)
    if run is None or run.phase not in ("closing", "closed"):
        raise InputError("CLOSING_NOT_OPEN", "The period is not being closed.")
    size = logbook.size(connection, contract.id)
    signed = {p for tree_size, p, _ in logbook.countersignatures(connection, contract.id) if tree_size == size}
    paid = _paid(connection, contract.id)
    return ClosingState(size=size, signed=tuple(sorted(signed)), held=tuple(sorted(paid - signed)))


def objections(connection: Connection, contract_id: str) -> tuple[str, ...]:
    """Participants that objected to a closing checkpoint of this contract."""
    table = db.objections.c
    rows = connection.execute(sa.select(table.participant).where(table.contract_id == contract_id).distinct())
    return tuple(sorted(str(row.participant) for row in rows))


def _paid(connection: Connection, contract_id: str) -> set[str]:
    body = _last(connection, contract_id, PeriodSettled.TYPE)
    assert isinstance(body, PeriodSettled)  # noqa: S101 - selected by its type
    return {line.participant for line in body.lines if line.fen > 0}


def _settled(connection: Connection, contract_id: str) -> RevenueRecorded:
    body = _last(connection, contract_id, RevenueRecorded.TYPE)
    assert isinstance(body, RevenueRecorded)  # noqa: S101 - selected by its type
    return body


def _last(connection: Connection, contract_id: str, kind: str) -> Body:
    """The log's last entry of a type that it is known to have."""
    entry = logbook.last_of(connection, contract_id, kind)
    assert entry is not None  # noqa: S101 - a closing run has it
    return entry.open()
