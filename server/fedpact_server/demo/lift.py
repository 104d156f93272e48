"""Lift: does joining pay? Each participant's own DP model beside the federation's, over independent draws of noise.

Demo only: it reads everybody's data in one process, outside every ledger, and is marked "not covered by the contract's
epsilon". No baseline is weakened: alone, a participant takes the same number of steps with the noise that the same
epsilon needs for exactly these steps (it needs no spare attempts), on the same rows, from the same initial model.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from fedpact_contract.contract import Contract
from fedpact_contract.messages import release_event
from fedpact_contract.metric import UNIT, metric_text
from fedpact_contract.privacy import solve_noise_multiplier
from fedpact_models.dp import SystemNoise, dp_sgd
from fedpact_models.evaluate import evaluate
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import build
from fedpact_models.tasks import task_of
from fedpact_models.training import LOSSES, physical_batch
from fedpact_models.weights import flatten, load_flat

DRAWS = 3


def lift(
    contract: Contract, initial: Floats, final: Floats, data: Mapping[str, Examples], validation: Examples
) -> dict[str, Any]:
    """The task's metric on the validation set, together and alone.

    Args:
        contract: The contract.
        initial: The contract's initial model, float64 [P].
        final: The delivered model, float64 [P].
        data: Participant id -> the rows it trains on.
        validation: The operator's validation set.
    """
    steps = contract.training.rounds * contract.training.local_steps
    privacy = contract.privacy
    noise_multiplier = solve_noise_multiplier(privacy.epsilon, privacy.delta, privacy.sample_rate, steps)
    lines = []
    for party in contract.participants:
        draws = [_alone(contract, initial, data[party.id], validation, noise_multiplier, steps) for _ in range(DRAWS)]
        lines.append({"id": party.id, "name": party.name, "draws": draws, "mean": float(np.mean(draws))})
    return {
        "together": _metric(contract, final, validation),
        "participants": lines,
        "draws": DRAWS,
        "alone_noise_multiplier": str(noise_multiplier),
        "steps": steps,
        "note": "not covered by the contract's epsilon",
    }


def _alone(
    contract: Contract, initial: Floats, own: Examples, validation: Examples, noise_multiplier: Decimal, steps: int
) -> float:
    import torch

    module = build(contract.model, contract.data)
    load_flat(module, initial)
    sample_rate = float(contract.privacy.sample_rate)
    dp_sgd(
        module,
        torch.from_numpy(own.x),
        torch.from_numpy(own.y),
        steps=steps,
        sample_rate=sample_rate,
        noise_multiplier=float(noise_multiplier),
        max_grad_norm=float(release_event(contract).max_grad_norm),
        denominator=sample_rate * len(own),
        learning_rate=float(contract.training.learning_rate),
        noise=SystemNoise(),
        physical_batch=physical_batch(contract),
        loss=LOSSES[contract.contribution.loss],
    )
    return _metric(contract, flatten(module), validation)


def _metric(contract: Contract, model: Floats, validation: Examples) -> float:
    loss, correct = evaluate(contract.model, contract.data, model, validation)
    pairs = task_of(contract.data.label).pairs(validation.y)
    return float(metric_text(contract, [round(loss * len(validation) * UNIT)], correct, pairs))
