"""Our commands without the seconds in which Python loads their libraries: forked by a process that has loaded them.

The same command lines, each in a process and session of its own; only the loading is shared. For the demo and for
tests, which call dozens of commands: what runs for long, or shows itself to a terminal, is started as a user starts it.
"""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess  # ourselves, no shell
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Any, NoReturn

from fedpact_contract.errors import FailedError

COMMANDS = ("fedpact", "fedpact-agent")
MODULES = (
    *("cryptography.hazmat.primitives.serialization.ssh", "dp_accounting.pld", "httpx", "jinja2", "sqlalchemy"),
    *("fedpact_server.cli_contract", "fedpact_server.cli_demo", "fedpact_server.contracts", "fedpact_server.home"),
    *("fedpact_server.pki", "fedpact_server.report"),
)
"""What commands would load, with what these load in their turn."""
MESSAGE = 1 << 17  # bytes of a request at most: words and environment
_PR_SET_PDEATHSIG = 1


class Warm:
    """The process that commands are forked from. It ends when this one does, and they with it. On Linux alone."""

    def __init__(self) -> None:
        self._ready, self._lock = False, threading.Lock()
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-c", f"from {__name__} import main; main()", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"OMP_NUM_THREADS": "1"} | dict(os.environ),  # no threads where we fork
                start_new_session=True,
            )

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether the libraries are loaded; waits so long for it, at most.

        Raises:
            FailedError: COMMAND_MISSING, the process has ended.
        """
        with self._lock:
            if not self._ready and select.select([self._link], [], [], seconds)[0]:
                if not self._link.recv(1):
                    raise _gone()
                self._ready = True
            return self._ready

    def start(self, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> "Called":
        """Fork a process that runs `fedpact` or `fedpact-agent`; waits until the libraries are loaded (`ready`).

        Raises:
            FailedError: COMMAND_MISSING, the process is gone.
        """
        while not self.ready(60):
            pass
        report, theirs = os.pipe()
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - `Called` closes them
        request = {
            "arguments": [*arguments],
            "env": dict(os.environ if env is None else env),
            "folder": str(Path.cwd()),
        }
        try:
            socket.send_fds(self._link, [json.dumps(request).encode()], [out.fileno(), err.fileno(), theirs])
        except OSError as fault:
            os.close(report)
            raise _gone() from fault
        finally:
            os.close(theirs)
        return Called(arguments, report, out, err)

    def close(self) -> None:
        """End it."""
        self._link.close()
        self._process.wait()


def _gone() -> FailedError:
    return FailedError("COMMAND_MISSING", "The process that commands are forked from has ended.")


class Called:
    """A forked command, with what `subprocess.Popen` has of these names."""

    stdout: None = None
    stderr: None = None

    def __init__(self, arguments: Sequence[str], report: int, out: IO[bytes], err: IO[bytes]) -> None:
        self.args = list(arguments)
        self.returncode: int | None = None
        self._report, self._out, self._err, self._said = report, out, err, b""
        while b"\n" not in self._said and self.returncode is None:
            self._listen(None)
        self.pid = int(self._said.split(b"\n")[0] or 0)

    def poll(self) -> int | None:
        """The exit code, if it has ended; that of SIGKILL where it ended without giving one."""
        self._listen(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._listen(left)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """What it wrote, at its end.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self.wait(timeout)
        found = []
        for file in (self._out, self._err):
            file.seek(0)
            found.append(file.read())
            file.close()
        return found[0], found[1]

    def _listen(self, seconds: float | None) -> None:
        if self.returncode is not None or not select.select([self._report], [], [], seconds)[0]:
            return
        part = os.read(self._report, 64)
        self._said += part
        lines = self._said.split(b"\n")
        if len(lines) > 2:  # number of the process, exit code
            self.returncode = int(lines[1])
        elif not part:
            self.returncode = -signal.SIGKILL
        if self.returncode is not None:
            os.close(self._report)


def main() -> NoReturn:
    """Load, then fork a command for each request, until nobody is there to make one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: each tells its own end
    commands = {point.name: point.load() for point in entry_points(group="console_scripts") if point.name in COMMANDS}
    for name in MODULES:
        import_module(name)
    with socket.socket(fileno=int(sys.argv[1])) as link:
        link.send(b"!")
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(link, MESSAGE, 3)
            except ConnectionError:
                os._exit(0)
            if not data:
                os._exit(0)
            if os.fork() == 0:
                link.close()
                _become(commands, json.loads(data), *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _become(commands: Mapping[str, Any], request: Mapping[str, Any], out: int, err: int, report: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, descriptor in ((1, out), (2, err)):
            os.dup2(descriptor, number)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["folder"])
        sys.argv = request["arguments"]
        os.write(report, b"%d\n" % os.getpid())
        commands[sys.argv[0]]()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the process's edge, where Python itself would print it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(report, b"%d\n" % code)
        os._exit(code)
