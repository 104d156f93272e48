"""Tables from files: CSV, Parquet, SQLite, NDJSON and Arrow, as polars frames: one, or in batches of bounded size.

CSV cells stay text: what a cell means is said by the contract's schema (`features`), never guessed from the file.
"""

import codecs
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal
from urllib.parse import quote

import polars as pl

from fedpact_contract.errors import InputError
from fedpact_contract.output import counted

Kind = Literal["csv", "parquet", "sqlite", "ndjson", "arrow"]
Cell = int | float | str | bytes | None

MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"PAR1", "parquet"),
    (b"SQLite format 3\x00", "sqlite"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # the stream format has no magic; each of its messages begins with this
)
BINARY = ("parquet", "sqlite", "arrow")
UTF8_BOM = b"\xef\xbb\xbf"
ROWS = 50_000
"""Most rows of a batch, where nothing else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """One file of a table, and the columns that its folders say (hive partitions: name -> text or nothing)."""

    path: Path
    partitions: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a table's files are read; the names are those of `read_table`. `columns`: no others are read; None: all."""

    kind: Kind
    table: str | None = None
    query: str | None = None
    column_names: Sequence[str] | None = None
    delimiter: str = ","
    missing: Sequence[str] = ()
    columns: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows that follow one another in a file: how many rows of it come before them, and the rows."""

    file: str
    before: int
    frame: pl.DataFrame


def read_table(
    path: str | Path,
    *,
    kind: Kind,
    table: str | None = None,
    query: str | None = None,
    column_names: Sequence[str] | None = None,
    delimiter: str = ",",
    missing: Sequence[str] = (),
) -> pl.DataFrame:
    """Read one table of one file.

    Text is stripped of surrounding blanks. Empty text and the `missing` markers become null; a marker that is a
    number also matches equal numbers.

    Args:
        path: The file.
        kind: What the file is.
        table: The table or view; for SQLite, and only there.
        query: In place of a table: one SELECT statement.
        column_names: Names for a CSV file that has no header; for CSV alone.
        delimiter: One character; for CSV.
        missing: Texts that stand for a missing value, such as "?" or "NA".

    Raises:
        InputError: DATA_OPTIONS (options that do not fit together), DATA_FILE_MISSING, DATA_UNREADABLE (also:
            corrupt, not UTF-8, a directory), DATA_WRONG_KIND, DATA_TABLE_MISSING, DATA_QUERY, DATA_QUERY_WRITES,
            DATA_COLUMN_COUNT, DATA_COLUMN_TWICE, DATA_EMPTY (an empty file, or no rows). Each names the file.
    """
    form = Form(kind=kind, table=table, query=query, column_names=column_names, delimiter=delimiter, missing=missing)
    return read_files([TableFile(path=Path(path))], form)


def read_files(files: Sequence[TableFile], form: Form) -> pl.DataFrame:
    """The whole table of several files, in their order; as `read_batches`."""
    frames = [batch.frame for batch in read_batches(files, form)]
    return frames[0] if len(frames) == 1 else pl.concat(frames)


def read_batches(files: Sequence[TableFile], form: Form, rows: int = ROWS) -> Iterator[Batch]:
    """The rows of several files of one table, in the files' order, at most about so many at a time.

    Every file has the same columns, in any order. Numbers of two types are read as float64; other types must agree.

    Raises:
        InputError: as `read_table`; DATA_FILES_DIFFER, naming the file and the column.
    """
    schema = _common_schema(files, form) if len(files) > 1 else None
    found = False
    for file in files:
        before = 0
        for frame in _frames(file, form, rows):
            if frame.height:
                cells = frame if schema is None else frame.select(pl.col(n).cast(t) for n, t in schema.items())
                yield Batch(file=str(file.path), before=before, frame=_tidy(cells, form.missing))
                before, found = before + frame.height, True
    if not found:
        raise InputError(
            "DATA_EMPTY", "The table has no rows.", file=files[0].path, remedy="Name a source that has rows."
        )


def first_line(kind: str, column_names: Sequence[str] | None) -> int | None:
    """The line of a CSV file in which its first row stands, as an editor counts; None for other kinds.

    Errors name a row of a CSV file by its line. (A cell that spans lines moves the rows after it.)
    """
    if kind != "csv":
        return None
    return 2 if column_names is None else 1


def _check_options(path: Path, form: Form) -> None:
    kind, column_names, problem = form.kind, form.column_names, None
    if kind not in ("csv", *BINARY, "ndjson"):
        problem = f"{kind!r} is no kind of table; kinds are csv, parquet, sqlite, ndjson and arrow."
    elif (form.table is not None) + (form.query is not None) != (kind == "sqlite"):
        problem = "`table` or `query`, one of them, goes with the kind sqlite, and only with it."
    elif column_names is not None and kind != "csv":
        problem = "`column_names` goes with the kind csv, and only with it."
    elif column_names is not None and len(set(column_names)) != len(column_names):
        problem = "`column_names` has a name twice."
    elif len(form.delimiter.encode()) != 1:
        problem = "`delimiter` must be one ASCII character."
    if problem:
        raise InputError("DATA_OPTIONS", problem, file=path)


def _first_bytes(path: Path) -> bytes:
    if not path.exists():
        raise InputError("DATA_FILE_MISSING", "The file does not exist.", file=path, remedy="Correct the path.")
    try:
        with path.open("rb") as source:
            head = source.read(16)
    except OSError as err:
        raise _unreadable(path, f"The file cannot be read: {err.strerror or err}.") from err
    if not head.removeprefix(UTF8_BOM):
        raise InputError("DATA_EMPTY", "The file is empty.", file=path)
    return head


def _check_magic(path: Path, kind: str, head: bytes) -> None:
    found = next((name for magic, name in MAGIC if head.startswith(magic)), None)
    if found != kind and (found is not None or kind in BINARY):
        what = f"it is {found}" if found else "its first bytes are not those of that kind"
        raise InputError(
            "DATA_WRONG_KIND", f"The file is not {kind}: {what}.", file=path, remedy="Correct the source's kind."
        )


def _common_schema(files: Sequence[TableFile], form: Form) -> dict[str, pl.DataType]:
    """The columns that all files have, and of which type each is read.

    Raises:
        InputError: DATA_FILES_DIFFER.
    """
    common: dict[str, pl.DataType] = {}
    for file in files:
        with _lazy(file, form) as lazy:
            schema = dict(lazy.collect_schema())
        if not common:
            common = schema
        lacks, more, wanted = common.keys() - schema.keys(), schema.keys() - common.keys(), form.columns or frozenset()
        # The names of a file without a header are cells: one of those that are wanted is told first.
        if odd := sorted(lacks & wanted) or sorted(more & wanted) or sorted(lacks) or sorted(more):
            raise _differ(file, odd[0], "The files of one table have different columns.")
        for name, dtype in schema.items():
            together = _together(common[name], dtype)
            if together is None:
                raise _differ(file, name, f"The column {name} is of another type here than in the files before.")
            common[name] = together
    return common


def _together(one: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """The type in which both can be read."""
    if one == other or other == pl.Null:
        return one
    if one == pl.Null:
        return other
    return pl.Float64() if one.is_numeric() and other.is_numeric() else None


def _differ(file: TableFile, column: str, message: str) -> InputError:
    return InputError(
        "DATA_FILES_DIFFER",
        message,
        file=file.path,
        field=column,
        rule="all files of one table have the same columns",
        remedy="Leave this file out of the source's path, or write it again with the columns of the others.",
    )


def _frames(file: TableFile, form: Form, rows: int) -> Iterator[pl.DataFrame]:
    """The cells of one file as they are, in batches."""
    if form.kind == "sqlite":
        _check_options(file.path, form)
        _check_magic(file.path, form.kind, _first_bytes(file.path))
        yield from _sqlite_frames(file.path, form, rows)
        return
    with _lazy(file, form) as lazy:
        yield from lazy.collect_batches(chunk_size=rows, engine="streaming")


@contextmanager
def _lazy(file: TableFile, form: Form) -> Iterator[pl.LazyFrame]:
    """The table of one file that polars reads: an open file is never taken for a pattern or an address."""
    path, kind = file.path, form.kind
    _check_options(path, form)
    _check_magic(path, kind, _first_bytes(path))
    try:
        with path.open("rb", buffering=0) as source:  # polars reads on from the descriptor's place, not the buffer's
            lazy = _scan_csv(path, source, form) if kind == "csv" else _SCANNERS[kind](source)
            names = lazy.collect_schema().names()
            if twice := sorted(file.partitions.keys() & set(names)):
                raise _twice(path, twice[0], "The column stands in the file and in the name of its folder.")
            whole = lazy.with_columns(pl.lit(text, pl.String).alias(name) for name, text in file.partitions.items())
            wanted = [n for n in (*names, *file.partitions) if form.columns is None or n in form.columns]
            yield whole.select(wanted) if wanted else whole
    except pl.exceptions.NoDataError as err:
        raise InputError("DATA_EMPTY", "The file holds no table.", file=path) from err
    # PanicException is no Exception, and its text may quote cells: no polars text is passed on.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as err:
        if kind in ("csv", "ndjson") and (line := _not_utf8(path)):
            raise InputError(
                "DATA_UNREADABLE",
                f"The file is not UTF-8: line {line} is the first that is not.",
                file=path,
                remedy="Save it as UTF-8; from a Chinese Windows it may be in GBK.",
            ) from err
        raise _unreadable(path, f"The file cannot be read as {kind}: it is damaged or of another kind.") from err


def _not_utf8(path: Path) -> int | None:
    """The first line (from 1) of a text file that is not UTF-8; read in pieces of one MiB."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                line += decoder.decode(chunk).count("\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as err:
        return line + err.object[: err.start].count(b"\n")
    except OSError:  # what polars met is told then
        return None
    return None


def _scan_csv(path: Path, source: IO[bytes], form: Form) -> pl.LazyFrame:
    header = form.column_names is None
    lazy = pl.scan_csv(source, has_header=header, separator=form.delimiter, infer_schema=False)
    found = lazy.collect_schema().names()
    if form.column_names is not None and len(found) != len(form.column_names):
        raise InputError(
            "DATA_COLUMN_COUNT",
            f"The file has {counted(len(found), 'column')}; names given for them: {len(form.column_names)}.",
            file=path,
            remedy="Correct `column_names` or `delimiter`.",
        )
    names = [name.strip() for name in form.column_names or found]
    times = Counter(names)
    twice = [n for n in names if "_duplicated_" in n and n.rpartition("_duplicated_")[0] in times]  # polars renames
    twice = [n.rpartition("_duplicated_")[0] for n in twice] + [n for n, count in times.items() if count > 1]
    if twice:
        raise _twice(path, twice[0], "A column name stands twice in the file.")
    return lazy.rename(dict(zip(found, names, strict=True)))


def _twice(path: Path, name: str, message: str) -> InputError:
    return InputError("DATA_COLUMN_TWICE", message, file=path, field=name)


def _scan_arrow(source: IO[bytes]) -> pl.LazyFrame:
    stream = source.read(4) == b"\xff\xff\xff\xff"
    source.seek(0)
    return pl.read_ipc_stream(source).lazy() if stream else pl.scan_ipc(source)


_SCANNERS: dict[str, Callable[[IO[bytes]], pl.LazyFrame]] = {
    "parquet": pl.scan_parquet,
    "ndjson": lambda source: pl.scan_ndjson(source, infer_schema_length=None),
    "arrow": _scan_arrow,
}

_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def _sqlite_frames(path: Path, form: Form, rows: int) -> Iterator[pl.DataFrame]:
    """The rows of a table or query in one transaction; of a query nothing but reading is allowed."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as database:
            database.isolation_level = None
            database.execute("BEGIN")
            if form.table is not None:
                what = _quoted(_known_table(database, path, form.table))
                select = f"SELECT * FROM {what}"  # noqa: S608 - an identifier, quoted above
            else:
                select = str(form.query).strip().removesuffix(";")
                database.set_authorizer(
                    lambda action, *_: sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY
                )
            cursor = _execute(database, path, select)
            names = [column[0] for column in cursor.description or ()]
            if twice := [name for name in names if names.count(name) > 1]:
                raise _twice(path, twice[0], "The query gives a column name twice.")
            each = ", ".join(f"group_concat(DISTINCT typeof({_quoted(n)}))" for n in names)
            kinds = database.execute(f"SELECT {each} FROM (\n{select}\n)").fetchone()  # noqa: S608 - reads only
            while batch := cursor.fetchmany(rows):
                columns = zip(names, zip(*batch, strict=True), kinds, strict=True)
                yield pl.DataFrame([_series(name, list(found), str(kind)) for name, found, kind in columns])
    except (sqlite3.Error, ValueError) as err:
        if getattr(err, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise InputError(
                "DATA_SOURCE_AWAY",
                "Another program holds the database's lock, and did not give it back in time.",
                file=path,
                remedy="End that program, or let it commit. Nothing is charged for it: the next round tries again.",
            ) from err
        raise _unreadable(path, "The file cannot be read as sqlite: it is damaged.") from err


def _execute(database: sqlite3.Connection, path: Path, query: str) -> sqlite3.Cursor:
    """Begin a query; its own faults are named as such, never in SQLite's words, which may quote cells."""
    try:
        return database.execute(query)
    except (sqlite3.Error, sqlite3.Warning) as err:
        code = getattr(err, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code in (sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_SCHEMA):  # the last: of CREATE
            raise query_writes(str(path)) from err
        if code != sqlite3.SQLITE_ERROR:
            raise  # the file's fault
        raise InputError(
            "DATA_QUERY",
            "SQLite does not accept the query: it names a table or column that is not there, is no SQL, or is more "
            "than one statement.",
            file=path,
            field="source.query",
            rule="one SELECT statement",
            remedy="Correct `query` in agent.toml; try it with the sqlite3 command.",
        ) from err


def query_writes(file: str) -> InputError:
    """A source's query that would do more than read."""
    return InputError(
        "DATA_QUERY_WRITES",
        "The query does more than read.",
        file=file,
        field="source.query",
        rule="one SELECT statement, which changes nothing",
        remedy="Correct `query` in agent.toml.",
    )


def _known_table(database: sqlite3.Connection, path: Path, table: str) -> str:
    known = database.execute(
        "SELECT count(*) FROM sqlite_master WHERE type IN ('table', 'view') AND name = ?", (table,)
    )
    if not known.fetchone()[0]:
        raise InputError("DATA_TABLE_MISSING", "The database has no such table or view.", file=path, field=table)
    return table


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _series(name: str, cells: list[Cell], kinds: str) -> pl.Series:
    """Some of a column's cells, of the SQLite types that all of its cells have: numbers if all are, else text."""
    types = set(kinds.split(",")) - {"null", "None"}
    if types <= {"integer"}:
        return pl.Series(name, cells, dtype=pl.Int64)
    if types <= {"integer", "real"}:
        return pl.Series(name, [None if c is None else float(c) for c in cells], dtype=pl.Float64)
    if types == {"blob"}:
        return pl.Series(name, cells, dtype=pl.Binary)
    texts = [c.decode(errors="replace") if isinstance(c, bytes) else None if c is None else str(c) for c in cells]
    return pl.Series(name, texts, dtype=pl.String)


def _tidy(frame: pl.DataFrame, missing: Sequence[str]) -> pl.DataFrame:
    """Strip text; turn empty text and markers into null."""
    texts = ["", *(marker.strip() for marker in missing)]
    numbers = [n for marker in missing if (n := _number(marker)) is not None]
    changed = []
    for name, dtype in frame.schema.items():
        column = pl.col(name)
        if dtype == pl.String:
            text = column.str.strip_chars()
            changed.append(pl.when(text.is_in(texts)).then(None).otherwise(text).alias(name))
        elif dtype.is_numeric() and numbers:
            value = column.cast(pl.Float64)
            marked = value.is_in([n for n in numbers if not math.isnan(n)])
            if dtype.is_float() and any(math.isnan(n) for n in numbers):
                marked = marked | value.is_nan()
            changed.append(pl.when(marked).then(None).otherwise(column).alias(name))
    return frame.with_columns(changed)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _unreadable(path: Path, message: str) -> InputError:
    return InputError(
        "DATA_UNREADABLE",
        message,
        file=path,
        remedy="Check the file, its rights and the source's kind. Text is UTF-8; a CSV file has as many cells in each "
        "line as in the first, and quotes in pairs.",
    )
