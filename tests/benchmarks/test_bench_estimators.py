"""Estimators beside exact values: coverage of their intervals, and their error beside two rivals' in real rounds."""

import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from tests.support.digits_round import DigitsRound, digits_round
from tests.support.games import FederatedGame, held, relative_error, renormalised, seed_of
from tests.support.mlp_round import PLAYERS, VALIDATION, MlpRound, mlp_rounds
from tests.support.rivals import fedce, gtg_shapley

from fedpact_contract.estimators import MAX_PAIRS, Estimator, Plan, choose, coalitions, coefficients, estimate
from fedpact_contract.sampling import t_quantile
from fedpact_contract.shapley import shapley
from fedpact_models.evaluate import evaluate_coalitions

REPETITIONS = 500
DRAWS = {"pairs": 8, "stratified": 104}
"""Of 16 players: 242 coalitions either way."""


@lru_cache
def a_round(players: int, seed: int, before: int) -> DigitsRound:
    return digits_round(players, seed, rounds_before=before)


@lru_cache
def a_table(players: int, seed: int, before: int, again: bool) -> tuple[list[int], tuple[Fraction, ...]]:
    """All coalitions of a round, and the exact values."""
    table = a_round(players, seed, before).table(renormalised=again)
    return table, shapley(table)


def coverage(
    kind: Estimator, values: Callable[[Sequence[int]], list[int]], expected: Sequence[object]
) -> tuple[float, float]:
    """Over players and repetitions the part of intervals that hold, and the median relative error."""
    covered, errors = [], []
    for repetition in range(REPETITIONS):
        plan = Plan(estimator=kind, players=16, draws=DRAWS[kind], seed=seed_of(repetition))
        found = estimate(plan, values(coalitions(plan)))
        covered += held(found, expected)
        errors.append(relative_error(found.values, expected))
    return float(np.mean(covered)), float(np.median(errors))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["saturating", "means", "digits fixed-weight", "digits re-normalised"])
def test_coverage_of_the_monte_carlo_interval(benchmark, capsys, name, seed) -> None:
    """Nominal 95 %, 500 repetitions with fixed seeds, 16 players, each estimator on its own games."""
    if name == "saturating":
        game = FederatedGame.drawn(16, seed)
        values, expected = game.values, game.shapley()
    else:
        if name == "means":
            table = renormalised(16, seed)(range(2**16))
            expected = shapley(table)
        else:
            table, expected = a_table(16, seed, 0, name.endswith("re-normalised"))

        def values(masks: Sequence[int]) -> list[int]:
            return [table[mask] for mask in masks]

    kind = "pairs" if name in ("saturating", "digits fixed-weight") else "stratified"
    covered, error = benchmark.pedantic(coverage, args=(kind, values, expected), rounds=1)
    benchmark.extra_info["coverage"] = round(covered, 4)
    with capsys.disabled():
        sys.stdout.write(f"\n{name}, seed {seed}, {kind}: coverage {covered:.4f}, relative error {error:.2g}\n")
    assert covered >= 0.93


def errors_of(n: int, before: int, again: bool, evaluations: int, repetitions: int) -> dict[str, float]:
    """Median relative L2 errors of values; of FedCE's coefficients against exact shares."""
    made, (table, expected) = a_round(n, 0, before), a_table(n, 0, before, again)
    errors: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        for kind, draws in (("pairs", evaluations // (2 * n - 2)), ("stratified", (evaluations - 2 * n) // 2)):
            plan = Plan(estimator=kind, players=n, draws=draws, seed=seed_of(repetition))
            found = estimate(plan, [table[mask] for mask in coalitions(plan)])
            errors.setdefault(kind, []).append(relative_error(found.values, expected))
        for label, within in (("GTG", 0.001), ("GTG, nothing cut", 0.0)):
            rng = np.random.default_rng(repetition)
            values = gtg_shapley(
                lambda mask: table[mask] / 10**9, n, evaluations, rng, between=0, within=within, criterion=None
            )
            errors.setdefault(label, []).append(relative_error((values * 10**9).tolist(), expected))
    shares = [value / sum(expected) for value in expected]
    updates = made.updates.reshape(n, -1)
    for mode in ("plus", "times"):
        found = fedce(updates, made.weights, made.losses_without(renormalised=again), mode)
        errors[f"FedCE {mode}, shares"] = [relative_error(found.tolist(), shares)]
    last = [table[-1] - table[-1 - 2**i] for i in range(n)]
    errors["leave-one-out, shares"] = [relative_error([value / sum(last) for value in last], shares)]
    errors["equal shares"] = [relative_error([1 / n] * n, shares)]
    return {label: float(np.median(each)) for label, each in errors.items()}


@pytest.mark.parametrize("again", [False, True], ids=["fixed-weight", "re-normalised"])
@pytest.mark.parametrize(("players", "evaluations"), [(10, 60), (16, 90), (16, 240)])
@pytest.mark.parametrize("before", [0, 4])
def test_error_beside_gtg_and_fedce_in_a_round_of_the_digits(
    benchmark, capsys, before, players, evaluations, again
) -> None:
    """At equal evaluations, each on its own game and on ours.

    FedCE takes N evaluations and gives shares alone; leave-one-out takes as many. It estimates no Shapley value of
    either game: it rewards whoever is unlike the others, so a noisy participant too; its figure tells how far apart the
    two questions are. Its own game is the re-normalised one, in which it leaves out a participant.
    """
    errors = benchmark.pedantic(errors_of, args=(players, before, again, evaluations, 20), rounds=1)
    benchmark.extra_info |= {label: float(f"{error:.2g}") for label, error in errors.items()}
    with capsys.disabled():
        told = ", ".join(f"{label} {error:.2g}" for label, error in errors.items())
        game = "re-normalised" if again else "fixed-weight"
        sys.stdout.write(f"\n{game}, N = {players}, round {before + 1}, {evaluations} evaluations: {told}\n")
    ours = errors["stratified" if again else "pairs"]
    assert ours <= min(errors["GTG"], errors["GTG, nothing cut"]) / 10
    rival = min(errors["FedCE plus, shares"], errors["FedCE times, shares"])
    assert ours <= rival / 10
    if not again:
        assert errors["leave-one-out, shares"] <= rival / 2
        assert ours <= 0.002  # contribution.md: .002 at N = 16 and 91 evaluations


@pytest.mark.parametrize(("kind", "draws"), [("pairs", 8), ("stratified", 692)])
def test_arithmetic_of_a_hundred_players(benchmark, kind, draws) -> None:
    """1,586 coalitions whose values are known: the fractions alone. Measured 0.03 s and 1 s, the linear map 0.05, 4."""
    game = FederatedGame.drawn(100, 1)
    plan = Plan(estimator=kind, players=100, draws=draws, seed=seed_of(1))
    values = game.values(coalitions(plan))
    found = benchmark.pedantic(estimate, args=(plan, values), rounds=3)
    assert relative_error(found.values, game.shapley()) < (0.02 if kind == "pairs" else 0.2)
    assert len(coefficients(plan)) == 100


def error_of_eight_pairs(made: MlpRound) -> dict[str, float]:
    """Relative L2 errors of the plan that `choose` gives, against 64 pairs of another seed, and of those themselves."""
    chosen = choose(PLAYERS, game="fixed-weight", linear=False, most=1600, seed=seed_of("chosen"))
    reference = Plan(estimator="pairs", players=PLAYERS, draws=MAX_PAIRS, seed=seed_of("reference"))
    masks = list(dict.fromkeys(coalitions(chosen) + coalitions(reference)))
    losses = evaluate_coalitions(made.model, made.data, made.base, made.steps, made.validation, [VALIDATION], masks)
    loss = {mask: total for mask, (total,) in zip(masks, losses.losses, strict=True)}
    found, expected = (estimate(plan, [loss[0] - loss[m] for m in coalitions(plan)]) for plan in (chosen, reference))
    halves = np.array([float(half) for half in expected.half_widths]) / float(t_quantile(MAX_PAIRS - 2))
    size = np.linalg.norm([float(value) for value in expected.values])
    return {
        "evaluations": len(coalitions(chosen)),
        "evaluations of the reference": len(coalitions(reference)),
        "error": relative_error(found.values, expected.values),
        "standard error of the reference": float(np.linalg.norm(halves) / size),
        "accuracy before": made.accuracy,
    }


def test_error_of_eight_pairs_in_rounds_of_a_hundred_trained_participants(benchmark, capsys) -> None:
    """MLP of 102 thousand parameters, 1,000 rows, 20 to 200 rows a participant; 1,586 evaluations against 12,546.

    Measured: .0011 in round 2 (accuracy before it .19), .0012 in round 7 (.37), .0011 in round 20 (.62). Of that the
    reference's own standard error is .0004: it lengthens the error by a tenth at most. Limit .01. A minute in all.
    """
    rounds = mlp_rounds(0, (2, 20))
    found = benchmark.pedantic(lambda: {n: error_of_eight_pairs(made) for n, made in rounds.items()}, rounds=1)
    for number, figures in found.items():
        benchmark.extra_info[f"round {number}"] = figures
        with capsys.disabled():
            told = ", ".join(f"{label} {figure:.5g}" for label, figure in figures.items())
            sys.stdout.write(f"\nround {number}: {told}\n")
    for figures in found.values():
        assert figures["evaluations"] == 1586
        assert figures["evaluations of the reference"] >= 12_000
        assert figures["error"] <= 0.01
