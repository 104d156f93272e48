"""Shapley values from coalitions sorted by size: every coalition tells something of every player.

After Stratified SVARM (Kolpaczki, Bengs, Muschalik and Hüllermeier 2024, "Approximating the Shapley value without
marginal contributions"). With D_i,s the mean of v over coalitions of size s with i, minus the mean over those without,

    phi_i = (v(N) - v(nobody)) / N + (1 / N) * sum over s = 1 .. N-1 of D_i,s

Sizes 1 and N-1 are enumerated. In between, coalitions come in complementary pairs without replacement: pass after pass,
for each size s = 2 .. N/2, a permutation is cut into blocks of s players (the last one filled up from its beginning),
so that one pass shows every player inside and outside of every size. Where a stratum holds no coalition, D_i,s is
interpolated in s from the nearest sizes that do. What then lacks in efficiency is added equally.

The error is a delete-group jackknife: 20 groups of pairs in turn left out, Student's t with 19 degrees of freedom.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import lcm
from typing import Self

from fedpact_contract.sampling import permutation, standard_error, t_quantile

GROUPS = 20
"""Of the jackknife; there are at least as many complementary pairs."""

_ZERO = Fraction(0)


@dataclass(frozen=True, slots=True)
class _Tally:
    """By size of coalition, and by size and player that is inside: how many coalitions, and the sum of their v."""

    count: list[int]
    total: list[int]
    count_in: list[list[int]]
    total_in: list[list[int]]

    @classmethod
    def of(cls, players: int, rows: Sequence[tuple[int, int]]) -> Self:
        count, total = [0] * players, [0] * players
        count_in, total_in = [[0] * players for _ in count], [[0] * players for _ in count]
        for mask, value in rows:
            size = mask.bit_count()
            count[size] += 1
            total[size] += value
            for i in members(mask):
                count_in[size][i] += 1
                total_in[size][i] += value
        return cls(count, total, count_in, total_in)

    def without(self, other: "_Tally") -> "_Tally":
        return _Tally(
            [a - b for a, b in zip(self.count, other.count, strict=True)],
            [a - b for a, b in zip(self.total, other.total, strict=True)],
            [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(self.count_in, other.count_in, strict=True)],
            [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(self.total_in, other.total_in, strict=True)],
        )

    def weights(self, player: int) -> list[Fraction]:
        """How much each size's D counts for this player: 1, and what the empty strata beside it lend it."""
        sizes = range(1, len(self.count))
        held = [s for s in sizes if 0 < self.count_in[s][player] < self.count[s]]
        result = [_ZERO] * len(self.count)
        for s in held:
            result[s] += 1
        for low, high in pairwise(held):
            for s in range(low + 1, high):
                result[low] += Fraction(high - s, high - low)
                result[high] += Fraction(s - low, high - low)
        return result


def members(mask: int) -> Iterator[int]:
    """The players of a coalition, by rising number."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def available(players: int) -> int:
    """How many complementary pairs of sizes 2 to N-2 there are."""
    return max(0, (1 << players - 1) - players - 1)


def coalitions(seed: bytes, players: int, pairs: int) -> tuple[int, ...]:
    """Nobody, all, each one, all but each one; then pair by pair a coalition and its complement."""
    full = 2**players - 1
    first = (0, full, *(m for i in range(players) for m in (1 << i, full ^ 1 << i)))
    found: dict[int, None] = {}
    for mask in _blocks(seed, players):
        if len(found) == pairs:
            break
        if full ^ mask not in found:
            found[mask] = None
    return (*first, *(m for mask in found for m in (mask, full ^ mask)))


def estimate(players: int, masks: Sequence[int], values: Sequence[Fraction]) -> tuple[list[Fraction], list[Decimal]]:
    """Values and the half-widths of their 95 % intervals, from v of `coalitions`."""
    unit = lcm(*(v.denominator for v in values))
    rows = [(mask, v.numerator * (unit // v.denominator)) for mask, v in zip(masks, values, strict=True)]
    total, rest, drawn = rows[1][1] - rows[0][1], rows[2:], rows[2 + 2 * players :]
    whole = _Tally.of(players, rest)
    pairs = [drawn[k : k + 2] for k in range(0, len(drawn), 2)]
    groups = [[row for pair in pairs[g::GROUPS] for row in pair] for g in range(GROUPS)]
    left_out = [_values(players, total, whole.without(_Tally.of(players, group))) for group in groups]
    halves = []
    for column in zip(*left_out, strict=True):
        mean = sum(column, _ZERO) / GROUPS
        variance = sum(((x - mean) ** 2 for x in column), _ZERO) * Fraction(GROUPS - 1, GROUPS)
        halves.append(standard_error(t_quantile(GROUPS - 1) ** 2 * variance / unit**2))
    return [value / unit for value in _values(players, total, whole)], halves


def coefficients(players: int, masks: Sequence[int]) -> list[dict[int, Fraction]]:
    """For each player the factor of each coalition's v in its value."""
    tally, full = _Tally.of(players, [(mask, 0) for mask in masks[2:]]), 2**players - 1
    weights = [tally.weights(i) for i in range(players)]
    result: list[dict[int, Fraction]] = [{0: Fraction(-1, players), full: Fraction(1, players)} for _ in range(players)]
    for mask in masks[2:]:
        size, row = mask.bit_count(), []
        for i in range(players):
            inside = tally.count_in[size][i]
            count = inside if mask >> i & 1 else inside - tally.count[size]
            row.append(weights[i][size] / (players * count) if weights[i][size] else _ZERO)
        mean = sum(row, _ZERO) / players
        for i, factor in enumerate(row):
            result[i][mask] = factor - mean
    return result


def _blocks(seed: bytes, players: int) -> Iterator[int]:
    """Coalitions of sizes 2 to N/2, endlessly."""
    index = 0
    while True:
        for size in range(2, players // 2 + 1):
            order = permutation(seed, index, players)
            index += 1
            for start in range(0, players, size):
                yield sum(1 << i for i in (order + order)[start : start + size])


def _values(players: int, total: int, tally: _Tally) -> list[Fraction]:
    raw = []
    for i in range(players):
        value = _ZERO
        for size, weight in enumerate(tally.weights(i)):
            if weight:
                inside, outside = tally.count_in[size][i], tally.count[size] - tally.count_in[size][i]
                sum_in, sum_out = tally.total_in[size][i], tally.total[size] - tally.total_in[size][i]
                value += weight * Fraction(sum_in * outside - sum_out * inside, inside * outside)
        raw.append(value / players)
    mean = sum(raw, _ZERO) / players
    return [Fraction(total, players) + value - mean for value in raw]
