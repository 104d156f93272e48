"""The loader: `python -m fedpact_client.loader`, started by the agent for one query of one database.

It inherits connections to the one host and port that agent.toml names, and an empty file for the rows. Then it closes
itself in: no network but, for libpq, the loopback of its own namespace; no file but the installation and the
authorities' certificates. Frames from the agent and its answers:

    load   {kind, host, port, database, user, password, ca_file?, query, connections, out} -> ready {isolation}
                                                                                          -> loaded {rows}
                                                                                          -> failed {code, message, ...}

The password travels in the frame, never in arguments or environment. Exit codes as the trainer's.
"""

import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import structlog
from pydantic import Field

from fedpact_client.databases import Account, copy_rows
from fedpact_client.frames import Pipe
from fedpact_client.sandbox import close_in, limit_memory
from fedpact_client.spawn import child_main
from fedpact_contract.errors import FaultError, FedpactError, InputError
from fedpact_contract.record import Part

ORDERS = frozenset({"load"})
ANSWERS = frozenset({"ready", "loaded", "failed"})
ORDER_SECONDS = 60.0
MEMORY = 2 << 30
"""Bytes that it may take: it holds some rows at a time, however many there are."""

log = structlog.get_logger()


class LoadOrder(Part):
    """What to load, over which descriptors; the rest is `databases.Account`."""

    kind: Literal["postgresql", "mariadb"]
    host: str
    port: int
    database: str
    user: str
    password: Annotated[str, Field(repr=False)]
    ca_file: str | None = None
    query: str
    connections: Annotated[tuple[int, ...], Field(min_length=1)]
    out: int


def main() -> NoReturn:
    """Answer one order, then end the process."""
    try:
        code = _serve(child_main(kinds=ORDERS))
    except (FaultError, InputError) as err:
        log.error("loader ends", code=err.code, reason=err.message)
        code = err.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(pipe: Pipe) -> int:
    frame = pipe.receive(ORDER_SECONDS)
    if frame is None:
        return 0
    order = LoadOrder.parse(frame.header, code="LOADER_HEADER")
    account = Account(**{name: getattr(order, name) for name in Account.__dataclass_fields__})
    servers = [socket.socket(fileno=connection) for connection in order.connections]
    certificates = [] if order.ca_file is None else [Path(order.ca_file)]
    limit_memory(MEMORY)
    isolation = close_in(certificates, loopback=order.kind == "postgresql")
    log.info("loader ready", isolation=isolation.sentence)
    pipe.send("ready", {"isolation": isolation.plain()})
    pipe.send(*_load(account, servers, order.out))
    return 0


def _load(account: Account, servers: Sequence[socket.socket], out: int) -> tuple[str, dict[str, Any]]:
    try:
        return "loaded", {"rows": copy_rows(account, servers, out)}
    except FedpactError as err:
        return "failed", err.as_dict()
    except Exception as err:  # noqa: BLE001 - the process's edge; a driver's text may quote cells, a trace names places
        places = [f"{place.filename}:{place.lineno}" for place in traceback.extract_tb(err.__traceback__)]
        log.error("loading failed", kind=type(err).__name__, places=places)
        return "failed", {
            "code": "DATA_LOADER_INTERNAL",
            "message": "Loading stopped at a fault of the program.",
            "remedy": "The loader's log has the details.",
        }


if __name__ == "__main__":
    main()
