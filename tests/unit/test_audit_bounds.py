"""The bounds of a one-run audit: against published values, an independent derivation, and exact mechanisms."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom, binomtest

from fedpact_contract.privacy import profile_pld
from fedpact_models.audit_bounds import (
    Guesses,
    binomial_chance,
    epsilon_delta_bound,
    inverse_blow_up,
    refuted,
)

NORMAL = NormalDist()
EPSILONS = [k / 50 for k in range(1000)]


def gaussian_delta(noise: float, epsilon: float) -> float:
    """Balle and Wang 2018."""
    return NORMAL.cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * NORMAL.cdf(-0.5 / noise - epsilon * noise)


def gaussian_epsilon(noise: float, delta: float) -> float:
    low, high = 0.0, 100.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(noise, middle) > delta else (low, middle)
    return high


def exact_inverse(noise: float):
    """Of one Gaussian mechanism: Phi(Phi^-1(y) - 1 / noise)."""
    return lambda y: 0.0 if y <= 0 else 1.0 if y >= 1 else NORMAL.cdf(NORMAL.inv_cdf(y) - 1 / noise)


def gaussian_inverse(noise: float):
    return inverse_blow_up(EPSILONS, [gaussian_delta(noise, e) for e in EPSILONS])


# (canaries, guesses, right guesses, delta, epsilon), as printed in fdp_analysis_tutorial.ipynb of
# facebookresearch/PrivacyGuard, the program of the paper's authors' group: error .05, noise in steps of .01
PUBLISHED = [
    (100, 80, 70, 1e-6, 3.2906),
    (1000, 10, 10, 1e-5, 1.2260),
    (1000, 15, 15, 1e-5, 1.8776),
    (1000, 25, 25, 1e-5, 2.7534),
    (1000, 40, 40, 1e-5, 3.6179),
    (1000, 268, 255, 1e-5, 4.1374),
    (1000, 429, 404, 1e-5, 4.1832),
    (1000, 686, 621, 1e-5, 3.6537),
]


@pytest.mark.parametrize(("canaries", "made", "correct", "delta", "epsilon"), PUBLISHED)
def test_the_f_dp_bound_is_the_published_one(canaries, made, correct, delta, epsilon) -> None:
    guesses = Guesses(canaries=canaries, made=made, correct=correct)
    for make in (exact_inverse, gaussian_inverse):
        noises = [k / 500 for k in range(100, 2500)]
        low, high = 0, len(noises) - 1  # the least noise that is refuted
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if refuted(guesses, make(noises[middle]), 0.05) else (middle, high)
        ours = gaussian_epsilon(noises[high], delta)
        a_step_less_noise = gaussian_epsilon(noises[high] - 0.015, delta)
        assert epsilon - 0.01 <= ours + 0.01
        assert ours <= a_step_less_noise
        assert epsilon <= a_step_less_noise
        assert ours == pytest.approx(epsilon, abs=0.06)


@pytest.mark.parametrize("correct", [5, 7, 9, 10])
@pytest.mark.parametrize("noise", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("canaries", [10, 25])
def test_the_recursion_finds_what_a_linear_program_finds(canaries: int, noise: float, correct: int) -> None:
    """All distributions of the number of right guesses that the paper's inequality allows; the largest tail of them."""
    made, lines = 10, [(e, gaussian_delta(noise, e)) for e in EPSILONS[::10]]
    right = np.array([i / canaries for i in range(made + 1)])
    wrong = np.array([(made - i) / canaries for i in range(made + 1)])
    rows, limits = [], []
    for t in range(made + 1):
        above, at_least = np.arange(made + 1) >= t + 1, np.arange(made + 1) >= t
        for epsilon, delta in lines:  # H_t >= e^-eps (R - delta) and H_t >= 1 - delta - e^eps (1 - R)
            grown = math.exp(epsilon)
            rows += [right * above / grown - wrong * at_least, right * above * grown - wrong * at_least]
            limits += [delta / grown, grown - 1 + delta]
    tail = -(np.arange(made + 1) >= correct).astype(float)
    best = linprog(tail, A_ub=rows, b_ub=limits, A_eq=[np.ones(made + 1)], b_eq=[1.0], bounds=(0, 1))
    assert best.success
    inverse = inverse_blow_up(*zip(*lines, strict=True))
    guesses = Guesses(canaries=canaries, made=made, correct=correct)
    most = -best.fun
    assert refuted(guesses, inverse, most * 1.001)
    assert not refuted(guesses, inverse, most * 0.999)


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_both_bounds_hold_for_an_exact_gaussian_mechanism(noise: float) -> None:
    """They say too much in at most one run of twenty; of 200 runs in 18 with a chance below .01."""
    rng, delta, wrong = np.random.default_rng(1), 1e-5, [0, 0]
    inverse, epsilon = exact_inverse(noise), gaussian_epsilon(noise, 1e-5)
    for _ in range(200):
        included = rng.random(400) < 0.5
        order = np.argsort(-(included + noise * rng.normal(size=400)))
        right = int(included[order[:25]].sum() + (~included[order[-25:]]).sum())
        guesses = Guesses(canaries=400, made=50, correct=right)
        wrong[0] += refuted(guesses, inverse, 0.05)
        wrong[1] += epsilon_delta_bound(guesses, delta, 0.05) > epsilon
    assert max(wrong) < 18


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_epsilon_delta_bound_holds_for_randomised_answers_and_is_tight(epsilon: float) -> None:
    rng, rate, bounds = np.random.default_rng(2), 1 / (1 + math.exp(-epsilon)), []
    for _ in range(300):
        guesses = Guesses(canaries=1000, made=1000, correct=int(rng.binomial(1000, rate)))
        bounds.append(epsilon_delta_bound(guesses, 0.0, 0.05))
    assert 3 <= sum(b > epsilon for b in bounds) < 27
    assert np.mean(bounds) > epsilon - 0.35


@pytest.mark.parametrize(("made", "correct"), [(100, 80), (100, 100), (7, 6), (624, 600)])
def test_without_delta_it_is_the_exact_binomial_interval(made: int, correct: int) -> None:
    low = binomtest(correct, made, alternative="greater").proportion_ci(0.95, method="exact").low
    bound = epsilon_delta_bound(Guesses(canaries=5000, made=made, correct=correct), 0.0, 0.05)
    assert bound == pytest.approx(max(0.0, math.log(low / (1 - low))), abs=1e-5)


def test_with_delta_it_is_the_papers_sum() -> None:
    """The p-value as the paper's appendix defines it, term by term."""
    m, r, v, delta = 500, 40, 37, 1e-3
    bound = epsilon_delta_bound(Guesses(canaries=m, made=r, correct=v), delta, 0.05)

    def chance(epsilon: float) -> float:
        rate = 1 / (1 + math.exp(-epsilon))
        worst = max((binom.cdf(v - 1, r, rate) - binom.cdf(v - i - 1, r, rate)) / i for i in range(1, v + 1))
        return float(binom.sf(v - 1, r, rate) + 2 * m * delta * worst)

    assert chance(bound) <= 0.05 < chance(bound + 1e-5)
    assert 0 < bound < epsilon_delta_bound(Guesses(canaries=m, made=r, correct=v), 0.0, 0.05)


def test_what_nobody_can_guess_gives_no_bound() -> None:
    for correct in (0, 20, 25):
        guesses = Guesses(canaries=400, made=50, correct=correct)
        assert epsilon_delta_bound(guesses, 1e-5, 0.05) == 0.0
        assert not refuted(guesses, exact_inverse(0.5), 0.05)


def test_the_profile_of_sampled_steps_gives_their_inverse() -> None:
    """One step at rate 1 - 1e-9 is a Gaussian mechanism."""
    from decimal import Decimal

    deltas = profile_pld([(Decimal("1.5"), Decimal("0.999999999"), 1)], EPSILONS)
    inverse, exact = inverse_blow_up(EPSILONS, deltas), exact_inverse(1.5)
    for y in (1e-4, 0.01, 0.3, 0.7, 0.99, 0.9999):
        assert exact(y) * 0.99 - 1e-5 < inverse(y) <= exact(y) + 1e-12
    assert max(deltas) <= 1
    assert deltas == sorted(deltas, reverse=True)


@pytest.mark.parametrize(("successes", "trials", "rate"), [(20, 100, 0.2), (35, 100, 0.2), (0, 10, 0.3), (10, 10, 0.3)])
def test_the_binomial_chance_is_twice_the_tail(successes: int, trials: int, rate: float) -> None:
    tails = binom.cdf(successes, trials, rate), binom.sf(successes - 1, trials, rate)
    assert binomial_chance(successes, trials, rate) == pytest.approx(min(1.0, 2 * min(tails)), rel=1e-9)


def test_a_hundred_million_trials_take_no_time() -> None:
    assert binomial_chance(20_000_000, 100_000_000, 0.2) > 0.99
    assert binomial_chance(20_040_000, 100_000_000, 0.2) < 1e-20
