"""A guard without the rest: reserves, "trains", completes, "sends" on standard output. The crash tests kill it.

python store_child.py loop HOME WITNESS     rounds until killed
python store_child.py once HOME WITNESS N   round 1; kills itself at the N-th point, or prints "points N" and ends
"""

import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpact_client.store import EgressKind, HomeLock, Ready, Reservation, Store
from fedpact_contract.arrays import update_digest
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.keys import load_key

BASE = "b" * 64


def say(line: str) -> None:
    """One write, so that the reader sees a whole line or none."""
    os.write(1, f"{line}\n".encode())


def train() -> bytes:
    return os.urandom(4 * 2000)


def send(store: Store, contract_id: str, number: int, ready: Ready) -> None:
    """Enter in the egress ledger, then let it leave."""
    body = ready.reply + ready.array
    store.record_egress(EgressKind(ready.kind), contract_id, number, len(body), sha256_hex(body))
    say(f"sent {number} {ready.kind} {sha256_hex(ready.reply)} {sha256_hex(ready.array)}")


def answer(store: Store, home: Path, contract_id: str, number: int) -> None:
    run_key = load_key(home / "run.pem")
    taken = store.reserve(contract_id, number, BASE, run_key)
    if isinstance(taken, Reservation):
        say(f"training {number} {taken.attempt}")
        array = train()
        if number % 5 == 4:
            taken = store.fail(taken, "DATA_NAN", lambda head: b"no " + head.encode(), run_key)
        else:
            reply = os.urandom(8)
            taken = store.complete(taken, lambda head: (reply + head.encode(), array), update_digest(array), run_key)
    send(store, contract_id, number, taken)


def loop(home: Path, witness: Path) -> None:
    with HomeLock(home), Store(home / "agent.db", witness=witness) as store:
        contract_id = store.contracts()[0].contract_id
        begun = [r.round for r in store.rows("heart")]
        say("ready")
        number = max(begun, default=1)
        while True:
            answer(store, home, contract_id, number)
            number += 1


class Points:
    """Counts points (every SQL statement, fsync, rename and what the caller names) and dies at one of them."""

    def __init__(self, deadly: int) -> None:
        self.deadly = deadly
        self.count = 0

    def __call__(self, name: object = None) -> None:
        self.count += 1
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*values: Any, **named: Any) -> Any:
            self()
            return call(*values, **named)

        return watched


def once(home: Path, witness: Path, deadly: int) -> None:
    points = Points(deadly)
    connect = sqlite3.connect

    def watched(*values: Any, **named: Any) -> sqlite3.Connection:
        connection = connect(*values, **named)
        connection.set_trace_callback(points)
        return connection

    sqlite3.connect = watched  # type: ignore[assignment]
    os.fsync = points.before(os.fsync)  # type: ignore[assignment]
    os.replace = points.before(os.replace)  # type: ignore[assignment]
    os.write = points.before(os.write)  # type: ignore[assignment]
    with HomeLock(home), Store(home / "agent.db", witness=witness) as store:
        answer(store, home, store.contracts()[0].contract_id, 1)
    say(f"points {points.count}")


if __name__ == "__main__":
    mode, home_path, witness_path, *rest = sys.argv[1:]
    if mode == "loop":
        loop(Path(home_path), Path(witness_path))
    else:
        once(Path(home_path), Path(witness_path), int(rest[0]))
