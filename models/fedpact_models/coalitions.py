"""The models of coalitions, and their outputs on one canonical path.

theta_S = base + the sum of the steps of the players in S, with no re-normalisation. The first layer, which has no bias,
is linear in the weights, so its outputs are computed once a player and then added up for each coalition; only the
layers behind the first ReLU, the tail, are computed coalition by coalition.

What is added up over players (the outputs of the first layer, example by example; the tail, tensor by tensor) is first
rounded to a grid wide enough for the sum of all players' magnitudes. So no sum over players is rounded, and a coalition
has the same bits in whatever order it is built: from the one before it in the list, a player more or a player less.
Matrix products are those of `exact`; everything else is element by element, each example on its own, in a fixed order.

The grid is 2^-51 of that sum, 2^-43 where 785 products are summed behind it. A step a million times larger than the
others would coarsen their values to 1e-7: steps are clipped before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import InputError
from fedpact_models.exact import Halves, half_bits, halves, largest, product, rounded_halves, scale_above, to_grid
from fedpact_models.features import Floats
from fedpact_models.registry import Dense, architecture, parameter_count, parameter_shapes
from fedpact_models.weights import check_flat

CHUNK_ELEMENTS = 2**15
"""Activations (float64) of one layer that are worked on at a time: 256 KiB, so that a core's cache holds a few."""

NARROWEST = 64
"""Examples that are worked on at a time, at least, where a layer is so wide that the cache would hold fewer."""

PART_ELEMENTS = 10 * 2**20
"""First-layer outputs (float64) of all players on one block of examples: 80 MiB. More players, fewer examples."""

TAIL_ELEMENTS = 6 * 2**20
"""Parameters (float64) behind the first layer that are kept, of players, and as many of a chunk's coalitions."""


class Rows(Protocol):
    """One row of float32 or float64 a player: an array [N, P] in memory or mapped, or something that reads on demand.

    Rows are read one at a time, some more than once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, player: int, /) -> NDArray[np.floating]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Game:
    """A model and its players: row 0 of what is added up is the base, row i + 1 the step of player i.

    `weights(row)`: the first layer's, cut in halves; `tail(row)`: the other layers' parameters [T], on their grid;
    `scales`: the grid's scale for each of their tensors.
    """

    shape: Dense
    count: int
    weights: Callable[[int], Halves]
    tail: Callable[[int], Floats]
    scales: tuple[float, ...]


def prepare(model: Model, data: Data, base: NDArray[np.floating], steps: Rows, x: Floats) -> Game:
    """A round's models, for features [V, d]; reads every row once.

    Raises:
        InputError: EVALUATION_INPUT, WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
    """
    shape, size = architecture(model, data), parameter_count(model, data)
    if x.ndim != 2 or 0 in x.shape or x.shape[1] != shape.widths[0]:
        raise input_error(f"The features have the shape {x.shape}, which does not fit the model.")
    (inputs, outputs), count = shape.layers[0], len(steps) + 1
    edges = np.cumsum([math.prod(tensor) for tensor in parameter_shapes(model, data).values()])  # ends; the first: 0

    def row(index: int) -> NDArray[np.floating]:
        return base if index == 0 else steps[index - 1]

    bounds = np.empty((count, len(edges) - 1))
    for index in range(count):
        flat = np.asarray(row(index))
        check_flat(flat, size)
        bounds[index] = [largest(flat[a:b], 0)[0] for a, b in pairwise(edges)]
    scales = tuple(_scale_of_sums(bounds).tolist())
    bits = [half_bits(terms) for width, _ in shape.layers[1:] for terms in (width, 1)]

    def weights(index: int) -> Halves:
        matrix = np.array(row(index)[: edges[0]], dtype=np.float64).reshape(outputs, inputs)
        return rounded_halves(matrix, (0, 1), inputs)

    @lru_cache(maxsize=TAIL_ELEMENTS // max(1, size - int(edges[0])))
    def tail(index: int) -> Floats:
        values = np.array(row(index)[edges[0] :], dtype=np.float64)
        for (a, b), scale, half in zip(pairwise(edges - edges[0]), scales, bits, strict=True):
            to_grid(values[a:b], scale, half)
        return values

    return Game(shape=shape, count=count, weights=weights, tail=tail, scales=scales)


def _scale_of_sums(bounds: Floats) -> Floats:
    """Scales above the sum of what the rows are bounded by, [N + 1, ...] -> [...]; the players' order moves nothing."""
    total = np.zeros(bounds.shape[1:])
    for bound in np.sort(bounds, axis=0):
        total += bound
    return scale_above(total)


def coalition_logits(
    game: Game, x: Floats, masks: Sequence[int], chunk: int | None, block: int | None
) -> Iterator[tuple[slice, slice, Floats]]:
    """All models' logits, chunk by chunk: which coalitions, which examples, float64 [coalitions, examples, classes].

    The classes lie before the examples in memory, and each chunk overwrites the one before.
    """
    widths = game.shape.widths[1:]
    held = min(len(x), block or max(1, PART_ELEMENTS // (game.count * widths[0])))
    wanted = max(CHUNK_ELEMENTS, 2 * len(game.tail(0))) // max(widths)
    block = min(held, block or max(NARROWEST, wanted))
    chunk = min(len(masks), chunk or max(1, CHUNK_ELEMENTS // (block * widths[-1])))
    for begin in range(0, len(x), held):
        parts, scale = _first_layer(game, x[begin : begin + held])
        for left in range(0, parts.shape[-1], block):
            inside = slice(left, left + block)
            rows = slice(begin + left, begin + left + parts[..., inside].shape[-1])
            models = _walk(game, parts[..., inside], masks)
            scores = np.empty((chunk, widths[-1], rows.stop - rows.start))
            for done in range(0, len(masks), chunk):
                which = slice(done, min(done + chunk, len(masks)))
                for place, (first, tail) in zip(range(which.stop - done), models, strict=False):
                    scores[place] = _behind_first(game, first, scale[inside], tail)
                yield which, rows, scores[: which.stop - done].swapaxes(-2, -1)


def _first_layer(game: Game, x: Floats) -> tuple[Floats, Floats]:
    """The first layer's outputs for the base and each step, [N + 1, outputs, examples], on a grid; its scale."""
    features = rounded_halves(np.ascontiguousarray(x.T), 0, x.shape[1])
    parts = np.empty((game.count, game.shape.widths[1], len(x)))
    for index in range(game.count):
        parts[index] = product(game.weights(index), features)
    scale = _scale_of_sums(np.array([largest(part, 0)[0] for part in parts]))
    bits = half_bits(game.shape.widths[1] if len(game.shape.layers) > 1 else 1)
    for part in parts:
        to_grid(part, scale, bits)
    return parts, scale


def _walk(game: Game, parts: Floats, masks: Sequence[int]) -> Iterator[tuple[Floats, Floats]]:
    """Each coalition's first-layer outputs and tail, from those of the one before; both arrays are reused."""
    first, tail, before = parts[0].copy(), game.tail(0).copy(), 0
    for mask in masks:
        changed = mask ^ before
        while changed:
            player = changed.bit_length() - 1
            changed ^= 1 << player
            combine = np.add if mask >> player & 1 else np.subtract
            combine(first, parts[player + 1], out=first)
            combine(tail, game.tail(player + 1), out=tail)
        before = mask
        yield first, tail


def _behind_first(game: Game, first: Floats, scale: Floats, tail: Floats) -> Floats:
    """From one model's first-layer outputs [h, V] and tail [T] to its logits, [classes, V]."""
    hidden, start = first, 0
    for index, (inputs, outputs) in enumerate(game.shape.layers[1:]):
        hidden, bits = np.maximum(hidden, 0.0), half_bits(inputs)
        cut = halves(hidden, scale, bits) if index == 0 else rounded_halves(hidden, 0, inputs)
        weight = tail[start : start + inputs * outputs].reshape(outputs, inputs)
        start += inputs * outputs
        hidden = product(halves(weight, game.scales[2 * index], bits), cut)
        hidden += tail[start : start + outputs, None]
        start += outputs
    return hidden


def input_error(message: str) -> InputError:
    """What does not fit a round's evaluation: EVALUATION_INPUT."""
    return InputError("EVALUATION_INPUT", message, remedy="Check the contract's validation slices and its schema.")
