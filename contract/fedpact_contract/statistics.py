"""Federated statistics: the queries that a contract names, and what their noised answers say. A contracted message.

Each query asks for sums over a participant's contracted rows; one row changes them by a vector of norm at most 1, and
normal noise of the contract's `noise_multiplier` is added to each sum. So each query is one Gaussian release without
sampling, charged like training. Everything computed from the noised sums is free.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedpact_contract.errors import InputError
from fedpact_contract.record import Dec, Name, Part

if TYPE_CHECKING:
    from fedpact_contract.contract import CategoryColumn, Contract, NumberColumn

Bins = Annotated[int, Field(ge=2, le=1000)]
_SHOWN = 12  # names in a message


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
    """Each query asks something of a column that training reads, in the column's own terms.

    Raises:
        InputError: CONTRACT_STATISTICS, naming the query.
    """
    if contract.statistics is None:
        return
    if contract.statistics.noise_multiplier <= 0:
        raise _wrong("noise_multiplier", "The noise must be greater than 0.")
    for index, query in enumerate(contract.statistics.queries):
        problem = _problem(contract, query)
        if problem:
            raise _wrong(f"queries.{index}", f"The {query.kind} of {query.column}: {problem}.")


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


def values_of(contract: "Contract", column: str) -> tuple[str, ...]:
    """The vocabulary of a category, or the classes of the label."""
    if column == contract.data.label.name:
        return contract.data.label.classes
    found: CategoryColumn | NumberColumn = next(c for c in contract.data.columns if c.name == column)
    return () if found.kind == "number" else found.values


def bounds_of(contract: "Contract", column: str) -> tuple[Decimal, Decimal]:
    """The public bounds of a number.

    Raises:
        InputError: CONTRACT_STATISTICS, the column is none.
    """
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
        One entry a query: `kind`, `column`, `labels` (of the values), and `answers`: for each participant's id, and for
        "together" where there are several, `values` and `error`, the standard error of each value by the noise alone
        (None for quantiles).
    """
    assert contract.statistics is not None  # noqa: S101 - the caller's log holds answers to it
    noise = float(contract.statistics.noise_multiplier)
    rows = {party: contract.participant(party).num_examples for party in sums}
    found = []
    for index, query in enumerate(contract.statistics.queries):
        parts = {party: (answers[index], rows[party], noise) for party, answers in sorted(sums.items())}
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
    if isinstance(query, MeanQuery):
        low, high = (float(bound) for bound in bounds_of(contract, query.column))
        half = (high - low) / 2
        return {"values": [low + half * (1 + cells[0] / rows)], "error": half * noise / rows}
    if isinstance(query, QuantileQuery):
        return {"values": _quantiles(contract, query, cells), "error": None}
    return {"values": [float(cell) for cell in cells], "error": noise}


def _quantiles(contract: "Contract", query: QuantileQuery, cells: Sequence[float]) -> list[float]:
    """Read off the histogram, negative sums as 0, evenly within a part; the bounds' middle where all sums are 0."""
    low, high = (float(bound) for bound in bounds_of(contract, query.column))
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
    return [f"{a:.6g} to {b:.6g}" for a, b in pairwise(edges)]


def _problem(contract: "Contract", query: Query) -> str | None:
    """What is wrong with a query, or None."""
    kinds = {c.name: c.kind for c in contract.data.columns} | {contract.data.label.name: "category"}
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
            return "a number needs `at_least`, a category or the label `value`"
        values = values_of(contract, query.column)
        if query.value is not None and query.value not in values:
            return f"it has no such value; its values are {_some(values)}"
    if isinstance(query, QuantileQuery) and not all(0 < p < 1 for p in query.probabilities):
        return "`probabilities` lie between 0 and 1"
    return None


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return (", ".join(known[:_SHOWN]) or "none") + more


def _wrong(field: str, message: str) -> InputError:
    return InputError(
        "CONTRACT_STATISTICS",
        message,
        field=f"statistics.{field}",
        rule="a query asks of a column that training reads, in the column's own terms",
        remedy="Correct the query in the template; each kind is explained there (`fedpact contract template`).",
    )
