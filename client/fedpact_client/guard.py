"""The guard: the agent's trusted process. It starts the executor (Flower) and the trainer (data), and answers orders.

It has no torch, no data and no Flower. Its two children have one pipe each, to the guard; they die with it. Orders
come one at a time; between them it looks for new signatures and for a period that is closing. Nothing that a child,
or the operator, sends ends it.
"""

import contextlib
import datetime
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import structlog

from fedpact_client import leaving, loading, sandbox, silence
from fedpact_client.answer import Desk, Trained, answer, open_contract
from fedpact_client.api import AnsweredInputError, AnsweredRefusedError, OperatorClient, egress_of, printable
from fedpact_client.cards import check_own_file
from fedpact_client.children import CancelledError, ExecutorChild, TrainerChild
from fedpact_client.closing import Closing, close, note_waiting
from fedpact_client.config import AgentConfig
from fedpact_client.executor import EXIT_REFUSED, EXIT_RETRY, EXIT_UNAVAILABLE, NO_REPLY, ORDER_FORM
from fedpact_client.facts import ROUNDS, Connection, Facts, RoundTime, cut_off, milliseconds, place_of
from fedpact_client.frames import Frame, FrameError
from fedpact_client.home import AgentHome
from fedpact_client.measuring import measure
from fedpact_client.signing import fetch_signed
from fedpact_client.store import Agreement, EgressKind, HomeLock, Ready, Store
from fedpact_contract.canonical import canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.contract import Contract, SignedContract
from fedpact_contract.errors import FailedError, FedpactError, InputError, RefusedError, ServiceError
from fedpact_contract.files import private_files
from fedpact_contract.messages import Found, TakingPart
from fedpact_contract.record import Part, read_envelope
from fedpact_contract.request import instant, utc_now

log = structlog.get_logger()

TELL_SECONDS = 1.0
"""How often the guard looks whether a person paused or withdrew while it waits for orders."""
ORDER_SECONDS = 0.5
"""How long the guard waits for an order before it looks whether anything else is due."""
RESTART_SECONDS = {EXIT_UNAVAILABLE: 2.0, EXIT_REFUSED: 2.0}
"""Before the executor starts again, by how it ended: a connection that was lost may be had again at once."""
OTHER_RESTART_SECONDS = 5.0
NOT_LET_IN_SECONDS = (2.0, 10.0)
"""The same where the operator did not let the node in: doubling from the first to the second. An earlier connection of
the node expires within a minute."""
NOT_LET_IN = (
    "the operator does not let this agent in yet: it holds an earlier connection of it, for up to a minute, or has not "
    "approved it"
)
HEARD_FOR_GOOD = {
    *("RUN_CLOSED", "PARTICIPANT_GONE"),
    *("NOTICE_WITHDRAWN", "NOTICE_MISMATCH", "RECEIPT_MISMATCH", "REVOCATION_MISMATCH"),
}
"""With these the operator takes what it is told neither now nor later; everything else is said again."""
LONG_SECONDS, SELDOM_SECONDS = 3600.0, 60.0
"""So long after the last order the operator is asked about a contract so seldom: each question is in the ledger."""
OBJECTED_SECONDS = 60.0
"""Before evidence that was objected to is fetched and verified again."""


class OrderFrame(Part):
    """What the executor hands over with a model: a signed order's text, and the digest of Flower's bundle."""

    order: str
    bundle: str


def run(
    home_path: Path,
    ready: Callable[[str, str], None] = lambda _url, _participant: None,
    waits: Callable[[str], None] = lambda _reason: None,
) -> int:
    """Run the agent until SIGTERM or Ctrl-C; returns the exit code.

    Args:
        home_path: The agent's home.
        ready: Told once, when the operator has let the agent in: the operator's address, this participant's id.
        waits: Told why, each time that the operator begins not to let the agent in.

    Raises:
        InputError: HOME_LOCKED, HOME_IN_INSTALLATION, NOT_ENROLLED, or a fault in the configuration.
    """
    home = AgentHome(home_path.expanduser().absolute()).check()
    sandbox.check_home(home.path)
    config = home.config()
    witness = None if config.paths.witness is None else Path(config.paths.witness)
    own = home.participant_id
    with private_files(), HomeLock(home.path), Store(home.db_path, witness=witness, participant=own) as store:
        return Guard(home=home, config=config, store=store, ready=ready, waits=waits).run()


def restart_seconds(exit_code: int | None, refused: int) -> float:
    """How long to wait before the executor starts again.

    Args:
        exit_code: How the last one ended.
        refused: How often in a row, before that, the operator did not let the node in.
    """
    if exit_code == EXIT_RETRY:
        shortest, longest = NOT_LET_IN_SECONDS
        return min(longest, shortest * float(1 << min(refused, 10)))
    return OTHER_RESTART_SECONDS if exit_code is None else RESTART_SECONDS.get(exit_code, OTHER_RESTART_SECONDS)


@dataclass(slots=True)
class Guard:
    """One running agent. `ready` is told once that the operator has let it in; `now` is the clock."""

    home: AgentHome
    config: AgentConfig
    store: Store
    ready: Callable[[str, str], None] = lambda _url, _participant: None
    waits: Callable[[str], None] = lambda _reason: None
    now: Callable[[], datetime.datetime] = utc_now
    trainer: TrainerChild = field(init=False)
    executor: ExecutorChild = field(init=False)
    place: str | None = field(init=False)
    stopping: bool = False
    desks: dict[str, Desk] = field(default_factory=dict)
    closings: dict[str, Closing | None] = field(default_factory=dict)  # by contract: what was verified
    quiet: dict[str, float] = field(default_factory=dict)  # by contract: when to look at its close again
    last_order: float = field(default_factory=time.monotonic)
    measured: set[str] = field(default_factory=set)  # contracts whose measurements are done with
    restart_at: float | None = None  # when the executor, which has ended, starts again
    refused: int = 0  # how often in a row the operator did not let the node in
    connected: str | None = None  # since when
    announced: bool = False  # whether `ready` was told
    told: dict[str, tuple[TakingPart, str]] = field(default_factory=dict)  # by contract: what the operator knows
    next_tell: float = 0.0
    training: float = 0.0  # seconds that the trainer took for the order at hand
    rounds: deque[RoundTime] = field(default_factory=lambda: deque(maxlen=ROUNDS))
    facts: Facts | None = None  # as last written

    def __post_init__(self) -> None:
        self.place = place_of(self.home)
        self.trainer = TrainerChild(
            home=self.home, config=self.config, key=self.home.selection_key(), interrupt=self._interrupt
        )
        self.executor = ExecutorChild(home=self.home, config=self.config, node=cut_off(self.home))

    def run(self) -> int:
        """Start both children, answer orders, end them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        client = OperatorClient.of_home(self.home, egress_of(self.store))
        loading.sweep(self.home)
        try:
            for child in (self.trainer, self.executor):
                with contextlib.suppress(FrameError):  # it ended at once: it is started again where it is needed
                    child.start()
            log.info("agent started", participant=self.home.participant_id)
            self.loop(client)
        finally:
            self.executor.stop()
            self.trainer.stop()
            client.close()
        return 0

    def loop(self, client: OperatorClient) -> None:
        """Answer orders and look after contracts, until the agent is to stop."""
        next_look = 0.0
        while not self.stopping:
            if time.monotonic() >= next_look:
                self._look(client)
                next_look = time.monotonic() + self.config.network.poll_seconds
            self._tell(client)
            if self.executor.alive:
                self._serve_one(client)
            else:
                self._restart_executor()
            self.trainer.look()
            self._publish()

    def _publish(self) -> None:
        """Note what changed, for `status`; say once that the agent is connected and serves."""
        if not (self.executor.alive and self.executor.connected):
            self.connected = None
        elif self.connected is None:
            self.connected, self.refused = instant(self.now()), 0
            log.info("connected", operator=self.config.operator.url)
        facts = Facts(
            process=os.getpid(),
            connected=self.connected,
            waiting=NOT_LET_IN if self.refused and self.connected is None else None,
            connection=self._connection(),
            trainer=self.trainer.isolation,
            executor=self.executor.isolation,
            loader=self.trainer.loader,
            rounds=tuple(self.rounds),
        )
        if facts != self.facts:
            self.facts = facts
            try:
                facts.write(self.home)
            except OSError as err:  # nothing is decided by it
                log.warning("state not written", reason=err.strerror)
        if self.connected and not self.announced:
            self.announced = True
            self.ready(self.config.operator.url, self.home.participant_id)

    def _connection(self) -> Connection | None:
        node, place = self.executor.node, self.place
        return None if node is None or place is None else Connection(node=node, place=place)

    def _restart_executor(self) -> None:
        """Start the executor again, after a pause."""
        now = time.monotonic()
        if self.restart_at is None:
            self.executor.stop()
            self.restart_at = now + restart_seconds(self.executor.exit_code, self.refused)
            self.refused = self.refused + 1 if self.executor.exit_code == EXIT_RETRY else 0
            if self.refused == 1:
                self.waits(NOT_LET_IN)
        if now < self.restart_at:
            time.sleep(min(0.2, self.restart_at - now))
            return
        self.restart_at = None
        why = NOT_LET_IN if self.executor.exit_code == EXIT_RETRY else None
        log.warning("executor restarts", exit_code=self.executor.exit_code, reason=why)
        try:
            self.executor.start()
        except (FrameError, FailedError) as err:  # it ended at once, or no process can be had now
            log.error("executor not started", code=err.code, reason=str(err))

    def _serve_one(self, client: OperatorClient) -> None:
        """Answer one order, if one arrives soon."""
        try:
            frame = self.executor.receive(ORDER_SECONDS)
            if frame is None:
                return
            malformed = frame.kind == "malformed"
            ready = None if malformed else self._answer(client, _order(frame), frame.array)
            if ready is None:
                record_no_reply(self.store, ORDER_FORM if malformed else NO_REPLY)
                self.executor.send("drop", {})
            else:
                self.executor.send("reply", {"reply": ready.reply.decode()}, ready.array)
        except FedpactError as err:
            # The executor counts as outside: it broke the pipe's rules, or has ended. Or what it would send cannot be
            # entered in the egress ledger: an executor that waits for an answer sends nothing.
            log.error("executor's pipe closed", code=err.code)
            self.executor.stop()

    def _answer(self, client: OperatorClient, order: OrderFrame, model: bytes) -> Ready | None:
        """What may leave as the answer to an order, entered in the egress ledger; None where nothing may."""
        data, self.last_order = order.order.encode(), time.monotonic()
        began, self.training = time.perf_counter(), 0.0
        try:
            contract_id = _contract_id(data)
            ready = answer(self._desk(contract_id, client), data, model, order.bundle)
            if ready is not None:
                number = record_reply(self.store, ready, contract_id, data)
                self._time(contract_id, number, time.perf_counter() - began)
        except (FedpactError, OSError) as err:
            # No contract of this agent, the ledger or the disk failed, or the agent stops: the operator asks again.
            code = err.code if isinstance(err, FedpactError) else "SYSTEM"
            log.warning("order not answered", code=code, reason=printable(str(err)))
            return None
        return ready

    def _train(self, contract: Contract, round_number: int, attempt: int, base: bytes) -> Trained:
        """One attempt (`answer.Train`), its time taken."""
        began = time.perf_counter()
        try:
            return self.trainer.train(contract, round_number, attempt, base)
        finally:
            self.training += time.perf_counter() - began

    def _check_rows(self, contract: Contract) -> None:
        """The rows before an attempt (`answer.Desk.own_rows`), the trainer's time taken."""
        began = time.perf_counter()
        data_set = contract.participant(self.home.participant_id).data_set
        first = all(row.contract_id != contract.id for row in self.store.rows(data_set))
        try:
            self.trainer.check(contract, first=first)
        finally:
            self.training += time.perf_counter() - began

    def _time(self, contract_id: str, number: int, seconds: float) -> None:
        """Keep how long one order took here."""
        own = milliseconds(seconds - self.training)
        training = milliseconds(self.training)
        self.rounds.append(RoundTime(contract=contract_id, round=number, guard_ms=own, training_ms=training))

    def _desk(self, contract_id: str, client: OperatorClient) -> Desk:
        """Everything for answering one contract's orders; its signatures are verified once."""
        if contract_id in self.desks:
            return self.desks[contract_id]
        agreement = self.store.contract(contract_id)
        signed = SignedContract.parse(parse_canonical(agreement.signed, what="signed contract"), code="SIGNED_CONTRACT")
        try:
            contract, run_keys = open_contract(signed, self.home.participant_id)
        except RefusedError:
            fetched = fetch_signed(client, contract_id)
            contract, run_keys = open_contract(fetched, self.home.participant_id)
            self.store.replace_signed(contract_id, canonical_bytes(fetched.plain()))
        if agreement.state == "signed":
            self.store.set_state(contract_id, "running")
        data_set = contract.participant(self.home.participant_id).data_set
        self.desks[contract_id] = Desk(
            store=self.store,
            contract=contract,
            contract_id=contract_id,
            participant=self.home.participant_id,
            run_keys=run_keys,
            run_key=self.home.run_key(contract_id),
            policy=self.config.policy.resolve(self.home.operator().id),
            entity=self._entity(data_set),
            own_file=lambda: check_own_file(self.home, self.config, self.store, data_set),
            own_rows=lambda: self._check_rows(contract),
            train=self._train,
            now=self.now,
        )
        return self.desks[contract_id]

    def _entity(self, data_set: str) -> str | None:
        """The column that agent.toml declares; none where it has lost the data set, whose contract may still close."""
        return next((d.entity for d in self.config.data_sets if d.id == data_set), None)

    def _look(self, client: OperatorClient) -> None:
        """Contracts that everybody has signed by now, and periods that are closing, also of withdrawn contracts."""
        away = False
        for agreement in self.store.contracts():
            if agreement.state == "closed" or time.monotonic() < self.quiet.get(agreement.contract_id, 0.0):
                continue
            found: Found | None = "away" if away else self._close(agreement.contract_id, client)
            away = found == "away"
            if found != "objected" and time.monotonic() - self.last_order > LONG_SECONDS:
                self.quiet[agreement.contract_id] = time.monotonic() + SELDOM_SECONDS
            if found == "open" and agreement.contract_id not in self.measured:
                self._measure(agreement.contract_id, client)
            if found is not None:
                self._note_silence(agreement, found)

    def _interrupt(self, contract_id: str) -> None:
        """Whether an attempt that is running is to end: the agent stops, or a person here paused or withdrew.

        Raises:
            CancelledError: the agent stops; the attempt stays charged, and may be repeated by a spare one.
            RefusedError: as `Store.check_running`: charged, and not repeated.
        """
        if self.stopping:
            raise CancelledError("AGENT_STOPPING", "The agent stops; this attempt stays charged.")
        self.store.check_running(contract_id)

    def _tell(self, client: OperatorClient) -> None:
        """Say what a person here decided of a contract, and when the policy's hours end or begin, until it is heard."""
        if time.monotonic() < self.next_tell:
            return
        self.next_tell = time.monotonic() + TELL_SECONDS
        hours = self.config.policy.hours
        in_hours = hours is None or hours.open_at(self.now())
        for agreement in self.store.contracts():
            revoked = self.home.revocation_path(agreement.contract_id).exists()
            said: tuple[TakingPart, str] | None = ("withdrawn", "KEY_REVOKED")
            said = said if revoked else leaving.said_of(agreement, in_hours=in_hours)
            if said is None or self.told.get(agreement.contract_id) == said:
                continue
            try:
                if self._say(agreement, said, client):
                    log.info("operator told", contract=agreement.contract_id, state=said[0], code=said[1])
                self.told[agreement.contract_id] = said
            except ServiceError as err:
                log.warning("operator not told", code=err.code)
                self.next_tell = time.monotonic() + self.config.network.poll_seconds
                return
            except (FedpactError, OSError) as err:  # our own disk, a limit on requests, a log that is not open yet
                code = err.code if isinstance(err, FedpactError) else "SYSTEM"
                why = printable(str(err))
                log.warning("operator not told", contract=agreement.contract_id, code=code, reason=why)
                if code in HEARD_FOR_GOOD:
                    self.told[agreement.contract_id] = said
                else:
                    self.next_tell = time.monotonic() + self.config.network.poll_seconds

    def _end_trainer(self) -> bool:
        """End the one trainer, which may hold encoded rows: that there is none now."""
        self.trainer.stop(0.0)
        return True

    def _say(self, agreement: Agreement, said: tuple[TakingPart, str], client: OperatorClient) -> bool:
        """Say one thing; nothing, and False, of a contract that goes on and of which nothing else was said before."""
        contract_id = agreement.contract_id
        if said[1] == "KEY_REVOKED":
            leaving.send_revocation(self.home, client, contract_id)
        elif said[0] == "withdrawn":
            key = self.home.run_key(contract_id)
            receipt = leaving.destroy(self.home, self.store, contract_id, key, self._end_trainer)
            leaving.withdraw(self.home, self.store, client, contract_id, key, receipt)
        elif said[0] == "running" and not self.store.count_egress(EgressKind.NOTICE, contract_id):
            return False
        else:
            participant = self.home.participant_id
            leaving.tell(self.store, client, agreement, participant, said, self.home.run_key(contract_id))
        return True

    def _close(self, contract_id: str, client: OperatorClient) -> Found | None:
        """Close a contract's period, if it is closing; what was found instead, where there is nothing that holds.

        None also where this agent's own store, keys or disk failed: that says nothing of the operator.
        """
        try:
            if self.home.revocation_path(contract_id).exists():
                return note_waiting(self.store, client, contract_id, self.home.participant_id)
            done, verified = close(self._desk(contract_id, client), client, self.closings.get(contract_id))
            self.closings[contract_id] = verified
            if done == "closed":
                self.store.set_state(contract_id, "closed")
            elif done == "objected":
                self.quiet[contract_id] = time.monotonic() + OBJECTED_SECONDS
        except ServiceError as err:
            log.warning("operator away", code=err.code)
            return "away"
        except (AnsweredInputError, AnsweredRefusedError) as err:
            log.info("contract waits", contract=contract_id, code=err.code)
            return "open"
        except FedpactError as err:
            if err.code == "CONTRACT_NOT_SIGNED":  # nobody's fault
                log.info("contract waits", contract=contract_id, code=err.code)
            else:
                log.error("close not looked after", contract=contract_id, code=err.code, reason=printable(str(err)))
            return None
        return "objected" if done == "objected" else "open" if done == "none" else None

    def _measure(self, contract_id: str, client: OperatorClient) -> None:
        """Release what a contract asks for outside the rounds, once everybody has signed it."""
        try:
            if measure(self._desk(contract_id, client), client, self.trainer.measure):
                self.measured.add(contract_id)
        except (ServiceError, AnsweredInputError, AnsweredRefusedError, RefusedError) as err:
            log.info("measurement waits", contract=contract_id, code=err.code)
        except FedpactError as err:
            log.error("measurement failed", contract=contract_id, code=err.code, reason=printable(str(err)))

    def _note_silence(self, agreement: Agreement, found: Found) -> None:
        """Record, once, that the operator did not close in time."""
        try:
            if silence.note(self.home, self.store, agreement, found, self.now()):
                log.error("operator silent", contract=agreement.contract_id, found=found)
        except FedpactError as err:
            log.error("silence not recorded", contract=agreement.contract_id, code=err.code)
        except OSError as err:  # the record stands in the ledger already; its file is written at the next look
            log.error("silence not exported", contract=agreement.contract_id, reason=err.strerror)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping = True


def record_reply(store: Store, ready: Ready, contract_id: str, data: bytes) -> int:
    """Enter a reply in the egress ledger; the order was verified by `answer`. The order's round."""
    kind = EgressKind.UPDATE if ready.kind == "update" else EgressKind.REFUSAL
    body = ready.reply + ready.array
    number = int(parse_canonical(read_envelope(data).body, what="order")["round"])
    store.record_egress(kind, contract_id, number, len(body), sha256_hex(body))
    return number


def record_no_reply(store: Store, text: str) -> None:
    """Enter the fixed text that goes to the operator in place of a reply: of which order, only its sender could say."""
    store.record_egress(EgressKind.NO_REPLY, None, None, len(text), sha256_hex(text.encode()), detail=text)


def _order(frame: Frame) -> OrderFrame:
    """The order in a frame of the executor.

    Raises:
        FrameError: FRAME_HEADER, it is none: the pipe is not used any more.
    """
    try:
        return OrderFrame.parse(frame.header, code="ORDER_FRAME")
    except InputError as err:
        raise FrameError("FRAME_HEADER", f"An order's frame is malformed: {err.message}") from err


def _contract_id(data: bytes) -> str:
    """The contract that an order says it is of (not believed before its signature is checked)."""
    value = parse_canonical(read_envelope(data).body, what="order")
    if not isinstance(value, dict) or not isinstance(value.get("contract_id"), str):
        raise InputError("ORDER_FORM", "The order names no contract.")
    return str(value["contract_id"])
