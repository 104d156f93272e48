"""Games with known Shapley values, as integers of 1e-9, for tests of estimators. No tests here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import SupportsFloat

import numpy as np

from fedpact_contract.estimators import Estimate, Plan, coalitions
from fedpact_models.features import Floats

UNIT = 10**9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FederatedGame:
    """v(S) = 1 - prod over S of (1 - p_i) + sum over S of c_i + sum over pairs of S of J_ij (contribution.md)."""

    p: Floats
    c: Floats
    pairs: Floats

    @classmethod
    def drawn(cls, players: int, seed: int) -> "FederatedGame":
        """A game like a round of federated learning: gains that saturate, small pairwise terms."""
        rng = np.random.default_rng(seed)
        upper = np.triu(rng.normal(0, 0.1 / players**2, (players, players)), 1)
        return cls(
            p=rng.uniform(0.2, 1.8, players) / players,
            c=rng.normal(0, 0.1 / players, players),
            pairs=upper + upper.T,
        )

    def values(self, masks: Sequence[int]) -> list[int]:
        inside = np.array([[mask >> i & 1 for i in range(len(self.p))] for mask in masks], dtype=np.float64)
        saturated = 1 - np.exp(inside @ np.log1p(-self.p))
        together = 0.5 * np.einsum("mi,ij,mj->m", inside, self.pairs, inside, optimize=True)
        return [round(v * UNIT) for v in (saturated + inside @ self.c + together).tolist()]

    def shapley(self) -> Floats:
        """In units of 1e-9, by Gauss-Legendre integration, exact for polynomials of degree 2N - 1."""
        n = len(self.p)
        nodes, weights = np.polynomial.legendre.leggauss(n)
        t, weights = (nodes + 1) / 2, weights / 2
        factors = 1 - t[:, None] * self.p
        integrals = [weights @ np.prod(np.delete(factors, i, axis=1), axis=1) for i in range(n)]
        return (self.p * np.array(integrals) + self.c + self.pairs.sum(axis=1) / 2) * UNIT


def renormalised(players: int, seed: int) -> Callable[[Sequence[int]], list[int]]:
    """Means of updates instead of sums: v(S) = 8 - |target - mean over S|^2, and with an update of 0 for nobody."""
    updates = np.random.default_rng(seed).normal(0, 1, (players, 8)) + 1

    def values(masks: Sequence[int]) -> list[int]:
        inside = np.array([[mask >> i & 1 for i in range(players)] for mask in masks], dtype=np.float64)
        means = inside @ updates / np.maximum(1, inside.sum(axis=1))[:, None]
        return [round(v * UNIT) for v in (8 - ((1 - means) ** 2).sum(axis=1)).tolist()]

    return values


def utilities(plan: Plan, game: FederatedGame) -> list[int]:
    return game.values(coalitions(plan))


def seed_of(label: object) -> bytes:
    return sha256(str(label).encode()).digest()


def relative_error(found: Sequence[SupportsFloat], expected: Sequence[SupportsFloat]) -> float:
    """L2 norm of the difference over that of what is expected."""
    a, b = (np.array([float(v) for v in side]) for side in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def held(found: Estimate, expected: Sequence[SupportsFloat]) -> list[bool]:
    """For each player whether its interval holds what is expected."""
    triples = zip(found.values, expected, found.half_widths, strict=True)
    return [abs(float(v) - float(e)) <= float(h) for v, e, h in triples]
