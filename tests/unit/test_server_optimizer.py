"""FedOpt servers: the step is Flower's, a sum over participants, and the game is scored by each one's momentum."""

import tracemalloc
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedYogi
from numpy.typing import NDArray
from tests.support.closed_run import EVERYBODY_IS_PAID, open_run
from tests.support.federation import Federation, make_federation
from tests.support.settlement_kit import a_contract

from fedpact_contract.contract import Contract
from fedpact_contract.contribution import (
    admitted_in,
    check_scores,
    period_values,
    players_of,
    round_values,
    total_value,
)
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.log import RoundScores
from fedpact_contract.shares import unopened_shares
from fedpact_contract.text import render
from fedpact_models import aggregation
from fedpact_server import closing, scoring
from fedpact_server.run_state import load_model

ADAM = {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.001"}
YOGI = ADAM | {"kind": "yogi"}
ADAGRAD = {"kind": "adagrad", "beta_1": 0, "beta_2": 0, "tau": "0.001"}
FLOWER = {"adam": FedAdam, "yogi": FedYogi, "adagrad": FedAdagrad}


def with_optimizer(optimizer: Mapping[str, Any] | None) -> Contract:
    plain = a_contract().plain()
    plain["training"] |= {"server_rate": "0.1"} | ({} if optimizer is None else {"server_optimizer": optimizer})
    return Contract.parse(plain)


def some_updates(contract: Contract, number: int, size: int = 40) -> dict[str, NDArray[np.float32]]:
    """Of everybody, but in round 2 the first participant is absent and in round 3 the last."""
    rng = np.random.default_rng(number)
    ids = list(contract.by_id())
    drawn = {p: rng.normal(size=size).astype(np.float32) for p in ids}
    for round_, absent in ((2, ids[0]), (3, ids[-1])):
        if number == round_:
            del drawn[absent]
    return drawn


@pytest.mark.parametrize("optimizer", [ADAM, YOGI, ADAGRAD], ids=lambda o: o["kind"])
def test_the_step_is_that_of_flowers_strategy(optimizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    contract = with_optimizer(optimizer)
    betas = {} if optimizer["kind"] == "adagrad" else {"beta_1": 0.9, "beta_2": 0.99}
    flower = FLOWER[optimizer["kind"]](eta=0.1, tau=0.001, **betas)
    model, memory = np.zeros(40), aggregation.START
    for number in range(1, 6):
        updates = some_updates(contract, number)
        counts = {p: contract.participant(p).num_examples for p in updates}
        mean = sum(u.astype(float) * counts[p] for p, u in updates.items()) / sum(counts.values())
        averaged = ArrayRecord({"w": Array(model + mean)})
        monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_, a=averaged: (a, MetricRecord()))
        flower.current_arrays = {"w": model}
        expected, _ = flower.aggregate_train(number, [])
        steps, memory = aggregation.server_steps(contract, updates, memory)
        model = aggregation.apply(model, steps.values())
        assert expected is not None
        np.testing.assert_allclose(model, expected["w"].numpy(), rtol=1e-9, atol=1e-12)


def test_momenta_are_not_all_in_memory_at_once() -> None:
    size, contract = 250_000, with_optimizer(ADAM)
    updates = some_updates(contract, 1, size)
    memory = aggregation.START
    tracemalloc.start()
    try:
        for _ in range(3):
            steps, memory = aggregation.server_steps(contract, updates, memory)
            assert len(memory.momenta) == len(updates)
            aggregation.apply(np.zeros(size), steps.values())
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < 3 * 8 * size, "the second moment and the scale of the step; of each participant nothing"


@pytest.mark.parametrize(("optimizer", "absent_too"), [(ADAM, True), (YOGI, True), (ADAGRAD, False)])
def test_whoever_moved_the_model_before_is_a_player_where_momentum_is_kept(
    optimizer: dict[str, Any], absent_too: bool
) -> None:
    contract = with_optimizer(optimizer)
    memory, admitted = aggregation.START, []
    for number in (1, 2):
        updates = some_updates(contract, number)
        admitted.append(sorted(updates))
        steps, memory = aggregation.server_steps(contract, updates, memory)
        assert tuple(steps) == players_of(contract, admitted)
    assert (len(steps), len(admitted[1])) == (3 if absent_too else 2, 2)


def test_without_an_optimizer_the_steps_are_the_weighted_updates() -> None:
    contract = with_optimizer(None)
    updates = some_updates(contract, 1)
    steps, memory = aggregation.server_steps(contract, updates, aggregation.START)
    counts = {p: contract.participant(p).num_examples for p in updates}
    np.testing.assert_array_equal(
        np.stack(list(steps.values())),
        np.stack([u.astype(float) * (0.1 * counts[p] / sum(counts.values())) for p, u in sorted(updates.items())]),
    )
    assert (memory.round, memory.momenta) == (1, {})


def test_a_participant_that_sends_zeros_moves_nothing() -> None:
    contract = with_optimizer(ADAM)
    updates = some_updates(contract, 1)
    nobody = sorted(updates)[1]
    updates[nobody] = np.zeros(40, np.float32)
    steps, _ = aggregation.server_steps(contract, updates, aggregation.START)
    assert not steps[nobody].any()


def test_nothing_is_added_up_to_a_step() -> None:
    with pytest.raises(Exception, match="no update") as caught:
        aggregation.server_steps(with_optimizer(ADAM), {}, aggregation.START)
    assert getattr(caught.value, "code", "") == "AGGREGATION_EMPTY"


@pytest.mark.parametrize(
    ("optimizer", "code", "field"),
    [
        (ADAM | {"beta_1": 1}, "CONTRACT_BETA", "training.server_optimizer.beta_1"),
        (YOGI | {"beta_2": "-0.1"}, "CONTRACT_BETA", "training.server_optimizer.beta_2"),
        (ADAGRAD | {"beta_1": "0.9"}, "CONTRACT_BETA", "training.server_optimizer.beta_1"),
        (ADAM | {"tau": 0}, "CONTRACT_NOT_POSITIVE", "training.server_optimizer.tau"),
        (ADAM | {"kind": "sgd"}, "CONTRACT", "training.server_optimizer.kind"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(optimizer: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(InputError) as caught:
        with_optimizer(optimizer)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_the_contracts_text_says_how_the_server_steps() -> None:
    text = render(with_optimizer(ADAM))
    assert 'the server\'s optimizer "adam" steps by (rate 0.1, beta_1 0.9, beta_2 0.99, tau 0.001)' in text
    assert "parts of the server's momentum" in text
    plain = render(with_optimizer(None))
    assert "server's optimizer" not in plain
    assert "momentum" not in plain


def step_through(federation: Federation, *, anew: bool) -> list[RoundScores]:
    """Run to the end, Enterprise 2 away in round 2. `anew`: with another process's loop in every step."""
    from fedpact_server import db

    loop, driver = federation.loop(), 1
    nodes = federation.transport.agents.items()
    absent = {node for node, agent in nodes if agent is federation.agent(2)}
    while True:
        with federation.database.read() as connection:
            done = connection.execute(db.rounds.select().where(db.rounds.c.phase == "committed")).all()
        federation.transport.offline = absent if len(done) == 1 else set()
        if anew:
            driver += 1
            federation.take_over(str(driver))
            loop = federation.loop(str(driver))
        if loop._step() != "running":
            break
    with federation.database.read() as connection:
        return [scores for _, scores in scoring.all_scores(connection, federation.contract.id)]


class TestRun:
    @pytest.fixture
    def federation(self, tmp_path: Path) -> Federation:
        """Three rounds of FedAdam on the digits."""
        return make_federation(
            tmp_path,
            training__rounds=3,
            training__local_steps=2,
            training__server_rate=Decimal("0.05"),
            training__server_optimizer={"kind": "adam", "beta_1": Decimal("0.9"), "beta_2": Decimal("0.99"), "tau": 1},
        )

    @pytest.mark.parametrize("anew", [False, True])
    def test_the_values_add_up_to_the_fall_of_the_loss_and_verify(
        self, federation: Federation, anew: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fedpact_server.rounds.GATHER_SECONDS", 0.05)
        contract = federation.contract
        rounds = step_through(federation, anew=anew)
        absent = federation.agent(2).desk.participant
        assert [absent in admitted_in(scores) for scores in rounds] == [True, False, True]
        assert all(absent in scores.players for scores in rounds)
        assert round_values(rounds[1], contract)[absent] != 0, "its momentum still moves the model"
        assert sum(period_values(rounds, contract).values()) == total_value(rounds, contract)
        with federation.database.write() as connection:
            result = closing.settle(connection, contract, federation.operator_run_key, 100_000, 0)
        lines = {line.participant: line.share.rounds_admitted for line in result.lines}
        assert lines[absent] == 2
        assert set(lines.values()) == {2, 3}

    def test_the_models_are_those_of_the_optimizer(
        self, federation: Federation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fedpact_contract.log import RoundAggregated

        monkeypatch.setattr("fedpact_server.rounds.GATHER_SECONDS", 0.05)
        step_through(federation, anew=True)
        federation.take_over("99")
        loop, contract = federation.loop("99"), federation.contract
        model, memory = load_model(federation.home, contract.model.initial_digest), aggregation.START
        bodies = [e.open() for e in federation.entries()]
        for body in (b for b in bodies if isinstance(b, RoundAggregated)):
            with federation.database.read() as connection:
                admitted = loop._admitted(connection, body.round)
            steps, memory = aggregation.server_steps(contract, loop._updates(admitted), memory)
            model = aggregation.apply(model, steps.values())
            np.testing.assert_array_equal(model, load_model(federation.home, body.model_digest))


def scores_with(contract: Contract, **changes: Any) -> RoundScores:
    ids = tuple(contract.by_id())
    values: dict[str, Any] = {"round": 1, "players": ids, "losses": ((9,),) * 8, "correct": (0, 0)} | changes
    return RoundScores(**values)


@pytest.mark.parametrize(
    ("optimizer", "admitted", "right"),
    [(ADAM, (0, 1), True), (ADAM, None, False), (None, (0, 1), False), (ADAGRAD, (0, 1), False), (None, None, True)],
)
def test_who_was_admitted_stands_beside_the_players_only_with_momentum(
    optimizer: dict[str, Any] | None, admitted: tuple[int, ...] | None, right: bool
) -> None:
    contract = with_optimizer(optimizer)
    names = None if admitted is None else tuple(list(contract.by_id())[i] for i in admitted)
    scores = scores_with(contract, admitted=names)
    if right:
        check_scores(scores, contract)
        return
    with pytest.raises(FaultError) as caught:
        check_scores(scores, contract)
    assert caught.value.code == "SCORES_PLAYERS"


def test_rounds_admitted_are_counted_alike_where_scores_are_lost() -> None:
    contract = with_optimizer(ADAM)
    ids = list(contract.by_id())
    found = unopened_shares(contract, [ids, ids[1:]])
    assert [line.rounds_admitted for line in found.lines] == [1, 2, 2]


ADAM_RUN = {
    "training__server_rate": Decimal("0.05"),
    "training__server_optimizer": {"kind": "adam", "beta_1": Decimal("0.9"), "beta_2": Decimal("0.99"), "tau": 1},
}


def test_the_evidence_of_such_a_run_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.GATHER_SECONDS", 0.05)
    run = open_run(tmp_path, **({"training__rounds": 2} | EVERYBODY_IS_PAID | ADAM_RUN))
    rounds = step_through(run.federation, anew=True)
    assert [len(admitted_in(scores)) for scores in rounds] == [4, 3]
    run.settle()
    assert run.verified().faults == ()


@pytest.mark.parametrize("changed", ["players", "admitted"])
def test_other_players_than_those_that_moved_the_model_are_a_fault(
    tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that leaves one out, or counts one as admitted that was not, from the commitment on."""
    right = scoring.score_round

    def wrong(contract: Contract, number: int, admitted: Mapping[str, str], *rest: Any) -> Any:
        scores, values = right(contract, number, admitted, *rest)
        if number == 2 and changed == "admitted":
            scores = scores.model_copy(update={"admitted": scores.players[1:]})
        elif number == 2:
            three = {"players": scores.players[:3], "admitted": scores.players[:3], "losses": scores.losses[:8]}
            scores = scores.model_copy(update=three | {"first_order": (scores.first_order or ())[:3]})
            values = values[:3]
        return scores, values

    monkeypatch.setattr(scoring, "score_round", wrong)
    run = open_run(tmp_path, **({"training__rounds": 2} | EVERYBODY_IS_PAID | ADAM_RUN))
    assert run.federation.run() == "completed"
    run.settle()
    (fault, *_) = [fault for fault in run.verified().faults if fault["code"] == "SCORES_PLAYERS"]
    assert fault["field"].endswith(f"scores.{changed}")
