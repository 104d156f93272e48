"""The budget ledger's rows and its transition function."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from tests.support.ledger_kit import BASE, DATA_SET, OTHER_BASE, contract_id, request, reserved, terms
from tests.support.settlement_kit import a_contract

from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.ledger import (
    GENESIS,
    NO_CONTRACT,
    LedgerRow,
    Terms,
    attempts,
    charged,
    charged_steps,
    check_chain,
    check_plans,
    committed,
    ledger_head,
    next_failed,
    next_lost,
    next_reserved,
    next_restored,
    next_spent,
    written_off,
)
from fedpact_contract.privacy import epsilon_pld
from fedpact_contract.record import Envelope, open_signed, read_envelope, sign

LIMIT = Decimal(5)
DIGEST = "d" * 64


def spent(rows: list[LedgerRow], number: int, **values: object) -> LedgerRow:
    rows.append(next_spent(rows, reserved(rows, number, **values), DIGEST))
    return rows[-1]


def refusal(rows: list[LedgerRow], number: int, base: str = BASE, limit: Decimal = LIMIT, **values: object) -> str:
    with pytest.raises(RefusedError) as caught:
        next_reserved(rows, request(number, base, terms(**values)), limit)
    return caught.value.code


# Rows


def test_a_row_has_one_canonical_form_and_is_signed_as_a_ledger_row():
    key = generate_key()
    row = spent([], 1)
    assert LedgerRow.from_bytes(row.to_bytes()) == row
    assert b'"rdp":"0.1"' in row.to_bytes()
    envelope: Envelope[LedgerRow] = read_envelope(sign(row, key).to_bytes())
    assert open_signed(envelope, LedgerRow, public_hex(key)).row_hash == row.row_hash == row.digest()


def test_the_chain_starts_at_genesis_and_each_row_names_the_one_before():
    rows: list[LedgerRow] = []
    assert ledger_head(rows) == GENESIS
    spent(rows, 1)
    spent(rows, 2)
    assert [r.seq for r in rows] == [0, 1, 2, 3]
    assert [r.previous for r in rows] == [GENESIS, *(r.row_hash for r in rows[:-1])]
    assert ledger_head(rows) == rows[-1].row_hash
    check_chain(rows)


@pytest.mark.parametrize(
    "change",
    [
        {"update_digest": DIGEST},
        {"code": "DATA_NAN"},
        {"state": "spent"},
        {"state": "failed"},
        {"state": "restored"},
        {"state": "lost"},
        {"round": 0},
        {"attempt": 0},
        {"base_digest": None},
        {"steps": 0},
        {"steps": -1},
        {"rdp": "0"},
        {"rdp": "-0.1"},
        {"rdp": "NaN"},
        {"rdp": "0.10"},
        {"rdp": 0.1},
        {"seq": True},
        {"previous": "no hash"},
        {"surplus": 1},
    ],
)
def test_a_malformed_row_is_refused(change: dict[str, object]):
    plain = reserved([], 1).plain() | change
    with pytest.raises(InputError) as caught:
        LedgerRow.parse(plain, code="LEDGER_ROW")
    assert caught.value.code.startswith("LEDGER_ROW")


@pytest.mark.parametrize("change", [{"round": 1}, {"attempt": 1}, {"base_digest": BASE}, {"rdp": "-1"}, {"code": "X"}])
def test_a_restored_row_belongs_to_no_attempt(change: dict[str, object]):
    plain = next_restored([], terms()).plain()
    assert LedgerRow.parse(plain, code="LEDGER_ROW").state == "restored"
    with pytest.raises(InputError):
        LedgerRow.parse(plain | change, code="LEDGER_ROW")


# Terms


def test_terms_are_what_the_contract_says():
    contract = a_contract(rounds=8)
    participant = contract.participants[1]
    found = Terms.of(contract, participant.id, Decimal("0.02"))
    assert (found.contract_id, found.data_set, found.rdp) == (contract.id, participant.data_set, Decimal("0.02"))
    assert found.planned_attempts * found.steps == contract.planned_steps
    assert (found.rounds, found.spare_attempts) == (8, 1)


@pytest.mark.parametrize("rdp", [Decimal(0), Decimal("-1"), Decimal("NaN"), Decimal("Infinity")])
def test_a_free_attempt_or_an_infinite_one_is_no_term(rdp: Decimal):
    contract = a_contract()
    with pytest.raises(InputError, match="LEDGER_TERMS"):
        Terms.of(contract, contract.participants[0].id, rdp)


def test_terms_are_for_participants_only():
    contract = a_contract()
    with pytest.raises(InputError, match="CONTRACT_NOT_A_PARTY"):
        Terms.of(contract, contract.operator.id, Decimal(1))


# Charges


def test_each_attempt_is_charged_once_whatever_becomes_of_it():
    rows: list[LedgerRow] = []
    spent(rows, 1)
    assert charged(rows) == Decimal("0.1")
    rows.append(next_failed(rows, reserved(rows, 2), "DATA_NAN"))
    assert charged(rows) == Decimal("0.2")
    reserved(rows, 3)  # crashed
    assert charged(rows) == Decimal("0.3")
    assert charged_steps(rows, contract_id()) == 6
    assert charged_steps(rows, contract_id("two")) == 0


def test_sums_round_up_under_any_decimal_context():
    digits = Decimal("0." + "3" * 70)
    rows = [reserved([], 1, rdp=digits)]
    with localcontext(prec=3):
        total = charged(rows)
    assert Fraction(digits) < Fraction(total) < Fraction(digits) + Fraction(1, 10**59)


def test_nothing_is_charged_in_an_empty_ledger():
    assert charged([]) == 0
    assert committed([], [terms()]) == Decimal("0.4")


# Reserving


def test_the_last_attempt_that_fits_is_admitted_and_the_next_refused():
    rows: list[LedgerRow] = []
    for number in (1, 2, 3):
        assert reserved(rows, number, limit="0.3").attempt == 1
    assert charged(rows) == Decimal("0.3")
    assert refusal(rows, 1, limit=Decimal("0.3"), name="two") == "BUDGET_EXCEEDED"


def test_other_contracts_on_the_data_set_count():
    rows: list[LedgerRow] = []
    reserved(rows, 1, rdp=Decimal("4.95"))
    assert refusal(rows, 1, name="two") == "BUDGET_EXCEEDED"
    assert reserved(rows, 1, name="two", rdp=Decimal("0.05")).attempt == 1


def test_another_base_model_for_the_same_round_is_refused():
    rows: list[LedgerRow] = []
    reserved(rows, 1)
    assert refusal(rows, 1, OTHER_BASE) == "BASE_MODEL_CHANGED"
    spent_rows: list[LedgerRow] = []
    spent(spent_rows, 1)
    assert refusal(spent_rows, 1, OTHER_BASE) == "BASE_MODEL_CHANGED"
    assert next_reserved(spent_rows, request(2, OTHER_BASE), LIMIT).round == 2


def test_a_round_that_is_done_or_failed_is_never_tried_again():
    rows: list[LedgerRow] = []
    spent(rows, 1)
    assert refusal(rows, 1) == "ROUND_DONE"
    rows.append(next_failed(rows, reserved(rows, 2), "TRAINER_MEMORY"))
    assert refusal(rows, 2) == "ROUND_FAILED"
    assert refusal(rows, 1) == "ROUND_DONE"
    assert reserved(rows, 3).attempt == 1


def test_rounds_only_increase_within_a_contract():
    rows: list[LedgerRow] = []
    reserved(rows, 2)
    assert refusal(rows, 1) == "ROUND_BACKWARDS"
    assert reserved(rows, 1, name="two").round == 1
    assert refusal(rows, 1) == "ROUND_BACKWARDS"


def test_a_round_beyond_the_plan_is_refused():
    assert refusal([], 4) == "ROUND_NOT_PLANNED"
    assert next_reserved([], request(3), LIMIT).round == 3


def test_a_crashed_round_takes_a_spare_of_the_whole_contract():
    rows: list[LedgerRow] = []
    reserved(rows, 1)
    assert reserved(rows, 1).attempt == 2
    assert refusal(rows, 1) == "ATTEMPTS_EXHAUSTED"
    assert reserved(rows, 2).attempt == 1
    assert refusal(rows, 2) == "ATTEMPTS_EXHAUSTED"
    assert reserved(rows, 3).attempt == 1
    assert attempts(rows, contract_id()) == terms().planned_attempts
    check_chain(rows)


def test_rounds_missed_give_no_spares():
    rows: list[LedgerRow] = []
    reserved(rows, 3)
    assert reserved(rows, 3).attempt == 2
    assert refusal(rows, 3) == "ATTEMPTS_EXHAUSTED"
    assert attempts(rows, contract_id()) < terms().planned_attempts


def test_without_spares_a_crash_loses_the_round_only():
    rows: list[LedgerRow] = []
    reserved(rows, 1, spare_attempts=0)
    assert refusal(rows, 1, spare_attempts=0) == "ATTEMPTS_EXHAUSTED"
    assert reserved(rows, 2, spare_attempts=0).attempt == 1


def test_attempts_never_exceed_the_plan_whatever_terms_reserved_them():
    rows: list[LedgerRow] = []
    for number in (1, 1, 2):
        reserved(rows, number)
    assert refusal(rows, 3, spare_attempts=0) == "ATTEMPTS_EXHAUSTED"
    assert reserved(rows, 3).attempt == 1


# Ending


def test_an_end_copies_the_attempt():
    rows = [reserved([], 1)]
    end = next_spent(rows, rows[0], DIGEST)
    assert (end.state, end.update_digest, end.code) == ("spent", DIGEST, None)
    assert (end.round, end.attempt, end.base_digest, end.rdp, end.steps) == (1, 1, BASE, Decimal("0.1"), 2)
    failed = next_failed(rows, rows[0], "DATA_NAN")
    assert (failed.state, failed.update_digest, failed.code) == ("failed", None, "DATA_NAN")


def test_an_attempt_ends_once():
    rows = [reserved([], 1)]
    rows.append(next_spent(rows, rows[0], DIGEST))
    for end in (lambda: next_spent(rows, rows[0], "e" * 64), lambda: next_failed(rows, rows[0], "DATA_NAN")):
        with pytest.raises(RefusedError, match="ATTEMPT_ENDED"):
            end()


def test_an_attempt_given_up_cannot_end_any_more():
    rows = [reserved([], 1)]
    first = rows[0]
    reserved(rows, 1)
    with pytest.raises(RefusedError, match="ATTEMPT_SUPERSEDED"):
        next_spent(rows, first, DIGEST)
    later = [first]
    reserved(later, 2)
    with pytest.raises(RefusedError, match="ATTEMPT_SUPERSEDED"):
        next_failed(later, first, "TRAINER_TIME")
    gone = [first]
    gone.append(next_restored(gone, terms()))
    with pytest.raises(RefusedError, match="ATTEMPT_SUPERSEDED"):
        next_spent(gone, first, DIGEST)


def test_another_contract_does_not_supersede():
    rows = [reserved([], 1)]
    reserved(rows, 1, name="two")
    assert next_spent(rows, rows[0], DIGEST).round == 1


def test_what_was_never_reserved_cannot_end():
    rows = [reserved([], 1)]
    other = reserved([], 1, name="two")
    end = next_spent(rows, rows[0], DIGEST)
    for stranger in (other, end, next_reserved(rows, request(2), LIMIT)):
        with pytest.raises(RefusedError, match="ATTEMPT_UNKNOWN"):
            next_spent([*rows, end], stranger, DIGEST)


def test_a_malformed_digest_or_code_is_an_input_error():
    rows = [reserved([], 1)]
    with pytest.raises(InputError, match="LEDGER_ROW"):
        next_spent(rows, rows[0], "no digest")
    with pytest.raises(InputError, match="LEDGER_ROW"):
        next_failed(rows, rows[0], "two words")


# The plan


def test_the_whole_plan_of_every_signed_contract_must_fit():
    check_plans([], [], terms(), Decimal("0.4"))
    with pytest.raises(RefusedError, match="BUDGET_EXCEEDED"):
        check_plans([], [], terms(), Decimal("0.39"))
    check_plans([], [terms()], terms("two"), Decimal("0.8"))
    with pytest.raises(RefusedError, match="BUDGET_EXCEEDED"):
        check_plans([], [terms()], terms("two"), Decimal("0.79"))


def test_what_a_running_contract_charged_is_not_counted_twice():
    rows: list[LedgerRow] = []
    spent(rows, 1)
    assert committed(rows, [terms()]) == Decimal("0.4")
    assert committed(rows, []) == Decimal("0.1")  # it ended: its other attempts are free again
    check_plans(rows, [], terms("two"), Decimal("0.5"))


# Old copies


def test_after_a_restore_a_contract_counts_as_fully_spent():
    rows: list[LedgerRow] = []
    spent(rows, 1)
    rows.append(next_restored(rows, terms()))
    assert rows[-1].rdp == Decimal("0.3")
    assert charged(rows) == terms().planned_attempts * terms().rdp == committed(rows, [terms()])
    assert charged_steps(rows, contract_id()) == terms().planned_attempts * terms().steps
    assert written_off(rows, contract_id())
    assert not written_off(rows, contract_id("two"))
    for number in (1, 2, 3):
        assert refusal(rows, number) == "LEDGER_RESTORED"
    assert reserved(rows, 1, name="two").attempt == 1
    check_chain(rows)


def test_a_contract_is_written_off_once_and_its_row_may_charge_nothing():
    rows: list[LedgerRow] = []
    for number in (1, 1, 2, 3):
        reserved(rows, number)
    rows.append(next_restored(rows, terms()))
    assert (rows[-1].rdp, rows[-1].steps) == (0, 0)
    with pytest.raises(RefusedError, match="LEDGER_RESTORED"):
        next_restored(rows, terms())


def test_what_a_witness_saw_beyond_is_charged_to_no_contract():
    rows: list[LedgerRow] = []
    spent(rows, 1)
    assert next_lost(rows, DATA_SET, Decimal("0.1")) is None
    assert next_lost(rows, DATA_SET, Decimal("0.05")) is None
    for seen in ("0.7", "0.8"):
        row = next_lost(rows, DATA_SET, Decimal(seen))
        assert row is not None
        rows.append(row)
        assert charged(rows) == Decimal(seen)
    assert {r.contract_id for r in rows[-2:]} == {NO_CONTRACT}
    check_chain(rows)


# The chain


def ledger() -> list[LedgerRow]:
    """Two contracts: done, crashed and done, failed, written off."""
    rows: list[LedgerRow] = []
    spent(rows, 1)
    reserved(rows, 2)
    spent(rows, 1, name="two")
    spent(rows, 2)
    rows.append(next_failed(rows, reserved(rows, 3), "DATA_NAN"))
    rows.append(next_restored(rows, terms("two")))
    return rows


def place(rows: list[LedgerRow]) -> tuple[str | None, str | None]:
    with pytest.raises(FaultError) as caught:
        check_chain(rows)
    assert caught.value.code == "LEDGER_CHAIN"
    return caught.value.field, caught.value.rule


def relinked(rows: list[LedgerRow]) -> list[LedgerRow]:
    """The rows with numbers and hashes that fit: what a forger who holds no key would make."""
    result: list[LedgerRow] = []
    for row in rows:
        plain = row.plain() | {"seq": len(result), "previous": ledger_head(result)}
        result.append(LedgerRow.parse(plain, code="LEDGER_ROW"))
    return result


def changed(row: LedgerRow, **values: object) -> LedgerRow:
    return LedgerRow.parse(row.plain() | values, code="LEDGER_ROW")


def test_a_whole_ledger_and_each_beginning_of_it_verify():
    rows = ledger()
    for size in range(len(rows) + 1):
        check_chain(rows[:size])
    assert relinked(rows) == rows


@pytest.mark.parametrize("index", range(len(ledger()) - 1))
def test_a_changed_row_is_found_at_the_next_one(index: int):
    rows = ledger()
    rows[index] = changed(rows[index], noise_multiplier="9")
    field, _ = place(rows)
    assert field in (f"row {index}", f"row {index + 1}")


def test_a_missing_a_doubled_and_a_swapped_row_are_found():
    rows = ledger()
    assert place(rows[1:]) == ("row 0", "rows are numbered from 0 without a gap")
    assert place(rows[:2] + rows[3:])[0] == "row 2"
    assert place([*rows[:2], rows[1], *rows[2:]])[0] == "row 2"
    assert place([*rows[:2], rows[3], rows[2], *rows[4:]])[0] == "row 2"


def test_a_row_with_the_right_number_and_the_wrong_link_is_found():
    rows = ledger()
    rows[3] = changed(rows[3], previous="0" * 64)
    assert place(rows) == ("row 3", "each row names the hash of the row before it")


def test_two_data_sets_do_not_mix():
    rows = ledger()
    rows[5] = changed(rows[5], data_set="other")
    assert place(relinked(rows)) == ("row 5", "all rows are of one data set")


FITS = "a row fits the contract's last row"


@pytest.mark.parametrize(
    ("index", "values"),
    [
        (1, {"attempt": 2}),  # the end of an attempt that was not reserved
        (1, {"base_digest": OTHER_BASE}),
        (1, {"rdp": "0.01"}),
        (1, {"noise_multiplier": "3"}),
        (2, {"attempt": 2}),  # attempts start at 1
        (2, {"round": 1}),  # a second try at a round that is done
        (5, {"base_digest": OTHER_BASE}),  # another base for the same round
        (5, {"attempt": 3}),
        (5, {"attempt": 1}),
        (7, {"round": 1}),  # backwards
    ],
)
def test_rows_that_are_linked_but_break_a_rule_are_found(index: int, values: dict[str, object]):
    rows = ledger()
    rows[index] = changed(rows[index], **values)
    assert place(relinked(rows)) == (f"row {index}", FITS)


def test_nothing_follows_a_write_off():
    rows = ledger()
    for extra in (reserved([], 2, name="two"), rows[3], next_restored([], terms("two"))):
        assert place(relinked([*rows, extra])) == (f"row {len(rows)}", FITS)


def test_a_second_end_is_found():
    rows = ledger()
    assert place(relinked([*rows[:2], rows[1]])) == ("row 2", FITS)
    failed = next_failed(rows[:1], rows[0], "DATA_NAN")
    assert place(relinked([*rows[:2], failed])) == ("row 2", FITS)


def test_a_failed_round_tried_again_is_found():
    rows = ledger()[:-1]
    again = changed(rows[-2], attempt=2)
    assert place(relinked([*rows, again])) == (f"row {len(rows)}", FITS)


def test_only_a_write_off_may_stand_without_a_contract():
    forged = changed(reserved([], 1), contract_id=NO_CONTRACT)
    assert place([forged]) == ("row 0", FITS)


def test_refusals_say_where_and_what_to_do():
    rows: list[LedgerRow] = []
    reserved(rows, 2)
    for number, base in ((4, BASE), (2, OTHER_BASE), (1, BASE)):
        with pytest.raises(FedpactError) as caught:
            next_reserved(rows, request(number, base), LIMIT)
        assert caught.value.field == f"round {number}"
        assert caught.value.exit_code == 5


# Trap 10 of the privacy document: an accountant that begins anew each round


def test_forty_rounds_cost_what_their_steps_cost_together():
    """0.64 is what one round of ten steps costs, and what a fresh accountant reports in the fortieth: 4.25 is true.

    Steps are counted from the rows, over all rounds and attempts, so a restart in between forgets none.
    """
    delta, step = Decimal("1e-4"), (Decimal(2), Decimal("0.1"))
    long = {"rounds": 40, "spare_attempts": 1, "steps": 10, "noise_multiplier": step[0], "sample_rate": step[1]}
    rows: list[LedgerRow] = []
    for number in range(1, 41):
        reserved(rows, number, limit="100", **long)
        rows.append(next_spent(rows, rows[-1], "d" * 64))
        again = [LedgerRow.from_bytes(row.to_bytes()) for row in rows]  # as after a restart
        assert charged_steps(again, contract_id()) == 10 * number
    one, all_of_them = (epsilon_pld([(*step, steps)], delta) for steps in (10, charged_steps(again, contract_id())))
    assert float(one) == pytest.approx(0.64, abs=0.02)
    assert float(all_of_them) == pytest.approx(4.24, abs=0.02)
    assert charged(again) == 40 * terms(**long).rdp
