"""The gradient behind first-order values, against torch's."""

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_model, plain_schema, random_examples

from fedpact_contract.errors import FailedError, InputError
from fedpact_models.evaluate import evaluate
from fedpact_models.gradient import first_order, loss_gradient
from fedpact_models.registry import build, parameter_count
from fedpact_models.weights import load_flat


@pytest.mark.parametrize("hidden", [(), (9,), (8, 6)])
def test_it_is_torchs(hidden: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    data, model = plain_schema(7, 4), a_model(*hidden)
    flat, examples = rng.normal(size=parameter_count(model, data)), random_examples(rng, 50, 7, 4)
    network = build(model, data)
    load_flat(network, flat)
    loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(examples.x)), torch.from_numpy(examples.y))
    loss.backward()
    due = np.concatenate([p.grad.numpy().ravel() for p in network.parameters() if p.grad is not None])
    np.testing.assert_allclose(loss_gradient(model, data, flat, examples), due, rtol=1e-10, atol=1e-14)


def test_a_small_step_is_worth_what_it_lowers_the_loss_by() -> None:
    rng = np.random.default_rng(2)
    data, model = plain_schema(7, 4), a_model(9)
    count = parameter_count(model, data)
    base, examples = rng.normal(size=count), random_examples(rng, 50, 7, 4)
    steps = [rng.normal(size=count) * 1e-6, np.zeros(count)]
    before, _ = evaluate(model, data, base, examples)
    after, _ = evaluate(model, data, base + steps[0], examples)
    value, nothing = first_order(model, data, base, steps, examples)
    assert value / 1e9 == pytest.approx(before - after, rel=1e-3)
    assert nothing == 0


def test_what_is_not_finite_is_refused() -> None:
    data, model = plain_schema(7, 4), a_model()
    count, examples = parameter_count(model, data), random_examples(np.random.default_rng(3), 9, 7, 4)
    with pytest.raises(InputError, match="finite"):
        loss_gradient(model, data, np.full(count, np.nan), examples)
    with pytest.raises(FailedError) as caught:
        first_order(model, data, np.zeros(count), [np.full(count, np.inf)], examples)
    assert caught.value.code == "EVALUATION_NOT_FINITE"
