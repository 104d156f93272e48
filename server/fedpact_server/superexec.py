"""Flower's SuperExec as a child of `fedpact serve`: it starts a ServerApp for each run.

It is started again if it dies, and dies with us: it watches our process id (`--parent-pid`), and each ServerApp
watches its own. The secret that lets it take tasks goes in by its standard input: never in argv, the environment or
a file.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from fedpact_contract.errors import InputError

log = structlog.get_logger()

RESTART_SECONDS = (0.2, 10.0)
"""Shortest and longest wait before it is started again; doubled each time, reset once it ran for a minute."""
STEADY_SECONDS = 60.0
GRACE_SECONDS = 5.0

_KEPT = ("HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "TEMP", "TMP", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV")
_KEPT_PREFIXES = ("LC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON")


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperExecConfig:
    """How to start it.

    Args:
        address: Host and port of the Runtime API.
        ca: The certificate that signs the API's.
        secret: Shared with the SuperLink; lets it take tasks.
        log: File that its output is appended to.
        environment: The child's whole environment; a ServerApp inherits it.
    """

    address: str
    ca: Path
    secret: bytes
    log: Path
    environment: Mapping[str, str]


class SuperExec:
    """One supervised `flower-superexec`.

    Raises:
        InputError: FLOWER_MISSING.
    """

    def __init__(self, config: SuperExecConfig) -> None:
        self._config = config
        self._program = _executable("flower-superexec")
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._supervise, name="superexec", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the one that runs now."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def start(self) -> None:
        """Start it, in the background."""
        self._thread.start()

    def stop(self) -> None:
        """End it and the ServerApps that it started; waits for them a few seconds, then kills them."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _supervise(self) -> None:
        delay, longest = RESTART_SECONDS
        while not self._stopping.is_set():
            started = time.monotonic()
            self._process = process = self._spawn()
            while process.poll() is None and not self._stopping.wait(0.1):
                pass
            if self._stopping.is_set():
                break
            if time.monotonic() - started > STEADY_SECONDS:
                delay = RESTART_SECONDS[0]
            log.warning("superexec ended", code=process.returncode, again_in=delay, log=str(self._config.log))
            self._stopping.wait(delay)
            delay = min(2 * delay, longest)
        if self._process is not None:
            _end_group(self._process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        config = self._config
        command = [
            self._program,
            *("--runtime-api-address", config.address),
            *("--root-certificates", str(config.ca)),
            *("--superexec-auth-secret-file", "/dev/stdin"),
            *("--parent-pid", str(os.getpid())),
        ]
        with os.fdopen(os.open(config.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(config.environment),
                start_new_session=True,
            )
        assert process.stdin is not None  # noqa: S101 - asked for above
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(config.secret)
        return process


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """A child's environment: what locates programs and sets up Python, and `extra`; nothing else of ours leaks in."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    scripts = sysconfig.get_path("scripts")  # flower-superexec looks for flwr-serverapp there
    kept["PATH"] = os.pathsep.join([scripts, kept.get("PATH", os.defpath)])
    return kept | dict(extra)


def _executable(name: str) -> str:
    path = shutil.which(name, path=child_environment({})["PATH"])
    if path is None:
        raise InputError(
            "FLOWER_MISSING",
            f"Flower's command {name} is not installed beside {sys.executable}.",
            remedy="Install Fedpact with its server extra: pip install 'fedpact[server]'.",
        )
    return path


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started (it leads its own group)."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    patience = time.monotonic() + GRACE_SECONDS
    while _group_lives(process) and time.monotonic() < patience:
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap it: a zombie leader would count as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
