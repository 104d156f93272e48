"""Cards and released rows: what leaves is what was shown, budgets are declared once, released rows never train."""

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.agent_world import DATA_SET, PASSPHRASE, ROWS, Lab, lab

from fedpact_client import cards, released
from fedpact_client.sources import row_digests, table_title
from fedpact_client.store import EgressKind
from fedpact_client.text import show_card
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.errors import FaultError, InputError, RefusedError, ServiceError
from fedpact_contract.files import replace_file
from fedpact_contract.messages import DataSetCard
from fedpact_contract.privacy import filter_alpha, filter_limit
from fedpact_contract.record import open_signed, read_envelope
from fedpact_server import cards as server_cards
from fedpact_server import validation

NAMES = ["age", "sex", "ill"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path) as made:
        made.enrol()
        made.approve()
        made.wire.sent.clear()
        replace_file(made.home.path / "keys" / "release.key", b"k" * 32)  # the same choice in every test
        yield made


def draft(world: Lab, data_set: str = DATA_SET, rows: str = ROWS) -> cards.Draft:
    world.configure(data_set=data_set, rows=rows)
    return cards.prepare(world.home, world.home.config(), world.store, "set-1")


def rewrite(world: Lab, old: str, new: str) -> None:
    text = world.home.config_path.read_text()
    assert old in text
    world.home.config_path.write_text(text.replace(old, new, 1))


def with_line(line: str) -> str:
    return DATA_SET.replace('label = "ill"', f'label = "ill"\n{line}')


def test_a_card_says_what_was_declared_and_nothing_else(world: Lab) -> None:
    made = draft(world)
    delta = Decimal("0.00001")
    assert made.card == DataSetCard(
        data_set="set-1",
        participant=world.home.participant_id,
        num_examples=40,
        columns=("age", "sex"),
        label="ill",
        epsilon=Decimal(8),
        delta=delta,
        alpha=filter_alpha(Decimal(8), delta),
        released_rows=0,
    )
    assert made.limit == filter_limit(Decimal(8), delta, made.card.alpha)
    assert (made.available, made.rows) == (60, ())
    assert world.wire.sent == []


def test_every_field_of_a_card_is_shown(world: Lab) -> None:
    made = draft(world)
    shown = {name: value for name, value, _ in made.items()}
    assert len(shown) == len(DataSetCard.model_fields) - 2, "and no facts and counts, where there are none"
    assert shown["epsilon"] == "8"
    assert shown["columns"] == "age, sex"


def test_a_declared_data_set_is_known_on_both_sides(world: Lab) -> None:
    draft(world)
    made = world.declare()
    declared = world.store.data_set("set-1")
    assert (declared.limit, declared.alpha) == (made.limit, made.card.alpha)
    assert open_signed(read_envelope(declared.card), DataSetCard, world.home.contract_public) == made.card
    with world.world.database.read() as connection:
        assert server_cards.card_list(connection, world.home.participant_id) == [made.card]
    assert [e.kind for e in world.store.egress()][-1] == EgressKind.CARD


def test_no_cell_leaves_without_a_release(world: Lab) -> None:
    canary = ROWS.replace("20,f,yes", "77.123456789,f,yes")
    world.configure(rows=canary)
    world.declare()
    assert all(b"77.123456789" not in request.content for request in world.wire.sent)


def test_declaring_again_sends_the_same_bytes(world: Lab) -> None:
    draft(world)
    world.declare()
    world.declare()
    first, second = (r.content for r in world.wire.sent)
    assert first == second


def test_a_lost_connection_is_made_good_by_the_same_command(world: Lab) -> None:
    draft(world)
    world.wire.cut_before = "POST /cards"
    with pytest.raises(ServiceError, match="OPERATOR_AWAY"):
        world.declare()
    assert world.store.data_set("set-1").epsilon == 8
    world.wire.cut_before = ""
    world.declare()
    assert world.wire.paths() == ["POST /cards"]


def test_a_wrong_passphrase_declares_nothing(world: Lab) -> None:
    made = draft(world)
    with world.client() as client, pytest.raises(InputError, match="KEY_PASSPHRASE"):
        cards.declare(world.home, world.store, client, made, b"wrong horse")
    assert world.store.data_sets() == []
    assert world.wire.sent == []


def test_a_budget_is_declared_once(world: Lab) -> None:
    draft(world)
    world.declare()
    rewrite(world, "epsilon = 8\ndelta", "epsilon = 9\ndelta")
    with pytest.raises(RefusedError) as caught:
        cards.prepare(world.home, world.home.config(), world.store, "set-1")
    assert (caught.value.code, caught.value.file) == ("DATA_SET_BUDGET_FIXED", str(world.home.config_path))
    assert "says epsilon 9 at delta 0.00001" in caught.value.message
    assert caught.value.remedy == "Write epsilon 8 at delta 0.00001 again."


def test_what_is_odd_about_the_rows_is_shown_and_stays_here(world: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """All labels alike, few examples, cells that are no number: column and count, never a value."""
    odd = "".join(f"{age},f,sure\n" for age in ("nan", "-inf", "1e999", "30", "31", "", "32", "33", "34", "35"))
    made = draft(world, DATA_SET.replace("num_examples = 40", "num_examples = 9"), "age,sex,ill\n" + odd)
    assert (made.not_finite, made.one_class) == ({"age": 3}, True)
    show_card(made)
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "all rows are of one class",
        "fewer than 10 examples",
        "column age has 3 cells that are NaN or infinite",
    ):
        assert words in shown
    assert "1e999" not in shown
    assert "sure" not in shown
    show_card(made, "zh")
    chinese = capsys.readouterr().out
    whole = ["".join(text.split()).replace(made.card.participant, "") for text in (chinese, shown)]
    figures, same = (re.findall(r"[0-9]{2,}", text) for text in whole)
    assert figures == same
    assert "217931814" in figures
    assert "所有行同属一个类别" in chinese
    assert "列age有3个单元格为NaN或无穷大" in "".join(chinese.split())
    english = set(re.findall(r"[a-zA-Z]+", chinese.replace("\n", "").replace(made.source, "")))
    assert not english & {"declared", "fewer", "rows", "Mind", "leaves", "computed", "here", "limit"}
    world.declare()
    assert all(b"one_class" not in r.content and b"not_finite" not in r.content for r in world.wire.sent)


def test_copies_among_the_rows_are_shown_and_stay_here(world: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{age},f,{'sure' if age % 2 else 'no'}\n" for age in range(20, 60))
    made = draft(world, rows="age,sex,ill\n" + rows + rows.splitlines()[0] + "\n")
    assert made.duplicates == 1
    show_card(made)
    assert "1 row is an exact copy of another (2.4%): a contract may" in " ".join(capsys.readouterr().out.split())
    (world.home.path / "rows.csv").write_text("age,sex,ill\n" + rows * 2)
    made = cards.prepare(world.home, world.home.config(), world.store, "set-1")
    assert made.duplicates == 40
    show_card(made)
    assert "40 rows are exact copies of another (50.0%)" in " ".join(capsys.readouterr().out.split())
    world.declare()
    assert all(b"duplicates" not in r.content for r in world.wire.sent)


def test_of_usual_rows_nothing_is_remarked(world: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    made = draft(world)
    assert (made.not_finite, made.one_class, made.duplicates) == ({}, False, 0)
    show_card(made)
    assert "Mind" not in capsys.readouterr().out


@pytest.mark.parametrize(("count", "delta", "most"), [(40, "0.1", "0.00001"), (15_000, "0.00001", "0.00000666")])
def test_a_card_keeps_the_contracts_rule_for_delta(world: Lab, count: int, delta: str, most: str) -> None:
    """Where rows are many the limit is the fraction, and what the message says is allowed."""
    wrong = DATA_SET.replace("num_examples = 40", f"num_examples = {count}").replace("0.00001", delta)
    with pytest.raises(InputError) as caught:
        draft(world, wrong)
    assert (caught.value.code, caught.value.field) == ("CARD_DELTA", "delta")
    assert caught.value.file == str(world.home.config_path)
    assert f"delta = {most}," in caught.value.remedy
    assert world.store.data_sets() == []
    rewrite(world, f"delta = {delta}\ncolumns", f"delta = {most}\ncolumns")
    with pytest.raises(InputError, match="DATA_TOO_FEW_ROWS") if count > 60 else nullcontext():
        cards.prepare(world.home, world.home.config(), world.store, "set-1")


def test_a_second_name_for_one_file_buys_no_budget(world: Lab) -> None:
    draft(world)
    world.declare()
    world.configure(data_set=DATA_SET.replace("set-1", "set-2"))
    with pytest.raises(RefusedError) as caught:
        cards.prepare(world.home, world.home.config(), world.store, "set-2")
    assert (caught.value.code, caught.value.file) == ("DATA_SET_KNOWN_ELSEWHERE", str(world.home.config_path))
    assert "set-1" in caught.value.message


def test_one_file_is_one_data_set_whatever_is_appended_to_it(world: Lab) -> None:
    draft(world)
    world.declare()
    (world.home.path / "link.csv").symlink_to("rows.csv")
    before = world.home.config_path.read_text()
    for text in (before, before.replace(DATA_SET, "", 1)):  # set-1 described beside it, or renamed in its place
        for path in ("rows.csv", "./rows.csv", "link.csv"):
            world.home.config_path.write_text(text)
            again = DATA_SET.replace("set-1", "set-2").replace("rows.csv", path)
            world.configure(data_set=again, rows=ROWS + "99,m,no\n")
            with pytest.raises(RefusedError) as caught:
                cards.prepare(world.home, world.home.config(), world.store, "set-2")
            assert caught.value.code == "DATA_SET_KNOWN_ELSEWHERE"
            assert f"{world.home.path / 'rows.csv'} is known as data set set-1" in caught.value.message
            assert "inherits what was spent" in caught.value.remedy


def test_a_file_to_which_a_declared_data_set_moved_since_its_card_is_taken_too(world: Lab) -> None:
    draft(world)
    world.declare()
    text = world.home.config_path.read_text().replace('path = "rows.csv"', 'path = "moved.csv"', 1)
    world.home.config_path.write_text(text)
    (world.home.path / "moved.csv").write_text(ROWS + "99,m,no\n")
    world.configure(data_set=DATA_SET.replace("set-1", "set-2").replace("rows.csv", "moved.csv"))
    with pytest.raises(RefusedError, match=r"moved\.csv is known as data set set-1"):
        cards.prepare(world.home, world.home.config(), world.store, "set-2")


@pytest.mark.parametrize(
    ("first", "then"), [("in/rows.csv", "in"), ("in/rows.csv", "in/*.csv"), ("in", "in/rows.csv"), ("in", "in/r*.csv")]
)
def test_a_file_among_others_is_known_again_without_its_old_block(world: Lab, first: str, then: str) -> None:
    """With one file more, neither bytes nor table nor the pattern are those of the data set that was declared."""
    (world.home.path / "in").mkdir()
    (world.home.path / "in" / "rows.csv").write_text(ROWS)
    (world.home.path / "in" / os.fsdecode(b"\xff[1].csv")).write_text("age,sex,ill\n30,f,no\n")
    before = world.home.config_path.read_text()
    world.configure(data_set=DATA_SET.replace("rows.csv", first))
    world.declare()
    world.home.config_path.write_text(before)
    world.configure(data_set=DATA_SET.replace("set-1", "set-2").replace("rows.csv", then))
    with pytest.raises(RefusedError, match="is known as data set set-1"):
        cards.prepare(world.home, world.home.config(), world.store, "set-2")


def test_an_appended_file_is_a_new_version_of_its_own_data_set(world: Lab) -> None:
    draft(world)
    world.declare()
    (world.home.path / "rows.csv").write_text(ROWS + "99,m,no\n")
    assert world.declare().available == 61
    assert len(world.store.versions("set-1")) == 5  # one place; bytes and rows, twice


def as_csv(path: Path) -> None:
    path.write_text(ROWS)


def as_parquet(path: Path) -> None:
    pl.read_csv(ROWS.encode()).sample(fraction=1, shuffle=True, seed=3).write_parquet(path)


def as_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (ill TEXT, sex TEXT, age REAL)")
        rows = pl.read_csv(ROWS.encode()).select("ill", "sex", "age").rows()
        database.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
    database.close()


def test_another_table_of_a_declared_file_is_no_other_data_set(world: Lab) -> None:
    as_sqlite(world.home.path / "rows.db")
    source = ('"rows.csv"\nkind = "csv"', '"rows.db"\nkind = "sqlite"\ntable = "t"')
    world.configure(data_set=DATA_SET.replace(*source))
    world.declare()
    with sqlite3.connect(world.home.path / "rows.db") as database:
        database.execute("CREATE TABLE u AS SELECT ill, sex, age + 1 AS age FROM t")
    database.close()
    second = DATA_SET.replace("set-1", "set-2").replace(*source).replace('table = "t"', 'table = "u"')
    world.configure(data_set=second)
    with pytest.raises(RefusedError, match=r"rows\.db is known as data set set-1"):
        cards.prepare(world.home, world.home.config(), world.store, "set-2")


@pytest.mark.parametrize(
    ("write", "path", "kind"),
    [
        (as_csv, "renamed.csv", 'kind = "csv"'),
        (as_parquet, "converted.parquet", 'kind = "parquet"'),
        (as_sqlite, "converted.db", 'kind = "sqlite"\ntable = "t"'),
    ],
)
def test_renamed_and_converted_rows_are_known_again(
    world: Lab, write: Callable[[Path], None], path: str, kind: str
) -> None:
    draft(world)
    world.declare()
    write(world.home.path / path)
    again = DATA_SET.replace("set-1", "set-2").replace('"rows.csv"\nkind = "csv"', f'"{path}"\n{kind}')
    world.configure(data_set=again)
    with pytest.raises(RefusedError, match="These rows are known as data set set-1") as caught:
        cards.prepare(world.home, world.home.config(), world.store, "set-2")
    assert caught.value.code == "DATA_SET_KNOWN_ELSEWHERE"


def test_what_docs_privacy_calls_undetected_is_undetected(world: Lab) -> None:
    """Other rows at another place are another data set, as far as a program can tell; so are other columns."""
    draft(world)
    world.declare()
    as_parquet(world.home.path / "copy.parquet")
    (world.home.path / "more.csv").write_text(ROWS + "99,m,no\n")
    source = ('"rows.csv"\nkind = "csv"', '"copy.parquet"\nkind = "parquet"')
    world.configure(data_set=DATA_SET.replace("set-1", "set-2").replace('"age", "sex"', '"age"').replace(*source))
    world.configure(data_set=DATA_SET.replace("set-1", "set-3").replace("rows.csv", "more.csv"))
    for data_set in ("set-2", "set-3"):
        assert cards.prepare(world.home, world.home.config(), world.store, data_set).card.data_set == data_set


# Whose a row is

OF_PATIENTS = DATA_SET.replace('label = "ill"', 'label = "ill"\nentity = "who"')


def patients(*names: str) -> str:
    """The rows, each with the name of its patient: the names one after the other, then "z" for all others."""
    head, *rows = ROWS.splitlines()
    whose = [*names, *["z"] * (len(rows) - len(names))]
    return "\n".join([f"{head},who", *(f"{row},{name}" for row, name in zip(rows, whose, strict=True))]) + "\n"


def test_rows_of_nobody_are_refused_by_column_and_count(world: Lab) -> None:
    with pytest.raises(InputError) as caught:
        draft(world, OF_PATIENTS, patients("secret-a", "", "secret-b", "  "))
    assert (caught.value.code, caught.value.field) == ("DATA_MISSING_VALUE", "who")
    assert "in 2 of 60 rows; the first is line 3" in caught.value.message
    assert "secret" not in str(caught.value)
    assert world.wire.sent == []


def test_rows_left_under_a_cap_are_counted_and_stay_here(world: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"p{i}" for i in range(30)] + ["p0", "p0", " p1 "]
    made = draft(world, OF_PATIENTS, patients(*names))
    # p0 has 3 rows, p1 has 2, 28 others have one, and z has 27
    assert made.capped == {1: 31, 2: 34, 4: 37, 8: 41}
    show_card(made)
    shown = capsys.readouterr().out
    assert "computed from the data; stays here" in shown
    assert re.search(r"\b4\b.*\b37\b.*too few", shown)
    assert re.search(r"\b8\b.*\b41\b.*enough", shown)
    assert "37" not in made.card.to_bytes().decode().replace(made.card.participant, "")
    assert all("capped" not in str(request.content) for request in world.wire.sent)


def test_released_rows_are_not_counted_under_a_cap(world: Lab) -> None:
    (world.home.path / "gift.csv").write_text("age,sex,ill,who\n20,f,yes,p0\n")
    line = 'entity = "who"\nrelease_file = "gift.csv"'
    made = draft(world, with_line(line), patients(*(f"p{i}" for i in range(60))))
    assert made.capped == dict.fromkeys(cards.CAPS, 59)


def test_without_an_entity_nothing_is_counted(world: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    made = draft(world)
    assert made.capped == {}
    show_card(made)
    assert "computed from the data" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data_set", "rows", "code", "field"),
    [
        (DATA_SET.replace("num_examples = 40", "num_examples = 61"), ROWS, "DATA_TOO_FEW_ROWS", "num_examples"),
        (DATA_SET.replace('"sex"', '"Sex"'), ROWS, "DATA_COLUMN_MISSING", "Sex"),
        (DATA_SET.replace('"ill"', '"sick"'), ROWS, "DATA_COLUMN_MISSING", "sick"),
        (DATA_SET.replace("rows.csv", "none.csv"), ROWS, "DATA_UNREADABLE", None),
        (DATA_SET, "", "DATA_EMPTY", None),
        (DATA_SET, "age,sex,ill\n", "DATA_EMPTY", None),
        (DATA_SET.replace("epsilon = 8", "epsilon = 0.000000000001"), ROWS, "CARD_BUDGET", "epsilon"),
        (with_line("release_fraction = 0.0000000001"), ROWS, "RELEASE_EMPTY", "release_fraction"),
        (with_line("release_fraction = 0.5"), ROWS, "DATA_TOO_FEW_ROWS", "num_examples"),
        (with_line('release_file = "none.csv"'), ROWS, "DATA_FILE_MISSING", None),
    ],
)
def test_what_does_not_fit_is_named(world: Lab, data_set: str, rows: str, code: str, field: str | None) -> None:
    with pytest.raises(InputError) as caught:
        draft(world, data_set, rows)
    assert (caught.value.code, caught.value.field) == (code, field)
    assert world.wire.sent == []


def test_an_unknown_data_set_is_named(world: Lab) -> None:
    with pytest.raises(InputError, match="CONFIG_DATA_SET"):
        cards.prepare(world.home, world.home.config(), world.store, "set-1")


def test_released_rows_leave_as_shown_and_are_recorded_before(world: Lab) -> None:
    world.configure(data_set=with_line("release_fraction = 0.2"))
    world.wire.cut_before = "POST /cards"
    with pytest.raises(ServiceError):
        world.declare()
    recorded = released.read(world.home.released_path("set-1"))
    assert 1 <= len(recorded) <= 20
    world.wire.cut_before = ""
    made = world.declare()
    sent = json.loads(world.wire.sent[-1].content)["released"]
    assert sent == [dict(row) for row in made.rows]
    assert sorted(sorted(row.items()) for row in recorded) == sorted(sorted(row.items()) for row in made.rows)
    assert made.available == 60 - len(sent) == 60 - made.card.released_rows
    with world.world.database.read() as connection:
        table = validation.released_table(connection, world.home.participant_id, "set-1")
    assert table is not None
    assert table.select(NAMES).rows() == [tuple(row[n] for n in NAMES) for row in made.rows]


def test_rows_once_released_stay_out_when_the_choice_changes(world: Lab) -> None:
    world.configure(data_set=with_line("release_fraction = 0.2"))
    first = world.declare()
    text = world.home.config_path.read_text()
    world.home.config_path.write_text(text.replace("release_fraction = 0.2\n", "", 1))
    second = cards.prepare(world.home, world.home.config(), world.store, "set-1")
    assert (second.rows, second.card.released_rows) == ((), 0)
    assert second.available == first.available


@pytest.mark.parametrize("how", ["gone", "cut short"])
def test_without_the_record_of_released_rows_nothing_goes_on(world: Lab, how: str) -> None:
    """Training would use rows that the operator has for validation: also where a later card releases none."""
    world.configure(data_set=with_line("release_fraction = 0.2"))
    world.declare()
    text = world.home.config_path.read_text()
    world.home.config_path.write_text(text.replace("release_fraction = 0.2\n", "", 1))
    world.declare()
    assert cards.check_own_file(world.home, world.home.config(), world.store, "set-1")
    path = world.home.released_path("set-1")
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    if how == "cut short":
        path.write_text("".join(lines[:-1]))
    with pytest.raises(FaultError, match="RELEASED_DAMAGED"):
        cards.check_own_file(world.home, world.home.config(), world.store, "set-1")


def test_a_file_of_rows_is_released_and_left_out(world: Lab) -> None:
    (world.home.path / "gift.csv").write_text("ill,age,sex,note\nyes,20.0, f ,secret\nno,99,m,secret\n")
    made = draft(world, with_line('release_file = "gift.csv"'))
    assert [dict(row) for row in made.rows] == [
        {"age": "20.0", "sex": "f", "ill": "yes"},
        {"age": "99", "sex": "m", "ill": "no"},
    ]
    assert made.available == 59


def test_too_much_for_one_request_is_refused_here(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "MAX_RELEASE_BYTES", 100)
    with pytest.raises(InputError, match="RELEASE_TOO_LARGE"):
        draft(world, with_line("release_fraction = 0.2"))


def test_the_largest_release_fits_into_a_request_of_the_operator() -> None:
    from fedpact_server.api_edge import Limits

    assert Limits().body > cards.MAX_RELEASE_BYTES + 100_000


# Released rows


def table(*rows: tuple[object, ...]) -> pl.DataFrame:
    return pl.DataFrame({n: [row[i] for row in rows] for i, n in enumerate(NAMES)}, strict=False)


def test_exclusion_sees_through_spelling_order_and_kind() -> None:
    texts = table(("3", "f", "yes"), ("04.0", "m", None), ("5", " f ", "no"))
    numbers = table((5.0, "f", "no"), (3, "f", "yes"), (4, "m", None), (4, "m", "no"))
    left = released.exclude(numbers, released.cells(texts, NAMES))
    assert left.rows() == [(4.0, "m", "no")]
    assert released.exclude(texts, released.cells(numbers, NAMES)).height == 0


def test_exclusion_takes_every_copy() -> None:
    rows = table(("3", "f", "yes"), ("3", "f", "yes"), ("4", "f", "yes"))
    assert released.exclude(rows, [{"age": "3", "sex": "f", "ill": "yes"}]).height == 1


def test_exclusion_keeps_order_and_all_columns() -> None:
    rows = table(("3", "f", "yes"), ("4", "f", "yes"), ("1", "m", "no")).with_columns(other=pl.Series([1, 2, 3]))
    left = released.exclude(rows, [{"age": "4", "sex": "f", "ill": "yes"}])
    assert left.rows() == [("3", "f", "yes", 1), ("1", "m", "no", 3)]


def test_of_a_recorded_row_the_common_columns_count() -> None:
    rows = table(("3", "f", "yes"), ("4", "f", "yes"))
    assert released.exclude(rows, [{"age": "4", "gone": "x"}]).height == 1
    with pytest.raises(InputError, match="RELEASED_COLUMNS"):
        released.exclude(rows, [{"gone": "x"}])


def test_nothing_recorded_leaves_everything(tmp_path: Path) -> None:
    rows = table(("3", "f", "yes"))
    assert released.read(tmp_path / "none.jsonl") == []
    assert released.exclude(rows, []).equals(rows)


cell = st.one_of(
    st.none(), st.text(max_size=5), st.integers(-5, 5).map(str), st.sampled_from(["1.0", "01", "-0", "nan"])
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=30), data=st.data())
def test_the_choice_looks_at_one_row_at_a_time(rows: list[tuple[str | None, ...]], data: st.DataObject) -> None:
    """Removing any row changes the fate of no other: this is what keeps the privacy unit one row."""
    key, fraction = b"k" * 32, Decimal("0.5")
    chosen = set(map(str, released.choose(table(*rows), NAMES, fraction, key).rows()))
    gone = data.draw(st.integers(0, len(rows) - 1))
    fewer = [row for index, row in enumerate(rows) if index != gone]
    if fewer:
        again = set(map(str, released.choose(table(*fewer), NAMES, fraction, key).rows()))
        assert again == chosen & set(map(str, fewer))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=30))
def test_what_is_chosen_and_what_is_left_never_meet(rows: list[tuple[str | None, ...]]) -> None:
    whole = table(*rows).cast(pl.String)
    chosen = released.choose(whole, NAMES, Decimal("0.5"), b"k" * 32)
    left = released.exclude(whole, released.cells(chosen, NAMES))
    assert left.height + chosen.height == whole.height
    assert released.exclude(left, released.cells(chosen, NAMES)).height == left.height


def test_about_the_fraction_is_chosen_and_another_key_chooses_others() -> None:
    rows = table(*[(str(i), "f", "yes") for i in range(2000)])
    one = released.choose(rows, NAMES, Decimal("0.1"), b"a" * 32)
    two = released.choose(rows, NAMES, Decimal("0.1"), b"b" * 32)
    assert 140 <= one.height <= 260  # 200, and 4.5 standard deviations
    assert one.equals(released.choose(rows, NAMES, Decimal("0.1"), b"a" * 32))
    assert not one.equals(two)


def test_the_record_only_grows_and_counts_copies(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    one, two = {"a": "1"}, {"a": "2"}
    released.record(path, [one, one])
    released.record(path, [one, two])
    released.record(path, [one, two])
    assert released.read(path) == [one, one, two]
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("line", ["", "{}", "[]", '{"a": 1}', "no", '{"a": "1"', "[" * 100_000])
def test_a_damaged_record_stops_everything(tmp_path: Path, line: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"a":"1"}\n' + line + "\n")
    with pytest.raises(FaultError) as caught:
        released.read(path)
    assert (caught.value.code, caught.value.field) == ("RELEASED_DAMAGED", "line 2")


def test_a_column_of_another_kind_is_not_released() -> None:
    odd = pl.DataFrame({"a": [[1, 2]], "b": ["x"]})
    with pytest.raises(InputError) as caught:
        released.cells(odd, ["b", "a"])
    assert (caught.value.code, caught.value.field) == ("RELEASE_CELL", "a")


def test_the_passphrase_constant_opens_the_homes_of_these_tests(world: Lab) -> None:
    assert world.home.load_contract_key(PASSPHRASE) is not None


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
@pytest.mark.parametrize("release", ["", "release_fraction = 0.2", 'release_file = "gift.csv"'])
def test_a_card_does_not_hang_on_the_batches(
    world: Lab, monkeypatch: pytest.MonkeyPatch, rows_at_once: int, release: str
) -> None:
    """What is drafted from batches is what the whole table gives."""
    (world.home.path / "gift.csv").write_text("age,sex,ill,who\n20,f,yes,p0\n33,m,no,p1\n")
    released.record(world.home.released_path("set-1"), [{"age": "25", "sex": "m", "ill": "no"}])
    lines = patients(*(f"p{i % 11}" for i in range(50))).splitlines()
    text = "\n".join([*lines, *lines[5:12], "nan,f,yes,p3", ",m,no,p4"]) + "\n"
    monkeypatch.setattr("fedpact_client.sources.rows_at_once", lambda _: rows_at_once)
    made = draft(world, with_line(f'entity = "who"\n{release}').replace("= 40", "= 20"), text)
    table = pl.read_csv(text.encode(), infer_schema=False)
    gone = released.read(world.home.released_path("set-1"))
    rows = []
    if "fraction" in release:
        key = world.home.release_key()
        rows = released.cells(released.choose(table, NAMES, Decimal("0.2"), key), NAMES)
    elif release:
        rows = [{"age": "20", "sex": "f", "ill": "yes"}, {"age": "33", "sex": "m", "ill": "no"}]
    left = released.exclude(table, [*gone, *rows])
    each = left["who"].value_counts()["count"].to_list()
    assert list(made.rows) == rows
    assert (made.available, made.duplicates) == (left.height, left.height - left.unique(NAMES).height)
    assert made.capped == {cap: sum(min(n, cap) for n in each) for cap in cards.CAPS}
    assert (made.not_finite, made.one_class) == ({"age": 1}, False)
    assert made.profile.counts.rows == table.height
    assert made.profile.counts.entities.number == 12
    digests = b"".join(sorted(row_digests(table, sorted(NAMES))))
    assert made.fingerprints[-1] == sha256_hex(table_title(sorted(NAMES)) + digests)
