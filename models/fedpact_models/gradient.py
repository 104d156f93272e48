"""The gradient of the mean validation loss: how steep the loss is where a round begins. numpy only."""

import numpy as np

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import FailedError
from fedpact_models.evaluate import logits
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import architecture


def loss_gradient(model: Model, data: Data, flat: Floats, examples: Examples) -> Floats:
    """Of the mean cross-entropy with respect to the weights, float64 [P], in the order of `weights.flatten`.

    Raises:
        InputError: as `evaluate.logits`.
        FailedError: EVALUATION_NOT_FINITE.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        outputs = logits(model, data, flat, examples.x)
        inputs, weights = _forward(model, data, np.asarray(flat, dtype=np.float64), examples.x)
        error = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(examples)), examples.y] -= 1
        error /= len(examples)
        parts: list[Floats] = []
        for index in reversed(range(len(weights))):
            bias = [error.sum(axis=0)] if index else []
            parts = [(error.T @ inputs[index]).reshape(-1), *bias, *parts]
            error = (error @ weights[index]) * (inputs[index] > 0)
        result = np.concatenate(parts)
    if not np.isfinite(result).all():
        raise FailedError("EVALUATION_NOT_FINITE", "The gradient of the validation loss is not finite.")
    return result


def _forward(model: Model, data: Data, flat: Floats, x: Floats) -> tuple[list[Floats], list[Floats]]:
    """Each layer's inputs [V, inputs] and weights [outputs, inputs]."""
    inputs, weights, start = [x], [], 0
    layers = architecture(model, data).layers
    for index, (width, outputs) in enumerate(layers):
        weights.append(flat[start : start + width * outputs].reshape(outputs, width))
        start += width * outputs
        bias = flat[start : start + outputs] if index else 0.0
        start += outputs if index else 0
        if index + 1 < len(layers):
            inputs.append(np.maximum(inputs[-1] @ weights[-1].T + bias, 0.0))
    return inputs, weights
