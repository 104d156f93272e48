"""The noise floor: is there as much energy in an update as its contracted noise alone brings?

An honest update is D = -(lr / B) sum_t (S_t + sigma C z_t), S_t the clipped sum of step t, z_t normal in d dimensions,
B = q n. What is fixed adds energy, on the mean. But the S_t answer: each step's gradient pulls earlier noise back, by a
factor of 1 - c_j along the j-th eigenvector of lr times the curvature. Of the energy of T steps' noise there stays

    kept = (1/d) sum_j f(c_j) >= f(c), f(c) = (1/T) sum_k<T (1 - c)^(2k), c the mean of the c_j (f is convex)

and for a linear model c <= lr k feature_scale^2 / d: one example's curvature has at most the trace k ||x||^2 (softmax:
(1 - sum_k p_k^2) ||x||^2, so k = 1 - 1/K; half the squared error: k = 1; K intervals' hazards: k = K/4), which
clipping only lowers. For an mlp this is no theorem; tests/benchmarks/test_bench_noise_floor.py measures both. Nor is
it for a cnn (measured: docs/adr/0014).
(A pull towards an anchor, which no contract names yet, would add its strength to lr times the curvature.)

The ratio ||D||^2 / (d T (lr sigma C / B)^2), a mean over k updates, v = k d, must not fall below

    kept - 4 sqrt(2 / v)

which an honest one does with probability at most exp(-8) = 3.4e-4, for every v (Laurent and Massart 2000, "Adaptive
estimation of a quadratic functional", lemma 1); computed for kept = 1: 1.4e-7 at v = 100, 2.3e-5 at 8,450. There is
power from where half the noise (a quarter of its energy) and no gradient would pass with probability at most exp(-8)
too, by the same lemma's upper tail. Pools are no larger than that: they judge the present, and remain quick.

The test catches misconfiguration, not malice. Gradients that agree add energy and can hide what is missing: in a small
model's first rounds they may outweigh the noise. The ratio tells: near 1 there is noise and little else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Contract
from fedpact_contract.messages import release_event
from fedpact_models.tasks import task_of

CODE = "UPDATE_NOISE_FLOOR"
"""The code of an update that is rejected here. Its array is kept: it is in the pool, and evidence in a dispute."""

Outcome = Literal["passed", "failed", "no power"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """A pool's result: `ratio` is the mean energy of `updates`, with `degrees` in all, over that of the noise alone.

    `kept` is the part of the noise's energy that the gradients leave at least.
    """

    updates: int
    degrees: int
    ratio: float
    kept: float

    @property
    def floor(self) -> float:
        """What an honest pool's ratio hardly ever falls below."""
        return self.kept - 4 * math.sqrt(2 / self.degrees)

    @property
    def outcome(self) -> Outcome:
        """Whether the ratio is below the floor; no power where half the noise could pass as well."""
        if self.degrees < power_at(self.kept):
            return "no power"
        return "failed" if self.ratio < self.floor else "passed"

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "outcome": self.outcome,
            "updates": self.updates,
            "ratio": f"{self.ratio:.4f}",
            "floor": f"{self.floor:.4f}" if self.outcome != "no power" else None,
        }


def kept(contract: Contract, parameters: int, steps: int | None = None) -> float:
    """The part of the noise's energy that the gradients leave at least, of one attempt or of so many steps."""
    training = contract.training
    curvature = task_of(contract.data.label).curvature * float(contract.data.feature_scale) ** 2
    left = (1 - min(1.0, float(training.learning_rate) * curvature / parameters)) ** 2  # f falls until c = 1
    steps = training.local_steps if steps is None else steps
    return 1.0 if left == 1 else float((1 - left**steps) / (1 - left) / steps)


def power_at(kept: float) -> float:
    """Degrees of freedom with power: (1 + 2 u + 2 u^2) / 4 <= kept - 2 u for u = sqrt(8 / v). 99.3 for kept = 1."""
    u = math.sqrt(max(0.0, 5.75 + 2 * kept)) - 2.5
    return 8 / u**2 if u > 0 else math.inf


def pool_size(contract: Contract, parameters: int) -> int:
    """How many updates have power together; those of all rounds where they have none."""
    needed, rounds = power_at(kept(contract, parameters)) / parameters, contract.training.rounds
    return min(math.ceil(needed), rounds) if needed < rounds else rounds


def energy_ratio(values: NDArray[np.float64], contract: Contract, num_examples: int, steps: int | None = None) -> float:
    """||D||^2 / (d T (lr sigma C / B)^2) of one update [d], or of what so many steps gave."""
    privacy, training = release_event(contract), contract.training
    batch = float(privacy.sample_rate) * num_examples
    deviation = float(training.learning_rate * privacy.noise_multiplier * privacy.max_grad_norm) / batch
    scaled = float(np.linalg.norm(values)) / deviation
    return scaled * scaled / (len(values) * (training.local_steps if steps is None else steps))


def pooled(ratios: Sequence[float], contract: Contract, parameters: int, steps: int | None = None) -> NoiseFloor:
    """The result of these updates' ratios together."""
    return NoiseFloor(
        updates=len(ratios),
        degrees=len(ratios) * parameters,
        ratio=sum(ratios) / len(ratios),
        kept=kept(contract, parameters, steps),
    )
