"""The demo's processes: every one it starts is watched, and ended with everything below it, whatever happens."""

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess  # argument lists only, no shell
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

from fedpact_contract.errors import FailedError, InputError
from fedpact_server.demo.warm import Called, Warm

GRACE_SECONDS = 15.0
CALL_GRACE_SECONDS = 3.0
WATCH_SECONDS = 0.1
"""How often it is looked whether all processes still run."""
PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to outgoing connections (from 32768), which would take one between two steps."""
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36
_WITH_US = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the command after its parent's number, and has Linux end it when that parent is gone, even by kill -9."""
R = TypeVar("R")

_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="start")
"""Starts every process: for Linux the parent is the *thread* that started it, so it must be one that lives on."""


class CancelledError(FailedError):
    """Everything is being ended, for a reason that somebody else tells."""


def command(name: str) -> str:
    """The installed command of this name, beside this Python.

    Raises:
        FailedError: it is not there.
    """
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FailedError("COMMAND_MISSING", f"The command {name} is not installed beside this Python.", file=path)
    return str(path)


def reserve_port() -> socket.socket:
    """A socket that holds a TCP port which nobody uses, at every address, until it is closed.

    Meanwhile our server can listen there, for both sockets allow to share the address, and another demo's
    `reserve_port` cannot have the port, for it asks for an address of its own.

    Raises:
        FailedError: DEMO_PORT, none of many is free.
    """
    for port in random.sample(PORTS, 200):
        held = socket.socket()
        try:
            held.bind(("0.0.0.0", port))  # noqa: S104 - the port must be free at every address
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    raise FailedError("DEMO_PORT", "No free port was found on this machine.", field=f"{PORTS.start}-{PORTS.stop - 1}")


def free_port() -> int:
    """A TCP port that nobody uses right now."""
    with reserve_port() as held:
        return int(held.getsockname()[1])


def say(text: str) -> None:
    """One line on stderr, for whoever is still there; also from within a signal's handler."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextlib.contextmanager
def interruptible(first: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does; what comes after the first is ignored, for everything is ending then.

    A signal that is ignored already (nohup) stays so. Only in the main thread.

    Args:
        first: Called at once, wherever the main thread is: it may write, and take no lock.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for each in changed:
            signal.signal(each, signal.SIG_IGN)
        first()
        raise KeyboardInterrupt

    changed = {n: signal.getsignal(n) for n in ENDINGS if signal.getsignal(n) is not signal.SIG_IGN}
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, before in changed.items():
            signal.signal(number, before)


def adopt_orphans() -> None:
    """Have Linux give this process whatever its children leave behind, so that it can be ended too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Watched:
    """A long-running process and its log."""

    process: "subprocess.Popen[bytes]"
    log: Path


@dataclass(slots=True)
class Processes:
    """Long-running processes, each with a log, and the commands that are called meanwhile.

    While a command runs, all processes are watched: one that ends is an error at once. `stop` ends everything, and so
    does the death of this process, unless the long-running ones are to `stay`. Commands are forked where there is a
    `warm` process.
    """

    running: dict[str, Watched] = field(default_factory=dict)
    step: str = ""
    stay: bool = False
    warm: Warm | None = None
    _announced: bool = False
    _calls: "dict[int, subprocess.Popen[bytes] | Called]" = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ending: threading.Event = field(default_factory=threading.Event)
    _before: frozenset[int] = field(default_factory=lambda: frozenset(_below(os.getpid())))

    def start(self, name: str, arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        """Start one of our commands in the background.

        Raises:
            CancelledError: everything is being ended.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out, self._lock:
            self._go_on()
            process = _popen(arguments, out, with_us=not self.stay)
            self.running[name] = Watched(process, log)
        return process

    def check(self) -> None:
        """Raise if a process has ended.

        Raises:
            FailedError: DEMO_PROCESS_ENDED, with the process, the step and the log.
        """
        with self._lock:
            self._go_on()
            ended = [(n, w, code) for n, w in self.running.items() if (code := w.process.poll()) is not None]
        for name, watched, code in ended:
            during = f" during the step “{self.step}”" if self.step else ""
            raise FailedError(
                "DEMO_PROCESS_ENDED",
                f"The process of {name} ended{during}: {_how(code)}.",
                file=watched.log,
                party=name,
                remedy="Its log says what it did last.",
            )

    def call(
        self, arguments: Sequence[str], *, ok: Sequence[int] = (0,), seconds: float = 300.0, shown: bool = False
    ) -> dict[str, Any]:
        """Run one of our commands with --json, watching the processes; its object.

        Args:
            arguments: The command.
            ok: Exit codes that are no failure.
            seconds: How long it may take.
            shown: Let it write to the terminal instead, without --json; the object is empty.

        Raises:
            FailedError: another exit code, with the command's own error; no answer in time; a process that ended.
            CancelledError: everything is being ended.
        """
        while not (shown or self.warm is None or self.warm.ready(WATCH_SECONDS)):
            self.check()
        with self._lock:
            self._go_on()
            process: subprocess.Popen[bytes] | Called
            if shown:
                process = _popen(arguments, None, with_us=True)
            elif self.warm is None:
                process = _popen([*arguments, "--json"], subprocess.PIPE, with_us=True)
            else:
                process = self.warm.start([*arguments, "--json"], _environment())
            self._calls[process.pid] = process
        try:
            out, err = self._communicate(process, arguments, seconds)
        finally:
            _end_call(process)
            with self._lock:
                del self._calls[process.pid]
        code = process.wait()
        if code not in ok:
            self.check()  # a process that ended is the cause, what the command says of it is not
        if shown:
            return {}
        return _answer(arguments, code, out, err, ok)

    def _communicate(
        self, process: "subprocess.Popen[bytes] | Called", arguments: Sequence[str], seconds: float
    ) -> tuple[str, str]:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=WATCH_SECONDS)
                return (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")
            self.check()
            if time.monotonic() > deadline:
                raise FailedError("DEMO_STEP_SLOW", f"`{_shown(arguments)}` did not end in {seconds:g} seconds.")

    def wait_for(self, ready: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait until something is so, watching the processes.

        Raises:
            FailedError: DEMO_SLOW, or a process that ended.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise FailedError("DEMO_SLOW", f"{what} is not ready after {seconds:g} seconds.")
            time.sleep(0.05)

    def each(self, works: Sequence[Callable[[], R]]) -> list[R]:
        """Do several things, a few at a time, watching the processes; the first failure ends everything."""
        pool = ThreadPoolExecutor(max_workers=4)
        futures = [pool.submit(work) for work in works]
        try:
            self._watch(futures)
        except BaseException:
            self.announce()
            self.stop()  # the other threads' commands end, and so do the threads
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]

    def _watch(self, futures: "Sequence[Future[R]]") -> None:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=WATCH_SECONDS)
            errors = [err for future in done if (err := future.exception()) is not None]
            if errors:
                raise errors[0]
            self.check()

    def announce(self) -> None:
        """Say once that everything is being ended before its time: that takes seconds."""
        if not self._announced and (count := len(self.running) + len(self._calls)):
            self._announced = True
            # A line of its own: on a terminal something else may stand in this one.
            say(f"{chr(10) * os.isatty(2)}Stopping {count} process{'' if count == 1 else 'es'}…")

    def stop(self) -> None:
        """End everything: SIGTERM first, then SIGKILL; whatever is left of this process's descendants, too."""
        self._ending.set()
        with self._lock:
            watched, calls = list(self.running.values()), list(self._calls.values())
        for one in calls:
            _signal_group(one, signal.SIGTERM)
        for each in watched:
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for each in watched:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.1, deadline - time.monotonic()))
            _signal_group(each.process, signal.SIGKILL)
            each.process.wait()
        self._end_orphans()
        self.running.clear()

    def let_go(self) -> dict[str, int]:
        """Leave everything running and forget it; name -> process id."""
        with self._lock:
            pids = {name: each.process.pid for name, each in self.running.items()}
            self.running.clear()
        return pids

    def _end_orphans(self) -> None:
        """What ended processes left behind has become ours, or ends with them (`adopt_orphans`)."""
        calls = set(self._calls)
        deadline = time.monotonic() + CALL_GRACE_SECONDS
        while left := _below(os.getpid()) - self._before - calls:
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)

    def _go_on(self) -> None:
        if self._ending.is_set():
            raise CancelledError("DEMO_ENDING", "The demo is being ended.")


def write_secret(path: Path, text: str) -> Path:
    """A file that only its owner reads, with one line.

    Raises:
        InputError: it exists already.
    """
    from fedpact_contract.keys import write_private

    try:
        write_private(path, text.encode() + b"\n")
    except OSError as err:
        raise InputError("DEMO_FOLDER", f"The demo's folder cannot be written: {err.strerror}.", file=path) from err
    return path


def _popen(arguments: Sequence[str], out: int | IO[bytes] | None, *, with_us: bool) -> "subprocess.Popen[bytes]":
    """Start one of our commands in a session of its own; `with_us`: it ends when this process does."""
    line = [command(arguments[0]), *arguments[1:]]
    if with_us and sys.platform == "linux":
        line = [sys.executable, "-I", "-S", "-c", _WITH_US, str(os.getpid()), *line]

    def begin() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(  # noqa: S603 - our own commands
            line,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=_environment(),
        )

    return _starter.submit(begin).result()


def _environment() -> dict[str, str]:
    """A dozen processes share this machine, and idle threads spin."""
    return {"OMP_NUM_THREADS": "1"} | dict(os.environ)


def _answer(arguments: Sequence[str], code: int, out: str, err: str, ok: Sequence[int]) -> dict[str, Any]:
    """What a command that ended has said.

    Raises:
        FailedError: an exit code that is not in `ok`, or no JSON.
    """
    try:
        value = json.loads(out.strip().splitlines()[-1]) if out.strip() else {}
    except ValueError as fault:
        raise FailedError("DEMO_STEP", f"`{_shown(arguments)}` gave no JSON: {err[-300:]}") from fault
    if code not in ok:
        error = value.get("error", {}) if isinstance(value, dict) else {}
        raise FailedError(
            str(error.get("code", "DEMO_STEP")),
            f"`{_shown(arguments)}` failed: {error.get('message') or err[-300:] or _how(code)}",
            file=error.get("file"),
            field=error.get("field"),
            party=error.get("party"),
            rule=error.get("rule"),
            remedy=str(error.get("remedy", "")),
        )
    return value if isinstance(value, dict) else {}


def _shown(arguments: Sequence[str]) -> str:
    return " ".join(arguments[:3])


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _end_call(process: "subprocess.Popen[bytes] | Called") -> None:
    """End a command that is still running, with its group."""
    if process.poll() is None:
        # One that shows its progress gives the terminal back as it was only at an interruption.
        _signal_group(process, signal.SIGINT if process.stdout is None else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CALL_GRACE_SECONDS)
        _signal_group(process, signal.SIGKILL)
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _signal_group(process: "subprocess.Popen[Any] | Called", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _below(pid: int) -> set[int]:
    """Every process below one, the dead that nobody has waited for among them; empty where there is no /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    level = {pid}
    while level := {child for child, parent in parents.items() if parent in level} - found:
        found |= level
    return found
