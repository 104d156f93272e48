import sys
from fractions import Fraction
from itertools import pairwise
from math import floor
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.settlement_kit import a_contract, a_round, linear_round, steady_moments

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contribution import own_slice_difference, period_values, round_values, total_value
from fedpact_contract.settlement import (
    largest_remainder,
    settle_period,
    settle_unopened,
    statement,
    water_fill,
    water_level,
)
from fedpact_contract.shares import shares

CONTRACT = a_contract(slices=((None, 30),))
TWO = a_contract(slices=((None, 30), (1, 20)))

names = st.text("abcdef0123456789", min_size=1, max_size=4)
weights = st.one_of(
    st.just(Fraction(0)), st.integers(1, 10**12).map(Fraction), st.fractions(0, 10**6, max_denominator=10**6)
)
weighted = st.dictionaries(names, weights, min_size=1, max_size=12).filter(lambda w: any(w.values()))
amounts = st.integers(0, 10**15)
loss_tables = st.lists(st.tuples(*[st.integers(0, 10**12)] * 2), min_size=8, max_size=8)


@given(amounts, weighted)
def test_largest_remainder_is_exact_in_sum_and_within_a_fen(total, shares_):
    paid = largest_remainder(total, shares_)
    whole = sum(shares_.values())
    assert sum(paid.values()) == total
    assert all(abs(paid[k] - total * w / whole) < 1 for k, w in shares_.items())
    assert min(paid.values()) >= 0


@given(amounts, weighted)
def test_a_larger_weight_is_never_paid_less(total, shares_):
    paid = largest_remainder(total, shares_)
    ranked = sorted(shares_, key=shares_.__getitem__)
    for a, b in pairwise(ranked):
        assert shares_[a] == shares_[b] or paid[a] <= paid[b]


@given(amounts, weighted, st.data())
def test_renaming_moves_nothing_but_ties(total, shares_, data):
    new = data.draw(st.permutations(list(shares_)))
    name = dict(zip(shares_, new, strict=True))
    before = largest_remainder(total, shares_)
    after = largest_remainder(total, {name[k]: w for k, w in shares_.items()})
    whole = sum(shares_.values())
    remainder = {k: total * w / whole - floor(total * w / whole) for k, w in shares_.items()}
    for key in shares_:
        if before[key] != after[name[key]]:
            assert any(remainder[key] == remainder[other] for other in shares_ if other != key)
    assert sorted(before.values()) == sorted(after.values())


@given(amounts, weighted, st.data())
def test_water_filling(pool, shares_, data):
    floors = {k: data.draw(st.integers(0, max(1, pool))) for k in shares_}
    paid, level = water_fill(pool, shares_, floors), water_level(pool, shares_, floors)
    assert sum(paid.values()) == pool
    if level is None:
        assert sum(floors.values()) > pool
        assert all(paid[k] * sum(floors.values()) == pool * f for k, f in floors.items())
    else:
        assert all(paid[k] == max(f, level * shares_[k]) for k, f in floors.items())


@given(amounts, weighted, st.data())
def test_affordable_floors_are_respected_in_whole_fen(pool, shares_, data):
    floors = {k: data.draw(st.integers(0, pool // len(shares_))) for k in shares_}
    paid = largest_remainder(pool, water_fill(pool, shares_, floors))
    assert sum(paid.values()) == pool
    assert all(paid[k] >= floor_ for k, floor_ in floors.items())


GROUPS = ((), ((0, 1),), ((0, 2), (1, 3)), ((1, 2, 3),))
BY_GROUPS = {
    (groups, floors): a_contract(
        (100, 200, 300, 50), floors=floors, weights=("0", "0.4", "0.6"), slices=((None, 30),), control=groups
    )
    for groups in GROUPS
    for floors in ((0, 0, 0, 0), (100, 0, 250, 70), (400, 400, 400, 400))
}
presence = st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=5)


@settings(max_examples=150)
@given(st.sampled_from(list(BY_GROUPS)), presence, st.integers(0, 3000), st.booleans())
def test_a_group_is_paid_as_one_and_everybody_else_as_if_it_were_one(terms, rounds, pool, united):
    groups, floors = terms
    contract = BY_GROUPS[terms]
    ids = list(contract.by_id())
    admitted = [tuple(ids[i] for i in sorted(places)) for places in rounds]
    unions = [[[ids[0], ids[1]]]] * len(rounds) if united else []
    result = settle_unopened(contract, admitted, pool, 0, unions)
    lines = {line.participant: line for line in result.lines}
    assert sum(line.exact for line in result.lines) == sum(line.fen for line in result.lines) == pool
    assert sum(line.share.share for line in result.lines) == 1
    assert len(result.split.groups) == len(groups)
    for group in result.split.groups:
        inside = [lines[p] for p in group.members]
        assert group.exact == sum(line.exact for line in inside)
        assert group.floor_fen <= min(
            sum(x.floor_fen for x in inside), max(floors[ids.index(p)] for p in group.members)
        )
        there = sum(any(p in names for p in group.members) for names in admitted)
        assert sum(line.share.counted.rounds for line in inside) <= there
        if not united:
            assert sum(line.share.counted.rounds for line in inside) == there
        if result.level is not None:
            assert group.exact == max(group.floor_fen, result.level * sum(line.share.share for line in inside))
    alone = set(ids) - {p for group in result.split.groups for p in group.members}
    if result.level is not None:
        assert all(lines[p].exact == max(lines[p].floor_fen, result.level * lines[p].share.share) for p in alone)
    assert result.split.floors_fen <= sum(line.floor_fen for line in result.lines)


# Values


@given(loss_tables)
def test_values_without_own_slices_are_efficient(table):
    contract = a_contract(slices=((None, 50),))
    scores = a_round(contract, [[sum(row)] for row in table])
    values = round_values(scores, contract)
    assert sum(values.values()) == Fraction(sum(table[0]) - sum(table[-1]), 50)
    assert own_slice_difference([scores], contract) == 0


@given(loss_tables)
def test_values_add_up_over_slices(table):
    """What the operator splits into slices of its own does not matter, only their sum."""
    others = {k: v for k, v in round_values(a_round(TWO, table), TWO).items() if k != list(TWO.by_id())[1]}
    merged = round_values(a_round(CONTRACT, [[sum(row)] for row in table]), CONTRACT)
    for key in others:
        assert others[key] * 50 == merged[key] * 30


@given(loss_tables, loss_tables)
def test_values_add_up_over_rounds(first, second):
    second = [first[-1], *second[1:]]
    rounds = [a_round(TWO, first), a_round(TWO, second, number=2)]
    both = period_values(rounds, TWO)
    one, two = (round_values(r, TWO) for r in rounds)
    assert both == {k: one[k] + two[k] for k in both}
    assert total_value(rounds, TWO) == total_value(rounds[:1], TWO) + total_value(rounds[1:], TWO)
    assert total_value(rounds, TWO) == Fraction(sum(first[0]) - sum(second[-1]), 50)


@given(loss_tables, st.integers(0, 2))
def test_a_zero_update_is_worth_exactly_nothing(table, player):
    table = [table[mask & ~(1 << player)] for mask in range(8)]
    assert list(round_values(a_round(TWO, table), TWO).values())[player] == 0


@given(loss_tables)
def test_two_equal_updates_are_worth_the_same(table):
    def swapped(mask):
        return mask & 2 | (mask & 1) << 2 | mask >> 2

    table = [[a + b for a, b in zip(table[mask], table[swapped(mask)], strict=True)] for mask in range(8)]
    values = list(round_values(a_round(TWO, table), TWO).values())
    assert values[0] == values[2]


# Settled periods

gains = st.lists(st.integers(-(10**9), 10**9), min_size=3, max_size=3)
agreed = st.integers(0, 10).flatmap(
    lambda a: st.integers(0, 10 - a).map(lambda b: tuple(text(x) for x in (a, b, 10 - a - b)))
)


def text(tenths):
    return {0: "0", 10: "1"}.get(tenths, f"0.{tenths}")


@st.composite
def periods(draw):
    contract = a_contract(
        counts=draw(st.lists(st.integers(1, 10**5), min_size=3, max_size=3)),
        floors=draw(st.lists(st.integers(0, 10**6), min_size=3, max_size=3)),
        weights=draw(agreed),
        fallback=draw(st.sampled_from(["metered", "equal"])),
        slices=((None, 50),),
    )
    rounds, start = [], [10**12]
    for number in range(1, draw(st.integers(1, 3)) + 1):
        places = sorted(draw(st.sets(st.integers(0, 2), min_size=1)))
        each = draw(gains)
        scores = linear_round(contract, [[each[p]] for p in places], number=number, places=places, start=start)
        rounds.append(scores)
        start = scores.losses[-1]
    values = period_values(rounds, contract)
    present = {p for r in rounds for p in r.players}
    spread = draw(st.integers(0, 10**8))
    moments = steady_moments(contract, list(values.values()), [spread if k in present else 0 for k in values])
    revenue = draw(st.integers(0, 10**12))
    return contract, rounds, moments, revenue, draw(st.integers(0, revenue))


@given(periods())
@settings(max_examples=60, deadline=None)
def test_a_period_pays_its_pool_and_respects_what_was_agreed(period):
    contract, _, _, revenue, fees = period
    result = settle_period(*period)
    assert sum(line.fen for line in result.lines) == result.pool_fen == revenue - fees
    assert sum(p.fen for p in result.postings) == 0
    assert sum(line.share.share for line in result.lines) == 1
    assert all(abs(line.fen - line.exact) < 1 and line.fen >= 0 for line in result.lines)
    affordable = sum(line.floor_fen for line in result.lines) <= result.pool_fen
    assert (result.level is not None) == affordable
    for line in result.lines:
        assert 0 <= line.share.low <= line.share.share <= line.share.high <= 1
        assert line.floor_fen <= contract.participant(line.participant).floor_fen
        assert not affordable or line.fen >= line.floor_fen
        assert line.share.rounds_admitted or line.fen == 0
    if result.shares.method == "none":
        assert all(line.share.high - line.share.low <= Fraction(1, 10**6) for line in result.lines)


@given(periods())
@settings(max_examples=30, deadline=None)
def test_a_period_settled_again_gives_the_same_bytes(period):
    contract = period[0]
    one, two = settle_period(*period), settle_period(*period)
    assert one == two
    for key in contract.by_id():
        assert canonical_bytes(statement(one, contract, key)) == canonical_bytes(statement(two, contract, key))


@given(gains, st.permutations(range(3)), st.integers(0, 10**8))
@settings(deadline=None)
def test_who_holds_which_id_moves_no_share(values, order, pool):
    """The same parties under other ids, and so in another order, have the same values and shares."""
    counts = [100, 200, 300]
    paid = []
    for places in (range(3), order):
        contract = a_contract(
            [counts[i] for i in places], weights=("0.5", "0.3", "0.2"), label=str(list(places)), slices=((None, 50),)
        )
        rounds = [linear_round(contract, [[values[i]] for i in places])]
        moments = steady_moments(contract, list(period_values(rounds, contract).values()))
        result = settle_period(contract, rounds, moments, pool, 0)
        lines = {places[k]: line for k, line in enumerate(result.lines)}
        paid.append([lines[i] for i in range(3)])
    for before, after in zip(*paid, strict=True):
        assert (before.share.value, before.share.share) == (after.share.value, after.share.share)
        assert before.exact == after.exact
        assert abs(before.fen - after.fen) <= 1
    remainders = [line.exact % 1 for line in paid[0]]
    if len(set(remainders)) == 3:
        assert [line.fen for line in paid[0]] == [line.fen for line in paid[1]]


@given(gains)
@settings(deadline=None, max_examples=20)
def test_a_new_name_moves_no_fen(values):
    contract = a_contract(weights=("0.5", "0.3", "0.2"), slices=((None, 50),))
    parties = tuple(p.model_copy(update={"name": f"Z{p.name}"}) for p in reversed(contract.participants))
    renamed = contract.model_copy(update={"participants": parties})
    rounds = [linear_round(contract, [[v] for v in values])]
    moments = steady_moments(contract, list(period_values(rounds, contract).values()))
    before, after = (settle_period(c, rounds, moments, 1_000_003, 0) for c in (contract, renamed))
    assert [(x.participant, x.fen) for x in before.lines] == [(x.participant, x.fen) for x in after.lines]
    assert before.contract_id != after.contract_id


@given(gains)
@settings(deadline=None)
def test_a_larger_value_never_has_the_smaller_share(values):
    contract = a_contract(counts=(100,) * 3, slices=((None, 50),))
    rounds = [linear_round(contract, [[v] for v in values])]
    found = list(period_values(rounds, contract).values())
    result = shares(contract, rounds, steady_moments(contract, found))
    ranked = sorted(range(3), key=lambda i: values[i])
    paid = [result.lines[i].share for i in ranked]
    assert paid == sorted(paid)
