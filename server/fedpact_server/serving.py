"""Sockets, signals and uvicorn, as `fedpact serve` needs them."""

import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from fedpact_contract.errors import InputError

BACKLOG = 1024


class Uvicorn(uvicorn.Server):
    """Uvicorn that says when it answers, and leaves signals to us (it would raise them again, and end the process)."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        logging.getLogger("uvicorn.error").addFilter(_tells_something)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Catch none."""
        yield


def _tells_something(record: logging.LogRecord) -> bool:
    """Uvicorn calls it an error when it ends and has no task to cancel."""
    return not (str(record.msg).startswith("Cancel %s running task(s)") and record.args == (0,))


@contextlib.contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop`, where they can be caught: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that accepts connections; port 0 takes any.

    Raises:
        InputError: PORT_TAKEN, PORT_FORBIDDEN, HOST_UNKNOWN.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as err:
        sock.close()
        raise _bind_error(host, port, err) from err
    return sock


def _bind_error(host: str, port: int, err: OSError) -> InputError:
    if isinstance(err, PermissionError):
        return InputError("PORT_FORBIDDEN", f"This user may not take port {port}.", remedy="Choose a port above 1023.")
    if isinstance(err, socket.gaierror) or err.errno == errno.EADDRNOTAVAIL:
        return InputError("HOST_UNKNOWN", f"{host} is no address of this machine.", remedy="Use 0.0.0.0 for all.")
    return InputError(
        "PORT_TAKEN",
        f"Port {port} at {host} cannot be taken: {err.strerror}.",
        remedy="Stop the program that has it (`ss -ltnp` shows which), or choose another port.",
    )
