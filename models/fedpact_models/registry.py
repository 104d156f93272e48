"""Which models there are. A kind is one entry of `ARCHITECTURES`; all are stacks of dense layers with ReLU between.

The first layer has no bias of its own: the last feature is constant, and its weights are the bias (`features.encode`).

That shape is used in three places: `build` (training), `initial_weights` and `coalitions` (which exploits that the
first layer is linear in the weights). A kind of another shape needs its own path in `coalitions`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import InputError
from fedpact_contract.shape import feature_count
from fedpact_models.features import Floats
from fedpact_models.tasks import task_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A stack of dense layers: `widths` from features to the task's outputs; whether training starts from zeros."""

    widths: tuple[int, ...]
    zero_start: bool

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each layer."""
        return tuple(zip(self.widths[:-1], self.widths[1:], strict=True))


def _linear(_: Model, features: int, outputs: int) -> Dense:
    return Dense(widths=(features, outputs), zero_start=True)


def _mlp(model: Model, features: int, outputs: int) -> Dense:
    return Dense(widths=(features, *model.hidden, outputs), zero_start=False)


ARCHITECTURES: dict[str, Callable[[Model, int, int], Dense]] = {"softmax": _linear, "linear": _linear, "mlp": _mlp}
"""Model kind -> its shape, from the contract's model, the number of features and the number of the task's outputs."""


def architecture(model: Model, data: Data) -> Dense:
    """The model's shape.

    Raises:
        InputError: MODEL_UNKNOWN.
    """
    shape = ARCHITECTURES.get(model.kind)
    if shape is None:
        raise InputError(
            "MODEL_UNKNOWN",
            f"There is no model kind {model.kind}.",
            field="model.kind",
            remedy=f"Kinds are: {', '.join(sorted(ARCHITECTURES))}.",
        )
    return shape(model, feature_count(data), task_of(data.label).outputs)


def parameter_shapes(model: Model, data: Data) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes in the order of `build(...).named_parameters()`; needs no torch."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (inputs, outputs) in enumerate(architecture(model, data).layers):
        shapes[f"{2 * index}.weight"] = (outputs, inputs)
        if index:
            shapes[f"{2 * index}.bias"] = (outputs,)
    return shapes


def parameter_count(model: Model, data: Data) -> int:
    """Number of parameters P; needs no torch."""
    return sum(math.prod(shape) for shape in parameter_shapes(model, data).values())


def build(model: Model, data: Data) -> "torch.nn.Module":
    """The network in float64, a `Sequential` that Opacus takes; its weights are arbitrary until they are loaded."""
    from torch import float64, nn

    parts: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(architecture(model, data).layers):
        parts += [nn.Linear(inputs, outputs, bias=index > 0, dtype=float64), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def initial_weights(model: Model, data: Data, rng: np.random.Generator) -> Floats:
    """The weights that round 1 starts from, float64 [P], in the order of `parameter_shapes`.

    Zeros for softmax and linear (the loss is convex). For an mlp torch's own rule for `nn.Linear`, Kaiming-uniform with
    a = sqrt(5): weights and biases uniform in +-1/sqrt(inputs). `rng` is explicit: the contract names the result's
    digest.
    """
    shape = architecture(model, data)
    if shape.zero_start:
        return np.zeros(parameter_count(model, data))
    parts: list[Floats] = []
    for index, (inputs, outputs) in enumerate(shape.layers):
        bound = inputs**-0.5
        parts += [rng.uniform(-bound, bound, size) for size in (inputs * outputs, outputs)[: 2 if index else 1]]
    return np.concatenate(parts)
