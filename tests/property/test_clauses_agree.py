"""The guard refuses what the clauses exclude, and nothing else: 15,000 actions, by a second reader of the clauses."""

import copy
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.clause_reader import CLAUSES, Verdict, read, remember
from tests.support.clause_world import CODES, Outcome, Station

from fedpact_client.store import Store
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError

STATIONS, ACTIONS = 60, 250
ALLOWED_SHARE, SOLE = 0.3, 100

pytestmark = pytest.mark.slow


def fits(verdict: Verdict, outcome: Outcome, before: str | None) -> bool:
    """Whether the verdict allows this answer of the guard; `before`: the code with which this order was refused."""
    if verdict.allowed != outcome.allowed:
        return False
    if outcome.allowed or outcome.code is None:
        return outcome.allowed or verdict.again == "update"
    if before is not None:  # an order has one answer
        return outcome.code == before
    return outcome.code in {CODES[name] for name in verdict.broken}


def test_no_action_that_the_clauses_exclude_is_allowed_and_no_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    folder = Path(folder, f"fedpact-clauses-{os.getpid()}")
    folder.mkdir()
    allowed, sole, reasons, tried = 0, Counter[str](), Counter[int](), Counter[str]()
    try:
        for number in range(STATIONS):
            with Station(folder, number, ACTIONS, monkeypatch, tried) as station:
                for _ in range(ACTIONS):
                    action = station.next()
                    verdict, outcome = read(action), station.enforce(action)
                    place = (action["id"], action["order"]["round"], action["order"]["base"])
                    shown = (number, station.done, verdict, outcome, action["order"], action["policy"], action["now"])
                    assert fits(verdict, outcome, station.codes.get(place)), shown
                    allowed += outcome.allowed
                    if verdict.again is None:
                        reasons[len(verdict.broken)] += 1
                        sole.update(verdict.broken if len(verdict.broken) == 1 else ())
                        if outcome.code is not None:
                            station.codes[place] = outcome.code
                    remember(action, verdict)
                check_ledger(station.store, station)
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert allowed >= ALLOWED_SHARE * STATIONS * ACTIONS, allowed
    assert {name: sole[name] for name in CLAUSES if sole[name] < SOLE} == {}, (allowed, sole, reasons)


def check_ledger(store: Store, station: Station) -> None:
    """Limits ran down by exactly what the second reader counted."""
    assert store.uses("set") == station.past.uses
    assert store.budget("set").charged == station.past.charged


CHOICES = (
    *("kind", "rule", "unit", "relation", "sampling", "trust_model", "aggregation", "game", "loss", "estimator"),
    *("fallback", "clip", "wreckers", "missing", "method", "currency"),
)
"""Keys whose values are words with a meaning."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every table and value in a contract."""
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from places(below, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_what_is_unknown_is_refused_when_a_contract_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    for number in (3, 4, 10):  # at client level; with defences; with a second unit
        with Station(tmp_path, number, 1, monkeypatch) as station:
            plain = station.plain[station.first]
        for path, value in places(plain):
            other = copy.deepcopy(plain)
            if isinstance(value, dict):
                at(other, path)["duty"] = "delete"
            elif path[-1] in CHOICES:
                at(other, path[:-1])[path[-1]] = "another"
            else:
                continue
            tried += 1
            with pytest.raises(InputError):
                Contract.parse(other)
    assert tried > 100
