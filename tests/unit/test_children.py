"""The guard's two children as the guard sees them: what they are told, what they may answer, how they end."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.agent_world import DATA_SET, ENTITY, PASSPHRASE, ROWS, contract
from tests.support.fake_child import Spawner

from fedpact_client import children
from fedpact_client.answer import BEFORE_ROWS, TrainerLostError, TrainingFailedError
from fedpact_client.children import (
    EXECUTOR_KINDS,
    TRAINER_KINDS,
    CancelledError,
    ExecutorChild,
    TrainerChild,
)
from fedpact_client.frames import FrameError
from fedpact_client.home import AgentHome, init
from fedpact_client.sandbox import Isolation
from fedpact_client.spawn import spawn
from fedpact_contract.contract import Defences
from fedpact_contract.errors import FailedError, InputError, RefusedError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import public_hex

ISOLATION = {
    "no_new_privs": True,
    "user_and_network_namespace": True,
    "ipc_namespace": True,
    "network_kept": False,
    "landlock_abi": 6,
    "tcp_denied": True,
    "sockets_denied": True,
    "missing": [],
}
BASE = bytes(8 * 6)
UPDATE = b"\x01\x02\x03\x04" * 6
GOOD = {"noise": "csprng", "fingerprints": ["a" * 64, "b" * 64], "num_examples": 40}


@pytest.fixture
def home(tmp_path: Path) -> AgentHome:
    """A home with one data set, enrolled with an operator's address."""
    made = init(tmp_path / "agent", name="Hospital 1", entity_code=ENTITY, sector="medical", passphrase=PASSPHRASE)
    text = made.config_path.read_text().replace("[policy]\n", DATA_SET + "[policy]\n", 1)
    text = text.replace('url = ""', 'url = "https://fl.example.cn:8443"', 1)
    replace_file(made.config_path, text.encode())
    (made.path / "rows.csv").write_text(ROWS)
    return made


@pytest.fixture
def signed(home: AgentHome):
    return contract(public_hex(home.load_contract_key(PASSPHRASE)), data_set="set-1")


def ready(pipe) -> dict[str, Any]:
    """Take the setup, say that it is ready; the setup."""
    frame = pipe.receive(5.0)
    assert frame.kind == "setup"
    pipe.send("ready", {"isolation": ISOLATION})
    return dict(frame.header)


def limited(agreed):
    """The contract, with a limit on copies."""
    clause = {"clip": "none", "wreckers": "report", "negatives": "0.1", "dispute_hours": 1, "max_duplicates": "0.05"}
    return agreed.model_copy(update={"defences": Defences.parse(clause, code="TEST")})


def ruled(trainer: TrainerChild) -> TrainerChild:
    """The trainer's guard, with a rule for the data set."""
    text = trainer.home.config_path.read_text().replace(
        "[policy]\n", '[[data_sets.rules]]\nrule = "varies"\n[policy]\n', 1
    )
    replace_file(trainer.home.config_path, text.encode())
    trainer.config = trainer.home.config()
    return trainer


def answering(*answers):
    """A trainer that answers each order with the next of (kind, header, array)."""

    def behave(pipe) -> None:
        ready(pipe)
        for kind, header, array in answers:
            if pipe.receive(10.0) is None:
                return
            pipe.send(kind, header, array)
        pipe.receive(10.0)

    return behave


def aborted(child: Any, _grace: float = 0.0) -> int:
    child.pipe.close()
    return -int(signal.SIGABRT)


class Trainers:
    """Makes trainers whose processes are threads."""

    def __init__(self, home: AgentHome, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self._monkeypatch = home, monkeypatch
        self.stopping = self.paused = False
        self.spawner = Spawner(answering())

    def make(self, *behaviours, **options: Any) -> TrainerChild:
        self.spawner = Spawner(*behaviours, **options)
        self._monkeypatch.setattr(children, "spawn", self.spawner)
        return TrainerChild(home=self.home, config=self.home.config(), key=b"k" * 32, interrupt=self.interrupt)

    def interrupt(self, _contract_id: str) -> None:
        if self.stopping:
            raise children.CancelledError("AGENT_STOPPING", "The agent stops.")
        if self.paused:
            raise RefusedError("PARTICIPANT_PAUSED", "The contract is paused.")


@pytest.fixture
def trainers(home: AgentHome, monkeypatch: pytest.MonkeyPatch):
    made = Trainers(home, monkeypatch)
    yield made
    made.spawner.stop()


def lost(trainer: TrainerChild, signed, code: str) -> None:
    with pytest.raises(TrainerLostError) as err:
        trainer.train(signed, 1, 1, BASE)
    assert err.value.code == code


class TestTrainer:
    def test_it_is_told_what_it_may_read_and_use(self, trainers: Trainers) -> None:
        seen: list[dict[str, Any]] = []
        trainer = trainers.make(lambda pipe: seen.append(ready(pipe)))
        trainer.start()
        trainers.spawner.children[0].join()
        (setup,) = seen
        assert setup["read_paths"] == [
            str(trainers.home.path / n) for n in ("rows.csv", "released", "profiles", "loaded")
        ]
        assert (setup["threads"], setup["memory"]) == (2, 4096)
        assert (setup["scratch"], trainers.home.scratch.is_dir()) == (str(trainers.home.path / "scratch"), True)
        module, options = trainers.spawner.asked[0]
        assert (module, options["kinds"]) == ("fedpact_client.trainer", TRAINER_KINDS)
        assert (options["processors"], options["nice"]) == (None, 0)
        assert options.keys() == {"log", "max_array", "kinds", "processors", "nice"}, "no argument, no variable"

    def test_an_attempt(self, trainers: Trainers, signed) -> None:
        orders: list[Any] = []

        def behave(pipe) -> None:
            ready(pipe)
            orders.append(pipe.receive(5.0))
            pipe.send("update", GOOD, UPDATE)
            pipe.receive(5.0)

        trainer = trainers.make(behave)
        found = trainer.train(signed, 3, 2, BASE)
        assert (found.update, found.noise, found.fingerprints) == (UPDATE, "csprng", ("a" * 64, "b" * 64))
        (order,) = orders
        assert (order.kind, order.array) == ("train", BASE)
        assert (order.header["round"], order.header["attempt"]) == (3, 2)
        assert order.header["contract"] == signed.to_bytes().decode()
        assert order.header["source"] == {"path": "rows.csv", "kind": "csv"} | order.header["source"]
        assert order.header["columns"] == ["age", "sex", "ill"]
        assert order.header["selection_key"] == (b"k" * 32).hex()
        assert trainer.isolation == Isolation.parse(ISOLATION, code="X")

    def test_it_stays_warm(self, trainers: Trainers, signed) -> None:
        trainer = trainers.make(answering(("update", GOOD, UPDATE), ("update", GOOD, UPDATE)))
        trainer.start()
        for number in (1, 2):
            trainer.train(signed, number, 1, BASE)
        assert len(trainers.spawner.children) == 1

    def test_one_that_was_idle_too_long_is_replaced(self, trainers: Trainers, signed) -> None:
        trainer = trainers.make(lambda pipe: ready(pipe) and None, answering(("update", GOOD, UPDATE)))
        trainer.start()
        trainers.spawner.children[0].join()
        assert trainer.train(signed, 1, 1, BASE).update == UPDATE
        assert len(trainers.spawner.children) == 2

    def test_what_the_data_does_not_allow_is_no_crash(self, trainers: Trainers, signed) -> None:
        header = {"code": "DATA_COLUMN_MISSING", "message": "No column age.", "file": "rows.csv", "field": "age"}
        trainer = trainers.make(answering(("failed", header, b""), ("update", GOOD, UPDATE)))
        with pytest.raises(TrainingFailedError) as err:
            trainer.train(signed, 1, 1, BASE)
        assert (err.value.code, err.value.message, err.value.file) == (
            "DATA_COLUMN_MISSING",
            "No column age.",
            "rows.csv",
        )
        trainer.train(signed, 2, 1, BASE)
        assert len(trainers.spawner.children) == 1, "the same process goes on"

    @pytest.mark.parametrize(
        ("kind", "header"),
        [
            ("update", {}),
            ("update", {"noise": "csprng"}),
            ("update", {"noise": 1, "fingerprints": ["a" * 64]}),
            ("update", {"noise": "csprng", "fingerprints": []}),
            ("update", {"noise": "csprng", "fingerprints": "a" * 64}),
            ("update", {"noise": "csprng", "fingerprints": ["a" * 64, 7]}),
            ("update", {"noise": "csprng", "fingerprints": ["a" * 64, "b"]}),
            ("failed", {}),
            ("failed", {"code": 7}),
            ("failed", {"code": "POLICY_EPSILON"}),
            ("failed", {"code": "DATA_" + "x" * 40}),
            ("failed", {"code": "DATA_AGE 47 IN ROW 12"}),
            ("failed", {"code": "DATA_" + "A" * 61}),
            ("failed", {"code": "DATA_A\n"}),
            ("ready", {"isolation": ISOLATION}),
            ("checked", {"num_rows": 4}),
        ],
    )
    def test_an_answer_that_is_none_is_a_lost_trainer(
        self, trainers: Trainers, signed, kind: str, header: dict
    ) -> None:
        """Only codes that the trainer can have may leave: no column, no value, no count."""
        trainer = trainers.make(answering((kind, header, b"")))
        lost(trainer, signed, "TRAINER_ANSWER")
        assert trainers.spawner.children[0].stopped, "nothing of it may answer for the next attempt"

    def test_rows_are_checked_where_the_contract_limits_copies(self, trainers: Trainers, signed) -> None:
        orders: list[Any] = []

        def behave(pipe) -> None:
            ready(pipe)
            orders.append(pipe.receive(5.0))
            pipe.send("checked", {"num_rows": 40, "fingerprints": ["a" * 64]})
            pipe.receive(5.0)

        trainer = trainers.make(behave)
        trainer.check(signed)
        assert trainers.spawner.children == [], "no clause, nothing to ask"
        trainer.check(limited(signed))
        (order,) = orders
        assert (order.kind, order.array) == ("check", b"")
        assert order.header["selection_key"] == (b"k" * 32).hex(), "the very rows that it would train on"

    def test_copies_are_told_with_all_that_the_trainer_says(self, trainers: Trainers, signed) -> None:
        places = {"file": "rows.csv", "field": "data set set-1", "rule": "at most 0.05", "remedy": "Drop them."}
        header = {"code": "DATA_DUPLICATES", "message": "20 are exact copies.", **places}
        trainer = trainers.make(answering(("failed", header, b""), ("update", GOOD, UPDATE)))
        with pytest.raises(InputError) as err:
            trainer.check(limited(signed))
        assert err.value.as_dict() == header
        trainer.train(signed, 1, 1, BASE)
        assert len(trainers.spawner.children) == 1, "the same process goes on"

    def test_before_the_first_attempt_the_data_sets_own_rules_go_along(self, trainers: Trainers, signed) -> None:
        orders: list[Any] = []

        def behave(pipe) -> None:
            ready(pipe)
            while (frame := pipe.receive(5.0)) is not None:
                orders.append(frame)
                pipe.send("checked", {"num_rows": 40, "fingerprints": ["a" * 64]})

        trainer = ruled(trainers.make(behave))
        trainer.check(signed)
        assert orders == [], "an attempt was charged before, and the contract has no clause"
        trainer.check(signed, first=True)
        (order,) = orders
        assert order.header["gate"]["data_set"]["rules"] == [{"rule": "varies"}]
        assert order.header["gate"]["profile"] == str(trainer.home.profile_path("set-1"))

    @pytest.mark.parametrize(
        "answers",
        [
            [("failed", {"code": "QUALITY_GATE", "message": "It breaks a rule.", "field": "age"}, b"")],
            [("update", {}, b"")],
        ],
    )
    def test_a_broken_rule_refuses_and_so_does_one_that_was_not_checked(
        self, trainers: Trainers, signed, answers: list[Any]
    ) -> None:
        with pytest.raises(RefusedError) as err:
            ruled(trainers.make(answering(*answers))).check(signed, first=True)
        assert err.value.code == "QUALITY_GATE"

    @pytest.mark.parametrize("kind", ["failed", "update"])
    def test_what_else_keeps_it_from_the_rows_is_left_to_the_attempt(
        self, trainers: Trainers, signed, kind: str
    ) -> None:
        """The attempt is charged: nothing else that rests on the data is answered for nothing."""
        trainer = trainers.make(answering((kind, {"code": "DATA_TOO_FEW_ROWS", "message": "Too few."}, b"")))
        trainer.check(limited(signed))

    def test_rows_of_a_database_are_loaded_when_it_wants_them(self, trainers: Trainers, signed, monkeypatch) -> None:
        """The second order names the file; it is there as long as the trainer reads it, and told by nobody else."""
        files: list[Path] = []

        @contextlib.contextmanager
        def rows_of(home: AgentHome, data_set: Any, interrupt: Any, told: Any) -> Iterator[Path]:
            assert data_set.id == "set-1"
            (path := home.loaded / "x.arrow").write_text("rows")
            told(Isolation.parse(ISOLATION, code="TEST"))
            yield path
            path.unlink()

        def behave(pipe) -> None:
            ready(pipe)
            assert "loaded" not in pipe.receive(5.0).header
            pipe.send("wanted", {})
            files.append(Path(pipe.receive(5.0).header["loaded"]))
            assert files[0].read_text() == "rows"
            pipe.send("update", GOOD, UPDATE)
            pipe.receive(5.0)

        monkeypatch.setattr(children.loading, "rows_of", rows_of)
        trainer = trainers.make(behave)
        assert trainer.train(signed, 1, 1, BASE).update == UPDATE
        assert not files[0].exists()
        assert trainer.loader == Isolation.parse(ISOLATION, code="TEST")

    @pytest.mark.parametrize("code", ["DATA_SOURCE_AWAY", "DATA_QUERY_FAILED"])
    def test_rows_that_cannot_be_loaded(self, trainers: Trainers, signed, monkeypatch, code: str) -> None:
        """Before an attempt what is no row's fault is told; in an attempt all of it is a failure, and charged."""

        @contextlib.contextmanager
        def rows_of(*_: Any) -> Iterator[Path]:
            raise FailedError(code, "Not to be had.", file="postgresql://h:1/d")
            yield

        monkeypatch.setattr(children.loading, "rows_of", rows_of)
        trainer = trainers.make(answering(*[("wanted", {}, b"")] * 2))
        if code == "DATA_SOURCE_AWAY":
            with pytest.raises(InputError) as err:
                trainer.check(limited(signed))
            assert (err.value.code, err.value.file) == (code, "postgresql://h:1/d")
        else:
            trainer.check(limited(signed))
        with pytest.raises(TrainingFailedError) as failed:
            trainer.train(signed, 1, 1, BASE)
        assert failed.value.code == code
        assert len(trainers.spawner.children) == 1, "the trainer goes on"

    def test_a_large_source_is_looked_at_before_an_attempt(self, trainers: Trainers, signed, monkeypatch) -> None:
        monkeypatch.setattr(children.sources, "size", lambda *_: children.LARGE)
        trainer = trainers.make(answering(("checked", {"num_rows": 40, "fingerprints": ["a" * 64]}, b"")))
        trainer.check(signed)
        assert len(trainers.spawner.children) == 1

    @pytest.mark.parametrize("gone", ["no file", "a circle of links", "a file that this user may not read"])
    def test_files_that_are_away_cost_nothing(self, trainers: Trainers, signed, monkeypatch, gone: str) -> None:
        """A disk that is not mounted says nothing of any row: the code is told, no attempt is charged for it."""
        path = trainers.home.path / "rows.csv"
        if gone == "a file that this user may not read":
            monkeypatch.setattr(children.sources.os, "access", lambda *_: False)
        else:
            path.unlink()
        if gone == "a circle of links":
            path.symlink_to(path)
        trainer = trainers.make(answering())
        with pytest.raises(InputError) as err:
            trainer.check(signed)
        assert err.value.code in BEFORE_ROWS
        assert err.value.file == str(path)
        trainer.start()
        assert len(trainers.spawner.children) == 1, "and the agent goes on"

    def test_a_file_that_another_program_locks_costs_nothing(self, trainers: Trainers, signed) -> None:
        """Of an SQLite file the trainer says so, when it looks before an attempt."""
        before = 'path = "rows.csv"\nkind = "csv"'
        text = trainers.home.config_path.read_text().replace(before, 'path = "rows.csv"\nkind = "sqlite"\ntable = "t"')
        replace_file(trainers.home.config_path, text.encode())
        trainer = trainers.make(answering(("failed", {"code": "DATA_SOURCE_AWAY", "message": "Locked."}, b"")))
        with pytest.raises(InputError, match="DATA_SOURCE_AWAY"):
            trainer.check(signed)

    @pytest.mark.parametrize("moved", ["a file", "a link"])
    def test_what_took_a_sources_place_is_read_by_another_trainer(self, trainers: Trainers, signed, moved: str) -> None:
        """Landlock's rules are of what stood there when a trainer began."""
        path, new = trainers.home.path / "rows.csv", trainers.home.path / "new.csv"
        new.write_text(ROWS)
        if moved == "a link":
            path.rename(trainers.home.path / "old.csv")
            path.symlink_to("old.csv")
        trainer = trainers.make(answering(*[("update", GOOD, UPDATE)] * 2))
        trainer.train(signed, 1, 1, BASE)
        trainer.train(signed, 2, 1, BASE)
        assert len(trainers.spawner.children) == 1
        if moved == "a link":
            path.unlink()
            path.symlink_to("new.csv")
        else:
            new.replace(path)
        trainer.train(signed, 3, 1, BASE)
        assert len(trainers.spawner.children) == 2

    def test_a_library_that_ends_it_is_no_crash(self, trainers: Trainers, signed, monkeypatch) -> None:
        """polars and torch end the process where they get no memory: charged, refused, never tried again."""

        def behave(pipe) -> None:
            ready(pipe)
            pipe.receive(5.0)

        trainer = trainers.make(behave)
        monkeypatch.setattr("tests.support.fake_child.FakeChild.stop", aborted)
        with pytest.raises(TrainingFailedError) as err:
            trainer.train(signed, 1, 1, BASE)
        assert err.value.code == "TRAINING_MEMORY"

    def test_a_kind_that_it_may_not_send_closes_the_pipe(self, trainers: Trainers, signed) -> None:
        lost(trainers.make(answering(("order", {}, b""))), signed, "FRAME_KIND")
        assert trainers.spawner.children[0].pipe.closed

    @pytest.mark.parametrize("raw", [b"\x00", b"\xf1\x05", b"\xf1" + b"\xff" * 12, b"garbage on the pipe"])
    def test_a_malformed_frame_closes_the_pipe(self, trainers: Trainers, signed, raw: bytes) -> None:
        def behave(pipe) -> None:
            ready(pipe)
            pipe.receive(5.0)
            os.write(pipe._fds[1], raw)

        trainer = trainers.make(behave)
        with pytest.raises(TrainerLostError) as err:
            trainer.train(signed, 1, 1, BASE)
        assert err.value.code.startswith("FRAME_")
        assert trainers.spawner.children[0].pipe.closed

    def test_one_that_ends_without_an_answer(self, trainers: Trainers, signed) -> None:
        def behave(pipe) -> None:
            ready(pipe)
            pipe.receive(5.0)

        lost(trainers.make(behave), signed, "TRAINER_LOST")

    def test_one_that_never_becomes_ready(self, trainers: Trainers, signed, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(children, "READY_SECONDS", 0.2)
        monkeypatch.setattr(children, "POLL_SECONDS", 0.05)
        lost(trainers.make(lambda pipe: pipe.receive(5.0) and pipe.receive(5.0)), signed, "FRAME_TIMEOUT")
        lost(trainers.make(lambda pipe: pipe.receive(5.0) and None), signed, "TRAINER_LOST")
        assert len(trainers.spawner.children) == 2, "it is tried twice"

    def test_one_that_begins_with_something_else(self, trainers: Trainers, signed) -> None:
        def behave(pipe) -> None:
            pipe.receive(5.0)
            pipe.send("update", GOOD, UPDATE)

        lost(trainers.make(behave), signed, "TRAINER_ANSWER")

    def test_one_that_hangs_is_ended_and_the_next_one_starts(self, trainers: Trainers, signed, monkeypatch) -> None:
        """Time is no crash: no other attempt at this round."""
        monkeypatch.setattr(children, "TRAIN_SECONDS", 0.3)
        monkeypatch.setattr(children, "POLL_SECONDS", 0.05)
        short = signed.participation.model_copy(update={"deadline_seconds": 0})
        signed = signed.model_copy(update={"participation": short})

        over = threading.Event()

        def hang(pipe) -> None:
            ready(pipe)
            pipe.receive(5.0)
            over.wait(10.0)

        trainer = trainers.make(hang, answering(("update", GOOD, UPDATE)))
        begun = time.monotonic()
        with pytest.raises(TrainingFailedError) as err:
            trainer.train(signed, 1, 1, BASE)
        assert err.value.code == "TRAINING_TIME"
        assert children.FAILURE.fullmatch(err.value.code), "a code that may leave"
        assert 0.3 <= time.monotonic() - begun < 4
        assert [child.stopped for child in trainers.spawner.children] == [True, False], "the next one starts at once"
        assert trainer.train(signed, 2, 1, BASE).update == UPDATE
        over.set()

    def test_it_has_the_rounds_whole_time(self, trainers: Trainers, signed, monkeypatch) -> None:
        monkeypatch.setattr(children, "TRAIN_SECONDS", 0.1)
        monkeypatch.setattr(children, "POLL_SECONDS", 0.05)
        assert signed.participation.deadline_seconds == 60

        def slow(pipe) -> None:
            ready(pipe)
            pipe.receive(5.0)
            time.sleep(0.5)
            pipe.send("update", GOOD, UPDATE)
            pipe.receive(5.0)

        assert trainers.make(slow).train(signed, 1, 1, BASE).update == UPDATE

    def test_a_real_process_that_hangs_is_killed(self, home: AgentHome, signed, monkeypatch) -> None:
        program = """
import signal, time
from fedpact_client.spawn import child_main
pipe = child_main()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pipe.receive(10)
pipe.send("ready", {"isolation": ISOLATION})
pipe.receive(30)
time.sleep(600)
""".replace("ISOLATION", repr(ISOLATION))
        monkeypatch.setattr(children, "spawn", partial(spawn, command=[sys.executable, "-I", "-c", program]))
        monkeypatch.setattr(children, "TRAIN_SECONDS", 0.2)
        short = signed.participation.model_copy(update={"deadline_seconds": 0})
        trainer = TrainerChild(home=home, config=home.config(), key=b"k" * 32)
        trainer.start()
        first = trainer._child.process
        with pytest.raises(TrainingFailedError):
            trainer.train(signed.model_copy(update={"participation": short}), 1, 1, BASE)
        assert first.returncode == -signal.SIGKILL
        assert trainer._child.process.pid != first.pid
        trainer.stop()

    def test_what_it_got_is_known_before_the_first_order(self, trainers: Trainers) -> None:
        trainer = trainers.make(answering())
        trainer.look()
        assert trainer.isolation is None, "not started"
        trainer.start()
        until = time.monotonic() + 5
        while trainer.isolation is None and time.monotonic() < until:
            trainer.look()
        assert trainer.isolation == Isolation.parse(ISOLATION, code="X")
        trainer.look()
        assert not trainers.spawner.children[0].stopped

    @pytest.mark.parametrize("header", [{}, {"isolation": {}}, {"isolation": ISOLATION | {"more": 1}}])
    def test_one_that_does_not_say_what_it_got_is_ended(self, trainers: Trainers, header: dict[str, Any]) -> None:
        def behave(pipe) -> None:
            pipe.receive(5.0)
            pipe.send("ready", header)
            pipe.receive(5.0)

        trainer = trainers.make(behave)
        trainer.start()
        until = time.monotonic() + 5
        while not trainers.spawner.children[0].stopped and time.monotonic() < until:
            trainer.look()
        assert trainers.spawner.children[0].stopped
        assert trainer.isolation is None

    @pytest.mark.parametrize("when", ["training", "starting"])
    def test_a_stop_does_not_wait_for_it(self, trainers: Trainers, signed, when: str, monkeypatch) -> None:
        monkeypatch.setattr(children, "POLL_SECONDS", 0.05)
        reached = threading.Event()

        def behave(pipe) -> None:
            if when == "training":
                ready(pipe)
            pipe.receive(10.0)
            reached.set()
            pipe.receive(30.0)

        trainer = trainers.make(behave)

        def stop() -> None:
            reached.wait(10.0)
            trainers.stopping = True

        threading.Thread(target=stop).start()
        begun = time.monotonic()
        with pytest.raises(CancelledError) as err:
            trainer.train(signed, 1, 1, BASE)
        assert err.value.code == "AGENT_STOPPING"
        assert time.monotonic() - begun < 10

    def test_a_person_pauses_while_it_trains(self, trainers: Trainers, signed) -> None:
        reached = threading.Event()

        def behave(pipe) -> None:
            ready(pipe)
            pipe.receive(5.0)
            reached.set()
            pipe.receive(30.0)

        trainer = trainers.make(behave)

        def pause() -> None:
            reached.wait(10.0)
            trainers.paused = True

        threading.Thread(target=pause).start()
        with pytest.raises(RefusedError) as err:
            trainer.train(signed, 1, 1, BASE)
        assert err.value.code == "PARTICIPANT_PAUSED"
        assert trainers.spawner.children[0].stopped, "the process was ended"

    def test_a_data_set_that_the_configuration_lost(self, trainers: Trainers, signed) -> None:
        trainer = trainers.make(answering())
        other = signed.model_copy(
            update={
                "participants": tuple(
                    p.model_copy(update={"data_set": "gone"}) if p.data_set == "set-1" else p
                    for p in signed.participants
                )
            }
        )
        with pytest.raises(InputError) as err:
            trainer.train(other, 1, 1, BASE)
        assert err.value.code == "CONFIG_DATA_SET"

    def test_a_process_that_is_killed(self, home: AgentHome, signed, monkeypatch: pytest.MonkeyPatch) -> None:
        """A real process: killed while it trains, it is lost; the next attempt has another one."""
        program = """
from fedpact_client.spawn import child_main
pipe = child_main()
pipe.receive(10)
pipe.send("ready", {"isolation": ISOLATION})
pipe.receive(30)
pipe.receive(60)
""".replace("ISOLATION", repr(ISOLATION))
        command = [sys.executable, "-I", "-c", program]
        monkeypatch.setattr(children, "spawn", partial(spawn, command=command))
        trainer = TrainerChild(home=home, config=home.config(), key=b"k" * 32)
        trainer.start()
        first = trainer._child.process.pid

        def kill() -> None:
            time.sleep(1.0)
            os.kill(first, signal.SIGKILL)

        threading.Thread(target=kill).start()
        lost(trainer, signed, "TRAINER_LOST")
        trainer.start()
        assert trainer._child.process.pid != first
        trainer.stop()


class TestExecutor:
    @pytest.fixture
    def executors(self, home: AgentHome, monkeypatch: pytest.MonkeyPatch):
        spawners = []

        def make(*behaviours, **options: Any) -> tuple[ExecutorChild, Spawner]:
            spawner = Spawner(*behaviours, **options)
            spawners.append(spawner)
            monkeypatch.setattr(children, "spawn", spawner)
            return ExecutorChild(home=home, config=home.config()), spawner

        yield make
        for spawner in spawners:
            spawner.stop()

    def test_it_is_told_where_the_operator_is_and_nothing_secret(self, executors, home: AgentHome) -> None:
        seen: list[Any] = []
        executor, spawner = executors(lambda pipe: seen.append(pipe.receive(5.0)))
        executor.start()
        spawner.children[0].join()
        (frame,) = seen
        assert frame.kind == "setup"
        assert frame.header["superlink"] == "fl.example.cn:8443"
        assert frame.header["ca"] == str(home.ca_path)
        assert frame.header["node_key"] == str(home.node_key_path), "a path: the key is read there"
        secret = home.node_key_path.read_text()
        assert secret.splitlines()[1] not in json.dumps(frame.header)
        assert (home.path / "flower").stat().st_mode & 0o077 == 0
        module, options = spawner.asked[0]
        assert (module, options["kinds"]) == ("fedpact_client.executor", EXECUTOR_KINDS)
        assert options.keys() == {"log", "max_array", "kinds"}

    def test_orders_and_replies(self, executors) -> None:
        got: list[Any] = []

        def behave(pipe) -> None:
            pipe.receive(5.0)
            pipe.send("order", {"order": "{}", "bundle": "b"}, b"12345678")
            got.append(pipe.receive(5.0))

        executor, spawner = executors(behave)
        executor.start()
        assert executor.alive
        frame = executor.receive(5.0)
        assert (frame.kind, frame.header, frame.array) == ("order", {"order": "{}", "bundle": "b"}, b"12345678")
        executor.send("drop", {})
        spawner.children[0].join()
        assert got[0].kind == "drop"

    def test_what_it_says_of_itself_is_noted(self, executors) -> None:
        def behave(pipe) -> None:
            pipe.receive(5.0)
            pipe.send("ready", {"isolation": ISOLATION | {"network_kept": True}})
            pipe.send("connected", {"node": "7"})
            pipe.send("order", {})
            pipe.receive(5.0)

        executor, _ = executors(behave, lambda pipe: pipe.receive(5.0) and pipe.receive(5.0))
        executor.start()
        assert (executor.isolation, executor.connected) == (None, False)
        assert executor.receive(5.0) is None
        assert executor.isolation.network_kept
        assert executor.receive(5.0) is None
        assert executor.connected
        assert executor.receive(5.0).kind == "order"
        executor.start()
        assert (executor.isolation, executor.connected) == (None, False), "the next one has not said it yet"

    def test_the_next_one_is_told_the_connection_of_the_one_before(self, executors) -> None:
        setups: list[dict[str, Any]] = []

        def behave(pipe) -> None:
            setups.append(pipe.receive(5.0).header)
            pipe.send("connected", {"node": str(2**64 - 1)})

        executor, spawner = executors(behave, behave)
        for number in range(2):
            executor.start()
            executor.receive(5.0)
            spawner.children[number].join()
        assert [setup.get("earlier") for setup in setups] == [None, str(2**64 - 1)]

    @pytest.mark.parametrize(
        ("kind", "header"),
        [
            *(("ready", header) for header in ({}, {"isolation": None}, {"isolation": {"missing": ["x"]}})),
            *(("connected", h) for h in ({}, {"node": 7}, {"node": "-1"}, {"node": "7\n"}, {"node": "1" * 21})),
        ],
    )
    def test_an_isolation_or_a_number_that_is_none_breaks_the_rules(
        self, executors, kind: str, header: dict[str, Any]
    ) -> None:
        executor, _ = executors(lambda pipe: pipe.receive(5.0) and pipe.send(kind, header))
        executor.start()
        with pytest.raises(FrameError) as err:
            executor.receive(5.0)
        assert err.value.code == "FRAME_HEADER"
        assert (executor.isolation, executor.connected, executor.node) == (None, False, None)

    def test_nothing_within_the_time_is_nothing(self, executors) -> None:
        executor, _ = executors(lambda pipe: pipe.receive(5.0) and pipe.receive(5.0))
        assert executor.receive(0.0) is None, "not started"
        executor.send("drop", {})
        executor.start()
        assert executor.receive(0.05) is None
        assert executor.alive

    def test_one_that_has_ended_is_not_alive(self, executors) -> None:
        executor, spawner = executors(lambda pipe: pipe.receive(5.0) and None)
        executor.start()
        spawner.children[0].join()
        assert executor.receive(5.0) is None
        assert not executor.alive
        executor.stop()
        executor.stop()
        assert executor.receive(0.0) is None
        assert executor.exit_code == 0

    @pytest.mark.parametrize("kind", ["reply", "setup", "update"])
    def test_a_kind_that_it_may_not_send(self, executors, kind: str) -> None:
        def behave(pipe) -> None:
            pipe.receive(5.0)
            pipe.send(kind, {})

        executor, _ = executors(behave)
        executor.start()
        with pytest.raises(FrameError) as err:
            executor.receive(5.0)
        assert err.value.code == "FRAME_KIND"
        assert not executor.alive

    def test_an_agent_that_is_not_enrolled(self, home: AgentHome) -> None:
        text = home.config_path.read_text().replace('url = "https://fl.example.cn:8443"', 'url = ""')
        replace_file(home.config_path, text.encode())
        with pytest.raises(InputError) as err:
            ExecutorChild(home=home, config=home.config()).start()
        assert err.value.code == "NOT_ENROLLED"

    def test_a_log_that_cannot_be_written(self, home: AgentHome) -> None:
        (home.logs / "executor.log").mkdir()
        with pytest.raises(FailedError) as err:
            ExecutorChild(home=home, config=home.config()).start()
        assert err.value.code == "SPAWN_LOG"
