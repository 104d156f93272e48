"""Loss and metric against torch and by hand."""

import math

import numpy as np
import pytest
import torch

from fedpact_models.tasks import Sums, accuracy, correct, cross_entropy, predicted, probabilities


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
    assert correct(logits, np.array([1, 1, 0])) == 2
    assert accuracy(logits, np.array([1, 1, 0])) == 2 / 3
    np.testing.assert_allclose(probabilities(logits).sum(axis=1), 1, rtol=1e-15)
    assert probabilities(logits)[2].tolist() == [0.5, 0.5]
