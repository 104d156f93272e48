"""Start a child process of the guard, joined to it by one pipe of frames; it dies with the guard, whatever happens.

The guard calls `spawn`; the child calls `child_main` before anything else. The child inherits three descriptors (frames
in, frames out, log) and a clean environment.
"""

import contextlib
import ctypes
import os
import random
import signal
import subprocess  # argument lists only, no shell
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedpact_client.frames import Pipe
from fedpact_contract.errors import FailedError, InputError

PARENT = "FEDPACT_PARENT"
MAX_HEADER = 1 << 24
"""A contract with a hundred thousand columns travels in a header."""
MAX_ARRAY = 1 << 30
"""A model of 134 million parameters, float64."""
LOG_BYTES = 1 << 24
"""A log that is larger when a child starts is put aside, in the place of the one before: the disk is the ledgers'."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_PAUSE = 0.01

_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawn")
"""Starts every child: "die with your parent" means the parent's *thread*, so it must be one that lives on."""


@dataclass(frozen=True, slots=True)
class Child:
    """A running child and the pipe to it. As a context manager it is stopped at the end."""

    process: subprocess.Popen[bytes]
    pipe: Pipe

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return not _ended_within(self.process, 0.0)

    def stop(self, grace: float = 5.0) -> int:
        """End the child and all of its process group: close the pipe, then SIGTERM, then SIGKILL.

        Args:
            grace: Seconds to wait after the pipe was closed, and again after SIGTERM.

        Returns:
            The exit code, or minus the number of the signal that ended it.
        """
        self.pipe.close()
        if self.process.returncode is None:
            if not _ended_within(self.process, grace):
                self._signal(signal.SIGTERM)
                _ended_within(self.process, grace)
            # Until it is waited for, its number cannot be taken by another group: nobody else can be hit.
            self._signal(signal.SIGKILL)
        return self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def spawn(
    module: str,
    *,
    log: Path | None,
    max_array: int = MAX_ARRAY,
    max_header: int = MAX_HEADER,
    kinds: frozenset[str] | None = None,
    extra_env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    command: Sequence[str] | None = None,
    descriptors: Sequence[int] = (),
    processors: int | None = None,
    nice: int = 0,
) -> Child:
    """Start `python -m module args...`, from an isolated Python (no PYTHON* variables, no current folder on its path).

    No secret may stand in `args` or `extra_env`: other processes can read both.

    Args:
        module: The module; it must call `child_main` first.
        log: Where its standard error and stray output go (appended, 0600; `LOG_BYTES`); None: nowhere.
        max_array: Limit of the pipe, in bytes, as is `max_header`.
        max_header: See `Pipe`.
        kinds: The kinds of frames that the child may send.
        extra_env: Variables beyond PATH, LANG and HOME.
        args: Arguments of the module.
        command: What to start instead of Python and the module; the arguments are added to it. For tests.
        descriptors: Open ones that the child inherits beside its pipe, under the same numbers.
        processors: On so many of this process's own at most it runs, with all threads and children that it has.
        nice: How far its priority is below this process's own; it cannot raise that again.

    Raises:
        FailedError: SPAWN_LOG, SPAWN_FAILED.
    """
    line = [*(command or (sys.executable, "-I", "-m", module)), *args]
    environment = {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",  # libraries that look for a home find none
        **(extra_env or {}),
        PARENT: str(os.getpid()),
    }
    child_in, own_out = os.pipe()
    own_in, child_out = os.pipe()
    try:
        with _open_log(log) as errors:
            process = _starter.submit(
                _start, line, environment, child_in, child_out, errors, tuple(descriptors)
            ).result()
            _restrain(process.pid, processors, nice)
    except BaseException:
        os.close(own_in)
        os.close(own_out)
        raise
    finally:
        os.close(child_in)
        os.close(child_out)
    return Child(process, Pipe(own_in, own_out, max_array=max_array, max_header=max_header, kinds=kinds))


def child_main(
    *, max_array: int = MAX_ARRAY, max_header: int = MAX_HEADER, kinds: frozenset[str] | None = None
) -> Pipe:
    """In the child, first of all: die with the parent, gain no privileges, take the pipe off stdin and stdout.

    What it writes is its owner's alone.

    Afterwards stdin is empty and stdout goes where stderr goes, so that a stray print corrupts no frame.

    Raises:
        InputError: SPAWN_BY_HAND, when no guard started this process.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent.isdecimal():
        raise InputError(
            "SPAWN_BY_HAND",
            "This program is started by the agent, not by hand.",
            remedy="Use `fedpact-agent start`.",
        )
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl {option}")
    os.umask(0o077)
    if os.getppid() != int(parent):  # it died before prctl: nobody will send the signal
        os._exit(1)
    read_fd, write_fd = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return Pipe(read_fd, write_fd, max_array=max_array, max_header=max_header, kinds=kinds)


@contextlib.contextmanager
def _open_log(log: Path | None) -> Iterator[int]:
    path = os.devnull if log is None else log
    try:
        if log is not None and log.is_file() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise FailedError("SPAWN_LOG", f"The log cannot be written: {err.strerror}.", file=path) from err
    try:
        yield handle
    finally:
        os.close(handle)


def _start(
    line: Sequence[str],
    environment: Mapping[str, str],
    child_in: int,
    child_out: int,
    errors: int,
    descriptors: tuple[int, ...],
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - a list of arguments that this package made
            list(line),
            stdin=child_in,
            stdout=child_out,
            stderr=errors,
            env=dict(environment),
            cwd="/",
            close_fds=True,
            pass_fds=descriptors,
            start_new_session=True,  # its own group: the terminal's Ctrl-C reaches the guard alone
        )
    except OSError as err:
        raise FailedError("SPAWN_FAILED", f"{line[0]} cannot be started: {err.strerror}.", file=line[0]) from err


def _restrain(pid: int, processors: int | None, nice: int) -> None:
    """Cap a process that has just started: it has one thread, and what it starts later inherits both.

    Which processors is left to chance, so that several agents on one machine do not all share the first.
    """
    with contextlib.suppress(ProcessLookupError):  # it ended at once: its pipe will say so
        if processors is not None:
            own = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(pid, random.SystemRandom().sample(own, min(processors, len(own))))
        if nice:
            os.setpriority(os.PRIO_PROCESS, pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice))


def _ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process has ended, waiting so long for it; it is not reaped, so its number stays taken."""
    deadline = time.monotonic() + seconds
    while process.returncode is None:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE)
    return True
