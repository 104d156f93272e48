"""federation.toml: nothing that decides about training or privacy has a default, and each fault is named."""

import dataclasses
import re
import shutil
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.demo_kit import own_data
from tests.support.federation import NOW

from fedpact_contract.contract import Baseline, Contract, Party, Software, load_toml
from fedpact_contract.errors import FailedError, InputError
from fedpact_contract.sketch import sketch
from fedpact_server.demo.run import Demo
from fedpact_server.demo.scenario import (
    MAX_EPSILON,
    MAX_ROUNDS,
    Description,
    agent_blocks,
    of_digits,
    of_folder,
    template,
)

ROOT = Path(__file__).resolve().parents[2]
PRIVACY = ("epsilon", "delta", "max_grad_norm", "sample_rate", "spare_attempts", "data_set_epsilon")
TRAINING = ("rounds", "local_steps", "learning_rate")


@pytest.fixture
def folder(tmp_path) -> Path:
    return own_data(tmp_path / "own")


def change(folder: Path, old: str, new: str) -> None:
    path = folder / "federation.toml"
    text = path.read_text("utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), "utf-8")


def fault(folder: Path) -> InputError:
    with pytest.raises(InputError) as err:
        of_folder(folder)
    return err.value


def test_what_is_written_is_what_contract_and_agents_say(folder) -> None:
    change(folder, "spare_attempts = 1", "spare_attempts = 3")
    change(folder, "max_grad_norm = 1", "max_grad_norm = 1.5")
    change(folder, "delta = 0.00001", "delta = 0.000002")
    change(folder, "data_set_epsilon = 8", "data_set_epsilon = 5")
    scenario = of_folder(folder)
    terms = load_toml(template(scenario, NOW), file="template")
    said = {key: terms["privacy"][key] for key in PRIVACY[:-1]}
    assert said == {
        "epsilon": 2,
        "delta": Decimal("0.000002"),
        "max_grad_norm": Decimal("1.5"),
        "sample_rate": Decimal("0.2"),
        "spare_attempts": 3,
    }
    assert [terms["training"][key] for key in TRAINING] == [1, 3, 4]
    for enterprise in scenario.enterprises:
        (block,) = load_toml(agent_blocks(scenario, enterprise), file="agent")["data_sets"]
        assert (block["epsilon"], block["delta"], block["num_examples"]) == (5, Decimal("0.000002"), 100)


@pytest.mark.parametrize("key", [*(f"training.{key}" for key in TRAINING), *(f"privacy.{key}" for key in PRIVACY)])
def test_no_key_of_training_or_privacy_has_a_default(folder, key) -> None:
    path = folder / "federation.toml"
    text = path.read_text("utf-8")
    path.write_text(re.sub(rf"^{key.partition('.')[2]} = .*\n", "", text, count=1, flags=re.MULTILINE), "utf-8")
    err = fault(folder)
    assert (err.code, err.field, err.rule) == ("DATA_DESCRIPTION_MISSING_KEY", key, "no key is left out")
    assert err.file == str(path)


@pytest.mark.parametrize("table", ["training", "privacy"])
def test_neither_table_may_be_left_out(folder, table) -> None:
    path = folder / "federation.toml"
    text = path.read_text("utf-8")
    path.write_text(re.sub(rf"\[{table}\]\n(\w+ = .*\n)+", "", text), "utf-8")
    err = fault(folder)
    assert (err.code, err.field) == ("DATA_DESCRIPTION_MISSING_KEY", table)


@pytest.mark.parametrize(
    ("old", "new", "field", "rule"),
    [
        ("\nepsilon = 2", "\nepsilon = 0", "privacy.epsilon", "above 0"),
        ("\nepsilon = 2", "\nepsilon = -1", "privacy.epsilon", "above 0"),
        ("\nepsilon = 2", "\nepsilon = 4", "privacy.epsilon", "at most 3"),
        ("data_set_epsilon = 8", "data_set_epsilon = 1", "privacy.epsilon", "at most privacy.data_set_epsilon"),
        ("sample_rate = 0.2", "sample_rate = 1", "privacy.sample_rate", "below 1"),
        ("sample_rate = 0.2", 'sample_rate = "x"', "privacy.sample_rate", "a decimal number"),
        ("max_grad_norm = 1", "max_grad_norm = 0", "privacy.max_grad_norm", "above 0"),
        ("data_set_epsilon = 8", "data_set_epsilon = 0", "privacy.data_set_epsilon", "above 0"),
        ("delta = 0.00001", "delta = 0.0001", "privacy.delta", "at most 1e-5"),
        ("spare_attempts = 1", "spare_attempts = -1", "privacy.spare_attempts", "at least 0"),
        ("rounds = 1", "rounds = 0", "training.rounds", "at least 1"),
        ("learning_rate = 4", "learning_rate = 0", "training.learning_rate", "above 0"),
        ('name = "South"', 'name = "North"', "participants.name", "no two alike"),
        ('file = "south.csv"', 'file = "north.csv"', "participants.file", "no two alike"),
        ("low = 0, high = 1", "low = 1, high = 1", "columns.height", "CONTRACT_BOUNDS"),
        ('["red", "blue"]', '["red", "red"]', "columns.colour", "CONTRACT_VOCABULARY"),
        ('missing = "refuse"', 'missing = "fill"', "columns.height", "CONTRACT_FILL"),
        ('rule = "value"', 'rule = "above"', "label", "CONTRACT_LABEL_RULE"),
        ('name = "colour"', 'name = "height"', "columns", "CONTRACT_COLUMN_TWICE"),
        ('file = "validation.csv"', 'file = "validation.csv", fraction = 0.2', "validation", "give either"),
    ],
)
def test_a_broken_rule_is_named_with_file_and_field(folder, old, new, field, rule) -> None:
    change(folder, old, new)
    err = fault(folder)
    assert err.code == "DATA_DESCRIPTION"
    assert err.file == str(folder / "federation.toml")
    assert err.field == field
    assert rule in str(err.rule)


def test_delta_is_held_against_the_largest_file(folder) -> None:
    """20,000 rows allow 1/200,000, which is below 1e-5."""
    rows = (folder / "north.csv").read_text("utf-8").splitlines()
    (folder / "north.csv").write_text("\n".join([rows[0], *rows[1:] * 200]) + "\n", "utf-8")
    err = fault(folder)
    assert (err.code, err.field) == ("DATA_DESCRIPTION", "privacy.delta")
    assert "1/200000" in str(err.rule)
    change(folder, "delta = 0.00001", "delta = 0.000005")
    assert of_folder(folder).privacy.delta == Decimal("0.000005")


def test_an_unknown_key_and_a_file_that_is_not_there_are_named(folder) -> None:
    change(folder, "[privacy]", '[privacy]\nnoise = "low"')
    err = fault(folder)
    assert (err.code, err.field) == ("DATA_DESCRIPTION_UNKNOWN_KEY", "privacy.noise")
    change(folder, 'noise = "low"\n', "")
    (folder / "south.csv").unlink()
    err = fault(folder)
    assert (err.code, err.file) == ("DATA_FILE_MISSING", str(folder / "south.csv"))
    shutil.rmtree(folder)
    err = fault(folder)
    assert (err.code, err.file) == ("DATA_DESCRIPTION", str(folder / "federation.toml"))
    assert "docs/own-data.md" in err.remedy


def test_the_guide_shows_every_key_and_the_hearts_description_is_complete() -> None:
    text = (ROOT / "docs" / "own-data.md").read_text("utf-8")
    shown, _ = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = Description.parse(load_toml(shown, file="own-data.md"), code="TEST")
    assert set(found.training.plain()) == set(TRAINING)
    assert set(found.privacy.plain()) == set(PRIVACY)
    for name in Description.model_fields:
        assert re.search(rf"^(\[+)?{name}\b", shown, re.MULTILINE), f"{name} is not in the guide"
    heart = ROOT / "configs" / "heart" / "federation.toml"
    Description.parse(load_toml(heart.read_text("utf-8"), file=heart), code="TEST")


MEASURED = """[statistics]
noise_multiplier = 20
queries = [{ kind = "mean", column = "height" }, { kind = "count", column = "colour", value = "red" }]
[baseline]
steps = 5
"""


def sketched(terms: dict[str, Any]) -> Contract:
    """The contract that `contract new` would make of the template."""
    for place, item in enumerate(terms["participants"]):
        item |= {"name": f"P{place}", "key": f"{place}" * 64, "sector": "trade", "num_examples": 90}
    operator = Party(name="O", entity_code="9" * 18, key="a" * 64)
    return sketch(terms, operator, Software(release="0", models_digest="0" * 64, shell_digest="0" * 64))


def test_statistics_and_a_baseline_reach_the_contract(folder) -> None:
    path = folder / "federation.toml"
    path.write_text(path.read_text("utf-8") + MEASURED, "utf-8")
    made = sketched(load_toml(template(of_folder(folder), NOW), file="template"))
    assert made.measurements == ("statistics", "baseline")
    assert made.statistics is not None
    assert [q.column for q in made.statistics.queries] == ["height", "colour"]
    assert made.baseline == Baseline(steps=5)
    change(folder, 'value = "red"', 'value = "green"')
    err = fault(folder)
    assert (err.code, err.field) == ("DATA_DESCRIPTION", "statistics.queries.1")
    assert "red, blue" in err.message
    change(folder, MEASURED.replace("red", "green"), "")
    assert sketched(load_toml(template(of_folder(folder), NOW), file="template")).measurements == ()


def test_the_guides_clause_for_entities_fits_the_template(folder) -> None:
    text = (ROOT / "docs" / "own-data.md").read_text("utf-8")
    _, clause = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    made = sketched(load_toml(template(of_folder(folder), NOW) + clause, file="template"))
    assert made.privacy.entity is not None
    assert (made.privacy.entity.column, made.privacy.entity.max_rows) == ("patient_id", 4)


@pytest.mark.parametrize(("rounds", "local_steps", "limit"), [(101, 6, 100), (100_000, 6, 100), (100, 1000, 99)])
def test_too_many_rounds_are_refused_before_any_data_is_read(tmp_path, folder, rounds, local_steps, limit) -> None:
    change(folder, "local_steps = 3", f"local_steps = {local_steps}")
    (folder / "south.csv").unlink()
    with pytest.raises(InputError) as err:
        of_folder(folder, rounds=rounds)
    assert (err.value.code, err.value.field) == ("DEMO_ROUNDS", "--rounds")
    assert f"at most {limit}" in err.value.message
    change(folder, "rounds = 1\n", f"rounds = {min(rounds, 1000)}\n")
    assert rounds > 1000 or (fault(folder).code, fault(folder).field) == ("DEMO_ROUNDS", "training.rounds")


def test_the_limit_of_rounds_is_that_of_a_fresh_agents_policy() -> None:
    policy = load_toml((ROOT / "configs" / "agent.toml").read_text("utf-8"))["policy"]
    assert (policy["max_rounds"], policy["max_epsilon"]) == (MAX_ROUNDS, MAX_EPSILON)


@pytest.mark.parametrize(("participants", "rounds", "field"), [(2, None, "--participants"), (4, 101, "--rounds")])
def test_options_that_are_refused_leave_no_folder(tmp_path, participants, rounds, field) -> None:
    with pytest.raises(InputError) as err:
        of_digits(tmp_path / "demo", participants, rounds)
    assert err.value.field == field
    assert not (tmp_path / "demo").exists()


def test_participants_are_those_of_the_description(folder) -> None:
    assert len(of_folder(folder, participants=2).enterprises) == 2
    with pytest.raises(InputError) as err:
        of_folder(folder, participants=5)
    assert (err.value.code, err.value.field) == ("DEMO_PARTICIPANTS", "--participants")
    assert err.value.file == str(folder / "federation.toml")


def test_a_row_at_fault_is_named_by_its_line(folder) -> None:
    path = folder / "south.csv"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines[:6], "tall" + lines[6][6:], *lines[7:]]) + "\n", "utf-8")
    err = fault(folder)
    assert (err.code, err.file, err.field) == ("DATA_NOT_A_NUMBER", str(path), "height")
    assert err.message.endswith("the first is line 7.")


def test_an_agents_configuration_of_another_form_is_not_written_over(folder, tmp_path) -> None:
    (tmp_path / "agent.toml").write_text("# somebody's own\n")
    scenario = of_folder(folder)
    three = dataclasses.replace(scenario, enterprises=(*scenario.enterprises, scenario.enterprises[0]))
    with pytest.raises(FailedError, match="DEMO_CONFIG"):
        Demo._configure(cast("Demo", SimpleNamespace(scenario=three)), tmp_path, three.enterprises[0])
    assert (tmp_path / "agent.toml").read_text() == "# somebody's own\n"
