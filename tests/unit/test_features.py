"""Features: the schema applied, its errors, the keyed choice of rows, the validation set's root."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.support.models_kit import a_schema, category, duplicate_count, number, random_examples

from fedpact_contract import merkle
from fedpact_contract.errors import InputError
from fedpact_contract.log import validation_leaf
from fedpact_contract.shape import feature_count
from fedpact_models.features import (
    Examples,
    encode,
    encode_features,
    row_bytes,
    select_rows,
    validation_root,
)
from fedpact_models.tables import first_line, read_table

AGE = number("age", 0, 100)
CITY = category("city", ["Wuhan", "Xi'an"])
LABEL = {"name": "y", "classes": ["no", "yes"], "rule": "value"}


def _fault(schema: Any, values: dict[str, Any], **frame: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        encode(schema, pl.DataFrame(values, **frame), file="rows.csv")
    assert caught.value.file == "rows.csv"
    return caught.value


def test_numbers_are_clipped_and_scaled_and_categories_one_hot() -> None:
    schema = a_schema(AGE, CITY, label=LABEL, feature_scale=2)
    table = pl.DataFrame({"y": ["no", "yes", "yes"], "city": ["Xi'an", "Wuhan", "Wuhan"], "age": [25, 150, -3]})
    examples = encode(schema, table, file="t")
    assert feature_count(schema) == 4
    np.testing.assert_array_equal(examples.x, np.array([[-0.5, -1, 1, 1], [1, 1, -1, 1], [-1, 1, -1, 1]]))
    assert examples.y.tolist() == [0, 1, 1]
    assert (examples.x.dtype, examples.y.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("columns", [1, 63, 64])
def test_the_last_feature_is_constant_and_counts_in_the_scale(columns: int) -> None:
    schema = a_schema(*(number(f"f{i}") for i in range(columns)), label=LABEL, feature_scale=2)
    table = pl.DataFrame({f"f{i}": [0, 16, 99] for i in range(columns)} | {"y": ["no", "no", "yes"]})
    expected = np.ones((3, columns + 1))
    expected[0, :-1] = -1
    expected *= 2 / np.sqrt(columns + 1)
    np.testing.assert_array_equal(encode(schema, table, file="t").x, expected)
    np.testing.assert_array_equal(encode_features(schema, table.drop("y"), file="t")[0], expected)
    assert feature_count(schema) == columns + 1
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 2)


@pytest.mark.parametrize(
    "cells",
    [
        pl.Series([7, 8]),
        pl.Series([7.0, 8.0], dtype=pl.Float32),
        pl.Series([" 7", "8.0"]),
        pl.Series(["7e0", "+8"]),
        pl.Series(["7", "8"], dtype=pl.Categorical),
        pl.Series(["7.00", "8"]).cast(pl.Decimal(10, 2)),
    ],
)
def test_numbers_are_accepted_in_every_spelling(cells: pl.Series) -> None:
    table = pl.DataFrame({"age": cells, "y": ["no", "no"]})
    expected = np.array([[2 * 0.07 - 1, 1], [2 * 0.08 - 1, 1]]) / 2**0.5
    np.testing.assert_allclose(encode(a_schema(AGE, label=LABEL), table, file="t").x, expected, rtol=1e-15)


@pytest.mark.parametrize(
    "cells", [[3, 10], [3.0, 10.0], ["3", "10"], [" 3.0", "10."], pl.Series(["3", "10"], dtype=pl.Categorical)]
)
def test_a_class_matches_as_integer_float_and_text(cells: Any) -> None:
    schema = a_schema(AGE, label={"name": "y", "classes": ["10", "3"], "rule": "value"})
    assert encode(schema, pl.DataFrame({"age": [1, 2], "y": cells}), file="t").y.tolist() == [1, 0]


def test_spelling_comes_before_value_and_a_code_is_no_number() -> None:
    schema = a_schema(category("c", ["1", "1.0", "-0.50", "no"]), label=LABEL)

    def places(*cells: str) -> list[int]:
        x, _ = encode_features(schema, pl.DataFrame({"c": cells}), file="t")
        return x[:, :-1].argmax(axis=1).tolist()

    assert places("1", "1.0", "-0.5") == [0, 1, 2]
    for strange in ("1.00", "01", "1e0", "NO"):  # two choices have that number; a code; no plain number; another text
        with pytest.raises(InputError, match="DATA_UNKNOWN_CATEGORY"):
            places(strange)


def test_booleans_are_numbers_and_words() -> None:
    schema = a_schema(number("b", 0, 1), label={"name": "y", "classes": ["false", "true"], "rule": "value"})
    examples = encode(schema, pl.DataFrame({"b": [True, False], "y": [True, False]}), file="t")
    assert np.sign(examples.x).tolist() == [[1, 1], [-1, 1]]
    assert examples.y.tolist() == [1, 0]


def test_the_label_rule_above_is_strict() -> None:
    label = {"name": "pm25", "classes": ["good", "bad"], "rule": "above", "threshold": "75"}
    table = pl.DataFrame({"age": [1, 1, 1], "pm25": ["75", "75.0001", "9"]})
    assert encode(a_schema(AGE, label=label), table, file="t").y.tolist() == [0, 1, 0]
    assert _fault(a_schema(AGE, label=label), {"age": [1], "pm25": ["x"]}).code == "DATA_NOT_A_NUMBER"
    assert _fault(a_schema(AGE, label=label), {"age": [1], "pm25": [None]}).code == "DATA_MISSING_VALUE"


def test_missing_values_are_filled_or_the_row_dropped() -> None:
    schema = a_schema(
        number("a", 0, 4, "fill", fill=1),
        category("c", ["u", "v"], "fill", fill="v"),
        number("d", 0, 4, "drop"),
        label=LABEL,
    )
    table = pl.DataFrame(
        {"a": [None, 4, "what"], "c": ["", "u", "w"], "d": [0, 4, None], "y": ["no", "yes", None]}, strict=False
    )
    examples = encode(schema, table, file="t")  # the last row's other faults are left out with it
    expected = np.array([[-0.5, -1, 1, -1, 1], [1, 1, -1, 1, 1]]) / 5**0.5
    np.testing.assert_allclose(examples.x, expected, rtol=1e-15)
    assert examples.y.tolist() == [0, 1]
    x, kept = encode_features(schema, table.drop("y"), file="t")
    assert kept.tolist() == [True, True, False]
    np.testing.assert_array_equal(x, examples.x)


FAULTS = [
    ({"age": [1, 2, "x3", "x4"], "city": ["Wuhan"] * 4}, "DATA_NOT_A_NUMBER", "age", 2, 3),
    ({"age": [[1], [2], None, [4]], "city": ["Wuhan"] * 4}, "DATA_NOT_A_NUMBER", "age", 3, 1),
    ({"age": [1, "inf", 3, "nan"], "city": ["Wuhan"] * 4}, "DATA_NOT_FINITE", "age", 2, 2),
    ({"age": [1.0, 2.0, 3.0, float("nan")], "city": ["Wuhan"] * 4}, "DATA_NOT_FINITE", "age", 1, 4),
    ({"age": [1, None, 3, " "], "city": ["Wuhan"] * 4}, "DATA_MISSING_VALUE", "age", 2, 2),
    ({"age": [1] * 4, "city": ["Wuhan", "Secretville", None, "Wuhan"]}, "DATA_UNKNOWN_CATEGORY", "city", 1, 2),
    ({"age": [1] * 4, "city": [b"Wuhan"] * 4}, "DATA_UNKNOWN_CATEGORY", "city", 4, 1),
    ({"age": [1] * 4, "city": ["Wuhan"] * 4, "y": ["no", "no", "secret", "no"]}, "DATA_UNKNOWN_CLASS", "y", 1, 3),
    ({"age": [1] * 4, "city": ["Wuhan"] * 4, "y": ["no", "no", "no", None]}, "DATA_MISSING_VALUE", "y", 1, 4),
]


@pytest.mark.parametrize(("values", "code", "column", "count", "first"), FAULTS)
def test_a_fault_names_file_column_rule_count_and_first_row_but_no_value(
    values: dict[str, Any], code: str, column: str, count: int, first: int
) -> None:
    fault = _fault(a_schema(AGE, CITY, label=LABEL), {"y": ["no"] * 4} | values, strict=False)
    assert (fault.code, fault.field) == (code, column)
    assert fault.message.startswith(f"The column {column} holds ")
    assert fault.message.endswith(f" in {count} of 4 rows; the first is row {first} (without header).")
    assert fault.rule
    assert not re.search("x3|x4|secret|nan|inf|Wuhan", str(fault), re.IGNORECASE)


@pytest.mark.parametrize(("header", "column_names", "line"), [("age,city,y\n", None, 5), ("", ("age", "city", "y"), 4)])
@pytest.mark.parametrize("empty", ["", "4,Wuhan,no"])
def test_a_row_of_a_csv_file_is_named_by_the_line_that_an_editor_shows(
    tmp_path: Path, header: str, column_names: tuple[str, ...] | None, line: int, empty: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}1,Wuhan,no\n2,Wuhan,no\n{empty}\nx,Wuhan,no\n")
    table = read_table(path, kind="csv", column_names=column_names)
    begins = first_line("csv", column_names)
    drop = AGE | {"missing": "drop"}
    for read in (encode, encode_features):
        with pytest.raises(InputError) as err:
            read(a_schema(drop, CITY, label=LABEL), table, file=str(path), first_line=begins)
        assert err.value.message.endswith(f"in 1 of 4 rows; the first is line {line}.")
    assert path.read_text().splitlines()[line - 1].startswith("x,")
    assert first_line("ndjson", None) is None


def test_absent_columns_are_named() -> None:
    schema = a_schema(AGE, CITY, label=LABEL)
    assert _fault(schema, {"city": ["Wuhan"], "y": ["no"]}).field == "age"
    both = _fault(schema, {"y": ["no"]})
    assert (both.code, both.field) == ("DATA_COLUMN_MISSING", "age")
    assert "and 1 more" in both.message
    label = _fault(schema, {"age": [1], "city": ["Wuhan"]})
    assert (label.code, label.field) == ("DATA_LABEL_MISSING", "y")


def test_nothing_left_is_an_error() -> None:
    schema = a_schema(number("age", 0, 100, "drop"), label=LABEL)
    assert _fault(schema, {"age": [None, None], "y": ["no", "no"]}).code == "DATA_EMPTY"
    assert _fault(schema, {"age": [], "y": []}).code == "DATA_EMPTY"


def test_row_bytes_are_canonical() -> None:
    assert row_bytes(np.array([-0.0, 1.0]), 3) == b"fedpact.row.v1:" + bytes(8) + bytes.fromhex(
        "000000000000f03f0300000000000000"
    )


def test_selection_is_keyed_exact_and_refuses_too_few() -> None:
    examples = random_examples(np.random.default_rng(0), 60, 3, 2)
    one, two = select_rows(examples, 20, b"k" * 32), select_rows(examples, 20, b"l" * 32)
    assert len(one) == len(two) == 20
    rows = {row_bytes(x, int(y)) for x, y in zip(examples.x, examples.y, strict=True)}
    chosen = [{row_bytes(x, int(y)) for x, y in zip(e.x, e.y, strict=True)} for e in (one, two)]
    assert chosen[0] <= rows
    assert chosen[0] != chosen[1]
    with pytest.raises(InputError, match="DATA_TOO_FEW_ROWS"):
        select_rows(examples, 61, b"k")


def test_appended_rows_never_push_out_more_than_they_bring() -> None:
    examples = random_examples(np.random.default_rng(1), 40, 3, 2)
    more = Examples(x=np.vstack([examples.x, examples.x[:1] + 0.5]), y=np.append(examples.y, 0))
    before, after = (select_rows(e, 20, b"k").x.tolist() for e in (examples, more))
    assert sum(row not in after for row in before) <= 1


def test_duplicates_are_counted_and_chosen_apart() -> None:
    x, y = np.zeros((5, 2)), np.array([0, 0, 0, 1, 1])
    examples = Examples(x=x, y=y)
    assert duplicate_count(examples) == 3
    assert len(select_rows(examples, 5, b"k")) == 5
    assert duplicate_count(random_examples(np.random.default_rng(0), 50, 3, 2)) == 0


def test_validation_root_is_the_tree_over_salted_rows() -> None:
    examples = random_examples(np.random.default_rng(0), 5, 3, 2)
    salts = [bytes([i]) * 32 for i in range(5)]
    leaves = [validation_leaf(s, row_bytes(x, int(y))) for s, x, y in zip(salts, examples.x, examples.y, strict=True)]
    root = validation_root(examples, salts)
    assert root == merkle.root(leaves).hex()
    assert root != validation_root(examples, [salts[-1], *salts[:-1]])
    for wrong in (salts[:4], [b"x" * 31, *salts[1:]], [salts[1], *salts[1:]]):
        with pytest.raises(InputError, match="VALIDATION_SALTS"):
            validation_root(examples, wrong)
