"""What leaves an enterprise: the egress ledger against what arrived, against the wire, and against planted rows.

One real federation on hosts of their own, whom nothing holds back: whatever an agent tries is on its wire. The operator
writes down all that arrives (tests/launchers/serve_recording.py). One enterprise's file goes bad after it signed. Then
the operator cheats: it rewrites its log before the close, and has Flower carry another bundle.

Beside the ledger's messages an agent sends Flower's own calls (`FLEET`): node number, ids of messages and objects, and
headers. They are no part of the ledger; their kinds, forms and volume are held here.
"""

import base64
import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from flwr.app import Message
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from tests.support.contract_kit import a_year_from_now
from tests.support.netns import Hosts, hosts
from tests.support.proc import mentioning

from fedpact_client.store import EgressEntry, EgressKind, Store
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import Data
from fedpact_contract.keys import load_key
from fedpact_contract.log import Checkpoint, Entry
from fedpact_contract.record import read_envelope, sign
from fedpact_models.features import encode
from fedpact_server import db, logbook, shell
from fedpact_server.demo.processes import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.root]
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
PASSPHRASE = "correct horse battery staple"
ENTERPRISES, ROUNDS, ROWS = 4, 2, 60
SPOILED = ENTERPRISES - 1
"""Whose file goes bad: a cell that is no number, and a column of the contract that holds text."""
PATIENT, BAD_CELL = "Zhang-Canary-4471", "not-a-number-7719"
RAN = "CODE-OF-THE-BUNDLE-RAN"

FLEET = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "get-run": run_pb2.GetRunRequest,
    "get-fab": GetFabRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "push-object": message_pb2.PushObjectRequest,
}
"""Flower's calls: every one that may arrive, with its form."""
PUSHES = {"push-messages", "push-object"}
CALL_BYTES = 256
"""The longest body of a call of Flower's that carries nothing of ours: numbers and digests."""
HEADERS = {
    *("host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"),
    *("fedpact-node", "fedpact-date", "fedpact-signature"),
    *("flwr-public-key", "flwr-timestamp", "flwr-signature"),
    *("flwr-component-name", "flwr-package-name", "flwr-package-version"),
}
AGENTS = {"fedpact-agent", f"python-httpx/{httpx.__version__}"}


@dataclass(frozen=True)
class Arrived:
    """One request at the operator, after TLS."""

    peer: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def size(self) -> int:
        """Bytes of HTTP/1.1."""
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{n}: {v}" for n, v in self.headers.items()), "", ""]
        return len("\r\n".join(lines)) + len(self.body)

    @property
    def call(self) -> str | None:
        """Which call of Flower's it is; none of another's."""
        return self.path.removeprefix("/v1/fleet/") if self.path.startswith("/v1/fleet/") else None


@dataclass
class World:
    """An operator on this machine and enterprises on hosts of their own."""

    folder: Path
    net: Hosts
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    contract_id: str = ""

    @property
    def operator(self) -> Path:
        return self.folder / "operator"

    @property
    def record(self) -> Path:
        return self.folder / "arrived.jsonl"

    def home(self, index: int) -> Path:
        return self.folder / f"enterprise{index}" / "agent"

    def data(self, index: int) -> Path:
        return self.folder / f"data{index}" / "rows.csv"

    def address(self, index: int) -> str:
        return self.net.operator.rpartition(".")[0] + f".{10 + index}"

    def run(self, line: list[str], ok: tuple[int, ...] = (0,)) -> Any:
        env = {k: v for k, v in os.environ.items() if not k.startswith("FEDPACT_")}
        done = subprocess.run(line, capture_output=True, text=True, timeout=180, env=env, check=False)
        assert done.returncode in ok, (line, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def fedpact(self, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        return self.run([str(BIN / "fedpact"), *arguments, "--home", str(self.operator), "--json"], ok)

    def agent(self, index: int, *arguments: str, ok: tuple[int, ...] = (0,)) -> Any:
        line = [str(BIN / "fedpact-agent"), *arguments, "--home", str(self.home(index)), "--json"]
        return self.run(self.net.within(index, *line), ok)

    def each(self, *arguments: str) -> list[Any]:
        with ThreadPoolExecutor(ENTERPRISES) as pool:
            return list(pool.map(lambda index: self.agent(index, *arguments), range(ENTERPRISES)))

    def start(self, name: str, line: list[str], **environment: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as out:
            self.running[name] = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=os.environ | environment,
            )

    def serve(self, **environment: str) -> None:
        launcher = str(ROOT / "tests" / "launchers" / "serve_recording.py")
        self.start("operator", [sys.executable, launcher, str(self.operator), str(self.record)], **environment)
        self.wait(lambda: self._answers(), 90)

    def start_agents(self) -> None:
        for index in range(ENTERPRISES):
            line = [str(BIN / "fedpact-agent"), "start", "--home", str(self.home(index))]
            self.start(f"agent{index}", self.net.within(index, *line))

    def listen(self) -> None:
        """Begin to count the packets of every host."""
        for index in range(ENTERPRISES):
            program = str(ROOT / "tests" / "support" / "capture.py")
            out = str(self.folder / f"capture{index}.json")
            self.start(f"capture{index}", self.net.within(index, sys.executable, program, out))
        logs = [self.folder / f"capture{index}.log" for index in range(ENTERPRISES)]
        self.wait(lambda: all(log.read_bytes() == b"listening\n" for log in logs))

    def wait(self, what: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"still waiting; logs in {self.folder}"
            time.sleep(0.3)

    def stop(self, *names: str) -> None:
        processes = [self.running.pop(name) for name in names or tuple(self.running)]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _answers(self) -> bool:
        from fedpact_server.demo.run import _answers

        return _answers(self.operator, self.port)

    def arrived(self) -> list[Arrived]:
        found = []
        for line in self.record.read_text().splitlines():
            value = json.loads(line)
            value["headers"] = dict(value["headers"])
            found.append(Arrived(**(value | {"body": base64.b64decode(value["body"])})))
        return found

    def ledger(self, index: int) -> list[EgressEntry]:
        with Store(self.home(index) / "agent.db", read_only=True) as store:
            return [entry for entry in store.egress() for _ in range(entry.times)]

    def outcomes(self, contract_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.fedpact("run", "status", contract_id)["outcomes"]
        return found

    # Set-up, by the public commands

    def begin(self) -> None:
        secret = ("--passphrase-file", str(self.folder / "passphrase"))
        (self.folder / "passphrase").write_text(PASSPHRASE)
        (self.folder / "passphrase").chmod(0o600)
        self.fedpact(
            *("init", "--name", "Operator", "--entity-code", "91310000MA1EGRES99", "--host", self.net.operator),
            *("--port", str(self.port), *secret),
        )
        self.serve()
        self.listen()
        for index in range(ENTERPRISES):
            self.data(index).parent.mkdir()
            self.data(index).write_text(rows(index))
        (self.folder / "validation.csv").write_text(rows(ENTERPRISES))
        with ThreadPoolExecutor(ENTERPRISES) as pool:
            list(pool.map(self._join, range(ENTERPRISES)))

    def _join(self, index: int) -> None:
        secret = ("--passphrase-file", str(self.folder / "passphrase"))
        name, invitation = f"Hospital {index}", self.folder / f"invitation{index}.json"
        made = self.agent(
            index, *("init", "--name", name, "--entity-code", code(index), "--sector", "medical"), *secret
        )
        config = self.home(index) / "agent.toml"
        text = config.read_text("utf-8").replace("purposes = []", 'purposes = ["disease-prediction"]')
        text = text.replace("threads = 2", "threads = 1").replace("poll_seconds = 5", "poll_seconds = 1")
        text += (
            f'\n[[data_sets]]\nid = "set-{index}"\nnum_examples = 40\nepsilon = 8\ndelta = 0.00001\n'
            f'columns = ["age", "dose", "sex"]\nlabel = "ill"\n[data_sets.source]\npath = "{self.data(index)}"\n'
            'kind = "csv"\n'
        )
        config.write_text(text, "utf-8")
        self.fedpact(
            *("participant", "invite", "--name", name, "--entity-code", code(index)),
            *("--sector", "medical", "--out", str(invitation)),
        )
        self.agent(index, "enrol", str(invitation), *secret)
        self.fedpact("participant", "approve", made["participant"], "--fingerprint", made["participant"])
        self.agent(index, "card", f"set-{index}", "--yes", *secret)

    def sign(self, title: str) -> str:
        """A contract that everybody has signed."""
        secret = ("--yes", "--passphrase-file", str(self.folder / "passphrase"))
        template = self.folder / f"{title}.toml"
        template.write_text(TEMPLATE.replace("Heart", title), "utf-8")
        validation = str(self.folder / "validation.csv")
        made = str(self.fedpact("contract", "new", str(template), "--validation", validation)["contract_id"])
        self.fedpact("contract", "offer", made)
        self.fedpact("contract", "sign", made, *secret)
        self.each("sign", made, *secret)
        return made


def code(index: int) -> str:
    return f"91310000MA1EGRES{index:02d}"


def cells(index: int) -> list[tuple[float, float]]:
    """Age and dose of each row: numbers that are nowhere else."""
    random = np.random.default_rng(4242 + index)
    ages, doses = random.uniform(20, 90, ROWS), random.uniform(1, 9, ROWS)
    return [(round(float(a), 11), round(float(d), 12)) for a, d in zip(ages, doses, strict=True)]


def rows(index: int) -> str:
    """One enterprise's file, with a column that the contract does not name."""
    lines = [
        f"{PATIENT}-{index}-{number},{age},{dose},{'fm'[number % 2]},{('no', 'yes')[age > 55]}"
        for number, (age, dose) in enumerate(cells(index))
    ]
    return "\n".join(["patient,age,dose,sex,ill", *lines, ""])


TEMPLATE = f"""
title = "Heart"
purpose = "disease-prediction"
[data]
feature_scale = 1
[[data.columns]]
name = "age"
kind = "number"
low = 0
high = 100
missing = "refuse"
[[data.columns]]
name = "dose"
kind = "number"
low = 0
high = 10
missing = "refuse"
[[data.columns]]
name = "sex"
kind = "category"
values = ["f", "m"]
missing = "refuse"
[data.label]
name = "ill"
classes = ["no", "yes"]
rule = "value"
[model]
kind = "softmax"
hidden = []
[training]
rounds = 2
local_steps = 3
learning_rate = 0.5
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
missed_rounds_limit = 3
[contribution]
game = "fixed-weight"
loss = "cross-entropy"
estimator = "exact"
[settlement]
currency = "CNY"
contribution_weight = 0.7
data_weight = 0.2
equal_weight = 0.1
fallback = "metered"
close_days = 7
[term]
not_before = "2026-01-01T00:00:00Z"
not_after = "{a_year_from_now()}"
""" + "".join(
    f'[[participants]]\nentity_code = "{code(i)}"\ndata_set = "set-{i}"\nfloor_fen = 0\n' for i in range(ENTERPRISES)
)


DATA = Data.parse(
    {
        "columns": [
            {"name": "age", "kind": "number", "low": "0", "high": "100", "missing": "refuse"},
            {"name": "dose", "kind": "number", "low": "0", "high": "10", "missing": "refuse"},
            {"name": "sex", "kind": "category", "values": ["f", "m"], "missing": "refuse"},
        ],
        "label": {"name": "ill", "classes": ["no", "yes"], "rule": "value"},
        "feature_scale": "1",
    },
    code="TEST",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The run is completed, every agent has ended; the operator still serves."""
    folder, port = tmp_path_factory.mktemp("egress"), free_port()
    with hosts(ENTERPRISES, port, kept=False) as net:
        made = World(folder, net, port)
        try:
            made.begin()
            made.contract_id = made.sign("Heart")
            spoiled = made.data(SPOILED).read_text().splitlines()
            spoiled[7] = f"{PATIENT}-x,{BAD_CELL},{BAD_CELL},f,yes"
            made.data(SPOILED).write_text("\n".join([*spoiled, ""]))
            made.start_agents()
            made.fedpact("run", "start", made.contract_id)
            assert made.fedpact("run", "follow", made.contract_id, "--seconds", "240")["phase"] == "completed"
            made.stop(*(f"agent{index}" for index in range(ENTERPRISES)))
            made.stop(*(f"capture{index}" for index in range(ENTERPRISES)))
            yield made
        finally:
            made.stop()
    assert mentioning(str(folder)) == {}, "no orphan"


# What arrived


def replies(arrived: Sequence[Arrived]) -> list[bytes]:
    """What the agent's Flower messages hold, decoded: the bytes of each reply with its array, or an error's text."""
    contents: dict[str, bytes] = {}
    for each in arrived:
        if each.call == "push-object":
            pushed = message_pb2.PushObjectRequest.FromString(each.body)
            contents[pushed.object_id] = pushed.object_content
    found, owned = [], set()
    for each in arrived:
        if each.call != "push-messages":
            continue
        request = fleet_pb2.PushMessagesRequest.FromString(each.body)
        assert list(request.clientapp_runtime_list) == [0.0], "for how long it ran depends on the rows"
        (message,), (tree,) = request.messages_list, request.message_object_trees
        assert message.content.ByteSize() == 0, "what a message holds is in its objects"
        if message.HasField("error"):
            found.append(message.error.reason.encode())
            assert message.error.code == 2
        owned |= {each.object_id for each in iterate_object_tree(tree)}
        inflated = inflate_object_from_contents(tree.object_id, {i: contents[i] for i in owned & contents.keys()})
        assert isinstance(inflated, Message)
        if inflated.has_content():
            found.append(_held(inflated))
    assert contents.keys() <= owned, "every object is part of a message"
    return found


def _held(message: Message) -> bytes:
    records = dict(message.content)
    config = records.pop("reply")
    values = dict(config)
    reply, array = values.pop("reply"), values.pop("update", b"")
    for name, record in records.items():
        assert name == "update"
        (array,) = (each.data for each in record.values())
    assert not values
    return bytes(reply) + bytes(array)


def test_the_ledger_is_what_arrived_byte_for_byte(world: World) -> None:
    """Of each enterprise, from `enrol` to its last request: nothing arrived that is not entered, and the reverse."""
    everything, kinds = world.arrived(), set()
    for index in range(ENTERPRISES):
        mine = [each for each in everything if each.peer == world.address(index)]
        ours = Counter(
            (f"{each.method} {each.path}", len(each.body), sha256_hex(each.body)) for each in mine if each.call is None
        )
        flowers = Counter(("", len(body), sha256_hex(body)) for body in replies(mine))
        ledger = world.ledger(index)
        by_flower = {EgressKind.UPDATE, EgressKind.REFUSAL, EgressKind.NO_REPLY}
        entered = Counter((e.detail if e.kind not in by_flower else "", e.size, e.sha256) for e in ledger)
        assert ours + flowers == entered
        kinds |= {e.kind for e in ledger}
        assert [e.round for e in ledger if e.kind in by_flower] == [1, 2]
        assert {e.kind for e in ledger if e.kind in by_flower} == {
            EgressKind.REFUSAL if index == SPOILED else EgressKind.UPDATE
        }
    assert kinds >= {EgressKind.ENROLMENT, EgressKind.CARD, EgressKind.SIGNATURE, EgressKind.REQUEST}
    assert {each.peer for each in everything} <= {world.address(i) for i in range(ENTERPRISES)} | {
        world.net.operator,
        "127.0.0.1",
    }


def test_of_flowers_own_calls_each_is_known_and_holds_numbers_alone(world: World) -> None:
    for each in world.arrived():
        assert "content-encoding" not in each.headers, "what was scanned is what there is"
        if each.call is None:
            assert each.path.startswith("/fedpact/v1/") or each.path == "/health", each.path
            continue
        form = FLEET[each.call].FromString(each.body)
        plain = form.SerializeToString(deterministic=True)
        form.DiscardUnknownFields()
        assert form.SerializeToString(deterministic=True) == plain, "no field that this form has not"
        assert each.call in PUSHES or len(each.body) <= CALL_BYTES, each.call


def test_headers_say_nothing_of_the_machine(world: World) -> None:
    names, agents = set(), set()
    for each in world.arrived():
        if each.peer in {world.address(i) for i in range(ENTERPRISES)}:
            names |= each.headers.keys()
            agents.add(each.headers.get("user-agent", ""))
    assert names == HEADERS
    assert agents == AGENTS


# The wire


def test_the_wire_shows_one_port_of_one_address(world: World) -> None:
    for index in range(ENTERPRISES):
        found = json.loads((world.folder / f"capture{index}.json").read_text())
        assert found["lost"] == 0
        outside = [flow for flow in found["flows"] if flow[0] == "eth0" and flow[2] != "arp"]
        outside = [flow for flow in outside if flow[1] or flow[2] != "ipv6"]  # the bridge's own multicast comes in
        there = ["tcp", world.address(index), world.net.operator, world.port]
        back = ["tcp", world.net.operator, world.address(index), world.port]
        assert sorted(flow[1:6] for flow in outside) == [[False, *back], [True, *there]], "one port; no DNS; no other"
        assert not [flow for flow in outside if not flow[1] and flow[8]], "nobody opens a connection to an agent"
        inside = [flow for flow in found["flows"] if flow[0] == "lo"]
        assert {(flow[2], flow[3], flow[4]) for flow in inside} == {("tcp", "127.0.0.1", "127.0.0.1")}
        assert not [flow for flow in inside if flow[5] in (53, 853)]


def test_the_volume_is_the_ledgers_with_a_stated_overhead(world: World) -> None:
    """Bytes above TCP that left: the messages, HTTP's headers and Flower's calls, and TLS."""
    for index in range(ENTERPRISES):
        found = json.loads((world.folder / f"capture{index}.json").read_text())
        (flow,) = (flow for flow in found["flows"] if flow[0] == "eth0" and flow[1] and flow[2] == "tcp")
        left, opened = flow[7], flow[8]
        mine = [each for each in world.arrived() if each.peer == world.address(index)]
        http, entered = sum(each.size for each in mine), sum(e.size for e in world.ledger(index))
        assert http <= left <= http + 100 * len(mine) + 1500 * opened, "TLS: records, and a handshake a connection"
        bodies = sum(len(each.body) for each in mine if each.call in PUSHES or each.call is None)
        assert entered <= bodies <= entered + 4096 * sum(e.kind is not EgressKind.REQUEST for e in world.ledger(index))
        assert http <= bodies + (CALL_BYTES + 1024) * len(mine)


# Planted rows


def needles(index: int) -> dict[str, bytes]:
    """One row of an enterprise in every form in which it might leave; of float32 two neighbours, against chance."""
    age, dose = cells(index)[3]
    line = rows(index).splitlines()[4]
    table = pl.DataFrame({"age": [age], "dose": [dose], "sex": ["m"], "ill": ["yes"]})
    x = encode(DATA, table, file="x").x[0]
    found = {"line": line.encode(), "patient": f"{PATIENT}-{index}".encode()}
    for name, values in (("raw", [age, dose]), ("encoded", [float(v) for v in x[:2]])):
        for order in "<>":
            found[f"{name} f4{order}"] = struct.pack(f"{order}2f", *values)
            for number, value in enumerate(values):
                found[f"{name} f8{order} {number}"] = struct.pack(f"{order}d", value)
        for number, value in enumerate(values):
            found[f"{name} text {number}"] = f"{value:.9f}"[:9].encode()
    for name, data in list(found.items()):
        found[f"{name}, hex"], found[f"{name}, HEX"] = data.hex().encode(), data.hex().upper().encode()
        for shift in range(3):
            text = base64.b64encode(bytes(shift) + data + b"\0\0")
            inner = text[4 if shift else 0 : (shift + len(data)) // 3 * 4]
            found[f"{name}, base64 {shift}"] = inner
            found[f"{name}, base64url {shift}"] = inner.replace(b"+", b"-").replace(b"/", b"_")
    return {name: data for name, data in found.items() if len(data) >= 7}


def planted() -> dict[str, bytes]:
    found = {f"{index} {name}": data for index in range(ENTERPRISES) for name, data in needles(index).items()}
    return found | {"bad cell": BAD_CELL.encode(), "patient": PATIENT.encode()}


def within(data: bytes, wanted: dict[str, bytes]) -> list[str]:
    return [name for name, needle in wanted.items() if needle in data]


def test_planted_rows_are_found_where_they_are() -> None:
    """That the search finds each form: in the file itself, and in made-up messages."""
    age, dose = cells(1)[3]
    mine = needles(1)
    assert {"line", "patient", "raw text 0", "raw text 1"} <= set(within(rows(1).encode(), mine))
    for order in "<>":
        packed = struct.pack(f"{order}2d", age, dose)
        assert {f"raw f8{order} 0", f"raw f8{order} 1"} <= set(within(b"x" + packed, mine))
        for shift in range(3):
            text = base64.b64encode(b"q" * shift + packed + b"q")
            assert f"raw f8{order} 0, base64 {shift}" in within(text, mine)
        assert f"raw f8{order} 0, hex" in within(packed.hex().encode(), mine)
        assert f"raw f4{order}" in within(struct.pack(f"{order}2f", age, dose), mine)


def test_planted_rows_appear_nowhere(world: World) -> None:
    """Not in what arrived, decoded; nor in a log, a database or a file of anybody's home. The data lie elsewhere."""
    wanted, everything = planted(), world.arrived()
    seen = b"\n".join(each.body + repr((each.path, each.headers)).encode() for each in everything)
    decoded = b"\n".join(
        b for index in range(ENTERPRISES) for b in replies([e for e in everything if e.peer == world.address(index)])
    )
    assert len(decoded) > 10_000
    assert within(seen, wanted) == []
    assert within(decoded, wanted) == []
    files = [path for path in world.folder.rglob("*") if path.is_file() and not path.parent.name.startswith("data")]
    files = [path for path in files if path.name != "validation.csv"]
    names = {path.name for path in files}
    assert {
        "agent.db",
        "operator.db",
        "operator.log",
        "agent0.log",
        "trainer.log",
        "executor.log",
        "coordinator.log",
    } <= names
    found = {str(path): where for path in files if (where := within(path.read_bytes(), wanted))}
    assert found == {}


def test_a_bad_cell_is_named_at_home_alone_and_only_a_fixed_code_leaves(world: World) -> None:
    status = world.agent(SPOILED, "status", "--offline")
    (alarm,) = {(a["code"], a["contract"]) for a in status["alarms"]}
    assert alarm == ("DATA_NOT_A_NUMBER", world.contract_id)
    (outcome,) = {tuple(o.items()) for p, o in world.outcomes(world.contract_id).items() if p == status["participant"]}
    assert dict(outcome) == {"outcome": "refused", "code": "TRAINING_FAILED"}
    seen = b"\n".join(each.body for each in world.arrived())
    assert b"DATA_NOT_A_NUMBER" not in seen
    assert b"dose" not in b"".join(replies([e for e in world.arrived() if e.peer == world.address(SPOILED)]))


# A dishonest operator


def rewrite_the_log(world: World) -> int:
    """Another salt in an entry that everybody has seen, and every later checkpoint signed anew; the entry's index."""
    database = db.Database.in_home(world.operator)
    key = load_key(world.operator / "keys" / "run" / f"{world.contract_id}.key")
    with database.write() as connection:
        entries = logbook.read_entries(connection, world.contract_id)
        index = next(i for i, entry in enumerate(entries) if entry.type == "update-decided")
        entries[index] = Entry.of(entries[index].open())
        place = sa.and_(db.entries.c.contract_id == world.contract_id, db.entries.c.position == index)
        new = {"data": entries[index].to_bytes(), "leaf_hash": entries[index].leaf_hash}
        connection.execute(db.entries.update().where(place).values(**new))
        hashes = [entry.leaf_hash for entry in entries]
        for size in logbook.signed_checkpoints(connection, world.contract_id):
            if size <= index:
                continue
            record = Checkpoint(origin=world.contract_id, size=size, root=logbook.root_of(hashes[:size]))
            where = sa.and_(db.checkpoints.c.contract_id == world.contract_id, db.checkpoints.c.size == size)
            connection.execute(db.checkpoints.update().where(where).values(envelope=sign(record, key).to_bytes()))
            connection.execute(db.countersignatures.delete().where(db.countersignatures.c.size == size))
    database.dispose()
    return index


def test_a_log_that_was_rewritten_before_the_close_is_objected_to(world: World) -> None:
    """By everybody, over the real processes: nobody countersigns, and each can show the head that it holds."""
    held = [head for heads in world.each("head", world.contract_id) for head in heads["heads"]]
    world.stop("operator")
    rewrite_the_log(world)
    world.serve()
    world.start_agents()
    closed = world.fedpact("settle", "close", world.contract_id, "--revenue", "1000.00", "--wait", "60", ok=(4,))
    assert not closed["final"]
    paid = [line for line in closed["lines"] if line["fen"]]
    assert paid
    assert all(line["objected"] for line in paid)
    for index in range(ENTERPRISES):
        world.wait(lambda index=index: "HEAD_ROOT" in alarms(world, index, world.contract_id))
        sent = {e.kind for e in world.ledger(index)}
        assert EgressKind.OBJECTION in sent
        assert EgressKind.COUNTERSIGNATURE not in sent
    assert [head for heads in world.each("head", world.contract_id) for head in heads["heads"]] == held
    with contextlib.closing(db.Database.in_home(world.operator).engine.raw_connection()) as raw:
        rows_there = raw.execute("SELECT size, envelope FROM checkpoints").fetchall()
    theirs = {size: Checkpoint.from_bytes(read_envelope(data).body).root for size, data in rows_there}
    assert all(theirs[head["size"]] != head["root"] for head in held), "by telephone it is noticed at once"


def alarms(world: World, index: int, contract_id: str) -> set[str]:
    status = world.agent(index, "status", "--offline")
    return {alarm["code"] for alarm in status["alarms"] if alarm["contract"] == contract_id}


def hostile_bundle() -> bytes:
    """Flower's application with much that would run where it is unpacked, or where Python starts beside it."""
    own = shell.resources.files(shell)
    marks = f"import os\nos.write(2, b'{RAN} ' + os.readlink('/proc/self/ns/net').encode() + b'\\n')\n".encode()
    files = {name: own.joinpath(name).read_bytes() for name in shell.FILES}
    return shell.bundle(
        files
        | {
            "fedpact_shell/client.py": marks + files["fedpact_shell/client.py"],
            "fedpact_client/__init__.py": marks,
            "fedpact_client/trainer.py": marks,
            "fedpact_client/executor.py": marks,
            "sitecustomize.py": marks,
            "usercustomize.py": marks,
            "conftest.py": marks,
            "hostile.pth": b"import sitecustomize\n",
            "hostile-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n",
            "hostile-1.0.dist-info/entry_points.txt": b"[fedpact.commands]\nx = sitecustomize\n",
        }
    )


def test_a_hostile_bundle_trains_no_batch_and_is_refused_on_both_sides(world: World, tmp_path: Path) -> None:
    world.data(SPOILED).write_text(rows(SPOILED))  # that nothing but the bundle is in the way
    contract_id = world.sign("Lungs")
    world.stop("operator")
    (tmp_path / "bundle").write_bytes(hostile_bundle())
    world.serve(FEDPACT_TEST_BUNDLE=str(tmp_path / "bundle"))
    trained = [trainings(world, index) for index in range(ENTERPRISES)]
    assert trained == [ROUNDS] * SPOILED + [0]
    world.fedpact("run", "start", contract_id)
    refused = {"outcome": "refused", "code": "CODE_BUNDLE_MISMATCH"}
    world.wait(lambda: list(world.outcomes(contract_id).values()).count(refused) == ENTERPRISES, 180)
    for index in range(ENTERPRISES):
        assert "CODE_BUNDLE_MISMATCH" in alarms(world, index, contract_id)
        assert trainings(world, index) == trained[index]
        with Store(world.home(index) / "agent.db", read_only=True) as store:
            assert [row for row in store.rows(f"set-{index}") if row.contract_id == contract_id] == []
            assert {e.kind for e in store.egress() if e.contract_id == contract_id and e.round} == {EgressKind.REFUSAL}
        texts = [path for path in world.home(index).rglob("*") if path.is_file()]
        texts.append(world.folder / f"agent{index}.log")
        assert [str(path) for path in texts if RAN.encode() in path.read_bytes()] == []
        assert not [path for path in texts if "fedpact_shell" in str(path) or "hostile" in str(path)]
    assert list((world.operator / "flower").rglob("sitecustomize.py")), "the operator did unpack it"


def trainings(world: World, index: int) -> int:
    """How often the enterprise's trainer has trained, by its own log."""
    return len(re.findall(r"\btrained\b", (world.home(index) / "logs" / "trainer.log").read_text()))
