"""The demo's data: who gets which rows, in which format, with which labels flipped."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.datasets import load_digits

from fedpact_contract.errors import InputError
from fedpact_models.features import Examples, encode
from fedpact_models.tables import read_table
from fedpact_server.demo import data as demo
from fedpact_server.demo.scenario import agent_blocks, of_digits, template

EVERY_NUMBER = range(3, 13)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[list[demo.Share], Path]:
    return demo.write(tmp_path_factory.mktemp("demo"), 4)


def table_of(share: demo.Share) -> pl.DataFrame:
    """The table as text, columns by name: formats differ in types and order, not in what they say."""
    table = read_table(share.file, kind=share.kind, table=share.table)
    return table.select(pl.col(name).cast(pl.String) for name in sorted(table.columns))


def validation_of(path: Path) -> pl.DataFrame:
    return read_table(path, kind="csv")


def pixels_and_labels(table: pl.DataFrame) -> tuple[list[bytes], np.ndarray]:
    numbers = table.select(pl.col(name).cast(pl.Int64) for name in table.columns)
    pixels = numbers.select(demo.PIXELS).to_numpy().astype(np.int64)
    return [row.tobytes() for row in pixels], numbers[demo.LABEL].to_numpy()


def truth() -> dict[bytes, set[int]]:
    """Pixels -> their labels in the source (no two of its pictures are alike)."""
    digits = load_digits()
    found: dict[bytes, set[int]] = {}
    for row, label in zip(digits.data.astype(np.int64), digits.target, strict=True):
        found.setdefault(row.tobytes(), set()).add(int(label))
    return found


def test_four_enterprises_have_the_sizes_that_are_promised() -> None:
    assert demo.sizes(4) == [450, 200, 350, 350]
    assert demo.sizes(3) == [450, 200, 350]


@pytest.mark.parametrize("count", EVERY_NUMBER)
def test_any_number_of_enterprises_leaves_the_validation_rows(count) -> None:
    found = demo.sizes(count)
    assert len(found) == count
    assert min(found) >= 50
    assert sum(found) <= sum(demo.WEIGHTS)
    assert sum(found) + demo.VALIDATION_ROWS <= len(load_digits().target)
    assert found[0] == max(found), "the first is a large one"
    assert found[1] == min(found), "the second is a small one"


@pytest.mark.parametrize("count", [-1, 0, 2, 13, 1000])
def test_a_number_that_the_data_cannot_be_split_among_is_refused(count, tmp_path) -> None:
    with pytest.raises(InputError) as err:
        demo.write(tmp_path / "demo", count)
    assert (err.value.code, err.value.field) == ("DEMO_PARTICIPANTS", "--participants")
    assert "3 to 12" in err.value.message
    assert err.value.remedy
    assert not (tmp_path / "demo").exists(), "nothing was written"


def test_every_file_is_of_another_format_and_holds_what_its_share_says(four) -> None:
    shares, _ = four
    assert [share.kind for share in shares] == ["csv", "parquet", "sqlite", "ndjson"]
    assert [share.num_examples for share in shares] == [450, 200, 350, 350]
    assert [share.table for share in shares] == [None, None, "digits", None]
    for share in shares:
        table = table_of(share)
        assert (table.height, table.columns) == (share.num_examples, [demo.LABEL, *demo.PIXELS])
        assert table.null_count().sum_horizontal().item() == 0


def test_the_files_lie_apart_one_folder_each(four) -> None:
    shares, validation = four
    folders = [Path(share.file).parent for share in shares]
    assert len({*folders, validation.parent}) == 5
    assert all([*folder.iterdir()] == [Path(share.file)] for folder, share in zip(folders, shares, strict=True)), (
        "no journal or partial file is left"
    )


@pytest.mark.parametrize("count", [3, 4, 12])
def test_no_row_is_in_two_files(count, tmp_path) -> None:
    shares, validation = demo.write(tmp_path, count)
    rows = [row for table in (*map(table_of, shares), validation_of(validation)) for row in pixels_and_labels(table)[0]]
    assert len(rows) == sum(demo.sizes(count)) + demo.VALIDATION_ROWS
    assert len(set(rows)) == len(rows)
    assert set(rows) <= truth().keys()


def test_three_in_ten_labels_of_the_third_are_wrong_and_no_others(four) -> None:
    shares, validation = four
    known, wrong = truth(), []
    for table in (*map(table_of, shares), validation_of(validation)):
        rows, labels = pixels_and_labels(table)
        wrong.append(np.mean([label not in known[row] for row, label in zip(rows, labels, strict=True)]))
        assert set(labels) <= set(range(10))
    assert wrong[:2] == [0, 0]
    assert wrong[3:] == [0, 0]
    assert abs(wrong[2] - demo.FLIPPED) < 0.05  # two standard deviations of 350 draws


def test_flipped_labels_go_to_all_other_classes(four) -> None:
    rows, labels = pixels_and_labels(table_of(four[0][2]))
    known = truth()
    moved = [(label - min(known[row])) % 10 for row, label in zip(rows, labels, strict=True) if label not in known[row]]
    assert set(moved) == set(range(1, 10))


def test_every_part_has_every_class(four) -> None:
    """A validation set without a class would pay nobody for it."""
    shares, validation = four
    for table in (*map(table_of, shares), validation_of(validation)):
        labels, counts = np.unique(pixels_and_labels(table)[1], return_counts=True)
        assert list(labels) == list(range(10))
        assert counts.min() >= len(pixels_and_labels(table)[1]) / 25


def test_two_writings_are_the_same_rows(four, tmp_path) -> None:
    again, validation = demo.write(tmp_path, 4)
    for left, right in zip(four[0], again, strict=True):
        assert table_of(left).equals(table_of(right))
        assert (left.name, left.sector) == (right.name, right.sector)
    assert validation.read_bytes() == four[1].read_bytes()


def test_whoever_is_third_has_the_flipped_labels_however_many_there_are(tmp_path) -> None:
    known = truth()
    for count in (3, 7):
        shares, _ = demo.write(tmp_path / str(count), count)
        wrong = []
        for share in shares:
            rows, labels = pixels_and_labels(table_of(share))
            wrong.append(any(label not in known[row] for row, label in zip(rows, labels, strict=True)))
        assert wrong == [index == 2 for index in range(count)]


def test_enterprises_have_names_sectors_and_codes_of_their_own(tmp_path) -> None:
    enterprises = of_digits(tmp_path, 12).enterprises
    for field in ("name", "entity_code", "data_set"):
        assert len({getattr(e, field) for e in enterprises}) == 12, field
    assert all(len(e.entity_code) == 18 for e in enterprises)
    assert all(e.sector for e in enterprises)
    assert len({e.sector for e in enterprises[:4]}) >= 3


@pytest.mark.parametrize("count", [3, 4, 12])
def test_the_scenario_encodes_its_own_files_within_the_public_bounds(count, tmp_path) -> None:
    """Nothing is clipped: every pixel lies within 0..16, the bounds that the scenario states."""
    scenario = of_digits(tmp_path, count)
    for enterprise in scenario.enterprises:
        examples = encode(scenario.data, read_table(**enterprise.source), file=enterprise.source["path"])
        assert isinstance(examples, Examples)
        assert examples.x.shape == (enterprise.num_examples, 65)
        assert np.isfinite(examples.x).all()
        raw = read_table(**enterprise.source).select(pl.col(name).cast(pl.Float64) for name in demo.PIXELS).to_numpy()
        assert 0 <= raw.min() < raw.max() <= 16
        assert np.allclose(examples.x[:, :64], (raw / 8 - 1) * 2 / np.sqrt(65))
    assert scenario.validation is not None
    assert len(encode(scenario.data, read_table(**scenario.validation), file="validation")) == demo.VALIDATION_ROWS


def test_the_scenarios_texts_are_read_by_those_they_are_for(tmp_path) -> None:
    import tomllib

    from tests.support.federation import NOW

    scenario = of_digits(tmp_path, 4)
    contract = tomllib.loads(template(scenario, NOW))
    assert [contract["training"][key] for key in ("rounds", "local_steps")] == [5, 6]
    assert contract["privacy"]["epsilon"] == 2
    assert [p["data_set"] for p in contract["participants"]] == [e.data_set for e in scenario.enterprises]
    (block,) = tomllib.loads(agent_blocks(scenario, scenario.enterprises[2]))["data_sets"]
    assert (block["num_examples"], block["epsilon"]) == (350, 8)
    assert block["source"] == {"path": scenario.enterprises[2].source["path"], "kind": "sqlite", "table": "digits"}
