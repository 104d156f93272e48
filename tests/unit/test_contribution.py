import sys
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.settlement_kit import a_contract, a_round, linear_round

from fedpact_contract.contribution import (
    check_rounds,
    check_scores,
    leave_one_out,
    own_slice_difference,
    period_values,
    round_values,
    total_value,
    validation_rows,
)
from fedpact_contract.errors import FaultError

# Two slices, one given by participant 1; losses by mask 0..7.
CONTRACT = a_contract(slices=((None, 30), (1, 20)))
IDS = list(CONTRACT.by_id())
LOSSES = ((900, 600), (840, 570), (870, 510), (780, 500), (900, 600), (830, 580), (880, 520), (770, 490))
NEXT = ((770, 490), (760, 480), (770, 470), (755, 460), (750, 490), (745, 475), (750, 465), (730, 450))


def mean_of_orders(value, n, i):
    """The Shapley value by its definition, for three players."""
    rest = [j for j in range(n) if j != i]
    a, b = (1 << j for j in rest)
    bit = 1 << i

    def gain(s):
        return value(s | bit) - value(s)

    return Fraction(2 * gain(0) + gain(a) + gain(b) + 2 * gain(a | b), 6)


def test_round_values_are_shapley_values_on_the_rows_of_others():
    values = round_values(a_round(CONTRACT, LOSSES), CONTRACT)
    for i in (0, 2):
        assert values[IDS[i]] == mean_of_orders(lambda s: Fraction(1500 - sum(LOSSES[s]), 50), 3, i)
    assert values[IDS[1]] == mean_of_orders(lambda s: Fraction(900 - LOSSES[s][0], 30), 3, 1)
    assert list(values) == IDS


def test_without_a_slice_of_ones_own_the_values_are_efficient():
    contract = a_contract(slices=((None, 50),))
    losses = [(sum(row),) for row in LOSSES]
    values = round_values(a_round(contract, losses), contract)
    assert sum(values.values()) == Fraction(1500 - 1260, 50)
    assert own_slice_difference([a_round(contract, losses)], contract) == 0


def test_the_absent_have_exactly_nothing():
    contract = a_contract()
    values = round_values(a_round(contract, [(100,), (90,)], places=[2]), contract)
    assert list(values.values()) == [0, 0, Fraction(10, 50)]


def test_a_zero_update_has_exactly_nothing():
    losses = [LOSSES[mask & 5] for mask in range(8)]
    values = round_values(a_round(CONTRACT, losses), CONTRACT)
    assert values[IDS[1]] == 0
    assert values[IDS[0]] > 0


def test_a_period_adds_up_its_rounds():
    rounds = [a_round(CONTRACT, LOSSES), a_round(CONTRACT, NEXT, number=2)]
    values = [round_values(r, CONTRACT) for r in rounds]
    assert period_values(rounds, CONTRACT) == {p: values[0][p] + values[1][p] for p in IDS}
    assert total_value(rounds, CONTRACT) == Fraction(1500 - 1180, 50)
    difference = sum(period_values(rounds, CONTRACT).values()) - Fraction(1500 - 1180, 50)
    assert own_slice_difference(rounds, CONTRACT) == difference != 0


def test_no_round_is_worth_nothing():
    assert period_values([], CONTRACT) == dict.fromkeys(IDS, 0)
    assert total_value([], CONTRACT) == 0
    assert leave_one_out([], CONTRACT) == dict.fromkeys(IDS, 0)


def test_leave_one_out_uses_the_rows_of_others():
    rounds = [a_round(CONTRACT, LOSSES), a_round(CONTRACT, NEXT, number=2)]
    assert leave_one_out(rounds, CONTRACT) == {
        IDS[0]: Fraction(880 + 520 - 770 - 490 + 750 + 465 - 730 - 450, 50),
        IDS[1]: Fraction(830 - 770 + 745 - 730, 30),
        IDS[2]: Fraction(780 + 500 - 770 - 490 + 755 + 460 - 730 - 450, 50),
    }
    absent = leave_one_out([a_round(CONTRACT, [(100, 10), (90, 10)], places=[0])], CONTRACT)
    assert absent == {IDS[0]: Fraction(10, 50), IDS[1]: 0, IDS[2]: 0}


def test_a_slice_of_nearly_all_rows_still_leaves_the_others():
    contract = a_contract(slices=((0, 999), (None, 1)))
    values = round_values(linear_round(contract, [[999, 7], [500, 1], [0, 0]]), contract)
    assert list(values.values()) == [7, Fraction(501, 1000), 0]


def test_twelve_participants_each_with_a_slice():
    contract = a_contract(counts=[100] * 12, slices=[(None, 40), *((i, 10 + i) for i in range(12))])
    gains = [[1000 * (i + 1) + k for k in range(13)] for i in range(12)]
    values = round_values(linear_round(contract, gains), contract)
    rows = validation_rows(contract)
    assert rows == 40 + 12 * 10 + 66
    assert list(values.values()) == [Fraction(sum(g) - g[i + 1], rows - 10 - i) for i, g in enumerate(gains)]


def fault(call, *args):
    with pytest.raises(FaultError) as caught:
        call(*args)
    assert caught.value.exit_code == 1
    return caught.value


def test_rounds_that_do_not_join_are_a_fault_that_names_the_round_and_slice():
    shifted = ((770, 491), *NEXT[1:])
    rounds = [a_round(CONTRACT, LOSSES), a_round(CONTRACT, shifted, number=2)]
    for call in (check_rounds, period_values, total_value, own_slice_difference, leave_one_out):
        error = fault(call, rounds, CONTRACT)
        assert (error.code, error.field) == ("SCORES_CHAIN", "round 2")
        assert "slice 1" in error.message


def test_rows_may_not_move_between_slices_of_consecutive_rounds():
    moved = ((771, 489), *NEXT[1:])
    rounds = [a_round(CONTRACT, LOSSES), a_round(CONTRACT, moved, number=2)]
    assert fault(check_rounds, rounds, CONTRACT).code == "SCORES_CHAIN"


def test_rounds_only_increase_and_may_skip():
    first, second = a_round(CONTRACT, LOSSES), a_round(CONTRACT, NEXT, number=5)
    assert total_value([first, second], CONTRACT) == Fraction(1500 - 1180, 50)
    again = a_round(CONTRACT, NEXT, number=1)
    assert fault(check_rounds, [first, again], CONTRACT).code == "SCORES_ORDER"
    assert fault(check_rounds, [second, first], CONTRACT).code == "SCORES_ORDER"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"players": ()}, "SCORES_PLAYERS"),
        ({"players": tuple(reversed(IDS))}, "SCORES_PLAYERS"),
        ({"players": (IDS[0], IDS[0], IDS[1])}, "SCORES_PLAYERS"),
        ({"players": (*IDS[:2], "f" * 64)}, "SCORES_PLAYERS"),
        ({"players": tuple(IDS[:2])}, "SCORES_SHAPE"),
        ({"losses": LOSSES[:7]}, "SCORES_SHAPE"),
        ({"losses": ()}, "SCORES_SHAPE"),
        ({"losses": (*LOSSES[:7], (770,))}, "SCORES_SHAPE"),
        ({"losses": (*LOSSES[:7], ())}, "SCORES_SHAPE"),
        ({"losses": tuple((*row, 0) for row in LOSSES)}, "SCORES_SHAPE"),
        ({"losses": (*LOSSES[:7], (770, -1))}, "SCORES_RANGE"),
        ({"losses": (*LOSSES[:7], (770, 10**400))}, "SCORES_RANGE"),
        ({"correct": (0, 51)}, "SCORES_CORRECT"),
        ({"correct": (-1, 0)}, "SCORES_CORRECT"),
        ({"round": 9}, "SCORES_ROUND"),
    ],
)
def test_scores_that_do_not_fit_the_contract_are_a_fault(change, code):
    scores = a_round(CONTRACT, LOSSES).model_copy(update=change)
    for call in (check_scores, round_values):
        error = fault(call, scores, CONTRACT)
        assert (error.code, error.field) == (code, f"round {scores.round}")
    assert fault(period_values, [scores], CONTRACT).code == code
