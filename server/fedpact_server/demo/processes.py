"""The demo's processes: every one it starts is ended, with everything below it, whatever happens."""

import contextlib
import json
import os
import signal
import socket
import subprocess  # argument lists only, no shell
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpact_contract.errors import FailedError, InputError

GRACE_SECONDS = 15.0


def command(name: str) -> str:
    """The installed command of this name, beside this Python.

    Raises:
        FailedError: it is not there.
    """
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FailedError("COMMAND_MISSING", f"The command {name} is not installed beside this Python.", file=path)
    return str(path)


def free_port() -> int:
    """A TCP port that nobody uses right now."""
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))  # noqa: S104 - the port must be free at every address
        return int(sock.getsockname()[1])


def call(arguments: Sequence[str], *, ok: Sequence[int] = (0,), seconds: float = 300.0) -> dict[str, Any]:
    """Run one of our commands with --json; its object.

    Raises:
        FailedError: another exit code, with the command's own error; or no answer in time.
    """
    line = [command(arguments[0]), *arguments[1:], "--json"]
    try:
        done = subprocess.run(  # noqa: S603 - our own commands
            line, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise FailedError("DEMO_STEP_SLOW", f"`{_shown(arguments)}` did not end in {seconds:g} seconds.") from err
    try:
        value = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}
    except ValueError as err:
        raise FailedError("DEMO_STEP", f"`{_shown(arguments)}` gave no JSON: {done.stderr[-300:]}") from err
    if done.returncode not in ok:
        error = value.get("error", {}) if isinstance(value, dict) else {}
        raise FailedError(
            str(error.get("code", "DEMO_STEP")),
            f"`{_shown(arguments)}` failed: {error.get('message', done.stderr[-300:] or 'no message')}",
            file=error.get("file"),
            field=error.get("field"),
            party=error.get("party"),
            rule=error.get("rule"),
            remedy=str(error.get("remedy", "")),
        )
    return value if isinstance(value, dict) else {}


def _shown(arguments: Sequence[str]) -> str:
    return " ".join(arguments[:3])


@dataclass(slots=True)
class Processes:
    """Long-running processes, each with a log; `stop` ends them and whatever they started."""

    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start one of our commands in the background."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(  # noqa: S603 - our own commands
                [command(arguments[0]), *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def check(self) -> None:
        """Raise if one has ended.

        Raises:
            FailedError: DEMO_PROCESS_ENDED, naming it.
        """
        for name, process in self.running.items():
            if process.poll() is not None:
                raise FailedError(
                    "DEMO_PROCESS_ENDED",
                    f"{name} ended with exit code {process.returncode}.",
                    remedy="Its log in the demo's folder says why.",
                )

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

    def stop(self) -> None:
        """End everything: SIGTERM first, then SIGKILL to each process group."""
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.running.clear()

    def pids(self) -> dict[str, int]:
        """Name -> process id."""
        return {name: process.pid for name, process in self.running.items()}


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
