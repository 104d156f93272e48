"""What the loader does with a database: one query in a read-only transaction, its rows into an Arrow file.

PostgreSQL through ADBC (COPY, columns as they come), MariaDB and MySQL through PyMySQL. No text of a driver or a server
is passed on: it may quote cells, or the query.
"""

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpact_contract.errors import FailedError, InputError

if TYPE_CHECKING:
    import pyarrow as pa

MISSING = "DATA_DRIVER_MISSING"
CONNECTIONS = {"postgresql": 2, "mariadb": 1}
"""How many a driver needs: ADBC asks for the types on one of its own."""
_CHUNK = 1 << 18
_ROWS = 20_000
_GONE = {1053, 1077, 1079, 1184, 1927, 2003, 2006, 2013, 2055}
_TEXT = {1054, 1064, 1142, 1143, 1146, 1248, 1305, 1370}
"""Unknown names, syntax, rights."""
_TWICE, _WRITES = 1060, {1290, 1792}


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where a database answers, who asks, and what. `ca_file`: the authorities of its certificate; None: no TLS."""

    kind: str
    host: str
    port: int
    database: str
    user: str
    password: str = field(repr=False)
    ca_file: str | None
    query: str

    @property
    def place(self) -> str:
        """What messages call it."""
        return f"{self.kind}://{self.host}:{self.port}/{self.database}"

    @property
    def select(self) -> str:
        """The query inside another one: whatever is not a single SELECT is a fault of syntax there."""
        return f"SELECT * FROM (\n{self.query.strip().removesuffix(';')}\n) AS fedpact_rows"  # noqa: S608 - reads only


def copy_rows(account: Account, servers: Sequence[socket.socket], out: int) -> int:
    """Run the query, write the rows as an Arrow file; how many there are.

    Args:
        account: Who asks what.
        servers: Connections that stand, as many as `CONNECTIONS` says.
        out: The descriptor of an empty file.

    Raises:
        InputError: DATA_SOURCE_LOGIN, DATA_QUERY, DATA_QUERY_WRITES, DATA_QUERY_FAILED, DATA_COLUMN_TWICE, DATA_EMPTY,
            DATA_DRIVER_MISSING.
        FailedError: DATA_SOURCE_AWAY, the connection was lost; DATA_SCRATCH, the disk is full.
    """
    try:
        return (_copy_postgresql if account.kind == "postgresql" else _copy_mariadb)(account, servers, out)
    except ImportError as err:
        raise InputError(
            MISSING,
            f"The driver of {account.kind} is not installed.",
            file=account.place,
            remedy="Install the extra: pip install 'fedpact[agent,databases]'.",
        ) from err


def _copy_postgresql(account: Account, servers: Sequence[socket.socket], out: int) -> int:
    relay = _Relay(servers)

    import pyarrow as pa
    from adbc_driver_postgresql import dbapi

    with contextlib.ExitStack() as stack:
        tls = ("disable", "") if account.ca_file is None else ("verify-full", account.ca_file)
        words = {
            "host": account.host,
            "hostaddr": "127.0.0.1",
            "port": str(relay.port),
            "dbname": account.database,
            "user": account.user,
            "password": account.password,
            "sslmode": tls[0],
            "sslrootcert": tls[1],
            "gssencmode": "disable",
            "application_name": "fedpact-agent",
        }
        try:
            connection = stack.enter_context(dbapi.connect(" ".join(f"{k}={_quoted(v)}" for k, v in words.items())))
        except dbapi.Error as err:
            raise _login(account) from err
        try:
            cursor = stack.enter_context(connection.cursor())
            cursor.execute("SET TRANSACTION READ ONLY")
            cursor.execute("SELECT current_setting('transaction_read_only')")
            if cursor.fetchone() != ("on",):
                raise _writes(account)
            cursor.execute(account.select)
            return _write(account, _plain(cursor.fetch_record_batch()), out)
        except (dbapi.Error, pa.ArrowException, OSError) as err:
            raise _postgresql_error(account, str(getattr(err, "sqlstate", None) or ""), lost=relay.lost) from err


def _postgresql_error(account: Account, state: str, *, lost: bool) -> InputError | FailedError:
    if lost or state[:2] == "08" or state in ("57P01", "57P02", "57P03"):
        return away(account.place, "The connection was lost.")
    if state == "25006":
        return _writes(account)
    return _query(account) if state[:2] == "42" else _failed(account)


def _plain(reader: "pa.RecordBatchReader") -> "Iterator[pa.RecordBatch]":
    """Batches whose columns have types that every reader knows: numerics and JSON as text, UUIDs too."""
    import pyarrow as pa

    for batch in reader:
        columns = []
        for column in batch.columns:
            if not isinstance(column.type, pa.BaseExtensionType):
                columns.append(column)
            elif pa.types.is_string(column.type.storage_type):
                columns.append(column.storage)
            else:
                texts = [None if cell is None else str(cell) for cell in column.to_pylist()]
                columns.append(pa.array(texts, pa.string()))
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _copy_mariadb(account: Account, servers: Sequence[socket.socket], out: int) -> int:
    import ssl

    import pyarrow as pa  # noqa: F401 - asked for now, before the connection
    import pymysql

    context = None if account.ca_file is None else ssl.create_default_context(cafile=account.ca_file)
    connection = pymysql.connections.Connection(
        host=account.host,
        port=account.port,
        user=account.user,
        password=account.password,
        database=account.database,
        ssl=context,
        ssl_disabled=context is None,
        cursorclass=pymysql.cursors.SSCursor,
        charset="utf8mb4",
        program_name="fedpact-agent",
        defer_connect=True,
    )
    try:
        connection.connect(sock=servers[0])
    except pymysql.MySQLError as err:
        if _number(err) in _GONE - {2003}:
            raise away(account.place, "The connection was lost.") from err
        raise _login(account) from err
    try:
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION READ ONLY")
            cursor.execute("START TRANSACTION READ ONLY")
            cursor.execute("SELECT @@tx_read_only")
            if cursor.fetchall() != [(1,)]:
                raise _writes(account)
            cursor.execute(account.select)
            return _write(account, _mariadb_batches(cursor), out)
    except (pymysql.MySQLError, OSError) as err:
        raise _mariadb_error(account, _number(err)) from err


def _number(err: Exception) -> int:
    return int(err.args[0]) if err.args and isinstance(err.args[0], int) else 0


def _mariadb_error(account: Account, number: int) -> InputError | FailedError:
    if number in _GONE:
        return away(account.place, "The connection was lost.")
    if number == _TWICE:
        return _twice(account, None)
    if number in _WRITES:
        return _writes(account)
    return _query(account) if number in _TEXT else _failed(account)


def _mariadb_batches(cursor: Any) -> "Iterator[pa.RecordBatch]":  # noqa: ANN401 - an unbuffered cursor of PyMySQL
    """Rows as columns of the types that the server names: whole numbers, floating ones, bytes; all else as text."""
    import pyarrow as pa
    from pymysql.constants import FIELD_TYPE as KIND

    whole = {KIND.TINY, KIND.SHORT, KIND.INT24, KIND.LONG, KIND.YEAR}
    named = [(column[0], column[1]) for column in cursor.description]
    makers: list[tuple[Any, Callable[[Any], Any]]] = []
    for index, (_, kind) in enumerate(named):
        if kind in whole:
            makers.append((pa.int64(), int))
        elif kind in (KIND.FLOAT, KIND.DOUBLE):
            makers.append((pa.float64(), float))
        elif kind == KIND.BIT:
            makers.append((pa.string(), lambda cell: str(int.from_bytes(cell, "big"))))
        elif kind in (KIND.BLOB, KIND.STRING, KIND.VAR_STRING) and cursor._result.fields[index].charsetnr == 63:
            makers.append((pa.binary(), bytes))
        else:
            makers.append((pa.string(), str))  # BIGINT may be unsigned, DECIMAL exact: as text both are what they are
    while rows := cursor.fetchmany(_ROWS):
        columns = [
            pa.array([None if cell is None else make(cell) for cell in cells], kind)
            for cells, (kind, make) in zip(zip(*rows, strict=True), makers, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(columns, names=[name for name, _ in named])


def _write(account: Account, batches: "Iterable[pa.RecordBatch]", out: int) -> int:
    import pyarrow as pa

    from fedpact_models.scratch import disk_full

    count, writer = 0, None
    with contextlib.ExitStack() as stack:
        for batch in batches:
            if writer is None:
                names = batch.schema.names
                if twice := [name for name in names if names.count(name) > 1]:
                    raise _twice(account, twice[0])
                try:
                    writer = stack.enter_context(pa.ipc.new_file(pa.PythonFile(_Out(out), "w"), batch.schema))
                except OSError as err:
                    raise disk_full(err) from err
            try:
                writer.write_batch(batch)
            except OSError as err:
                raise disk_full(err) from err
            count += batch.num_rows
    if not count:
        raise InputError(
            "DATA_EMPTY", "The query gives no rows.", file=account.place, remedy="Name a query that gives rows."
        )
    return count


class _Out:
    """A descriptor as a file that is written to, whole, and never closed."""

    def __init__(self, descriptor: int) -> None:
        self._file = open(descriptor, "wb", closefd=False)  # noqa: SIM115 - it stays open
        self.closed = False

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        self.closed = True


class _Relay:
    """A port on this process's own loopback, and behind it the connections that it was given, one for each caller.

    libpq makes its connections itself. In a network namespace without another device these are the only ones that it
    can make, and TLS goes through unbroken. Processes of their own pass the bytes on: the driver holds Python's lock
    while it waits for them. They must begin before anything starts threads.
    """

    def __init__(self, servers: Sequence[socket.socket]) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=len(servers))
        self.port: int = listener.getsockname()[1]
        self._ended, told = os.pipe()
        os.set_blocking(self._ended, False)
        for server in servers:
            if os.fork() == 0:
                try:
                    _pass_on(listener, server, told)
                finally:
                    os._exit(0)
        for handle in (listener, *servers):
            handle.close()
        os.close(told)

    @property
    def lost(self) -> bool:
        """Whether the server ended a connection."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self._ended, 1))
        return False


def _pass_on(listener: socket.socket, server: socket.socket, told: int) -> None:
    """Between the two sides until one ends; a byte says that it was the server."""
    client, _ = listener.accept()
    listener.close()
    other = {client: server, server: client}
    while True:
        for source in select.select(list(other), [], [])[0]:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            if not data:
                if source is server:
                    os.write(told, b"!")
                return
            other[source].sendall(data)


def _quoted(text: str) -> str:
    """A value in a libpq connection string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def away(place: str, message: str) -> FailedError:
    """The database cannot be read now; no row has anything to do with it."""
    return FailedError(
        "DATA_SOURCE_AWAY",
        message,
        file=place,
        field="source.host",
        remedy="Nothing was trained and nothing charged for it. Start the database, or correct host and port; the next "
        "round tries again.",
    )


def _login(account: Account) -> InputError:
    wrong = "user, password or database is wrong"
    return InputError(
        "DATA_SOURCE_LOGIN",
        f"The database does not let the agent in: {wrong}, or "
        + ("it wants TLS." if account.ca_file is None else "its certificate does not hold, or it has no TLS."),
        file=account.place,
        field="source.user",
        remedy="Correct the source in agent.toml: user, password, database, tls, ca_file. The server's log says more.",
    )


def _query(account: Account) -> InputError:
    return InputError(
        "DATA_QUERY",
        "The database does not accept the query: it names something that is not there or that this user may not read, "
        "or is no single SELECT.",
        file=account.place,
        field="source.query",
        rule="one SELECT statement, which changes nothing",
        remedy="Correct `query` in agent.toml; try it with the database's own command as this user.",
    )


def _writes(account: Account) -> InputError:
    from fedpact_models.tables import query_writes

    return query_writes(account.place)


def _twice(account: Account, name: str | None) -> InputError:
    return InputError(
        "DATA_COLUMN_TWICE",
        "The query gives a column name twice.",
        file=account.place,
        field=name or "source.query",
        remedy="Name the columns in the query, with AS.",
    )


def _failed(account: Account) -> InputError:
    return InputError(
        "DATA_QUERY_FAILED",
        "The database began the query and could not finish it.",
        file=account.place,
        field="source.query",
        remedy="Run the query with the database's own command: it says where it fails.",
    )
