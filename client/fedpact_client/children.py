"""The guard's two children: the trainer, with the data, and the executor, with Flower. One pipe each."""

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from fedpact_client import sources
from fedpact_client.answer import Trained, TrainerLostError, TrainingFailedError
from fedpact_client.config import AgentConfig
from fedpact_client.frames import Frame, FrameError
from fedpact_client.home import AgentHome
from fedpact_client.spawn import Child, spawn
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, InputError
from fedpact_contract.keys import write_private

log = structlog.get_logger()

IDLE_SECONDS = 300
READY_SECONDS = 120.0
TRAIN_SECONDS = 24 * 3600.0


def selection_key(home: AgentHome) -> bytes:
    """The key by which this enterprise picks exactly the contracted rows; made once, never leaves."""
    path = home.path / "keys" / "selection.key"
    if not path.exists():
        write_private(path, secrets.token_bytes(32))
    return path.read_bytes()


@dataclass(slots=True)
class TrainerChild:
    """The trainer as the guard sees it; started early (it imports for seconds), restarted when it was idle or lost."""

    home: AgentHome
    config: AgentConfig
    key: bytes
    module: str = "fedpact_client.trainer"
    isolation: dict[str, Any] = field(default_factory=dict)
    _child: Child | None = None
    _ready: bool = False

    def start(self) -> None:
        """Start the process and say what it may read; it answers when it has closed itself in."""
        self.stop()
        self._child = spawn(self.module, log=self.home.logs / "trainer.log")
        paths = [str(p) for d in self.config.data_sets for p in sources.read_paths(d.source, self.home.path)]
        released = [str(self.home.released_path(d.id)) for d in self.config.data_sets]
        self._child.pipe.send(
            "setup",
            {
                "read_paths": [*paths, *released],
                "threads": self.config.limits.threads,
                "idle_seconds": IDLE_SECONDS,
            },
        )
        self._ready = False

    def stop(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.stop(2.0)
        self._child, self._ready = None, False

    def train(self, contract: Contract, round_number: int, attempt: int, base: bytes) -> Trained:
        """One attempt (`answer.Train`).

        Raises:
            TrainingFailedError: data or output do not allow it; the reason stays here.
            TrainerLostError: the process ended without an answer.
        """
        data_set = self.config.data_set(contract.participant(self.home.participant_id).data_set)
        header = {
            "contract": contract.to_bytes().decode(),
            "participant": self.home.participant_id,
            "source": data_set.source.plain(),
            "base_dir": str(self.home.path),
            "released": str(self.home.released_path(data_set.id)),
            "selection_key": self.key.hex(),
            "round": round_number,
            "attempt": attempt,
        }
        try:
            self._await_ready()
            assert self._child is not None  # noqa: S101 - `_await_ready` started it
            self._child.pipe.send("train", header, base)
            frame = self._child.pipe.receive(TRAIN_SECONDS)
        except FrameError as err:
            self.stop()
            raise TrainerLostError(err.code, err.message) from err
        if frame is None:
            self.stop()
            raise TrainerLostError("TRAINER_LOST", "The trainer ended without an answer.")
        return _trained(frame)

    def _await_ready(self) -> None:
        """A trainer that is closed in; a new one where the last has ended."""
        for _ in range(2):
            if self._child is None or self._child.process.poll() is not None:
                self.start()
            assert self._child is not None  # noqa: S101 - just started
            if self._ready:
                return
            frame = self._child.pipe.receive(READY_SECONDS)
            if frame is not None and frame.kind == "ready":
                self.isolation, self._ready = dict(frame.header["isolation"]), True
                log.info("trainer ready", isolation=self.isolation)
                return
            self.stop()
        raise TrainerLostError("TRAINER_LOST", "The trainer does not start.")


def _trained(frame: Frame) -> Trained:
    if frame.kind == "update":
        return Trained(
            update=frame.array,
            noise=str(frame.header["noise"]),
            rows_fingerprint=str(frame.header["rows_fingerprint"]),
        )
    if frame.kind == "failed":
        raise TrainingFailedError(
            str(frame.header["code"]), str(frame.header.get("message", "")), file=frame.header.get("file")
        )
    raise TrainerLostError("TRAINER_ANSWER", f"The trainer answered with a frame of kind {frame.kind}.")


@dataclass(slots=True)
class ExecutorChild:
    """The executor as the guard sees it: a process that counts as outside."""

    home: AgentHome
    config: AgentConfig
    module: str = "fedpact_client.executor"
    exit_code: int | None = None
    _child: Child | None = None

    def start(self) -> None:
        """Start Flower's side against the enrolled operator."""
        self.stop()
        url = self.config.operator.url
        if not url:
            raise InputError("NOT_ENROLLED", "agent.toml names no operator.", remedy="Run `fedpact-agent enrol` first.")
        self._child = spawn(self.module, log=self.home.logs / "executor.log")
        self._child.pipe.send(
            "setup",
            {
                "superlink": url.removeprefix("https://"),
                "ca": str(self.home.ca_path),
                "node_key": str(self.home.node_key_path),
                "home": str(_flower_home(self.home)),
                "poll_seconds": "0.1",
                "patched": self.config.network.patched,
            },
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs; where it has ended, its exit code is kept."""
        if self._child is None:
            return False
        self.exit_code = self._child.process.poll()
        return self.exit_code is None

    @property
    def fileno(self) -> int:
        """The pipe's descriptor, to wait on."""
        if self._child is None:
            raise FailedError("EXECUTOR_STOPPED", "The executor is not running.")
        return self._child.pipe.read_fd

    def receive(self) -> Frame | None:
        """The next frame; None where the executor has ended."""
        if self._child is None:
            return None
        frame = self._child.pipe.receive(10.0)
        if frame is None:
            time.sleep(0.1)
        return frame

    def send(self, kind: str, header: dict[str, Any], array: bytes = b"") -> None:
        """Answer the order that the executor handed over."""
        if self._child is not None:
            self._child.pipe.send(kind, header, array)

    def stop(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.stop(5.0)
        self._child = None


def _flower_home(home: AgentHome) -> Path:
    path = home.path / "flower"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
