"""The re-normalised game: means, medians and Krum of every coalition, by hand and by brute force, and whole runs."""

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from tests.support.auditor_kit import AUDITOR, CLAUSE, OPENING_KEY, SIGNING_KEY
from tests.support.central import CENTRAL
from tests.support.closed_run import EVERYBODY_IS_PAID, ClosedRun, closed_run, open_run
from tests.support.contract_kit import change, party, plain_contract
from tests.support.federation import contract_values, digits
from tests.support.noise import FixedNoise
from tests.support.settlement_kit import a_contract
from tests.support.task_kit import TASKS

from fedpact_client import simulation
from fedpact_client.quote import Share, Simulated, plausible_share
from fedpact_contract.contract import Contract, Krum, ServerOptimizer, Training, ValidationSlice, estimator_plan
from fedpact_contract.contribution import (
    check_draws,
    check_scores,
    leave_one_out,
    masks,
    monte_carlo,
    period_values,
    round_values,
    total_value,
)
from fedpact_contract.errors import FailedError, FaultError, InputError
from fedpact_contract.evidence import unpack
from fedpact_contract.keys import generate_key
from fedpact_contract.log import RoundScores, ScoresOpened
from fedpact_contract.looks import OF_UPDATES
from fedpact_contract.sampling import round_seed
from fedpact_contract.scorecard import game_table
from fedpact_contract.shapley import shapley
from fedpact_contract.text import render
from fedpact_contract.trust import Trust
from fedpact_contract.verify import verify
from fedpact_models import aggregation
from fedpact_models.evaluate import evaluate, evaluate_coalitions
from fedpact_models.features import Examples
from fedpact_models.renormalised import Aggregator, evaluate_models
from fedpact_server import bundle, diagnostic, scoring, watch
from fedpact_server.evidence import evidence_parts
from fedpact_server.reevaluate import reevaluate
from fedpact_server.run_state import admitted_updates, load_model

RATE = Fraction(7, 10)
RULES: list[tuple[str, Krum | None]] = [
    ("weighted-mean", None),
    ("median", None),
    ("krum", Krum(tolerated=1, kept=1)),
    ("krum", Krum(tolerated=1, kept=3)),
    ("krum", Krum(tolerated=2, kept=2)),
]
COUNTS = [30, 50, 20, 90, 70, 10, 40]
KRUM = {"tolerated": 1, "kept": 2}
DEFENCES = {"clip": "median-signal", "wreckers": "report", "negatives": "0.5", "dispute_hours": 24}


def training(rule: str, krum: Krum | None = None) -> Training:
    values = {"rounds": 1, "local_steps": 1, "learning_rate": 1, "server_rate": "0.7", "aggregation": rule}
    return Training.parse(values | ({} if krum is None else {"krum": krum.plain()}), code="TRAINING")


def models(rule: Training, updates: np.ndarray, base: np.ndarray, wanted: Sequence[int], **held: int) -> np.ndarray:
    """All models, copied out of what is overwritten."""
    made = Aggregator(rule, COUNTS[: len(updates)], updates, **held).models(base, wanted)
    return np.array([model.copy() for model in made])


def by_hand(rule: str, krum: Krum | None, updates: np.ndarray, members: list[int]) -> list[Fraction]:
    """A of these updates alone, in exact arithmetic."""
    rows = {i: [Fraction(float(v)) for v in updates[i]] for i in members}
    if rule == "median":
        return [median(column) for column in zip(*rows.values(), strict=True)]
    weights = {i: COUNTS[i] if rule == "weighted-mean" else 1 for i in members}
    if krum is not None and 2 * krum.tolerated + 2 < len(members):
        apart = {(i, j): sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for i in rows for j in rows}
        nearest = len(members) - krum.tolerated - 2
        score = {i: sum(sorted(apart[i, j] for j in members if j != i)[:nearest]) for i in members}
        kept = sorted(members, key=lambda i: (score[i], i))[: min(krum.kept, len(members) - krum.tolerated)]
        rows = {i: rows[i] for i in kept}
    total = sum(weights[i] for i in rows)
    return [sum(weights[i] * row[k] for i, row in rows.items()) / total for k in range(updates.shape[1])]


@pytest.fixture(scope="module")
def setting() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=(7, 12)).astype(np.float32), rng.normal(size=12)


@pytest.mark.parametrize(("rule", "krum"), RULES)
def test_each_coalitions_model_is_what_the_rule_makes_of_its_updates_alone(setting, rule, krum) -> None:
    updates, base = setting
    found = models(training(rule, krum), updates, base, range(2**7))
    np.testing.assert_array_equal(found[0], base)
    for mask in range(1, 2**7):
        members = [i for i in range(7) if mask >> i & 1]
        due = by_hand(rule, krum, updates, members)
        expected = [float(Fraction(float(b)) + RATE * a) for b, a in zip(base, due, strict=True)]
        np.testing.assert_allclose(found[mask], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("rule", "krum"), RULES)
def test_blocks_and_the_order_of_players_move_no_bit(setting, monkeypatch, rule, krum) -> None:
    updates, base = setting
    wanted = list(range(2**7))
    found = models(training(rule, krum), updates, base, wanted)
    monkeypatch.setattr("fedpact_models.renormalised.MODEL_ELEMENTS", 30)
    monkeypatch.setattr("fedpact_models.renormalised.WORK_ELEMENTS", 5)
    assert models(training(rule, krum), updates, base, wanted, held=17).tobytes() == found.tobytes()
    order = [4, 0, 6, 2, 5, 1, 3]
    renamed = [sum(1 << order.index(i) for i in range(7) if mask >> i & 1) for mask in wanted]
    counts = [COUNTS[i] for i in order]
    made = Aggregator(training(rule, krum), counts, updates[order]).models(base, renamed)
    assert np.array([model.copy() for model in made]).tobytes() == found.tobytes()


def test_a_mean_of_numbers_of_every_size_does_not_depend_on_their_order() -> None:
    rng = np.random.default_rng(5)
    updates = (rng.normal(size=(6, 50)) * 10.0 ** rng.integers(-9, 9, (6, 50))).astype(np.float32)
    for order in list(permutations(range(6)))[::37]:
        rows = Aggregator(training("weighted-mean"), [COUNTS[i] for i in order], updates[list(order)])
        (found,) = (model.copy() for model in rows.models(np.zeros(50), [63]))
        (due,) = models(training("weighted-mean"), updates, np.zeros(50), [63])
        assert found.tobytes() == due.tobytes()


@pytest.mark.parametrize(("rule", "krum"), RULES)
def test_updates_are_read_once_where_all_of_them_can_be_held(setting, rule, krum) -> None:
    updates, base = setting
    read = []

    class Disk:
        """Rows that tell when they are read."""

        def __len__(self) -> int:
            return len(updates)

        def __getitem__(self, player: int) -> np.ndarray:
            read.append(player)
            return updates[player]

    list(Aggregator(training(rule, krum), COUNTS, Disk(), held=7 * 12).models(base, range(2**7)))
    assert sorted(read) == sorted([*range(7), *([] if krum is None else [0])]), "Krum asks for the length of one"


def test_krum_leaves_out_who_is_far_and_the_median_hardly_moves() -> None:
    """Five alike and one a thousand away, however many examples it claims; the mean goes with it."""
    updates = np.array([[1.0, 1.0], [1.1, 0.9], [0.9, 1.1], [1.0, 1.1], [1.1, 1.0], [1000.0, -1000.0]], np.float32)
    full, base = [63], np.zeros(2)
    for rule, krum in RULES[1:4]:
        assert np.abs(models(training(rule, krum), updates, base, full) / 0.7 - 1).max() < 0.11
    assert np.abs(models(training("weighted-mean"), updates, base, full) / 0.7 - 1).max() > 30


class TestEvaluation:
    """Losses of whole models, by the path of a round's coalitions."""

    @pytest.fixture
    def world(self) -> tuple[Contract, np.ndarray, np.ndarray, Examples]:
        rng = np.random.default_rng(1)
        base, updates = rng.normal(size=650) * 0.1, rng.normal(size=(4, 650)).astype(np.float32) * 0.1
        return digits_contract(), base, updates, validation_set()

    @pytest.mark.parametrize(("rule", "krum"), RULES)
    def test_a_coalitions_loss_is_that_of_its_model_on_its_own(self, world, rule, krum) -> None:
        contract, base, updates, rows = world
        rule_ = training(rule, krum)
        wanted = [5, 0, 15, 3, 8]
        game = Aggregator(rule_, COUNTS[:4], updates)
        found = evaluate_models(contract.model, contract.data, base, game, rows, [200, 20], wanted)
        for place, weights in enumerate(models(rule_, updates, base, wanted)):
            mean, right = evaluate(contract.model, contract.data, weights, rows)
            assert sum(found.losses[place]) == pytest.approx(mean * 220e9, abs=2)
            if wanted[place] in (0, 15):
                assert found.correct[wanted[place]] == right
        assert set(found.correct) == {0, 15}
        np.testing.assert_allclose(found.by_example.sum(axis=1) * 1e9, [sum(r) for r in found.losses], atol=2)

    def test_one_member_of_the_mean_is_one_step_of_the_fixed_weight_game(self, world) -> None:
        contract, base, updates, rows = world
        game = Aggregator(training("weighted-mean"), COUNTS[:4], updates)
        alone = [1, 2, 4, 8]
        found = evaluate_models(contract.model, contract.data, base, game, rows, [220], alone)
        steps = updates.astype(np.float64) * 0.7
        fixed = evaluate_coalitions(contract.model, contract.data, base, steps, rows, [220], alone)
        assert [abs(a[0] - b[0]) <= 1 for a, b in zip(found.losses, fixed.losses, strict=True)] == [True] * 4


def digits_contract(count: int = 4, **changes: Any) -> Contract:
    """The federation's contract, without one."""
    rows = validation_set()
    salts = [i.to_bytes(32, "big") for i in range(len(rows))]
    keys = [generate_key() for _ in range(count)]
    options = {
        "participation__minimum": 2,
        "contribution__game": "re-normalised",
        "training__server_rate": Decimal("0.7"),
    }
    return Contract.parse(
        contract_values(generate_key(), keys, [60] * count, rows, salts, "0" * 64, **(options | changes))
    )


@lru_cache
def validation_set() -> Examples:
    return digits([10])[1]


def scored(contract: Contract, updates: dict[str, np.ndarray]) -> RoundScores:
    digests = {p: f"{i:064x}" for i, p in enumerate(sorted(updates))}
    steps, _ = aggregation.server_steps(contract, updates, aggregation.START)
    scores, values = scoring.score_round(contract, 1, digests, np.zeros(650), steps, validation_set(), None)
    due = round_values(scores, contract)
    np.testing.assert_allclose(values.mean(axis=1) * 1e9, [float(due[p]) for p in scores.players], atol=1.0)
    return scores


class TestByHand:
    """Three participants whose values follow from two losses."""

    @pytest.fixture
    def contract(self) -> Contract:
        return digits_contract(3, training__aggregation="median")

    def test_median_of_two_alike_and_one_that_sends_zeros(self, contract: Contract) -> None:
        """v is a where both or one alike are in the majority, b (half the step) where one meets the zeros.

        phi of the zeros is (b - a) / 3, not 0; of each of the others (4 a - b) / 6.
        """
        ids = list(contract.by_id())
        step = np.random.default_rng(2).normal(size=650).astype(np.float32) * 0.01
        scores = scored(contract, dict(zip(ids, (step, step, np.zeros_like(step)), strict=True)))
        fall = {mask: sum(scores.losses[0]) - sum(scores.losses[mask]) for mask in range(8)}
        a, b = fall[1], fall[5]
        assert [fall[m] for m in (0, 1, 2, 3, 4, 5, 6, 7)] == [0, a, a, a, 0, b, b, a]
        assert a not in (0, b)
        values = round_values(scores, contract)
        count = len(validation_set())
        assert values[ids[2]] == Fraction(b - a, 3 * count)
        assert values[ids[0]] == values[ids[1]] == Fraction(4 * a - b, 6 * count)

    def test_gloves(self, contract: Contract) -> None:
        """Median of three: one who sends the opposite is outvoted only where both others are there.

        x, x, -x: v = a of (1), (2), (12), (123), c of (3), 0 of (13) and (23), whose medians are 0.
        """
        ids = list(contract.by_id())
        step = np.random.default_rng(2).normal(size=650).astype(np.float32) * 0.01
        scores = scored(contract, dict(zip(ids, (step, step, -step), strict=True)))
        fall = [sum(scores.losses[0]) - sum(row) for row in scores.losses]
        a, c = fall[1], fall[4]
        assert fall == [0, a, a, a, c, 0, 0, a]
        values = round_values(scores, contract)
        count = len(validation_set())
        assert values[ids[2]] * count == Fraction(c, 3) - Fraction(a, 3)
        assert values[ids[0]] * count == Fraction(2 * a, 3) - Fraction(c, 6)


def test_a_rounds_values_are_those_of_the_mean_by_brute_force() -> None:
    """Against a game that adds nothing up: every coalition's model, by numpy, evaluated by the formula."""
    contract, validation = digits_contract(5), validation_set()
    rng = np.random.default_rng(8)
    ids = list(contract.by_id())
    updates = {p: rng.normal(size=650).astype(np.float32) * 0.05 for p in ids}
    scores = scored(contract, updates)
    table = []
    for mask in range(32):
        members = [updates[p].astype(float) for i, p in enumerate(ids) if mask >> i & 1]
        theta = 0.7 * np.mean(members, axis=0) if members else np.zeros(650)
        logits = validation.x @ theta.reshape(10, 65).T
        table.append(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(220), validation.y]))
    expected = shapley([Fraction(round((table[0] - loss) * 1e12), 1000) for loss in table])
    values = round_values(scores, contract)
    for value, due in zip(values.values(), expected, strict=True):
        assert abs(value - due) < 2
    assert sum(values.values()) == Fraction(sum(scores.losses[0]) - sum(scores.losses[-1]), 220)


@pytest.mark.parametrize("rule", ["weighted-mean", "median", "krum"])
def test_a_simulated_run_is_of_the_contracts_rule_and_its_values_sum_to_the_fall(rule: str) -> None:
    krum = {"training__krum": KRUM} if rule == "krum" else {}
    contract = digits_contract(5, training__aggregation=rule, participation__minimum=5, training__rounds=2, **krum)
    mine = next(iter(contract.by_id()))
    draw = simulation.simulated_run(
        contract, mine, 0.0, noise=FixedNoise(1), rng=np.random.default_rng(1), in_time=lambda: True
    )
    assert draw is not None
    assert abs(sum(draw.values.values()) - draw.total) < 200, "efficient, but for rounding"
    rng = np.random.default_rng(4)
    updates = {p: rng.normal(size=650).astype(np.float32) for p in contract.by_id()}
    *_, last = simulation._arrivals(contract, np.ones(650), updates)(range(5))
    steps, _ = aggregation.server_steps(contract, updates, aggregation.START)
    assert last.tobytes() == aggregation.next_model(contract, np.ones(650), steps).tobytes()


def test_a_quote_names_the_game() -> None:
    draws = {part: [Share(share=Fraction(1, 4), fen=None, reason="reliable")] * 3 for part in (0.0, 0.5)}
    for game, told in (("re-normalised", True), ("fixed-weight", False)):
        contract = digits_contract(contribution__game=game)
        me = contract.participant(next(iter(contract.by_id())))
        found = plausible_share(contract, me, Simulated(by_label_noise=draws), None)
        assert any('game "re-normalised"' in text for text in found["reasons"]) == told
        assert ("sixteen orders of arrival" in found["simulated"]["model"]) == told
    assert 2 * simulation.RENORMALISED_PAIRS == 16


def test_a_participant_is_scored_on_the_rows_that_others_gave() -> None:
    contract, rng = digits_contract(3, training__aggregation="median"), np.random.default_rng(6)
    ids = list(contract.by_id())
    slices = tuple(ValidationSlice(source=source, count=n) for source, n in (("operator", 150), (ids[1], 70)))
    terms = contract.contribution.validation.model_copy(update={"slices": slices})
    contribution = contract.contribution.model_copy(update={"validation": terms})
    contract = contract.model_copy(update={"contribution": contribution})
    scores = scored(contract, {p: rng.normal(size=650).astype(np.float32) * 0.05 for p in ids})
    values = round_values(scores, contract)
    for own, player in ((0, ids[0]), (1, ids[1])):
        kept, rows = (slice(None), 220) if own == 0 else (slice(1), 150)
        table = [sum(scores.losses[0][kept]) - sum(row[kept]) for row in scores.losses]
        assert values[player] == shapley(table)[ids.index(player)] / rows


def test_a_union_counts_once_and_a_clipped_update_counts_clipped() -> None:
    """Two copies of one update, as one union: the mean has it once, and each gets half its value."""
    contract = digits_contract(4, defences=DEFENCES)
    ids = list(contract.by_id())
    rng = np.random.default_rng(9)
    updates = {p: rng.normal(size=650).astype(np.float32) * 0.05 for p in ids}
    updates[ids[1]] = updates[ids[0]]
    updates[ids[3]] *= 100
    unions = ((ids[0], ids[1]),)
    factors = [float(clip.factor) for clip in aggregation.clips(contract, updates) or ()]
    assert factors[:3] == [1.0] * 3
    assert factors[3] < 0.5
    steps, _ = aggregation.server_steps(contract, updates, aggregation.START, unions)
    due = 0.7 * sum(updates[ids[i]].astype(float) * f for i, f in ((0, 1), (2, 1), (3, factors[3]))) / 3
    np.testing.assert_allclose(aggregation.next_model(contract, np.zeros(650), steps, unions), due, atol=1e-12)
    digests = {p: f"{i:064x}" for i, p in enumerate(ids)}
    scores, values = scoring.score_round(contract, 1, digests, np.zeros(650), steps, validation_set(), None, unions)
    found = round_values(scores, contract)
    assert scores.unions == unions
    assert found[ids[0]] == found[ids[1]]
    assert sum(found.values()) == Fraction(sum(scores.losses[0]) - sum(scores.losses[-1]), 220)
    np.testing.assert_allclose(values.mean(axis=1) * 1e9, [float(found[p]) for p in ids], atol=1.0)


def test_no_model_comes_of_no_update() -> None:
    contract = digits_contract()
    steps, _ = aggregation.server_steps(contract, {}, aggregation.START)
    with pytest.raises(FailedError) as caught:
        aggregation.next_model(contract, np.zeros(650), steps)
    assert caught.value.code == "AGGREGATION_EMPTY"


class TestContract:
    @pytest.mark.parametrize(
        ("changes", "code", "field"),
        [
            ({"training.aggregation": "median"}, "CONTRACT_AGGREGATION_GAME", "contribution.game"),
            (
                {"training.aggregation": "krum", "training.krum": KRUM},
                "CONTRACT_AGGREGATION_GAME",
                "contribution.game",
            ),
            (
                {
                    "contribution.game": "re-normalised",
                    "training.server_optimizer": {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.001"},
                },
                "CONTRACT_OPTIMIZER_GAME",
                "training.server_optimizer",
            ),
            ({"training.krum": KRUM}, "CONTRACT_KRUM", "training.krum"),
            ({"contribution.game": "re-normalised", "training.aggregation": "krum"}, "CONTRACT_KRUM", "training.krum"),
            (
                {
                    "contribution.game": "re-normalised",
                    "training.aggregation": "krum",
                    "training.krum": {"tolerated": 1, "kept": 1},
                    "participation.minimum": 4,
                },
                "CONTRACT_KRUM",
                "training.krum.tolerated",
            ),
            (
                {
                    "contribution.game": "re-normalised",
                    "training.aggregation": "krum",
                    "training.krum": {"tolerated": 1, "kept": 5},
                    "participation.minimum": 5,
                },
                "CONTRACT_KRUM",
                "training.krum.kept",
            ),
            ({"training.krum": {"tolerated": 0, "kept": 1}}, "CONTRACT", "training.krum.tolerated"),
        ],
    )
    def test_terms_that_do_not_go_together_are_refused(self, changes: dict[str, Any], code: str, field: str) -> None:
        plain = change(a_contract([100] * 6).plain(), changes, ".")
        with pytest.raises(InputError) as caught:
            Contract.parse(plain)
        assert (caught.value.code, caught.value.field) == (code, field)
        assert code == "CONTRACT" or caught.value.remedy

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"defences.wreckers": "reject"}, "defences.wreckers"),
            ({"training.aggregation": "median"}, "training.aggregation"),
            (
                {"contribution.estimator": "sampled", "contribution.max_coalitions": 4096},
                "contribution.estimator",
            ),
        ],
    )
    def test_defences_that_are_none_in_this_game_are_refused(self, changes: dict[str, Any], field: str) -> None:
        contract = robust_contract("weighted-mean", 6, defences=DEFENCES)
        text = " ".join(render(contract).split())
        assert "detectors look at all admitted updates. What" in text
        with pytest.raises(InputError) as caught:
            Contract.parse(change(contract.plain(), changes, "."))
        assert (caught.value.code, caught.value.field) == ("CONTRACT_DEFENCES_GAME", field)

    @pytest.mark.parametrize("rule", ["median", "krum"])
    def test_at_client_level_there_is_no_such_rule_and_no_such_game(self, rule: str) -> None:
        people = [party(f"company {i}", f"{i:018d}", f"{i + 1:064x}", f"set-{i}", 100) for i in range(6)]
        for more in ({"training__aggregation": rule}, {"contribution__game": "re-normalised"}):
            with pytest.raises(InputError) as caught:
                Contract.parse(plain_contract(people, "f" * 64, **(CENTRAL | more)))
            assert caught.value.code == "CONTRACT_TRUST_MODEL"

    def test_krum_may_tolerate_what_the_minimum_allows(self) -> None:
        contract = robust_contract(
            "krum", 6, **{"participation.minimum": 5, "training.krum": {"tolerated": 1, "kept": 4}}
        )
        assert Contract.from_bytes(contract.to_bytes()) == contract

    def test_the_text_names_rule_and_game(self) -> None:
        def text(rule: str) -> str:
            return " ".join(render(robust_contract(rule, 6)).split())

        for rule in ("weighted-mean", "median", "krum"):
            assert 'of the game "re-normalised"' in text(rule)
            assert "whoever sends zeros" in text(rule)
            assert f'by the rule "{rule}"' in text(rule)
        assert "the middle one of them" in text("median")
        assert "(tolerated 1, kept 2)" in text("krum")
        assert "fewer than 5 the rule stands for the plain mean" in text("krum")
        assert "fewer than 5" not in text("median")
        assert "the rule by which changes are combined" not in render(a_contract())

    def test_a_linear_model_has_no_more_groups_scored_than_another(self) -> None:
        sampled = {"contribution.estimator": "sampled", "contribution.max_coalitions": 2**14}
        fixed = change(a_contract([100] * 12).plain(), sampled, ".")
        assert estimator_plan(Contract.parse(fixed), 12, bytes(32)).estimator == "exact"
        contract = robust_contract("median", 12, **sampled)
        assert estimator_plan(contract, 13, bytes(32)).estimator == "stratified"
        assert estimator_plan(Contract.parse(fixed), 13, bytes(32)).estimator == "exact"
        assert "if at most 12 were admitted" in " ".join(render(contract).split())


def robust_contract(rule: str, count: int, **changes: Any) -> Contract:
    plain = a_contract([100] * count).plain()
    options = {
        "contribution.game": "re-normalised",
        "training.aggregation": rule,
        "participation.minimum": min(count, 5),
    }
    if rule == "krum":
        options["training.krum"] = KRUM
    return Contract.parse(change(plain, options | changes, "."))


# Whole runs


def rounds_of(run: ClosedRun) -> list[RoundScores]:
    with run.federation.database.read() as connection:
        return [scores for _, scores in scoring.all_scores(connection, run.contract_id)]


def a_run(folder: Path, rule: str, counts: Sequence[int] = (40, 50, 60, 70, 80), **changes: Any) -> ClosedRun:
    options: dict[str, Any] = {
        "training__rounds": 2,
        "training__aggregation": rule,
        "training__server_rate": Decimal("0.9"),
        "participation__minimum": 5,
        "contribution__game": "re-normalised",
        "auditor": CLAUSE,
    }
    if rule == "krum":
        options["training__krum"] = KRUM
    run = open_run(folder, counts=list(counts), **(EVERYBODY_IS_PAID | options | changes))
    assert run.federation.run(accept_test_noise=False) == "completed"
    return run


@pytest.mark.parametrize("rule", ["weighted-mean", "median", "krum"])
def test_a_run_is_scored_settled_verified_and_evaluated_again(tmp_path: Path, rule: str) -> None:
    run = a_run(tmp_path, rule)
    contract, rounds = run.federation.contract, rounds_of(run)
    assert len(rounds) == 2
    led_to = [e.body["model_digest"] for e in run.federation.entries() if e.type == "round-aggregated"]
    for scores, digest in zip(rounds, led_to, strict=True):
        assert scores.sampling is None
        assert len(scores.losses) == 2**5
        model, rows = load_model(run.home, digest), run.federation.validation
        alone = evaluate_coalitions(contract.model, contract.data, model, np.empty((0, 0)), rows, [len(rows)], [0])
        assert alone.losses[0] == scores.losses[-1], "the grand coalition is the model that was delivered"
        assert alone.correct[0] == scores.correct[1]
    assert rounds[1].losses[0] == rounds[0].losses[-1]
    assert sum(period_values(rounds, contract).values()) == total_value(rounds, contract) != 0
    assert leave_one_out(rounds, contract) is not None
    assert len(game_table(rounds[0])["values"]) == 32
    run.settle()
    assert run.verified().faults == ()
    with run.federation.database.read() as connection:
        said = {line.code for line in watch.look(connection, contract, run.home, run.federation.validation)}
    assert said == set(OF_UPDATES), "values are no alarm in this game"

    def one_more(bodies: list[Any]) -> list[Any]:
        return [with_one_more(body) if isinstance(body, ScoresOpened) else body for body in bodies]

    changed = {name: text.encode() for name, text in run.rewritten(one_more).items()}
    assert "SCORES_COMMITMENT" in {f["code"] for f in verify(unpack(changed), Trust.of(contract), privacy=False).faults}
    record = again(run, tmp_path / "handed")
    assert (record.differing, record.largest, record.coalitions, record.evaluated) == (0, 0, "all", 64)
    assert again(run, tmp_path / "handed", sample=6, seed="5e" * 32).differing == 0


def test_what_has_no_such_diagnostic_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = closed_run(tmp_path)
    contract, rows = run.federation.contract, run.federation.validation
    optimizer = ServerOptimizer(kind="adagrad", beta_1=Decimal(0), beta_2=Decimal(0), tau=Decimal("0.01"))
    stepping = contract.model_copy(
        update={"training": contract.training.model_copy(update={"server_optimizer": optimizer})}
    )
    with run.federation.database.read() as connection:
        found = diagnostic.renormalised(connection, contract, run.home, rows)
        assert set(found) == set(contract.by_id())
        for other, why in ((digits_contract(), "already"), (stepping, "optimizer")):
            with pytest.raises(InputError, match=why) as caught:
                diagnostic.renormalised(connection, other, run.home, rows)
            assert caught.value.code == "DIAGNOSTIC_GAME"
        monkeypatch.setattr(diagnostic, "MAX_PLAYERS", 3)
        with pytest.raises(InputError) as caught:
            diagnostic.renormalised(connection, contract, run.home, rows)
        assert caught.value.code == "DIAGNOSTIC_PLAYERS"


def with_one_more(body: ScoresOpened) -> ScoresOpened:
    """Another loss of one coalition, as the operator would open it."""
    losses = [list(row) for row in body.scores.losses]
    losses[3][0] += 1000
    return body.model_copy(update={"scores": body.scores.model_copy(update={"losses": tuple(map(tuple, losses))})})


def again(run: ClosedRun, folder: Path, **options: Any) -> Any:
    with run.federation.database.read() as connection:
        parts = evidence_parts(connection, run.contract_id)
    if not folder.exists():
        bundle.write(folder, run.home, run.federation.contract, *parts)
    return reevaluate(folder, AUDITOR, (SIGNING_KEY, OPENING_KEY), **options)[1]


@pytest.mark.parametrize("task", ["regression", "survival"])
def test_it_is_played_over_every_task(tmp_path: Path, task: str) -> None:
    federation = TASKS[task].federation(
        tmp_path, contribution__game="re-normalised", training__aggregation="median", training__rounds=2
    )
    assert federation.run() == "completed"
    with federation.database.read() as connection:
        rounds = [scores for _, scores in scoring.all_scores(connection, federation.contract.id)]
    assert rounds[1].losses[0] == rounds[0].losses[-1]
    assert sum(period_values(rounds, federation.contract).values()) == total_value(rounds, federation.contract) != 0
    assert (rounds[0].correct is None) == (task == "regression")


def test_the_auditor_finds_a_loss_and_a_model_of_another_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the mean in round 2 where the contract says median, and states another loss in round 1."""
    true_model, true_scores = aggregation.next_model, scoring.score_round
    made = []

    def mean_instead(contract: Contract, base: Any, steps: Any, unions: Any = ()) -> Any:
        made.append(base)
        if len(made) < 2:
            return true_model(contract, base, steps)
        rule = contract.training.model_copy(update={"aggregation": "weighted-mean"})
        return true_model(contract.model_copy(update={"training": rule}), base, steps)

    def lying(*arguments: Any) -> Any:
        scores, values = true_scores(*arguments)
        losses = [list(row) for row in scores.losses]
        if scores.round == 1:
            losses[5][0] += 1000
        return scores.model_copy(update={"losses": tuple(map(tuple, losses))}), values

    with monkeypatch.context() as patch:
        patch.setattr(aggregation, "next_model", mean_instead)
        patch.setattr(scoring, "score_round", lying)
        run = a_run(tmp_path, "median")
    run.settle()
    found = [(d.what, d.round) for d in again(run, tmp_path / "handed").differences]
    assert ("loss", 1) in found
    assert ("model", 2) in found
    assert ("model", 1) not in found


def test_a_run_of_fourteen_is_drawn_by_size(tmp_path: Path) -> None:
    """N = 14 and at most 300 coalitions: 210 to begin with, in complementary pairs."""
    changes = {"contribution__estimator": "sampled", "contribution__max_coalitions": 300}
    run = a_run(tmp_path, "median", [40] * 14, **changes)
    contract, rounds = run.federation.contract, rounds_of(run)
    for scores in rounds:
        assert scores.sampling is not None
        assert scores.sampling.estimator == "stratified"
        named = masks(scores)
        assert 210 <= len(named) == len(scores.losses) <= 300
        assert {(2**14 - 1) ^ mask for mask in named} == set(named)
    assert sum(period_values(rounds, contract).values()) == total_value(rounds, contract)
    halves = monte_carlo(rounds, contract)
    assert halves is not None
    assert min(halves.values()) > 0
    folder = run.home / "arrays" / contract.id
    for scores in rounds:
        due = [float(v) / 1e9 for v in period_values([scores.model_copy(update={"round": 1})], contract).values()]
        np.testing.assert_allclose(scoring.read_values(folder, contract, scores).mean(axis=1), due, atol=1e-9)
    run.settle()
    assert run.verified().faults == ()
    assert again(run, tmp_path / "handed").differing == 0
    _altered_draws(contract, rounds[0], run)


def _altered_draws(contract: Contract, scores: RoundScores, run: ClosedRun) -> None:
    """What `verify` says where a draw is stated otherwise."""
    with run.federation.database.read() as connection:
        digests = list(admitted_updates(connection, contract.id, 1).values())
    check_draws(scores, contract, digests)
    assert scores.sampling is not None
    assert scores.sampling.seed == round_seed(1, digests).hex()
    for change_, code in (
        ({"seed": "ab" * 32}, "SCORES_SEED"),
        ({"draws": 30}, "SCORES_DRAWS"),
        ({"draws": 10**6}, "SCORES_DRAWS"),
        ({"estimator": "pairs", "draws": 8}, "SCORES_SAMPLING"),
    ):
        wrong = scores.model_copy(update={"sampling": scores.sampling.model_copy(update=change_)})
        with pytest.raises(FaultError) as caught:
            check_draws(wrong, contract, digests)
        assert caught.value.code == code
    with pytest.raises(FaultError) as caught:
        check_scores(scores.model_copy(update={"sampling": None}), contract)
    assert caught.value.code == "SCORES_SAMPLING"
