"""A participant's answers to a contract's statistical queries: exact sums over its rows, and the noise on them.

The rows are the contracted ones as training sees them: clipped to public bounds, missing values as the schema says.
One row adds to each query's sums a vector of norm at most 1, so that the noise is the contract's multiplier itself.
"""

import math

import numpy as np

from fedpact_contract.contract import Contract, NumberColumn, SurvivalLabel
from fedpact_contract.statistics import CountQuery, MeanQuery, Query, bounds_of, cell_count, values_of
from fedpact_models.dp import Noise
from fedpact_models.features import Examples, Floats, Integers

ROUNDING = 1e-9
"""Values are read back from features: one on an edge must not fall below it."""


def noised_sums(contract: Contract, examples: Examples, noise: Noise) -> Floats:
    """All queries' sums one after the other, float64 [cells], each with its noise."""
    assert contract.statistics is not None  # noqa: S101 - the caller was asked for it
    exact = np.concatenate([_sums(contract, examples, query) for query in contract.statistics.queries])
    return exact + float(contract.statistics.noise_multiplier) * noise.normal(len(exact))


def _sums(contract: Contract, examples: Examples, query: Query) -> Floats:
    if isinstance(query, MeanQuery):
        return np.array([_scaled(contract, examples, query.column).sum()])
    if isinstance(query, CountQuery):
        return np.array([float(_holds(contract, examples, query).sum())])
    cells = cell_count(contract, query)
    if query.bins is None:
        place = _choice(contract, examples, query.column)
    else:
        share = (_scaled(contract, examples, query.column) + 1) / 2
        place = np.minimum((share * cells + ROUNDING).astype(np.int64), cells - 1)
    return np.asarray(np.bincount(place, minlength=cells), dtype=np.float64)


def _holds(contract: Contract, examples: Examples, query: CountQuery) -> Floats:
    """1 for each row that is counted."""
    if query.value is not None:
        wanted = values_of(contract, query.column).index(query.value)
        return np.where(_choice(contract, examples, query.column) == wanted, 1.0, 0.0)
    assert query.at_least is not None  # noqa: S101 - the contract was checked
    low, high = (float(bound) for bound in bounds_of(contract, query.column))
    threshold = 2 * (float(query.at_least) - low) / (high - low) - 1
    return np.where(_scaled(contract, examples, query.column) >= threshold - ROUNDING, 1.0, 0.0)


def _scaled(contract: Contract, examples: Examples, column: str) -> Floats:
    """A number's values in [-1, 1], out of the features or the targets: rounding may leave them 1e-16 outside."""
    if column == contract.data.label.name:
        return np.clip(examples.y, -1.0, 1.0)
    return np.clip(_block(contract, examples, column)[:, 0], -1.0, 1.0)


def _choice(contract: Contract, examples: Examples, column: str) -> Integers:
    """Which value each row has; the first of the vocabulary where it has none."""
    if column in contract.data.label_columns:
        y = examples.y.astype(np.int64)
        if isinstance(contract.data.label, SurvivalLabel):
            return y // 2 if column == contract.data.label.name else y % 2
        return y
    return np.asarray(_block(contract, examples, column).argmax(axis=1))


def _block(contract: Contract, examples: Examples, column: str) -> Floats:
    """A column's features, unscaled: [n, 1 or vocabulary size]."""
    start = 0
    for found in contract.data.columns:
        width = 1 if isinstance(found, NumberColumn) else len(found.values)
        if found.name == column:
            scale = float(contract.data.feature_scale) / math.sqrt(examples.x.shape[1])
            return examples.x[:, start : start + width] / scale
        start += width
    raise AssertionError(column)
