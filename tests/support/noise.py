"""Fixed noise, for tests alone: an update made with it is marked `test`, and a normal coordinator rejects it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class FixedNoise:
    """Reproducible draws; sampling and noise come from two streams, so that the number of rows moves no noise."""

    label = "test"

    def __init__(self, seed: int) -> None:
        self._uniform, self._normal = (np.random.default_rng([seed, stream]) for stream in (0, 1))

    def uniform(self, n: int) -> NDArray[np.float64]:
        return self._uniform.random(n)

    def normal(self, n: int) -> NDArray[np.float64]:
        return self._normal.standard_normal(n)


class ScriptedNoise:
    """Takes the rows that it is told to, one list a step, and adds no noise."""

    label = "test"

    def __init__(self, *batches: Sequence[int]) -> None:
        self._batches = list(batches)
        self.drawn = 0

    def uniform(self, n: int) -> NDArray[np.float64]:
        result = np.ones(n)
        result[list(self._batches.pop(0))] = 0.0
        return result

    def normal(self, n: int) -> NDArray[np.float64]:
        self.drawn += n
        return np.zeros(n)
