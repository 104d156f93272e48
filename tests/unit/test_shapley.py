import json
import random
from fractions import Fraction
from itertools import pairwise

import pytest

from fedpact_contract.errors import InputError
from fedpact_contract.shapley import banzhaf, owen, read_game, recompute, shapley, union_counts


def table(n, value):
    return [value([i for i in range(n) if mask >> i & 1]) for mask in range(2**n)]


def voting(quota, weights):
    return table(len(weights), lambda s: int(sum(weights[i] for i in s) >= quota))


def integral(coefficients):
    """Of the polynomial with these coefficients, from 0 to 1."""
    return sum((Fraction(c) / (k + 1) for k, c in enumerate(coefficients)), Fraction(0))


def product(polynomials):
    result = [Fraction(1)]
    for a, b in polynomials:
        result = [a * x + b * y for x, y in zip([*result, Fraction(0)], [Fraction(0), *result], strict=True)]
    return result


def test_glove_game():
    game = table(3, lambda s: int(0 in s and (1 in s or 2 in s)))
    assert shapley(game) == (Fraction(2, 3), Fraction(1, 6), Fraction(1, 6))
    assert banzhaf(game) == (Fraction(3, 4), Fraction(1, 4), Fraction(1, 4))


def test_majority_game():
    game = voting(51, [50, 49, 1])
    assert shapley(game) == (Fraction(2, 3), Fraction(1, 6), Fraction(1, 6))
    assert banzhaf(game) == (Fraction(3, 4), Fraction(1, 4), Fraction(1, 4))


def test_owen_values_of_the_glove_game():
    """The left glove and a right one bargain together: the other right one is not needed, and yet it counts inside."""
    game = table(3, lambda s: int(0 in s and (1 in s or 2 in s)))
    assert owen(game, [[0, 1], [2]]) == (Fraction(3, 4), Fraction(1, 4), 0)
    assert owen(game, [[0], [1, 2]]) == (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))


def test_a_union_alone_moves_nothing_in_an_additive_game():
    """So the union's n must count once: that is what takes from two copies what they are too many."""
    game = table(4, lambda s: sum([5, 7, 7, 11][i] for i in s))
    assert owen(game, [[0], [1, 2], [3]]) == shapley(game) == (5, 7, 7, 11)
    assert union_counts([100, 200, 200, 300], [[0], [1, 2], [3]]) == (100, 100, 100, 300)
    assert union_counts([300, 100, 7], [[0, 1], [2]]) == (225, 75, 7)


def test_of_copies_in_one_union_none_counts_more_than_once():
    """A union that is worth what one of it is worth: together they have its Shapley value beside one other."""
    game = table(3, lambda s: 6 * int(0 in s or 1 in s) + 4 * int(2 in s) - 2 * int(2 in s and len(s) > 1))
    assert owen(game, [[0, 1], [2]]) == (Fraction(5, 2), Fraction(5, 2), 3)


@pytest.mark.parametrize("unions", [[], [[0, 1]], [[0, 1], [1, 2]], [[0, 1], [2], []], [[0, 1], [2, 3]]])
def test_unions_that_are_no_partition_are_refused(unions):
    with pytest.raises(InputError) as caught:
        owen([0] * 8, unions)
    assert caught.value.code == "GAME_UNIONS"


def test_airport_game():
    costs = [8, 11, 13, 18]
    assert shapley(table(4, lambda s: max((costs[i] for i in s), default=0))) == (2, 3, 4, 9)


def test_unanimity_game():
    assert shapley(table(4, lambda s: int({0, 2} <= set(s)))) == (Fraction(1, 2), 0, Fraction(1, 2), 0)
    assert shapley(table(5, lambda s: int({1, 2, 4} <= set(s)))) == (
        0,
        Fraction(1, 3),
        Fraction(1, 3),
        0,
        Fraction(1, 3),
    )


def test_united_nations_security_council():
    values = shapley(voting(39, [7] * 5 + [1] * 10))
    assert values == (Fraction(421, 2145),) * 5 + (Fraction(4, 2145),) * 10


def test_quadratic_game():
    a = [Fraction(3), Fraction(-1, 7), Fraction(5, 2), Fraction(0)]
    b = [[0, 4, Fraction(1, 3), -2], [4, 0, 1, 1], [Fraction(1, 3), 1, 0, Fraction(7, 5)], [-2, 1, Fraction(7, 5), 0]]
    game = table(
        4, lambda s: sum((a[i] + sum((Fraction(b[i][j]) for j in s), Fraction(0)) / 2 for i in s), Fraction(0))
    )
    assert shapley(game) == tuple(a[i] + sum(map(Fraction, b[i])) / 2 for i in range(4))


def test_game_like_federated_learning_with_12_players():
    n, p = 12, [Fraction(k + 1, 40) for k in range(12)]
    c = [Fraction((-1) ** k, k + 2) for k in range(n)]

    def value(s):
        rest = Fraction(1)
        for i in s:
            rest *= 1 - p[i]
        return 1 - rest + sum((c[i] for i in s), Fraction(0))

    expected = tuple(
        p[i] * integral(product([(Fraction(1), -p[j]) for j in range(n) if j != i])) + c[i] for i in range(n)
    )
    assert shapley(table(n, value)) == expected


def test_a_value_of_the_empty_coalition_is_nobodys():
    assert shapley([5, 7]) == (2,)
    assert banzhaf([5, 7]) == (2,)


@pytest.mark.parametrize("size", [0, 1, 3, 6])
def test_a_table_of_another_size_is_refused(size):
    for value in (shapley, banzhaf, lambda game: owen(game, [])):
        with pytest.raises(InputError) as caught:
            value([0] * size)
        assert caught.value.code == "GAME_TABLE_SIZE"


GOOD = {"players": ["a", "b", "c"], "values": {"": 0, "a": 3, "b": "2.5", "c": "-0.25", "b,a": 7, "a,c": 4, "b,c": 2}}


def game_json(**changes):
    return json.dumps({**GOOD, **changes}).encode()


def with_values(**values):
    return game_json(values={**GOOD["values"], "c,a,b": 8, **values})


def test_recompute_gives_exact_strings():
    result = recompute(b'{"players": ["a", "b"], "values": {"": 0, "a": 3, "b": "2.5", "b,a": 7}}')
    assert result == {"shapley": {"a": "15/4", "b": "13/4"}, "banzhaf": {"a": "15/4", "b": "13/4"}}
    assert recompute(b'{"players": ["a"], "values": {"": 0, "a": 3}}')["shapley"] == {"a": "3"}


def test_a_table_is_read_in_mask_order_whatever_the_order_of_its_keys():
    game = read_game(with_values())
    assert game.players == ("a", "b", "c")
    assert game.values == (0, 3, Fraction(5, 2), 7, Fraction(-1, 4), 4, 2, 8)
    shuffled = json.loads(with_values())
    shuffled["values"] = dict(reversed(shuffled["values"].items()))
    assert read_game(json.dumps(shuffled).encode()) == game


def test_a_missing_coalition_is_named():
    with pytest.raises(InputError) as caught:
        read_game(game_json(), file="game.json")
    error = caught.value
    assert (error.code, error.field, error.file) == ("GAME_TABLE_MISSING", '"a,b,c"', "game.json")
    assert '"a,b,c"' in error.message


def test_every_missing_coalition_is_noticed():
    full = json.loads(with_values())["values"]
    for key in full:
        with pytest.raises(InputError) as caught:
            read_game(game_json(values={k: v for k, v in full.items() if k != key}))
        assert caught.value.code == "GAME_TABLE_MISSING"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "GAME_TABLE_JSON"),
        (b"\xff", "GAME_TABLE_JSON"),
        (b"[" * 100_000, "GAME_TABLE_JSON"),
        (b'{"players": ["a"], "values": {"": 0, "a": ' + b"9" * 5000 + b"}}", "GAME_TABLE_JSON"),
        (b"[]", "GAME_TABLE_FORM"),
        (b"1.5", "GAME_TABLE_FORM"),
        (b'{"players": ["a"]}', "GAME_TABLE_FORM"),
        (game_json(extra=1), "GAME_TABLE_FORM"),
        (game_json(values=[0, 1]), "GAME_TABLE_FORM"),
        (game_json(players=[]), "GAME_TABLE_PLAYERS"),
        (game_json(players="abc"), "GAME_TABLE_PLAYERS"),
        (game_json(players=["a", "a", "b"]), "GAME_TABLE_PLAYERS"),
        (game_json(players=["a", "b,c"]), "GAME_TABLE_PLAYERS"),
        (game_json(players=["a", ""]), "GAME_TABLE_PLAYERS"),
        (game_json(players=["a", 1]), "GAME_TABLE_PLAYERS"),
        (game_json(players=[str(i) for i in range(17)]), "GAME_TABLE_PLAYERS"),
        (with_values(**{"b,a,c": 8}), "GAME_TABLE_DUPLICATE"),
        (with_values(**{"a,a": 3}), "GAME_TABLE_DUPLICATE"),
        (b'{"players": ["a"], "values": {"": 0, "a": 3, "a": 4}}', "GAME_TABLE_DUPLICATE"),
        (with_values(d=1), "GAME_TABLE_UNKNOWN_PLAYER"),
        (with_values(**{"a, b": 1}), "GAME_TABLE_UNKNOWN_PLAYER"),
        (with_values(**{"a,": 1}), "GAME_TABLE_UNKNOWN_PLAYER"),
        (with_values(a=3.5), "GAME_TABLE_FLOAT"),
        (with_values(a=float("nan")), "GAME_TABLE_FLOAT"),
        (with_values(a=float("inf")), "GAME_TABLE_FLOAT"),
        (with_values(a=1e300), "GAME_TABLE_FLOAT"),
        (with_values(a=True), "GAME_TABLE_NUMBER"),
        (with_values(a=None), "GAME_TABLE_NUMBER"),
        (with_values(a=[1]), "GAME_TABLE_NUMBER"),
        (with_values(a="x"), "GAME_TABLE_NUMBER"),
        (with_values(a="1e3"), "GAME_TABLE_NUMBER"),
        (with_values(a="1/3"), "GAME_TABLE_NUMBER"),
        (with_values(a=" 1"), "GAME_TABLE_NUMBER"),
        (with_values(a="1\n"), "GAME_TABLE_NUMBER"),
        (with_values(a="٣"), "GAME_TABLE_NUMBER"),
        (with_values(a="NaN"), "GAME_TABLE_NUMBER"),
        (with_values(a=10**100), "GAME_TABLE_NUMBER"),
        (with_values(a="9" * 101), "GAME_TABLE_NUMBER"),
    ],
    ids=lambda value: value if isinstance(value, str) else "table",
)
def test_a_bad_table_is_refused_with_its_code(data, code):
    with pytest.raises(InputError) as caught:
        read_game(data)
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_sixteen_players_are_read():
    n = 16
    names = [f"p{i}" for i in range(n)]
    keys = [",".join(names[i] for i in range(n) if mask >> i & 1) for mask in range(2**n)]
    values = {key: len(key.split(",")) if key else 0 for key in keys}
    result = recompute(json.dumps({"players": names, "values": values}).encode())
    assert set(result["shapley"].values()) == {"1"}
    assert all(a == b for a, b in pairwise(result["banzhaf"].values()))


def test_owen_coefficients_give_owen_values() -> None:
    from fedpact_contract.shapley import owen_coefficients

    rng = random.Random(5)
    table = [Fraction(rng.randrange(-50, 50)) for _ in range(32)]
    unions = ((0, 3), (1,), (2, 4))
    factors = owen_coefficients(5, unions)
    assert tuple(sum(table[mask] * f for mask, f in own.items()) for own in factors) == owen(table, unions)
