"""The noise that a training really added, tensor by tensor: has it the right size everywhere, and is it independent?

What one step moves the weights by, less the sum of gradients that it moved them by, is its noise. In units of the
contract's deviation it must be independent standard normal numbers: over steps, coordinates and tensors.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fedpact_models.dp import SecureDPOptimizer
from fedpact_models.features import Floats

NOISE_ERROR = 1e-6
"""Chance that the tests, all of them together, speak of a fault where there is none (Bonferroni)."""

_ENOUGH = 30  # numbers, or pairs; of tensors with fewer the sums are added up
_SMALL = "the small tensors together"
_ALL = "all tensors together"
_GRID = 1e-9  # in deviations: what of the noise is recovered at least, but where a step moves weights by few digits
_SKETCH = 256  # coordinates, evenly spread, by which every step is compared with every other
_SKETCHES = 4096  # steps so compared, the first: 8 MB, and a quarter of a second


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseTests:
    """How many tests there were, and the worst: its tensor, its name, and its chance times the number of tests."""

    count: int
    tensor: str
    test: str
    chance: float

    @property
    def failed(self) -> bool:
        """Whether it is a fault."""
        return self.chance < NOISE_ERROR


class NoiseSeen:
    """Stands in `dp_sgd` as `before_noise`, after whatever else adds to the sum; `result` when the steps are over.

    Args:
        names: Of the trained parameters, in their order.
        deviation: Of the noise on the sum, noise multiplier times clip.
        scale: What a step moves the weights by, times this, is the noised sum: denominator / learning rate.
    """

    def __init__(self, names: Sequence[str], *, deviation: float, scale: float) -> None:
        self._names, self._deviation, self._scale = names, deviation, scale
        self._open: SecureDPOptimizer | None = None  # in the middle of a step, until the next or the end
        self._values: list[Floats] = []
        self._sums: list[Floats] = []
        self._last: list[Floats] = []
        self._grid = _GRID
        self._found: dict[tuple[str, str], Floats] = {}
        self._sketches: list[Floats] = []
        self._repeated, self._expected = 0, 0.0

    def __call__(self, optimizer: SecureDPOptimizer, _: int) -> None:
        """Take in the step before, and keep what this one's noise will be told from."""
        self._take()
        self._open = optimizer
        self._values = [p.detach().double().numpy().flatten() for p in optimizer.params]  # copies
        self._sums = [p.summed_grad.double().numpy().flatten() for p in optimizer.params]
        weights = [p.detach().numpy() for p in optimizer.params]
        digit = max(float(np.finfo(w.dtype).eps * np.abs(w).max()) for w in weights)
        self._grid = max(_GRID, self._scale * digit / self._deviation)

    def result(self) -> NoiseTests:
        """The tests of every step so far."""
        self._take()
        chances = {key: _chance(sums) for key, sums in _pooled(self._found).items()}
        chances[_ALL, "values that repeat within a step"] = _poisson_tail(self._repeated, self._expected)
        chances[_ALL, "correlation of any two steps"] = _closest_pair(self._sketches)
        worst = min(chances, key=lambda key: chances[key])
        return NoiseTests(
            count=len(chances), tensor=worst[0], test=worst[1], chance=min(1.0, chances[worst] * len(chances))
        )

    def _take(self) -> None:
        if self._open is None:
            return
        step = [
            ((value - p.detach().double().numpy().flatten()) * self._scale - summed) / self._deviation
            for p, value, summed in zip(self._open.params, self._values, self._sums, strict=True)
        ]
        self._open = None
        before: Sequence[Floats | None] = self._last or [None] * len(step)
        for name, noise, last in zip(self._names, step, before, strict=True):
            for test, sums in _sums(noise, last):
                self._add(name, test, sums)
        for (name, a), (other, b) in combinations(zip(self._names, step, strict=True), 2):
            shared = min(len(a), len(b))
            self._add(name, f"correlation with {other}", _pair(a[:shared], b[:shared]))
        together = np.concatenate(step)
        if len(self._sketches) < _SKETCHES:
            self._sketches.append(together[:: math.ceil(len(together) / _SKETCH)])
        together = np.rint(np.abs(together) / self._grid)
        self._repeated += len(together) - len(np.unique(together))
        self._expected += math.comb(len(together), 2) * self._grid / math.sqrt(math.pi)  # half-normal: density's square
        self._last = step

    def _add(self, tensor: str, test: str, sums: Floats) -> None:
        self._found[tensor, test] = self._found.get((tensor, test), 0.0) + sums


def _sums(noise: Floats, last: Floats | None) -> Iterator[tuple[str, Floats]]:
    """Each test's sums over one step: of squares [2], squares and count; of pairs [4], products, squares, count."""
    half = len(noise) // 2
    parts = {
        "energy": noise,
        "energy of the first half": noise[:half],
        "energy of the second half": noise[half:],
        "energy of even coordinates": noise[::2],
        "energy of odd coordinates": noise[1::2],
    }
    for test, part in parts.items():
        yield test, np.array([part @ part, len(part)])
    pairs = {
        "correlation of neighbours": (noise[1:], noise[:-1]),
        "correlation of next but one": (noise[2:], noise[:-2]),
        "correlation of the halves": (noise[:half], noise[half : 2 * half]),
    }
    if last is not None:
        pairs["correlation of consecutive steps"] = (noise, last)
    for test, (a, b) in pairs.items():
        yield test, _pair(a, b)


def _pair(a: Floats, b: Floats) -> Floats:
    return np.array([a @ b, a @ a, b @ b, len(a)])


def _closest_pair(sketches: Sequence[Floats]) -> float:
    """The chance of the largest correlation of two of them, times the number of pairs: noise that comes again."""
    if len(sketches) < 2:
        return 1.0
    steps = np.stack(sketches)
    if not np.isfinite(steps).all():
        return 0.0
    steps /= np.maximum(1e-300, np.linalg.norm(steps, axis=1, keepdims=True))  # one of zeros resembles none
    products = np.abs(np.tril(steps @ steps.T, -1))
    return _chance(np.array([products.max(), 1.0, 1.0, steps.shape[1]])) * math.comb(len(steps), 2)


def _pooled(found: Mapping[tuple[str, str], Floats]) -> dict[tuple[str, str], Floats]:
    """The sums of which a chance can be taken; those of too few numbers added up, each test by itself."""
    result = {key: sums for key, sums in found.items() if sums[-1] >= _ENOUGH}
    pool: dict[tuple[str, str], Floats] = {}
    for (name, test), sums in found.items():
        if (name, test) not in result:
            pool[_SMALL, test] = pool.get((_SMALL, test), 0.0) + sums
    return result | {key: sums for key, sums in pool.items() if sums[-1] >= _ENOUGH}


def _chance(sums: Floats) -> float:
    """Two-sided, of sums at least as far out; 0 of what is no number.

    Squares: chi-square by Wilson and Hilferty 1931. Pairs: the correlation about zero, as Student's t by Wallace 1959.
    Both are good far out, where the central limit is not.
    """
    if not np.isfinite(sums).all():
        return 0.0
    count = float(sums[-1])
    if len(sums) == 2:
        spread = 2 / (9 * count)
        z = (math.cbrt(float(sums[0]) / count) - (1 - spread)) / math.sqrt(spread)
    else:
        product, left, right = (float(s) for s in sums[:3])
        size, free = math.sqrt(left) * math.sqrt(right), count - 1
        r = product / size if size else 0.0  # no noise at all: its energy says so
        z = (8 * free + 1) / (8 * free + 3) * math.sqrt(-free * math.log(max(1e-300, 1 - r * r)))
    return math.erfc(abs(z) / math.sqrt(2))


def _poisson_tail(count: int, expected: float) -> float:
    """The chance of at least so many."""
    if count <= expected:
        return 1.0
    j = np.arange(count, count + 1000)
    logs = j * math.log(expected) - expected - np.array([math.lgamma(k + 1) for k in j])
    return min(1.0, float(np.exp(logs).sum()))
