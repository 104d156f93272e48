"""Shares and intervals are the same digits wherever people read them."""

import re
import sys
from pathlib import Path

import pytest
from tests.support.closed_run import ClosedRun, closed_run

from fedpact_client.text import show_statement
from fedpact_client.views import Checked, statement
from fedpact_contract import cli, output
from fedpact_contract.report import build
from fedpact_contract.verify import verify_folder
from fedpact_server.report.html import render

FIGURES = re.compile(r"[0-9.]+ - [0-9.]+ %|(?<![0-9.] - )\b[0-9]+\.[0-9]+ %")


@pytest.fixture
def run(tmp_path: Path) -> ClosedRun:
    made = closed_run(tmp_path)
    made.settle()
    return made


def test_every_place_shows_the_same_share_and_interval(
    run: ClosedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fedpact(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedpact", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "80")
    home, folder = str(run.home), tmp_path / "evidence"
    preview = fedpact("settle", "preview", run.contract_id, "--revenue", "1000000", "--home", home)
    fedpact("evidence", run.contract_id, "--home", home, "--out", str(folder))
    verified = fedpact("verify", str(folder))
    entries = run.federation.entries()
    report = build(entries)
    page = render(report, "en")
    for party in report["participants"]:
        own = [output.format_share(party["share"]), output.format_interval(party["share_low"], party["share_high"])]
        for text in (preview, verified, page):
            assert all(figure in text for figure in own)
        found = Checked(files={}, entries=tuple(entries), report=verify_folder(folder, None), missed=())
        capsys.readouterr()
        show_statement(statement(found, party["id"]))
        told = capsys.readouterr().out
        assert FIGURES.findall(told) == own
        assert output.OUTWARD in told
        show_statement(statement(found, party["id"]), "zh")
        chinese = capsys.readouterr().out
        assert FIGURES.findall(chinese) == own
        lines = [text for text in chinese.splitlines()[2:] if text and not text.startswith("- ")]
        assert not [text for text in lines if re.search(r"\b(share|paid|round|interval|exact|rank|run is)\b", text)]
        assert {"份额", "应付", "区间", "精确"} == {text.strip()[:2] for text in lines[1:5]}
    assert output.OUTWARD in preview
    assert output.OUTWARD in verified
    every = {figure for text in (preview, verified) for figure in FIGURES.findall(text)}
    assert len(every) <= 2 * len(report["participants"]), "and no other figure"
