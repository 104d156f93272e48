"""How many numbers a contract's rows and model have: from the contract alone, for every room."""

from itertools import pairwise

from fedpact_contract.contract import Data, Model, NumberColumn


def feature_count(data: Data) -> int:
    """Number of features d: one a number, one a vocabulary value, and the constant."""
    return 1 + sum(1 if isinstance(column, NumberColumn) else len(column.values) for column in data.columns)


def weight_shapes(model: Model, data: Data) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of each layer's weights, convolutions first; a filter's inputs are its window's numbers.

    The first layer has no bias of its own: the constant is among its inputs, in a convolution's every window.

    Raises:
        InputError: CONTRACT_IMAGE: a window is larger than what it looks at.
    """
    grids = model.grids
    found = [
        (layer.kernel**2 * before.channels + (index == 0), layer.filters)
        for index, (layer, before) in enumerate(zip(model.convolutions or (), grids[:-1], strict=True))
    ]
    flat = grids[-1].size if grids else feature_count(data)
    return (*found, *pairwise((flat, *model.hidden, data.label.outputs)))


def parameter_count(model: Model, data: Data) -> int:
    """Number of parameters P of a model of these data.

    For whoever recomputes without the models room, which builds the model and counts what it built.
    """
    return sum((inputs + (layer > 0)) * outputs for layer, (inputs, outputs) in enumerate(weight_shapes(model, data)))
