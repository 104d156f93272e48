"""Differentially private steps: noise, the check of a network, and DP-SGD. The one module that imports opacus.

Opacus gives per-sample gradients and clipping (`GradSampleModule`, `DPOptimizer`). Not its engine: `make_private`
derives the sampling rate and the denominator from the number of rows and so leaks it. Here both are public constants,
the number of steps is exact, and noise and sampling come from a source that is handed in.
"""

import math
import os
import warnings
from collections.abc import Iterator
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import nn
from torch.nn import functional

from fedpact_contract.errors import InputError
from fedpact_models.features import Floats
from fedpact_models.imports import bare_package

with bare_package("opacus"):  # it would import accountants, and scipy for them: .7 s of each trainer's start
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

Mode: TypeAlias = Literal["hooks", "ghost"]
"""How the clipped sum is made. hooks: from each example's whole gradient. ghost: from its norm alone, which the layers'
inputs and output gradients give, and a second backward pass of the losses weighted by the clipping factors (Li et al.
2022, "Large language models can be strong differentially private learners", arXiv:2110.05679)."""

GHOST_PARAMETERS = 2_000
"""From here on ghost is faster: about as fast at 650 parameters, 3 times at 7,850, 33 times and more at a million
(batch 256, tests/benchmarks/test_bench_dp.py). Below, one backward pass does."""

NOISE_CHUNK = 2**16
"""Numbers drawn at a time: bounds memory, and stays in a cache."""


class Noise(Protocol):
    """A source of randomness for sampling and noise. `label` goes into the signed update: csprng or test."""

    @property
    def label(self) -> str:
        """What the update says of its noise."""
        ...

    def uniform(self, n: int) -> Floats:
        """Draw n independent numbers, uniform in (0, 1), float64."""
        ...

    def normal(self, n: int) -> Floats:
        """Draw n independent standard normal numbers, float64."""
        ...


class SystemNoise:
    """The only source in production: AES-256 in counter mode under a key from the operating system.

    It cannot be seeded. A forked child takes a new key before its first number, so parent and child share none. A
    normal number is half the sum of four Box-Muller draws, which hides the floating-point grid of a single one
    (Holohan and Braghin 2021, "Secure random sampling in differential privacy", arXiv:2107.10138).
    """

    def __init__(self) -> None:
        self._process = -1
        self._stream: CipherContext

    @property
    def label(self) -> str:
        """The label csprng."""
        return "csprng"

    def uniform(self, n: int) -> Floats:
        """Draw n numbers, uniform on the odd multiples of 2^-53 in (0, 1)."""
        out = np.empty(n)
        for start in range(0, n, NOISE_CHUNK):
            part = out[start : start + NOISE_CHUNK]
            part[:] = self._uniform(len(part))
        return out

    def normal(self, n: int) -> Floats:
        """Draw n standard normal numbers."""
        out = np.empty(n)
        for start in range(0, n, NOISE_CHUNK):
            part = out[start : start + NOISE_CHUNK]
            part[:] = self._normal(len(part))
        return out

    def _uniform(self, n: int) -> Floats:
        if self._process != os.getpid():
            self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
            self._process = os.getpid()
        words = np.frombuffer(self._stream.update(bytes(8 * n)), dtype="<u8")
        return (words >> np.uint64(12)).astype(np.float64) * 2.0**-52 + 2.0**-53

    def _normal(self, n: int) -> Floats:
        half = (n + 1) // 2
        out = np.zeros(2 * half)
        for _ in range(4):
            u = self._uniform(2 * half)
            radius, angle = np.sqrt(-2.0 * np.log(u[:half])), (2.0 * math.pi) * u[half:]
            out[:half] += radius * np.cos(angle)
            out[half:] += radius * np.sin(angle)
        return out[:n] * 0.5


def validate(module: nn.Module) -> None:
    """Return if every layer has a gradient per example, so that one example's influence can be bounded.

    Raises:
        InputError: MODEL_NOT_PRIVATE, with the layer and the reason.
    """
    for name, part in module.named_modules():
        check = ModuleValidator.VALIDATORS.get(type(part))
        errors: list[Exception] = list(check(part)) if check else []
        if not errors and any(p.requires_grad for p in part.parameters(recurse=False)):
            errors = list(GradSampleModule.validate(part))
        if errors:
            raise _not_private(name or type(part).__name__, str(errors[0]))
    if errors := ModuleValidator.validate(module, strict=False):
        raise _not_private(type(module).__name__, str(errors[0]))


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus has no types
    """One noised step for each logical batch, which comes in as many micro-batches as memory asks for.

    `begin`, then `accumulate` after each micro-batch's backward pass, then `finish`. Nothing of an interrupted batch
    outlives the next `begin`; no step hook is used.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, noise: Noise, noise_multiplier: float, max_grad_norm: float
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._noise = noise

    def begin(self) -> None:
        """Start a logical batch from nothing: its sum is zero until something is accumulated, also if nothing is."""
        self.clear()
        for p in self.params:
            p.summed_grad = torch.zeros_like(p)

    def accumulate_clipped(self) -> None:
        """Add a backward pass that was clipped already, by weighting the losses, to the batch's sum."""
        for p in self.params:
            p.summed_grad += p.grad
            p.grad = None

    def accumulate(self) -> None:
        """Clip the last backward pass's per-example gradients and add them to the batch's sum."""
        self.clip_and_accumulate()
        for p in self.params:
            p.grad_sample = None
            p.grad = None  # the plain backward pass leaves the raw gradient there

    def finish(self) -> None:
        """Add the noise and take the step."""
        self.add_noise()
        self.original_optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forget every gradient."""
        for p in self.params:
            p.grad = p.grad_sample = p.summed_grad = None

    def clip_and_accumulate(self) -> None:
        """As opacus does, after a gradient that is not finite has been set to zero: it would defeat the clipping."""
        for p in self.params:
            for g in p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample]:
                torch.nan_to_num_(g, nan=0.0, posinf=0.0, neginf=0.0)
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """The sum plus normal noise of standard deviation noise_multiplier * max_grad_norm, added in float64."""
        deviation = float(self.noise_multiplier) * float(self.max_grad_norm)
        for p in self.params:
            z = torch.from_numpy(self._noise.normal(p.numel()) * deviation).view_as(p)
            p.grad = (p.summed_grad.double() + z).to(p.dtype)
            p.summed_grad = None


def mode_of(module: nn.Module) -> Mode:
    """The faster way for this network: by its size, where every layer's norms follow from inputs and outputs."""
    layers = [part for part in module.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    known = all(type(layer) in GradSampleModuleFastGradientClipping.NORM_SAMPLERS for layer in layers)
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return "ghost" if known and size >= GHOST_PARAMETERS else "hooks"


def dp_sgd(
    module: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int,
    sample_rate: float,
    noise_multiplier: float,
    max_grad_norm: float,
    denominator: float,
    learning_rate: float,
    noise: Noise,
    physical_batch: int,
    mode: Mode | None = None,
) -> None:
    """Train in place by exactly `steps` steps of DP-SGD (Abadi et al. 2016, arXiv:1607.00133), cross-entropy loss.

    Each step takes each row with probability `sample_rate`, independently; sums the rows' gradients, each clipped to
    norm `max_grad_norm`; adds normal noise of noise_multiplier * max_grad_norm; and moves the weights by -learning_rate
    / denominator times that. A batch without rows is a step of noise alone. One row more or less changes the sum by at
    most max_grad_norm, and nothing else: `sample_rate` and `denominator` must be public constants.

    Args:
        module: The network; left in training mode, without hooks or gradients.
        x: Features [n, d], of the network's type.
        y: Classes, int64 [n].
        steps: T.
        sample_rate: q, between 0 and 1.
        noise_multiplier: sigma, above 0.
        max_grad_norm: C, above 0.
        denominator: The public stand-in for the batch size, q times the contracted n.
        learning_rate: Step size in terms of the mean gradient.
        noise: Where sampling and noise come from.
        physical_batch: Rows whose gradients are held at a time; a question of memory only.
        mode: How the clipped sum is made; None is the faster way (`mode_of`).

    Raises:
        InputError: MODEL_NOT_PRIVATE, DP_PARAMETER.
    """
    _check_parameters(
        steps=steps,
        sample_rate=sample_rate,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        denominator=denominator,
        learning_rate=learning_rate,
        physical_batch=physical_batch,
    )
    module.train()
    validate(module)
    ghost = (mode or mode_of(module)) == "ghost"
    wrapped = (
        GradSampleModuleFastGradientClipping(module, loss_reduction="sum", max_grad_norm=max_grad_norm)
        if ghost
        else GradSampleModule(module, loss_reduction="sum")
    )
    optimizer = SecureDPOptimizer(
        torch.optim.SGD(module.parameters(), lr=learning_rate / denominator),
        noise=noise,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    try:
        with warnings.catch_warnings():
            # Data needs no gradient; torch warns of every hook on a layer whose input has none.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for _ in range(steps):
                chosen = torch.from_numpy(np.flatnonzero(noise.uniform(len(x)) < sample_rate))
                optimizer.begin()
                for part in _micro_batches(chosen, physical_batch):
                    if ghost:
                        _backward_weighted(wrapped, x[part], y[part])
                        optimizer.accumulate_clipped()
                    else:
                        loss = functional.cross_entropy(wrapped(x[part]), y[part], reduction="sum")
                        torch.autograd.backward(loss)
                        optimizer.accumulate()
                optimizer.finish()
    finally:
        optimizer.clear()
        wrapped.to_standard_module()
        _forget(module)


def _backward_weighted(wrapped: GradSampleModuleFastGradientClipping, x: torch.Tensor, y: torch.Tensor) -> None:
    """Leave in `grad` the sum of the examples' clipped gradients, and nothing else.

    An example whose gradient is not finite takes no part: its factor is 0 and its features are zeros, for 0 times
    infinity is no number.
    """
    losses = functional.cross_entropy(wrapped(x), y, reduction="none")
    torch.autograd.backward(losses.sum(), retain_graph=True)
    wrapped.zero_grad(set_to_none=True)  # the plain gradient: nothing of it may stay
    factors = wrapped.get_clipping_coef()
    finite = torch.isfinite(wrapped.per_sample_gradient_norms) & torch.isfinite(losses)
    wrapped.disable_hooks()
    try:
        if not bool(finite.all()):
            factors = torch.where(finite, factors, torch.zeros_like(factors))
            x = torch.where(finite[:, None], x, torch.zeros_like(x))
            losses = functional.cross_entropy(wrapped(x), y, reduction="none")
        torch.autograd.backward((factors * losses).sum())
    finally:
        wrapped.enable_hooks()


def _forget(module: nn.Module) -> None:
    """Drop what opacus keeps: norms of single gradients, and on the layers of a pass that was broken off its inputs."""
    for part in (*module.modules(), *module.parameters()):
        for name in ("activations", "max_batch_len", "_norm_sample"):
            if name in part.__dict__:
                delattr(part, name)


def _micro_batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _check_parameters(**parameters: float) -> None:
    for name, value in parameters.items():
        if not (math.isfinite(value) and value > 0) or (name == "sample_rate" and value >= 1):
            limit = "between 0 and 1" if name == "sample_rate" else "above 0"
            raise InputError("DP_PARAMETER", f"{name} must be {limit}.", field=name)


def _not_private(layer: str, reason: str) -> InputError:
    return InputError(
        "MODEL_NOT_PRIVATE",
        f"The layer {layer} cannot be trained privately: {reason}",
        field=layer,
        rule="a gradient for each example",
        remedy="Use a layer that does not mix examples (for instance GroupNorm in place of BatchNorm).",
    )
