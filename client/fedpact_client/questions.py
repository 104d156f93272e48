"""What the operator's log asks this enterprise, and a person's signed answer. Nothing here happens by itself.

An entry that asks is shown as it stands in the log. The answer names it by its leaf hash: it can be taken for no other
one. Whether the entry is true is recomputed at the close, by this agent and everybody else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpact_client.api import OperatorClient, contract_path, reply_error
from fedpact_client.home import AgentHome
from fedpact_client.store import EgressKind
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.log import Entry, ReviewOpened, UnionDeclared
from fedpact_contract.messages import Statement
from fedpact_contract.record import sign

Answer = Literal["agree", "dispute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An entry that asks this enterprise, its leaf hash, and the answers so far as the operator tells them."""

    body: UnionDeclared | ReviewOpened
    subject: str
    answers: dict[str, str]

    def plain(self, contract: Contract, own: str) -> dict[str, Any]:
        """As plain values, parties by name."""

        def names(ids: Sequence[str]) -> list[str]:
            return [contract.participant(p).name for p in ids]

        body = self.body
        common = {
            "subject": self.subject,
            "answered": self.answers.get(own),
            "answers": {contract.participant(p).name: answer for p, answer in self.answers.items()},
        }
        if isinstance(body, UnionDeclared):
            terms = {"members": names(body.members), "round": body.round, "until": body.until, "reason": body.reason}
            return {"kind": "union"} | common | terms
        named = {"negative": names(body.negative), "ratio": body.ratio, "text": body.text}
        return {"kind": "review"} | common | named


def fetch(client: OperatorClient, contract: Contract, own: str) -> list[Asked]:
    """What asks this enterprise now, answered or not.

    Raises:
        ServiceError: the operator does not answer, or not in this form.
    """
    found = client.get(_path(contract.id), contract_id=contract.id).get("questions")
    if not isinstance(found, list):
        raise reply_error("questions is no list")
    return [_asked(item, contract, own) for item in found]


def choose(asked: Sequence[Asked], prefix: str) -> Asked:
    """The one question whose subject begins so.

    Raises:
        InputError: QUESTION_UNKNOWN.
    """
    found = [question for question in asked if prefix and question.subject.startswith(prefix)]
    if len(found) != 1:
        known = ", ".join(question.subject[:12] for question in asked) or "nothing asks"
        raise InputError(
            "QUESTION_UNKNOWN",
            f"{'No question begins' if not found else 'More than one question begins'} with {prefix[:64]}.",
            field="--subject",
            remedy=f"Open now: {known}. `fedpact-agent questions CONTRACT` shows them.",
        )
    return found[0]


def prepare(contract: Contract, own: str, asked: Asked, answer: Answer, reason: str | None) -> Statement:
    """The statement to be signed.

    Raises:
        InputError: STATEMENT_REASON, a dispute without one; STATEMENT_FORM.
    """
    if answer == "dispute" and not reason:
        raise InputError(
            "STATEMENT_REASON",
            "A dispute needs a reason: the operator has to answer it.",
            field="--reason",
            remedy="Give one: --reason TEXT. Everybody who reads the log sees it.",
        )
    values = {
        "contract_id": contract.id,
        "participant": own,
        "subject": asked.subject,
        "answer": answer,
        "reason": reason or None,
    }
    return Statement.parse(values, code="STATEMENT_FORM")


def send(home: AgentHome, client: OperatorClient, record: Statement, passphrase: bytes) -> int:
    """Sign a statement with the contract key and send it; the index of the entry that holds it.

    Raises:
        InputError: a wrong passphrase; the operator does not take it.
        RefusedError: the operator refuses it: STATEMENT_TWICE, STATEMENT_SUBJECT.
        ServiceError: the operator does not answer; the same command again sends the same bytes.
    """
    envelope = sign(record, home.load_contract_key(passphrase))
    body = {"statement": envelope.plain()}
    index = client.post(_path(record.contract_id), body, EgressKind.STATEMENT, contract_id=record.contract_id).get(
        "index"
    )
    if not isinstance(index, int):
        raise reply_error("index is no number")
    return index


def _path(contract_id: str) -> str:
    return f"{contract_path(contract_id)}/questions"


def _asked(item: object, contract: Contract, own: str) -> Asked:
    """One question as the operator serves it."""
    if not isinstance(item, dict) or not isinstance(item.get("answers"), dict):
        raise reply_error("a question is no entry with its answers")
    try:
        entry = Entry.parse(item.get("entry"), code="ENTRY_FORM")
        body = entry.open()
    except (InputError, FaultError) as err:
        raise reply_error(f"a question is no entry of the log: {err.message}") from err
    known = contract.by_id()
    named = body.members if isinstance(body, UnionDeclared) else body.negative if isinstance(body, ReviewOpened) else ()
    if not isinstance(body, UnionDeclared | ReviewOpened) or not {*named, *item["answers"]} <= known.keys():
        raise reply_error("a question is about something else than this contract's participants")
    if isinstance(body, UnionDeclared) and own not in body.members:
        raise reply_error("a question is about a union that this enterprise is not in")
    if not all(answer in ("agree", "dispute") for answer in item["answers"].values()):
        raise reply_error("an answer is neither agree nor dispute")
    return Asked(body=body, subject=entry.leaf_hash.hex(), answers=dict(item["answers"]))
