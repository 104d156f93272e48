"""A contract whose coalitions are drawn: from the round's updates, by a rule that every party recomputes."""

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.closed_run import open_run
from tests.support.settlement_kit import a_contract

from fedpact_contract.contract import Contract, estimator_plan
from fedpact_contract.contribution import (
    agrees_with_first_order,
    banzhaf_values,
    check_draws,
    check_scores,
    first_order_values,
    leave_one_out,
    masks,
    monte_carlo,
    next_draws,
    own_slice_difference,
    period_values,
    total_value,
)
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.estimators import Plan, coalitions, estimate
from fedpact_contract.log import RoundScores, Sampling
from fedpact_contract.sampling import round_seed
from fedpact_contract.scorecard import game_table, value_lines
from fedpact_contract.text import render
from fedpact_server import scoring

PLAYERS = 14
MLP = {"kind": "mlp", "hidden": [4], "initial_digest": "0" * 64}


def a_sampled_contract(
    count: int = PLAYERS,
    *,
    most: int | None = 2000,
    estimator: str = "sampled",
    model: Mapping[str, Any] = MLP,
    **more: Any,
) -> Contract:
    plain = a_contract([100] * min(count, 12), **more).plain()
    plain["participants"] += [
        plain["participants"][0]
        | {
            "name": f"more {i}",
            "key": sha256(f"more {i}".encode()).hexdigest(),
            "entity_code": f"{900 + i:018d}",
            "data_set": f"more-{i}",
        }
        for i in range(count - 12)
    ]
    plain["model"] = model
    plain["contribution"] |= {"estimator": estimator} | ({} if most is None else {"max_coalitions": most})
    return Contract.parse(plain)


CONTRACT = a_sampled_contract(slices=((None, 40), (0, 10)))
IDS = tuple(CONTRACT.by_id())
DIGESTS = [sha256(p.encode()).hexdigest() for p in IDS]
SEED = round_seed(1, DIGESTS)
GIVER = next(i for i, p in enumerate(IDS) if p == CONTRACT.contribution.validation.slices[1].source)


def loss(mask: int, bend: int) -> tuple[int, int]:
    """Each player lowers both slices by its own amount; `bend`: and by less, the more are there."""
    own = sum(1000 * (i + 1) for i in range(PLAYERS) if mask >> i & 1)
    third = bend * mask.bit_count() ** 3
    return 10**9 - 40 * own + third, 10**9 - 10 * own


def scores_of(
    plan: Plan, errors: list[int], *, bend: int = 0, first_order: tuple[int, ...] | None = None
) -> RoundScores:
    """The scores of a round with these draws."""
    nobody, everybody, *drawn = coalitions(plan)
    first = tuple(1000 * (i + 1) for i in range(PLAYERS)) if first_order is None else first_order
    return RoundScores(
        round=1,
        players=IDS,
        losses=tuple(loss(mask, bend) for mask in (nobody, *drawn, everybody)),
        correct=(0, 0),
        sampling=Sampling(
            estimator="pairs",
            seed=plan.seed.hex(),
            draws=plan.draws,
            errors=tuple((error,) * PLAYERS for error in errors),
        ),
        first_order=first,
    )


PLAN = estimator_plan(CONTRACT, PLAYERS, SEED)


class TestValues:
    def test_an_additive_game_is_exact_and_efficient(self) -> None:
        rounds = [scores_of(PLAN, [10**6])]
        values = period_values(rounds, CONTRACT)
        assert list(values.values()) == [Fraction(1000 * (i + 1)) for i in range(PLAYERS)]
        assert sum(values.values()) == total_value(rounds, CONTRACT)
        assert own_slice_difference(rounds, CONTRACT) == 0
        assert set((monte_carlo(rounds, CONTRACT) or {}).values()) == {Decimal(0)}

    def test_a_game_that_is_not_has_monte_carlo_half_widths_and_stays_efficient_on_all_rows(self) -> None:
        contract = a_sampled_contract(slices=((None, 40), (0, 10)))
        rounds = [scores_of(PLAN, [10**6], bend=200)]
        halves = monte_carlo(rounds, contract)
        assert halves is not None
        assert min(halves.values()) > 0
        values = period_values(rounds, contract)
        bent = [values[p] for i, p in enumerate(IDS) if i != GIVER]
        true = [Fraction(1000 * (i + 1)) - Fraction(200 * PLAYERS**2, 50) for i in range(PLAYERS) if i != GIVER]
        for value, due, half in zip(bent, true, [halves[p] for i, p in enumerate(IDS) if i != GIVER], strict=True):
            assert abs(value - due) < 5 * Fraction(half) + 1

    def test_the_giver_is_scored_on_the_others_rows(self) -> None:
        rounds = [scores_of(PLAN, [10**6], bend=200)]
        alone = a_sampled_contract(slices=((None, 40), (0, 10)))
        only = [scores_of(PLAN, [10**6], bend=200)]
        found = period_values(rounds, CONTRACT)[IDS[GIVER]]
        table = [-row[0] for row in only[0].losses]
        in_order = [table[0], table[-1], *table[1:-1]]
        assert found == estimate(PLAN, in_order).values[GIVER] / 40
        assert alone.id == CONTRACT.id

    def test_what_needs_other_coalitions_is_not_known(self) -> None:
        rounds = [scores_of(PLAN, [10**6])]
        assert leave_one_out(rounds, CONTRACT) is None
        assert banzhaf_values(rounds, CONTRACT) is None
        line = value_lines(rounds, CONTRACT)[IDS[0]]
        assert (line["leave_one_out"], line["banzhaf"], line["monte_carlo"]) == (None, None, "0")
        with pytest.raises(InputError) as caught:
            game_table(rounds[0])
        assert caught.value.code == "GAME_NOT_COMPLETE"

    def test_the_rows_of_a_table_are_nobody_the_draws_and_all(self) -> None:
        found = masks(scores_of(PLAN, [10**6]))
        assert (found[0], found[-1]) == (0, 2**PLAYERS - 1)
        assert set(found) == set(coalitions(PLAN))


class TestDraws:
    def test_draws_that_stop_where_the_rule_says_are_right(self) -> None:
        check_draws(scores_of(PLAN, [10**6]), CONTRACT, DIGESTS)
        bent = scores_of(PLAN, [1], bend=20_000)
        with pytest.raises(FaultError) as caught:
            check_draws(bent, CONTRACT, DIGESTS)
        assert caught.value.code == "SCORES_DRAWS", "more were due"
        twice = replace(PLAN, draws=2 * PLAN.draws)
        check_draws(scores_of(twice, [1, 10**9], bend=20_000), CONTRACT, DIGESTS)

    def test_first_order_values_that_go_another_way_double_the_draws_once(self) -> None:
        against = tuple(1000 * (PLAYERS - i) for i in range(PLAYERS))
        twice = replace(PLAN, draws=2 * PLAN.draws)
        check_draws(scores_of(twice, [10**9, 10**9], first_order=against), CONTRACT, DIGESTS)
        with pytest.raises(FaultError):
            check_draws(scores_of(PLAN, [10**9], first_order=against), CONTRACT, DIGESTS)

    @pytest.mark.parametrize(
        ("errors", "draws"), [([10**6, 10**6], 1), ([10**6], 2), ([10**6, 10**6], 2), ([10**6] * 9, 8)]
    )
    def test_other_draws_than_the_rules_are_a_fault(self, errors: list[int], draws: int) -> None:
        """The last: draws that nobody asked for."""
        wrong = scores_of(replace(PLAN, draws=draws * PLAN.draws), errors)
        with pytest.raises(FaultError) as caught:
            check_draws(wrong, CONTRACT, DIGESTS)
        assert caught.value.code == "SCORES_DRAWS"

    def test_a_seed_of_other_updates_is_a_fault(self) -> None:
        with pytest.raises(FaultError) as caught:
            check_draws(scores_of(PLAN, [10**6]), CONTRACT, DIGESTS[1:])
        assert caught.value.code == "SCORES_SEED"

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"draws": 2}, "SCORES_DRAWS"),
            ({"draws": 10**6}, "SCORES_DRAWS"),
            ({"errors": ()}, "SCORES_SAMPLING"),
            ({"errors": ((1,),)}, "SCORES_SAMPLING"),
            ({"draws": 16}, "SCORES_SHAPE"),
        ],
    )
    def test_a_malformed_draw_is_a_fault(self, change: dict[str, Any], code: str) -> None:
        right = scores_of(PLAN, [10**6])
        assert right.sampling is not None
        wrong = right.model_copy(update={"sampling": right.sampling.model_copy(update=change)})
        with pytest.raises(FaultError) as caught:
            check_scores(wrong, CONTRACT)
        assert caught.value.code == code

    def test_a_table_without_draws_is_none_of_such_a_round(self) -> None:
        wrong = scores_of(PLAN, [10**6]).model_copy(update={"sampling": None})
        with pytest.raises(FaultError) as caught:
            check_scores(wrong, CONTRACT)
        assert caught.value.code == "SCORES_SAMPLING"
        exact = a_contract()
        few = RoundScores(round=1, players=tuple(exact.by_id()), losses=((1,),) * 8, correct=(0, 0))
        drawn = few.model_copy(update={"sampling": scores_of(PLAN, [1]).sampling, "first_order": (1, 2, 3)})
        with pytest.raises(FaultError) as caught:
            check_scores(drawn, exact)
        assert caught.value.code == "SCORES_SAMPLING"


class TestContract:
    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"most": None}, "CONTRACT_ESTIMATOR"),
            ({"estimator": "exact", "count": 4}, "CONTRACT_ESTIMATOR"),
            ({"most": 40}, "CONTRACT_COALITIONS"),
            ({"count": 101}, "CONTRACT_TOO_MANY_PLAYERS"),
            ({"estimator": "exact", "most": None}, "CONTRACT_TOO_MANY_PLAYERS"),
        ],
    )
    def test_terms_that_cannot_be_kept_are_refused(self, changes: dict[str, Any], code: str) -> None:
        with pytest.raises(InputError) as caught:
            a_sampled_contract(**changes)
        assert caught.value.code == code
        assert caught.value.field in ("contribution.estimator", "contribution.max_coalitions")

    def test_its_text_says_when_groups_are_drawn(self) -> None:
        text = " ".join(render(CONTRACT).split())
        assert "all groups are scored if at most 12 were admitted and there are no more than 2000." in text
        assert "drawn by the admitted updates' digests" in text
        assert "all groups are scored if" not in render(a_contract())


def test_a_run_of_fourteen_is_scored_settled_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax on the digits, no more than 300 coalitions a round: eight pairs take 210. One is away in round 2."""
    changes: dict[str, Any] = {
        "training__rounds": 2,
        "participation__head_threshold": 2,
        "contribution__estimator": "sampled",
        "contribution__max_coalitions": 300,
        "settlement__contribution_weight": Decimal("0.5"),
        "settlement__data_weight": Decimal("0.3"),
        "settlement__equal_weight": Decimal("0.2"),
    }
    run = open_run(tmp_path, counts=[60] * PLAYERS, **changes)
    assert run.federation.run() == "completed"
    contract = run.federation.contract
    with run.federation.database.read() as connection:
        rounds = [scores for _, scores in scoring.all_scores(connection, contract.id)]
    for scores in rounds:
        assert scores.sampling is not None
        assert len(scores.losses) == len(masks(scores)) <= 300
    assert abs(sum(period_values(rounds, contract).values()) - total_value(rounds, contract)) == 0
    folder = run.home / "arrays" / contract.id
    for scores in rounds:
        carried = np.fromfile(scoring.values_path(folder, scores.round), "<f8").reshape(PLAYERS, -1)
        due = [float(v) / 1e9 for v in period_values([scores.model_copy(update={"round": 1})], contract).values()]
        np.testing.assert_allclose(carried.mean(axis=1), due, atol=1e-9)
    run.settle()
    report = run.verified()
    assert report.faults == ()


def test_nothing_is_drawn_where_few_are_admitted() -> None:
    assert estimator_plan(CONTRACT, 5, bytes(32)).estimator == "exact"
    softmax = a_sampled_contract(model={"kind": "softmax", "hidden": [], "initial_digest": "0" * 64}, most=2**14)
    assert estimator_plan(softmax, PLAYERS, bytes(32)).estimator == "exact"
    assert next_draws(CONTRACT, PLAN, estimate(PLAN, [0] * len(coalitions(PLAN))), [0] * PLAYERS, [1] * PLAYERS) is None


def test_first_order_values_are_one_for_each_player() -> None:
    for wrong in ((1,), None):
        with pytest.raises(FaultError) as caught:
            check_scores(scores_of(PLAN, [10**6]).model_copy(update={"first_order": wrong}), CONTRACT)
        assert caught.value.code == "SCORES_FIRST_ORDER"


def test_a_round_is_cross_checked_with_first_order_values() -> None:
    right = scores_of(PLAN, [10**6])
    assert agrees_with_first_order(right, CONTRACT) is True
    assert right.first_order is not None
    against = right.model_copy(update={"first_order": right.first_order[::-1]})
    assert agrees_with_first_order(against, CONTRACT) is False
    found = first_order_values([right], CONTRACT)
    assert found is not None
    assert [found[p] for p in right.players] == list(right.first_order)
