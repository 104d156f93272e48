"""The noise floor in hundreds of draws of real updates: what it finds, whom it leaves alone, what the gradient pulls.

The figures of privacy.md: at 8,450 parameters 10 % missing noise is found; at 2,114 half of it, always. And what its
bound does not cover: later gradients answer the noise of earlier steps. How far that lowers an honest update's energy
is measured at the learning rates of our scenarios and far beyond them.
"""

import sys
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
from tests.support.weak_noise import Weak, WeakFixed, a_case, a_ratio

from fedpact_contract.contract import Contract
from fedpact_models.features import Examples, Floats
from fedpact_models.training import local_update
from fedpact_server.noise_floor import energy_ratio, kept, pool_size, pooled

SHAPES = {8450: (30, (256,), 2), 2114: (30, (64,), 2), 650: (64, (), 10)}
DRAWS = 100


def found_of(parameters: int) -> dict[float, tuple[Counter[str], float, float]]:
    """By the part of the noise that was added: outcomes, least and largest ratio."""
    case = a_case(*SHAPES[parameters])
    result = {}
    for factor in (1.0, 0.9, 0.5, 0.25, 0.0):
        ratios = [a_ratio(case, Weak(factor)) for _ in range(DRAWS)]
        outcomes = Counter(str(pooled([ratio], case[0], parameters).outcome) for ratio in ratios)
        result[factor] = (outcomes, min(ratios), max(ratios))
    return result


@pytest.mark.parametrize("parameters", list(SHAPES))
def test_what_is_found_and_whom_it_leaves_alone(benchmark, capsys, parameters) -> None:
    found = benchmark.pedantic(found_of, args=(parameters,), rounds=1)
    with capsys.disabled():
        for factor, (outcomes, low, high) in found.items():
            line = f"{parameters} parameters, noise x {factor}: {dict(outcomes)}, ratio {low:.3f} to {high:.3f}"
            sys.stdout.write(f"\n{line}")
            benchmark.extra_info[f"noise {factor}"] = dict(outcomes)
    assert found[1.0][0] == {"passed": DRAWS}
    for factor in (0.5, 0.25, 0.0) if parameters > 650 else (0.25, 0.0):
        assert found[factor][0] == {"failed": DRAWS}
    if parameters == 8450:  # what is missing is three deviations beyond the floor, with these gradients
        assert found[0.9][0]["failed"] >= 0.95 * DRAWS


def pulled(case: tuple[Contract, Floats, Examples], rounds: int, seed: int) -> list[float]:
    """Ratios of an honest participant's updates in the later half of a run: the drift is over, the pull is not."""
    contract, base, examples = case
    noise, ratios = WeakFixed(seed, 1.0), []
    for _ in range(rounds):
        update = local_update(contract, base, examples, noise).astype(np.float64)
        ratios.append(energy_ratio(update, contract, len(examples)))
        base = base + update / 4  # four participants, of whom this one is the one that is looked at
    return ratios[rounds // 2 :]


PULL = [  # shape, rows, steps, learning rate
    ((64, (), 10), 90, 6, "4"),
    ((10, (), 2), 200, 6, "1"),
    ((64, (), 10), 400, 20, "4"),
    ((64, (), 10), 400, 20, "16"),
    ((64, (), 10), 400, 20, "64"),
    ((10, (), 2), 500, 20, "4"),
    ((10, (), 2), 500, 20, "64"),
    ((64, (32,), 10), 200, 6, "4"),
    ((64, (32,), 10), 400, 20, "16"),
    ((10, (8,), 2), 500, 20, "16"),
]


@pytest.mark.parametrize(("shape", "rows", "steps", "rate"), PULL)
def test_how_much_noise_the_gradient_pulls_back(benchmark, capsys, shape, rows, steps, rate) -> None:
    """Never as much as `kept` allows for; the mean is taken as what it is within four deviations."""
    privacy = {"sample_rate": Decimal("0.2"), "noise_multiplier": Decimal("2.7" if steps == 6 else "1.0")}
    training = {"local_steps": steps, "learning_rate": Decimal(rate), "rounds": 40}
    case = a_case(*shape, rows=rows, privacy=privacy, training=training)
    parameters = len(case[1])
    size, allowed = pool_size(case[0], parameters), kept(case[0], parameters)

    def measure() -> tuple[list[float], Counter[str]]:
        runs = [pulled(case, 40, seed) for seed in range(5)]
        pools = [pooled(run[i : i + size], case[0], parameters) for run in runs for i in range(len(run) - size + 1)]
        return [ratio for run in runs for ratio in run], Counter(str(one.outcome) for one in pools)

    ratios, outcomes = benchmark.pedantic(measure, rounds=1)
    mean, error = float(np.mean(ratios)), float(np.std(ratios)) / len(ratios) ** 0.5
    with capsys.disabled():
        where = f"{parameters} parameters, {steps} steps at learning rate {rate}"
        told = f"mean ratio {mean:.3f}, least {min(ratios):.3f}, allowed {allowed:.3f}"
        sys.stdout.write(f"\n{where}: {told}, pools of {size}: {dict(outcomes)}\n")
    benchmark.extra_info["mean ratio"] = round(mean, 3)
    assert mean + 4 * error >= allowed
    assert "failed" not in outcomes
