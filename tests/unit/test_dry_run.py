"""`dry-run`: what a contract would do here, with no network at all, and not one byte of the home changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.agent_world import ROWS, Lab, lab
from tests.support.required import lacking

from fedpact_client import quote
from fedpact_contract.contract import Contract

COMMAND = str(Path(sys.executable).parent / "fedpact-agent")


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[tuple[Lab, Contract, Path]]:
    """A card is declared, a contract is offered and lies in a file; nothing is signed."""
    with lab(tmp_path) as world:
        world.enrol()
        world.approve()
        world.configure()
        world.declare()
        contract = world.offer()
        file = tmp_path / "contract.json"
        file.write_bytes(contract.to_bytes())
        world.store.close()
        yield world, contract, file


def rehearse(world: Lab, *arguments: object, prefix: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    line = [*prefix, COMMAND, "dry-run", *map(str, arguments), "--json"]
    env = os.environ | {"FEDPACT_AGENT_HOME": str(world.home.path)}
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below, its bytes and when it was last written."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.root
def test_without_any_network_and_without_a_trace(ready: tuple[Lab, Contract, Path], tmp_path: Path) -> None:
    """In a network namespace that has not even a loopback, under strace: nobody is called, and nobody is missed."""
    if shutil.which("strace") is None:
        lacking("needs strace")
    world, contract, file = ready
    before, seen = tree(world.home.path), tmp_path / "calls"
    strace = ("strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg,bind", "-o", str(seen))
    code, found = rehearse(world, file, prefix=("unshare", "-n", *strace))
    assert (code, found["accepted"]) == (0, True), found["checks"]
    assert tree(world.home.path) == before
    calls = [line for line in seen.read_text().splitlines() if re.search(r"AF_(INET|INET6|UNIX|NETLINK)|send", line)]
    calls = [line for line in calls if "/nscd/socket" not in line]  # who this user is, asked on this machine
    walls = [line for line in calls if "EACCES" in line or "ENETUNREACH" in line]
    assert all("sin_port=htons(1)" in line and "127.0.0.1" in line for line in walls)
    assert calls == walls, "the trainer alone tries its own walls, and is refused"
    assert len(walls) <= 1
    assert found["contract"] == contract.id


def test_what_it_says_is_what_signing_and_the_rounds_would_do(ready: tuple[Lab, Contract, Path]) -> None:
    world, contract, file = ready
    _, found = rehearse(world, file)
    assert found["data"] == {
        "data_set": "set-1",
        "columns": ["age", "sex"],
        "label": ["ill"],
        "rows_that_fit": 60,
        "rows_used": 40,
    }
    cost = found["privacy"]
    assert (cost["attempts"], cost["fits"], cost["before"]) == (3, True, "0")
    assert 0 < float(cost["epsilon"]) <= 2, "the contract's own limit"
    moved = quote.traffic(contract, contract.participant(world.home.participant_id))
    kinds = {k["kind"]: k for k in found["leaves"]["kinds"]}
    assert set(kinds) == {"signature", "update", "countersignature"}
    assert kinds["update"]["times"] == contract.training.rounds
    assert sum(k["total"] for k in kinds.values()) == found["leaves"]["total"] == moved["out"]["total"]
    assert found["leaves"]["per_round"] == kinds["update"]["bytes"]
    assert float(found["time"]["run_seconds"]) > 0


def test_what_would_be_refused_is_said_and_exits_with_5(ready: tuple[Lab, Contract, Path]) -> None:
    world, _, file = ready
    (world.home.path / "rows.csv").write_text(ROWS.replace(",f,", ",x,"))
    code, found = rehearse(world, file)
    assert (code, found["accepted"], found["data"]["rows_that_fit"]) == (5, False, None)
    (wrong,) = (c for c in found["checks"] if not c["ok"])
    assert (wrong["name"], wrong["error"]["code"]) == ("rows fit the schema", "DATA_UNKNOWN_CATEGORY")


def test_an_id_is_looked_for_here_alone(ready: tuple[Lab, Contract, Path]) -> None:
    world, contract, _ = ready
    code, found = rehearse(world, contract.id)
    assert (code, found["error"]["code"]) == (2, "CONTRACT_UNKNOWN")
    assert "--keep" in found["error"]["remedy"]


def test_as_text(ready: tuple[Lab, Contract, Path]) -> None:
    world, contract, file = ready
    env = os.environ | {"FEDPACT_AGENT_HOME": str(world.home.path), "COLUMNS": "160"}
    done = subprocess.run([COMMAND, "dry-run", file], capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing was sent, charged or kept" in done.stdout
    assert "60 rows fit, 40 are trained on" in done.stdout
    assert "WHAT WOULD LEAVE" in done.stdout
    assert contract.id in done.stdout
    line = [COMMAND, "dry-run", file, "--lang", "zh"]
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    chinese = done.stdout.replace(contract.title, "")
    assert "60行相符，其中40行用于训练" in chinese
    assert "未发送、未计费、未留存任何内容" in chinese
    assert not {"the", "of", "our", "and", "in", "for", "a"} & {*re.findall(r"\b[a-z]+\b", chinese, re.ASCII)}
