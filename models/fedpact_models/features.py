"""From a table to examples: the contract's schema applied. Bounds are public, nothing is learned from the data.

Errors name file, column, rule, the number of rows at fault and the first of them: by its line where the caller knows
in which line the rows begin (a CSV file), else by its number, from 1 and without a header. They never show a value.
"""

import hmac
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fedpact_contract import merkle
from fedpact_contract.contract import Column, Data, Label, NumberColumn, NumberLabel, SurvivalLabel
from fedpact_contract.errors import InputError
from fedpact_contract.log import validation_leaf
from fedpact_contract.output import counted

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Targets: TypeAlias = NDArray[np.int64] | NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]
Fault: TypeAlias = tuple[str, str, Flags]

ROW_TYPE = b"fedpact.row.v1:"
PLAIN_NUMBER = re.compile(r"(-?)(0|[1-9][0-9]*)(?:\.([0-9]*))?")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Encoded rows: features `x`, float64 [n, d], and targets `y` [n].

    Targets are indices into the label's classes, int64; numbers scaled to [-1, 1] by the label's bounds, float64; or
    codes of what was seen of a duration, int64 (`tasks.Survival`).
    The last feature is constant (`encode`). `entity`, int64 [n], tells apart whose the rows are, where that is asked.
    """

    x: Floats
    y: Targets
    entity: Integers | None = None

    def take(self, rows: Integers | Sequence[int]) -> "Examples":
        """These rows, in this order."""
        return Examples(x=self.x[rows], y=self.y[rows], entity=None if self.entity is None else self.entity[rows])

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cells:
    """One column, parsed: a float64 number or a choice's index a row, where nothing is missing or at fault.

    `on_missing`: refuse, drop or fill. `faults`: error code, what is wrong, and in which rows.
    """

    name: str
    rule: str
    on_missing: str
    values: Floats
    missing: Flags
    faults: tuple[Fault, ...]


def encode(
    data: Data, table: pl.DataFrame, *, file: str, first_line: int | None = None, entity: str | None = None
) -> Examples:
    """Features and labels of a table, in the table's order, without the rows that a `drop` rule leaves out.

    Numbers are clipped to their public bounds and scaled to [-1, 1], categories are one-hot in {-1, 1}, and a constant
    1 comes last; all are then multiplied by feature_scale / sqrt(d), d with the constant. A row's norm is thus at most
    feature_scale. The constant is the input of the first layer's bias. An input of 1 beside features this small would
    take much of each gradient's norm, and clipping would take it from the rest: at feature_scale 1 at least half of the
    squared norm, at 2 a quarter on the digits (accuracy there at epsilon 2, 40 seeds: .846 in place of .871).

    Args:
        data: The schema.
        table: The rows.
        file: What errors call the table.
        first_line: The line of the file in which the first row stands (`tables.first_line`).
        entity: The column that says whose a row is, where rows are to be told apart by that.

    Raises:
        InputError: DATA_EMPTY (no rows, or none left), DATA_COLUMN_MISSING, DATA_LABEL_MISSING, DATA_ENTITY_MISSING,
            DATA_NOT_A_NUMBER, DATA_NOT_FINITE, DATA_UNKNOWN_CATEGORY, DATA_UNKNOWN_CLASS, DATA_UNKNOWN_EVENT,
            DATA_LABEL_BOUNDS, DATA_MISSING_VALUE.
    """
    encoder = Encoder(data, entity=entity)
    examples, _ = encoder.add(table, file=file, first_line=first_line)
    encoder.finish(file)
    return examples


class Encoder:
    """The schema applied to a table that comes in parts, in their order; faults are told once all parts were seen.

    Args:
        data: The schema.
        entity: The column that says whose a row is, where rows are to be told apart by that.
        names: All texts of that column, sorted, where there is more than one part (`entity_names`).
    """

    def __init__(self, data: Data, *, entity: str | None = None, names: pl.Series | None = None) -> None:
        self._data, self._entity, self._names = data, entity, names
        self._faults, self._kept = _Faults(), 0

    def add(self, table: pl.DataFrame, *, file: str, first_line: int | None, before: int = 0) -> tuple[Examples, Flags]:
        """Examples of one part, and which of its rows they are, bool [rows]. They hold anything where a fault is.

        Args:
            table: The part.
            file: The file that it stands in.
            first_line: The line of the file in which its first row stands (`tables.first_line`).
            before: Rows of the file that come before this part.

        Raises:
            InputError: DATA_EMPTY, DATA_COLUMN_MISSING, DATA_LABEL_MISSING.
        """
        columns = _parse_columns(self._data, table, file)
        label, *more = _parse_label(self._data.label, table, file)
        whose = [] if self._entity is None else [_parse_entity(self._entity, table, file, self._names)]
        keep = _kept((*columns, label, *more))
        self._faults.note((*columns, label, *more, *whose), keep, file=file, first_line=first_line, before=before)
        self._kept += int(keep.sum())
        examples = Examples(
            x=_features(self._data, columns)[keep],
            y=label.values[keep].astype(target_type(self._data.label)),
            entity=whose[0].values[keep].astype(np.int64) if whose else None,
        )
        return examples, keep

    def finish(self, file: str) -> None:
        """Raise the first column's first fault, if there is one.

        Raises:
            InputError: as `encode`.
        """
        self._faults.refuse()
        if not self._kept:
            raise InputError(
                "DATA_EMPTY",
                "No row is left: a value that the contract's schema needs is missing in every row.",
                file=file,
            )


def encode_features(
    data: Data, table: pl.DataFrame, *, file: str, first_line: int | None = None
) -> tuple[Floats, Flags]:
    """Features alone, for prediction: x as in `encode`, float64 [m, d], and which rows of the table they are, bool [n].

    Raises:
        InputError: as `encode`, but that no label is asked for and no row need be left.
    """
    columns = _parse_columns(data, table, file)
    keep, faults = _kept(columns), _Faults()
    faults.note(columns, keep, file=file, first_line=first_line)
    faults.refuse()
    return _features(data, columns)[keep], keep


class Entities:
    """Whether every row of a table that comes in parts is somebody's: what `encode` finds, before there is a schema."""

    def __init__(self, name: str) -> None:
        self._name, self._faults = name, _Faults()

    def add(self, table: pl.DataFrame, *, file: str, first_line: int | None, before: int = 0) -> None:
        """Look at one part; the arguments are those of `Encoder.add`.

        Raises:
            InputError: DATA_COLUMN_MISSING.
        """
        cells, every = _parse_entity(self._name, table, file), np.ones(table.height, dtype=np.bool_)
        self._faults.note([cells], every, file=file, first_line=first_line, before=before)

    def finish(self) -> None:
        """Raise where a row is nobody's.

        Raises:
            InputError: DATA_ENTITY_MISSING, DATA_MISSING_VALUE.
        """
        self._faults.refuse()


def select_rows(examples: Examples, n: int, key: bytes, max_rows: int | None = None) -> Examples:
    """Exactly n rows: the first n by HMAC-SHA-256 under `key` of the row's bytes and its occurrence number.

    With `max_rows`, of each entity only its first so many in that order. The same rows in the same order however the
    table was sorted: identical rows are told apart by a count alone, which goes by entity where there is one.

    Raises:
        InputError: DATA_TOO_FEW_ROWS.
    """
    seen: dict[bytes, int] = {}
    ranked = []
    rows = _rows(examples)
    for index in range(len(rows)) if examples.entity is None else np.argsort(examples.entity, kind="stable").tolist():
        row = rows[index]
        count = seen[row] = seen.get(row, -1) + 1
        ranked.append((hmac.digest(key, row + count.to_bytes(8, "little"), "sha256"), index))
    order = [index for _, index in sorted(ranked)]
    if max_rows is not None:
        order = _capped(order, examples, max_rows)
    if len(order) < n:
        raise too_few_rows(len(order), n, max_rows)
    return examples.take(order[:n])


def too_few_rows(found: int, n: int, max_rows: int | None) -> InputError:
    """Fewer rows are there than the contract needs; `max_rows` is its cap for each entity."""
    capped = "" if max_rows is None else f", at most {max_rows} of each entity,"
    return InputError(
        "DATA_TOO_FEW_ROWS",
        f"The contract needs {counted(n, 'row')}{capped} and the data has {found}.",
        rule="train on exactly the contracted number of rows",
        remedy="Restore the rows, or agree on an amendment of the contract."
        if max_rows is None
        else "Declare fewer examples on the data set's card, or agree on a contract with more rows an entity.",
    )


def _capped(order: Sequence[int], examples: Examples, max_rows: int) -> list[int]:
    """The rows in this order, of each entity its first `max_rows`."""
    if examples.entity is None:
        raise InputError("DATA_ENTITY_MISSING", "It is not known whose the rows are.", rule="a row cap for each entity")
    taken: Counter[int] = Counter()
    kept = []
    for index in order:
        whose = int(examples.entity[index])
        taken[whose] += 1
        if taken[whose] <= max_rows:
            kept.append(index)
    return kept


def unknown_choices(series: pl.Series, choices: Sequence[str]) -> pl.Series:
    """Which cells hold something that is none of the choices, as `encode` compares them; booleans."""
    return pl.Series(series.name, _parse_choices(series, choices)[2])


def target_type(label: Label) -> Literal["<i8", "<f8"]:
    """How a target is stored: a number as it is, anything else by its index or code."""
    return "<f8" if isinstance(label, NumberLabel) else "<i8"


def row_bytes(x_row: Floats, y: np.int64 | np.float64) -> bytes:
    """One row's canonical bytes: type, features as little-endian float64, target as it is stored (`target_type`)."""
    features = np.asarray(x_row, dtype="<f8") + 0.0  # no negative zero: one value has one spelling
    target = np.asarray(y, "<f8") + 0.0 if isinstance(y, np.floating) else np.asarray(y, "<i8")
    return ROW_TYPE + features.astype("<f8").tobytes() + target.tobytes()


def validation_root(examples: Examples, salts: Sequence[bytes]) -> str:
    """Merkle root (hexadecimal) over the salted rows in their order: one fresh salt of 32 bytes a row.

    Raises:
        InputError: VALIDATION_SALTS: not one salt of 32 bytes a row, or a salt twice.
    """
    if len(salts) != len(examples) or len(set(salts)) != len(salts) or any(len(salt) != 32 for salt in salts):
        raise InputError("VALIDATION_SALTS", "Each validation row needs its own salt of 32 bytes.")
    return merkle.root([validation_leaf(s, row) for s, row in zip(salts, _rows(examples), strict=True)]).hex()


def pack_rows(examples: Examples, salts: Sequence[bytes]) -> bytes:
    """The salted rows one after another: of each its salt and its canonical bytes, what the leaves of its root hash."""
    return b"".join(salt + row for salt, row in zip(salts, _rows(examples), strict=True))


def unpack_rows(
    data: bytes, features: int, target: Literal["<i8", "<f8"] = "<i8"
) -> tuple[Examples, tuple[bytes, ...]]:
    """The rows, of so many features and this `target_type`, that `pack_rows` made bytes of, and their salts.

    Raises:
        InputError: VALIDATION_ROWS: these are no such rows.
    """
    kind = np.dtype([("salt", "V32"), ("type", f"V{len(ROW_TYPE)}"), ("x", "<f8", (features,)), ("y", target)])
    if not data or len(data) % kind.itemsize:
        raise InputError("VALIDATION_ROWS", f"These are no validation rows of {features} features.")
    rows = np.frombuffer(data, kind)
    examples = Examples(x=rows["x"].astype(np.float64), y=rows["y"].astype(np.dtype(target).newbyteorder("=")))
    salts = tuple(data[start : start + 32] for start in range(0, len(data), kind.itemsize))
    if pack_rows(examples, salts) != data:
        raise InputError("VALIDATION_ROWS", "A validation row is not in its one spelling.")
    return examples, salts


def packed(examples: Examples) -> tuple[bytes, int]:
    """All rows' canonical bytes (`row_bytes`) one after another, and the length of each."""
    floats = np.issubdtype(examples.y.dtype, np.floating)
    kind = np.dtype(
        [("type", f"V{len(ROW_TYPE)}"), ("x", "<f8", (examples.x.shape[1],)), ("y", "<f8" if floats else "<i8")]
    )
    rows = np.empty(len(examples), kind)
    rows["type"] = np.void(ROW_TYPE)
    rows["x"] = examples.x + 0.0  # no negative zero: one value has one spelling
    rows["y"] = examples.y + 0.0 if floats else examples.y
    return rows.tobytes(), kind.itemsize


def _rows(examples: Examples) -> list[bytes]:
    data, size = packed(examples)
    return [data[start : start + size] for start in range(0, len(data), size)]


def _parse_columns(data: Data, table: pl.DataFrame, file: str) -> list[_Cells]:
    if table.height == 0:
        raise InputError("DATA_EMPTY", "The table has no rows.", file=file)
    absent = [column.name for column in data.columns if column.name not in table.columns]
    if absent:
        more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(
            "DATA_COLUMN_MISSING",
            f"The table lacks the column {absent[0]}{more}, which the contract's schema names.",
            file=file,
            field=absent[0],
            rule="every column of the contract's schema",
            remedy="Name the source that has it; column names are compared exactly.",
        )
    return [_parse_column(column, table[column.name]) for column in data.columns]


def _parse_column(column: Column, series: pl.Series) -> _Cells:
    if isinstance(column, NumberColumn):
        values, missing, faults = _parse_numbers(series)
        rule = f"number in [{column.low}, {column.high}]"
    else:
        values, missing, unknown = _parse_choices(series, column.values)
        faults = (("DATA_UNKNOWN_CATEGORY", "a value outside the vocabulary", unknown),)
        rule = f"category of {len(column.values)} values"
    return _Cells(
        name=column.name,
        rule=f"{rule}, missing: {column.missing}",
        on_missing=column.missing,
        values=values,
        missing=missing,
        faults=faults,
    )


def _parse_label(label: Label, table: pl.DataFrame, file: str) -> list[_Cells]:
    """The targets, and what else they rest on."""
    names = [label.name, label.event] if isinstance(label, SurvivalLabel) else [label.name]
    if absent := [name for name in names if name not in table.columns]:
        raise InputError(
            "DATA_LABEL_MISSING",
            f"The table lacks the label column {absent[0]}.",
            file=file,
            field=absent[0],
            rule="label",
            remedy="Name the source that has it; column names are compared exactly.",
        )
    series = table[label.name]
    if isinstance(label, NumberLabel):
        return [_parse_number(label, series)]
    if isinstance(label, SurvivalLabel):
        return _parse_durations(label, series, table[label.event])
    if label.threshold is None:
        values, missing, unknown = _parse_choices(series, label.classes)
        faults: tuple[Fault, ...] = (("DATA_UNKNOWN_CLASS", "a value outside the classes", unknown),)
        rule = f"label, one of {len(label.classes)} classes"
    else:
        numbers, missing, faults = _parse_numbers(series)
        values = (numbers > float(label.threshold)).astype(np.float64)
        rule = f"label, above {label.threshold}"
    return [
        _Cells(
            name=label.name,
            rule=rule,
            on_missing=label.missing or "refuse",
            values=values,
            missing=missing,
            faults=faults,
        )
    ]


def _parse_number(label: NumberLabel, series: pl.Series) -> _Cells:
    """Numbers, scaled by their bounds. A feature outside its bounds is clipped; a target there would be another one."""
    numbers, missing, faults = _parse_numbers(series)
    low, high = float(label.low), float(label.high)
    outside = ~missing & ((numbers < low) | (numbers > high))
    return _Cells(
        name=label.name,
        rule=f"label, number in [{label.low}, {label.high}]",
        on_missing=label.missing or "refuse",
        values=2.0 * ((np.clip(numbers, low, high) - low) / (high - low)) - 1.0,
        missing=missing,
        faults=(*faults, ("DATA_LABEL_BOUNDS", "a number outside the label's bounds", outside)),
    )


def _parse_durations(label: SurvivalLabel, durations: pl.Series, events: pl.Series) -> list[_Cells]:
    """Codes of `tasks.Survival`, and whether the event came.

    Of the censored, an interval counts as lived through that they were watched beyond the middle of.
    """
    lengths, missing, faults = _parse_numbers(durations)
    outcomes, unsaid, unknown = _parse_choices(events, label.outcomes)
    cuts = np.array([0.0, *map(float, label.cuts)])
    ended = np.searchsorted(cuts[1:], lengths)
    watched = np.searchsorted((cuts[1:] + cuts[:-1]) / 2, lengths, "right")
    came = (outcomes == 1.0) & (ended < len(label.cuts))
    faults = (*faults, ("DATA_LABEL_BOUNDS", "a duration below 0", ~missing & (lengths < 0)))
    return [
        _Cells(
            name=label.name,
            rule="label, duration, at least 0",
            on_missing=label.missing or "refuse",
            values=np.where(came, 2.0 * ended + 1.0, 2.0 * np.where(outcomes == 1.0, len(label.cuts), watched)),
            missing=missing,
            faults=faults,
        ),
        _Cells(
            name=label.event,
            rule="label, event, one of 2 outcomes",
            on_missing=label.missing or "refuse",
            values=outcomes,
            missing=unsaid,
            faults=(("DATA_UNKNOWN_EVENT", "a value that is none of the outcomes", unknown),),
        ),
    ]


def _parse_entity(name: str, table: pl.DataFrame, file: str, names: pl.Series | None = None) -> _Cells:
    """Whose each row is, as numbers: cells of one text are of one entity.

    The numbers are the texts' places among the sorted `names` of all parts, from 1; None: this is the only part.
    """
    text, strange = _entity_texts(name, table, file)
    if names is None:
        values = text.rank("dense").fill_null(0).to_numpy()
    else:
        values = np.where(text.is_null().to_numpy(), 0, names.search_sorted(text.fill_null("")).to_numpy() + 1)
    return _Cells(
        name=name,
        rule="whose a row is",
        on_missing="refuse",
        values=values.astype(np.float64),
        missing=text.is_null().to_numpy(),
        faults=(("DATA_ENTITY_MISSING", "something that names nobody", strange),),
    )


def entity_names(name: str, tables: Iterable[tuple[pl.DataFrame, str]]) -> pl.Series:
    """All texts of the column that says whose a row is, in a table that comes in parts (each with its file), sorted.

    Raises:
        InputError: DATA_COLUMN_MISSING.
    """
    names = pl.Series(name, [], dtype=pl.String)
    for table, file in tables:
        names = pl.concat([names, _entity_texts(name, table, file)[0].drop_nulls().unique()]).unique()
    return names.sort()


def _entity_texts(name: str, table: pl.DataFrame, file: str) -> tuple[pl.Series, Flags]:
    """The column's cells as text, and which of them name nobody (then no text is made)."""
    if name not in table.columns:
        raise InputError(
            "DATA_COLUMN_MISSING",
            f"The table lacks the column {name}, by which the contract tells entities apart.",
            file=file,
            field=name,
            rule="privacy.entity.column",
            remedy="Name the source that has it; column names are compared exactly.",
        )
    series = _stripped(table[name])
    strange = np.full(len(series), series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object))
    if series.dtype.is_float():
        strange |= series.is_nan().fill_null(value=False).to_numpy()
    return series.cast(pl.String, strict=False) if not strange.any() else pl.Series(name, [""] * len(series)), strange


def _parse_numbers(series: pl.Series) -> tuple[Floats, Flags, tuple[Fault, ...]]:
    series = _stripped(series)
    missing = series.is_null().to_numpy()
    if series.dtype.is_nested() or series.dtype.is_temporal() or series.dtype in (pl.Binary, pl.Object):
        values, strange = np.zeros(len(series)), ~missing
    else:
        numbers = series.cast(pl.Float64, strict=False)
        strange = numbers.is_null().to_numpy() & ~missing
        values = numbers.fill_null(0.0).to_numpy()
    infinite = ~np.isfinite(values)
    faults = (
        ("DATA_NOT_A_NUMBER", "something that is not a number", strange),
        ("DATA_NOT_FINITE", "a number that is not finite", infinite),
    )
    return np.where(infinite, 0.0, values), missing, faults


def _parse_choices(series: pl.Series, choices: Sequence[str]) -> tuple[Floats, Flags, Flags]:
    """Index of the choice in each row (-1: none), where nothing stands, and where something unknown does."""
    series = _stripped(series)
    missing = series.is_null().to_numpy()
    values = np.full(len(series), -1.0)
    if not (series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object)):
        text = series.cast(pl.String)
        known = _lookup(choices, text.unique().drop_nulls().to_list())
        if known:
            found = text.replace_strict(list(known), list(known.values()), default=-1, return_dtype=pl.Int64)
            values = found.fill_null(-1).to_numpy().astype(np.float64)
    return values, missing, (values < 0) & ~missing


def _stripped(series: pl.Series) -> pl.Series:
    """Text without surrounding blanks, nothing as null."""
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype != pl.String:
        return series
    frame = series.str.strip_chars().to_frame("t")
    return frame.select(pl.when(pl.col("t") == "").then(None).otherwise(pl.col("t"))).to_series()


def _lookup(choices: Sequence[str], texts: Sequence[str]) -> dict[str, int]:
    """Which choice each text is: by spelling, else as a plain number (3 and 3.0 are one, 03 is not)."""
    exact = {choice: index for index, choice in enumerate(choices)}
    by_number: dict[str, list[int]] = {}
    for choice, index in exact.items():
        if (number := _plain_number(choice)) is not None:
            by_number.setdefault(number, []).append(index)
    result = {}
    for text in texts:
        same = by_number.get(_plain_number(text) or "", [])
        if text in exact:
            result[text] = exact[text]
        elif len(same) == 1:
            result[text] = same[0]
    return result


def _plain_number(text: str) -> str | None:
    """A decimal number's one spelling, or None."""
    if not (match := PLAIN_NUMBER.fullmatch(text)):
        return None
    sign, whole, fraction = match.groups()
    fraction = (fraction or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number


def _kept(columns: Sequence[_Cells]) -> Flags:
    """Rows that no `drop` rule leaves out."""
    keep = np.ones(len(columns[0].missing), dtype=np.bool_)
    for cells in columns:
        if cells.on_missing == "drop":
            keep &= ~cells.missing
    return keep


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """One kind of fault in one column: in how many rows that are kept, and where the first is."""

    cells: _Cells
    what: str
    count: int
    file: str
    place: str


def _faults_in(cells: _Cells, keep: Flags) -> list[Fault]:
    """The faults that there are in rows that are kept."""
    faults = cells.faults
    if cells.on_missing == "refuse":
        faults = (*faults, ("DATA_MISSING_VALUE", "no value", cells.missing))
    return [(code, what, wrong) for code, what, rows in faults if (wrong := rows & keep).any()]


class _Faults:
    """The faults of columns that come in parts: of each kind how many rows, and where the first is."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], _Found] = {}
        self._rows = 0

    def note(
        self, columns: Sequence[_Cells], keep: Flags, *, file: str, first_line: int | None, before: int = 0
    ) -> None:
        """Note the faults of one part in rows that are kept; the arguments are those of `Encoder.add`."""
        for index, cells in enumerate(columns):
            for code, what, rows in _faults_in(cells, keep):
                known = self._found.get((index, code))
                first = int(np.argmax(rows)) + before
                place = f"row {first + 1} (without header)" if first_line is None else f"line {first + first_line}"
                count = int(rows.sum()) + (known.count if known else 0)
                where = (known.file, known.place) if known else (file, place)
                self._found[index, code] = _Found(cells=cells, what=what, count=count, file=where[0], place=where[1])
        self._rows += len(keep)

    def refuse(self) -> None:
        """Raise the first column's first fault, if there is one."""
        for (_, code), found in sorted(self._found.items(), key=lambda item: item[0][0]):  # stable: a column's order
            raise _fault(code, found, self._rows)


def _fault(code: str, found: _Found, rows: int) -> InputError:
    return InputError(
        code,
        f"The column {found.cells.name} holds {found.what} in {found.count} of {counted(rows, 'row')}; "
        f"the first is {found.place}.",
        file=found.file,
        field=found.cells.name,
        rule=found.cells.rule,
        remedy="Correct these rows, or name the marker for a missing value in the source's `missing`.",
    )


def _features(data: Data, columns: Sequence[_Cells]) -> Floats:
    """All rows' features, float64 [n, d], the constant last; rows left out hold anything."""
    blocks = [_block(column, cells) for column, cells in zip(data.columns, columns, strict=True)]
    x = np.concatenate([*blocks, np.ones((len(blocks[0]), 1))], axis=1)
    return x * (float(data.feature_scale) / math.sqrt(x.shape[1]))


def _block(column: Column, cells: _Cells) -> Floats:
    """One column's features in [-1, 1], float64 [n, 1 or vocabulary size]."""
    if isinstance(column, NumberColumn):
        low, high = float(column.low), float(column.high)
        values = np.where(cells.missing, low if column.fill is None else float(column.fill), cells.values)
        return (2.0 * ((np.clip(values, low, high) - low) / (high - low)) - 1.0)[:, None]
    fill = -1.0 if column.fill is None else float(column.values.index(column.fill))
    chosen = np.where(cells.missing, fill, cells.values)
    return np.where(chosen[:, None] == np.arange(len(column.values)), 1.0, -1.0)
