"""What can be counted of a table without saying any of its values: in one pass a question, so that it can stream.

Counts are of cells as `tables` reads them: text without outer blanks, empty text and the source's markers as missing.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from functools import partial
from typing import TypeVar

import numpy as np
import polars as pl

from fedpact_models.features import unknown_choices

BINS = 20
"""Parts of a column's public bounds, for `histograms`."""
TEXTS = 64
FEW_LABELS = 1000
"""A label with more values than these is no class: its values are not counted one by one."""
MISSING, NOT_FINITE, TEXT = -100_000, -100_001, 200_000

Bounds = tuple[Decimal, Decimal]
Bin = TypeVar("Bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnCounts:
    """Cells of one column, of as many as the table has rows.

    `numbers` are those that can be read as one, NaN and infinities among them (`not_finite`); `integers` those without
    a fraction; `days` those that begin with a day such as 2026-11-24, or are one. `constant`: there is at most one
    value.
    """

    name: str
    missing: int
    numbers: int
    integers: int
    not_finite: int
    days: int
    constant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A table's counts. `duplicates` are rows that are exact copies of another that is counted once.

    `labels` are the rows of each label, rarest first, none where there are too many to be classes; `entities` the rows
    of each entity, fewest first, none where no column tells.
    """

    rows: int
    columns: tuple[ColumnCounts, ...]
    duplicates: int
    labels: tuple[int, ...]
    entities: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What else is counted, each by a key: finite numbers outside bounds, values outside a vocabulary, days before one.

    `recent`: the column, and how many days before `today` are recent.
    """

    today: date
    outside: Mapping[int, tuple[str, Bounds]] = field(default_factory=dict)
    unknown: Mapping[int, tuple[str, Sequence[str]]] = field(default_factory=dict)
    recent: Mapping[int, tuple[str, int]] = field(default_factory=dict)


def count(
    table: pl.LazyFrame, names: Sequence[str], label: str, entity: str | None, *, others: Sequence[str], classes: bool
) -> Counts:
    """Count a table's rows and its columns, all of which are there.

    Args:
        table: The rows.
        names: The columns of the card: copies are told by them.
        label: The one that is predicted.
        entity: The one that says whose a row is, if any.
        others: More columns whose cells are counted.
        classes: Whether the label's values are counted however many there are.
    """
    schema, every = table.collect_schema(), (*names, *others)
    asked = [pl.len().alias("rows"), pl.struct(names).hash().n_unique().alias("different")]
    asked += [expr.alias(f"{place}:{what}") for place, n in enumerate(every) for what, expr in _of(n, schema).items()]
    if not _opaque(schema[label]):
        asked.append(pl.col(label).approx_n_unique().alias("labels"))
    found = table.select(asked).collect(engine="streaming").row(0, named=True)
    columns = tuple(
        ColumnCounts(name=n, **{what: found[f"{place}:{what}"] for what in _of(n, schema)})
        for place, n in enumerate(every)
    )
    few = classes or found.get("labels", FEW_LABELS) < FEW_LABELS
    return Counts(
        rows=found["rows"],
        columns=columns,
        duplicates=found["rows"] - found["different"],
        labels=_groups(table, label) if few else (),
        entities=() if entity is None else _groups(table, entity),
    )


def answers(table: pl.LazyFrame, asked: Questions) -> dict[int, int]:
    """The cells that each question is about, by its key. A day is recent if it is not after `today` either."""
    schema = table.collect_schema()
    exprs = {key: _outside(column, schema, bounds) for key, (column, bounds) in asked.outside.items()}
    exprs |= {key: _unknown(column, schema, values) for key, (column, values) in asked.unknown.items()}
    for key, (column, days) in asked.recent.items():
        since = asked.today - timedelta(days=days)
        exprs[key] = ~_day(column, schema).is_between(since, asked.today).fill_null(value=False)
    if not exprs:
        return {}
    counted = table.select(expr.sum().alias(str(key)) for key, expr in exprs.items())
    return {int(key): int(value) for key, value in counted.collect(engine="streaming").row(0, named=True).items()}


def histograms(table: pl.LazyFrame, names: Sequence[str], bounds: Mapping[str, Bounds]) -> dict[str, dict[int, int]]:
    """Of each column, how many cells lie in which bin. No bin depends on the data, and none tells a value.

    A number lies in one of `BINS` parts of the column's bounds, below or above them; without bounds, in a quarter of
    an octave. Text lies in one of `TEXTS` bins by its checksum.
    """
    schema = table.collect_schema()
    result = {}
    for name in names:
        if _opaque(schema[name]):
            continue
        place = partial(_bins, bounds=bounds.get(name))
        bins = pl.col(name).map_batches(place, return_dtype=pl.Int32, is_elementwise=True)
        found = table.select(bins.alias("bin")).group_by("bin").len().collect(engine="streaming")
        result[name] = {int(key): int(size) for key, size in sorted(found.rows())}
    return result


def distance(before: Mapping[Bin, int], after: Mapping[Bin, int]) -> Decimal:
    """Total variation distance between two histograms, in [0, 1]: the share of cells that would have to move."""
    sizes = sum(before.values()), sum(after.values())
    moved = sum(abs(before.get(key, 0) * sizes[1] - after.get(key, 0) * sizes[0]) for key in {*before, *after})
    return Decimal(moved) / (2 * sizes[0] * sizes[1])


def _of(name: str, schema: pl.Schema) -> dict[str, pl.Expr]:
    """What is counted of one column, by the names of `ColumnCounts`."""
    column, number = pl.col(name), _number(name, schema)
    opaque = _opaque(schema[name])
    finite = number.is_finite()
    return {
        "missing": column.null_count(),
        "numbers": number.is_not_null().sum(),
        "integers": (finite & (number == number.floor())).sum(),
        "not_finite": (~finite).sum(),
        "days": _day(name, schema).is_not_null().sum(),
        "constant": pl.lit(value=False) if opaque else (column.min() == column.max()).fill_null(value=True),
    }


def _opaque(dtype: pl.DataType) -> bool:
    """Whether cells hold neither text nor numbers nor days: no contract can use them."""
    return dtype.is_nested() or dtype in (pl.Binary, pl.Object, pl.Duration)


def _number(name: str, schema: pl.Schema) -> pl.Expr:
    """The column's cells as float64, null where they are no number."""
    dtype = schema[name]
    if _opaque(dtype) or dtype.is_temporal():
        return pl.lit(None, pl.Float64)
    column = pl.col(name)
    return (column.cast(pl.String) if dtype in (pl.Categorical, pl.Enum) else column).cast(pl.Float64, strict=False)


def _day(name: str, schema: pl.Schema) -> pl.Expr:
    """The column's cells as days, null where they are none."""
    dtype = schema[name]
    if dtype in (pl.Date, pl.Datetime):
        return pl.col(name).cast(pl.Date)
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return pl.col(name).cast(pl.String).str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)
    return pl.lit(None, pl.Date)


def _outside(name: str, schema: pl.Schema, bounds: Bounds) -> pl.Expr:
    number = _number(name, schema)
    low, high = map(float, bounds)
    return (number.is_finite() & ~number.is_between(low, high)).fill_null(value=False)


def _unknown(name: str, schema: pl.Schema, values: Sequence[str]) -> pl.Expr:
    if _opaque(schema[name]):
        return pl.col(name).is_not_null()
    return pl.col(name).map_batches(
        lambda cells: unknown_choices(cells, values), return_dtype=pl.Boolean, is_elementwise=True
    )


def _groups(table: pl.LazyFrame, name: str) -> tuple[int, ...]:
    """The number of rows of each value of a column, fewest first; rows without a value are not counted."""
    groups = table.select(pl.col(name).alias("key")).drop_nulls().group_by("key").len().select("len")
    return tuple(sorted(groups.collect(engine="streaming")["len"].to_list()))


def _bins(cells: pl.Series, bounds: Bounds | None) -> pl.Series:
    """The bin of each cell (`histograms`), int32."""
    text = cells.cast(pl.String)
    numbers = (text if cells.dtype in (pl.Categorical, pl.Enum) or cells.dtype.is_temporal() else cells).cast(
        pl.Float64, strict=False
    )
    values = numbers.fill_null(np.nan).to_numpy()
    with np.errstate(all="ignore"):  # what is not finite gets a bin of its own
        if bounds is None:
            place = np.sign(values) * (np.floor(4 * np.log2(np.abs(values))) + 5000)  # above 0 for every double
        else:
            low, high = map(float, bounds)
            place = np.floor((values - low) / (high - low) * BINS)
            place = np.where(values == high, BINS - 1, np.clip(place, -1, BINS))
    place = np.where(values == 0, 0 if bounds is None else place, place)
    finite = np.isfinite(values)
    result = np.where(finite, place, NOT_FINITE)
    known = {t: TEXT + zlib.crc32(t.encode()) % TEXTS for t in text.filter(numbers.is_null()).drop_nulls().unique()}
    if known:
        hashed = text.replace_strict(list(known), list(known.values()), default=0, return_dtype=pl.Int64)
        result = np.where(numbers.is_null().to_numpy(), hashed.fill_null(0).to_numpy(), result)
    result = np.where(text.is_null().to_numpy(), MISSING, result)
    return pl.Series(cells.name, result.astype(np.int32))
