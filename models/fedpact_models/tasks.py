"""The tasks: loss and metric of each kind of label, example by example, in float64 (docs/adr/0009).

Everything is done element by element in one fixed order, so that an example's loss does not depend on which other
examples or models are computed along with it, nor on threads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import ClassLabel, Label, SurvivalLabel
from fedpact_models.features import Flags, Floats, Integers, Targets

PLAIN = 2.0**46
"""A sum of exp(logit) below this, and above its inverse, has its digits without a shift by the largest logit."""


class Task(Protocol):
    """What a kind of label asks of a model. Outputs are float64 [..., V, outputs], targets [V]."""

    @property
    def outputs(self) -> int:
        """How many numbers a model puts out for each example."""
        ...

    @property
    def curvature(self) -> float:
        """A bound on the trace of the trained loss's second derivative by the outputs."""
        ...

    def losses(self, scores: Floats, y: Targets) -> Floats:
        """Each example's validation loss, float64 [..., V]: not negative."""
        ...

    def gradient(self, scores: Floats, y: Targets) -> Floats:
        """Of `losses` by the outputs: float64 [V, outputs] -> float64 [V, outputs]."""
        ...

    def marks(self, scores: Floats, y: Targets) -> Floats:
        """What `count` looks at of each example, float64 [V]."""
        ...

    def count(self, marks: Floats, y: Targets) -> int | None:
        """What the metric is worked out from besides the loss; None where the loss alone tells it."""
        ...

    def pairs(self, y: Targets) -> int | None:
        """Out of how many pairs of examples `count` counts; None where it counts examples, or nothing."""
        ...

    def are_targets(self, y: Targets) -> bool:
        """Whether these can be targets of this label."""
        ...

    def made_up(self, uniform: Floats) -> Targets:
        """Targets from uniform numbers between 0 and 1, all equally likely."""
        ...


@dataclass(frozen=True, slots=True)
class Classification:
    """Classes: softmax and cross-entropy in nat; what counts is which examples are classified rightly."""

    outputs: int

    @property
    def curvature(self) -> float:
        """1 - sum p^2, largest where all classes are equally likely."""
        return 1 - 1 / self.outputs

    def losses(self, scores: Floats, y: Targets) -> Floats:
        """Cross-entropy."""
        return cross_entropy(scores, y)

    def gradient(self, scores: Floats, y: Targets) -> Floats:
        """Probabilities, less 1 at the right class."""
        slope = probabilities(scores)
        slope[np.arange(len(y)), y] -= 1.0
        return slope

    def marks(self, scores: Floats, y: Targets) -> Floats:
        """1 where the class is right."""
        return np.where(predicted(scores) == y, 1.0, 0.0)

    def count(self, marks: Floats, y: Targets) -> int | None:  # noqa: ARG002 - of other tasks
        """How many classes are right."""
        return int(marks.sum())

    def pairs(self, y: Targets) -> int | None:  # noqa: ARG002 - of other tasks
        """Examples are counted."""
        return None

    def are_targets(self, y: Targets) -> bool:
        """Indices of classes."""
        return y.dtype.kind == "i" and bool(((y >= 0) & (y < self.outputs)).all())

    def made_up(self, uniform: Floats) -> Targets:
        """Classes."""
        return np.floor(uniform * self.outputs).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Regression:
    """A number in [-1, 1]: half the squared error.

    A model's one output is cut to [-1, 1] before it is judged, as it is before anybody is told it: what lies outside
    the public bounds is nobody's value. So a validation loss is at most 2, whatever a model puts out. Training does not
    cut, for a cut output has no gradient; there the clip bounds each example.
    """

    outputs: int = 1
    curvature: float = 1.0

    def losses(self, scores: Floats, y: Targets) -> Floats:
        """Half the squared error."""
        error = within_bounds(scores) - y
        return np.asarray(0.5 * (error * error))

    def gradient(self, scores: Floats, y: Targets) -> Floats:
        """The error; 0 where the output is cut."""
        error = within_bounds(scores) - y
        return np.where(np.abs(scores[..., 0]) < 1.0, error, 0.0)[..., None]

    def marks(self, scores: Floats, y: Targets) -> Floats:  # noqa: ARG002 - of other tasks
        """Nothing."""
        return np.zeros(len(y))

    def count(self, marks: Floats, y: Targets) -> int | None:  # noqa: ARG002 - of other tasks
        """Nothing: the loss is the metric's square."""
        return None

    def pairs(self, y: Targets) -> int | None:  # noqa: ARG002 - of other tasks
        """Nothing is counted."""
        return None

    def are_targets(self, y: Targets) -> bool:
        """Scaled numbers."""
        return y.dtype.kind == "f" and bool((np.abs(y) <= 1.0).all())

    def made_up(self, uniform: Floats) -> Targets:
        """Scaled numbers."""
        return 2.0 * uniform - 1.0


@dataclass(frozen=True, slots=True)
class Survival:
    """When an event comes: an output for each interval, the logit of its hazard, the chance that the event comes in it.

    The loss is minus the logarithm of the likelihood, in nat (Gensheimer and Narasimhan 2019, "A scalable discrete-time
    survival model for neural networks", arXiv:1805.00917): a sum over the intervals that an example lived through and
    the one in which its event came. It is of each example by itself, as clipping and values by example need it; Cox's
    partial likelihood, a sum over the others at risk, is not.

    A target is 2 j + 1 where the event came after j intervals, and 2 j where j were lived through and no more is known.
    """

    outputs: int

    @property
    def curvature(self) -> float:
        """H (1 - h) of each interval."""
        return self.outputs / 4

    def losses(self, scores: Floats, y: Targets) -> Floats:
        """Minus the logarithm of the likelihood."""
        total = np.zeros(scores.shape[:-1])
        for interval, came, lived in self._seen(y):
            logit = np.where(came, -scores[..., interval], scores[..., interval])
            each = np.maximum(logit, 0.0) + np.log1p(np.exp(-np.abs(logit)))
            total += np.where(came | lived, each, 0.0)
        return total

    def gradient(self, scores: Floats, y: Targets) -> Floats:
        """The hazard of each interval that was lived through, less 1 where the event came."""
        slope = np.zeros_like(scores)
        for interval, came, lived in self._seen(y):
            hazard = 1.0 / (1.0 + np.exp(-scores[..., interval]))
            slope[..., interval] = np.where(came | lived, hazard - came, 0.0)
        return slope

    def marks(self, scores: Floats, y: Targets) -> Floats:  # noqa: ARG002 - of other tasks
        """How many intervals the model expects to be lived through."""
        return np.asarray(survival(scores).sum(axis=-1))

    def count(self, marks: Floats, y: Targets) -> int | None:
        """Twice the pairs in the right order, ties once: the event that came earlier was expected earlier."""
        found = 0
        for _, came, lived in self._seen(y):
            later = np.sort(marks[lived])
            below, upto = np.searchsorted(later, marks[came]), np.searchsorted(later, marks[came], "right")
            found += int((2 * len(later) - below - upto).sum())
        return found

    def pairs(self, y: Targets) -> int | None:
        """Pairs of which one's event came in an earlier interval than the other's could."""
        return sum(int(came.sum()) * int(lived.sum()) for _, came, lived in self._seen(y))

    def are_targets(self, y: Targets) -> bool:
        """Codes, as above."""
        return y.dtype.kind == "i" and bool(((y >= 0) & (y <= 2 * self.outputs)).all())

    def made_up(self, uniform: Floats) -> Targets:
        """Codes, as above."""
        return np.floor(uniform * (2 * self.outputs + 1)).astype(np.int64)

    def _seen(self, y: Targets) -> Iterator[tuple[int, Flags, Flags]]:
        """For each interval, in which examples the event came in it, and which lived through it."""
        for interval in range(self.outputs):
            yield interval, y == 2 * interval + 1, y >= 2 * interval + 2


def task_of(label: Label) -> Task:
    """The task of a label."""
    if isinstance(label, ClassLabel):
        return Classification(label.outputs)
    return Survival(label.outputs) if isinstance(label, SurvivalLabel) else Regression()


def counts(task: Task, marks: Iterable[tuple[int, Floats]], y: Targets) -> dict[int, int]:
    """What the task counts of each marked coalition; empty where it counts nothing."""
    found = ((mask, task.count(of, y)) for mask, of in marks)
    return {mask: count for mask, count in found if count is not None}


def cross_entropy(logits: Floats, y: Targets) -> Floats:
    """Cross-entropy in nat: logits float64 [..., V, classes], y int64 [V] -> float64 [..., V]."""
    by_class = np.ascontiguousarray(logits.swapaxes(-2, -1))  # a view of classes before examples is not copied
    with np.errstate(over="ignore", divide="ignore"):  # then the sum is not plain
        total = _sum_over_classes(np.exp(by_class))
        loss = np.log(total)
    if not _is_plain(total).all():
        largest = by_class.max(axis=-2)
        shifted = np.log(_sum_over_classes(np.exp(by_class - largest[..., None, :]))) + largest
        loss = np.where(_is_plain(total), loss, shifted)
    flat = by_class.reshape(*by_class.shape[:-2], -1)
    loss -= flat.take(y.astype(np.int64, copy=False) * len(y) + np.arange(len(y)), axis=-1)
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


def probabilities(logits: Floats) -> Floats:
    """Softmax: logits float64 [..., classes] -> float64 [..., classes]."""
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(scores / scores.sum(axis=-1, keepdims=True))


def predicted(logits: Floats) -> Integers:
    """The class of the largest logit, the first of equals: logits [..., classes] -> int64 [...]."""
    return np.asarray(logits.argmax(axis=-1), dtype=np.int64)


def within_bounds(scores: Floats) -> Floats:
    """A regression model's one output, cut to the scaled bounds: float64 [..., V, 1] -> float64 [..., V]."""
    return np.asarray(np.clip(scores[..., 0], -1.0, 1.0))


def survival(logits: Floats) -> Floats:
    """The chance to live through each interval and all before it: float64 [..., intervals] -> the same shape."""
    return np.asarray(np.cumprod(1.0 / (1.0 + np.exp(logits)), axis=-1))
