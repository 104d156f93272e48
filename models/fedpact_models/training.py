"""A participant's work in one round: from the base model to its update, as the contract says."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpact_contract.contract import ClientPrivacy, Contract, RecordPrivacy
from fedpact_contract.errors import FailedError, InputError
from fedpact_models.dp import (
    BeforeNoise,
    Loss,
    Mode,
    Noise,
    cross_entropy,
    discrete_hazard,
    dp_sgd,
    micro_batches,
    squared_error,
)
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import Layer, architecture, build
from fedpact_models.weights import clipped, flatten, load_flat

LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "squared-error": squared_error,
    "discrete-hazard": discrete_hazard,
}
"""By the contract's name."""

GRADIENT_ELEMENTS = 2**21
"""Numbers (float64) of per-example gradients held at a time: 16 MiB. Above the allocator's 32 MiB each micro-batch pays
for fresh pages."""


def physical_batch(contract: Contract) -> int:
    """Rows whose gradients are held at a time (`dp.Mode`).

    Of dense layers, each row's inputs and output gradients; of a convolution, those of every window, and the gradient.
    """
    return max(1, GRADIENT_ELEMENTS // sum(map(_held, architecture(contract.model, contract.data).layers)))


def _held(layer: Layer) -> int:
    """Numbers of one row's gradient."""
    whole = 0 if layer.windows is None else layer.inputs * layer.outputs
    return layer.count * (layer.inputs + layer.outputs) + whole


def local_update(contract: Contract, base: Floats, examples: Examples, noise: Noise) -> NDArray[np.float32]:
    """Train `local_steps` steps from `base`; local weights minus base, float32 [P].

    The steps are private ones, or at client level plain ones, and the update is clipped as a whole. The public
    denominator is sample_rate * n, n the contracted number of rows: the caller hands over exactly so many.

    Raises:
        InputError: TRAINING_ROWS (a number of rows that no participant contracted), WEIGHTS_SHAPE,
            WEIGHTS_NOT_FINITE, MODEL_NOT_PRIVATE.
        FailedError: TRAINING_NOT_FINITE.
    """
    return _trained(contract, base, examples, noise, contract.training.local_steps)


def local_baseline(contract: Contract, initial: Floats, examples: Examples, noise: Noise) -> NDArray[np.float32]:
    """Train the contract's baseline steps from the initial model, alone; as `local_update`."""
    assert contract.baseline is not None  # noqa: S101 - the caller was asked for it
    return _trained(contract, initial, examples, noise, contract.baseline.steps)


def _trained(contract: Contract, base: Floats, examples: Examples, noise: Noise, steps: int) -> NDArray[np.float32]:
    if len(examples) not in {p.num_examples for p in contract.participants}:
        raise InputError(
            "TRAINING_ROWS",
            f"No participant contracted {len(examples)} rows.",
            field="participants.num_examples",
            rule="train on exactly the contracted number of rows",
        )
    module = build(contract.model, contract.data)
    load_flat(module, base)
    if isinstance(contract.privacy, ClientPrivacy):
        _sgd(contract, module, examples, noise, steps)
        raw = clipped(flatten(module) - base, float(contract.privacy.max_update_norm))
    else:
        train(contract, module, examples, noise, steps)
        raw = flatten(module) - base
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is refused below
        update = raw.astype(np.float32)
    if not np.isfinite(update).all():
        raise FailedError(
            "TRAINING_NOT_FINITE",
            "The trained weights are not finite numbers.",
            remedy="The contract's learning rate is too large for its model; the round is charged and not retried.",
        )
    return update


def train(
    contract: Contract,
    module: torch.nn.Module,
    examples: Examples,
    noise: Noise,
    steps: int,
    *,
    mode: Mode | None = None,
    before_noise: BeforeNoise | None = None,
) -> None:
    """Train the module in place by so many private steps, as the contract says; `dp_sgd` has mode and before_noise.

    Raises:
        InputError: MODEL_NOT_PRIVATE; TRAINING_NOT_PRIVATE, at client level.
    """
    privacy, sample_rate = contract.privacy, float(contract.privacy.sample_rate)
    if not isinstance(privacy, RecordPrivacy):
        raise InputError(
            "TRAINING_NOT_PRIVATE",
            "At client level participants train without noise.",
            field="privacy.trust_model",
            rule="noise at each participant",
        )
    dp_sgd(
        module,
        torch.from_numpy(examples.x),
        torch.from_numpy(examples.y),
        steps=steps,
        sample_rate=sample_rate,
        noise_multiplier=float(privacy.noise_multiplier),
        max_grad_norm=float(privacy.max_grad_norm),
        denominator=sample_rate * len(examples),
        learning_rate=float(contract.training.learning_rate),
        noise=noise,
        physical_batch=physical_batch(contract),
        mode=mode,
        loss=LOSSES[contract.contribution.loss],
        before_noise=before_noise,
    )


def _sgd(contract: Contract, module: nn.Module, examples: Examples, noise: Noise, steps: int) -> None:
    """Plain steps on Poisson-sampled batches: what they yield has no noise, and a row's influence no bound."""
    sample_rate = float(contract.privacy.sample_rate)
    rate = float(contract.training.learning_rate) / (sample_rate * len(examples))
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    loss, at_once = LOSSES[contract.contribution.loss], physical_batch(contract)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.from_numpy(np.flatnonzero(noise.uniform(len(x)) < sample_rate))
        optimizer.zero_grad()
        for part in micro_batches(chosen, at_once):
            torch.autograd.backward(loss(module(x[part]), y[part]).sum())
        optimizer.step()
