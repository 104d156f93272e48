"""A contract's run as it stands in the database: what the round loop reads and may write.

The run is ours and outlives Flower's: a Flower run that died is replaced. `driver` names the one Flower run that may
write; every write of another one is refused (fencing).
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from fedpact_contract.arrays import model_digest
from fedpact_contract.contract import Contract, Delegation, SignedContract
from fedpact_contract.errors import FailedError, FaultError, InputError
from fedpact_contract.log import (
    Body,
    ContractSigned,
    Entry,
    RoundAggregated,
    RoundDiscarded,
    RoundOpened,
    UnionConfirmed,
    UnionWithdrawn,
    kept_rounds,
)
from fedpact_contract.record import open_signed
from fedpact_contract.unions import Unions, by_round
from fedpact_server import db, logbook

FloatArray = NDArray[np.float64]


STOPS = ("stop", "unscored")
"""What is wanted of a run that is to end; `unscored`: without scores, for what makes them is lost."""


class SupersededError(FailedError):
    """Another Flower run drives this contract's run now, or it was paused or has ended."""


class StopWantedError(FailedError):
    """The operator wants the run to end here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Everything fixed about one contract's run."""

    home: Path
    database: db.Database
    contract_id: str
    contract: Contract
    run_key: Ed25519PrivateKey
    run_keys: dict[str, str]  # participant id -> run key (hex)
    nodes: dict[str, str]  # participant id -> node id
    driver: str
    accept_test_noise: bool = False

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction, if this driver still is the one that may write.

        Raises:
            SupersededError: it is not.
        """
        with self.database.write() as connection:
            self._fence(connection)
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction, if this driver still is the one that may write.

        Raises:
            SupersededError: it is not.
            StopWantedError: it is, and is to stop waiting.
        """
        with self.database.read() as connection:
            self._fence(connection)
            run = run_row(connection, self.contract_id)
            if run is not None and run.wanted in STOPS:
                raise StopWantedError("RUN_STOPPED", "The operator stops the run.")
            yield connection

    def _fence(self, connection: Connection) -> None:
        run = run_row(connection, self.contract_id)
        if run is None or run.driver != self.driver or run.phase != "running" or run.wanted == "pause":
            raise SupersededError("RUN_SUPERSEDED", "This Flower run no longer drives the contract's run.")

    @property
    def arrays(self) -> Path:
        """Folder of this contract's updates and per-example values."""
        return self.home / "arrays" / self.contract_id


def run_row(connection: Connection, contract_id: str) -> sa.Row[tuple[object, ...]] | None:
    """The run of a contract, if it has one."""
    return connection.execute(sa.select(db.runs).where(db.runs.c.contract_id == contract_id)).first()


def last_round(connection: Connection, contract_id: str) -> sa.Row[tuple[object, ...]] | None:
    """The latest round, if there is one."""
    query = sa.select(db.rounds).where(db.rounds.c.contract_id == contract_id).order_by(db.rounds.c.round.desc())
    return connection.execute(query.limit(1)).first()


def sign_between_rounds(connection: Connection, contract_id: str, key: Ed25519PrivateKey) -> None:
    """A checkpoint over what was entered beside the round loop; a round under way has one of its own at its end."""
    run, current = run_row(connection, contract_id), last_round(connection, contract_id)
    if run is None or run.phase != "running" or current is None or current.phase == "committed":
        logbook.checkpoint(connection, contract_id, key)


def outcomes(connection: Connection, contract_id: str, round_number: int) -> dict[str, sa.Row[tuple[object, ...]]]:
    """What became of each participant in a round."""
    table = db.outcomes.c
    rows = connection.execute(
        sa.select(db.outcomes).where(table.contract_id == contract_id, table.round == round_number)
    )
    return {str(row.participant): row for row in rows}


def admitted_updates(connection: Connection, contract_id: str, round_number: int) -> dict[str, str]:
    """Participant id -> update digest of a round's admitted updates, in the order of ids."""
    rows = outcomes(connection, contract_id, round_number)
    return {p: str(row.update_digest) for p, row in sorted(rows.items()) if row.kind == "admitted"}


def base_of(connection: Connection, contract_id: str, round_number: int) -> str:
    """The digest of the model that a round began from."""
    table = db.rounds.c
    where = (table.contract_id == contract_id, table.round == round_number)
    return str(connection.execute(sa.select(table.base_digest).where(*where)).scalar_one())


def unions_of(connection: Connection, contract_id: str, round_number: int) -> Unions:
    """The unions that stood when a round was opened."""
    return unions_by_round(connection, contract_id).get(round_number, ())


def unions_by_round(connection: Connection, contract_id: str) -> dict[int, Unions]:
    """Round -> the unions that stood when it was opened."""
    return by_round(logbook.bodies_of(connection, contract_id, (UnionConfirmed, UnionWithdrawn, RoundOpened)))


def rounds_kept(connection: Connection, contract_id: str) -> list[RoundAggregated]:
    """The rounds that led to a model which was not given up, in order."""
    return kept_rounds(logbook.bodies_of(connection, contract_id, (RoundAggregated, RoundDiscarded)))


def invited(connection: Connection, contract_id: str, round_number: int) -> tuple[str, ...]:
    """Who was invited to a round, by the log's word."""
    table = db.rounds.c
    where = (table.contract_id == contract_id, table.round == round_number)
    index = connection.execute(sa.select(table.opened_index).where(*where)).scalar()
    if index is None:
        raise FailedError("ROUND_UNKNOWN", f"Round {round_number} was never opened.")
    return tuple(logbook.read_entry(connection, contract_id, int(index)).body["invited"])


def set_phase(connection: Connection, contract_id: str, round_number: int, phase: str) -> None:
    """Move a round to its next phase."""
    table = db.rounds.c
    connection.execute(
        db.rounds.update().where(table.contract_id == contract_id, table.round == round_number).values(phase=phase)
    )


def record_outcome(
    connection: Connection,
    contract_id: str,
    round_number: int,
    participant: str,
    *,
    kind: str,
    code: str,
    body: Body,
    update_digest: str | None = None,
    attempts: int | None = None,
) -> None:
    """Append the entry that says what became of a participant, and the outcome, as one."""
    (index,) = logbook.append(connection, contract_id, [body])
    connection.execute(
        db.outcomes.insert().values(
            contract_id=contract_id,
            round=round_number,
            participant=participant,
            kind=kind,
            code=code,
            position=index,
            update_digest=update_digest,
            attempts=attempts,
        )
    )


def add_timing(connection: Connection, contract_id: str, round_number: int, part: str, seconds: float) -> None:
    """Add to the milliseconds that one of our own parts of a round took."""
    table = db.rounds.c
    where = (table.contract_id == contract_id, table.round == round_number)
    stored = connection.execute(sa.select(table.timings).where(*where)).scalar()
    timings = json.loads(bytes(stored)) if stored else {}
    timings[part] = timings.get(part, 0) + round(seconds * 1000)
    connection.execute(db.rounds.update().where(*where).values(timings=json.dumps(timings).encode()))


def write_array(path: Path, data: bytes) -> None:
    """Write an array durably; the same bytes twice are fine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    with part.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)


def read_array(path: Path, what: Literal["model", "update"], digest_of: Callable[[bytes], str]) -> bytes:
    """An array's bytes; the file's stem is their digest.

    Raises:
        FaultError: MODEL_MISSING, UPDATE_MISSING; MODEL_DIGEST, UPDATE_DIGEST, it is not what its name says.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as err:
        raise FaultError(f"{what.upper()}_MISSING", f"The file of a {what} is missing.", file=path) from err
    if digest_of(data) != path.stem:
        raise FaultError(f"{what.upper()}_DIGEST", f"The file of a {what} is not what its digest says.", file=path)
    return data


def load_model(home: Path, digest: str) -> FloatArray:
    """A model by its digest, float64 [P].

    Raises:
        FaultError: the file is missing or is not what its name says.
    """
    data = read_array(home / "models" / f"{digest}.f8", "model", model_digest)
    return np.frombuffer(data, "<f8").copy()


def store_model(home: Path, model: FloatArray) -> str:
    """Keep a model under its digest; returns the digest."""
    data = model.astype("<f8").tobytes()
    digest = model_digest(data)
    write_array(home / "models" / f"{digest}.f8", data)
    return digest


def signed_contract(connection: Connection, contract_id: str) -> SignedContract:
    """The signed contract of entry 0.

    Raises:
        InputError: it is not signed by everybody yet.
    """
    query = sa.select(db.entries.c.data).where(db.entries.c.contract_id == contract_id, db.entries.c.position == 0)
    data = connection.execute(query).scalar()
    if data is None:
        raise InputError(
            "CONTRACT_NOT_SIGNED",
            "The contract is not signed by everybody yet.",
            remedy="`fedpact contract status` says whose signature is missing.",
        )
    body = Entry.from_bytes(bytes(data)).open()
    assert isinstance(body, ContractSigned)  # noqa: S101 - entry 0 is written by `contracts` alone
    return body.signed


def run_keys(signed: SignedContract, contract: Contract) -> dict[str, str]:
    """Party id -> delegated run key."""
    keys: dict[str, str] = {}
    parties = contract.parties()
    for envelope in signed.delegations:
        party = Delegation.from_bytes(envelope.body).party
        delegation = open_signed(envelope, Delegation, parties[party].key)
        keys[delegation.party] = delegation.run_key
    return keys


def node_ids(connection: Connection, contract: Contract) -> dict[str, str]:
    """Participant id -> node id, of those that are registered and not suspended."""
    table = db.participants.c
    rows = connection.execute(
        sa.select(table.id, table.node).where(
            table.state == "registered", table.id.in_([p.id for p in contract.participants])
        )
    )
    return {str(row.id): str(row.node) for row in rows}
