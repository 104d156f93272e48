"""What an agent believes of an order: pure checks against the contract, the log's heads that it saw, and its replies.

Nothing here reads a file, a clock or a socket. `check_head` decides whether the head shown may be countersigned;
`check_order` decides whether the order may be obeyed. Both return what follows, or raise `RefusedError`.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpact_contract import merkle
from fedpact_contract.arrays import model_digest
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.log import (
    Checkpoint,
    Countersignature,
    Proved,
    ReplyMissed,
    RoundOpened,
    UpdateDecided,
    UpdateRefused,
)
from fedpact_contract.messages import Head, HeadStep, Order, Receipt, Refusal, Update
from fedpact_contract.record import Envelope, Record, open_signed, read_envelope
from fedpact_contract.request import MAX_SKEW_SECONDS, parse_instant

EMPTY = Head(size=0, root=merkle.EMPTY_ROOT.hex())


@dataclass(frozen=True, slots=True, kw_only=True)
class Replied:
    """What this agent answered last: the round, and the update's digest or None for a refusal."""

    round: int
    update_digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What this agent knows of one contract: who signs, which heads it saw, what it answered."""

    contract: Contract
    contract_id: str
    participant: str
    run_keys: Mapping[str, str]  # party id -> run key
    heads: Sequence[Head]  # every head seen, ascending
    replied: Replied | None  # to a round before the order's
    latest: int = 0  # the latest round answered at all
    countersigned: int = 0  # size of the latest head that this agent countersigned before the one shown

    @property
    def operator_key(self) -> str:
        """The operator's run key."""
        return self.run_keys[self.contract.operator.id]


def open_order(data: bytes, known: Known) -> Order:
    """The order in an envelope, if the operator's run key signed it for this contract and participant.

    Raises:
        RefusedError: ORDER_SIGNATURE, ORDER_FORM, ORDER_ADDRESSEE.
    """
    try:
        order: Order = open_signed(read_envelope(data), Order, known.operator_key)
    except InputError as err:
        raise RefusedError("ORDER_FORM", f"The order is malformed: {err.message}") from err
    except FaultError as err:
        raise RefusedError("ORDER_SIGNATURE", "The order is not signed by the operator's run key.") from err
    if (order.contract_id, order.participant) != (known.contract_id, known.participant):
        raise RefusedError("ORDER_ADDRESSEE", "The order is for another contract or participant.")
    return order


def check_head(since: int, steps: Sequence[HeadStep], known: Known) -> tuple[Head, ...]:
    """The new heads, if they only append to every head that this agent saw.

    Args:
        since: Size of the head that the chain begins at; 0 for the empty log.
        steps: Signed checkpoints, each with its consistency proof to the one before.
        known: What the agent knows.

    Raises:
        RefusedError: HEAD_UNKNOWN_START, HEAD_SIGNATURE, HEAD_ORIGIN, HEAD_INCONSISTENT, HEAD_OLDER, HEAD_NOT_NEWER.
    """
    seen = {head.size: head.root for head in known.heads} | {0: EMPTY.root}
    if since not in seen:
        raise RefusedError("HEAD_UNKNOWN_START", "The operator's chain of heads begins where this agent never was.")
    previous = Head(size=since, root=seen[since])
    chain: dict[int, str] = {previous.size: previous.root}
    for step in steps:
        checkpoint = _checkpoint(step.checkpoint, known)
        path = [bytes.fromhex(p) for p in step.consistency]
        if not merkle.verify_consistency(
            previous.size, checkpoint.size, bytes.fromhex(previous.root), bytes.fromhex(checkpoint.root), path
        ):
            raise RefusedError(
                "HEAD_INCONSISTENT",
                "The operator's log does not continue the log that this agent saw.",
                rule="append-only log",
                remedy="Keep this agent's home as evidence and ask the other participants for their `head`.",
            )
        previous = Head(size=checkpoint.size, root=checkpoint.root)
        chain[previous.size] = previous.root
    for size, root in seen.items():
        if size > previous.size:
            raise RefusedError("HEAD_OLDER", "The operator shows an older log than this agent saw before.")
        if size > since and chain.get(size) != root:
            raise RefusedError(
                "HEAD_INCONSISTENT", "A head that this agent saw is not in the operator's log.", rule="append-only log"
            )
    if previous.size == since:
        raise RefusedError("HEAD_NOT_NEWER", "The operator shows no head beyond the one that its chain begins at.")
    return tuple(Head(size=size, root=root) for size, root in sorted(chain.items()) if size > since)


def check_results(order: Order, head: Head, known: Known) -> tuple[str | None, bool]:
    """The log's word on this agent's last reply: (logged ledger head, whether the log says that none came).

    Raises:
        RefusedError: RECEIPT_MISSING, RECEIPT_WRONG.
    """
    covering = Checkpoint(origin=known.contract_id, size=head.size, root=head.root)
    ledger_head, about_last, missed = None, False, False
    for proved in order.results:
        body = _proved_result(proved, covering, known)
        if known.replied is not None and body.round == known.replied.round:
            about_last, missed = True, isinstance(body, ReplyMissed)
            if not missed:
                _same_reply(body, known)
        if not isinstance(body, ReplyMissed):
            ledger_head = _signed_reply(body, known).ledger_head
    if known.replied is not None and not about_last:
        raise RefusedError(
            "RECEIPT_MISSING",
            f"The order has no receipt for this agent's reply of round {known.replied.round}.",
            rule="an order carries the receipt for the last reply",
        )
    return ledger_head, missed


def check_order(order: Order, model: bytes, head: Head, known: Known) -> None:
    """Raise unless the round is open in the log, from exactly this base model, for this participant.

    Raises:
        RefusedError: ROUND_NOT_OPENED, BASE_MODEL_MISMATCH, NOT_INVITED, ROUND_BACKWARDS, ROUND_BEYOND_CONTRACT.
    """
    covering = Checkpoint(origin=known.contract_id, size=head.size, root=head.root)
    try:
        order.opened.check(covering)
        opened = order.opened.entry.open()
    except FaultError as err:
        raise RefusedError("ROUND_NOT_OPENED", "The order does not prove that its round is open in the log.") from err
    if not isinstance(opened, RoundOpened) or opened.round != order.round:
        raise RefusedError("ROUND_NOT_OPENED", "The order does not prove that its round is open in the log.")
    if not opened.base_digest == order.base_digest == model_digest(model):
        raise RefusedError("BASE_MODEL_MISMATCH", "The base model is not the one that the log names for this round.")
    if order.round == 1 and order.base_digest != known.contract.model.initial_digest:
        raise RefusedError("BASE_MODEL_MISMATCH", "Round 1 does not begin at the contract's initial model.")
    if known.participant not in opened.invited:
        raise RefusedError("NOT_INVITED", "The log does not name this participant as invited to the round.")
    if order.round > known.contract.training.rounds:
        raise RefusedError("ROUND_BEYOND_CONTRACT", "The contract has fewer rounds.", rule="training.rounds")
    if order.round < known.latest:
        raise RefusedError("ROUND_BACKWARDS", "The agent answered a later round already.", rule="rounds only increase")


def check_clock(order: Order, known: Known, now: datetime.datetime) -> None:
    """Raise where this clock is far behind the moment at which the operator opened the round: it was set back.

    A term that has ended must not begin again so. The order was checked: the log names its deadline.

    Raises:
        RefusedError: CLOCK_SET_BACK.
    """
    opened = order.opened.entry.open()
    assert isinstance(opened, RoundOpened)  # noqa: S101 - as `check_order` saw
    whole = datetime.timedelta(seconds=known.contract.participation.deadline_seconds)
    behind = (parse_instant(opened.deadline) - whole - now).total_seconds()
    if behind > MAX_SKEW_SECONDS:
        raise RefusedError(
            "CLOCK_SET_BACK",
            f"This machine's clock is {behind:.0f} s behind the moment at which the operator opened the round.",
            rule=f"a clock is at most {MAX_SKEW_SECONDS} s behind the operator's",
            remedy="Set this machine's clock (NTP); `fedpact-agent preflight` compares it.",
        )


def count_witnesses(order: Order, known: Known) -> int:
    """How many other participants countersigned the head before, or a later one of this agent's own chain.

    A head older than the one that this agent itself countersigned last proves nothing of what came since.

    Raises:
        RefusedError: WITNESS_WRONG, a countersignature on a head that is not on this agent's chain.
    """
    seen = {head.size: head.root for head in known.heads}
    others = {p.id for p in known.contract.participants} - {known.participant}
    witnesses = set()
    for envelope in order.countersignatures:
        record = _countersignature(envelope, known)
        if record.size in seen and seen[record.size] != record.root:
            raise RefusedError("WITNESS_WRONG", "Another participant was shown another log.", party=record.participant)
        if record.participant in others and record.size in seen and record.size >= known.countersigned:
            witnesses.add(record.participant)
    return len(witnesses)


def _checkpoint(envelope: Envelope[Checkpoint], known: Known) -> Checkpoint:
    try:
        checkpoint = open_signed(envelope, Checkpoint, known.operator_key)
    except (FaultError, InputError) as err:
        raise RefusedError("HEAD_SIGNATURE", "A checkpoint is not signed by the operator's run key.") from err
    if checkpoint.origin != known.contract_id:
        raise RefusedError("HEAD_ORIGIN", "A checkpoint is of another contract's log.")
    return checkpoint


def _proved_result(proved: Proved, covering: Checkpoint, known: Known) -> Any:  # noqa: ANN401 - one of three bodies
    try:
        proved.check(covering)
        body = proved.entry.open()
    except FaultError as err:
        raise RefusedError("RECEIPT_WRONG", f"A receipt is not in the log: {err.message}") from err
    if not isinstance(body, UpdateDecided | UpdateRefused | ReplyMissed) or body.participant != known.participant:
        raise RefusedError("RECEIPT_WRONG", "An entry shown as a receipt is not about this participant.")
    return body


def _signed_reply(body: UpdateDecided | UpdateRefused, known: Known) -> Update | Refusal:
    key = known.run_keys[known.participant]
    kind: type[Update] | type[Refusal] = Update if isinstance(body, UpdateDecided) else Refusal
    plain = body.update if isinstance(body, UpdateDecided) else body.refusal
    reply: Update | Refusal = _open(plain, kind, key)
    return reply


def _same_reply(body: UpdateDecided | UpdateRefused, known: Known) -> None:
    replied = known.replied
    assert replied is not None  # noqa: S101 - the caller compared rounds
    if isinstance(body, UpdateRefused):
        if replied.update_digest is not None:
            raise RefusedError("RECEIPT_WRONG", "The log says that this agent refused; it sent an update.")
        return
    receipt = _open(body.receipt, Receipt, known.operator_key)
    update = _signed_reply(body, known)
    same = (
        isinstance(update, Update)
        and receipt.update_digest == update.update_digest == replied.update_digest
        and (receipt.round, receipt.participant) == (replied.round, known.participant)
    )
    if not same:
        raise RefusedError("RECEIPT_WRONG", "The receipt is for another update than this agent sent.")


def _countersignature(envelope: Envelope[Countersignature], known: Known) -> Countersignature:
    try:
        record = Countersignature.from_bytes(envelope.body)
        key = known.run_keys.get(record.participant, "")
        record = open_signed(envelope, Countersignature, key)
    except (FaultError, InputError) as err:
        raise RefusedError("WITNESS_WRONG", "A countersignature shown does not verify.") from err
    if record.origin != known.contract_id:
        raise RefusedError("WITNESS_WRONG", "A countersignature shown is of another log.")
    return record


def _open(plain: dict[str, Any], kind: type[Any], key: str) -> Any:  # noqa: ANN401 - an instance of `kind`
    try:
        return open_signed(read_envelope(plain), kind, key)
    except (FaultError, InputError) as err:
        name = kind.TYPE if issubclass(kind, Record) else "record"
        raise RefusedError("RECEIPT_WRONG", f"A {name} in the log is not signed as it should be.") from err
