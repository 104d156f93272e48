"""Differentially private steps: the check of a network, and DP-SGD. The one module that imports opacus.

Opacus gives per-sample gradients and clipping (`GradSampleModule`, `DPOptimizer`). Not its engine: `make_private`
derives the sampling rate and the denominator from the number of rows and so leaks it. Here both are public constants,
the number of steps is exact, and noise and sampling come from a source that is handed in.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpact_contract.errors import InputError
from fedpact_models.features import Floats
from fedpact_models.imports import bare_package
from fedpact_models.noise import Noise as Noise
from fedpact_models.noise import SystemNoise as SystemNoise
from fedpact_models.weights import load_flat

with bare_package("opacus"):  # it would import accountants, and scipy for them: .7 s of each trainer's start
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

Mode: TypeAlias = Literal["hooks", "ghost"]
"""How the clipped sum is made. hooks: from each example's gradient, of a dense layer kept as the product of input and
output gradient that it is (Bu et al. 2023, "Differentially private optimization on large model at small cost",
arXiv:2210.00038). ghost: from its norm alone, and a second backward pass of the losses weighted by the clipping factors
(Li et al. 2022, "Large language models can be strong differentially private learners", arXiv:2110.05679)."""

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Outputs [n, k] and targets [n] -> losses [n]. An example's loss must not depend on the other examples: a mean over
the batch, or a broadcast of [n, 1] against [n], would undo the clipping. The shape is checked."""

GHOST_PARAMETERS = 2_000
"""From here on ghost is faster where hooks would make whole gradients: of embeddings, and of layers on sequences."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pull:
    """A term strength * (w - anchor) of each step's mean gradient, added after the noise and outside the clip.

    The weights are noised already and the anchor is a released model, so it reads no data and costs no privacy. From
    weights of one's own that are kept between rounds it is MR-MTL (Liu et al. 2022, arXiv:2206.07902), from the global
    model FedProx (Li et al. 2020, arXiv:1812.06127); the anchor of both is the round's global model.

    Attributes:
        strength: lambda, above 0.
        anchor: Weights, float64 [P], in the order of `weights.flatten`.
    """

    strength: float
    anchor: Floats


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses in nat of logits [n, classes] against classes, int64 [n]."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half the squared error of a single output [n, 1] against numbers [n]: the gradient by the output is the error."""
    return 0.5 * (outputs.squeeze(1) - targets).square()


def discrete_hazard(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses in nat of hazards' logits [n, intervals] against what was seen, int64 [n] (`tasks.Survival`)."""
    lived, interval = (targets // 2)[:, None], torch.arange(outputs.shape[1])
    came = (targets % 2 == 1)[:, None] & (interval == lived)
    each = functional.softplus(torch.where(came, -outputs, outputs))
    return torch.where(came | (interval < lived), each, torch.zeros_like(each)).sum(dim=1)


def validate(module: nn.Module) -> None:
    """Return if every layer has a gradient per example, so that one example's influence can be bounded.

    Raises:
        InputError: MODEL_NOT_PRIVATE, with the layer and the reason.
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise _not_private(type(module).__name__, "it has no parameter that is trained.")
    for name, part in module.named_modules():
        if reason := _embedding_fault(part):
            raise _not_private(name or type(part).__name__, reason)
        check = ModuleValidator.VALIDATORS.get(type(part))
        errors: list[Exception] = list(check(part)) if check else []
        if not errors and any(p.requires_grad for p in part.parameters(recurse=False)):
            errors = list(GradSampleModule.validate(part))
        if errors:
            raise _not_private(name or type(part).__name__, str(errors[0]))
    if errors := ModuleValidator.validate(module, strict=False):
        raise _not_private(type(module).__name__, str(errors[0]))


def _embedding_fault(part: nn.Module) -> str | None:
    """What makes a table of embeddings one that opacus does not know how to train privately, though it takes it."""
    if isinstance(part, nn.EmbeddingBag):
        return "an EmbeddingBag has no gradient for each example; use an Embedding and a mean."
    if isinstance(part, nn.Embedding):
        if part.scale_grad_by_freq:
            return "with scale_grad_by_freq one record's gradient depends on the other records."
        if part.max_norm is not None:
            return "with max_norm the forward pass changes weights by the records, without noise."
        if part.padding_idx is not None:
            return "with padding_idx the padding's gradient, which is not used, is clipped as if it were."
        if part.sparse:
            return "with sparse gradients there is none for each example."
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Outer:
    """Each example's gradient of a dense layer's weights, left x right: [rows, outputs] and [rows, inputs]."""

    left: torch.Tensor
    right: torch.Tensor


_Gradients: TypeAlias = torch.Tensor | _Outer
"""Of each example with respect to one parameter: [rows, *shape], or as a product."""


class _GradSamples(GradSampleModule):  # type: ignore[misc]  # opacus has no types
    """As opacus's, but a dense layer that is used once, on vectors, keeps factors in place of whole gradients."""

    def capture_backprops_hook(
        self,
        module: nn.Module,
        inputs: torch.Tensor,
        outputs: tuple[torch.Tensor, ...],
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        trained: list[Any] = [p for p in module.parameters(recurse=False) if p.requires_grad]
        once = all(p._forward_counter == 1 and not hasattr(p, "_current_grad_sample") for p in trained)
        stack: Any = getattr(module, "activations", None)
        if not (type(module) is nn.Linear and once and self.hooks_enabled and stack[-1][0].dim() == 2):
            super().capture_backprops_hook(module, inputs, outputs, loss_reduction, batch_first)
            return
        left, right = outputs[0].detach(), stack.pop()[0]
        for p in trained:
            p.grad_sample = left if p is module.bias else _Outer(left, right)
            p._forward_counter -= 1


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
            if p.grad is not None:  # the network need not use every parameter
                p.summed_grad += p.grad
            p.grad = None

    def accumulate(self) -> None:
        """Clip the last backward pass's per-example gradients and add them to the batch's sum."""
        self.clip_and_accumulate()
        for p in self.params:
            p.grad_sample = None
            p.grad = None  # the plain backward pass leaves the raw gradient there

    def finish(self, strength: float = 0.0, anchor: Sequence[torch.Tensor] = ()) -> None:
        """Add the noise, then `strength` times the way from the anchor (if there is one), and take the step."""
        self.add_noise()
        for p, centre in zip(self.params, anchor, strict=False):
            p.grad.add_(p.detach() - centre, alpha=strength)
        self.original_optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forget every gradient."""
        for p in self.params:
            p.grad = p.grad_sample = p.summed_grad = None

    def clip_and_accumulate(self) -> None:
        """Add each example's gradient, scaled to at most max_grad_norm, to the batch's sum.

        One that is not finite takes no part: it would defeat the clipping. A parameter that the network does not use
        has no gradients.
        """
        samples = {p: p.grad_sample for p in self.params if p.grad_sample is not None}
        norms = _norms(samples.values())
        factors = (float(self.max_grad_norm) / (norms + 1e-6)).clamp(max=1.0)
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            factors = torch.where(finite, factors, torch.zeros_like(factors))
            samples = {p: _finite(gradients) for p, gradients in samples.items()}  # 0 times infinity is no number
        for p, gradients in samples.items():
            if isinstance(gradients, _Outer):
                p.summed_grad.addmm_((factors[:, None] * gradients.left).T, gradients.right)
            else:
                p.summed_grad += (factors @ gradients.flatten(1)).view_as(p)

    def add_noise(self) -> None:
        """The sum plus normal noise of standard deviation noise_multiplier * max_grad_norm, added in float64."""
        deviation = float(self.noise_multiplier) * float(self.max_grad_norm)
        for p in self.params:
            z = torch.from_numpy(self._noise.normal(p.numel()) * deviation).view_as(p)
            p.grad = (p.summed_grad.double() + z).to(p.dtype)
            p.summed_grad = None


BeforeNoise: TypeAlias = Callable[[SecureDPOptimizer, int], None]
"""What an audit does once a step, when the batch's sum is whole and its noise not yet drawn: it is given the optimizer
and the number of rows drawn. What it accumulates is clipped and noised as every record's gradient is."""


def _norms(samples: Iterable[_Gradients]) -> torch.Tensor:
    """Each example's norm over all parameters, [rows]."""
    norms = [
        g.left.norm(2, dim=1) * g.right.norm(2, dim=1) if isinstance(g, _Outer) else g.flatten(1).norm(2, dim=1)
        for g in samples
    ]
    result: torch.Tensor = torch.stack(norms, dim=1).norm(2, dim=1)
    return result


def _finite(gradients: _Gradients) -> _Gradients:
    if isinstance(gradients, _Outer):
        return _Outer(torch.nan_to_num(gradients.left), torch.nan_to_num(gradients.right))
    return torch.nan_to_num(gradients)


def mode_of(module: nn.Module, x: torch.Tensor) -> Mode:
    """The faster way for this network on features like these, as measured (tests/benchmarks/test_bench_dp.py).

    Ghost where every layer's norms follow from inputs and outputs, no weights are tied, and hooks would make whole
    gradients that are large: of embeddings, and of dense layers on sequences. The windows of a picture are no such
    sequence: their weights are few, and ghost takes three times as long (8 and 20 filters on 28 x 28 pixels).
    """
    layers = [part for part in module.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    known = all(type(layer) in GradSampleModuleFastGradientClipping.NORM_SAMPLERS for layer in layers)
    vectors = x.dim() == 2 and all(type(layer) is nn.Linear for layer in layers)
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return "ghost" if known and not vectors and size >= GHOST_PARAMETERS and _tied(module) is None else "hooks"


def _tied(module: nn.Module) -> str | None:
    """The second place of a trained parameter that stands in two: a norm for each place is not the sum's norm."""
    seen: set[nn.Parameter] = set()
    for name, p in module.named_parameters(remove_duplicate=False):
        if p in seen and p.requires_grad:
            return name
        seen.add(p)
    return None


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
    loss: Loss = cross_entropy,
    pull: Pull | None = None,
    before_noise: BeforeNoise | None = None,
) -> None:
    """Train in place by exactly `steps` steps of DP-SGD (Abadi et al. 2016, arXiv:1607.00133).

    Each step takes each row with probability `sample_rate`, independently; sums the rows' gradients, each clipped to
    norm `max_grad_norm`; adds normal noise of noise_multiplier * max_grad_norm; and moves the weights by -learning_rate
    / denominator times that. A batch without rows is a step of noise alone. One row more or less changes the sum by at
    most max_grad_norm, and nothing else: `sample_rate` and `denominator` must be public constants.

    Args:
        module: The network; left in training mode, without hooks or gradients.
        x: Features [n, d], of the network's type.
        y: Targets [n]; for cross-entropy classes, int64.
        steps: T.
        sample_rate: q, between 0 and 1.
        noise_multiplier: sigma, above 0.
        max_grad_norm: C, above 0.
        denominator: The public stand-in for the batch size, q times the contracted n.
        learning_rate: Step size in terms of the mean gradient.
        noise: Where sampling and noise come from.
        physical_batch: Rows whose gradients are held at a time; a question of memory only.
        mode: How the clipped sum is made; None is the faster way (`mode_of`).
        loss: Of each example by itself.
        pull: Towards an anchor, after the noise.
        before_noise: What an audit does in each step; None in production.

    Raises:
        InputError: MODEL_NOT_PRIVATE, DP_PARAMETER, WEIGHTS_SHAPE or WEIGHTS_NOT_FINITE (of the anchor).
    """
    _check_parameters(
        steps=steps,
        sample_rate=sample_rate,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        denominator=denominator,
        learning_rate=learning_rate,
        physical_batch=physical_batch,
        **({"pull": pull.strength} if pull else {}),
    )
    module.train()
    validate(module)
    strength, anchor = (denominator * pull.strength, _like(module, pull.anchor)) if pull else (0.0, [])
    ghost = (mode or mode_of(module, x)) == "ghost"
    if ghost and (name := _tied(module)):
        raise _not_private(name, _TWICE)
    wrapped = (
        GradSampleModuleFastGradientClipping(module, loss_reduction="sum", max_grad_norm=max_grad_norm)
        if ghost
        else _GradSamples(module, loss_reduction="sum")
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
                for part in micro_batches(chosen, physical_batch):
                    if ghost:
                        _backward_weighted(wrapped, x[part], y[part], loss)
                        optimizer.accumulate_clipped()
                    else:
                        torch.autograd.backward(_losses(loss, wrapped(x[part]), y[part]).sum())
                        optimizer.accumulate()
                if before_noise is not None:
                    before_noise(optimizer, len(chosen))
                optimizer.finish(strength, anchor)
    finally:
        optimizer.clear()
        wrapped.to_standard_module()
        _forget(module)


def _like(module: nn.Module, flat: Floats) -> list[torch.Tensor]:
    """A flat array [P] as tensors like the parameters that are trained."""
    copied = copy.deepcopy(module)
    load_flat(copied, flat)
    return [p.detach() for p in copied.parameters() if p.requires_grad]


def _losses(loss: Loss, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = loss(outputs, targets)
    if losses.shape != (len(outputs),):
        raise InputError("DP_PARAMETER", "loss must give one number for each example.", field="loss")
    return losses


def _backward_weighted(
    wrapped: GradSampleModuleFastGradientClipping, x: torch.Tensor, y: torch.Tensor, loss: Loss
) -> None:
    """Leave in `grad` the sum of the examples' clipped gradients, and nothing else.

    An example whose gradient is not finite takes no part: its factor is 0, and its features and target are zeros, for 0
    times infinity is no number.
    """
    for p in wrapped.trainable_parameters:
        p._norm_sample = p.new_zeros(len(x))  # and so it stays where the network does not use the parameter
    try:
        losses = _losses(loss, wrapped(x), y)
    except NotImplementedError as err:  # so opacus says that a layer is used twice
        counts = ((name, getattr(p, "_forward_counter", 0)) for name, p in wrapped.named_parameters())
        twice = next((name for name, count in counts if count > 1), None)
        if twice is None:
            raise
        raise _not_private(twice.removeprefix("_module."), _TWICE) from err
    torch.autograd.backward(losses.sum(), retain_graph=True)
    wrapped.zero_grad(set_to_none=True)  # the plain gradient: nothing of it may stay
    factors = wrapped.get_clipping_coef()
    finite = torch.isfinite(wrapped.per_sample_gradient_norms) & torch.isfinite(losses)
    wrapped.disable_hooks()
    try:
        if not bool(finite.all()):
            factors = torch.where(finite, factors, torch.zeros_like(factors))
            x, y = x.clone(), y.clone()
            x[~finite] = y[~finite] = 0
            losses = loss(wrapped(x), y)
        torch.autograd.backward((factors * losses).sum())
    finally:
        wrapped.enable_hooks()


_TWICE = "it is used in two places, and ghost clipping has the norm of each alone; take the mode hooks."


def _forget(module: nn.Module) -> None:
    """Drop what opacus keeps: norms of single gradients, and on the layers of a pass that was broken off its inputs."""
    for part in (*module.modules(), *module.parameters()):
        for name in ("activations", "max_batch_len", "_norm_sample"):
            if name in part.__dict__:
                delattr(part, name)


def micro_batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """The rows of a batch, so many at a time."""
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
