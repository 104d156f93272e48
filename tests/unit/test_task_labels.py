"""Labels that are no classes: what a contract says of them, how cells become targets, what a model then tells."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.support.central import CENTRAL
from tests.support.contract_kit import change
from tests.support.models_kit import a_schema, duplicate_count, number, training_contract
from tests.support.noise import FixedNoise
from tests.support.task_kit import TASKS, TaskCase

from fedpact_client import simulation
from fedpact_client.simulation import seconds_a_step, simulated_run
from fedpact_contract import shape
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_contract.statistics import cell_count, results
from fedpact_contract.text import render
from fedpact_models.audit import audit
from fedpact_models.evaluate import evaluate
from fedpact_models.features import (
    Examples,
    encode,
    pack_rows,
    row_bytes,
    select_rows,
    target_type,
    unpack_rows,
    validation_root,
)
from fedpact_models.registry import parameter_count
from fedpact_models.release import load_release, make_release, predict, save_release
from fedpact_models.statistics import noised_sums
from fedpact_models.training import local_update
from fedpact_server import validation

AGE = number("age", 0, 100)
SCORE = {"name": "score", "rule": "number", "low": "10", "high": "70"}
DAYS = {"name": "days", "rule": "survival", "event": "died", "outcomes": ["0", "1"], "cuts": ["10", "20", "50"]}
OTHERS = {name: case for name, case in TASKS.items() if name != "classification"}
cases = pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)


class NoNoise(FixedNoise):
    """Draws rows, and adds nothing."""

    def normal(self, n: int) -> Any:
        return np.zeros(n)


def a_contract(case: TaskCase, *hidden: int, **changes: Any) -> Contract:
    return training_contract(
        case.schema(6),
        case.model(*hidden),
        (200, 300),
        contribution={"loss": case.loss},
        privacy={"epsilon": 3, "delta": "0.00001", "noise_multiplier": "1.25"},
        **changes,
    )


def changed(contract: Contract, **parts: Any) -> dict[str, Any]:
    return contract.plain() | parts


# The contract


@pytest.mark.parametrize("case", TASKS.values(), ids=TASKS)
def test_the_loss_and_the_model_are_the_labels(case: TaskCase) -> None:
    contract = a_contract(case)
    assert a_contract(case, 5).model.kind == "mlp"
    for other in TASKS.values():
        if other is case:
            continue
        with pytest.raises(InputError) as caught:
            Contract.parse(changed(contract, contribution=contract.contribution.plain() | {"loss": other.loss}))
        assert (caught.value.code, caught.value.field) == ("CONTRACT_LOSS", "contribution.loss")
        assert f'"{case.loss}"' in caught.value.remedy
        if other.kind != case.kind:
            with pytest.raises(InputError) as caught:
                Contract.parse(changed(contract, model=contract.model.plain() | {"kind": other.kind}))
            assert (caught.value.code, caught.value.field) == ("CONTRACT_MODEL", "model.kind")
            assert f'"{case.kind}"' in caught.value.remedy
    with pytest.raises(InputError) as caught:
        Contract.parse(changed(contract, model=contract.model.plain() | {"hidden": [4]}))
    assert (caught.value.code, caught.value.field) == ("CONTRACT_MODEL", "model.hidden")


FORMS = [
    ({"low": 70}, "CONTRACT_BOUNDS", "data.label"),
    ({"classes": ["a", "b"]}, "CONTRACT_UNKNOWN_KEY", "data.label.classes"),
    ({"high": None}, "CONTRACT_MISSING_KEY", "data.label.high"),
    ({"rule": "numeric"}, "CONTRACT", "data.label"),
    (DAYS | {"cuts": ["10", "10"]}, "CONTRACT_CUTS", "data.label.cuts"),
    (DAYS | {"cuts": ["0", "10"]}, "CONTRACT_CUTS", "data.label.cuts"),
    (DAYS | {"cuts": []}, "CONTRACT", "data.label.cuts"),
    (DAYS | {"outcomes": ["a", "a"]}, "CONTRACT_OUTCOMES", "data.label.outcomes"),
    (DAYS | {"outcomes": ["a"]}, "CONTRACT", "data.label.outcomes"),
    (DAYS | {"event": "f2"}, "CONTRACT_COLUMN_TWICE", "data.columns"),
    (DAYS | {"event": "days"}, "CONTRACT_COLUMN_TWICE", "data.columns"),
]


@pytest.mark.parametrize(("keys", "code", "field"), FORMS)
def test_a_label_of_another_form_is_refused_by_name(keys: dict[str, Any], code: str, field: str) -> None:
    contract = a_contract(TASKS["regression"])
    base = {} if "cuts" in keys else SCORE
    label = {key: value for key, value in (base | keys).items() if value is not None}
    with pytest.raises(InputError) as caught:
        Contract.parse(changed(contract, data=contract.data.plain() | {"label": label}))
    assert (caught.value.code, caught.value.field) == (code, field)


def test_the_text_says_what_is_predicted_and_what_is_measured() -> None:
    text = re.sub(r"\s+", " ", render(a_contract(TASKS["regression"])))
    assert 'Predicted is the column digit, a number from 0 to 9 (rule "number")' in text
    assert 'The loss "squared-error" of a row is half the squared error of the scaled label' in text


def test_the_text_says_when_an_event_counts() -> None:
    contract = a_contract(TASKS["survival"])
    text = re.sub(r"\s+", " ", render(contract))
    assert "the column digit is the duration, and seen says whether the event came then (yes)" in text
    assert "0 - 2, 2 - 4.5, 4.5 - 7, 7 - 8, above 8" in text
    assert 'The loss "discrete-hazard" of a row is minus the logarithm' in text
    assert contract.columns_read[-2:] == ("digit", "seen")


@pytest.mark.parametrize("case", TASKS.values(), ids=TASKS)
def test_the_contract_counts_its_parameters_as_the_model_has_them(case: TaskCase) -> None:
    for hidden in ((), (5,), (5, 4)):
        contract = a_contract(case, *hidden)
        assert shape.parameter_count(contract.model, contract.data) == parameter_count(contract.model, contract.data)


# From cells to targets


def test_a_number_is_scaled_by_its_public_bounds() -> None:
    table = pl.DataFrame({"age": [1, 2, 3, 4], "score": ["10", "40", " 70 ", "25"]})
    examples = encode(a_schema(AGE, label=SCORE), table, file="t")
    assert examples.y.tolist() == [-1.0, 0.0, 1.0, -0.5]
    assert examples.y.dtype == np.float64


def test_a_duration_becomes_the_intervals_that_were_seen() -> None:
    cells = [
        ("0", "1", "came in the first interval"),
        ("10", "1", "which ends with its end"),
        ("10.5", "1", "came in the second"),
        ("50", "1", "came in the last"),
        ("51", "1", "came beyond: lived through all"),
        ("0", "0", "nothing was seen"),
        ("5", "0", "watched to the middle of the first: lived through it"),
        ("14.9", "0", "not beyond the middle of the second"),
        ("35", "0", "lived through the third"),
        ("999", "0", "lived through all"),
    ]
    table = pl.DataFrame({"age": [1] * 10, "days": [c[0] for c in cells], "died": [c[1] for c in cells]})
    examples = encode(a_schema(AGE, label=DAYS), table, file="t")
    found = dict(zip((c[2] for c in cells), (divmod(code, 2) for code in examples.y.tolist()), strict=True))
    assert list(found.values()) == [(0, 1), (0, 1), (1, 1), (2, 1), (3, 0), (0, 0), (1, 0), (1, 0), (3, 0), (3, 0)]
    assert examples.y.dtype == np.int64


UNSEEN = [
    ({"days": ["1", "-2", "3", "-0.5"]}, "DATA_LABEL_BOUNDS", "days", 2, 2),
    ({"days": ["1", "2", "x", "4"]}, "DATA_NOT_A_NUMBER", "days", 1, 3),
    ({"days": ["1", "2", "3", "inf"]}, "DATA_NOT_FINITE", "days", 1, 4),
    ({"days": ["1", None, "3", "4"]}, "DATA_MISSING_VALUE", "days", 1, 2),
    ({"died": ["0", "1", "2", "yes"]}, "DATA_UNKNOWN_EVENT", "died", 2, 3),
    ({"died": ["0", "1", "1", None]}, "DATA_MISSING_VALUE", "died", 1, 4),
]


@pytest.mark.parametrize(("cells", "code", "column", "count", "first"), UNSEEN)
def test_a_duration_or_an_event_that_is_none_is_named(
    cells: dict[str, Any], code: str, column: str, count: int, first: int
) -> None:
    table = {"age": [1] * 4, "days": ["1", "2", "3", "4"], "died": ["0", "1", "0", "1"]} | cells
    with pytest.raises(InputError) as caught:
        encode(a_schema(AGE, label=DAYS), pl.DataFrame(table), file="ward")
    assert (caught.value.code, caught.value.file, caught.value.field) == (code, "ward", column)
    assert caught.value.message.endswith(f" in {count} of 4 rows; the first is row {first} (without header).")
    with pytest.raises(InputError) as caught:
        encode(a_schema(AGE, label=DAYS), pl.DataFrame(table).drop("died"), file="ward")
    assert (caught.value.code, caught.value.field) == ("DATA_LABEL_MISSING", "died")


FAULTS = [
    ([10, 20, 70.5, 9], "DATA_LABEL_BOUNDS", 2, 3),
    (["10", "-20", "30", "40"], "DATA_LABEL_BOUNDS", 1, 2),
    ([10, None, 20, None], "DATA_MISSING_VALUE", 2, 2),
    (["10", "x", "20", "30"], "DATA_NOT_A_NUMBER", 1, 2),
    (["10", "20", "inf", "nan"], "DATA_NOT_FINITE", 2, 3),
]


@pytest.mark.parametrize(("cells", "code", "count", "first"), FAULTS)
def test_a_cell_that_is_no_target_is_named_by_file_column_and_row(
    cells: list[Any], code: str, count: int, first: int
) -> None:
    with pytest.raises(InputError) as caught:
        encode(a_schema(AGE, label=SCORE), pl.DataFrame({"age": [1] * 4, "score": cells}, strict=False), file="exams")
    fault = caught.value
    assert (fault.code, fault.file, fault.field) == (code, "exams", "score")
    assert fault.message.endswith(f" in {count} of 4 rows; the first is row {first} (without header).")
    assert "10" in (fault.rule or "")
    assert "70.5" not in str(fault)
    assert fault.remedy


@pytest.mark.parametrize(
    ("label", "cells"),
    [
        (SCORE, {"score": ["10", None, "70", "x"]}),
        (DAYS, {"days": ["5", None, "60", "1"], "died": ["1", "0", "1", "?"]}),
        (DAYS, {"days": ["5", "1", "60", "1"], "died": ["1", None, "1", "?"]}),
        ({"name": "ill", "classes": ["no", "yes"], "rule": "value"}, {"ill": ["no", None, "yes", "?"]}),
    ],
)
def test_rows_without_a_label_are_left_out_where_the_contract_says_so(
    label: dict[str, Any], cells: dict[str, Any]
) -> None:
    schema = a_schema(number("age", 0, 100, "drop"), label=label | {"missing": "drop"})
    table = pl.DataFrame({"age": [1, 2, 3, None]} | cells)  # the last row's own faults are left out with it
    assert len(encode(schema, table, file="t")) == 2
    with pytest.raises(InputError) as caught:
        encode(a_schema(number("age", 0, 100, "drop"), label=label), table, file="t")
    assert caught.value.code == "DATA_MISSING_VALUE"
    assert "missing: drop" not in str(caught.value)


@cases
def test_rows_travel_sealed_and_come_back(case: TaskCase) -> None:
    examples = case.examples(np.random.default_rng(0), 50)
    salts = [bytes([i]) * 32 for i in range(50)]
    found, again = unpack_rows(pack_rows(examples, salts), examples.x.shape[1], target_type(case.schema().label))
    assert (found.x.tobytes(), found.y.tobytes(), found.y.dtype) == (
        examples.x.tobytes(),
        examples.y.tobytes(),
        examples.y.dtype,
    )
    assert again == tuple(salts)
    assert validation_root(found, salts) == validation_root(examples, salts)
    twice = Examples(x=np.vstack([examples.x, examples.x[:1]]), y=np.append(examples.y, examples.y[0]))
    assert duplicate_count(twice) == 1
    moved = Examples(x=np.vstack([examples.x, examples.x[:1]]), y=np.append(examples.y, examples.y[1]))
    assert (duplicate_count(moved) == 0) == (examples.y[0] != examples.y[1])
    assert len(select_rows(examples, 20, b"k")) == 20


def test_a_target_of_zero_has_one_spelling() -> None:
    assert row_bytes(np.zeros(1), np.float64(-0.0)) == row_bytes(np.zeros(1), np.float64(0.0))
    assert row_bytes(np.zeros(1), np.float64(0.5))[-8:] == bytes.fromhex("000000000000e03f")


def test_a_validation_set_of_numbers_is_kept_and_checked(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    data = a_schema(AGE, label=SCORE)
    table = pl.DataFrame({"age": [1, 2, 3], "score": [10.0, 20.5, 30.0]}, strict=False)
    made = validation.build(data, [validation.Source(giver="operator", table=table, name="rows")])
    validation.save(tmp_path, made)
    loaded = validation.load(tmp_path, made.root)
    assert loaded.examples.y.tobytes() == made.examples.y.tobytes()
    same = table.with_columns(score=pl.lit(20))
    with pytest.raises(InputError, match="of one value") as caught:
        validation.build(data, [validation.Source(giver="operator", table=same, name="rows")])
    assert caught.value.code == "VALIDATION_ONE_CLASS"


def test_validation_rows_of_which_no_two_can_be_ordered_are_refused() -> None:
    table = pl.DataFrame({"age": [1, 2, 3], "days": [15, 15, 4], "died": [1, 1, 0]})
    with pytest.raises(InputError) as caught:
        validation.build(a_schema(AGE, label=DAYS), [validation.Source(giver="operator", table=table, name="rows")])
    assert (caught.value.code, caught.value.field) == ("VALIDATION_NO_PAIRS", "data.label")


# Training, and what is made up


@cases
@pytest.mark.parametrize("hidden", [(), (12,)])
def test_plain_steps_at_client_level_lower_the_loss(case: TaskCase, hidden: tuple[int, ...]) -> None:
    longer = {"training__local_steps": 60, "privacy__max_update_norm": 9}
    contract = Contract.parse(change(a_contract(case, *hidden).plain(), CENTRAL | longer, "__"))
    rows = simulation._World(contract, np.random.default_rng(1)).rows(200)
    base = np.random.default_rng(2).normal(size=parameter_count(contract.model, contract.data)) * 0.2
    step = local_update(contract, base, rows, FixedNoise(1))
    before, _ = evaluate(contract.model, contract.data, base, rows)
    after, _ = evaluate(contract.model, contract.data, base + step, rows)
    assert after < 0.97 * before


@cases
def test_a_quote_simulates_the_task(case: TaskCase) -> None:
    contract = a_contract(case)
    me = contract.participants[0].id
    assert seconds_a_step(contract, me, FixedNoise(0)) > 0
    values: dict[float, list[float]] = {0.0: [], 1.0: []}
    for wrong, found in values.items():
        for seed in range(6):
            draw = simulated_run(
                contract, me, wrong, noise=FixedNoise(seed), rng=np.random.default_rng(seed), in_time=lambda: True
            )
            assert draw is not None
            found.append(float(draw.values[me]))
    assert np.mean(values[0.0]) > np.mean(values[1.0]), "labels of no meaning are worth less"


@cases
def test_an_audit_runs_on_made_up_targets(case: TaskCase) -> None:
    found = audit(a_contract(case), noise=FixedNoise(3), coins=FixedNoise(8), seconds=60, canaries=400)
    assert found.faults == {}
    assert found.largest_contribution == pytest.approx(1, abs=1e-5), "a row far out of range is clipped, and reaches it"


# What a model tells


def test_a_prediction_is_in_the_labels_unit_and_within_its_bounds(tmp_path: Path) -> None:
    data, model = a_schema(number("age", 0, 100, "drop"), label=SCORE), TASKS["regression"].model()
    weights = np.array([1.0, 0.5]) * 2**0.5  # of the scaled age, and of the constant
    release = make_release(model, data, weights, contract_id="ab" * 32, round=1, privacy={})
    assert release.card.task == "regression"
    told = predict(
        load_release(save_release(tmp_path / "m", release)[0]), pl.DataFrame({"age": [0, 50, None, 100]}), file="t"
    )
    assert told.columns == ["row", "predicted"]
    assert told["predicted"].to_list() == [pytest.approx(25), pytest.approx(55), None, 70]
    nothing = predict(release, pl.DataFrame({"age": [None, None]}, schema={"age": pl.Int64}), file="t")
    assert nothing["predicted"].to_list() == [None, None]


def test_statistics_ask_of_a_number_what_numbers_are_asked() -> None:
    data = a_schema(AGE, label=SCORE)
    table = pl.DataFrame({"age": [1] * 4, "score": [10, 40, 70, 55]})
    queries = (
        {"kind": "mean", "column": "score"},
        {"kind": "histogram", "column": "score", "bins": 2},
        {"kind": "count", "column": "score", "at_least": 55},
    )
    case = TASKS["regression"]
    plain = training_contract(data, case.model(), (4, 30, 40), contribution={"loss": case.loss}).plain()
    contract = Contract.parse(plain | {"statistics": {"noise_multiplier": 1, "queries": list(queries)}})
    flat = noised_sums(contract, encode(data, table, file="t"), NoNoise(0)).tolist()
    assert contract.statistics is not None
    sizes = np.cumsum([0, *(cell_count(contract, q) for q in contract.statistics.queries)])
    found = results(contract, {contract.participants[0].id: [flat[a:b] for a, b in pairwise(sizes)]})
    answers = [next(iter(query["answers"].values()))["values"] for query in found]
    assert answers[0] == [pytest.approx((10 + 40 + 70 + 55) / 4)]
    assert answers[1:] == [[1, 3], [2]]
    with pytest.raises(InputError, match="CONTRACT_STATISTICS"):
        Contract.parse(
            plain | {"statistics": {"noise_multiplier": 1, "queries": [{"kind": "histogram", "column": "score"}]}}
        )


def test_a_prediction_of_survival_is_a_mean_duration_and_a_chance(tmp_path: Path) -> None:
    data, case = a_schema(number("age", 0, 100), label=DAYS), TASKS["survival"]
    weights = np.zeros(6)
    weights[4] = -1e6 * 2**0.5  # of older people the hazard in the last interval is nothing, of the young certain
    release = make_release(case.model(), data, weights, contract_id="ab" * 32, round=1, privacy={})
    assert release.card.task == "survival"
    loaded = load_release(save_release(tmp_path / "m", release)[0])
    told = predict(loaded, pl.DataFrame({"age": [0, 50, 100]}), file="t")
    assert told.columns == ["row", "predicted", "survival"]
    assert told["survival"].to_list() == pytest.approx([0, 0.125, 0.25])
    seen = 10 * 0.75 + 10 * 0.375
    assert told["predicted"].to_list() == pytest.approx([seen + 30 * (0.25 + end) / 2 for end in (0, 0.125, 0.25)])


def test_statistics_ask_of_intervals_and_of_outcomes() -> None:
    data, case = a_schema(AGE, label=DAYS), TASKS["survival"]
    table = pl.DataFrame({"age": [1] * 4, "days": [1, 12, 60, 30], "died": [1, 1, 1, 0]})
    queries = [
        {"kind": "histogram", "column": "days"},
        {"kind": "histogram", "column": "died"},
        {"kind": "count", "column": "days", "value": "above 50"},
    ]
    plain = training_contract(data, case.model(), (4, 30, 40), contribution={"loss": case.loss}).plain()
    contract = Contract.parse(plain | {"statistics": {"noise_multiplier": 1, "queries": queries}})
    flat = noised_sums(contract, encode(data, table, file="t"), NoNoise(0)).tolist()
    assert flat == [1, 1, 1, 1, 2, 2, 1]
