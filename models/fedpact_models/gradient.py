"""The gradient of the validation loss, for values to first order: what each player's step would be worth alone.

It says whether estimated values go along with it, and decides whether more coalitions are drawn. Never paid by.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import FailedError
from fedpact_models.evaluate import UNIT
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import architecture, parameter_count
from fedpact_models.tasks import probabilities
from fedpact_models.weights import check_flat


def loss_gradient(model: Model, data: Data, flat: NDArray[np.floating], examples: Examples) -> Floats:
    """The gradient of the mean cross-entropy over the examples: weights [P] -> float64 [P].

    Raises:
        InputError: WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
    """
    check_flat(flat, parameter_count(model, data))
    weights, biases, start = [], [], 0
    for index, (inputs, outputs) in enumerate(architecture(model, data).layers):
        weights.append(np.asarray(flat[start : start + inputs * outputs], dtype=np.float64).reshape(outputs, inputs))
        start += inputs * outputs
        biases.append(flat[start : start + outputs] if index else 0.0)
        start += outputs if index else 0
    active = [examples.x]
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        scores = active[-1] @ weight.T + bias
        active.append(scores if index == len(weights) - 1 else np.maximum(scores, 0.0))
    back = probabilities(active[-1])
    back[np.arange(len(examples)), examples.y] -= 1.0
    back /= len(examples)
    parts: list[Floats] = []
    for index in reversed(range(len(weights))):
        own = [(back.T @ active[index]).ravel(), back.sum(axis=0)]
        parts[:0] = own if index else own[:1]
        back = (back @ weights[index]) * (active[index] > 0) if index else back
    return np.concatenate(parts)


def first_order(
    model: Model,
    data: Data,
    base: NDArray[np.floating],
    steps: Iterable[NDArray[np.floating]],
    examples: Examples,
) -> tuple[int, ...]:
    """Each player's value to first order, minus the gradient at the base model times its step, in 1e-9 nat.

    Args:
        model: The contract's model.
        data: The contract's schema.
        base: Weights before the round, float64 [P].
        steps: What each player would add, [P] each.
        examples: The validation set.

    Raises:
        InputError: WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    gradient = loss_gradient(model, data, base, examples)
    values = [-float(gradient @ step) * UNIT for step in steps]
    if not np.isfinite(values).all():
        raise FailedError("EVALUATION_NOT_FINITE", "A value to first order is not a finite number.")
    return tuple(round(value) for value in values)
