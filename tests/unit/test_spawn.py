"""Children: a clean start, a pipe that stray prints cannot corrupt, and never an orphan."""

import gc
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from fedpact_client.frames import FrameError
from fedpact_client.spawn import PARENT, Child, child_main, spawn
from fedpact_contract.errors import FailedError, InputError

ECHO = """
    from fedpact_client.spawn import child_main
    pipe = child_main(kinds=frozenset({"k"}))
    while (frame := pipe.receive()) is not None:
        pipe.send("echo", frame.header, frame.array)
"""
REPORT = """
    import os, sys
    from pathlib import Path
    from fedpact_client.spawn import child_main
    pipe = child_main()
    status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    pipe.send("report", {
        "env": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path,
        "fds": sorted(int(n) for n in os.listdir("/proc/self/fd")), "nnp": status["NoNewPrivs"],
        "session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(),
        "stdin": os.readlink("/proc/self/fd/0"), "isolated": sys.flags.isolated,
    })
    pipe.receive()
"""


def start(code: str, **values) -> Child:
    values = {"log": None} | values
    return spawn("none", command=[sys.executable, "-I", "-c", textwrap.dedent(code)], **values)


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process ends (or is a zombie) in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_frames_go_both_ways_and_closing_the_pipe_ends_the_child():
    with start(ECHO) as child:
        assert child.running
        child.pipe.send("k", {"a": 1}, b"x" * 100_000)
        frame = child.pipe.receive(10)
        assert frame is not None
        assert (frame.kind, frame.header, len(frame.array)) == ("echo", {"a": 1}, 100_000)
        assert child.stop() == 0
        assert not child.running
        assert child.stop() == 0
        with pytest.raises(FrameError, match="FRAME_CLOSED"):
            child.pipe.receive()


def test_a_module_is_started_by_its_name(tmp_path):
    with spawn("fedpact_client.trainer", log=tmp_path / "log", kinds=frozenset({"ready"})) as child:
        child.pipe.send("train", {})  # a setup is due first
        assert child.pipe.receive(20) is None
        assert child.process.wait(5) == 1
    assert "TRAINER_ORDER" in (tmp_path / "log").read_text()


def test_the_child_starts_clean(monkeypatch):
    monkeypatch.setenv("FEDPACT_PASSPHRASE", "planted")
    monkeypatch.setenv("PYTHONPATH", "/planted")
    leak_read, leak_write = os.pipe()
    os.set_inheritable(leak_write, True)  # a library that forgot close-on-exec
    try:
        with start(REPORT, extra_env={"EXTRA": "1"}, args=["one"]) as child:
            frame = child.pipe.receive(10)
    finally:
        os.close(leak_read)
        os.close(leak_write)
    assert frame is not None
    found = frame.header
    assert found["env"].pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"  # Python's own, where the locale is C
    assert found["env"] == {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent", "EXTRA": "1"}
    assert found["argv"] == ["-c", "one"]
    assert found["cwd"] == "/"
    assert "/planted" not in found["path"]
    assert "" not in found["path"]
    assert found["isolated"] == 1
    assert found["fds"][:-1] == [0, 1, 2, 3, 4]  # the last is the listing's own
    assert len(found["fds"]) == 6
    assert found["stdin"] == "/dev/null"
    assert found["nnp"] == "1"
    assert found["session"]
    assert found["group"]


def test_stray_prints_go_to_the_log(tmp_path):
    log = tmp_path / "child.log"
    code = """
        import os, subprocess, sys
        from fedpact_client.spawn import child_main
        pipe = child_main()
        print("printed", flush=True)
        os.write(1, b"written\\n")
        subprocess.run(["/bin/echo", "by a program"])
        print("an error", file=sys.stderr)
        pipe.send("k", {"read": sys.stdin.read()})
    """
    for _ in range(2):
        with start(code, log=log) as child:
            frame = child.pipe.receive(10)
            assert frame is not None
            assert (frame.kind, frame.header) == ("k", {"read": ""})
            assert child.stop() == 0
    assert log.read_text() == "printed\nwritten\nby a program\nan error\n" * 2
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_log_does_not_fill_the_disk(tmp_path, monkeypatch):
    """An executor whose operator is away starts every few seconds, for weeks."""
    log = tmp_path / "child.log"
    monkeypatch.setattr("fedpact_client.spawn.LOG_BYTES", 10)
    for word in ("first", "second", "third"):
        log.write_text(f"the {word} was here\n")
        with start("", log=log):
            pass
    assert log.read_text() == ""
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["child.log", "child.log.1"]
    assert "third" in (tmp_path / "child.log.1").read_text()


def test_a_child_that_speaks_something_else_is_cut_off():
    with start("print('hello')") as child:
        with pytest.raises(FrameError, match="FRAME_MAGIC"):
            child.pipe.receive(10)
        assert child.pipe.closed


@pytest.mark.parametrize(
    ("deaf", "result"), [("", -signal.SIGTERM), ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", -signal.SIGKILL)]
)
def test_a_child_that_does_not_end_is_ended(deaf: str, result: int):
    code = f"""
        import signal, time
        from fedpact_client.spawn import child_main
        pipe = child_main()
        {deaf or "pass"}
        pipe.send("k", {{}})
        time.sleep(60)
    """
    child = start(code)
    assert child.pipe.receive(10) is not None
    began = time.monotonic()
    assert child.stop(0.1) == result
    assert time.monotonic() - began < 5


def test_a_childs_own_children_end_with_it():
    code = """
        import subprocess
        from fedpact_client.spawn import child_main
        pipe = child_main()
        pipe.send("k", {"pid": subprocess.Popen(["/bin/sleep", "60"]).pid})
        pipe.receive()
    """
    child = start(code)
    frame = child.pipe.receive(10)
    assert frame is not None
    assert child.stop() == 0  # it ended by itself, its own child did not
    assert gone(frame.header["pid"])


def test_a_child_outlives_the_thread_that_started_it():
    children: list[Child] = []
    thread = threading.Thread(target=lambda: children.append(start(ECHO)))
    thread.start()
    thread.join()
    (child,) = children
    with child:
        for _ in range(10):
            time.sleep(0.02)
            child.pipe.send("k", {})
            assert child.pipe.receive(10) is not None


def test_a_child_dies_with_a_parent_that_is_killed():
    code = f"""
        import sys, time
        from fedpact_client.spawn import spawn
        deaf = "import signal, time; from fedpact_client.spawn import child_main; pipe = child_main(); " \\
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); pipe.send('k', {{}}); time.sleep(60)"
        child = spawn("none", log=None, command=[{sys.executable!r}, "-I", "-c", deaf])
        child.pipe.receive(10)
        print(child.process.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-I", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid, 0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


def test_a_child_whose_parent_died_before_it_could_ask_ends_at_once():
    code = "from fedpact_client.spawn import child_main; child_main(); print('still here')"
    result = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env={PARENT: "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == b""


@pytest.mark.parametrize("value", ["", "x", "-1"])
def test_by_hand_it_says_that_it_is_not_meant_to_be(monkeypatch, value: str):
    monkeypatch.setenv(PARENT, value)
    with pytest.raises(InputError) as caught:
        child_main()
    assert caught.value.code == "SPAWN_BY_HAND"


def test_by_hand_the_trainer_ends_with_a_code():
    line = [sys.executable, "-I", "-m", "fedpact_client.trainer"]
    result = subprocess.run(line, env={}, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "SPAWN_BY_HAND" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_what_cannot_be_started(tmp_path):
    gc.collect()  # what earlier tests left open is none of this one's
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FailedError) as caught:
        spawn("none", log=None, command=[str(tmp_path / "missing")])
    assert caught.value.code == "SPAWN_FAILED"
    with pytest.raises(FailedError) as caught:
        spawn("none", log=tmp_path / "no" / "folder.log", command=[sys.executable])
    assert (caught.value.code, caught.value.file) == ("SPAWN_LOG", str(tmp_path / "no" / "folder.log"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


BUSY = """
    import os, time
    from fedpact_client.spawn import child_main
    pipe = child_main()
    pipe.receive()
    until = time.monotonic() + 1.0
    children = []
    for _ in range(4):
        if not (pid := os.fork()):
            while time.monotonic() < until:
                pass
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    pipe.send("used", {"seconds": str(sum(os.times()[:4]))})
    pipe.receive()
"""


def test_a_cap_on_processors_holds_for_whatever_it_starts():
    with start(BUSY, processors=1, nice=7) as child:
        pid = child.process.pid
        assert len(os.sched_getaffinity(pid)) == 1
        assert os.sched_getaffinity(pid) <= os.sched_getaffinity(0)
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
        before = time.monotonic()
        child.pipe.send("go", {})
        frame = child.pipe.receive(30)
        assert frame is not None
        assert float(frame.header["seconds"]) <= 1.25 * (time.monotonic() - before), "four that spin, on one processor"


def test_more_processors_than_there_are_is_all_of_them():
    with start(ECHO, processors=1024) as child:
        assert os.sched_getaffinity(child.process.pid) == os.sched_getaffinity(0)
