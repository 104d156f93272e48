"""A trainer that adds less noise than contracted, as a fault of configuration would. For the noise floor's tests."""

from decimal import Decimal

import numpy as np
from tests.support.models_kit import a_model, plain_schema, random_examples, training_contract
from tests.support.noise import FixedNoise

from fedpact_contract.contract import Contract
from fedpact_models.dp import Noise, SystemNoise
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import initial_weights
from fedpact_models.training import local_update
from fedpact_server.noise_floor import energy_ratio


class Weak(SystemNoise):
    """The system's noise, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def normal(self, n: int) -> Floats:
        return super().normal(n) * self.factor


class WeakFixed(FixedNoise):
    """Noise that can be repeated, times a factor."""

    def __init__(self, seed: int, factor: float) -> None:
        super().__init__(seed)
        self.factor = factor

    def normal(self, n: int) -> Floats:
        return super().normal(n) * self.factor


def a_case(
    features: int, hidden: tuple[int, ...], classes: int, *, rows: int = 1000, **changes: dict[str, object]
) -> tuple[Contract, Floats, Examples]:
    """A contract on random rows with a label that can be learned, its initial weights, the rows."""
    privacy = {"sample_rate": Decimal("0.1"), "noise_multiplier": Decimal("1.2")} | changes.get("privacy", {})
    training = {"local_steps": 10, "learning_rate": Decimal("0.5")} | changes.get("training", {})
    data, model, rng = plain_schema(features, classes), a_model(*hidden), np.random.default_rng(0)
    contract = training_contract(data, model, [rows, rows], privacy=privacy, training=training)
    examples = random_examples(rng, rows, features, classes)
    seen = examples.x[:, :3].sum(axis=1)
    labels = np.minimum((classes * seen.argsort().argsort()) // rows, classes - 1).astype(np.int64)
    return contract, initial_weights(model, data, rng), Examples(x=examples.x, y=labels)


def a_ratio(case: tuple[Contract, Floats, Examples], noise: Noise) -> float:
    """The energy ratio of one update made with this noise."""
    contract, base, examples = case
    update = local_update(contract, base, examples, noise)
    return energy_ratio(update.astype(np.float64), contract, len(examples))
