"""What the operator does about gaming beside the round loop: readmissions, unions, the review of negative values.

Each appends its entry inside a transaction that the caller opened; so does a participant's answer. What the entries
mean is `fedpact_contract.replay_defences` (docs/adr/0008).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract, Defences
from fedpact_contract.defended import said
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.log import (
    Body,
    Entry,
    Finding,
    ParticipantExcluded,
    ParticipantReadmitted,
    PeriodSettled,
    ReviewOpened,
    StatementTaken,
    UnionConfirmed,
    UnionDeclared,
    UnionWithdrawn,
)
from fedpact_contract.messages import Statement
from fedpact_contract.output import counted
from fedpact_contract.parties import Place, opened
from fedpact_contract.questions import Asking, Negatives, Question, agreed, answered
from fedpact_contract.record import Envelope
from fedpact_contract.replay_defences import unlike
from fedpact_contract.request import instant, parse_instant
from fedpact_server import logbook, scoring
from fedpact_server.run_state import run_row, sign_between_rounds

B = TypeVar("B", bound=Body)

KINDS: tuple[type[Body], ...] = (
    ParticipantExcluded,
    ParticipantReadmitted,
    UnionDeclared,
    UnionConfirmed,
    UnionWithdrawn,
    ReviewOpened,
    StatementTaken,
    PeriodSettled,
)
"""The entries that say where the defences stand."""


@dataclass(slots=True, kw_only=True)
class Standing:
    """Where the defences stand: who is excluded, since which round; unions pending and confirmed; the open review."""

    excluded: dict[str, int] = field(default_factory=dict)
    pending: dict[tuple[str, ...], Question[UnionDeclared]] = field(default_factory=dict)
    unions: dict[tuple[str, ...], Question[UnionDeclared]] = field(default_factory=dict)
    review: Question[ReviewOpened] | None = None
    settled: bool = False

    @property
    def questions(self) -> list[Question[Asking]]:
        """What still asks participants."""
        found: list[Question[Asking]] = [*self.pending.values()]
        return [] if self.settled else [*found, *([] if self.review is None else [self.review])]

    def asked(self, participant: str) -> list[Question[Asking]]:
        """What asks this participant, answered or not."""
        return [question for question in self.questions if question.asks(participant)]

    def waiting(self, participant: str) -> list[str]:
        """The subjects that it has not answered."""
        return [question.subject for question in self.asked(participant) if participant not in question.answers]

    def union_of(self, participant: str) -> Question[UnionDeclared] | None:
        """The union, pending or confirmed, that it is in."""
        found = (*self.pending.values(), *self.unions.values())
        return next((question for question in found if participant in question.body.members), None)


def standing(connection: Connection, contract: Contract) -> Standing:
    """Read the log for where the defences stand; nothing where the contract has none."""
    state = Standing()
    if contract.defences is None:
        return state
    for index, entry in logbook.entries_of(connection, contract.id, KINDS):
        _take(state, index, entry, entry.open())
    return state


def _take(state: Standing, index: int, entry: Entry, body: Body) -> None:
    place, subject = Place(index=index, type=entry.type), entry.leaf_hash.hex()
    if isinstance(body, ParticipantExcluded):
        state.excluded[body.participant] = body.round
    elif isinstance(body, ParticipantReadmitted):
        state.excluded.pop(body.participant, None)
    elif isinstance(body, UnionDeclared):
        state.pending[body.members] = Question(body=body, place=place, subject=subject)
    elif isinstance(body, UnionConfirmed):
        state.unions[body.members] = state.pending.pop(body.members)
    elif isinstance(body, UnionWithdrawn):
        state.pending.pop(body.members, None)
        state.unions.pop(body.members, None)
    elif isinstance(body, ReviewOpened):
        state.review = Question(body=body, place=place, subject=subject)
    elif isinstance(body, PeriodSettled):
        state.settled = True
    elif isinstance(body, StatementTaken):
        record = said(body.statement)
        for question in state.questions:
            if question.subject == record.subject:
                question.answers[body.participant] = record


def alarms(connection: Connection, contract: Contract) -> list[Finding]:
    """What the detectors raised in the rounds so far: the operator's alone until the close."""
    kept = scoring.all_findings(connection, contract.id)
    return [line for _, said in kept for line in said.lines if line.outcome == "alarm"]


def readmit(
    connection: Connection, contract: Contract, key: Ed25519PrivateKey, participant: str, reason: str
) -> ParticipantReadmitted:
    """Let an excluded participant train again, from the next round on.

    Raises:
        InputError: DEFENCES_NOT_CONTRACTED, READMISSION, REASON_FORM.
        RefusedError: RUN_ENDED.
    """
    _going_on(connection, contract)
    name = contract.participant(participant).name
    if participant not in standing(connection, contract).excluded:
        raise InputError(
            "READMISSION",
            "The participant is not excluded.",
            party=name,
            remedy="`fedpact run status` shows who is.",
        )
    body = ParticipantReadmitted.parse({"participant": participant, "reason": reason}, code="REASON_FORM")
    return _appended(connection, contract, key, body)


def declare(
    connection: Connection,
    contract: Contract,
    key: Ed25519PrivateKey,
    members: Sequence[str],
    reason: str,
    now: datetime,
) -> UnionDeclared:
    """Hold these participants to be one; they may dispute it for as long as the contract says.

    Raises:
        InputError: DEFENCES_NOT_CONTRACTED, UNION_MEMBERS, UNION_NO_ROUND, UNION_UNFOUNDED, REASON_FORM.
        RefusedError: RUN_ENDED.
    """
    defences = _going_on(connection, contract)
    if len(members) != len(set(members)) or len(members) < 2:
        raise InputError(
            "UNION_MEMBERS", "A union is at least two different participants.", field="MEMBER", remedy="Name each once."
        )
    state = standing(connection, contract)
    for member in members:
        if (known := state.union_of(member)) is not None:
            raise InputError(
                "UNION_MEMBERS",
                f"The participant is in a union already: {names(contract, known.body.members)}.",
                field="MEMBER",
                party=contract.participant(member).name,
                remedy="`fedpact union withdraw` ends that one; then declare the larger one.",
            )
    found = [said for _, said in scoring.all_findings(connection, contract.id)]
    if not found:
        raise InputError(
            "UNION_NO_ROUND",
            "No round has been scored yet: a union rests on a NEAR_COPY alarm.",
            remedy="`fedpact run status` says where the run stands.",
        )
    for member in unlike(members, found):
        raise InputError(
            "UNION_UNFOUNDED",
            "No NEAR_COPY alarm so far names this participant with another of these.",
            field="MEMBER",
            party=contract.participant(member).name,
            rule="NEAR_COPY",
            remedy="`fedpact contribution alarms` shows who is alike.",
        )
    values = {
        "round": found[-1].round,
        "members": sorted(members),
        "declared": instant(now),
        "until": instant(now + timedelta(hours=defences.dispute_hours)),
        "reason": reason,
    }
    return _appended(connection, contract, key, UnionDeclared.parse(values, code="REASON_FORM"))


def confirm(
    connection: Connection,
    contract: Contract,
    key: Ed25519PrivateKey,
    member: str,
    reason: str | None,
    now: datetime,
) -> UnionConfirmed:
    """Count a declared union once from the next round on, after the time to dispute it.

    Raises:
        InputError: DEFENCES_NOT_CONTRACTED, UNION_NOT_DECLARED, UNION_DISPUTED, REASON_FORM.
        RefusedError: RUN_ENDED, UNION_WINDOW.
    """
    _going_on(connection, contract)
    state = standing(connection, contract)
    question = state.union_of(member)
    if question is None or question.body.members not in state.pending:
        raise InputError(
            "UNION_NOT_DECLARED",
            "No declared union with this participant waits to be confirmed.",
            field="MEMBER",
            party=contract.participant(member).name,
            remedy="`fedpact run status` shows the unions; `fedpact union declare` declares one.",
        )
    body = question.body
    if now < parse_instant(body.until):
        raise RefusedError(
            "UNION_WINDOW",
            f"The union can be disputed until {body.until}; it is {instant(now)}.",
            rule="defences.dispute_hours",
            remedy="Confirm it then, or withdraw it.",
        )
    if reason is None and (disputed := question.said("dispute")):
        raise InputError(
            "UNION_DISPUTED",
            f"The union is disputed by {names(contract, disputed)}: {_reasons(question)}.",
            field="--reason",
            remedy="Say why it is confirmed all the same (--reason), or withdraw it.",
        )
    values: dict[str, Any] = {"members": body.members, "at": instant(now), "reason": reason}
    return _appended(connection, contract, key, UnionConfirmed.parse(values, code="REASON_FORM"))


def withdraw(
    connection: Connection, contract: Contract, key: Ed25519PrivateKey, member: str, reason: str
) -> UnionWithdrawn:
    """End a union, declared or confirmed, from the next round on.

    Raises:
        InputError: DEFENCES_NOT_CONTRACTED, UNION_NOT_DECLARED, REASON_FORM.
        RefusedError: RUN_ENDED.
    """
    _going_on(connection, contract)
    question = standing(connection, contract).union_of(member)
    if question is None:
        raise InputError(
            "UNION_NOT_DECLARED",
            "The participant is in no union.",
            field="MEMBER",
            party=contract.participant(member).name,
            remedy="`fedpact run status` shows the unions.",
        )
    values = {"members": question.body.members, "reason": reason}
    return _appended(connection, contract, key, UnionWithdrawn.parse(values, code="REASON_FORM"))


def open_review(
    connection: Connection, contract: Contract, key: Ed25519PrivateKey, due: Negatives | None, period: int, text: str
) -> ReviewOpened:
    """Put the operator's review of negative values before the participants; it takes the place of an earlier one.

    Args:
        connection: A transaction.
        contract: The contract.
        key: The operator's run key.
        due: What the settlement finds (`questions.review_due`).
        period: The period.
        text: What the operator found out.

    Raises:
        InputError: DEFENCES_NOT_CONTRACTED, REVIEW_NOT_DUE, REVIEW_FORM.
        RefusedError: REVIEW_SETTLED, REVIEW_AGREED.
    """
    defences = _clause(contract)
    state = standing(connection, contract)
    if state.settled:
        raise RefusedError("REVIEW_SETTLED", "The period is settled already; nothing is reviewed any more.")
    if due is None:
        raise InputError(
            "REVIEW_NOT_DUE",
            f"Negative values are not above {defences.negatives} of the total value, or contribution is not paid.",
            rule="defences.negatives",
            remedy="`fedpact settle close` needs no review.",
        )
    if state.review is not None and agreed(contract, state.review):
        raise RefusedError(
            "REVIEW_AGREED", "The participants have agreed to a review.", remedy="Go on: `fedpact settle close`."
        )
    values = {"period": period, "negative": due.participants, "ratio": str(due.ratio), "text": text}
    return _appended(connection, contract, key, ReviewOpened.parse(values, code="REVIEW_FORM"))


def waits_for_review(connection: Connection, contract: Contract, due: Negatives | None) -> RefusedError | None:
    """Why the period cannot be settled yet (SETTLE_REVIEW_DUE); None where no review is due, or it is agreed."""
    state = standing(connection, contract)
    review = state.review
    if due is None or state.settled or (review is not None and agreed(contract, review)):
        return None
    return RefusedError(
        "SETTLE_REVIEW_DUE",
        f"{due_words(contract, due)} {review_words(contract, review)}",
        party=names(contract, due.participants),
        rule="defences.negatives",
        remedy="Look into their data with them, then `fedpact contribution review RUN --text TEXT`."
        if review is None
        else "Wait for answers (`fedpact-agent answer`), or open another review, which takes this one's place.",
    )


def due_words(contract: Contract, due: Negatives) -> str:
    """Why a review is due, in a sentence."""
    part = "" if contract.defences is None else f", above the contract's {contract.defences.negatives}"
    return (
        f"Values of {names(contract, due.participants)} are negative: together "
        f"{float(due.ratio):.3f} of the total value{part}."
    )


def review_words(contract: Contract, review: Question[ReviewOpened] | None) -> str:
    """How far the review is, in a sentence."""
    if review is None:
        return "No review of it is opened yet."
    others = len(contract.participants) - len(review.body.negative)
    agree = set(review.said("agree")) - set(review.body.negative)
    disputed = review.said("dispute")
    said = f"; disputed by {names(contract, disputed)}: {_reasons(review)}" if disputed else ""
    return f"The review is agreed to by {len(agree)} of {counted(others, 'other participant')}{said}."


def take_statement(
    connection: Connection,
    contract: Contract,
    key: Ed25519PrivateKey,
    participant: str,
    envelope: Envelope[Statement],
) -> int:
    """Log a participant's answer to an open question; the same one again changes nothing. The entry's index.

    Raises:
        FaultError: not signed by the caller's contract key alone.
        InputError: malformed.
        RefusedError: STATEMENT_MISMATCH, STATEMENT_SUBJECT, STATEMENT_TWICE, STATEMENT_REASON.
    """
    record: Statement = opened(envelope, Statement, contract.participant(participant).key)
    for index, entry in logbook.entries_of(connection, contract.id, (StatementTaken,)):
        if said(entry.body["statement"]) == record:
            return index
    answered(record, contract.id, participant, standing(connection, contract).questions)
    body = StatementTaken(participant=participant, statement=envelope.plain())
    (index,) = logbook.append(connection, contract.id, [body])
    sign_between_rounds(connection, contract.id, key)
    return index


def names(contract: Contract, participants: Sequence[str]) -> str:
    """Participants by name, for people."""
    return ", ".join(contract.participant(p).name for p in participants)


def _reasons(question: Question[Any]) -> str:
    """The disputes' reasons."""
    return "; ".join(question.answers[p].reason or "" for p in question.said("dispute"))


def _clause(contract: Contract) -> Defences:
    if contract.defences is None:
        raise InputError(
            "DEFENCES_NOT_CONTRACTED",
            "The contract has no defences against gaming: nothing of them may change who is invited or what is paid.",
            field="defences",
            remedy="A new contract with a [defences] clause has them.",
        )
    return contract.defences


def _going_on(connection: Connection, contract: Contract) -> Defences:
    """The clause, while the run goes on: what is entered here holds from the next round on."""
    defences, run = _clause(contract), run_row(connection, contract.id)
    if run is None or run.phase != "running":
        raise RefusedError(
            "RUN_ENDED",
            f"The run {'was never started' if run is None else f'is {run.phase}'}: no next round would go by it.",
            remedy="`fedpact run status` says where it stands.",
        )
    return defences


def _appended(connection: Connection, contract: Contract, key: Ed25519PrivateKey, body: B) -> B:
    logbook.append(connection, contract.id, [body])
    sign_between_rounds(connection, contract.id, key)
    return body
