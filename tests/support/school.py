"""The ILEA schools as a federation in one process: each school steps with the agent's own trainer and noise. No tests.

Liu et al. 2022, "On privacy and personalization in cross-silo federated learning" (arXiv:2206.07902), its published
settings: linear regression, 200 rounds of one epoch, batches of 32, learning rate .01, clipping at 1, and the loss of
its code, half the squared error. Functions here are called in worker processes, so they stand in a module of their own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from tests.support.models_kit import a_schema, number

from fedpact_contract.privacy import solve_noise_multiplier
from fedpact_models.aggregation import apply, weighted_steps
from fedpact_models.dp import Pull, SystemNoise, dp_sgd, squared_error
from fedpact_models.features import Floats, encode_features
from fedpact_models.weights import flatten, load_flat

EPSILON, DELTA = Decimal(6), Decimal("0.001")
ROUNDS, BATCH, LEARNING_RATE, MAX_GRAD_NORM = 200, 32, 0.01, 1.0
STRENGTH = 1.0
"""lambda of MR-MTL."""

HIGHEST_RATE = Decimal("0.999")
"""Stands for 1 at the 15 schools with 32 rows and fewer: the trainer refuses a rate of 1."""

PERCENTAGES = {3, 4}
"""Of 28 features: free meals and the best verbal reasoning band, in % of the school. 27 is constant; the rest are 0, 1.

Their public bounds are 0..100 and 0..1: declared, not measured.
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class School:
    """Features [n, d] and marks [n], divided by their public range; for training and for the test."""

    x: Floats
    y: Floats
    test_x: Floats
    test_y: Floats


def plan(n: int) -> tuple[Decimal, int]:
    """Sample rate and steps a round of a school with n rows: one epoch of batches of 32 in the mean."""
    batch = min(BATCH, n)
    return min((Decimal(batch) / n).quantize(Decimal("1e-6"), ROUND_CEILING), HIGHEST_RATE), n // batch


def noise_for(rate_and_steps: tuple[Decimal, int]) -> Decimal:
    """The noise multiplier that keeps all rounds of such a plan within epsilon."""
    rate, steps = rate_and_steps
    return solve_noise_multiplier(EPSILON, DELTA, rate, ROUNDS * steps)


def schools(folder: Path, seed: int, scaling: str) -> list[School]:
    """All 139, a fifth of each for the test. `scaling`: public (declared bounds) or private (the paper's)."""
    from scipy.io import loadmat
    from sklearn.model_selection import train_test_split

    source = loadmat(folder / "school.mat")
    scaled = {"public": _by_public_bounds, "private": _by_private_statistics}[scaling]
    result = []
    for x, y in zip(source["X"][0], source["Y"][0], strict=True):
        train, test, marks, test_marks = train_test_split(x, y[:, 0], test_size=0.2, random_state=seed)
        a, b = scaled(train, test)
        result.append(School(x=a, y=(marks - 1) / 69, test_x=b, test_y=(test_marks - 1) / 69))
    return result


def _by_public_bounds(*tables: Floats) -> list[Floats]:
    """The product's own encoding, with a scale at which each feature, the constant too, lies in [-1, 1]."""
    features = tables[0].shape[1] - 1
    columns = [number(f"f{i}", 0, 100 if i in PERCENTAGES else 1) for i in range(features)]
    data = a_schema(*columns, feature_scale=str(round((features + 1) ** 0.5, 6)))
    return [encode_features(data, pl.DataFrame(t[:, :-1], [c["name"] for c in columns]), file="")[0] for t in tables]


def _by_private_statistics(train: Floats, *tables: Floats) -> list[Floats]:
    """As the paper does: each school by its own mean and deviation, which no contract covers."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1
    return [np.column_stack([(t - mean) / deviation, np.ones(len(t))]) for t in (train, *tables)]


def federate(
    folder: Path, seed: int, scaling: str, method: str, noise: dict[tuple[Decimal, int], Decimal]
) -> tuple[float, float]:
    """(mean squared error over all schools' test rows, that of each school's own mean mark) of a whole run.

    `method`: FedAvg, one model for all; or MR-MTL, each school's own, pulled towards the mean model.
    """
    torch.set_num_threads(1)
    parts = schools(folder, seed, scaling)
    counts = {f"{k:03}": len(school.y) for k, school in enumerate(parts)}
    model = np.zeros(parts[0].x.shape[1])
    own = [model] * len(parts)
    for _ in range(ROUNDS):
        starts = [model] * len(parts) if method == "FedAvg" else own
        anchor = None if method == "FedAvg" else model
        updates = [_update(s, start, anchor, noise) for s, start in zip(parts, starts, strict=True)]
        own = [start + update for start, update in zip(starts, updates, strict=True)]
        model = apply(model, weighted_steps(dict(zip(counts, updates, strict=True)), counts, Decimal(1)).values())
    final = [model] * len(parts) if method == "FedAvg" else own
    return _error(parts, [s.test_x @ w for s, w in zip(parts, final, strict=True)]), _error(
        parts, [np.full(len(s.test_y), s.y.mean()) for s in parts]
    )


def _update(
    school: School, start: Floats, anchor: Floats | None, noise: dict[tuple[Decimal, int], Decimal]
) -> NDArray[np.float32]:
    """A school's update, as the agent makes it."""
    module = _module(len(start))
    load_flat(module, start)
    rate, steps = plan(len(school.y))
    dp_sgd(
        module,
        torch.from_numpy(school.x),
        torch.from_numpy(school.y),
        steps=steps,
        sample_rate=float(rate),
        noise_multiplier=float(noise[rate, steps]),
        max_grad_norm=MAX_GRAD_NORM,
        denominator=float(rate) * len(school.y),
        learning_rate=LEARNING_RATE,
        noise=SystemNoise(),
        physical_batch=1024,
        loss=squared_error,
        pull=None if anchor is None else Pull(strength=STRENGTH, anchor=anchor),
    )
    return (flatten(module) - start).astype(np.float32)


@functools.cache
def _module(features: int) -> torch.nn.Module:
    return torch.nn.Linear(features, 1, bias=False, dtype=torch.float64)


def _error(parts: Sequence[School], predicted: Sequence[Floats]) -> float:
    return float(np.mean(np.concatenate([p - s.test_y for p, s in zip(predicted, parts, strict=True)]) ** 2))
