"""What can be counted of a table without saying any of its values: batch by batch, so that it need not fit into memory.

Counts are of cells as `tables` reads them: text without outer blanks, empty text and the source's markers as missing.
"""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fedpact_models.features import unknown_choices
from fedpact_models.scratch import Growing, Scratch

BINS = 20
"""Parts of a column's public bounds, for `Counting`'s histograms."""
TEXTS = 64
FEW_LABELS = 1000
"""A label with so many values or more is no class: its values are not counted one by one."""
MISSING, NOT_FINITE, TEXT = -100_000, -100_001, 200_000
HASH = np.dtype("S16")
CHUNK = 1 << 16

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


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows that have something in common: how many groups there are of each size, the smallest first."""

    sizes: Mapping[int, int] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """How many groups there are."""
        return sum(self.sizes.values())

    @property
    def rows(self) -> int:
        """How many rows they have together."""
        return sum(size * number for size, number in self.sizes.items())

    @property
    def smallest(self) -> int:
        """The rows of the smallest; 0 where there is none."""
        return min(self.sizes, default=0)

    @property
    def largest(self) -> int:
        """The rows of the largest; 0 where there is none."""
        return max(self.sizes, default=0)

    def each(self, most: int = FEW_LABELS) -> list[int]:
        """The rows of each group; none where there are so many groups or more."""
        return [size for size, n in self.sizes.items() for _ in range(n)] if self.number < most else []

    def capped(self, most: int) -> int:
        """How many rows are left where each group keeps so many at most."""
        return sum(min(size, most) * number for size, number in self.sizes.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A table's counts. `duplicates` are rows that are exact copies of another that is counted once.

    `labels` are the rows of each label, none where there are too many to be classes; `entities` the rows of each
    entity, none where no column tells.
    """

    rows: int
    columns: tuple[ColumnCounts, ...]
    duplicates: int
    labels: Groups
    entities: Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What else is counted, each by a key: finite numbers outside bounds, values outside a vocabulary, days before one.

    `recent`: the column, and how many days before `today` are recent; a day after `today` is not. `bins`: the columns
    of which the cells of each bin are counted, with their bounds if there are any.
    """

    today: date = date.min
    outside: Mapping[int, tuple[str, Bounds]] = field(default_factory=dict)
    unknown: Mapping[int, tuple[str, Sequence[str]]] = field(default_factory=dict)
    recent: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    bins: Mapping[str, Bounds | None] = field(default_factory=dict)


class Counting:
    """Counts of a table that comes in batches, in which all columns that are asked for are.

    Of each row 16 bytes are kept three times at most, by which equal rows, labels and entities are found; in files
    where they are many.

    Args:
        names: The columns of the card: copies are told by them.
        label: The one that is predicted.
        entity: The one that says whose a row is, if any: cells of one text are of one entity, as in contracts.
        others: More columns whose cells are counted.
        classes: Whether the label's values are counted however many there are.
        asked: What else is counted.
        scratch: Where rows' hashes lie.
    """

    def __init__(
        self,
        names: Sequence[str],
        label: str,
        entity: str | None,
        *,
        others: Sequence[str] = (),
        classes: bool = False,
        asked: Questions | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        room = scratch or Scratch()
        self._names, self._label, self._entity = list(names), label, entity
        self._every, self._classes, self.asked = (*names, *others), classes, asked or Questions()
        self._rows, self._labels, self._entities = _Equal(room), _Equal(room), _Equal(room)
        self._parts: list[pl.DataFrame] = []
        self._bins: dict[str, Counter[int]] = {}

    def add(self, frame: pl.DataFrame) -> None:
        """Count one batch.

        Raises:
            InputError, FailedError: DATA_SCRATCH.
        """
        schema = frame.schema
        asked = [pl.len().cast(pl.Int64).alias("rows")]
        for place, name in enumerate(self._every):
            asked += [e.cast(pl.Int64).alias(f"{place}:{what}") for what, e in _of(name, schema).items()]
            if not _opaque(schema[name]):
                asked += [pl.col(name).min().alias(f"{place}:low"), pl.col(name).max().alias(f"{place}:high")]
        asked += [e.sum().cast(pl.Int64).alias(f"?{key}") for key, e in _questions(self.asked, schema).items()]
        self._parts.append(frame.lazy().select(asked).collect())
        self._rows.add(frame.select(self._names))
        if not _opaque(schema[self._label]):
            self._labels.add(frame.select(self._label).drop_nulls())
        if self._entity is not None:
            whose = pl.col(self._entity)
            text = whose.cast(pl.String) if schema[self._entity].is_float() else whose
            self._entities.add(frame.select(text).drop_nulls())
        for name, bounds in self.asked.bins.items():
            if not _opaque(schema[name]):
                bins, sizes = np.unique(_bins(frame[name], bounds), return_counts=True)
                found = dict(zip(bins.tolist(), sizes.tolist(), strict=True))
                self._bins.setdefault(name, Counter()).update(found)

    def counts(self) -> Counts:
        """The counts of all batches, once all were added."""
        whole = pl.concat(self._parts)
        same = {
            place: (pl.col(f"{place}:low").min() == pl.col(f"{place}:high").max()).fill_null(value=True)
            for place in range(len(self._every))
            if f"{place}:low" in whole.columns
        }
        sums = pl.col("rows", "^[0-9]+:(missing|numbers|integers|not_finite|days)$").sum()
        found = whole.select(sums, *(e.alias(f"{place}:constant") for place, e in same.items())).row(0, named=True)
        labels = self._labels.groups()
        return Counts(
            rows=found["rows"],
            columns=tuple(
                ColumnCounts(
                    name=name,
                    **{what: found[f"{place}:{what}"] for what in _COUNTED},
                    constant=found.get(f"{place}:constant", False),
                )
                for place, name in enumerate(self._every)
            ),
            duplicates=found["rows"] - self._rows.groups().number,
            labels=labels if self._classes or labels.number < FEW_LABELS else Groups(),
            entities=self._entities.groups(),
        )

    def answers(self) -> dict[int, int]:
        """The cells that each question is about, by its key."""
        found = pl.concat(self._parts).select(pl.col(r"^\?[0-9]+$").sum())
        return {int(name[1:]): int(cells[0]) for name, cells in zip(found.columns, found.iter_columns(), strict=True)}

    def histograms(self) -> dict[str, dict[int, int]]:
        """Of each column that was asked for, how many cells lie in which bin.

        No bin depends on the data, and none tells a value. A number lies in one of `BINS` parts of the column's bounds,
        below or above them; without bounds, in a quarter of an octave. Text lies in one of `TEXTS` bins by its
        checksum.
        """
        return {name: dict(sorted(bins.items())) for name, bins in self._bins.items()}


class _Equal:
    """Which rows are equal to each other, told by 128 bits of hashes: of one process, and never kept."""

    def __init__(self, scratch: Scratch) -> None:
        self._hashes = Growing(scratch, HASH)

    def add(self, rows: pl.DataFrame) -> None:
        """Note rows; always the same columns."""
        if rows.height:
            pairs = np.stack([rows.hash_rows(seed).to_numpy() for seed in (1, 2)], axis=1)
            self._hashes.append(np.ascontiguousarray(pairs).view(HASH).reshape(-1))

    def groups(self) -> Groups:
        """How many equal rows there are of each; once."""
        ordered: NDArray[np.bytes_] = self._hashes.whole()
        ordered.sort()
        sizes: Counter[int] = Counter()
        begin = 0
        for start in range(1, len(ordered), CHUNK):
            some = ordered[start - 1 : start + CHUNK]
            begins = np.flatnonzero(some[1:] != some[:-1]) + start
            sizes.update(np.diff(begins, prepend=begin).tolist())
            begin = int(begins[-1]) if len(begins) else begin
        sizes[len(ordered) - begin] += 1
        return Groups(dict(sorted((size, number) for size, number in sizes.items() if size)))


def distance(before: Mapping[Bin, int], after: Mapping[Bin, int]) -> Decimal:
    """Total variation distance between two histograms, in [0, 1]: the share of cells that would have to move."""
    sizes = sum(before.values()), sum(after.values())
    moved = sum(abs(before.get(key, 0) * sizes[1] - after.get(key, 0) * sizes[0]) for key in {*before, *after})
    return Decimal(moved) / (2 * sizes[0] * sizes[1])


_COUNTED = ("missing", "numbers", "integers", "not_finite", "days")


def _of(name: str, schema: pl.Schema) -> dict[str, pl.Expr]:
    """What is counted of one column, by the names of `ColumnCounts`."""
    column, number = pl.col(name), _number(name, schema)
    finite = number.is_finite()
    return {
        "missing": column.null_count(),
        "numbers": number.is_not_null().sum(),
        "integers": (finite & (number == number.floor())).sum(),
        "not_finite": (~finite).sum(),
        "days": _day(name, schema).is_not_null().sum(),
    }


def _questions(asked: Questions, schema: pl.Schema) -> dict[int, pl.Expr]:
    """Of each question the cells that it is about, as booleans."""
    exprs = {key: _outside(column, schema, bounds) for key, (column, bounds) in asked.outside.items()}
    exprs |= {key: _unknown(column, schema, values) for key, (column, values) in asked.unknown.items()}
    for key, (column, days) in asked.recent.items():
        since = asked.today - timedelta(days=days)
        exprs[key] = ~_day(column, schema).is_between(since, asked.today).fill_null(value=False)
    return exprs


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
    return pl.repeat(None, pl.len(), dtype=pl.Date)


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


def _bins(cells: pl.Series, bounds: Bounds | None) -> NDArray[np.int32]:
    """The bin of each cell (`Counting.histograms`)."""
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
    return result.astype(np.int32)
