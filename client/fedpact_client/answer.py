"""From an order to its reply: what the guard does with one message, without pipes, processes or clocks of its own.

The order of things is the order of trust: whose order is it, does its head continue what this agent saw, is the
receipt for the last reply there, is the round really open from this base model, do contract and policy allow it now,
do the rows hold no more copies than allowed (read, and nothing of them leaves), is there budget. Only then is data
trained on. A refusal is a recorded result: its code leaves, its reason stays.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Protocol

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client import order as checks
from fedpact_client.policy import (
    CLAUSES,
    ORDER_CLAUSES,
    DataSetUse,
    Policy,
    check,
    check_data_set,
    check_entities,
)
from fedpact_client.review import check_code
from fedpact_client.store import STATE_CODES, Ready, Reservation, SeenHead, Store
from fedpact_contract import ledger
from fedpact_contract.arrays import update_digest, update_salt
from fedpact_contract.canonical import parse_canonical
from fedpact_contract.contract import Contract, MeasurementKind, SignedContract
from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError
from fedpact_contract.log import Countersignature
from fedpact_contract.messages import Head, Metering, Order, Refusal, Reply, Update, update_event
from fedpact_contract.parties import NOT_YET, parties_of
from fedpact_contract.record import Envelope, sign

log = structlog.get_logger()


class TrainerLostError(FedpactError):
    """The trainer's process ended without an answer: the attempt stays charged, a spare one may follow."""


class TrainingFailedError(FedpactError):
    """The trainer answered that data or output do not allow it: charged, refused, never tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the trainer gave: the update (little-endian float32), how its noise was made, by what its rows are known."""

    update: bytes
    noise: str
    fingerprints: tuple[str, ...]


class Train(Protocol):
    """Trains one attempt; the guard gives the real trainer, tests a double."""

    def __call__(self, contract: Contract, round_number: int, attempt: int, base: bytes) -> Trained:
        """The update of one attempt.

        Raises:
            TrainingFailedError: data or output do not allow it.
            TrainerLostError: the process ended without an answer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What answering needs: ledgers, this contract's keys, the policy, the trainer, a clock.

    `entity` is the column that agent.toml declares for the contract's data set: whose a row is. `own_file` holds the
    data set's file against the others' (`cards.check_own_file`) and gives the fingerprints of its place. `own_rows`
    holds the rows against the contract's `max_duplicates` (InputError, DATA_DUPLICATES) and, before the first attempt,
    against the data set's own rules (RefusedError, QUALITY_GATE: this code leaves, and nothing else of it).
    """

    store: Store
    contract: Contract
    contract_id: str
    participant: str
    run_keys: dict[str, str]
    run_key: Ed25519PrivateKey
    policy: Policy
    entity: str | None
    own_file: Callable[[], tuple[str, ...]]
    own_rows: Callable[[], None]
    train: Train
    now: Callable[[], datetime.datetime]

    @property
    def data_set(self) -> str:
        """The data set that this contract trains on."""
        return self.contract.participant(self.participant).data_set

    def check_allowed(self, number: int, kind: MeasurementKind | None = None) -> None:
        """Nobody here has stopped it, the code is the contract's, agent.toml allows it now. Before anything is charged.

        Args:
            number: The round, 0 for a measurement. One of which an attempt is charged is finished, whatever the hour.
            kind: Of a measurement.

        Raises:
            RefusedError: PARTICIPANT_PAUSED, PARTICIPANT_WITHDRAWN, CODE_MODELS_MISMATCH, POLICY_*,
                DATA_SET_KNOWN_ELSEWHERE, or what `policy.check_entities` refuses.
            InputError: CONFIG_DATA_SET, agent.toml has lost the data set.
        """
        self.store.check_running(self.contract_id)
        check_code(self.contract)
        here = self._tries(number, kind)
        check(self.contract, self.participant, self.policy, self.now(), CLAUSES if here else ORDER_CLAUSES)
        card = self.store.data_set(self.data_set).declaration
        check_entities(self.contract, self.policy, self.data_set, self.entity, card.entity)
        self.own_file()

    def check_use(self, number: int, kind: MeasurementKind | None = None) -> None:
        """One attempt more keeps the policy's limits for the data set over all contracts; none is, after the last one.

        Raises:
            RefusedError: POLICY_DATA_SET_EPSILON, POLICY_DATA_SET_USES.
        """
        limits = (self.policy.max_data_set_epsilon, self.policy.max_data_set_uses)
        if limits == (None, None) or "spent" in self._tries(number, kind):
            return
        terms, known = self.store.contract(self.contract_id).terms, self.store.data_set(self.data_set)
        cost = sum((m.rdp for m in terms.measurements if m.kind == kind), Decimal(0)) if kind else terms.rdp
        with localcontext(ledger.UPWARD):
            charged = ledger.charged(self.store.rows(self.data_set)) + cost
        uses = self.store.uses(self.data_set) + 1
        use = DataSetUse(data_set=self.data_set, uses=uses, rdp=charged, delta=known.delta, alpha=known.alpha)
        check_data_set(self.policy, use)

    def _tries(self, number: int, kind: MeasurementKind | None) -> list[str]:
        """The states of the ledger's rows on a round, or a measurement."""
        wanted = (self.contract_id, number, kind)
        return [r.state for r in self.store.rows(self.data_set) if (r.contract_id, r.round, r.kind) == wanted]

    def know_again(self, trained: Trained) -> None:
        """Enter what was trained on as this data set's. Before anything leaves.

        Raises:
            RefusedError: DATA_SET_KNOWN_ELSEWHERE, another data set has these rows: nothing is entered.
        """
        self.store.add_version(self.data_set, *self.own_file(), *trained.fingerprints)

    def known(self, before: int, shown: int = 0) -> checks.Known:
        """What this agent knows of the contract's log, and its last reply to a round before this one.

        `shown` is the size of the head that the order shows: what was countersigned before it counts.
        """
        seen = self.store.heads(self.contract_id)
        heads = [Head(size=h.size, root=h.root) for h in seen]
        answers = self.store.answers(self.contract_id)
        earlier = [number for number in answers if number < before]
        replied = None
        if earlier:
            digest = self.store.sent_updates(self.contract_id).get(earlier[-1])
            replied = checks.Replied(round=earlier[-1], update_digest=digest)
        return checks.Known(
            contract=self.contract,
            contract_id=self.contract_id,
            participant=self.participant,
            run_keys=self.run_keys,
            heads=heads,
            replied=replied,
            latest=max(answers, default=0),
            countersigned=max((h.size for h in seen if h.countersigned and h.size < shown), default=0),
        )


def open_contract(signed: SignedContract, participant: str) -> tuple[Contract, dict[str, str]]:
    """The contract and each party's run key, if everybody signed and delegated.

    Raises:
        RefusedError: CONTRACT_NOT_SIGNED, naming the party; CONTRACT_NOT_A_PARTY.
        FaultError: a signature or delegation that is there and does not hold.
    """
    contract = Contract.from_bytes(signed.contract.body)
    if participant not in contract.by_id():
        raise RefusedError(
            "CONTRACT_NOT_A_PARTY",
            "This enterprise is not a participant of the contract.",
            remedy="Do not take part: only a participant that the contract names does.",
        )
    parties, faults = parties_of(signed)
    for fault in faults:
        if fault.code not in NOT_YET:
            raise fault
    if parties is None or faults:
        raise RefusedError(
            "CONTRACT_NOT_SIGNED",
            "A party has not signed the contract yet.",
            party=faults[0].party,
            remedy="Wait until every party has signed; `fedpact-agent contract list` shows who has.",
        )
    return contract, parties.run_keys


def answer(desk: Desk, data: bytes, model: bytes, bundle: str) -> Ready | None:
    """The reply to one order, durable in the outbox; None where nothing may be answered.

    Args:
        desk: The agent's side.
        data: The signed order's canonical bytes.
        model: The base model, little-endian float64.
        bundle: Digest of the bundle that Flower sent along (its code never runs here).
    """
    try:
        order = checks.open_order(data, desk.known(0))
    except RefusedError as err:
        signed = err.code == "ORDER_ADDRESSEE"  # other bytes are nobody's word: they accuse nobody, and are not kept
        _alarm(desk, err.code, "an order without the operator's word for this agent", data if signed else None)
        log.warning("order without the operator's word", code=err.code)
        return None
    try:
        head, missed = _check_log(desk, order)
    except (RefusedError, FaultError) as err:
        return _refuse(desk, order, err, head=None, evidence=data)
    if missed:
        _alarm(desk, "REPLY_LATE", f"the log says that no reply came before {order.round}", None)
    try:
        _check_terms(desk, order, model, head, bundle)
    except (RefusedError, FaultError, InputError) as err:
        return _refuse(desk, order, err, head=head, evidence=data)
    try:
        desk.own_rows()
    except InputError as err:
        code = err.code if err.code in BEFORE_ROWS else FAILED
        return _refuse(desk, order, err, head=head, evidence=data, code=code)
    except RefusedError as err:  # the gate, or a person who stopped it while the rows were read
        return _refuse(desk, order, err, head=head, evidence=data)
    return _train(desk, order, model, head)


def _check_log(desk: Desk, order: Order) -> tuple[Head, bool]:
    """Keep the heads shown, if they continue what was seen and show the receipt; the newest one."""
    known = desk.known(order.round)
    heads = checks.check_head(order.since, order.heads, known)
    head = heads[-1]
    ledger_head, missed = checks.check_results(order, head, known)
    if ledger_head is not None:
        desk.store.check_logged_head(desk.data_set, ledger_head)
    checkpoints = {step_size(step.checkpoint.body): step.checkpoint.to_bytes() for step in order.heads}
    desk.store.add_heads(
        desk.contract_id, [SeenHead(size=h.size, root=h.root, checkpoint=checkpoints[h.size]) for h in heads]
    )
    for proved in order.results:
        desk.store.add_result(desk.contract_id, int(proved.entry.body["round"]), proved.entry.to_bytes())
    return head, missed


def step_size(body: bytes) -> int:
    """Size of a checkpoint from its canonical bytes (verified by the caller)."""
    return int(parse_canonical(body, what="checkpoint")["size"])


def _check_terms(desk: Desk, order: Order, model: bytes, head: Head, bundle: str) -> None:
    known = desk.known(order.round, head.size)
    witnesses = checks.count_witnesses(order, known)
    threshold = desk.contract.participation.head_threshold
    if order.round > 1 and witnesses < threshold:
        text = f"round {order.round}: {witnesses} of {threshold} countersignatures on the head before"
        _alarm(desk, "HEAD_FEW_WITNESSES", text, None)
        if desk.contract.participation.strict_heads:
            raise RefusedError("HEAD_FEW_WITNESSES", text)
    checks.check_order(order, model, head, known)
    checks.check_clock(order, known, desk.now())
    if bundle != desk.contract.code.shell_digest:
        raise RefusedError("CODE_BUNDLE_MISMATCH", "The bundle that Flower carries is not the contracted one.")
    desk.check_allowed(order.round)


def _train(desk: Desk, order: Order, model: bytes, head: Head) -> Ready | None:
    """Transaction 1, training, transaction 2; a lost trainer is another attempt while there are spares."""
    while True:
        try:
            desk.check_use(order.round)
            reserved = desk.store.reserve(desk.contract_id, order.round, order.base_digest, desk.run_key)
        except RefusedError as err:
            return _refuse(desk, order, err, head=head, evidence=b"")
        if isinstance(reserved, Ready):
            return reserved
        try:
            trained = desk.train(desk.contract, order.round, reserved.attempt, model)
            desk.know_again(trained)
            return _complete(desk, order, reserved, trained, head)
        except TrainerLostError as err:
            desk.store.add_alarm("TRAINER_LOST", desk.contract_id, f"round {order.round}: {err.message}")
            log.warning("trainer lost", round=order.round, attempt=reserved.attempt)
            continue
        except (TrainingFailedError, RefusedError, InputError) as err:
            return _fail(desk, order, reserved, err, head)


def _complete(desk: Desk, order: Order, reserved: Reservation, trained: Trained, head: Head) -> Ready:
    array = trained.update + update_salt(desk.contract)
    digest = update_digest(array)

    def build(ledger_head: str) -> tuple[bytes, bytes]:
        update = Update(
            contract_id=desk.contract_id,
            round=order.round,
            attempt=reserved.attempt,
            participant=desk.participant,
            base_digest=order.base_digest,
            update_digest=digest,
            num_examples=desk.contract.participant(desk.participant).num_examples,
            privacy_event=update_event(desk.contract),
            noise="csprng" if trained.noise == "csprng" else "test",
            metering=Metering(
                rows=desk.contract.participant(desk.participant).num_examples,
                steps=desk.contract.training.local_steps,
            ),
            ledger_head=ledger_head,
            head=head,
        )
        reply = Reply(update=sign(update, desk.run_key), countersignature=_countersignature(desk, head))
        return reply.to_bytes(), array

    desk.store.countersign(desk.contract_id, head.size, head.root)
    return desk.store.complete(reserved, build, digest, desk.run_key)


BEFORE_ROWS = frozenset(
    {
        "DATA_SOURCE_AWAY",
        "DATA_SOURCE_LOGIN",
        "DATA_SOURCE_PASSWORD",
        "DATA_DRIVER_MISSING",
        "DATA_QUERY",
        "DATA_QUERY_WRITES",
    }
)
"""What keeps a database from answering a query: no row has anything to do with it, so it costs nothing and may be told.
"""
FAILED = "TRAINING_FAILED"
"""The one code with which a failed attempt is refused: which fault it was may rest on a single row, and stays here.

An attempt that a person here ended is refused with that: it is charged all the same, and the round is not tried again.
"""


WANTED = frozenset({*STATE_CODES.values(), "POLICY_HOURS"})
"""Codes of what this enterprise itself wants to be refused: no alarm for a person."""


def _fail(desk: Desk, order: Order, reserved: Reservation, err: FedpactError, head: Head) -> Ready:
    log.warning("training failed", round=order.round, code=err.code, reason=str(err))
    desk.store.add_alarm(err.code, desk.contract_id, str(err))
    desk.store.countersign(desk.contract_id, head.size, head.root)
    code = err.code if err.code in WANTED else FAILED
    return desk.store.fail(reserved, err.code, lambda row: _refusal(desk, order, code, row, head), desk.run_key)


def _refuse(
    desk: Desk, order: Order, err: FedpactError, *, head: Head | None, evidence: bytes, code: str | None = None
) -> Ready | None:
    """A refusal that costs nothing; where an update answers this order already, nothing more is said.

    `code` is what leaves in place of the error's own.
    """
    log.warning("order refused", round=order.round, code=err.code, reason=str(err))
    if err.code not in WANTED:
        _alarm(desk, err.code, str(err), evidence or None)
    if head is not None:
        desk.store.countersign(desk.contract_id, head.size, head.root)
    try:
        return desk.store.refuse(
            desk.contract_id,
            order.round,
            order.base_digest,
            lambda row: _refusal(desk, order, code or err.code, row, head),
        )
    except RefusedError as taken:
        log.warning("no second answer", round=order.round, code=taken.code)
        return None


def _alarm(desk: Desk, code: str, detail: str, evidence: bytes | None) -> None:
    """Keep an alarm, once: whoever hands over orders can hand over the same one for ever."""
    new = (code, desk.contract_id, detail, evidence)
    if all((a.code, a.contract_id, a.detail, a.evidence) != new for a in desk.store.alarms()):
        desk.store.add_alarm(code, desk.contract_id, detail, evidence)


def _refusal(desk: Desk, order: Order, code: str, ledger_head: str, head: Head | None) -> bytes:
    refusal = Refusal(
        contract_id=desk.contract_id,
        round=order.round,
        participant=desk.participant,
        code=code,
        attempts=_attempts(desk, order.round),
        ledger_head=ledger_head,
        head=head or checks.EMPTY,
    )
    signature = None if head is None else _countersignature(desk, head)
    return Reply(refusal=sign(refusal, desk.run_key), countersignature=signature).to_bytes()


def _attempts(desk: Desk, round_number: int) -> int:
    """Attempts at this round that the ledger has charged."""
    rows = desk.store.rows(desk.data_set)
    return sum(r.contract_id == desk.contract_id and r.round == round_number and r.state == "reserved" for r in rows)


def _countersignature(desk: Desk, head: Head) -> Envelope[Countersignature]:
    record = Countersignature(origin=desk.contract_id, size=head.size, root=head.root, participant=desk.participant)
    return sign(record, desk.run_key)
