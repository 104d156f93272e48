"""The models of coalitions, and their outputs on one canonical path.

theta_S = base + the sum of the steps of the players in S, with no re-normalisation. The first layer, which has no bias,
is linear in the weights, so its outputs are computed once a player and then added up for each coalition; only the
layers behind the first ReLU, the tail, are computed coalition by coalition. A convolution is a matrix product of the
weights with what its windows hold.

What is added up over players (the outputs of the first layer, example by example; the tail, tensor by tensor) is first
rounded to a grid wide enough for the sum of all players' magnitudes. So no sum over players is rounded, and a coalition
has the same bits in whatever order it is built: from the one before it in the list, a player more or a player less.
Matrix products are those of `exact`; everything else is element by element, each example on its own, in a fixed order.

The grid is 2^-51 of that sum, 2^-43 where 785 products are summed behind it. A step a million times larger than the
others would coarsen their values to 1e-7: steps are clipped before.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import InputError
from fedpact_models.exact import (
    Halves,
    cut,
    half_bits,
    halves,
    joined,
    largest,
    positive_halves,
    product,
    round_and_cut,
    scale_above,
    to_grid,
)
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import Layer, Stack, architecture, parameter_count, parameter_shapes
from fedpact_models.tasks import Sums
from fedpact_models.weights import check_flat

TILE_ELEMENTS = 2**15
"""Activations (float64) of one layer that are worked on at a time: 256 KiB, so that a core's cache holds a few."""

NARROWEST = 256
"""Examples that are worked on at a time, at least, where a layer is so wide that the cache would hold fewer."""

WINDOWED = 48
"""As NARROWEST, where a convolution follows the first layer."""

CUT = 32
"""Examples whose features are cut at a time."""

LINEAR_ELEMENTS = 2**16
"""Powers (float64) of the sums that players apart add, which are multiplied at a time: 512 KiB."""

APART = 5
"""Players of a linear model whose sums are worked out apart, at most."""

STACKED = 256
"""Outputs of the first layer, of several players where it has few, that are one product."""

PART_ELEMENTS = 14 * 2**20
"""First-layer outputs (float64) of all players on one block of examples: 112 MiB. More players, fewer examples."""

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
    `scales`: the grid's scale for each of their tensors. `places`: for each layer which numbers its windows hold.
    `apart`: of a linear model players whose sums are worked out apart, at most half of all. Who they are depends on the
    steps alone; equal steps are apart together or not at all.
    """

    shape: Stack
    places: tuple[NDArray[np.intp] | None, ...]
    count: int
    weights: Callable[[int], Halves]
    tail: Callable[[int], Floats]
    scales: tuple[float, ...]
    apart: tuple[int, ...]


def prepare(model: Model, data: Data, base: NDArray[np.floating], steps: Rows, x: Floats) -> Game:
    """A round's models, for features [V, d]; reads every row once.

    Raises:
        InputError: EVALUATION_INPUT, WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
    """
    shape, size = architecture(model, data), parameter_count(model, data)
    if x.ndim != 2 or 0 in x.shape or x.shape[1] != shape.features:
        raise input_error(f"The features have the shape {x.shape}, which does not fit the model.")
    inputs, outputs, count = shape.layers[0].inputs, shape.layers[0].outputs, len(steps) + 1
    edges = np.cumsum([math.prod(tensor) for tensor in parameter_shapes(model, data).values()])  # ends; the first: 0

    def row(index: int) -> NDArray[np.floating]:
        return base if index == 0 else steps[index - 1]

    bounds = np.empty((count, len(edges) - 1))
    for index in range(count):
        flat = np.asarray(row(index))
        check_flat(flat, size)
        bounds[index] = [largest(flat[a:b], 0)[0] for a, b in pairwise(edges)]
    scales = tuple(_scale_of_sums(bounds).tolist())
    bits = [half_bits(terms) for layer in shape.layers[1:] for terms in (layer.inputs, 1)]

    def weights(index: int) -> Halves:
        matrix, parts = np.asarray(row(index)[: edges[0]]).reshape(outputs, inputs), np.empty((2, outputs, inputs))
        bits, rows = half_bits(inputs), max(1, TILE_ELEMENTS // inputs)
        scale = scale_above(largest(matrix, (0, 1)).astype(np.float64))
        for at in range(0, outputs, rows):  # that fit a core's cache
            inside = slice(at, at + rows)
            to_grid(matrix[inside], scale, bits, parts[1, inside])
            cut(parts[:, inside], scale, bits)
        return Halves(parts=parts)

    @lru_cache(maxsize=TAIL_ELEMENTS // max(1, size - int(edges[0])))
    def tail(index: int) -> Floats:
        values = np.array(row(index)[edges[0] :], dtype=np.float64)
        for (a, b), scale, half in zip(pairwise(edges - edges[0]), scales, bits, strict=True):
            to_grid(values[a:b], scale, half)
        return values

    apart = _apart(steps) if len(shape.layers) == 1 else ()
    places = tuple(None if layer.windows is None else layer.windows.places() for layer in shape.layers)
    return Game(shape=shape, places=places, count=count, weights=weights, tail=tail, scales=scales, apart=apart)


def _apart(steps: Rows) -> tuple[int, ...]:
    """Players by the digests of their steps."""
    rows = (np.asarray(steps[place], dtype=np.float64) + 0.0 for place in range(len(steps)))
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    order = sorted(range(len(steps)), key=digests.__getitem__)
    count = min(APART, len(steps) // 2)
    while count and digests[order[count - 1]] == digests[order[count]]:
        count -= 1
    return tuple(order[:count])


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
    first, *tail = game.shape.layers
    outputs = game.shape.layers[-1].outputs
    widest = max(first.width, *(layer.count * max(layer.inputs, layer.outputs) for layer in tail), outputs)
    wanted = max(TILE_ELEMENTS, 2 * len(game.tail(0))) // widest
    for rows, parts, scale in _blocks(game, x, block, wanted):
        walk = _Walk(game, parts, scale)
        count = rows.stop - rows.start
        size = min(len(masks), chunk or max(1, TILE_ELEMENTS // (count * outputs)))
        scores = np.empty((size, outputs, count))
        for done in range(0, len(masks), size):
            which = slice(done, min(done + size, len(masks)))
            for mask, logits in zip(masks[which], scores, strict=False):
                walk.to(mask, logits)
            yield which, rows, scores[: which.stop - done].swapaxes(-2, -1)


def linear_losses(
    game: Game, examples: Examples, masks: Sequence[int], chunk: int | None, block: int | None
) -> Iterator[tuple[list[int], slice, Floats, Callable[[int], Floats]]]:
    """A linear model's cross-entropies, float64 [coalitions, examples]: of which places in the list, of which examples.

    Exp of a sum is a product: it is worked out once for what each set of the players of `game.apart` adds, and once for
    each set of the others. Last comes what gives the logits [examples, classes] of one of these coalitions.
    """
    outputs, pieces = game.shape.layers[0].outputs, _pieces(game.apart, masks, chunk)
    for rows, parts, scale in _blocks(game, examples.x, block, LINEAR_ELEMENTS // (outputs << len(game.apart))):
        y = examples.y[rows].astype(np.int64, copy=False)
        parts -= parts[:, None, y, np.arange(len(y))]  # exact, and no class's loss depends on what is added to all
        walk, logits = _Walk(game, parts, scale), np.empty((outputs, len(y)))
        sums = Sums(walk.subsets(game.apart), y)
        for others, added, places in pieces:
            walk.to(others, logits)
            losses = sums.cross_entropy(logits, added)
            yield places, rows, losses, partial(sums.scores, logits, added)


def _pieces(apart: Sequence[int], masks: Sequence[int], chunk: int | None) -> list[tuple[int, list[int], list[int]]]:
    """The list by who is in a coalition but not apart: these others, which sets of those apart, at which places."""
    groups: dict[int, list[tuple[int, int]]] = {}
    everyone = sum(1 << player for player in apart)
    for place, mask in enumerate(masks):
        added = sum((mask >> player & 1) << bit for bit, player in enumerate(apart))
        groups.setdefault(mask & ~everyone, []).append((added, place))
    pieces = []
    for others, found in groups.items():
        found.sort()
        size = chunk or len(found)
        for at in range(0, len(found), size):
            some = found[at : at + size]
            pieces.append((others, [added for added, _ in some], [place for _, place in some]))
    return pieces


def _blocks(game: Game, x: Floats, block: int | None, wanted: int) -> Iterator[tuple[slice, Floats, Floats]]:
    """The examples in blocks of `block` or about `wanted`, each with a copy of what `_first_layer` says of it."""
    seen = [
        layer.count * max(layer.inputs, layer.outputs) for layer in game.shape.layers[1:] if layer.windows is not None
    ]
    held = min(len(x), block or max(1, PART_ELEMENTS // max(game.count * game.shape.layers[0].width, *seen, 1)))
    block = min(held, block or max(WINDOWED if seen else NARROWEST, wanted))
    held -= held % block
    for begin in range(0, len(x), held):
        parts, scale = _first_layer(game, x[begin : begin + held])
        for left in range(0, parts.shape[-1], block):
            inside = slice(left, left + block)
            here = np.ascontiguousarray(parts[..., inside])
            yield slice(begin + left, begin + left + here.shape[-1]), here, scale[inside]


def _first_layer(game: Game, x: Floats) -> tuple[Floats, Floats]:
    """The first layer's outputs for the base and each step, [N + 1, outputs, examples], on a grid, and its scale.

    The scale is each example's, a power of two, and the outputs are divided by it.
    """
    layer, outputs = game.shape.layers[0], game.shape.layers[0].outputs
    features = np.empty((2, *x.shape))
    for at in range(0, len(x), CUT):
        inside = slice(at, at + CUT)
        round_and_cut(x[inside] * game.shape.scale, 1, layer.inputs, features[:, inside])
    columns, places = features.swapaxes(-2, -1), game.places[0]
    parts = np.empty((game.count, layer.width, len(x)))
    together = max(1, STACKED // outputs)
    wide = len(x) if places is None else max(1, TILE_ELEMENTS // places.size)
    for at in range(0, game.count, together):
        weights = [game.weights(index).parts for index in range(at, min(at + together, game.count))]
        stacked = Halves(parts=np.concatenate(weights, axis=1))
        for left in range(0, len(x), wide):
            rows = slice(left, left + wide)
            found = _windowed(stacked, Halves(parts=columns[..., rows]), places)
            parts[at : at + together, :, rows] = found.reshape(len(weights), layer.width, -1)
    scale = _scale_of_sums(np.array([largest(part, 0)[0] for part in parts]))
    bits = half_bits(game.shape.layers[1].inputs if len(game.shape.layers) > 1 else 1)
    for part in parts:
        part /= scale
        to_grid(part, 1.0, bits)
    return parts, scale


def _windowed(weights: Halves, numbers: Halves, places: NDArray[np.intp] | None) -> Floats:
    """Products with what each window holds of numbers [numbers, examples]: [outputs, windows x examples].

    Without windows with all of them. One half after the other is laid out, so that a core's cache holds it.
    """
    if places is None:
        return product(weights, numbers)
    rows, terms = weights.parts.shape[1:]
    with_high = weights.parts.reshape(2 * rows, terms) @ np.take(numbers.high, places, axis=0).reshape(terms, -1)
    return joined(with_high, weights.high @ np.take(numbers.low, places, axis=0).reshape(terms, -1))


class _Walk:
    """A model on a block of examples, led from one coalition to the next."""

    def __init__(self, game: Game, parts: Floats, scale: Floats) -> None:
        """Start with nobody; `parts` and `scale` are those of `_first_layer`, of the block's examples, and its own."""
        self._game, self._parts, self._scale = game, parts, scale
        self._layers = game.shape.layers[1:]
        if not self._layers:
            parts *= scale
        self._first, self._tail, self._at = parts[0].copy(), game.tail(0).copy(), 0

    def subsets(self, players: Sequence[int]) -> Floats:
        """What the first layer gains by each set of these players, [2^players, outputs, examples]."""
        added = np.zeros((1, *self._first.shape))
        for player in players:
            added = np.concatenate([added, added + self._parts[player + 1]])
        return added

    def to(self, mask: int, logits: Floats) -> None:
        """Write a coalition's logits [classes, examples]; without a tail the next call reads them again."""
        changes = list(_changes(self._at, mask))
        self._at = mask
        if self._layers:
            for combine, row in changes:
                combine(self._tail, self._game.tail(row), out=self._tail)
            logits[...] = self._behind_first(changes)
            return
        if not changes:
            logits[...] = self._first
        for combine, row in changes:
            combine(self._first, self._parts[row], out=logits)
            self._first = logits

    def _behind_first(self, changes: list[tuple[np.ufunc, int]]) -> Floats:
        """The first layer's outputs after these changes, and from them the logits, [classes, examples]."""
        layer, *deeper = self._layers
        out = (self._dense if layer.windows is None else self._convolved)(layer, changes)
        out *= self._scale
        start = self._add_bias(out, layer, 0)
        for index, layer in enumerate(deeper, 1):
            np.maximum(out, 0.0, out=out)
            out = self._product(index, start, layer, positive_halves(out, layer.inputs))
            start = self._add_bias(out, layer, start)
        return out

    def _dense(self, layer: Layer, changes: list[tuple[np.ufunc, int]]) -> Floats:
        """What a dense layer makes of the first one's outputs after these changes, [outputs, examples]."""
        inputs, outputs = layer.inputs, layer.outputs
        bits, block = half_bits(inputs), self._first.shape[-1]
        tall = self._cut_tail(0, 0, inputs, outputs).parts.reshape(2 * outputs, inputs)
        with_high, with_low = np.zeros((2 * outputs, block)), np.zeros((outputs, block))
        size = max(TILE_ELEMENTS // block, 2 * outputs)
        cutting = np.empty((2, min(size, inputs), block))
        for at in range(0, inputs, size):
            tile = slice(at, min(at + size, inputs))
            first, hidden = self._first[tile], cutting[:, : tile.stop - at]
            for combine, row in changes:
                combine(first, self._parts[row, tile], out=first)
            np.maximum(first, 0.0, out=hidden[1])
            cut(hidden, 1.0, bits)
            with_high += tall[:, tile] @ hidden[0]
            with_low += tall[:outputs, tile] @ hidden[1]
        return joined(with_high, with_low)

    def _convolved(self, layer: Layer, changes: list[tuple[np.ufunc, int]]) -> Floats:
        """As `_dense`, of a convolution: [outputs x windows, examples]."""
        for combine, row in changes:
            combine(self._first, self._parts[row], out=self._first)
        cutting = np.empty((2, *self._first.shape))
        np.maximum(self._first, 0.0, out=cutting[1])
        cut(cutting, 1.0, half_bits(layer.inputs))
        return self._product(0, 0, layer, Halves(parts=cutting))

    def _product(self, index: int, start: int, layer: Layer, cutting: Halves) -> Floats:
        """A layer behind the first, without its bias, of its inputs [numbers, examples]."""
        weights = self._cut_tail(index, start, layer.inputs, layer.outputs)
        return _windowed(weights, cutting, self._game.places[index + 1]).reshape(layer.width, -1)

    def _add_bias(self, out: Floats, layer: Layer, start: int) -> int:
        """Add the bias of the layer that begins at `start` of the tail; returns where the next one begins."""
        begin = start + layer.inputs * layer.outputs
        each = out.reshape(layer.outputs, -1)  # a view
        each += self._tail[begin : begin + layer.outputs, None]
        return begin + layer.outputs

    def _cut_tail(self, index: int, start: int, inputs: int, outputs: int) -> Halves:
        """The weights of a layer behind the first."""
        weight = self._tail[start : start + inputs * outputs].reshape(outputs, inputs)
        return halves(weight, self._game.scales[2 * index], half_bits(inputs))


def _changes(before: int, mask: int) -> Iterator[tuple[np.ufunc, int]]:
    """What leads from one coalition to another: whether a row is added or taken off, and which."""
    changed = mask ^ before
    while changed:
        player = changed.bit_length() - 1
        changed ^= 1 << player
        yield (np.add if mask >> player & 1 else np.subtract), player + 1


def input_error(message: str) -> InputError:
    """What does not fit a round's evaluation: EVALUATION_INPUT."""
    return InputError("EVALUATION_INPUT", message, remedy="Check the contract's validation slices and its schema.")
