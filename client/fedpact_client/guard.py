"""The guard: the agent's trusted process. It starts the executor (Flower) and the trainer (data), and answers orders.

It has no torch, no data and no Flower. Its two children have one pipe each, to the guard; they die with it. Orders
come one at a time; between them it looks for new signatures and for a period that is closing.
"""

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from fedpact_client.answer import Desk, answer, open_contract
from fedpact_client.api import OperatorClient, egress_of
from fedpact_client.children import ExecutorChild, TrainerChild, selection_key
from fedpact_client.closing import close
from fedpact_client.config import AgentConfig
from fedpact_client.home import AgentHome
from fedpact_client.signing import fetch_signed
from fedpact_client.store import EgressKind, HomeLock, Ready, Store
from fedpact_contract.canonical import canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.contract import SignedContract
from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError, ServiceError
from fedpact_contract.request import utc_now

log = structlog.get_logger()

EXECUTOR_RESTART_SECONDS = 5.0
"""Between restarts of the executor: Flower refuses a node that comes back before its last heartbeat expired."""


def run(home_path: Path) -> int:
    """Run the agent until SIGTERM or Ctrl-C; returns the exit code.

    Raises:
        InputError: HOME_LOCKED, NOT_ENROLLED, or a fault in the configuration.
    """
    home = AgentHome(home_path.expanduser().absolute()).check()
    config = home.config()
    witness = None if config.paths.witness is None else Path(config.paths.witness)
    with HomeLock(home.path), Store(home.db_path, witness=witness) as store:
        return Guard(home=home, config=config, store=store).run()


@dataclass(slots=True)
class Guard:
    """One running agent."""

    home: AgentHome
    config: AgentConfig
    store: Store
    stopping: bool = False
    desks: dict[str, Desk] = field(default_factory=dict)
    trainer: TrainerChild = field(init=False)
    executor: ExecutorChild = field(init=False)

    def run(self) -> int:
        """Start both children, answer orders, end them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self.trainer = TrainerChild(
            home=self.home, config=self.config, key=selection_key(self.home), cancelled=lambda: self.stopping
        )
        self.executor = ExecutorChild(home=self.home, config=self.config)
        client = OperatorClient.of_home(self.home, egress_of(self.store))
        try:
            self.trainer.start()
            self.executor.start()
            log.info("agent ready", participant=self.home.participant_id)
            self._loop(client)
        finally:
            self.executor.stop()
            self.trainer.stop()
            client.close()
        return 0

    def _loop(self, client: OperatorClient) -> None:
        next_look = 0.0
        restart_at = 0.0
        while not self.stopping:
            if not self.executor.alive:
                if not restart_at:
                    self.executor.stop()
                    restart_at = time.monotonic() + EXECUTOR_RESTART_SECONDS
                elif time.monotonic() >= restart_at:
                    log.warning("executor restarts", exit_code=self.executor.exit_code)
                    self.executor.start()
                    restart_at = 0.0
            if time.monotonic() >= next_look:
                self._look(client)
                next_look = time.monotonic() + self.config.network.poll_seconds
            if self.executor.alive:
                self._serve_one(client)
            else:
                time.sleep(0.2)

    def _serve_one(self, client: OperatorClient) -> None:
        """Answer one order, if one arrives soon."""
        try:
            frame = self.executor.receive(0.5)
            if frame is None:
                return
            ready = self._answer(client, frame.header, frame.array)
            if ready is None:
                self.executor.send("drop", {})
                return
            self._record_reply(frame.header, ready)
            self.executor.send("reply", {"reply": ready.reply.decode()}, ready.array)
        except FaultError as err:  # the executor counts as outside: it broke the pipe's rules, or has ended
            log.error("executor's pipe closed", code=err.code)
            self.executor.stop()

    def _answer(self, client: OperatorClient, header: dict[str, Any], model: bytes) -> Ready | None:
        data = str(header["order"]).encode()
        try:
            contract_id = _contract_id(data)
            desk = self._desk(contract_id, client)
        except (InputError, RefusedError, FaultError, ServiceError) as err:
            log.warning("order for no contract of this agent", code=err.code, reason=str(err))
            return None
        try:
            return answer(desk, data, model, str(header["bundle"]))
        except FedpactError as err:
            # The ledger or the disk failed: nothing may leave, the operator asks again.
            log.error("order not answered", code=err.code, reason=str(err))
            return None

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
        self.desks[contract_id] = Desk(
            store=self.store,
            contract=contract,
            contract_id=contract_id,
            participant=self.home.participant_id,
            run_keys=run_keys,
            run_key=self.home.run_key(contract_id),
            policy=self.config.policy.resolve(self.home.operator().id),
            train=self.trainer.train,
            now=utc_now,
        )
        return self.desks[contract_id]

    def _look(self, client: OperatorClient) -> None:
        """Contracts that everybody has signed by now, and periods that are closing."""
        for agreement in self.store.contracts():
            if agreement.state in ("withdrawn", "closed"):
                continue
            try:
                desk = self._desk(agreement.contract_id, client)
                if close(desk, client) == "closed":
                    self.store.set_state(agreement.contract_id, "closed")
            except ServiceError as err:
                log.warning("operator away", code=err.code)
                return
            except (InputError, RefusedError, FaultError) as err:
                log.info("contract waits", contract=agreement.contract_id, code=err.code)

    def _record_reply(self, header: dict[str, Any], ready: Ready) -> None:
        kind = EgressKind.UPDATE if ready.kind == "update" else EgressKind.REFUSAL
        body = ready.reply + ready.array
        data = str(header["order"]).encode()
        order = parse_canonical(_payload(data), what="order")
        self.store.record_egress(kind, order["contract_id"], order["round"], len(body), sha256_hex(body))

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping = True


def _payload(data: bytes) -> bytes:
    from fedpact_contract.record import read_envelope

    return read_envelope(data).body


def _contract_id(data: bytes) -> str:
    """The contract that an order says it is of (not believed before its signature is checked)."""
    value = parse_canonical(_payload(data), what="order")
    if not isinstance(value, dict) or not isinstance(value.get("contract_id"), str):
        raise InputError("ORDER_FORM", "The order names no contract.")
    return str(value["contract_id"])
