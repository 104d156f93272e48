"""Tables from files: CSV, Parquet, SQLite, NDJSON and Arrow, into one polars frame.

CSV cells stay text: what a cell means is said by the contract's schema (`features`), never guessed from the file.
"""

import math
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
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


def read_table(
    path: str | Path,
    *,
    kind: Kind,
    table: str | None = None,
    column_names: Sequence[str] | None = None,
    delimiter: str = ",",
    missing: Sequence[str] = (),
) -> pl.DataFrame:
    """Read one table.

    Text is stripped of surrounding blanks. Empty text and the `missing` markers become null; a marker that is a
    number also matches equal numbers.

    Args:
        path: The file.
        kind: What the file is.
        table: The table or view; for SQLite, and only there.
        column_names: Names for a CSV file that has no header; for CSV alone.
        delimiter: One character; for CSV.
        missing: Texts that stand for a missing value, such as "?" or "NA".

    Raises:
        InputError: DATA_OPTIONS (options that do not fit together), DATA_FILE_MISSING, DATA_UNREADABLE (also:
            corrupt, not UTF-8, a directory), DATA_WRONG_KIND, DATA_TABLE_MISSING, DATA_COLUMN_COUNT,
            DATA_COLUMN_TWICE, DATA_EMPTY (an empty file, or no rows). Each names the file.
    """
    path = Path(path)
    _check_options(path, kind, table, column_names, delimiter)
    _check_magic(path, kind, _first_bytes(path))
    if kind == "csv":
        frame = _read(path, kind, lambda source: _read_csv(path, source, column_names, delimiter))
    elif kind == "sqlite":
        frame = _read_sqlite(path, str(table))
    else:
        frame = _read(path, kind, _READERS[kind])
    if frame.height == 0:
        raise InputError("DATA_EMPTY", "The table has no rows.", file=path, remedy="Name a source that has rows.")
    return _tidy(frame, missing)


def first_line(kind: str, column_names: Sequence[str] | None) -> int | None:
    """The line of a CSV file in which its first row stands, as an editor counts; None for other kinds.

    Errors name a row of a CSV file by its line. (A cell that spans lines moves the rows after it.)
    """
    if kind != "csv":
        return None
    return 2 if column_names is None else 1


def _check_options(
    path: Path, kind: str, table: str | None, column_names: Sequence[str] | None, delimiter: str
) -> None:
    problem = None
    if kind not in ("csv", *BINARY, "ndjson"):
        problem = f"{kind!r} is no kind of table; kinds are csv, parquet, sqlite, ndjson and arrow."
    elif (kind == "sqlite") != (table is not None):
        problem = "`table` goes with the kind sqlite, and only with it."
    elif column_names is not None and kind != "csv":
        problem = "`column_names` goes with the kind csv, and only with it."
    elif column_names is not None and len(set(column_names)) != len(column_names):
        problem = "`column_names` has a name twice."
    elif len(delimiter.encode()) != 1:
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


def _read(path: Path, kind: str, reader: Callable[[IO[bytes]], pl.DataFrame]) -> pl.DataFrame:
    """Call a polars reader on the open file: an open file is never taken for a pattern or an address."""
    try:
        with path.open("rb", buffering=0) as source:  # polars reads on from the descriptor's place, not the buffer's
            return reader(source)
    except pl.exceptions.NoDataError as err:
        raise InputError("DATA_EMPTY", "The file holds no table.", file=path) from err
    # PanicException is no Exception, and its text may quote cells: no polars text is passed on.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as err:
        raise _unreadable(path, f"The file cannot be read as {kind}: it is damaged or of another kind.") from err


def _read_csv(path: Path, source: IO[bytes], column_names: Sequence[str] | None, delimiter: str) -> pl.DataFrame:
    frame = pl.read_csv(source, has_header=column_names is None, separator=delimiter, infer_schema=False)
    if column_names is not None:
        if frame.width != len(column_names):
            raise InputError(
                "DATA_COLUMN_COUNT",
                f"The file has {counted(frame.width, 'column')}; names given for them: {len(column_names)}.",
                file=path,
                remedy="Correct `column_names` or `delimiter`.",
            )
        frame.columns = list(column_names)
    names = [name.strip() for name in frame.columns]
    twice = [n for n in names if "_duplicated_" in n and n.rpartition("_duplicated_")[0] in names]  # polars renames
    twice = [n.rpartition("_duplicated_")[0] for n in twice] + [n for n in names if names.count(n) > 1]
    if twice:
        raise InputError("DATA_COLUMN_TWICE", "A column name stands twice in the file.", file=path, field=twice[0])
    frame.columns = names
    return frame


def _read_arrow(source: IO[bytes]) -> pl.DataFrame:
    stream = source.read(4) == b"\xff\xff\xff\xff"
    source.seek(0)
    return pl.read_ipc_stream(source) if stream else pl.read_ipc(source)


_READERS: dict[str, Callable[[IO[bytes]], pl.DataFrame]] = {
    "parquet": pl.read_parquet,
    "ndjson": lambda source: pl.read_ndjson(source, infer_schema_length=None),
    "arrow": _read_arrow,
}


def _read_sqlite(path: Path, table: str) -> pl.DataFrame:
    name = '"' + table.replace('"', '""') + '"'
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as database:
            known = database.execute(
                "SELECT count(*) FROM sqlite_master WHERE type IN ('table', 'view') AND name = ?", (table,)
            )
            if not known.fetchone()[0]:
                raise InputError(
                    "DATA_TABLE_MISSING", "The database has no such table or view.", file=path, field=table
                )
            cursor = database.execute(f"SELECT * FROM {name}")  # noqa: S608 - an identifier, quoted above
            names = [column[0] for column in cursor.description]
            rows = cursor.fetchall()
    except (sqlite3.Error, ValueError) as err:
        raise _unreadable(path, "The file cannot be read as sqlite: it is damaged or locked.") from err
    return pl.DataFrame([_series(n, [row[i] for row in rows]) for i, n in enumerate(names)])


def _series(name: str, cells: list[Cell]) -> pl.Series:
    """A column of SQLite cells, whose types may differ from row to row: numbers if all are, else text."""
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds <= {int}:
        return pl.Series(name, cells, dtype=pl.Int64)
    if kinds <= {int, float}:
        return pl.Series(name, [None if c is None else float(c) for c in cells], dtype=pl.Float64)
    if kinds == {bytes}:
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
        "DATA_UNREADABLE", message, file=path, remedy="Check the file, its rights and the source's kind; text is UTF-8."
    )
