"""Fixed noise, for tests alone: an update made with it is marked `test`, and a normal coordinator rejects it."""

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
