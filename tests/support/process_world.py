"""An operator and enterprises on this machine, each a process tree of its own, by the public commands. No tests here.

They train digits for as many steps as a test needs to reach them in the middle.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.contract_kit import a_year_from_now
from tests.support.proc import command_lines, descendants

from fedpact_client.store import Store
from fedpact_server.demo import data as digits
from fedpact_server.demo.processes import free_port
from fedpact_server.demo.warm import Warm

BIN = Path(sys.executable).parent
PASSPHRASE = "correct horse battery staple"
TRAINER, EXECUTOR = "fedpact_client.trainer", "fedpact_client.executor"


@functools.cache
def warm() -> Warm:
    """This test process's, which ends with it: a federation's commands took a third of its processor time to load."""
    return Warm()


class World:
    """An operator and enterprises; `minimum` of them make a round."""

    def __init__(
        self, folder: Path, *, enterprises: int, rounds: int, steps: int, minimum: int = 3, deadline: int = 180
    ) -> None:
        self.folder, self.port, self.enterprises = folder, free_port(), enterprises
        self.minimum = minimum
        self.template = _template(enterprises, rounds, steps, minimum, deadline)
        self.operator = folder / "operator"
        self.shares, self.validation = digits.write(folder / "data", self.enterprises + 1)
        self.passphrase = folder / "passphrase"
        self.passphrase.write_text(PASSPHRASE + "\n")
        self.passphrase.chmod(0o600)
        self.sources: dict[int, str] = {}  # by enterprise, an agent.toml's source in place of its file
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.contract_id = ""

    def home(self, index: int) -> Path:
        return self.folder / f"enterprise{index}" / "agent"

    def run(self, name: str, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        env = {k: v for k, v in os.environ.items() if not k.startswith("FEDPACT_")}
        called = warm().start([name, *arguments, "--json"], env)
        out, err = called.communicate(180)
        assert called.returncode in ok, (arguments, called.returncode, out, err)
        return json.loads(out)

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
        with ThreadPoolExecutor(self.enterprises) as pool:
            made = list(pool.map(self._make_home, range(self.enterprises)))
            self.wait(lambda: self._answers(), 90)
            list(pool.map(self._join, range(self.enterprises), made))
        template = self.folder / "template.toml"
        template.write_text(self.template, "utf-8")
        self.contract_id = self.fedpact("contract", "new", str(template), "--validation", str(self.validation))[
            "contract_id"
        ]
        self.fedpact("contract", "offer", self.contract_id)
        self.fedpact("contract", "sign", self.contract_id, "--yes", *secret)
        with ThreadPoolExecutor(self.enterprises) as pool:
            list(pool.map(lambda i: self.agent(i, "sign", self.contract_id, "--yes", *secret), range(self.enterprises)))
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
        text = text.replace("min_participants = 3", f"min_participants = {self.minimum}")
        columns = ", ".join(f'"{name}"' for name in digits.PIXELS)
        table = f'table = "{share.table}"\n' if share.table else ""
        source = self.sources.get(index, f'path = "{share.file}"\nkind = "{share.kind}"\n{table}')
        text += (
            f'\n[[data_sets]]\nid = "digits-{index}"\nnum_examples = {share.num_examples}\nepsilon = 8\n'
            f'delta = 0.00001\ncolumns = [{columns}]\nlabel = "digit"\n[data_sets.source]\n{source}'
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


def _template(enterprises: int, rounds: int, steps: int, minimum: int, deadline: int) -> str:
    columns = "\n".join(
        f'[[data.columns]]\nname = "{n}"\nkind = "number"\nlow = 0\nhigh = 16\nmissing = "refuse"'
        for n in digits.PIXELS
    )
    people = "\n".join(
        f'[[participants]]\nentity_code = "{code(i)}"\ndata_set = "digits-{i}"\nfloor_fen = 0'
        for i in range(enterprises)
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
rounds = {rounds}
local_steps = {steps}
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
minimum = {minimum}
deadline_seconds = {deadline}
head_threshold = {minimum - 1}
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
not_after = "{a_year_from_now()}"
{people}
"""
