"""A whole federation in one process: the operator's round loop, the agents' answers, real ledgers and logs.

What is doubled: the transport (in memory) and the trainer's process (the same training code, called directly, with
the noise that the test gives). Everything else is the product's own.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.contract_kit import party, plain_contract
from tests.support.noise import FixedNoise

from fedpact_client.answer import Desk, Trained, answer, open_contract
from fedpact_client.policy import Policy
from fedpact_client.review import make_terms
from fedpact_client.store import Ready, Store
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract, Delegation, SignedContract
from fedpact_contract.keys import fingerprint, generate_key, public_hex, save_key
from fedpact_contract.log import ContractSigned
from fedpact_contract.messages import DataSetCard
from fedpact_contract.privacy import filter_alpha, filter_limit
from fedpact_contract.record import sign
from fedpact_models.code import models_digest
from fedpact_models.dp import Noise
from fedpact_models.features import Examples, validation_root
from fedpact_models.training import local_update
from fedpact_server import db, logbook
from fedpact_server.driver import run_context
from fedpact_server.rounds import Loop
from fedpact_server.run_state import store_model
from fedpact_server.transport import Incoming, Outgoing
from fedpact_server.validation import ValidationSet
from fedpact_server.validation import save as save_validation

BUNDLE = "ab" * 32
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
PIXELS = [f"pixel_{i}" for i in range(64)]


def fixed_keys(count: int) -> list[Ed25519PrivateKey]:
    """Contract keys that are always the same: the order of ids is whose noise is drawn first, and that of sums."""
    return [Ed25519PrivateKey.from_private_bytes(sha256(f"demo {i}".encode()).digest()) for i in range(count)]


def digits(counts: list[int], *, flip: Mapping[int, float] | None = None, seed: int = 0, validation: int = 220):
    """Encoded digits for each participant, and validation rows."""
    from sklearn.datasets import load_digits

    data, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(data.target))
    x = np.column_stack([data.data[order] / 8 - 1, np.ones(len(order))]) * (2 / np.sqrt(65))
    y = data.target[order].astype(np.int64)
    parts, start = [], 0
    for index, count in enumerate(counts):
        own = y[start : start + count].copy()
        flipped = rng.random(count) < (flip or {}).get(index, 0.0)
        own[flipped] = (own[flipped] + rng.integers(1, 10, int(flipped.sum()))) % 10
        parts.append(Examples(x=x[start : start + count], y=own))
        start += count
    return parts, Examples(x=x[start : start + validation], y=y[start : start + validation])


def contract_values(
    operator: Ed25519PrivateKey,
    keys: list[Ed25519PrivateKey],
    counts: list[int],
    validation: Examples,
    salts: list[bytes],
    initial_digest: str,
    **changes: Any,
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "title": "Digits",
        "purpose": "digit-recognition",
        "data": {
            "columns": [
                {"name": name, "kind": "number", "low": Decimal(0), "high": Decimal(16), "missing": "refuse"}
                for name in PIXELS
            ],
            "label": {"name": "digit", "classes": [str(d) for d in range(10)], "rule": "value"},
            "feature_scale": Decimal(2),
        },
        "model__initial_digest": initial_digest,
        "training__local_steps": 6,
        "training__learning_rate": Decimal(4),
        "privacy__sample_rate": Decimal("0.2"),
        "privacy__noise_multiplier": Decimal("2.7"),
        "participation__minimum": 3,
        "participation__deadline_seconds": 30,
        "participation__head_threshold": 2,
        "contribution__validation": {
            "root": validation_root(validation, salts),
            "slices": [{"source": "operator", "count": len(validation)}],
        },
        "settlement__contribution_weight": Decimal(1),
        "settlement__data_weight": Decimal(0),
        "settlement__equal_weight": Decimal(0),
        "code__models_digest": models_digest(),
        "code__shell_digest": BUNDLE,
        "term__not_after": "2099-12-31T00:00:00Z",
    }
    entries = [
        party(f"Enterprise {i + 1}", f"{i + 1:018d}", public_hex(key), f"digits-{i + 1}", counts[i], sector="finance")
        | {"gate_order": "4.3"}
        for i, key in enumerate(keys)
    ]
    return plain_contract(entries, public_hex(operator), **(base | changes))


POLICY = {
    "purposes": ["digit-recognition"],
    "operators": [],
    "sectors": "*",
    "model_kinds": ["softmax", "linear", "mlp", "cnn"],
    "columns": "*",
    "max_epsilon": Decimal(3),
    "min_participants": 2,
    "max_rounds": 100,
    "not_after": "2100-01-01T00:00:00Z",
    "trust_models": ["record-level-at-each-participant", "client-level-at-the-operator"],
}


@dataclass
class Agent:
    """One participant: its desk, and seams for faults."""

    desk: Desk
    examples: Examples
    noise: Noise
    tamper: Callable[[Ready], tuple[bytes, bytes]] | None = None
    answered: int = 0
    crash: Callable[[int], bool] = field(default=lambda _attempt: False)

    def __call__(self, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        ready = answer(self.desk, order, model, BUNDLE)
        self.answered += 1
        if ready is None:
            return None
        return self.tamper(ready) if self.tamper else (ready.reply, ready.array)


class DirectTransport:
    """Delivers at once; `before` may change or swallow what goes out (order, model) to a node."""

    def __init__(self, agents: Mapping[str, Agent]) -> None:
        self.agents = agents
        self.before: Callable[[str, bytes, bytes], tuple[bytes, bytes] | None] = lambda _n, o, m: (o, m)
        self.offline: set[str] = set()
        self.pending: dict[str, tuple[str, Outgoing]] = {}
        self.count = 0
        self.sent: list[Outgoing] = []

    def online(self) -> dict[str, bool]:
        return {node: node not in self.offline for node in self.agents}

    def send(self, outgoing, ttl_seconds: float) -> dict[str, str]:
        result = {}
        for item in outgoing:
            self.count += 1
            self.sent.append(item)
            self.pending[f"m{self.count}"] = (item.node, item)
            result[f"m{self.count}"] = item.node
        return result

    def poll(self, message_ids) -> list[Incoming]:
        found = []
        for message_id in message_ids:
            node, item = self.pending.pop(message_id, (None, None))
            if node is None or node in self.offline:
                continue
            changed = self.before(node, item.order, item.model)
            reply = None if changed is None else self.agents[node](*changed)
            if reply is None:
                found.append(Incoming(message_id=message_id, node=node, reply=None, array=b"", error="AGENT_NO_REPLY"))
            else:
                found.append(Incoming(message_id=message_id, node=node, reply=reply[0], array=reply[1], error=None))
        return found


def set_clocks(agents: Mapping[str, Agent], now: Callable[[], datetime]) -> None:
    """What the agents' machines take for the time, from now on."""
    for agent in agents.values():
        agent.desk = replace(agent.desk, now=now)


@dataclass
class Federation:
    """Operator and agents, ready to run."""

    home: Path
    database: db.Database
    contract: Contract
    agents: dict[str, Agent]
    transport: DirectTransport
    validation: Examples
    operator_key: Ed25519PrivateKey
    operator_run_key: Ed25519PrivateKey

    def agent(self, number: int) -> Agent:
        """The agent of `Enterprise number` (from 1)."""
        name = f"Enterprise {number}"
        return self.agents[next(p.id for p in self.contract.participants if p.name == name)]

    def loop(self, driver: str = "1", *, accept_test_noise: bool = True) -> Loop:
        context = run_context(self.home, self.database, self.contract.id, driver, accept_test_noise=accept_test_noise)
        return Loop(
            context=context,
            transport=self.transport,
            examples=self.validation,
            sleep=lambda _s: time.sleep(0.005),
            now=lambda: NOW,  # as the agents' clocks; a round waits by the monotonic one
        )

    def run(self, **options: Any) -> str:
        return self.loop(**options).run()

    def entries(self):
        with self.database.read() as connection:
            return logbook.read_entries(connection, self.contract.id)

    def kinds(self) -> list[str]:
        return [entry.type for entry in self.entries()]

    def outcomes(self, round_number: int) -> dict[str, tuple[str, str]]:
        """Participant's name -> (kind, code)."""
        table = db.outcomes.c
        with self.database.read() as connection:
            rows = connection.execute(
                sa.select(table.participant, table.kind, table.code).where(table.round == round_number)
            ).all()
        return {self.contract.participant(r.participant).name: (r.kind, r.code) for r in rows}

    def take_over(self, driver: str) -> None:
        with self.database.write() as connection:
            connection.execute(db.runs.update().values(driver=driver))


def make_federation(
    folder: Path,
    counts: list[int] | None = None,
    *,
    data: tuple[list[Examples], Examples] | None = None,
    noise: Callable[[int], Noise] = lambda index: FixedNoise(index),
    keys: list[Ed25519PrivateKey] | None = None,
    names: list[str] | None = None,
    policy: Mapping[int, Mapping[str, Any]] | None = None,
    base: np.ndarray | None = None,
    **changes: Any,
) -> Federation:
    """A signed contract, its log, and an agent for each participant; `changes` are contract keys, a__b for a.b.

    `base`: the initial model's weights, float64 [P]; by default the zeros of softmax on the digits.
    """
    counts = counts or [90, 60, 70, 80]
    parts, validation = data or digits(counts)
    operator, operator_run = generate_key(), generate_key()
    keys = keys or [generate_key() for _ in counts]
    run_keys = [generate_key() for _ in counts]
    home = folder / "operator"
    for part in ("models", "arrays", "keys/run"):
        (home / part).mkdir(parents=True)
    initial = store_model(home, np.zeros(650) if base is None else base)
    salts = [i.to_bytes(32, "big") for i in range(len(validation))]
    values = contract_values(operator, keys, counts, validation, salts, initial, **changes)
    for index, name in enumerate(names or []):
        values["participants"][index]["name"] = name
    contract = Contract.parse(values)
    if contract.auditor is not None:
        (home / "validation").mkdir()
        terms = contract.contribution.validation
        rows = ValidationSet(examples=validation, salts=tuple(salts), root=terms.root, slices=terms.slices)
        save_validation(home, rows)
    signed = _sign_all(contract, operator, operator_run, keys, run_keys)
    database = db.Database.in_home(home)
    database.create()
    save_key(home / "keys" / "run" / f"{contract.id}.key", operator_run)
    nodes = {p.id: f"{i:064x}" for i, p in enumerate(contract.participants)}
    _fill_database(database, contract, signed, operator_run, nodes)
    agents = {
        p.id: _agent(folder / f"agent{i}", contract, signed, i, keys[i], run_keys[i], parts[i], noise(i), policy)
        for i, p in enumerate(contract.participants)
    }
    transport = DirectTransport({nodes[p]: agent for p, agent in agents.items()})
    return Federation(home, database, contract, agents, transport, validation, operator, operator_run)


def _sign_all(contract, operator, operator_run, keys, run_keys) -> SignedContract:
    def delegation(key, run_key):
        party = fingerprint(public_hex(key))
        return sign(Delegation(contract_id=contract.id, party=party, run_key=public_hex(run_key)), key)

    pairs = [(operator, operator_run), *zip(keys, run_keys, strict=True)]
    return SignedContract(
        contract=sign(contract, *(key for key, _ in pairs)), delegations=tuple(delegation(*pair) for pair in pairs)
    )


def _fill_database(database, contract, signed, operator_run, nodes) -> None:
    with database.write() as connection:
        connection.execute(db.contracts.insert().values(id=contract.id, payload=contract.to_bytes(), state="signed"))
        for participant in contract.participants:
            connection.execute(
                db.participants.insert().values(
                    id=participant.id,
                    name=participant.name,
                    entity_code=participant.entity_code,
                    sector=participant.sector,
                    contract_key=participant.key,
                    node_key_pem="",
                    node=nodes[participant.id],
                    enrolment=b"",
                    state="registered",
                )
            )
        logbook.append(connection, contract.id, [ContractSigned(signed=signed)])
        logbook.checkpoint(connection, contract.id, operator_run)
        connection.execute(
            db.runs.insert().values(
                contract_id=contract.id, phase="running", wanted="run", driver="1", detail="", started="x"
            )
        )


def declare_another(agent: Agent, fingerprint_of_rows: str) -> None:
    """Declare a data set `another` in the agent's store, which is known by this fingerprint."""
    store, key = agent.desk.store, generate_key()
    mine = store.data_set(agent.desk.data_set)
    changes = {"data_set": "another", "participant": fingerprint(public_hex(key))}
    store.declare(sign(mine.declaration.model_copy(update=changes), key).to_bytes(), mine.limit)
    store.add_version("another", fingerprint_of_rows)


def _agent(folder, contract, signed, index, key, run_key, examples, noise, policy) -> Agent:
    folder.mkdir(parents=True)
    participant = contract.participants[index]
    privacy = contract.privacy
    store = Store(folder / "agent.db", create=True)
    alpha = filter_alpha(Decimal(8), privacy.delta)
    card = DataSetCard(
        data_set=participant.data_set,
        participant=participant.id,
        num_examples=participant.num_examples,
        columns=tuple(PIXELS),
        label="digit",
        entity=None if privacy.entity is None else privacy.entity.column,
        epsilon=Decimal(8),
        delta=privacy.delta,
        alpha=alpha,
        released_rows=0,
    )
    store.declare(sign(card, key).to_bytes(), filter_limit(Decimal(8), privacy.delta, alpha))
    terms = make_terms(contract, participant.id, alpha)
    store.add_contract(canonical_bytes(signed.plain()), terms, "run", public_hex(run_key))
    store.set_state(contract.id, "running")
    opened, run_keys = open_contract(signed, participant.id)
    own_policy = Policy.parse(
        {**POLICY, "operators": [contract.operator.id], **((policy or {}).get(index, {}))}, code="POLICY"
    )
    holder: dict[str, Agent] = {}

    def train(contract: Contract, round_number: int, attempt: int, base: bytes) -> Trained:
        from fedpact_client.answer import TrainerLostError

        agent = holder["agent"]
        if agent.crash(attempt):
            raise TrainerLostError("TRAINER_LOST", "killed by the test")
        update = local_update(contract, np.frombuffer(base, "<f8").copy(), agent.examples, agent.noise)
        return Trained(update=update.astype("<f4").tobytes(), noise=agent.noise.label, fingerprints=(f"{index:064x}",))

    desk = Desk(
        store=store,
        contract=opened,
        contract_id=contract.id,
        participant=participant.id,
        run_keys=run_keys,
        run_key=run_key,
        policy=own_policy,
        entity=card.entity,
        own_file=lambda: (f"{index:062x}ff",),
        own_rows=lambda: None,
        train=train,
        now=lambda: NOW + timedelta(minutes=1),
    )
    holder["agent"] = Agent(desk=desk, examples=examples, noise=noise)
    return holder["agent"]
