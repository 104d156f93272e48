"""A real agent whose processes are killed in the middle of a round: nothing is lost, nothing is charged in silence.

One federation for all of it, over the real Flower: three enterprises train for seconds, and in the first round one
loses its trainer, one its guard (which a person starts again), one its executor.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.proc import command_lines, descendants, mentioning

from fedpact_client.store import EgressKind, Store
from fedpact_contract.log import Entry, UpdateDecided
from fedpact_contract.messages import Update
from fedpact_contract.record import read_envelope
from fedpact_server.demo import data as digits
from fedpact_server.demo.processes import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BIN = Path(sys.executable).parent
PASSPHRASE = "correct horse battery staple"
ENTERPRISES = 3
ROUNDS, STEPS = 2, 1500
TRAINER, EXECUTOR = "fedpact_client.trainer", "fedpact_client.executor"


class World:
    """An operator and three enterprises on this machine, every one a process tree of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.operator = folder / "operator"
        self.shares, self.validation = digits.write(folder / "data", ENTERPRISES + 1)
        self.passphrase = folder / "passphrase"
        self.passphrase.write_text(PASSPHRASE + "\n")
        self.passphrase.chmod(0o600)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.contract_id = ""

    def home(self, index: int) -> Path:
        return self.folder / f"enterprise{index}" / "agent"

    def run(self, name: str, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        env = {k: v for k, v in os.environ.items() if not k.startswith("FEDPACT_")}
        line = [str(BIN / name), *arguments, "--json"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=180, env=env, check=False)
        assert done.returncode in ok, (arguments, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def fedpact(self, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        return self.run("fedpact", *arguments, "--home", str(self.operator), ok=ok)

    def agent(self, index: int, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        return self.run("fedpact-agent", *arguments, "--home", str(self.home(index)), ok=ok)

    def start(self, name: str, *line: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as out:
            self.running[name] = subprocess.Popen(
                [str(BIN / line[0]), *line[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_agent(self, index: int) -> None:
        self.start(f"agent{index}", "fedpact-agent", "start", "--home", str(self.home(index)))

    def guard(self, index: int) -> int:
        return self.running[f"agent{index}"].pid

    def child(self, index: int, module: str) -> int | None:
        """The process of a guard's child, if it has one now."""
        lines = command_lines()
        found = [pid for pid in descendants(self.guard(index)) if module in lines.get(pid, "")]
        return min(found, default=None)

    def rows(self, index: int, number: int) -> list[tuple[str, int]]:
        """State and attempt of each row of a round in the enterprise's budget ledger."""
        with Store(self.home(index) / "agent.db", read_only=True) as store:
            return [(row.state, row.attempt) for row in store.rows(f"digits-{index}") if row.round == number]

    def wait(self, what: Callable[[], object], seconds: float = 60.0, every: float = 0.1) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"still waiting; logs in {self.folder}"
            time.sleep(every)

    def stop(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # Set-up, by the public commands

    def begin(self) -> None:
        """From nothing to agents that train."""
        secret = ("--passphrase-file", str(self.passphrase))
        self.fedpact(
            *("init", "--name", "Operator", "--entity-code", "91310000MA1GUARD99", "--host", "127.0.0.1"),
            *("--port", str(self.port), *secret),
        )
        self.start("operator", "fedpact", "serve", "--home", str(self.operator), "--host", "127.0.0.1")
        with ThreadPoolExecutor(ENTERPRISES) as pool:
            made = list(pool.map(self._make_home, range(ENTERPRISES)))
            self.wait(lambda: self._answers(), 90)
            list(pool.map(self._join, range(ENTERPRISES), made))
        template = self.folder / "template.toml"
        template.write_text(TEMPLATE, "utf-8")
        self.contract_id = self.fedpact("contract", "new", str(template), "--validation", str(self.validation))[
            "contract_id"
        ]
        self.fedpact("contract", "offer", self.contract_id)
        self.fedpact("contract", "sign", self.contract_id, "--yes", *secret)
        with ThreadPoolExecutor(ENTERPRISES) as pool:
            list(pool.map(lambda i: self.agent(i, "sign", self.contract_id, "--yes", *secret), range(ENTERPRISES)))
        self.fedpact("run", "start", self.contract_id)

    def _answers(self) -> bool:
        from fedpact_server.demo.run import _answers

        return _answers(self.operator, self.port)

    def _make_home(self, index: int) -> Any:
        share = self.shares[index]
        made = self.agent(
            index,
            *("init", "--name", share.name, "--entity-code", code(index), "--sector", share.sector),
            *("--passphrase-file", str(self.passphrase)),
        )
        config = self.home(index) / "agent.toml"
        text = config.read_text("utf-8").replace("purposes = []", 'purposes = ["digit-recognition"]')
        text = text.replace("threads = 2", "threads = 1").replace("poll_seconds = 5", "poll_seconds = 1")
        columns = ", ".join(f'"{name}"' for name in digits.PIXELS)
        table = f'table = "{share.table}"\n' if share.table else ""
        text += (
            f'\n[[data_sets]]\nid = "digits-{index}"\nnum_examples = {share.num_examples}\nepsilon = 8\n'
            f'delta = 0.00001\ncolumns = [{columns}]\nlabel = "digit"\n[data_sets.source]\npath = "{share.file}"\n'
            f'kind = "{share.kind}"\n{table}'
        )
        config.write_text(text, "utf-8")
        return made

    def _join(self, index: int, made: Any) -> None:
        share, invitation = self.shares[index], self.folder / f"invitation{index}.json"
        self.fedpact(
            *("participant", "invite", "--name", share.name, "--entity-code", code(index)),
            *("--sector", share.sector, "--out", str(invitation)),
        )
        self.agent(index, "enrol", str(invitation), "--passphrase-file", str(self.passphrase))
        self.fedpact("participant", "approve", made["participant"], "--fingerprint", made["participant"])
        self.start_agent(index)
        self.agent(index, "card", f"digits-{index}", "--yes", "--passphrase-file", str(self.passphrase))


def code(index: int) -> str:
    return f"91310000MA1GUARD{index:02d}"


def _template() -> str:
    columns = "\n".join(
        f'[[data.columns]]\nname = "{n}"\nkind = "number"\nlow = 0\nhigh = 16\nmissing = "refuse"'
        for n in digits.PIXELS
    )
    people = "\n".join(
        f'[[participants]]\nentity_code = "{code(i)}"\ndata_set = "digits-{i}"\nfloor_fen = 0'
        for i in range(ENTERPRISES)
    )
    classes = ", ".join(f'"{d}"' for d in range(10))
    return f"""
title = "Killed in the middle"
purpose = "digit-recognition"
[data]
feature_scale = 2
[data.label]
name = "digit"
classes = [{classes}]
rule = "value"
{columns}
[model]
kind = "softmax"
hidden = []
[training]
rounds = {ROUNDS}
local_steps = {STEPS}
learning_rate = 0.01
server_rate = 1
aggregation = "weighted-mean"
[privacy]
trust_model = "record-level-at-each-participant"
unit = "example"
relation = "zero-out"
sampling = "poisson"
epsilon = 2
delta = 0.00001
max_grad_norm = 1
sample_rate = 0.2
spare_attempts = 1
[participation]
minimum = 3
deadline_seconds = 180
head_threshold = 2
strict_heads = true
missed_rounds_limit = 2
[contribution]
game = "fixed-weight"
loss = "cross-entropy"
estimator = "exact"
[settlement]
currency = "CNY"
contribution_weight = 0.8
data_weight = 0.1
equal_weight = 0.1
fallback = "metered"
close_days = 7
[term]
not_before = "2026-01-01T00:00:00Z"
not_after = "2027-12-01T00:00:00Z"
{people}
"""


TEMPLATE = _template()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everybody trains the first round, or is about to."""
    folder = tmp_path_factory.mktemp("guard")
    made = World(folder)
    try:
        made.begin()
        yield made
    finally:
        made.stop()
    assert mentioning(str(folder)) == {}, "no orphan"


def test_killed_in_the_middle_of_a_round(world: World) -> None:
    """Each as soon as it trains: its attempt is reserved then, and not spent."""

    def strike(index: int, victim: Callable[[], int | None]) -> tuple[int, set[int]]:
        world.wait(lambda: world.rows(index, 1) == [("reserved", 1)], 120)
        world.wait(lambda: victim() is not None)
        pid = victim()
        assert pid
        below = descendants(pid)
        os.kill(pid, signal.SIGKILL)
        return pid, below

    victims = (lambda: world.child(0, TRAINER), lambda: world.guard(1), lambda: world.child(2, EXECUTOR))
    with ThreadPoolExecutor(ENTERPRISES) as pool:
        struck = list(pool.map(strike, range(ENTERPRISES), victims))
    orphans = struck[1][1]
    assert len(orphans) >= 2
    world.running["agent1"].wait()
    world.wait(lambda: not any(alive(pid) for pid in orphans), 10)
    world.start_agent(1)
    world.wait(lambda: world.fedpact("run", "status", world.contract_id)["round"] == 2, 240, every=3)
    assert world.rows(0, 1) == [("reserved", 1), ("reserved", 2), ("spent", 2)], "a spare attempt, charged in full"
    assert world.rows(1, 1) == [("reserved", 1), ("reserved", 2), ("spent", 2)], "the attempt that the kill cut off"
    assert world.rows(2, 1) == [("reserved", 1), ("spent", 1)], "its guard was not hurt: nothing was drawn again"


def test_no_secret_stands_in_arguments_or_environment(world: World) -> None:
    """Of guard, executor and trainer: other users of the machine can read the first, the same user both."""
    for index in range(ENTERPRISES):
        world.wait(lambda index=index: world.child(index, TRAINER) and world.child(index, EXECUTOR))
        secrets = [PASSPHRASE.encode(), (world.home(index) / "keys" / "selection.key").read_bytes().hex().encode()]
        secrets.append(json.loads((world.folder / f"invitation{index}.json").read_bytes())["token"].encode())
        for path in (world.home(index) / "keys").rglob("*.key"):
            if path.name != "selection.key":
                secrets += [line for line in path.read_bytes().splitlines() if len(line) > 20 and b"KEY" not in line]
        assert len(secrets) > 6
        for pid in (world.guard(index), world.child(index, TRAINER), world.child(index, EXECUTOR)):
            shown = b"".join(Path(f"/proc/{pid}/{part}").read_bytes() for part in ("cmdline", "environ"))
            assert not [secret for secret in secrets if secret in shown]
        for module in (TRAINER, EXECUTOR):
            environment = Path(f"/proc/{world.child(index, module)}/environ").read_bytes().split(b"\0")
            names = {entry.partition(b"=")[0] for entry in environment if entry}
            assert names <= {b"PATH", b"LANG", b"HOME", b"FEDPACT_PARENT"}, "nothing of the guard's own environment"


def test_the_run_is_completed_and_every_attempt_is_in_the_log(world: World) -> None:
    done = world.fedpact("run", "follow", world.contract_id, "--seconds", "180")
    assert done["phase"] == "completed"
    assert {outcome["outcome"] for outcome in done["outcomes"].values()} == {"admitted"}
    closed = world.fedpact("settle", "close", world.contract_id, "--revenue", "1000.00", "--wait", "60")
    assert closed["final"]
    evidence = world.folder / "evidence"
    world.fedpact("evidence", world.contract_id, "--out", str(evidence))
    assert world.run("fedpact", "verify", str(evidence), ok=(3,))["faults"] == []
    bodies = [Entry.from_bytes(line).open() for line in (evidence / "log.jsonl").read_bytes().splitlines()]
    attempts = {
        (body.participant, body.round): Update.from_bytes(read_envelope(body.update).body).attempt
        for body in bodies
        if isinstance(body, UpdateDecided)
    }
    who = [world.agent(i, "status", "--offline")["participant"] for i in range(ENTERPRISES)]
    assert attempts == {
        **{(who[0], 1): 2, (who[1], 1): 2, (who[2], 1): 1},
        **dict.fromkeys(((p, 2) for p in who), 1),
    }


def test_the_ledgers_agree_with_the_log(world: World) -> None:
    for index, tried in ((0, 3), (1, 3), (2, 2)):
        (line,) = world.agent(index, "budget")["data_sets"]
        (contract,) = line["contracts"]
        assert contract["steps"] == tried * STEPS
        assert float(contract["epsilon_pld"]) <= float(contract["epsilon"])
        with Store(world.home(index) / "agent.db", read_only=True) as store:
            sent = [(e.round, e.sha256) for e in store.egress() if e.kind is EgressKind.UPDATE]
        assert {number for number, _ in sent} == {1, 2}
        assert len(set(sent)) == 2, "one update a round, however often it was sent"
        statement = world.agent(index, "statement", world.contract_id, ok=(0, 4))
        assert [line["outcome"] for line in statement["rounds"]] == ["admitted", "admitted"]
        assert statement["sent_but_missed"] == []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
