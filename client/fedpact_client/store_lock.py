"""One guard a home: an exclusive lock that the operating system releases when its holder dies."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from fedpact_contract.errors import FailedError, InputError


class HomeLock:
    """Holds the agent's home for this process (flock), as a context manager or from `acquire` to `release`.

    The lock belongs to the open file: it ends with the process, also by kill -9. A child made by fork alone, without
    exec, shares it and keeps the home locked: the guard starts its children with exec.
    """

    def __init__(self, home: Path) -> None:
        self.path = home / "guard.lock"
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock and leave the process id in the file.

        Raises:
            InputError: HOME_LOCKED, naming the process that holds it; HOME_MISSING.
            FailedError: HOME_UNWRITABLE.
        """
        if self._handle is not None:
            raise RuntimeError("this lock is held already")
        handle = self._open()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            holder = _read_pid(handle)
            os.close(handle)
            raise InputError(
                "HOME_LOCKED",
                f"The agent runs in this home (`fedpact-agent start`), or another command holds it: process {holder}.",
                file=self.path,
                remedy="Stop it first (Ctrl-C, or SIGTERM). `fedpact-agent status` works meanwhile.",
            ) from err
        except OSError as err:
            os.close(handle)
            raise _unwritable(self.path, err) from err
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two guards each lock a file of their own."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as err:
            raise InputError(
                "HOME_MISSING", "The agent's home does not exist.", file=self.path.parent, remedy="Run `init` first."
            ) from err
        except OSError as err:
            raise _unwritable(self.path, err) from err


def _read_pid(handle: int) -> str:
    """The process id in the lock file; its holder may not have written it yet."""
    with suppress(ValueError, OSError):
        return str(int(os.pread(handle, 32, 0)))
    return "unknown"


def _unwritable(path: Path, err: OSError) -> FailedError:
    return FailedError(
        "HOME_UNWRITABLE",
        f"The agent's home cannot be locked: {err.strerror}.",
        file=path,
        remedy="Give a home on a local disk that this user can write to.",
    )
