"""The task, classification: loss and metric, example by example, in float64.

Everything is done element by element in one fixed order, so that an example's loss does not depend on which other
examples or models are computed along with it, nor on threads.
"""

import numpy as np
from numpy.typing import NDArray

from fedpact_models.features import Floats, Integers

TASK = "classification"

PLAIN = 2.0**46
"""A sum of exp(logit) below this, and above its inverse, has its digits without a shift by the largest logit."""


def cross_entropy(logits: Floats, y: Integers) -> Floats:
    """Cross-entropy in nat: logits float64 [..., V, classes], y int64 [V] -> float64 [..., V]."""
    by_class = np.ascontiguousarray(logits.swapaxes(-2, -1))  # a view of classes before examples is not copied
    with np.errstate(over="ignore", divide="ignore"):  # then the sum is not plain
        total = _sum_over_classes(np.exp(by_class))
        loss = np.log(total)
    if not _is_plain(total).all():
        largest = by_class.max(axis=-2)
        shifted = np.log(_sum_over_classes(np.exp(by_class - largest[..., None, :]))) + largest
        loss = np.where(_is_plain(total), loss, shifted)
    loss -= by_class.reshape(*by_class.shape[:-2], -1).take(y * len(y) + np.arange(len(y)), axis=-1)
    return np.asarray(loss)


class Sums:
    """Cross-entropies of logits that are sums: exp of a sum is a product, so few exps serve many sums.

    All logits are relative to that of an example's own class: its loss is the logarithm of the sum of their exps.
    """

    def __init__(self, added: Floats, y: Integers) -> None:
        """What may be added to logits, float64 [sets, classes, V]; y int64 [V]."""
        with np.errstate(over="ignore"):
            self.added, self._y, self._powers = added, y, np.exp(added)
        self._everything = list(range(len(added)))

    def scores(self, logits: Floats, sets: list[int], place: int) -> Floats:
        """The logits with one of these sets added, float64 [V, classes]."""
        return np.asarray(logits + self.added[sets[place]]).T

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # then the sum is not plain
    def cross_entropy(self, logits: Floats, sets: list[int]) -> Floats:
        """Of logits float64 [classes, V] with each of these sets added: float64 [sets, V], in nat."""
        powers, others = self._powers if sets == self._everything else self._powers[sets], np.exp(logits)
        if logits.shape[-1] > 1:  # as in `_sum_over_classes`
            total = np.asarray(np.einsum("skv,kv->sv", powers, others))
        else:
            total = _sum_over_classes(powers * others)
        loss = np.log(total)
        if not total.max() < PLAIN:
            shifted = cross_entropy((logits + self.added[sets]).swapaxes(-2, -1), self._y)
            loss = np.where(total < PLAIN, loss, shifted)
        return np.asarray(loss)


def _is_plain(total: Floats) -> NDArray[np.bool_]:
    """Where a sum of exp(logit) needs no shift to keep its digits."""
    return (total > 1 / PLAIN) & (total < PLAIN)


def _sum_over_classes(powers: Floats) -> Floats:
    """The sum over the classes in their order: [..., classes, V] -> [..., V]."""
    if powers.shape[-1] > 1:
        return np.asarray(np.add.reduce(powers, axis=-2))  # row after row: one number a row it would add in pairs
    total = powers[..., 0, :].copy()
    for place in range(1, powers.shape[-2]):
        total += powers[..., place, :]
    return total


def loss_gradient(logits: Floats, y: Integers) -> Floats:
    """Each example's loss by its logits: float64 [V, classes], y int64 [V] -> float64 [V, classes]."""
    slope = probabilities(logits)
    slope[np.arange(len(y)), y] -= 1.0
    return slope


def probabilities(logits: Floats) -> Floats:
    """Softmax: logits float64 [..., classes] -> float64 [..., classes]."""
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(scores / scores.sum(axis=-1, keepdims=True))


def predicted(logits: Floats) -> Integers:
    """The class of the largest logit, the first of equals: logits [..., classes] -> int64 [...]."""
    return np.asarray(logits.argmax(axis=-1), dtype=np.int64)


def correct(logits: Floats, y: Integers) -> int:
    """How many examples are classified rightly: logits [V, classes], y [V]."""
    return int((predicted(logits) == y).sum())


def accuracy(logits: Floats, y: Integers) -> float:
    """The share of rightly classified examples."""
    return correct(logits, y) / len(y)
