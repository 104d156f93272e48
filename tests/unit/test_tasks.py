"""Losses, gradients and metrics of each task, against torch and by hand."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch

from fedpact_contract.contract import ClassLabel, Label, NumberLabel, SurvivalLabel
from fedpact_models.dp import cross_entropy as trained_cross_entropy
from fedpact_models.dp import discrete_hazard, squared_error
from fedpact_models.features import Floats, Targets
from fedpact_models.tasks import Sums, Task, cross_entropy, predicted, probabilities, survival, task_of

CLASSES = ClassLabel(name="y", classes=("a", "b", "c"), rule="value")
NUMBER = NumberLabel(name="y", rule="number", low=Decimal(10), high=Decimal(30))
EVENT = SurvivalLabel(
    name="days", rule="survival", event="died", outcomes=("no", "yes"), cuts=(Decimal(10), Decimal(20), Decimal(50))
)
LABELS = [CLASSES, NUMBER, EVENT]
TRAINED = {
    "cross-entropy": trained_cross_entropy,
    "squared-error": squared_error,
    "discrete-hazard": discrete_hazard,
}


def _sample(label: Label, rows: int, spread: float) -> tuple[Task, Floats, Targets]:
    rng, task = np.random.default_rng(3), task_of(label)
    return task, rng.normal(size=(rows, task.outputs)) * spread, task.made_up(rng.random(rows))


def test_cross_entropy_is_that_of_torch_for_each_example() -> None:
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(3, 50, 7)) * 5, rng.integers(0, 7, 50)
    losses = cross_entropy(logits, y)
    for one, loss in zip(logits, losses, strict=True):
        expected = torch.nn.functional.cross_entropy(torch.from_numpy(one), torch.from_numpy(y), reduction="none")
        np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-13, atol=1e-14)


def test_cross_entropy_by_hand_and_at_the_extremes() -> None:
    logits = np.array([[0.0, 0.0], [0.0, math.log(3)], [1e4, -1e4], [-1e4, 1e4]])
    losses = cross_entropy(logits, np.array([0, 1, 0, 0]))
    assert losses == pytest.approx([math.log(2), math.log(4 / 3), 0.0, 2e4], rel=1e-15)


def test_an_examples_loss_does_not_depend_on_its_company() -> None:
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(4, 33, 5)), rng.integers(0, 5, 33)
    whole = cross_entropy(logits, y)
    for b in range(4):
        for v in range(33):
            assert cross_entropy(logits[b, v : v + 1], y[v : v + 1])[0] == whole[b, v]


def test_losses_of_sums_are_those_of_the_sums_each_on_its_own_whatever_their_size() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 33)
    for size in (0.3, 30.0, 900.0):
        added, logits = rng.normal(size=(8, 5, 33)) * size, rng.normal(size=(5, 33)) * size
        for part in (*added, logits):
            part -= part[y, np.arange(33)]
        whole = Sums(added, y).cross_entropy(logits, list(range(8)))
        expected = cross_entropy((logits + added).swapaxes(-2, -1), y)
        np.testing.assert_allclose(whole, expected, rtol=1e-13, atol=1e-14)
        for v in range(33):  # one example is added up by other code of numpy's
            one = Sums(added[..., v : v + 1].copy(), y[v : v + 1])
            for sets in ([3], [7, 0, 3], list(range(8))):
                assert one.cross_entropy(logits[:, v : v + 1].copy(), sets)[:, 0].tolist() == whole[sets, v].tolist()


def test_the_metric_counts_and_equal_logits_go_to_the_first_class() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
    assert predicted(logits).tolist() == [1, 0, 0]
    task, y = task_of(ClassLabel(name="y", classes=("a", "b"), rule="value")), np.array([1, 1, 0])
    assert task.marks(logits, y).tolist() == [1, 0, 1]
    assert task.count(task.marks(logits, y), y) == 2
    np.testing.assert_allclose(probabilities(logits).sum(axis=1), 1, rtol=1e-15)
    assert probabilities(logits)[2].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label.TASK)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_gradient_is_the_losses_by_finite_differences(label: Label, spread: float) -> None:
    task, scores, y = _sample(label, 200, spread)
    slope, step = task.gradient(scores, y), 1e-6
    for output in range(task.outputs):
        moved = scores.copy()
        moved[:, output] += step
        found = task.losses(moved, y)
        moved[:, output] -= 2 * step
        np.testing.assert_allclose((found - task.losses(moved, y)) / (2 * step), slope[:, output], atol=1e-8)


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label.TASK)
def test_what_is_trained_is_what_is_scored(label: Label) -> None:
    """Within the bounds: an output beyond them is cut where it is scored, and where it is trained it is not."""
    task, scores, y = _sample(label, 200, 0.3)
    scores = np.clip(scores, -0.99, 0.99)
    outputs = torch.from_numpy(scores).requires_grad_()
    losses = TRAINED[label.LOSS](outputs, torch.from_numpy(y))
    np.testing.assert_allclose(losses.detach().numpy(), task.losses(scores, y), rtol=1e-12)
    torch.autograd.backward(losses.sum())
    assert outputs.grad is not None
    np.testing.assert_allclose(outputs.grad.numpy(), task.gradient(scores, y), atol=1e-14)


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label.TASK)
def test_no_second_derivative_is_larger_than_the_noise_floor_believes(label: Label) -> None:
    task, scores, y = _sample(label, 50, 1.0)
    loss, targets = TRAINED[label.LOSS], torch.from_numpy(y)
    for row in range(50):

        def of_row(outputs: torch.Tensor, row: int = row) -> torch.Tensor:
            return loss(outputs[None], targets[row : row + 1]).sum()

        hessian = torch.autograd.functional.hessian(of_row, torch.from_numpy(scores[row]))
        assert float(torch.trace(hessian)) <= task.curvature + 1e-12


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label.TASK)
def test_targets_are_told_from_what_is_none(label: Label) -> None:
    task, _, y = _sample(label, 500, 1.0)
    assert task.are_targets(y)
    assert not task.are_targets(y + 1000)
    assert not task.are_targets(y - 1000)
    assert not task.are_targets(np.zeros(3, dtype=np.int64) if label is NUMBER else y.astype(np.float64))
    assert len(np.unique(y)) > 2


def test_an_error_is_bounded_and_a_tie_at_the_bound_has_no_gradient() -> None:
    task, y = task_of(NUMBER), np.array([-1.0, -1.0, 0.5, 1.0])
    scores = np.array([[1e9], [-7.0], [0.25], [3.0]])
    assert task.losses(scores, y).tolist() == [2.0, 0.0, 0.03125, 0.0]
    assert task.gradient(scores, y)[:, 0].tolist() == [0.0, 0.0, -0.25, 0.0]
    assert task.count(task.marks(scores, y), y) is None


def test_a_likelihood_is_that_of_the_intervals_seen() -> None:
    """Against the product that Gensheimer and Narasimhan write down, hazard by hazard."""
    task, scores, y = _sample(EVENT, 300, 2.0)
    hazards = 1 / (1 + np.exp(-scores))
    for row, code in enumerate(y.tolist()):
        lived, came = divmod(code, 2)
        likelihood = np.prod(1 - hazards[row, :lived]) * (hazards[row, lived] if came else 1.0)
        assert task.losses(scores, y)[row] == pytest.approx(-math.log(likelihood), rel=1e-12, abs=1e-15)
    np.testing.assert_allclose(survival(scores), np.cumprod(1 - hazards, axis=1), rtol=1e-11)


def test_what_was_not_seen_moves_no_loss_and_no_gradient() -> None:
    task, scores, y = task_of(EVENT), np.array([[0.3, -1.0, 2.0]]), np.array([2])  # censored after the first interval
    other = scores.copy()
    other[0, 1:] = [50.0, -1e6]
    assert task.losses(scores, y).tobytes() == task.losses(other, y).tobytes()
    assert task.gradient(other, y)[0, 1:].tolist() == [0.0, 0.0]
    assert task.losses(scores, np.array([0]))[0] == 0.0, "of whom nothing was seen there is nothing to lose"
    assert task.losses(np.full((1, 3), 1e4), np.array([6]))[0] == pytest.approx(3e4)


def test_the_concordance_is_that_of_a_loop_over_pairs() -> None:
    rng, task = np.random.default_rng(5), task_of(EVENT)
    y = task.made_up(rng.random(80))
    marks = np.round(rng.normal(size=80), 1)  # with ties
    pairs = right = 0
    for a in range(80):
        for b in range(80):
            if y[a] % 2 == 1 and y[b] // 2 > y[a] // 2:
                pairs += 1
                right += 2 * int(marks[a] < marks[b]) + int(marks[a] == marks[b])
    assert (task.count(marks, y), task.pairs(y)) == (right, pairs)
    assert task.count(np.zeros(80), y) == pairs, "a constant is chance: one half"
    lived = (y // 2).astype(np.float64)
    assert task.count(lived, y) == 2 * pairs
    assert task.count(-lived, y) == 0
    assert task.pairs(np.array([0, 2, 4])) == 0, "no event was seen"
    certain = np.array([[1e4, 0.0, 0.0], [-1e4, 1e4, 0.0]])
    with np.errstate(over="ignore"):
        assert task.marks(certain, np.array([1, 3])).tolist() == [0.0, 1.0]
