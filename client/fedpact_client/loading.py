"""A database's rows on their way to training: loaded by a process of its own into a file of the home, then gone.

The guard opens the connection to the one host and port that agent.toml names and hands it to the loader, which can make
no other; it speaks nothing over it itself.
"""

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from fedpact_client import sources
from fedpact_client.config import DataSet
from fedpact_client.databases import CONNECTIONS, away
from fedpact_client.frames import Frame, FrameError
from fedpact_client.home import AgentHome
from fedpact_client.loader import ANSWERS
from fedpact_client.sandbox import Isolation
from fedpact_client.sources import Source
from fedpact_client.spawn import spawn
from fedpact_contract.errors import FailedError, FedpactError, InputError

log = structlog.get_logger()

CONNECT_SECONDS = 20.0
LOAD_SECONDS = 3600.0
POLL_SECONDS = 0.5
SYSTEM_CA = Path("/etc/ssl/certs/ca-certificates.crt")


@contextlib.contextmanager
def rows_of(
    home: AgentHome,
    data_set: DataSet,
    interrupt: Callable[[], object] = lambda: None,
    told: Callable[[Isolation], object] = lambda _isolation: None,
    *,
    traceless: bool = False,
) -> Iterator[Path | None]:
    """The file that a database's rows were loaded into, as long as it is needed; None where the source is files.

    Args:
        home: The agent's home.
        data_set: Whose rows.
        interrupt: Is called now and then, and raises where the rows are not wanted any more.
        told: Is given the isolation that the loader got.
        traceless: No log is written.

    Raises:
        InputError, FailedError: DATA_*, as `databases.copy_rows`; DATA_SOURCE_PASSWORD; DATA_LOADER_LOST.
    """
    if not data_set.source.is_database:
        yield None
        return
    with _in_use(home, fcntl.LOCK_SH):
        out, name = tempfile.mkstemp(".arrow", dir=home.loaded)
        try:
            try:
                log_file = None if traceless else home.logs / "loader.log"
                _load(home, data_set.source, out, log_file, interrupt, told)
            finally:
                os.close(out)
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


def sweep(home: AgentHome) -> None:
    """Remove rows that an agent left which was killed; none where a command beside us reads its own now."""
    with contextlib.suppress(BlockingIOError), _in_use(home, fcntl.LOCK_EX | fcntl.LOCK_NB):
        for path in home.loaded.iterdir():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_use(home: AgentHome, lock: int) -> Iterator[None]:
    """The folder of loaded rows, held by this process alone or with others; a death lets go."""
    folder = os.open(home.loaded, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, lock)
        yield
    finally:
        os.close(folder)


def _load(
    home: AgentHome,
    source: Source,
    out: int,
    log_file: Path | None,
    interrupt: Callable[[], object],
    told: Callable[[Isolation], object],
) -> None:
    began, place = time.monotonic(), sources.place(source, home.path)
    order = {
        "kind": source.kind,
        "host": source.host,
        "port": source.tcp_port,
        "database": source.database,
        "user": source.user,
        "password": _password(source, home.path),
        "query": source.query,
        "out": out,
    }
    if source.tls:
        order["ca_file"] = str(SYSTEM_CA if source.ca_file is None else (home.path / source.ca_file).resolve())
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(_connected(source, place)) for _ in range(CONNECTIONS[source.kind])]
        connections = [server.fileno() for server in servers]
        with spawn(
            "fedpact_client.loader", log=log_file, max_array=0, kinds=ANSWERS, descriptors=(*connections, out)
        ) as child:
            stack.close()  # the loader alone holds them now
            try:
                child.pipe.send("load", {**order, "connections": connections})
                deadline = began + LOAD_SECONDS
                frame = _receive(lambda: child.pipe.receive(POLL_SECONDS), deadline, interrupt, place)
                if frame is not None and frame.kind == "ready":
                    told(Isolation.parse(frame.header.get("isolation"), code="LOADER_ANSWER"))
                    frame = _receive(lambda: child.pipe.receive(POLL_SECONDS), deadline, interrupt, place)
            except FrameError as err:
                raise _lost(home) from err
    if frame is None:
        raise _lost(home)
    if frame.kind == "failed":
        raise _error(frame)
    log.info("rows loaded", source=place, rows=frame.header.get("rows"), seconds=time.monotonic() - began)


def _receive(
    receive: Callable[[], Frame | None], deadline: float, interrupt: Callable[[], object], place: str
) -> Frame | None:
    while True:
        try:
            return receive()
        except FrameError as err:
            if err.code != "FRAME_TIMEOUT":
                raise
        interrupt()
        if time.monotonic() > deadline:
            raise away(place, f"The query had not ended after {LOAD_SECONDS:g} seconds.")


def _connected(source: Source, place: str) -> socket.socket:
    """A connection to the configured host and port.

    Raises:
        FailedError: DATA_SOURCE_AWAY.
    """
    try:
        server = socket.create_connection((str(source.host), source.tcp_port), CONNECT_SECONDS)
    except OSError as err:
        raise away(place, f"Nothing answers at {source.host} port {source.tcp_port}.") from err
    server.settimeout(None)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return server


def _password(source: Source, folder: Path) -> str:
    """The password, from the environment or from a file that only its owner can read.

    Raises:
        InputError: DATA_SOURCE_PASSWORD.
    """
    if source.password_env is not None:
        if (text := os.environ.get(source.password_env)) is None:
            raise _no_password(
                f"The environment has no variable {source.password_env}.", source.password_env, "password_env"
            )
        return text
    path = (folder / str(source.password_file)).resolve()
    try:
        if path.stat().st_mode & 0o077:
            raise _no_password("Others can read the file with the password.", path, "password_file")
        return path.read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise _no_password("The file with the password cannot be read.", path, "password_file") from err


def _no_password(message: str, file: str | Path, field: str) -> InputError:
    return InputError(
        "DATA_SOURCE_PASSWORD",
        message,
        file=file,
        field=f"source.{field}",
        rule="a file of the agent's user with mode 600, or a variable of the agent's environment",
        remedy=f"Correct `{field}` in agent.toml, or the file: chmod 600.",
    )


def _error(frame: Frame) -> FedpactError:
    places = {k: str(frame.header[k]) for k in ("file", "field", "rule", "remedy") if k in frame.header}
    code, message = str(frame.header.get("code")), str(frame.header.get("message"))
    return InputError(code, message, **places)


def _lost(home: AgentHome) -> FailedError:
    return FailedError(
        "DATA_LOADER_LOST",
        "The loader ended without an answer.",
        file=home.logs / "loader.log",
        remedy="Its log says why; a machine without enough memory is the usual cause.",
    )
