import sys
from dataclasses import FrozenInstanceError
from decimal import Context, localcontext
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.settlement_kit import a_contract, linear_round, steady_moments

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contribution import period_values
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.settlement import (
    MAX_FEN,
    Posting,
    check_postings,
    format_fen,
    largest_remainder,
    parse_yuan,
    settle_period,
    settle_unopened,
    statement,
    water_fill,
    water_level,
)


def fractions(**values):
    return {key: Fraction(value) for key, value in values.items()}


def settled(gains, revenue=1_000_000, fees=0, *, spread=0, places=None, **terms):
    """A settled period of one round, and its contract."""
    contract = a_contract([100, 200, 300] if places else [100, 200, 300][: len(gains)], **terms)
    rounds = [linear_round(contract, [[g] for g in gains], places=places)]
    values = list(period_values(rounds, contract).values())
    present = places or range(len(gains))
    moments = steady_moments(contract, values, [spread if i in present else 0 for i in range(len(values))])
    return settle_period(contract, rounds, moments, revenue, fees), contract


def fen(result):
    return [line.fen for line in result.lines]


def refused(code, call, *args, **terms):
    with pytest.raises(InputError) as caught:
        call(*args, **terms)
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    return caught.value


# Largest remainder


def test_the_largest_remainders_get_the_fen_left_over():
    assert largest_remainder(10, fractions(a=1, b=1, c=5)) == {"a": 2, "b": 1, "c": 7}
    assert largest_remainder(100, fractions(a="1/3", b="1/3", c="1/3")) == {"a": 34, "b": 33, "c": 33}
    assert largest_remainder(101, fractions(c="1/3", b="1/3", a="1/3")) == {"a": 34, "b": 34, "c": 33}


def test_ties_go_by_id_whatever_the_order_given():
    assert largest_remainder(1, fractions(b=1, a=1)) == {"a": 1, "b": 0}


def test_a_weight_of_zero_gets_nothing():
    assert largest_remainder(7, fractions(a=0, b=1, c=1)) == {"a": 0, "b": 4, "c": 3}


def test_nothing_is_split_by_anything():
    assert largest_remainder(0, fractions(a=0, b=0)) == {"a": 0, "b": 0}
    assert largest_remainder(0, fractions(a=1, b=2)) == {"a": 0, "b": 0}
    assert largest_remainder(0, {}) == {}


def test_amounts_beyond_a_double_are_exact():
    total = 10**30 + 1
    assert sum(largest_remainder(total, fractions(a="1/7", b="1/11", c="1/13")).values()) == total


def test_an_amount_without_weights_is_refused():
    refused("SETTLEMENT_WEIGHTS", largest_remainder, 1, fractions(a=0, b=0))
    refused("SETTLEMENT_WEIGHTS", largest_remainder, 1, {})
    refused("SETTLEMENT_AMOUNT", largest_remainder, -1, fractions(a=1))
    assert refused("SETTLEMENT_WEIGHTS", largest_remainder, 1, fractions(a=2, b=-1)).party == "b"


# Water filling


def test_floors_are_filled_and_the_rest_keeps_its_proportions():
    amounts = water_fill(1000, fractions(a=1, b=2, c=97), {"a": 50, "b": 10, "c": 0})
    assert amounts == {"a": 50, "b": Fraction(950 * 2, 99), "c": Fraction(950 * 97, 99)}
    assert water_level(1000, fractions(a=1, b=2, c=97), {"a": 50, "b": 10, "c": 0}) == Fraction(950, 99)


def test_a_floor_may_push_another_below_its_own():
    amounts = water_fill(100, fractions(a="0.1", b="0.3", c="0.6"), {"a": 40, "b": 25, "c": 0})
    assert amounts == {"a": 40, "b": 25, "c": 35}


def test_floors_that_are_met_anyway_change_nothing():
    weights = fractions(a="1/2", b="1/2")
    assert water_fill(100, weights, {"a": 50, "b": 49}) == {"a": 50, "b": 50}


def test_floors_that_are_the_pool_exactly():
    weights = fractions(a="1/2", b="1/2", c=0)
    assert water_fill(100, weights, {"a": 30, "b": 60, "c": 10}) == {"a": 30, "b": 60, "c": 10}
    assert water_level(100, weights, {"a": 30, "b": 60, "c": 10}) == 60


def test_floors_above_the_pool_are_paid_pro_rata():
    weights = fractions(a="0.9", b="0.1", c=0)
    assert water_fill(100, weights, {"a": 0, "b": 150, "c": 50}) == {"a": 0, "b": 75, "c": 25}
    assert water_level(100, weights, {"a": 0, "b": 150, "c": 50}) is None


def test_a_floor_without_weight_is_paid():
    assert water_fill(100, fractions(a=1, b=0), {"a": 0, "b": 30}) == {"a": 70, "b": 30}


def test_an_empty_pool_pays_nothing():
    weights = fractions(a="0.9", b="0.1")
    assert water_fill(0, weights, {"a": 0, "b": 0}) == {"a": 0, "b": 0}
    assert water_fill(0, weights, {"a": 5, "b": 0}) == {"a": 0, "b": 0}
    assert water_fill(0, fractions(a=0), {"a": 0}) == {"a": 0}


def test_floors_and_weights_that_do_not_fit_are_refused():
    refused("SETTLEMENT_FLOORS", water_fill, 100, fractions(a=1), {"b": 1})
    refused("SETTLEMENT_FLOORS", water_fill, 100, fractions(a=1, b=1), {"a": 1})
    refused("SETTLEMENT_WEIGHTS", water_fill, 100, fractions(a=1), {"a": -1})
    refused("SETTLEMENT_WEIGHTS", water_fill, 100, fractions(a=-1), {"a": 1})
    refused("SETTLEMENT_WEIGHTS", water_fill, 100, fractions(a=0, b=0), {"a": 1, "b": 1})
    refused("SETTLEMENT_AMOUNT", water_fill, -1, fractions(a=1), {"a": 0})


# A settled period


def test_a_period_is_paid_by_shares():
    result, contract = settled([5000, 3000, 2000], 1_000_000, 100_000)
    assert fen(result) == [450_000, 270_000, 180_000]
    assert (result.revenue_fen, result.fees_fen, result.pool_fen) == (1_000_000, 100_000, 900_000)
    assert (result.basis, result.contract_id, result.level) == ("contribution", contract.id, 900_000)
    assert [line.participant for line in result.lines] == list(contract.by_id())


def test_postings_are_double_entry():
    result, contract = settled([5000, 3000, 2000], 1_000_001, 7)
    ids = list(contract.by_id())
    assert result.postings[:2] == (Posting(account="revenue", fen=-1_000_001), Posting(account="fees", fen=7))
    assert [p.account for p in result.postings[2:]] == [f"participant:{i}" for i in ids]
    assert sum(p.fen for p in result.postings) == 0


def test_postings_that_do_not_balance_are_a_fault():
    with pytest.raises(FaultError) as caught:
        check_postings([Posting(account="revenue", fen=-10), Posting(account="participant:a", fen=9)])
    assert caught.value.code == "SETTLEMENT_UNBALANCED"


def test_a_result_is_frozen():
    result, _ = settled([5000, 3000, 2000])
    with pytest.raises(FrozenInstanceError):
        result.pool_fen = 1
    with pytest.raises(FrozenInstanceError):
        result.postings[0].fen = 1


def test_thirds_of_a_pool_go_by_remainder_and_id():
    result, _ = settled([1000, 1000, 1000], 101)
    assert fen(result) == [34, 34, 33]


def test_floors_move_fen_and_no_share():
    result, _ = settled([8000, 2000, -1000], 1000, floors=(0, 0, 250))
    assert [line.share.share for line in result.lines] == [Fraction(4, 5), Fraction(1, 5), 0]
    assert fen(result) == [600, 150, 250]
    assert result.level == 750


def test_floors_are_due_pro_rata_to_rounds_admitted_in_whole_fen():
    contract = a_contract(floors=(100, 100, 100))
    first = linear_round(contract, [[9000]], places=[0])
    second = linear_round(contract, [[9000], [10]], number=2, places=[0, 1], start=first.losses[-1])
    third = linear_round(contract, [[9000]], number=3, places=[0], start=second.losses[-1])
    rounds = [first, second, third]
    moments = steady_moments(contract, list(period_values(rounds, contract).values()))
    result = settle_period(contract, rounds, moments, 10_000, 0)
    assert [line.floor_fen for line in result.lines] == [100, 33, 0]
    assert fen(result) == [9967, 33, 0]


def test_floors_above_the_pool():
    result, _ = settled([8000, 2000, 1000], 1001, floors=(0, 1000, 2000))
    assert result.level is None
    assert [line.exact for line in result.lines] == [0, Fraction(1001, 3), Fraction(2002, 3)]
    assert fen(result) == [0, 334, 667]


def test_an_empty_pool():
    result, contract = settled([5000, 3000, 2000], 500, 500, floors=(10, 0, 0))
    assert fen(result) == [0, 0, 0]
    assert result.postings[0].fen == -500
    assert settled([5000, 3000, 2000], 0, 0)[0].level == 0
    assert canonical_bytes(statement(result, contract, result.lines[0].participant))


def test_all_values_negative():
    result, _ = settled([-5000, -3000, -2000], 600)
    assert (result.basis, fen(result)) == ("fallback", [100, 200, 300])


def test_a_negative_total():
    result, _ = settled([5000, -9000, 2000], 601, fallback="equal")
    assert (result.basis, fen(result)) == ("fallback", [201, 200, 200])


def test_a_single_admitted_participant():
    result, _ = settled([5000], 777, places=[2], weights=("0.5", "0.3", "0.2"))
    assert fen(result) == [0, 0, 777]


def test_amounts_out_of_range_are_refused():
    assert refused("SETTLEMENT_FEES", settled, [5000, 3000], 100, 101).field == "fees_fen"
    assert refused("SETTLEMENT_AMOUNT", settled, [5000, 3000], -1, 0).field == "revenue_fen"
    assert refused("SETTLEMENT_AMOUNT", settled, [5000, 3000], 1, -1).field == "fees_fen"
    refused("SETTLEMENT_AMOUNT", settled, [5000, 3000], MAX_FEN + 1, 0)
    assert sum(fen(settled([5000, 3000], MAX_FEN, 1)[0])) == MAX_FEN - 1


def test_no_round_is_refused():
    contract = a_contract()
    refused("SHARES_NO_ROUNDS", settle_period, contract, [], steady_moments(contract, [Fraction(0)] * 3), 1, 0)


# Common control


def in_rounds(contract, presence, revenue=1_000_000):
    """A period in which everybody gains alike: for each round the places of those admitted."""
    rounds, start = [], None
    for number, places in enumerate(presence, start=1):
        scores = linear_round(contract, [[100]] * len(places), number=number, places=places, start=start)
        rounds, start = [*rounds, scores], scores.losses[-1]
    return settle_period(
        contract, rounds, steady_moments(contract, list(period_values(rounds, contract).values())), revenue, 0
    )


def amounts(result):
    return [line.exact for line in result.lines]


EQUAL = {"weights": ("0", "0", "1"), "fallback": "equal"}


def test_a_group_has_one_equal_part_which_it_splits_by_its_rounds():
    alone = in_rounds(a_contract(**EQUAL), [(0, 1, 2)] * 2, 900)
    assert fen(alone) == [300, 300, 300]
    contract = a_contract(**EQUAL, control=((0, 1),))
    assert fen(in_rounds(contract, [(0, 1, 2)] * 2, 900)) == [225, 225, 450]
    # Of four rounds 0 was in four and 1 in two: the group has four, split 4 : 2.
    uneven = in_rounds(contract, [(0, 1, 2), (0, 1, 2), (0, 2), (0, 2)], 1200)
    assert amounts(uneven) == [400, 200, 600]
    # By turns: the group was there in both rounds, and 2 was.
    assert amounts(in_rounds(contract, [(0, 2), (1, 2)], 1000)) == [250, 250, 500]
    assert fen(in_rounds(contract, [(0, 1)] * 2, 1000)) == [500, 500, 0]


@pytest.mark.parametrize("weights", [("0", "1", "0"), ("1", "0", "0")])
def test_contribution_and_data_are_paid_to_each_member(weights):
    plain, grouped = (
        in_rounds(a_contract(weights=weights, control=control), [(0, 1, 2)] * 2) for control in ((), ((0, 1),))
    )
    assert amounts(grouped) == amounts(plain)
    assert [(x.share.low, x.share.high) for x in grouped.lines] == [(x.share.low, x.share.high) for x in plain.lines]


@pytest.mark.parametrize("floors", [(0, 0, 0), (400_000, 700_000, 10), (600_000, 600_000, 600_000), (0, 900_000, 0)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_group_gets_what_one_participant_with_its_rows_would(floors, rounds):
    """So nobody gains by taking part as two."""
    terms = {"weights": ("0", "0.5", "0.5"), "fallback": "metered"}
    two = in_rounds(a_contract(floors=floors, control=((0, 1),), **terms), [(0, 1, 2)] * rounds)
    whole = a_contract((300, 300), floors=(max(floors[:2]), floors[2]), **terms)
    one = in_rounds(whole, [(0, 1)] * rounds)
    assert [amounts(two)[0] + amounts(two)[1], amounts(two)[2]] == amounts(one)
    assert sum(fen(two)) == sum(fen(one)) == 1_000_000


def test_a_groups_floor_is_its_largest_once_and_its_members_floors_come_from_the_group():
    terms = {"weights": ("0", "1", "0")}
    plain = in_rounds(a_contract((10, 10, 980), floors=(300, 200, 0), **terms), [(0, 1, 2)], 1000)
    assert fen(plain) == [300, 200, 500]
    grouped = in_rounds(a_contract((10, 10, 980), floors=(300, 200, 0), control=((0, 1),), **terms), [(0, 1, 2)], 1000)
    assert fen(grouped) == [180, 120, 700], "floors beyond the group's are paid pro rata"
    [line] = grouped.split.groups
    assert (line.floor_fen, line.exact, line.level, grouped.split.floors_fen) == (300, 300, None, 300)
    # A member that is above its floor pays the other's: the group is above its own.
    rich = in_rounds(a_contract((900, 10, 90), floors=(0, 200, 0), control=((0, 1),), **terms), [(0, 1, 2)], 1000)
    assert fen(rich) == [710, 200, 90]


def test_a_groups_floor_is_due_by_the_rounds_in_which_one_of_it_was_there():
    contract = a_contract(floors=(100, 300, 0), control=((0, 1),), weights=("0", "0", "1"), fallback="equal")
    by_turns = in_rounds(contract, [(0, 2), (1, 2), (2,), (2,)], 400)
    assert by_turns.split.groups[0].floor_fen == 100  # a quarter of 100, and a quarter of 300
    assert [line.floor_fen for line in by_turns.lines] == [25, 75, 0]


def test_a_union_inside_a_group_counts_once_and_not_less():
    contract = a_contract(floors=(100, 100, 0), control=((0, 1),), **EQUAL)
    ids = list(contract.by_id())

    def split(revenue, *union):
        return settle_unopened(contract, [ids] * 2, revenue, 0, [[[ids[i] for i in union]]] * 2)

    found = split(1000, 0, 1)
    assert amounts(found) == [250, 250, 500]
    assert found.split.groups[0].floor_fen == 100
    outside = split(900, 1, 2)
    assert amounts(outside) == [400, 200, 300], "the group once, 2 for its half of the union"
    assert outside.split.groups[0].floor_fen == 100


def test_floors_of_groups_that_exceed_the_pool_are_paid_pro_rata():
    contract = a_contract(floors=(600, 300, 600), control=((0, 1),), **EQUAL)
    found = in_rounds(contract, [(0, 1, 2)], 600)
    assert (found.level, fen(found)) == (None, [200, 100, 300])


def test_a_contract_without_groups_is_paid_as_before():
    """The clause is absent from the record, and a floor and a share go to each participant by itself."""
    contract = a_contract(floors=(0, 0, 250))
    assert b"common_control" not in contract.to_bytes()
    assert contract.blocks() == tuple((p,) for p in contract.by_id())
    result, _ = settled([8000, 2000, -1000], 1000, floors=(0, 0, 250))
    assert (fen(result), result.split.groups) == ([600, 150, 250], ())


def test_the_fallback_is_paid_once_to_a_group_too():
    result, contract = settled([-5000, -3000, -2000], 600, fallback="equal", control=((0, 2),))
    assert (result.basis, fen(result)) == ("fallback", [150, 300, 150])
    shown = statement(result, contract, result.lines[0].participant)["common_control"]
    assert [(g["name"], g["members"]) for g in shown] == [
        ("holding 0", [result.lines[0].participant, result.lines[2].participant])
    ]


def test_amounts_inside_a_group_are_recomputed_by_hand_from_the_statement():
    result, contract = settled(
        [8000, 2345, 100], 1_234_567, weights=("0.7", "0.2", "0.1"), floors=(0, 400_000, 300_000), control=((1, 2),)
    )
    page = statement(result, contract, result.lines[1].participant)
    [group], lines = page["common_control"], {x["participant"]: x for x in page["lines"]}
    inside = [lines[p] for p in group["members"]]
    level = Fraction(page["totals"]["level_fen"])
    together = max(Fraction(group["floor_fen"]), level * sum(Fraction(x["share"]) for x in inside))
    assert together == Fraction(group["exact_fen"]) == sum(Fraction(x["exact_fen"]) for x in inside)
    if group["level_fen"] is None:
        due = sum(x["floor_fen"] for x in inside)
        assert all(Fraction(x["exact_fen"]) == together * x["floor_fen"] / due for x in inside)
    assert page["totals"]["floors_fen"] == 400_000
    assert sum(x["fen"] for x in page["lines"]) == page["pool"]["pool_fen"]


# Statements


def test_each_fen_is_recomputed_by_hand_from_the_statement():
    """Nothing but the statement is used below."""
    result, contract = settled(
        [8000, 2345, -1000], 1_234_567, 34_560, weights=("0.7", "0.2", "0.1"), floors=(0, 0, 200_000), spread=9
    )
    for line in result.lines:
        page = statement(result, contract, line.participant)
        pool, totals, lines = page["pool"], page["totals"], page["lines"]
        assert [x["participant"] for x in lines] == [p.id for p in contract.participants], "the contract's order"
        assert pool["pool_fen"] == pool["revenue_fen"] - pool["fees_fen"] == 1_200_007
        a, b, c = (Fraction(page["weights_applied"][k]) for k in ("contribution", "data", "equal"))
        positive = sum(max(Fraction(0), Fraction(x["value"])) for x in lines)
        assert positive == Fraction(totals["positive_values"])
        exact = {}
        for x in lines:
            part_a = a * max(Fraction(0), Fraction(x["value"])) / positive
            part_b = b * Fraction(x["metered_rows"]) / Fraction(totals["metered_rows"])
            part_c = c * x["rounds_admitted"] / totals["rounds_admitted"]
            assert [part_a, part_b, part_c] == [Fraction(x[f"share_{k}"]) for k in ("contribution", "data", "equal")]
            assert part_a + part_b + part_c == Fraction(x["share"])
            amount = max(Fraction(x["floor_fen"]), Fraction(totals["level_fen"]) * Fraction(x["share"]))
            assert amount == Fraction(x["exact_fen"]) == x["whole_fen"] + Fraction(x["remainder"])
            exact[x["participant"]] = amount
        assert sum(exact.values()) == pool["pool_fen"]
        assert totals["left_over_fen"] == pool["pool_fen"] - sum(map(floor, exact.values()))
        for x in lines:
            extra = x["remainder_rank"] <= totals["left_over_fen"]
            assert x["fen"] == x["whole_fen"] + extra
        assert page["line"] == next(x for x in lines if x["participant"] == line.participant)
        assert page["line"]["fen"] == line.fen
        assert sum(p["fen"] for p in page["postings"]) == 0


def test_a_statement_says_what_the_payment_rests_on():
    result, contract = settled([8000, 2000, -1000], 1000, spread=9)
    page = statement(result, contract, result.lines[2].participant)
    assert page["name"] == contract.participant(page["participant"]).name
    assert (page["currency"], page["rounds"], page["fallback"]) == ("CNY", [1], "metered")
    assert (page["basis"], page["reason"]) == ("contribution", "reliable")
    assert page["interval"] == {"level": "0.95", "method": "delta", "covers": "validation sampling only"}
    assert page["weights_agreed"] == {"contribution": "1", "data": "0", "equal": "0"}
    assert (page["totals"]["total_value"], page["totals"]["negative_values"]) == ("180", "-20")
    assert page["totals"]["own_slice_difference"] == "0"
    assert (page["line"]["value"], page["line"]["share"], page["line"]["share_high"]) == ("-20", "0", "0")


def test_a_statement_of_floors_that_exceed_the_pool():
    result, contract = settled([8000, 2000, 1000], 1000, floors=(0, 1000, 2000))
    totals = statement(result, contract, result.lines[0].participant)["totals"]
    assert (totals["floors_paid_pro_rata"], totals["level_fen"], totals["floors_fen"]) == (True, None, 3000)


def test_a_statement_of_a_fallback_has_intervals_of_nothing():
    result, contract = settled([8000, 2000, 1000], 1000, spread=10**6)
    page = statement(result, contract, result.lines[0].participant)
    assert (page["basis"], page["reason"], page["interval"]["method"]) == ("fallback", "not-reliable", "none")
    assert page["weights_applied"] == {"contribution": "0", "data": "1", "equal": "0"}


def test_the_same_input_gives_the_same_bytes():
    def page():
        result, contract = settled([8000, 2345, 70], 1_234_567, 34_560, weights=("0.7", "0.2", "0.1"), spread=30)
        assert result.shares.method == "draws"
        return canonical_bytes(statement(result, contract, result.lines[0].participant))

    first = page()
    with localcontext(Context(prec=2)):
        assert page() == first


def test_a_statement_for_a_stranger_or_another_contract_is_refused():
    result, contract = settled([8000, 2000, 1000])
    refused("CONTRACT_NOT_A_PARTY", statement, result, contract, "f" * 64)
    other = a_contract(label="other")
    refused("STATEMENT_CONTRACT", statement, result, other, next(iter(other.by_id())))


# Money for people


@pytest.mark.parametrize(
    ("amount", "zh", "en"),
    [
        (0, "¥0.00", "CNY 0.00"),
        (5, "¥0.05", "CNY 0.05"),
        (1_234_567, "¥12,345.67", "CNY 12,345.67"),
        (-1_234_567, "-¥12,345.67", "-CNY 12,345.67"),
        (MAX_FEN, "¥90,071,992,547,409.91", "CNY 90,071,992,547,409.91"),
    ],
)
def test_amounts_for_people(amount, zh, en):
    assert format_fen(amount, "zh") == zh
    assert format_fen(amount, "en") == en


def test_another_language_is_refused():
    refused("LANGUAGE_UNKNOWN", format_fen, 1, "fr")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1000000.00", 100_000_000),
        ("0", 0),
        ("0.05", 5),
        ("12.5", 1250),
        ("007", 700),
        ("90071992547409.91", MAX_FEN),
    ],
)
def test_yuan_are_read_as_fen(text, amount):
    assert parse_yuan(text) == amount


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("1.005", "MONEY_DECIMALS"),
        ("1.000", "MONEY_DECIMALS"),
        ("-1", "MONEY_NEGATIVE"),
        ("-0.01", "MONEY_NEGATIVE"),
        ("90071992547409.92", "MONEY_TOO_LARGE"),
        *[(text, "MONEY_FORM") for text in ("", " 1", "1 ", "1\n", "+1", "--1", "1.", ".5", "1e3", "1_0", "1,000.00")],
        *[(text, "MONEY_FORM") for text in ("¥1", "NaN", "inf", "１２")],
        ("9" * 101, "MONEY_FORM"),
    ],
)
def test_other_amounts_are_refused(text, code):
    error = refused(code, parse_yuan, text, file="revenue.csv", field="line 3")
    assert (error.file, error.field) == ("revenue.csv", "line 3")
    assert error.remedy
