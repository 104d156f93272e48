from fractions import Fraction
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from fedpact_contract.shapley import banzhaf, owen, shapley

numbers = st.one_of(
    st.integers(-(10**20), 10**20), st.fractions(min_value=-1000, max_value=1000, max_denominator=10**6)
)


@st.composite
def games(draw, most=5):
    n = draw(st.integers(1, most))
    return draw(st.lists(numbers, min_size=2**n, max_size=2**n))


def players(game):
    return len(game).bit_length() - 1


def moved(mask, order):
    """The coalition after player i was renamed order[i]."""
    return sum(1 << order[i] for i in range(len(order)) if mask >> i & 1)


@given(games(most=4))
def test_shapley_is_the_mean_over_all_orders_of_arrival(game):
    n = players(game)
    total, orders = [Fraction(0)] * n, list(permutations(range(n)))
    for order in orders:
        mask = 0
        for i in order:
            total[i] += Fraction(game[mask | 1 << i]) - Fraction(game[mask])
            mask |= 1 << i
    assert list(shapley(game)) == [t / len(orders) for t in total]


@given(games())
def test_banzhaf_is_the_mean_marginal_contribution(game):
    for i, value in enumerate(banzhaf(game)):
        without = [mask for mask in range(len(game)) if not mask >> i & 1]
        assert value == sum((Fraction(game[m | 1 << i]) - Fraction(game[m]) for m in without), Fraction(0)) / len(
            without
        )


@given(games())
def test_efficiency(game):
    assert sum(shapley(game), Fraction(0)) == Fraction(game[-1]) - Fraction(game[0])


@given(games(), st.data())
def test_a_null_player_has_exactly_nothing(game, data):
    i = data.draw(st.integers(0, players(game) - 1))
    game = [game[mask & ~(1 << i)] for mask in range(len(game))]
    assert shapley(game)[i] == banzhaf(game)[i] == 0


@given(games(), st.data())
def test_interchangeable_players_have_the_same_value(game, data):
    i, j = data.draw(st.tuples(*[st.integers(0, players(game) - 1)] * 2))
    swap = list(range(players(game)))
    swap[i], swap[j] = j, i
    game = [Fraction(game[mask]) + Fraction(game[moved(mask, swap)]) for mask in range(len(game))]
    assert shapley(game)[i] == shapley(game)[j]
    assert banzhaf(game)[i] == banzhaf(game)[j]


@given(games(), st.data())
def test_renaming_permutes_the_values(game, data):
    order = data.draw(st.permutations(range(players(game))))
    renamed = [Fraction(0)] * len(game)
    for mask, value in enumerate(game):
        renamed[moved(mask, order)] = Fraction(value)
    for value in (shapley, banzhaf):
        before, after = value(game), value(renamed)
        assert all(after[order[i]] == before[i] for i in range(players(game)))


@given(games(), st.data())
def test_additivity(game, data):
    other = data.draw(st.lists(numbers, min_size=len(game), max_size=len(game)))
    both = [Fraction(a) + Fraction(b) for a, b in zip(game, other, strict=True)]
    for value in (shapley, banzhaf):
        assert value(both) == tuple(a + b for a, b in zip(value(game), value(other), strict=True))


@given(games(), st.fractions(max_denominator=1000))
def test_homogeneity(game, factor):
    assert shapley([Fraction(v) * factor for v in game]) == tuple(v * factor for v in shapley(game))


@st.composite
def games_with_unions(draw):
    game = draw(games(most=4))
    groups = draw(st.lists(st.integers(0, 3), min_size=players(game), max_size=players(game)))
    return game, [[i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))]


@given(games_with_unions())
def test_owen_is_the_mean_over_the_orders_in_which_unions_stand_together(case):
    game, unions = case
    n = players(game)
    places = [{i: k for k, union in enumerate(unions) for i in union}[i] for i in range(n)]
    orders = [
        order
        for order in permutations(range(n))
        if all(a == b or b not in [places[i] for i in order[:k]] for k, (a, b) in enumerate(_steps(order, places)))
    ]
    total = [Fraction(0)] * n
    for order in orders:
        mask = 0
        for i in order:
            total[i] += Fraction(game[mask | 1 << i]) - Fraction(game[mask])
            mask |= 1 << i
    assert list(owen(game, unions)) == [t / len(orders) for t in total]


def _steps(order, places):
    """(union of the one before, union of this one) along an order."""
    return [(None if k == 0 else places[order[k - 1]], places[i]) for k, i in enumerate(order)]


@given(games())
def test_owen_without_unions_or_with_one_of_all_is_shapley(game):
    n = players(game)
    assert owen(game, [[i] for i in range(n)]) == owen(game, [list(range(n))]) == shapley(game)


@given(games_with_unions())
def test_a_union_has_the_value_that_it_has_among_unions(case):
    game, unions = case
    masks = [sum(1 << i for i in union) for union in unions]
    among = shapley([game[sum(m for k, m in enumerate(masks) if s >> k & 1)] for s in range(2 ** len(unions))])
    values = owen(game, unions)
    assert [sum((values[i] for i in union), Fraction(0)) for union in unions] == list(among)
