"""Entries of the log that ask participants for a person's answer: declared unions, and reviews of negative values.

Whoever replays a log and the operator that takes an answer go by the same rules.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Generic, Literal, TypeVar

from fedpact_contract.contract import Contract
from fedpact_contract.errors import RefusedError
from fedpact_contract.log import ReviewOpened, UnionDeclared
from fedpact_contract.messages import Statement
from fedpact_contract.parties import Place
from fedpact_contract.shares import PeriodShares

Asking = UnionDeclared | ReviewOpened
B = TypeVar("B", UnionDeclared, ReviewOpened, Asking, covariant=True)


@dataclass(slots=True, kw_only=True)
class Question(Generic[B]):
    """An entry that asks: where it stands, the leaf hash by which answers name it, and the answers by participant."""

    body: B
    place: Place
    subject: str
    answers: dict[str, Statement] = field(default_factory=dict)
    confirmed: str | None = None  # of a union: when, as the operator says

    def asks(self, participant: str) -> bool:
        """A union asks its members, a review every participant."""
        return not isinstance(self.body, UnionDeclared) or participant in self.body.members

    def said(self, answer: Literal["agree", "dispute"]) -> tuple[str, ...]:
        """Who answered so, in the order of ids."""
        return tuple(sorted(p for p, record in self.answers.items() if record.answer == answer))


def answered(
    record: Statement, contract_id: str, participant: str, asked: Iterable[Question[Asking]]
) -> Question[Asking]:
    """The open question that a statement of this participant answers.

    Raises:
        RefusedError: STATEMENT_MISMATCH, STATEMENT_SUBJECT, STATEMENT_TWICE, STATEMENT_REASON.
    """
    if (record.contract_id, record.participant) != (contract_id, participant):
        raise RefusedError(
            "STATEMENT_MISMATCH", "The statement is another contract's, or in another participant's name."
        )
    found = next((q for q in asked if q.subject == record.subject and q.asks(participant)), None)
    if found is None:
        raise RefusedError(
            "STATEMENT_SUBJECT",
            "The statement is about no entry that asks this participant, or that still asks.",
            field="subject",
            remedy="`fedpact-agent questions CONTRACT` shows what waits for an answer.",
        )
    if participant in found.answers:
        raise RefusedError(
            "STATEMENT_TWICE",
            "The participant has answered this entry already; an answer stands.",
            field="subject",
            rule="one answer of a participant to an entry",
        )
    if record.answer == "dispute" and record.reason is None:
        raise RefusedError(
            "STATEMENT_REASON", "A dispute names no reason.", field="reason", remedy="Give one: --reason TEXT."
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Negatives:
    """Whose values are negative, in the order of ids, and their sum over v(N), without its sign."""

    participants: tuple[str, ...]
    ratio: Fraction


def review_due(contract: Contract, paid: PeriodShares) -> Negatives | None:
    """The negative values, where they are more than the contract's part of v(N) and contribution is paid by."""
    if contract.defences is None or paid.reason != "reliable":
        return None
    negative = {line.participant: -line.value for line in paid.lines if line.value < 0}
    ratio = Fraction(sum(negative.values())) / paid.total_value
    if ratio <= Fraction(contract.defences.negatives):
        return None
    return Negatives(participants=tuple(negative), ratio=ratio)


def agreed(contract: Contract, review: Question[ReviewOpened]) -> bool:
    """Whether more than half of the participants that the review does not name have agreed to it."""
    others = contract.by_id().keys() - set(review.body.negative)
    return 2 * len(others & set(review.said("agree"))) > len(others)
