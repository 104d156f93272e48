"""Where a data set's rows are: the `source` block of agent.toml. The enterprise chooses it, never a contract."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, cast
from urllib.parse import unquote

from pydantic import Field, StringConstraints, model_validator

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.errors import InputError
from fedpact_contract.record import Name, Part
from fedpact_contract.record import form as form_of

if TYPE_CHECKING:
    import polars as pl

    from fedpact_client.config import Limits
    from fedpact_models.scratch import Scratch
    from fedpact_models.tables import Batch, Form, Kind, TableFile

FilePath = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Text = Annotated[str, StringConstraints(max_length=200)]
Query = Annotated[str, StringConstraints(min_length=1, max_length=100_000, pattern=r"^[^\x00]+$")]
PORTS = {"postgresql": 5432, "mariadb": 3306}
"""The kinds that are databases, with their usual ports."""
AWAY = "DATA_SOURCE_AWAY"
"""The code where rows cannot be reached now, whatever is in them."""
SCRATCH_FILES = 16
"""Each data set that is trained on and beyond memory holds one, and four more while it is read; a card takes eight."""
MEMORY_PART = 16
"""One part in so many of `limits.memory` may be taken by the encoded rows; beyond that they lie in a file."""
MOST_ROWS, MOST_CELLS = 100_000, 1 << 22
"""Of a batch of rows, and of its cells or features."""
_SQLITE_SIBLINGS = ("-wal", "-shm")
_CHUNK = 1 << 20
_PLAIN = r"^[ !#-\[\]-~]*$"
"""Text that JSON spells as it is, in quotation marks."""
_WILD = frozenset("*?[")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class Source(Part):
    """One table: in one file, in all files that a pattern or a folder names, or what a database answers to a query.

    Args:
        path: For kinds that are files. The file; a relative path is taken from agent.toml's folder. Or, but for sqlite,
            a pattern with `*`, `?`, `[...]` or `**`, or a folder, which stands for all files below it. Files and
            folders whose names begin with `.` or `_` are left out. Folders named `column=text` (hive partitions) add
            that column.
        kind: What the file is, or which database. mariadb is MySQL too.
        table: The table or view, for sqlite.
        query: One SELECT statement: for databases, and for sqlite in place of a table.
        column_names: The columns' names, for CSV files without a header.
        delimiter: What separates cells, for csv; one ASCII character.
        missing: Texts that stand for a missing value, such as "?" or "NA".
        rename: Contract's column -> the file's column, where the two names differ.
        host: The database's host, as is `port` (its usual one if absent), `database`, `user`.
        password_file: A file with the password, which only its owner can read; a relative path as `path`.
        password_env: In its place, the variable of the agent's environment that holds the password.
        tls: Whether the connection is encrypted and the database's certificate checked.
        ca_file: The authorities that the certificate is checked by; the system's if absent.
    """

    path: FilePath | None = None
    kind: Literal["csv", "parquet", "sqlite", "ndjson", "arrow", "postgresql", "mariadb"]
    table: Name | None = None
    query: Query | None = None
    column_names: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    delimiter: Annotated[str, StringConstraints(pattern=r"^[\x01-\x7f]$")] = ","
    missing: tuple[Text, ...] = ()
    rename: dict[Name, Name] = Field(default_factory=dict)
    host: Annotated[str, form_of(r"^[A-Za-z0-9.:_\-]{1,253}$", "a host's name or address")] | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    database: Name | None = None
    user: Name | None = None
    password_file: FilePath | None = None
    password_env: Annotated[str, form_of(r"^[A-Za-z_][A-Za-z0-9_]*$", "a variable's name")] | None = None
    tls: bool = True
    ca_file: FilePath | None = None

    @property
    def is_database(self) -> bool:
        """Whether a server is asked: by the loader, never by the trainer."""
        return self.kind in PORTS

    @property
    def tcp_port(self) -> int:
        """A database's port."""
        return self.port or PORTS[self.kind]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_place()
        if self.path is not None and any("**" in part and part != "**" for part in self.path.split("/")):
            raise ValueError("in a pattern `**` stands alone between two slashes: folders at any depth")
        if (self.kind == "sqlite") != (self.table is not None or (self.query is not None and not self.is_database)):
            raise ValueError("`table` or `query`, one of them, goes with the kind sqlite, and only with it")
        if self.table is not None and self.query is not None:
            raise ValueError("`table` or `query`, one of them, goes with the kind sqlite, and only with it")
        if self.kind != "csv" and (self.column_names is not None or self.delimiter != ","):
            raise ValueError("`column_names` and `delimiter` go with the kind csv, and only with it")
        if self.column_names is not None and len(set(self.column_names)) != len(self.column_names):
            raise ValueError("`column_names` has a name twice")
        if len(set(self.rename.values())) != len(self.rename):
            raise ValueError("`rename` uses one column of the file twice")
        return self

    def _check_place(self) -> None:
        """Files have a path; databases have an account and a query."""
        account = (self.host, self.port, self.database, self.user, self.password_file, self.password_env, self.ca_file)
        if not self.is_database:
            if self.path is None:
                raise ValueError("`path` goes with every kind but postgresql and mariadb")
            if any(value is not None for value in account) or not self.tls:
                raise ValueError("host, port, database, user, passwords, tls and ca_file go with databases only")
            return
        if self.path is not None or None in (self.host, self.database, self.user, self.query):
            raise ValueError(f"{self.kind} needs host, database, user and query, and has no path")
        if (self.password_file is None) == (self.password_env is None):
            raise ValueError("give password_file or password_env, one of them")
        if self.ca_file is not None and not self.tls:
            raise ValueError("`ca_file` goes with tls = true")


def file_path(source: Source, base_dir: Path) -> Path:
    """The source's file, pattern or folder; links are followed, so that everybody opens the same one."""
    folder, pattern = _folder(source, base_dir)
    return folder if pattern is None else folder / pattern


def place(source: Source, base_dir: Path) -> str:
    """Where the source is, for people: the file, pattern or folder, or the database without its user."""
    if source.is_database:
        return f"{source.kind}://{source.host}:{source.tcp_port}/{source.database}"
    return str(file_path(source, base_dir))


def loaded(source: Source, file: str | Path | None) -> Source:
    """The source as files: of a database, the file that the loader made of its rows."""
    if not source.is_database:
        return source
    return Source(path=str(file), kind="arrow", missing=source.missing, rename=source.rename)


def overlap(one: Source, other: Source, base_dir: Path) -> bool:
    """Whether two sources have a file, or the same query of a database, in common; a file that is gone is in none."""
    if one.is_database or other.is_database:
        return place_fingerprint(one, base_dir) == place_fingerprint(other, base_dir)
    return file_path(one, base_dir) == file_path(other, base_dir) or bool(
        _there(one, base_dir) & _there(other, base_dir)
    )


def _there(source: Source, base_dir: Path) -> set[Path]:
    try:
        with _reaching(base_dir):
            return {file.path.resolve() for file in table_files(source, base_dir)}
    except InputError:
        return set()


def table_files(source: Source, base_dir: Path) -> "list[TableFile]":
    """The files of the source's table, in the order of their paths.

    Raises:
        InputError: DATA_FILE_MISSING, a pattern or folder that holds none; DATA_SOURCE_AWAY.
    """
    from fedpact_models.tables import TableFile

    folder, pattern = _folder(source, base_dir)
    with _reaching(folder):
        if pattern is None and not (folder.is_dir() and source.kind != "sqlite"):
            return [TableFile(path=folder)]
        found = sorted(p for p in folder.glob(pattern or "**/*") if not _hidden(p, folder) and not p.is_dir())
    if not found:
        raise InputError(
            "DATA_FILE_MISSING",
            "No file is there.",
            file=file_path(source, base_dir),
            remedy="Correct the source's path; names that begin with . or _ are left out.",
        )
    return [TableFile(path=path, partitions=_partitions(path.relative_to(folder))) for path in found]


def check_there(source: Source, base_dir: Path) -> None:
    """The source's files are there and may be read; nothing of what is in them is. Databases are for the loader.

    Raises:
        InputError: DATA_SOURCE_AWAY.
    """
    try:
        files = [] if source.is_database else table_files(source, base_dir)
    except InputError as err:
        raise _away(err.file, err.message.rstrip(".")) from err
    for file in files:
        with _reaching(file.path):
            file.path.stat()
        if not os.access(file.path, os.R_OK):
            raise _away(file.path, "this user may not read it")


def batches(
    source: Source, base_dir: Path, rows: int, *, name: str | None = None, columns: Iterable[str] | None = None
) -> "Iterator[Batch]":
    """The table in batches of at most about so many rows, with the contract's column names.

    A column that a renamed one displaces is left out. `name` is what errors call all of its files. Of a file whose kind
    allows it, columns beside `columns` are not read.

    Raises:
        InputError: DATA_*, from `fedpact_models.tables.read_batches`; DATA_COLUMN_MISSING where `rename` names a column
            that the file lacks.
    """
    from fedpact_models.tables import Batch, read_batches

    how = form(source)
    if columns is not None:
        how = replace(how, columns=frozenset((*columns, *source.rename, *source.rename.values())))
    for batch in read_batches(table_files(source, base_dir), how, rows):
        file = name or batch.file
        frame = _renamed(batch.frame, source.rename, file) if source.rename else batch.frame
        yield Batch(file=file, before=batch.before, frame=frame)


def rows_at_once(cells: int) -> int:
    """Rows of one batch, where a row has so many cells, or features."""
    return max(1_000, min(MOST_ROWS, MOST_CELLS // max(cells, 1)))


def nameless(folder: str | Path) -> list[int]:
    """Open, empty files of this folder, `SCRATCH_FILES` of them, without a name: gone when they are closed."""
    made = []
    for _ in range(SCRATCH_FILES):
        file, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)  # noqa: PTH108 - as it was made
        made.append(file)
    return made


@contextlib.contextmanager
def scratch(folder: Path, limits: "Limits") -> "Iterator[Scratch]":
    """Room for what is noted of a table's rows, for as long as it is read: in memory while it is small, else in files.

    Args:
        folder: Where the files begin.
        limits: Of whose memory a small part is used. Their threads are those that read, too: each takes memory.

    Raises:
        FailedError: DATA_SCRATCH, no file can be made there.
    """
    os.environ.setdefault("POLARS_MAX_THREADS", str(limits.threads))  # read when polars is loaded

    from fedpact_models.scratch import Scratch, disk_full

    try:
        files = nameless(folder)
    except OSError as err:
        raise disk_full(err) from err
    room = Scratch(files, (limits.memory << 20) // (4 * MEMORY_PART))
    try:
        yield room
    finally:
        room.close()


def form(source: Source) -> "Form":
    """How the source's files are read."""
    from fedpact_models.tables import Form

    return Form(
        kind=cast("Kind", source.kind),  # a database's rows come as a file (`loaded`)
        table=source.table,
        query=source.query,
        column_names=source.column_names,
        delimiter=source.delimiter,
        missing=source.missing,
    )


def size(source: Source, base_dir: Path) -> int:
    """Bytes of the source's files; none of a database's, or where they are not there."""
    try:
        return 0 if source.is_database else sum(f.path.stat().st_size for f in table_files(source, base_dir))
    except (InputError, OSError):
        return 0


def read_paths(source: Source, base_dir: Path) -> tuple[Path, ...]:
    """What reading this source opens: all that the trainer's sandbox must let it read. Of a pattern, its folder.

    Of a database nothing: its rows come through the home's folder `loaded`.

    Raises:
        InputError: SOURCE_FOLDER, that folder holds the agent's keys; DATA_SOURCE_AWAY.
    """
    if source.is_database:
        return ()
    folder, pattern = _folder(source, base_dir)
    keys = (base_dir / "keys").resolve()
    with _reaching(folder):
        whole = pattern is not None or folder.is_dir()
    if folder.is_relative_to(keys) or (whole and keys.is_relative_to(folder)):
        raise InputError(
            "SOURCE_FOLDER",
            "The source's files lie beside the agent's keys, which would be open to training.",
            file=folder,
            field="source.path",
            rule="a pattern's folder is readable for training as a whole",
            remedy="Put the files into a folder of their own, outside of the home's `keys`.",
        )
    if source.kind != "sqlite":
        return (folder,)
    # A database in WAL mode keeps committed rows in a second file, and that file's index in a third.
    return (folder, *(folder.with_name(folder.name + suffix) for suffix in _SQLITE_SIBLINGS))


def _folder(source: Source, base_dir: Path) -> tuple[Path, str | None]:
    """The file, or the folder where a pattern begins and the pattern.

    Raises:
        InputError: DATA_SOURCE_AWAY.
    """
    whole = base_dir / str(source.path)
    parts = whole.parts
    wild = next((i for i, part in enumerate(parts) if _WILD & set(part)), None)
    with _reaching(whole):
        if wild is None or source.kind == "sqlite" or whole.exists():
            return whole.resolve(), None
        return Path(*parts[:wild]).resolve(), "/".join(parts[wild:])


@contextlib.contextmanager
def _reaching(path: Path) -> Iterator[None]:
    """Whatever keeps the system from looking at a path (rights, a disk that is away, links in a circle) is named.

    Raises:
        InputError: DATA_SOURCE_AWAY.
    """
    try:
        yield
    except (OSError, RuntimeError) as err:  # pathlib has no OSError for links in a circle
        raise _away(path, str(getattr(err, "strerror", None) or "its links lead in a circle")) from err


def _away(file: object, why: str) -> InputError:
    return InputError(
        AWAY,
        f"The source's files cannot be reached: {why}.",
        file=file,
        field="source.path",
        remedy="Mount the disk, or correct path or rights. Nothing is charged for it: the next round tries again.",
    )


def _hidden(path: Path, folder: Path) -> bool:
    return any(part[0] in "._" for part in path.relative_to(folder).parts)


def _partitions(path: Path) -> dict[str, str | None]:
    """The columns that the folders on the way to a file say, as hive spells them."""
    pairs = (part.partition("=") for part in path.parts[:-1] if "=" in part)
    return {unquote(name): None if text == _NO_VALUE else unquote(text) for name, _, text in pairs}


def content_fingerprint(source: Source, base_dir: Path) -> str:
    """SHA-256 (hexadecimal) over the bytes of the source's files: renaming keeps it.

    It answers "was this file touched?" without reading its meaning. Converting the file or sorting its rows changes
    it; `TableFingerprint` survives both, and so does the trainer's `rows_fingerprint` under one contract's schema.

    Raises:
        InputError: DATA_UNREADABLE.
    """
    digest = hashlib.sha256(b"fedpact.source-files.v1:")
    siblings = read_paths(source, base_dir)[1:]
    paths = [file.path for file in table_files(source, base_dir)]
    for path in (*paths, *(s for s in siblings if s.name.endswith("-wal") and s.exists())):
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
    """SHA-256 (hexadecimal) of where the source's file is, links followed: what is appended to the file keeps it.

    Of a pattern or folder, so does a file that is added.

    Of a database: host, port, database and query, however its blanks are set; not the user.
    """
    if source.is_database:
        query = " ".join(str(source.query).split()).rstrip("; ")
        where = [source.kind, str(source.host).lower(), source.tcp_port, source.database, query]
        return _place_digest(canonical_bytes(where))
    return _place_digest(os.fsencode(file_path(source, base_dir)))


def _place_digest(where: bytes) -> str:
    return hashlib.sha256(b"fedpact.source-place.v1:" + where).hexdigest()


def place_fingerprints(source: Source, base_dir: Path) -> tuple[str, ...]:
    """That of the place, and of each file of a pattern or folder that of its own place: it may be a source by itself.

    Raises:
        InputError: DATA_SOURCE_AWAY.
    """
    place = place_fingerprint(source, base_dir)
    files = [] if source.is_database else _there(source, base_dir)
    each = {_place_digest(os.fsencode(path)) for path in files}
    return place, *sorted(each - {place})


class TableFingerprint:
    """SHA-256 (hexadecimal) over the sorted rows of these columns, cells in one spelling: converting keeps it.

    Neither the order of rows or columns nor the file's kind matters. Columns that hold neither text nor numbers, which
    no contract can use, are left out. The rows come in batches; of each 32 bytes are kept.
    """

    def __init__(self, names: Sequence[str], scratch: "Scratch") -> None:
        from fedpact_models.scratch import Growing

        self._names, self._scratch, self._digests = names, scratch, Growing(scratch, "S32")
        self._texts: list[str] = []

    def add(self, frame: "pl.DataFrame") -> None:
        """Note one batch."""
        import numpy as np

        self._texts = comparable(frame, self._names)
        self._digests.append(np.array(row_digests(frame, self._texts), "S32"))

    def hexdigest(self) -> str:
        """The fingerprint, once all batches were added."""
        from fedpact_models.choosing import fingerprint

        return fingerprint(self._digests.whole(), table_title(self._texts), self._scratch)[0]


def comparable(table: "pl.DataFrame", names: Sequence[str]) -> list[str]:
    """Those of the columns that a table's fingerprint is made of, sorted."""
    import polars as pl

    kinds = {name: table.schema[name] for name in names if name in table.columns}
    return sorted(n for n, kind in kinds.items() if not (kind.is_nested() or kind in (pl.Binary, pl.Object)))


def table_title(names: Sequence[str]) -> bytes:
    """What a table's fingerprint begins with."""
    return b"fedpact.source-table.v1:" + json.dumps(list(names)).encode()


def row_digests(table: "pl.DataFrame", names: Sequence[str]) -> list[bytes]:
    """Of each row the SHA-256 of these columns' cells, in one spelling, as a JSON array of texts."""
    import polars as pl

    cells = one_spelling(table, names)
    plain = pl.all_horizontal(pl.col(names).str.contains(_PLAIN).fill_null(value=True).all())
    if not names or not cells.select(plain).item():
        return [hashlib.sha256(json.dumps(row).encode()).digest() for row in cells.rows()]
    quoted = [pl.concat_str(pl.lit('"'), pl.col(name), pl.lit('"')).fill_null("null") for name in names]
    rows = cells.select(pl.concat_str(pl.lit("["), pl.concat_str(quoted, separator=", "), pl.lit("]"))).to_series()
    return [hashlib.sha256(row.encode()).digest() for row in rows]


def one_spelling(table: "pl.DataFrame", names: Sequence[str]) -> "pl.DataFrame":
    """The columns as text in which equal cells are equal: numbers in one spelling, text without outer blanks."""
    import polars as pl

    primitive = [name for name in names if table.schema[name] in (pl.Float64, pl.Int64, pl.Int32)]
    others = [name for name in names if name not in primitive]
    text = table.select(
        pl.col(name) if name in primitive else pl.col(name).cast(pl.String).str.strip_chars() for name in names
    )
    zero = pl.lit("0.0")  # also for negative zero, which polars does not reliably turn by adding 0
    spelled = {
        name: pl.when(value == 0).then(zero).otherwise(value.cast(pl.String))  # what is not finite has one spelling too
        for name, value in ((name, pl.col(name).cast(pl.Float64)) for name in primitive)
    } | {
        name: pl.when(value == 0)
        .then(zero)
        .when(value.is_finite())
        .then(value.cast(pl.String))
        .when(pl.col(name) != "")
        .then(pl.col(name))
        .otherwise(None)
        for name, value in ((name, pl.col(name).cast(pl.Float64, strict=False)) for name in others)
    }
    return text.select(spelled[name].alias(name) for name in names)


def _renamed(table: "pl.DataFrame", rename: dict[str, str], path: str) -> "pl.DataFrame":
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
