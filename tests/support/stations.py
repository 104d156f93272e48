"""Four stations of Beijing's air as a federation in one process, as configs/air/federation.toml has it. No tests."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.support.models_kit import training_contract

from fedpact_contract.contract import Contract, Model
from fedpact_contract.privacy import solve_noise_multiplier
from fedpact_models.aggregation import apply, weighted_steps
from fedpact_models.dp import SystemNoise
from fedpact_models.evaluate import evaluate
from fedpact_models.features import Examples, Floats, encode
from fedpact_models.registry import initial_weights
from fedpact_models.tables import read_table
from fedpact_models.training import local_update
from fedpact_server.demo.scenario import Scenario, of_folder

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Root mean squared errors on the rows held out, in the label's unit."""

    together: float
    pooled: float
    constant: float


def described(folder: Path, source: Path) -> Scenario:
    """What `fedpact demo --data` makes of the description beside links to the data."""
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "air" / "federation.toml", folder)
    for file in source.glob("PRSA_Data_*.csv"):
        (folder / file.name).symlink_to(file)
    return of_folder(folder)


def federate(scenario: Scenario, seed: int) -> Found:
    """One run of the scenario's plan; a twentieth of each station's rows is held out."""
    rng, train, test = np.random.default_rng(seed), [], []
    for enterprise in scenario.enterprises:
        whole = encode(scenario.data, read_table(**enterprise.source), file=enterprise.name)
        order = rng.permutation(len(whole))
        test.append(whole.take(order[: len(whole) // 20]))
        train.append(whole.take(order[len(whole) // 20 :]))
    held_out = _joined(test)
    contract = _contract(scenario, [len(part) for part in train])
    model = initial_weights(contract.model, contract.data, rng)
    counts = {str(k): len(part) for k, part in enumerate(train)}
    for _ in range(contract.training.rounds):
        updates = {str(k): local_update(contract, model, part, SystemNoise()) for k, part in enumerate(train)}
        model = apply(model, weighted_steps(updates, counts, contract.training.server_rate).values())
    rows = _joined(train)
    pooled = np.linalg.lstsq(rows.x, rows.y.astype(np.float64), rcond=None)[0]
    return Found(
        together=_error(contract, model, held_out),
        pooled=_error(contract, pooled, held_out),
        constant=_error(contract, np.append(np.zeros(len(pooled) - 1), rows.y.mean() / rows.x[0, -1]), held_out),
    )


def _joined(parts: list[Examples]) -> Examples:
    return Examples(x=np.concatenate([p.x for p in parts]), y=np.concatenate([p.y for p in parts]))


def _error(contract: Contract, model: Floats, rows: Examples) -> float:
    return float(500 * np.sqrt(2 * evaluate(contract.model, contract.data, model, rows)[0]))


def _contract(scenario: Scenario, counts: list[int]) -> Contract:
    privacy = scenario.privacy
    steps = (scenario.rounds + privacy.spare_attempts) * scenario.local_steps
    noise = solve_noise_multiplier(privacy.epsilon, privacy.delta, privacy.sample_rate, steps)
    terms = {key: value for key, value in privacy if key != "data_set_epsilon"}
    return training_contract(
        scenario.data,
        Model.parse({"kind": "linear", "hidden": (), "initial_digest": "0" * 64}, code="MODEL"),
        counts,
        training={
            "rounds": scenario.rounds,
            "local_steps": scenario.local_steps,
            "learning_rate": scenario.learning_rate,
        },
        privacy=terms | {"noise_multiplier": noise},
        contribution={"loss": scenario.data.label.LOSS},
    )
