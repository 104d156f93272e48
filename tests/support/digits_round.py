"""A real round of a small federation on the digits of scikit-learn: softmax, SGD, growing label noise. No tests here.

The set-up of contribution.md: 397 validation rows, learning rate .1, two epochs, batches of 16, label noise from 0 to
.9 over the participants.
"""

from dataclasses import dataclass

import numpy as np
from tests.support.models_kit import digits

from fedpact_models.features import Examples, Floats

VALIDATION = 397
UNIT = 10**9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DigitsRound:
    """Before the round `base` [10, d]; `updates` [N, 10, d]; weights [N], equal; each one's rows, and the others."""

    base: Floats
    updates: Floats
    weights: Floats
    own: list[Examples]
    validation: Examples

    @property
    def players(self) -> int:
        return len(self.updates)

    def table(self, *, renormalised: bool) -> list[int]:
        """v(S) = L(nobody) - L(S) by mask, in 1e-9 nat: updates weighted by n_i / sum n, or by n_i / sum n of S."""
        base = self.validation.x @ self.base.T
        gains = np.einsum("vd,ncd->nvc", self.validation.x, self.updates).reshape(self.players, -1)
        losses = []
        for start in range(0, 2**self.players, 1024):
            masks = np.arange(start, min(start + 1024, 2**self.players))
            parts = (masks[:, None] >> np.arange(self.players) & 1) * self.weights
            if renormalised:
                parts = parts / np.where(masks > 0, parts.sum(axis=1), 1)[:, None]
            logits = base[None] + (parts @ gains).reshape(len(masks), *base.shape)
            losses.append(cross_entropy(logits, self.validation.y).mean(axis=1))
        loss = np.concatenate(losses)
        return [round(v) for v in ((loss[0] - loss) * UNIT).tolist()]

    def losses_without(self, *, renormalised: bool) -> Floats:
        """For each participant the loss on its own rows of the model without its update."""
        result = []
        for i, rows in enumerate(self.own):
            parts = self.weights.copy()
            parts[i] = 0
            if renormalised:
                parts /= parts.sum()
            model = self.base + np.tensordot(parts, self.updates, axes=1)
            result.append(cross_entropy(rows.x @ model.T, rows.y).mean())
        return np.array(result)


def cross_entropy(logits: Floats, labels: np.ndarray) -> Floats:
    """Of each row: logits [..., V, classes], labels [V]."""
    top = logits.max(axis=-1, keepdims=True)
    right = np.take_along_axis(logits, np.broadcast_to(labels[:, None], (*logits.shape[:-1], 1)), axis=-1)
    return np.asarray((np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)) + top - right)[..., 0])


def digits_round(players: int, seed: int, *, rounds_before: int = 1) -> DigitsRound:
    """The round after `rounds_before` rounds of federated averaging."""
    rows = (1797 - VALIDATION) // players
    noise = dict(enumerate(np.linspace(0, 0.9, players)))
    sizes = [rows] * players
    _, own, rest = digits(seed, sizes, noise)
    validation = Examples(x=rest.x[:VALIDATION], y=rest.y[:VALIDATION])
    rng, base = np.random.default_rng(seed), np.zeros((10, own[0].x.shape[1]))
    weights = np.full(players, 1 / players)
    for number in range(rounds_before + 1):
        updates = np.array([trained(base, examples, rng) - base for examples in own])
        if number < rounds_before:
            base = base + np.tensordot(weights, updates, axes=1)
    return DigitsRound(base=base, updates=updates, weights=weights, own=own, validation=validation)


def trained(base: Floats, examples: Examples, rng: np.random.Generator) -> Floats:
    model = base.copy()
    for _ in range(2):
        order = rng.permutation(len(examples))
        for start in range(0, len(order), 16):
            batch = order[start : start + 16]
            x, logits = examples.x[batch], examples.x[batch] @ model.T
            chances = np.exp(logits - logits.max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            chances[np.arange(len(batch)), examples.y[batch]] -= 1
            model -= 0.1 * chances.T @ x / len(batch)
    return model
