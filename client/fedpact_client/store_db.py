"""The SQLite file under the store: schema, explicit transactions, errors in our words.

Durability. Rollback journal in TRUNCATE mode with synchronous=FULL: a commit returns after the journal, the database
file and the truncated journal were each fsynced, so a committed row survives kill -9 and power loss, and a torn commit
is rolled back when the file is next opened. WAL would save a millisecond, but (1) a copy of the one file would lack
what stands in the -wal file, and this file's copies matter; (2) large updates would be written twice; (3) SQLite 3.7.0
to 3.51.2 can lose commits when two processes meet a WAL reset (https://sqlite.org/wal.html#walresetbug), and Python
brings whatever SQLite the machine has.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpact_contract.errors import FailedError, FedpactError, InputError
from fedpact_contract.files import sync_folder

VERSION = 3
ACCOUNTING = "dp-accounting RDP at the card's one alpha; relation REPLACE_SPECIAL; order list 1"
"""What the numbers in this schema mean. Another accountant, relation or list of orders is another version."""

BUSY_SECONDS = 10.0

SCHEMA = """
CREATE TABLE schema_version (version INTEGER NOT NULL, accounting TEXT NOT NULL);
CREATE TABLE data_sets (
    data_set TEXT PRIMARY KEY, participant TEXT NOT NULL, epsilon TEXT NOT NULL, delta TEXT NOT NULL,
    alpha TEXT NOT NULL, rdp_limit TEXT NOT NULL);
CREATE TABLE cards (
    seq INTEGER PRIMARY KEY, data_set TEXT NOT NULL REFERENCES data_sets, card BLOB NOT NULL, UNIQUE (data_set, card));
CREATE TABLE versions (
    seq INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, data_set TEXT NOT NULL REFERENCES data_sets);
CREATE TABLE contracts (
    contract_id TEXT PRIMARY KEY, data_set TEXT NOT NULL REFERENCES data_sets, state TEXT NOT NULL
        CHECK (state IN ('signed', 'running', 'paused', 'withdrawn', 'closed')),
    terms BLOB NOT NULL, run_key_name TEXT NOT NULL, run_public TEXT NOT NULL, signed BLOB NOT NULL);
CREATE TABLE heads (
    contract_id TEXT NOT NULL REFERENCES contracts, size INTEGER NOT NULL, root TEXT NOT NULL,
    countersigned INTEGER NOT NULL DEFAULT 0, checkpoint BLOB NOT NULL, PRIMARY KEY (contract_id, size));
CREATE TABLE ledger (
    data_set TEXT NOT NULL REFERENCES data_sets, seq INTEGER NOT NULL, contract_id TEXT NOT NULL,
    kind TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL
        CHECK (state IN ('reserved', 'spent', 'failed', 'restored')),
    row_hash TEXT NOT NULL UNIQUE, envelope BLOB NOT NULL, PRIMARY KEY (data_set, seq));
CREATE UNIQUE INDEX ledger_reserved_once ON ledger (contract_id, kind, round, attempt)
    WHERE state = 'reserved';
CREATE UNIQUE INDEX ledger_ended_once ON ledger (contract_id, kind, round)
    WHERE state IN ('spent', 'failed');
CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TABLE outbox (
    contract_id TEXT NOT NULL REFERENCES contracts, round INTEGER NOT NULL, base_digest TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('update', 'refusal')), reply_digest TEXT NOT NULL, array_digest TEXT,
    reply BLOB NOT NULL, array BLOB, PRIMARY KEY (contract_id, round, base_digest));
CREATE UNIQUE INDEX outbox_one_update ON outbox (contract_id, round) WHERE kind = 'update' AND round > 0;
CREATE TABLE egress (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL, contract_id TEXT, round INTEGER,
    size INTEGER NOT NULL, sha256 TEXT NOT NULL, detail TEXT NOT NULL, times INTEGER NOT NULL DEFAULT 1, last TEXT);
CREATE INDEX egress_by_bytes ON egress (sha256);
CREATE TABLE results (
    seq INTEGER PRIMARY KEY, contract_id TEXT NOT NULL REFERENCES contracts, round INTEGER NOT NULL,
    body BLOB NOT NULL, UNIQUE (contract_id, round, body));
CREATE TABLE alarms (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, code TEXT NOT NULL, contract_id TEXT,
    detail TEXT NOT NULL, evidence BLOB);
"""

Row = tuple[Any, ...]


class Database:
    """One connection to the store's file; a lock makes each transaction one thread's.

    Args:
        path: The file.
        create: Make a new, empty file; else a missing file is an error, never a fresh ledger.
        read_only: Refuse to write (a crashed writer's journal is still rolled back).
        upgrading: Take a store of any version (`store_upgrade`).

    Raises:
        InputError: STORE_MISSING, STORE_EXISTS, STORE_DAMAGED, STORE_OLDER, STORE_NEWER, STORE_VERSION.
        FailedError: STORE_UNWRITABLE, STORE_FULL, STORE_BUSY.
    """

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False, upgrading: bool = False) -> None:
        self.path = path
        self.lock = threading.RLock()
        if create:
            _create_file(path)
        elif not path.is_file():
            raise InputError(
                "STORE_MISSING",
                "The agent's store is missing.",
                file=path,
                remedy="Run `fedpact-agent init` for a new agent; for an existing one restore a backup: "
                "an empty store would forget what was spent.",
            )
        with self._translated():
            # mode=rw: SQLite itself never makes an empty file where ours is missing.
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=rw",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,  # no hidden transactions
                check_same_thread=False,  # the lock above serialises
            )
        try:
            self._prepare(create=create, read_only=read_only)
            if not upgrading:
                _check_version(self)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A write transaction (BEGIN IMMEDIATE): committed and fsynced at the end, rolled back on any error."""
        with self._bracket("BEGIN IMMEDIATE"):
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One consistent view; inside this thread's transaction, that transaction's view."""
        with self.lock:
            if self._connection.in_transaction:
                yield
                return
            with self._bracket("BEGIN"):
                yield

    def execute(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Run one statement; the number of rows it changed."""
        with self._translated():
            return self._connection.execute(sql, values).rowcount

    def insert(self, sql: str, values: Sequence[Any]) -> int:
        """Run one INSERT; the new row's number."""
        with self._translated():
            return self._connection.execute(sql, values).lastrowid or 0

    def all(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Every row of a query."""
        with self._translated():
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Row | None:
        """The first row of a query, if there is one."""
        rows = self.all(sql, values)
        return rows[0] if rows else None

    def check_integrity(self) -> None:
        """Read every page and index of the file.

        Raises:
            InputError: STORE_DAMAGED.
        """
        found = self.all("PRAGMA integrity_check(1)")
        if found != [("ok",)]:
            raise self.damaged(str(found[0][0]))

    def copy_to(self, target: Path) -> None:
        """Copy the file as it stands after the last commit (SQLite's online backup) to a new file, durably.

        Raises:
            InputError: STORE_EXISTS, the target is there already.
        """
        _create_file(target)
        with self.lock, self._translated():
            copy = sqlite3.connect(target)
            try:
                copy.execute("PRAGMA synchronous = FULL")
                self._connection.backup(copy)
            finally:
                copy.close()

    def _prepare(self, *, create: bool, read_only: bool) -> None:
        for pragma in ("synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF", "secure_delete = ON"):
            self.execute(f"PRAGMA {pragma}")
        if self.one("PRAGMA journal_mode = TRUNCATE") != ("truncate",):
            raise FailedError(
                "STORE_BUSY",
                "Another program holds the store in another journal mode.",
                file=self.path,
                remedy="End the program that has the file open.",
            )
        if create:
            with self.transaction():
                for statement in _statements(SCHEMA):
                    self.execute(statement)
                self.execute("INSERT INTO schema_version VALUES (?, ?)", (VERSION, ACCOUNTING))
        if read_only:
            self.execute("PRAGMA query_only = ON")
        if self.one("SELECT 1 FROM sqlite_master WHERE name = 'schema_version'") is None:
            raise self.damaged("it is empty or not an agent's store")

    @contextmanager
    def _bracket(self, begin: str) -> Iterator[None]:
        with self.lock:
            if self._connection.in_transaction:
                raise RuntimeError("a transaction is open in this thread already")
            self.execute(begin)
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                # A failed COMMIT may have rolled back already. What failed is raised; what was written is gone.
                if self._connection.in_transaction:
                    self.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OverflowError) as err:
            raise self._error(err) from err

    def _error(self, err: Exception) -> FedpactError:
        primary = getattr(err, "sqlite_errorcode", 0) & 0xFF
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT):
            return self.damaged(str(err))
        code, message, remedy = _FAILURES.get(
            primary,
            ("STORE_FAILED", "The store did not take a statement.", "This is a fault in Fedpact: please report it."),
        )
        return FailedError(code, f"{message} SQLite says: {err}.", file=self.path, remedy=remedy)

    def damaged(self, why: str) -> InputError:
        """The error for a file that cannot be believed."""
        return InputError(
            "STORE_DAMAGED",
            f"The agent's store is damaged: {why}.",
            file=self.path,
            remedy="Restore a backup of the agent's home, then run `fedpact-agent restore`.",
        )


def schema_of(database: Database) -> tuple[int, str]:
    """The version of a store's schema, and what its numbers mean.

    Raises:
        InputError: STORE_DAMAGED.
    """
    found = database.all("SELECT version, accounting FROM schema_version")
    if len(found) != 1 or not isinstance(found[0][0], int):
        raise database.damaged("it does not say its version")
    return found[0][0], str(found[0][1])


def _check_version(database: Database) -> None:
    if (found := schema_of(database)) != (VERSION, ACCOUNTING):
        raise wrong_version(database.path, *found)


def wrong_version(path: Path, version: int, accounting: str) -> InputError:
    """The refusal of a store that this release does not work with."""
    if accounting == ACCOUNTING and version < VERSION:
        code, remedy = "STORE_OLDER", "Run `fedpact-agent upgrade`: it takes a backup first."
    elif accounting == ACCOUNTING:
        code, remedy = "STORE_NEWER", "Install the release that wrote it, or a later one: nothing leads back."
    else:
        code, remedy = "STORE_VERSION", "Use the release that wrote it: its numbers mean something else."
    return InputError(
        code,
        f"The store has schema version {version}, and this release works with version {VERSION}.",
        file=path,
        field="schema_version",
        remedy=remedy,
    )


def _create_file(path: Path) -> None:
    """A new, empty file that only its owner can read; an existing one is never overwritten."""
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, mode=0o700)
    except OSError as err:
        raise _cannot_create(path, err) from err
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        sync_folder(path.parent)
    except FileExistsError as err:
        raise InputError(
            "STORE_EXISTS",
            "A file stands there already and is not overwritten.",
            file=path,
            remedy="Use another folder, or move the file away yourself.",
        ) from err
    except OSError as err:
        raise _cannot_create(path, err) from err


def _cannot_create(path: Path, err: OSError) -> FailedError:
    return FailedError(
        "STORE_UNWRITABLE",
        f"The file cannot be made: {err.strerror}.",
        file=path,
        remedy="Give a folder that this user can write to.",
    )


def _statements(script: str) -> Iterator[str]:
    """Single statements of a script (`executescript` would commit between them)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


_WRITE_REMEDY = "Free the disk or make it writable for this user; nothing was sent, and the charge stands."
_FAILURES = {
    sqlite3.SQLITE_READONLY: ("STORE_UNWRITABLE", "The store cannot be written.", _WRITE_REMEDY),
    sqlite3.SQLITE_CANTOPEN: ("STORE_UNWRITABLE", "The store cannot be opened.", _WRITE_REMEDY),
    sqlite3.SQLITE_PERM: ("STORE_UNWRITABLE", "The store cannot be opened.", _WRITE_REMEDY),
    sqlite3.SQLITE_IOERR: ("STORE_UNWRITABLE", "The disk failed under the store.", _WRITE_REMEDY),
    sqlite3.SQLITE_FULL: ("STORE_FULL", "The disk under the store is full.", _WRITE_REMEDY),
    sqlite3.SQLITE_BUSY: (
        "STORE_BUSY",
        f"Another process held the store for more than {BUSY_SECONDS:.0f} s.",
        "End the other command, then try again.",
    ),
    sqlite3.SQLITE_LOCKED: ("STORE_BUSY", "Another process holds the store.", "End the other command, then try again."),
    sqlite3.SQLITE_TOOBIG: (
        "STORE_TOO_BIG",
        "An update is larger than SQLite's limit of 1e9 bytes.",
        "Train a smaller model.",
    ),
}
