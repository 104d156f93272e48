"""Differentially private steps: against a plain reference, and one regression test for each trap of docs/privacy.

Traps by their numbers there: 1 the number of rows leaks through rate and denominator; 2 a NaN record; 3 the one step
hook; 4 a seeded generator repeats its noise; 5 a logical batch that was broken off; 6 raw gradients left in `p.grad`;
9 an empty batch.
"""

import copy
import math
import os
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from tests.support.models_kit import a_model, plain_schema, random_examples
from tests.support.noise import FixedNoise, ScriptedNoise
from torch import nn

from fedpact_contract.errors import InputError
from fedpact_models import dp
from fedpact_models.dp import SystemNoise, dp_sgd, validate
from fedpact_models.features import Floats
from fedpact_models.noise import NOISE_CHUNK, _trigonometry
from fedpact_models.registry import build
from fedpact_models.weights import flatten, load_flat

RATES = {
    "steps": 3,
    "sample_rate": 0.2,
    "noise_multiplier": 1.5,
    "max_grad_norm": 1.0,
    "denominator": 20.0,
    "learning_rate": 0.5,
    "physical_batch": 8,
}


MODES: tuple[dp.Mode, ...] = ("hooks", "ghost")


def _data(rows: int = 100, features: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    examples = random_examples(np.random.default_rng(5), rows, features, classes)
    return torch.from_numpy(examples.x), torch.from_numpy(examples.y)


def _network(*hidden: int, features: int = 6, classes: int = 3) -> nn.Module:
    module = build(a_model(*hidden), plain_schema(features, classes))
    count = sum(p.numel() for p in module.parameters())
    load_flat(module, np.random.default_rng(3).normal(size=count) * 0.3)
    return module


def _update(x: torch.Tensor, y: torch.Tensor, noise: Any, *hidden: int, module: Any = None, **changes: Any) -> Floats:
    module = module or _network(*hidden)
    before = flatten(module)
    dp_sgd(module, x, y, noise=noise, **RATES | changes)
    return flatten(module) - before


def _clipped_sum(module: nn.Module, x: torch.Tensor, y: torch.Tensor, limit: float) -> Floats:
    """The reference: gradients one record at a time, by autograd alone."""
    total = np.zeros(sum(p.numel() for p in module.parameters()))
    for row, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(module(row[None]), label[None])
        parts = torch.autograd.grad(loss, list(module.parameters()))
        gradient = torch.cat([g.reshape(-1) for g in parts]).numpy()
        total += gradient * min(1.0, limit / (np.linalg.norm(gradient) + 1e-6))
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
@pytest.mark.parametrize("physical", [1, 7, 1000])
def test_steps_are_those_of_a_plain_reference(hidden: tuple[int, ...], physical: int, mode: dp.Mode) -> None:
    x, y = _data()
    actual = _update(x, y, FixedNoise(1), *hidden, physical_batch=physical, max_grad_norm=0.4, mode=mode)
    noise, module = FixedNoise(1), _network(*hidden)
    start = flatten(module)
    for _ in range(3):
        rows = torch.from_numpy(np.flatnonzero(noise.uniform(100) < 0.2))
        total = _clipped_sum(module, x[rows], y[rows], 0.4)
        total += np.concatenate([noise.normal(p.numel()) for p in module.parameters()]) * (1.5 * 0.4)
        load_flat(module, flatten(module) - 0.5 / 20 * total)
    np.testing.assert_allclose(actual, flatten(module) - start, atol=1e-13)


def test_trap_1_neither_rate_nor_denominator_nor_noise_depends_on_the_number_of_rows() -> None:
    x, y = _data(101)
    rare = {"sample_rate": 1e-12, "steps": 1}
    updates = [_update(x[:n], y[:n], FixedNoise(1), **rare) for n in (100, 101, 1)]
    np.testing.assert_array_equal(updates[0], updates[1])
    np.testing.assert_array_equal(updates[0], updates[2])
    noise = FixedNoise(1)
    expected = noise.normal(21) * (-0.5 * 1.5 * 1.0 / 20)
    np.testing.assert_allclose(updates[0], expected, rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_trap_2_a_record_that_is_not_finite_spoils_nothing(bad: float, hidden: tuple[int, ...], mode: dp.Mode) -> None:
    x, y = _data()
    x[4, 2] = bad
    spoiled = _update(x, y, ScriptedNoise([1, 4, 9]), *hidden, steps=1, mode=mode)
    clean = _update(x, y, ScriptedNoise([1, 9]), *hidden, steps=1, mode=mode)
    assert np.isfinite(spoiled).all()
    assert np.linalg.norm(spoiled - clean) <= 0.5 / 20 * 1.0 + 1e-12
    assert clean.any()


def test_only_the_needed_part_of_opacus_is_loaded_and_all_of_it_can_be() -> None:
    """The accountants' scipy would take a third of a trainer's start; other users of the package get it whole."""
    code = (
        "import sys, fedpact_models.dp\n"
        "assert not {'scipy', 'opacus.accountants'} & set(sys.modules), sorted(sys.modules)\n"
        "import opacus\n"
        "assert opacus.GradSampleModule is fedpact_models.dp.GradSampleModule\n"
        "assert opacus.PrivacyEngine"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_trap_3_no_step_hook_and_no_step_of_opacus_is_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("not ours")

    x, y = _data()
    expected = _update(x, y, FixedNoise(2), 5)
    for name in ("attach_step_hook", "pre_step", "step", "zero_grad", "signal_skip_step"):
        monkeypatch.setattr(DPOptimizer, name, never)
    np.testing.assert_array_equal(_update(x, y, FixedNoise(2), 5), expected)
    noise = ScriptedNoise(range(30), [], [1])
    _update(x, y, noise)
    assert noise.drawn == 3 * 21  # noise for every parameter in each of exactly T steps


def test_trap_4_a_seeded_torch_or_numpy_repeats_no_noise() -> None:
    x, y = _data()
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        updates.append(_update(x, y, SystemNoise()))
    assert (updates[0] != updates[1]).all()


@pytest.mark.parametrize("mode", MODES)
def test_trap_5_a_batch_that_was_broken_off_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, mode: dp.Mode
) -> None:
    x, y = _data()
    module, calls = _network(5), 0
    real = dp.functional.cross_entropy

    def broken(*args: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(dp.functional, "cross_entropy", broken)
    with pytest.raises(KeyboardInterrupt):
        dp_sgd(module, x, y, noise=ScriptedNoise(range(90)), mode=mode, **RATES)  # in the third of twelve micro-batches
    monkeypatch.undo()
    assert not any(
        getattr(p, "summed_grad", None) is not None or hasattr(p, "grad_sample") for p in module.parameters()
    )
    again = _update(x, y, ScriptedNoise([7]), module=module, steps=1, mode=mode)
    load_flat(module, flatten(module) - again)
    np.testing.assert_allclose(again, -0.5 / 20 * _clipped_sum(module, x[7:8], y[7:8], 1.0), atol=1e-15)
    assert np.linalg.norm(again) <= 0.5 / 20 * 1.0


@pytest.mark.parametrize("mode", MODES)
def test_trap_6_no_raw_gradient_norm_hook_or_activation_stays_on_the_network(mode: dp.Mode) -> None:
    """Ghost's first pass leaves plain gradients in `p.grad`: they must be gone before the second, and after it."""
    x, y = _data()
    module = _network(5)
    attributes = {name: set(part.__dict__) for name, part in module.named_modules()}
    _update(x, y, FixedNoise(1), module=module, mode=mode)
    for p in module.parameters():
        assert not hasattr(p, "_norm_sample")
        assert p.grad is None
        assert getattr(p, "summed_grad", None) is None
        assert not hasattr(p, "grad_sample")
    for name, part in module.named_modules():
        assert set(part.__dict__) == attributes[name]
        assert not part._forward_hooks
        assert not part._backward_hooks


@pytest.mark.parametrize("mode", MODES)
def test_trap_9_an_empty_batch_is_a_step_of_noise_alone(mode: dp.Mode) -> None:
    x, y = _data()
    for hidden in ((), (5,)):
        assert not _update(x, y, ScriptedNoise([], [], []), *hidden, mode=mode).any()
        empty = _update(x, y, FixedNoise(4), *hidden, sample_rate=1e-12, steps=2, mode=mode)
        assert (empty != 0).all()
    mixed = _update(x, y, ScriptedNoise([], [3], []), 5, mode=mode)
    np.testing.assert_array_equal(mixed, _update(x, y, ScriptedNoise([3]), 5, steps=1, mode=mode))


def _regression(rows: int = 100) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    x, _ = _data(rows)
    module = nn.Linear(7, 1, bias=False, dtype=torch.float64)
    load_flat(module, np.linspace(-1, 1, 7))
    return x, torch.linspace(-3, 3, rows, dtype=torch.float64), module


@pytest.mark.parametrize("mode", MODES)
def test_a_regression_is_trained_by_its_own_loss(mode: dp.Mode) -> None:
    x, y, module = _regression()
    actual = _update(x, y, FixedNoise(1), module=module, mode=mode, loss=dp.squared_error)
    noise, weights = FixedNoise(1), np.linspace(-1, 1, 7)
    for _ in range(3):
        rows = noise.uniform(100) < 0.2
        gradients = x.numpy()[rows] * (x.numpy()[rows] @ weights - y.numpy()[rows])[:, None]
        norms = np.linalg.norm(gradients, axis=1, keepdims=True)
        assert norms.min() < 1 < norms.max()
        total = (gradients * np.minimum(1, 1 / (norms + 1e-6))).sum(axis=0) + 1.5 * noise.normal(7)
        weights = weights - 0.5 / 20 * total
    np.testing.assert_allclose(actual, weights - np.linspace(-1, 1, 7), atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_target_that_is_not_finite_or_too_large_spoils_nothing(bad: float, mode: dp.Mode) -> None:
    x, y, module = _regression()
    clean = _update(x, y, ScriptedNoise([1, 9]), module=module, steps=1, mode=mode, loss=dp.squared_error)
    x, y, module = _regression()
    y[4] = bad
    spoiled = _update(x, y, ScriptedNoise([1, 4, 9]), module=module, steps=1, mode=mode, loss=dp.squared_error)
    assert np.isfinite(spoiled).all()
    assert np.linalg.norm(spoiled - clean) <= 0.5 / 20 * 1.0 + 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss",
    [nn.functional.cross_entropy, lambda outputs, y: (outputs[:, :1] - y).square()],
    ids=["a mean", "a broadcast"],
)
def test_a_loss_that_mixes_examples_is_refused(loss: dp.Loss, mode: dp.Mode) -> None:
    x, y = _data()
    module = _network(5)
    before = flatten(module)
    with pytest.raises(InputError) as caught:
        dp_sgd(module, x, y, noise=FixedNoise(0), mode=mode, loss=loss, **RATES)
    assert (caught.value.code, caught.value.field) == ("DP_PARAMETER", "loss")
    np.testing.assert_array_equal(flatten(module), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_pull_changes_neither_the_clipped_sum_nor_the_noise(monkeypatch: pytest.MonkeyPatch, mode: dp.Mode) -> None:
    x, y = _data()
    real, seen = dp.SecureDPOptimizer.add_noise, []

    def add_noise(self: dp.SecureDPOptimizer) -> None:
        clipped = [p.summed_grad.clone() for p in self.params]
        real(self)
        seen.append((clipped, [p.grad.clone() for p in self.params]))

    monkeypatch.setattr(dp.SecureDPOptimizer, "add_noise", add_noise)
    module = _network(5)
    start, anchor = flatten(module), np.linspace(-100, 100, len(flatten(module)))
    plain = _update(x, y, FixedNoise(1), module=module, steps=1, mode=mode)
    pulled = _update(x, y, FixedNoise(1), 5, steps=1, mode=mode, pull=dp.Pull(strength=0.3, anchor=anchor))
    for one, other in zip(*seen, strict=True):  # the clipped sum, then what the noise made of it
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    np.testing.assert_allclose(pulled, plain - 0.5 * 0.3 * (start - anchor), atol=1e-12)


def test_pulled_steps_are_those_of_a_plain_reference() -> None:
    x, y = _data()
    module, noise = _network(5), FixedNoise(1)
    start = flatten(module)
    anchor = np.ones(len(start))
    actual = _update(x, y, FixedNoise(1), 5, pull=dp.Pull(strength=1.0, anchor=anchor))
    for _ in range(3):
        rows = torch.from_numpy(np.flatnonzero(noise.uniform(100) < 0.2))
        total = _clipped_sum(module, x[rows], y[rows], 1.0)
        total += np.concatenate([noise.normal(p.numel()) for p in module.parameters()]) * 1.5
        load_flat(module, flatten(module) - 0.5 * (total / 20 + 1.0 * (flatten(module) - anchor)))
    np.testing.assert_allclose(actual, flatten(module) - start, atol=1e-13)


@pytest.mark.parametrize(
    ("pull", "code"),
    [
        (dp.Pull(strength=0.0, anchor=np.zeros(21)), "DP_PARAMETER"),
        (dp.Pull(strength=math.nan, anchor=np.zeros(21)), "DP_PARAMETER"),
        (dp.Pull(strength=1.0, anchor=np.zeros(20)), "WEIGHTS_SHAPE"),
        (dp.Pull(strength=1.0, anchor=np.full(21, math.inf)), "WEIGHTS_NOT_FINITE"),
    ],
)
def test_a_pull_out_of_range_is_refused(pull: dp.Pull, code: str) -> None:
    x, y = _data()
    with pytest.raises(InputError, match=code):
        dp_sgd(_network(), x, y, noise=FixedNoise(0), pull=pull, **RATES)


def test_the_mode_follows_from_size_layers_and_features() -> None:
    vectors, sequences, tokens = torch.zeros(2, 300), torch.zeros(2, 5, 300), torch.zeros(2, 5, dtype=torch.int64)
    large = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 3))
    assert dp.mode_of(large, vectors) == "hooks"
    assert dp.mode_of(large, sequences) == "ghost"
    assert dp.mode_of(_network(5), sequences) == "hooks"
    assert dp.mode_of(nn.Sequential(nn.Embedding(300, 400), nn.Flatten(), nn.Linear(2000, 3)), tokens) == "ghost"
    assert dp.mode_of(nn.Sequential(nn.Conv1d(5, 400, 3), nn.Flatten(), nn.Linear(400, 3)), sequences) == "hooks"
    for p in large.parameters():
        p.requires_grad_(False)
    assert dp.mode_of(large, sequences) == "hooks"


def test_where_every_gradient_is_far_above_the_limit_both_modes_clip_alike() -> None:
    x, y = _data()
    updates = [
        _update(1e3 * x, y, ScriptedNoise(range(40)), 5, steps=1, max_grad_norm=1e-3, mode=mode) for mode in MODES
    ]
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-9, atol=1e-18)
    assert 0 < np.linalg.norm(updates[0]) <= 0.5 / 20 * 40 * 1e-3


def test_a_batch_is_a_poisson_sample_of_the_given_rate() -> None:
    counts = [int((SystemNoise().uniform(450) < 0.2).sum()) for _ in range(400)]
    assert abs(np.mean(counts) - 90) < 6 * (450 * 0.2 * 0.8 / 400) ** 0.5
    assert np.var(counts) == pytest.approx(72, rel=0.45)


def test_float32_networks_train_too() -> None:
    x, y = _data()
    double = _update(x, y, FixedNoise(1), 5)
    module = _network(5)
    module.float()
    single = _update(x.float(), y, FixedNoise(1), module=module)
    np.testing.assert_allclose(single, double, atol=1e-6)
    assert all(p.dtype == torch.float32 for p in module.parameters())


def _optimizer(weights: nn.Parameter, noise: Any) -> dp.SecureDPOptimizer:
    return dp.SecureDPOptimizer(
        torch.optim.SGD([weights], lr=1.0), noise=noise, noise_multiplier=1.5, max_grad_norm=0.7
    )


def test_to_a_float32_sum_the_noise_is_added_in_float64_and_rounded_once() -> None:
    weights = nn.Parameter(torch.zeros(1000))
    optimizer, z = _optimizer(weights, FixedNoise(1)), FixedNoise(1).normal(1000) * (1.5 * 0.7)
    optimizer.begin()
    weights.summed_grad += torch.linspace(-3, 3, 1000)
    summed = weights.summed_grad.numpy().copy()
    optimizer.add_noise()
    np.testing.assert_array_equal(weights.grad.numpy(), (summed.astype(np.float64) + z).astype(np.float32))
    assert (weights.grad.numpy() != summed + z.astype(np.float32)).any(), "float32 would add other bits"


def test_trap_5_a_logical_batch_begins_from_nothing_whatever_was_left() -> None:
    """As one is broken off where nobody cleans up: in the middle of a backward pass."""
    weights = nn.Parameter(torch.zeros(4))
    optimizer = _optimizer(weights, ScriptedNoise([]))
    optimizer.begin()
    weights.summed_grad += 9
    weights.grad = weights.grad_sample = torch.full((3, 4), 9.0).mean(0)
    optimizer.begin()
    assert (weights.grad, weights.grad_sample) == (None, None)
    assert torch.equal(weights.summed_grad, torch.zeros(4))
    weights.grad = torch.ones(4)
    optimizer.accumulate_clipped()
    assert torch.equal(weights.summed_grad, torch.ones(4))


def test_the_noise_floor_holds_and_tells_missing_noise() -> None:
    """||update||^2 / (d T (lr sigma C / B)^2) against 1 - 4 sqrt(2/d), as the server tests it; d = 8,450."""
    x, y = _data(1000, 30, 2)

    def energy(factor: float, sample_rate: float) -> float:
        module = _network(256, features=30, classes=2)
        changes = {"steps": 10, "sample_rate": sample_rate, "noise_multiplier": 1.2 * factor, "denominator": 100.0}
        update = _update(x, y, SystemNoise(), module=module, physical_batch=128, **changes)
        return float(np.sum(update**2) / (len(update) * 10 * (0.5 * 1.2 * 1.0 / 100) ** 2))

    spread = math.sqrt(2 / 8450)
    assert energy(1.0, 0.1) > 1 - 4 * spread
    assert abs(energy(1.0, 1e-12) - 1) < 6 * spread
    assert energy(0.9, 0.1) < 1 - 4 * spread
    assert energy(0.5, 0.1) < 0.5


@pytest.fixture(params=["with torch", "without torch"])
def trigonometry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise as a trainer makes it, and as an operator that has loaded no torch does."""
    if request.param == "without torch":
        monkeypatch.delitem(sys.modules, "torch")


def test_cosines_and_sines_are_the_same_with_torch_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    angles = 2 * math.pi * SystemNoise().uniform(100_000)
    found = [function(angles) for function in _trigonometry()]
    monkeypatch.delitem(sys.modules, "torch")
    assert _trigonometry() == (np.cos, np.sin)
    for ours, function in zip(found, _trigonometry(), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, function(angles), rtol=0, atol=4e-16)


@pytest.mark.usefixtures("trigonometry")
def test_system_noise_is_standard_normal_and_uniform() -> None:
    noise, n = SystemNoise(), 400_000
    assert noise.label == "csprng"
    u, z = noise.uniform(n), noise.normal(n)
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 6 * (1 / 12 / n) ** 0.5
    assert abs(np.mean(u**2) - 1 / 3) < 6 * (4 / 45 / n) ** 0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - moment) < 6 * (variance / n) ** 0.5
    assert abs(np.mean(z[:-1] * z[1:])) < 6 * n**-0.5
    assert abs(np.mean(z[: n // 2] * z[n // 2 :])) < 6 * (2 / n) ** 0.5
    assert len(np.unique(u)) > n - 10
    for size in (0, 1, 2, 7, NOISE_CHUNK + 1):
        assert len(noise.normal(size)) == len(noise.uniform(size)) == size


@pytest.mark.usefixtures("trigonometry")
def test_system_noise_has_the_tails_of_a_normal() -> None:
    z = np.abs(SystemNoise().normal(1_000_000))
    for limit in (1.0, 2.0, 3.0, 4.0):
        expected = 1e6 * math.erfc(limit / 2**0.5)
        assert abs((z > limit).sum() - expected) < 6 * expected**0.5 + 1


def test_system_noise_needs_little_memory() -> None:
    noise = SystemNoise()
    tracemalloc.start()
    try:
        noise.normal(2_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16_000_000 + 8_000_000


def test_system_noise_is_never_shared_across_a_fork_nor_copied() -> None:
    noise = SystemNoise()
    noise.uniform(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, noise.uniform(8).tobytes())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reader, 64))
    os.close(reader)
    os.close(writer)
    assert len(theirs) == 8
    assert not np.isin(theirs, noise.uniform(8)).any()
    with pytest.raises(TypeError):
        copy.deepcopy(noise)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "1"),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), "0.1"),
        (nn.BatchNorm1d(4), "BatchNorm1d"),
        (nn.Sequential(nn.LSTM(4, 4)), "0"),
        (nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)), "0"),
        (nn.Sequential(nn.Linear(4, 2)).eval(), "Sequential"),
    ],
)
def test_a_layer_that_mixes_records_is_refused_by_name(module: nn.Module, layer: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(module)
    assert (caught.value.code, caught.value.field) == ("MODEL_NOT_PRIVATE", layer)
    assert layer in caught.value.message


def test_dp_sgd_itself_refuses_such_a_network_and_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double()
    before = flatten(module)
    x, y = _data()
    with pytest.raises(InputError, match="MODEL_NOT_PRIVATE"):
        dp_sgd(module, x, y, noise=FixedNoise(0), **RATES)
    np.testing.assert_array_equal(flatten(module), before)


@pytest.mark.parametrize("name", list(RATES))
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_parameters_out_of_range_are_refused(name: str, value: float) -> None:
    x, y = _data()
    with pytest.raises(InputError) as caught:
        dp_sgd(_network(), x, y, noise=FixedNoise(0), **RATES | {name: value})
    assert (caught.value.code, caught.value.field) == ("DP_PARAMETER", name)


def test_a_sample_rate_of_one_is_refused() -> None:
    x, y = _data()
    with pytest.raises(InputError, match="DP_PARAMETER"):
        dp_sgd(_network(), x, y, noise=FixedNoise(0), **RATES | {"sample_rate": 1.0})
