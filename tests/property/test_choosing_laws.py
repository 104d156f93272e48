"""What is done batch by batch, held against the same on the whole table in memory: contracted rows, and counts."""

import contextlib
import datetime
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models_kit import a_schema, category, duplicate_count, number

from fedpact_contract.canonical import sha256, sha256_hex
from fedpact_contract.errors import FedpactError
from fedpact_models.choosing import ROWS_TYPE, Cap, Chosen, Table, choose
from fedpact_models.features import Examples, encode, row_bytes, select_rows
from fedpact_models.profile import ColumnCounts, Counting, Groups, Questions
from fedpact_models.scratch import Scratch
from fedpact_models.tables import Batch

SCHEMA = a_schema(
    number("a", 0, 3, "drop"),
    category("c", ["u", "1", "v"], "fill", fill="v"),
    label={"name": "y", "classes": ["0", "1"], "rule": "value"},
)
ROWS = st.lists(
    st.tuples(
        st.sampled_from([None, 0.0, -0.0, 1.0, 2.0, 9.0]) | st.floats(0, 3),
        st.sampled_from([None, "u", "1.0", "v"]),
        st.sampled_from("01"),
        st.sampled_from(["p", "q", "Q", "r7"]),
    ),
    min_size=1,
    max_size=30,
)
FAULTY = st.tuples(
    st.sampled_from([1.0, None, float("nan"), float("inf")]),
    st.sampled_from(["u", "other"]),
    st.sampled_from(["0", "7", None]),
    st.sampled_from(["p", None]),
)


def _frame(rows: list[tuple]) -> pl.DataFrame:
    kinds = {"a": pl.Float64, "c": pl.String, "y": pl.String, "who": pl.String}
    return pl.DataFrame(rows, schema=kinds, orient="row")


def _digests(frame: pl.DataFrame) -> list[bytes]:
    return [sha256(repr(row).encode()) for row in frame.rows()]


def _table(frame: pl.DataFrame, size: int) -> Table:
    def batches() -> Iterator[Batch]:
        for start in range(0, len(frame), size):
            yield Batch(file="t", before=start, frame=frame[start : start + size])

    return Table(batches=batches, first_line=2, digests=_digests, title=b"t:", file="t")


def _without(examples: Examples, released: Examples) -> Examples:
    gone = Counter(row_bytes(x, y) for x, y in zip(released.x, released.y, strict=True))
    kept = []
    for index, (x, y) in enumerate(zip(examples.x, examples.y, strict=True)):
        row = row_bytes(x, y)
        gone[row] -= 1
        if gone[row] < 0:
            kept.append(index)
    return examples.take(kept)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    folder = tmp_path_factory.mktemp("scratch")
    return Scratch([os.open(folder / str(number), os.O_RDWR | os.O_CREAT) for number in range(16)])


def _outcome(make: Callable[[], Any]) -> Any:
    """What is made, or the error as a dictionary."""
    try:
        return make()
    except FedpactError as err:
        return err.as_dict()


@given(ROWS, st.lists(st.integers(0, 40), max_size=8), st.binary(min_size=1, max_size=40), st.data())
def test_batches_give_the_rows_of_the_whole_table(scratch, rows, given_away, key: bytes, data: st.DataObject) -> None:
    frame = _frame(rows)
    size, in_memory = data.draw(st.sampled_from([1, 2, 7, 100])), data.draw(st.sampled_from([0, 200, 1 << 20]))
    max_rows = data.draw(st.sampled_from([None, 1, 2]))
    released = frame[sorted({i % len(frame) for i in given_away})]
    released = released.filter(pl.col("a").is_not_null())
    n = data.draw(st.integers(1, len(frame)))
    cap = None if max_rows is None else Cap(column="who", max_rows=max_rows)
    gone = encode(SCHEMA, released, file="r") if len(released) else None
    column = None if cap is None else "who"
    whole = _outcome(lambda: encode(SCHEMA, frame, file="t", first_line=2, entity=column))
    usable = whole if gone is None or isinstance(whole, dict) else _without(whole, gone)
    expected = whole if isinstance(whole, dict) else _outcome(lambda: select_rows(usable, n, key, max_rows))
    scratch.in_memory = in_memory
    table = _table(frame, size)
    found = _outcome(lambda: choose(table, SCHEMA, n=n, key=key, cap=cap, released=gone, scratch=scratch))
    if isinstance(expected, dict):
        assert found == expected
        return
    assert isinstance(found, Chosen), found
    assert found.examples.x.tobytes() == expected.x.tobytes()
    assert found.examples.y.tobytes() == expected.y.tobytes()
    assert found.examples.y.dtype == expected.y.dtype
    assert (found.examples.entity is None) == (expected.entity is None)
    if expected.entity is not None:
        np.testing.assert_array_equal(found.examples.entity, expected.entity)
    assert (found.num_rows, found.copies) == (len(usable), duplicate_count(expected))
    hashes = sorted(sha256(row_bytes(x, y)) for x, y in zip(whole.x, whole.y, strict=True))
    assert found.rows_fingerprint == sha256_hex(ROWS_TYPE + b"".join(hashes))
    assert found.table_fingerprint == sha256_hex(b"t:" + b"".join(sorted(_digests(frame))))


@given(st.lists(FAULTY, min_size=1, max_size=12), st.sampled_from([1, 2, 5, 100]), st.booleans())
def test_a_fault_is_told_as_of_the_whole_table(rows: list[tuple], size: int, entities: bool) -> None:
    """Column, rule, how many rows and where the first is do not depend on the batches."""
    frame = _frame(rows)
    whole = _outcome(lambda: encode(SCHEMA, frame, file="t", first_line=2, entity="who" if entities else None))
    if isinstance(whole, dict):
        cap = Cap(column="who", max_rows=1) if entities else None
        assert _outcome(lambda: choose(_table(frame, size), SCHEMA, n=1, key=b"k", cap=cap)) == whole


def test_every_file_comes_back(scratch: Scratch) -> None:
    scratch.in_memory = 0
    gc.collect()
    free = len(scratch._free)
    found = choose(
        _table(_frame([(1.0, "u", "0", "p"), (1.0, "u", "0", "q")]), 1), SCHEMA, n=2, key=b"k", scratch=scratch
    )
    assert len(scratch._free) == free - 1, "the chosen rows lie in one"
    del found
    assert len(scratch._free) == free
    assert all(os.fstat(file).st_size == 0 for file in scratch._free)


# Counts, for profile, gate and card

TODAY = datetime.date(2026, 11, 30)
KINDS = {"f": pl.Float64, "i": pl.Int64, "t": pl.String, "d": pl.Date, "b": pl.Boolean, "l": pl.List(pl.Int64)}
KINDS |= {"w": pl.String, "c": pl.Categorical}
WORDS = [None, "u", "1", "1.0", "-0", "nan", "inf", "2026-11-29", "2026-12-01T10:00", "2026-13-01"]
CELLS = st.tuples(
    st.sampled_from([None, 0.0, -0.0, 1.0, 1.5, float("nan"), float("inf")]) | st.floats(-3, 3),
    st.sampled_from([None, 0, 3]),
    st.sampled_from(WORDS),
    st.sampled_from([None, TODAY, TODAY - datetime.timedelta(days=9)]),
    st.sampled_from([None, True, False]),
    st.sampled_from([None, [], [1]]),
    st.sampled_from([None, "p", "q", "r"]),
    st.sampled_from([None, "1", "v"]),
)
BOUNDS = (Decimal("-0.5"), Decimal(1))
ASKED = Questions(
    today=TODAY,
    outside={k: (name, BOUNDS) for k, name in enumerate("fitdblc")},
    unknown={20 + k: (name, ("1", "u", "0.0")) for k, name in enumerate("fitdblc")},
    recent={40 + k: (name, 5) for k, name in enumerate("fitdblc")},
    bins={"f": BOUNDS, "i": None, "t": None, "c": None, "b": None},
)


def _whole_column(cells: pl.Series) -> ColumnCounts:
    """One column's counts, cell by cell."""
    opaque = cells.dtype == pl.List(pl.Int64)
    values = [v for v in cells.to_list() if v is not None]
    numbers: list[float] = []
    for value in [] if opaque or cells.dtype == pl.Date else values:
        with contextlib.suppress(ValueError):
            numbers.append(float(value))
    days = [v for v in values if _day(v) is not None]
    finite = [n for n in numbers if np.isfinite(n)]
    told = [v for v in values if v == v]
    return ColumnCounts(
        name=cells.name,
        missing=len(cells) - len(values),
        numbers=len(numbers),
        integers=sum(n.is_integer() for n in finite),
        not_finite=len(numbers) - len(finite),
        days=len(days),
        constant=not opaque and len(set(told)) <= 1,
    )


def _day(value: object) -> datetime.date | None:
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(value[:10]) if isinstance(value, str) and len(value) >= 10 else None
    except ValueError:
        return None


def _groups(keys: list[Any]) -> Groups:
    return Groups(dict(sorted(Counter(Counter(keys).values()).items())))


def _counted(frame: pl.DataFrame, label: str, size: int, scratch: Scratch) -> Counting:
    counted = Counting("fitdbl", label, "w", others=["c"], classes=True, asked=ASKED, scratch=scratch)
    for start in range(0, len(frame), size):
        counted.add(frame[start : start + size])
    return counted


@given(st.lists(CELLS, min_size=1, max_size=40), st.sampled_from([1, 2, 7, 100]), st.booleans(), st.sampled_from("tf"))
def test_batches_give_the_counts_of_the_whole_table(scratch, rows: list[tuple], size: int, files: bool, label: str):
    frame = pl.DataFrame(rows, schema=KINDS, orient="row")
    scratch.in_memory = 0 if files else 1 << 20
    counted, at_once = _counted(frame, label, size, scratch), _counted(frame, label, len(frame), Scratch())
    counts = counted.counts()
    assert counts == at_once.counts()
    assert counted.answers() == at_once.answers()
    assert counted.histograms() == at_once.histograms()
    assert counts.rows == len(frame)
    assert counts.columns == tuple(_whole_column(frame[name]) for name in "fitdblc")
    assert counts.duplicates == len(frame) - len(set(map(repr, _plain(frame.select([*"fitdbl"])))))
    assert counts.labels == _groups([repr(row) for row in _plain(frame.select(label).drop_nulls())])
    assert counts.entities == _groups(frame["w"].drop_nulls().to_list())
    outside = [n for n in frame["f"].drop_nulls() if np.isfinite(n) and not -0.5 <= n <= 1]
    assert counted.answers()[0] == len(outside)
    for key, name in enumerate("fitdblc", 40):
        days = [_day(value) for value in frame[name].to_list()]
        assert counted.answers()[key] == sum(
            d is None or not TODAY - datetime.timedelta(days=5) <= d <= TODAY for d in days
        )
    assert {name: sum(bins.values()) for name, bins in counted.histograms().items()} == dict.fromkeys(
        "fitcb", len(frame)
    )


def _plain(frame: pl.DataFrame) -> list[tuple]:
    """Rows in which equal cells are spelled alike: there is one zero."""
    return [tuple(0.0 if isinstance(v, float) and v == 0 else v for v in row) for row in frame.rows()]
