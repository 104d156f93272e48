"""Laws of the sampled estimators, for any game: whatever holds of all orders holds of the orders drawn."""

from fractions import Fraction
from hashlib import sha256

from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact_contract import estimators, stratified
from fedpact_contract.estimators import Plan, coalitions, coefficients, estimate
from fedpact_contract.sampling import permutation

laws = settings(deadline=None, max_examples=50)
seeds = st.binary(min_size=32, max_size=32)


@st.composite
def plans(draw):
    kind = draw(st.sampled_from(["exact", "pairs", "stratified"]))
    if kind == "exact":
        return Plan(estimator="exact", players=draw(st.integers(1, 6)))
    if kind == "pairs":
        return Plan(
            estimator="pairs", players=draw(st.integers(1, 24)), draws=draw(st.integers(3, 9)), seed=draw(seeds)
        )
    players = draw(st.integers(6, 20))
    draws = draw(st.integers(20, min(60, stratified.available(players))))
    return Plan(estimator="stratified", players=players, draws=draws, seed=draw(seeds))


def game(label, masks):
    """Any values, the same for the same mask: nothing about them is additive."""
    return [int.from_bytes(sha256(b"%d:%d" % (label, mask)).digest()[:5], "big") - 2**39 for mask in masks]


def moved(mask, order):
    """The coalition after player i was renamed order[i]."""
    return sum(1 << order[i] for i in range(len(order)) if mask >> i & 1)


@laws
@given(plans(), st.integers(0, 10**6))
def test_efficiency(plan, label):
    values = game(label, coalitions(plan))
    masks = coalitions(plan)
    total = values[masks.index(2**plan.players - 1)] - values[masks.index(0)]
    assert sum(estimate(plan, values).values, Fraction(0)) == total


@laws
@given(plans(), st.integers(0, 10**6))
def test_values_are_their_coefficients(plan, label):
    masks = coalitions(plan)
    of = dict(zip(masks, game(label, masks), strict=True))
    rows = coefficients(plan)
    found = estimate(plan, list(of.values())).values
    assert found == tuple(sum((factor * of[mask] for mask, factor in row.items()), Fraction(0)) for row in rows)
    assert all(sum(row.values(), Fraction(0)) == 0 for row in rows)  # a constant is nobody's


@laws
@given(plans(), st.integers(0, 10**6), st.fractions(max_denominator=100))
def test_additivity_and_homogeneity(plan, label, factor):
    masks = coalitions(plan)
    one, other = game(label, masks), game(label + 1, masks)
    both = [a + factor * b for a, b in zip(one, other, strict=True)]
    pairs = zip(estimate(plan, one).values, estimate(plan, other).values, strict=True)
    assert estimate(plan, both).values == tuple(a + factor * b for a, b in pairs)


@laws
@given(plans().filter(lambda p: p.estimator != "stratified"), st.integers(0, 10**6), st.data())
def test_a_null_player_has_exactly_nothing(plan, label, data):
    null = data.draw(st.integers(0, plan.players - 1))
    found = estimate(plan, game(label, [mask & ~(1 << null) for mask in coalitions(plan)]))
    assert (found.values[null], found.half_widths[null]) == (0, 0)


@laws
@given(plans(), st.integers(0, 10**6))
def test_an_additive_game_is_found_exactly(plan, label):
    parts = game(label, range(plan.players))
    values = [sum(p for i, p in enumerate(parts) if mask >> i & 1) for mask in coalitions(plan)]
    found = estimate(plan, values)
    assert found.values == tuple(parts)
    assert set(found.half_widths) == {0}


@laws
@given(plans(), st.integers(0, 10**6), st.data())
def test_players_that_change_places_take_their_values_along(plan, label, data):
    """Nothing favours a position: with the orders drawn renamed too, values and intervals are renamed exactly."""
    order = data.draw(st.permutations(range(plan.players)))
    masks = coalitions(plan)
    before = estimate(plan, game(label, masks))
    of = {moved(mask, order): value for mask, value in zip(masks, game(label, masks), strict=True)}
    renamed = Plan(estimator=plan.estimator, players=plan.players, draws=plan.draws, seed=plan.seed)

    def drawn(seed, index, count):
        return tuple(order[i] for i in permutation(seed, index, count))

    patched = (estimators, stratified)
    try:
        for module in patched:
            module.permutation = drawn
        coalitions.cache_clear()
        after = estimate(renamed, [of[mask] for mask in coalitions(renamed)])
    finally:
        for module in patched:
            module.permutation = permutation
        coalitions.cache_clear()
    assert all(after.values[order[i]] == before.values[i] for i in range(plan.players))
    assert all(after.half_widths[order[i]] == before.half_widths[i] for i in range(plan.players))
