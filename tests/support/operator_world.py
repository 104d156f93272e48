"""A small world for tests of the operator: a home, enterprises with keys, cards, a template. No tests here."""

import datetime
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.contract import Contract, Delegation, Software
from fedpact_contract.keys import fingerprint, generate_key, public_hex
from fedpact_contract.messages import DataSetCard, Enrolment, Invitation, SignedEnrolment
from fedpact_contract.record import Envelope, sign
from fedpact_contract.request import node_id, node_public_pem, node_sign, sign_request
from fedpact_server import cards, enrolment
from fedpact_server.db import Database
from fedpact_server.home import OperatorHome, init

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
PASSPHRASE = b"correct horse"
OPERATOR_CODE = "91310000MA1K999999"
CODE = Software(release="0.1.0", models_digest="a" * 64, shell_digest="b" * 64)

TEMPLATE = """
title = "Heart disease"
purpose = "disease-prediction"

[[participants]]
entity_code = "91310000MA1K000001"
data_set = "set-1"
floor_fen = 100

[[participants]]
entity_code = "91310000MA1K000002"
data_set = "set-2"
floor_fen = 0

[[participants]]
entity_code = "91310000MA1K000003"
data_set = "set-3"
floor_fen = 0

[data]
feature_scale = 1

[[data.columns]]
name = "age"
kind = "number"
low = 0
high = 100
missing = "drop"

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
local_steps = 1
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
deadline_seconds = 60
head_threshold = 1
strict_heads = false
missed_rounds_limit = 2

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
close_days = 14

[term]
not_before = "2026-11-01T00:00:00Z"
not_after = "2099-11-01T00:00:00Z"
"""

ROWS = "age,sex,ill\n" + "".join(f"{20 + i},{'fm'[i % 2]},{('no', 'yes')[i % 3 == 0]}\n" for i in range(30))


@dataclass(frozen=True)
class Enterprise:
    """An enterprise with its contract key and its node key."""

    number: int
    contract_key: Ed25519PrivateKey
    node_key: ec.EllipticCurvePrivateKey

    @property
    def name(self) -> str:
        return f"Hospital {self.number}"

    @property
    def entity_code(self) -> str:
        return f"91310000MA1K{self.number:06d}"

    @property
    def id(self) -> str:
        return fingerprint(public_hex(self.contract_key))

    @property
    def node(self) -> str:
        return node_id(node_public_pem(self.node_key))

    def request(self, invitation: Invitation, **changed: Any) -> SignedEnrolment:
        """The enrolment for an invitation; `changed` replaces fields of the record before it is signed."""
        values = {
            "operator": invitation.operator,
            "name": self.name,
            "entity_code": self.entity_code,
            "sector": "medical",
            "token_digest": sha256_hex(bytes.fromhex(invitation.token)),
            "contract_key": public_hex(self.contract_key),
            "node_key_pem": node_public_pem(self.node_key),
        }
        envelope = sign(Enrolment(**(values | changed)), self.contract_key)
        return SignedEnrolment(
            enrolment=envelope, node_signature=node_sign(self.node_key, enrolment.NODE_PREFIX + envelope.body)
        )

    def card(self, **changed: Any) -> Envelope[DataSetCard]:
        values = {
            "data_set": f"set-{self.number}",
            "participant": self.id,
            "num_examples": 100 + self.number,
            "columns": ("age", "sex"),
            "label": "ill",
            "epsilon": 8,
            "delta": "0.00001",
            "alpha": "4.3",
            "released_rows": 0,
        }
        return sign(DataSetCard(**(values | changed)), self.contract_key)

    def signature(
        self, contract: Contract, run_key: Ed25519PrivateKey | None = None
    ) -> tuple[Envelope[Contract], Envelope[Delegation]]:
        run_key = run_key or run_key_of(self.number)
        delegation = Delegation(contract_id=contract.id, party=self.id, run_key=public_hex(run_key))
        return sign(contract, self.contract_key), sign(delegation, self.contract_key)

    def headers(self, method: str, path: str, body: bytes = b"", now: datetime.datetime = NOW) -> dict[str, str]:
        return sign_request(self.node_key, method, path, body, now)


@functools.cache
def enterprise(number: int) -> Enterprise:
    """One enterprise a number, as long as the tests run."""
    return Enterprise(number, generate_key(), ec.generate_private_key(ec.SECP384R1()))


@functools.cache
def run_key_of(number: int) -> Ed25519PrivateKey:
    return generate_key()


@dataclass(frozen=True)
class Operator:
    """A home with its database."""

    home: OperatorHome
    database: Database

    def invite(self, who: Enterprise, **values: Any) -> Invitation:
        given = {"name": who.name, "entity_code": who.entity_code, "sector": "medical", "now": NOW} | values
        return enrolment.invite(self.home, self.database, **given)

    def enrol(self, who: Enterprise) -> enrolment.Member:
        invitation = self.invite(who)
        return enrolment.enrol(
            self.home, self.database, token=invitation.token, signed=who.request(invitation), now=NOW
        )

    def admit(self, *enterprises: Enterprise, cards_too: bool = True) -> None:
        """Enrol, approve, and take a card."""
        for who in enterprises:
            self.enrol(who)
            enrolment.approve(self.database, selector=who.name, fingerprint=who.id, now=NOW)
            if cards_too:
                with self.database.write() as connection:
                    cards.accept_card(connection, enrolment.find(connection, who.id), who.card(), [])


def operator(folder: Path) -> Operator:
    home = init(
        folder / "operator",
        name="City Data",
        entity_code=OPERATOR_CODE,
        hosts=("fl.example.cn",),
        port=8443,
        passphrase=PASSPHRASE,
        now=NOW,
    )
    return Operator(home, home.database())


def changed(signed: SignedEnrolment, **parts: Any) -> SignedEnrolment:
    return SignedEnrolment.parse(signed.plain() | parts, code="TEST")


def body_of(value: dict[str, Any]) -> bytes:
    return canonical_bytes(value)
