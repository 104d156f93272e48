"""Findings as a test wants them, in the form that a log has: every detector that is due speaks. No tests here."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fedpact_contract import looks
from fedpact_contract.contract import Contract
from fedpact_contract.log import Finding, Findings


def quiet(code: str, number: int) -> Finding:
    """A detector that found nothing."""
    return Finding(
        code=code,
        round=number,
        outcome="quiet",
        participants=(),
        statistic="0",
        threshold="3",
        power="any",
        evidence={},
    )


def alarm(code: str, number: int, *who: str) -> Finding:
    """A detector that raises an alarm of these."""
    told = {"outcome": "alarm", "participants": tuple(sorted(who)), "statistic": "9.5", "evidence": {"rounds": 2}}
    return quiet(code, number).model_copy(update=told)


def filled(contract: Contract, number: int, lines: Iterable[Finding]) -> Findings:
    """These lines, and a quiet one of every other detector that speaks after the round."""
    given = {line.code: line for line in lines}
    found = tuple(given.get(code) or quiet(code, number) for code in looks.due(contract, number))
    return Findings(round=number, lines=found)


def say(patch: pytest.MonkeyPatch, said: Callable[[int], Iterable[Finding]]) -> None:
    """The detectors look after every round and say this; nobody's opened values refute that it is a wrecker."""
    patch.setattr("fedpact_contract.looks.looks", lambda rounds: tuple(range(1, rounds + 1)))
    patch.setattr("fedpact_contract.replay_defences.refuted", lambda *_: False)

    def after(self: Any, _connection: Any, number: int) -> Findings:
        return filled(self.contract, number, said(number))

    patch.setattr("fedpact_server.watch.KeptWatch.after", after)
