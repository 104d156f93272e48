"""A completed run to be settled and closed: a real operator's home, the real API in front of it, agents with clients.

A run takes seconds, so it is made once for each kind of contract, and copied for every test that needs one.
"""

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.agent_world import Wire
from tests.support.auditor_kit import CLAUSE
from tests.support.federation import Agent, DirectTransport, Federation, make_federation
from tests.support.operator_world import NOW, Operator

from fedpact_client.api import OperatorClient, egress_of
from fedpact_client.store import Store
from fedpact_contract import merkle
from fedpact_contract.evidence import pack, unpack
from fedpact_contract.log import Body, Checkpoint, Entry
from fedpact_contract.messages import Order, Reply, Update
from fedpact_contract.record import read_envelope, sign
from fedpact_contract.request import node_id, node_public_pem
from fedpact_contract.trust import Trust
from fedpact_contract.verify import Report, verify
from fedpact_models.dp import SystemNoise
from fedpact_server import closing, db, logbook, rounds
from fedpact_server.evidence import evidence_files
from fedpact_server.home import OperatorHome, init
from fedpact_server.run_state import run_row

REVENUE = 100_000_000
PASSPHRASE = b"correct horse"
EVERYBODY_IS_PAID = {
    "settlement__contribution_weight": Decimal("0.5"),
    "settlement__data_weight": Decimal("0.3"),
    "settlement__equal_weight": Decimal("0.2"),
}
"""The noise is the system's, so whose value is positive is chance; a part of the pool goes by presence."""


@dataclasses.dataclass
class ClosedRun:
    """A federation whose run is completed, and the operator's API in front of its database."""

    federation: Federation
    wire: Wire
    node_keys: dict[str, ec.EllipticCurvePrivateKey]

    @property
    def home(self) -> Path:
        return self.federation.home

    @property
    def contract_id(self) -> str:
        return self.federation.contract.id

    def client(self, number: int) -> OperatorClient:
        """The connection of the agent of `Enterprise number`; what it sends stands in that agent's egress ledger."""
        desk = self.federation.agent(number).desk
        ca = (self.home / "tls" / "ca.crt").read_text("ascii")
        record = egress_of(desk.store)
        return OperatorClient("https://fl.example.cn:8443", ca, self.node_keys[desk.participant], record, self.wire)

    def settle(self, revenue: int = REVENUE, fees: int = 0) -> Any:
        with self.federation.database.write() as connection:
            key = self.federation.operator_run_key
            return closing.settle(connection, self.federation.contract, key, revenue, fees)

    def phase(self) -> str:
        with self.federation.database.read() as connection:
            return str(run_row(connection, self.contract_id).phase)

    def state(self) -> closing.ClosingState:
        with self.federation.database.read() as connection:
            return closing.closing_state(connection, self.federation.contract)

    def files(self) -> dict[str, str]:
        with self.federation.database.read() as connection:
            return evidence_files(connection, self.contract_id)

    def verified(self, trust: Trust | None = None) -> Report:
        found = {name: text.encode() for name, text in self.files().items()}
        return verify(unpack(found), trust or Trust.of(self.federation.contract))

    def serve(self, path: str, answer: Any) -> None:
        """What the operator answers from now on where the address holds this text; text is sent as it stands."""
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.wire.replace[path] = lambda _content: text

    def rewritten(self, change: Callable[[list[Body]], Sequence[Body]], upto: int | None = None) -> dict[str, str]:
        """The evidence as a dishonest operator would make it: other entries, every later checkpoint signed anew.

        Entries whose bodies are unchanged keep their salt. `upto`: only so many of the checkpoints.
        """
        with self.federation.database.read() as connection:
            old = logbook.read_entries(connection, self.contract_id)
            heads = list(logbook.signed_checkpoints(connection, self.contract_id).values())
            countersigned = [e for _, _, e in logbook.countersignatures(connection, self.contract_id)]
        kept = {entry.to_bytes(): entry for entry in old}
        by_body = {json.dumps(entry.body, sort_keys=True): entry for entry in kept.values()}
        entries = [
            by_body.get(json.dumps(body.plain(), sort_keys=True)) or Entry.of(body)
            for body in change([entry.open() for entry in old])
        ]
        hashes = [entry.leaf_hash for entry in entries]
        sizes = [Checkpoint.from_bytes(head.body).size for head in heads][: upto or len(heads)]
        if upto is None:
            sizes = [*(size for size in sizes[:-1] if size < len(entries)), len(entries)]
        signed, roots = [], {}
        for head in heads:
            record = Checkpoint.from_bytes(head.body)
            roots[record.size] = (record.root, head)
        for size in sizes:
            root = merkle.root(hashes[:size]).hex()
            if roots.get(size, ("", None))[0] == root:
                signed.append(roots[size][1])
            else:
                record = Checkpoint(origin=self.contract_id, size=size, root=root)
                signed.append(sign(record, self.federation.operator_run_key))
        true = {c.size: c.root for c in (Checkpoint.from_bytes(e.body) for e in signed)}
        held = [e for e in countersigned if _fits(e, true)]
        return {name: data.decode() for name, data in pack(entries[: sizes[-1]], signed, held).items()}


def _fits(envelope: Any, roots: dict[int, str]) -> bool:
    from fedpact_contract.log import Countersignature

    record = Countersignature.from_bytes(envelope.body)
    return roots.get(record.size) == record.root


def closed_run(folder: Path, **changes: Any) -> ClosedRun:
    """A fresh copy of a completed run of two rounds, with production's noise; `changes` as for `make_federation`.

    `stop_in`: the operator stops the run while this round waits for its replies. `drop`: the update of this round and
    enterprise never arrives. `spoil`: its array arrives as another one. `audited`: the contract names an auditor.
    """
    return copy(_completed(**({"training__rounds": 2} | EVERYBODY_IS_PAID | changes)), folder)


def open_run(folder: Path, **changes: Any) -> ClosedRun:
    """A federation that has signed and not begun, with the operator's API in front of it and production's noise."""
    federation = make_federation(folder, **({"noise": lambda _index: SystemNoise()} | changes))
    home, keys = with_operator_home(federation), _node_keys()
    _register(federation)
    agents = [federation.agents[p.id] for p in federation.contract.participants]
    by_node = {node_id(node_public_pem(key)): agent for key, agent in zip(keys, agents, strict=False)}
    federation.transport = DirectTransport(by_node)
    node_keys = {agent.desk.participant: key for key, agent in zip(keys, agents, strict=False)}
    return ClosedRun(federation, Wire(Operator(home, federation.database)), node_keys)


def _register(federation: Federation) -> None:
    """Give each participant its node key."""
    with federation.database.write() as connection:
        for key, participant in zip(_node_keys(), federation.contract.participants, strict=False):
            pem = node_public_pem(key)
            values = {"node_key_pem": pem, "node": node_id(pem)}
            connection.execute(db.participants.update().where(db.participants.c.id == participant.id).values(**values))


def with_operator_home(federation: Federation) -> OperatorHome:
    """Make the federation's folder a real operator's home: settings, keys and certificates."""
    made = federation.home.with_name("made")
    code = federation.contract.operator.entity_code
    init(made, name="Operator", entity_code=code, hosts=("127.0.0.1",), port=8443, passphrase=PASSPHRASE, now=NOW)
    for part in ("operator.toml", "tls", "keys/operator.key", "keys/operator.pub"):
        shutil.move(made / part, federation.home / part)
    shutil.rmtree(made)
    federation.home.chmod(0o700)
    return OperatorHome.open(federation.home)


def copy(base: Federation, folder: Path) -> ClosedRun:
    """A completed run of its own, with the API in front of it."""
    federation = copied(base, folder)
    keys = _node_keys()
    node_keys = {p.id: keys[i] for i, p in enumerate(base.contract.participants)}
    home = OperatorHome.open(federation.home)
    return ClosedRun(federation, Wire(Operator(home, federation.database)), node_keys)


def copied(base: Federation, folder: Path) -> Federation:
    """A federation with everything on its own: the operator's folder and database, each agent's store."""
    root = folder / "copy"
    shutil.copytree(base.home.parent, root)
    agents: dict[str, Agent] = {}
    for index, participant in enumerate(base.contract.participants):
        known = base.agents[participant.id]
        store = Store(root / f"agent{index}" / "agent.db")
        agents[participant.id] = dataclasses.replace(known, desk=dataclasses.replace(known.desk, store=store))
    return dataclasses.replace(
        base,
        home=root / "operator",
        database=db.Database.in_home(root / "operator"),
        agents=agents,
        transport=DirectTransport({node: agents[a.desk.participant] for node, a in base.transport.agents.items()}),
    )


@functools.cache
def _node_keys() -> list[ec.EllipticCurvePrivateKey]:
    return [ec.generate_private_key(ec.SECP384R1()) for _ in range(16)]


def _completed(**changes: Any) -> Federation:
    return _made(tuple(sorted(changes.items())))


@functools.cache
def _made(changes: tuple[tuple[str, Any], ...]) -> Federation:
    """A completed run; kept as long as the tests run."""
    options = dict(changes)
    stop_in, drop, spoil = (options.pop(name, None) for name in ("stop_in", "drop", "spoil"))
    options |= {"auditor": CLAUSE} if options.pop("audited", False) else {}
    federation = make_federation(_folder(), **({"noise": lambda _index: SystemNoise()} | options))
    with_operator_home(federation)

    def stop(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        if Order.from_bytes(read_envelope(order).body).round != stop_in:
            return order, model
        with federation.database.write() as connection:
            connection.execute(db.runs.update().values(wanted="stop"))
        return None

    federation.transport.before = stop
    if drop is not None:
        federation.agent(drop[1]).tamper = lambda ready: (
            None if _round(ready) == drop[0] else (ready.reply, ready.array)
        )
    if spoil is not None:
        federation.agent(spoil[1]).tamper = lambda ready: (
            ready.reply,
            bytes(len(ready.array)) if _round(ready) == spoil[0] else ready.array,
        )
    before, rounds.RESEND_SECONDS = rounds.RESEND_SECONDS, 0.1
    try:
        federation.run(accept_test_noise="noise" in options)
    finally:
        rounds.RESEND_SECONDS = before
    _register(federation)
    federation.database.dispose()
    return federation


def _round(ready: Any) -> int:
    update = Reply.from_bytes(ready.reply).update
    return 0 if update is None else Update.from_bytes(update.body).round


_TEMPORARY = tempfile.TemporaryDirectory(prefix="fedpact-closed-run-")


def _folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_TEMPORARY.name))
