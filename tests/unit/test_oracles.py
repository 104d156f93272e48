"""The oracles of the accounting through what a round does: steps, scores, values. Draws where there are many players.

Equal twins, a null player, other names, what adds up; the estimators and the evaluation have theirs by themselves.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.models_kit import plain_schema, random_examples
from tests.support.settlement_kit import a_contract

from fedpact_contract.contract import Contract
from fedpact_contract.contribution import monte_carlo, period_values, round_values, total_value
from fedpact_contract.log import RoundScores
from fedpact_models import aggregation
from fedpact_models.evaluate import evaluate
from fedpact_models.features import Examples
from fedpact_models.registry import parameter_count
from fedpact_server import scoring

SCHEMA, ROWS, ROUNDS = plain_schema(6, 3), 90, 3
EXAMPLES: Examples = random_examples(np.random.default_rng(0), ROWS, 6, 3)
ADAM = {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.01"}
OPTIMIZERS: dict[str, dict[str, Any] | None] = {
    "FedAvg": None,
    "FedAdam": ADAM,
    "FedYogi": ADAM | {"kind": "yogi"},
    "FedAdagrad": {"kind": "adagrad", "beta_1": 0, "beta_2": 0, "tau": "0.01"},
    "FedAdam without momentum": ADAM | {"beta_1": 0},
}
Updates = Callable[[int], Sequence[np.ndarray | None]]
"""By round: the update of each place in the contract, None of whoever is away."""


def contract_of(
    players: int = 5, *, optimizer: Mapping[str, Any] | None = None, label: str = "kit", hidden: Sequence[int] = ()
) -> Contract:
    plain = a_contract([100] * min(players, 12), rounds=ROUNDS, label=label, slices=((None, ROWS),)).plain()
    kind = "mlp" if hidden else "softmax"
    plain |= {"data": SCHEMA.plain(), "model": {"kind": kind, "hidden": hidden, "initial_digest": "0" * 64}}
    for i in range(players - 12):
        more = {"name": f"more {i}", "key": f"{i + 1:064x}", "entity_code": f"{900 + i:018d}", "data_set": f"more-{i}"}
        plain["participants"].append(plain["participants"][0] | more)
    plain["training"] |= {"server_rate": "0.5"} | ({} if optimizer is None else {"server_optimizer": optimizer})
    if players > 12:
        plain["contribution"] |= {"estimator": "sampled", "max_coalitions": 2000}
    return Contract.parse(plain)


def drawn(contract: Contract, players: int = 5) -> Updates:
    count = parameter_count(contract.model, contract.data)
    return lambda number: list(np.random.default_rng(number).normal(size=(players, count)).astype(np.float32))


def rounds_of(contract: Contract, updates: Updates) -> tuple[list[RoundScores], list[np.ndarray]]:
    """The scores of the contract's rounds, and the models, one more than there are rounds."""
    ids, memory, rounds = list(contract.by_id()), aggregation.START, list[RoundScores]()
    models = [np.random.default_rng(99).normal(size=parameter_count(contract.model, contract.data)) * 0.1]
    for number in range(1, ROUNDS + 1):
        there = {i: u for i, u in zip(ids, updates(number), strict=True) if u is not None}
        steps, memory = aggregation.server_steps(contract, there, memory)
        digests = {i: f"{number}{k:063x}" for k, i in enumerate(there)}
        before = rounds[-1] if rounds else None
        scores, _ = scoring.score_round(contract, number, digests, models[-1], steps, EXAMPLES, before)
        rounds.append(scores)
        models.append(aggregation.apply(models[-1], steps.values()))
    return rounds, models


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_values_add_up_to_the_integer_and_to_the_models_that_were_made(optimizer, hidden) -> None:
    """With somebody away in the second round, and somebody else in the third."""
    contract = contract_of(optimizer=OPTIMIZERS[optimizer], hidden=hidden)
    everybody = drawn(contract)

    def some(number: int) -> list[np.ndarray | None]:
        away = number if number > 1 else None
        return [None if i == away else update for i, update in enumerate(everybody(number))]

    rounds, models = rounds_of(contract, some)
    for scores in rounds:
        fall = Fraction(scores.losses[0][0] - scores.losses[-1][0], ROWS)
        assert sum(round_values(scores, contract).values()) == fall != 0
    assert sum(period_values(rounds, contract).values()) == total_value(rounds, contract)
    tables = [rounds[0].losses[0][0], *(scores.losses[-1][0] for scores in rounds)]
    for model, stored in zip(models, tables, strict=True):
        loss, _ = evaluate(contract.model, contract.data, model, EXAMPLES)
        assert abs(loss * ROWS * 1e9 - stored) <= 2
    values = round_values(rounds[1], contract)
    absent = list(values)[2]
    assert (values[absent] == 0) == (not contract.keeps_momentum)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_equal_twins_are_worth_the_same(optimizer) -> None:
    contract = contract_of(optimizer=OPTIMIZERS[optimizer])
    everybody = drawn(contract)
    rounds, _ = rounds_of(contract, lambda k: [everybody(k)[1 if i == 3 else i] for i in range(5)])
    values = list(period_values(rounds, contract).values())
    assert values[1] == values[3]
    assert len(set(values)) == 4


def test_of_fourteen_equal_twins_are_within_the_interval_of_each_other() -> None:
    contract = contract_of(14, hidden=(4,))
    everybody = drawn(contract, 14)
    rounds, _ = rounds_of(contract, lambda k: [everybody(k)[1 if i == 3 else i] for i in range(14)])
    assert all(scores.sampling is not None for scores in rounds)
    ids, values, halves = list(contract.by_id()), period_values(rounds, contract), monte_carlo(rounds, contract)
    assert halves is not None
    assert values[ids[1]] != values[ids[3]]
    assert abs(values[ids[1]] - values[ids[3]]) <= Fraction(halves[ids[1]]) + Fraction(halves[ids[3]])
    assert sum(values.values()) == total_value(rounds, contract)


@pytest.mark.parametrize("players", [5, 14])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_whoever_sends_zeros_is_worth_exactly_nothing(optimizer, players) -> None:
    contract = contract_of(players, optimizer=OPTIMIZERS[optimizer], hidden=(4,))
    everybody = drawn(contract, players)
    rounds, _ = rounds_of(contract, lambda k: [u * (i != 2) for i, u in enumerate(everybody(k))])
    values, halves = period_values(rounds, contract), monte_carlo(rounds, contract)
    null = list(contract.by_id())[2]
    assert [p for p, value in values.items() if value == 0] == [null]
    assert halves is None or halves[null] == 0


@pytest.mark.parametrize("optimizer", ["FedAvg", "FedAdam"])
def test_other_keys_in_another_order_move_no_value(optimizer) -> None:
    """The same updates, of participants whose ids stand in another order."""
    one, other = (contract_of(optimizer=OPTIMIZERS[optimizer], label=label) for label in ("kit", "other"))
    everybody, order = drawn(one), [3, 0, 4, 1, 2]
    first, _ = rounds_of(one, everybody)
    second, _ = rounds_of(other, lambda k: [everybody(k)[i] for i in order])
    values, again = (list(period_values(r, c).values()) for r, c in ((first, one), (second, other)))
    assert not set(one.by_id()) & set(other.by_id())
    drift = 0 if optimizer == "FedAvg" else 1  # the server's sum over participants is one of floats
    assert max(abs(a - values[i]) for a, i in zip(again, order, strict=True)) <= drift
