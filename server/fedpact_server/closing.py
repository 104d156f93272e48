"""Closing a period: openings, settlement, the closing checkpoint, and who countersigned it.

`close` is final for a participant's line when that participant has countersigned the closing checkpoint; the line of
one that has not is held, the others are paid (trust.md, "Closing").
"""

from dataclasses import dataclass

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError, RejectedError
from fedpact_contract.log import (
    Body,
    Countersignature,
    Findings,
    FindingsOpened,
    Moments,
    MomentsOpened,
    PeriodClosing,
    PeriodSettled,
    RevenueRecorded,
    RoundScores,
    RunCompleted,
    ScoresCommitted,
    ScoresOpened,
    SettledLine,
    commitment,
)
from fedpact_contract.parties import opened
from fedpact_contract.questions import review_due
from fedpact_contract.record import Envelope
from fedpact_contract.settlement import PeriodResult, settle_period, settle_unopened
from fedpact_server import db, defences, logbook, scoring
from fedpact_server.run_state import rounds_kept, run_row, unions_by_round

ENDED = ("completed", "stopped")
"""Phases of a run whose committed rounds can be settled."""
PERIOD = 1
"""The spine settles a whole run as one period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosingState:
    """Where the close stands: the closing checkpoint's size, who signed it, whose line is still held."""

    size: int
    signed: tuple[str, ...]
    held: tuple[str, ...]


def preview(
    connection: Connection, contract: Contract, revenue_fen: int, fees_fen: int, *, unopened: bool = False
) -> PeriodResult:
    """What the settlement of a run that has ended would be, over the rounds that were committed.

    Args:
        connection: A transaction.
        contract: The contract.
        revenue_fen: The period's revenue.
        fees_fen: What is taken off it first.
        unopened: Settle without the scores, by the contract's fallback: the operator cannot open what it committed to.

    Raises:
        InputError: the run goes on, no round was committed, the fees exceed the revenue, or OPENINGS_INTACT.
        FaultError: OPENING_MISSING, OPENING_MISMATCH: the kept scores are not those that the log commits to.
    """
    return _work_out(connection, contract, revenue_fen, fees_fen, unopened=unopened)[0]


def _work_out(
    connection: Connection, contract: Contract, revenue_fen: int, fees_fen: int, *, unopened: bool
) -> tuple[PeriodResult, list[Body]]:
    """What is settled, and the openings that it rests on."""
    run = run_row(connection, contract.id)
    if run is None or run.phase not in (*ENDED, "closing", "closed"):
        where = "was never started" if run is None else f"is {run.phase}"
        raise InputError(
            "SETTLE_RUN_NOT_ENDED",
            f"The run {where}: only a run that has ended can be settled.",
            remedy="`fedpact run status` says where it stands; `fedpact run stop` ends it.",
        )
    if logbook.last_of(connection, contract.id, RunCompleted.TYPE) is None:
        why = f" ({run.detail})" if run.detail else ""
        raise InputError(
            "SETTLE_NO_ROUND", f"The run ended{why} before a round was committed: there is nothing to share."
        )
    if run.phase not in ENDED:
        unopened = logbook.last_of(connection, contract.id, MomentsOpened.TYPE) is None
    if unopened and run.phase in ENDED:
        _really_lost(connection, contract.id)
    if unopened:
        standing, admitted = unions_by_round(connection, contract.id), _admitted_rounds(connection, contract.id)
        unions = [standing[number] for number in range(1, len(admitted) + 1)]
        return settle_unopened(contract, admitted, revenue_fen, fees_fen, unions), []
    rounds, findings, moments = _openings(connection, contract.id)
    result = settle_period(contract, [o.scores for o in rounds], moments.moments, revenue_fen, fees_fen)
    return result, [*rounds, *findings, moments]


def settle(
    connection: Connection,
    contract: Contract,
    key: Ed25519PrivateKey,
    revenue_fen: int,
    fees_fen: int,
    *,
    unopened: bool = False,
) -> PeriodResult:
    """Open every commitment, record revenue and settlement, and sign the closing checkpoint, as one transaction.

    The same amounts again change nothing: whoever was cut off while waiting for countersignatures may ask again.

    Raises:
        InputError, FaultError: as `preview`; or settled before with other amounts.
        RefusedError: SETTLE_REVIEW_DUE, negative values ask for a review that is not agreed.
    """
    result, openings = _work_out(connection, contract, revenue_fen, fees_fen, unopened=unopened)
    run = run_row(connection, contract.id)
    if run is None or run.phase not in ENDED:
        settled = _settled(connection, contract.id)
        if (settled.revenue_fen, settled.fees_fen) != (revenue_fen, fees_fen):
            raise InputError(
                "SETTLE_TWICE",
                "This period is settled already, with other amounts; a correction is an entry of the next period.",
                rule="one settlement for a period",
                remedy="`fedpact settle statement` shows what was settled.",
            )
        return result
    if waits := defences.waits_for_review(connection, contract, review_due(contract, result.shares)):
        raise waits
    bodies = [
        *openings,
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


def recorded(connection: Connection, contract_id: str) -> RevenueRecorded | None:
    """The amounts by which the period was settled; None before it was."""
    settled = logbook.last_of(connection, contract_id, PeriodSettled.TYPE) is not None
    return _settled(connection, contract_id) if settled else None


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


def _openings(
    connection: Connection, contract_id: str
) -> tuple[list[ScoresOpened], list[FindingsOpened], MomentsOpened]:
    """The openings of every commitment in the log: scores, findings, second moments.

    Raises:
        FaultError: one is missing, or is not what was committed to.
    """
    promised: dict[str, str] = {}
    for entry in logbook.read_entries(connection, contract_id):
        if entry.type == ScoresCommitted.TYPE:
            promised[f"round {entry.body['round']}"] = str(entry.body["commitment"])
            if entry.body.get("findings"):
                promised[f"the findings of round {entry.body['round']}"] = str(entry.body["findings"])
        elif entry.type == RunCompleted.TYPE:
            promised["the second moments"] = str(entry.body.get("commitment"))
    rounds, kept = scoring.all_scores(connection, contract_id), scoring.opened_moments(connection, contract_id)
    found = {f"round {scores.round}": commitment(RoundScores, salt, scores) for salt, scores in rounds}
    findings = scoring.all_findings(connection, contract_id)
    found |= {f"the findings of round {said.round}": commitment(Findings, salt, said) for salt, said in findings}
    if kept is not None:
        found["the second moments"] = commitment(Moments, *kept)
    for what, value in promised.items():
        if found.get(what) != value:
            raise FaultError(
                "OPENING_MISMATCH" if what in found else "OPENING_MISSING",
                f"What is kept for {what} is not what the log commits to.",
                field=what,
                rule="an opening matches its commitment",
                remedy="Restore a backup; where there is none, `fedpact settle close --unopened` pays by the fallback.",
            )
    assert kept is not None  # noqa: S101 - an ended run with rounds has an entry that asks for them
    opened_rounds = [ScoresOpened(round=scores.round, salt=salt.hex(), scores=scores) for salt, scores in rounds]
    opened_findings = [FindingsOpened(round=said.round, salt=salt.hex(), findings=said) for salt, said in findings]
    return opened_rounds, opened_findings, MomentsOpened(salt=kept[0].hex(), moments=kept[1])


def _really_lost(connection: Connection, contract_id: str) -> None:
    """Raise where everything can be opened: the fallback is for lost scores, not for scores that somebody dislikes.

    Raises:
        InputError: OPENINGS_INTACT.
    """
    try:
        _openings(connection, contract_id)
    except FaultError:
        return
    raise InputError(
        "OPENINGS_INTACT",
        "Every commitment in the log can be opened: there is nothing that the fallback stands in for.",
        field="--unopened",
        remedy="`fedpact settle close` without it pays by what was measured.",
    )


def _admitted_rounds(connection: Connection, contract_id: str) -> list[tuple[str, ...]]:
    """Who was admitted, for each round that led to a model."""
    return [body.admitted for body in rounds_kept(connection, contract_id)]


def _paid(connection: Connection, contract_id: str) -> set[str]:
    """Whose countersignature the close waits for: who is paid; where nobody is, whoever took part."""
    body = _last(connection, contract_id, PeriodSettled.TYPE)
    assert isinstance(body, PeriodSettled)  # noqa: S101 - selected by its type
    paid = {line.participant for line in body.lines if line.fen > 0}
    return paid or {p for admitted in _admitted_rounds(connection, contract_id) for p in admitted}


def _settled(connection: Connection, contract_id: str) -> RevenueRecorded:
    body = _last(connection, contract_id, RevenueRecorded.TYPE)
    assert isinstance(body, RevenueRecorded)  # noqa: S101 - selected by its type
    return body


def _last(connection: Connection, contract_id: str, kind: str) -> Body:
    """The log's last entry of a type that it is known to have."""
    entry = logbook.last_of(connection, contract_id, kind)
    assert entry is not None  # noqa: S101 - a closing run has it
    return entry.open()
