"""The report as a page: one file that fetches nothing, in two languages, whatever names the parties have."""

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.federation import make_federation
from tests.support.page import HOSTILE, Page, page, with_texts

from fedpact_contract.language import Lang
from fedpact_contract.report import NOT_STOPPED, NOT_STOPPED_ZH, build
from fedpact_contract.request import parse_instant
from fedpact_server.report.charts import COLOURS, HEIGHT, INK, WIDTH, Bar, Series, bars, lines, width
from fedpact_server.report.html import render
from fedpact_server.report.labels import LABELS, SAID, words
from fedpact_server.report.spelled import number_ranges


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


ENTITY = (
    *("dp_kind", "dp_value", "dp_noise_multiplier", "dp_sample_rate", "dp_entity_epsilon", "dp_entity_delta"),
    *("dp_entity", "dp_column", "dp_max_rows", "dp_measurements", "statistics", "statistics_note", "noise_error"),
    *("dp_low", "dp_high", "dp_bins", "dp_probabilities"),
    *("dp_not_protected_from", "dp_max_update_norm", "privacy_note_central", "cumulative_note_central"),
    *(
        "query_mean",
        "query_histogram",
        "query_count",
        "query_quantile",
        "baselines",
        "baselines_note",
        "accuracy_alone",
    ),
    *("without_slices", "without", "without_slices_note", "buyer"),
    *("common_control", "common_control_note", "floor_once"),
)
"""Labels of clauses that this contract does not have, and of another trust model."""


class TestContent:
    def test_participants_under_common_control_are_named(self, report: dict[str, Any]) -> None:
        group = {"name": "Holding", "members": [], "names": ["A", "B"], "floor_fen": 12_345}
        text = page(report | {"settlement": report["settlement"] | {"common_control": [group]}}, "en").text
        assert "Holding: A, B (floor CNY 123.45)" in text
        text = page(report | {"settlement": report["settlement"] | {"common_control": [group]}}, "zh").text
        assert "Holding: A、B (保底金额 ¥123.45)" in text

    @pytest.mark.parametrize(("lang", "heads"), [("en", "without Operator (50)"), ("zh", "去除 运营方 (50)")])
    def test_what_hangs_on_each_slice_is_a_table(self, report: dict[str, Any], lang: Lang, heads: str) -> None:
        first, *others = report["participants"]
        shares = {p["id"]: "0.25" for p in report["participants"]}
        parts = [
            {"source": "operator", "rows": 50, "shares": shares},
            {"source": first["id"], "rows": 170, "shares": None},
            {"source": "buyer", "rows": 30, "shares": shares},
        ]
        text = page(report | {"settlement": report["settlement"] | {"without_slices": parts}}, lang).text
        assert heads in text
        assert f"{first['name']} (170)" in text
        assert words(lang)["buyer"] + " (30)" in text
        assert text.count(" 25.00 % – 25.00 %") == 1 + len(others)
        assert heads not in page(report, lang).text

    def test_it_says_what_the_log_says(self, report: dict[str, Any]) -> None:
        text = page(report).text
        assert report["contract_id"] in text
        assert report["model"]["digest"] in text
        assert "CNY 1,000,000.00" in text
        for party in report["participants"]:
            assert party["name"] in text
            assert f" {Decimal(party['value']):.6f} {Decimal(party['leave_one_out']):.6f} " in text
            assert f"{party['epsilon_budget']}" in text
            yuan, fen = divmod(party["fen"], 100)
            assert f"CNY {yuan:,}.{fen:02d}" in text
        assert text.count("admitted 1-2 ADMITTED") == 4, "one line each"
        assert "validation sampling" in text
        assert "skip or choose its noise" in text
        assert "no auditor has re-evaluated them" in text

    def test_whose_report_it_is_and_of_when(self, run: ClosedRun, report: dict[str, Any]) -> None:
        text, contract = page(report).text, run.federation.contract
        for party in (contract.operator, *contract.participants):
            assert party.entity_code in text
            assert party.id in text
        for moment in (contract.term.not_before, contract.term.not_after):
            assert f"{moment[:10]} {moment[11:-1]} UTC" in text
        assert f"within {contract.settlement.close_days} days after the term" in text
        assert "within 1 day after the term" in page(report | {"close_days": 1}).text
        for line, what in zip(report["rounds"], ("First", "Last"), strict=True):
            opened = parse_instant(line["deadline"]) - timedelta(seconds=contract.participation.deadline_seconds)
            assert f"{what} round opened {opened:%Y-%m-%d %H:%M:%S} UTC" in text
        one = page(build(run.federation.entries()[:2])).text
        assert "First round opened" in one
        assert "Last round opened" not in one
        assert "round opened" not in page(build(run.federation.entries()[:1])).text

    def test_it_says_what_its_words_mean(self, report: dict[str, Any]) -> None:
        text = page(report).text
        assert "A nat is the unit of the loss" in text
        assert "Leave-one-out is how much higher the loss would have been" in text
        assert "its ends are rounded outward" in text

    def test_a_participant_has_one_colour(self, report: dict[str, Any]) -> None:
        lift = comparison(report)
        lift["participants"].reverse()
        text = render(report, "en", lift)
        names = [p["name"] for p in report["participants"]]
        for picture in re.findall("<svg.*?</svg>", text):
            filled = [c for c in re.findall(r'<rect [^>]*fill="([^"]+)"', picture) if c != INK]
            shown = [n for n in re.findall("<text[^>]*>([^<]*)</text>", picture) if n in names]
            assert (shown, filled) in ((names, list(COLOURS[: len(names)])), ([], []))
        assert len(re.findall("<svg.*?</svg>", text)) == 5

    def test_there_is_a_chart_of_each_kind(self, report: dict[str, Any]) -> None:
        assert page(report).tags.count("svg") == 4
        assert page(report, lift=comparison(report)).tags.count("svg") == 5

    def test_together_beside_alone(self, report: dict[str, Any]) -> None:
        text = page(report, lift=comparison(report)).text
        assert "+0.250" in text
        assert "0.500 - 0.700" in text
        assert "Not covered by the contract's epsilon" in text

    @pytest.mark.parametrize("lang", ["en", "zh"])
    def test_what_the_renormalised_game_does_is_told_where_it_is_played(
        self, report: dict[str, Any], lang: str
    ) -> None:
        note = words(lang)["renormalised_note"]
        assert report["game"] == "fixed-weight"
        assert note not in page(report, lang).text
        assert note in page(report | {"game": "re-normalised"}, lang).text

    def test_in_chinese(self, report: dict[str, Any]) -> None:
        found = page(report, "zh", comparison(report))
        assert ("lang", "zh-CN") in found.attributes
        assert "¥1,000,000.00" in found.text
        assert "CNY" not in found.text
        assert "95%区间" in found.text
        shown = words("zh")
        elsewhere = {
            "unsettled",
            "fallback",
            "unopened",
            "before",
            "alone",
            "round",
            "close_day",
            "renormalised_note",
            "affected",
            *ENTITY,
        }
        elsewhere |= {key for key in LABELS if key.startswith(("reevaluated_", "left"))}
        for key in LABELS.keys() - elsewhere:
            assert shown[key].replace("{}", str(report["close_days"])) in found.text, key
        english = words("en")
        for key in ("report", "statement", "shares", "lift", "privacy", "outcomes", "not_stopped"):
            assert english[key] not in found.text, key

        assert not [line for line in NOT_STOPPED if line in found.text]
        assert all(line in found.text for line in NOT_STOPPED_ZH)
        assert len(NOT_STOPPED_ZH) == len(NOT_STOPPED)

    def test_no_english_is_left_in_the_chinese_page(self, report: dict[str, Any]) -> None:
        text = page(report, "zh", comparison(report)).text.rpartition("}")[2]  # what follows the style sheet
        chosen = [report["title"], report["purpose"], report["operator"]["name"]]
        chosen += [p[key] for p in report["participants"] for key in ("name", "sector")]
        ours = ["fedpact verify EVIDENCE --trust FILE", "NIST SP 800-226", "SHA-256", "ADMITTED", "UTC", "nat", "DP"]
        ours += ["dp-accounting", "PLD", "REPLACE_SPECIAL", "epsilon_pld", "epsilon_gate", "AES-256-CTR"]
        for known in [*chosen, *ours, *re.findall("[0-9a-f]{64}", text)]:
            text = text.replace(known, "")
        assert re.findall(r"[A-Za-z]+", text) == []

    def test_every_word_of_the_log_has_its_chinese(self) -> None:
        outcomes = {"admitted", "rejected", "refused", "missed"}
        assert outcomes | {"signed", "running", "completed", "stopped", "settled", "accuracy"} <= SAID.keys()
        assert all(re.search(r"[\u4e00-\u9fff]", chinese) for _, chinese in SAID.values())

    def test_both_languages_have_every_label(self) -> None:
        for key, (english, chinese) in LABELS.items():
            assert english
            assert re.search(r"[\u4e00-\u9fff]", chinese) or chinese in "εδ", key
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

    def test_outcomes_by_participant(self, report: dict[str, Any]) -> None:
        who = report["participants"][1]
        told = [("admitted", "ADMITTED"), ("missed", "DEADLINE"), *[("admitted", "ADMITTED")] * 2]
        outcomes = [{"participant": who["id"], "name": who["name"], "outcome": o, "code": c} for o, c in told]
        line = {"deadline": "2026-11-24T12:00:00Z", "invited": 4, "admitted": 1}
        rounds = [line | {"round": n, "outcomes": [o]} for n, o in enumerate(outcomes, start=1)]
        text = page(report | {"rounds": rounds}).text
        assert f"{who['name']} admitted 1, 3-4 ADMITTED {who['name']} no reply in time 2 DEADLINE" in text
        assert number_ranges([]) == ""
        assert number_ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"

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
        names = [
            "<script>alert(1)</script>",
            '"><svg onload=alert(1)>',
            "' onmouseover='x",
            "{{ 991 * 991 }}{% raw %}",
        ]
        federation = make_federation(tmp_path, names=names, title="<b>bold</b>", operator__name="</title><script>")
        found = page(build(federation.entries()))
        for name in [*names[:1], "{{ 991 * 991 }}{% raw %}", "<b>bold</b>", "</title><script>"]:
            assert name[:25] in found.text
        assert str(991 * 991) not in found.text

    def test_a_name_with_marks_that_turn_text_around(self, report: dict[str, Any]) -> None:
        assert page(with_texts(report, "\u202e开发\u200b <"))


NUMBERS = st.floats(-1e6, 1e6)
NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=200)


def series(name: str, values: list[float]) -> Series:
    return Series(name=name, colour=INK, values=values)


def bar(name: str, value: float, low: float | None = None, high: float | None = None) -> Bar:
    return Bar(name=name, colour=INK, value=value, low=low, high=high, label="12.34 %")


def labels(picture: str) -> list[tuple[str, float, float, float, float]]:
    """Every text of a picture with its box: left, right, top, bottom."""
    found = []
    for x, y, anchor, shown in re.findall('<text x="([^"]+)" y="([^"]+)" text-anchor="([a-z]+)">(.*?)</text>', picture):
        text = Page(f"<p>{shown}</p>").words
        wide = width("".join(text))
        left = float(x) - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        found.append(("".join(text), left, left + wide, float(y) - 9, float(y) + 2))
    return found


def check_labels(picture: str) -> None:
    """No text lies over another one, or leaves the picture."""
    boxes = labels(picture)
    height = float(re.findall(r'viewBox="0 0 \d+ ([^"]+)"', picture)[0])
    for number, (text, left, right, top, bottom) in enumerate(boxes):
        assert left >= 0, text
        assert right <= WIDTH, text
        assert top >= 0, text
        assert bottom <= height, text
        for other, a, b, c, d in boxes[:number]:
            assert right <= a or b <= left or bottom <= c or d <= top, (text, other)


def ticks(picture: str) -> list[float]:
    """The numbers at the vertical axis of a line chart, upwards."""
    at_axis = re.findall(r'<text x="64\.0" y="[^"]+" text-anchor="end">(-?[0-9.e-]+)</text>', picture)
    return [float(text) for text in at_axis]


class TestCharts:
    @given(st.lists(st.tuples(NAMES, st.lists(NUMBERS, max_size=120)), max_size=12))
    def test_lines_stay_within_the_picture(self, given_lines: list[tuple[str, list[float]]]) -> None:
        picture = lines([series(name, values) for name, values in given_lines], "Round", "nat")
        Page(picture)
        for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', picture):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT
        assert picture.count("<circle") == sum(len(values) for _, values in given_lines)
        if picture:
            check_labels(picture)

    @given(st.lists(st.tuples(NAMES, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=12))
    def test_bars_stay_within_the_picture(self, items: list[tuple[str, float, float, float]]) -> None:
        picture = bars([bar(n, v, min(a, b), max(a, b)) for n, v, a, b in items])
        Page(picture)
        for x, wide in re.findall(r'<rect x="([^"]+)" y="[^"]+" width="([^"]+)"', picture):
            assert float(wide) >= 0
            assert float(x) + float(wide) <= WIDTH
        assert picture.count("<rect") == len(items)
        if picture:
            check_labels(picture)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.099, 0.542], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
            ([-0.23, 0.38], [-0.4, -0.2, 0.0, 0.2, 0.4]),
            ([0.0, 0.00031], [0.0, 0.0001, 0.0002, 0.0003, 0.0004]),
            ([120.0, 870.0], [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]),
        ],
    )
    def test_ticks_are_round(self, values: list[float], expected: list[float]) -> None:
        assert ticks(lines([series("a", values)], "Round", "nat")) == expected

    @given(st.lists(NUMBERS, min_size=1))
    def test_ticks_are_even_and_hold_every_value(self, values: list[float]) -> None:
        found = ticks(lines([series("a", values)], "Round", "nat"))
        assert 2 <= len(found) <= 7
        step = found[1] - found[0]
        assert f"{step:.0e}"[0] in "125"
        slack = 0.02 * step + 1e-9
        assert found[0] - slack <= min(values)
        assert max(values) <= found[-1] + slack

    def test_a_value_of_nothing_and_a_negative_one(self) -> None:
        assert bars([]) == lines([], "", "") == lines([series("a", [])], "", "") == ""
        assert 'width="0.0"' in bars([bar("a", -1.0)])
        assert 'width="0.0"' in bars([bar("a", 0.0)])
        assert lines([series("a", [1.0])], "", "").count("<circle") == 1
        flat = lines([series("a", [2.0, 2.0, 2.0])], "", "")
        assert len(set(re.findall(r'cy="([^"]+)"', flat))) == 1

    def test_a_long_name_is_cut(self) -> None:
        assert "…" in bars([bar("x" * 200, 1.0)])
        assert "x" * 30 not in bars([bar("x" * 200, 1.0)])
        assert "…" in bars([bar("医" * 20, 1.0)])
        assert "…" not in bars([bar("x" * 20, 1.0)])


def build_again(report: dict[str, Any]) -> dict[str, Any]:
    """The same values, in other objects."""
    import json

    again: dict[str, Any] = json.loads(json.dumps(report))
    return again
