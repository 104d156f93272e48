"""Terms, cards, contracts and stores for the ledger's tests. No tests here."""

import base64
import functools
import os
from decimal import Decimal
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client.store import Ready, Reservation, Store
from fedpact_contract.arrays import update_digest
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.keys import fingerprint, generate_key, public_hex
from fedpact_contract.ledger import LedgerRow, Request, Terms, next_reserved
from fedpact_contract.messages import DataSetCard
from fedpact_contract.record import sign

DATA_SET = "heart"
BASE, OTHER_BASE = "b" * 64, "c" * 64


@functools.cache
def key(name: str) -> Ed25519PrivateKey:
    """One key a name, as long as the tests run."""
    return generate_key()


def contract_body(name: str) -> bytes:
    return canonical_bytes({"title": name})


def signed_contract(name: str) -> bytes:
    """A contract as it travels; the store looks at its id alone."""
    payload = base64.b64encode(contract_body(name)).decode()
    envelope = {"type": "application/vnd.fedpact.contract.v1+json", "payload": payload, "signatures": []}
    return canonical_bytes({"contract": envelope, "delegations": []})


def contract_id(name: str = "one") -> str:
    return sha256_hex(contract_body(name))


def terms(name: str = "one", **values: object) -> Terms:
    base = {
        "contract_id": contract_id(name),
        "data_set": DATA_SET,
        "rounds": 3,
        "spare_attempts": 1,
        "steps": 2,
        "sample_rate": Decimal("0.2"),
        "noise_multiplier": Decimal("2.5"),
        "max_grad_norm": Decimal(1),
        "rdp": Decimal("0.1"),
    }
    return Terms.parse(base | values, code="TERMS")


def request(number: int, base: str = BASE, of: Terms | None = None) -> Request:
    return Request(terms=of or terms(), round=number, base_digest=base)


def reserved(rows: list[LedgerRow], number: int, limit: str = "5", **values: object) -> LedgerRow:
    """Append the next reservation of round `number`."""
    rows.append(next_reserved(rows, request(number, of=terms(**values)), Decimal(limit)))
    return rows[-1]


def card(data_set: str = DATA_SET, signer: str = "contract", **values: object) -> bytes:
    base = {
        "data_set": data_set,
        "participant": fingerprint(public_hex(key("contract"))),
        "num_examples": 100,
        "columns": ("age", "sex"),
        "label": "ill",
        "epsilon": Decimal(8),
        "delta": Decimal("0.00001"),
        "alpha": Decimal("4.3"),
        "released_rows": 0,
    }
    return sign(DataSetCard.parse(base | values, code="CARD"), key(signer)).to_bytes()


def new_store(
    folder: Path, *, witness: Path | None = None, limit: str = "5", contracts: tuple[Terms, ...] = ()
) -> Store:
    """A store with one data set and running contracts on it (names in `contract_id`, run key `run`)."""
    store = Store(folder / "agent.db", witness=witness, create=True, clock=lambda: "2026-11-24T12:00:00Z")
    store.declare(card(), Decimal(limit))
    for name, one in zip(("one", "two", "three"), contracts or (terms(),), strict=False):
        assert one.contract_id == contract_id(name)
        store.add_contract(signed_contract(name), one, "run.pem", public_hex(key("run")))
        store.set_state(one.contract_id, "running")
    return store


def train(size: int = 8) -> bytes:
    """An update as training would make it: never twice the same."""
    return os.urandom(4 * size)


def reserve(store: Store, number: int = 1, name: str = "one", base: str = BASE) -> Reservation:
    taken = store.reserve(contract_id(name), number, base, key("run"))
    assert isinstance(taken, Reservation), "the outbox answered"
    return taken


def complete(store: Store, reservation: Reservation, array: bytes | None = None) -> Ready:
    array = train() if array is None else array
    return store.complete(
        reservation, lambda head: (b"reply " + head.encode(), array), update_digest(array), key("run")
    )
