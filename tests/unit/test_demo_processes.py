"""Every process that the demo started ends, with all below it, whatever ends the demo; and one that ends is named."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import process_child
from tests.support.proc import mentioning, with_default_signals

from fedpact_contract.errors import FailedError
from fedpact_server.demo import processes
from fedpact_server.demo.processes import Processes, free_port, reserve_port
from fedpact_server.serving import listen

ROOT = Path(__file__).resolve().parents[2]


def wait_for(what: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.02)


def begin(folder: Path, what: str) -> "subprocess.Popen[str]":
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, process_child.__file__, str(folder), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
        preexec_fn=with_default_signals,
    )


def finish(process: "subprocess.Popen[str]", folder: Path) -> tuple[int, str, float]:
    """Exit code, output, seconds; nothing is left of it."""
    begun = time.monotonic()
    try:
        out, _ = process.communicate(timeout=30)
        assert mentioning(str(folder)) == {}, out
    finally:
        process.kill()
        for pid in mentioning(str(folder)):
            os.kill(pid, signal.SIGKILL)
    assert "Traceback" not in out
    return process.returncode, out, time.monotonic() - begun


SEEN = {"call": "slow.pid", "shown": "shown.pid", "each": "slow2.pid", "own-work": "both"}
"""What a stand-in's demo is doing, and the file that is there by then; of both that are waited for."""


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (signal.SIGINT, "call"),
        (signal.SIGTERM, "call"),
        (signal.SIGHUP, "call"),
        (signal.SIGTERM, "shown"),
        (signal.SIGTERM, "each"),
        (signal.SIGHUP, "own-work"),
    ],
)
def test_a_signal_ends_everything_like_ctrl_c(tmp_path, number, what) -> None:
    process = begin(tmp_path, what)
    wait_for((tmp_path / SEEN[what]).exists)
    process.send_signal(number)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert re.fullmatch(r"Stopping [2-5] processes…\n", said), "at once, before anything has ended"
    assert mentioning(str(tmp_path))
    process.send_signal(number)  # somebody who is impatient changes nothing
    code, out, _ = finish(process, tmp_path)
    assert code == 130, out
    assert "Interrupted." in out
    assert (tmp_path / "interrupted").exists() == (what == "shown"), "what has the terminal gives it back in order"


def test_a_demo_that_is_killed_takes_its_processes_with_it(tmp_path) -> None:
    process = begin(tmp_path, "call")
    wait_for((tmp_path / "slow.pid").exists)
    pids = {int((tmp_path / f"{name}.pid").read_text()) for name in ("parent", "slow")}
    try:
        assert pids <= mentioning(str(tmp_path)).keys()
        process.kill()
        wait_for(lambda: not pids & mentioning(str(tmp_path)).keys())
    finally:
        for pid in mentioning(str(tmp_path)):  # what ignores SIGTERM, or is below it without asking for its end
            os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(("what", "killed"), [("call", "parent"), ("each", "stubborn"), ("own-work", "parent")])
def test_a_process_that_is_killed_is_noticed_at_once_and_its_children_are_ended(tmp_path, what, killed) -> None:
    process = begin(tmp_path, what)
    wait_for((tmp_path / SEEN[what]).exists)
    os.kill(int((tmp_path / f"{killed}.pid").read_text()), signal.SIGKILL)
    begun = time.monotonic()
    code, out, _ = finish(process, tmp_path)
    assert code == 1
    assert time.monotonic() - begun < 12
    assert "DEMO_PROCESS_ENDED" in out
    assert f"The process of {killed} ended during the step “some step”: signal SIGKILL." in out
    assert f"file: {tmp_path / 'logs' / killed}.log" in out


def test_a_command_that_fails_ends_everything_and_tells_its_own_error(tmp_path) -> None:
    code, out, _ = finish(begin(tmp_path, "failing"), tmp_path)
    assert code == 1
    assert "SOME_CODE: `stand-in failing` failed: It is so." in out
    assert "file: a.csv" in out
    assert "field: f" in out


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(processes, "command", processes.command)
    monkeypatch.setattr(processes, "GRACE_SECONDS", processes.GRACE_SECONDS)
    process_child.install(tmp_path)
    return tmp_path


def test_a_commands_object_is_returned_and_nothing_can_be_started_after_the_end(stand_ins) -> None:
    made = Processes()
    assert made.call(["stand-in", "quick"]) == {"said": "done"}
    made.stop()
    for call in (lambda: made.call(["stand-in", "quick"]), lambda: made.start("x", ["stand-in", "x"], stand_ins / "l")):
        with pytest.raises(FailedError) as err:
            call()
        assert err.value.code == "DEMO_ENDING"
    assert not (stand_ins / "x.pid").exists()


def test_a_command_that_takes_too_long_is_ended(stand_ins) -> None:
    with pytest.raises(FailedError) as err:
        Processes().call(["stand-in", "slow"], seconds=0.5)
    assert err.value.code == "DEMO_STEP_SLOW"
    assert mentioning(str(stand_ins)) == {}


def test_a_process_that_ended_is_the_cause_of_what_a_command_says(stand_ins) -> None:
    made = Processes(step="enrolment")
    process = made.start("Operator", ["stand-in", "quick"], stand_ins / "operator.log")
    process.wait()
    with pytest.raises(FailedError) as err:
        made.call(["stand-in", "failing"])
    assert (err.value.code, err.value.party) == ("DEMO_PROCESS_ENDED", "Operator")
    assert "enrolment" in err.value.message
    assert "exit code 0" in err.value.message
    assert err.value.file == str(stand_ins / "operator.log")
    made.stop()


def test_what_is_let_go_runs_on(stand_ins) -> None:
    made = Processes()
    process = made.start("Operator", ["stand-in", "slow"], stand_ins / "operator.log")
    assert made.let_go() == {"Operator": process.pid}
    made.check()
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_reserved_port_is_nobody_elses_and_lies_below_those_of_outgoing_connections() -> None:
    with reserve_port() as held:
        port = held.getsockname()[1]
        assert port in processes.PORTS
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with listen("0.0.0.0", port) as server:
            assert server.getsockname()[1] == port, "our server listens where the port is held for it"
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(processes.PORTS) < low
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))


def test_what_the_demo_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedError, match=r"COMMAND_MISSING.*fedpact-nothing"):
        processes.command("fedpact-nothing")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(processes, "PORTS", range(port, port + 1))
        monkeypatch.setattr(processes.random, "sample", lambda ports, _: list(ports))
        with pytest.raises(FailedError, match="DEMO_PORT"):
            reserve_port()


def test_what_does_not_come_in_time_is_named() -> None:
    started = Processes()
    with pytest.raises(FailedError, match=r"DEMO_SLOW.*the operator is not ready after 0\.1 seconds"):
        started.wait_for(lambda: False, "the operator", 0.1)
