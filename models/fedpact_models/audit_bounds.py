"""What the guesses of a one-run audit prove: two lower bounds on epsilon, each with a probability of error.

m canaries are included or not by fair coins; from the output, r of them are guessed (the others are abstained from)
and v guesses are right. How many are guessed is fixed beforehand: choosing it after a look would void the proof.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fedpact_models.features import Floats

Inverse: TypeAlias = Callable[[float], float]
"""The inverse of a blow-up: the least probability on one neighbour of an event that has probability y on the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """How many canaries there were (m), how many were guessed (r), how many of those rightly (v)."""

    canaries: int
    made: int
    correct: int


def epsilon_delta_bound(guesses: Guesses, delta: float, error: float) -> float:
    """The largest epsilon (to 1e-6) that these guesses refute at `delta`; 0 if none is.

    Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv:2305.08846), theorem 5.2.
    Under (epsilon, delta)-DP a larger epsilon is refuted with probability at most `error`.
    """
    if _chance(guesses, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, 1.0
    while _chance(guesses, high, delta) <= error:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _chance(guesses, middle, delta) <= error else (low, middle)
    return low


def _chance(guesses: Guesses, epsilon: float, delta: float) -> float:
    """At most how likely so many right guesses are, if the mechanism is (epsilon, delta)-DP.

    P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i for i from 1 to v, where W is binomial with r trials of
    probability e^epsilon / (1 + e^epsilon).
    """
    v, rate = guesses.correct, 1 / (1 + math.exp(-epsilon))
    if v == 0:
        return 1.0
    chances = _binomial(0, guesses.made, guesses.made, rate)
    between = np.cumsum(chances[v - 1 :: -1])  # at least v - i and below v, for i from 1
    worst = float(np.max(between / np.arange(1, v + 1)))
    return min(1.0, float(chances[v:].sum()) + 2 * guesses.canaries * delta * worst)


def inverse_blow_up(epsilons: Sequence[float], deltas: Sequence[float]) -> Inverse:
    """The inverse blow-up of a mechanism that is (epsilon, delta)-DP for each of these pairs, in both directions.

    P(E) <= e^epsilon Q(E) + delta for E and for what is not E give Q(E) from below; fewer pairs give less, never too
    much.
    """
    growth, lost = np.exp(np.asarray(epsilons)), np.asarray(deltas)

    def inverse(y: float) -> float:
        return max(0.0, float(np.max((y - lost) / growth)), float(np.max(1 - lost - growth * (1 - y))))

    return inverse


def refuted(guesses: Guesses, inverse: Inverse, error: float) -> bool:
    """Whether a mechanism with this inverse blow-up makes so many right guesses with probability below `error`.

    Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one run" (arXiv:2410.22235). Let p_i be
    the chance of exactly i right guesses, R_t the sum of i p_i / m over i >= t and H_t that of (r - i) p_i / m. Given
    the other coins, "guess j is right, and at least t others" is one event under one coin j and "guess j is wrong, and
    at least t others" the same event under the other coin, so H_t >= inverse(R_{t+1}), by convexity also on average.
    Were P[at least v right] = error, all of it at v would make R_v and then every H_t and R_t below it smallest; if
    even so the whole exceeds R_0 + H_0 = r / m, the assumption was wrong, and for any larger error too.
    """
    m, r, v = guesses.canaries, guesses.made, guesses.correct
    right, wrong = error * v / m, error * (r - v) / m
    for i in range(v - 1, -1, -1):
        needed = max(wrong, inverse(right))
        right += i / (r - i) * (needed - wrong)
        wrong = needed
        if right + wrong > r / m:
            return True
    return right + wrong > r / m


def binomial_chance(successes: int, trials: int, rate: float) -> float:
    """The two-sided chance of a number of successes at least as far out: twice its tail, at most 1."""
    if successes < trials * rate:
        successes, rate = trials - successes, 1 - rate
    far = successes + 50 * math.ceil(math.sqrt(trials * rate * (1 - rate)) + 1)  # what lies beyond is below every float
    return min(1.0, 2 * float(_binomial(successes, min(trials, far), trials, rate).sum()))


def _binomial(first: int, last: int, trials: int, rate: float) -> Floats:
    """The chances of so many successes, `first` to `last`."""
    ways = math.lgamma(trials + 1) - math.lgamma(first + 1) - math.lgamma(trials - first + 1)
    start = ways + first * math.log(rate) + (trials - first) * math.log1p(-rate)
    k = np.arange(first, last, dtype=np.float64)
    growth = np.log((trials - k) / (k + 1)) + (math.log(rate) - math.log1p(-rate))
    return np.exp(start + np.concatenate([[0.0], np.cumsum(growth)]))
