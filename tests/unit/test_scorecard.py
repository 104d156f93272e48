"""The scorecard: diagnostics beside the value, and what hangs on each slice of the validation set."""

from fractions import Fraction

import pytest
from tests.support.settlement_kit import a_contract, a_round, linear_round, steady_moments

from fedpact_contract.contribution import banzhaf_values, leave_one_out, period_values
from fedpact_contract.errors import InputError
from fedpact_contract.scorecard import game_table, scorecard
from fedpact_contract.shapley import recompute, shapley
from fedpact_contract.shares import shares

# Three slices: the operator's, participant 1's, participant 2's. gains[player][slice].
CONTRACT = a_contract(slices=((None, 50), (1, 30), (2, 20)))
IDS = list(CONTRACT.by_id())
GAINS = ((5000, 3000, 1000), (4000, 9000, 2000), (1000, 3000, 7000))


def gained(gains, rows):
    return [Fraction(g, r) for g, r in zip(gains, rows, strict=True)]


def test_in_an_additive_game_every_index_is_the_same():
    rounds = [linear_round(CONTRACT, GAINS)]
    due = [Fraction(9000, 100), Fraction(6000, 70), Fraction(4000, 80)]
    for found in (period_values, leave_one_out, banzhaf_values):
        assert list(found(rounds, CONTRACT).values()) == due


def test_banzhaf_of_the_glove_game_is_not_shapley():
    contract = a_contract(slices=((None, 4),))
    glove = [[100 - 100 * (mask & 1 and mask > 1)] for mask in range(8)]  # one left, two right
    rounds = [a_round(contract, glove)]
    assert list(banzhaf_values(rounds, contract).values()) == [Fraction(25 * k, 4) for k in (3, 1, 1)]
    assert list(period_values(rounds, contract).values()) == [Fraction(25 * k, 6) for k in (4, 1, 1)]


def test_without_a_slice_the_shares_are_those_of_a_set_that_never_had_it():
    rounds = [linear_round(CONTRACT, GAINS)]
    card = scorecard(CONTRACT, rounds, steady_moments(CONTRACT, list(period_values(rounds, CONTRACT).values())))
    parts = card["without_slices"]
    assert [(part["source"], part["rows"]) for part in parts] == [("operator", 50), (IDS[1], 30), (IDS[2], 20)]
    left = {
        0: [gained((4000,), (50,)), gained((2000,), (20,)), gained((3000,), (30,))],
        1: [gained((6000,), (70,)), gained((6000,), (70,)), gained((1000,), (50,))],
        2: [gained((8000,), (80,)), gained((4000,), (50,)), gained((4000,), (80,))],
    }
    for index, part in enumerate(parts):
        values = [sum(v) for v in left[index]]
        for player, value in zip(IDS, values, strict=True):
            assert Fraction(part["shares"][player]) == pytest.approx(float(value / sum(values)), abs=1e-8)


def test_a_slice_without_which_somebody_has_no_row_is_named():
    contract = a_contract(slices=((None, 50), (1, 30)))
    rounds = [linear_round(contract, [g[:2] for g in GAINS])]
    card = scorecard(contract, rounds, steady_moments(contract, list(period_values(rounds, contract).values())))
    assert [part["shares"] is None for part in card["without_slices"]] == [True, False]
    with pytest.raises(InputError) as caught:
        period_values(rounds, contract, without=0)
    assert (caught.value.code, caught.value.party) == ("SLICE_NEEDED", list(contract.by_id())[1])


def test_where_all_value_is_lost_with_a_slice_the_rule_for_no_value_holds():
    contract = a_contract(slices=((None, 50), (1, 30), (2, 20)), fallback="equal")
    rounds = [linear_round(contract, [(900, -1, -1)] * 3)]
    card = scorecard(contract, rounds, steady_moments(contract, list(period_values(rounds, contract).values())))
    assert card["without_slices"][0]["shares"] == dict.fromkeys(contract.by_id(), "0.333333333")


@pytest.mark.parametrize("weights", [("0", "1", "0"), ("0", "0.5", "0.5")])
def test_shares_that_do_not_rest_on_the_rows_have_no_such_table(weights):
    contract = a_contract(slices=((None, 50), (1, 30)), weights=weights)
    rounds = [linear_round(contract, [g[:2] for g in GAINS])]
    moments = steady_moments(contract, list(period_values(rounds, contract).values()))
    assert scorecard(contract, rounds, moments)["without_slices"] == []


def test_the_scorecard_says_what_the_paying_rule_says():
    rounds = [linear_round(CONTRACT, GAINS)]
    moments = steady_moments(CONTRACT, list(period_values(rounds, CONTRACT).values()))
    card, paid = scorecard(CONTRACT, rounds, moments), shares(CONTRACT, rounds, moments)
    by_id = {line["id"]: line for line in card["participants"]}
    assert [line["id"] for line in card["participants"]] == [p.id for p in CONTRACT.participants]
    for line in paid.lines:
        shown = by_id[line.participant]
        assert Fraction(shown["share"]) == pytest.approx(float(line.share), abs=1e-9)
        assert Fraction(shown["value"]) * 10**9 == pytest.approx(float(line.value), abs=0.5)
    assert card["reason"] == paid.reason


def test_a_game_table_is_what_recompute_reads():
    from json import dumps

    scores = a_round(CONTRACT, [(900 - m, 600, 50 * (m == 7)) for m in range(8)], places=[0, 1, 2])
    table = game_table(scores)
    assert table["players"] == list(IDS)
    assert table["values"][""] == 0
    found = recompute(dumps(table).encode())["shapley"]
    due = [-v for v in shapley([sum(row) for row in scores.losses])]
    assert [Fraction(found[player]) for player in IDS] == due
