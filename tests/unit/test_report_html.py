"""The report as a page: one file that fetches nothing, in two languages, whatever names the parties have."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.federation import make_federation

from fedpact_contract.report import NOT_STOPPED, build
from fedpact_server.report.charts import HEIGHT, WIDTH, Bar, Series, bars, lines
from fedpact_server.report.html import render
from fedpact_server.report.labels import LABELS, NOT_STOPPED_ZH, words

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--"
VOID = {"meta", "rect", "circle", "path", "polyline", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; every element must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(report: dict[str, Any], lang: str = "en", lift: dict[str, Any] | None = None) -> Page:
    """The page, parsed; it runs nothing and fetches nothing."""
    text = render(report, lang, lift)  # type: ignore[arg-type]  # a test's plain text
    found = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base", "a"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "style", "action", "srcset")
        assert "://" not in (value or "") or name == "xmlns"
    assert not re.search(r"@import|url\(", text)
    return found


def with_texts(value: Any, text: str) -> Any:
    """The report with this text in place of every name and word that a party chose."""
    if isinstance(value, dict):
        chosen = {"name", "title", "purpose", "entity_code", "sector", "code", "outcome"}
        return {k: text if k in chosen and isinstance(v, str) else with_texts(v, text) for k, v in value.items()}
    return [with_texts(item, text) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ClosedRun:
    made = closed_run(tmp_path_factory.mktemp("report"))
    made.settle()
    return made


@pytest.fixture(scope="module")
def report(run: ClosedRun) -> dict[str, Any]:
    """A settled run's."""
    return build(run.federation.entries())


def comparison(report: dict[str, Any]) -> dict[str, Any]:
    lines = [{"id": p["id"], "name": p["name"], "draws": [0.5, 0.7], "mean": 0.6} for p in report["participants"]]
    return {"together": 0.85, "participants": lines, "draws": 2, "steps": 3, "note": "n", "alone_noise_multiplier": "1"}


class TestContent:
    def test_it_says_what_the_log_says(self, report: dict[str, Any]) -> None:
        text = page(report).text
        assert report["contract_id"] in text
        assert report["model"]["digest"] in text
        assert "CNY 1,000,000.00" in text
        for party in report["participants"]:
            assert party["name"] in text
            assert party["value"] in text
            assert f"{party['epsilon_budget']}" in text
            yuan, fen = divmod(party["fen"], 100)
            assert f"CNY {yuan:,}.{fen:02d}" in text
        assert text.count("ADMITTED") == 8
        assert "validation sampling" in text
        assert "skip or choose its noise" in text
        assert "no auditor has re-evaluated them" in text

    def test_there_is_a_chart_of_each_kind(self, report: dict[str, Any]) -> None:
        assert page(report).tags.count("svg") == 4
        assert page(report, lift=comparison(report)).tags.count("svg") == 5

    def test_together_beside_alone(self, report: dict[str, Any]) -> None:
        text = page(report, lift=comparison(report)).text
        assert "+0.250" in text
        assert "0.500 – 0.700" in text
        assert "Not covered by the contract's epsilon" in text

    def test_in_chinese(self, report: dict[str, Any]) -> None:
        found = page(report, "zh", comparison(report))
        assert ("lang", "zh-CN") in found.attributes
        assert "¥1,000,000.00" in found.text
        assert "CNY" not in found.text
        shown = words("zh")
        for key in LABELS.keys() - {"unsettled", "fallback", "unopened", "before", "alone", "round"}:
            assert shown[key] in found.text, key
        english = words("en")
        for key in ("report", "statement", "shares", "lift", "privacy", "outcomes", "not_stopped"):
            assert english[key] not in found.text, key

        assert not [line for line in NOT_STOPPED if line in found.text]
        assert all(line in found.text for line in NOT_STOPPED_ZH)
        assert len(NOT_STOPPED_ZH) == len(NOT_STOPPED)

    def test_both_languages_have_every_label(self) -> None:
        for key, (english, chinese) in LABELS.items():
            assert english
            assert re.search(r"[\u4e00-\u9fff]", chinese), key
        template = Path(__file__).parents[2] / "server/fedpact_server/templates/report.html.j2"
        used = set(re.findall(r"\bw\.([a-z_]+)", template.read_text("utf-8")))
        assert used <= LABELS.keys()

    def test_the_same_report_gives_the_same_bytes(self, report: dict[str, Any]) -> None:
        assert render(report, "en") == render(build_again(report), "en")

    def test_an_unsettled_run(self, run: ClosedRun, report: dict[str, Any]) -> None:
        entries = run.federation.entries()
        upto = next(i for i, entry in enumerate(entries) if entry.type == "scores-opened")
        for count in (1, 2, 4, 8, upto):
            found = page(build(entries[:count]))
            assert "Not settled yet" in found.text
            assert report["contract_id"] in found.text
            assert found.tags.count("svg") == 1, "epsilon alone"

    def test_a_fallback_is_named(self, report: dict[str, Any]) -> None:
        settled = report["settlement"]
        for basis, named in (("fallback", True), ("contribution", False)):
            found = page(report | {"settlement": settled | {"basis": basis}})
            assert ("the contract's fallback was applied" in found.text) == named


class TestHostileNames:
    @pytest.mark.parametrize("lang", ["en", "zh"])
    def test_a_participant_that_is_called_script(self, report: dict[str, Any], lang: str) -> None:
        found = page(with_texts(report, HOSTILE), lang, with_texts(comparison(report), HOSTILE))
        assert found.text.count("<script>alert(1)</script>") >= 8 + 4, "shown as text"
        assert len(found.tags) == len(page(report, lang, comparison(report)).tags), "not one element more"

    def test_in_a_real_contract(self, tmp_path: Path) -> None:
        names = ["<script>alert(1)</script>", '"><svg onload=alert(1)>', "' onmouseover='x", "{{ 7 * 7 }}{% raw %}"]
        federation = make_federation(tmp_path, names=names, title="<b>bold</b>", operator__name="</title><script>")
        found = page(build(federation.entries()))
        for name in [*names[:1], "{{ 7 * 7 }}{% raw %}", "<b>bold</b>", "</title><script>"]:
            assert name[:25] in found.text
        assert "49" not in found.text.replace(federation.contract.id, "")

    def test_a_name_with_marks_that_turn_text_around(self, report: dict[str, Any]) -> None:
        assert page(with_texts(report, "\u202e开发\u200b <"))


NUMBERS = st.floats(-1e6, 1e6)
NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=200)


class TestCharts:
    @given(st.lists(st.tuples(NAMES, st.lists(NUMBERS, max_size=12)), max_size=12))
    def test_lines_stay_within_the_picture(self, series: list[tuple[str, list[float]]]) -> None:
        picture = lines([Series(name=name, values=values) for name, values in series], 0, "nat")
        Page(picture)
        for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', picture):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT
        assert picture.count("<circle") == sum(len(values) for _, values in series)

    @given(st.lists(st.tuples(NAMES, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=12))
    def test_bars_stay_within_the_picture(self, items: list[tuple[str, float, float, float]]) -> None:
        picture = bars([Bar(name=n, value=v, low=min(a, b), high=max(a, b)) for n, v, a, b in items], "")
        Page(picture)
        for x, width in re.findall(r'<rect x="([^"]+)" y="[^"]+" width="([^"]+)"', picture):
            assert float(width) >= 0
            assert float(x) + float(width) <= WIDTH
        assert picture.count("<rect") == len(items)

    def test_a_value_of_nothing_and_a_negative_one(self) -> None:
        assert bars([], "") == lines([], 0, "") == lines([Series(name="a", values=[])], 0, "") == ""
        assert 'width="0.0"' in bars([Bar(name="a", value=-1.0)], "")
        assert 'width="0.0"' in bars([Bar(name="a", value=0.0)], "")
        assert lines([Series(name="a", values=[1.0])], 0, "").count("<circle") == 1
        flat = lines([Series(name="a", values=[2.0, 2.0, 2.0])], 0, "")
        assert len(set(re.findall(r'cy="([^"]+)"', flat))) == 1

    def test_a_long_name_is_cut(self) -> None:
        assert "…" in bars([Bar(name="x" * 200, value=1.0)], "")
        assert "x" * 30 not in bars([Bar(name="x" * 200, value=1.0)], "")


def build_again(report: dict[str, Any]) -> dict[str, Any]:
    """The same values, in other objects."""
    import json

    again: dict[str, Any] = json.loads(json.dumps(report))
    return again
