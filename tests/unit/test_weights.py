"""Flat weights: the order, the round trip, the refusals."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_model, plain_schema
from torch import nn

from fedpact_contract.errors import InputError
from fedpact_models.registry import build, parameter_count
from fedpact_models.weights import energy, flatten, load_flat

SCHEMA = plain_schema(3, 2)


def test_the_order_is_layer_by_layer_weight_rows_then_bias() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    load_flat(module, np.arange(9.0))
    assert module[0].weight.tolist() == [[0, 1], [2, 3]]
    assert module[0].bias.tolist() == [4, 5]
    assert module[1].weight.tolist() == [[6, 7]]
    assert module[1].bias.tolist() == [8]
    assert flatten(module).tolist() == list(range(9))


def test_float64_comes_back_bit_for_bit_and_flatten_copies() -> None:
    model = a_model(4)
    flat = np.random.default_rng(0).normal(size=parameter_count(model, SCHEMA))
    module = build(model, SCHEMA)
    load_flat(module, flat)
    copy = flatten(module)
    np.testing.assert_array_equal(copy, flat)
    copy[:] = 0
    flat[:] = 1
    assert flatten(module).any()
    assert (flatten(module) != 1).all()


@pytest.mark.parametrize("flat", [np.zeros(7), np.zeros(9), np.zeros((8, 1)), np.zeros(0)])
def test_another_shape_is_refused(flat: np.ndarray) -> None:
    with pytest.raises(InputError, match="WEIGHTS_SHAPE"):
        load_flat(build(a_model(), SCHEMA), flat)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_and_nothing_changes(bad: float) -> None:
    module = build(a_model(), SCHEMA)
    before = flatten(module)
    flat = np.zeros(8)
    flat[7] = bad
    with pytest.raises(InputError, match="WEIGHTS_NOT_FINITE"):
        load_flat(module, flat)
    np.testing.assert_array_equal(flatten(module), before)
    assert all(p.requires_grad for p in module.parameters())
    assert torch.is_grad_enabled()


class TestEnergy:
    def test_it_is_the_sum_of_squares(self) -> None:
        rng = np.random.default_rng(1)
        for size, scale in ((1, 1.0), (650, 1e-6), (100_000, 3e4)):
            update = (rng.normal(size=size) * scale).astype("<f4")
            exact = sum(Fraction(float(x)) ** 2 for x in update)
            assert abs(energy(update) - exact) <= exact / 10**9
        assert energy(np.zeros(5, "<f4")) == 0
        assert energy(np.array([3, 4], "<f4")) == 25

    def test_it_does_not_depend_on_the_order(self) -> None:
        update = np.random.default_rng(2).normal(size=9_999).astype("<f4")
        assert energy(update) == energy(update[::-1]) == energy(np.sort(update))

    def test_what_is_not_finite_has_none(self) -> None:
        with pytest.raises(InputError) as caught:
            energy(np.array([1, np.inf], "<f4"))
        assert caught.value.code == "WEIGHTS_NOT_FINITE"
