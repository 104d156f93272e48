"""The model registry: shapes without torch, networks that fit them, initial weights."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_cnn, a_model, a_schema, category, number, plain_schema, random_examples

from fedpact_contract.contract import Model
from fedpact_contract.errors import InputError
from fedpact_models import registry
from fedpact_models.dp import validate
from fedpact_models.registry import (
    ARCHITECTURES,
    Layer,
    Stack,
    architecture,
    build,
    initial_weights,
    parameter_count,
    parameter_shapes,
)

SCHEMA = plain_schema(5, 3)


@pytest.mark.parametrize(
    "model",
    [a_model(), a_model(7), a_model(7, 4), a_cnn(1, 5, (7, 1, 2)), a_cnn(1, 5, (7, 1, 2), (2, 1, 1), hidden=(4,))],
)
def test_shapes_and_count_are_those_of_the_network(model: Model) -> None:
    module = build(model, SCHEMA)
    named = dict(module.named_parameters())
    assert {name: tuple(p.shape) for name, p in named.items()} == parameter_shapes(model, SCHEMA)
    assert list(named) == list(parameter_shapes(model, SCHEMA))
    assert sum(p.numel() for p in named.values()) == parameter_count(model, SCHEMA)
    assert all(p.dtype == torch.float64 for p in named.values())
    assert module(torch.zeros(2, 6, dtype=torch.float64)).shape == (2, 3)
    validate(module)


def test_the_first_layer_has_no_bias_and_the_deeper_ones_do() -> None:
    assert parameter_shapes(a_model(), SCHEMA) == {"0.weight": (3, 6)}
    deeper = {"2.weight": (4, 7), "2.bias": (4,), "4.weight": (3, 4), "4.bias": (3,)}
    assert parameter_shapes(a_model(7, 4), SCHEMA) == {"0.weight": (7, 6)} | deeper
    assert parameter_count(a_model(7, 4), SCHEMA) == 42 + 28 + 4 + 12 + 3
    assert parameter_count(a_model(), plain_schema(64, 10)) == 650
    module = build(a_model(7, 4), SCHEMA)
    assert [part.bias is None for part in module if hasattr(part, "bias")] == [True, False, False]


def test_the_kinds_are_what_the_contract_says() -> None:
    assert [type(part).__name__ for part in build(a_model(), SCHEMA)] == ["Linear"]
    assert [type(part).__name__ for part in build(a_model(4), SCHEMA)] == ["Linear", "ReLU", "Linear"]
    schema = a_schema(number("a"), category("c", ["u", "v", "w"]))
    assert parameter_count(a_model(), schema) == (4 + 1) * 2
    assert set(ARCHITECTURES) == set(Model.model_fields["kind"].annotation.__args__)  # type: ignore[union-attr]


def test_a_new_kind_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    bottleneck = Model.model_construct(kind="bottleneck", hidden=(), initial_digest="0" * 64)
    with pytest.raises(InputError, match="MODEL_UNKNOWN"):
        parameter_count(bottleneck, SCHEMA)
    two = (Layer(inputs=6, outputs=2), Layer(inputs=2, outputs=3))
    entry = {"bottleneck": lambda _model, _data: Stack(features=6, layers=two, zero_start=False)}
    monkeypatch.setattr(registry, "ARCHITECTURES", ARCHITECTURES | entry)
    assert parameter_count(bottleneck, SCHEMA) == 6 * 2 + 3 * 3
    assert len(initial_weights(bottleneck, SCHEMA, np.random.default_rng(0))) == 21


def test_softmax_starts_from_zero_and_an_mlp_as_torch_does() -> None:
    assert not initial_weights(a_model(), SCHEMA, np.random.default_rng(0)).any()
    wide = plain_schema(99, 10)  # 100 features
    flat = initial_weights(a_model(400), wide, np.random.default_rng(0))
    torch.manual_seed(0)
    start = 0
    for parameter in build(a_model(400), wide).parameters():
        part = flat[start : start + parameter.numel()]
        start += parameter.numel()
        theirs = parameter.detach().numpy()
        bound = 0.1 if start <= 100 * 400 else 0.05
        assert max(np.abs(part).max(), np.abs(theirs).max()) <= bound
        if len(part) >= 400:
            assert part.std() == pytest.approx(theirs.std(), rel=0.1)
            assert part.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert start == len(flat)


def test_a_cnn_is_torchs_convolutions_on_the_scaled_picture() -> None:
    """Its weights are those of `nn.Conv2d`, in their order; the first one's bias is weighted by the constant."""
    model, schema = a_cnn(6, 7, (4, 3, 1), (5, 2, 2), hidden=(3,), channels=2), plain_schema(84, 3)
    assert parameter_shapes(model, schema) == {
        **{"0.weight": (4, 19), "2.weight": (5, 16), "2.bias": (5,)},
        **{"4.weight": (3, 5 * 2 * 2), "4.bias": (3,), "6.weight": (3, 3), "6.bias": (3,)},
    }
    module, x = build(model, schema), torch.from_numpy(random_examples(np.random.default_rng(0), 9, 84, 3).x)
    tensors, scale = dict(module.named_parameters()), (85 / 19) ** 0.5
    kernel, bias = tensors["0.weight"][:, :18].view(4, 2, 3, 3), tensors["0.weight"][:, 18] * x[0, 84] * scale
    seen = torch.relu(torch.nn.functional.conv2d(x[:, :84].view(9, 2, 6, 7) * scale, kernel, bias))
    kernel = tensors["2.weight"].view(5, 4, 2, 2)
    seen = torch.relu(torch.nn.functional.conv2d(seen, kernel, tensors["2.bias"], stride=2)).flatten(1)
    seen = torch.relu(seen @ tensors["4.weight"].T + tensors["4.bias"])
    torch.testing.assert_close(module(x), seen @ tensors["6.weight"].T + tensors["6.bias"], rtol=0, atol=1e-14)
    window = torch.cat([x[:, :84].view(9, 2, 6, 7)[:, :, :3, :3].flatten(1), x[:, 84:]], dim=1) * scale
    assert float(window.norm(dim=1).max()) <= 2 + 1e-12, "the feature scale"


def test_the_places_of_windows_are_those_that_torch_looks_at() -> None:
    for layer in architecture(a_cnn(6, 7, (4, 3, 2), (5, 2, 1), channels=2), plain_schema(84, 3)).layers[:2]:
        numbers = torch.arange(layer.windows.grid.size, dtype=torch.float64)
        planes = numbers.view(1, *layer.windows.grid)
        expected = torch.nn.functional.unfold(planes, layer.windows.kernel, stride=layer.windows.stride)[0]
        found = layer.windows.places()
        assert found.shape == (layer.inputs, layer.count)
        assert np.array_equal(found[: len(expected)], expected.numpy())
        assert (found[len(expected) :] == len(numbers)).all()


def test_initial_weights_follow_the_generator_alone() -> None:
    one, two, other = (initial_weights(a_model(4), SCHEMA, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_nothing_heavy_is_imported_where_it_is_not_needed() -> None:
    code = (
        "import sys, fedpact_models, fedpact_models.code\n"
        "fedpact_models.code.models_digest(); assert 'numpy' not in sys.modules\n"
        "import fedpact_models.registry, fedpact_models.evaluate, fedpact_models.release, fedpact_models.weights\n"
        "assert not {'torch', 'opacus', 'flwr', 'fedpact_client', 'fedpact_server'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
