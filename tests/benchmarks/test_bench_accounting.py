"""Our two accountants beside Opacus' own, computed here and now, and what a decision of the gate costs.

The four rows are those of the privacy document. `epsilon_pld` is dp-accounting's PLD, Opacus' best is its PRV: two code
bases, two methods. Rényi divergences are compared through the same conversion (Canonne, Kamath and Steinke 2020), each
minimised over the fixed list of orders.
"""

import sys
import time
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import pytest
from tests.support.ledger_kit import DATA_SET, contract_id

from fedpact_contract import privacy
from fedpact_contract.ledger import LedgerRow, Request, Terms, charged, check_plans, next_reserved
from fedpact_contract.privacy import Group, epsilon_gate, epsilon_pld, filter_alpha, filter_limit, rdp

ROWS: dict[str, tuple[list[Group], Decimal]] = {
    "sigma 1.1, q 256/60k, 14063 steps": ([(Decimal("1.1"), Decimal(256) / 60_000, 14063)], Decimal("1e-5")),
    "sigma 2, q .1, 400 steps": ([(Decimal(2), Decimal("0.1"), 400)], Decimal("1e-4")),
    "sigma 4, q .25, 200 steps": ([(Decimal(4), Decimal("0.25"), 200)], Decimal("5e-4")),
    "(1.5, .05, 600) + (3, .2, 100)": (
        [(Decimal("1.5"), Decimal("0.05"), 600), (Decimal(3), Decimal("0.2"), 100)],
        Decimal("1e-5"),
    ),
}
ORDERS = [
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *(72, 96, 128, 192, 256, 384, 512, 768, 1024, 2048),
]
"""The orders of the privacy document: Opacus' own list stops at 63."""


def of_opacus(kind: str, groups: Sequence[Group], delta: Decimal) -> float:
    from opacus import accountants

    accountant = {"prv": accountants.PRVAccountant, "rdp": accountants.RDPAccountant}[kind]()
    accountant.history = [(float(noise), float(rate), steps) for noise, rate, steps in groups]
    more = {"alphas": ORDERS} if kind == "rdp" else {}
    return float(accountant.get_epsilon(float(delta), **more))


def our_rdp(groups: Sequence[Group], delta: Decimal) -> Decimal:
    """Our divergences, converted at each order; the least."""
    sums = {alpha: sum(rdp(*group, alpha) for group in groups) for alpha in map(Decimal, map(str, ORDERS))}
    return min(epsilon_gate(total, delta, alpha) for alpha, total in sums.items())


@pytest.mark.filterwarnings("ignore")  # of Opacus: each accountant comments on the other
@pytest.mark.parametrize("row", list(ROWS))
def test_both_epsilons_agree_with_opacus(benchmark, capsys, row) -> None:
    groups, delta = ROWS[row]
    prv, other = of_opacus("prv", groups, delta), of_opacus("rdp", groups, delta)
    pld = float(benchmark.pedantic(epsilon_pld, args=(groups, delta), rounds=1))
    ours = float(our_rdp(groups, delta))
    with capsys.disabled():
        told = f"epsilon_pld {pld:.4f}, Opacus PRV {prv:.4f}; RDP {ours:.4f}, Opacus RDP {other:.4f}"
        sys.stdout.write(f"\n{row}, delta {delta}: {told}\n")
    benchmark.extra_info.update(epsilon_pld=pld, opacus_prv=prv, rdp=ours, opacus_rdp=other)
    assert pld == pytest.approx(prv, abs=0.02)
    assert ours == pytest.approx(other, abs=0.005)
    assert pld < ours


ENTRIES = 200
BUDGET = (Decimal(8), Decimal("1e-5"))


def mixed(index: int) -> Terms:
    """The terms of one of many different contracts of one round each."""
    noise, rate = Decimal(150 + 13 * (index % 17)) / 100, Decimal(2 + index % 10) / 100
    cost = rdp(noise, rate, 20, filter_alpha(*BUDGET))
    return Terms(
        contract_id=contract_id(str(index)),
        data_set=DATA_SET,
        rounds=1,
        spare_attempts=0,
        steps=20,
        sample_rate=rate,
        noise_multiplier=noise,
        max_grad_norm=Decimal(1),
        rdp=cost,
    )


def timed(call, *arguments) -> tuple[float, object]:
    begun = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - begun, result


def test_a_decision_over_two_hundred_mixed_entries(benchmark, capsys) -> None:
    """From the charges that stand in the rows and the new contract's own, computed; beside it, composing all by PLD."""
    limit = filter_limit(*BUDGET, filter_alpha(*BUDGET))
    plans = [mixed(index) for index in range(ENTRIES + 1)]
    rows: list[LedgerRow] = []
    for terms in plans[:ENTRIES]:
        rows.append(next_reserved(rows, Request(terms=terms, round=1, base_digest="b" * 64), Decimal(1000)))
    asked = Request(terms=plans[ENTRIES], round=1, base_digest="b" * 64)
    enough = limit + charged(rows)

    def decide() -> LedgerRow:
        check_plans(rows, [], mixed(ENTRIES), enough)
        return next_reserved(rows, asked, enough)

    row = benchmark.pedantic(decide, rounds=5)
    ours = benchmark.stats.stats.max
    groups = [(t.noise_multiplier, t.sample_rate, t.steps) for t in plans]
    privacy._epsilon.cache_clear()
    by_pld, pld = timed(epsilon_pld, groups, BUDGET[1])
    gate = epsilon_gate(charged([*rows, row]), BUDGET[1], filter_alpha(*BUDGET))
    with capsys.disabled():
        told = f"{1000 * ours:.2f} ms from stored charges (epsilon_gate {gate}), {by_pld:.1f} s by PLD ({pld})"
        sys.stdout.write(f"\na decision over {ENTRIES} mixed entries: {told}\n")
    benchmark.extra_info.update(gate_ms=1000 * ours, pld_s=by_pld)
    assert ours < 1 < by_pld
    assert Fraction(charged([*rows, row])) >= sum(Fraction(t.rdp) for t in plans)
    assert gate > pld, "the gate is never under the composition of its parts"
