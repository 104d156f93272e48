"""What `fedpact serve` keeps true: approved nodes are known to Flower, and each wanted run has a live Flower run.

Our run outlives Flower's: where a Flower run has ended and ours is not completed, another one takes its place
(`driver` in the database fences the old one off). The supervisor holds no state that a restart could lose: it reads
the database, asks SuperLink, and makes them agree. What does not work now is tried again.
"""

import datetime
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Row

from fedpact_contract.errors import FedpactError, InputError
from fedpact_contract.request import utc_now
from fedpact_server import db, enrolment
from fedpact_server.alarms import raise_alarm
from fedpact_server.db import Database

log = structlog.get_logger()

STEP_SECONDS = 0.2
CHECK_SECONDS = 1.0
"""How often SuperLink is asked how a run is."""
BACKOFF_SECONDS = (1.0, 60.0)
"""Shortest and longest wait before a run that ended is replaced; doubled each time."""
STEADY_SECONDS = 60.0
"""A Flower run that lived so long was no failed start: the wait begins anew."""


class FlowerStatus(Protocol):
    """Where a Flower run stands: pending, starting, running, finished."""

    @property
    def status(self) -> str:
        """The status."""

    @property
    def sub_status(self) -> str:
        """How it finished."""


class FlowerControl(Protocol):
    """The calls of `superlink.Control` that the supervisor makes; each may raise a FedpactError."""

    def register_node(self, public_key_pem: str, name: str) -> int:
        """Let a node connect."""

    def start_run(self, contract_id: str) -> int:
        """Start a Flower run."""

    def run_status(self, flower_run_id: int) -> FlowerStatus:
        """Where it stands."""

    def stop_run(self, flower_run_id: int) -> None:
        """Stop it."""


@dataclass(slots=True)
class _Watch:
    """What the supervisor remembers of one contract's run between steps; seconds of its clock."""

    delay: float = BACKOFF_SECONDS[0]
    start_at: float = 0.0
    started: float = 0.0
    checked: float = field(default=-CHECK_SECONDS)


class Supervisor:
    """Registers nodes and keeps runs alive, in a thread.

    Args:
        database: The operator's database.
        control: SuperLink's Control API.
        failed: Called once if the thread ends by an error that nobody foresaw.
        ending: Whether SuperLink is being ended: then its runs end too, and none is replaced.
        now: The clock of alarms.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        database: Database,
        control: FlowerControl,
        *,
        failed: Callable[[], None] = lambda: None,
        ending: Callable[[], bool] = lambda: False,
        now: Callable[[], datetime.datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._control, self._failed, self._ending = database, control, failed, ending
        self._now, self._clock = now, clock
        self._watches: dict[str, _Watch] = {}
        self._registered: set[str] = set()
        self._said: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; returns when the thread has."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> None:
        """Make everything agree once."""
        with self._database.read() as connection:
            members = [
                row
                for row in connection.execute(sa.select(db.participants))
                if row.state == "approved" or (row.state == "registered" and row.id not in self._registered)
            ]
            runs = connection.execute(sa.select(db.runs).where(db.runs.c.phase == "running")).all()
        for row in members:
            self._attempt(f"node {row.id}", functools.partial(self._register, row))
        for row in runs:
            self._attempt(f"run {row.contract_id}", functools.partial(self._keep, row))

    def _run(self) -> None:
        try:
            while not (self._stopping.is_set() or self._ending()):
                self._attempt("step", self.step)
                self._stopping.wait(STEP_SECONDS)
        except BaseException as err:
            log.error("supervisor ended", error=type(err).__name__)
            self._failed()
            raise

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        """Do one thing; what does not work is logged when it changes, and tried again at the next step."""
        try:
            action()
        except (FedpactError, sa.exc.SQLAlchemyError) as err:
            said = str(err) if isinstance(err, FedpactError) else type(err).__name__
            if self._said.get(what) != said:
                self._said[what] = said
                log.warning("not possible now", what=what, reason=said)
        else:
            self._said.pop(what, None)

    def _register(self, row: Row[Any]) -> None:
        """Tell SuperLink of an approved node; a registered one is told again once after a start."""
        flower_node = self._control.register_node(row.node_key_pem, row.id)
        with self._database.write() as connection:
            enrolment.set_registered(connection, row.id, str(flower_node))
        if row.state == "approved":
            log.info("node registered", participant=row.id, flower_node=str(flower_node))
        self._registered.add(row.id)

    def _keep(self, row: Row[Any]) -> None:
        """One run that is not over: have it driven, or not, as it is wanted."""
        contract_id = str(row.contract_id)
        if contract_id not in self._watches:
            self._adopt(row)
            return
        watch = self._watches[contract_id]
        if row.wanted == "pause":  # a stop is the round loop's work: it ends the log as it should end
            self._halt(row)
        elif row.driver is None:
            if self._clock() >= watch.start_at:
                self._start(row, watch)
        elif self._clock() >= watch.checked + CHECK_SECONDS:
            watch.checked = self._clock()
            if (how := self._ended(int(row.driver))) is not None and not self._ending():
                self._replace(row, watch, how)

    def _adopt(self, row: Row[Any]) -> None:
        """A run seen for the first time: its driver, if it has one, ended with the `serve` that started it."""
        if row.driver is not None:
            self._end(int(row.driver))
            self._set_driver(row, None, alarm="`serve` was started again")
        self._watches[str(row.contract_id)] = _Watch(start_at=self._clock())

    def _start(self, row: Row[Any], watch: _Watch) -> None:
        contract_id = str(row.contract_id)
        watch.start_at = self._clock() + watch.delay  # also where the next line fails
        flower_run = self._control.start_run(contract_id)
        watch.started = watch.checked = self._clock()
        if self._set_driver(row, str(flower_run)):
            log.info("run driven", contract=contract_id, flower_run=str(flower_run))
        else:  # it was paused, stopped or terminated meanwhile
            self._end(flower_run)

    def _replace(self, row: Row[Any], watch: _Watch, how: str) -> None:
        """The Flower run has ended and ours has not: after a pause, another one."""
        shortest, longest = BACKOFF_SECONDS
        if self._clock() - watch.started >= STEADY_SECONDS:
            watch.delay = shortest
        if self._set_driver(row, None, alarm=f"its Flower run {row.driver} ended: {how}"):
            watch.start_at = self._clock() + watch.delay
            watch.delay = min(2 * watch.delay, longest)

    def _halt(self, row: Row[Any]) -> None:
        """Wanted is a pause: end the Flower run."""
        if row.driver is None:
            return
        self._end(int(row.driver))
        run = db.runs.c
        with self._database.write() as connection:
            connection.execute(
                db.runs.update()
                .where(run.contract_id == row.contract_id, run.phase == "running", run.wanted == row.wanted)
                .values(driver=None)
            )
        log.info("run halted", contract=str(row.contract_id))

    def _ended(self, flower_run: int) -> str | None:
        """How a Flower run ended, or None while it has not."""
        try:
            found = self._control.run_status(flower_run)
        except InputError:  # FLOWER_RUN_UNKNOWN: SuperLink's database is another one
            return "unknown to SuperLink"
        return (found.sub_status or "finished") if found.status == "finished" else None

    def _end(self, flower_run: int) -> None:
        try:
            self._control.stop_run(flower_run)
        except InputError:  # FLOWER_RUN_UNKNOWN: there is nothing to stop
            log.info("flower run unknown", flower_run=str(flower_run))

    def _set_driver(self, row: Row[Any], driver: str | None, *, alarm: str = "") -> bool:
        """Name the Flower run that may write, if the run still stands as it was read; says whether it does."""
        run = db.runs.c
        with self._database.write() as connection:
            found = connection.execute(
                db.runs.update()
                .where(
                    run.contract_id == row.contract_id,
                    run.phase == "running",
                    run.wanted == row.wanted,
                    run.driver.is_(None) if row.driver is None else run.driver == row.driver,
                )
                .values(driver=driver)
            )
            changed = found.rowcount == 1
            if changed and alarm:
                raise_alarm(connection, "RUN_REPLACED", f"{row.contract_id}: {alarm}", now=self._now())
        return changed
