"""Forked commands: the same answer, exit code and death as of one that is started."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.proc import alive

from fedpact_contract.errors import FailedError
from fedpact_server.demo.warm import Warm

GAME = {"players": ["a", "b"], "values": {"": 0, "a": 1, "b": 2, "a,b": 4}}


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    made = Warm()
    yield made
    made.close()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    "words",
    [
        ("fedpact", "contribution", "recompute", "table.json", "--json"),
        ("fedpact", "contribution", "recompute", "other.json", "--json"),
        ("fedpact", "nonsense"),
        ("fedpact-agent", "status", "--home", "nowhere", "--json"),
        ("fedpact-agent", "status", "--home", "nowhere", "--lang", "zh"),
    ],
    ids=" ".join,
)
def test_it_says_what_the_started_command_says(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    (tmp_path / "table.json").write_text(json.dumps(GAME))
    monkeypatch.chdir(tmp_path)
    env = os.environ | {"FEDPACT_LANG": "en"}
    path = str(Path(sys.executable).with_name(words[0]))
    started = subprocess.run([path, *words[1:]], capture_output=True, env=env, check=False)
    called = warm.start(words, env)
    assert called.communicate(60) == (started.stdout, started.stderr)
    assert called.poll() == called.wait() == started.returncode


def test_two_at_a_time_are_two_processes_with_the_environment_that_each_is_given(warm: Warm) -> None:
    line = ["fedpact-agent", "status", "--home", "nowhere"]
    called = [warm.start(line, os.environ | {"FEDPACT_LANG": lang}) for lang in ("en", "zh")]
    said = [each.communicate(60)[1].decode() for each in called]
    assert len({each.pid for each in called}) == 2
    assert [text.isascii() for text in said] == [True, False]


def test_one_that_is_killed_has_the_code_of_a_killed_process(warm: Warm, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "table.json")  # it waits for a writer
    called = warm.start(["fedpact", "contribution", "recompute", str(tmp_path / "table.json")])
    assert called.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        called.communicate(0.1)
    assert os.getpgid(called.pid) == called.pid, "a session of its own: it is ended with all below it"
    os.killpg(called.pid, signal.SIGKILL)
    assert called.wait(10) == -signal.SIGKILL
    assert gone(called.pid)


def test_commands_end_with_the_process_that_called_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "table.json")
    own = Warm()
    called = own.start(["fedpact", "contribution", "recompute", str(tmp_path / "table.json")])
    own.close()
    assert called.wait(10) != 0
    assert gone(called.pid)
    with pytest.raises(FailedError):
        own.start(["fedpact", "--help"])
