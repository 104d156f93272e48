"""A server that forks, omits, rewrites or invents, against the real guard: what each side shows; nothing is lost.

Each attack is made by the server's own code, at round 2 of a run whose first round was honest. The attack, what the
agent refuses it with, whether it countersigns the head shown (only where the head itself is sound), and where else the
rules of trust.md, "Log", are tested: `ATTACKS` and `ELSEWHERE`. The operator's side is the code in its own log, by the
agent's signed refusal; the agent's is an alarm in `status` with the operator's signed order as evidence.
"""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from tests.support.agent_world import ENTITY, PASSPHRASE
from tests.support.federation import BUNDLE, Agent, Federation, digits, make_federation

from fedpact_client import views
from fedpact_client.children import ExecutorChild
from fedpact_client.frames import Frame
from fedpact_client.guard import Guard
from fedpact_client.home import AgentHome, init
from fedpact_client.store import EgressKind
from fedpact_client.text import show_heads
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.files import replace_file
from fedpact_contract.keys import generate_key, show_fingerprint
from fedpact_contract.log import Checkpoint, Countersignature, Entry, UpdateRefused
from fedpact_contract.messages import HeadStep, Order, Refusal, Reply
from fedpact_contract.record import open_signed, read_envelope, sign
from fedpact_server import db, logbook, orders

ROOT = Path(__file__).resolve().parents[2]
ROUND = 2
COUNTS = [40, 40, 40]
DIGITS = digits(COUNTS, validation=40)

Build = Callable[..., Order]


@dataclasses.dataclass
class Server:
    """The operator's side, whose making of orders an attack changes. `agents`: every enterprise's desk, to compare."""

    federation: Federation

    def rewrite(self, connection: Connection, change: Callable[[list[Entry]], list[Entry]]) -> None:
        """Another log of the same length in place of the old one, every later checkpoint signed anew."""
        contract_id, key = self.federation.contract.id, self.federation.operator_run_key
        new = change(logbook.read_entries(connection, contract_id))
        hashes = [entry.leaf_hash for entry in new]
        for position, entry in enumerate(new):
            place = sa.and_(db.entries.c.contract_id == contract_id, db.entries.c.position == position)
            values = {"data": entry.to_bytes(), "leaf_hash": entry.leaf_hash, "type": entry.type}
            connection.execute(db.entries.update().where(place).values(**values))
        for size in logbook.signed_checkpoints(connection, contract_id):
            record = Checkpoint(origin=contract_id, size=size, root=logbook.root_of(hashes[:size]))
            place = sa.and_(db.checkpoints.c.contract_id == contract_id, db.checkpoints.c.size == size)
            connection.execute(db.checkpoints.update().where(place).values(envelope=sign(record, key).to_bytes()))


Attack = Callable[[Server, Connection, sa.Row[Any], str, logbook.Proofs, Order], Order]
"""Makes the order that leaves of the one that should; may rewrite the database, which is put back afterwards."""


def seen_by(participant: str) -> Callable[[Entry], bool]:
    return lambda entry: entry.type == "update-decided" and entry.body["participant"] == participant


def rebuilt(server: Server, connection: Connection, row: sa.Row[Any], participant: str, order: Order) -> Order:
    """The order as the server's own code makes it of the log as it stands now."""
    proofs = logbook.Proofs(connection, order.contract_id, int(row.checkpoint_size))
    return HONEST(connection, order.contract_id, row, participant, proofs=proofs, witnesses=order.countersignatures)


def rewrites(server, connection, row, participant, proofs, order) -> Order:
    """An entry that every agent has a head over gets other bytes: the contract's own, the first."""
    server.rewrite(connection, lambda old: [Entry.of(old[0].open()), *old[1:]])
    return rebuilt(server, connection, row, participant, order)


def omits(server, connection, row, participant, proofs, order) -> Order:
    """An early entry is gone; what came after moved up."""
    server.rewrite(connection, lambda old: [old[0], *old[2:], Entry.of(old[1].open())])
    return rebuilt(server, connection, row, participant, order)


def with_heads(order: Order, since: int, *heads: HeadStep) -> Order:
    return order.model_copy(update={"since": since, "heads": heads})


def chain(proofs, since: int) -> tuple[HeadStep, ...]:
    return tuple(proofs.chain(since))


def starts_over(server, connection, row, participant, proofs, order) -> Order:
    """A rewritten log, shown from its beginning, as to somebody who never saw one."""
    server.rewrite(connection, lambda old: [Entry.of(old[0].open()), *old[1:]])
    fresh = logbook.Proofs(connection, order.contract_id, int(row.checkpoint_size))
    return with_heads(rebuilt(server, connection, row, participant, order), 0, *chain(fresh, 0))


def older(server, connection, row, participant, proofs, order) -> Order:
    return with_heads(order, 0, chain(proofs, 0)[0])


def nothing_new(server, connection, row, participant, proofs, order) -> Order:
    """Two signatures on one size would do, where the roots agree: still nothing is shown that covers the round."""
    same = next(s for s in chain(proofs, 0) if Checkpoint.from_bytes(s.checkpoint.body).size == order.since)
    return with_heads(order, order.since, same.model_copy(update={"consistency": ()}))


def from_nowhere(server, connection, row, participant, proofs, order) -> Order:
    return with_heads(order, order.since + 1, *order.heads)


def resigned(server, order, key, **changes) -> Order:
    *before, last = order.heads
    record = Checkpoint.from_bytes(last.checkpoint.body).model_copy(update=changes)
    return with_heads(order, order.since, *before, last.model_copy(update={"checkpoint": sign(record, key)}))


def by_another_key(server, connection, row, participant, proofs, order) -> Order:
    return resigned(server, order, generate_key())


def another_log(server, connection, row, participant, proofs, order) -> Order:
    return resigned(server, order, server.federation.operator_run_key, origin="1" * 64)


def no_receipt(server, connection, row, participant, proofs, order) -> Order:
    return order.model_copy(update={"results": ()})


def anothers_receipt(server, connection, row, participant, proofs, order) -> Order:
    others = [p for p in server.federation.contract.by_id() if p != participant]
    index = next(i for i, e in enumerate(logbook.read_entries(connection, order.contract_id)) if seen_by(others[0])(e))
    return order.model_copy(update={"results": (proofs.entry(index),)})


def invented_receipt(server, connection, row, participant, proofs, order) -> Order:
    """A refusal that this agent never gave, in a log that continues: what it says of itself cannot be signed."""
    (result,) = order.results
    body = UpdateRefused(round=1, participant=participant, refusal=result.entry.body["update"])
    return order.model_copy(update={"results": (result.model_copy(update={"entry": Entry.of(body)}),)})


def unlogged_receipt(server, connection, row, participant, proofs, order) -> Order:
    """The right words about this agent's update, signed, in an entry that is in no log."""
    (result,) = order.results
    return order.model_copy(update={"results": (result.model_copy(update={"entry": Entry.of(result.entry.open())}),)})


def not_opened(server, connection, row, participant, proofs, order) -> Order:
    return order.model_copy(update={"opened": proofs.entry(0)})


def earlier_round(server, connection, row, participant, proofs, order) -> Order:
    """The round that was opened first, from its model, shown as this one."""
    entries = logbook.read_entries(connection, order.contract_id)
    first = next(i for i, entry in enumerate(entries) if entry.type == "round-opened")
    return order.model_copy(update={"opened": proofs.entry(first)})


def another_base(server, connection, row, participant, proofs, order) -> Order:
    """The model that arrives is another one than log and order say."""
    before = server.federation.transport.before
    server.federation.transport.before = lambda node, data, model: (
        (data, bytes(len(model))) if round_of(data) == ROUND else before(node, data, model)
    )
    return order


def named_base(server, connection, row, participant, proofs, order) -> Order:
    """Order and model agree with each other, not with the log."""
    from fedpact_contract.arrays import model_digest

    another_base(server, connection, row, participant, proofs, order)
    return order.model_copy(update={"base_digest": model_digest(bytes(8 * 650))})


def misnamed_base(server, connection, row, participant, proofs, order) -> Order:
    """Log and model agree, and the order names another base."""
    return order.model_copy(update={"base_digest": "0" * 64})


def accomplice(server, connection, row, participant, proofs, order) -> Order:
    """Another participant countersigned another head of a size that this agent saw: a fork, and its proof."""
    other = next(a.desk for a in server.federation.agents.values() if a.desk.participant != participant)
    lie = Countersignature(origin=order.contract_id, size=order.since, root="0" * 64, participant=other.participant)
    return order.model_copy(update={"countersignatures": (sign(lie, other.run_key),)})


def forged_witness(server, connection, row, participant, proofs, order) -> Order:
    """The operator signs in another participant's name."""
    other = next(a.desk for a in server.federation.agents.values() if a.desk.participant != participant)
    head = other.store.heads(order.contract_id)[-1]
    lie = Countersignature(origin=order.contract_id, size=head.size, root=head.root, participant=other.participant)
    return order.model_copy(update={"countersignatures": (sign(lie, server.federation.operator_run_key),)})


def no_witness(server, connection, row, participant, proofs, order) -> Order:
    return order.model_copy(update={"countersignatures": ()})


ATTACKS: dict[str, tuple[Attack, str, bool]] = {
    "rewrites an entry": (rewrites, "HEAD_INCONSISTENT", False),
    "omits an entry": (omits, "HEAD_INCONSISTENT", False),
    "starts its log over": (starts_over, "HEAD_INCONSISTENT", False),
    "shows an older log": (older, "HEAD_OLDER", False),
    "shows nothing new": (nothing_new, "HEAD_NOT_NEWER", False),
    "begins at a head nobody saw": (from_nowhere, "HEAD_UNKNOWN_START", False),
    "a head by another key": (by_another_key, "HEAD_SIGNATURE", False),
    "another contract's log": (another_log, "HEAD_ORIGIN", False),
    "leaves the receipt out": (no_receipt, "RECEIPT_MISSING", False),
    "another's receipt": (anothers_receipt, "RECEIPT_WRONG", False),
    "an invented refusal": (invented_receipt, "RECEIPT_WRONG", False),
    "a receipt that is in no log": (unlogged_receipt, "RECEIPT_WRONG", False),
    "a round that is not open": (not_opened, "ROUND_NOT_OPENED", True),
    "an earlier round as this one": (earlier_round, "ROUND_NOT_OPENED", True),
    "another base model": (another_base, "BASE_MODEL_MISMATCH", True),
    "another base model, and says so": (named_base, "BASE_MODEL_MISMATCH", True),
    "an order that names another base": (misnamed_base, "BASE_MODEL_MISMATCH", True),
    "a witness of another log": (accomplice, "WITNESS_WRONG", True),
    "a witness in another's name": (forged_witness, "WITNESS_WRONG", True),
    "too few witnesses": (no_witness, "HEAD_FEW_WITNESSES", True),
}
"""Attack -> how, the code on both sides, whether the head shown is countersigned."""

ELSEWHERE = {
    "an update that was sent is logged as missed: visible, disputable, not provable": (
        "unit/test_answer.py::test_an_update_that_the_operator_forgets_is_noticed_in_the_next_order",
        "unit/test_closing_client.py::test_an_update_that_the_log_calls_missed",
    ),
    "an agent that is not invited": ("unit/test_answer.py::test_a_round_to_which_the_log_does_not_invite_is_refused",),
    "rounds backwards, and beyond the contract": (
        "unit/test_answer.py::test_rounds_only_increase_and_end_with_the_contract",
    ),
    "a closing over a rewritten past": (
        "unit/test_closing_client.py::test_a_rewritten_past",
        "e2e/test_egress.py::test_a_log_that_was_rewritten_before_the_close_is_objected_to",
    ),
    "a closing without an entry that was shown": (
        "unit/test_closing_client.py::test_a_result_that_was_shown_and_is_gone",
    ),
    "a closing without this agent's update": ("unit/test_closing_client.py::test_an_update_that_is_missing",),
    "two closings of one size": (
        "unit/test_closing_client.py::test_two_closings_of_one_size_are_never_both_countersigned",
    ),
    "a withheld closing: the record, the alarm, and that a third party can check it": (
        "unit/test_silence.py::test_afterwards_there_is_a_signed_record_and_an_alarm",
        "unit/test_silence.py::test_anybody_can_verify_it",
    ),
    "an operator that goes silent: no answer, none of this form, never heard of the contract": (
        "unit/test_silence.py::test_whatever_it_answers_but_a_closing",
    ),
}
"""What a server may do beside its orders -> where a test of it stands."""

HONEST = orders.build_order


def round_of(order: bytes) -> int:
    return int(Order.from_bytes(read_envelope(order).body).round)


class Wire(ExecutorChild):
    """Stands for the executor: hands one order over, and keeps what the guard answers."""

    def hand(self, guard: Guard, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        self.guard, self.frames, self.sent = guard, [(order, model)], []
        guard.stopping = False
        guard.loop(Nobody())  # stands for the operator's API
        ((kind, header, array),) = self.sent
        return (header["reply"].encode(), array) if kind == "reply" else None

    @property
    def alive(self) -> bool:
        return True

    def receive(self, _timeout: float) -> Frame | None:
        if not self.frames:
            self.guard.stopping = True
            return None
        order, model = self.frames.pop()
        return Frame(kind="order", header={"order": order.decode(), "bundle": BUNDLE}, array=model)

    def send(self, kind: str, header: dict[str, Any], array: bytes = b"") -> None:
        self.sent.append((kind, header, array))


class Nobody:
    """An operator's API that has nothing to close."""

    def get(self, *_arguments: Any, **_options: Any) -> dict[str, Any]:
        return {"state": "none"}


@dataclasses.dataclass
class Guarded(Agent):
    """An enterprise whose orders go through the real guard."""

    guard: Guard | None = None
    replies: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)

    def __call__(self, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        assert self.guard is not None
        assert isinstance(self.guard.executor, Wire)
        found = self.guard.executor.hand(self.guard, order, model)
        if found is not None:
            self.replies.append(found)
        return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> AgentHome:
    folder = tmp_path_factory.mktemp("home") / "agent"
    made = init(folder, name="Enterprise 1", entity_code=ENTITY, sector="finance", passphrase=PASSPHRASE)
    text = made.config_path.read_text().replace('url = ""', 'url = "https://fl.example.cn:8443"', 1)
    replace_file(made.config_path, text.encode())
    return made


def signed(folder: Path) -> Federation:
    """A contract of two rounds that wants witnesses; few rows, for nobody here looks at the model."""
    terms = {"training__rounds": 2, "training__local_steps": 1, "participation__strict_heads": True}
    return make_federation(folder, COUNTS, data=DIGITS, **terms)


def guarded(federation: Federation, home: AgentHome) -> Guarded:
    """`Enterprise 1` behind its guard, in the federation's transport."""
    plain = federation.agent(1)
    made = Guarded(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
    made.guard = Guard(home=home, config=home.config(), store=plain.desk.store)
    made.guard.desks[plain.desk.contract_id] = plain.desk
    made.guard.executor = Wire(home=home, config=home.config())
    for node, agent in federation.transport.agents.items():
        if agent is plain:
            federation.transport.agents[node] = made  # a dict
            return made
    raise AssertionError


def attacked(monkeypatch: pytest.MonkeyPatch, server: Server, attack: Attack) -> None:
    """Let the server make its orders of round 2 by the attack; what it did to its log is taken back."""

    def build(connection: Connection, contract_id: str, row: Any, participant: str, **more: Any) -> Order:
        order = HONEST(connection, contract_id, row, participant, **more)
        if int(row.round) != ROUND:
            return order
        connection.exec_driver_sql("SAVEPOINT attack")
        try:
            return attack(server, connection, row, participant, more["proofs"], order)
        finally:
            connection.exec_driver_sql("ROLLBACK TO attack")

    monkeypatch.setattr(orders, "build_order", build)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_dishonest_order_is_refused_on_both_sides(
    home: AgentHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    attack, code, head_is_sound = ATTACKS[name]
    federation = signed(tmp_path)
    agent, contract_id = guarded(federation, home), federation.contract.id
    attacked(monkeypatch, Server(federation), attack)
    federation.run()
    desk = agent.desk
    # The operator's side: the agent's signed refusal, in its own log, with the code and no charge.
    assert federation.outcomes(1)["Enterprise 1"] == ("admitted", "ADMITTED")
    assert federation.outcomes(ROUND)["Enterprise 1"] == ("refused", code)
    reply = Reply.from_bytes(agent.replies[-1][0])
    refusal = open_signed(reply.refusal, Refusal, desk.run_keys[desk.participant])
    assert (refusal.round, refusal.code, refusal.attempts) == (ROUND, code, 0)
    assert agent.replies[-1][1] == b""
    # Nothing trained, nothing charged; entered in the egress ledger.
    assert [row.round for row in desk.store.rows(desk.data_set)] == [1, 1]
    (entry,) = [e for e in desk.store.egress() if e.round == ROUND]
    assert (entry.kind, entry.sha256) == (EgressKind.REFUSAL, sha256_hex(agent.replies[-1][0]))
    # Nothing countersigned but a sound head; what the agent holds is what it held.
    assert (reply.countersignature is not None) == head_is_sound
    heads = desk.store.heads(contract_id)
    first = Reply.from_bytes(agent.replies[0][0]).countersignature
    assert first is not None
    held = Countersignature.from_bytes(first.body)
    assert (heads[-1].size > held.size) == head_is_sound
    assert [h.size for h in heads if h.countersigned] == [held.size] + [heads[-1].size] * head_is_sound
    # `status` and `head`.
    assert {(a["code"], a["contract"]) for a in views.status(home, desk.store, "")["alarms"]} == {(code, contract_id)}
    (alarm,) = [a for a in desk.store.alarms() if a.code == code and a.evidence]
    order = open_signed(read_envelope(alarm.evidence), Order, desk.run_keys[federation.contract.operator.id])
    assert (order.round, order.participant) == (ROUND, desk.participant), "the operator's own signature shows it"
    (head,) = views.heads(desk.store, [contract_id])
    assert (head["size"], head["root"], head["countersigned"]) == (heads[-1].size, heads[-1].root, True)
    show_heads({"heads": [head]})
    assert show_fingerprint(heads[-1].root) in " ".join(capsys.readouterr().out.split())


def test_an_honest_server_is_obeyed(home: AgentHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the table looks at something: without an attack the same federation trains both rounds."""
    federation = signed(tmp_path)
    agent = guarded(federation, home)
    attacked(monkeypatch, Server(federation), lambda *arguments: arguments[-1])
    assert federation.run() == "completed"
    assert federation.outcomes(ROUND)["Enterprise 1"] == ("admitted", "ADMITTED")
    assert views.status(home, agent.desk.store, "")["alarms"] == []
    assert len(agent.desk.store.sent_updates(federation.contract.id)) == 2


def test_two_heads_of_one_size_are_never_both_countersigned(
    home: AgentHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second order of a round shows another log of the length that was countersigned: no word on it leaves."""
    federation = signed(tmp_path)
    agent, server = guarded(federation, home), Server(federation)
    honest: list[tuple[bytes, bytes]] = []
    federation.transport.before = lambda _node, data, model: honest.append((data, model)) or (data, model)
    forged: list[Order] = []

    def keep(server: Server, connection: Connection, row: Any, participant: str, proofs: Any, order: Order) -> Order:
        if participant == agent.desk.participant:
            forged.append(rewrites(server, connection, row, participant, proofs, order))
        return order

    attacked(monkeypatch, server, keep)
    assert federation.run() == "completed"
    before = agent.desk.store.heads(federation.contract.id)
    model = next(m for data, m in honest if round_of(data) == ROUND)
    data = sign(forged[0], federation.operator_run_key).to_bytes()
    assert agent(data, model) is None, "the update of that round stands; nothing more is said"
    assert agent.desk.store.heads(federation.contract.id) == before
    assert "HEAD_INCONSISTENT" in {a["code"] for a in views.status(home, agent.desk.store, "")["alarms"]}
    assert len(agent.desk.store.sent_updates(federation.contract.id)) == 2


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_other_attacks_are_tested_where_the_table_says(name: str) -> None:
    for place in ELSEWHERE[name]:
        file, _, test = place.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place
