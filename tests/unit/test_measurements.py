"""What leaves once, outside the rounds: statistics and a baseline, charged, in the log, verified, in the report."""

import base64
import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.agent_world import contract as agents_contract
from tests.support.closed_run import ClosedRun, open_run
from tests.support.federation import declare_another
from tests.support.models_kit import a_model, a_schema, category, number, training_contract
from tests.support.weak_noise import Weak

from fedpact_client.answer import Desk, Trained, TrainerLostError, TrainingFailedError
from fedpact_client.closing import close
from fedpact_client.measuring import measure
from fedpact_client.views import check_own, contract_budget, seen
from fedpact_contract import report as reports
from fedpact_contract import text
from fedpact_contract.arrays import update_digest
from fedpact_contract.contract import Baseline, Contract, MeasurementKind
from fedpact_contract.errors import FaultError, FedpactError, InputError
from fedpact_contract.evidence import unpack
from fedpact_contract.ledger import GENESIS, measured, next_restored
from fedpact_contract.log import BaselinesScored, MeasurementTaken
from fedpact_contract.measured import statistics as measured_statistics
from fedpact_contract.messages import Measurement, Order
from fedpact_contract.privacy import check_plan, epsilon_pld, plan_groups, plan_words
from fedpact_contract.record import read_envelope, sign
from fedpact_contract.request import parse_instant
from fedpact_contract.statistics import can_be_noised, cell_count, results
from fedpact_contract.verify import verify
from fedpact_models.dp import SystemNoise
from fedpact_models.features import Examples, encode
from fedpact_models.statistics import noised_sums
from fedpact_models.training import local_baseline
from fedpact_server import db, measurements, noise_floor

D = Decimal
STATISTICS = {
    "noise_multiplier": 30,
    "queries": [
        {"kind": "mean", "column": "pixel_20"},
        {"kind": "histogram", "column": "digit"},
        {"kind": "quantile", "column": "pixel_20", "bins": 8, "probabilities": ["0.5"]},
        {"kind": "count", "column": "pixel_20", "at_least": 8},
        {"kind": "count", "column": "digit", "value": "7"},
    ],
}
KNOWN = ("fedpact verify EVIDENCE --trust FILE", "NIST SP 800-226", "SHA-256", "UTC", "nat", "DP", "gt", "ADMITTED")
KNOWN = (*KNOWN, "dp-accounting", "PLD", "REPLACE_SPECIAL", "epsilon_pld", "epsilon_gate", "AES-256-CTR")
"""What a page in Chinese says in Latin letters: names of things."""
HISTOGRAM = {"kind": "histogram", "column": "age", "bins": 10}
QUANTILE = {"kind": "quantile", "column": "age", "bins": 10, "probabilities": ["0.5"]}
CLAUSES = {"statistics": STATISTICS, "baseline": {"steps": 4}, "privacy__epsilon": D(3), "training__rounds": 2}


class NoNoise:
    """Draws nothing but zeros."""

    label = "test"

    def uniform(self, n: int) -> Any:
        return np.full(n, 0.5)

    def normal(self, n: int) -> Any:
        return np.zeros(n)


@pytest.fixture
def run(tmp_path: Path) -> ClosedRun:
    return open_run(tmp_path, counts=[90, 60, 70], **CLAUSES)


def trainer(run: ClosedRun, number: int) -> Callable[[Contract, MeasurementKind, bytes], Trained]:
    """What the trainer of `Enterprise number` gives."""
    agent = run.federation.agent(number)

    def give(contract: Contract, kind: MeasurementKind, base: bytes) -> Trained:
        if kind == "statistics":
            array = noised_sums(contract, agent.examples, agent.noise)
        else:
            array = local_baseline(contract, np.frombuffer(base, "<f8").copy(), agent.examples, agent.noise)
        return Trained(update=array.astype("<f4").tobytes(), noise=agent.noise.label, fingerprints=(f"{number:064x}",))

    return give


def look(run: ClosedRun, number: int, give: Any = None) -> bool:
    with run.client(number) as client:
        return measure(run.federation.agent(number).desk, client, give or trainer(run, number))


def taken(run: ClosedRun) -> list[tuple[str, str]]:
    with run.federation.database.read() as connection:
        found = measurements.taken(connection, run.contract_id)
    return [(run.federation.contract.participant(who).name, kind) for who, kind in found]


def rows(desk: Desk) -> list[Any]:
    return [r for r in desk.store.rows(desk.data_set) if r.kind is not None]


class TestWhole:
    def test_a_run_with_both_is_verified_and_reported(self, run: ClosedRun) -> None:
        federation = run.federation
        check_plan(federation.contract)
        for index in (1, 2, 3):
            assert look(run, index)
            assert look(run, index)  # nothing is left to do
        assert sorted(taken(run)) == [
            (f"Enterprise {i}", kind) for i in (1, 2, 3) for kind in ("baseline", "statistics")
        ]
        assert federation.run(accept_test_noise=False) == "completed"
        assert BaselinesScored.TYPE in federation.kinds()
        run.settle()
        for index in (1, 2, 3):
            desk = federation.agent(index).desk
            with run.client(index) as client:
                assert close(desk, client)[0] == "countersigned"
        found = run.verified()
        assert (found.exit_code, found.faults) == (0, ())
        with federation.database.read() as connection:
            from fedpact_server import logbook

            built = reports.build(logbook.read_entries(connection, run.contract_id))
        json.dumps(built)
        assert [q["kind"] for q in built["statistics"]["queries"]] == [q["kind"] for q in STATISTICS["queries"]]
        assert [p["name"] for p in built["baselines"]] == ["Enterprise 1", "Enterprise 2", "Enterprise 3"]
        assert all(0 <= float(p["metric"]) <= 1 for p in built["baselines"])
        assert not any(p["metric"].endswith("0") and "." in p["metric"] for p in built["baselines"]), "as the metric"
        assert [line["kind"] for line in built["privacy"]["measurements"]] == [
            *(q["kind"] for q in STATISTICS["queries"]),
            "baseline",
        ]
        from fedpact_server.report.html import render

        english, chinese = render(built, "en"), render(built, "zh")
        assert "Trained alone" in english
        assert (
            "what: quantile; column: pixel_20; lower bound: 0; upper bound: 16; bins: 8; probabilities: 0.5; "
            in english
        )
        assert "of the noise only, not of sampling" in english
        low, high = (built["statistics"]["queries"][1]["answers"]["together"][key][3] for key in ("low", "high"))
        assert f"<small>{low} to {high}</small>" in english
        assert f"<small>{low} 至 {high}</small>" in chinese
        for words in (
            "单独训练",
            "内容：分位数；列：pixel_20；下界：0；上界：16；分箱数：8；分位点：0.5；噪声倍数：30",
            "仅反映噪声，不含抽样误差",
        ):
            assert words in chinese
        shown = re.sub("<style>.*</style>|<[^>]*>|[0-9a-f]{64}", " ", chinese, flags=re.DOTALL)
        for known in ("Enterprise", "finance", "pixel_20", "digit-recognition", "digit", "Digits", "Operator", *KNOWN):
            shown = shown.replace(known, "")
        assert re.findall("[A-Za-z]+", shown) == []

    def test_people_are_told_all_that_epsilon_covers(self, run: ClosedRun) -> None:
        assert plan_words(run.federation.contract) == "18 steps, 5 statistics and a baseline of 4 steps"
        one = run.federation.contract.model_copy(update={"baseline": Baseline(steps=1)})
        assert plan_words(one) == "18 steps, 5 statistics and a baseline of 1 step"
        assert "the same clipping and noise, 1 step from the initial model" in text.render(one)

    def test_each_is_charged_once_before_it_leaves_and_counts_in_epsilon(self, run: ClosedRun) -> None:
        desk = run.federation.agent(1).desk
        before = desk.store.budget(desk.data_set)
        look(run, 1)
        after = desk.store.budget(desk.data_set)
        assert [(r.kind, r.state) for r in rows(desk)] == [
            (kind, state) for kind in ("statistics", "baseline") for state in ("reserved", "spent")
        ]
        assert after.charged == sum(r.rdp for r in rows(desk) if r.state == "reserved") > 0
        assert after.committed == before.committed  # it was planned when the contract was signed
        agreement = desk.store.contract(desk.contract_id)
        spent = D(contract_budget(desk.store.rows(desk.data_set), agreement)["epsilon_pld"])
        assert spent == epsilon_pld(plan_groups(desk.contract, 0), desk.contract.privacy.delta) > 0
        look(run, 1)
        assert desk.store.budget(desk.data_set) == after

    def test_rounds_do_not_mind_where_measurements_come(self, run: ClosedRun) -> None:
        desk = run.federation.agent(2).desk
        look(run, 1)
        assert run.federation.run(accept_test_noise=False) == "completed"
        assert desk.store.answers(desk.contract_id) == [1, 2]
        with run.client(2) as client, pytest.raises(FedpactError, match="RUN_ENDED"):
            measure(desk, client, trainer(run, 2))
        assert len(rows(desk)) == 2  # the attempt was made, and is charged

    def test_what_is_not_asked_is_not_released(self, tmp_path: Path) -> None:
        run = open_run(tmp_path, counts=[90, 60, 70])
        assert look(run, 1)
        assert run.wire.sent == []
        desk = run.federation.agent(1).desk
        with pytest.raises(FedpactError, match="MEASUREMENT_NOT_PLANNED"):
            desk.store.reserve(desk.contract_id, 0, "a" * 64, desk.run_key, kind="statistics")

    def test_each_query_is_charged_for_itself(self, run: ClosedRun) -> None:
        """Five Gaussian releases of standard deviation 30 at order alpha: 5 alpha / (2 30^2), rounded up."""
        look(run, 1)
        desk = run.federation.agent(1).desk
        alpha = desk.store.data_set(desk.data_set).alpha
        first = rows(desk)[0]
        assert (first.kind, first.steps, first.sample_rate, first.noise_multiplier) == ("statistics", 5, 1, 30)
        assert abs(first.rdp - 5 * alpha / (2 * 30**2)) <= D("1e-8")
        assert plan_groups(desk.contract, 0)[1] == (30, 1, 5)

    def test_after_a_restore_epsilon_counts_the_whole_plan(self, run: ClosedRun) -> None:
        desk = run.federation.agent(1).desk
        agreement = desk.store.contract(desk.contract_id)
        lost = [next_restored([], agreement.terms)]
        whole = epsilon_pld(plan_groups(desk.contract), desk.contract.privacy.delta)
        assert D(contract_budget(tuple(lost), agreement)["epsilon_pld"]) == whole


class TestFailures:
    def test_what_comes_too_early_is_tried_again(self, run: ClosedRun) -> None:
        agent = run.federation.agent(1)
        later, early = agent.desk, parse_instant("2025-01-01T00:00:00Z")
        agent.desk = dataclasses.replace(agent.desk, now=lambda: early)
        assert not look(run, 1)
        agent.desk = later
        later.store.set_state(later.contract_id, "paused")
        assert not look(run, 1)
        assert (taken(run), later.store.alarms()) == ([], [])
        later.store.set_state(later.contract_id, "running")
        assert look(run, 1)
        assert len(taken(run)) == 2

    def test_the_same_bytes_are_sent_again_where_the_answer_was_lost(self, run: ClosedRun) -> None:
        run.wire.cut_after = "POST /contracts"
        with pytest.raises(FedpactError, match="OPERATOR_AWAY"):
            look(run, 1)
        run.wire.cut_after = ""
        assert look(run, 1)
        posts = [r.content for r in run.wire.sent if r.method == "POST" and "measurements" in r.url.path]
        assert len(posts) == 2  # the statistics, which had arrived, and the baseline
        assert len(rows(run.federation.agent(1).desk)) == 4

    def test_an_attempt_that_a_crash_lost_stays_charged_and_is_not_made_again(self, run: ClosedRun) -> None:
        desk = run.federation.agent(1).desk

        def lost(*_: Any) -> Trained:
            raise TrainerLostError("TRAINER_LOST", "killed")

        assert look(run, 1, lost)
        assert look(run, 1)
        assert [(r.kind, r.state) for r in rows(desk)] == [("statistics", "reserved"), ("baseline", "reserved")]
        assert taken(run) == []
        assert "MEASUREMENT_DONE" in {a.code for a in desk.store.alarms()}
        assert run.federation.run(accept_test_noise=False) == "completed"  # the rounds are not affected

    def test_data_that_does_not_allow_it_is_charged_and_refused(self, run: ClosedRun) -> None:
        desk = run.federation.agent(1).desk

        def fails(*_: Any) -> Trained:
            raise TrainingFailedError("DATA_TOO_FEW_ROWS", "too few")

        assert look(run, 1, fails)
        assert look(run, 1)
        assert [r.state for r in rows(desk)] == ["reserved", "failed", "reserved", "failed"]
        assert taken(run) == []
        assert "DATA_TOO_FEW_ROWS" in {a.code for a in desk.store.alarms()}

    def test_rows_known_as_another_data_set_are_charged_and_not_released(self, run: ClosedRun) -> None:
        agent, give = run.federation.agent(1), trainer(run, 1)
        declare_another(agent, "2" * 64)
        assert look(run, 1, lambda *asked: dataclasses.replace(give(*asked), fingerprints=("1" * 64, "2" * 64)))
        assert [r.state for r in rows(agent.desk)] == ["reserved", "failed", "reserved", "failed"]
        assert taken(run) == []
        assert "DATA_SET_KNOWN_ELSEWHERE" in {a.code for a in agent.desk.store.alarms()}

    def test_the_policy_is_asked_first(self, run: ClosedRun) -> None:
        agent = run.federation.agent(1)
        agent.desk = dataclasses.replace(agent.desk, policy=agent.desk.policy.model_copy(update={"purposes": ()}))
        assert look(run, 1)
        assert (rows(agent.desk), taken(run)) == ([], [])
        assert "POLICY_PURPOSE_MISMATCH" in {a.code for a in agent.desk.store.alarms()}

    def test_an_entity_that_agent_toml_no_longer_declares_as_the_card_does_stops_it(self, run: ClosedRun) -> None:
        agent = run.federation.agent(1)
        agent.desk = dataclasses.replace(agent.desk, entity="writer")
        assert look(run, 1)
        assert (rows(agent.desk), taken(run)) == ([], [])
        assert "CARD_ENTITY_CHANGED" in {a.code for a in agent.desk.store.alarms()}

    def test_other_code_than_was_signed_measures_nothing(self, run: ClosedRun, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fedpact_models.code.models_digest", lambda: "e" * 64)
        assert look(run, 1)
        desk = run.federation.agent(1).desk
        assert (rows(desk), taken(run)) == ([], [])
        assert "CODE_MODELS_MISMATCH" in {a.code for a in desk.store.alarms()}

    def test_copies_among_the_rows_are_refused_before_anything_is_charged(self, run: ClosedRun) -> None:
        agent = run.federation.agent(1)

        def copies() -> None:
            raise InputError("DATA_DUPLICATES", "20 are exact copies.")

        agent.desk = dataclasses.replace(agent.desk, own_rows=copies)
        assert look(run, 1)
        assert (rows(agent.desk), taken(run)) == ([], [])
        assert "DATA_DUPLICATES" in {a.code for a in agent.desk.store.alarms()}

    def test_another_initial_model_is_refused_before_anything_is_charged(self, run: ClosedRun) -> None:
        other = base64.b64encode(np.ones(650).astype("<f8").tobytes()).decode()
        run.serve("/initial-model", {"model": other})
        assert look(run, 1)
        assert [r.kind for r in rows(run.federation.agent(1).desk)] == ["statistics", "statistics"]
        run.serve("/initial-model", {"model": "no base64"})
        assert look(run, 1)
        assert "BASE_MODEL_MISMATCH" in {a.code for a in run.federation.agent(1).desk.store.alarms()}


class TestOperator:
    """What a participant may send, and what is turned away."""

    @pytest.fixture
    def honest(self, run: ClosedRun) -> tuple[Measurement, bytes]:
        contract, agent = run.federation.contract, run.federation.agent(1)
        array = noised_sums(contract, agent.examples, SystemNoise()).astype("<f4").tobytes()
        return self.statistics_of(run, array), array

    @staticmethod
    def statistics_of(run: ClosedRun, array: bytes) -> Measurement:
        return Measurement(
            contract_id=run.federation.contract.id,
            participant=run.federation.agent(1).desk.participant,
            kind="statistics",
            array_digest=update_digest(array),
            num_examples=90,
            privacy_event=measurements.measurement_event(run.federation.contract, "statistics"),
            noise="csprng",
            ledger_head="0" * 64,
        )

    def give(self, run: ClosedRun, record: Measurement, array: bytes, key: Any = None) -> str:
        desk = run.federation.agent(1).desk
        value = {
            "measurement": sign(record, key or desk.run_key).plain(),
            "array": base64.b64encode(array).decode(),
        }
        home = measurements.OperatorHome.open(run.home)
        run_key = desk.run_keys[desk.participant]
        with run.federation.database.write() as connection:
            return measurements.take(home, connection, desk.contract, desk.participant, run_key, value)

    def test_an_honest_one_is_taken_and_again_changes_nothing(self, run: ClosedRun, honest: Any) -> None:
        assert self.give(run, *honest) == self.give(run, *honest) == "statistics"
        assert run.federation.kinds().count(MeasurementTaken.TYPE) == 1

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"contract_id": "f" * 64}, "MEASUREMENT_PLACE"),
            ({"num_examples": 91}, "MEASUREMENT_EVENT"),
            ({"noise": "test"}, "MEASUREMENT_TEST_NOISE"),
            ({"array_digest": "f" * 64}, "MEASUREMENT_DIGEST"),
            ({"kind": "baseline"}, "MEASUREMENT_EVENT"),
            ({"ledger_head": GENESIS}, "MEASUREMENT_LEDGER_HEAD"),
        ],
    )
    def test_other_words_are_refused(self, run: ClosedRun, honest: Any, change: dict[str, Any], code: str) -> None:
        record, array = honest
        with pytest.raises(FedpactError) as err:
            self.give(run, record.model_copy(update=change), array)
        assert err.value.code == code
        assert MeasurementTaken.TYPE not in run.federation.kinds()

    @pytest.mark.parametrize(
        ("spoil", "code"),
        [
            (lambda a: a[:-4], "MEASUREMENT_SHAPE"),
            (lambda a: a[:-4] + np.array([np.nan], "<f4").tobytes(), "MEASUREMENT_NOT_FINITE"),
            (lambda a: a[:-4] + np.array([1e9], "<f4").tobytes(), "MEASUREMENT_NORM"),
        ],
    )
    def test_other_arrays_are_refused(self, run: ClosedRun, honest: Any, spoil: Any, code: str) -> None:
        array = spoil(honest[1])
        with pytest.raises(FedpactError) as err:
            self.give(run, honest[0].model_copy(update={"array_digest": update_digest(array)}), array)
        assert err.value.code == code

    @pytest.mark.parametrize("noise", [NoNoise(), Weak(0.5), None])
    def test_a_baseline_with_too_little_noise_is_refused_whatever_it_says(self, run: ClosedRun, noise: Any) -> None:
        contract, agent = run.federation.contract, run.federation.agent(1)
        assert contract.baseline.steps != contract.training.local_steps
        initial = np.zeros(650)

        def sent(by: Any) -> tuple[Measurement, bytes]:
            made = np.zeros(650) if by is None else local_baseline(contract, initial, agent.examples, by)
            array = made.astype("<f4").tobytes()
            changes = {"kind": "baseline", "array_digest": update_digest(array)}
            event = {"privacy_event": measurements.measurement_event(contract, "baseline")}
            return self.statistics_of(run, array).model_copy(update=changes | event), array

        with pytest.raises(InputError, match="MEASUREMENT_NOISE_FLOOR"):
            self.give(run, *sent(noise))
        assert self.give(run, *sent(SystemNoise())) == "baseline"

    def test_a_baselines_floor_is_that_of_its_own_steps(self, run: ClosedRun) -> None:
        """As much energy as six steps bring is four steps' and a half."""
        contract = run.federation.contract
        ones = np.ones(650)
        assert (contract.training.local_steps, contract.baseline.steps) == (6, 4)
        of_a_round, own = (noise_floor.energy_ratio(ones, contract, 90, steps) for steps in (None, 4))
        assert own == pytest.approx(of_a_round * 6 / 4)
        assert noise_floor.kept(contract, 650, 1) == 1
        assert noise_floor.kept(contract, 650, 4) > noise_floor.kept(contract, 650)
        assert noise_floor.pooled([1.0], contract, 650, 4).kept == noise_floor.kept(contract, 650, 4)

    def test_a_baseline_too_small_for_a_floor_is_not_zero(self) -> None:
        contract = agents_contract(None, {"baseline": {"steps": 4}})
        me, cells = contract.participants[0], measurements.cells(contract, "baseline")
        record = Measurement(
            contract_id=contract.id,
            participant=me.id,
            kind="baseline",
            array_digest="0" * 64,
            num_examples=me.num_examples,
            privacy_event=measurements.measurement_event(contract, "baseline"),
            noise="csprng",
            ledger_head="0" * 64,
        )
        for value, refused in ((0.0, True), (1e-6, False)):
            array = np.full(cells, value, "<f4").tobytes()
            signed = record.model_copy(update={"array_digest": update_digest(array)})
            with pytest.raises(InputError, match="MEASUREMENT_NOISE_FLOOR") if refused else nullcontext():
                measurements.check(signed, array, contract, me.id)

    def test_statistics_without_noise_are_refused_whatever_they_say(self, run: ClosedRun) -> None:
        contract, agent = run.federation.contract, run.federation.agent(1)
        array = noised_sums(contract, agent.examples, NoNoise()).astype("<f4").tobytes()
        with pytest.raises(InputError, match="MEASUREMENT_NOISE_FLOOR"):
            self.give(run, self.statistics_of(run, array), array)

    def test_a_second_draw_is_refused(self, run: ClosedRun, honest: Any) -> None:
        record, array = honest
        self.give(run, record, array)
        other = (np.frombuffer(array, "<f4") + 1).astype("<f4").tobytes()
        with pytest.raises(FedpactError, match="MEASUREMENT_TAKEN"):
            self.give(run, record.model_copy(update={"array_digest": update_digest(other)}), other)

    def test_somebody_elses_key_is_a_fault(self, run: ClosedRun, honest: Any) -> None:
        with pytest.raises(FaultError):
            self.give(run, *honest, key=run.federation.agent(2).desk.run_key)

    @pytest.mark.parametrize("value", [{}, {"measurement": {}, "array": 3}, {"measurement": {}, "array": "§"}])
    def test_a_body_of_another_form_is_refused(self, run: ClosedRun, value: dict[str, Any]) -> None:
        home, desk = measurements.OperatorHome.open(run.home), run.federation.agent(1).desk
        with run.federation.database.write() as connection, pytest.raises(FedpactError) as err:
            measurements.take(home, connection, desk.contract, desk.participant, "0" * 64, value)
        assert err.value.exit_code == 2


def test_a_run_without_scores_ends_without_the_baselines_too(run: ClosedRun) -> None:
    """What makes the scores is lost, and with it a baseline's model: the run can still be ended."""
    look(run, 1)
    federation = run.federation

    def stop(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        if Order.from_bytes(read_envelope(order).body).round == 1:
            return order, model
        for path in (federation.home / "arrays").rglob("*.f4"):
            path.unlink()
        with federation.database.write() as connection:
            connection.execute(db.runs.update().values(wanted="unscored"))
        return None

    federation.transport.before = stop
    assert federation.run(accept_test_noise=False) == "stopped"
    assert BaselinesScored.TYPE not in federation.kinds()


class TestVerifier:
    """The evidence as a dishonest operator would make it."""

    @pytest.fixture
    def done(self, run: ClosedRun) -> ClosedRun:
        for index in (1, 2, 3):
            look(run, index)
        run.federation.run(accept_test_noise=False)
        run.settle()
        return run

    def faults(self, run: ClosedRun, change: Any) -> set[str]:
        files = {name: data.encode() for name, data in run.rewritten(change).items()}
        return {fault["code"] for fault in verify(unpack(files), None, privacy=False).faults}

    @staticmethod
    def where(bodies: list[Any], kind: type) -> int:
        return next(i for i, body in enumerate(bodies) if isinstance(body, kind))

    def test_nothing_is_wrong_with_the_honest_one(self, done: ClosedRun) -> None:
        assert self.faults(done, lambda bodies: bodies) == set()

    def test_other_sums_than_were_signed(self, done: ClosedRun) -> None:
        def change(bodies: list[Any]) -> list[Any]:
            place = self.where(bodies, MeasurementTaken)
            array = base64.b64encode(bytes(len(base64.b64decode(bodies[place].array)))).decode()
            bodies[place] = bodies[place].model_copy(update={"array": array})
            return bodies

        assert "MEASUREMENT_DIGEST" in self.faults(done, change)

    def test_sums_without_noise(self, done: ClosedRun) -> None:
        """Signed, and taken by an operator that did not look."""
        contract, agent = done.federation.contract, done.federation.agent(1)
        array = noised_sums(contract, agent.examples, NoNoise()).astype("<f4").tobytes()

        def change(bodies: list[Any]) -> list[Any]:
            for place, body in enumerate(bodies):
                if isinstance(body, MeasurementTaken) and body.array and body.participant == agent.desk.participant:
                    record = Measurement.from_bytes(read_envelope(body.measurement).body)
                    signed = sign(record.model_copy(update={"array_digest": update_digest(array)}), agent.desk.run_key)
                    told = {"measurement": signed.plain(), "array": base64.b64encode(array).decode()}
                    bodies[place] = body.model_copy(update=told)
            return bodies

        assert "MEASUREMENT_NOISE_FLOOR" in self.faults(done, change)

    def test_a_measurement_twice_and_one_too_late(self, done: ClosedRun) -> None:
        def twice(bodies: list[Any]) -> list[Any]:
            place = self.where(bodies, MeasurementTaken)
            return [*bodies[: place + 1], bodies[place], *bodies[place + 1 :]]

        assert "MEASUREMENT_TWICE" in self.faults(done, twice)

        def late(bodies: list[Any]) -> list[Any]:
            place = self.where(bodies, MeasurementTaken)
            return [*bodies[:place], *bodies[place + 1 : -1], bodies[place], bodies[-1]]

        assert "MEASUREMENT_LATE" in self.faults(done, late)

    def test_a_measurement_of_other_terms_than_the_contracts(self, done: ClosedRun) -> None:
        def other(bodies: list[Any]) -> list[Any]:
            place = self.where(bodies, MeasurementTaken)
            record = Measurement.from_bytes(read_envelope(bodies[place].measurement).body)
            numbers = range(1, 1 + len(done.federation.contract.participants))
            desks = (done.federation.agent(number).desk for number in numbers)
            desk = next(desk for desk in desks if desk.participant == record.participant)
            fewer = record.model_copy(update={"num_examples": record.num_examples - 1})
            bodies[place] = bodies[place].model_copy(update={"measurement": sign(fewer, desk.run_key).plain()})
            return bodies

        assert "MEASUREMENT_MISMATCH" in self.faults(done, other)

    def test_a_measurement_under_an_old_ledger_head(self, done: ClosedRun) -> None:
        """The empty ledger's, and the one of the participant's other measurement: both were charged, both move it."""
        taken = [body for body in (e.open() for e in done.federation.entries()) if isinstance(body, MeasurementTaken)]
        desk = done.federation.agent(1).desk
        taken = [body for body in taken if body.participant == desk.participant]
        own = [Measurement.from_bytes(read_envelope(body.measurement).body) for body in taken]
        assert len({record.ledger_head for record in own}) == len(own) == 2
        for head in (GENESIS, own[0].ledger_head):
            signed = sign(own[1].model_copy(update={"ledger_head": head}), desk.run_key).plain()

            def old(bodies: list[Any], signed: dict[str, Any] = signed) -> list[Any]:
                place = bodies.index(taken[1])
                bodies[place] = taken[1].model_copy(update={"measurement": signed})
                return bodies

            assert "MEASUREMENT_LEDGER_HEAD" in self.faults(done, old)

    def test_the_operators_own_measurement(self, done: ClosedRun) -> None:
        def forged(bodies: list[Any]) -> list[Any]:
            place = self.where(bodies, MeasurementTaken)
            record = Measurement.from_bytes(read_envelope(bodies[place].measurement).body)
            signed = sign(record, done.federation.operator_run_key).plain()
            bodies[place] = bodies[place].model_copy(update={"measurement": signed})
            return bodies

        assert self.faults(done, forged) - {"MEASUREMENT_DIGEST"}

    def test_a_baseline_left_out_of_the_scores(self, done: ClosedRun) -> None:
        def fewer(bodies: list[Any]) -> list[Any]:
            place = self.where(bodies, BaselinesScored)
            bodies[place] = bodies[place].model_copy(update={"lines": bodies[place].lines[1:]})
            return bodies

        def none(bodies: list[Any]) -> list[Any]:
            return [body for body in bodies if not isinstance(body, BaselinesScored)]

        def twice(bodies: list[Any]) -> list[Any]:
            place = self.where(bodies, BaselinesScored)
            return [*bodies[:place], bodies[place], *bodies[place:]]

        assert "BASELINES_TIME" in self.faults(done, twice)
        assert "BASELINES_LINES" in self.faults(done, fewer)
        assert "BASELINES_MISSING" in self.faults(done, none)

    def test_an_agent_finds_what_it_never_sent(self, done: ClosedRun) -> None:
        desk = done.federation.agent(1).desk
        evidence = unpack({name: text.encode() for name, text in done.files().items()})
        own = seen(desk.store, done.contract_id)
        check_own(own, desk.participant, evidence)
        with pytest.raises(FaultError, match="STATEMENT_MEASUREMENT"):
            check_own(dataclasses.replace(own, measured={}), desk.participant, evidence)


LABEL = {"name": "ill", "classes": ["no", "yes"], "rule": "value"}
SCHEMA = a_schema(number("age", 0, 100), category("sex", ["f", "m"]), label=LABEL)


class TestQueries:
    QUERIES = (
        {"kind": "mean", "column": "age"},
        {"kind": "histogram", "column": "sex"},
        {"kind": "histogram", "column": "age", "bins": 4},
        {"kind": "count", "column": "age", "at_least": 50},
        {"kind": "count", "column": "ill", "value": "yes"},
        {"kind": "quantile", "column": "age", "bins": 100, "probabilities": ["0.25", "0.5"]},
    )

    def asked(self, *queries: Any, noise: Any = 1, counts: tuple[int, ...] = (8, 30, 40)) -> Contract:
        values = training_contract(SCHEMA, a_model(), counts).plain()
        return Contract.parse(values | {"statistics": {"noise_multiplier": noise, "queries": list(queries)}})

    def examples(self) -> Examples:
        import polars as pl

        ages = [0, 10, 25, 50, 50, 75, 100, 140]
        table = pl.DataFrame({"age": ages, "sex": list("ffmmmmmf"), "ill": ["no"] * 5 + ["yes"] * 3})
        return encode(SCHEMA, table, file="t")

    def split(self, contract: Contract, flat: Any) -> list[list[float]]:
        assert contract.statistics is not None
        counts = [cell_count(contract, query) for query in contract.statistics.queries]
        edges = np.cumsum([0, *counts])
        return [list(flat[a:b]) for a, b in pairwise(edges)]

    def test_exact_sums_give_exact_answers(self) -> None:
        contract = self.asked(*self.QUERIES)
        exact = self.split(contract, noised_sums(contract, self.examples(), NoNoise()))
        assert exact[1:5] == [[3, 5], [2, 1, 2, 3], [5], [3]]
        me = contract.participants[0].id
        found = results(contract, {me: exact})
        answers = [query["answers"][me]["values"] for query in found]
        assert answers[0] == [pytest.approx((0 + 10 + 25 + 50 + 50 + 75 + 100 + 100) / 8)]
        assert answers[5][0] == pytest.approx(11, abs=1)
        assert answers[5][1] == pytest.approx(51, abs=1)
        assert found[2]["labels"][0] == "0 – 25"
        assert [query["answers"].keys() for query in found] == [{me: 0}.keys()] * 6

    def test_together_the_noise_is_that_of_all(self) -> None:
        contract = self.asked(*self.QUERIES[:2], noise=4)
        first, second, _ = (p.id for p in contract.participants)
        found = results(contract, {first: [[4.0], [3, 5]], second: [[-6.0], [10, 20]]})
        together, error = found[1]["answers"]["together"], 4 * 2**0.5
        assert (together["values"], together["error"]) == ([13, 25], pytest.approx(error))
        assert together["low"] == [pytest.approx(value - 1.959964 * error) for value in (13, 25)]
        assert together["high"] == [pytest.approx(value + 1.959964 * error) for value in (13, 25)]
        mean = found[0]["answers"]["together"]
        assert mean["values"] == [pytest.approx(50 * (1 - 2 / 38))]
        assert mean["error"] == pytest.approx(50 * 4 * 2**0.5 / 38)

    def test_one_row_moves_a_query_by_at_most_one(self) -> None:
        """Zero-out: without a row's own contribution the sums of each query lie at most 1 away, in norm."""
        contract = self.asked(*self.QUERIES)
        whole = self.examples()
        exact = self.split(contract, noised_sums(contract, whole, NoNoise()))
        for row in range(len(whole)):
            fewer = whole.take([i for i in range(len(whole)) if i != row])
            without = self.split(contract, noised_sums(contract, fewer, NoNoise()))
            assert all(np.linalg.norm(np.subtract(a, b)) <= 1 + 1e-9 for a, b in zip(exact, without, strict=True))

    def test_noise_has_the_contracted_size(self) -> None:
        contract = self.asked(*self.QUERIES, noise=7)
        exact = noised_sums(contract, self.examples(), NoNoise())
        draws = np.array([noised_sums(contract, self.examples(), SystemNoise()) - exact for _ in range(300)])
        assert draws.std() == pytest.approx(7, rel=0.05)
        between = np.corrcoef(draws.T) - np.eye(draws.shape[1])
        assert np.abs(between).max() < 0.35  # 300 draws: standard deviation .058

    def test_whole_numbers_are_no_noise_where_there_are_enough_of_them(self) -> None:
        count = {"kind": "count", "column": "ill", "value": "yes"}
        alone = self.asked(count, {"kind": "mean", "column": "age"})
        assert not can_be_noised(alone, [20.0, 3.25])
        assert not can_be_noised(alone, [-127.0, 3.25])
        assert can_be_noised(alone, [20.5, 3.0])
        assert can_be_noised(alone, [257.0, 3.0]), "once in 32,768 by chance"
        assert can_be_noised(alone, [2.0**24, 3.0]), "a float32 of this size is always whole"
        two = self.asked(count, count | {"value": "no"})
        assert not can_be_noised(two, [30001.0, 29999.0])
        assert can_be_noised(two, [30001.0, 29999.5])
        assert can_be_noised(self.asked({"kind": "mean", "column": "age"}), [4.0])
        parts = self.asked({"kind": "histogram", "column": "age", "bins": 2}, {"kind": "mean", "column": "age"}, count)
        assert not can_be_noised(parts, [20.0, 21.0, 0.5, 7.0])
        assert can_be_noised(parts, [20.0, 21.0, 7.0, 0.5])

    def test_intervals_hold_what_the_rows_say(self) -> None:
        """Of 2,000 draws of noise 95 % hold the answer without noise: of sums exactly, of quantiles at least."""
        ages = np.repeat([3.0, 17.0, 41.0, 42.0, 77.0, 99.0], [60, 20, 150, 90, 30, 50])
        bins, wanted, noise, draws = 20, (D("0.1"), D("0.5"), D("0.9")), 6.0, 2000
        queries = [
            {"kind": "mean", "column": "age"},
            {"kind": "count", "column": "age", "at_least": 42},
            {"kind": "quantile", "column": "age", "bins": bins, "probabilities": list(map(str, wanted))},
        ]
        contract = self.asked(*queries, noise=int(noise), counts=(len(ages), 30, 40))
        me = contract.participants[0].id
        exact = [[(ages / 50 - 1).sum()], [(ages >= 42).sum()], list(np.histogram(ages, bins, (0, 100))[0])]
        truth = [[ages.mean()], [170.0], [np.sort(ages)[int(p * len(ages)) - 1] for p in wanted]]
        rng, held, width = np.random.default_rng(7), np.zeros(5), np.zeros(5)
        for _ in range(draws):
            noised = [list(np.asarray(cells) + noise * rng.standard_normal(len(cells))) for cells in exact]
            answers = [query["answers"][me] for query in results(contract, {me: noised})]
            low, value, high = (np.concatenate([a[key] for a in answers]) for key in ("low", "values", "high"))
            assert (low <= value).all()
            assert (value <= high).all()
            held += (low <= np.concatenate(truth)) & (np.concatenate(truth) <= high)
            width += high - low
        assert held[:2] / draws == pytest.approx(0.95, abs=0.015)  # three standard deviations
        assert (held[2:] / draws >= 0.95 - 0.015).all()
        assert (width[2:] / draws < [40, 35, 60]).all(), "and tell something: the bounds are 100 apart"

    def test_a_quantile_interval_is_read_off_by_hand(self) -> None:
        """100 rows in four parts: 40 and 80 lie surely below and above half, 39 - 61 does not show."""
        quantile = {"kind": "quantile", "column": "age", "bins": 4, "probabilities": ["0.5"]}
        contract = self.asked(quantile, noise=1, counts=(100, 30, 40))
        me = contract.participants[0].id

        def interval(*cells: float) -> tuple[float, float]:
            answer = results(contract, {me: [list(cells)]})[0]["answers"][me]
            return answer["low"][0], answer["high"][0]

        assert interval(40, 40, 10, 10) == (25, 50)
        assert interval(40, 11, 39, 10) == (25, 75)  # 51 below 50 years, give or take 1.96
        assert interval(49, 2, 39, 10) == (0, 75)  # 49 below 25 years, give or take 1.70
        assert interval(0, 0, 0, 100) == (75, 100)

    def test_no_digit_is_finer_than_the_noise(self, run: ClosedRun) -> None:
        for index in (1, 2, 3):
            look(run, index)
        federation = run.federation
        found = measured_statistics([e.open() for e in federation.entries()], federation.contract)
        assert found is not None
        assert found["interval"] == {"level": "0.95", "covers": "the noise alone, each value by itself; not sampling"}
        ids = [p.id for p in federation.contract.participants]
        assert [p["id"] for p in found["participants"]] == ids
        mean, histogram, quantile, *_ = found["queries"]
        assert list(histogram["answers"]) == [*ids, "together"], "the contract's order"
        alone, together = histogram["answers"][ids[0]], histogram["answers"]["together"]
        assert (alone["error"], together["error"]) == ("30", "52")  # 30 sqrt(3) is 51.96
        assert all("." not in number for key in ("values", "low", "high") for number in together[key])
        error = mean["answers"][ids[0]]["error"]
        assert error == "2.7"  # 8 * 30 / 90 = 2.67, rounded up
        assert all(D(n).as_tuple().exponent == -1 for n in mean["answers"][ids[0]]["values"])
        edges = quantile["answers"]["together"]
        assert edges["error"] is None
        assert 0 <= D(edges["low"][0]) <= D(edges["values"][0]) <= D(edges["high"][0]) <= 16

    def test_quantiles_of_nothing_but_noise_are_within_the_bounds(self) -> None:
        contract = self.asked(self.QUERIES[5])
        me = contract.participants[0].id
        for cells in ([-1.0] * 100, [0.0] * 99 + [5.0], [-5.0] * 99 + [0.1]):
            answer = results(contract, {me: [cells]})[0]["answers"][me]
            for key in ("low", "values", "high"):
                assert all(0 <= value <= 100 for value in answer[key])

    @pytest.mark.parametrize(
        "query",
        [
            {"kind": "mean", "column": "sex"},
            {"kind": "mean", "column": "ill"},
            {"kind": "mean", "column": "nobody"},
            {"kind": "histogram", "column": "age"},
            {"kind": "histogram", "column": "sex", "bins": 3},
            {"kind": "count", "column": "age", "value": "3"},
            {"kind": "count", "column": "age"},
            {"kind": "count", "column": "sex", "value": "x"},
            {"kind": "count", "column": "sex"},
            {"kind": "count", "column": "ill", "at_least": 1},
            {"kind": "quantile", "column": "sex", "bins": 3, "probabilities": ["0.5"]},
            {"kind": "quantile", "column": "age", "bins": 3, "probabilities": ["1"]},
        ],
    )
    def test_a_query_that_asks_nothing_sensible_is_refused(self, query: dict[str, Any]) -> None:
        with pytest.raises(InputError) as err:
            self.asked(query)
        assert (err.value.code, err.value.field) == ("CONTRACT_STATISTICS", "statistics.queries.0")
        assert "contract template" in err.value.remedy

    @pytest.mark.parametrize(
        ("query", "allowed"),
        [
            ({"kind": "mean", "column": "nobody"}, "it reads age, sex, ill."),
            ({"kind": "mean", "column": "sex"}, "the contract's numbers are age."),
            ({"kind": "count", "column": "sex", "value": "x"}, "its values are f, m."),
            ({"kind": "count", "column": "ill", "value": "x"}, "its values are no, yes."),
        ],
    )
    def test_what_may_be_asked_is_listed(self, query: dict[str, Any], allowed: str) -> None:
        with pytest.raises(InputError) as err:
            self.asked(query)
        assert err.value.message.endswith(allowed)

    def test_the_same_query_twice_is_refused_and_another_value_of_the_column_is_not(self) -> None:
        count = {"kind": "count", "column": "age", "at_least": "50"}
        with pytest.raises(InputError, match=r"The count of age is asked twice, by the sums of queries\.0 too") as err:
            self.asked(count, {"kind": "mean", "column": "age"}, dict(count))
        assert (err.value.code, err.value.field) == ("CONTRACT_STATISTICS", "statistics.queries.2")
        assert err.value.remedy
        self.asked(count, count | {"at_least": "51"})

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (HISTOGRAM, QUANTILE),
            (QUANTILE, HISTOGRAM),
            (QUANTILE, QUANTILE | {"probabilities": ["0.9"]}),
            ({"kind": "count", "column": "age", "at_least": "50"}, {"kind": "count", "column": "age", "at_least": 50}),
        ],
    )
    def test_the_same_sums_are_not_charged_twice(self, first: dict[str, Any], second: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"by the sums of queries\.0 too") as err:
            self.asked(first, second)
        assert (err.value.code, err.value.field) == ("CONTRACT_STATISTICS", "statistics.queries.1")
        if "bins" in first:
            self.asked(first, second | {"bins": 20})

    @pytest.mark.parametrize("at_least", ["-5", "0", "100.5", "1000"])
    def test_a_count_of_all_rows_or_none_is_refused(self, at_least: str) -> None:
        with pytest.raises(InputError, match="all rows or none") as err:
            self.asked({"kind": "count", "column": "age", "at_least": at_least})
        assert err.value.code == "CONTRACT_STATISTICS"
        for inside in ("0.001", "100"):
            self.asked({"kind": "count", "column": "age", "at_least": inside})

    def test_without_noise_nothing_is_asked(self) -> None:
        with pytest.raises(InputError, match="CONTRACT_STATISTICS"):
            self.asked(self.QUERIES[0], noise=0)

    def test_the_contract_says_in_words_what_is_released(self) -> None:
        values = self.asked(*self.QUERIES, noise=7).plain()
        shown = text.render(Contract.parse(values | {"baseline": {"steps": 5}}))
        for words in (
            "Noise is added to each sum; its standard deviation, in rows, is 7:",
            "the mean of age, clipped to its bounds",
            "the histogram of age in 4 parts",
            "how many rows have age: at least 50",
            "the quantiles 0.25, 0.5 of age, from a histogram of 100 parts",
            "trains a model alone, with the same clipping and noise, 5 steps",
            "and the statistics, and the baseline. Epsilon covers all of them",
            "every round and spare attempt, statistics, baseline, costs at most epsilon",
        ):
            assert words in shown

    def test_statistics_that_cost_more_than_the_contract_promises_are_refused(self) -> None:
        contract = self.asked(*self.QUERIES, noise="0.5")
        with pytest.raises(InputError, match="CONTRACT_NOISE_TOO_SMALL"):
            check_plan(contract)


def test_the_ledger_counts_them_apart(run: ClosedRun) -> None:
    look(run, 1)
    desk = run.federation.agent(1).desk
    all_rows = desk.store.rows(desk.data_set)
    assert [r.kind for r in measured(all_rows, desk.contract_id)] == ["statistics", "baseline"]
    assert {r.round for r in all_rows} == {0}
