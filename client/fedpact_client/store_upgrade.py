"""`fedpact-agent upgrade`: a store that an earlier release wrote, made one of this release.

A backup is taken first. Everything else is one transaction, which also reads every ledger and verifies every row's
signature before it is committed: a crash at any moment leaves the store as it was or as it shall be, never between.
Rows are never changed: what was signed stays, byte for byte.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpact_client.store_chain import Chains
from fedpact_client.store_db import ACCOUNTING, VERSION, Database, schema_of, wrong_version
from fedpact_contract.files import sync_folder

STEPS: dict[int, Sequence[str]] = {
    1: (
        "DROP TRIGGER ledger_no_update",
        "DROP TRIGGER ledger_no_delete",
        "DROP INDEX ledger_reserved_once",
        "DROP INDEX ledger_ended_once",
        "ALTER TABLE ledger RENAME TO ledger_of_1",
        """CREATE TABLE ledger (
    data_set TEXT NOT NULL REFERENCES data_sets, seq INTEGER NOT NULL, contract_id TEXT NOT NULL,
    kind TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL
        CHECK (state IN ('reserved', 'spent', 'failed', 'restored')),
    row_hash TEXT NOT NULL UNIQUE, envelope BLOB NOT NULL, PRIMARY KEY (data_set, seq))""",
        "INSERT INTO ledger (data_set, seq, contract_id, kind, round, attempt, state, row_hash, envelope) "
        "SELECT data_set, seq, contract_id, '', round, attempt, state, row_hash, envelope FROM ledger_of_1",
        "DROP TABLE ledger_of_1",
        """CREATE UNIQUE INDEX ledger_reserved_once ON ledger (contract_id, kind, round, attempt)
    WHERE state = 'reserved'""",
        """CREATE UNIQUE INDEX ledger_ended_once ON ledger (contract_id, kind, round)
    WHERE state IN ('spent', 'failed')""",
        "CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger "
        "BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END",
        "CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger "
        "BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END",
        "DROP INDEX outbox_one_update",
        "CREATE UNIQUE INDEX outbox_one_update ON outbox (contract_id, round) WHERE kind = 'update' AND round > 0",
    ),
    2: (
        "ALTER TABLE egress ADD COLUMN times INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE egress ADD COLUMN last TEXT",
        "CREATE INDEX egress_by_bytes ON egress (sha256)",
    ),
}
"""By version, the statements that make the next one of it. A step stays as it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgraded:
    """What was done: the versions, and the copy that was taken before (none where there was nothing to do)."""

    old: int
    new: int
    backup: Path | None


def upgrade(path: Path, now: datetime.datetime) -> Upgraded:
    """Make the store one of this release. The caller holds the home's lock.

    Raises:
        InputError: STORE_NEWER, STORE_VERSION: no step leads from it to here; STORE_MISSING, STORE_DAMAGED.
        FaultError: LEDGER_CHAIN; the store stays as it was.
        FailedError: the disk failed; the store stays as it was.
    """
    database = Database(path, upgrading=True)
    try:
        old, accounting = schema_of(database)
        if (old, accounting) == (VERSION, ACCOUNTING):
            return Upgraded(old=old, new=VERSION, backup=None)
        if accounting != ACCOUNTING or not all(version in STEPS for version in range(old, VERSION)) or old > VERSION:
            raise wrong_version(path, old, accounting)
        database.check_integrity()
        backup = _copy(database, path, old, now)
        with database.transaction():
            for version in range(old, VERSION):
                for statement in STEPS[version]:
                    database.execute(statement)
            database.execute("UPDATE schema_version SET version = ?", (VERSION,))
            list(Chains(database).every())
    finally:
        database.close()
    return Upgraded(old=old, new=VERSION, backup=backup)


def _copy(database: Database, path: Path, version: int, now: datetime.datetime) -> Path:
    """The store as it stands, beside it: under its name only once it is whole and on the disk."""
    stamp = now.astimezone(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    target = path.with_name(f"{path.name}.version-{version}.{stamp}")
    draft = target.with_name(f"{target.name}.{os.getpid()}.part")
    draft.unlink(missing_ok=True)
    database.copy_to(draft)
    draft.replace(target)
    sync_folder(path.parent)
    return target
