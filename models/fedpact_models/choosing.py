"""The contracted rows out of a table that need not fit into memory: read in batches, as often as it takes.

The same rows in the same order, bit for bit, as `encode` and `select_rows` give on the whole table. Of each row about
110 bytes are kept (digests, its place in the keyed order), in a file where there are many; of the features nothing but
the chosen rows'.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fedpact_contract.contract import Data
from fedpact_contract.errors import InputError
from fedpact_models.features import (
    Encoder,
    Examples,
    Flags,
    Floats,
    Integers,
    Targets,
    entity_names,
    packed,
    target_type,
    too_few_rows,
)
from fedpact_models.scratch import Growing, Scratch
from fedpact_models.tables import Batch

ROWS_TYPE = b"fedpact.rows.v1:"
RECORD = np.dtype([("table", "S32"), ("row", "S32"), ("rank", "S32"), ("entity", "<i8"), ("state", "u1")])
"""Of each row of the table: the digest of its cells, that of its encoded bytes, where it stands in the keyed order,
whose it is, and what becomes of it."""
DROPPED, RELEASED, USABLE = 0, 1, 2
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that is read in batches, any number of times.

    `first_line` as in `features.encode`; `digests` are of the cells of each of a batch's rows, and `title` is what the
    fingerprint of them all begins with; `file` is what errors about the whole table call it.
    """

    batches: Callable[[], Iterator[Batch]]
    first_line: int | None
    digests: Callable[[pl.DataFrame], list[bytes]]
    title: bytes
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """At most so many rows of each entity, which the column tells apart."""

    column: str
    max_rows: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """The rows to train on, and what the table was.

    `num_rows` may be used; `copies` of the chosen are exact copies of another that is counted once; the fingerprints
    (hexadecimal) are of the table's sorted rows and of the sorted encoded ones.
    """

    examples: Examples
    num_rows: int
    copies: int
    table_fingerprint: str
    rows_fingerprint: str


def choose(
    table: Table,
    data: Data,
    *,
    n: int,
    key: bytes,
    cap: Cap | None = None,
    released: Examples | None = None,
    scratch: Scratch | None = None,
) -> Chosen:
    """Exactly n rows of the table, as `select_rows` chooses them among those that were not released.

    Of several equal rows, as many fewer are used as were released.

    Raises:
        InputError: as `encode` and `select_rows`; DATA_CHANGED, the table was another one when it was read again.
        FailedError: DATA_SCRATCH.
    """
    room = scratch or Scratch()
    whole = _Whole(table, data, cap, room)
    records = whole.look(key, released)
    table_fingerprint, _ = fingerprint(records["table"], table.title, room)
    encoded = _pick(records["row"], np.flatnonzero(records["state"] != DROPPED), room)
    rows_fingerprint, twice = fingerprint(encoded, ROWS_TYPE, room)
    usable = np.flatnonzero(records["state"] == USABLE)
    if twice:
        whole.rank_copies(records, usable, _occurrences(records, usable, room), key)
    order = usable[np.argsort(_pick(records["rank"], usable, room), kind="stable")]
    if cap is not None:
        order = order[_within(records["entity"][order], cap.max_rows)]
    if len(order) < n:
        raise too_few_rows(len(order), n, None if cap is None else cap.max_rows)
    chosen = order[:n]
    return Chosen(
        examples=whole.gather(records, chosen),
        num_rows=len(usable),
        copies=fingerprint(_pick(records["row"], chosen, room), ROWS_TYPE, room)[1] if twice else 0,
        table_fingerprint=table_fingerprint,
        rows_fingerprint=rows_fingerprint,
    )


@dataclass(slots=True)
class _Part:
    """Encoded rows of one batch: where it begins in the table, and which of its rows they are."""

    start: int
    keep: Flags
    examples: Examples


class _Whole:
    """The table, encoded batch by batch; kept in memory while it is small, else encoded again for each pass."""

    def __init__(self, table: Table, data: Data, cap: Cap | None, scratch: Scratch) -> None:
        self._table, self._data, self._scratch = table, data, scratch
        self._column = None if cap is None else cap.column
        self._kept: list[_Part] | None = []
        self._names = None
        if cap is not None:
            self._names = entity_names(cap.column, ((b.frame, b.file) for b in table.batches()))

    def look(self, key: bytes, released: Examples | None) -> NDArray[Any]:
        """The first pass: a record of every row. A row's rank is that of the first of its copies."""
        records = Growing(self._scratch, RECORD)
        gone = Counter() if released is None else Counter(map(_sha256, _split(released)))
        encoder = Encoder(self._data, entity=self._column, names=self._names)
        size = 0
        for part, frame in self._encoded(encoder):
            rows = _split(part.examples)
            digests = [_sha256(row) for row in rows]
            found = np.zeros(len(part.keep), RECORD)
            found["table"] = self._table.digests(frame)
            state = np.full(len(rows), USABLE, np.uint8)
            for index, digest in enumerate(digests) if gone else ():
                if gone[digest] > 0:
                    gone[digest] -= 1
                    state[index] = RELEASED
            for name, values in (
                ("row", digests),
                ("rank", [_rank(key, row, 0) for row in rows]),
                ("entity", 0 if part.examples.entity is None else part.examples.entity),
                ("state", state),
            ):
                column = found[name]
                column[part.keep] = values
            records.append(found)
            size += part.examples.x.nbytes
            if self._kept is not None:
                self._kept.append(part)
                if size > self._scratch.in_memory:
                    self._kept = None
        encoder.finish(self._table.file)
        return records.whole()

    def rank_copies(self, records: NDArray[Any], usable: Integers, copies: Integers, key: bytes) -> None:
        """Give every further copy of a row its own rank."""
        number = np.zeros(len(records), np.int64)
        number[usable] = copies
        for part in self._again(records):
            inside = np.flatnonzero(part.keep)
            rows = _split(part.examples)
            for index in np.flatnonzero(number[inside + part.start]).tolist():
                place = int(inside[index]) + part.start
                records["rank"][place] = _rank(key, rows[index], int(number[place]))

    def gather(self, records: NDArray[Any], chosen: Integers) -> Examples:
        """The chosen rows, in their order."""
        back = np.argsort(chosen, kind="stable")
        ordered = chosen[back]
        x: Floats | None = None
        y: Targets | None = None
        entity: Integers | None = None
        for part in self._again(records):
            low, high = np.searchsorted(ordered, (part.start, part.start + len(part.keep)))
            among = (np.cumsum(part.keep) - 1)[ordered[low:high] - part.start]
            found, target = part.examples.take(among), back[low:high]
            if x is None or y is None:
                x = self._scratch.array((len(chosen), found.x.shape[1]), np.float64)
                y = np.zeros(len(chosen), target_type(self._data.label))
                entity = None if found.entity is None else np.zeros(len(chosen), np.int64)
            digests = np.array([_sha256(row) for row in _split(found)], "S32")
            if (digests != records["row"][ordered[low:high]]).any():
                raise _changed(self._table.file)
            x[target], y[target] = found.x, found.y
            if entity is not None and found.entity is not None:
                entity[target] = found.entity
        assert x is not None  # noqa: S101 - a table without rows was refused
        assert y is not None  # noqa: S101 - the same
        return Examples(x=x, y=y, entity=entity)

    def _again(self, records: NDArray[Any]) -> Iterator[_Part]:
        """Another pass over the same rows.

        Raises:
            InputError: DATA_CHANGED, and whatever encoding finds in changed rows.
        """
        if self._kept is not None:
            yield from self._kept
            return
        encoder, seen = Encoder(self._data, entity=self._column, names=self._names), 0
        for part, _ in self._encoded(encoder):
            seen += len(part.keep)
            if seen > len(records) or ((records["state"][part.start : seen] != DROPPED) != part.keep).any():
                raise _changed(self._table.file)
            yield part
        if seen != len(records):
            raise _changed(self._table.file)

    def _encoded(self, encoder: Encoder) -> Iterator[tuple[_Part, pl.DataFrame]]:
        start = 0
        for batch in self._table.batches():
            examples, keep = encoder.add(
                batch.frame, file=batch.file, first_line=self._table.first_line, before=batch.before
            )
            yield _Part(start=start, keep=keep, examples=examples), batch.frame
            start += len(keep)


def _split(examples: Examples) -> list[memoryview]:
    """Each row's canonical bytes."""
    data, size = packed(examples)
    view = memoryview(data)
    return [view[start : start + size] for start in range(0, len(data), size)]


def _sha256(row: memoryview) -> bytes:
    return hashlib.sha256(row).digest()


def _rank(key: bytes, row: memoryview, number: int) -> bytes:
    """Where a copy of a row, by its number among equals, stands in the keyed order."""
    return hmac.digest(key, bytes(row) + number.to_bytes(8, "little"), "sha256")


def _pick(values: NDArray[Any], index: Integers, scratch: Scratch) -> NDArray[Any]:
    """The values at these places; a copy, in a file where it is large."""
    result = scratch.array((len(index),), values.dtype)
    for start in range(0, len(index), CHUNK):
        result[start : start + CHUNK] = values[index[start : start + CHUNK]]
    return result


def fingerprint(digests: NDArray[Any], title: bytes, scratch: Scratch) -> tuple[str, int]:
    """SHA-256 (hexadecimal) over the title and the sorted digests, and how many are copies of another counted once."""
    ordered = scratch.array(digests.shape, digests.dtype)
    ordered[:] = digests
    ordered.sort()
    whole, copies = hashlib.sha256(title), 0
    for start in range(0, len(ordered), CHUNK):
        whole.update(ordered[start : start + CHUNK].tobytes())
        some = ordered[start : start + CHUNK + 1]
        copies += int(np.count_nonzero(some[1:] == some[:-1]))
    return whole.hexdigest(), copies


def _occurrences(records: NDArray[Any], usable: Integers, scratch: Scratch) -> Integers:
    """Of each usable row, how many equal ones come before it: by entity, then in the table's order."""
    by_entity = np.argsort(records["entity"][usable], kind="stable")
    digests = _pick(records["row"], usable[by_entity], scratch)
    order = np.argsort(digests, kind="stable")
    result = np.zeros(len(usable), np.int64)
    result[by_entity[order]] = _places_among_equals(_pick(digests, order, scratch))
    return result


def _within(entities: Integers, most: int) -> Flags:
    """Which of the rows, in their order, are among the first so many of their entity."""
    order = np.argsort(entities, kind="stable")
    result = np.zeros(len(entities), np.bool_)
    result[order] = _places_among_equals(entities[order]) < most
    return result


def _places_among_equals(values: NDArray[Any]) -> Integers:
    """Of each of the sorted values, how many equal ones stand before it."""
    if not len(values):
        return np.zeros(0, np.int64)
    begins = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    lengths = np.diff(np.append(begins, len(values)))
    return np.arange(len(values)) - np.repeat(begins, lengths)


def _changed(file: str) -> InputError:
    return InputError(
        "DATA_CHANGED",
        "The source changed while it was read.",
        file=file,
        remedy="Nothing was trained. Let no program write to the source while the agent reads it.",
    )
