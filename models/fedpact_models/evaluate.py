"""Validation: the losses of every coalition in one round, each player's value on each example, and plain evaluation.

theta_S = base + the sum of the steps of the players in S, a step being eta w_i D_i, with no re-normalisation: the
fixed-weight game. The first layer, which has no bias, is linear in the weights, so its outputs are computed once a
player and then added up for each coalition; only the layers behind the first ReLU are computed coalition by coalition.

One canonical path: matrix products come from `exact`, everything else is element by element in a fixed order (base,
then steps by rising player number). So the result has the same bits whatever the chunk size, the threads or the BLAS,
and a player whose step is zero has the value zero, exactly. What remains is numpy's exp and log, whose last bit depends
on the processor's instruction set: on another kind of processor a loss integer may now and then move by one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import FailedError, InputError
from fedpact_models.exact import matmul_transposed
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import architecture, parameter_count
from fedpact_models.tasks import correct, cross_entropy
from fedpact_models.weights import check_flat

UNIT = 10**9
"""Losses are kept as integers of 1e-9 nat."""

MAX_PLAYERS = 16
CHUNK_ELEMENTS = 2**19
"""Activations (float64) of one layer that a chunk of coalitions may take: 4 MiB, near the size of a cache."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundEvaluation:
    """One round's validation.

    `losses[mask][k]`: the sum over slice k of the loss of coalition `mask` (bit i: player i), in 1e-9 nat.
    `values`: float64 [N, V], player i's Shapley value on example x in nat; 0 on the rows it gave itself, the others
    scaled up so that the mean over all V rows is its value. `correct`: rightly classified rows before and after.
    """

    losses: tuple[tuple[int, ...], ...]
    values: Floats
    correct: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """The models of several coalitions: first-layer outputs [B, V, h] and the other layers' parameters [B, T]."""

    first: Floats
    rest: Floats

    def plus(self, other: "_Block") -> "_Block":
        return _Block(first=self.first + other.first, rest=self.rest + other.rest)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused below
def evaluate_round(
    model: Model,
    data: Data,
    base: NDArray[np.floating],
    steps: NDArray[np.floating],
    examples: Examples,
    slices: Sequence[int],
    *,
    own_slice: Sequence[int | None],
    chunk: int | None = None,
) -> RoundEvaluation:
    """Evaluate all 2^N coalitions of a round on the validation set.

    Memory: 2^N x V losses and, for each of log2(2^N / chunk) + 1 levels, one chunk of activations.

    Args:
        model: The contract's model.
        data: The contract's schema.
        base: Weights before the round, float64 [P].
        steps: What each player would add, eta w_i D_i, float64 [N, P]; players in the order of their ids.
        examples: The validation set, V rows, slices one after another.
        slices: Rows of each slice; they sum to V.
        own_slice: For each player the slice that it gave, or None.
        chunk: Coalitions computed together, a power of two; by default from the sizes. Moves no bit of the result.

    Raises:
        InputError: EVALUATION_INPUT (sizes that do not fit), WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    _check(steps, examples, slices, own_slice, chunk)
    _check_features(model, data, examples.x)
    for weights in (base, *steps):
        check_flat(weights, parameter_count(model, data))
    parts = np.vstack([base[None], steps]).astype(np.float64)
    players = len(steps)
    losses = np.empty((2**players, len(examples)))
    right: dict[int, int] = {}
    for first_mask, logits in _coalitions(model, data, parts, examples.x, chunk):
        losses[first_mask : first_mask + len(logits)] = cross_entropy(logits, examples.y)
        for mask in {0, 2**players - 1} & set(range(first_mask, first_mask + len(logits))):
            right[mask] = correct(logits[mask - first_mask], examples.y)
    if not np.isfinite(losses).all():
        raise FailedError("EVALUATION_NOT_FINITE", "A coalition's loss on the validation set is not a finite number.")
    edges = np.cumsum([0, *slices])
    return RoundEvaluation(
        losses=tuple(tuple(_unit_sum(row[a:b]) for a, b in pairwise(edges)) for row in losses),
        values=_without_own(shapley_by_example(losses), edges, own_slice),
        correct=(right[0], right[2**players - 1]),
    )


@np.errstate(over="ignore", invalid="ignore")
def evaluate(model: Model, data: Data, flat: NDArray[np.floating], examples: Examples) -> tuple[float, int]:
    """Mean cross-entropy in nat, and how many rows are classified rightly, by the same path as a round's coalitions.

    Raises:
        InputError: EVALUATION_INPUT (no rows, another number of features), WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    scores = logits(model, data, flat, examples.x)
    loss = cross_entropy(scores, examples.y)
    if not np.isfinite(loss).all():
        raise FailedError("EVALUATION_NOT_FINITE", "A loss on the validation set is not a finite number.")
    return math.fsum(loss.tolist()) / len(examples), correct(scores, examples.y)


def logits(model: Model, data: Data, flat: NDArray[np.floating], x: Floats) -> Floats:
    """The model's outputs: weights [P], features float64 [V, d] -> float64 [V, classes].

    Raises:
        InputError: EVALUATION_INPUT, WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
    """
    check_flat(flat, parameter_count(model, data))
    _check_features(model, data, x)
    ((_, result),) = _coalitions(model, data, np.asarray(flat, dtype=np.float64)[None], x, 1)
    return np.asarray(result[0])


def shapley_by_example(losses: Floats) -> Floats:
    """Exact Shapley values of the drop of each example's loss: losses [2^N, V] by mask -> values [N, V].

    phi_i = sum over S without i of |S|! (N - |S| - 1)! / N! (loss(S) - loss(S + i)). Differences come first, so that a
    player that changes nothing gets exactly 0.
    """
    masks = np.arange(len(losses))
    players = len(losses).bit_length() - 1
    sizes = np.array([int(mask).bit_count() for mask in masks])
    values = np.zeros((players, losses.shape[1]))
    for player in range(players):
        for size in range(players):
            coalitions = masks[(sizes == size) & (masks >> player & 1 == 0)]
            drop = np.zeros(losses.shape[1])
            for mask in coalitions:
                drop += losses[mask] - losses[mask | 1 << player]
            values[player] += drop / (players * math.comb(players - 1, size))
    return values


def _coalitions(model: Model, data: Data, parts: Floats, x: Floats, chunk: int | None) -> Iterator[tuple[int, Floats]]:
    """Logits of all coalitions, block by block: (the block's first mask, float64 [B, V, classes])."""
    shape = architecture(model, data)
    (inputs, outputs), players = shape.layers[0], len(parts) - 1
    weight, rest = parts[:, : inputs * outputs], parts[:, inputs * outputs :]
    first = matmul_transposed(x, weight.reshape(players + 1, outputs, inputs))
    single = [_Block(first=first[i : i + 1], rest=rest[i : i + 1]) for i in range(players + 1)]
    low = _low_players(players, len(x) * max(shape.widths[1:]), chunk)
    block = single[0]
    for step in single[1 : low + 1]:
        with_step = block.plus(step)
        block = _Block(
            first=np.concatenate([block.first, with_step.first]), rest=np.concatenate([block.rest, with_step.rest])
        )
    for high_mask, combined in _with_high(block, single[low + 1 :], 0):
        yield high_mask << low, _behind_first(shape.layers[1:], combined)


def _low_players(players: int, elements: int, chunk: int | None) -> int:
    """How many players vary inside a block: log2 of the block's coalitions."""
    wanted = chunk or max(1, CHUNK_ELEMENTS // elements)
    return min(players, wanted.bit_length() - 1)


def _with_high(block: _Block, steps: Sequence[_Block], mask: int) -> Iterator[tuple[int, _Block]]:
    """The block with each subset of the further steps, added by rising player number; one addition a block."""
    depth = mask.bit_length()
    yield mask, block
    for index in range(depth, len(steps)):
        yield from _with_high(block.plus(steps[index]), steps, mask | 1 << index)


def _behind_first(layers: Sequence[tuple[int, int]], block: _Block) -> Floats:
    """From first-layer outputs to logits, [B, V, classes]."""
    hidden, start = block.first, 0
    for inputs, outputs in layers:
        weight = block.rest[:, start : start + inputs * outputs].reshape(-1, outputs, inputs)
        start += inputs * outputs
        hidden = matmul_transposed(np.maximum(hidden, 0.0), weight) + block.rest[:, None, start : start + outputs]
        start += outputs
    return hidden


def _without_own(values: Floats, edges: NDArray[np.int64], own_slice: Sequence[int | None]) -> Floats:
    """Zero each player's values on its own slice and rescale the rest, so that the mean is that of the others' rows."""
    result = values.copy()
    count = values.shape[1]
    for player, own in enumerate(own_slice):
        if own is not None:
            begin, end = edges[own], edges[own + 1]
            result[player] *= count / (count - (end - begin))
            result[player, begin:end] = 0.0
    return result


def _unit_sum(losses: Floats) -> int:
    """The exact sum, rounded to a float64, then half-even to units of 1e-9 nat."""
    return round(Fraction(math.fsum(losses.tolist())) * UNIT)


def _check(
    steps: NDArray[np.floating],
    examples: Examples,
    slices: Sequence[int],
    own_slice: Sequence[int | None],
    chunk: int | None,
) -> None:
    count = len(examples)
    problem = None
    if steps.ndim != 2 or not 1 <= len(steps) <= MAX_PLAYERS:
        problem = f"The steps have the shape {steps.shape}; they are [N, P] with N from 1 to {MAX_PLAYERS}."
    elif not slices or min(slices) < 1 or sum(slices) != count:
        problem = f"The slices have {sum(slices)} rows and the validation set has {count}."
    elif len(own_slice) != len(steps):
        problem = f"{len(own_slice)} own slices are given for {len(steps)} players."
    elif any(own is not None and not 0 <= own < len(slices) for own in own_slice):
        problem = "A player's own slice does not exist."
    elif any(own is not None and slices[own] == count for own in own_slice):
        problem = "A player's own slice is the whole validation set: there is nothing to score it on."
    elif chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        problem = "The chunk is not a power of two."
    if problem:
        raise _input_error(problem)


def _check_features(model: Model, data: Data, x: Floats) -> None:
    if x.ndim != 2 or 0 in x.shape or x.shape[1] != architecture(model, data).widths[0]:
        raise _input_error(f"The features have the shape {x.shape}, which does not fit the model.")


def _input_error(message: str) -> InputError:
    return InputError("EVALUATION_INPUT", message, remedy="Check the contract's validation slices and its schema.")
