"""Where a data set's rows are: the `source` block of agent.toml. The enterprise chooses it, never a contract."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from fedpact_contract.errors import InputError
from fedpact_contract.record import Name, Part

if TYPE_CHECKING:
    import polars as pl

Text = Annotated[str, StringConstraints(max_length=200)]
_SQLITE_SIBLINGS = ("-wal", "-shm")
_CHUNK = 1 << 20


class Source(Part):
    """One table in one file.

    Args:
        path: The file; a relative path is taken from agent.toml's folder.
        kind: What the file is.
        table: The table or view, for sqlite.
        column_names: The columns' names, for a CSV file without a header.
        delimiter: What separates cells, for csv; one ASCII character.
        missing: Texts that stand for a missing value, such as "?" or "NA".
        rename: Contract's column -> the file's column, where the two names differ.
    """

    path: Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
    kind: Literal["csv", "parquet", "sqlite", "ndjson", "arrow"]
    table: Name | None = None
    column_names: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    delimiter: Annotated[str, StringConstraints(pattern=r"^[\x01-\x7f]$")] = ","
    missing: tuple[Text, ...] = ()
    rename: dict[Name, Name] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "sqlite") != (self.table is not None):
            raise ValueError("`table` goes with the kind sqlite, and only with it")
        if self.kind != "csv" and (self.column_names is not None or self.delimiter != ","):
            raise ValueError("`column_names` and `delimiter` go with the kind csv, and only with it")
        if self.column_names is not None and len(set(self.column_names)) != len(self.column_names):
            raise ValueError("`column_names` has a name twice")
        if len(set(self.rename.values())) != len(self.rename):
            raise ValueError("`rename` uses one column of the file twice")
        return self


def file_path(source: Source, base_dir: Path) -> Path:
    """The source's file; links are followed, so that everybody opens the same one."""
    return (base_dir / source.path).resolve()


def read(source: Source, base_dir: Path) -> "pl.DataFrame":
    """The table, with the contract's column names. A column that a renamed one displaces is left out.

    Raises:
        InputError: DATA_*, from `fedpact_models.tables.read_table`; DATA_COLUMN_MISSING where `rename` names a column
            that the file lacks.
    """
    from fedpact_models.tables import read_table

    path = file_path(source, base_dir)
    table = read_table(
        path,
        kind=source.kind,
        table=source.table,
        column_names=source.column_names,
        delimiter=source.delimiter,
        missing=source.missing,
    )
    return _renamed(table, source.rename, path) if source.rename else table


def read_paths(source: Source, base_dir: Path) -> tuple[Path, ...]:
    """The files that reading this source opens: all that the trainer's sandbox must let it read."""
    path = file_path(source, base_dir)
    if source.kind != "sqlite":
        return (path,)
    # A database in WAL mode keeps committed rows in a second file, and that file's index in a third.
    return (path, *(path.with_name(path.name + suffix) for suffix in _SQLITE_SIBLINGS))


def content_fingerprint(source: Source, base_dir: Path) -> str:
    """SHA-256 (hexadecimal) over the bytes of the source's files: renaming keeps it.

    It answers "was this file touched?" without reading its meaning. Converting the file or sorting its rows changes
    it; `table_fingerprint` survives both, and so does the trainer's `rows_fingerprint` under one contract's schema.

    Raises:
        InputError: DATA_UNREADABLE.
    """
    digest = hashlib.sha256(b"fedpact.source-files.v1:")
    main, *siblings = read_paths(source, base_dir)
    for path in (main, *(s for s in siblings if s.name.endswith("-wal") and s.exists())):
        try:
            digest.update(path.stat().st_size.to_bytes(8, "little"))
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as err:
            raise InputError(
                "DATA_UNREADABLE",
                f"The file cannot be read: {err.strerror}.",
                file=path,
                remedy="Correct the source's path, or the file's rights.",
            ) from err
    return digest.hexdigest()


def place_fingerprint(source: Source, base_dir: Path) -> str:
    """SHA-256 (hexadecimal) of where the source's file is, links followed: what is appended to the file keeps it."""
    return hashlib.sha256(b"fedpact.source-place.v1:" + os.fsencode(file_path(source, base_dir))).hexdigest()


def table_fingerprint(table: "pl.DataFrame", names: Sequence[str]) -> str:
    """SHA-256 (hexadecimal) over the sorted rows of these columns, cells in one spelling: converting keeps it.

    Neither the order of rows or columns nor the file's kind matters. Columns that hold neither text nor numbers, which
    no contract can use, are left out.
    """
    import polars as pl

    texts = sorted(n for n in names if not (table[n].dtype.is_nested() or table[n].dtype in (pl.Binary, pl.Object)))
    rows = sorted(hashlib.sha256(json.dumps(row).encode()).digest() for row in one_spelling(table, texts).rows())
    digest = hashlib.sha256(b"fedpact.source-table.v1:" + json.dumps(texts).encode())
    digest.update(b"".join(rows))
    return digest.hexdigest()


def one_spelling(table: "pl.DataFrame", names: Sequence[str]) -> "pl.DataFrame":
    """The columns as text in which equal cells are equal: numbers in one spelling, text without outer blanks."""
    import polars as pl

    text = table.select(pl.col(name).cast(pl.String).str.strip_chars() for name in names)
    number = [pl.col(name).cast(pl.Float64, strict=False) for name in names]
    return text.select(
        pl.when(value == 0)
        .then(pl.lit("0.0"))  # also for negative zero, which polars does not reliably turn by adding 0
        .when(value.is_finite())
        .then(value.cast(pl.String))
        .when(pl.col(name) != "")
        .then(pl.col(name))
        .otherwise(None)
        .alias(name)
        for name, value in zip(names, number, strict=True)
    )


def _renamed(table: "pl.DataFrame", rename: dict[str, str], path: Path) -> "pl.DataFrame":
    for new, old in rename.items():
        if old not in table.columns:
            raise InputError(
                "DATA_COLUMN_MISSING",
                f"The file lacks the column {old}, which `rename` calls {new}.",
                file=path,
                field=f"source.rename.{new}",
                remedy="Correct `rename` in agent.toml; column names are compared exactly.",
            )
    new_names = {old: new for new, old in rename.items()}
    kept = [name for name in table.columns if name in new_names or name not in rename]
    return table.select(kept).rename(new_names)
