"""The guard's two children: the trainer, with the data, and the executor, with Flower. One pipe each."""

import math
import re
import secrets
import time
from collections.abc import Callable
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
POLL_SECONDS = 0.5
MAX_ARRAY = 1 << 29
"""Largest array on either pipe, in bytes: a model of 64 million parameters."""
TRAINER_KINDS = frozenset({"ready", "update", "checked", "failed"})
EXECUTOR_KINDS = frozenset({"order"})
FAILURE = re.compile(r"(DATA|TRAINING)_[A-Z0-9_]{1,60}", re.ASCII)


class CancelledError(FailedError):
    """The agent stops while an attempt is running."""


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
    cancelled: Callable[[], bool] = bool
    module: str = "fedpact_client.trainer"
    isolation: dict[str, Any] = field(default_factory=dict)
    _child: Child | None = None
    _ready: bool = False

    def start(self) -> None:
        """Start the process and say what it may read; it answers when it has closed itself in."""
        self.stop()
        self._child = spawn(self.module, log=self.home.logs / "trainer.log", max_array=MAX_ARRAY, kinds=TRAINER_KINDS)
        paths = [str(p) for d in self.config.data_sets for p in sources.read_paths(d.source, self.home.path)]
        self._child.pipe.send(
            "setup",
            {
                "read_paths": [*paths, str(self.home.path / "released")],
                "threads": self.config.limits.threads,
                "memory": self.config.limits.memory,
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
            child = self._ready_child()
            child.pipe.send("train", header, base)
            return _trained(self._receive(child))
        except (FrameError, TrainerLostError) as err:
            self.stop()  # nothing of this attempt may answer for the next one
            raise TrainerLostError(err.code, err.message) from err

    def _receive(self, child: Child, seconds: float = math.inf) -> Frame | None:
        """The trainer's next frame, in so long a time; None where the trainer has ended.

        Raises:
            CancelledError: the agent is stopping: the attempt stays charged.
            FrameError: the time is over, or the pipe broke.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                return child.pipe.receive(POLL_SECONDS)
            except FrameError as err:
                if err.code != "FRAME_TIMEOUT" or child.pipe.closed or time.monotonic() > deadline:
                    raise
            if self.cancelled():
                raise CancelledError("AGENT_STOPPING", "The agent stops; this attempt stays charged.")

    def _ready_child(self) -> Child:
        """A trainer that is closed in; a new one where the last has ended."""
        for _ in range(2):
            if self._child is None or not self._child.running:
                self.start()
            assert self._child is not None  # noqa: S101 - just started
            if self._ready:
                return self._child
            frame = self._receive(self._child, READY_SECONDS)
            if frame is not None:
                if frame.kind != "ready":
                    raise TrainerLostError("TRAINER_ANSWER", f"The trainer began with a frame of kind {frame.kind}.")
                self.isolation, self._ready = frame.header.get("isolation", {}), True
                log.info("trainer ready", isolation=self.isolation)
                return self._child
            self.stop()
        raise TrainerLostError("TRAINER_LOST", "The trainer does not start.")


def _trained(frame: Frame | None) -> Trained:
    """What an attempt gave.

    Raises:
        TrainingFailedError: data or output do not allow it. Its code leaves, so it is one that the trainer can have.
        TrainerLostError: the trainer ended, or answered something else.
    """
    if frame is None:
        raise TrainerLostError("TRAINER_LOST", "The trainer ended without an answer.")
    texts = {name: value for name, value in frame.header.items() if isinstance(value, str)}
    if frame.kind == "update" and {"noise", "rows_fingerprint"} <= texts.keys():
        return Trained(update=frame.array, noise=texts["noise"], rows_fingerprint=texts["rows_fingerprint"])
    if frame.kind == "failed" and FAILURE.fullmatch(texts.get("code", "")):
        raise TrainingFailedError(texts["code"], texts.get("message", ""), file=texts.get("file"))
    raise TrainerLostError("TRAINER_ANSWER", f"The trainer answered with a frame of kind {frame.kind} that is none.")


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
        self._child = spawn(self.module, log=self.home.logs / "executor.log", max_array=MAX_ARRAY, kinds=EXECUTOR_KINDS)
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
        """Whether the process runs and its pipe is open."""
        return self._child is not None and self._child.running and not self._child.pipe.closed

    def receive(self, timeout: float) -> Frame | None:
        """The next frame, if one begins in time.

        Raises:
            FrameError: the executor broke the pipe's rules, or has ended: the pipe is closed.
        """
        if self._child is None:
            return None
        try:
            frame = self._child.pipe.receive(timeout)
        except FrameError as err:
            if err.code == "FRAME_TIMEOUT" and not self._child.pipe.closed:
                return None
            raise
        if frame is None:
            self._child.pipe.close()
        return frame

    def send(self, kind: str, header: dict[str, Any], array: bytes = b"") -> None:
        """Answer the order that the executor handed over."""
        if self._child is not None:
            self._child.pipe.send(kind, header, array)

    def stop(self) -> None:
        """End the process."""
        if self._child is not None:
            self.exit_code = self._child.stop(5.0)
        self._child = None


def _flower_home(home: AgentHome) -> Path:
    path = home.path / "flower"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
