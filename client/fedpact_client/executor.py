"""The executor: Flower's side of the agent, a process that counts as outside. `python -m fedpact_client.executor`.

Started by the guard, joined to it by one pipe. It has the node key and the connection to SuperLink; it has no data, no
run key and no ledger. Once it has read its key, and before Flower is imported, it closes itself off from every file
but the installation and its own folder (`sandbox.fence`). It takes each task of the SuperNode, hands the order and the
model to the guard, and sends what the guard answers: one task at a time, a reply leaves before the next task is taken.
Of the bundle that Flower delivers, the hash alone is used: it is never unpacked or imported.

Frames, guard to executor: `setup` once (see `Setup`); `reply` (reply: text; array: flat float32) or `drop` for each
order. Executor to guard: `ready` once (isolation), `connected` once, when SuperLink let the node in (node: its number
there); `order` (order: text, bundle: hex SHA-256; array: the model, flat float64), or `malformed` in its place, which
is dropped. Nothing is sent for an order before the guard has answered: it enters in the egress ledger what will leave.

Exit codes: 0 the guard closed the pipe, or SIGTERM. 69 SuperLink could not be reached as configured, or the connection
ended. 70 a fault in here. 75 SuperLink did not let the node in: an earlier connection has not expired yet (start again;
it takes a minute at most), or the key is not registered. 76 the guard broke the protocol. 77 SuperLink no longer knows
the node, or a task's lease was lost. 78 the setup is wrong.
"""

import logging
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, NoReturn, Protocol

import structlog
from pydantic import Field, StringConstraints

from fedpact_client.frames import NODE_NUMBER, Frame, FrameError, Pipe
from fedpact_client.logs import log_to_stderr
from fedpact_client.sandbox import fence, names_are_lost
from fedpact_client.spawn import child_main
from fedpact_contract.errors import FaultError, FedpactError, InputError
from fedpact_contract.record import Dec, Part

log = structlog.get_logger()

EXIT_OK = 0
EXIT_UNAVAILABLE = 69
EXIT_FAULT = 70
EXIT_RETRY = 75
EXIT_PROTOCOL = 76
EXIT_REFUSED = 77
EXIT_SETUP = 78

MAX_ARRAY = 1 << 31
KINDS = frozenset({"setup", "reply", "drop"})
SETUP_SECONDS = 30.0
LEAVE_SECONDS = 6.0
GONE_SECONDS = 2.0
"""How long the working thread may take to notice that the guard closed the pipe: it may be in a call of Flower's."""

NAMES_SECONDS = 20.0
"""How often the file of name servers is looked at: where it was replaced, a new process may read the new one."""

NO_REPLY, ORDER_FORM = "E_NO_REPLY", "E_ORDER_FORM"
"""The texts of error replies: fixed, for they go to the operator."""


class Setup(Part):
    """What the guard says first.

    Args:
        superlink: "host:port" of the operator.
        ca: Path of the operator's CA certificate (PEM).
        node_key: Path of the node's key (OpenSSH).
        home: Folder for Flower's own files.
        poll_seconds: How often SuperLink is asked for messages, where `patched`.
        patched: Whether waits that Flower hard-codes are shortened.
        earlier: The node's number in a connection whose process is gone without a goodbye, which is said first:
            SuperLink would not let the node in for as long as a minute.
    """

    superlink: Annotated[str, Field(pattern=r"^.{1,255}:[0-9]{1,5}$")]
    ca: str
    node_key: str
    home: str
    poll_seconds: Dec
    patched: bool
    earlier: Annotated[str, StringConstraints(pattern=NODE_NUMBER)] | None = None


class Task(Protocol):
    """One order taken from Flower; it is answered once. `order` is None where the message is of another form."""

    order: bytes | None
    model: bytes
    bundle: str

    def answer(self, reply: bytes, array: bytes) -> None:
        """Send the reply."""

    def fail(self, text: str) -> None:
        """Send an error reply with a fixed text."""


class Orders(Protocol):
    """Where tasks come from."""

    poll_seconds: float

    @property
    def node(self) -> int | None:
        """The node's number, once SuperLink has let it in."""

    def take(self) -> Task | None:
        """The next task, if there is one."""


class ProtocolError(FaultError):
    """The guard sent a frame that does not belong here."""


def work(pipe: Pipe, orders: Orders) -> None:
    """Take tasks and have the guard answer them, until the guard closes the pipe.

    Raises:
        ProtocolError: EXECUTOR_FRAME.
        FrameError: the pipe broke.
    """
    told = False
    while True:
        if not told and (node := orders.node) is not None:
            pipe.send("connected", {"node": str(node)})
            told = True
        try:
            frame = pipe.receive(orders.poll_seconds)
        except FrameError as err:
            if err.code != "FRAME_TIMEOUT" or pipe.closed:
                raise
        else:
            if frame is None:
                return
            raise ProtocolError("EXECUTOR_FRAME", f"A frame of kind {frame.kind} came while there was no order.")
        task = orders.take()
        if task is not None and not handle(pipe, task):
            return


def handle(pipe: Pipe, task: Task) -> bool:
    """Have the guard answer one task; False where it closed the pipe instead.

    Raises:
        ProtocolError: EXECUTOR_FRAME.
        FrameError: the pipe broke.
    """
    handed_over = _hand_over(pipe, task)
    if not handed_over:
        pipe.send("malformed", {})
    frame = pipe.receive()
    if frame is None:
        return False
    if frame.kind == "reply" and handed_over:
        task.answer(_reply_text(frame).encode(), frame.array)
    elif frame.kind == "drop":
        task.fail(NO_REPLY if handed_over else ORDER_FORM)
    else:
        raise ProtocolError("EXECUTOR_FRAME", f"A frame of kind {frame.kind} came in place of a reply.")
    return True


def _hand_over(pipe: Pipe, task: Task) -> bool:
    """Give the guard the order; False where it has not the form of one, or a frame cannot hold it."""
    try:
        if task.order is not None:
            pipe.send("order", {"order": task.order.decode(), "bundle": task.bundle}, task.model)
            return True
    except (UnicodeDecodeError, InputError, FrameError) as err:
        if pipe.closed:
            raise
        log.warning("order not handed over", reason=str(err))
    return False


def main() -> NoReturn:
    """Run until the guard is gone; ends the process."""
    try:
        pipe = child_main(max_array=MAX_ARRAY, kinds=KINDS)
    except InputError as err:
        sys.exit(str(err))
    log_to_stderr()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    try:
        setup = _receive_setup(pipe)
        _set_environment(Path(setup.home))
        node_key = _read(setup.node_key, "NODE_KEY_FORM", "The node key cannot be read.")
        ca = _read(setup.ca, "CA_UNREADABLE", "The operator's CA certificate cannot be read.")
        isolation = fence([Path(setup.home)])
        log.info("executor fenced", isolation=isolation.sentence)
        from fedpact_client.supernode import SuperNode

        node = SuperNode(
            superlink=setup.superlink,
            ca=ca,
            node_key=node_key,
            patched_poll=float(setup.poll_seconds) if setup.patched else None,
        )
        node.start_runtime()
        pipe.send("ready", {"isolation": isolation.plain()})
    except FedpactError as err:
        log.exception("executor not started", **err.as_dict())
        _exit(EXIT_SETUP)
    leaving: list[int] = []
    threading.Thread(target=_watch_guard, args=(pipe.read_fd, leaving), name="guard", daemon=True).start()
    threading.Thread(target=_work, args=(pipe, node, leaving), name="work", daemon=True).start()
    if not names_are_lost():
        threading.Thread(target=_watch_names, args=(leaving,), name="names", daemon=True).start()
    if setup.earlier is not None:
        node.end_connection(int(setup.earlier))
    code = _run(node)
    _exit(leaving[0] if leaving else code)


def _run(node: "SuperNodeLike") -> int:
    """Flower in the main thread; returns the exit code."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # notes which signals came; Flower sets the handlers
    try:
        node.run()
    except KeyboardInterrupt:  # Flower interrupted itself again while it was leaving
        return EXIT_REFUSED
    except SystemExit as err:
        if node.activation_failed(err):
            return EXIT_RETRY
        if err.code not in (0, None):
            return EXIT_UNAVAILABLE
        try:
            caught = os.read(reader, 64)
        except BlockingIOError:
            caught = b""
        # Flower interrupts itself where SuperLink answers 401, or does not accept a task's heartbeat.
        return EXIT_REFUSED if signal.SIGINT in caught else EXIT_OK
    return EXIT_UNAVAILABLE


class SuperNodeLike(Protocol):
    """What `_run` needs of `supernode.SuperNode`."""

    def run(self) -> None:
        """Serve until a signal."""

    def activation_failed(self, err: SystemExit) -> bool:
        """Whether SuperLink did not let the node in."""


def _work(pipe: Pipe, orders: Orders, leaving: list[int]) -> None:
    """The working thread: its end ends the process."""
    try:
        work(pipe, orders)
        code = EXIT_OK
    except (ProtocolError, FrameError) as err:
        log.exception("pipe to the guard", **err.as_dict())
        code = EXIT_PROTOCOL
    except BaseException:
        log.exception("executor failed")
        leaving.append(EXIT_FAULT)
        _leave(EXIT_FAULT)
        raise
    leaving.append(code)
    _leave(code)


def _watch_guard(read_fd: int, leaving: list[int]) -> None:
    """End the process where the guard is gone and the working thread does not end it: Flower holds it up."""
    waiter = select.poll()
    waiter.register(read_fd, 0)  # nothing but the end of the pipe
    waiter.poll()
    time.sleep(GONE_SECONDS)
    if not leaving:
        log.warning("guard gone; the task under way is given up")
        leaving.append(EXIT_OK)
        _leave(EXIT_OK)


def _watch_names(leaving: list[int]) -> None:
    """End the process where the name servers' file was replaced: it is behind the fence then, for this process."""
    while not names_are_lost():
        time.sleep(NAMES_SECONDS)
    log.warning("name servers changed")
    leaving.append(EXIT_UNAVAILABLE)
    _leave(EXIT_UNAVAILABLE)


def _leave(code: int) -> None:
    """Have the main thread say goodbye to SuperLink, so that the node may come back at once; but do not wait long."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE_SECONDS)
    _exit(code)


def _receive_setup(pipe: Pipe) -> Setup:
    frame = pipe.receive(SETUP_SECONDS)
    if frame is None or frame.kind != "setup":
        raise ProtocolError("EXECUTOR_FRAME", "The guard did not begin with a setup.")
    return Setup.parse(frame.header, code="EXECUTOR_SETUP")


def _read(path: str, code: str, message: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as err:
        raise InputError(code, message, file=path) from err


def _reply_text(frame: Frame) -> str:
    text = frame.header.get("reply")
    if not isinstance(text, str):
        raise ProtocolError("EXECUTOR_FRAME", "A reply has no text.")
    return text


def _set_environment(home: Path) -> None:
    """What flwr reads from the environment when it is imported: its folder; no telemetry, no look for updates.

    Temporary files go into that folder too: no other one can be written.
    """
    for name in [name for name in os.environ if name.startswith("FLWR_")]:
        del os.environ[name]
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ |= {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "TMPDIR": str(home),
    }


def _exit(code: int) -> NoReturn:
    """End at once: threads of Flower and uvicorn would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
