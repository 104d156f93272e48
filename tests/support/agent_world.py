"""A small world for the agent's tests: keys, contracts, a home, an operator behind a mock transport. No tests here."""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.testclient import TestClient
from tests.support.contract_kit import change, party, plain_contract
from tests.support.operator_world import PASSPHRASE as OPERATOR_PASSPHRASE
from tests.support.operator_world import TEMPLATE, Operator, enterprise, operator

from fedpact_client import cards
from fedpact_client.api import OperatorClient, egress_of
from fedpact_client.enrol import Enrolled, enrol
from fedpact_client.home import AgentHome, init
from fedpact_client.store import Store
from fedpact_contract.contract import Contract
from fedpact_contract.files import replace_file
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.privacy import solve_noise_multiplier
from fedpact_contract.request import instant, utc_now
from fedpact_server import contracts, enrolment
from fedpact_server.api import create_api
from fedpact_server.api_closing import router as closing_router
from fedpact_server.api_edge import Limits
from fedpact_server.api_leaving import router as leaving_router
from fedpact_server.api_measurements import router as measurements_router
from fedpact_server.api_questions import router as questions_router
from fedpact_server.drafting import ValidationFile
from fedpact_server.drafting import new as draft_contract

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
ENTITY = "91310000MA1K000001"
OWN_CODE, OPERATOR_CODE = "91310000MA1K000000", "91310000MA1K999999"


@functools.cache
def key(name: str) -> Ed25519PrivateKey:
    """One key a name, as long as the tests run."""
    return generate_key()


@functools.cache
def noise(epsilon: str, delta: str, rate: str, steps: int) -> Decimal:
    return solve_noise_multiplier(Decimal(epsilon), Decimal(delta), Decimal(rate), steps)


def contract_values(own_public: str | None = None, **own: Any) -> dict[str, Any]:
    """A whole contract as plain values: `own` changes this enterprise's entry."""
    public = own_public or public_hex(key("own"))
    entries = [
        party("own", OWN_CODE, public, "set-own", 40) | own,
        party("beta", "91310000MA1K000002", public_hex(key("beta")), "set-beta", 40),
        party("gamma", "91310000MA1K000003", public_hex(key("gamma")), "set-gamma", 40, sector="finance"),
    ]
    return plain_contract(
        entries,
        public_hex(key("operator")),
        title="Heart disease",
        purpose="disease-prediction",
        operator__name="City Data",
        operator__entity_code=OPERATOR_CODE,
        data={
            "columns": [
                {"name": "age", "kind": "number", "low": "0", "high": "100", "missing": "drop"},
                {"name": "sex", "kind": "category", "values": ["f", "m"], "missing": "refuse"},
            ],
            "label": {"name": "ill", "classes": ["no", "yes"], "rule": "value"},
            "feature_scale": "1",
        },
        training__rounds=4,
        training__local_steps=2,
        privacy__sample_rate="0.2",
        privacy__noise_multiplier=str(noise("2", "0.00001", "0.2", 10)),
        participation__minimum=3,
        term__not_before="2026-11-01T00:00:00Z",
    )


def contract(own_public: str | None = None, changes: dict[str, Any] | None = None, **own: Any) -> Contract:
    """A contract; `changes` are dotted paths to other values."""
    return Contract.parse(change(contract_values(own_public, **own), changes or {}, "."))


PASSPHRASE = b"correct horse"
FREE = Limits(address=(10**6, 1e6), node=(10**6, 1e6), enrol=(10**6, 1e6))
ROWS = "age,sex,ill\n" + "".join(f"{20 + i},{'fm'[i % 2]},{('no', 'yes')[i % 3 == 0]}\n" for i in range(60))
DATA_SET = """
[[data_sets]]
id = "set-1"
num_examples = 40
epsilon = 8
delta = 0.00001
columns = ["age", "sex"]
label = "ill"
[data_sets.source]
path = "rows.csv"
kind = "csv"

"""


class Wire(httpx.BaseTransport):
    """The operator's real API instead of a network; keeps what was sent, and can be cut."""

    def __init__(self, world: Operator) -> None:
        routers = [closing_router, leaving_router, measurements_router, questions_router]
        app = create_api(world.home, world.database, routers=routers, limits=FREE, now=utc_now)
        self._inner = TestClient(app)._transport
        self.sent: list[httpx.Request] = []
        self.cut_before = self.cut_after = ""
        self.replace: dict[str, Callable[[bytes], bytes]] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        what = f"{request.method} {request.url.path.removeprefix('/fedpact/v1')}"
        if self.cut_before and self.cut_before in what:
            raise httpx.ConnectError("cut")
        self.sent.append(request)
        response = self._inner.handle_request(request)
        if self.cut_after and self.cut_after in what:
            raise httpx.ReadError("cut")
        content = b"".join(response.stream)
        for part, rewrite in self.replace.items():
            if part in what:
                content = rewrite(content)
        headers = {k: v for k, v in response.headers.items() if k != "content-length"}
        return httpx.Response(response.status_code, headers=headers, stream=httpx.ByteStream(content))

    def paths(self) -> list[str]:
        return [f"{r.method} {r.url.path.removeprefix('/fedpact/v1')}" for r in self.sent]


@dataclass(frozen=True)
class Lab:
    """An operator, the wire to it, and one agent's home with its store."""

    world: Operator
    wire: Wire
    home: AgentHome
    store: Store

    def client(self) -> OperatorClient:
        node_key = self.home.load_node_key()
        egress = egress_of(self.store)
        return OperatorClient("https://fl.example.cn:8443", self.world.home.ca_pem(), node_key, egress, self.wire)

    def invitation(self, **changes: Any) -> Path:
        made = enrolment.invite(
            self.world.home,
            self.world.database,
            name="Hospital 1",
            entity_code=ENTITY,
            sector="medical",
            now=utc_now(),
            replace=True,
        )
        path = self.home.path.parent / "invitation.json"
        path.write_text(json.dumps(made.plain() | changes, indent=2))
        return path

    def enrol(self) -> Enrolled:
        return enrol(self.home, self.invitation(), PASSPHRASE, egress_of(self.store), transport=self.wire)

    def approve(self) -> None:
        mine = self.home.participant_id
        enrolment.approve(self.world.database, selector=ENTITY, fingerprint=mine, now=utc_now())

    def configure(self, *, data_set: str = DATA_SET, rows: str = ROWS, **policy_lines: str) -> None:
        """Write rows, a data set, and a policy that allows the contract below."""
        (self.home.path / "rows.csv").write_text(rows)
        lines = {"purposes": '["disease-prediction"]'} | policy_lines
        text = self.home.config_path.read_text()
        text = text.replace("[policy]\n", data_set + "[policy]\n", 1) if data_set else text
        for name, value in lines.items():
            text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
        replace_file(self.home.config_path, text.encode())

    def declare(self) -> cards.Draft:
        with self.client() as client:
            draft = cards.prepare(self.home, self.home.config(), self.store, "set-1")
            cards.declare(self.home, self.store, client, draft, PASSPHRASE)
        return draft

    def offer(self, old: str = "", new: str = "", *, released: bool = False) -> Contract:
        """A contract with this agent and two others, offered."""
        for number in (2, 3):
            if enrolment_missing(self.world, enterprise(number).entity_code):
                self.world.admit(enterprise(number))
        path = self.home.path.parent / "validation.csv"
        path.write_text(ROWS)
        now = utc_now()
        template = TEMPLATE.replace("2026-11-01T00:00:00Z", instant(now - datetime.timedelta(days=1)))
        template = template.replace("2099-11-01T00:00:00Z", instant(now + datetime.timedelta(days=30)))
        assert not old or template.count(old) == 1
        template = template.replace(old, new) if old else template
        contract = draft_contract(
            self.world.home, self.world.database, template, ValidationFile(path=path), now=now, released=released
        )
        contracts.offer(self.world.database, contract.id, now=now)
        return contract

    def others_sign(self, contract: Contract) -> None:
        contracts.sign(self.world.home, self.world.database, contract.id, OPERATOR_PASSPHRASE, now=utc_now())
        for who in (enterprise(2), enterprise(3)):
            envelope, delegation = who.signature(contract)
            contracts.accept_signature(
                self.world.home,
                self.world.database,
                contract.id,
                who.id,
                envelope=envelope,
                delegation=delegation,
                now=utc_now(),
            )


def enrolment_missing(world: Operator, entity_code: str) -> bool:
    with world.database.read() as connection:
        return enrolment.by_entity(connection, entity_code) is None


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A fresh operator and a fresh agent."""
    world = operator(folder)
    home = init(folder / "agent", name="Hospital 1", entity_code=ENTITY, sector="medical", passphrase=PASSPHRASE)
    with Store(home.db_path) as store:
        yield Lab(world, Wire(world), home, store)
