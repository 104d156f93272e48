"""Pictures and convolutions, from the contract's clause to the model that predicts; what other rooms test, they test.

Digits of scikit-learn are pictures of 8 x 8 pixels.
"""

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.support.auditor_kit import CLAUSE, OPENING_KEY, SIGNING_KEY
from tests.support.closed_run import EVERYBODY_IS_PAID
from tests.support.federation import Federation, make_federation
from tests.support.models_kit import (
    a_cnn,
    a_model,
    category,
    digits,
    mean_step,
    number,
    plain_schema,
    training_contract,
)
from tests.support.noise import FixedNoise, ScriptedNoise
from tests.unit.test_dp_layers import LIMIT, clipped_sum, moved
from tests.unit.test_reevaluate import AUDITOR, handed_over

from fedpact_contract import shape
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract, Model, quick_to_score
from fedpact_contract.contribution import period_values, total_value
from fedpact_contract.errors import InputError
from fedpact_contract.log import ScoresOpened
from fedpact_contract.privacy import epsilon_pld
from fedpact_contract.text import render
from fedpact_contract.trust import Trust
from fedpact_contract.verify import verify_folder
from fedpact_models import dp
from fedpact_models.audit import audit
from fedpact_models.dp import SystemNoise
from fedpact_models.evaluate import evaluate
from fedpact_models.registry import architecture, build, initial_weights, parameter_count
from fedpact_models.release import load_release, make_release, predict, save_release
from fedpact_models.training import GRADIENT_ELEMENTS, local_update, physical_batch
from fedpact_models.weights import load_flat
from fedpact_server import retraining, rounds
from fedpact_server.reevaluate import reevaluate

CNN = a_cnn(8, 8, (4, 3, 2), (5, 2, 1), hidden=(6,))
DIGITS = plain_schema(64, 10)
ADAM = {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.001"}


def a_contract(model: Model = CNN, **changes: dict[str, Any]) -> Contract:
    return training_contract(DIGITS, model, (100, 200, 300), **changes)


# The contract


def test_the_contract_counts_its_parameters_as_the_model_has_them() -> None:
    for model in (CNN, a_cnn(8, 4, (3, 4, 1), channels=2), a_cnn(8, 8, (2, 8, 31)), a_cnn(1, 64, (3, 1, 2), (4, 1, 5))):
        contract = a_contract(model)
        assert shape.parameter_count(contract.model, contract.data) == parameter_count(contract.model, contract.data)
        assert shape.parameter_count(contract.model, contract.data) == sum(
            p.numel() for p in build(model, contract.data).parameters()
        )
    assert [grid.size for grid in CNN.grids] == [64, 36, 20]
    assert shape.parameter_count(CNN, DIGITS) == 4 * 10 + 5 * 17 + 6 * 21 + 10 * 7


def test_contracts_without_pictures_have_the_bytes_that_they_had() -> None:
    assert "image" not in a_contract(a_model(5)).plain()["model"]
    contract = a_contract()
    assert Contract.from_bytes(contract.to_bytes()) == contract
    assert not quick_to_score(contract), "a group's loss does not follow from its members' steps"


def pixels(*changed: dict[str, Any]) -> dict[str, Any]:
    columns = [number(f"f{i}") for i in range(64)]
    columns[64 - len(changed) :] = changed
    return DIGITS.plain() | {"columns": columns}


LAYER = {"filters": 4, "kernel": 3, "stride": 2}
BROKEN = [
    ({"model": {"image": None}}, "CONTRACT_MODEL", "model.image"),
    ({"model": {"convolutions": None}}, "CONTRACT_MODEL", "model.convolutions"),
    ({"model": {"kind": "mlp"}}, "CONTRACT_MODEL", "model.image"),
    ({"model": {"kind": "softmax", "hidden": []}}, "CONTRACT_MODEL", "model.image"),
    ({"model": {"image": {"height": 8, "width": 9, "channels": 1}}}, "CONTRACT_IMAGE", "model.image"),
    ({"model": {"image": {"height": 0, "width": 8, "channels": 1}}}, "CONTRACT", "model.image.height"),
    ({"model": {"image": {"height": 8, "width": 8}}}, "CONTRACT_MISSING_KEY", "model.image.channels"),
    ({"model": {"convolutions": []}}, "CONTRACT", "model.convolutions"),
    ({"model": {"convolutions": [LAYER] * 9}}, "CONTRACT", "model.convolutions"),
    ({"model": {"convolutions": [LAYER | {"kernel": 9}]}}, "CONTRACT_IMAGE", "model.convolutions.0.kernel"),
    ({"model": {"convolutions": [LAYER] * 3}}, "CONTRACT_IMAGE", "model.convolutions.2.kernel"),
    ({"model": {"convolutions": [LAYER | {"stride": 0}]}}, "CONTRACT", "model.convolutions.0.stride"),
    ({"model": {"convolutions": [LAYER | {"kernel": 32}]}}, "CONTRACT", "model.convolutions.0.kernel"),
    ({"model": {"convolutions": [LAYER | {"filters": 1025}]}}, "CONTRACT", "model.convolutions.0.filters"),
    ({"model": {"convolutions": [LAYER | {"padding": 1}]}}, "CONTRACT_UNKNOWN_KEY", "model.convolutions.0.padding"),
    ({"data": pixels(category("c", ["u", "v"]))}, "CONTRACT_IMAGE", "data.columns.c"),
    ({"data": pixels(number("p", 0, 15), number("q"))}, "CONTRACT_IMAGE", "data.columns.p"),
    ({"data": pixels(number("p", -1, 16))}, "CONTRACT_IMAGE", "data.columns.p"),
]


@pytest.mark.parametrize(("parts", "code", "field"), BROKEN)
def test_what_is_no_picture_or_does_not_fit_is_refused_by_name(parts: dict[str, Any], code: str, field: str) -> None:
    values = a_contract().plain()
    for part, changed in parts.items():
        values[part] = {key: value for key, value in (values[part] | changed).items() if value is not None}
    with pytest.raises(InputError) as caught:
        Contract.parse(values)
    assert (caught.value.code, caught.value.field) == (code, field)
    assert caught.value.rule


def test_each_channel_has_bounds_of_its_own() -> None:
    columns = [number(f"f{i}", 0, 16 if i < 32 else 255) for i in range(64)]
    values = a_contract().plain() | {"data": DIGITS.plain() | {"columns": columns}}
    values["model"] = a_cnn(4, 8, (4, 3, 1), channels=2).plain()
    assert Contract.parse(values).model.grids[0].channels == 2
    with pytest.raises(InputError, match="f32 is no number with the bounds of f0"):
        Contract.parse(values | {"model": a_contract().plain()["model"]})


def test_windows_beyond_memory_are_refused() -> None:
    many = plain_schema(64 * 64, 2)
    for layer in ((1024, 3, 1), (1, 31, 1)):
        with pytest.raises(InputError) as caught:
            training_contract(many, a_cnn(64, 64, layer), (100, 200, 300))
        assert (caught.value.code, caught.value.field) == ("CONTRACT_IMAGE", "model.convolutions.0")
    training_contract(many, a_cnn(64, 64, (16, 5, 3)), (100, 200, 300))


def test_the_text_says_how_a_row_is_a_picture_and_what_looks_at_it() -> None:
    image = a_cnn(4, 8, (11, 3, 2), (13, 1, 5), channels=2, hidden=(17,))
    text = " ".join(render(a_contract(image)).split())
    for words in (
        'of the kind "cnn": the columns are a picture, 4 lines of 8 pixels with 2 channels (channel by channel',
        "11 filters of 3 x 3 at a stride of 2, 13 filters of 1 x 1 at a stride of 5",
        "dense layers come behind them with hidden layers of 17 units. The first round",
    ):
        assert words in text
    assert "pixels" not in render(a_contract(a_model()))


@pytest.mark.parametrize(
    "parts",
    [
        {"training": {"server_optimizer": ADAM, "server_rate": "0.1"}},
        {"training": {"aggregation": "median"}, "contribution": {"game": "re-normalised"}},
        {"contribution": {"estimator": "sampled", "max_coalitions": 64}},
    ],
)
def test_every_clause_of_an_mlp_is_one_of_a_cnn(parts: dict[str, Any]) -> None:
    assert a_contract(**parts).model.kind == "cnn"


# Training


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_private_steps_clip_each_pictures_whole_gradient(mode: dp.Mode) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (12, 65)) * 2)
    module, y = build(CNN, DIGITS), torch.arange(12) % 10
    load_flat(module, initial_weights(CNN, DIGITS, rng))
    dp.validate(module)
    expected = clipped_sum(module, x, y)
    assert np.linalg.norm(expected) > LIMIT
    np.testing.assert_allclose(moved(module, x, y, ScriptedNoise(range(12)), mode=mode), expected, atol=1e-13)
    assert dp.mode_of(module, x) == "hooks", "a third of ghost's time"


def test_a_micro_batch_holds_what_its_windows_take() -> None:
    first, second, dense, last = architecture(CNN, DIGITS).layers
    row = 9 * (10 + 4) + 40 + 4 * (16 + 5) + 80 + (20 + 6) + (6 + 10)
    assert [layer.count for layer in (first, second, dense, last)] == [9, 4, 1, 1]
    assert physical_batch(a_contract()) == GRADIENT_ELEMENTS // row


def test_a_federation_at_epsilon_2_learns_the_digits() -> None:
    """72 steps at this noise cost 1.93 at delta 1e-5. Seen over eight seeds: .864, standard deviation .026 (0014)."""
    data, parts, others = digits(0, [300] * 4, {})
    model = a_cnn(8, 8, (8, 3, 1))
    training = {"local_steps": 6, "learning_rate": "1", "rounds": 12}
    contract = training_contract(
        data, model, [300] * 4, training=training, privacy={"sample_rate": "0.2", "noise_multiplier": "3.7"}
    )
    assert epsilon_pld([(Decimal("3.7"), Decimal("0.2"), 72)], Decimal("0.00001")) < 2
    weights, noises = initial_weights(model, data, np.random.default_rng(0)), [FixedNoise(i) for i in range(4)]
    for _ in range(12):
        updates = [local_update(contract, weights, *own) for own in zip(parts, noises, strict=True)]
        weights = weights + mean_step(updates, [300] * 4).sum(axis=0)
    _, right = evaluate(model, data, weights, others)
    assert right / len(others) > 0.75


def test_the_audit_of_its_training_finds_no_fault() -> None:
    privacy = {"epsilon": 3, "delta": "0.00001", "noise_multiplier": "1.5", "sample_rate": "0.2"}
    training = {"rounds": 2, "local_steps": 3, "learning_rate": "0.5"}
    contract = a_contract(privacy=privacy, training=training)
    found = audit(contract, noise=FixedNoise(3), coins=FixedNoise(8), seconds=60, canaries=400)
    assert (found.faults, found.mode) == ({}, "hooks")
    assert 0.9 < found.largest_contribution <= 1 + 1e-6


# What is delivered


def test_a_release_predicts_what_the_network_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = initial_weights(CNN, DIGITS, rng)
    release = make_release(CNN, DIGITS, weights, contract_id="ab" * 32, round=2, privacy={"unit": "example"})
    loaded = load_release(save_release(tmp_path / "model", release)[0])
    assert loaded.card == release.card
    cells = rng.integers(0, 17, (20, 64))
    told = predict(loaded, pl.DataFrame({f"f{i}": cells[:, i] for i in range(64)}), file="digits")
    module, x = build(CNN, DIGITS), np.column_stack([cells / 8 - 1, np.ones(20)]) * (2 / 65**0.5)
    load_flat(module, weights)
    expected = module(torch.from_numpy(x)).softmax(dim=1).max(dim=1)
    assert told["predicted"].to_list() == [str(index) for index in expected.indices.tolist()]
    np.testing.assert_allclose(told["probability"].to_numpy(), expected.values.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("image", "code"), [({"height": 8, "width": 7, "channels": 1}, "CONTRACT_IMAGE"), (None, "CONTRACT_MODEL")]
)
def test_a_card_whose_picture_is_not_its_columns_is_refused(
    tmp_path: Path, image: dict[str, int] | None, code: str
) -> None:
    weights = initial_weights(CNN, DIGITS, np.random.default_rng(0))
    release = make_release(CNN, DIGITS, weights, contract_id="ab" * 32, round=2, privacy={"unit": "example"})
    file, card = save_release(tmp_path / "model", release)
    values = json.loads(card.read_text("utf-8"))
    values["model"] |= {"image": image}
    if image is None:
        del values["model"]["image"]
    card.write_bytes(canonical_bytes(values))
    with pytest.raises(InputError) as caught:
        load_release(file)
    assert (caught.value.code, caught.value.file) == (code, str(card))


# A whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    """Two rounds with defences, settled and handed over."""
    folder = tmp_path_factory.mktemp("cnn")
    plain = CNN.plain()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "RESEND_SECONDS", 0.0)
        federation = make_federation(
            folder / "run",
            noise=lambda _: SystemNoise(),
            base=initial_weights(CNN, DIGITS, np.random.default_rng(0)),
            auditor=CLAUSE,
            training__rounds=2,
            training__learning_rate="1",
            defences={"clip": "median-signal", "wreckers": "reject", "negatives": "0.1", "dispute_hours": 1},
            **{f"model__{key}": plain[key] for key in ("kind", "hidden", "image", "convolutions")},
            **EVERYBODY_IS_PAID,
        )
        assert federation.run(accept_test_noise=False) == "completed"
    handed_over(federation, folder / "handed")
    return federation, folder / "handed"


def test_its_evidence_verifies_and_its_values_add_up(run: tuple[Federation, Path]) -> None:
    federation, folder = run
    found = verify_folder(folder / "evidence", Trust.of(federation.contract), privacy=False)
    assert (found.faults, found.exit_code) == ((), 4), "nobody countersigned the close"
    scores = [body.scores for e in federation.entries() if isinstance(body := e.open(), ScoresOpened)]
    values = period_values(scores, federation.contract)
    assert sum(values.values()) == total_value(scores, federation.contract)
    fall = scores[0].losses[0][0] - scores[-1].losses[-1][0]
    assert total_value(scores, federation.contract) == Fraction(fall, len(federation.validation))


def test_an_auditor_finds_the_same_integers(run: tuple[Federation, Path]) -> None:
    _, folder = run
    record = reevaluate(folder, AUDITOR, (SIGNING_KEY, OPENING_KEY))[1]
    assert (record.differing, record.differences, record.largest, record.evaluated) == (0, (), 0, 32)


def test_it_is_trained_again_for_every_coalition(run: tuple[Federation, Path]) -> None:
    federation, _ = run
    rows = {agent.desk.participant: agent.examples for agent in federation.agents.values()}
    base = initial_weights(CNN, DIGITS, np.random.default_rng(0))
    found = retraining.audit(federation.contract, rows, federation.validation, base, draws=2, seed=11)
    for draw in found.draws:
        assert sum(draw.retrained.values()) == draw.total
