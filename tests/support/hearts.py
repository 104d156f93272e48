"""Four hospitals as a federation in one process: FLamby's Fed-Heart-Disease by public bounds. No tests.

Rows and columns as FLamby prepares them (du Terrail et al. 2022, arXiv:2210.04620); features by the product's encoding
with the bounds of configs/heart/federation.toml; softmax; each hospital steps with the agent's own trainer and noise.
"""

from decimal import Decimal
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tests.support.models_kit import a_model, a_schema

from fedpact_contract.contract import Data, load_toml
from fedpact_contract.privacy import solve_noise_multiplier
from fedpact_models.aggregation import apply, weighted_steps
from fedpact_models.dp import SystemNoise, dp_sgd
from fedpact_models.evaluate import evaluate
from fedpact_models.features import Examples, Floats, encode
from fedpact_models.registry import build, initial_weights
from fedpact_models.tables import read_table
from fedpact_models.weights import flatten, load_flat

ROOT = Path(__file__).resolve().parents[2]
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
TEST_SHARE = 0.34


EPSILON, DELTA = Decimal(1), Decimal("0.0001")
DESCRIBED = load_toml((ROOT / "configs" / "heart" / "federation.toml").read_text("utf-8"))
"""Training, sampling and clipping are those of this file, not tuned for these splits."""


@cache
def noise_multiplier() -> Decimal:
    """What keeps all steps within epsilon (no spare attempt is in this plan)."""
    training = DESCRIBED["training"]
    return solve_noise_multiplier(
        EPSILON, DELTA, Decimal(DESCRIBED["privacy"]["sample_rate"]), training["rounds"] * training["local_steps"]
    )


def hospitals(folder: Path) -> tuple[Data, list[Examples]]:
    """The schema and each hospital's examples: 303, 261, 46 and 130."""
    data = a_schema(*DESCRIBED["columns"], label=DESCRIBED["label"], feature_scale=DESCRIBED["feature_scale"])
    source = DESCRIBED["source"]
    tables = {
        name: read_table(
            folder / f"processed.{name}.data",
            kind="csv",
            column_names=source["column_names"],
            missing=source["missing"],
        )
        for name in HOSPITALS
    }
    return data, [encode(data, table, file=name) for name, table in tables.items()]


def split(parts: list[Examples], seed: int) -> tuple[list[Examples], list[Examples]]:
    """Rows to train on and, of each hospital, 34 % for the test, by label where there are more than two of each."""
    from sklearn.model_selection import train_test_split

    train, test = [], []
    for part in parts:
        by_label = part.y if np.bincount(part.y, minlength=2).min() > 2 else None
        rows = train_test_split(np.arange(len(part)), test_size=TEST_SHARE, random_state=seed, stratify=by_label)
        for side, chosen in zip((train, test), rows, strict=True):
            side.append(Examples(x=part.x[chosen], y=part.y[chosen]))
    return train, test


def federate(data: Data, train: list[Examples]) -> Floats:
    """The final model of FedAvg, float64 [P]."""
    counts = {str(k): len(part) for k, part in enumerate(train)}
    model = initial_weights(a_model(), data, np.random.default_rng(0))
    for _ in range(DESCRIBED["training"]["rounds"]):
        updates = {str(k): _update(data, part, model) for k, part in enumerate(train)}
        model = apply(model, weighted_steps(updates, counts, Decimal(1)).values())
    return model


def _update(data: Data, part: Examples, base: Floats) -> NDArray[np.float32]:
    """As `training.local_update`, whose contract could not have this delta."""
    training, privacy = DESCRIBED["training"], DESCRIBED["privacy"]
    module, sample_rate = build(a_model(), data), float(privacy["sample_rate"])
    load_flat(module, base)
    dp_sgd(
        module,
        torch.from_numpy(part.x),
        torch.from_numpy(part.y),
        steps=training["local_steps"],
        sample_rate=sample_rate,
        noise_multiplier=float(noise_multiplier()),
        max_grad_norm=float(privacy["max_grad_norm"]),
        denominator=sample_rate * len(part),
        learning_rate=float(training["learning_rate"]),
        noise=SystemNoise(),
        physical_batch=1024,
    )
    return (flatten(module) - base).astype(np.float32)


def accuracies(data: Data, model: Floats, test: list[Examples]) -> list[float]:
    """Accuracy at each hospital."""
    return [evaluate(a_model(), data, model, part)[1] / len(part) for part in test]
