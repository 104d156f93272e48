"""The rivals of tests/support are what their papers say, and ours is nearer to the exact values of a real round."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.digits_round import cross_entropy, digits_round
from tests.support.games import relative_error, seed_of
from tests.support.models_kit import a_model, plain_schema
from tests.support.rivals import fedce, gtg_shapley

from fedpact_contract.estimators import Plan, coalitions, estimate
from fedpact_contract.shapley import shapley
from fedpact_models.evaluate import evaluate_round

GAME = [(mask * 2654435761 + 7) % 1000 / 1000 for mask in range(2**4)]


def counted(table):
    asked = []

    def value(mask):
        asked.append(mask)
        return table[mask]

    return value, asked


def test_gtg_with_all_orders_and_nothing_cut_comes_to_the_shapley_values():
    value, asked = counted(GAME)
    found = gtg_shapley(value, 4, 14, np.random.default_rng(0), within=0.0, criterion=None)
    assert np.allclose(found, np.array(list(map(float, shapley([round(1000 * v) for v in GAME])))) / 1000, atol=0.05)
    assert len(asked) == len(set(asked)) == 16


def test_gtg_gives_nothing_for_a_round_that_gained_nothing():
    value, asked = counted([0.0, 5.0, 5.0, 0.009])
    assert gtg_shapley(value, 2, 10, np.random.default_rng(0)).tolist() == [0.0, 0.0]
    assert asked == [0, 3]


def test_gtg_cuts_a_walk_that_has_reached_the_whole():
    value, asked = counted([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = gtg_shapley(value, 3, 10, np.random.default_rng(0))
    assert sorted(asked) == [0, 1, 2, 4, 7]  # each leads in turn, and nobody after it is asked for
    assert np.allclose(found, 1 / 3)


@pytest.mark.parametrize("evaluations", [1, 7, 10])
def test_gtg_keeps_to_its_evaluations(evaluations):
    value, asked = counted(GAME)
    gtg_shapley(value, 4, evaluations, np.random.default_rng(0), within=0.0, criterion=None)
    assert len(asked) == evaluations + 2


def test_fedce_by_hand():
    updates, coefficients = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), np.full(3, 1 / 3)
    away = np.array([1 - 1 / 10**0.5, 1 - 1 / 5**0.5, 1 - 3 / (2**0.5 * 5**0.5)])
    losses = np.array([3.0, 1.0, 4.0])
    gradient, data = away / away.sum(), losses / 8
    assert np.allclose(fedce(updates, coefficients, losses), (gradient + data) / 2)
    assert np.allclose(fedce(updates, coefficients, losses, "times"), gradient * data / (gradient @ data))


def test_the_real_round_is_what_the_operator_evaluates():
    """The table of tests/support against evaluate_round: at most a unit or two apart."""
    made, players = digits_round(5, 1), 5
    steps = np.array([(w * u).ravel() for w, u in zip(made.weights, made.updates, strict=True)])
    count = len(made.validation)
    evaluation = evaluate_round(
        a_model(), plain_schema(64, 10), made.base.ravel(), steps, made.validation, [count], own_slice=[()] * players
    )
    losses = np.array([row[0] for row in evaluation.losses]) / count
    assert np.abs((losses[0] - losses) - made.table(renormalised=False)).max() <= 2
    full = 2**players - 1
    assert made.table(renormalised=True)[full] == made.table(renormalised=False)[full] > 0


def test_a_loss_without_somebody_is_that_of_the_others_model():
    made = digits_round(4, 0)
    model = made.base + made.updates[[0, 1, 3]].mean(axis=0)
    loss = cross_entropy(made.own[2].x @ model.T, made.own[2].y).mean()
    assert np.isclose(made.losses_without(renormalised=True)[2], loss)
    assert not np.isclose(made.losses_without(renormalised=False)[2], loss)


@pytest.mark.parametrize(("renormalised", "kind"), [(False, "pairs"), (True, "stratified")])
def test_ours_is_at_most_a_tenth_of_gtgs_error_in_a_real_round_at_equal_evaluations(renormalised, kind):
    """N = 10; with 16 participants and FedCE beside them in tests/benchmarks."""
    table = digits_round(10, 0).table(renormalised=renormalised)
    expected, ours, theirs = shapley(table), [], {0.001: [], 0.0: []}
    for repetition in range(5):
        plan = Plan(estimator=kind, players=10, draws=3 if kind == "pairs" else 20, seed=seed_of(repetition))
        masks = coalitions(plan)
        ours.append(relative_error(estimate(plan, [table[mask] for mask in masks]).values, expected))
        for within, errors in theirs.items():
            rng = np.random.default_rng(repetition)
            found = gtg_shapley(
                lambda mask: table[mask] / 10**9, 10, len(masks) - 2, rng, between=0, within=within, criterion=None
            )
            errors.append(relative_error((found * 10**9).tolist(), expected))
    assert np.median(ours) <= min(np.median(errors) for errors in theirs.values()) / 10
