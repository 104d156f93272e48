"""The gradient of the validation loss and the first-order values: against torch, and against small steps."""

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_cnn, a_model, plain_schema, random_examples
from threadpoolctl import threadpool_limits

from fedpact_contract.contract import Model
from fedpact_contract.errors import FailedError, InputError
from fedpact_models.evaluate import evaluate_coalitions
from fedpact_models.features import Examples
from fedpact_models.gradient import first_order_values, gradient
from fedpact_models.registry import build, parameter_count
from fedpact_models.weights import load_flat

SHAPES = [
    pytest.param(a_model(), id="softmax"),
    *(pytest.param(a_model(*hidden), id=f"mlp-{len(hidden)}") for hidden in ((9,), (9, 6))),
    pytest.param(a_cnn(3, 4, (5, 2, 1)), id="cnn-1"),
    pytest.param(a_cnn(3, 2, (4, 2, 1), (3, 1, 1), channels=2, hidden=(6,)), id="cnn-2"),
]


def _setting(model: Model, rows: int = 60):
    rng = np.random.default_rng(11)
    schema = plain_schema(12, 5)
    count = parameter_count(model, schema)
    base, steps = rng.normal(size=count) * 0.5, rng.normal(size=(4, count)) * 1e-4
    return model, schema, base, steps, random_examples(rng, rows, 12, 5)


@pytest.mark.parametrize("model", SHAPES)
def test_the_gradient_is_that_of_torch(model: Model) -> None:
    model, schema, base, _, examples = _setting(model)
    module = build(model, schema)
    load_flat(module, base)
    torch.nn.functional.cross_entropy(module(torch.from_numpy(examples.x)), torch.from_numpy(examples.y)).backward()
    expected = np.concatenate([parameter.grad.reshape(-1).numpy() for parameter in module.parameters()])
    found = gradient(model, schema, base, examples)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("model", SHAPES)
def test_small_steps_are_worth_what_the_gradient_says(model: Model) -> None:
    model, schema, base, steps, examples = _setting(model)
    steps[2] = 0
    values = first_order_values(model, schema, base, steps, examples)
    losses = evaluate_coalitions(model, schema, base, steps, examples, [60], [0, 1, 2, 4, 8]).losses
    falls = [(losses[0][0] - loss[0]) / 60e9 for loss in losses[1:]]
    np.testing.assert_allclose(values, falls, atol=1e-7)
    assert max(map(abs, values)) > 5e-6
    assert values[2] == 0


def test_threads_move_no_bit_and_rows_may_be_float32() -> None:
    model, schema, base, steps, examples = _setting(a_model(9, 6))
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(first_order_values(model, schema, base, steps, examples))
    assert results[0] == results[1]
    single = first_order_values(model, schema, base, steps.astype(np.float32), examples)
    np.testing.assert_allclose(single, results[0], rtol=1e-5, atol=1e-10)


def test_what_does_not_fit_is_refused() -> None:
    model, schema, base, steps, examples = _setting(a_model(9))
    with pytest.raises(InputError, match="WEIGHTS_SHAPE"):
        first_order_values(model, schema, base, steps[:, 1:], examples)
    with pytest.raises(InputError, match="WEIGHTS_NOT_FINITE"):
        first_order_values(model, schema, base, np.full_like(steps, np.nan), examples)
    with pytest.raises(InputError, match="EVALUATION_INPUT"):
        gradient(model, schema, base, Examples(x=np.zeros((0, 13)), y=np.zeros(0, dtype=np.int64)))
    with pytest.raises(FailedError, match="EVALUATION_NOT_FINITE"):
        gradient(model, schema, np.full_like(base, 1e200), examples)
    with pytest.raises(FailedError, match="EVALUATION_NOT_FINITE"):
        first_order_values(model, schema, base, np.full_like(steps, 1e308), examples)
