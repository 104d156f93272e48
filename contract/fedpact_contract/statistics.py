"""Federated statistics: the queries that a contract names, and what their noised answers say. A contracted message.

Each query asks for sums over a participant's contracted rows; one row changes them by a vector of norm at most 1, and
normal noise of the contract's `noise_multiplier` is added to each sum. So each query is one Gaussian release without
sampling, charged like training. Everything computed from the noised sums is free.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedpact_contract.errors import InputError
from fedpact_contract.record import Dec, Name, Part

if TYPE_CHECKING:
    from fedpact_contract.contract import CategoryColumn, Contract, NumberColumn

Bins = Annotated[int, Field(ge=2, le=1000)]
_SHOWN = 12  # names in a message

FLOAT_BITS, UNLIKELY_BITS = 24, 16

DEVIATIONS = NormalDist().inv_cdf(0.975)
"""So many standard deviations to both sides hold 95 % of the noise."""


class MeanQuery(Part):
    """The mean of a number, its values clipped to the column's public bounds: one sum, of values scaled to [-1, 1]."""

    kind: Literal["mean"]
    column: Name


class HistogramQuery(Part):
    """How many rows have each value of a category or class, or lie in each of `bins` parts of a number's bounds."""

    kind: Literal["histogram"]
    column: Name
    bins: Bins | None = None


class CountQuery(Part):
    """How many rows have this `value` of a category or class, or a number of at least `at_least`."""

    kind: Literal["count"]
    column: Name
    value: Name | None = None
    at_least: Dec | None = None


class QuantileQuery(Part):
    """The values below which these `probabilities` of the rows lie: read off a histogram of `bins` parts."""

    kind: Literal["quantile"]
    column: Name
    bins: Bins
    probabilities: Annotated[tuple[Dec, ...], Field(min_length=1, max_length=99)]


Query = Annotated[MeanQuery | HistogramQuery | CountQuery | QuantileQuery, Field(discriminator="kind")]


class Statistics(Part):
    """What each participant releases once, before or beside training: the answers to these queries.

    `noise_multiplier` is the standard deviation of the noise on each sum, in rows: the same for all queries.
    """

    noise_multiplier: Dec
    queries: Annotated[tuple[Query, ...], Field(min_length=1, max_length=100)]


def check_statistics(contract: "Contract") -> None:
    """Each query asks something of a column that training reads, in the column's own terms, by sums of its own.

    Raises:
        InputError: CONTRACT_STATISTICS, naming the query.
    """
    if contract.statistics is None:
        return
    if contract.statistics.noise_multiplier <= 0:
        raise _wrong("noise_multiplier", "The noise must be greater than 0.")
    places: dict[object, int] = {}
    for index, query in enumerate(contract.statistics.queries):
        problem = _problem(contract, query)
        if problem:
            raise _wrong(f"queries.{index}", f"The {query.kind} of {query.column}: {problem}.")
        first = places.setdefault(_asked(query), index)
        if first < index:
            raise _wrong(
                f"queries.{index}",
                f"The {query.kind} of {query.column} is asked twice, by the sums of queries.{first} too, and would "
                "cost twice.",
                remedy="Leave one of them out, and ask one quantile for all `probabilities`; a quantile's sums are the "
                "histogram. For a sharper answer take a smaller noise_multiplier.",
                rule="each query has sums of its own",
            )


def cell_count(contract: "Contract", query: Query) -> int:
    """How many sums answer a query."""
    if isinstance(query, MeanQuery | CountQuery):
        return 1
    if query.bins is not None:
        return query.bins
    return len(values_of(contract, query.column))


def total_cells(contract: "Contract") -> int:
    """How many sums answer all of a contract's queries; 0 where it asks none."""
    return 0 if contract.statistics is None else sum(cell_count(contract, q) for q in contract.statistics.queries)


def can_be_noised(contract: "Contract", sums: Sequence[float]) -> bool:
    """Whether the sums that count rows can hold noise, which makes no whole numbers; True where they cannot tell.

    Of a number of 24 bits those below the unit are even chances: a noised sum that is at least 2^k is whole once in
    2^(23 - k). All of them together are, in honest sums, less often than once in 2^UNLIKELY_BITS where this is False.
    """
    assert contract.statistics is not None  # noqa: S101 - the caller has its sums
    place, bits = 0, 0
    for query in contract.statistics.queries:
        found = sums[place : (place := place + cell_count(contract, query))]
        if isinstance(query, MeanQuery):
            continue
        if not all(float(value).is_integer() for value in found):
            return True
        bits += sum(max(0, FLOAT_BITS - max(0, math.frexp(value)[1])) for value in found)
    return bits < UNLIKELY_BITS


def values_of(contract: "Contract", column: str) -> tuple[str, ...]:
    """The vocabulary of a category, the classes of the label, or the intervals and outcomes that training sees."""
    label = contract.data.label
    if label.rule == "survival" and column in contract.data.label_columns:
        return label.outcomes if column == label.event else label.intervals
    if column == label.name:
        return label.classes if label.rule in ("value", "above") else ()
    found: CategoryColumn | NumberColumn = next(c for c in contract.data.columns if c.name == column)
    return () if found.kind == "number" else found.values


def bounds_of(contract: "Contract", column: str) -> tuple[Decimal, Decimal]:
    """The public bounds of a number.

    Raises:
        InputError: CONTRACT_STATISTICS, the column is none.
    """
    label = contract.data.label
    if column == label.name and label.rule == "number":
        return label.low, label.high
    for found in contract.data.columns:
        if found.name == column and found.kind == "number":
            return found.low, found.high
    raise _wrong("queries", f"{column} is no number.")


def results(contract: "Contract", sums: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """What the noised sums say: for each query the answer of each participant and of all together.

    Args:
        contract: With a `statistics` clause.
        sums: Participant id -> for each query its noised sums.

    Returns:
        One entry a query: `kind`, `column`, `labels` (of the values), and `answers`: for each participant's id, in the
        contract's order, and for "together" where there are several, `values`, `error`, the standard deviation that the
        noise gives each value (None for quantiles), and `low` and `high`, the ends of its 95 % interval: where the
        answer without noise lies. Of the noise alone, each value by itself; nothing is said of other rows than these.
    """
    assert contract.statistics is not None  # noqa: S101 - the caller's log holds answers to it
    noise = float(contract.statistics.noise_multiplier)
    rows = {party.id: party.num_examples for party in contract.participants if party.id in sums}
    found = []
    for index, query in enumerate(contract.statistics.queries):
        parts = {party: (sums[party][index], rows[party], noise) for party in rows}
        if len(parts) > 1:
            cells = [sum(cell) for cell in zip(*(answer for answer, _, _ in parts.values()), strict=True)]
            parts["together"] = (cells, sum(rows.values()), noise * len(sums) ** 0.5)
        answers = {party: _answer(contract, query, *part) for party, part in parts.items()}
        found.append(
            {"kind": query.kind, "column": query.column, "labels": _labels(contract, query), "answers": answers}
        )
    return found


def _answer(
    contract: "Contract", query: Query, cells: Sequence[float], rows: int, noise: float
) -> dict[str, list[float] | float | None]:
    if isinstance(query, QuantileQuery):
        return _quantiles(contract, query, cells, rows, noise)
    values, error = [float(cell) for cell in cells], noise
    if isinstance(query, MeanQuery):
        low, high = (float(bound) for bound in bounds_of(contract, query.column))
        half = (high - low) / 2
        values, error = [low + half * (1 + cells[0] / rows)], half * noise / rows
    reach = DEVIATIONS * error
    return {
        "values": values,
        "error": error,
        "low": [value - reach for value in values],
        "high": [value + reach for value in values],
    }


def _quantiles(
    contract: "Contract", query: QuantileQuery, cells: Sequence[float], rows: int, noise: float
) -> dict[str, list[float] | float | None]:
    """The values, and from which edge of the histogram to which the quantiles of the rows lie."""
    low, high = (float(bound) for bound in bounds_of(contract, query.column))
    width = (high - low) / query.bins
    values = _read_off(query, cells, low, high)
    spans = [_span(cells, float(p), rows, noise) for p in query.probabilities]
    return {
        "values": values,
        "error": None,
        "low": [min(v, low + width * first) for v, (first, _) in zip(values, spans, strict=True)],
        "high": [max(v, low + width * last) for v, (_, last) in zip(values, spans, strict=True)],
    }


def _span(cells: Sequence[float], probability: float, rows: int, noise: float) -> tuple[int, int]:
    """The numbers of the edges between which a quantile lies, at 95 %.

    How many rows lie below edge k of K is known from the noised sums below it and, the number of rows being public,
    from those above it; the best of both has the variance noise^2 k (K - k) / K. Edges are tried from below while
    they surely have too few rows below them, and from above while they surely have enough: each end is wrong only
    where the one edge next to the quantile is misjudged, which is 2.5 %, however many edges are tried.
    """
    count, total, below = len(cells), sum(cells), 0.0
    least, most = [0.0], [0.0]
    for k, cell in enumerate(cells, start=1):
        below += cell
        middle = below + (rows - total) * k / count
        reach = DEVIATIONS * noise * (k * (count - k) / count) ** 0.5
        least.append(middle - reach)
        most.append(middle + reach)
    wanted = probability * rows
    first = next(k for k in range(1, count + 1) if k == count or most[k] >= wanted) - 1
    last = next(k for k in range(count - 1, -1, -1) if k == 0 or least[k] < wanted) + 1
    return first, max(last, first + 1)


def _read_off(query: QuantileQuery, cells: Sequence[float], low: float, high: float) -> list[float]:
    """Quantiles by the histogram, negative sums as 0, evenly within a part; the middle where all sums are 0."""
    width = (high - low) / query.bins
    counts = [max(0.0, float(cell)) for cell in cells]
    total, answers = sum(counts), []
    for probability in query.probabilities:
        wanted, below, value = float(probability) * total, 0.0, high
        for place, count in enumerate(counts):
            if count and below + count >= wanted:
                value = low + width * (place + (wanted - below) / count)
                break
            below += count
        answers.append(value if total else (low + high) / 2)
    return answers


def _labels(contract: "Contract", query: Query) -> list[str]:
    if isinstance(query, QuantileQuery):
        return [format(p, "f") for p in query.probabilities]
    if isinstance(query, MeanQuery):
        return ["mean"]
    if isinstance(query, CountQuery):
        return [query.value if query.value is not None else f">= {query.at_least:f}"]
    if query.bins is None:
        return list(values_of(contract, query.column))
    low, high = bounds_of(contract, query.column)
    edges = [low + (high - low) * place / query.bins for place in range(query.bins + 1)]
    return [f"{a:.6g} – {b:.6g}" for a, b in pairwise(edges)]


def _asked(query: Query) -> tuple[object, ...]:
    """What a query's sums are over: queries with the same are one release, charged twice."""
    if isinstance(query, MeanQuery):
        return query.column, "mean"
    if isinstance(query, CountQuery):
        return query.column, query.value, query.at_least
    return query.column, query.bins


def _problem(contract: "Contract", query: Query) -> str | None:
    """What is wrong with a query, or None."""
    label = contract.data.label
    kinds = {c.name: c.kind for c in contract.data.columns}
    kinds |= dict.fromkeys(contract.data.label_columns, "number" if label.rule == "number" else "category")
    kind = kinds.get(query.column)
    if kind is None:
        return f"the contract reads no such column; it reads {_some(kinds)}"
    number = kind == "number"
    if isinstance(query, MeanQuery | QuantileQuery) and not number:
        return f"it is no number; the contract's numbers are {_some(n for n, k in kinds.items() if k == 'number')}"
    if isinstance(query, HistogramQuery) and (query.bins is not None) != number:
        return "`bins` goes with a number, and only with it"
    if isinstance(query, CountQuery):
        if (query.at_least is not None) != number or (query.value is None) != number:
            return "a number needs `at_least`, a category or class `value`"
        values = values_of(contract, query.column)
        if query.value is not None and query.value not in values:
            return f"it has no such value; its values are {_some(values)}"
        if query.at_least is not None:
            low, high = bounds_of(contract, query.column)
            if not low < query.at_least <= high:
                return f"all rows or none are counted; `at_least` lies above {low:f} and up to {high:f}, its bounds"
    if isinstance(query, QuantileQuery) and not all(0 < p < 1 for p in query.probabilities):
        return "`probabilities` lie between 0 and 1"
    return None


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return (", ".join(known[:_SHOWN]) or "none") + more


def _wrong(
    field: str,
    message: str,
    remedy: str = "Correct the query in the template; each kind is explained there (`fedpact contract template`).",
    rule: str = "a query asks of a column that training reads, in the column's own terms",
) -> InputError:
    return InputError(
        "CONTRACT_STATISTICS",
        message,
        field=f"statistics.{field}",
        rule=rule,
        remedy=remedy,
    )
