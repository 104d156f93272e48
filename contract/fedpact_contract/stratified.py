"""Shapley values from coalitions sorted by size: every coalition tells something of every player.

After Stratified SVARM (Kolpaczki, Bengs, Muschalik and Hüllermeier 2024, "Approximating the Shapley value without
marginal contributions"). With D_i,s the mean of v over coalitions of size s with i, minus the mean over those without,

    phi_i = (v(N) - v(nobody)) / N + (1 / N) * sum over s = 1 .. N-1 of D_i,s

Sizes 1 and N-1 are enumerated. In between, coalitions come in complementary pairs without replacement: pass after pass,
for each size s = 2 .. N/2, a permutation is cut into blocks of s players (the last one filled up from its beginning),
so that one pass shows every player inside and outside of every size.

Whom a coalition happens to hold beside i would blur D_i,s. So what the enumerated sizes foretell is taken out first: in
a mean over s players each one counts 1/s, and between both ends D_i,s is expected at

    E_i,s = a D_i,1 + (1 - a) D_i,N-1,  a = (1/s - 1/(N-1)) / (1 - 1/(N-1))

The additive game g_s(S) = (N-1)/N * sum over S of E_i,s has exactly these differences, whatever they are. So D_i,s is
estimated as E_i,s plus the difference of means of v - g_s: without bias, as the ends are no sample, and linear in v.
Where a stratum holds no coalition, E_i,s stands alone. On rounds of the digits, re-normalised, it divides the
error by 40. What lacks in efficiency is added equally.

The error is a delete-group jackknife: 20 groups of pairs in turn left out, Student's t with 19 degrees of freedom.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import lcm
from typing import Self

from fedpact_contract.sampling import permutation, standard_error, t_quantile

GROUPS = 20
"""Of the jackknife; there are at least as many complementary pairs."""

_ZERO = Fraction(0)


@dataclass(frozen=True, slots=True)
class _Tally:
    """By size of coalition, and by size and player that is inside: how many coalitions, and the sum of their values."""

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
            for i in _members(mask):
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

    def strata(self, player: int) -> Iterator[tuple[int, int, int]]:
        """Sizes that hold coalitions with and without the player, and how many of each."""
        for size, count in enumerate(self.count):
            inside = self.count_in[size][player]
            if 0 < inside < count:
                yield size, inside, count - inside


def available(players: int) -> int:
    """How many complementary pairs of sizes 2 to N-2 there are."""
    return max(0, (1 << players - 1) - players - 1)


def coalitions(seed: bytes, players: int, pairs: int) -> tuple[int, ...]:
    """Nobody, all; each one and all but that one, by player; then a coalition and its complement, pair by pair."""
    full = (1 << players) - 1
    found: dict[int, None] = {}
    for mask in _blocks(seed, players):
        if len(found) == pairs:
            break
        if full ^ mask not in found:
            found[mask] = None
    halves = (*(1 << i for i in range(players)), *found)
    return (0, full, *(m for mask in halves for m in (mask, full ^ mask)))


def estimate(players: int, masks: Sequence[int], values: Sequence[Fraction]) -> tuple[list[Fraction], list[Decimal]]:
    """Values and the half-widths of their 95 % intervals, from v of `coalitions`."""
    unit = lcm(*(v.denominator for v in values))
    whole = [v.numerator * (unit // v.denominator) for v in values]
    first, last = _ends(players, whole)
    rows = []
    for mask, value in zip(masks[2 + 2 * players :], whole[2 + 2 * players :], strict=True):
        a, b, scale = _expected(players, mask.bit_count())
        rows.append((mask, scale * value - sum(a * first[i] + b * last[i] for i in _members(mask))))
    of_first, of_last = _all_sizes(players)
    foretold = [of_first * x + of_last * y for x, y in zip(first, last, strict=True)]
    total, tally = whole[1] - whole[0], _Tally.of(players, rows)
    pairs = [rows[k : k + 2] for k in range(0, len(rows), 2)]
    groups = [[row for pair in pairs[g::GROUPS] for row in pair] for g in range(GROUPS)]
    left_out = [_values(foretold, total, tally.without(_Tally.of(players, group))) for group in groups]
    halves = []
    for column in zip(*left_out, strict=True):
        mean = sum(column, _ZERO) / GROUPS
        variance = sum(((x - mean) ** 2 for x in column), _ZERO) * Fraction(GROUPS - 1, GROUPS)
        halves.append(standard_error(t_quantile(GROUPS - 1) ** 2 * variance / unit**2))
    return [value / unit for value in _values(foretold, total, tally)], halves


def coefficients(players: int, masks: Sequence[int]) -> list[dict[int, Fraction]]:
    """For each player the factor of each coalition's v in its value."""
    tally = _Tally.of(players, [(mask, 0) for mask in masks[2 + 2 * players :]])
    raw = [_raw_coefficients(players, masks, tally, i) for i in range(players)]
    means = {mask: sum((row.get(mask, _ZERO) for row in raw), _ZERO) / players for mask in masks}
    total = {0: Fraction(-1, players), masks[1]: Fraction(1, players)}
    return [{mask: row.get(mask, _ZERO) - mean for mask, mean in means.items()} | total for row in raw]


def _raw_coefficients(players: int, masks: Sequence[int], tally: _Tally, player: int) -> dict[int, Fraction]:
    """Before the gap in efficiency is closed."""
    counts = {size: (inside, outside) for size, inside, outside in tally.strata(player)}
    beside = {size: ([0] * players, [0] * players) for size in counts}
    result = {}
    for mask in masks[2 + 2 * players :]:
        size, out = mask.bit_count(), 1 - (mask >> player & 1)
        if size in counts:
            result[mask] = Fraction(-1 if out else 1, players * counts[size][out])
            for j in _members(mask):
                beside[size][out][j] += 1
    # What is taken from the enumerated sizes: E of the player itself, less E of whom its strata hold beside it.
    of_first, of_last = ([_ZERO] * players for _ in range(2))
    of_first[player], of_last[player] = _all_sizes(players)
    unit = lcm(*(inside * outside * _expected(players, s)[2] for s, (inside, outside) in counts.items()))
    for j in range(players):
        first = last = 0
        for size, (inside, outside) in counts.items():
            a, b, scale = _expected(players, size)
            surplus = beside[size][0][j] * outside - beside[size][1][j] * inside
            surplus *= unit // (inside * outside * scale)
            first, last = first + a * surplus, last + b * surplus
        of_first[j] -= Fraction(first, players * unit)
        of_last[j] -= Fraction(last, players * unit)
    sum_first, sum_last = sum(of_first, _ZERO), sum(of_last, _ZERO)
    for j in range(players):
        alone, but_one = masks[2 + 2 * j : 4 + 2 * j]
        result[alone] = players * of_first[j] - sum_first
        result[but_one] = sum_last - players * of_last[j]
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


def _ends(players: int, values: Sequence[int]) -> tuple[list[int], list[int]]:
    """(N-1) D_i,1 and (N-1) D_i,N-1 for each player."""
    alone, but_one = values[2 : 2 + 2 * players : 2], values[3 : 2 + 2 * players : 2]
    return [players * v - sum(alone) for v in alone], [sum(but_one) - players * v for v in but_one]


def _expected(players: int, size: int) -> tuple[int, int, int]:
    """a, b, c with g_s(S) = sum over S of (a (N-1) D_i,1 + b (N-1) D_i,N-1) / c."""
    return players - 1 - size, (players - 1) * (size - 1), players * size * (players - 2)


def _all_sizes(players: int) -> tuple[Fraction, Fraction]:
    """a, b with (1 / N) sum over s of E_i,s = a (N-1) D_i,1 + b (N-1) D_i,N-1."""
    parts = [_expected(players, size) for size in range(1, players)]
    first, last = (sum((Fraction(part[k], part[2]) for part in parts), _ZERO) for k in (0, 1))
    return first / (players - 1), last / (players - 1)


def _values(foretold: Sequence[Fraction], total: int, tally: _Tally) -> list[Fraction]:
    players, raw = len(foretold), []
    for i, value in enumerate(foretold):
        surplus = _ZERO
        for size, inside, outside in tally.strata(i):
            sum_in, sum_out = tally.total_in[size][i], tally.total[size] - tally.total_in[size][i]
            scale = _expected(players, size)[2]
            surplus += Fraction(sum_in * outside - sum_out * inside, inside * outside * scale)
        raw.append(value + surplus / players)
    mean = sum(raw, _ZERO) / players
    return [Fraction(total, players) + value - mean for value in raw]


def _members(mask: int) -> Iterator[int]:
    """The players of a coalition, by rising number."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
