"""The task, classification: loss and metric, example by example, in float64.

Everything is done element by element in one fixed order, so that an example's loss does not depend on which other
examples or models are computed along with it, nor on threads.
"""

import numpy as np

from fedpact_models.features import Floats, Integers

TASK = "classification"


def cross_entropy(logits: Floats, y: Integers) -> Floats:
    """Cross-entropy in nat: logits float64 [..., V, classes], y int64 [V] -> float64 [..., V]."""
    by_class = np.ascontiguousarray(logits.swapaxes(-2, -1))  # a view of classes before examples is not copied
    largest = by_class.max(axis=-2)
    powers = by_class - largest[..., None, :]
    np.exp(powers, out=powers)
    total = np.zeros_like(largest)
    for scores in np.moveaxis(powers, -2, 0):
        total += scores
    flat = by_class.reshape(*by_class.shape[:-2], -1)
    chosen = flat.take(y * len(y) + np.arange(len(y)), axis=-1)
    return np.asarray(np.log(total) + (largest - chosen))


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
