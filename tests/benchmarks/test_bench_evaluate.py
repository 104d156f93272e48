"""Speed of a round's evaluation. The bound holds on two idle cores with room to spare; the fastest run counts."""

import numpy as np
import pytest
from tests.support.models_kit import a_model, plain_schema, random_examples

from fedpact_models.evaluate import evaluate_round
from fedpact_models.registry import parameter_count


def _setting(hidden: tuple[int, ...], features: int, players: int):
    rng = np.random.default_rng(0)
    schema, model = plain_schema(features, 10), a_model(*hidden)
    count = parameter_count(model, schema)
    base, steps = rng.normal(size=count) * 0.05, rng.normal(size=(players, count)) * 0.01
    return model, schema, base, steps, random_examples(rng, 1000, features, 10)


@pytest.mark.benchmark(group="evaluate_round")
def test_four_players_of_an_mlp_of_262_thousand_parameters_and_a_thousand_rows(benchmark) -> None:
    """784-330-10, 16 coalitions, float64: 0.11 s seen on two cores (plain products, not reproducible: 0.05 s)."""
    setting = _setting((330,), 784, 4)
    result = benchmark.pedantic(
        evaluate_round, args=(*setting, [1000]), kwargs={"own_slice": [None] * 4}, rounds=5, warmup_rounds=1
    )
    assert len(result.losses) == 16
    assert benchmark.stats.stats.min < 0.3


@pytest.mark.benchmark(group="evaluate_round")
def test_twelve_players_of_a_linear_model(benchmark) -> None:
    """64-10, 4,096 coalitions, a thousand rows: the most that a contract may ask for; 0.3 s seen on two cores."""
    setting = _setting((), 64, 12)
    result = benchmark.pedantic(
        evaluate_round, args=(*setting, [1000]), kwargs={"own_slice": [None] * 12}, rounds=3, warmup_rounds=1
    )
    assert len(result.losses) == 4096
    assert benchmark.stats.stats.min < 1.5
