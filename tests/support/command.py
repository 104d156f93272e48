"""A command line of `fedpact` or `fedpact-agent`, run in this process. No tests here."""

import sys
from collections.abc import Callable
from typing import NoReturn

import pytest

from fedpact_contract import cli

Run = Callable[..., tuple[int, str, str]]
"""A command line's words -> exit code, standard output, standard error."""


def runner(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], NoReturn] = cli.main,
    name: str = "fedpact",
) -> Run:
    """Runs the command with these words; what was printed before does not count."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        shown = capsys.readouterr()
        assert left.value.code is None or isinstance(left.value.code, int)
        return left.value.code or 0, shown.out, shown.err

    return call
