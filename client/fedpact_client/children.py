"""The guard's two children: the trainer, with the data, and the executor, with Flower. One pipe each."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import structlog

from fedpact_client import loading, sources
from fedpact_client.answer import BEFORE_ROWS, Trained, TrainerLostError, TrainingFailedError
from fedpact_client.config import AgentConfig, DataSet
from fedpact_client.frames import NODE_NUMBER, Frame, FrameError
from fedpact_client.home import AgentHome
from fedpact_client.quality import GATE
from fedpact_client.sandbox import Isolation
from fedpact_client.spawn import Child, spawn
from fedpact_contract.contract import MAX_PARAMETERS, Contract, MeasurementKind
from fedpact_contract.errors import FailedError, FedpactError, InputError, RefusedError

log = structlog.get_logger()

IDLE_SECONDS = 300
READY_SECONDS = 120.0
POLL_SECONDS = 0.5
TRAIN_SECONDS = 300.0
"""A trainer that works this long, and beyond the round's deadline, hangs: its answer would not count any more. Below
that a slow first look at the data is no fault, and to start again would make it slower."""
LARGE, LOOK_SECONDS = 1 << 30, 3600.0
"""A source of so many bytes is looked at before an attempt, and the first look may take so long."""
MAX_ARRAY = 8 * MAX_PARAMETERS
"""Largest array on either pipe, in bytes."""
TRAINER_KINDS = frozenset({"ready", "update", "checked", "wanted", "failed"})
EXECUTOR_KINDS = frozenset({"ready", "connected", "order", "malformed"})
FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
DUPLICATES = "DATA_DUPLICATES"
FAILURE = re.compile(r"(DATA|TRAINING|QUALITY)_[A-Z0-9_]{1,60}", re.ASCII)

Answer = TypeVar("Answer")


ABORTED = {
    -signal.SIGABRT: {
        "code": "TRAINING_MEMORY",
        "message": "A library ended the trainer, as it does where it gets no more memory.",
        "remedy": "Raise limits.memory in agent.toml, or use a larger machine; trainer.log has the library's words.",
    }
}
"""What an exit code says of rows or memory: no crash, which a spare attempt would follow."""
LOST = "Its log, trainer.log, says why; a machine without enough memory is the usual cause."


class NotLoadedError(TrainingFailedError):
    """A database's rows could not be loaded."""


class CancelledError(FailedError):
    """The agent stops while an attempt is running."""


def gate_header(home: AgentHome, config: AgentConfig, contract: Contract) -> dict[str, Any]:
    """What a `check` order says of the data set's rules (`trainer.Gate`); nothing where it has none."""
    data_set = config.data_set(contract.participant(home.participant_id).data_set)
    if not data_set.rules:
        return {}
    return {"gate": {"data_set": data_set.plain(), "profile": str(home.profile_path(data_set.id))}}


@dataclass(slots=True)
class TrainerChild:
    """The trainer as the guard sees it; started early (it imports for seconds), restarted when it was idle or lost."""

    home: AgentHome
    config: AgentConfig
    key: bytes
    interrupt: Callable[[str], None] = lambda _contract_id: None  # raises where an attempt for it is to end now
    module: str = "fedpact_client.trainer"
    isolation: Isolation | None = None  # as the last one said
    loader: Isolation | None = None  # as the last loader of a database's rows said
    _child: Child | None = None
    _ready: bool = False
    _opened: frozenset[object] = frozenset()

    def start(self) -> None:
        """Start the process and say what it may read; it answers when it has closed itself in."""
        self.stop()
        paths, self._opened = self._read_paths(), self._places()
        self._child = spawn(
            self.module,
            log=self.home.logs / "trainer.log",
            max_array=MAX_ARRAY,
            kinds=TRAINER_KINDS,
            processors=self.config.limits.processors,
            nice=self.config.limits.nice,
        )
        profiles = self.home.path / "profiles"
        profiles.mkdir(mode=0o700, exist_ok=True)  # homes of earlier releases have none; it must be there to be read
        self._child.pipe.send(
            "setup",
            {
                "read_paths": [*paths, str(self.home.path / "released"), str(profiles), str(self.home.loaded)],
                "threads": self.config.limits.threads,
                "memory": self.config.limits.memory,
                "scratch": str(self.home.scratch),
                "idle_seconds": IDLE_SECONDS,
            },
        )
        self._ready = False

    def stop(self, grace: float = 2.0) -> int | None:
        """End the process, after so many seconds of grace; how it ended."""
        code = None if self._child is None else self._child.stop(grace)
        self._child, self._ready = None, False
        return code

    def _read_paths(self) -> list[str]:
        """What the sources' rows are read from, as far as it can be reached now.

        Raises:
            InputError: SOURCE_FOLDER.
        """
        found: list[str] = []
        for data_set in self.config.data_sets:
            try:
                found += map(str, sources.read_paths(data_set.source, self.home.path))
            except InputError as err:
                if err.code != sources.AWAY:
                    raise
        return found

    def _places(self) -> frozenset[object]:
        """Which files and folders these are now: a trainer may read those alone that stood there when it began."""
        found: set[object] = set()
        for path in self._read_paths():
            with contextlib.suppress(OSError):
                state = os.stat(path)  # noqa: PTH116 - a text
                found.add((path, state.st_dev, state.st_ino))
        return frozenset(found)

    def train(self, contract: Contract, round_number: int, attempt: int, base: bytes) -> Trained:
        """One attempt (`answer.Train`).

        Raises:
            TrainingFailedError: data or output do not allow it, the reason stays here; TRAINING_TIME, it hung and was
                ended.
            TrainerLostError: the process ended without an answer.
            RefusedError: PARTICIPANT_PAUSED, PARTICIPANT_WITHDRAWN: a person ended it; the process is gone.
        """
        return self._ask(_trained, contract, "train", {"round": round_number, "attempt": attempt}, base)

    def measure(self, contract: Contract, kind: MeasurementKind, base: bytes) -> Trained:
        """One measurement outside the rounds (`measuring.Measure`).

        Raises:
            TrainingFailedError, TrainerLostError, RefusedError: as `train`.
        """
        return self._ask(_trained, contract, "measure", {"kind": kind}, base)

    def check(self, contract: Contract, *, first: bool = False) -> None:
        """A database answers, and the rows hold no more exact copies than the contract allows (`Desk.own_rows`).

        Before the contract's `first` attempt, the data set's own rules are kept too, where it has any. Whatever else
        keeps the trainer from its rows is left to the attempt, which is charged.

        Raises:
            InputError: DATA_DUPLICATES, SOURCE_FOLDER, and what is no row's fault (`answer.BEFORE_ROWS`).
            RefusedError: QUALITY_GATE: a rule is broken, or could not be checked; as `train`.
        """
        more = gate_header(self.home, self.config, contract) if first else {}
        limited = contract.defences is not None and contract.defences.max_duplicates is not None
        source = self._data_set(contract).source
        sources.check_there(source, self.home.path)
        large = source.is_database or source.kind == "sqlite" or sources.size(source, self.home.path) >= LARGE
        if not (more or limited or large):
            return
        try:
            self._ask(_checked, contract, "check", more, b"")
        except TrainingFailedError as err:
            if err.code in (DUPLICATES, sources.AWAY) or (err.code in BEFORE_ROWS and isinstance(err, NotLoadedError)):
                raise InputError(**err.as_dict()) from err
            if err.code == GATE:
                raise RefusedError(**err.as_dict()) from err
            log.warning("rows not checked", code=err.code)
        except TrainerLostError as err:
            if more:
                raise RefusedError(
                    GATE, f"The trainer ended before the data set's rules were checked: {err.code}.", remedy=LOST
                ) from err
            log.warning("rows not checked", code=err.code)

    def _ask(
        self,
        read: Callable[[Frame | None], Answer],
        contract: Contract,
        what: str,
        more: dict[str, Any],
        base: bytes,
    ) -> Answer:
        """Send one order to the trainer, and wait for what it gives."""
        data_set = self._data_set(contract)
        header = {
            "contract": contract.to_bytes().decode(),
            "participant": self.home.participant_id,
            "source": data_set.source.plain(),
            "base_dir": str(self.home.path),
            "released": str(self.home.released_path(data_set.id)),
            "columns": list(data_set.names),
            "selection_key": self.key.hex(),
            **more,
        }
        limit = max(LOOK_SECONDS if what == "check" else TRAIN_SECONDS, contract.participation.deadline_seconds)
        try:
            frame = self._asked(what, header, base, limit, contract.id)
            if frame is not None and frame.kind == "wanted":
                with self._loaded(data_set, contract.id) as file:
                    frame = self._asked(what, header | {"loaded": str(file)}, base, limit, contract.id)
            return read(frame)
        except (FrameError, TrainerLostError) as err:
            code = self.stop()  # nothing of this attempt may answer for the next one
            if code in ABORTED:
                raise TrainingFailedError(**ABORTED[code]) from err
            raise TrainerLostError(err.code, err.message) from err
        except RefusedError:  # in the middle of a step, too
            self.stop(0.0)
            raise

    def _asked(self, what: str, header: dict[str, Any], base: bytes, limit: float, contract_id: str) -> Frame | None:
        child = self._ready_child(contract_id)
        child.pipe.send(what, header, base)
        try:
            return self._receive(child, limit, contract_id)
        except FrameError as err:
            if err.code != "FRAME_TIMEOUT" or child.pipe.closed:
                raise
            raise self._hung(limit) from err

    @contextlib.contextmanager
    def _loaded(self, data_set: DataSet, contract_id: str) -> Iterator[Path]:
        """A database's rows in a file, for as long as the trainer reads it.

        Raises:
            NotLoadedError: they cannot be had; nothing was trained.
        """
        with contextlib.ExitStack() as stack:
            try:
                interrupt = partial(self.interrupt, contract_id)
                file = stack.enter_context(loading.rows_of(self.home, data_set, interrupt, self._told))
            except (CancelledError, RefusedError):
                raise
            except FedpactError as err:
                raise NotLoadedError(**err.as_dict()) from err
            assert file is not None  # noqa: S101 - the trainer wants rows of databases only
            yield file

    def _told(self, isolation: Isolation) -> None:
        self.loader = isolation
        log.info("loader ready", isolation=isolation.sentence)

    def _data_set(self, contract: Contract) -> DataSet:
        return self.config.data_set(contract.participant(self.home.participant_id).data_set)

    def look(self) -> None:
        """Take note that the trainer is ready, where it says so by now; waits for nothing."""
        if self._child is None or self._ready:
            return
        try:
            self._note_ready(self._child.pipe.receive(0.0))
        except (FrameError, TrainerLostError) as err:
            if err.code != "FRAME_TIMEOUT" or self._child.pipe.closed:
                log.warning("trainer not ready", code=err.code)
                self.stop()  # the next attempt starts another one

    def _hung(self, seconds: float) -> TrainingFailedError:
        """End a trainer that hangs and start the next one. Time is no crash: charged, refused, never tried again."""
        log.error("trainer hangs", seconds=seconds)
        self.stop()
        with contextlib.suppress(FrameError, FailedError):  # the next attempt tries again
            self.start()
        return TrainingFailedError("TRAINING_TIME", f"Training had not ended after {seconds:g} seconds.")

    def _receive(self, child: Child, seconds: float, contract_id: str) -> Frame | None:
        """The trainer's next frame, in so long a time; None where the trainer has ended.

        Raises:
            CancelledError: the agent is stopping: the attempt stays charged.
            RefusedError: a person has paused the contract, or withdrawn from it.
            FrameError: the time is over, or the pipe broke.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                return child.pipe.receive(POLL_SECONDS)
            except FrameError as err:
                if err.code != "FRAME_TIMEOUT" or child.pipe.closed or time.monotonic() > deadline:
                    raise
            self.interrupt(contract_id)

    def _ready_child(self, contract_id: str) -> Child:
        """A trainer that is closed in; a new one where the last has ended, or may not read what stands there now."""
        for _ in range(2):
            if self._child is None or not self._child.running or not self._places() <= self._opened:
                self.start()
            assert self._child is not None  # noqa: S101 - just started
            if self._ready:
                return self._child
            if (frame := self._receive(self._child, READY_SECONDS, contract_id)) is not None:
                self._note_ready(frame)
                return self._child
            self.stop()
        raise TrainerLostError("TRAINER_LOST", "The trainer does not start.")

    def _note_ready(self, frame: Frame | None) -> None:
        """The trainer has closed itself in, and said how far.

        Raises:
            TrainerLostError: it ended, or began with something else.
        """
        if frame is None:
            raise TrainerLostError("TRAINER_LOST", "The trainer does not start.")
        if frame.kind != "ready":
            raise TrainerLostError("TRAINER_ANSWER", f"The trainer began with a frame of kind {frame.kind}.")
        try:
            self.isolation = Isolation.parse(frame.header.get("isolation"), code="TRAINER_ANSWER")
        except InputError as err:
            raise TrainerLostError("TRAINER_ANSWER", f"The trainer is ready, but {err.message}") from err
        self._ready = True
        log.info("trainer ready", isolation=self.isolation.sentence)


def _trained(frame: Frame | None) -> Trained:
    """What an attempt gave.

    Raises:
        TrainingFailedError: data or output do not allow it. Its code leaves, so it is one that the trainer can have.
        TrainerLostError: the trainer ended, or answered something else.
    """
    if frame is not None and frame.kind == "update":
        noise, known_by = frame.header.get("noise"), frame.header.get("fingerprints")
        if isinstance(noise, str) and _are_fingerprints(known_by):
            return Trained(update=frame.array, noise=noise, fingerprints=tuple(known_by))
    raise _failure(frame)


def _checked(frame: Frame | None) -> None:
    """The rows are as the contract wants them.

    Raises:
        TrainingFailedError, TrainerLostError: as `_trained`.
    """
    if frame is None or frame.kind != "checked":
        raise _failure(frame)


def _failure(frame: Frame | None) -> TrainingFailedError | TrainerLostError:
    """What an answer means that is not what was asked for."""
    if frame is None:
        return TrainerLostError("TRAINER_LOST", "The trainer ended without an answer.")
    texts = {name: value for name, value in frame.header.items() if isinstance(value, str)}
    if frame.kind == "failed" and FAILURE.fullmatch(texts.get("code", "")):
        places = {name: texts[name] for name in ("file", "field", "rule", "remedy") if name in texts}
        return TrainingFailedError(texts["code"], texts.get("message", ""), **places)
    return TrainerLostError("TRAINER_ANSWER", f"The trainer answered with a frame of kind {frame.kind} that is none.")


def _are_fingerprints(value: object) -> TypeGuard[list[str]]:
    """Whether these are a trainer's fingerprints: at least one, or nothing would be known again."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, str) and FINGERPRINT.fullmatch(item) for item in value)


@dataclass(slots=True)
class ExecutorChild:
    """The executor as the guard sees it: a process that counts as outside."""

    home: AgentHome
    config: AgentConfig
    module: str = "fedpact_client.executor"
    exit_code: int | None = None
    isolation: Isolation | None = None  # as it said before anything came from outside
    connected: bool = False  # whether the operator has let this one in
    node: str | None = None  # the number that the operator's SuperLink gave the last one that it let in
    _child: Child | None = None

    def start(self) -> None:
        """Start Flower's side against the enrolled operator."""
        self.stop()
        self.isolation, self.connected = None, False
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
                "earlier": self.node,
            },
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs and its pipe is open."""
        return self._child is not None and self._child.running and not self._child.pipe.closed

    def receive(self, timeout: float) -> Frame | None:
        """The next order, if one begins in time; what it says of itself is noted.

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
        elif frame.kind == "ready":
            self.isolation = _isolation(frame)
        elif frame.kind == "connected":
            self.connected, self.node = True, _node(frame)
        else:
            return frame
        return None

    def send(self, kind: str, header: dict[str, Any], array: bytes = b"") -> None:
        """Answer the order that the executor handed over."""
        if self._child is not None:
            self._child.pipe.send(kind, header, array)

    def stop(self) -> None:
        """End the process."""
        if self._child is not None:
            self.exit_code = self._child.stop(5.0)
        self._child = None


def _isolation(frame: Frame) -> Isolation:
    """What the executor says that it got.

    Raises:
        FrameError: FRAME_HEADER, it is nothing of the kind.
    """
    try:
        return Isolation.parse(frame.header.get("isolation"), code="EXECUTOR_ANSWER")
    except InputError as err:
        raise FrameError("FRAME_HEADER", f"The executor's isolation is malformed: {err.message}") from err


def _node(frame: Frame) -> str:
    """The node's number.

    Raises:
        FrameError: FRAME_HEADER, it is none.
    """
    node = frame.header.get("node")
    if not isinstance(node, str) or not re.fullmatch(NODE_NUMBER, node):
        raise FrameError("FRAME_HEADER", "The executor's node number is none.")
    return node


def _flower_home(home: AgentHome) -> Path:
    path = home.path / "flower"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
