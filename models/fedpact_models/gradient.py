"""The gradient of the validation loss, and what it says that each player's step is worth: the first-order cross-check.

By hand, since all models are stacks of dense layers and convolutions, and with the products of `exact`: the same bits
everywhere. A convolution is taken window by window, in their order.
"""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import FailedError
from fedpact_models.coalitions import Rows, input_error
from fedpact_models.exact import product, rounded_halves
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import Stack, architecture, parameter_count, parameter_shapes
from fedpact_models.tasks import Task, task_of
from fedpact_models.weights import check_flat

LARGEST_TERM = 1e300

HELD_ELEMENTS = 2**24
"""Numbers (float64) of the widest layer that are held at a time: 128 MiB. The sum over more examples is one of sums."""


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused below
def first_order_values(
    model: Model, data: Data, base: NDArray[np.floating], steps: Rows, examples: Examples
) -> tuple[float, ...]:
    """-<gradient, step> for each player: the fall of the mean loss, were it linear in the weights.

    Args:
        model: The contract's model.
        data: The contract's schema.
        base: Weights before the round, float64 [P].
        steps: What each player would add, eta w_i D_i, [N, P], as in `evaluate_coalitions`; read once, row by row.
        examples: The validation set.

    Raises:
        InputError: EVALUATION_INPUT, WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    slope = gradient(model, data, base, examples)
    values = []
    for player in range(len(steps)):
        step = np.asarray(steps[player], dtype=np.float64)
        check_flat(step, len(slope))
        values.append(0.0 - _sum(slope * step))
    if not all(map(math.isfinite, values)):
        raise _not_finite()
    return tuple(values)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused below
def gradient(model: Model, data: Data, flat: NDArray[np.floating], examples: Examples) -> Floats:
    """The mean loss's gradient at these weights, float64 [P].

    Raises:
        InputError: EVALUATION_INPUT, WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    shape, count = architecture(model, data), len(examples)
    check_flat(flat, parameter_count(model, data))
    if examples.x.ndim != 2 or 0 in examples.x.shape or examples.x.shape[1] != shape.features:
        raise input_error(f"The features have the shape {examples.x.shape}, which does not fit the model.")
    tensors = _layers(model, data, np.asarray(flat, dtype=np.float64))
    rows = max(1, HELD_ELEMENTS // max(layer.count * max(layer.inputs, layer.outputs) for layer in shape.layers))
    result = np.zeros(len(flat))
    for at in range(0, count, rows):
        result += _of_rows(shape, *tensors, task_of(data.label), examples.take(np.arange(at, min(at + rows, count))))
    result /= count
    if not np.isfinite(result).all():
        raise _not_finite()
    return result


def _of_rows(shape: Stack, weights: list[Floats], biases: list[Floats], task: Task, examples: Examples) -> Floats:
    """The sum of these examples' gradients, [P]."""
    looks = [[slice(None)] if layer.windows is None else layer.windows.places().T for layer in shape.layers]
    count = len(examples)
    scores: Floats = np.empty(0)
    inputs = [np.ascontiguousarray(examples.x.T * shape.scale)]  # of each layer, [width, V]
    for weight, bias, windows in zip(weights, biases, looks, strict=True):
        each = [_product(weight, inputs[-1][window]) + bias for window in windows]
        scores = np.stack(each, axis=1).reshape(-1, count)
        inputs.append(np.maximum(scores, 0.0))
    slope = task.gradient(scores.T, examples.y).T  # by what goes out of a layer
    parts: list[Floats] = []
    for index in reversed(range(len(weights))):
        weight, below = weights[index], np.zeros_like(inputs[index])
        errors, own = slope.reshape(len(weight), -1, count), np.zeros_like(weight)  # [outputs, windows, V]
        for window, error in zip(looks[index], errors.swapaxes(0, 1), strict=True):
            own += _product(error, np.ascontiguousarray(inputs[index][window].T))
            if index:
                below[window] += _product(np.ascontiguousarray(weight.T), error)
        parts.insert(0, own.reshape(-1))
        if index:
            parts.insert(1, np.array([_sum(error.reshape(-1)) for error in errors]))
            slope = below * (inputs[index] > 0)
    return np.concatenate(parts)


def _layers(model: Model, data: Data, flat: Floats) -> tuple[list[Floats], list[Floats]]:
    """Weights [outputs, inputs] and biases [outputs, 1] of each layer; the first has the bias 0."""
    shapes = list(parameter_shapes(model, data).values())
    edges = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
    tensors = [flat[a:b].reshape(shape) for (a, b), shape in zip(pairwise(edges), shapes, strict=True)]
    return tensors[:1] + tensors[1::2], [np.zeros((1, 1)), *(bias[:, None] for bias in tensors[2::2])]


def _product(a: Floats, b: Floats) -> Floats:
    return product(rounded_halves(a, (0, 1), a.shape[1]), rounded_halves(b, 0, a.shape[1]))


def _sum(terms: Floats) -> float:
    """The exact sum, rounded; not a number where it may be beyond float64's range."""
    return math.fsum(terms.tolist()) if np.abs(terms).max() < LARGEST_TERM else math.nan


def _not_finite() -> FailedError:
    return FailedError("EVALUATION_NOT_FINITE", "The gradient of the validation loss is not finite.")
