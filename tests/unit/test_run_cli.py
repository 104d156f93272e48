"""`fedpact run`, `settle`, `report`, `evidence`, `model`, `predict`: what they print, exit codes, errors."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.closed_run import REVENUE, ClosedRun, closed_run, with_operator_home
from tests.support.command import runner
from tests.support.federation import Federation, make_federation

from fedpact_client.closing import close
from fedpact_contract.record import ratio_text
from fedpact_contract.trust import Trust, write
from fedpact_server import db, logbook, runs, scoring, validation
from fedpact_server.cli_run import FOLLOW_SECONDS
from fedpact_server.detectors import TESTS
from fedpact_server.home import OperatorHome

COUNTS = [90, 60, 70, 80]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one line on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    @property
    def error(self) -> str:
        return str(self.json["error"]["code"])


Fedpact = Callable[..., Result]


@pytest.fixture
def fedpact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fedpact:
    """Run `fedpact` in this process, in a folder of its own; nothing it says may be a traceback."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("FEDPACT_HOME", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    run = runner(monkeypatch, capsys)

    def call(*args: str) -> Result:
        result = Result(*run(*args))
        assert "Traceback" not in result.out + result.err
        assert not re.search(r"\bINTERNAL\b", result.out + result.err)
        return result

    return call


@pytest.fixture
def run(tmp_path: Path) -> ClosedRun:
    """A completed run in a real operator's home."""
    return closed_run(tmp_path)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """A signed contract without a run, in a real operator's home."""
    made = make_federation(tmp_path)
    with_operator_home(made)
    with made.database.write() as connection:
        connection.execute(db.runs.delete())
    monkeypatch.setattr(runs, "installed_code", lambda: made.contract.code)
    return made


class TestRun:
    def test_from_start_to_stop(self, fedpact: Fedpact, federation: Federation) -> None:
        at = ("--home", str(federation.home), "--json")
        name = federation.contract.id[:8]
        assert (unknown := fedpact("run", "status", name, *at)).code == 2
        assert unknown.error == "RUN_UNKNOWN"
        started = fedpact("run", "start", name, *at)
        assert (started.code, started.json["phase"], started.json["rounds"]) == (0, "running", 3)
        for named in (started.json["run_id"], federation.contract.id, name.upper()):
            assert fedpact("run", "status", named, *at).json == started.json | {"noise_floor": {}}
        wanted = [fedpact("run", what, name, *at).json["wanted"] for what in ("pause", "resume", "stop")]
        assert wanted == ["pause", "run", "stop"]
        ended = fedpact("run", "resume", name, *at)
        assert (ended.code, ended.error) == (5, "RUN_ENDED")

    def test_it_says_what_moves_the_run_and_when_a_wish_takes_effect(
        self, fedpact: Fedpact, federation: Federation
    ) -> None:
        at = (federation.contract.id, "--home", str(federation.home))
        alone = "Nothing moves now: start `fedpact serve`."
        assert alone in fedpact("run", "start", *at).err
        assert fedpact("run", "status", *at, "--json").json["served"] is False
        with OperatorHome.open(federation.home).serving():
            assert fedpact("run", "status", *at, "--json").json["served"] is True
            assert fedpact("run", "status", *at).err == ""
            assert "`fedpact run resume` goes on" in fedpact("run", "pause", *at).err
            assert fedpact("run", "resume", *at).err == ""
            assert "Stop: within seconds" in fedpact("run", "stop", *at).err
        assert alone in fedpact("run", "status", *at).err

    def test_as_text(self, fedpact: Fedpact, run: ClosedRun) -> None:
        shown = fedpact("run", "status", run.contract_id, "--home", str(run.home))
        assert shown.code == 0
        assert "completed" in shown.out
        assert "round 2 of 2" in shown.out
        assert shown.out.count("ADMITTED") == 4
        assert shown.out.count("passed (") == 4
        for party in run.federation.contract.participants:
            assert re.search(rf"{party.name} +{party.id[:12]} +admitted", shown.out)
        assert "Milliseconds of each round:" in shown.out

    def test_follow_a_run_that_is_over(self, fedpact: Fedpact, run: ClosedRun) -> None:
        at = ("--home", str(run.home))
        followed = fedpact("run", "follow", run.contract_id, *at, "--json")
        assert (followed.code, followed.json["phase"]) == (0, "completed")
        shown = fedpact("run", "follow", run.contract_id, *at)
        assert shown.code == 0
        assert "Enterprise 4" in shown.out
        with run.federation.database.write() as connection:
            connection.execute(db.runs.update().values(phase="stopped", detail="ROUND_TOO_FEW_UPDATES in round 2"))
        stopped = fedpact("run", "follow", run.contract_id, *at, "--json")
        assert (stopped.code, stopped.error) == (1, "RUN_STOPPED")
        assert "ROUND_TOO_FEW_UPDATES in round 2" in fedpact("run", "follow", run.contract_id, *at).err

    def test_follow_waits_and_gives_up(self, fedpact: Fedpact, federation: Federation) -> None:
        at = ("--home", str(federation.home), "--json")
        fedpact("run", "start", federation.contract.id, *at)
        slow = fedpact("run", "follow", federation.contract.id, *at, "--seconds", "0.5")
        assert (slow.code, slow.error) == (1, "RUN_SLOW")

        def complete() -> None:
            time.sleep(3 * FOLLOW_SECONDS)
            with federation.database.write() as connection:
                connection.execute(db.runs.update().values(phase="completed"))

        thread = threading.Thread(target=complete)
        thread.start()
        followed = fedpact("run", "follow", federation.contract.id, *at, "--seconds", "30")
        thread.join()
        assert (followed.code, followed.json["phase"]) == (0, "completed")

    @pytest.mark.parametrize(
        "command",
        [
            *(("run", what) for what in ("start", "status", "follow", "pause", "resume", "stop")),
            ("settle", "preview", "--revenue", "1"),
            ("settle", "close", "--revenue", "1"),
            ("report",),
            ("evidence", "--out", "there"),
            ("model", "--out", "there"),
        ],
        ids=" ".join,
    )
    def test_no_home_and_no_contract(self, fedpact: Fedpact, run: ClosedRun, command: tuple[str, ...]) -> None:
        missing = fedpact(*command, run.contract_id, "--home", "nowhere", "--json")
        assert (missing.code, missing.error) == (2, "HOME_MISSING")
        for name in ("0" * 64, "run-", "", "'; DROP TABLE runs", "%"):
            unknown = fedpact(*command, name, "--home", str(run.home), "--json")
            assert (unknown.code, unknown.error) == (2, "CONTRACT_UNKNOWN")
        assert fedpact(*command, "0" * 64, "--home", str(run.home)).err.startswith("CONTRACT_UNKNOWN")
        (run.home / "operator.db").rename(run.home / "away.db")
        gone = fedpact(*command, run.contract_id, "--home", str(run.home), "--json")
        assert (gone.code, gone.error) == (1, "DATABASE_UNREADABLE")


class TestSettle:
    def test_held_until_all_who_are_paid_have_signed(self, fedpact: Fedpact, run: ClosedRun) -> None:
        at = ("--home", str(run.home), "--json")
        money = ("--revenue", "1000000.00", "--fees", "0.01")
        preview = fedpact("settle", "preview", run.contract_id, *money, *at)
        assert (preview.code, preview.json["pool_fen"]) == (0, REVENUE - 1)
        assert (preview.json["settled"], preview.err) == (False, "")
        assert run.phase() == "completed"
        held = fedpact("settle", "close", run.contract_id, *money, "--wait", "0.1", *at)
        assert (held.code, held.json["final"]) == (4, False)
        again = fedpact("settle", "preview", run.contract_id, *money, *at)
        told = "This period is settled already: revenue CNY 1,000,000.00, fees CNY 0.01."
        assert (again.code, again.json["settled"], again.json["lines"]) == (0, True, preview.json["lines"])
        assert again.err.startswith(told)
        assert "other amounts" not in again.err
        other = fedpact("settle", "preview", run.contract_id, "--revenue", "5", *at)
        assert other.err.startswith(f"{told} These are other amounts: nothing of it will be paid.")
        everybody = ", ".join(p.name for p in run.federation.contract.participants)
        assert held.err.endswith(f"countersignatures of {everybody}.\n"), "in the contract's order"
        assert all(line["held"] and not line["objected"] for line in held.json["lines"])
        assert [line["fen"] for line in held.json["lines"]] == [line["fen"] for line in preview.json["lines"]]
        assert sum(line["fen"] for line in held.json["lines"]) == REVENUE - 1
        for number in (1, 2, 3):
            with run.client(number) as client:
                close(run.federation.agent(number).desk, client)
        waited = fedpact("settle", "close", run.contract_id, *money, "--wait", "0.1", *at)
        assert waited.code == 4
        nobody = "No agent can be reached now: start `fedpact serve`. "
        assert waited.err == f"Recorded. {nobody}Waiting up to 0.1 s for the countersignatures of Enterprise 4.\n"
        with run.client(4) as client:
            close(run.federation.agent(4).desk, client)
        final = fedpact("settle", "close", run.contract_id, *money, *at)
        assert final.err == ""
        assert (final.code, final.json["final"]) == (0, True)
        assert not any(line["held"] for line in final.json["lines"])
        twice = fedpact("settle", "close", run.contract_id, "--revenue", "1", *at)
        assert (twice.code, twice.error) == (2, "SETTLE_TWICE")

    def test_a_person_is_asked_once_and_sees_the_amounts(
        self, fedpact: Fedpact, run: ClosedRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        answers = iter([False, True])

        def confirm(question: str, **_: object) -> bool:
            asked.append(question)
            return next(answers)

        monkeypatch.setattr("typer.confirm", confirm)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        close = (
            "settle",
            "close",
            run.contract_id,
            "--revenue",
            "10000",
            "--wait",
            "0",
            "--home",
            str(run.home),
            "--json",
        )
        declined = fedpact(*close)
        assert (declined.code, declined.error, run.phase()) == (5, "DECLINED", "completed")
        assert [fedpact(*close).code for _ in range(2)] == [4, 4], "what is recorded is not asked about again"
        title = run.federation.contract.title
        assert asked == [f"Settle {title} ({run.contract_id[:8]}) for good: revenue CNY 10,000.00, fees CNY 0.00?"] * 2

    def test_whoever_objects_is_held_and_the_others_are_paid(self, fedpact: Fedpact, run: ClosedRun) -> None:
        at = ("--home", str(run.home), "--json")
        run.settle(1_000_000)
        run.serve("/evidence", {})
        with run.client(2) as client:
            assert close(run.federation.agent(2).desk, client)[0] == "objected"
        run.wire.replace.clear()
        for number in (1, 3, 4):
            with run.client(number) as client:
                close(run.federation.agent(number).desk, client)
        begun = time.monotonic()
        result = fedpact("settle", "close", run.contract_id, "--revenue", "10000", "--wait", "60", *at)
        assert time.monotonic() - begun < 30, "who has objected is not waited for"
        assert (result.code, result.json["final"]) == (4, False)
        lines = {line["name"]: (line["held"], line["objected"]) for line in result.json["lines"]}
        assert lines == {f"Enterprise {n}": (n == 2, n == 2) for n in (1, 2, 3, 4)}
        shown = fedpact("settle", "close", run.contract_id, "--revenue", "10000", "--home", str(run.home))
        assert shown.code == 4
        assert shown.out.count("objected") == 1

    def test_statement(self, fedpact: Fedpact, run: ClosedRun) -> None:
        at = ("--home", str(run.home))
        early = fedpact("settle", "statement", run.contract_id, "Enterprise 1", *at, "--json")
        assert (early.code, early.error) == (2, "SETTLE_NOT_CLOSED")
        run.settle()
        who = run.federation.agent(1).desk.participant
        by_name = fedpact("settle", "statement", run.contract_id, "Enterprise 1", *at, "--json")
        by_id = fedpact("settle", "statement", run.contract_id, who[:12], *at)
        assert by_name.code == by_id.code == 0
        assert by_name.json == json.loads(by_id.out)
        assert by_name.json["line"]["participant"] == who
        assert sum(line["fen"] for line in by_name.json["lines"]) == REVENUE
        for unknown in ("Enterprise 9", "Enterprise", ""):
            wrong = fedpact("settle", "statement", run.contract_id, unknown, *at, "--json")
            assert (wrong.code, wrong.error) == (2, "PARTICIPANT_UNKNOWN")

    @pytest.mark.parametrize(
        ("amounts", "code"),
        [
            (("--revenue=-1",), "MONEY_NEGATIVE"),
            (("--revenue", "1.005"), "MONEY_DECIMALS"),
            (("--revenue", "1,000"), "MONEY_FORM"),
            (("--revenue", "1e9"), "MONEY_FORM"),
            (("--revenue", "9" * 30), "MONEY_TOO_LARGE"),
            (("--revenue", "1", "--fees", "x"), "MONEY_FORM"),
            (("--revenue", "1", "--fees", "2"), "SETTLEMENT_FEES"),
        ],
    )
    def test_amounts(self, fedpact: Fedpact, run: ClosedRun, amounts: tuple[str, ...], code: str) -> None:
        before = run.federation.entries()
        for what in ("preview", "close"):
            wrong = fedpact("settle", what, run.contract_id, *amounts, "--home", str(run.home), "--json")
            assert (wrong.code, wrong.error) == (2, code)
        assert run.federation.entries() == before

    def test_a_run_that_goes_on_or_has_no_round(self, fedpact: Fedpact, federation: Federation) -> None:
        at = ("--home", str(federation.home), "--json")
        for state in (None, "running", "stopped"):
            if state == "running":
                fedpact("run", "start", federation.contract.id, *at)
            if state == "stopped":
                with federation.database.write() as connection:
                    connection.execute(db.runs.update().values(phase="stopped", detail="ROUND_TOO_FEW_UPDATES"))
            refused = fedpact("settle", "close", federation.contract.id, "--revenue", "1", *at)
            code = "SETTLE_NO_ROUND" if state == "stopped" else "SETTLE_RUN_NOT_ENDED"
            assert (refused.code, refused.error) == (2, code)
            why = "ROUND_TOO_FEW_UPDATES" if state == "stopped" else state or "never started"
            assert why in refused.json["error"]["message"]


class TestReport:
    def test_html_and_json_in_both_languages(self, fedpact: Fedpact, run: ClosedRun, tmp_path: Path) -> None:
        at = ("--home", str(run.home))
        run.settle()
        made = fedpact("report", run.contract_id, *at)
        assert made.code == 0
        page = Path(f"report-{run.contract_id[:16]}.html")
        assert made.out.strip() == str(page)
        assert "Contribution report" in page.read_text("utf-8")
        page.write_text("mine")
        again = fedpact("report", run.contract_id, *at, "--json")
        assert (again.code, again.error, page.read_text()) == (2, "FILE_EXISTS", "mine")
        assert "--out" in again.json["error"]["remedy"]
        zh = tmp_path / "zh.html"
        made = fedpact("report", run.contract_id, *at, "--lang", "zh", "--out", str(zh), "--json")
        assert (made.code, made.json) == (0, {"file": str(zh)})
        assert "贡献与收益报告" in zh.read_text("utf-8")
        printed = fedpact("report", run.contract_id, *at, "--format", "json").json
        assert printed["settlement"]["pool_fen"] == REVENUE
        label = fedpact("report", run.contract_id, *at, "--format", "label")
        assert "Standard: NIST SP 800-226\n" in label.out
        assert "Accounting:\n  quantity: epsilon_pld, of the plan" in label.out
        assert "Rényi orders: 4.3\n" in label.out
        assert "  Enterprise 1: steps: " in label.out
        chinese = fedpact("report", run.contract_id, *at, "--format", "label", "--lang", "zh")
        assert "标准：NIST SP 800-226\n" in chinese.out
        assert fedpact("report", run.contract_id, *at, "--format", "label", "--json").json == printed["privacy"]
        written = fedpact("report", run.contract_id, *at, "--format", "label", "--out", "label.txt", "--json")
        assert (written.code, written.error, Path("label.txt").exists()) == (2, "REPORT_LABEL_FILE", False)
        out = tmp_path / "report.json"
        for code in (0, 2):
            assert fedpact("report", run.contract_id, *at, "--format", "json", "--out", str(out)).code == code
        assert json.loads(out.read_text("utf-8")) == printed

    def test_an_unsettled_run_and_one_without_rounds(
        self, fedpact: Fedpact, run: ClosedRun, federation: Federation
    ) -> None:
        for home, contract_id, state in (
            (run.home, run.contract_id, "completed"),
            (federation.home, federation.contract.id, "signed"),
        ):
            printed = fedpact("report", contract_id, "--home", str(home), "--format", "json").json
            assert (printed["state"], printed["settlement"], printed["metric"]) == (state, None, None)
            assert fedpact("report", contract_id, "--home", str(home), "--out", f"{state}.html").code == 0
            assert "Not settled yet" in Path(f"{state}.html").read_text("utf-8")

    @pytest.mark.parametrize("option", [("--format", "pdf"), ("--lang", "fr"), ("--format", "")])
    def test_another_form(self, fedpact: Fedpact, run: ClosedRun, option: tuple[str, str]) -> None:
        wrong = fedpact("report", run.contract_id, "--home", str(run.home), *option, "--json")
        assert (wrong.code, wrong.error) == (2, "USAGE")
        assert wrong.json["error"]["field"] == option[0]

    def test_with_a_comparison(self, fedpact: Fedpact, run: ClosedRun) -> None:
        at = ("--home", str(run.home), "--out", "page.html", "--json")
        lines = [{"id": p, "name": "E", "draws": [0.5, 0.6, 0.7], "mean": 0.6} for p in run.federation.contract.by_id()]
        value = {"together": 0.8, "participants": lines, "draws": 3, "steps": 5, "note": "n"}
        value |= {"alone_noise_multiplier": "1.2"}
        Path("lift.json").write_text(json.dumps(value))
        assert fedpact("report", run.contract_id, *at, "--lift", "lift.json").code == 0
        assert "+0.200" in Path("page.html").read_text("utf-8")
        for text, code in (
            (None, "LIFT_FILE"),
            ("{", "LIFT_FILE"),
            ("[]", "LIFT_FORM"),
            (json.dumps(value | {"participants": []}), "LIFT_FORM"),
            (json.dumps(value | {"together": "<script>"}), "LIFT_FORM"),
            (json.dumps(value | {"more": 1}), "LIFT_FORM_UNKNOWN_KEY"),
        ):
            Path("lift.json").unlink(missing_ok=True)
            if text is not None:
                Path("lift.json").write_text(text)
            wrong = fedpact("report", run.contract_id, *at, "--lift", "lift.json")
            assert (wrong.code, wrong.error) == (2, code)
            assert wrong.json["error"]["file"] == "lift.json"

    def test_a_place_that_cannot_be_written(self, fedpact: Fedpact, run: ClosedRun) -> None:
        wrong = fedpact("report", run.contract_id, "--home", str(run.home), "--out", "no/such/folder/a.html", "--json")
        assert (wrong.code, wrong.error) == (2, "FILE_ACCESS")

    def test_a_contract_that_nobody_has_signed(self, fedpact: Fedpact, federation: Federation) -> None:
        with federation.database.write() as connection:
            for table in (db.checkpoints, db.entries):
                connection.execute(table.delete())
        at = ("--home", str(federation.home), "--json")
        for command in (("report",), ("evidence", "--out", "there"), ("run", "start")):
            wrong = fedpact(*command, federation.contract.id, *at)
            assert (wrong.code, wrong.error) == (2, "CONTRACT_NOT_SIGNED")
        assert not Path("there").exists()


class TestEvidence:
    def test_it_is_verified_with_a_trust_file(self, fedpact: Fedpact, run: ClosedRun) -> None:
        run.settle()
        for number in (1, 2, 3, 4):
            with run.client(number) as client:
                close(run.federation.agent(number).desk, client)
        made = fedpact("evidence", run.contract_id, "--home", str(run.home), "--out", "proof", "--json")
        assert (made.code, made.json) == (0, {"file": str(Path("proof").absolute())})
        write(Path("trust.toml"), Trust.of(run.federation.contract))
        assert fedpact("verify", "proof").code == 3
        assert fedpact("verify", "proof", "--trust", "trust.toml").code == 0

    @pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
    def test_nothing_is_overwritten(self, fedpact: Fedpact, run: ClosedRun, kind: str) -> None:
        place = Path("there")
        if kind == "file":
            place.write_text("mine")
        elif kind == "link":
            place.symlink_to("nowhere")
        else:
            place.mkdir()
            (place / "mine").touch() if kind == "folder" else None
        before = sorted(str(p) for p in Path().rglob("*"))
        wrong = fedpact("evidence", run.contract_id, "--home", str(run.home), "--out", str(place), "--json")
        assert (wrong.code, wrong.error) == (2, "EVIDENCE_EXISTS")
        assert sorted(str(p) for p in Path().rglob("*")) == before

    def test_a_run_that_goes_on(self, fedpact: Fedpact, run: ClosedRun) -> None:
        """Entries that no checkpoint covers yet are not in the evidence: it has no fault."""
        with run.federation.database.write() as connection:
            last = max(logbook.signed_checkpoints(connection, run.contract_id))
            connection.execute(db.checkpoints.delete().where(db.checkpoints.c.size == last))
        assert fedpact("evidence", run.contract_id, "--home", str(run.home), "--out", "proof").code == 0
        assert fedpact("verify", "proof", "--json").json["faults"] == []


class TestModel:
    def test_delivered_and_used(self, fedpact: Fedpact, run: ClosedRun) -> None:
        made = fedpact("model", run.contract_id, "--home", str(run.home), "--out", "deep/model", "--json")
        assert (made.code, made.json) == (0, {"file": str(Path("deep/model.safetensors").absolute())})
        for left in ("deep/model.safetensors", "deep/model.json"):
            Path(left).rename("away")
            (other,) = Path("deep").iterdir()
            again = fedpact("model", run.contract_id, "--home", str(run.home), "--out", "deep/model", "--json")
            assert (again.code, again.error, again.json["error"]["file"]) == (2, "FILE_EXISTS", str(other))
            Path("away").rename(left)
        card = json.loads(Path("deep/model.json").read_text("utf-8"))
        assert (card["contract_id"], card["round"]) == (run.contract_id, 2)
        assert card["model_digest"] == model_digest(run)
        pixels, labels = validation_rows()
        columns = [f"pixel_{i}" for i in range(64)]
        np.savetxt("new.csv", pixels, fmt="%d", delimiter=",", header=",".join(columns), comments="")
        found = fedpact("predict", "deep/model.json", "new.csv", "--json").json["predictions"]
        right = sum(int(line["predicted"]) == int(label) for line, label in zip(found, labels, strict=True))
        run.settle()
        report = fedpact("report", run.contract_id, "--home", str(run.home), "--format", "json").json
        assert report["metric"]["final"] == ratio_text(Fraction(right, len(labels))), (
            "the report's accuracy, to the row"
        )
        shown = fedpact("predict", "deep/model.safetensors", "new.csv")
        assert (shown.code, "probability" in shown.out) == (0, True)
        assert fedpact("predict", "deep/model", "new.csv", "--out", "found.csv", "--json").code == 0
        assert len(Path("found.csv").read_text().splitlines()) == len(labels) + 1
        assert fedpact("predict", "deep/model", "new.csv", "--out", "found.csv", "--json").error == "FILE_EXISTS"
        Path("short.csv").write_text("pixel_0\n1\n")
        wrong = fedpact("predict", "deep/model.json", "short.csv", "--json")
        assert wrong.code == 2
        assert "pixel_1" in json.dumps(wrong.json)
        for file, name in (("nowhere.csv", "nowhere.csv"), ("new.csv", "new.exe")):
            if name == "new.exe":
                Path(name).write_bytes(Path(file).read_bytes())
            assert fedpact("predict", "deep/model.json", name, "--json").code == 2
        with Path("deep/model.safetensors").open("r+b") as weights:
            weights.seek(-1, 2)
            weights.write(b"\x7f")
        assert fedpact("predict", "deep/model.json", "new.csv", "--json").error == "MODEL_DIGEST"
        assert fedpact("predict", "nowhere.json", "new.csv", "--json").code == 2

    def test_a_run_that_is_not_completed_has_no_model(self, fedpact: Fedpact, federation: Federation) -> None:
        wrong = fedpact("model", federation.contract.id, "--home", str(federation.home), "--out", "m", "--json")
        assert (wrong.code, wrong.error) == (2, "RUN_NOT_COMPLETED")

    def test_a_model_file_that_changed_is_not_delivered(self, fedpact: Fedpact, run: ClosedRun) -> None:
        path = run.home / "models" / f"{model_digest(run)}.f8"
        first, *rest = path.read_bytes()
        path.write_bytes(bytes([first ^ 1, *rest]))
        wrong = fedpact("model", run.contract_id, "--home", str(run.home), "--out", "m", "--json")
        assert (wrong.code, wrong.error) == (1, "MODEL_DIGEST")
        path.unlink()
        assert (
            fedpact("model", run.contract_id, "--home", str(run.home), "--out", "m", "--json").error == "MODEL_MISSING"
        )


def model_digest(run: ClosedRun) -> str:
    return str(next(e.body for e in run.federation.entries() if e.type == "run-completed")["model_digest"])


def validation_rows() -> tuple[Any, Any]:
    """Pixels and labels of the federation's validation set (`tests.support.federation.digits`)."""
    from sklearn.datasets import load_digits

    data, order = load_digits(), np.random.default_rng(0).permutation(1797)
    rows = order[sum(COUNTS) : sum(COUNTS) + 220]
    return data.data[rows], data.target[rows]


def keep_validation(run: ClosedRun) -> None:
    """The operator's own copy of the validation set, which a federation in one process does not need."""
    asked, rows = run.federation.contract.contribution.validation, run.federation.validation
    (run.federation.home / "validation").mkdir(exist_ok=True)
    salts = tuple(i.to_bytes(32, "big") for i in range(len(rows)))  # as `make_federation` committed to them
    kept = validation.ValidationSet(examples=rows, salts=salts, root=asked.root, slices=asked.slices)
    validation.save(run.federation.home, kept)


class TestContribution:
    def test_it_shows_what_will_be_paid_while_nobody_else_sees_it(self, fedpact: Fedpact, run: ClosedRun) -> None:
        contract, home = run.federation.contract, ("--home", str(run.federation.home))
        card = fedpact("contribution", "show", contract.id[:8], *home, "--json").json
        assert card["live"] is True
        paid = fedpact("settle", "preview", contract.id[:8], "--revenue", "100.00", *home, "--json").json
        assert [line["id"] for line in card["participants"]] == [p.id for p in contract.participants]
        for key in ("id", "share", "share_low", "share_high"):
            assert [line[key] for line in card["participants"]] == [line[key] for line in paid["lines"]]
        for line in card["participants"]:
            by_round = [Fraction(scored["values"][line["id"]]) for scored in card["rounds"]]
            assert abs(Fraction(line["value"]) - sum(by_round)) <= Fraction(2, 10**9)
        text = fedpact("contribution", "show", contract.id[:8], *home).out
        assert "round 2 of 2" in text
        assert "alone until the period closes" in text
        run.settle()
        again = fedpact("contribution", "show", contract.id[:8], *home, "--json").json
        assert again == card | {"live": False}
        report = fedpact("report", contract.id[:8], "--format", "json", *home).json
        for line, shown in zip(report["participants"], card["participants"], strict=True):
            for key in ("value", "leave_one_out", "banzhaf", "share"):
                assert line[key] == shown[key]

    def test_values_of_the_renormalised_game_are_a_column_that_nobody_is_paid_by(
        self, fedpact: Fedpact, run: ClosedRun
    ) -> None:
        contract, home = run.federation.contract, ("--home", str(run.federation.home))
        keep_validation(run)
        show = ("contribution", "show", contract.id[:8], *home)
        plain, card = (fedpact(*show, *more, "--json").json for more in ((), ("--diagnostic", "renormalised")))
        found = {line["id"]: Fraction(line.pop("renormalised")) for line in card["participants"]}
        assert card == plain, "nothing else changes"
        assert abs(sum(found.values()) - Fraction(card["total_value"])) < Fraction(10, 10**9)
        assert any(abs(found[line["id"]] - Fraction(line["value"])) > 10**-4 for line in card["participants"])
        assert "never paid by" in fedpact(*show, "--diagnostic", "renormalised").out
        assert "never paid by" not in fedpact(*show).out

    def test_alarms_are_told_and_where_there_is_no_power(self, fedpact: Fedpact, run: ClosedRun) -> None:
        contract, home = run.federation.contract, ("--home", str(run.federation.home))
        keep_validation(run)
        found = fedpact("contribution", "alarms", contract.id[:8], *home, "--json").json["findings"]
        assert {f["round"] for f in found} == {1, 2}
        last = {f["code"]: f for f in found if f["round"] == 2}
        assert set(last) == {*TESTS, "NEGATIVES"}, "after the last round every detector looks"
        assert {f["code"] for f in found if f["outcome"] == "alarm"} <= {"NEGATIVES"}, "a rule, which noise may break"
        assert last["VALUE_PER_ROW"]["outcome"] == "no power", "four participants have three peers each"
        text = fedpact("contribution", "alarms", contract.id[:8], *home).out
        assert ("No alarm." in text) == (last["NEGATIVES"]["outcome"] == "quiet")
        assert "REPLAY could find nothing in round 2: none before 3 rounds" in text
        assert "VALUE_PER_ROW could find nothing in round 2: nobody has 4 peers" in text
        for code in TESTS:
            silent = [str(f["round"]) for f in found if f["code"] == code and f["outcome"] == "no power"]
            there = re.search(rf"{code} could find nothing in rounds? ([0-9, -]+): ", text)
            assert (there.group(1) if there else "") == "-".join(silent), (
                "the rounds in which it could not, and no others"
            )

    def test_a_rounds_game_is_recomputed_by_anybody(self, fedpact: Fedpact, run: ClosedRun) -> None:
        contract, home = run.federation.contract, ("--home", str(run.federation.home))
        card = fedpact("contribution", "show", contract.id[:8], *home, "--json").json
        table = fedpact("contribution", "show", contract.id[:8], "--game", "2", *home)
        Path("table.json").write_text(table.out)
        found = fedpact("contribution", "recompute", "table.json", "--json").json
        rows = card["validation_rows"]
        for player, value in card["rounds"][1]["values"].items():
            assert abs(Fraction(found["shapley"][player]) / rows / 10**9 - Fraction(value)) <= Fraction(1, 10**9)
        unknown = fedpact("contribution", "show", contract.id[:8], "--game", "3", *home, "--json")
        assert (unknown.code, unknown.error) == (2, "CONTRIBUTION_NO_ROUND")
        assert unknown.json["error"]["remedy"] == "Scored so far: 1, 2."

    def test_a_picture_is_a_file_of_its_own(self, fedpact: Fedpact, run: ClosedRun) -> None:
        from xml.etree import ElementTree as Xml

        contract, home = run.federation.contract, ("--home", str(run.federation.home), "--json")
        assert fedpact("contribution", "show", contract.id[:8], "--plot", "a.svg", *home).code == 0
        words = {element.text for element in Xml.fromstring(Path("a.svg").read_text()).iter() if element.text}
        assert {p.name for p in contract.participants} <= words
        kept = fedpact("contribution", "show", contract.id[:8], "--plot", "a.svg", *home)
        assert (kept.error, kept.json["error"]["field"]) == ("FILE_EXISTS", "--plot")
        assert "with --plot" in kept.json["error"]["remedy"]
        assert fedpact("contribution", "show", contract.id[:8], "--plot", "a.png", *home).error == "PLOT_FORM"

    def test_before_the_first_round_it_says_so(self, fedpact: Fedpact, federation: Federation) -> None:
        none = fedpact("contribution", "show", federation.contract.id[:8], "--home", str(federation.home), "--json")
        assert (none.code, none.error) == (2, "CONTRIBUTION_NO_ROUND")

    def test_values_that_are_lost_are_named(self, fedpact: Fedpact, run: ClosedRun) -> None:
        contract, database = run.federation.contract, run.federation.database
        with database.write() as connection:  # as it is while the run goes on
            connection.execute(db.openings.delete().where(db.openings.c.name == "moments"))
        show = ("contribution", "show", contract.id[:8], "--home", str(run.federation.home), "--json")
        assert fedpact(*show).json["live"] is True
        path = scoring.values_path(run.federation.home / "arrays" / contract.id, 2)
        path.write_bytes(path.read_bytes()[:-8])
        lost = fedpact(*show)
        assert (lost.code, lost.error) == (1, "CONTRIBUTION_VALUES_LOST")
        assert lost.json["error"]["file"] == str(path)
