"""The quality gate and a card's facts: each rule bites, no value is ever shown, only what was let out leaves."""

import datetime
import hashlib
import html
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.agent_world import DATA_SET, PASSPHRASE, ROWS, Lab, lab
from tests.support.models_kit import a_schema, category, number

from fedpact_client import cards, quality, quality_text
from fedpact_client.config import DataSet, parse, template
from fedpact_client.rules import CardPart
from fedpact_contract import quality as words
from fedpact_contract.croissant import REQUIRED, croissant
from fedpact_contract.errors import FedpactError, InputError, RefusedError
from fedpact_contract.messages import DataSetCard
from fedpact_contract.quality import DIMENSIONS, ITEMS, MINIMUM, TC609, Facts, Measured
from fedpact_models import profile as counting
from fedpact_models.tables import read_table
from fedpact_server import cards as server_cards

TODAY = datetime.date(2026, 11, 30)
CLEAN = "age,sex,ill,visit,who\n" + "".join(
    f"{20 + i},{'fm'[i % 2]},{('no', 'yes')[i % 3 == 0]},2026-11-{1 + i % 28:02d},p{i % 30}\n" for i in range(60)
)


def data_set(*rules: dict[str, Any], entity: str | None = None, **changes: Any) -> DataSet:
    values = {
        "id": "set-1",
        "num_examples": 40,
        "epsilon": 8,
        "delta": Decimal("0.00001"),
        "columns": ["age", "sex"],
        "label": "ill",
        "source": {"path": "rows.csv", "kind": "csv"},
        "rules": list(rules),
    }
    return DataSet.parse(values | ({} if entity is None else {"entity": entity}) | changes, code="CONFIG")


def look(folder: Path, rows: str, declared: DataSet, before: quality.Reference | None = None) -> quality.Profile:
    (folder / "rows.csv").write_text(rows)
    return quality.profile(declared, folder, before, TODAY, keep=True)


def spoilt(column: str, cells: dict[int, str], rows: str = CLEAN) -> str:
    """The rows with other cells in one column: by row, from 0."""
    head, *lines = rows.splitlines()
    place = head.split(",").index(column)
    for row, cell in cells.items():
        parts = lines[row].split(",")
        parts[place] = cell
        lines[row] = ",".join(parts)
    return "\n".join([head, *lines]) + "\n"


HALF = Decimal("0.05")  # of 60 rows: three are within it, four are not
FOUR = (3, 7, 11, 19)
BY_COUNT: list[tuple[dict[str, Any], str, str, int]] = [
    ({"rule": "missing", "columns": ["age"], "at_most": HALF}, "age", "", 60),
    ({"rule": "missing", "at_most": HALF}, "sex", "", 60),
    ({"rule": "type", "columns": ["age"], "type": "number", "at_most": HALF}, "age", "old", 60),
    ({"rule": "type", "columns": ["age"], "type": "integer", "at_most": HALF}, "age", "30.5", 60),
    ({"rule": "type", "columns": ["sex"], "type": "text", "at_most": HALF}, "sex", "1", 60),
    ({"rule": "type", "columns": ["visit"], "type": "day", "at_most": HALF}, "visit", "2026-13-01", 60),
    ({"rule": "finite", "columns": ["age"], "at_most": HALF}, "age", "inf", 60),
    ({"rule": "finite", "at_most": HALF}, "age", "nan", 60),
    ({"rule": "bounds", "column": "age", "low": 20, "high": 79, "at_most": HALF}, "age", "19.99", 60),
    ({"rule": "bounds", "column": "age", "low": 20, "high": 79, "at_most": HALF}, "age", "1e9", 60),
    ({"rule": "vocabulary", "column": "sex", "values": ["f", "m"], "at_most": HALF}, "sex", "x", 60),
    ({"rule": "recent", "column": "visit", "days": 30, "at_most": HALF}, "visit", "2026-10-30", 60),
    ({"rule": "recent", "column": "visit", "days": 30, "at_most": HALF}, "visit", "2026-12-01", 60),
    ({"rule": "recent", "column": "visit", "days": 30, "at_most": HALF}, "visit", "", 60),
]


class TestEachRule:
    @pytest.mark.parametrize(("rule", "column", "cell", "of"), BY_COUNT)
    def test_it_is_kept_up_to_its_limit_and_broken_by_one_cell_more(
        self, tmp_path: Path, rule: dict[str, Any], column: str, cell: str, of: int
    ) -> None:
        declared = data_set(rule)
        for rows, count in ((CLEAN, 0), (FOUR[:3], 3), (FOUR, 4)):
            text = rows if isinstance(rows, str) else spoilt(column, dict.fromkeys(rows, cell))
            found = look(tmp_path, text, declared)
            (finding,) = [f for f in found.findings if f.column in (column, None)]
            assert (finding.count, finding.of, finding.passed) == (count, of, count <= 3), finding
            assert bool(found.failed) == (count > 3)

    def test_of_a_type_and_a_vocabulary_missing_cells_are_no_values(self, tmp_path: Path) -> None:
        rules = (
            {"rule": "type", "columns": ["age"], "type": "number", "at_most": 0},
            {"rule": "vocabulary", "column": "sex", "values": ["f", "m"], "at_most": 0},
        )
        text = spoilt("sex", {5: ""}, spoilt("age", {1: "", 2: ""}))
        assert [(f.count, f.of, f.passed) for f in look(tmp_path, text, data_set(*rules)).findings] == [
            (0, 58, True),
            (0, 59, True),
        ]

    def test_the_day_that_is_so_many_days_ago_is_recent(self, tmp_path: Path) -> None:
        rule = {"rule": "recent", "column": "visit", "days": 30, "at_most": 0}
        assert not look(tmp_path, spoilt("visit", {0: "2026-10-31", 1: "2026-11-30T09:00:00Z"}), data_set(rule)).failed

    def test_numbers_are_no_days(self, tmp_path: Path) -> None:
        pl.DataFrame({"age": [1, 2, 3], "sex": ["f"] * 3, "ill": ["no"] * 3}).write_parquet(tmp_path / "rows.parquet")
        rule = {"rule": "recent", "column": "age", "days": 30, "at_most": 0}
        declared = data_set(rule, source={"path": "rows.parquet", "kind": "parquet"})
        (finding,) = quality.profile(declared, tmp_path, None, TODAY).findings
        assert (finding.count, finding.of, finding.passed) == (3, 3, False)

    def test_a_vocabulary_is_compared_as_in_contracts(self, tmp_path: Path) -> None:
        rule = {"rule": "vocabulary", "column": "sex", "values": ["1", "2"], "at_most": 0}
        rows = "age,sex,ill\n30,1.0,no\n31,2,yes\n32,01,no\n"
        (finding,) = look(tmp_path, rows, data_set(rule)).findings
        assert (finding.count, finding.of) == (1, 3), "01 is no 1"

    @pytest.mark.parametrize(("copies", "kept"), [(3, True), (4, False)])
    def test_copies(self, tmp_path: Path, copies: int, kept: bool) -> None:
        head, *lines = ROWS.splitlines()
        rows = "\n".join([head, *lines[: 60 - copies], *lines[:copies]]) + "\n"
        (finding,) = look(tmp_path, rows, data_set({"rule": "duplicates", "at_most": HALF})).findings
        assert (finding.count, finding.of, finding.passed) == (copies, 60, kept)

    @pytest.mark.parametrize(("cells", "kept"), [({}, True), ({0: "f"}, True), (dict.fromkeys(range(60), "f"), False)])
    def test_a_column_of_one_value(self, tmp_path: Path, cells: dict[int, str], kept: bool) -> None:
        found = look(tmp_path, spoilt("sex", cells), data_set({"rule": "varies"}))
        assert {f.column: f.passed for f in found.findings} == {"age": True, "sex": kept, "ill": True}
        if not kept:
            assert found.failed[0].count == 60

    @pytest.mark.parametrize(("yes", "share", "kept"), [(6, "0.1", True), (5, "0.1", False), (60, "0.1", False)])
    def test_the_rarest_label(self, tmp_path: Path, yes: int, share: str, kept: bool) -> None:
        rows = spoilt("ill", {i: "yes" if i < yes else "no" for i in range(60)})
        rule = {"rule": "balance", "at_least": Decimal(share)}
        (finding,) = look(tmp_path, rows, data_set(rule)).findings
        assert finding.passed == kept
        assert (finding.count, finding.of) == (0 if yes == 60 else yes, 60), "one label alone has no rarest beside it"

    @pytest.mark.parametrize(("least", "kept"), [(60, True), (61, False)])
    def test_rows(self, tmp_path: Path, least: int, kept: bool) -> None:
        assert look(tmp_path, CLEAN, data_set({"rule": "rows", "at_least": least})).findings[0].passed == kept

    @pytest.mark.parametrize(("least", "kept"), [(30, True), (31, False)])
    def test_entities(self, tmp_path: Path, least: int, kept: bool) -> None:
        found = look(tmp_path, CLEAN, data_set({"rule": "entities", "at_least": least}, entity="who"))
        assert (found.findings[0].count, found.findings[0].passed) == (30, kept)
        assert found.counts.entities.sizes == {2: 30}

    def test_drift_is_against_the_last_signed_card(self, tmp_path: Path) -> None:
        rule = {"rule": "drift", "columns": ["sex"], "at_most": HALF}
        first = look(tmp_path, CLEAN, data_set(rule))
        assert [(f.count, f.passed) for f in first.findings] == [(0, None)], "there is nothing to compare with"
        assert not first.failed
        for moved, kept in ((0, True), (3, True), (4, False)):
            rows = spoilt("sex", {2 * i: "m" for i in range(moved)})
            (finding,) = look(tmp_path, rows, data_set(rule), first.reference).findings
            assert (finding.count, finding.of, finding.passed) == (moved, 60, kept)

    def test_bounds_that_were_changed_are_not_compared(self, tmp_path: Path) -> None:
        def rules(high: int) -> DataSet:
            bounds = {"rule": "bounds", "column": "age", "low": 0, "high": high, "at_most": 1}
            return data_set(bounds, {"rule": "drift", "columns": ["age"], "at_most": 0})

        first = look(tmp_path, CLEAN, rules(100))
        assert look(tmp_path, CLEAN, rules(100), first.reference).findings[1].passed is True
        assert look(tmp_path, CLEAN, rules(120), first.reference).findings[1].passed is None

    @pytest.mark.parametrize("rule", [kind for kind, *_ in BY_COUNT] + [{"rule": "varies"}])
    def test_it_names_a_code_and_a_dimension(self, tmp_path: Path, rule: dict[str, Any]) -> None:
        for finding in look(tmp_path, CLEAN, data_set(rule)).findings:
            assert finding.rule.CODE in TC609
            assert finding.rule.DIMENSION in DIMENSIONS
            assert finding.rule.rule in quality_text.RULES


class TestCounts:
    def test_kinds_of_files_count_alike(self, tmp_path: Path) -> None:
        rows = spoilt("ill", {9: ""}, spoilt("age", {3: "nan", 4: ""}))
        (tmp_path / "rows.csv").write_text(rows)
        typed = read_table(tmp_path / "rows.csv", kind="csv").with_columns(pl.col("age").cast(pl.Float64))
        typed.write_parquet(tmp_path / "rows.parquet")
        text = look(tmp_path, rows, data_set())
        parquet = data_set(source={"path": "rows.parquet", "kind": "parquet"})
        other = quality.profile(parquet, tmp_path, None, TODAY, keep=True)
        assert other.counts == text.counts
        assert other.reference == text.reference

    @given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
    def test_drift_is_the_total_variation_distance(self, a: list[int], b: list[int]) -> None:
        one, two = ({k: cells.count(k) for k in set(cells)} for cells in (a, b))
        expected = sum(abs(a.count(k) / len(a) - b.count(k) / len(b)) for k in range(10)) / 2
        assert float(counting.distance(one, two)) == pytest.approx(expected, abs=1e-12)
        assert counting.distance(one, one) == 0

    @given(st.lists(st.floats(width=64), min_size=1, max_size=50))
    def test_every_number_has_a_bin(self, cells: list[float]) -> None:
        for bounds in (None, (Decimal(-1), Decimal(1))):
            counted = counting.Counting(["x"], "x", None, asked=counting.Questions(bins={"x": bounds}))
            counted.add(pl.DataFrame({"x": cells}))
            assert sum(counted.histograms()["x"].values()) == len(cells)

    def test_a_contracts_schema_is_held_against_the_rows(self, tmp_path: Path) -> None:
        label = {"name": "ill", "classes": ["no", "yes"], "rule": "value"}
        schema = a_schema(number("age", 25, 70), category("sex", ["f"]) | {"values": ["f", "x"]}, label=label)

        class Asked:
            data = schema

        (tmp_path / "rows.csv").write_text(spoilt("ill", {0: "perhaps"}))
        found = quality.profile(data_set(), tmp_path, None, TODAY, Asked())
        by_rule = {(f.rule.rule, f.column): f for f in found.findings}
        assert by_rule["bounds", "age"].passed, "a contract clips what lies outside its bounds"
        assert by_rule["bounds", "age"].count == 14
        assert (by_rule["vocabulary", "sex"].count, by_rule["vocabulary", "sex"].passed) == (30, False)
        assert (by_rule["vocabulary", "ill"].count, by_rule["vocabulary", "ill"].passed) == (1, False)
        assert {f.whose for f in found.findings} == {"contract"}


def refusal(folder: Path, rows: str, declared: DataSet) -> FedpactError:
    with pytest.raises(FedpactError) as caught:
        look(folder, rows, declared)
    return caught.value


class TestBadInput:
    def test_a_rule_on_a_column_that_is_not_there(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, CLEAN, data_set({"rule": "missing", "columns": ["weight"], "at_most": 0}))
        assert (error.code, error.field) == ("DATA_COLUMN_MISSING", "weight")
        assert "the rule missing names" in error.message
        assert error.remedy

    def test_no_label(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, "age,sex\n1,f\n", data_set({"rule": "balance", "at_least": 0}))
        assert (error.code, error.field) == ("DATA_LABEL_MISSING", "ill")
        assert "`delimiter`" in error.remedy, "semicolons, another encoding and a missing header all look like this"

    def test_entities_that_nobody_tells_apart(self, tmp_path: Path) -> None:
        assert refusal(tmp_path, CLEAN, data_set({"rule": "entities", "at_least": 2})).code == "QUALITY_ENTITY"

    def test_a_source_that_cannot_be_read(self, tmp_path: Path) -> None:
        declared = data_set({"rule": "rows", "at_least": 1}, source={"path": "gone.csv", "kind": "csv"})
        with pytest.raises(InputError, match="DATA_FILE_MISSING"):
            quality.profile(declared, tmp_path, None, TODAY)
        with pytest.raises(RefusedError) as caught:
            quality.check(declared, tmp_path, tmp_path / "none.json", TODAY)
        assert caught.value.code == "QUALITY_GATE", "what cannot be checked is refused"
        assert "DATA_FILE_MISSING" in caught.value.message

    @pytest.mark.parametrize("text", ["", "{}", '{"rows":1,"columns":{"a":{"bins":{"1":-1}}}}', "\x00"])
    def test_a_damaged_profile(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(InputError) as caught:
            quality.Reference.read(tmp_path / "p.json")
        assert caught.value.code == "PROFILE_FILE"
        assert caught.value.remedy

    @pytest.mark.parametrize(
        ("rule", "line"),
        [
            ('rule = "magic"\nat_most = 0', "[[data_sets.rules]]"),
            ('rule = "missing"\nat_most = 1.5', "at_most"),
            ('rule = "missing"\nat_most = -0.1', "at_most"),
            ('rule = "missing"\nat_most = nan', "at_most"),
            ('rule = "missing"\ncolumns = []\nat_most = 0', "columns"),
            ('rule = "missing"\ncolumns = ["age", "age"]\nat_most = 0', "columns"),
            ('rule = "bounds"\ncolumn = "age"\nlow = 9\nhigh = 9\nat_most = 0', "[[data_sets.rules]]"),
            ('rule = "balance"\nat_least = 2', "at_least"),
            ('rule = "rows"\nat_least = 0', "at_least"),
            ('rule = "recent"\ncolumn = "visit"\ndays = 0\nat_most = 0', "days"),
            ('rule = "type"\ncolumns = ["age"]\ntype = "float"\nat_most = 0', "type"),
            ('rule = "varies"\nat_most = 0', "at_most"),
            ('rule = "missing"', "[[data_sets.rules]]"),
            ("at_most = 0", "[[data_sets.rules]]"),
        ],
    )
    def test_a_rule_that_is_none_names_its_line(self, tmp_path: Path, rule: str, line: str) -> None:
        good = '[[data_sets.rules]]\nrule = "varies"\n'
        text = template().replace("[policy]\n", f"{DATA_SET}{good}[[data_sets.rules]]\n{rule}\n\n[policy]\n", 1)
        with pytest.raises(InputError) as caught:
            parse(text, tmp_path / "agent.toml")
        lines = text.splitlines()
        start = lines.index(rule.splitlines()[0])
        place = next(n for n in range(start - 1, start + 6) if lines[n].startswith(line))
        assert caught.value.code.startswith("CONFIG")
        assert caught.value.file == f"{tmp_path / 'agent.toml'}:{place + 1}"


CANARY = {
    "age": "77.123456789",
    "sex": "canary-sex",
    "ill": "canary-ill",
    "visit": "1999-09-19",
    "who": "canary-person",
}
STRICT: list[dict[str, Any]] = [
    {"rule": "type", "columns": ["age"], "type": "integer", "at_most": 0},
    {"rule": "bounds", "column": "age", "low": 0, "high": 60, "at_most": 0},
    {"rule": "vocabulary", "column": "sex", "values": ["f", "m"], "at_most": 0},
    {"rule": "vocabulary", "column": "ill", "values": ["no", "yes"], "at_most": 0},
    {"rule": "recent", "column": "visit", "days": 365, "at_most": 0},
    {"rule": "varies"},
    {"rule": "drift", "at_most": 0},
]


def with_canaries() -> str:
    rows = CLEAN
    for column, cell in CANARY.items():
        rows = spoilt(column, {13: cell}, rows)
    return rows


class TestNoValueIsShown:
    def test_neither_in_the_report_nor_in_a_refusal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        declared = data_set(*STRICT, entity="who")
        before = look(tmp_path, CLEAN, declared).reference
        found = look(tmp_path, with_canaries(), declared, before)
        assert {(f.rule.rule, f.column) for f in found.failed} >= {
            ("type", "age"),
            ("bounds", "age"),
            ("vocabulary", "sex"),
            ("vocabulary", "ill"),
            ("recent", "visit"),
            ("drift", "ill"),
        }
        with pytest.raises(RefusedError) as caught:
            quality.refuse(found)
        written = tmp_path / "p.json"
        assert found.reference is not None
        found.reference.write(written)
        assert quality.Reference.read(written) == found.reference
        shown = [str(caught.value), json.dumps(found.plain()), written.read_text()]
        for lang in ("en", "zh"):
            quality_text.show(found, lang, TODAY.isoformat())
            shown += [capsys.readouterr().out, quality_text.render(found, lang, TODAY.isoformat())]
        for text in shown:
            for cell in CANARY.values():
                assert cell not in text
            assert float(CANARY["age"]).hex() not in text
        assert str(caught.value).count("column age, 1 of 60") == 1
        assert "7 other rules broken too" in str(caught.value)

    def test_a_report_says_each_rule_in_both_languages(self, tmp_path: Path) -> None:
        found = look(tmp_path, with_canaries(), data_set(*STRICT, entity="who"))
        zh, en = (quality_text.render(found, lang, TODAY.isoformat()) for lang in ("zh", "en"))
        assert '<html lang="zh-CN">' in zh
        for dimension, name in DIMENSIONS.items():
            assert (name in zh) == (dimension in en)
        for text in (zh, en):
            assert "<script" not in text
            assert "http" not in text.replace(str(tmp_path), "")
        assert "未通过" in zh
        assert "BROKEN" in en
        assert "0207 type consistency" in en

    def test_fewer_rows_than_declared_are_told_before_the_card_refuses_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for examples, told in ((60, False), (61, True)):
            found = look(tmp_path, CLEAN, data_set(num_examples=examples))
            assert found.plain()["declared_examples"] == examples
            quality_text.show(found, "en", TODAY.isoformat())
            assert (f"declares {examples} examples" in " ".join(capsys.readouterr().out.split())) == told
            quality_text.show(found, "zh", TODAY.isoformat())
            assert (f"申报{examples}个样本" in "".join(capsys.readouterr().out.split())) == told

    def test_names_that_others_chose_are_text_in_html(self, tmp_path: Path) -> None:
        name = "<b>age</b>"
        (tmp_path / "rows.csv").write_text(CLEAN.replace("age", name))
        found = quality.profile(data_set(columns=[name, "sex"]), tmp_path, None, TODAY)
        page = quality_text.render(found, "en", TODAY.isoformat())
        assert name not in page
        assert html.escape(name) in page


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path) as made:
        made.enrol()
        made.approve()
        made.wire.sent.clear()
        yield made


GATE = '[[data_sets.rules]]\nrule = "missing"\nat_most = 0\n'
CARD = """[data_sets.card]
title = "Heart"
description = "Patients of 2025"
license = "CC-BY-4.0"
creator = "Hospital 1"
url = "https://hospital.example.org/heart"
published = 2026-11-01
origin = "wards"
annotation = "two doctors"
retention = "10 years"
cleaning_recipe = "clean.sql"
rights = ["hold", "process"]
registration = "R-1"
"""


def prepare(world: Lab) -> cards.Draft:
    return cards.prepare(world.home, world.home.config(), world.store, "set-1")


class TestCard:
    def test_a_data_set_that_breaks_a_rule_gets_no_card(self, world: Lab) -> None:
        world.configure(data_set=DATA_SET + GATE, rows=ROWS.replace("25,m,no", ",m,no"))
        with pytest.raises(RefusedError) as caught:
            prepare(world)
        assert (caught.value.code, caught.value.field, caught.value.exit_code) == ("QUALITY_GATE", "age", 5)
        assert "1 of 60" in caught.value.message
        assert (world.wire.sent, world.store.data_sets()) == ([], [])
        (world.home.path / "rows.csv").write_text(ROWS)
        world.declare()
        assert world.store.data_set("set-1")

    def test_the_last_cards_profile_is_kept_for_drift(self, world: Lab) -> None:
        drift = '[[data_sets.rules]]\nrule = "drift"\nat_most = 0.05\n'
        world.configure(data_set=DATA_SET + drift)
        world.declare()
        path = world.home.profile_path("set-1")
        assert path.stat().st_mode & 0o077 == 0
        (world.home.path / "rows.csv").write_text(ROWS.replace(",f,", ",m,"))
        with pytest.raises(RefusedError, match="breaks the rule drift: column sex, 30 of 60"):
            prepare(world)

    def test_declared_facts_stand_on_the_card_and_of_files_their_digest(self, world: Lab) -> None:
        (world.home.path / "clean.sql").write_text("select * from secret_table")
        world.configure(data_set=DATA_SET + CARD)
        made = world.declare()
        facts = made.card.facts
        assert facts is not None
        assert (facts.published, facts.rights) == ("2026-11-01", ("hold", "process"))
        assert facts.recipe == hashlib.sha256(b"select * from secret_table").hexdigest()
        assert all(b"secret_table" not in request.content for request in world.wire.sent)
        shown = {name: (value, where) for name, value, where in made.items()}
        assert shown["rights"] == ("hold, process", "declared; 0101 basic information")
        with world.world.database.read() as connection:
            (card,) = server_cards.card_list(connection, world.home.participant_id)
        assert card == made.card

    def test_a_recipe_that_is_not_there(self, world: Lab) -> None:
        world.configure(data_set=DATA_SET + CARD)
        with pytest.raises(InputError) as caught:
            prepare(world)
        assert (caught.value.code, caught.value.field) == ("CARD_FILE", "data_sets.card.cleaning_recipe")

    def test_what_is_counted_leaves_only_where_it_was_let_out_and_rounded(self, world: Lab) -> None:
        """60 rows, 3 cells missing, 40 copies: none of these numbers is on a card unless it was named."""
        rows = ROWS.replace("25,m,no", ",m,no").replace("26,f,no", ",f,no").replace("28,f,no", ",f,no")
        world.configure(rows=rows)
        draft = prepare(world)
        assert draft.card.measured is None
        out = draft.letting_out(cards.countable(draft, ["missing-cells", "rows", "smallest-class"]))
        assert [(m.item, m.at_least, m.words("en")) for m in out.card.measured or ()] == [
            ("rows", 60, "at least 60"),
            ("missing-cells", 0, f"fewer than {MINIMUM}"),
            ("smallest-class", 20, "at least 20"),
        ]
        assert all("outside the privacy guarantee" in where for name, _, where in out.items() if name in _items())
        with pytest.raises(InputError) as caught:
            cards.countable(draft, ["entities"])
        assert caught.value.code == "CARD_MEASURED"

    @given(st.integers(0, 10_000))
    def test_a_count_that_leaves_tells_less_than_a_row(self, count: int) -> None:
        made = Measured.of("rows", count)
        assert made.at_least % MINIMUM == 0
        assert made.at_least <= count < made.at_least + MINIMUM
        assert made.basis == "outside-the-guarantee"

    def test_an_exact_count_is_no_record(self) -> None:
        with pytest.raises(InputError):
            Measured.parse({"item": "rows", "at_least": 63, "basis": "outside-the-guarantee"}, code="CARD")

    def test_a_card_without_facts_is_what_it_was(self, world: Lab) -> None:
        world.configure()
        card = world.declare().card
        assert not {"facts", "measured"} & set(card.plain())
        assert DataSetCard.from_bytes(card.to_bytes()) == card

    def test_no_cell_leaves_and_none_is_logged(self, world: Lab, capsys: pytest.CaptureFixture[str]) -> None:
        from fedpact_client.text import show_card

        cell = "77.123456789"
        world.configure(data_set=DATA_SET + CARD.replace('cleaning_recipe = "clean.sql"\n', ""))
        (world.home.path / "rows.csv").write_text(ROWS.replace("25,m,no", f"{cell},m,canary-ill"))
        with world.client() as client:
            draft = prepare(world)
            draft = draft.letting_out(cards.countable(draft, list(draft.profile.items())))
            cards.declare(world.home, world.store, client, draft, PASSPHRASE)
        show_card(draft)
        shown = capsys.readouterr()
        egress = json.dumps([str(entry) for entry in world.store.egress()])
        for text in (shown.out, shown.err, egress, *(str(r.content) for r in world.wire.sent)):
            assert cell not in text
            assert "canary-ill" not in text


def _items() -> set[str]:
    return {english for _, english, _ in ITEMS.values()}


class TestCardOfAContract:
    def test_a_contract_names_the_card_that_it_was_made_by(self, world: Lab) -> None:
        world.configure()
        card = world.declare().card
        contract = world.offer()
        assert contract.participant(world.home.participant_id).card == card.digest()

    def test_a_card_that_changed_since_is_noticed_on_both_sides(self, world: Lab) -> None:
        from fedpact_client.review import check_own
        from fedpact_server import alarms

        world.configure()
        world.declare()
        contract = world.offer()
        me = contract.participant(world.home.participant_id)
        check_own(world.home, world.home.config(), world.store, contract, me)
        text = world.home.config_path.read_text().replace("[policy]\n", '[data_sets.card]\ntitle = "x"\n[policy]\n', 1)
        world.home.config_path.write_text(text)
        world.declare()
        with pytest.raises(RefusedError) as caught:
            check_own(world.home, world.home.config(), world.store, contract, me)
        assert (caught.value.code, caught.value.field) == ("SIGN_CARD", "card")
        with world.world.database.read() as connection:
            (alarm,) = [a for a in alarms.latest(connection) if a["code"] == "CARD_CHANGED"]
            (card,) = server_cards.card_list(connection, world.home.participant_id)
            assert server_cards.naming(connection, card) == [(contract.id, False)]
        assert contract.id[:12] in alarm["detail"]
        world.declare()
        with world.world.database.read() as connection:
            assert len([a for a in alarms.latest(connection) if a["code"] == "CARD_CHANGED"]) == 1, "said once"


class TestCroissant:
    def card(self, **changes: Any) -> DataSetCard:
        facts = {
            "title": "Heart 心脏",
            "description": "Patients",
            "license": "CC-BY-4.0",
            "creator": "Hospital",
            "url": "https://hospital.example.org",
            "published": "2026-11-01",
            "rights": ("hold",),
        }
        return DataSetCard(
            data_set="set-1",
            participant="ab" * 32,
            num_examples=40,
            columns=("age",),
            label="ill",
            epsilon=Decimal(8),
            delta=Decimal("0.00001"),
            alpha=Decimal("4.3"),
            released_rows=0,
            facts=Facts.parse({k: v for k, v in (facts | changes).items() if v is not None}, code="CARD"),
            measured=(Measured.of("missing-cells", 3),),
        )

    def test_it_has_what_croissant_requires(self) -> None:
        made = croissant(self.card())
        for name in ("@context", "@type", "conformsTo", *REQUIRED):
            assert made[name]
        assert made["@context"]["conformsTo"] == "dct:conformsTo"
        assert made["conformsTo"] == "http://mlcommons.org/croissant/1.1"
        assert made["@type"] == "sc:Dataset"
        assert {q["fedpact:tc609"] for q in made["fedpact:quality"]} <= set(TC609)
        assert {
            "fedpact:tc609": "0204",
            "fedpact:item": "missing-cells",
            "fedpact:atLeast": 0,
            "fedpact:basis": "outside-the-guarantee",
        } in made["fedpact:quality"]
        assert json.loads(json.dumps(made)) == made

    @pytest.mark.parametrize("fact", list(REQUIRED.values()))
    def test_what_is_not_declared_is_asked_for_by_name(self, fact: str) -> None:
        with pytest.raises(InputError) as caught:
            croissant(self.card(**{fact: None}))
        assert (caught.value.code, caught.value.field) == ("CARD_CROISSANT", f"data_sets.card.{fact}")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("published", "2026-02-30"),
            ("published", "yesterday"),
            ("url", "ftp://x"),
            ("url", "javascript:alert(1)"),
            ("rights", ["own"]),
            ("rights", ["hold", "hold"]),
            ("rights", []),
            ("recipe", "xyz"),
        ],
    )
    def test_facts_of_another_form_are_refused(self, key: str, value: object) -> None:
        with pytest.raises(InputError):
            Facts.parse({key: value}, code="CARD")

    def test_it_validates_with_mlcroissant(self, tmp_path: Path) -> None:
        mlcroissant = pytest.importorskip("mlcroissant", reason="360 MB of packages; installed by whoever wants this")
        path = tmp_path / "card.json"
        path.write_text(json.dumps(croissant(self.card())))
        assert mlcroissant.Dataset(path).metadata.issues.errors == set()


def test_every_fact_and_item_has_a_known_code() -> None:
    assert set(words.FACTS) == set(Facts.model_fields)
    assert {code for code, _ in words.FACTS.values()} | {code for code, *_ in ITEMS.values()} <= set(TC609)
    assert set(CardPart.model_fields) - set(Facts.model_fields) == {"cleaning_recipe"}


HOSPITALS = {"cleveland": (303, 6, 13, 0), "hungarian": (294, 782, 106, 1), "switzerland": (123, 273, 5, 0)}
HOSPITALS |= {"va": (200, 698, 10, 1)}


@pytest.mark.data("heart_disease")
def test_hospitals_that_are_as_they_are(data_dir: Path, tmp_path: Path) -> None:
    """The UCI files. The figures were counted by awk: rows, cells with "?", rows of the rarest label, copies."""
    names = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope"]
    names += ["ca", "thal", "num"]
    rules = [{"rule": "varies", "columns": ["chol"]}, {"rule": "missing", "columns": ["ca"], "at_most": HALF}]

    def look_at(hospital: str) -> quality.Profile:
        source = {"path": str(data_dir / "heart_disease" / f"processed.{hospital}.data"), "kind": "csv"}
        source |= {"column_names": names, "missing": ["?"]}
        declared = data_set(*rules, columns=names[:-1], label="num", source=source)
        return quality.profile(declared, tmp_path, None, TODAY)

    found = {hospital: look_at(hospital) for hospital in HOSPITALS}
    for hospital, (rows, missing, rarest, copies) in HOSPITALS.items():
        counts = found[hospital].counts
        assert (counts.rows, sum(c.missing for c in counts.columns)) == (rows, missing), hospital
        assert (counts.labels.smallest, counts.duplicates) == (rarest, copies), hospital
        assert all(c.numbers == rows - c.missing for c in counts.columns)
    broken = {hospital: [(f.rule.rule, f.count) for f in look.failed] for hospital, look in found.items()}
    assert broken["cleveland"] == []
    assert broken["switzerland"] == [("varies", 123), ("missing", 118)], "cholesterol is 0 in every row there"
