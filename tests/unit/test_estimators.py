import sys
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.contract_kit import party, plain_contract
from tests.support.games import FederatedGame, held, relative_error, renormalised, seed_of, utilities

from fedpact_contract import stratified
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_contract.estimators import (
    MAX_PAIRS,
    MAX_PLAYERS,
    Estimate,
    Plan,
    agrees,
    choose,
    coalitions,
    coefficients,
    estimate,
    evaluations,
    leave_one_out,
    left_out,
    next_plan,
    precise,
)
from fedpact_contract.sampling import permutation, round_seed
from fedpact_contract.shapley import owen, shapley

SEED = seed_of("a round")


def pairs_plan(players, draws=8, seed=SEED):
    return Plan(estimator="pairs", players=players, draws=draws, seed=seed)


def stratified_plan(players, draws, seed=SEED):
    return Plan(estimator="stratified", players=players, draws=draws, seed=seed)


def exact_plan(players):
    return Plan(estimator="exact", players=players)


def members(mask):
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def quadratic(players):
    """a.1_S + 1/2 1'B1, as a function of a mask; and its Shapley values."""
    a = [Fraction((-3) ** (i % 5), i + 2) for i in range(players)]
    b = [[Fraction((i * j) % 7 - 3, i + j + 1) for j in range(players)] for i in range(players)]
    b = [[b[i][j] + b[j][i] for j in range(players)] for i in range(players)]

    def value(mask):
        s = members(mask)
        return sum((a[i] + sum((b[i][j] for j in s), Fraction(0)) / 2 for i in s), Fraction(0))

    return value, tuple(a[i] + sum(b[i]) / 2 for i in range(players))


# Coalitions


@pytest.mark.parametrize("players", [1, 2, 3, 16, 100, 128])
def test_a_pair_walks_one_permutation_from_both_ends(players):
    order = permutation(SEED, 0, players)
    full = 2**players - 1
    up = [sum(1 << i for i in order[:k]) for k in range(1, players)]
    down = [sum(1 << i for i in order[::-1][:k]) for k in range(1, players)]
    found = coalitions(pairs_plan(players, 3))
    assert found[:2] == (0, full)
    assert found[2 : 2 + len({*up, *down})] == tuple(dict.fromkeys(up + down))


@pytest.mark.parametrize("players", [1, 2, 5, 13, 50, 128])
def test_more_pairs_only_append(players):
    plans = [pairs_plan(players, k) for k in (3, 8, 16, 64)]
    for fewer, more in pairwise(map(coalitions, plans)):
        assert more[: len(fewer)] == fewer
    for plan in plans:
        masks = coalitions(plan)
        assert len(set(masks)) == len(masks) <= evaluations("pairs", players, plan.draws)


def test_eight_pairs_of_a_hundred_evaluate_what_is_documented():
    assert evaluations("pairs", 100, 8) == 1 + 1585  # nobody is known
    assert 1570 <= len(coalitions(pairs_plan(100))) <= 1586  # two permutations may begin with the same player


@pytest.mark.parametrize(("players", "draws"), [(6, 25), (7, 50), (13, 83), (16, 104), (50, 342)])
def test_stratified_coalitions_come_in_pairs_without_replacement_and_more_only_append(players, draws):
    full = 2**players - 1
    masks = coalitions(stratified_plan(players, draws))
    assert masks[:2] == (0, full)
    assert set(masks[2 : 2 + 2 * players]) == {m for i in range(players) for m in (1 << i, full ^ 1 << i)}
    drawn = masks[2 + 2 * players :]
    assert all(
        a ^ b == full and 2 <= a.bit_count() <= players // 2 for a, b in zip(drawn[::2], drawn[1::2], strict=True)
    )
    assert len(masks) == len(set(masks)) == evaluations("stratified", players, draws)
    fewer = coalitions(stratified_plan(players, 20))
    assert masks[: len(fewer)] == fewer


@pytest.mark.parametrize("players", [13, 16, 50])
def test_the_first_pass_shows_everybody_inside_and_outside_of_every_size(players):
    masks = coalitions(choose(players, game="re-normalised", linear=False, most=10**6, seed=SEED))
    for size in range(1, players):
        of_size = [m for m in masks if m.bit_count() == size]
        assert all(any(m >> i & 1 for m in of_size) for i in range(players))
        assert all(any(not m >> i & 1 for m in of_size) for i in range(players))


def test_known_coalitions_stay_what_they_are():
    """Of the seed 00 01 .. 1f: what another language must come to."""
    seed = bytes(range(32))
    assert coalitions(pairs_plan(6, 3, seed)) == (
        *(0, 63, 2, 10, 11, 15, 31, 32, 48, 52, 53, 61, 8, 9, 25, 29, 34),
        *(38, 54, 55, 4, 5, 7, 39, 47, 16, 24, 56, 58, 59),
    )
    assert coalitions(stratified_plan(6, 20, seed)) == (
        *(0, 63, 1, 62, 2, 61, 4, 59, 8, 55, 16, 47, 32, 31),
        *(10, 53, 5, 58, 48, 15, 25, 38, 34, 29, 24, 39, 22, 41, 9, 54, 20, 43, 40, 23),
        *(18, 45, 28, 35, 33, 30, 12, 51, 13, 50, 42, 21, 52, 11, 37, 26, 7, 56, 36, 27),
    )


# Values


@pytest.mark.parametrize("players", [1, 2, 3, 10, 30])
def test_one_pair_is_exact_for_a_quadratic_game(players):
    """Each pair alone is: the interval has no width."""
    value, expected = quadratic(players)
    plan = pairs_plan(players, 3)
    found = estimate(plan, [value(mask) for mask in coalitions(plan)])
    assert found == Estimate(values=expected, half_widths=(Decimal(0),) * players)


def test_values_are_the_mean_of_marginal_contributions_by_definition():
    game, players, draws = FederatedGame.drawn(9, 3), 9, 5
    plan = pairs_plan(players, draws)
    expected = [Fraction(0)] * players
    for k in range(draws):
        order = permutation(SEED, k, players)
        for walk in (order, order[::-1]):
            for place, player in enumerate(walk):
                before = sum(1 << i for i in walk[:place])
                low, high = game.values([before, before | 1 << player])
                expected[player] += Fraction(high - low, 2 * draws)
    assert estimate(plan, utilities(plan, game)).values == tuple(expected)


@pytest.mark.parametrize(("players", "worst"), [(16, 0.02), (50, 0.02), (100, 0.02)])
def test_a_game_like_federated_learning_against_the_integral(players, worst):
    """Strongly saturated: all together reach 1 - 1/e. Measured .010, .015, .013."""
    game = FederatedGame.drawn(players, 1)
    plan = choose(players, game="fixed-weight", linear=False, most=10_000, seed=SEED)
    assert (plan.estimator, plan.draws) == ("pairs", 8)
    found, expected = estimate(plan, utilities(plan, game)), game.shapley()
    assert relative_error(found.values, expected) < worst
    assert sum(held(found, expected)) >= 0.85 * players  # of nominally 95 %, in one draw


def test_the_integral_and_the_exact_estimator_agree():
    game = FederatedGame.drawn(12, 5)
    plan = choose(12, game="fixed-weight", linear=False, most=4096, seed=SEED)
    assert plan == exact_plan(12)
    found = estimate(plan, utilities(plan, game))
    assert found.values == shapley(utilities(plan, game))
    assert max(abs(float(v) - e) for v, e in zip(found.values, game.shapley(), strict=True)) <= 1  # unit of 1e-9
    assert set(found.half_widths) == {0}


@pytest.mark.parametrize("players", [13, 16, 50])
@pytest.mark.parametrize("kind", ["pairs", "stratified"])
def test_efficiency_is_exact_for_any_game(players, kind):
    plan = pairs_plan(players, 3) if kind == "pairs" else stratified_plan(players, 7 * players - 8)
    values = [(mask * 2654435761 + 12345) % 10**9 for mask in coalitions(plan)]
    assert sum(estimate(plan, values).values) == values[1] - values[0]


def test_efficiency_is_exact_in_each_permutation_pair():
    game, players = FederatedGame.drawn(16, 2), 16
    three, four = (estimate(p, utilities(p, game)).values for p in (pairs_plan(players, 3), pairs_plan(players, 4)))
    full = game.values([2**16 - 1])[0]
    assert sum(three) == sum(four) == full
    assert three != four


def test_equal_twins_are_equal_with_all_coalitions_and_within_the_interval_otherwise():
    drawn = FederatedGame.drawn(16, 4)
    p, c, pairs = drawn.p.copy(), drawn.c.copy(), np.zeros((16, 16))
    p[1], c[1] = p[0], c[0]
    twins = FederatedGame(p=p, c=c, pairs=pairs)
    found = estimate(exact_plan(16), utilities(exact_plan(16), twins)).values
    assert abs(found[0] - found[1]) <= 1
    sampled = estimate(pairs_plan(16), utilities(pairs_plan(16), twins))
    assert sampled.values[0] != sampled.values[1]
    assert abs(sampled.values[0] - sampled.values[1]) <= sum(map(Fraction, sampled.half_widths[:2]))


@pytest.mark.parametrize("players", [5, 16, 100])
def test_a_null_player_has_exactly_nothing_and_no_doubt(players):
    game, null = FederatedGame.drawn(players, 6), players // 2
    plan = exact_plan(players) if players < 13 else pairs_plan(players)
    found = estimate(plan, game.values([mask & ~(1 << null) for mask in coalitions(plan)]))
    assert (found.values[null], found.half_widths[null]) == (0, 0)
    assert all(value != 0 for i, value in enumerate(found.values) if i != null)


def test_names_enter_nowhere():
    """Players stand in the order of ids, fingerprints of keys; the seed is made of digests. Names stand elsewhere."""
    keys = [bytes([i]).hex() * 32 for i in range(1, 6)]
    contracts = []
    for names in ("abcde", "vwxyz"[::-1]):
        parties = [
            party(f"company {n}", f"{i:018d}", key, f"set-{i}", 100)
            for i, (n, key) in enumerate(zip(names, keys, strict=True))
        ]
        parties.sort(key=lambda p: str(p["name"]))
        contracts.append(Contract.parse(plain_contract(parties, "ee" * 32)))
    assert [p.name for p in contracts[0].participants] != [p.name for p in contracts[1].participants]
    assert list(contracts[0].by_id()) == list(contracts[1].by_id())
    digests = [seed_of(i).hex() for i in range(5)]
    assert round_seed(1, digests) == round_seed(1, digests[::-1])


# The linear map


@pytest.mark.parametrize(
    "plan",
    [
        *(exact_plan(n) for n in (1, 5)),
        *(pairs_plan(n, k) for n, k in ((1, 3), (4, 3), (20, 8))),
        *(stratified_plan(n, k) for n, k in ((6, 20), (6, 25), (9, 21), (20, 60))),
    ],
    ids=lambda p: f"{p.estimator}-{p.players}-{p.draws}",
)
def test_coefficients_give_the_values(plan):
    masks = coalitions(plan)
    values = [Fraction((mask * 2654435761 + 99) % 10**9, 7) for mask in masks]
    of = dict(zip(masks, values, strict=True))
    found = tuple(sum((f * of[m] for m, f in row.items()), Fraction(0)) for row in coefficients(plan))
    assert found == estimate(plan, values).values
    assert all(all(row.values()) for row in coefficients(plan))


def test_coefficients_are_independent_of_values_so_examples_add_up():
    plan, rng = pairs_plan(14), np.random.default_rng(0)
    masks = coalitions(plan)
    examples = rng.integers(0, 10**9, (3, len(masks))).tolist()
    each = [estimate(plan, row).values for row in examples]
    both = estimate(plan, [sum(column) for column in zip(*examples, strict=True)]).values
    assert both == tuple(sum(column) for column in zip(*each, strict=True))


def test_leave_one_out_compares_all_with_all_but_one():
    game, players = FederatedGame.drawn(20, 7), 20
    full = 2**players - 1
    values = dict(zip((full, *left_out(players)), game.values([full, *left_out(players)]), strict=True))
    found = leave_one_out(players, values)
    assert found == tuple(values[full] - game.values([full - 2**i])[0] for i in range(players))
    del values[full - 2**3]
    with pytest.raises(InputError) as caught:
        leave_one_out(players, values)
    assert caught.value.code == "ESTIMATOR_UTILITIES"
    assert "1 of 21" in caught.value.message
    assert hex(full - 2**3) in caught.value.message


# Stratified


@pytest.mark.parametrize("players", [6, 7, 8])
def test_with_every_coalition_drawn_stratified_values_are_exact(players):
    plan = stratified_plan(players, stratified.available(players))
    assert len(coalitions(plan)) == 2**players
    table = [(mask * 2654435761 + 7) % 10**9 for mask in range(2**players)]
    assert estimate(plan, [table[mask] for mask in coalitions(plan)]).values == shapley(table)


@pytest.mark.parametrize("seed", range(3))
def test_stratified_values_of_means_are_nearer_than_pairs_of_as_many_coalitions(seed):
    values = renormalised(16, seed)
    expected = shapley(values(range(2**16)))
    errors = {}
    for plan in (pairs_plan(16), choose(16, game="re-normalised", linear=False, most=10_000, seed=SEED)):
        found = estimate(plan, values(coalitions(plan)))
        errors[plan.estimator] = relative_error(found.values, expected)
        if plan.estimator == "stratified":
            held = [
                abs(v - e) <= Fraction(h) for v, e, h in zip(found.values, expected, found.half_widths, strict=True)
            ]
            assert sum(held) >= 13
    assert evaluations("stratified", 16, 104) == evaluations("pairs", 16, 8) == 242
    assert errors["stratified"] < errors["pairs"] / 2


@pytest.mark.parametrize("players", [6, 13])
def test_where_a_player_counts_as_in_a_mean_stratified_values_are_exact(players):
    """v(S) the mean of what its members have: the enumerated sizes foretell the rest."""
    parts = [Fraction((-3) ** (i % 4), i + 1) for i in range(players)]

    def value(mask):
        return sum((parts[i] for i in members(mask)), Fraction(0)) / max(1, mask.bit_count())

    plan = stratified_plan(players, 20)
    found = estimate(plan, [value(mask) for mask in coalitions(plan)])
    assert found.values == shapley([value(mask) for mask in range(2**players)])
    assert set(found.half_widths) == {0}


# Intervals


def test_the_half_width_is_students_over_the_pairs():
    from scipy.stats import t

    game, players, draws = FederatedGame.drawn(11, 8), 11, 6
    plan = pairs_plan(players, draws)
    singles = []
    for k in range(draws):
        order, value = permutation(SEED, k, players), [0.0] * players
        for walk in (order, order[::-1]):
            masks = np.cumsum([0, *(1 << i for i in walk)]).tolist()
            for player, (low, high) in zip(walk, pairwise(game.values(masks)), strict=True):
                value[player] += (high - low) / 2
        singles.append(value)
    expected = t.ppf(0.975, draws - 2) * np.std(singles, axis=0, ddof=1) / draws**0.5
    found = np.array(list(map(float, estimate(plan, utilities(plan, game)).half_widths)))
    assert (found >= expected).all()
    assert np.allclose(found, expected, rtol=1e-4, atol=2e-3)


def test_the_stratified_half_width_is_a_jackknife_of_twenty_groups():
    from scipy.stats import t

    players, values = 9, renormalised(9, 4)
    plan = stratified_plan(players, 47)
    masks = coalitions(plan)
    utility = list(map(Fraction, values(masks)))
    ends, estimates = 2 + 2 * players, []
    for group in range(20):
        kept = [k for k in range(len(masks)) if k < ends or (k - ends) // 2 % 20 != group]
        estimates.append(stratified.estimate(players, [masks[k] for k in kept], [utility[k] for k in kept])[0])
    column = np.array(estimates, dtype=np.float64)
    expected = t.ppf(0.975, 19) * np.sqrt(19 / 20 * ((column - column.mean(axis=0)) ** 2).sum(axis=0))
    found = np.array(list(map(float, estimate(plan, utility).half_widths)))
    assert (expected > 1000).all()
    assert np.allclose(found, expected, rtol=1e-4)


def test_intervals_cover():
    """60 draws of 16 players, each estimator on its game; 500 in tests/benchmarks."""
    game, means = FederatedGame.drawn(16, 0), renormalised(16, 0)
    for kind, draws, values, expected in (
        ("pairs", 8, game.values, game.shapley()),
        ("stratified", 104, means, shapley(means(range(2**16)))),
    ):
        covered = []
        for repetition in range(60):
            plan = Plan(estimator=kind, players=16, draws=draws, seed=seed_of(repetition))
            covered += held(estimate(plan, values(coalitions(plan))), expected)
        assert np.mean(covered) >= 0.92, kind


# The rules


@pytest.mark.parametrize(
    ("players", "game", "linear", "most", "kind", "draws"),
    [
        (1, "fixed-weight", False, 2, "exact", 0),
        (12, "fixed-weight", False, 4096, "exact", 0),
        (12, "re-normalised", False, 4096, "exact", 0),
        (12, "fixed-weight", False, 4095, "pairs", 8),
        (13, "fixed-weight", False, 10**6, "pairs", 8),
        (13, "re-normalised", False, 10**6, "stratified", 83),
        (16, "fixed-weight", True, 65_536, "exact", 0),
        (16, "fixed-weight", True, 65_535, "pairs", 8),
        (17, "fixed-weight", True, 10**6, "pairs", 8),
        (16, "re-normalised", False, 200, "stratified", 83),
        (5, "fixed-weight", False, 31, "pairs", 3),
        (100, "fixed-weight", False, 1586, "pairs", 8),
        (100, "fixed-weight", False, 1585, "pairs", 7),
        (100, "fixed-weight", False, 596, "pairs", 3),
        (128, "re-normalised", False, 10**6, "stratified", 888),
    ],
)
def test_the_rule_that_chooses(players, game, linear, most, kind, draws):
    plan = choose(players, game=game, linear=linear, most=most, seed=SEED)
    assert (plan.estimator, plan.draws) == (kind, draws)
    assert len(coalitions(plan)) <= most


@pytest.mark.parametrize(
    ("players", "game", "most", "needed"),
    [
        (100, "fixed-weight", 595, 596),
        (3, "fixed-weight", 7, 8),
        (1, "fixed-weight", 1, 2),
        (5, "re-normalised", 31, 32),
        (13, "re-normalised", 67, 68),
    ],
)
def test_too_small_a_budget_is_refused_with_what_would_do(players, game, most, needed):
    with pytest.raises(InputError) as caught:
        choose(players, game=game, linear=False, most=most, seed=SEED)
    assert caught.value.code == "ESTIMATOR_BUDGET"
    assert f"at least {needed}" in caught.value.message
    assert str(needed) in caught.value.remedy
    assert choose(players, game=game, linear=False, most=needed, seed=SEED)


@pytest.mark.parametrize(
    "change",
    [
        {"players": 0},
        {"players": -1},
        {"players": MAX_PLAYERS + 1},
        {"draws": 2},
        {"draws": MAX_PAIRS + 1},
        {"seed": b""},
        {"seed": bytes(31)},
        {"estimator": "exact"},
        {"estimator": "exact", "draws": 0},
        {"estimator": "exact", "draws": 0, "seed": b"", "players": 17},
        {"estimator": "stratified", "draws": 19},
        {"estimator": "stratified", "draws": 20, "players": 5},
    ],
)
def test_a_plan_that_no_rule_gives_is_refused(change):
    with pytest.raises(InputError) as caught:
        Plan(**{"estimator": "pairs", "players": 13, "draws": 8, "seed": SEED} | change)
    assert caught.value.code == "ESTIMATOR_PLAN"
    assert caught.value.remedy


@pytest.mark.parametrize("players", [0, MAX_PLAYERS + 1])
@pytest.mark.parametrize("game", ["fixed-weight", "re-normalised"])
def test_no_rule_scores_nobody_or_too_many(players, game):
    with pytest.raises(InputError) as caught:
        choose(players, game=game, linear=False, most=10**6, seed=SEED)
    assert caught.value.code == "ESTIMATOR_PLAN"


def test_values_that_are_not_those_of_the_plan_are_refused():
    plan = pairs_plan(13)
    for utility in ([], [0] * (len(coalitions(plan)) - 1), [0] * (len(coalitions(plan)) + 1)):
        with pytest.raises(InputError) as caught:
            estimate(plan, utility)
        assert caught.value.code == "ESTIMATOR_UTILITIES"


def estimated(values, halves):
    return Estimate(values=tuple(map(Fraction, values)), half_widths=tuple(map(Decimal, halves)))


@pytest.mark.parametrize(
    ("halves", "errors", "enough"),
    [
        (["10", "20"], ["100", "200"], True),  # a tenth of the validation error
        (["10.001", "20"], ["100", "200"], False),
        (["10", "10.001"], ["1000", "100"], False),
        (["5", "5"], ["0", "0"], True),  # 0.5 % of 1000
        (["5", "5.001"], ["0", "0"], False),
        (["0", "0"], ["0", "0"], True),
    ],
)
def test_the_rule_that_stops(halves, errors, enough):
    for values in ([900, 100], [-900, -100]):
        assert precise(estimated(values, halves), list(map(Decimal, errors))) is enough


def test_draws_double_until_they_suffice_or_no_more_are_allowed():
    rough, fine = estimated([900] * 20, ["10000"] * 20), estimated([900] * 20, ["0.1"] * 20)
    none = [Decimal(0)] * 20
    plan, steps = pairs_plan(20), []
    while plan is not None:
        steps.append(plan.draws)
        plan = next_plan(plan, rough, most=10**6, validation_errors=none)
    assert steps == [8, 16, 32, 64]
    assert next_plan(pairs_plan(20), fine, most=10**6, validation_errors=none) is None
    least = next_plan(pairs_plan(20), rough, most=evaluations("pairs", 20, 11), validation_errors=none)
    assert least == pairs_plan(20, 11)
    assert next_plan(least, rough, most=evaluations("pairs", 20, 11), validation_errors=none) is None
    assert next_plan(exact_plan(2), estimated([1, 2], ["0", "0"]), most=4, validation_errors=none[:2]) is None
    drawn = next_plan(stratified_plan(20, 132), rough, most=10**6, validation_errors=none)
    assert drawn == stratified_plan(20, 264)


def test_first_order_values_that_disagree_double_the_draws_once():
    values = estimated(range(1, 21), ["0"] * 20)
    arguments = {"most": 10**6, "validation_errors": [Decimal(0)] * 20}
    odd = [Fraction((7 * k) % 20) for k in range(20)]
    near = [Fraction(3 * k + k % 2) for k in range(20)]
    assert next_plan(pairs_plan(20), values, first_order=near, **arguments) is None
    raised = next_plan(pairs_plan(20), values, first_order=odd, **arguments)
    assert raised == pairs_plan(20, 16)
    assert next_plan(raised, values, first_order=odd, **arguments) is None


def test_agreement_is_a_correlation_of_nine_tenths():
    ahead = [Fraction(v) for v in (1, 2, 3, 4)]
    assert agrees(ahead, [10 * v + 5 for v in ahead])
    assert not agrees(ahead, [-v for v in ahead])
    assert not agrees(ahead, [Fraction(1)] * 4)
    assert agrees([Fraction(2)] * 4, [Fraction(1)] * 4)
    assert agrees(ahead[:2], [Fraction(2), Fraction(1)])
    rng = np.random.default_rng(0)
    for spread in np.linspace(0.2, 1.0, 30):
        a = rng.integers(0, 100, 9)
        b = np.rint(a + rng.normal(0, 30 * spread, 9)).astype(int)
        whole = [[Fraction(int(v)) for v in side] for side in (a, b)]
        assert agrees(*whole) is bool(np.corrcoef(a, b)[0, 1] >= 0.9)


class TestUnions:
    """Players that count as one: Owen's values, exact or from orders in which a union arrives together."""

    UNIONS = ((0, 4), (2, 5, 6))

    def table(self) -> list[Fraction]:
        rng = np.random.default_rng(3)
        return [Fraction(int(v)) for v in rng.integers(-100, 100, 2**8)]

    def test_exact_values_are_owens_and_linear(self) -> None:
        table, plan = self.table(), Plan(estimator="exact", players=8, unions=self.UNIONS)
        values = estimate(plan, table).values
        assert values == owen(table, plan.blocks)
        assert values == tuple(sum(table[m] * f for m, f in own.items()) for own in coefficients(plan))

    def test_unions_arrive_together_and_values_are_linear_and_efficient(self) -> None:
        table, plan = self.table(), Plan(estimator="pairs", players=8, draws=5, seed=b"s" * 32, unions=self.UNIONS)
        masks = coalitions(plan)
        for union in self.UNIONS:
            bits = sum(1 << i for i in union)
            cut = [m & bits for m in masks if m & bits not in (0, bits)]
            assert cut, "there are orders that cut the union"
            for mask in masks:  # while a union is cut, each other one has arrived as a whole or not at all
                if mask & bits not in (0, bits):
                    for other in self.UNIONS:
                        whole = sum(1 << i for i in other)
                        assert other == union or mask & whole in (0, whole)
        values = estimate(plan, [table[m] for m in masks]).values
        assert sum(values) == table[-1] - table[0]
        assert values == tuple(sum(table[m] * f for m, f in own.items()) for own in coefficients(plan))

    def test_draws_are_unbiased_for_owens_values(self) -> None:
        """The mean over many seeds is near; an order of blocks that hangs on the order inside would not be."""
        table = self.table()
        due = [float(v) for v in owen(table, Plan(estimator="exact", players=8, unions=self.UNIONS).blocks)]
        found = []
        for k in range(400):
            plan = Plan(estimator="pairs", players=8, draws=8, seed=seed_of(k), unions=self.UNIONS)
            found.append([float(v) for v in estimate(plan, [table[m] for m in coalitions(plan)]).values])
        mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / 20
        assert np.all(np.abs(mean - due) < 4 * error)

    def test_more_draws_only_append_coalitions(self) -> None:
        few = Plan(estimator="pairs", players=8, draws=4, seed=b"s" * 32, unions=self.UNIONS)
        more = Plan(estimator="pairs", players=8, draws=8, seed=b"s" * 32, unions=self.UNIONS)
        assert coalitions(more)[: len(coalitions(few))] == coalitions(few)

    @pytest.mark.parametrize("unions", [((0,),), ((0, 1), (1, 2)), ((0, 9),), ((0, 0),)])
    def test_no_partition_is_refused(self, unions) -> None:
        with pytest.raises(InputError) as caught:
            Plan(estimator="exact", players=8, unions=unions)
        assert caught.value.code == "ESTIMATOR_PLAN"
