"""The model registry: shapes without torch, networks that fit them, initial weights."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_model, a_schema, category, number, plain_schema

from fedpact_contract.contract import Model
from fedpact_contract.errors import InputError
from fedpact_models import registry
from fedpact_models.dp import validate
from fedpact_models.registry import ARCHITECTURES, Dense, build, initial_weights, parameter_count, parameter_shapes

SCHEMA = plain_schema(5, 3)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 4)])
def test_shapes_and_count_are_those_of_the_network(hidden: tuple[int, ...]) -> None:
    model = a_model(*hidden)
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
    entry = {"bottleneck": lambda model, features, classes: Dense(widths=(features, 2, classes), zero_start=False)}
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
