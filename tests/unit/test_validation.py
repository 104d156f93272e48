"""Committed validation sets: fresh salts, an order of slices, and a root that every load checks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.support.operator_world import Operator, enterprise, operator

from fedpact_contract.contract import Data
from fedpact_contract.errors import FaultError, FedpactError
from fedpact_contract.messages import DataSetCard
from fedpact_server import cards, enrolment, validation
from fedpact_server.validation import Source, ValidationSet, build, load, save

DATA = Data.parse(
    {
        "columns": [
            {"name": "age", "kind": "number", "low": 0, "high": 100, "missing": "drop"},
            {"name": "sex", "kind": "category", "values": ["f", "m"], "missing": "refuse"},
        ],
        "label": {"name": "ill", "classes": ["no", "yes"], "rule": "value"},
        "feature_scale": 1,
    },
    code="DATA",
)
LOW, HIGH = "1" * 64, "a" * 64


def table(*rows: tuple[str | None, str, str]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=["age", "sex", "ill"], orient="row")


OWN = table(("20", "f", "no"), ("70", "m", "yes"), (None, "f", "no"), ("50", "f", "yes"))


def code_of(call: Any, *args: Any) -> str:
    with pytest.raises(FedpactError) as err:
        call(*args)
    return err.value.code


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "validation").mkdir()
    return tmp_path


@pytest.fixture
def made(home: Path) -> ValidationSet:
    made = build(DATA, [Source(giver="operator", table=OWN, name="rows.csv")])
    save(home, made)
    return made


def rewrite(home: Path, made: ValidationSet, **parts: Any) -> None:
    path = home / "validation" / made.root / "rows.npz"
    with np.load(path) as stored:
        content = {name: stored[name] for name in stored.files}
    np.savez(path, **(content | parts))


def test_a_set_is_kept_and_loaded(home: Path, made: ValidationSet) -> None:
    found = load(home, made.root)
    assert len(found.examples) == 3  # the row without an age is dropped by the schema
    assert np.array_equal(found.examples.x, made.examples.x)
    assert np.array_equal(found.examples.y, made.examples.y)
    assert (found.salts, found.root, found.slices) == (made.salts, made.root, made.slices)
    assert [s.plain() for s in found.slices] == [{"source": "operator", "count": 3}]
    for path in (home / "validation" / made.root, home / "validation" / made.root / "rows.npz"):
        assert path.stat().st_mode & 0o077 == 0


def test_salts_are_fresh_so_that_equal_rows_make_another_root(made: ValidationSet) -> None:
    again = build(DATA, [Source(giver="operator", table=OWN, name="rows.csv")])
    assert again.root != made.root
    assert len({*made.salts, *again.salts}) == 6
    assert all(len(salt) == 32 for salt in made.salts)


def test_slices_stand_operator_first_then_by_id() -> None:
    sources = [
        Source(giver=HIGH, table=table(("3", "f", "no")), name="h"),
        Source(giver="operator", table=table(("1", "f", "no"), ("1", "m", "no")), name="o"),
        Source(giver=LOW, table=table(("2", "f", "yes")), name="l"),
    ]
    made = build(DATA, sources)
    assert [(s.source, s.count) for s in made.slices] == [("operator", 2), (LOW, 1), (HIGH, 1)]
    assert made.examples.y.tolist() == [0, 0, 1, 0]


def test_a_changed_row_salt_label_or_order_is_a_fault(home: Path, made: ValidationSet) -> None:
    x, y = made.examples.x, made.examples.y
    salts = np.frombuffer(b"".join(made.salts), np.uint8).reshape(-1, 32)
    changed_x, changed_salts = x.copy(), salts.copy()
    changed_x[1, 0] = np.nextafter(changed_x[1, 0], 2)
    changed_salts[2, 31] ^= 1
    for parts in ({"x": changed_x}, {"y": 1 - y}, {"salts": changed_salts}, {"x": x[::-1], "y": y[::-1]}):
        rewrite(home, made, **parts)
        with pytest.raises(FaultError) as err:
            load(home, made.root)
        assert (err.value.code, err.value.exit_code) == ("VALIDATION_ROOT", 1)
        rewrite(home, made, x=x, y=y, salts=salts)
    load(home, made.root)


def test_a_lost_or_damaged_file_is_a_fault(home: Path, made: ValidationSet) -> None:
    path = home / "validation" / made.root / "rows.npz"
    kept = path.read_bytes()
    for data in (b"", b"PK\x03\x04 nonsense", kept[:-50]):
        path.write_bytes(data)
        assert code_of(load, home, made.root) == "VALIDATION_DAMAGED"
    path.write_bytes(kept)
    wrong: list[dict[str, Any]] = [
        {"x": np.array([["a"]], dtype=object)},
        {"x": np.zeros(3)},
        {"y": np.zeros(2, dtype=np.int64)},
        {"salts": np.zeros((3, 31), np.uint8)},
        {"salts": np.zeros((3, 32), np.uint8)},
        {"slices": np.frombuffer(json.dumps([{"source": "operator", "count": 2}]).encode(), np.uint8)},
        {"slices": np.frombuffer(b"nonsense", np.uint8)},
    ]
    for parts in wrong:
        rewrite(home, made, **parts)
        assert code_of(load, home, made.root) == "VALIDATION_DAMAGED"
        path.write_bytes(kept)
    path.unlink()
    assert code_of(load, home, made.root) == "VALIDATION_MISSING"


def test_nothing_is_unpickled(home: Path, made: ValidationSet) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("the validation file ran code",))

    rewrite(home, made, x=np.array([Evil()], dtype=object))
    assert code_of(load, home, made.root) == "VALIDATION_DAMAGED"


def test_no_rows_and_one_giver_twice_are_refused() -> None:
    assert code_of(build, DATA, []) == "VALIDATION_EMPTY"
    twice = [Source(giver="operator", table=OWN, name="a"), Source(giver="operator", table=OWN, name="b")]
    assert code_of(build, DATA, twice) == "VALIDATION_TWICE"
    alike = [Source(giver=giver, table=table(("20", "f", "no")), name=giver) for giver in ("operator", "1" * 64)]
    assert code_of(build, DATA, alike) == "VALIDATION_ONE_CLASS"
    bad = [Source(giver="operator", table=table(("20", "x", "no")), name="rows.csv")]
    assert code_of(build, DATA, bad) == "DATA_UNKNOWN_CATEGORY"


@pytest.fixture
def world(tmp_path: Path) -> Operator:
    world = operator(tmp_path)
    world.admit(enterprise(1), cards_too=False)
    return world


def send_card(world: Operator, released: list[Any], **values: Any) -> DataSetCard:
    who = enterprise(1)
    with world.database.write() as connection:
        member = enrolment.find(connection, who.id)
        return cards.accept_card(connection, member, who.card(**values), released)


def test_released_rows_come_back_as_a_table_of_text(world: Operator) -> None:
    rows = [{"age": 30, "sex": "f", "ill": "no"}, {"age": None, "sex": "m\u2028", "ill": "yes"}]
    send_card(world, rows, released_rows=2)
    with world.database.read() as connection:
        found = validation.released_table(connection, enterprise(1).id, "set-1")
        assert validation.released_table(connection, enterprise(1).id, "set-2") is None
    assert found is not None
    assert found.select("age", "sex", "ill").rows() == [("30", "f", "no"), (None, "m\u2028", "yes")]


def test_rows_are_released_as_the_card_says_or_not_at_all(world: Operator) -> None:
    row = {"age": 30, "sex": "f", "ill": "no"}
    for released, count, code in (
        ([row], 0, "RELEASE_COUNT"),
        ([], 1, "RELEASE_COUNT"),
        ([row | {"name": "Wang"}], 1, "RELEASE_COLUMNS"),
        ([{"age": 30}], 1, "RELEASE_COLUMNS"),
        (["row"], 1, "RELEASE_ROW"),
        ([row | {"age": 0.5}], 1, "RELEASE_CELL"),
        ([row | {"age": True}], 1, "RELEASE_CELL"),
        ([row | {"age": [1]}], 1, "RELEASE_CELL"),
    ):
        with pytest.raises(FedpactError) as err:
            send_card(world, released, released_rows=count)
        assert err.value.code == code
    with world.database.read() as connection:
        assert validation.released_table(connection, enterprise(1).id, "set-1") is None
        assert cards.card_list(connection, enterprise(1).id) == []


def test_a_later_card_replaces_rows_and_numbers_but_never_the_budget(world: Operator) -> None:
    row = {"age": 30, "sex": "f", "ill": "no"}
    send_card(world, [row], released_rows=1)
    send_card(world, [], num_examples=500)
    with world.database.read() as connection:
        assert validation.released_table(connection, enterprise(1).id, "set-1") is None
        assert [c.num_examples for c in cards.card_list(connection, enterprise(1).id)] == [500]
    for values in ({"epsilon": 9}, {"delta": "0.000002"}, {"alpha": "5"}):
        with pytest.raises(FedpactError) as err:
            send_card(world, [], **values)
        assert err.value.code == "CARD_BUDGET_CHANGED"


def test_a_card_is_its_senders_and_has_a_budget_under_which_something_fits(world: Operator) -> None:
    with pytest.raises(FedpactError) as err:
        send_card(world, [], participant=enterprise(2).id)
    assert err.value.code == "CARD_PARTICIPANT"
    with pytest.raises(FedpactError) as err:
        send_card(world, [], epsilon="0.001")
    assert err.value.code == "CARD_BUDGET"
    for values in ({"delta": "0.1"}, {"delta": "0.00001", "num_examples": 10_001}):
        with pytest.raises(FedpactError) as err:
            send_card(world, [], **values)
        assert (err.value.code, err.value.field, err.value.party) == ("CARD_DELTA", "delta", enterprise(1).name)
    for values in ({"epsilon": -1}, {"delta": 0}, {"delta": 1}, {"alpha": 1}):
        with pytest.raises(FedpactError) as err:
            send_card(world, [], **values)
        assert err.value.code == "PRIVACY_RANGE"
    with world.database.write() as connection, pytest.raises(FedpactError) as err:
        cards.accept_card(connection, enrolment.find(connection, enterprise(1).id), enterprise(2).card(), [])
    assert err.value.code == "SIGNATURE_MISSING"


def test_the_buyers_rows_stand_behind_the_operators(made: ValidationSet) -> None:
    sources = [Source(giver=g, table=OWN, name=g) for g in (HIGH, "buyer", LOW, "operator")]
    assert [s.source for s in build(DATA, sources).slices] == ["operator", "buyer", LOW, HIGH]
