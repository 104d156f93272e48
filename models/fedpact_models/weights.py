"""Weights as one flat array.

Order: `module.parameters()`, each tensor in C order; for our models that is, layer by layer, the weight matrix
[outputs, inputs] by rows, then the bias, which the first layer lacks.
"""

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.errors import InputError
from fedpact_models.features import Floats

if TYPE_CHECKING:
    import torch


def flatten(module: "torch.nn.Module") -> Floats:
    """The module's parameters, float64 [P], a copy."""
    parts = [p.detach().cpu().double().reshape(-1).numpy() for p in module.parameters()]
    return np.concatenate(parts)


def load_flat(module: "torch.nn.Module", flat: NDArray[np.floating]) -> None:
    """Set the module's parameters from a flat array [P], cast to each parameter's type.

    Raises:
        InputError: WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE; the module is then unchanged.
    """
    import torch

    parameters = list(module.parameters())
    check_flat(flat, sum(p.numel() for p in parameters))
    source, start = torch.from_numpy(np.array(flat, dtype=np.float64)), 0
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(source[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


def clipped(update: NDArray[np.floating], norm: float) -> Floats:
    """The update, float64 [P], shortened to this Euclidean norm where it is longer; what is not finite stays so."""
    exact = np.asarray(update, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        length = float(np.linalg.norm(exact))
        return exact * (norm / length) if length > norm else exact


def energy(update: NDArray[np.floating]) -> Fraction:
    """||D||^2 of an update [P], the same on every machine: squares on a grid on which their sum is exact.

    The grid is the finest one; what it leaves off is less than P^2 2^-53 of the largest square.

    Raises:
        InputError: WEIGHTS_NOT_FINITE.
    """
    squares = np.asarray(update, dtype=np.float64) ** 2
    if not np.isfinite(squares).all():
        raise InputError("WEIGHTS_NOT_FINITE", "A weight is not a finite number.", field="weights")
    largest = float(squares.max(initial=0.0))
    if largest == 0:
        return Fraction(0)
    exponent = math.frexp(largest)[1] + len(squares).bit_length() - 53
    return Fraction(int(np.rint(np.ldexp(squares, -exponent)).sum())) * Fraction(2) ** exponent


def check_flat(flat: NDArray[np.floating], count: int) -> None:
    """Raise unless the array is one flat array of `count` finite numbers.

    Raises:
        InputError: WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
    """
    if flat.shape != (count,):
        raise InputError(
            "WEIGHTS_SHAPE", f"The weights have the shape {flat.shape}; the model needs ({count},).", field="weights"
        )
    if not np.isfinite(flat).all():
        raise InputError("WEIGHTS_NOT_FINITE", "A weight is not a finite number.", field="weights")
