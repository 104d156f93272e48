"""The re-normalised game: a coalition's model is what the contract's own rule would make of its updates alone.

theta_S = base + eta A({D_i: i in S}), and the base for nobody. A is

- `weighted-mean`: sum over S of n_i D_i / sum over S of n_i;
- `median`: element by element the middle one, or the mean of both middle ones (Yin et al. 2018, arXiv:1803.01498);
- `krum`: the plain mean of those updates of S that lie closest to their neighbours (Blanchard et al. 2017,
  arXiv:1703.02757). An update's score is the sum of its squared distances to the |S| - f - 2 nearest others; the `kept`
  lowest scores are taken, at most |S| - f of them, ties by place. Where S has fewer than 2 f + 3 members the rule says
  nothing, and A is the plain mean of S.

So the grand coalition's model is the next model itself. A zero update is one update more in the mean: it has not the
value 0, as it has where weights are fixed.

A coalition is no sum of steps here, so each model is built on its own and evaluated on its own, by the path of
`evaluate`. No bit depends on the order of players, on blocks or on threads: sums are of numbers on a grid (`exact`),
and everything else is element by element, a sort, or `math.fsum`.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Krum, Model, Training
from fedpact_models.coalitions import Rows
from fedpact_models.evaluate import CoalitionLosses, evaluate_coalitions
from fedpact_models.exact import largest, scale_above, to_grid
from fedpact_models.features import Examples, Floats

HELD_ELEMENTS = 12 * 2**20
"""Numbers (float64) of all players' updates that are held at a time: 96 MiB. If they are more, some are read again."""

MODEL_ELEMENTS = 4 * 2**20
"""Parameters (float64) of coalitions' models that are built together, one model at least."""

WORK_ELEMENTS = 2**17
"""Numbers (float64) that a rule works on at a time: 1 MiB."""

_BITS = 25
_NOBODY = np.empty((0, 0))


class Aggregator:
    """A contract's rule over a round's updates, for any coalition of its players."""

    def __init__(
        self, training: Training, counts: Sequence[int | Fraction], updates: Rows, *, held: int = HELD_ELEMENTS
    ) -> None:
        """Keep what is needed; no update is read yet.

        Args:
            training: The rule, and eta.
            counts: What the examples of each player count for, in the weighted mean alone.
            updates: Of each player, [N, P], in the order of ids; read row by row, some more than once.
            held: As HELD_ELEMENTS. Moves no bit of a model.
        """
        self._training, self._updates, self._held = training, updates, held
        self._counts = np.array([float(count) for count in counts])
        self._block: tuple[slice, Floats] | None = None
        self._apart: Floats | None = None

    def __len__(self) -> int:
        return len(self._updates)

    def models(self, base: NDArray[np.floating], masks: Sequence[int]) -> Iterator[Floats]:
        """theta_S for each coalition, float64 [P]; bit i of a mask is player i. Each is soon overwritten."""
        batch, rate = max(1, MODEL_ELEMENTS // len(base)), float(self._training.server_rate)
        for at in range(0, len(masks), batch):
            among = [self._counted(mask) for mask in masks[at : at + batch]]
            built = np.tile(np.asarray(base, dtype=np.float64), (len(among), 1))
            for columns in _parts(len(base), self._held // len(self)):
                block = self._read(columns)
                for model, members in zip(built[:, columns], among, strict=True):
                    for part in _parts(block.shape[1] if members else 0, WORK_ELEMENTS // max(1, len(members))):
                        model[part] += rate * self._of(members, block[members, part])
            yield from built

    def _counted(self, mask: int) -> list[int]:
        """The players of a coalition whose updates enter its model: all, or those that Krum keeps."""
        members = [i for i in range(len(self)) if mask >> i & 1]
        krum = self._training.krum
        return members if krum is None or len(members) < 2 * krum.tolerated + 3 else self._kept(members, krum)

    def _of(self, members: list[int], rows: Floats) -> Floats:
        if self._training.aggregation == "median":
            return _median(rows)
        weighted = self._training.aggregation == "weighted-mean"
        return _mean(rows, self._counts[members] if weighted else np.ones(len(members)))

    def _kept(self, members: list[int], krum: Krum) -> list[int]:
        nearest = len(members) - krum.tolerated - 2
        if self._apart is None:
            self._apart = self._distances()
        apart = np.sort(self._apart[np.ix_(members, members)], axis=1)[:, 1 : nearest + 1]  # the first: its own, 0
        scores = [math.fsum(row) for row in apart.tolist()]
        best = sorted(range(len(members)), key=lambda place: (scores[place], place))
        return sorted(members[place] for place in best[: min(krum.kept, len(members) - krum.tolerated)])

    def _distances(self) -> Floats:
        """Squared distances of all updates, [N, N]: sums of numbers on a grid, so exact in any order."""
        count, size = len(self), len(self._updates[0])
        bounds = np.zeros(count)
        for columns in _parts(size, self._held // count):
            bounds = np.maximum(bounds, largest(self._read(columns), 1)[:, 0])
        scales = scale_above(size * (bounds[:, None] + bounds) ** 2)
        result = np.zeros((count, count))
        for columns in _parts(size, self._held // count):
            block = self._read(columns)
            for i in range(count):
                for j in range(i):
                    squares = (block[i] - block[j]) ** 2
                    result[i, j] += to_grid(squares, float(scales[i, j]), _BITS).sum()
        return result + result.T

    def _read(self, columns: slice) -> Floats:
        """These elements of all updates, float64 [N, columns]; the newest are kept."""
        if self._block is None or self._block[0] != columns:
            self._block = None
            block = np.empty((len(self), columns.stop - columns.start))
            for player, row in enumerate(block):
                row[:] = self._updates[player][columns]
            self._block = (columns, block)
        return self._block[1]


def evaluate_models(
    model: Model,
    data: Data,
    base: NDArray[np.floating],
    updates: Aggregator,
    examples: Examples,
    slices: Sequence[int],
    masks: Sequence[int],
) -> CoalitionLosses:
    """As `evaluate.evaluate_coalitions`, of the re-normalised game: model after model.

    Args:
        model: The contract's model.
        data: The contract's schema.
        base: Weights before the round, float64 [P].
        updates: The round's updates under the contract's rule.
        examples: The validation set, V rows, slices one after another.
        slices: Rows of each slice; they sum to V.
        masks: The coalitions; bit i: player i.

    Raises:
        InputError: EVALUATION_INPUT (sizes that do not fit), WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE.
        FailedError: EVALUATION_NOT_FINITE.
    """
    by_example, losses, right = np.empty((len(masks), len(examples))), list[tuple[int, ...]](), dict[int, int]()
    for place, (mask, weights) in enumerate(zip(masks, updates.models(base, masks), strict=True)):
        alone = evaluate_coalitions(model, data, weights, _NOBODY, examples, slices, [0])
        by_example[place] = alone.by_example[0]
        losses += alone.losses
        if mask in (0, 2 ** len(updates) - 1):
            right |= dict.fromkeys([mask], alone.correct[0]) if alone.correct else {}
    return CoalitionLosses(losses=tuple(losses), by_example=by_example, correct=right)


def _parts(size: int, width: int) -> Iterator[slice]:
    """0 .. size in parts of this width, of 1 at least."""
    width = max(1, width)
    return (slice(at, min(at + width, size)) for at in range(0, size, width))


def _mean(rows: Floats, counts: Floats) -> Floats:
    """The weighted mean of rows, [S, columns] -> [columns]; the sum of the terms is not rounded."""
    terms = rows * counts[:, None]
    to_grid(terms, scale_above(len(terms) * largest(terms, 0)), _BITS)
    return np.asarray(terms.sum(axis=0) / math.fsum(counts.tolist()))


def _median(rows: Floats) -> Floats:
    """The median of each column, [S, columns] -> [columns]."""
    middle = (len(rows) - 1) // 2, len(rows) // 2
    low, high = np.partition(rows, middle, axis=0)[[*middle]]
    return np.asarray(low * 0.5 + high * 0.5 + 0.0)
