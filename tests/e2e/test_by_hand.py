"""By hand, as the README says, on separate hosts: each agent in a network namespace that reaches one port only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.netns import Hosts, hosts
from tests.support.proc import descendants, mentioning

from fedpact_server.demo import data as digits
from fedpact_server.demo.processes import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.root]
BIN = Path(sys.executable).parent
ENTERPRISES = 3


class World:
    """The operator on this machine, three enterprises each on a host of its own."""

    def __init__(self, folder: Path, net: Hosts, port: int) -> None:
        self.folder, self.net, self.port = folder, net, port
        self.operator = folder / "operator"
        self.background: list[subprocess.Popen[bytes]] = []
        self.shares, self.validation = digits.write(folder / "data", 4)
        self.passphrase = folder / "passphrase"
        self.passphrase.write_text("correct horse battery staple\n")
        self.passphrase.chmod(0o600)

    def run(self, line: list[str], ok: tuple[int, ...] = (0,)) -> dict:
        env = {k: v for k, v in os.environ.items() if not k.startswith("FEDPACT_")}
        done = subprocess.run([*line, "--json"], capture_output=True, text=True, timeout=180, env=env, check=False)
        assert done.returncode in ok, f"{line}: {done.returncode} {done.stdout} {done.stderr}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    def fedpact(self, *arguments: str, ok: tuple[int, ...] = (0,)) -> dict:
        return self.run([str(BIN / "fedpact"), *arguments, "--home", str(self.operator)], ok)

    def agent(self, index: int, *arguments: str, ok: tuple[int, ...] = (0,)) -> dict:
        home = str(self.home(index))
        line = self.net.within(index, str(BIN / "fedpact-agent"), *arguments, "--home", home)
        return self.run(line, ok)

    def home(self, index: int) -> Path:
        return self.folder / f"enterprise{index}" / "agent"

    def start(self, line: list[str], log: str) -> subprocess.Popen[bytes]:
        out = (self.folder / log).open("ab")
        process = subprocess.Popen(line, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
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

    def wait(self, what, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"still waiting; logs in {self.folder}"
            time.sleep(0.2)


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


def join(world: World, index: int) -> None:
    """Invite, enrol, approve, describe the data, sign its card."""
    share = world.shares[index]
    code = f"91310000MA1HAND{index:03d}"
    invitation = world.folder / f"invitation{index}.json"
    world.fedpact(
        *("participant", "invite", "--name", share.name, "--entity-code", code),
        *("--sector", share.sector, "--out", str(invitation)),
    )
    made = world.agent(
        index,
        *("init", "--name", share.name, "--entity-code", code, "--sector", share.sector),
        *("--passphrase-file", str(world.passphrase)),
    )
    config = world.home(index) / "agent.toml"
    text = config.read_text("utf-8").replace("purposes = []", 'purposes = ["digit-recognition"]')
    columns = ", ".join(f'"{name}"' for name in digits.PIXELS)
    table = f'table = "{share.table}"\n' if share.table else ""
    text += (
        f'\n[[data_sets]]\nid = "digits-{index}"\nnum_examples = {share.num_examples}\nepsilon = 8\ndelta = 0.00001\n'
        f'columns = [{columns}]\nlabel = "digit"\n'
        f'[data_sets.source]\npath = "{share.file}"\nkind = "{share.kind}"\n{table}'
    )
    config.write_text(text, "utf-8")
    world.agent(index, "enrol", str(invitation), "--passphrase-file", str(world.passphrase))
    again = world.run(
        world.net.within(
            index,
            *(str(BIN / "fedpact-agent"), "card", f"digits-{index}", "--home", str(world.home(index))),
            *("--yes", "--passphrase-file", str(world.passphrase)),
        ),
        ok=(5,),
    )
    assert again["error"]["code"] == "PARTICIPANT_REQUESTED", "nothing is taken before the approval"
    wrong = world.fedpact("participant", "approve", made["participant"], "--fingerprint", "0" * 64, ok=(1, 2, 5))
    assert wrong["error"]["code"] == "FINGERPRINT_MISMATCH"
    world.fedpact("participant", "approve", made["participant"], "--fingerprint", made["participant"])
    world.agent(index, "card", f"digits-{index}", "--yes", "--passphrase-file", str(world.passphrase))


def make_contract(world: World) -> str:
    template = world.folder / "template.toml"
    columns = "\n".join(
        f'[[data.columns]]\nname = "{n}"\nkind = "number"\nlow = 0\nhigh = 16\nmissing = "refuse"'
        for n in digits.PIXELS
    )
    people = "\n".join(
        f'[[participants]]\nentity_code = "91310000MA1HAND{i:03d}"\ndata_set = "digits-{i}"\nfloor_fen = 0'
        for i in range(ENTERPRISES)
    )
    classes = ", ".join(f'"{d}"' for d in range(10))
    template.write_text(
        f"""
title = "Digits by hand"
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
rounds = 3
local_steps = 6
learning_rate = 4
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
deadline_seconds = 120
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
""",
        "utf-8",
    )
    made = world.fedpact("contract", "new", str(template), "--validation", str(world.validation))
    contract_id = made["contract_id"]
    world.fedpact("contract", "offer", contract_id)
    world.fedpact("contract", "sign", contract_id, "--yes", "--passphrase-file", str(world.passphrase))
    early = world.fedpact("run", "start", contract_id, ok=(2,))
    assert early["error"]["code"] == "CONTRACT_NOT_SIGNED"
    for index in range(ENTERPRISES):
        world.agent(index, "sign", contract_id, "--yes", "--passphrase-file", str(world.passphrase))
    return contract_id


def check_the_port(world: World) -> None:
    """From another host: Fleet, health and our API answer; everything else is 403, other ports do not exist."""
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
    for port in (22, world.port + 1, 53):
        line = world.net.within(0, sys.executable, "-c", program, world.net.operator, str(port))
        assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip() == "shut"


def test_three_enterprises_on_hosts_of_their_own(tmp_path) -> None:
    port = free_port()
    with hosts(ENTERPRISES, port) as net:
        world = World(tmp_path, net, port)
        try:
            play(world)
        finally:
            world.stop()
    assert mentioning(str(tmp_path)) == {}


def play(world: World) -> None:
    world.run(
        [
            *(str(BIN / "fedpact"), "init", "--home", str(world.operator), "--name", "Operator"),
            *("--entity-code", "91310000MA1HAND999", "--host", world.net.operator, "--port", str(world.port)),
            *("--passphrase-file", str(world.passphrase)),
        ]
    )
    serve = [str(BIN / "fedpact"), "serve", "--home", str(world.operator)]
    server = world.start(serve, "operator.log")
    world.wait(lambda: ask(world, 0, "GET", "/health") == "200")
    check_the_port(world)
    for index in range(ENTERPRISES):
        join(world, index)
    used = world.run(
        world.net.within(
            1,
            *(str(BIN / "fedpact-agent"), "enrol", str(world.folder / "invitation0.json")),
            *("--home", str(world.home(1)), "--passphrase-file", str(world.passphrase)),
        ),
        ok=(1, 2, 5),
    )
    assert used["error"]["code"].startswith(("ENROLMENT_", "INVITATION_", "ENROLLED_", "ALREADY_")), used
    contract_id = make_contract(world)
    for index in range(ENTERPRISES):
        line = world.net.within(index, str(BIN / "fedpact-agent"), "start", "--home", str(world.home(index)))
        world.start(line, f"agent{index}.log")
    world.fedpact("run", "start", contract_id)
    world.wait(lambda: world.fedpact("run", "status", contract_id)["round"] >= 2, 120)
    kill_the_server(world, server)
    server = world.start(serve, "operator.log")
    done = world.fedpact("run", "follow", contract_id, "--seconds", "240")
    assert done["phase"] == "completed"
    closed = world.fedpact("settle", "close", contract_id, "--revenue", "12345.67", "--wait", "60")
    assert closed["final"]
    assert sum(line["fen"] for line in closed["lines"]) == 1_234_567
    for index in range(ENTERPRISES):
        statement = world.agent(index, "statement", contract_id, ok=(0, 4))
        assert statement
        states = world.agent(index, "budget")["data_sets"]
        assert states
        rows = json.dumps(states)
        assert "failed" not in rows
    evidence = world.folder / "evidence"
    world.fedpact("evidence", contract_id, "--out", str(evidence))
    verified = world.run([str(BIN / "fedpact"), "verify", str(evidence)], ok=(3,))
    assert verified["faults"] == []
    # Killed in the middle of a round, the operator lost nothing and nobody was charged twice.
    for index in range(ENTERPRISES):
        charged = world.agent(index, "egress", "--contract", contract_id)["egress"]
        sent = {(e["round"], e["sha256"]) for e in charged if e["kind"] == "update"}
        assert len({number for number, _ in sent}) == len(sent) == 3, "one update a round, whatever was sent again"


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
