"""The supervisor: nodes registered, runs driven, dead Flower runs replaced, whatever SuperLink answers."""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.support.operator_world import NOW, Enterprise, Operator, enterprise, operator

from fedpact_contract.errors import FedpactError, InputError, RefusedError, ServiceError
from fedpact_server import alarms, db, enrolment
from fedpact_server.supervise import Supervisor

ONE, TWO = enterprise(1), enterprise(2)
AWAY = ServiceError("CONTROL_AWAY", "SuperLink does not answer.")


@dataclass
class Status:
    status: str
    sub_status: str = ""


@dataclass
class Control:
    """SuperLink's Control API: as it is told to answer."""

    nodes: dict[str, int] = field(default_factory=dict)
    runs: dict[int, Status] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    fails: FedpactError | None = None
    on_start: Any = None
    asked: int = 0

    def register_node(self, public_key_pem: str, name: str) -> int:
        self._maybe_fail()
        return self.nodes.setdefault(public_key_pem, 100 + len(self.nodes))

    def start_run(self, contract_id: str) -> int:
        self._maybe_fail()
        if self.on_start is not None:
            self.on_start()
        self.runs[number := 1000 + len(self.runs)] = Status("running")
        return number

    def run_status(self, flower_run_id: int) -> Status:
        self.asked += 1
        self._maybe_fail()
        if flower_run_id not in self.runs:
            raise InputError("FLOWER_RUN_UNKNOWN", "SuperLink knows no such run.")
        return self.runs[flower_run_id]

    def stop_run(self, flower_run_id: int) -> None:
        self._maybe_fail()
        if flower_run_id not in self.runs:
            raise InputError("FLOWER_RUN_UNKNOWN", "SuperLink knows no such run.")
        self.stopped.append(flower_run_id)
        self.runs[flower_run_id] = Status("finished", "stopped")

    def _maybe_fail(self) -> None:
        if self.fails is not None:
            raise self.fails


class World:
    """A supervisor over a real database, a scripted SuperLink and a clock that the test turns."""

    def __init__(self, base: Operator) -> None:
        self.base, self.control, self.time = base, Control(), 1000.0
        self.supervisor = self.restart()

    def restart(self) -> Supervisor:
        self.supervisor = Supervisor(self.base.database, self.control, now=lambda: NOW, clock=lambda: self.time)
        return self.supervisor

    def steps(self, count: int = 3, seconds: float = 0.0) -> None:
        for _ in range(count):
            self.supervisor.step()
            self.time += seconds

    def add_run(self, contract_id: str = "a" * 64, **values: Any) -> None:
        with self.base.database.write() as connection:
            connection.execute(db.contracts.insert().values(id=contract_id, payload=b"", state="signed"))
            given = {"phase": "running", "wanted": "run", "driver": None, "started": "2026-11-24T12:00:00Z"} | values
            connection.execute(db.runs.insert().values(contract_id=contract_id, **given))

    def set_run(self, **values: Any) -> None:
        with self.base.database.write() as connection:
            connection.execute(db.runs.update().values(**values))

    @property
    def run(self) -> Any:
        with self.base.database.read() as connection:
            return connection.execute(sa.select(db.runs)).one()

    def state(self, who: Enterprise) -> tuple[str, str | None]:
        with self.base.database.read() as connection:
            member = enrolment.find(connection, who.id)
        return member.state, member.flower_node

    @property
    def alarms(self) -> list[str]:
        with self.base.database.read() as connection:
            return [alarm["code"] for alarm in alarms.latest(connection)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(operator(tmp_path))


class TestNodes:
    def test_an_approved_node_is_registered(self, world: World) -> None:
        world.base.enrol(TWO)
        world.base.admit(ONE, cards_too=False)
        world.steps()
        assert world.state(ONE) == ("registered", "100")
        assert world.state(TWO) == ("requested", None)
        assert len(world.control.nodes) == 1

    def test_what_superlink_refuses_for_one_does_not_stop_the_others(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world.base.admit(ONE, TWO, cards_too=False)
        register = world.control.register_node

        def refuse_one(pem: str, name: str) -> int:
            if name == ONE.id:
                raise RefusedError("NODE_KEY_REVOKED", "This node key was unregistered before.")
            return register(pem, name)

        monkeypatch.setattr(world.control, "register_node", refuse_one)
        world.steps()
        assert (world.state(ONE)[0], world.state(TWO)[0]) == ("approved", "registered")

    def test_while_superlink_is_away_it_is_tried_again(self, world: World) -> None:
        world.base.admit(ONE, cards_too=False)
        world.control.fails = AWAY
        world.steps()
        assert world.state(ONE) == ("approved", None)
        world.control.fails = None
        world.steps()
        assert world.state(ONE) == ("registered", "100")

    def test_after_a_start_registered_nodes_are_told_again_once(self, world: World) -> None:
        """SuperLink's own database may be a new one."""
        world.base.admit(ONE, cards_too=False)
        world.steps()
        world.control.nodes = {"another": 100}
        world.restart()
        world.steps()
        assert world.state(ONE) == ("registered", "101")
        world.control.nodes.clear()
        world.steps()
        assert world.control.nodes == {}

    def test_a_suspended_node_stays_suspended(self, world: World) -> None:
        world.base.admit(ONE, cards_too=False)
        enrolment.suspend(world.base.database, selector=ONE.id, now=NOW)
        world.steps()
        assert world.state(ONE) == ("suspended", None)
        assert world.control.nodes == {}


class TestRuns:
    def test_a_wanted_run_is_driven(self, world: World) -> None:
        world.add_run()
        world.steps()
        assert world.run.driver == "1000"
        world.steps(20, 1.0)
        assert list(world.control.runs) == [1000]
        assert world.alarms == []

    def test_one_that_is_over_or_paused_is_not(self, world: World) -> None:
        standing = (("completed", "run"), ("stopped", "run"), ("closing", "run"), ("running", "pause"))
        for number, (phase, wanted) in enumerate(standing):
            world.add_run(str(number) * 64, phase=phase, wanted=wanted)
        world.steps(5, 1.0)
        assert world.control.runs == {}

    def test_a_dead_flower_run_is_replaced_with_patience(self, world: World) -> None:
        world.add_run()
        started = []
        for _ in range(2000):
            world.steps(1, 0.2)
            for number, status in world.control.runs.items():
                if status.status == "running":
                    status.status, status.sub_status = "finished", "failed"
                    started.append((number, world.time))
        gaps = [round(b - a) for (_, a), (_, b) in itertools.pairwise(started)]
        assert gaps[:5] == [2, 3, 5, 9, 17]  # 1, 2, 4, 8, 16 seconds, and 1 until it is noticed
        assert max(gaps) <= 62
        assert set(world.alarms) == {"RUN_REPLACED"}
        assert len(started) - 1 <= len(world.alarms) <= len(started)

    def test_after_a_steady_run_patience_begins_anew(self, world: World) -> None:
        world.add_run()
        for _ in range(4):
            world.steps(3, 1.0)
            world.control.runs[max(world.control.runs)] = Status("finished", "failed")
            world.steps(15, 1.0)
        world.steps(70, 1.0)
        latest = max(world.control.runs)
        assert world.control.runs[latest].status == "running"
        world.control.runs[latest] = Status("finished", "failed")
        world.steps(4, 1.0)
        assert world.run.driver == str(latest + 1)

    def test_a_flower_run_that_superlink_does_not_know_is_replaced(self, world: World) -> None:
        world.add_run()
        world.steps()
        world.control.runs.clear()
        world.steps(6, 1.0)
        assert world.run.driver == "1000"
        assert world.alarms == ["RUN_REPLACED"]

    def test_after_a_restart_of_serve_the_old_driver_is_ended_and_replaced(self, world: World) -> None:
        world.add_run()
        world.steps()
        world.restart()
        world.steps()
        assert world.control.stopped == [1000]
        assert world.run.driver == "1001"
        assert world.alarms == ["RUN_REPLACED"]

    def test_after_a_restart_an_unknown_driver_is_replaced_too(self, world: World) -> None:
        world.add_run(driver="77")
        world.steps()
        assert world.run.driver == "1000"

    def test_pause_ends_the_flower_run(self, world: World) -> None:
        world.add_run()
        world.steps()
        world.set_run(wanted="pause")
        world.steps(3, 1.0)
        assert world.control.stopped == [1000]
        assert (world.run.driver, world.run.phase) == (None, "running")
        world.steps(100, 1.0)
        assert list(world.control.runs) == [1000]

    def test_a_paused_run_is_resumed_by_a_new_flower_run(self, world: World) -> None:
        world.add_run(wanted="pause")
        world.steps(2, 1.0)
        world.set_run(wanted="run")
        world.steps(2, 1.0)
        assert world.run.driver == "1000"

    def test_stopping_is_done_by_the_round_loop(self, world: World) -> None:
        """It writes the end into the log; a run that nobody drives gets a driver for that."""
        world.add_run()
        world.steps()
        world.set_run(wanted="stop")
        world.steps(3, 1.0)
        assert world.control.stopped == []
        assert (world.run.driver, world.run.phase) == ("1000", "running")

    def test_a_run_stopped_before_it_was_driven_is_given_a_driver(self, world: World) -> None:
        world.add_run(wanted="stop")
        world.steps()
        assert world.run.driver == "1000"

    def test_a_run_that_changed_while_it_was_started_is_not_driven(self, world: World) -> None:
        world.add_run()
        world.control.on_start = lambda: world.set_run(wanted="pause")
        world.steps(2)
        assert world.control.stopped == [1000]
        assert world.run.driver is None

    def test_a_completed_run_is_left_alone(self, world: World) -> None:
        world.add_run()
        world.steps()
        world.set_run(phase="completed")
        world.control.runs[1000] = Status("finished", "completed")
        world.steps(10, 1.0)
        assert list(world.control.runs) == [1000]
        assert world.alarms == []

    def test_while_superlink_is_away_nothing_is_changed_and_starts_are_not_hammered(self, world: World) -> None:
        world.add_run()
        world.steps()
        world.control.fails = AWAY
        world.steps(50, 0.2)
        assert world.run.driver == "1000"
        assert world.control.asked <= 11
        world.control.fails = None
        world.steps(3, 1.0)
        assert world.run.driver == "1000"
        assert world.alarms == []


class TestThread:
    @pytest.fixture
    def running(self, world: World) -> Iterator[World]:
        world.restart().start()
        yield world
        world.supervisor.stop()

    def test_it_works_by_itself_until_it_is_stopped(self, running: World) -> None:
        running.base.admit(ONE, cards_too=False)
        running.add_run()
        patience = time.monotonic() + 20
        while (running.state(ONE)[0], running.run.driver) != ("registered", "1000"):
            assert time.monotonic() < patience
            time.sleep(0.05)
        running.supervisor.stop()
        running.set_run(wanted="stop")
        time.sleep(0.5)
        assert running.run.phase == "running"

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_an_error_that_nobody_foresaw_is_told(self, world: World) -> None:
        told = threading.Event()
        broken: Any = object()
        world.add_run()
        supervisor = Supervisor(world.base.database, broken, failed=told.set)
        supervisor.start()
        assert told.wait(20)
        supervisor.stop()

    def test_a_database_that_is_away_for_a_while_is_no_end(self, world: World, monkeypatch: Any) -> None:
        calls = []

        def step() -> None:
            calls.append(1)
            if len(calls) < 3:
                raise sa.exc.OperationalError("", None, Exception())

        monkeypatch.setattr(world.supervisor, "step", step)
        world.supervisor.start()
        patience = time.monotonic() + 20
        while len(calls) < 4 and time.monotonic() < patience:
            time.sleep(0.05)
        world.supervisor.stop()
        assert len(calls) >= 4
