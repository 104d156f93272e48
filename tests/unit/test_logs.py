"""The operator's log: JSON lines in a file or text on stderr, never on stdout."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from fedpact_server.logs import configure_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_a_file_gets_json_lines_and_keeps_what_it_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    configure_logging(path)
    structlog.get_logger().info("update admitted", participant="p")
    structlog.get_logger().debug("not shown")
    first, line = path.read_text().splitlines()
    shown = json.loads(line)
    assert first == "before"
    assert (shown["event"], shown["participant"], shown["level"]) == ("update admitted", "p", "info")
    assert shown["timestamp"].endswith("Z")
    assert capsys.readouterr() == ("", "")


def test_without_a_file_it_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    structlog.get_logger().warning("alarm", code="X")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "alarm" in shown.err
    assert "X" in shown.err


def test_commands_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level=logging.ERROR)
    structlog.get_logger().warning("alarm")
    assert capsys.readouterr() == ("", "")
