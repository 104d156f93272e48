"""The SuperExec's supervision, with a program of the test's in Flower's place."""

import os
import stat
import time

import pytest

from fedpact_contract.errors import InputError
from fedpact_server import superexec
from fedpact_server.superexec import SuperExec, SuperExecConfig, child_environment

PATIENCE = 20.0
SECRET = b"\x00secret\n" + bytes(range(32))


def program(folder, text):
    """Put a program on the path under the name of Flower's."""
    path = folder / "flower-superexec"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(superexec.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(superexec, "RESTART_SECONDS", (0.05, 0.2))
    monkeypatch.setattr(superexec, "GRACE_SECONDS", 1.0)
    started = []

    def go(text):
        program(tmp_path, text)
        config = SuperExecConfig(
            address="127.0.0.1:1",
            ca=tmp_path / "ca.crt",
            secret=SECRET,
            log=tmp_path / "log",
            environment=child_environment({"FEDPACT_HOME": "/home"}),
        )
        it = SuperExec(config)
        started.append(it)
        it.start()
        return it

    yield go
    for it in started:
        it.stop()


def wait(what):
    patience = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < patience
        time.sleep(0.01)


def test_the_secret_goes_in_by_standard_input_alone(start, tmp_path):
    start(f'cat /dev/stdin > {tmp_path}/got; echo "$@" > {tmp_path}/argv; env > {tmp_path}/env; sleep 60')
    wait(lambda: (tmp_path / "env").exists() and (tmp_path / "env").read_text().endswith("\n"))
    assert (tmp_path / "got").read_bytes() == SECRET
    argv = (tmp_path / "argv").read_text()
    assert "--superexec-auth-secret-file /dev/stdin" in argv
    assert f"--parent-pid {os.getpid()}" in argv
    assert "secret\n" not in (tmp_path / "env").read_text()


def test_it_is_started_again(start, tmp_path):
    it = start(f"echo x >> {tmp_path}/starts; exit 3")
    wait(lambda: (tmp_path / "starts").exists() and len((tmp_path / "starts").read_text()) >= 6)
    it.stop()
    starts = (tmp_path / "starts").read_text()
    time.sleep(0.4)
    assert (tmp_path / "starts").read_text() == starts


def test_a_program_that_ends_before_it_reads_the_secret_is_no_error(start, tmp_path):
    start(f"exec 0<&-; echo x >> {tmp_path}/starts; exit 0")
    wait(lambda: (tmp_path / "starts").exists() and len((tmp_path / "starts").read_text()) >= 4)


def test_stopping_ends_what_it_started_too(start, tmp_path):
    it = start(f"sleep 600 & echo $! > {tmp_path}/child; wait")
    wait(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip())
    child, parent = int((tmp_path / "child").read_text()), it.pid
    it.stop()
    assert it.pid is None
    for pid in (child, parent):
        wait(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110 - a process, not a file


def test_one_that_ignores_sigterm_is_killed(start, tmp_path):
    it = start(f"trap '' TERM; echo x > {tmp_path}/up; while :; do sleep 0.1; done")
    wait(lambda: (tmp_path / "up").exists())
    begun = time.monotonic()
    it.stop()
    assert it.pid is None
    assert time.monotonic() - begun < PATIENCE


def test_its_output_is_the_owners_alone(start, tmp_path):
    start("echo hello; echo there >&2; sleep 60")
    wait(lambda: (tmp_path / "log").exists() and "there" in (tmp_path / "log").read_text())
    assert "hello" in (tmp_path / "log").read_text()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_flower_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(superexec.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    config = SuperExecConfig(address="x:1", ca=tmp_path, secret=b"x", log=tmp_path / "log", environment={})
    with pytest.raises(InputError) as caught:
        SuperExec(config)
    assert caught.value.code == "FLOWER_MISSING"


def test_the_environment_of_children(monkeypatch):
    monkeypatch.setenv("FEDPACT_PASSPHRASE", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    found = child_environment({"FEDPACT_HOME": "/home"})
    assert "secret" not in found.values()
    assert "FLWR_LOG_LEVEL" not in found
    assert (found["OMP_NUM_THREADS"], found["LC_ALL"], found["FEDPACT_HOME"]) == ("1", "C.UTF-8", "/home")
    assert found["PATH"].split(os.pathsep)[0] == superexec.sysconfig.get_path("scripts")
