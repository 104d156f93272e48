"""What the report says of the defences: before the close what is visible, after it the findings; on paper and page."""

import dataclasses
import json
import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from tests.support import findings
from tests.support.central import CENTRAL
from tests.support.federation import Federation, contract_values, digits, fixed_keys, make_federation, set_clocks
from tests.support.page import HOSTILE, page, with_texts

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract
from fedpact_contract.defended import DETECTORS
from fedpact_contract.keys import generate_key
from fedpact_contract.language import Lang
from fedpact_contract.log import (
    Body,
    Entry,
    Finding,
    FindingsOpened,
    ParticipantReadmitted,
    ReviewOpened,
    ScoresCommitted,
    StatementTaken,
    UnionConfirmed,
    UnionDeclared,
    UnionWithdrawn,
)
from fedpact_contract.messages import Statement
from fedpact_contract.record import sign
from fedpact_contract.replay import replay
from fedpact_contract.report import build
from fedpact_contract.request import instant, utc_now
from fedpact_contract.text import render as render_text
from fedpact_contract.undetected import ATTACKS, RUNS, unlike_measured
from fedpact_server import closing, detectors, logbook
from fedpact_server.report.defence_rows import AGAINST, DETECTORS_ZH, EVIDENCE, POWER_ZH, WORDS
from fedpact_server.report.html import render

CLAUSE: dict[str, Any] = {
    "clip": "median-signal",
    "wreckers": "reject",
    "negatives": Decimal("0.125"),
    "dispute_hours": 71,
}
PADDER, TWIN, OTHER_TWIN, WRECKER = 1, 2, 3, 4


def finding(code: str, number: int, *who: str, **changes: Any) -> Finding:
    told: dict[str, Any] = {"outcome": "alarm", "statistic": "9.5", "threshold": "3.25", "power": "any"}
    told |= {"evidence": {"value": "0.731", "against": "declared noise", "peers": 5}} | changes
    return Finding(code=code, round=number, participants=tuple(sorted(who)), **told)


def after(fed: Federation, number: int, keys: list[Any]) -> None:
    """What people do after a round: a union is declared, disputed and confirmed; after the third all is taken back."""
    first, second = members = tuple(sorted(fed.agent(k).desk.participant for k in (TWIN, OTHER_TWIN)))
    if number == 1:
        say(
            fed,
            UnionDeclared(
                round=1,
                members=members,
                declared=instant(utc_now()),
                until=instant(utc_now() + timedelta(hours=71)),
                reason="one warehouse",
            ),
        )
        key = keys[[p.id for p in fed.contract.participants].index(second)]
        statement = Statement(
            contract_id=fed.contract.id,
            participant=second,
            subject=fed.entries()[-1].leaf_hash.hex(),
            answer="dispute",
            reason="our own rows",
        )
        say(fed, StatementTaken(participant=second, statement=sign(statement, key).plain()))
        at = instant(utc_now() + timedelta(hours=72))
        say(fed, UnionConfirmed(members=(first, second), at=at, reason="the same invoices"))
    if number == 3:
        wrecker = fed.agent(WRECKER).desk.participant
        say(fed, ParticipantReadmitted(participant=wrecker, reason="labels mended"))
        say(fed, UnionWithdrawn(members=members, reason="two warehouses"))


def say(fed: Federation, body: Body) -> None:
    with fed.database.write() as connection:
        logbook.append(connection, fed.contract.id, [body])


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A settled run of five rounds in which all of it happens; one update is four times too large in every round."""
    keys = fixed_keys(6)
    made = make_federation(
        tmp_path_factory.mktemp("defended"), [60] * 6, keys=keys, defences=CLAUSE, training__rounds=5
    )
    who = {k: made.agent(k).desk.participant for k in range(1, 7)}
    found = {
        1: [finding("NEAR_COPY", 1, who[TWIN], who[OTHER_TWIN]), quiet("REPLAY", 1)],
        2: [finding("WRECKER", 2, who[WRECKER], evidence={"rounds": 2}), quiet("REPLAY", 2)],
        5: [finding("NEGATIVES", 5, evidence={"negative": "0.1", "total": "0.2"})],
    }
    padder = made.agent(PADDER)
    plain = padder.desk.train
    padder.desk = dataclasses.replace(padder.desk, train=lambda *order: four_times(plain(*order)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpact_server.admission.norm_bound", lambda *_: 1e9)
        findings.say(patch, lambda number: found.get(number, ()))
        whole = type(made.loop())._commit

        def commit(self: Any, current: Any) -> None:
            after(made, int(current.round), keys)
            self.now = lambda: utc_now() + timedelta(hours=73)
            set_clocks(made.agents, self.now)
            whole(self, current)

        patch.setattr("fedpact_server.rounds.Loop._commit", commit)
        assert made.run() == "completed"
    with made.database.write() as connection:
        closing.settle(connection, made.contract, made.operator_run_key, 1_000_000, 0)
    return made


def quiet(code: str, number: int) -> Finding:
    changes = {"outcome": "no power", "power": "none before 3 rounds that follow a step", "evidence": {}}
    return finding(code, number, **changes)


def four_times(trained: Any) -> Any:
    """The update four times as large."""
    array = (np.frombuffer(trained.update, "<f4") * np.float32(4)).astype("<f4")
    return dataclasses.replace(trained, update=array.tobytes())


@pytest.fixture(scope="module")
def report(fed: Federation) -> dict[str, Any]:
    return build(fed.entries())


def upto(fed: Federation, kind: type[Body]) -> dict[str, Any]:
    """The report of the log that ends before its first entry of this kind."""
    entries = fed.entries()
    return build(entries[: next(i for i, entry in enumerate(entries) if entry.type == kind.TYPE)])


def test_the_story_is_one_that_verify_takes(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    findings.say(monkeypatch, lambda _: ())
    found = replay(fed.entries()).faults
    assert {f.code for f in found if f.rule != "noise"} - {"HEAD_ROOT", "HEAD_TIME"} == set()


class TestJson:
    def test_alarms_say_who_and_by_which_figures(self, fed: Federation, report: dict[str, Any]) -> None:
        found = report["defences"]
        assert found["findings"] == "opened"
        assert [(line["round"], line["code"]) for line in found["alarms"]] == [
            (1, "NEAR_COPY"),
            (2, "WRECKER"),
            (5, "NEGATIVES"),
        ]
        first = found["alarms"][0]
        assert {p["name"] for p in first["participants"]} == {"Enterprise 2", "Enterprise 3"}
        assert (first["statistic"], first["threshold"]) == ("9.5", "3.25")
        assert first["evidence"] == {"value": "0.731", "against": "declared noise", "peers": 5}
        assert first["meaning"] == DETECTORS["NEAR_COPY"]
        assert found["alarms"][2]["participants"] == []
        assert [(line["code"], line["rounds"], line["power"]) for line in found["no_power"]] == [
            ("REPLAY", [1, 2], "none before 3 rounds that follow a step")
        ]
        assert found["clause"] == fed.contract.defences.plain()
        assert found["of_values"]
        assert canonical_bytes(report) == canonical_bytes(build(fed.entries()))
        assert json.loads(json.dumps(report)) == report, "as an agent compares it with the operator's"

    def test_factors_below_one_and_how_many_updates_there_were(self, fed: Federation, report: dict[str, Any]) -> None:
        found = report["defences"]
        assert found["updates"] == fed.kinds().count("update-decided")
        assert {line["participant"]["name"] for line in found["clipped"]} >= {"Enterprise 1"}
        assert [line["round"] for line in found["clipped"] if line["participant"]["name"] == "Enterprise 1"] == [
            *range(1, 6)
        ]
        assert all(0 < Decimal(line["factor"]) < 1 for line in found["clipped"])

    def test_exclusions_with_how_they_ended(self, report: dict[str, Any]) -> None:
        (line,) = report["defences"]["exclusions"]
        assert (line["participant"]["name"], line["round"], line["code"]) == ("Enterprise 4", 2, "WRECKER")
        assert line["readmitted"] == {"round": 3, "reason": "labels mended"}

    def test_unions_with_all_that_became_of_them(self, fed: Federation, report: dict[str, Any]) -> None:
        (union,) = report["defences"]["unions"]
        assert {p["name"] for p in union["members"]} == {"Enterprise 2", "Enterprise 3"}
        assert (union["state"], union["round"], union["rounds"]) == ("withdrawn", 1, [2, 3])
        steps = [(step["what"], step["reason"]) for step in union["steps"]]
        assert steps == [
            ("declared", "one warehouse"),
            ("disputed", "our own rows"),
            ("confirmed", "the same invoices"),
            ("withdrawn", "two warehouses"),
        ]
        assert union["steps"][1]["by"] == union["members"][1]

    def test_before_the_close_only_what_is_visible_is_in_it(self, fed: Federation, report: dict[str, Any]) -> None:
        early = upto(fed, FindingsOpened)["defences"]
        assert early["findings"] == "committed"
        assert (early["alarms"], early["no_power"]) == ([], [])
        for key in ("clipped", "exclusions", "unions", "updates"):
            assert early[key] == report["defences"][key]
        assert upto(fed, ScoresCommitted)["defences"]["findings"] == "none"
        second = [i for i, entry in enumerate(fed.entries()) if entry.type == FindingsOpened.TYPE][1]
        assert build(fed.entries()[:second])["defences"]["findings"] == "committed", "until all of them are open"

    def test_findings_that_were_never_opened_are_named(self, fed: Federation) -> None:
        kept = [entry for entry in fed.entries() if entry.type != FindingsOpened.TYPE]
        assert build(kept)["defences"]["findings"] == "withheld"

    def test_a_union_that_is_declared_again_is_another_one(self, fed: Federation) -> None:
        entries = fed.entries()
        declared = next(entry for entry in entries if entry.type == UnionDeclared.TYPE)
        gone = next(i for i, entry in enumerate(entries) if entry.type == UnionWithdrawn.TYPE)
        again = Entry.of(declared.open())
        first, second = build([*entries[: gone + 1], again, *entries[gone + 1 :]])["defences"]["unions"]
        assert (first["state"], first["rounds"]) == ("withdrawn", [2, 3])
        assert (second["state"], second["rounds"], len(second["steps"])) == ("declared", [], 1)

    def test_reviews_with_who_agreed(self, fed: Federation) -> None:
        found = reviewed(fed, "agree", "agree", "dispute")["defences"]["reviews"]
        (review,) = found
        assert [p["name"] for p in review["negative"]] == ["Enterprise 4"]
        assert (review["ratio"], review["text"], review["agreed"]) == ("0.25", "labels were swapped", False)
        assert [(a["what"], a["by"]["name"], a["reason"]) for a in review["answers"]] == [
            ("agreed", "Enterprise 1", None),
            ("agreed", "Enterprise 2", None),
            ("disputed", "Enterprise 3", "no proof"),
        ]
        (review,) = reviewed(fed, *["agree"] * 3)["defences"]["reviews"]
        assert review["agreed"], "3 of 5"

    def test_a_contract_without_defences_has_none(self, tmp_path) -> None:
        found = build(make_federation(tmp_path / "plain").entries())
        assert found["defences"] is None
        assert [line["attack"] for line in found["undetected"]] == [attack.english for attack in ATTACKS]
        central = build(make_federation(tmp_path / "central", **CENTRAL).entries())
        assert (central["defences"], central["undetected"]) == (None, [])


def reviewed(fed: Federation, *answers: str) -> dict[str, Any]:
    """The report of a log in which a review was opened, and the first participants answered so."""
    ids = [p.id for p in fed.contract.participants]
    opened = ReviewOpened(period=1, negative=(ids[3],), ratio="1/4", text="labels were swapped")
    entries = [Entry.of(opened)]
    for who, key, answer in zip(ids, fixed_keys(6), answers, strict=False):
        statement = Statement(
            contract_id=fed.contract.id,
            participant=who,
            subject=entries[0].leaf_hash.hex(),
            answer=answer,
            reason="no proof" if answer == "dispute" else None,
        )
        entries.append(Entry.of(StatementTaken(participant=who, statement=sign(statement, key).plain())))
    log = fed.entries()
    place = next(i for i, entry in enumerate(log) if entry.type == FindingsOpened.TYPE)
    return build([*log[:place], *entries, *log[place:]])


class TestPage:
    @pytest.mark.parametrize("lang", ["en", "zh"])
    def test_a_review(self, fed: Federation, lang: str) -> None:
        text, place = page(reviewed(fed, "agree", "dispute"), lang).text, 1 if lang == "zh" else 0
        assert WORDS["review"][place].format("25", "labels were swapped") in text
        assert WORDS["agreed"][place].format("Enterprise 1") in text
        assert WORDS["disputed"][place].format("Enterprise 2") in text
        assert WORDS["not_enough"][place] in text
        assert WORDS["enough"][place] in page(reviewed(fed, *["agree"] * 3), lang).text

    @pytest.mark.parametrize("lang", ["en", "zh"])
    def test_in_the_renormalised_game_no_value_is_looked_at(self, report: dict[str, Any], lang: str) -> None:
        place = 1 if lang == "zh" else 0
        text = page(report | {"defences": report["defences"] | {"of_values": False}}, lang).text
        assert WORDS["detectors_of_updates"][place] in text
        assert WORDS["wreckers_reject"][place] not in text

    def test_in_english(self, report: dict[str, Any]) -> None:
        text = page(report).text
        for words in (
            "within so many hours: 71.",
            "above 12.5 % of the total value",
            "The findings of all scored rounds are opened. Alarms: 3.",
            f"Round 1 NEAR_COPY {DETECTORS['NEAR_COPY']} Participants: Enterprise",
            "Statistic 9.5, threshold 3.25 Evidence: value: 0.731; compared with: declared noise; peers: 5",
            "Participants: nobody",
            f"REPLAY {DETECTORS['REPLAY']} Rounds: 1-2 Power: none before 3 rounds that follow a step",
            "Enterprise 4 WRECKER Invited no more after round 2 Readmitted after round 3: labels mended",
            "our own rows Confirmed",
            ": the same invoices Withdrawn: two warehouses Counted once in rounds 2-3",
            f"Its share was {ATTACKS[0].gain} times an honest one; an alarm in {ATTACKS[0].alarms} of {RUNS} runs.",
        ):
            assert words in text, words
        factor = Decimal(report["defences"]["clipped"][0]["factor"])
        assert f"Round 1: {int(factor * 10000) / 10000:.4f}" in text

    def test_in_chinese_no_english_is_left(self, fed: Federation, report: dict[str, Any]) -> None:
        text = page(report, "zh").text
        for words in (
            "第1轮 NEAR_COPY",
            "警报数：3",
            "统计量9.5，阈值3.25",
            "比较对象：申报噪声",
            "按一方计入的轮次：2-3",
        ):
            assert words in text, words
        assert all(attack.chinese in text and attack.english not in text for attack in ATTACKS)
        begin, end = text.index(WORDS["title"][1]), text.index("隐私标签（")
        section = text[begin:end] + text[text.index(WORDS["undetected"][1]) :]
        for known in ("one warehouse", "our own rows", "the same invoices", "two warehouses", "labels mended", "UTC"):
            section = section.replace(known, "")
        section = re.sub(r"Enterprise \d", "", section)
        assert set(re.findall(r"[A-Za-z_]+", section)) == {"NEAR_COPY", "WRECKER", "NEGATIVES", "REPLAY"}

    @pytest.mark.parametrize("lang", ["en", "zh"])
    def test_each_state_of_the_findings(self, report: dict[str, Any], lang: Lang) -> None:
        place = 1 if lang == "zh" else 0
        for state in ("none", "committed", "withheld"):
            found = report["defences"] | {"findings": state, "alarms": [], "no_power": []}
            assert WORDS[state][place] in page(report | {"defences": found}, lang).text
        calm = report["defences"] | {
            "alarms": [],
            "no_power": [],
            "clipped": [],
            "exclusions": [],
            "unions": [],
            "reviews": [],
        }
        text = render(report | {"defences": calm}, lang)
        assert WORDS["quiet"][place] in text
        for key in ("alarms", "clips"):
            assert f"<h3>{WORDS[key][place]}</h3>" in text
        for absent in ("no_power", "exclusions", "unions", "reviews"):
            assert f"<h3>{WORDS[absent][place]}</h3>" not in text
        loose = calm | {"clause": calm["clause"] | {"clip": "none", "wreckers": "report"}}
        text = page(report | {"defences": loose}, lang).text
        assert WORDS["clip_none"][place] in text
        assert WORDS["wreckers_report"][place] in text
        assert WORDS["clips"][place] not in text
        copies = WORDS["max_duplicates"][place].format("2.5")
        assert copies not in text
        limited = calm | {"clause": calm["clause"] | {"max_duplicates": "0.025"}}
        assert copies in page(report | {"defences": limited}, lang).text

    @pytest.mark.parametrize(
        ("audit", "agreed"),
        [
            (None, False),
            ({"auditor": "A & Co", "coalitions": "all", "sample": 0, "differing": 0}, True),
            ({"auditor": "A & Co", "coalitions": "all", "sample": 0, "differing": 1}, False),
            ({"auditor": "A & Co", "coalitions": "sampled", "sample": 8, "differing": 0}, False),
        ],
    )
    def test_whose_word_the_findings_are(self, report: dict[str, Any], audit: Any, agreed: bool) -> None:
        text = page(report | {"reevaluation": audit}).text
        assert ("What the detectors say was made again by A & Co, and agrees." in text) == agreed
        assert (WORDS["stated"][0] in text) != agreed

    def test_a_contract_without_defences_says_so(self, tmp_path) -> None:
        plain = build(make_federation(tmp_path / "plain").entries())
        assert WORDS["without"][0] in page(plain).text
        central = build(make_federation(tmp_path / "central", **CENTRAL).entries())
        assert WORDS["central"][0] in page(central).text
        assert WORDS["undetected"][0] not in page(central).text

    @pytest.mark.parametrize("lang", ["en", "zh"])
    def test_names_and_reasons_are_text(self, report: dict[str, Any], lang: str) -> None:
        shown = page(with_texts(report, HOSTILE), lang)
        assert len(shown.tags) == len(page(report, lang).tags), "not one element more"
        assert shown.text.count("<script>alert(1)</script>") > 20

    def test_it_fits_a_telephone(self, report: dict[str, Any]) -> None:
        """Two columns whose text breaks anywhere: nothing in the section keeps a line together."""
        text = render(report, "en")
        section = text[text.index("Defences against gaming") : text.index("Privacy label (NIST")]
        assert "<td>" in section
        assert not re.search('nowrap|<th|<pre|class="(n|whole)"', section)
        assert re.search(r"body \{[^}]*overflow-wrap: anywhere", text)


class TestWords:
    def test_every_detector_has_a_sentence_in_both_languages(self) -> None:
        assert DETECTORS.keys() == DETECTORS_ZH.keys() == {*detectors.TESTS, "NEGATIVES"}

    def test_every_word_has_its_chinese(self) -> None:
        for english, chinese in [*WORDS.values(), *EVIDENCE.values(), *AGAINST.values()]:
            assert english
            assert re.search(r"[\u4e00-\u9fff]", chinese), english
        for key, (english, chinese) in WORDS.items():
            fields = [len(re.findall(r"\{\d?\}", text)) for text in (english, chinese)]
            assert fields[0] == fields[1], key

    def test_all_that_a_detector_says_is_known_in_chinese(self) -> None:
        """Whatever stands in evidence and power of real findings, of few participants and of enough."""
        for count in (2, 3, 8):
            for rounds in (1, 6):
                for slices in ([("operator", 30)], [("operator", 20), ("p1", 10)]):
                    for line in real_findings(count, rounds, slices):
                        assert line.evidence.keys() <= EVIDENCE.keys()
                        assert line.evidence.get("against", "peers") in AGAINST
                        known = [p for p, _ in POWER_ZH if re.fullmatch(p, line.power)]
                        assert known or line.outcome != "no power", line.power

    def test_the_list_of_attacks_is_whole(self) -> None:
        assert {"leaked validation set", "same rows, fresh noise"} <= {attack.name for attack in ATTACKS}
        for attack in ATTACKS:
            assert re.search(r"[\u4e00-\u9fff]", attack.chinese)
            assert 0 <= attack.alarms <= RUNS
            assert Decimal(attack.gain) > 0


def real_findings(count: int, rounds: int, slices: list[tuple[str, int]]) -> list[detectors.Finding]:
    rng = np.random.default_rng(count)
    ids = [f"p{i}" for i in range(count)]
    seen, apart = [], detectors.Apart(b"")
    for number in range(1, rounds + 1):
        updates = {p: rng.normal(size=40) for p in ids}
        seen.append(
            detectors.observe(
                number,
                updates,
                examples=dict.fromkeys(ids, 50),
                noise=dict.fromkeys(ids, 40.0),
                step=None if number == 1 else rng.normal(size=40),
                slope=1.0,
                values=rng.normal(size=(count, 30)),
                apart=apart,
            )
        )
    return [line for k in range(1, rounds + 1) for line in detectors.findings(seen[:k], rounds, slices)]


def test_the_list_of_attacks_says_where_its_figures_are_not_this_contracts() -> None:
    made = contract(CLAUSE)
    assert unlike_measured(made) == ["few"]
    assert unlike_measured(made.model_copy(update={"defences": None})) == ["without"]
    assert made.defences is not None
    bare = made.defences.model_copy(update={"clip": "none"})
    assert unlike_measured(made.model_copy(update={"defences": bare})) == ["unclipped", "few"]
    game = made.contribution.model_copy(update={"game": "re-normalised"})
    assert "re-normalised" in unlike_measured(made.model_copy(update={"contribution": game}))
    assert "the detectors that compare somebody with the others have no power here" in render_text(made)


def contract(clause: dict[str, Any]) -> Contract:
    """Four participants."""
    keys = [generate_key() for _ in range(4)]
    rows = digits([30] * 4)[1]
    salts = [i.to_bytes(32, "big") for i in range(len(rows))]
    return Contract.parse(contract_values(generate_key(), keys, [30] * 4, rows, salts, "0" * 64, defences=clause))
