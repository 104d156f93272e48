"""A store as the releases of schema versions 1 and 2 wrote it: the schema as it stood then, with rows of today."""

import sqlite3
from pathlib import Path

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
    round INTEGER NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL
        CHECK (state IN ('reserved', 'spent', 'failed', 'restored')),
    row_hash TEXT NOT NULL UNIQUE, envelope BLOB NOT NULL, PRIMARY KEY (data_set, seq));
CREATE UNIQUE INDEX ledger_reserved_once ON ledger (contract_id, round, attempt) WHERE state = 'reserved';
CREATE UNIQUE INDEX ledger_ended_once ON ledger (contract_id, round) WHERE state IN ('spent', 'failed');
CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TABLE outbox (
    contract_id TEXT NOT NULL REFERENCES contracts, round INTEGER NOT NULL, base_digest TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('update', 'refusal')), reply_digest TEXT NOT NULL, array_digest TEXT,
    reply BLOB NOT NULL, array BLOB, PRIMARY KEY (contract_id, round, base_digest));
CREATE UNIQUE INDEX outbox_one_update ON outbox (contract_id, round) WHERE kind = 'update';
CREATE TABLE egress (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL, contract_id TEXT, round INTEGER,
    size INTEGER NOT NULL, sha256 TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE results (
    seq INTEGER PRIMARY KEY, contract_id TEXT NOT NULL REFERENCES contracts, round INTEGER NOT NULL,
    body BLOB NOT NULL, UNIQUE (contract_id, round, body));
CREATE TABLE alarms (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, code TEXT NOT NULL, contract_id TEXT,
    detail TEXT NOT NULL, evidence BLOB);
"""
TABLES = ("data_sets", "cards", "versions", "contracts", "heads", "ledger", "outbox", "egress", "results", "alarms")


def as_version_1(path: Path) -> None:
    """Rewrite a store of today, which holds nothing that version 1 had no place for, as version 1 had it."""
    today = path.with_name("today.db")
    path.rename(today)
    with sqlite3.connect(path) as old:
        old.executescript(SCHEMA)
        old.execute("ATTACH ? AS today", (str(today),))
        old.execute("INSERT INTO schema_version SELECT 1, accounting FROM today.schema_version")
        for table in TABLES:
            names = [row[1] for row in old.execute(f"PRAGMA main.table_info({table})")]
            columns = ", ".join(names)
            old.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM today.{table}")
    old.close()
    path.chmod(0o600)
    today.unlink()


def as_version_2(path: Path) -> None:
    """Rewrite a store of today as version 2 had it: an egress ledger that counted nothing."""
    with sqlite3.connect(path) as store:
        store.execute("DROP INDEX egress_by_bytes")
        for column in ("times", "last"):
            store.execute(f"ALTER TABLE egress DROP COLUMN {column}")
        store.execute("UPDATE schema_version SET version = 2")
    store.close()
