"""By hand, as the README says, on separate hosts: each agent in a network namespace that reaches one port only.

Every command of the README's part "Across real machines" is taken from there, in its order, with this test's own names
in place of the README's; one that it shows and this test does not run makes the test fail.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests.support.contract_kit import a_year_from_now
from tests.support.netns import Hosts, hosts
from tests.support.proc import descendants, mentioning
from tests.support.readme import Script, commands, filled
from tests.support.required import lacking

from fedpact_server.demo import data as digits
from fedpact_server.demo.processes import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.root]
BIN = Path(sys.executable).parent
ENTERPRISES = 3
HEADING = "Across real machines"
CONTRACT = "3f2a91c0"
ASKS = {"sign": True, "card": True, "init": False, "enrol": False}
"""Commands that open a key with a passphrase, and whether they also ask a question."""


class World:
    """The operator on this machine, three enterprises each on a host of its own; each has a folder to work in."""

    def __init__(self, folder: Path, net: Hosts, port: int) -> None:
        self.folder, self.net, self.port = folder, net, port
        self.script = Script.of_readme(HEADING)
        self.desk = folder / "operators-desk"
        self.desk.mkdir()
        self.operator = self.desk / "operator"
        self.background: list[subprocess.Popen[bytes]] = []
        self.shares, self.validation = digits.write(folder / "data", 4)
        self.passphrase = folder / "passphrase"
        self.passphrase.write_text("correct horse battery staple\n")
        self.passphrase.chmod(0o600)
        self.ids: dict[int, str] = {}
        self.values: dict[str, str] = {"fl.example.org": net.operator, "8443": str(port)}

    def place(self, index: int | None) -> Path:
        """Where somebody works: the operator, or an enterprise."""
        if index is None:
            return self.desk
        (self.folder / f"enterprise{index}").mkdir(exist_ok=True)
        return self.folder / f"enterprise{index}"

    def home(self, index: int) -> Path:
        return self.place(index) / "agent"

    def own(self, index: int) -> dict[str, str]:
        """An enterprise's own words for those of the README's Hospital A."""
        share = self.shares[index]
        return {
            "Hospital A": share.name,
            "91310000MA1HOSP001": code_of(index),
            "medical": share.sector,
            "hospital-a.json": str(self.folder / f"invitation{index}.json"),
            "heart-2026": f"digits-{index}",
            "3f2a 91c0 ...": self.ids.get(index, ""),
        }

    def line(self, words: list[str], index: int | None) -> list[str]:
        """The command line on the host of an enterprise, or the operator's."""
        line = [str(BIN / words[0]), *words[1:]]
        return line if index is None else self.net.within(index, *line)

    def run(
        self, words: list[str], index: int | None = None, ok: tuple[int, ...] = (0,), *, form: str = "--json"
    ) -> Any:
        env = {k: v for k, v in os.environ.items() if not k.startswith("FEDPACT_")}
        line = [*self.line(words, index), *([form] if form else [])]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=240, env=env, check=False, cwd=self.place(index)
        )
        assert done.returncode in ok, f"{line}: {done.returncode} {done.stdout} {done.stderr}"
        return json.loads(done.stdout.strip().splitlines()[-1]) if form else done.stdout

    def secretly(self, words: list[str]) -> list[str]:
        """With the passphrase from a file, and without questions."""
        verb = next((word for word in words[1:3] if word in ASKS), "")
        if not verb or words[1] == "participant":  # these open no key
            return words
        return [*words, "--passphrase-file", str(self.passphrase), *(["--yes"] if ASKS[verb] else [])]

    def operates(self, beginning: str, *more: str, ok: tuple[int, ...] = (0,), **options: Any) -> Any:
        """The README's next command, as the operator gives it."""
        words = self.secretly(filled(self.script.take(beginning), self.values))
        return self.run([*words, *more], ok=ok, **options)

    def each_runs(self, beginning: str, *more: str, ok: tuple[int, ...] = (0,), by_operator: bool = False) -> list[Any]:
        """The README's next command, for each enterprise: by its own hand, or the operator's."""
        words = self.script.take(beginning)

        def one(index: int) -> Any:
            line = self.secretly(filled(words, self.values | self.own(index)))
            return self.run([*line, *more], None if by_operator else index, ok)

        with ThreadPoolExecutor(ENTERPRISES) as pool:
            return list(pool.map(one, range(ENTERPRISES)))

    def fedpact(self, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        """A command of the operator that the README does not show."""
        return self.run(["fedpact", *arguments, "--home", "operator"], ok=ok)

    def agent(self, index: int, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        return self.run(["fedpact-agent", *arguments, "--home", "agent"], index, ok)

    def each(self, *arguments: str, ok: tuple[int, ...] = (0,)) -> list[Any]:
        """A command that the README does not show, by each enterprise."""
        with ThreadPoolExecutor(ENTERPRISES) as pool:
            return list(pool.map(lambda index: self.agent(index, *arguments, ok=ok), range(ENTERPRISES)))

    def start(self, words: list[str], log: str, index: int | None = None) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                self.line(words, index),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self.place(index),
            )
        self.background.append(process)
        return process

    def stop(self) -> None:
        for process in self.background:
            process.send_signal(signal.SIGTERM)
        for process in self.background:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def wait(self, what: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"still waiting; logs in {self.folder}"
            time.sleep(0.5)


def code_of(index: int) -> str:
    return f"91310000MA1HAND{index:03d}"


def ask(world: World, index: int, method: str, path: str) -> str:
    """The status code that host `index` gets with nothing but the CA certificate; `away` where nothing answers."""
    program = (
        "import ssl,sys,http.client\n"
        "host,port,ca,method,path=sys.argv[1:]\n"
        "c=http.client.HTTPSConnection(host,int(port),timeout=5,context=ssl.create_default_context(cafile=ca))\n"
        "try:\n c.request(method,path,body=b'' if method=='POST' else None); print(c.getresponse().status)\n"
        "except OSError: print('away')\n"
    )
    ca = str(world.operator / "tls" / "ca.crt")
    line = world.net.within(index, sys.executable, "-c", program, world.net.operator, str(world.port), ca, method, path)
    return subprocess.run(line, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


@contextmanager
def listener(address: str) -> Iterator[int]:
    """Somebody who takes connections at another port of the operator."""
    with socket.socket() as server:
        server.bind((address, 0))
        server.listen()
        server.settimeout(0.2)
        ending = threading.Event()

        def take() -> None:
            while not ending.is_set():
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ending.set()
            thread.join()


def check_the_port(world: World) -> None:
    """From another host: Fleet, health and our API answer; everything else is 403, other ports cannot be reached."""
    assert ask(world, 0, "GET", "/health") == "200"
    assert ask(world, 0, "GET", "/fedpact/v1/operator") == "200"
    for path in ("/docs", "/openapi.json", "/v1/control/list-runs", "//v1/control/list-runs", "/v1/fleet/../control/x"):
        assert ask(world, 0, "GET", path) == "403", path
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/flwr.proto.Control/StartRun"):
        assert ask(world, 0, "POST", path) == "403", path
    assert ask(world, 0, "GET", "/fedpact/v1/contracts") == "401"
    program = (
        "import socket,sys\n"
        "try: socket.create_connection((sys.argv[1],int(sys.argv[2])),2); print('open')\n"
        "except OSError: print('shut')"
    )

    def probe(host: str, port: int) -> str:
        line = world.net.at(host, sys.executable, "-c", program, world.net.operator, str(port))
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    with listener(world.net.operator) as other:
        assert probe(world.net.control, other) == "open", "somebody listens there"
        with ThreadPoolExecutor(ENTERPRISES) as pool:
            found = list(pool.map(lambda host: (probe(host, other), probe(host, world.port)), world.net.names))
        assert found == [("shut", "open")] * ENTERPRISES, "an enterprise's host reaches the one port and not this one"


def configure(world: World, index: int) -> None:
    """What a person writes into agent.toml."""
    share = world.shares[index]
    config = world.home(index) / "agent.toml"
    text = config.read_text("utf-8").replace("purposes = []", 'purposes = ["digit-recognition"]')
    text = text.replace("#trust_models = ", "trust_models = ")  # both
    columns = ", ".join(f'"{name}"' for name in digits.PIXELS)
    table = f'table = "{share.table}"\n' if share.table else ""
    text += (
        f'\n[[data_sets]]\nid = "digits-{index}"\nnum_examples = {share.num_examples}\nepsilon = 8\ndelta = 0.00001\n'
        f'columns = [{columns}]\nlabel = "digit"\n'
        f'[data_sets.source]\npath = "{share.file}"\nkind = "{share.kind}"\n{table}'
    )
    config.write_text(text, "utf-8")


def terms(template: str, title: str, rounds: int) -> str:
    """The installed template, filled in."""
    values = tomllib.loads(template)
    pixels = [{"name": name, "kind": "number", "low": 0, "high": 16, "missing": "refuse"} for name in digits.PIXELS]
    label = {"name": "digit", "classes": [str(d) for d in range(10)], "rule": "value"}
    values |= {"title": title, "purpose": "digit-recognition"}
    values["data"] = {"feature_scale": 2, "columns": pixels, "label": label}
    values["training"] |= {"rounds": rounds, "local_steps": 6, "learning_rate": 4}
    values["privacy"] |= {"sample_rate": 0.2}
    queries = [{"kind": "mean", "column": "pixel_2_4"}, {"kind": "histogram", "column": "digit"}]
    values |= {"statistics": {"noise_multiplier": 20, "queries": queries}, "baseline": {"steps": 6}}
    values["participation"] |= {"strict_heads": True}
    values["settlement"] |= {"contribution_weight": 0.8, "data_weight": 0.1, "equal_weight": 0.1}
    values["term"] = {"not_before": "2026-01-01T00:00:00Z", "not_after": a_year_from_now()}
    values["participants"] = [
        {"entity_code": code_of(i), "data_set": f"digits-{i}", "floor_fen": 0} for i in range(ENTERPRISES)
    ]
    return tomli_w.dumps(values)


def at_client_level(template: str) -> str:
    """The same, with noise that the operator adds: nothing is paid by contribution, nothing measured besides."""
    values = tomllib.loads(template)
    del values["statistics"], values["baseline"], values["defences"], values["privacy"]["max_grad_norm"]
    values["privacy"] |= {
        "trust_model": "client-level-at-the-operator",
        "unit": "participant",
        "max_update_norm": 1,
    }
    values["training"]["aggregation"] = "uniform-mean"
    values["contribution"]["game"] = "unanimity"
    values["settlement"] |= {"contribution_weight": 0, "data_weight": 0.5, "equal_weight": 0.5}
    return tomli_w.dumps(values)


def test_three_enterprises_on_hosts_of_their_own(tmp_path) -> None:
    if shutil.which("nft") is None:
        lacking("needs the command `nft` (nftables): without it no host is kept to one port")
    port = free_port()
    with hosts(ENTERPRISES, port) as net:
        world = World(tmp_path, net, port)
        try:
            play(world)
            stop_in_the_middle(world)
        finally:
            world.stop()
    assert mentioning(str(tmp_path)) == {}


def play(world: World) -> None:
    """The README's commands, from `init` to `verify`."""
    operator = world.operates("fedpact init")["fingerprint"]
    serve = world.script.take("fedpact serve")
    server = world.start(serve, "operator.log")
    world.wait(lambda: ask(world, 0, "GET", "/health") == "200")
    check_the_port(world)
    world.each_runs("fedpact participant invite", by_operator=True)
    for index, made in enumerate(world.each_runs("fedpact-agent init")):
        world.ids[index] = made["participant"]
        configure(world, index)
    for found in world.each_runs("fedpact-agent preflight"):
        assert found["count"]["fail"] == 0
        assert {c["name"] for c in found["checks"] if c["state"] == "pass"} >= {"DNS", "TCP", "TLS", "clock", "post"}
    world.each_runs("fedpact-agent enrol")
    check_enrolment(world)
    world.each_runs("fedpact participant approve", by_operator=True)
    assert all(found["passed"] for found in world.each_runs("fedpact-agent profile"))
    cards = world.each_runs("fedpact-agent card")
    seen = world.each_runs("fedpact participant card", by_operator=True)
    assert [c["num_examples"] for c in seen] == [c["num_examples"] for c in cards]
    make_contract(world)
    know_each_other(world)
    world.each_runs("fedpact-agent contract list")
    assert all(found["privacy"]["fits"] for found in world.each_runs("fedpact-agent quote"))
    for found in world.each_runs("fedpact-agent dry-run"):
        assert found["accepted"]
        assert {k["kind"]: k["times"] for k in found["leaves"]["kinds"]}["update"] == 3
    world.each_runs("fedpact-agent sign")
    words = world.script.take("fedpact-agent start")
    for index in range(ENTERPRISES):
        world.start(words, f"agent{index}.log", index)
    contract_id = world.operates("fedpact run start")["contract_id"]
    world.wait(lambda: world.fedpact("run", "status", contract_id)["round"] >= 2, 120)
    kill_the_server(world, server)
    world.start(serve, "operator.log")
    assert world.operates("fedpact run follow", "--seconds", "240")["phase"] == "completed"
    settle(world)
    deliver(world)
    look_at_home(world, contract_id)
    world.values |= {"5b7e 40aa ...": operator}
    world.operates("fedpact trust add")
    world.each_runs("fedpact trust add", by_operator=True)
    verified = world.operates("fedpact verify")
    assert verified["faults"] == []
    world.script.done()


def check_enrolment(world: World) -> None:
    """Nothing is taken before the approval, which needs the right fingerprint; a token is good once."""
    more = ("--yes", "--passphrase-file", str(world.passphrase))
    early = world.agent(0, "card", "digits-0", *more, ok=(5,))
    assert early["error"]["code"] == "PARTICIPANT_REQUESTED"
    wrong = world.fedpact("participant", "approve", world.ids[0], "--fingerprint", "0" * 64, ok=(1, 2, 5))
    assert wrong["error"]["code"] == "FINGERPRINT_MISMATCH"
    used = world.agent(1, "enrol", str(world.folder / "invitation0.json"), *more[1:], ok=(1, 2, 5))
    assert used["error"]["code"].startswith(("ENROLMENT_", "INVITATION_", "ENROLLED_", "ALREADY_")), used


def make_contract(world: World) -> None:
    world.operates("fedpact contract template", form="")
    template = world.desk / "heart.toml"
    template.write_text(terms(template.read_text("utf-8"), "Digits by hand", 3), "utf-8")
    shutil.copy(world.validation, world.desk / "validation.csv")
    made = world.operates("fedpact contract new")
    world.values[CONTRACT] = made["contract_id"][:8]
    world.operates("fedpact contract offer")
    world.operates("fedpact contract sign")
    early = world.fedpact("run", "start", made["contract_id"], ok=(2,))
    assert early["error"]["code"] == "CONTRACT_NOT_SIGNED"


def know_each_other(world: World) -> None:
    """Each enterprise enters the others in its trust file, as they told it their fingerprints."""
    words = world.script.take("fedpact trust add")
    for index in range(ENTERPRISES):
        for other in range(ENTERPRISES):
            if other != index:
                theirs = {
                    "Hospital B": world.shares[other].name,
                    "91310000MA1HOSP002": code_of(other),
                    "8c01 d2e4 ...": world.ids[other],
                }
                world.run(filled(words, theirs), index)


def settle(world: World) -> None:
    seen = world.operates("fedpact settle preview")
    closed = world.operates("fedpact settle close")
    assert closed["final"]
    assert sum(line["fen"] for line in closed["lines"]) == 100_000_000
    assert [line["fen"] for line in seen["lines"]] == [line["fen"] for line in closed["lines"]]


def deliver(world: World) -> None:
    """Report, model, prediction, evidence."""
    world.operates("fedpact report")
    assert "<svg" in (world.desk / "report.html").read_text("utf-8")
    world.operates("fedpact model")
    shutil.copy(world.validation, world.desk / "patients.csv")
    found = world.operates("fedpact predict")["predictions"]
    assert len(found) == digits.VALIDATION_ROWS
    world.operates("fedpact evidence")


def look_at_home(world: World, contract_id: str) -> None:
    """What each enterprise sees. Killed in the middle of a round, the operator lost nothing; nobody paid twice."""
    assert all(world.each_runs("fedpact-agent status"))
    for found in world.each_runs("fedpact-agent budget"):
        assert found["data_sets"]
        assert "failed" not in json.dumps(found["data_sets"])
    for found in world.each_runs("fedpact-agent egress"):
        assert len([e for e in found["egress"] if e["kind"] == "measurement"]) == 2
        updates = [e for e in found["egress"] if e["kind"] == "update"]
        sent = {(e["round"], e["sha256"]) for e in updates}
        assert len({number for number, _ in sent}) == len(sent) == 3, "one update a round, whatever was sent again"
    assert all(world.each_runs("fedpact-agent statement"))
    world.each_runs("fedpact-agent report")
    for index in range(ENTERPRISES):
        report = json.loads((world.place(index) / "report.json").read_text("utf-8"))
        assert report["contract_id"] == contract_id
        assert len(report["statistics"]["participants"]) == len(report["baselines"]) == ENTERPRISES


def stop_in_the_middle(world: World) -> None:
    """A second contract, at client level, stopped after some of its forty rounds: it settles, and verifies."""
    template = world.desk / "second.toml"
    template.write_text(at_client_level(terms((world.desk / "heart.toml").read_text("utf-8"), "Digits again", 40)))
    secret = ("--yes", "--passphrase-file", str(world.passphrase))
    contract_id = world.fedpact("contract", "new", "second.toml", "--validation", "validation.csv")["contract_id"]
    world.fedpact("contract", "offer", contract_id)
    world.fedpact("contract", "sign", contract_id, *secret)
    world.each("sign", contract_id, *secret)
    world.fedpact("run", "start", contract_id)
    world.wait(lambda: world.fedpact("run", "status", contract_id)["round"] >= 2, 120)
    early = world.fedpact("settle", "close", contract_id, "--revenue", "12345.67", ok=(2,))
    assert early["error"]["code"] == "SETTLE_RUN_NOT_ENDED"
    world.fedpact("run", "stop", contract_id)
    world.wait(lambda: world.fedpact("run", "status", contract_id)["phase"] == "stopped")
    again = world.fedpact("run", "start", contract_id, ok=(5,))
    assert again["error"]["code"] == "RUN_ENDED"
    closed = world.fedpact("settle", "close", contract_id, "--revenue", "12345.67", "--wait", "60")
    assert closed["final"]
    assert sum(line["fen"] for line in closed["lines"]) == 1_234_567
    world.fedpact("evidence", contract_id, "--out", "evidence-of-the-stopped")
    words = ["fedpact", "verify", "evidence-of-the-stopped", "--trust", "trust.toml"]
    assert world.run(words)["faults"] == []
    report = world.fedpact("report", contract_id, "--format", "json")
    assert report["rounds"][0].get("metric")
    finished = [line for line in report["rounds"] if line.get("metric")]
    assert 1 <= len(finished) < 40, "over the rounds that were finished, and no more"
    assert all(world.each("statement", contract_id))


def kill_the_server(world: World, server: subprocess.Popen[bytes]) -> None:
    """kill -9 in the middle of a round: nothing of it is left."""
    below = descendants(server.pid)
    server.kill()
    server.wait()
    world.background.remove(server)
    world.wait(lambda: not any(Path(f"/proc/{pid}").exists() and not _zombie(pid) for pid in below), 30)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


TEXT = """
## Before
```sh
fedpact no
```
## Here
```sh
fedpact one --x "a b"   # why
fedpact two \\
  --y
```
"""


def test_a_command_that_is_shown_and_not_run_is_noticed() -> None:
    script = Script(commands(TEXT, "Here"))
    assert script.left == [["fedpact", "one", "--x", "a b"], ["fedpact", "two", "--y"]]
    with pytest.raises(AssertionError, match="goes on with"):
        Script(commands(TEXT, "Here")).take("fedpact two")
    script.take("fedpact one")
    with pytest.raises(AssertionError, match="no test runs"):
        script.done()
    script.take("fedpact two")
    script.done()
