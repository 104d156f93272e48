"""Every kind of layer in both modes: its clipped sum is that of a plain reference, or it is refused with the reason.

And traps 7, 8, 10 and 11 of docs/privacy: 7 an empty batch whose sensitivity is 2C, unpickled checkpoints, an
accountant that counts entries; 8 a step divided by the true batch size, and secure mode; 10 a fresh accountant each
round; 11 low-rank adapters.
"""

import ast
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from tests.support.noise import FixedNoise, ScriptedNoise
from torch import nn

from fedpact_contract.errors import InputError
from fedpact_contract.privacy import epsilon_pld
from fedpact_models import dp
from fedpact_models.dp import dp_sgd, mode_of, validate
from fedpact_models.features import Floats
from fedpact_models.weights import flatten

MODES: tuple[dp.Mode, ...] = ("hooks", "ghost")
ROWS, LIMIT = 12, 0.3
STEP = {
    "steps": 1,
    "sample_rate": 0.5,
    "noise_multiplier": 1.0,
    "max_grad_norm": LIMIT,
    "denominator": 1.0,
    "learning_rate": 1.0,
    "physical_batch": 5,
}


class Mean(nn.Module):
    """Over the second axis: of a sequence, one vector."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


class Parts(nn.Module):
    """Layers under names, and a forward pass over them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._pass = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._pass(self, x)


def tied() -> nn.Module:
    module = Parts(
        lambda self, x: self.c(torch.relu(self.b(torch.relu(self.a(x))))),
        a=nn.Linear(4, 4, bias=False),
        b=nn.Linear(4, 4, bias=False),
        c=nn.Linear(4, 3),
    )
    module.b.weight = module.a.weight
    return module


def used_twice() -> nn.Module:
    return Parts(
        lambda self, x: self.c(torch.relu(self.a(torch.relu(self.a(x))))), a=nn.Linear(4, 4), c=nn.Linear(4, 3)
    )


def frozen(name: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    for key, p in module.named_parameters():
        p.requires_grad_(not key.startswith(name))
    return module


def low_rank() -> nn.Module:
    """An adapter: a frozen layer, and a product of two narrow ones beside it."""
    module = Parts(
        lambda self, x: self.base(x) + self.b(self.a(x)),
        base=nn.Linear(4, 3),
        a=nn.Linear(4, 2, bias=False),
        b=nn.Linear(2, 3, bias=False),
    )
    module.base.requires_grad_(False)
    return module


def unused() -> nn.Module:
    return Parts(lambda self, x: self.a(x), a=nn.Linear(4, 3), u=nn.Linear(4, 3))


def attention(kind: type[nn.Module]) -> nn.Module:
    return Parts(lambda self, x: self.c(self.m(x, x, x)[0].mean(1)), m=kind(4, 2, batch_first=True), c=nn.Linear(4, 3))


def recurrent(kind: type[nn.Module]) -> nn.Module:
    return Parts(lambda self, x: self.c(self.m(x)[0].mean(1)), m=kind(4, 5, batch_first=True), c=nn.Linear(5, 3))


TOKENS, VECTOR, SEQUENCE, IMAGE = (-1,), (4,), (6, 4), (1, 8, 8)
"""Shapes of one record; TOKENS are six integers below 7."""

TRAINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), VECTOR),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Mean(), nn.Linear(5, 3)), SEQUENCE),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), Mean(), nn.Linear(4, 3)), TOKENS),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        IMAGE,
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)), VECTOR),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        IMAGE,
    ),
    "frozen layer": (lambda: frozen("0."), VECTOR),
    "frozen weight": (lambda: frozen("0.weight"), VECTOR),
    "unused parameter": (unused, VECTOR),
    "low rank": (low_rank, VECTOR),
    "attention of opacus": (lambda: attention(DPMultiheadAttention), SEQUENCE),
}
ONLY_HOOKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "tied weights": (tied, VECTOR, "b.weight"),
    "a layer used twice": (used_twice, VECTOR, "a.weight"),
    "lstm of opacus": (lambda: recurrent(DPLSTM), SEQUENCE, "m.l0.ih.weight"),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), "1", "BatchNorm"),
    "batch norm without weights": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False)),
        "1",
        "BatchNorm",
    ),
    "lstm": (lambda: recurrent(nn.LSTM), "m", "LSTM"),
    "attention": (lambda: attention(nn.MultiheadAttention), "m", "MultiheadAttention"),
    "transformer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)), "0.self_attn", "MultiheadAttention"),
    "frequencies": (lambda: nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True)), "0", "scale_grad_by_freq"),
    "renormalised": (lambda: nn.Sequential(nn.Embedding(7, 4, max_norm=1.0)), "0", "max_norm"),
    "padding": (lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0)), "0", "padding_idx"),
    "sparse": (lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True)), "0", "sparse"),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4)), "0", "EmbeddingBag"),
    "nothing to train": (lambda: nn.Linear(4, 3).requires_grad_(False), "Linear", "no parameter"),
}


def data(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(7)
    if shape == TOKENS:
        x = torch.randint(0, 7, (ROWS, 6), generator=source)
    else:
        x = torch.randn(ROWS, *shape, generator=source, dtype=torch.float64)
    return x, torch.arange(ROWS) % 3


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make().double()


def moved(module: nn.Module, x: torch.Tensor, y: torch.Tensor, noise: Any, **changes: Any) -> Floats:
    before = flatten(module)
    dp_sgd(module, x, y, noise=noise, **STEP | changes)
    return before - flatten(module)


def clipped_sum(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Floats:
    """The reference: autograd of one record at a time; zero for what is frozen or unused."""
    total = np.zeros(sum(p.numel() for p in module.parameters()))
    trained = [p for p in module.parameters() if p.requires_grad]
    for row, label in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(module(row[None]), label[None])
        found = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
        parts = [found.get(p) if found.get(p) is not None else torch.zeros_like(p) for p in module.parameters()]
        gradient = torch.cat([g.reshape(-1) for g in parts]).numpy()
        total += gradient * min(1.0, LIMIT / (float(np.linalg.norm(gradient)) + 1e-6))
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_layer_trains_as_the_plain_reference_does(name: str, mode: dp.Mode) -> None:
    make, shape = TRAINED[name]
    x, y = data(shape)
    module = made(make)
    expected = clipped_sum(module, x, y)
    np.testing.assert_allclose(moved(module, x, y, ScriptedNoise(range(ROWS)), mode=mode), expected, atol=1e-13)
    assert np.linalg.norm(expected) > LIMIT / 10
    empty = moved(module, x, y, ScriptedNoise([], []), mode=mode, steps=2)
    assert not empty.any()


@pytest.mark.parametrize("name", ONLY_HOOKS)
def test_what_stands_in_two_places_trains_by_hooks_and_is_refused_in_ghost_mode(name: str) -> None:
    make, shape, place = ONLY_HOOKS[name]
    x, y = data(shape)
    module = made(make)
    expected = clipped_sum(module, x, y)
    np.testing.assert_allclose(moved(module, x, y, ScriptedNoise(range(ROWS)), mode="hooks"), expected, atol=1e-13)
    assert not moved(module, x, y, ScriptedNoise([]), mode="hooks").any()
    with pytest.raises(InputError) as caught:
        moved(module, x, y, ScriptedNoise(range(ROWS)), mode="ghost")
    assert (caught.value.code, caught.value.field) == ("MODEL_NOT_PRIVATE", place)
    assert "two places" in caught.value.message


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_private_is_refused_with_the_reason(name: str) -> None:
    make, layer, reason = REFUSED[name]
    module = made(make)
    with pytest.raises(InputError) as caught:
        validate(module)
    assert (caught.value.code, caught.value.field) == ("MODEL_NOT_PRIVATE", layer)
    assert reason in caught.value.message
    before = flatten(module)
    with pytest.raises(InputError, match="MODEL_NOT_PRIVATE"):
        dp_sgd(module, *data(VECTOR), noise=FixedNoise(0), **STEP)
    np.testing.assert_array_equal(flatten(module), before)


def test_the_rule_never_takes_ghost_for_tied_weights() -> None:
    module = Parts(lambda self, x: self.b(self.a(x)), a=nn.Linear(50, 50), b=nn.Linear(50, 50))
    assert mode_of(module, torch.zeros(2, 6, 50)) == "ghost"
    module.b.weight = module.a.weight
    assert mode_of(module, torch.zeros(2, 6, 50)) == "hooks"


@pytest.mark.parametrize("mode", MODES)
def test_noise_reaches_a_parameter_that_is_not_used_and_none_that_is_frozen(mode: dp.Mode) -> None:
    x, y = data(VECTOR)
    assert (moved(made(unused), x, y, FixedNoise(3), mode=mode) != 0).all()
    moves = moved(made(lambda: frozen("0.")), x, y, FixedNoise(3), mode=mode)
    assert not moves[:25].any()
    assert (moves[25:] != 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("name", ["conv2d", "group norm", "linear on sequences", "attention of opacus"])
def test_a_record_that_is_not_finite_spoils_no_network(name: str, bad: float, mode: dp.Mode) -> None:
    make, shape = TRAINED[name]
    x, y = data(shape)
    x[2] = bad
    spoiled = moved(made(make), x, y, ScriptedNoise([0, 2, 4]), mode=mode)
    clean = moved(made(make), x, y, ScriptedNoise([0, 4]), mode=mode)
    assert np.isfinite(spoiled).all()
    assert np.linalg.norm(spoiled - clean) <= LIMIT + 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_one_record_and_labels_all_equal_are_data_like_any_other(mode: dp.Mode) -> None:
    x, y = data(VECTOR)
    module = made(TRAINED["linear"][0])
    expected = clipped_sum(module, x[:1], y[:1])
    np.testing.assert_allclose(moved(module, x[:1], y[:1], ScriptedNoise([0]), mode=mode), expected, atol=1e-13)
    equal = torch.zeros(ROWS, dtype=torch.int64)
    expected = clipped_sum(module, x, equal)
    np.testing.assert_allclose(moved(module, x, equal, ScriptedNoise(range(ROWS)), mode=mode), expected, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_a_data_set_without_rows_trains_on_noise_alone(mode: dp.Mode) -> None:
    x, y = data(VECTOR)
    module = made(TRAINED["linear"][0])
    assert np.isfinite(moved(module, x[:0], y[:0], FixedNoise(1), mode=mode)).all()


@pytest.mark.parametrize(("name", "value"), [("sample_rate", 1.0), ("noise_multiplier", 0.0), ("max_grad_norm", 0.0)])
def test_parameters_that_give_no_privacy_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError) as caught:
        dp_sgd(made(TRAINED["linear"][0]), *data(VECTOR), noise=FixedNoise(0), **STEP | {name: value})
    assert (caught.value.code, caught.value.field) == ("DP_PARAMETER", name)


@pytest.mark.parametrize("mode", MODES)
def test_trap_7_between_an_empty_batch_and_one_record_lies_no_more_than_the_clip(mode: dp.Mode) -> None:
    x, y = data(VECTOR)
    one = moved(made(TRAINED["linear"][0]), 1e3 * x, y, ScriptedNoise([5]), mode=mode)
    none = moved(made(TRAINED["linear"][0]), 1e3 * x, y, ScriptedNoise([]), mode=mode)
    assert np.linalg.norm(one - none) == pytest.approx(LIMIT, rel=1e-6)


def test_traps_7_and_8_what_opacus_does_wrong_is_named_nowhere() -> None:
    """Its engine, loaders, checkpoints, accountants, adaptive clipping and secure mode."""
    tree = ast.parse(Path(dp.__file__).read_text())
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    wrong = {
        "PrivacyEngine",
        "DPDataLoader",
        "rand_on_empty",
        "load_checkpoint",
        "clipping",
        "secure_mode",
        "generator",
    }
    assert not names & wrong


@pytest.mark.parametrize("mode", MODES)
def test_trap_8_the_step_is_not_divided_by_the_number_of_rows_drawn(mode: dp.Mode) -> None:
    x, y = data(VECTOR)
    twice, labels = torch.cat([x, x]), torch.cat([y, y])
    once = moved(made(TRAINED["linear"][0]), twice, labels, ScriptedNoise(range(ROWS)), mode=mode)
    both = moved(made(TRAINED["linear"][0]), twice, labels, ScriptedNoise(range(2 * ROWS)), mode=mode)
    np.testing.assert_allclose(both, 2 * once, atol=1e-13)


def test_trap_10_rounds_are_composed_and_not_each_counted_afresh() -> None:
    noise, rate, delta = Decimal(2), Decimal("0.1"), Decimal("0.0001")
    one, all_of_them = epsilon_pld([(noise, rate, 10)], delta), epsilon_pld([(noise, rate, 10)] * 40, delta)
    assert all_of_them == epsilon_pld([(noise, rate, 400)], delta)
    assert float(all_of_them) == pytest.approx(4.238, abs=0.02)
    assert one < all_of_them / 4


@pytest.mark.parametrize("mode", MODES)
def test_trap_11_an_adapter_changes_nothing_frozen_and_merges_to_the_same_network(mode: dp.Mode) -> None:
    x, y = data(VECTOR)
    module = made(low_rank)
    base = [p.clone() for p in module.base.parameters()]
    moved(module, x, y, FixedNoise(2), mode=mode, steps=5)
    for before, after in zip(base, module.base.parameters(), strict=True):
        assert torch.equal(before, after)
    merged = nn.Linear(4, 3).double()
    with torch.no_grad():
        merged.weight.copy_(module.base.weight + module.b.weight @ module.a.weight)
        merged.bias.copy_(module.base.bias)
        np.testing.assert_allclose(merged(x), module(x), atol=1e-12)
        assert not torch.allclose(module(x), module.base(x))
