from fractions import Fraction
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from fedpact_contract.shapley import banzhaf, shapley

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
