"""The payout game over every task: losses and values against a loop over models, and the game's laws, exactly."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.noise import FixedNoise
from tests.support.task_kit import TASKS, TaskCase

from fedpact_models.dp import Mode, SecureDPOptimizer, dp_sgd
from fedpact_models.evaluate import evaluate, evaluate_round
from fedpact_models.features import Floats
from fedpact_models.gradient import first_order_values, gradient
from fedpact_models.registry import build, parameter_count
from fedpact_models.training import LOSSES
from fedpact_models.weights import load_flat

HIDDEN: list[tuple[int, ...]] = [(), (9,), (9, 6)]
cases = pytest.mark.parametrize("case", TASKS.values(), ids=TASKS)
shapes = pytest.mark.parametrize("hidden", HIDDEN)


def _loop(case: TaskCase, model: Any, schema: Any, base: Floats, steps: Floats, examples: Any) -> Floats:
    """Per-example losses of every coalition by loading each model, the loss that is trained: [2^N, V]."""
    module, result, y = build(model, schema), [], torch.from_numpy(examples.y)
    for mask in range(2 ** len(steps)):
        load_flat(module, base + sum(s for i, s in enumerate(steps) if mask >> i & 1))
        with torch.no_grad():
            scores = module(torch.from_numpy(examples.x))
            if case.loss == "squared-error":
                scores = scores.clamp(-1, 1)
            result.append(LOSSES[case.loss](scores, y).numpy())
    return np.array(result)


@cases
@shapes
def test_losses_and_values_are_those_of_a_loop_over_models(case: TaskCase, hidden: tuple[int, ...]) -> None:
    game = case.game(*hidden)
    found, loop = evaluate_round(*game, [25, 35], own_slice=[()] * 4), _loop(case, *game)
    for mask, (first, second) in enumerate(found.losses):
        assert first == pytest.approx(loop[mask, :25].sum() * 1e9, abs=2)
        assert second == pytest.approx(loop[mask, 25:].sum() * 1e9, abs=2)
    by_orders = np.zeros((4, 60))
    for order in itertools.permutations(range(4)):
        for place, player in enumerate(order):
            before = sum(1 << p for p in order[:place])
            by_orders[player] += (loop[before] - loop[before | 1 << player]) / 24
    np.testing.assert_allclose(found.values, by_orders, atol=1e-12)
    np.testing.assert_allclose(found.values.sum(axis=0), loop[0] - loop[-1], atol=1e-11)
    loss, right = evaluate(*game[:3], game[4])
    assert loss * 60e9 == pytest.approx(sum(found.losses[0]), abs=2)
    assert right == (None if found.correct is None else found.correct[0])
    assert (right is None) == (case.loss == "squared-error")


@cases
@shapes
def test_a_null_player_is_worth_nothing_and_twins_the_same(case: TaskCase, hidden: tuple[int, ...]) -> None:
    model, schema, base, steps, examples = case.game(*hidden, players=5)
    steps[2], steps[4] = 0, steps[1]
    found = evaluate_round(model, schema, base, steps, examples, [60], own_slice=[()] * 5)
    assert not found.values[2].any()
    assert all(found.losses[mask] == found.losses[mask | 4] for mask in range(32))
    assert found.values[1].tobytes() == found.values[4].tobytes()
    order = [4, 2, 0, 3, 1]
    renamed = evaluate_round(model, schema, base, steps[order], examples, [60], own_slice=[()] * 5)
    assert renamed.values.tobytes() == found.values[order].tobytes()


@cases
@shapes
def test_neither_chunk_nor_block_moves_a_bit(case: TaskCase, hidden: tuple[int, ...]) -> None:
    game = case.game(*hidden)
    results = [
        evaluate_round(*game, [60], own_slice=[()] * 4, chunk=chunk, block=block)
        for chunk, block in ((None, None), (1, 1), (3, 7), (16, 59))
    ]
    same = {(r.losses, r.correct, r.values.tobytes()) for r in results}
    assert len(same) == 1


@cases
@shapes
def test_the_gradient_is_that_of_the_mean_validation_loss(case: TaskCase, hidden: tuple[int, ...]) -> None:
    model, schema, base, steps, examples = case.game(*hidden)
    slope = gradient(model, schema, base, examples)
    values = first_order_values(model, schema, base, steps, examples)
    np.testing.assert_allclose(values, -(steps @ slope), rtol=1e-12)
    for step in steps:
        ahead, behind = (evaluate(model, schema, base + h * step, examples)[0] for h in (1e-6, -1e-6))
        assert (ahead - behind) / 2e-6 == pytest.approx(step @ slope, abs=1e-7)


@cases
@shapes
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_each_examples_gradient_is_clipped_by_itself(case: TaskCase, hidden: tuple[int, ...], mode: Mode) -> None:
    model, schema, base, _, examples = case.game(*hidden, rows=40)
    module, loss = build(model, schema), LOSSES[case.loss]
    load_flat(module, base)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    own = np.empty((40, parameter_count(model, schema)))
    for row in range(40):
        module.zero_grad()
        torch.autograd.backward(loss(module(x[row : row + 1]), y[row : row + 1]).sum())
        own[row] = np.concatenate([p.grad.numpy().reshape(-1) for p in module.parameters() if p.grad is not None])
    norms = np.linalg.norm(own, axis=1)
    clip = float(np.median(norms))
    due = (own * np.minimum(1.0, clip / (norms + 1e-6))[:, None]).sum(axis=0)
    module.zero_grad()
    seen: list[Floats] = []

    def look(optimizer: SecureDPOptimizer, rows: int) -> None:
        assert rows == 40
        seen.append(np.concatenate([p.summed_grad.numpy().reshape(-1) for p in optimizer.params]))

    dp_sgd(
        module,
        x,
        y,
        steps=1,
        sample_rate=1 - 1e-12,
        noise_multiplier=1.0,
        max_grad_norm=clip,
        denominator=40,
        learning_rate=1.0,
        noise=FixedNoise(0),
        physical_batch=7,
        mode=mode,
        loss=loss,
        before_noise=look,
    )
    np.testing.assert_allclose(seen[0], due, atol=1e-12)
