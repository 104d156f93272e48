"""Client-level privacy by contract: what is refused, what it costs, who clips and who adds the noise, and when."""

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.central import CENTRAL, NORM, central_toml
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.contract_kit import DROP, change
from tests.support.federation import Federation, make_federation
from tests.support.models_kit import a_model, plain_schema, random_examples, training_contract
from tests.support.noise import FixedNoise
from tests.support.operator_world import NOW, TEMPLATE, Operator, operator
from tests.support.operator_world import enterprise as an_enterprise
from tests.support.settlement_kit import a_contract, linear_round
from torch.nn import functional

from fedpact_client.closing import close
from fedpact_contract.arrays import SALT_BYTES, update_digest
from fedpact_contract.contract import ClientPrivacy, Contract, RecordPrivacy
from fedpact_contract.contribution import check_scores, leave_one_out, period_values
from fedpact_contract.errors import FailedError, FaultError, InputError
from fedpact_contract.log import RoundAggregated, RoundScores, ScoresOpened
from fedpact_contract.messages import Order, PrivacyEvent, Reply, Update, release_event, update_event
from fedpact_contract.privacy import (
    ACCOUNTANT,
    CENTRAL_ACCOUNTANT,
    accountant,
    attempt_rdp,
    check_plan,
    epsilon_central,
    epsilon_pld,
    solve_central_noise,
)
from fedpact_contract.record import read_envelope, sign
from fedpact_contract.report import CENTRAL_NOT_STOPPED, CENTRAL_NOT_STOPPED_ZH, NOT_STOPPED, build
from fedpact_contract.text import render
from fedpact_contract.verify import verify
from fedpact_models.aggregation import noised_mean
from fedpact_models.registry import build as build_module
from fedpact_models.registry import initial_weights
from fedpact_models.training import local_update
from fedpact_models.weights import clipped, flatten, load_flat
from fedpact_server import flower_accountant, rounds
from fedpact_server.drafting import ValidationFile, new
from fedpact_server.report.html import render as page
from fedpact_server.run_state import load_model, run_row

D = Decimal
DELTA = D("0.00001")


def values(**changes: Any) -> dict[str, Any]:
    plain = a_contract((100, 200, 300), rounds=3).plain()
    return change(plain, CENTRAL | {"privacy__delta": DELTA} | changes, "__")


def contract(**changes: Any) -> Contract:
    return Contract.parse(values(**changes))


def central(found: Contract) -> ClientPrivacy:
    assert isinstance(found.privacy, ClientPrivacy)
    return found.privacy


class TestContract:
    def test_contracts_at_record_level_have_the_bytes_that_they_had(self) -> None:
        """The id of a contract made before there was another trust model."""
        term = {"not_before": "2026-01-01T00:00:00Z", "not_after": "2026-12-31T00:00:00Z"}
        made = Contract.parse(a_contract().plain() | {"term": term})
        assert made.id == "364dae1f9f0f838392796e4172ef9c795b0dd76cb7793f3ba56e7d2acde476e6"
        assert isinstance(a_contract().privacy, RecordPrivacy)

    def test_it_reads_back_as_it_was_written(self) -> None:
        found = contract()
        assert Contract.from_bytes(found.to_bytes()) == found
        assert (found.planned_steps, found.noised_steps) == (3, 1)
        check_plan(found)

    @pytest.mark.parametrize(
        ("changes", "code", "field"),
        [
            (
                {"settlement__contribution_weight": D("0.1"), "settlement__equal_weight": D("0.3")},
                "CONTRACT_CENTRAL_PAYOUT",
                "settlement.contribution_weight",
            ),
            (
                {
                    "privacy__entity": {
                        "column": "who",
                        "max_rows": 2,
                        "method": "mixture-of-gaussians",
                        "epsilon": 9,
                        "delta": DELTA,
                    }
                },
                "CONTRACT_CENTRAL_CLAUSE",
                "privacy.entity",
            ),
            ({"baseline": {"steps": 3}}, "CONTRACT_CENTRAL_CLAUSE", "baseline"),
            (
                {"statistics": {"noise_multiplier": 9, "queries": [{"kind": "mean", "column": "age"}]}},
                "CONTRACT_CENTRAL_CLAUSE",
                "statistics",
            ),
            ({"training__aggregation": "weighted-mean"}, "CONTRACT_TRUST_MODEL", "training.aggregation"),
            ({"contribution__game": "fixed-weight"}, "CONTRACT_TRUST_MODEL", "contribution.game"),
            ({"privacy__delta": D("0.00002")}, "CONTRACT_DELTA", "privacy.delta"),
            ({"privacy__max_update_norm": 0}, "CONTRACT_NOT_POSITIVE", "privacy.max_update_norm"),
            ({"privacy__max_update_norm": DROP}, "CONTRACT_MISSING_KEY", "privacy.max_update_norm"),
            ({"privacy__max_grad_norm": 1}, "CONTRACT_UNKNOWN_KEY", "privacy.max_grad_norm"),
            ({"privacy__unit": "example"}, "CONTRACT", "privacy.unit"),
            ({"privacy__trust_model": DROP}, "CONTRACT_MISSING_KEY", "privacy.trust_model"),
            ({"privacy__trust_model": "none"}, "CONTRACT", "privacy"),
            (
                {"participants__0__trust_model": "record-level-at-each-participant"},
                "CONTRACT_UNKNOWN_KEY",
                "participants.0.trust_model",
            ),
        ],
    )
    def test_what_does_not_go_with_it_is_refused(self, changes: dict[str, Any], code: str, field: str) -> None:
        with pytest.raises(InputError) as caught:
            contract(**changes)
        assert (caught.value.code, caught.value.field) == (code, field)

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"training": {"aggregation": "uniform-mean"}}, "CONTRACT_TRUST_MODEL"),
            ({"contribution": {"game": "unanimity"}}, "CONTRACT_TRUST_MODEL"),
            ({"privacy": {"max_update_norm": 1}}, "CONTRACT_UNKNOWN_KEY"),
        ],
    )
    def test_nor_do_its_terms_go_with_the_other(self, changes: dict[str, Any], code: str) -> None:
        plain = a_contract().plain()
        for part, change_ in changes.items():
            plain[part] |= change_
        with pytest.raises(InputError) as caught:
            Contract.parse(plain)
        assert caught.value.code == code

    def test_an_update_says_that_it_has_no_noise(self) -> None:
        found = contract()
        event = {"sampling": "none", "sample_rate": 1, "max_grad_norm": NORM, "steps": 1}
        assert update_event(found) == PrivacyEvent.parse(event | {"noise_multiplier": 0}, code="E")
        assert release_event(found) == PrivacyEvent.parse(event | {"noise_multiplier": D("3.723")}, code="E")
        assert update_event(a_contract()) == release_event(a_contract())

    def test_who_signs_is_told_that_the_operator_sees_all(self) -> None:
        text = render(contract())
        assert "THE OPERATOR SEES EACH PARTICIPANT'S CHANGE OF THE MODEL WITHOUT NOISE" in text
        assert "the same for every participant" in text
        assert "without all changes of any one participant" in text
        assert "Contribution is not measured" in text
        assert "divided by 3 (whoever is missing counts as 0)" in text
        assert all(line in text for line in CENTRAL_NOT_STOPPED)
        assert NOT_STOPPED[0] not in text
        assert len(CENTRAL_NOT_STOPPED) == len(CENTRAL_NOT_STOPPED_ZH)
        for value in contract().privacy.plain().values():
            assert str(value) in text
        assert "WITHOUT NOISE" not in render(a_contract())


class TestCost:
    @pytest.mark.parametrize(("epsilon", "releases"), [("0.5", 1), ("2", 3), ("3", 40)])
    def test_the_noise_is_the_smallest_that_keeps_epsilon(self, epsilon: str, releases: int) -> None:
        noise = solve_central_noise(D(epsilon), DELTA, releases)
        assert epsilon_central(noise, DELTA, releases) <= D(epsilon)
        assert epsilon_central(noise - D("0.001"), DELTA, releases) > D(epsilon)

    @pytest.mark.parametrize(("noise", "releases"), [("1", 1), ("3.723", 3), ("16.647", 60)])
    def test_three_ways_agree(self, noise: str, releases: int) -> None:
        """The textbook formula at the same orders; Flower's accountant; and the tighter one, which is a few % below."""
        delta, rho = float(DELTA), releases / (2 * float(noise) ** 2)
        orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
        textbook = min(a * rho + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in orders)
        found = float(epsilon_central(D(noise), DELTA, releases))
        assert 0 <= found - textbook < 2e-6
        terms = contract(privacy__noise_multiplier=D(noise))
        flower, _ = flower_accountant.accountant(terms, central(terms), releases)
        assert 0 <= found - flower.get_epsilon(delta) < 2e-6
        tight = float(epsilon_pld([(D(noise), D(1), releases)], DELTA))
        assert 0.88 * found < tight < found

    def test_flower_agrees_to_the_plan_and_to_nothing_more(self) -> None:
        found = contract()
        assert not any(flower_accountant.would_exceed(found, central(found), released) for released in range(3))
        assert flower_accountant.would_exceed(found, central(found), 3)
        less = contract(privacy__noise_multiplier=D("3.722"))
        assert flower_accountant.would_exceed(less, central(less), 0)

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"privacy__noise_multiplier": D("3.722")}, "CONTRACT_NOISE_TOO_SMALL"),
            ({"privacy__accountant": ACCOUNTANT}, "CONTRACT_ACCOUNTANT"),
        ],
    )
    def test_a_plan_that_breaks_its_promise_is_refused(self, changes: dict[str, Any], code: str) -> None:
        with pytest.raises(InputError) as caught:
            check_plan(contract(**changes))
        assert caught.value.code == code

    @pytest.mark.parametrize("noise", ["0.249", "0." + "0" * 98 + "1", "0.3"])
    def test_noise_that_protects_nobody_is_no_number(self, noise: str) -> None:
        assert not epsilon_central(D(noise), DELTA, 1000).is_finite()
        with pytest.raises(InputError, match="more than 100"):
            check_plan(
                contract(privacy__noise_multiplier=D(noise))
                if noise != "0.3"
                else contract(privacy__noise_multiplier=D(noise), training__rounds=1000)
            )

    def test_a_charge_beyond_all_digits_is_infinite(self) -> None:
        hardly = "0." + "0" * 98 + "1"
        assert not attempt_rdp(contract(privacy__noise_multiplier=D(hardly)), D(9)).is_finite()

    def test_each_trust_model_has_its_accountant(self) -> None:
        assert accountant("client-level-at-the-operator") == CENTRAL_ACCOUNTANT
        assert accountant("record-level-at-each-participant") == ACCOUNTANT

    def test_a_row_is_charged_for_two_updates_that_lie_twice_the_norm_apart(self) -> None:
        """Rényi divergence alpha (2 C)^2 / (2 sigma^2 C^2): four times that of an update against zeros."""
        for alpha in (D("4.3"), D(9)):
            exact = 4 * alpha / (2 * D("3.723") ** 2)
            assert 0 <= attempt_rdp(contract(), alpha) - exact < D("1e-8")


class TestDraft:
    @pytest.fixture
    def world(self, tmp_path: Path) -> Operator:
        world = operator(tmp_path)
        world.admit(*(an_enterprise(number) for number in (1, 2, 3)))
        return world

    def draft(self, world: Operator, template: str) -> Contract:
        path = world.home.path.parent / "validation.csv"
        path.write_text("age,sex,ill\n" + "".join(f"{20 + i},f,{('no', 'yes')[i % 2]}\n" for i in range(20)))
        return new(world.home, world.database, template, ValidationFile(path=path), now=NOW)

    def test_noise_and_accountant_are_worked_out(self, world: Operator) -> None:
        made = self.draft(world, central_toml(TEMPLATE))
        assert made.privacy.accountant == CENTRAL_ACCOUNTANT
        assert made.privacy.noise_multiplier == solve_central_noise(D(2), DELTA, 2)
        check_plan(made)

    def test_a_template_that_pays_by_contribution_is_refused(self, world: Operator) -> None:
        paying = central_toml(TEMPLATE).replace("contribution_weight = 0\n", "contribution_weight = 0.7\n")
        with pytest.raises(InputError) as caught:
            self.draft(world, paying)
        assert caught.value.code == "CONTRACT_CENTRAL_PAYOUT"
        assert caught.value.remedy

    def test_the_documented_template_becomes_one_by_what_its_comments_say(self) -> None:
        documented = (Path(__file__).parents[2] / "configs" / "contract.toml").read_text()
        changed = central_toml("\n".join(line for line in documented.splitlines() if not line.startswith("#")))
        comments = " ".join(line.strip("# ") for line in documented.splitlines() if line.startswith("#"))
        for line in (
            "client-level-at-the-operator",
            "uniform-mean",
            "unanimity",
            "max_update_norm",
            "contribution_weight = 0",
        ):
            assert line in comments
            assert line in changed


SCHEMA = plain_schema(6, 3)


def training(norm: str, rate: str = "0.5") -> Contract:
    changes: dict[str, Any] = {"training__local_steps": 3, "training__learning_rate": rate}
    plain = training_contract(SCHEMA, a_model(), (40, 60, 80)).plain()
    own = {"privacy__max_update_norm": norm, "privacy__sample_rate": "0.25", "privacy__delta": DELTA}
    return Contract.parse(change(plain, CENTRAL | changes | own, "__"))


class TestTraining:
    base = initial_weights(a_model(), SCHEMA, np.random.default_rng(0))
    examples = random_examples(np.random.default_rng(2), 60, 6, 3)

    def test_it_is_plain_sgd_on_poisson_batches(self) -> None:
        update = local_update(training("1000"), self.base, self.examples, FixedNoise(1))
        module, noise = build_module(a_model(), SCHEMA), FixedNoise(1)
        load_flat(module, self.base)
        for _ in range(3):
            drawn = np.flatnonzero(noise.uniform(60) < 0.25)
            x, y = torch.from_numpy(self.examples.x[drawn]), torch.from_numpy(self.examples.y[drawn])
            module.zero_grad()
            functional.cross_entropy(module(x), y, reduction="sum").backward()
            with torch.no_grad():
                for p in module.parameters():
                    assert p.grad is not None
                    p -= 0.5 / (0.25 * 60) * p.grad
        np.testing.assert_allclose(update, flatten(module) - self.base, rtol=1e-5, atol=1e-8)

    def test_the_whole_update_is_clipped_and_keeps_its_direction(self) -> None:
        whole = local_update(training("1000"), self.base, self.examples, FixedNoise(1)).astype(float)
        short = local_update(training("0.01"), self.base, self.examples, FixedNoise(1)).astype(float)
        assert np.linalg.norm(whole) > 0.1
        assert np.linalg.norm(short) == pytest.approx(0.01, rel=1e-6)
        np.testing.assert_allclose(short / 0.01, whole / np.linalg.norm(whole), rtol=1e-4, atol=1e-7)

    def test_what_is_not_finite_is_refused(self) -> None:
        with pytest.raises(FailedError) as caught:
            local_update(training("0.01"), np.full_like(self.base, 1e308), self.examples, FixedNoise(1))
        assert caught.value.code == "TRAINING_NOT_FINITE"
        assert not np.isfinite(clipped(np.array([np.nan, 1.0]), 1.0)).all()
        assert not np.isfinite(clipped(np.array([np.inf, 1.0]), 1.0)).all()


class Silence(FixedNoise):
    """No noise at all."""

    def normal(self, n: int) -> Any:
        return np.zeros(n)


class TestAggregation:
    terms = contract(training__server_rate=D(2))

    def mean(self, updates: list[Any], noise: Any) -> Any:
        return noised_mean(updates, self.terms, central(self.terms), noise)

    def test_noise_and_mean_are_the_contracts(self) -> None:
        """eta / N times the sum, and noise of eta sigma C / N in each coordinate, whatever the updates are."""
        size = 400_000
        update = np.full(size, float(NORM) / size**0.5, "f4")
        step = self.mean([update] * 3, FixedNoise(3)) - self.mean([update] * 3, Silence(0))
        deviation = 2 * 3.723 * 0.5 / 3
        assert abs(step.mean()) < 6 * deviation / size**0.5
        assert abs(step.std() / deviation - 1) < 6 / (2 * size) ** 0.5
        other = self.mean([update], FixedNoise(3)) - self.mean([update], Silence(0))
        np.testing.assert_allclose(step, other, atol=1e-12)
        np.testing.assert_allclose(self.mean([update] * 3, Silence(0)), 2 * update, rtol=1e-5)

    def test_whoever_is_missing_counts_as_zeros(self) -> None:
        one = np.array([0.3, -0.1, 0.2], "f4")
        zeros = np.zeros(3, "f4")
        np.testing.assert_array_equal(self.mean([one], Silence(0)), self.mean([one, zeros, zeros], Silence(0)))
        np.testing.assert_allclose(self.mean([one], Silence(0)), 2 * one / 3, rtol=1e-6)

    def test_one_update_moves_the_sum_by_the_norm_at_most(self) -> None:
        """Also where its participant did not clip it."""
        others = [np.array([0.1, 0.2, -0.3], "f4")] * 2
        for huge in (np.array([1e30, -1e30, 3.0], "f4"), np.array([0.4, 0.3, 0.0], "f4")):
            moved = self.mean([*others, huge], Silence(0)) - self.mean([*others, huge * 0], Silence(0))
            assert np.linalg.norm(moved) * 3 / 2 <= float(NORM) * (1 + 1e-12)

    def test_nothing_is_no_mean(self) -> None:
        with pytest.raises(FailedError, match="AGGREGATION_EMPTY"):
            self.mean([], Silence(0))


@pytest.fixture(autouse=True)
def resend_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)


@pytest.fixture
def federation(tmp_path: Any) -> Federation:
    return make_federation(tmp_path, **CENTRAL)


class Counted(FixedNoise):
    """How many numbers were drawn."""

    drawn = 0

    def normal(self, n: int) -> Any:
        self.drawn += n
        return super().normal(n)


def aggregated(federation: Federation) -> list[RoundAggregated]:
    bodies = [entry.open() for entry in federation.entries()]
    return [body for body in bodies if isinstance(body, RoundAggregated)]


def resigned(federation: Federation, ready: Any, array: bytes) -> tuple[bytes, bytes]:
    """The reply with another array, as Enterprise 2 signs it."""
    reply = Reply.from_bytes(ready.reply)
    assert reply.update is not None
    update = Update.from_bytes(reply.update.body).model_copy(update={"update_digest": update_digest(array)})
    key = federation.agent(2).desk.run_key
    return Reply(update=sign(update, key), countersignature=reply.countersignature).to_bytes(), array


class CrashError(Exception):
    pass


class TestRun:
    def test_the_log_has_one_noised_model_a_round_and_nothing_of_an_update(self, federation: Federation) -> None:
        loop, noise = federation.loop(), Counted(7)
        loop.noise = noise
        assert loop.run() == "completed"
        assert noise.drawn == 3 * 650
        found = aggregated(federation)
        assert {body.noise for body in found} == {"test"}, "what verification refuses"
        before = load_model(federation.home, federation.contract.model.initial_digest)
        reference, terms = FixedNoise(7), central(federation.contract)
        for number, body in enumerate(found, start=1):
            after = load_model(federation.home, body.model_digest)
            outcomes = self.outcomes(federation, number).items()
            admitted = {p: row.update_digest for p, row in outcomes if row.kind == "admitted"}
            updates = list(loop._updates(admitted).values())
            assert len(updates) == 4
            assert all(np.linalg.norm(u.astype(float)) <= float(NORM) * (1 + 1e-6) for u in updates)
            np.testing.assert_array_equal(
                after, before + noised_mean(updates, federation.contract, terms, reference), strict=True
            )
            before = after
        for agent in federation.agents.values():
            rows = agent.desk.store.rows(agent.desk.data_set)
            assert [row.state for row in rows] == ["reserved", "spent"] * 3
            alpha = agent.desk.store.data_set(agent.desk.data_set).alpha
            assert {row.rdp for row in rows} == {attempt_rdp(federation.contract, alpha)}

    @staticmethod
    def outcomes(federation: Federation, number: int) -> Any:
        from fedpact_server.run_state import outcomes

        with federation.database.read() as connection:
            return outcomes(connection, federation.contract.id, number)

    def test_a_digest_in_the_log_tells_nothing_of_a_guess(self, federation: Federation) -> None:
        """Two agents with the same values sign different digests; the values alone give neither."""
        seen: list[bytes] = []
        federation.agent(2).tamper = lambda ready: (seen.append(ready.array), (ready.reply, ready.array))[1]
        federation.loop().run()
        assert len({array[-SALT_BYTES:] for array in seen}) == len(seen) == 3
        assert {len(array) for array in seen} == {4 * 650 + SALT_BYTES}
        logged = {row.update_digest for number in (1, 2, 3) for row in self.outcomes(federation, number).values()}
        assert {update_digest(array) for array in seen} <= logged
        assert not {update_digest(array[:-SALT_BYTES]) for array in seen} & logged

    @pytest.mark.parametrize(
        ("scale", "cut", "outcome"),
        [
            (1.0, 0, ("admitted", "ADMITTED")),
            (1.001, 0, ("rejected", "UPDATE_NORM")),
            (1.0, SALT_BYTES, ("rejected", "UPDATE_SHAPE")),
        ],
    )
    def test_only_a_clipped_update_is_admitted(
        self, federation: Federation, scale: float, cut: int, outcome: tuple[str, str]
    ) -> None:
        def tamper(ready: Any) -> tuple[bytes, bytes]:
            if Reply.from_bytes(ready.reply).update is None:  # later: the receipt was not for what it had sent
                return ready.reply, ready.array
            numbers, salt = ready.array[:-SALT_BYTES], ready.array[-SALT_BYTES:]
            exact = np.frombuffer(numbers, "<f4").astype(float)
            exact *= scale * float(NORM) / np.linalg.norm(exact)
            array = exact.astype("<f4").tobytes() + salt
            return resigned(federation, ready, array[: len(array) - cut])

        federation.agent(2).tamper = tamper
        assert federation.run() == "completed"
        assert federation.outcomes(1)["Enterprise 2"] == outcome

    @pytest.mark.parametrize("after", ["noise drawn", "model stored", "aggregated", "evaluated"])
    def test_a_crash_releases_no_second_model(
        self, federation: Federation, monkeypatch: pytest.MonkeyPatch, after: str
    ) -> None:
        names = {"noise drawn": "write_array", "model stored": "store_model"}
        name, calls = names.get(after, "set_phase"), []
        original = getattr(rounds, name)

        def crash(*args: Any) -> Any:
            result = original(*args)
            if name == "set_phase":
                if args[2:] != (2, after):
                    return result
                args[0].commit()
            calls.append(args)
            if name != "set_phase" and len(calls) != 2:  # the second round's
                return result
            raise CrashError

        bases: dict[int, set[str]] = {}

        def watch(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes]:
            found = Order.from_bytes(read_envelope(order).body)
            bases.setdefault(found.round, set()).add(found.base_digest)
            return order, model

        federation.transport.before = watch
        loop, noise = federation.loop(), Counted(5)
        loop.noise = noise
        with monkeypatch.context() as patched:
            patched.setattr(rounds, name, crash)
            with pytest.raises(Exception):  # noqa: B017 - ours, or the transaction's that was cut off
                loop.run()
        federation.take_over("2")
        second = federation.loop(driver="2")
        second.noise = noise
        assert second.run() == "completed"
        assert noise.drawn == 3 * 650, "the noise of a round is drawn once"
        models = {path.stem for path in (federation.home / "models").glob("*.f8")}
        released = [body.model_digest for body in aggregated(federation)]
        assert len(released) == 3
        assert models == {federation.contract.model.initial_digest, *released}
        assert [bases[n] for n in (2, 3)] == [{released[0]}, {released[1]}]

    def test_flowers_accountant_stops_a_run_that_would_exceed(
        self, federation: Federation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []

        def refuses(_contract: Contract, _privacy: ClientPrivacy, released: int) -> bool:
            asked.append(released)
            return released == 2

        monkeypatch.setattr(flower_accountant, "would_exceed", refuses)
        assert federation.run() == "stopped"
        assert asked == [0, 1, 2]
        with federation.database.read() as connection:
            assert run_row(connection, federation.contract.id).detail == "RUN_PRIVACY_EXHAUSTED"
        assert [body.round for body in aggregated(federation)] == [1, 2]

    def test_a_plan_with_too_little_noise_opens_no_round(self, tmp_path: Any) -> None:
        federation = make_federation(tmp_path, **CENTRAL | {"privacy__noise_multiplier": D("3.6")})
        assert federation.run() == "stopped"
        assert "round-opened" not in federation.kinds()

    def test_an_agent_that_does_not_allow_it_sends_nothing(self, tmp_path: Any) -> None:
        only = {"trust_models": ["record-level-at-each-participant"]}
        federation = make_federation(tmp_path, policy={1: only}, **CENTRAL)
        federation.run()
        assert federation.outcomes(1)["Enterprise 2"] == ("refused", "POLICY_TRUST_MODEL")
        assert federation.agent(2).desk.store.rows(federation.agent(2).desk.data_set) == ()


class TestScores:
    def test_a_score_of_a_smaller_group_is_a_fault(self) -> None:
        """It would have been read off updates without noise."""
        found = contract()
        scores = linear_round(found, [[10], [20], [30]])
        with pytest.raises(FaultError) as caught:
            check_scores(scores, found)
        assert caught.value.code == "SCORES_SHAPE"
        whole = RoundScores(round=1, players=scores.players, losses=((90,), (60,)), correct=(0, 0))
        check_scores(whole, found)
        assert set(period_values([whole], found).values()) == {Fraction(30, 3 * 50)}
        assert set(leave_one_out([whole], found).values()) == {Fraction(30, 50)}

    def test_there_may_be_many_of_whom_nobody_is_scored(self) -> None:
        many = change(a_contract([100] * 12, rounds=3).plain(), CENTRAL | {"privacy__delta": DELTA}, "__")
        keys = [f"{i:064x}" for i in range(201)]
        many["participants"] = [
            many["participants"][0] | {"key": key, "entity_code": f"{i:018d}", "data_set": f"set-{i}"}
            for i, key in enumerate(keys)
        ]
        with pytest.raises(InputError) as caught:
            Contract.parse(many)
        assert caught.value.code == "CONTRACT_TOO_MANY_PLAYERS"
        many["participants"].pop()
        assert len(Contract.parse(many).participants) == 200


@pytest.fixture
def run(tmp_path: Any) -> ClosedRun:
    return closed_run(tmp_path, **CENTRAL)


class TestClosed:
    def test_a_run_is_settled_by_data_and_presence_and_verifies(self, run: ClosedRun) -> None:
        result = run.settle(1_000_000)
        counts = [p.num_examples for p in run.federation.contract.by_id().values()]
        exact = [600_000 * n / sum(counts) + 100_000 for n in counts]
        assert all(abs(line.fen - due) <= 1 for line, due in zip(result.lines, exact, strict=True))
        assert sum(line.fen for line in result.lines) == 1_000_000
        for number in (1, 2, 3, 4):
            with run.client(number) as client:
                assert close(run.federation.agent(number).desk, client)[0] == "countersigned"
        report = run.verified()
        assert (report.exit_code, report.status, report.faults) == (0, "closed", ())
        bodies = [entry.open() for entry in run.federation.entries()]
        scored = [body.scores for body in bodies if isinstance(body, ScoresOpened)]
        assert [len(scores.losses) for scores in scored] == [2, 2]
        assert scored[1].losses[0] == scored[0].losses[-1]

    def test_the_report_counts_the_released_models_and_says_what_is_not_protected(self, run: ClosedRun) -> None:
        run.settle(1_000_000)
        report = build(run.federation.entries())
        assert {party["steps"] for party in report["participants"]} == {2}
        assert report["not_stopped"] == [*CENTRAL_NOT_STOPPED, *NOT_STOPPED[1:]]
        english, chinese = page(report, "en"), page(report, "zh")
        for words in ("client level, at the operator", "Not protected from", "Contribution was not measured"):
            assert words in english
        for words in ("参与方级，由运营方加噪", CENTRAL_NOT_STOPPED_ZH[0], "未度量贡献"):
            assert words in chinese

    @pytest.mark.parametrize("said", [None, "test"])
    def test_an_operator_that_does_not_say_that_it_added_noise_is_at_fault(
        self, run: ClosedRun, said: str | None
    ) -> None:
        from fedpact_contract.evidence import unpack
        from fedpact_contract.trust import Trust

        run.settle(1_000_000)

        def without(bodies: list[Any]) -> list[Any]:
            return [b.model_copy(update={"noise": said}) if isinstance(b, RoundAggregated) else b for b in bodies]

        files = {name: text.encode() for name, text in run.rewritten(without).items()}
        report = verify(unpack(files), Trust.of(run.federation.contract))
        assert {fault["party"] for fault in report.faults if fault["code"] == "MODEL_NOISE"} == {"Operator"}
