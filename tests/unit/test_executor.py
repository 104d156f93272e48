"""The executor's loop between guard and Flower, with both of them doubled; and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from fedpact_client import executor
from fedpact_client.executor import KINDS, ProtocolError, handle, work
from fedpact_client.frames import FrameError, Pipe
from fedpact_client.home import init
from fedpact_client.sandbox import Isolation, landlock_abi
from fedpact_client.spawn import spawn
from fedpact_contract.errors import InputError

PATIENCE = 30.0


class FakeTask:
    def __init__(self, order=b'{"round": 1}', model=b"12345678", bundle="ab" * 32):
        self.order, self.model, self.bundle = order, model, bundle
        self.answered = []

    def answer(self, reply, array):
        self.answered.append((reply, array))

    def fail(self, text):
        self.answered.append(text)


class FakeOrders:
    poll_seconds = 0.001
    node = None

    def __init__(self, *tasks):
        self.tasks = list(tasks)

    def take(self):
        return self.tasks.pop(0) if self.tasks else None


@pytest.fixture
def ends():
    """The guard's end and the executor's end of one pipe."""
    down, up = os.pipe(), os.pipe()
    guard = Pipe(up[0], down[1], max_array=1000, max_header=1000)
    ours = Pipe(down[0], up[1], max_array=1000, max_header=1000, kinds=KINDS)
    yield guard, ours
    guard.close()
    ours.close()


def in_background(function, *args):
    """Run in a thread; returns a function that waits for its result or raises its error."""
    outcome = []

    def target():
        try:
            outcome.append((function(*args), None))
        except FrameError as err:
            outcome.append((None, err))
        except ProtocolError as err:
            outcome.append((None, err))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()

    def result():
        thread.join(PATIENCE)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return result


class TestWork:
    def test_an_order_is_handed_over_and_answered(self, ends):
        guard, ours = ends
        task = FakeTask()
        result = in_background(work, ours, FakeOrders(task))
        frame = guard.receive(PATIENCE)
        assert (frame.kind, frame.array) == ("order", b"12345678")
        assert frame.header == {"order": '{"round": 1}', "bundle": "ab" * 32}
        guard.send("reply", {"reply": "好"}, b"abcd")
        guard.close()
        assert result() is None
        assert task.answered == [("好".encode(), b"abcd")]

    def test_one_at_a_time(self, ends):
        guard, ours = ends
        tasks = [FakeTask(b"1"), FakeTask(b"2")]
        orders = FakeOrders(*tasks)
        in_background(work, ours, orders)
        assert guard.receive(PATIENCE).header["order"] == "1"
        with pytest.raises(FrameError) as caught:
            guard.receive(0.1)
        assert caught.value.code == "FRAME_TIMEOUT"
        assert orders.tasks == [tasks[1]]
        guard.send("drop", {})
        assert guard.receive(PATIENCE).header["order"] == "2"
        assert tasks[0].answered == ["E_NO_REPLY"]
        assert tasks[1].answered == []

    def test_that_it_is_connected_is_told_once(self, ends):
        guard, ours = ends
        orders = FakeOrders()
        result = in_background(work, ours, orders)
        with pytest.raises(FrameError) as caught:
            guard.receive(0.1)
        assert caught.value.code == "FRAME_TIMEOUT"
        orders.node = 2**64 - 1
        told = guard.receive(PATIENCE)
        assert (told.kind, told.header) == ("connected", {"node": str(2**64 - 1)})
        with pytest.raises(FrameError) as caught:
            guard.receive(0.1)
        assert caught.value.code == "FRAME_TIMEOUT"
        guard.close()
        result()

    def test_it_ends_when_the_guard_goes_while_idle(self, ends):
        guard, ours = ends
        result = in_background(work, ours, FakeOrders())
        guard.close()
        assert result() is None

    def test_it_ends_when_the_guard_goes_within_an_order(self, ends):
        guard, ours = ends
        task = FakeTask()
        result = in_background(work, ours, FakeOrders(task))
        guard.receive(PATIENCE)
        guard.close()
        assert result() is None
        assert task.answered == []

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_a_frame_without_an_order_is_a_fault(self, ends, kind):
        guard, ours = ends
        guard.send(kind, {})
        with pytest.raises(ProtocolError):
            work(ours, FakeOrders())

    def test_bytes_that_are_no_frame(self, ends):
        _, ours = ends
        guard, _ = ends
        os.write(guard._fds[1], b"nonsense that is long enough for a prefix")
        with pytest.raises(FrameError) as caught:
            work(ours, FakeOrders())
        assert caught.value.code == "FRAME_MAGIC"


class TestHandle:
    @pytest.mark.parametrize(
        "task",
        [
            FakeTask(order=b"\xff\xfe"),
            FakeTask(order=b"x" * 1001),
            FakeTask(model=b"x" * 1001),
            FakeTask(order="\ud800".encode("utf-8", "surrogatepass")),
            FakeTask(order=None),
        ],
        ids=["no text", "long order", "long model", "surrogate", "another form"],
    )
    def test_an_order_that_cannot_be_handed_over(self, ends, task):
        """Nothing leaves before the guard, who enters it in the egress ledger, has said so."""
        guard, ours = ends
        result = in_background(handle, ours, task)
        frame = guard.receive(PATIENCE)
        assert (frame.kind, frame.header, frame.array) == ("malformed", {}, b"")
        assert task.answered == []
        guard.send("drop", {})
        assert result() is True
        assert task.answered == ["E_ORDER_FORM"]

    def test_what_is_no_order_gets_no_reply(self, ends):
        guard, ours = ends
        task = FakeTask(order=None)
        result = in_background(handle, ours, task)
        guard.receive(PATIENCE)
        guard.send("reply", {"reply": "{}"})
        with pytest.raises(ProtocolError):
            result()
        assert task.answered == []

    @pytest.mark.parametrize("header", [{}, {"reply": 5}, {"reply": None}, {"answer": "x"}])
    def test_a_reply_without_text(self, ends, header):
        guard, ours = ends
        task = FakeTask()
        guard.send("reply", header)
        with pytest.raises(ProtocolError):
            handle(ours, task)
        assert task.answered == []

    def test_another_frame_in_place_of_a_reply(self, ends):
        guard, ours = ends
        guard.send("setup", {})
        with pytest.raises(ProtocolError):
            handle(ours, FakeTask())

    def test_a_guard_that_is_gone(self, ends):
        guard, ours = ends
        guard.close()
        with pytest.raises(FrameError) as caught:
            handle(ours, FakeTask())
        assert caught.value.code == "FRAME_PEER_GONE"


class FakeNode:
    """What `_run` needs of a SuperNode."""

    def __init__(self, end, failed=False):
        self.end, self.failed = end, failed

    def run(self):
        self.end()

    def activation_failed(self, err):
        return self.failed


def leave(code):
    def end():
        raise SystemExit(code)

    return end


def caught(number):
    def end():
        signal.signal(number, lambda *_: sys.exit(0))
        os.kill(os.getpid(), number)
        signal.pause()

    return end


@pytest.mark.parametrize(
    ("end", "failed", "code"),
    [
        (lambda: None, False, executor.EXIT_UNAVAILABLE),
        (leave(1), False, executor.EXIT_UNAVAILABLE),
        (leave(1), True, executor.EXIT_RETRY),
        (leave(0), False, executor.EXIT_OK),
        (caught(signal.SIGTERM), False, executor.EXIT_OK),
        (caught(signal.SIGINT), False, executor.EXIT_REFUSED),
    ],
    ids=["ended", "exit 1", "not activated", "exit 0", "SIGTERM", "SIGINT"],
)
def test_exit_codes(end, failed, code):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert executor._run(FakeNode(end, failed)) == code
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_exit_codes_are_told_apart():
    names = [name for name in vars(executor) if name.startswith("EXIT_")]
    assert len({getattr(executor, name) for name in names}) == len(names) == 7


SETUP = {
    "superlink": "operator.example:8443",
    "ca": "/a",
    "node_key": "/b",
    "home": "/c",
    "poll_seconds": "0.1",
    "patched": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {"superlink": "https://operator.example"},
        {"superlink": "operator.example"},
        {"poll_seconds": 0.1},
        {"poll_seconds": "often"},
        {"patched": "yes"},
        {"more": 1},
        {"ca": None},
    ],
)
def test_a_setup_of_another_form(change):
    assert executor.Setup.parse(SETUP, code="X").superlink == "operator.example:8443"
    with pytest.raises(InputError):
        executor.Setup.parse(SETUP | change, code="X")


class TestProcess:
    """The process itself, up to where Flower would be needed."""

    @pytest.fixture
    def child(self, tmp_path):
        with spawn("fedpact_client.executor", log=tmp_path / "log", max_array=executor.MAX_ARRAY) as child:
            yield child

    def end(self, child, tmp_path):
        return child.process.wait(PATIENCE), (tmp_path / "log").read_text()

    def test_a_guard_that_says_nothing(self, child, tmp_path):
        child.pipe.close()
        code, log = self.end(child, tmp_path)
        assert code == executor.EXIT_SETUP
        assert "EXECUTOR_FRAME" in log

    def test_a_wrong_setup(self, child, tmp_path):
        child.pipe.send("setup", SETUP | {"patched": "yes"})
        code, log = self.end(child, tmp_path)
        assert code == executor.EXIT_SETUP
        assert "EXECUTOR_SETUP" in log

    @pytest.mark.landlock
    def test_flower_sees_no_key_ledger_or_row(self, tmp_path):
        """The executor itself, with a stand-in in Flower's place that tries what Flower should not."""
        home = init(tmp_path / "agent", name="N", entity_code="9" * 18, sector="x", passphrase=b"correct horse")
        rows = tmp_path / "rows.csv"
        rows.write_text("age\n1\n")
        (home.path / "keys" / "run" / "a.key").write_text("secret")
        home.ca_path.write_text("ca")
        program = f"""
            import json, sys, threading, time, types
            from pathlib import Path
            from fedpact_client import executor
            def tried(f):
                try:
                    f()
                except PermissionError:
                    return "refused"
                return "done"
            home = Path({str(home.path)!r})
            class SuperNode:
                poll_seconds, node = 0.05, 7
                def __init__(self, *, superlink, ca, node_key, patched_poll):
                    found = {{name: tried((home / name).read_bytes) for name in
                        ("keys/node.key", "keys/contract.key", "keys/run/a.key", "agent.db", "agent.toml")}}
                    found["rows"] = tried(Path({str(rows)!r}).read_bytes)
                    found["log"] = tried(lambda: (home / "logs" / "executor.log").write_text(""))
                    found |= {{"key": node_key.decode(), "ca": ca.decode(), "threads": threading.active_count()}}
                    (home / "flower" / "found").write_text(json.dumps(found))
                def start_runtime(self):
                    pass
                def run(self):
                    time.sleep(60)
                def take(self):
                    return None
            sys.modules["fedpact_client.supernode"] = types.SimpleNamespace(SuperNode=SuperNode)
            executor.main()
        """
        command = [sys.executable, "-I", "-c", textwrap.dedent(program)]
        with spawn("none", log=home.logs / "executor.log", command=command) as child:
            paths = {"ca": str(home.ca_path), "node_key": str(home.node_key_path), "home": str(home.path / "flower")}
            child.pipe.send("setup", SETUP | paths)
            ready = child.pipe.receive(PATIENCE)
            assert (ready.kind, child.pipe.receive(PATIENCE).kind) == ("ready", "connected")
        isolation = Isolation.parse(ready.header["isolation"], code="X")
        assert (isolation.landlock_abi, isolation.network_kept) == (landlock_abi(), True)
        found = json.loads((home.path / "flower" / "found").read_text())
        assert (found.pop("key"), found.pop("ca")) == (home.node_key_path.read_text(), "ca"), "handed over, not read"
        assert found.pop("threads") == 1, "what started earlier would be outside the fence"
        assert set(found.values()) == {"refused"}, found

    def test_files_that_are_missing(self, child, tmp_path):
        child.pipe.send("setup", SETUP | {"home": str(tmp_path / "flower")})
        code, log = self.end(child, tmp_path)
        assert code == executor.EXIT_SETUP
        assert "NODE_KEY_FORM" in log
        assert (tmp_path / "flower").stat().st_mode & 0o777 == 0o700

    def test_a_ca_that_is_missing_is_named(self, child, tmp_path):
        (tmp_path / "node.key").write_text("k")
        paths = {"home": str(tmp_path / "flower"), "node_key": str(tmp_path / "node.key"), "ca": str(tmp_path / "none")}
        child.pipe.send("setup", SETUP | paths)
        code, log = self.end(child, tmp_path)
        assert code == executor.EXIT_SETUP
        assert "CA_UNREADABLE" in log
        assert str(tmp_path / "none") in log

    def test_started_by_hand(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "fedpact_client.executor"], capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("SPAWN_BY_HAND: ")

    def test_nothing_of_flower_is_imported_before_the_environment_is_set(self):
        program = "import sys, fedpact_client.executor; print([m for m in sys.modules if m.split('.')[0] == 'flwr'])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("working", "expected"), [(True, [executor.EXIT_OK]), (False, [])])
def test_it_ends_where_the_guard_is_gone_and_flower_holds_the_working_thread_up(monkeypatch, working, expected):
    left = []
    monkeypatch.setattr(executor, "_leave", left.append)
    monkeypatch.setattr(executor, "GONE_SECONDS", 0.0)
    read_fd, write_fd = os.pipe()
    leaving = [] if working else [executor.EXIT_PROTOCOL]
    thread = threading.Thread(target=executor._watch_guard, args=(read_fd, leaving))
    thread.start()
    os.write(write_fd, b"a frame that nobody reads")
    thread.join(0.1)
    assert thread.is_alive()  # something to read is not the end
    os.close(write_fd)
    thread.join(10)
    os.close(read_fd)
    assert left == expected


def test_it_ends_where_the_name_servers_changed(monkeypatch):
    answers, left = [False, False, True], []
    monkeypatch.setattr(executor, "NAMES_SECONDS", 0.01)
    monkeypatch.setattr(executor, "names_are_lost", lambda: answers.pop(0))
    monkeypatch.setattr(executor, "_leave", left.append)
    leaving = []
    executor._watch_names(leaving)
    assert leaving == left == [executor.EXIT_UNAVAILABLE]


def test_the_environment_for_flower(monkeypatch, tmp_path):
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "0")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    executor._set_environment(Path(tmp_path / "home"))
    found = {name: value for name, value in os.environ.items() if name.startswith("FLWR_")}
    assert found == {
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    assert os.environ["TMPDIR"] == str(tmp_path / "home")
