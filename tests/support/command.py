"""A command line of `fedpact`, run in this process. No tests here."""

import sys
from collections.abc import Callable

import pytest

from fedpact_contract import cli

Run = Callable[..., tuple[int, str, str]]
"""A command line's words -> exit code, standard output, standard error."""


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `fedpact` with these words; what was printed before does not count."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpact", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        assert left.value.code is None or isinstance(left.value.code, int)
        return left.value.code or 0, shown.out, shown.err

    return call
