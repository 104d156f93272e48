"""The trainer as a real process: what it can reach, how it ends, and that it trains."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.models_kit import a_model, a_schema, category, number, training_contract

from fedpact_client.frames import Frame
from fedpact_client.sandbox import Isolation, landlock_abi
from fedpact_client.spawn import Child, spawn
from fedpact_client.trainer import ANSWERS
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract
from fedpact_models.registry import parameter_count

pytestmark = pytest.mark.e2e

LAUNCHERS = Path(__file__).resolve().parents[1] / "launchers"
SECRET = "planted-secret-5f1c"
READY_SECONDS = 90
ROWS = 60


@dataclass(frozen=True)
class Home:
    """An agent's home with data and planted secrets, and a contract on its data."""

    path: Path
    contract: Contract

    def setup(self, **values: Any) -> dict[str, Any]:
        paths = [str(self.path / "data" / "rows.csv"), str(self.path / "released")]
        return {"read_paths": paths, "threads": 1, "idle_seconds": 60} | values

    def order(self, **values: Any) -> dict[str, Any]:
        return {
            "contract": self.contract.to_bytes().decode(),
            "participant": self.contract.participants[0].id,
            "source": {"path": "data/rows.csv", "kind": "csv"},
            "base_dir": str(self.path),
            "columns": ["age", "sex", "ill"],
            "selection_key": "5a" * 32,
        } | values

    def train_order(self, **values: Any) -> dict[str, Any]:
        return self.order(round=1, attempt=1, **values)

    @property
    def base(self) -> bytes:
        return np.zeros(parameter_count(self.contract.model, self.contract.data)).tobytes()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("agent")
    path.chmod(0o700)
    for folder in ("keys", "data", "released"):
        (path / folder).mkdir()
    for name in ("keys/node.key", "token", "agent.db"):
        (path / name).write_text(SECRET)
        (path / name).chmod(0o600)
    rng = random.Random(3)
    lines = [f"{rng.randint(1, 99)},{rng.choice('fm')},{rng.choice(['no', 'yes'])}\n" for _ in range(ROWS)]
    (path / "data" / "rows.csv").write_text("age,sex,ill\n" + "".join(lines))
    label = {"name": "ill", "classes": ["no", "yes"], "rule": "value"}
    data = a_schema(number("age", 0, 100), category("sex", ["f", "m"]), label=label)
    return Home(path=path, contract=training_contract(data, a_model(), (40, 50, 60)))


@pytest.fixture
def start(home: Home, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts trainers that end with the test."""
    with ExitStack() as stack:

        def begin(*launcher: str, setup: dict[str, Any] | None = None) -> Child:
            command = [sys.executable, "-I", str(LAUNCHERS / launcher[0])] if launcher else None
            child = spawn(
                "fedpact_client.trainer", log=tmp_path / "log", kinds=ANSWERS, command=command, args=launcher[1:]
            )
            stack.enter_context(child)
            child.pipe.send("setup", home.setup() if setup is None else setup)
            return child

        yield begin


def receive(child: Child, kind: str) -> Frame:
    frame = child.pipe.receive(READY_SECONDS)
    assert frame is not None
    assert frame.kind == kind, frame.header
    return frame


def train(child: Child, home: Home, **values: Any) -> Frame:
    child.pipe.send("train", home.train_order(**values), home.base)
    return receive(child, "update")


def test_what_the_trainer_can_reach(home: Home, start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDPACT_PASSPHRASE", SECRET)
    key = os.open(home.path / "keys" / "node.key", os.O_RDONLY)
    os.set_inheritable(key, True)
    local = socket.socket(socket.AF_UNIX)
    local.bind(str(home.path / "socket"))
    local.listen()
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            child = start("trainer_probe.py", str(home.path), str(port), str(Path.home()))
            isolation = Isolation.parse(receive(child, "ready").header["isolation"], code="ISOLATION")
    finally:
        os.close(key)
        local.close()
        (home.path / "socket").unlink()
    log = (tmp_path / "log").read_text()
    found = json.loads(next(line for line in log.splitlines() if line.startswith("PROBE ")).removeprefix("PROBE "))

    assert SECRET not in json.dumps(found)
    started_with = dict(line.split("=", 1) for line in found["started with"].strip("\0").split("\0"))
    assert set(started_with) == {"PATH", "LANG", "HOME", "FEDPACT_PARENT"}
    targets = found["descriptors"]
    assert {targets["0"], targets["1"], targets["2"]} == {"/dev/null", str(tmp_path / "log")}
    assert not [t for t in targets.values() if t.startswith("socket:") or str(home.path) in t]

    walls = ("reading", "connecting", "writing", "acting")
    assert found["rows"] == "done"
    if isolation.isolated:
        assert {result for wall in walls for result in found[wall].values()} == {"refused"}, found
    else:
        assert isolation.sentence.startswith("not isolated: ")
        assert f"isolation='{isolation.sentence}" in log or isolation.sentence in log
        if isolation.landlock_abi:
            assert set(found["reading"].values()) == {"refused"}
        else:
            assert "Landlock" in isolation.sentence
        if isolation.sockets_denied:
            assert set(found["connecting"].values()) == {"refused"}
    if landlock_abi() >= 6:
        assert isolation.landlock_abi >= 6
        assert isolation.tcp_denied


def test_training_gives_an_update(home: Home, start):
    child = start()
    isolation = Isolation.parse(receive(child, "ready").header["isolation"], code="ISOLATION")
    assert isolation.landlock_abi == landlock_abi()
    frames = [train(child, home) for _ in range(2)]
    for frame in frames:
        update = np.frombuffer(frame.array, dtype="<f4")
        assert update.shape == (len(home.base) // 8,)
        assert np.isfinite(update).all()
        assert np.abs(update).max() > 0
        assert frame.header["noise"] == "csprng"
        assert frame.header["num_examples"] == 40
    assert frames[0].array != frames[1].array
    assert frames[0].header == frames[1].header


def test_fixed_noise_is_the_same_and_the_systems_never(home: Home, start):
    first, second, other = (start("trainer_fixed.py", seed) for seed in ("7", "7", "8"))
    updates = {}
    for name, child in (("first", first), ("second", second), ("other", other)):
        isolation = Isolation.parse(receive(child, "ready").header["isolation"], code="ISOLATION")
        assert not any("threads" in words for words in isolation.missing)
        updates[name] = [train(child, home) for _ in range(2)]
        assert {frame.header["noise"] for frame in updates[name]} == {"test"}
    assert [f.array for f in updates["first"]] == [f.array for f in updates["second"]]
    assert updates["first"][0].array != updates["first"][1].array  # a new draw each round
    assert updates["first"][0].array != updates["other"][0].array


def test_check_looks_at_the_rows_and_trains_nothing(home: Home, start):
    child = start()
    receive(child, "ready")
    child.pipe.send("check", home.order())
    checked = receive(child, "checked")
    assert checked.header["num_rows"] == ROWS
    assert checked.header["fingerprints"] == train(child, home).header["fingerprints"]
    assert checked.array == b""


def test_failures_are_answers_and_the_trainer_goes_on(home: Home, start):
    child = start()
    receive(child, "ready")
    child.pipe.send("check", home.order(source={"path": "token", "kind": "csv"}))
    failed = receive(child, "failed")
    if landlock_abi():
        assert failed.header["code"] == "DATA_UNREADABLE"
    assert SECRET not in str(failed.header)
    child.pipe.send("train", home.train_order(), home.base + bytes(8))
    assert receive(child, "failed").header["code"] == "TRAINING_INPUT"
    child.pipe.send("train", home.train_order(), home.base[:-1])
    assert receive(child, "failed").header["code"] == "TRAINING_BASE"
    train(child, home)


@pytest.mark.parametrize(
    ("data", "code", "word"),
    [
        (b"Traceback", 1, "FRAME_MAGIC"),
        (b"\xf1" + (2**32 - 1).to_bytes(4, "little") + bytes(8), 1, "FRAME_TOO_LARGE"),
        (b"\xf1" + (2).to_bytes(4, "little") + bytes(8) + b"{}", 1, "FRAME_HEADER"),
        (("other", {}), 1, "FRAME_KIND"),
        (("train", {}), 1, "TRAINER_ORDER"),
        (("setup", {"read_paths": []}), 2, "SETUP_MISSING_KEY"),
        (("setup", {"read_paths": [], "threads": 0, "idle_seconds": 1}), 2, "SETUP"),
        (("setup", {"read_paths": ["relative"], "threads": 1, "idle_seconds": 1}), 2, "SETUP"),
        (("setup", {"read_paths": [], "threads": 1, "idle_seconds": 1, "noise": "test"}), 2, "SETUP_UNKNOWN_KEY"),
    ],
)
def test_a_malformed_beginning_ends_the_trainer_with_a_code(tmp_path: Path, data: Any, code: int, word: str):
    with spawn("fedpact_client.trainer", log=tmp_path / "log", kinds=ANSWERS) as child:
        _ends(child, data, code, word, tmp_path / "log")


@pytest.mark.parametrize(
    ("data", "code", "word"),
    [
        (b"\xf1" + (2).to_bytes(4, "little") + bytes(8) + b"{}", 1, "FRAME_HEADER"),
        (("setup", {}), 1, "TRAINER_ORDER"),
        (("train", {"contract": "x"}), 2, "TRAINER_HEADER"),
    ],
)
def test_a_malformed_order_ends_the_trainer_with_a_code(start, tmp_path: Path, data: Any, code: int, word: str):
    child = start()
    receive(child, "ready")
    _ends(child, data, code, word, tmp_path / "log")


def _ends(child: Child, data: Any, code: int, word: str, log: Path) -> None:
    if isinstance(data, bytes):
        os.write(_write_fd(child), data)
    else:
        child.pipe.send(*data)
    assert child.pipe.receive(30) is None
    assert child.process.wait(60) == code
    assert word in log.read_text()
    assert "Traceback (most" not in log.read_text()


def _write_fd(child: Child) -> int:
    assert child.pipe._fds is not None
    return child.pipe._fds[1]


def test_an_idle_trainer_ends(home: Home, start):
    child = start(setup=home.setup(idle_seconds=1))
    receive(child, "ready")
    assert child.pipe.receive(20) is None
    assert child.process.wait(60) == 0


def test_training_beyond_the_memory_limit_is_an_answer(home: Home, start):
    big = training_contract(home.contract.data, a_model(8_000, 8_000), (40, 50, 60))
    child = start(setup=home.setup(memory=640))
    receive(child, "ready")
    child.pipe.send("train", home.train_order(contract=big.to_bytes().decode()), home.base)
    assert receive(child, "failed").header["code"] == "TRAINING_MEMORY"
    train(child, home)


@pytest.mark.parametrize("busy", [False, True])
def test_no_trainer_outlives_a_guard_that_is_killed(home: Home, tmp_path: Path, busy: bool):
    many = {"rounds": 1, "local_steps": 40_000}
    endless = training_contract(home.contract.data, a_model(), (40, 50, 60), training=many)
    (tmp_path / "setup").write_bytes(canonical_bytes(home.setup()))
    (tmp_path / "train").write_bytes(canonical_bytes(home.train_order(contract=endless.to_bytes().decode())))
    (tmp_path / "base").write_bytes(home.base)
    code = f"""
        import json, sys, time
        from pathlib import Path
        from fedpact_client.spawn import spawn
        folder = Path({str(tmp_path)!r})
        child = spawn("fedpact_client.trainer", log=folder / "log")
        child.pipe.send("setup", json.loads((folder / "setup").read_text()))
        assert child.pipe.receive({READY_SECONDS}).kind == "ready"
        if {busy}:
            child.pipe.send("train", json.loads((folder / "train").read_text()), (folder / "base").read_bytes())
            time.sleep(0.5)
        print(child.process.pid, flush=True)
        time.sleep(60)
    """
    line = [sys.executable, "-I", "-c", textwrap.dedent(code)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, start_new_session=True) as guard:
        assert guard.stdout is not None
        trainer = int(guard.stdout.readline())
        assert _alive(trainer)
        guard.send_signal(signal.SIGKILL)
        guard.wait()
    deadline = time.monotonic() + 10
    while _alive(trainer) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(trainer)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
