"""The delivered model: the round trip, what is noticed when it was changed, and prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.support.models_kit import a_model, a_schema, category, number

from fedpact_contract.arrays import model_digest
from fedpact_contract.errors import FaultError, InputError
from fedpact_models.registry import build, parameter_count
from fedpact_models.release import Release, load_release, make_release, predict, save_release
from fedpact_models.weights import load_flat

SCHEMA = a_schema(
    number("age", 0, 100, "drop"),
    category("city", ["Wuhan", "Xi'an"]),
    label={"name": "y", "classes": ["no", "yes", "maybe"], "rule": "value"},
)
LABEL = {"unit": "example", "epsilon": "2", "delta": "0.00001"}


def _release(*hidden: int) -> Release:
    model = a_model(*hidden)
    weights = np.random.default_rng(0).normal(size=parameter_count(model, SCHEMA))
    return make_release(model, SCHEMA, weights, contract_id="ab" * 32, round=5, privacy=LABEL)


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_a_release_comes_back_whole_by_either_file(tmp_path: Path, hidden: tuple[int, ...]) -> None:
    release = _release(*hidden)
    files = save_release(tmp_path / "model.v1", release)
    assert [f.name for f in files] == ["model.v1.safetensors", "model.v1.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.v1.json", "model.v1.safetensors"]
    for file in files:
        loaded = load_release(file)
        assert loaded.card == release.card
        assert loaded.weights.tobytes() == release.weights.tobytes()


def test_the_files_say_what_they_hold(tmp_path: Path) -> None:
    release = _release(4)
    tensors, card = save_release(tmp_path / "model", release)
    module = build(a_model(4), SCHEMA)
    load_flat(module, release.weights)
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(load_file(tensors)[name], parameter.detach().numpy())
    said = json.loads(card.read_bytes())
    assert said["model_digest"] == model_digest(release.weights.astype("<f8").tobytes())
    assert (said["task"], said["round"], said["contract_id"]) == ("classification", 5, "ab" * 32)
    assert said["privacy"] == LABEL
    assert said["data"]["columns"][0] == {"name": "age", "kind": "number", "low": "0", "high": "100", "missing": "drop"}
    assert said["model"]["hidden"] == [4]


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    file, _ = save_release(tmp_path / "m", _release())
    tensors = load_file(file)
    tensors["0.weight"][1, 3] = np.nextafter(tensors["0.weight"][1, 3], 9)
    save_file(tensors, file)
    with pytest.raises(FaultError) as caught:
        load_release(file)
    assert (caught.value.code, caught.value.file) == ("MODEL_DIGEST", str(file))


@pytest.mark.parametrize("change", ["name", "shape", "type", "more", "less"])
def test_other_tensors_are_noticed(tmp_path: Path, change: str) -> None:
    file, _ = save_release(tmp_path / "m", _release(4))
    tensors: dict[str, Any] = load_file(file)
    if change == "name":
        tensors["bias"] = tensors.pop("2.bias")
    elif change == "shape":
        tensors["0.weight"] = tensors["0.weight"].reshape(-1)
    elif change == "type":
        tensors["0.weight"] = tensors["0.weight"].astype(np.float32)
    elif change == "more":
        tensors["0.bias"] = np.zeros(4)  # the first layer has none
    else:
        del tensors["2.bias"]
    save_file(tensors, file)
    with pytest.raises(FaultError, match="MODEL_TENSORS"):
        load_release(file)


def test_a_card_of_another_model_or_in_another_form_is_noticed(tmp_path: Path) -> None:
    file, card = save_release(tmp_path / "m", _release())
    text = card.read_text()
    card.write_text(text.replace(json.loads(text)["model_digest"], "0" * 64))
    with pytest.raises(FaultError, match="MODEL_DIGEST"):
        load_release(file)
    card.write_text(text.replace('"round":5', '"round": 5'))
    with pytest.raises(InputError, match="CANONICAL_FORM"):
        load_release(file)
    card.write_text(text.replace('"round":5', '"round":-5'))
    with pytest.raises(InputError, match="MODEL_RELEASE_FORM"):
        load_release(file)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none.json"):
        with pytest.raises(InputError, match="RELEASE_FILE_MISSING"):
            load_release(path)
    file, card = save_release(tmp_path / "m", _release())
    file.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="RELEASE_UNREADABLE"):
        load_release(card)
    file.unlink()
    (tmp_path / "d.json").mkdir()
    with pytest.raises(InputError, match="RELEASE_UNREADABLE"):
        load_release(tmp_path / "d")
    with pytest.raises(InputError, match="RELEASE_FILE_MISSING"):
        load_release(card)


def test_what_cannot_be_released_is_refused(tmp_path: Path) -> None:
    good: dict[str, Any] = {"contract_id": "ab" * 32, "round": 1, "privacy": LABEL}
    weights = np.zeros(parameter_count(a_model(), SCHEMA))
    for model, values, code in (
        (weights[:-1], good, "WEIGHTS_SHAPE"),
        (weights + np.nan, good, "WEIGHTS_NOT_FINITE"),
        (weights, good | {"contract_id": "ab"}, "RELEASE_FORM"),
        (weights, good | {"round": -1}, "RELEASE_FORM"),
    ):
        with pytest.raises(InputError, match=code):
            make_release(a_model(), SCHEMA, model, **values)
    with pytest.raises(InputError, match="CANONICAL_FLOAT"):
        save_release(tmp_path / "m", make_release(a_model(), SCHEMA, weights, **good | {"privacy": {"epsilon": 2.0}}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_prediction_gives_class_and_probability_and_leaves_dropped_rows_open(hidden: tuple[int, ...]) -> None:
    release = _release(*hidden)
    table = pl.DataFrame({"age": ["20", None, "80"], "city": ["Wuhan", "Wuhan", "Xi'an"], "other": [1, 2, 3]})
    result = predict(release, table, file="new.csv")
    assert result.columns == ["row", "predicted", "probability"]
    assert result["row"].to_list() == [1, 2, 3]
    assert result.row(1) == (2, None, None)
    module = build(a_model(*hidden), SCHEMA)
    load_flat(module, release.weights)
    x = torch.tensor([[-0.6, 1, -1, 1], [0.6, -1, 1, 1]], dtype=torch.float64) / 4**0.5
    chance, place = torch.softmax(module(x), dim=1).max(dim=1)
    assert [result["predicted"][i] for i in (0, 2)] == [["no", "yes", "maybe"][p] for p in place]
    assert [result["probability"][i] for i in (0, 2)] == pytest.approx(chance.tolist(), rel=1e-12)


def test_prediction_names_what_is_wrong_with_the_table() -> None:
    with pytest.raises(InputError) as caught:
        predict(_release(), pl.DataFrame({"age": [1]}), file="new.csv")
    assert (caught.value.code, caught.value.field, caught.value.file) == ("DATA_COLUMN_MISSING", "city", "new.csv")
    with pytest.raises(InputError, match="DATA_UNKNOWN_CATEGORY"):
        predict(_release(), pl.DataFrame({"age": [1], "city": ["Rome"]}), file="new.csv")
    nothing = predict(_release(), pl.DataFrame({"age": [None], "city": ["Wuhan"]}), file="new.csv")
    assert nothing.row(0) == (1, None, None)
    assert nothing.schema == {"row": pl.Int64, "predicted": pl.String, "probability": pl.Float64}
