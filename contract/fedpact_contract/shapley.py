"""Exact Shapley, Banzhaf and Owen values of a game that is given as a complete table.

A table lists v(S) by coalition mask: bit i stands for player i, so it has 2**N values. All arithmetic is exact.
Shapley (1953), "A value for n-person games"; Banzhaf (1965), "Weighted voting doesn't work".
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import factorial, lcm
from typing import Any

from fedpact_contract.errors import InputError

MAX_PLAYERS = 16
"""A table file of more players would hold more than 65,536 values."""

_DECIMAL = re.compile(r"-?[0-9]{1,100}(\.[0-9]{1,100})?", re.ASCII)
_LARGEST = 10**100
_REMEDY = 'Write {"players": ["a", "b"], "values": {"": 0, "a": 3, "b": "2.5", "a,b": 7}}.'


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """A game: its players' names, and 2**N values by mask (bit i: players[i])."""

    players: tuple[str, ...]
    values: tuple[Fraction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refused:
    """A number that JSON allows and a table does not: a float, NaN, Infinity."""

    text: str


def shapley(values: Sequence[int | Fraction]) -> tuple[Fraction, ...]:
    """Each player's Shapley value; together they are v(N) - v(empty).

    Args:
        values: 2**N values by mask, N >= 1. Time and memory grow as N 2**N: N = 15 takes a fraction of a second.

    Raises:
        InputError: the number of values is no power of two above 1.
    """
    n, scaled, unit = _scaled(values)
    by_size, holding = _size_sums(n, scaled)
    order = [factorial(k) for k in range(n + 1)]
    result = []
    for held in holding:
        gain = sum(held[s] * order[s - 1] * order[n - s] for s in range(1, n + 1))
        loss = sum((by_size[s] - held[s]) * order[s] * order[n - s - 1] for s in range(n))
        result.append(Fraction(gain - loss, order[n] * unit))
    return tuple(result)


def banzhaf(values: Sequence[int | Fraction]) -> tuple[Fraction, ...]:
    """Each player's Banzhaf value: the mean of its 2**(N-1) marginal contributions.

    Args:
        values: 2**N values by mask, N >= 1.

    Raises:
        InputError: the number of values is no power of two above 1.
    """
    n, scaled, unit = _scaled(values)
    by_size, holding = _size_sums(n, scaled)
    total = sum(by_size)
    return tuple(Fraction(2 * sum(held) - total, 2 ** (n - 1) * unit) for held in holding)


def owen(values: Sequence[int | Fraction], unions: Sequence[Sequence[int]]) -> tuple[Fraction, ...]:
    """Each player's Owen value: unions share as players of a game among themselves, and inside each its members.

    A member's marginal contributions count in the orders in which every union stands together. Owen (1977), "Values of
    games with a priori unions". With unions of one each, or one union of all, these are Shapley values.

    Args:
        values: 2**N values by mask, N >= 1.
        unions: The players' numbers, each in one union. Time grows with the sum over unions of
            2**(unions - 1) 2**(members - 1) members.

    Raises:
        InputError: GAME_TABLE_SIZE, as `shapley`; GAME_UNIONS: the unions are no partition of the players.
    """
    n, scaled, unit = _scaled(values)
    if sorted(i for union in unions for i in union) != list(range(n)) or not all(unions):
        raise InputError(
            "GAME_UNIONS",
            f"The unions are no partition of the {n} players.",
            field="unions",
            remedy="Name each player in one union; whoever is alone is a union of one.",
        )
    result = [Fraction(0)] * n
    for i, before, weight in _owen_terms(unions):
        result[i] += weight * (scaled[before | 1 << i] - scaled[before])
    return tuple(value / unit for value in result)


def owen_coefficients(players: int, unions: Sequence[Sequence[int]]) -> list[dict[int, Fraction]]:
    """For each player the factor of each coalition's v in its Owen value, by mask."""
    result: list[dict[int, Fraction]] = [{} for _ in range(players)]
    for i, before, weight in _owen_terms(unions):
        result[i][before | 1 << i], result[i][before] = weight, -weight
    return result


def _owen_terms(unions: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Fraction]]:
    """Each player's marginal contributions: the player, the coalition before it, and in which part of the orders."""
    masks = [sum(1 << i for i in union) for union in unions]
    for k, union in enumerate(unions):
        outside = _coalitions([mask for j, mask in enumerate(masks) if j != k])
        orders = factorial(len(unions)) * factorial(len(union))
        for i in union:
            inside = _coalitions([1 << j for j in union if j != i])
            for other, among in outside:
                for own, within in inside:
                    yield i, other | own, Fraction(among * within, orders)


def union_counts(counts: Sequence[int], unions: Sequence[Sequence[int]]) -> tuple[Fraction, ...]:
    """What each player's n counts for where a union's rows are the same ones: all of it together its largest n.

    Inside a union the n are scaled down in proportion.

    Args:
        counts: Each player's n, above 0.
        unions: The players' numbers, each in one union at most; whoever is in none keeps its own n.
    """
    result = [Fraction(n) for n in counts]
    for union in unions:
        total = sum(counts[i] for i in union)
        for i in union:
            result[i] = Fraction(counts[i] * max(counts[j] for j in union), total)
    return tuple(result)


def read_game(data: bytes, *, file: object = None) -> Game:
    """Read a game table: `{"players": [...], "values": {"": 0, "a": 3, "a,b": 7}}`.

    Values are integers or plain decimal strings. A coalition's players may stand in any order, each coalition once.

    Raises:
        InputError: not such a table, a coalition missing or twice, an unknown player, a float, or no number.
    """
    table = _load(data, file)
    players = _players(table["players"], file)
    bits = {name: 1 << i for i, name in enumerate(players)}
    if not isinstance(table["values"], dict):
        raise _error("GAME_TABLE_FORM", "`values` must be an object.", "values", file)
    found: dict[int, Fraction] = {}
    for key, value in table["values"].items():
        mask = _mask(key, bits, file)
        if mask in found:
            raise _error("GAME_TABLE_DUPLICATE", f"The coalition {_show(mask, players)} stands twice.", key, file)
        found[mask] = _number(value, key, file)
    missing = [mask for mask in range(2 ** len(players)) if mask not in found]
    if missing:
        first = _show(missing[0], players)
        message = f"The coalition {first} is missing ({len(missing)} of {2 ** len(players)} are)."
        raise _error("GAME_TABLE_MISSING", message, first, file)
    return Game(players=players, values=tuple(found[mask] for mask in range(2 ** len(players))))


def recompute(table_json: bytes, *, file: object = None) -> dict[str, dict[str, str]]:
    """Shapley and Banzhaf values of a game table, as exact strings ("5/2").

    Raises:
        InputError: as `read_game`.
    """
    game = read_game(table_json, file=file)
    return {
        "shapley": dict(zip(game.players, map(str, shapley(game.values)), strict=True)),
        "banzhaf": dict(zip(game.players, map(str, banzhaf(game.values)), strict=True)),
    }


def _coalitions(parts: Sequence[int]) -> list[tuple[int, int]]:
    """Every union of these disjoint masks, and in how many orders of them and one more it stands before that one."""
    found = [(0, 0)]
    for part in parts:
        found += [(mask | part, size + 1) for mask, size in found]
    return [(mask, factorial(size) * factorial(len(parts) - size)) for mask, size in found]


def _scaled(values: Sequence[int | Fraction]) -> tuple[int, Sequence[int], int]:
    """Number of players, and the values as integers over one denominator."""
    n = len(values).bit_length() - 1
    if n < 1 or len(values) != 2**n:
        raise InputError("GAME_TABLE_SIZE", f"A game of N players has 2^N values with N >= 1, not {len(values)}.")
    unit = lcm(*(v.denominator for v in values))
    return n, [v.numerator * (unit // v.denominator) for v in values], unit


def _size_sums(n: int, values: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Sums of v(S) by size of S: over all S, and for each player over the S that hold it."""
    by_size = [0] * (n + 1)
    holding = [[0] * (n + 1) for _ in range(n)]
    for mask, value in enumerate(values):
        size = mask.bit_count()
        by_size[size] += value
        rest = mask
        while rest:
            low = rest & -rest
            holding[low.bit_length() - 1][size] += value
            rest ^= low
    return by_size, holding


def _error(code: str, message: str, field: str | None, file: object) -> InputError:
    return InputError(code, message, field=field, file=file, remedy=_REMEDY)


def _load(data: bytes, file: object) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _error("GAME_TABLE_DUPLICATE", f'The key "{key}" stands twice.', key, file)
            seen.add(key)
        return dict(pairs)

    def refused(text: str) -> _Refused:
        return _Refused(text=text)

    try:
        table = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_float=refused, parse_constant=refused)
    except (UnicodeDecodeError, ValueError, RecursionError) as err:
        raise _error("GAME_TABLE_JSON", f"The table is not readable JSON: {err}.", None, file) from err
    if not isinstance(table, dict) or set(table) != {"players", "values"}:
        raise _error("GAME_TABLE_FORM", "A table has the keys `players` and `values`, and no others.", None, file)
    return table


def _players(value: object, file: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PLAYERS:
        raise _error("GAME_TABLE_PLAYERS", f"`players` must list 1 to {MAX_PLAYERS} names.", "players", file)
    for name in value:
        if not isinstance(name, str) or not name or "," in name:
            raise _error("GAME_TABLE_PLAYERS", "A player's name is a text without commas.", "players", file)
    if len(set(value)) != len(value):
        raise _error("GAME_TABLE_PLAYERS", "A player is listed twice.", "players", file)
    return tuple(value)


def _mask(key: str, bits: dict[str, int], file: object) -> int:
    mask = 0
    for name in key.split(",") if key else ():
        if name not in bits:
            raise _error("GAME_TABLE_UNKNOWN_PLAYER", f'The coalition "{key}" names "{name}".', key, file)
        if mask & bits[name]:
            raise _error("GAME_TABLE_DUPLICATE", f'The coalition "{key}" names "{name}" twice.', key, file)
        mask |= bits[name]
    return mask


def _number(value: object, key: str, file: object) -> Fraction:
    if isinstance(value, _Refused):
        message = f'The value {value.text} of the coalition "{key}" is a float; write an integer or "{value.text}".'
        raise _error("GAME_TABLE_FLOAT", message, key, file)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return Fraction(value)
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        return Fraction(value)
    message = f'The value of the coalition "{key}" is no integer or decimal string of at most 100 digits.'
    raise _error("GAME_TABLE_NUMBER", message, key, file)


def _show(mask: int, players: Sequence[str]) -> str:
    return '"' + ",".join(name for i, name in enumerate(players) if mask >> i & 1) + '"'
