"""Validation: the losses of coalitions in one round, each player's value on each example, and plain evaluation.

The fixed-weight game: theta_S = base + the sum of the steps of the players in S, a step being eta w_i D_i. `coalitions`
computes the models' outputs on one canonical path, `tasks` the losses, example by example. So the result has the same
bits whatever the list of coalitions, the blocks of examples, the chunk size, the threads or the BLAS; a player whose
step is zero has the value zero, and players with equal steps have equal values, exactly. What remains is numpy's exp
and log, whose last bit depends on the processor's instruction set: on another kind of processor a loss integer may now
and then move by one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import FailedError
from fedpact_models.coalitions import Game, Rows, coalition_logits, input_error, linear_losses, prepare
from fedpact_models.exact import product, rounded_halves
from fedpact_models.features import Examples, Floats
from fedpact_models.tasks import Classification, Task, counts, task_of

UNIT = 10**9
"""Losses are kept as integers of 1e-9 nat."""

MAX_PLAYERS = 16
"""In a round of which all coalitions are evaluated."""

MAX_LISTED_PLAYERS = 128
"""In a list of coalitions."""

LARGEST_LOSS = 2.0**30
"""Nat: a loss from here on is refused like one that is not finite."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoalitionLosses:
    """The losses of a list of coalitions.

    `losses[m][k]`: the sum over slice k of the loss of the m-th coalition, in 1e-9 nat. `by_example`: float64 [M, V] in
    nat, from which any estimator that is linear in the losses can be carried example by example. `correct`: what the
    task counts (rightly classified rows) of nobody's model and of everybody's, by mask, where these are in the list;
    empty where it counts nothing.
    """

    losses: tuple[tuple[int, ...], ...]
    by_example: Floats
    correct: dict[int, int]

    def ends(self, before: int, after: int) -> tuple[int, int] | None:
        """What the task counts of these two coalitions."""
        return (self.correct[before], self.correct[after]) if self.correct else None

    def joined(self, more: "CoalitionLosses") -> "CoalitionLosses":
        """This list and then another one."""
        return CoalitionLosses(
            losses=self.losses + more.losses,
            by_example=np.concatenate([self.by_example, more.by_example]),
            correct=self.correct | more.correct,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundEvaluation:
    """One round's validation.

    `losses[mask][k]`: the sum over slice k of the loss of coalition `mask` (bit i: player i), in 1e-9 nat.
    `values`: float64 [N, V], player i's Shapley value on example x in nat; 0 on the rows it gave itself, the others
    scaled up so that the mean over all V rows is its value. `correct`: what the task counts before and after.
    """

    losses: tuple[tuple[int, ...], ...]
    values: Floats
    correct: tuple[int, int] | None


class Evaluate(Protocol):
    """What gives a list of coalitions its losses, as `evaluate_coalitions` does."""

    def __call__(
        self,
        model: Model,
        data: Data,
        base: NDArray[np.floating],
        steps: Rows,
        examples: Examples,
        slices: Sequence[int],
        masks: Sequence[int],
    ) -> CoalitionLosses:
        """The losses of this list."""
        ...


def evaluate_round(
    model: Model,
    data: Data,
    base: NDArray[np.floating],
    steps: Rows,
    examples: Examples,
    slices: Sequence[int],
    *,
    own_slice: Sequence[Sequence[int]],
    chunk: int | None = None,
    block: int | None = None,
) -> RoundEvaluation:
    """Evaluate all 2^N coalitions of a round on the validation set.

    Args:
        model: The contract's model.
        data: The contract's schema.
        base: Weights before the round, float64 [P].
        steps: What each player would add, eta w_i D_i, [N, P]; players in the order of their ids.
        examples: The validation set, V rows, slices one after another.
        slices: Rows of each slice; they sum to V.
        own_slice: For each player the slices on which it is not scored, such as its own.
        chunk: Coalitions computed together; by default from the sizes. Moves no bit of the result.
        block: Examples computed together; as `chunk`.

    Raises:
        InputError: EVALUATION_INPUT (sizes that do not fit), WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    if not 1 <= len(steps) <= MAX_PLAYERS:
        raise input_error(f"There are {len(steps)} steps; all coalitions are evaluated of 1 to {MAX_PLAYERS} players.")
    masks = gray(len(steps))
    found = evaluate_coalitions(model, data, base, steps, examples, slices, masks, chunk=chunk, block=block)
    return of_all(found, masks, slices, own_slice)


def gray(players: int) -> tuple[int, ...]:
    """All coalitions, in the order of Gray's code: neighbours differ in one player."""
    return tuple(place ^ place >> 1 for place in range(2**players))


def of_all(
    found: CoalitionLosses, masks: Sequence[int], slices: Sequence[int], own_slice: Sequence[Sequence[int]]
) -> RoundEvaluation:
    """A round's evaluation from the losses of all its coalitions, listed in this order.

    Raises:
        InputError: EVALUATION_INPUT: own slices that are none.
    """
    _check_own(slices, own_slice, (len(masks) - 1).bit_length())
    values = shapley_by_example(found.by_example, masks)
    return RoundEvaluation(
        losses=tuple(found.losses[place] for place in np.argsort(masks)),
        values=_without_own(values, np.cumsum([0, *slices]), own_slice),
        correct=found.ends(0, len(masks) - 1),
    )


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused below
def evaluate_coalitions(
    model: Model,
    data: Data,
    base: NDArray[np.floating],
    steps: Rows,
    examples: Examples,
    slices: Sequence[int],
    masks: Sequence[int],
    *,
    chunk: int | None = None,
    block: int | None = None,
) -> CoalitionLosses:
    """Evaluate a list of coalitions, as the prefixes of permutations and their complements give it, in any order.

    A coalition's integers are those of `evaluate_round`, which is this function on the list of all.

    Memory beside the losses [M, V], see `coalitions`: PART_ELEMENTS, twice TAIL_ELEMENTS (one model where that is
    more), and a few chunks of activations. `steps` is read row by row, so that it may lie on a disk. Consecutive
    coalitions that differ in few players are faster, most where the layers behind the first have many parameters.

    Args:
        model: The contract's model.
        data: The contract's schema.
        base: Weights before the round, float64 [P].
        steps: What each player would add, eta w_i D_i, [N, P], N up to 128; 0 for one model on its own.
        examples: The validation set, V rows, slices one after another.
        slices: Rows of each slice; they sum to V.
        masks: The coalitions; bit i: player i.
        chunk: Coalitions computed together; by default from the sizes. Moves no bit of the result.
        block: Examples computed together; as `chunk`.

    Raises:
        InputError: EVALUATION_INPUT (sizes that do not fit), WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    check_coalitions(len(steps), examples, slices, masks, chunk, block)
    return added_up(data, *by_example_losses(model, data, base, steps, examples, masks, chunk, block), examples, slices)


@np.errstate(over="ignore", invalid="ignore")
def by_example_losses(
    model: Model,
    data: Data,
    base: NDArray[np.floating],
    steps: Rows,
    examples: Examples,
    masks: Sequence[int],
    chunk: int | None = None,
    block: int | None = None,
) -> tuple[Floats, dict[int, Floats]]:
    """What `added_up` adds up: example by example, so that several may each take some of the examples.

    Returns:
        The losses [M, V], and the task's marks [V] of nobody's model and of everybody's, where these are in the list.
    """
    game, task = prepare(model, data, base, steps, examples.x), task_of(data.label)
    by_example = np.empty((len(masks), len(examples)))
    marks = {mask: np.empty(len(examples)) for mask in {0, 2 ** len(steps) - 1} & set(masks)}
    places = {masks.index(mask): mask for mask in marks}
    for which, rows, losses, scores in _losses(game, task, examples, masks, chunk, block):
        by_example[which, rows] = losses
        for place in places.keys() & set(which):
            marks[places[place]][rows] = task.marks(scores(which.index(place)), examples.y[rows])
    return by_example, marks


def added_up(
    data: Data, by_example: Floats, marks: Mapping[int, Floats], examples: Examples, slices: Sequence[int]
) -> CoalitionLosses:
    """A list's losses from those of `by_example_losses`.

    Raises:
        FailedError: EVALUATION_NOT_FINITE.
    """
    right = counts(task_of(data.label), marks.items(), examples.y)
    return CoalitionLosses(losses=unit_sums(by_example, slices), by_example=by_example, correct=right)


def _losses(
    game: Game, task: Task, examples: Examples, masks: Sequence[int], chunk: int | None, block: int | None
) -> Iterator[tuple[list[int], slice, Floats, Callable[[int], Floats]]]:
    """As `linear_losses`, of any model and task."""
    if len(game.shape.layers) == 1 and isinstance(task, Classification):
        yield from linear_losses(game, examples, masks, chunk, block)
    else:
        for which, rows, scores in coalition_logits(game, examples.x, masks, chunk, block):
            places = list(range(which.start, which.stop))
            yield places, rows, task.losses(scores, examples.y[rows]), scores.__getitem__


@np.errstate(over="ignore", invalid="ignore")
def evaluate(model: Model, data: Data, flat: NDArray[np.floating], examples: Examples) -> tuple[float, int | None]:
    """Mean loss, and what the task counts (rightly classified rows), by the same path as a round's coalitions.

    Raises:
        InputError: EVALUATION_INPUT (no rows, another number of features), WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    scores, task = logits(model, data, flat, examples.x), task_of(data.label)
    loss = task.losses(scores, examples.y)
    if not np.isfinite(loss).all():
        raise FailedError("EVALUATION_NOT_FINITE", "A loss on the validation set is not a finite number.")
    return math.fsum(loss.tolist()) / len(examples), task.count(task.marks(scores, examples.y), examples.y)


def logits(model: Model, data: Data, flat: NDArray[np.floating], x: Floats) -> Floats:
    """The model's outputs: weights [P], features float64 [V, d] -> float64 [V, classes].

    Raises:
        InputError: EVALUATION_INPUT, WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
    """
    game = prepare(model, data, flat, np.empty((0, 0)), x)
    return np.vstack([scores[0].copy() for _, _, scores in coalition_logits(game, x, [0], None, None)])


def shapley_by_example(losses: Floats, masks: Sequence[int] | None = None) -> Floats:
    """Exact Shapley values of the drop of each example's loss: losses [2^N, V] -> values [N, V].

    The losses are in the order of `masks`, which are all; by default of rising masks.

    phi_i = sum over S without i of |S|! (N - |S| - 1)! / N! (loss(S) - loss(S + i)), as an exact product: so a player
    that changes nothing gets exactly 0, and players that change the same get the same.
    """
    count = len(losses)
    players = count.bit_length() - 1
    factors = np.array([1 / (players * math.comb(players - 1, size)) for size in range(players)])
    order = np.arange(count) if masks is None else np.array(masks)
    sizes = np.array([mask.bit_count() for mask in order.tolist()])
    coefficients = np.empty((players, count))
    for player in range(players):
        inside = order >> player & 1
        coefficients[player] = factors[sizes - inside] * (1 - 2 * inside)
    cut = rounded_halves(coefficients, (0, 1), count)
    blocks = [losses[:, at : at + 64] for at in range(0, losses.shape[1], 64)]  # that a few fit a core's cache
    return np.hstack([product(cut, rounded_halves(block, 0, count)) for block in blocks])


def unit_sums(losses: Floats, slices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Each slice's sum, [M, V] -> [M][slices]: of the losses cut to 2^-52 nat, exactly; then half-even to 1e-9 nat.

    Raises:
        FailedError: EVALUATION_NOT_FINITE.
    """
    starts = np.cumsum([0, *slices[:-1]])
    result: list[tuple[int, ...]] = []
    scaled, units = np.empty((32, losses.shape[1])), np.empty((32, losses.shape[1]), dtype=np.int64)
    for at in range(0, len(losses), 32):
        part = losses[at : at + 32]
        largest = max(-part.min(), part.max())
        if not largest < LARGEST_LOSS:
            raise FailedError(
                "EVALUATION_NOT_FINITE",
                "A coalition's loss on an example of the validation set is not a finite number below 2^30 nat.",
            )
        fine = np.multiply(part, 2.0**52, out=scaled[: len(part)])
        if largest < 2.0**10:
            units[: len(part)] = fine  # cuts
            sums = np.add.reduceat(
                units[: len(part)], starts, axis=1
            ).tolist()  # modulo 2^64: the rest by a float's sum
            near = np.add.reduceat(fine, starts, axis=1).tolist()
            exact = [list(map(_of_residue, *pair)) for pair in zip(sums, near, strict=True)]
        else:
            exact = [[sum(map(int, cut.tolist())) for cut in np.split(row, starts[1:])] for row in fine]
        result += (tuple(map(_nanonats, row)) for row in exact)
    return tuple(result)


def _of_residue(residue: int, near: float) -> int:
    """The integer near `near`, nearer than 2^63, that leaves this residue modulo 2^64."""
    return residue + (int(near) - residue + (1 << 63) >> 64 << 64)


def _nanonats(exact: int) -> int:
    """A sum in 2^-52 nat, in 1e-9 nat, half-even."""
    exact, half = exact * UNIT, 1 << 51
    floor = exact >> 52
    rest = exact - (floor << 52)
    return floor + (rest > half or (rest == half and floor & 1))


def estimated_by_example(
    found: CoalitionLosses,
    masks: Sequence[int],
    factors: Sequence[Mapping[int, Fraction]],
    slices: Sequence[int],
    own_slice: Sequence[Sequence[int]],
) -> Floats:
    """Each player's estimated value on each example, as `RoundEvaluation.values`: an estimator is linear in the losses.

    Args:
        found: The losses of coalitions.
        masks: Which they are.
        factors: For each player the factor of each coalition's utility in its value (`estimators.coefficients`).
        slices: Rows of each slice.
        own_slice: For each player the slices on which it is not scored.

    Returns:
        float64 [N, V].
    """
    _check_own(slices, own_slice, len(factors))
    values = np.zeros((len(factors), found.by_example.shape[1]))
    for mask, losses in zip(
        masks, found.by_example, strict=True
    ):  # in this order: a matrix product has none of its own
        values -= np.array([float(of.get(mask, 0)) for of in factors])[:, None] * losses
    return _without_own(values, np.cumsum([0, *slices]), own_slice)


def _without_own(values: Floats, edges: NDArray[np.int64], own_slice: Sequence[Sequence[int]]) -> Floats:
    """Zero each player's values on its own slices and rescale the rest: the mean is that of the others' rows."""
    result = values.copy()
    count = values.shape[1]
    for player, own in enumerate(own_slice):
        if own:
            result[player] *= count / (count - sum(edges[k + 1] - edges[k] for k in own))
            for k in own:
                result[player, edges[k] : edges[k + 1]] = 0.0
    return result


def check_coalitions(
    players: int,
    examples: Examples,
    slices: Sequence[int],
    masks: Sequence[int],
    chunk: int | None = None,
    block: int | None = None,
) -> None:
    """Refuse sizes that do not fit.

    Raises:
        InputError: EVALUATION_INPUT.
    """
    count = len(examples)
    problem = None
    if players > MAX_LISTED_PLAYERS:
        problem = f"There are {players} steps; coalitions are of at most {MAX_LISTED_PLAYERS} players."
    elif not slices or min(slices) < 1 or sum(slices) != count:
        problem = f"The slices have {sum(slices)} rows and the validation set has {count}."
    elif not masks:
        problem = "There is no coalition to evaluate."
    elif min(masks) < 0 or max(masks) >> players:
        problem = f"A coalition is not a set of the {players} players."
    elif any(size is not None and size < 1 for size in (chunk, block)):
        problem = "A chunk or a block is not at least 1."
    if problem:
        raise input_error(problem)


def _check_own(slices: Sequence[int], own_slice: Sequence[Sequence[int]], players: int) -> None:
    problem = None
    if len(own_slice) != players:
        problem = f"{len(own_slice)} own slices are given for {players} players."
    elif any({*own} - {*range(len(slices))} or len({*own}) < len(own) for own in own_slice):
        problem = "A player's own slice does not exist, or is named twice."
    elif any(len(own) == len(slices) for own in own_slice):
        problem = "A player's own slices are the whole validation set: there is nothing to score it on."
    if problem:
        raise input_error(problem)
