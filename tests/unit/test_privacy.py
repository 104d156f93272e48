import importlib.metadata
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.support.evidence_factory import contract_values

from fedpact_contract import privacy
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_contract.privacy import (
    ACCOUNTANT,
    INFINITE,
    check_plan,
    epsilon_gate,
    epsilon_pld,
    filter_alpha,
    filter_limit,
    rdp,
    solve_central_noise,
    solve_noise_multiplier,
)

D = Decimal
MNIST = D(256) / D(60000)
# docs/privacy.md, "Accounting": plan, delta, Opacus PRV, dp-accounting PLD, dp-accounting RDP.
TABLE = [
    ([(D("1.1"), MNIST, 14063)], D("1e-5"), D("2.392"), D("2.382"), D("2.597")),
    ([(D(2), D("0.1"), 400)], D("1e-4"), D("4.248"), D("4.238"), D("4.689")),
    ([(D(4), D("0.25"), 200)], D("5e-4"), D("2.993"), D("2.983"), D("3.354")),
    ([(D("1.5"), D("0.05"), 600), (D(3), D("0.2"), 100)], D("1e-5"), D("5.314"), D("5.304"), D("5.766")),
]
BUDGETS = [(D(8), D("4.3")), (D(3), D("9.1")), (D(1), D("24.5"))]


@pytest.mark.parametrize(("plan", "delta", "prv", "pld", "_rdp"), TABLE)
def test_epsilon_is_that_of_the_accounting_table(plan, delta, prv, pld, _rdp) -> None:
    epsilon = epsilon_pld(plan, delta)
    assert abs(epsilon - prv) <= D("0.02")
    assert abs(epsilon - pld) <= D("0.001")
    assert epsilon == epsilon.quantize(D("1e-6"))


@pytest.mark.parametrize(("plan", "delta", "_prv", "pld", "best"), TABLE)
def test_rdp_at_the_best_order_gives_the_tables_rdp_column(plan, delta, _prv, pld, best) -> None:
    orders = [D(tenths) / 10 for tenths in range(11, 400)]
    epsilon = min(epsilon_gate(sum(rdp(*group, alpha) for group in plan), delta, alpha) for alpha in orders)
    assert abs(epsilon - best) < D("0.005")
    assert epsilon > pld


def test_a_plan_cut_into_pieces_costs_the_same() -> None:
    whole = epsilon_pld([(D(2), D("0.1"), 30)], D("1e-5"))
    assert epsilon_pld([(D(2), D("0.1"), 10), (D("2.0"), D("0.1"), 20)], D("1e-5")) == whole
    assert epsilon_pld([(D(3), D("0.2"), 5), (D(2), D("0.1"), 5)], D("1e-5")) == epsilon_pld(
        [(D(2), D("0.1"), 5), (D(3), D("0.2"), 5)], D("1e-5")
    )


def test_composition_is_joint_not_a_sum() -> None:
    one, two = (D("1.5"), D("0.05"), 600), (D(3), D("0.2"), 100)
    delta = D("1e-5")
    assert epsilon_pld([one, two], delta) < epsilon_pld([one], delta) + epsilon_pld([two], delta) - D("0.5")


def test_no_steps_cost_nothing() -> None:
    assert epsilon_pld([], D("1e-5")) == 0
    assert epsilon_pld([(D(1), D("0.1"), 0)], D("1e-5")) == 0
    assert rdp(D(1), D("0.1"), 0, D(4)) == 0


@pytest.mark.parametrize(
    "group",
    [(D("0.001"), D("0.5"), 100), (D("0.249"), D("0.000001"), 1), (D("0.3"), D("0.9"), 500), (D(2), D("0.1"), 2**31)],
)
def test_what_protects_nobody_is_infinite_and_costs_no_time(group) -> None:
    began = time.process_time()
    assert epsilon_pld([group], D("1e-5")) == INFINITE
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [
        ("0", "0.1", 1, "1e-5"),
        ("-1", "0.1", 1, "1e-5"),
        ("NaN", "0.1", 1, "1e-5"),
        ("Infinity", "0.1", 1, "1e-5"),
        ("1", "0", 1, "1e-5"),
        ("1", "1.01", 1, "1e-5"),
        ("1", "NaN", 1, "1e-5"),
        ("1", "0.1", -1, "1e-5"),
        ("1", "0.1", 1, "0"),
        ("1", "0.1", 1, "1"),
        ("1", "0.1", 1, "NaN"),
    ],
)
def test_quantities_that_make_no_sense_are_refused(noise, rate, steps, delta) -> None:
    with pytest.raises(InputError) as refused:
        epsilon_pld([(D(noise), D(rate), steps)], D(delta))
    assert refused.value.code == "PRIVACY_RANGE"
    assert refused.value.field


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps", "most"),
    [
        ("2", "0.00001", "0.2", 36, 40),
        ("8", "0.00001", "0.1", 36, 30),
        ("1", "0.000001", "0.2", 36, 50),
        ("0.1", "0.000001", "0.2", 60, 130),
        ("3", "0.00001", "0.05", 400, 40),
    ],
)
def test_the_solved_noise_is_the_smallest_that_fits(monkeypatch, epsilon, delta, rate, steps, most) -> None:
    real, looks = privacy._epsilon, []
    monkeypatch.setattr(privacy, "_epsilon", lambda *args: looks.append(args[2]) or real(*args))
    noise = solve_noise_multiplier(D(epsilon), D(delta), D(rate), steps)
    monkeypatch.undo()
    assert noise == noise.quantize(D("0.001"))
    assert epsilon_pld([(noise, D(rate), steps)], D(delta)) <= D(epsilon)
    assert epsilon_pld([(noise - D("0.001"), D(rate), steps)], D(delta)) > D(epsilon)
    assert len(looks) <= most, "0.4 to 1.3 s on a quiet machine: what is counted is what it works out"
    assert looks.count(privacy._FINE) <= most // 6


def test_no_noise_multiplier_is_large_enough() -> None:
    with pytest.raises(InputError) as refused:
        solve_noise_multiplier(D("0.001"), D("1e-5"), D("0.9"), 1000)
    assert (refused.value.code, refused.value.field) == ("PRIVACY_UNREACHABLE", "privacy.epsilon")
    assert refused.value.rule == "noise_multiplier <= 1000"
    for words in ("training.rounds", "training.local_steps", "privacy.sample_rate"):
        assert words in refused.value.remedy
    with pytest.raises(InputError) as central:
        solve_central_noise(D("0.001"), D("1e-5"), 1000)
    assert (central.value.code, central.value.field) == ("PRIVACY_UNREACHABLE", "privacy.epsilon")
    assert "sample_rate" not in central.value.remedy, "at client level it buys nothing"


def test_a_budget_that_anything_meets_gives_the_least_noise_that_is_computed() -> None:
    assert solve_noise_multiplier(D(20), D("1e-5"), D("0.001"), 1) == D("0.25")


@pytest.mark.parametrize(("epsilon", "steps"), [("0", 10), ("101", 10), ("Infinity", 10), ("1", 0), ("1", 2_000_000)])
def test_unreasonable_budgets_are_refused(epsilon, steps) -> None:
    with pytest.raises(InputError) as refused:
        solve_noise_multiplier(D(epsilon), D("1e-5"), D("0.1"), steps)
    assert refused.value.code == "PRIVACY_RANGE"


def test_rdp_of_a_full_batch_is_the_gaussians() -> None:
    # Mironov 2017, "Rényi differential privacy": alpha / (2 sigma^2) a step.
    assert rdp(D("2.5"), D(1), 30, D("4.3")) == D("10.32")
    assert rdp(D(4), D(1), 1, D(2)) == D("0.0625")


@pytest.mark.parametrize("noise", ["0.8", "2.5", "50"])
def test_rdp_grows_with_the_order_and_between_integers(noise) -> None:
    values = [rdp(D(noise), D("0.2"), 30, D(tenths) / 10) for tenths in range(20, 130, 4)]
    assert values == sorted(values)
    assert min(values) >= 0


def test_rdp_is_the_steps_times_one_step_rounded_up_once() -> None:
    one, many = rdp(D("2.5"), D("0.2"), 1, D("4.3")), rdp(D("2.5"), D("0.2"), 30, D("4.3"))
    assert many == many.quantize(D("1e-9"))
    assert many <= 30 * one < many + D("3e-8")


@pytest.mark.parametrize("noise", [D(n) * D("1e-8") for n in range(61, 67)])
def test_rdp_is_not_rounded_down_where_it_is_large(noise) -> None:
    """Above 1e18 the 28 digits that Decimal has unasked end at 1e-9."""
    steps, alpha = 999_983, D(3)
    (one,) = privacy._rdp_one(noise, D(1), [3.0])
    truth = steps * Fraction(one)
    assert truth > 10**18
    assert truth <= Fraction(rdp(noise, D(1), steps, alpha)) < truth + Fraction(1, 10**9)


def test_rdp_stays_finite_and_bounded_where_the_series_does_not_converge(capsys) -> None:
    # dp-accounting answers infinity here, and warns on stderr that it leaves the order out.
    assert rdp(D("0.5"), D("0.5"), 100, D("1.01")) <= rdp(D("0.5"), D("0.5"), 100, D(2))
    # And here its value at 1.1 is above the one at 4.3: cancellation.
    assert rdp(D(50), D("0.1"), 10**6, D("1.1")) <= rdp(D(50), D("0.1"), 10**6, D("4.3"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("alpha", ["1", "0.5", "NaN", "Infinity"])
def test_rdp_orders_lie_above_one(alpha) -> None:
    with pytest.raises(InputError):
        rdp(D(1), D("0.1"), 1, D(alpha))


@pytest.mark.parametrize(("epsilon", "alpha"), BUDGETS)
def test_the_filters_order(epsilon, alpha) -> None:
    assert filter_alpha(epsilon, D("1e-5")) == alpha


def test_the_filters_limit() -> None:
    limit = filter_limit(D(8), D("1e-5"), D("4.3"))
    assert limit.quantize(D("0.01")) == D("5.22")
    assert limit == limit.quantize(D("1e-9"))


@pytest.mark.parametrize(("epsilon", "alpha"), BUDGETS)
def test_the_gate_and_the_limit_say_the_same(epsilon, alpha) -> None:
    limit = filter_limit(epsilon, D("1e-5"), alpha)
    assert epsilon_gate(limit, D("1e-5"), alpha) == epsilon
    assert epsilon_gate(limit + D("0.000001"), D("1e-5"), alpha) > epsilon
    assert epsilon_gate(limit - D("0.01"), D("1e-5"), alpha) < epsilon


@given(st.decimals("0.1", 20, places=6), st.sampled_from(["1e-5", "1e-9"]), st.integers(-2, 2))
def test_the_gate_and_the_limit_agree_to_the_last_digit_where_epsilon_has_six_decimals(epsilon, delta, more) -> None:
    alpha = filter_alpha(epsilon, D(delta))
    limit = filter_limit(epsilon, D(delta), alpha)
    total = limit + more * D("1e-9")
    assume(total > 0)
    assert (epsilon_gate(total, D(delta), alpha) <= epsilon) == (total <= limit)


def test_the_gate_of_an_empty_ledger_is_zero_and_of_a_small_sum_is_large() -> None:
    assert epsilon_gate(D(0), D("1e-5"), D("4.3")) == 0
    # docs/privacy.md: epsilon_pld 2.00, and 2.73 at the order of budget 2.
    group = (D("2.5"), D("0.2"), 30)
    alpha = filter_alpha(D(2), D("1e-5"))
    assert epsilon_pld([group], D("1e-5")).quantize(D("0.01")) == D("2.00")
    assert epsilon_gate(rdp(*group, alpha), D("1e-5"), alpha).quantize(D("0.01")) == D("2.73")
    assert epsilon_gate(INFINITE, D("1e-5"), alpha) == INFINITE


@pytest.mark.parametrize(("epsilon", "delta"), [("0", "1e-5"), ("-1", "1e-5"), ("1", "0"), ("1", "1"), ("NaN", "1e-5")])
def test_filters_of_no_budget_are_refused(epsilon, delta) -> None:
    with pytest.raises(InputError):
        filter_alpha(D(epsilon), D(delta))
    with pytest.raises(InputError):
        filter_limit(D(epsilon), D(delta), D("4.3"))


def test_a_negative_sum_is_refused() -> None:
    with pytest.raises(InputError):
        epsilon_gate(D(-1), D("1e-5"), D("4.3"))


def test_a_contract_within_its_epsilon_passes() -> None:
    assert check_plan(Contract.parse(contract_values())) is None


def test_the_plan_counts_every_spare_attempt() -> None:
    # 2 rounds of 3 steps: without spare attempts 1.0 is enough, with four of them it is not.
    noise = str(solve_noise_multiplier(D(2), D("0.00001"), D("0.1"), 6))
    fits = contract_values(privacy__noise_multiplier=noise, privacy__spare_attempts=0)
    check_plan(Contract.parse(fits))
    with pytest.raises(InputError) as refused:
        check_plan(Contract.parse(contract_values(privacy__noise_multiplier=noise, privacy__spare_attempts=4)))
    assert refused.value.code == "CONTRACT_NOISE_TOO_SMALL"
    assert refused.value.field == "privacy.noise_multiplier"
    assert "18 steps" in refused.value.message


@pytest.mark.parametrize("noise", ["1.2", "0.1"])
def test_too_little_noise_is_refused(noise) -> None:
    with pytest.raises(InputError) as refused:
        check_plan(Contract.parse(contract_values(privacy__noise_multiplier=noise, privacy__epsilon="1")))
    assert refused.value.code == "CONTRACT_NOISE_TOO_SMALL"


def test_another_accountant_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        check_plan(Contract.parse(contract_values(privacy__accountant="Opacus GDP")))
    assert refused.value.code == "CONTRACT_ACCOUNTANT"
    assert ACCOUNTANT in refused.value.message


def test_the_accountant_that_is_named_is_the_one_installed() -> None:
    name, version, method, *_ = ACCOUNTANT.split()
    assert importlib.metadata.version(name).startswith(f"{version}.")
    assert method == "PLD,"
