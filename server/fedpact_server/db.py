"""The operator's database: tables, and transactions that are durable when they return.

SQLite in the operator's home by default, PostgreSQL by URL. Processes of one operator (serve, the round loop, the
command line) share it; a write transaction takes the write lock at its beginning, so that what it read still holds
when it writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Integer, LargeBinary, MetaData, PrimaryKeyConstraint, String, Table
from sqlalchemy.engine import Connection, Engine

from fedpact_contract.errors import FailedError, ServiceError

SCHEMA_VERSION = 1

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(column_0_label)s",
    }
)

Id = String(64)

meta = Table(
    "meta", metadata, Column("key", String(40), primary_key=True), Column("value", String(200), nullable=False)
)

invitations = Table(
    "invitations",
    metadata,
    Column("token_digest", Id, primary_key=True),
    Column("entity_code", String(18), nullable=False),
    Column("name", String(200), nullable=False),
    Column("sector", String(80), nullable=False),
    Column("expires", String(20), nullable=False),
    Column("state", String(12), nullable=False),  # open, used, frozen, closed
    Column("participant", Id),
)

participants = Table(
    "participants",
    metadata,
    Column("id", Id, primary_key=True),  # fingerprint of the contract key
    Column("name", String(200), nullable=False),
    Column("entity_code", String(18), nullable=False, unique=True),
    Column("sector", String(80), nullable=False),
    Column("contract_key", Id, nullable=False),
    Column("node_key_pem", String(1000), nullable=False),
    Column("node", Id, nullable=False, unique=True),  # hex SHA-256 of the node key's DER SubjectPublicKeyInfo
    Column("enrolment", LargeBinary, nullable=False),  # canonical bytes of the SignedEnrolment
    Column("state", String(12), nullable=False),  # requested, approved, registered, suspended, frozen
    Column("approved", String(20)),  # when its fingerprint was first compared and found right
    Column("flower_node", String(24)),
)

cards = Table(
    "cards",
    metadata,
    Column("participant", Id, ForeignKey("participants.id"), nullable=False),
    Column("data_set", String(80), nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    PrimaryKeyConstraint("participant", "data_set"),
)

releases = Table(  # validation rows that a participant released, per data set
    "releases",
    metadata,
    Column("participant", Id, ForeignKey("participants.id"), nullable=False),
    Column("data_set", String(80), nullable=False),
    Column("table", LargeBinary, nullable=False),  # canonical JSON lines of the rows
    PrimaryKeyConstraint("participant", "data_set"),
)

contracts = Table(
    "contracts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("payload", LargeBinary, nullable=False),  # canonical bytes
    Column("state", String(12), nullable=False),  # draft, offered, signed, terminated
)

signatures = Table(
    "signatures",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("party", Id, nullable=False),
    Column("contract_envelope", LargeBinary, nullable=False),  # the contract with this one signature
    Column("delegation", LargeBinary, nullable=False),
    PrimaryKeyConstraint("contract_id", "party"),
)

entries = Table(
    "entries",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("type", String(40), nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("leaf_hash", LargeBinary, nullable=False),
    PrimaryKeyConstraint("contract_id", "position"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("size", Integer, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    PrimaryKeyConstraint("contract_id", "size"),
)

countersignatures = Table(
    "countersignatures",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("size", Integer, nullable=False),
    Column("participant", Id, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    PrimaryKeyConstraint("contract_id", "size", "participant"),
)

runs = Table(
    "runs",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), primary_key=True),
    Column("phase", String(12), nullable=False),  # running, completed, stopped, closing, closed
    Column("wanted", String(12), nullable=False),  # run, pause, stop, unscored
    Column("driver", String(24)),  # the Flower run that may write; a replaced one is fenced off
    Column("detail", String(200), nullable=False, default=""),
    Column("started", String(20), nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("round", Integer, nullable=False),
    Column("phase", String(12), nullable=False),  # opened, sent, admitted, aggregated, evaluated, scored, committed
    Column("base_digest", Id, nullable=False),
    Column("deadline", String(20), nullable=False),
    Column("opened_index", Integer, nullable=False),
    Column("checkpoint_size", Integer, nullable=False),
    Column("timings", LargeBinary),  # canonical JSON: milliseconds of each of our parts
    PrimaryKeyConstraint("contract_id", "round"),
)

orders = Table(
    "orders",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("round", Integer, nullable=False),
    Column("participant", Id, nullable=False),
    Column("order", LargeBinary, nullable=False),
    PrimaryKeyConstraint("contract_id", "round", "participant"),
)

outcomes = Table(  # what became of each invited participant in each round
    "outcomes",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("round", Integer, nullable=False),
    Column("participant", Id, nullable=False),
    Column("kind", String(12), nullable=False),  # admitted, rejected, refused, missed
    Column("code", String(80), nullable=False),
    Column("position", Integer, nullable=False),  # of the log entry
    Column("update_digest", Id),
    Column("attempts", sa.BigInteger),  # that the update names
    PrimaryKeyConstraint("contract_id", "round", "participant"),
)

openings = Table(  # salts and values behind commitments, until they are opened
    "openings",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("name", String(40), nullable=False),  # "round:3", "moments"
    Column("salt", LargeBinary, nullable=False),
    Column("value", LargeBinary, nullable=False),
    PrimaryKeyConstraint("contract_id", "name"),
)

objections = Table(
    "objections",
    metadata,
    Column("contract_id", Id, ForeignKey("contracts.id"), nullable=False),
    Column("participant", Id, nullable=False),
    Column("size", Integer, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    PrimaryKeyConstraint("contract_id", "participant", "size"),
)

alarms = Table(
    "alarms",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", String(20), nullable=False),
    Column("code", String(80), nullable=False),
    Column("detail", String(400), nullable=False),
)


class Database:
    """One operator's database.

    Args:
        url: SQLAlchemy URL, `sqlite:////abs/path` or `postgresql+psycopg://…`.
    """

    def __init__(self, url: str) -> None:
        self.engine: Engine = _engine(url)

    @classmethod
    def in_home(cls, home: Path) -> "Database":
        """The embedded database of a home folder."""
        return cls(f"sqlite:///{(home / 'operator.db').resolve()}")

    def create(self) -> None:
        """Create the tables of this schema version, where they are missing."""
        metadata.create_all(self.engine)
        with self.write() as connection:
            if connection.execute(sa.select(meta.c.value).where(meta.c.key == "schema")).first() is None:
                connection.execute(meta.insert().values(key="schema", value=str(SCHEMA_VERSION)))

    def check(self) -> None:
        """Raise unless the database has this schema version.

        Raises:
            FailedError: no tables, or another version.
        """
        try:
            with self.read() as connection:
                found = connection.execute(sa.select(meta.c.value).where(meta.c.key == "schema")).scalar()
        except sa.exc.DatabaseError as err:
            raise FailedError(
                "DATABASE_UNREADABLE",
                "The operator's database cannot be read.",
                file=self.engine.url.database,
                remedy="Run `fedpact init`, or restore a backup.",
            ) from err
        if found != str(SCHEMA_VERSION):
            raise FailedError(
                "DATABASE_VERSION",
                f"The database has schema version {found}, this release needs {SCHEMA_VERSION}.",
                file=self.engine.url.database,
                remedy="Use the release that made this home.",
            )

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: everything read in it is of one moment."""
        with self._connect() as connection:
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction that holds the write lock from the beginning; durable when it returns."""
        with self._connect() as connection:
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7368706)")
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    def dispose(self) -> None:
        """Close pooled connections (before a fork, at the end)."""
        self.engine.dispose()

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        try:
            connection = self.engine.connect()
        except sa.exc.OperationalError as err:
            raise ServiceError(
                "DATABASE_AWAY", "The operator's database does not answer.", remedy="Check its URL and that it runs."
            ) from err
        with connection:
            yield connection


def _engine(url: str) -> Engine:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _on_connect(connection: Any, _record: Any) -> None:  # noqa: ANN401 - DB-API objects
            connection.isolation_level = None  # transactions are begun by us
            cursor = connection.cursor()
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    return engine
