"""Which models there are. A kind is one entry of `ARCHITECTURES`; all are stacks of layers with ReLU between.

A layer is dense, or a convolution: the same weights on each window of a picture. The first layer has no bias of its
own: the last feature is constant, and its weights are the bias (`features.encode`); of a convolution, it is the last
number in every window.

That shape is used in four places: `build` (training), `initial_weights`, `gradient`, and `coalitions` (which exploits
that the first layer is linear in the weights). A kind of another shape needs its own path in `coalitions`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Grid, Model
from fedpact_contract.errors import InputError
from fedpact_contract.shape import feature_count, weight_shapes
from fedpact_models.features import Floats

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Where a convolution looks: at all kernel x kernel places, `stride` apart, of a grid; and at a `constant`."""

    grid: Grid
    kernel: int
    stride: int
    constant: bool

    @property
    def count(self) -> int:
        """How many windows there are."""
        return math.prod((side - self.kernel) // self.stride + 1 for side in self.grid[1:])

    def places(self) -> NDArray[np.intp]:
        """Which of the incoming numbers each window holds, [inputs, count], in the order of the grid."""
        channels, height, width = self.grid
        top, left = (np.arange(0, side - self.kernel + 1, self.stride) for side in (height, width))
        plane = np.arange(channels)[:, None, None] * (height * width)
        inside = plane + np.arange(self.kernel)[:, None] * width + np.arange(self.kernel)
        found = inside.reshape(-1, 1) + (top[:, None] * width + left).reshape(-1)
        return np.pad(found, ((0, 1), (0, 0)), constant_values=self.grid.size) if self.constant else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights [outputs, inputs], of all that comes in; or of each window of it, and then each output of all windows."""

    inputs: int
    outputs: int
    windows: Windows | None = None

    @property
    def count(self) -> int:
        """How often the weights are used on one example."""
        return 1 if self.windows is None else self.windows.count

    @property
    def width(self) -> int:
        """How many numbers go out."""
        return self.count * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Layers, from the features to the task's outputs; whether training starts from zeros.

    `scale`: what features are multiplied by. A dense layer takes them as they are, of a norm of at most feature_scale
    (`features.encode`). A convolution's window is a few of them, and is brought to that norm by sqrt(d / its numbers).
    """

    features: int
    layers: tuple[Layer, ...]
    zero_start: bool
    scale: float = 1.0


def _linear(model: Model, data: Data) -> Stack:
    return _stack(model, data, zero_start=True)


def _network(model: Model, data: Data) -> Stack:
    return _stack(model, data, zero_start=False)


def _stack(model: Model, data: Data, *, zero_start: bool) -> Stack:
    features, grids = feature_count(data), model.grids
    windows = [
        Windows(grid=grid, kernel=layer.kernel, stride=layer.stride, constant=index == 0)
        for index, (layer, grid) in enumerate(zip(model.convolutions or (), grids[:-1], strict=True))
    ]
    found = tuple(
        Layer(inputs=inputs, outputs=outputs, windows=look)
        for (inputs, outputs), look in zip_longest(weight_shapes(model, data), windows)
    )
    scale = math.sqrt(features / found[0].inputs)
    return Stack(features=features, layers=found, zero_start=zero_start, scale=scale)


ARCHITECTURES: dict[str, Callable[[Model, Data], Stack]] = {
    "softmax": _linear,
    "linear": _linear,
    "mlp": _network,
    "cnn": _network,
}
"""Model kind -> its shape, from the contract's model and schema."""


def architecture(model: Model, data: Data) -> Stack:
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
    return shape(model, data)


def parameter_shapes(model: Model, data: Data) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes in the order of `build(...).named_parameters()`; needs no torch."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(architecture(model, data).layers):
        shapes[f"{2 * index}.weight"] = (layer.outputs, layer.inputs)
        if index:
            shapes[f"{2 * index}.bias"] = (layer.outputs,)
    return shapes


def parameter_count(model: Model, data: Data) -> int:
    """Number of parameters P; needs no torch."""
    return sum(math.prod(shape) for shape in parameter_shapes(model, data).values())


def build(model: Model, data: Data) -> "torch.nn.Module":
    """The network in float64, a `Sequential` that Opacus takes; its weights are arbitrary until they are loaded."""
    from torch import float64, nn

    from fedpact_models.windows import Look, Planes

    module, shape = nn.Sequential(), architecture(model, data)
    for index, layer in enumerate(shape.layers):
        linear = nn.Linear(layer.inputs, layer.outputs, bias=index > 0, dtype=float64)
        if layer.windows is None:
            module.add_module(str(2 * index), linear)
        else:
            module.add_module(f"look_{index}", Look(layer.windows, shape.scale if index == 0 else 1.0))
            module.add_module(str(2 * index), linear)
            module.add_module(f"planes_{index}", Planes())
        if index + 1 < len(shape.layers):
            module.add_module(str(2 * index + 1), nn.ReLU())
    return module


def initial_weights(model: Model, data: Data, rng: np.random.Generator) -> Floats:
    """The weights that round 1 starts from, float64 [P], in the order of `parameter_shapes`.

    Zeros for softmax and linear (the loss is convex). For an mlp and a cnn torch's own rule for `nn.Linear` and
    `nn.Conv2d`, Kaiming-uniform with a = sqrt(5): weights and biases uniform in +-1/sqrt(inputs). `rng` is explicit:
    the contract names the result's digest.
    """
    shape = architecture(model, data)
    if shape.zero_start:
        return np.zeros(parameter_count(model, data))
    parts: list[Floats] = []
    for index, layer in enumerate(shape.layers):
        bound, sizes = layer.inputs**-0.5, (layer.inputs * layer.outputs, layer.outputs)
        parts += [rng.uniform(-bound, bound, size) for size in sizes[: 2 if index else 1]]
    return np.concatenate(parts)
