"""The gradient of the validation loss is torch's."""

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_model, plain_schema, random_examples
from torch.nn import functional

from fedpact_contract.errors import FailedError
from fedpact_models.gradient import loss_gradient
from fedpact_models.registry import build, parameter_count
from fedpact_models.weights import load_flat


@pytest.mark.parametrize("hidden", [(), (5,), (7, 4)])
def test_it_is_the_gradient_that_torch_finds(hidden) -> None:
    data, model, rng = plain_schema(6, 3), a_model(*hidden), np.random.default_rng(0)
    flat, examples = rng.normal(size=parameter_count(model, data)), random_examples(rng, 40, 6, 3)
    module = build(model, data)
    load_flat(module, flat)
    torch.autograd.backward(
        functional.cross_entropy(module(torch.from_numpy(examples.x)), torch.from_numpy(examples.y))
    )
    expected = np.concatenate([p.grad.numpy().reshape(-1) for p in module.parameters()])
    assert loss_gradient(model, data, flat, examples) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_what_is_not_finite_is_refused() -> None:
    data, model, rng = plain_schema(6, 3), a_model(5), np.random.default_rng(0)
    with pytest.raises(FailedError) as caught:
        loss_gradient(model, data, np.full(parameter_count(model, data), 1e200), random_examples(rng, 40, 6, 3))
    assert caught.value.code == "EVALUATION_NOT_FINITE"
