"""A contract tried out on made-up rows: how long one private step takes here, and what like data would be worth.

No data of anybody is read. Rows are made up to the contract's schema: each class has a place of its own in the public
range, and rows lie around it; a number or a duration goes with one direction in that range. Training is the contract's
own (`local_update`), with its noise, numbers of rows and rounds, and so is the server's step (`server_steps`), clip and
optimizer included. A round's values are those of one antithetic pair of orders, which is exact where participants
interact in pairs alone, as they nearly do in the fixed-weight game (docs/adr/0004). In the re-normalised game they do
not, and eight pairs are taken.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil, sqrt
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import ClassLabel, Contract
from fedpact_contract.contribution import validation_rows
from fedpact_contract.shape import feature_count
from fedpact_models.aggregation import START, aggregator, next_model, server_steps
from fedpact_models.dp import Noise
from fedpact_models.evaluate import logits
from fedpact_models.features import Examples, Floats, Targets
from fedpact_models.registry import initial_weights
from fedpact_models.tasks import task_of
from fedpact_models.training import local_update

MAX_ELEMENTS = 2**26
"""Numbers (float64) in all made-up rows together: 512 MiB. Beyond it nothing is simulated."""
STEP_SECONDS, STEP_REPEATS = 1.0, 10
"""A step is timed again until so much time or so many repeats are used."""
MAX_VALIDATION = 1000
SPREAD = 0.7
"""How far rows lie from their class's place, in parts of the public range: classes overlap, as they mostly do."""

RENORMALISED_PAIRS = 8
"""Pairs of orders that values of the re-normalised game are estimated from, each round."""

UNIT = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One simulated run: every participant's value, the fall of the loss and its squared standard error.

    Values are by id, in 1e-9 nat, the last in their square.
    """

    values: Mapping[str, Fraction]
    total: Fraction
    variance: Fraction


def seconds_a_step(contract: Contract, participant: str, noise: Noise) -> float:
    """Seconds of one local step of this participant's on made-up rows: the median of a few, after one unmeasured.

    Where the rows would take too much memory, fewer are taken, and the time is scaled up by their number.
    """
    factor = max(1, ceil(contract.participant(participant).num_examples * feature_count(contract.data) / MAX_ELEMENTS))
    small = _of_one_step(contract, factor)
    rng = np.random.default_rng()
    rows = _World(small, rng).rows(small.participant(participant).num_examples)
    base = initial_weights(small.model, small.data, rng)
    local_update(small, base, rows, noise)
    taken: list[float] = []
    while not taken or (sum(taken) < STEP_SECONDS and len(taken) < STEP_REPEATS):
        began = time.perf_counter()
        local_update(small, base, rows, noise)
        taken.append(time.perf_counter() - began)
    return median(taken) * factor


def too_large(contract: Contract) -> bool:
    """Whether all participants' rows together are more than is made up here."""
    return sum(p.num_examples for p in contract.participants) * feature_count(contract.data) > MAX_ELEMENTS


def simulated_run(
    contract: Contract,
    participant: str,
    label_noise: float,
    *,
    noise: Noise,
    rng: np.random.Generator,
    in_time: Callable[[], bool],
) -> Draw | None:
    """One run of the contract in which everybody has like data, and the participant part of its labels wrong.

    Args:
        contract: The contract; its participants add the noise themselves.
        participant: Whose labels are changed.
        label_noise: The part of them that is replaced by another class, or by a number of no meaning.
        noise: Where batches and privacy noise come from.
        rng: Where rows and orders come from.
        in_time: Whether to go on; asked before each round.

    Returns:
        The values, or None where time was up.
    """
    world, counts = _World(contract, rng), {i: p.num_examples for i, p in contract.by_id().items()}
    parts = {i: world.rows(n, label_noise if i == participant else 0.0) for i, n in counts.items()}
    task = task_of(contract.data.label)
    validation = world.rows(max(2, min(MAX_VALIDATION, validation_rows(contract))))

    def losses(model: Floats) -> Floats:
        return task.losses(logits(contract.model, contract.data, model, validation.x), validation.y)

    pairs = RENORMALISED_PAIRS if contract.contribution.game == "re-normalised" else 1
    base, memory = initial_weights(contract.model, contract.data, rng), START
    begun = before = losses(base)
    values = dict.fromkeys(counts, 0.0)
    for _ in range(contract.training.rounds):
        if not in_time():
            return None
        updates = {i: local_update(contract, base, rows, noise) for i, rows in parts.items()}
        made, memory = server_steps(contract, updates, memory)
        steps = dict(made)
        arrivals = _arrivals(contract, base, steps)
        for _ in range(pairs):
            order = rng.permutation(len(steps)).tolist()
            for direction in (order, order[::-1]):
                loss = float(before.mean())
                for place, model in zip(direction, arrivals(direction), strict=True):
                    after = float(losses(model).mean())
                    values[list(steps)[place]] += (loss - after) / (2 * pairs)
                    loss = after
        base = next_model(contract, base, steps)
        before = losses(base)
    fall = begun - before
    return Draw(
        values={i: _exact(value) for i, value in values.items()},
        total=_exact(float(fall.mean())),
        variance=_exact(float(fall.std(ddof=1)) / sqrt(len(fall))) ** 2,
    )


def _arrivals(
    contract: Contract, base: Floats, steps: Mapping[str, NDArray[np.floating]]
) -> Callable[[Sequence[int]], Iterator[Floats]]:
    """For an order of participants, by their places, the model after each arrival by the contract's rule."""
    if contract.contribution.game == "re-normalised":
        game = aggregator(contract, steps)
        return lambda order: game.models(base, list(accumulate(1 << place for place in order)))

    def added(order: Sequence[int]) -> Iterator[Floats]:
        model = base
        for place in order:
            model = model + list(steps.values())[place]
            yield model

    return added


class _World:
    """A made-up task on the contract's schema; rows as `features.encode` gives them.

    Of classes: where each lies. Of numbers and durations: the direction along which they grow.
    """

    def __init__(self, contract: Contract, rng: np.random.Generator) -> None:
        self._rng, self._width = rng, feature_count(contract.data)
        label = contract.data.label
        self._classes = len(label.classes) if isinstance(label, ClassLabel) else 0
        self._task = task_of(label)
        self._scale = float(contract.data.feature_scale) / sqrt(self._width)
        self._places = rng.uniform(-1, 1, (self._classes or 1, self._width - 1))

    def rows(self, count: int, label_noise: float = 0.0) -> Examples:
        """So many rows; of the labels the given part is another class, or a number of no meaning."""
        x = np.ones((count, self._width))
        spread = SPREAD * self._rng.standard_normal((count, self._width - 1))
        wrong = self._rng.random(count) < label_noise
        y: Targets
        if self._classes:
            y = self._rng.integers(0, self._classes, count)
            x[:, :-1] = np.clip(self._places[y] + spread, -1, 1)
            y[wrong] = (y[wrong] + self._rng.integers(1, self._classes, int(wrong.sum()))) % self._classes
        else:
            x[:, :-1] = np.clip(spread, -1, 1)
            along = x[:, :-1] @ self._places[0] / np.linalg.norm(self._places[0])
            place = np.clip((along + SPREAD * self._rng.standard_normal(count)) / 2, -1, 1)
            place[wrong] = self._rng.uniform(-1, 1, int(wrong.sum()))
            y = self._task.made_up((place + 1) / 2 * (1 - 1e-12))
        return Examples(x=x * self._scale, y=y)


def _of_one_step(contract: Contract, factor: int) -> Contract:
    """The contract with one local step, and a part of everybody's rows."""
    return contract.model_copy(
        update={
            "training": contract.training.model_copy(update={"local_steps": 1}),
            "participants": tuple(
                p.model_copy(update={"num_examples": max(1, p.num_examples // factor)}) for p in contract.participants
            ),
        }
    )


def _exact(nats: float) -> Fraction:
    return Fraction(round(nats * UNIT))
