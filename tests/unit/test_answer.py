"""The agent against a dishonest or broken operator: what it refuses, what it countersigns, what it charges."""

import dataclasses
import datetime
import sqlite3
from contextlib import closing
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from tests.support.federation import BUNDLE, Federation, declare_another, make_federation

from fedpact_client.answer import BEFORE_ROWS, TrainingFailedError, answer, open_contract
from fedpact_client.order import check_order, check_results, count_witnesses, open_order
from fedpact_client.store import Store
from fedpact_contract import merkle
from fedpact_contract.contract import Delegation
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.log import (
    Body,
    Checkpoint,
    Countersignature,
    Entry,
    Proved,
    ReplyMissed,
    RoundOpened,
    UpdateDecided,
)
from fedpact_contract.messages import Head, HeadStep, Order, Receipt, Refusal, Reply, Update
from fedpact_contract.record import Envelope, Record, read_envelope, sign
from fedpact_contract.request import parse_instant


@pytest.fixture(autouse=True)
def resend_at_once(monkeypatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)


class Operator:
    """Holds the orders of a run, so that a test can forge the next one with the operator's own key."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.orders: dict[tuple[int, str], tuple[bytes, bytes]] = {}
        federation.transport.before = self.keep

    def keep(self, node: str, order: bytes, model: bytes):
        record = self.read(order)
        self.orders[record.round, record.participant] = (order, model)
        return order, model

    @staticmethod
    def read(order: bytes) -> Order:
        return Order.from_bytes(read_envelope(order).body)

    def forge(self, order: bytes, **changes) -> bytes:
        record = self.read(order).model_copy(update=changes)
        return sign(record, self.federation.operator_run_key).to_bytes()


@pytest.fixture
def world(tmp_path):
    """A federation stopped before round 2, the operator's forger, and the first agent's next order."""
    federation = make_federation(tmp_path)
    operator = Operator(federation)
    held = {}

    def stop_at_two(node, order, model):
        if Operator.read(order).round == 2:
            held[Operator.read(order).participant] = (order, model)
            return None
        return operator.keep(node, order, model)

    federation.transport.before = stop_at_two
    loop = federation.loop()

    def stop(_seconds: float) -> None:
        if len(held) == 4:
            raise KeyboardInterrupt

    loop.sleep = stop
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    agent = federation.agent(1)
    return federation, operator, agent, *held[agent.desk.participant]


def refusal(ready) -> Refusal:
    reply = Reply.from_bytes(ready.reply)
    assert reply.refusal is not None
    return Refusal.from_bytes(reply.refusal.body)


def countersigned(ready) -> bool:
    return Reply.from_bytes(ready.reply).countersignature is not None


def charged(agent) -> int:
    return len([r for r in agent.desk.store.rows(agent.desk.data_set) if r.state == "reserved"])


def test_an_honest_order_is_answered_with_a_signed_countersigned_update(world) -> None:
    _, _, agent, order, model = world
    ready = answer(agent.desk, order, model, BUNDLE)
    update = Update.from_bytes(Reply.from_bytes(ready.reply).update.body)
    assert (update.round, update.attempt, update.noise) == (2, 1, "test")
    assert update.ledger_head == agent.desk.store.ledger_head(agent.desk.data_set)
    assert (update.head.size == Operator.read(order).heads[-1] and False) or countersigned(ready)
    assert len(ready.array) == 4 * 650


def test_the_same_order_again_gets_the_same_bytes_and_no_second_charge(world) -> None:
    _, _, agent, order, model = world
    first = answer(agent.desk, order, model, BUNDLE)
    assert answer(agent.desk, order, model, BUNDLE) == first
    assert charged(agent) == 2


def test_an_order_without_the_receipt_is_refused_and_not_countersigned(world) -> None:
    _, operator, agent, order, model = world
    ready = answer(agent.desk, operator.forge(order, results=()), model, BUNDLE)
    assert refusal(ready).code == "RECEIPT_MISSING"
    assert not countersigned(ready)
    assert charged(agent) == 1


def test_a_receipt_for_another_update_is_refused(world) -> None:
    federation, operator, agent, order, model = world
    others = [p for p in federation.contract.by_id() if p != agent.desk.participant]
    from fedpact_server import logbook

    with federation.database.read() as connection:
        head = Operator.read(order).heads[-1]
        size = Checkpoint.from_bytes(head.checkpoint.body).size
        entries = logbook.read_entries(connection, federation.contract.id)
        index = next(
            i for i, e in enumerate(entries) if e.type == "update-decided" and e.body["participant"] == others[0]
        )
        stolen = (logbook.prove(connection, federation.contract.id, index, size),)
    ready = answer(agent.desk, operator.forge(order, results=stolen), model, BUNDLE)
    assert refusal(ready).code == "RECEIPT_WRONG"
    assert not countersigned(ready)


def test_another_base_model_is_refused(world) -> None:
    _, operator, agent, order, model = world
    other = (np.frombuffer(model, "<f8") + 1e-9).tobytes()
    ready = answer(agent.desk, order, other, BUNDLE)
    assert refusal(ready).code == "BASE_MODEL_MISMATCH"
    assert countersigned(ready), "the head was fine: it is countersigned in a refusal too"
    from fedpact_contract.arrays import model_digest

    ready = answer(agent.desk, operator.forge(order, base_digest=model_digest(other)), other, BUNDLE)
    assert refusal(ready).code == "BASE_MODEL_MISMATCH"
    assert charged(agent) == 1


def test_round_1_begins_at_the_contracts_initial_model(world) -> None:
    """Log, order and model agree, and the contract names another one."""
    _, _, agent, data, model = world
    order, known = Operator.read(data), agent.desk.known(0)
    shown, head = opened_alone(order.model_copy(update={"round": 1}), round=1)
    known = dataclasses.replace(known, latest=0)
    with pytest.raises(RefusedError, match="BASE_MODEL_MISMATCH"):
        check_order(shown, model, head, known)
    begins = known.contract.model.model_copy(update={"initial_digest": order.base_digest})
    named = known.contract.model_copy(update={"model": begins})
    check_order(shown, model, head, dataclasses.replace(known, contract=named))


def forked_head(federation, order, key=None, origin=None) -> HeadStep:
    """A signed checkpoint of a log in which an earlier entry was rewritten."""
    from fedpact_server import logbook

    with federation.database.read() as connection:
        hashes = logbook.leaves(connection, federation.contract.id)
    last = Checkpoint.from_bytes(Operator.read(order).heads[-1].checkpoint.body)
    hashes = [merkle.leaf_hash(b"rewritten"), *hashes[1 : last.size]]
    record = Checkpoint(origin=origin or federation.contract.id, size=last.size, root=merkle.root(hashes).hex())
    since = Operator.read(order).since
    proof = merkle.consistency_proof(hashes, since)
    return HeadStep(
        checkpoint=sign(record, key or federation.operator_run_key), consistency=tuple(p.hex() for p in proof)
    )


def test_a_rewritten_log_is_refused_and_never_countersigned(world) -> None:
    federation, operator, agent, order, model = world
    forged = operator.forge(order, heads=(forked_head(federation, order),))
    ready = answer(agent.desk, forged, model, BUNDLE)
    assert refusal(ready).code == "HEAD_INCONSISTENT"
    assert not countersigned(ready)
    assert "HEAD_INCONSISTENT" in {a.code for a in agent.desk.store.alarms()}
    evidence = next(a.evidence for a in agent.desk.store.alarms() if a.code == "HEAD_INCONSISTENT")
    assert evidence == forged, "the signed order is kept: it proves the fork to others"


def test_a_chain_that_starts_over_is_refused(world) -> None:
    federation, operator, agent, order, model = world
    step = forked_head(federation, order)
    forged = operator.forge(order, since=0, heads=(HeadStep(checkpoint=step.checkpoint, consistency=()),))
    assert refusal(answer(agent.desk, forged, model, BUNDLE)).code == "HEAD_INCONSISTENT"


def test_a_chain_from_an_unknown_head_is_refused(world) -> None:
    _, operator, agent, order, model = world
    assert refusal(answer(agent.desk, operator.forge(order, since=3), model, BUNDLE)).code == "HEAD_UNKNOWN_START"


def test_an_older_log_is_refused(world) -> None:
    _, operator, agent, order, model = world
    first = Operator.read(operator.orders[1, agent.desk.participant][0])
    heads = first.heads
    forged = operator.forge(order, since=first.since, heads=heads)
    agent_heads = {h.size for h in agent.desk.store.heads(agent.desk.contract_id)}
    assert max(agent_heads) == Checkpoint.from_bytes(heads[-1].checkpoint.body).size
    assert refusal(answer(agent.desk, forged, model, BUNDLE)).code == "RECEIPT_WRONG", "no receipt can be in it"


def test_a_log_shorter_than_one_that_was_seen_is_refused(world) -> None:
    _, operator, agent, order, model = world
    first = Operator.read(operator.orders[1, agent.desk.participant][0])
    answer(agent.desk, order, model, BUNDLE)
    seen = agent.desk.store.heads(agent.desk.contract_id)
    ready = answer(agent.desk, operator.forge(order, round=3, since=first.since, heads=first.heads), model, BUNDLE)
    assert refusal(ready).code == "HEAD_OLDER"
    assert not countersigned(ready)
    assert agent.desk.store.heads(agent.desk.contract_id) == seen


def test_a_round_to_which_the_log_does_not_invite_is_refused(world) -> None:
    """All else is right: the round is open in the log, from this very model."""
    _, _, agent, data, model = world
    order, known = Operator.read(data), agent.desk.known(2)
    shown, head = opened_alone(order)
    check_order(shown, model, head, known)
    invited = RoundOpened.parse(order.opened.entry.body, code="X").invited
    shown, head = opened_alone(order, invited=tuple(p for p in invited if p != known.participant))
    with pytest.raises(RefusedError, match="NOT_INVITED"):
        check_order(shown, model, head, known)


def test_a_clock_that_was_set_back_is_refused_and_nothing_is_trained(world) -> None:
    """The operator's signed deadline says when the round was opened: a term that has ended does not begin again."""
    _, _, agent, data, model = world
    opened = RoundOpened.parse(Operator.read(data).opened.entry.body, code="X")
    whole = datetime.timedelta(seconds=agent.desk.contract.participation.deadline_seconds)
    began = parse_instant(opened.deadline) - whole
    agent.desk = dataclasses.replace(agent.desk, now=lambda: began - datetime.timedelta(seconds=301))
    rows = agent.desk.store.rows(agent.desk.data_set)
    ready = answer(agent.desk, data, model, BUNDLE)
    assert refusal(ready).code == "CLOCK_SET_BACK"
    assert agent.desk.store.rows(agent.desk.data_set) == rows, "nothing is charged"
    assert agent.desk.store.alarms()[-1].code == "CLOCK_SET_BACK"


def test_a_clock_may_be_five_minutes_behind(world) -> None:
    _, _, agent, data, model = world
    opened = RoundOpened.parse(Operator.read(data).opened.entry.body, code="X")
    whole = datetime.timedelta(seconds=agent.desk.contract.participation.deadline_seconds)
    late = parse_instant(opened.deadline) - whole - datetime.timedelta(seconds=300)
    agent.desk = dataclasses.replace(agent.desk, now=lambda: late)
    assert answer(agent.desk, data, model, BUNDLE).kind == "update"


def opened_alone(order: Order, **changes: Any) -> tuple[Order, Head]:
    """The order, its round opened so in a log that holds nothing else."""
    opened = RoundOpened.parse(order.opened.entry.body, code="X").model_copy(update=changes)
    entry = Entry.of(opened)
    head = Head(size=1, root=merkle.root([entry.leaf_hash]).hex())
    return order.model_copy(update={"opened": Proved(entry=entry, index=0, proof=())}), head


@pytest.mark.parametrize(
    ("options", "code"),
    [({"key": generate_key()}, "HEAD_SIGNATURE"), ({"origin": "1" * 64}, "HEAD_ORIGIN")],
    ids=["another key", "another log"],
)
def test_a_foreign_checkpoint_is_refused(world, options, code) -> None:
    federation, operator, agent, order, model = world
    forged = operator.forge(order, heads=(forked_head(federation, order, **options),))
    assert refusal(answer(agent.desk, forged, model, BUNDLE)).code == code


def test_an_order_that_the_operator_did_not_sign_gets_no_answer_at_all(world) -> None:
    _, _, agent, order, model = world
    forged = sign(Operator.read(order), generate_key()).to_bytes()
    assert answer(agent.desk, forged, model, BUNDLE) is None
    assert "ORDER_SIGNATURE" in {a.code for a in agent.desk.store.alarms()}
    assert "ORDER_FORM" not in {a.code for a in agent.desk.store.alarms()}
    assert answer(agent.desk, b"rubbish", model, BUNDLE) is None
    assert "ORDER_FORM" in {a.code for a in agent.desk.store.alarms()}
    assert charged(agent) == 1


def test_half_an_order_gets_no_answer_even_where_the_operator_signed_it(world) -> None:
    federation, _, agent, _, model = world

    class HalfAnOrder(Record):
        TYPE = Order.TYPE
        contract_id: str = agent.desk.contract_id

    data = sign(HalfAnOrder(), federation.operator_run_key).to_bytes()
    with pytest.raises(RefusedError, match="ORDER_FORM"):
        open_order(data, agent.desk.known(0))
    assert answer(agent.desk, data, model, BUNDLE) is None
    assert {a.code for a in agent.desk.store.alarms()} == {"ORDER_FORM"}


def test_an_order_for_somebody_else_gets_no_answer(world) -> None:
    federation, operator, agent, order, model = world
    other = federation.agent(2).desk.participant
    forged = operator.forge(order, participant=other)
    assert answer(agent.desk, forged, model, BUNDLE) is None
    (alarm,) = [a for a in agent.desk.store.alarms() if a.code == "ORDER_ADDRESSEE"]
    assert alarm.evidence == forged, "the operator signed it"


def test_a_round_that_is_not_open_in_the_log_is_refused(world) -> None:
    _, operator, agent, order, model = world
    record = Operator.read(order)
    opened = RoundOpened.parse(record.opened.entry.body, code="X")
    invented = record.opened.model_copy(update={"entry": Entry.of(opened)})
    ready = answer(agent.desk, operator.forge(order, opened=invented), model, BUNDLE)
    assert refusal(ready).code == "ROUND_NOT_OPENED"


def test_another_bundle_trains_nothing(world) -> None:
    _, _, agent, order, model = world
    ready = answer(agent.desk, order, model, "cd" * 32)
    assert refusal(ready).code == "CODE_BUNDLE_MISMATCH"
    assert charged(agent) == 1


def test_witnesses_on_another_head_are_refused(world) -> None:
    federation, operator, agent, order, model = world
    other = federation.agent(2)
    size = agent.desk.store.heads(agent.desk.contract_id)[-1].size
    lie = Countersignature(origin=federation.contract.id, size=size, root="0" * 64, participant=other.desk.participant)
    forged = operator.forge(order, countersignatures=(sign(lie, other.desk.run_key),))
    assert refusal(answer(agent.desk, forged, model, BUNDLE)).code == "WITNESS_WRONG"


def test_few_witnesses_raise_an_alarm_and_with_strict_heads_refuse(tmp_path) -> None:
    federation = make_federation(tmp_path, participation__strict_heads=True, training__rounds=2)
    operator = Operator(federation)
    federation.transport.before = lambda node, order, model: (
        (operator.forge(order, countersignatures=()), model) if Operator.read(order).round == 2 else (order, model)
    )
    federation.run()
    assert {code for _, code in federation.outcomes(2).values()} == {"HEAD_FEW_WITNESSES"}


def test_old_witnesses_prove_nothing_of_what_came_since(tmp_path) -> None:
    """An operator that shows everybody another log from round 2 on has countersignatures of round 1 to show."""
    federation = make_federation(tmp_path, participation__strict_heads=True, training__rounds=3)
    operator, shown = Operator(federation), {}

    def stale(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes]:
        record = Operator.read(order)
        if record.round == 2:
            shown[record.participant] = record.countersignatures
            assert len(record.countersignatures) >= 2
        if record.round < 3:
            return order, model
        return operator.forge(order, countersignatures=shown[record.participant]), model

    federation.transport.before = stale
    federation.run()
    assert {code for _, code in federation.outcomes(2).values()} == {"ADMITTED"}
    assert {code for _, code in federation.outcomes(3).values()} == {"HEAD_FEW_WITNESSES"}


def test_a_lost_trainer_is_charged_and_a_spare_attempt_follows(tmp_path) -> None:
    federation = make_federation(tmp_path)
    agent = federation.agent(1)
    seen = []
    agent.crash = lambda attempt: (seen.append(attempt), len(seen) == 1)[1]
    assert federation.run() == "completed"
    rows = agent.desk.store.rows(agent.desk.data_set)
    assert [r.state for r in rows] == ["reserved", "reserved", "spent", "reserved", "spent", "reserved", "spent"]
    assert [r.attempt for r in rows if r.round == 1] == [1, 2, 2]
    assert federation.outcomes(1)["Enterprise 1"] == ("admitted", "ADMITTED")


def test_without_a_spare_attempt_the_round_is_missed_and_stays_charged(tmp_path) -> None:
    federation = make_federation(tmp_path, privacy__spare_attempts=0)
    agent = federation.agent(1)
    agent.crash = lambda attempt: len(agent.desk.store.rows(agent.desk.data_set)) == 1
    assert federation.run() == "completed"
    kind, code = federation.outcomes(1)["Enterprise 1"]
    assert (kind, code) == ("refused", "ATTEMPTS_EXHAUSTED")
    assert charged(agent) == 3, "the crashed attempt of round 1 and those of rounds 2 and 3"


def test_other_code_than_was_signed_trains_nothing(world, monkeypatch) -> None:
    """An agent that was upgraded after it signed."""
    _, _, agent, order, model = world
    before = charged(agent)
    monkeypatch.setattr("fedpact_models.code.models_digest", lambda: "e" * 64)
    found = refusal(answer(agent.desk, order, model, BUNDLE))
    assert (found.code, found.attempts, charged(agent)) == ("CODE_MODELS_MISMATCH", 0, before)


def test_a_failure_of_the_data_is_charged_refused_and_never_retried(tmp_path) -> None:
    federation = make_federation(tmp_path)
    agent = federation.agent(2)
    tries = []

    def train(contract, round_number, attempt, base):
        tries.append(round_number)
        raise TrainingFailedError("TRAINING_NOT_FINITE", "the reason stays here", file="/secret/path.csv")

    agent.desk = agent.desk.__class__(**{f: getattr(agent.desk, f) for f in agent.desk.__slots__} | {"train": train})
    federation.run()
    assert federation.outcomes(1)["Enterprise 2"] == ("refused", "TRAINING_FAILED")
    assert "TRAINING_NOT_FINITE" in {a.code for a in agent.desk.store.alarms()}
    assert tries == [1, 2], "once a round, until the invitations end"
    log = b"".join(entry.to_bytes() for entry in federation.entries())
    assert b"secret" not in log
    assert [r.state for r in agent.desk.store.rows(agent.desk.data_set)] == ["reserved", "failed"] * 2


def test_rows_known_as_another_data_set_are_not_released(tmp_path) -> None:
    federation = make_federation(tmp_path)
    agent = federation.agent(2)
    store, train, leaving = agent.desk.store, agent.desk.train, []

    def swapped(*order):
        leaving.append(dataclasses.replace(train(*order), fingerprints=("1" * 64, "2" * 64, "3" * 64)))
        return leaving[-1]

    declare_another(agent, "2" * 64)
    agent.desk = dataclasses.replace(agent.desk, train=swapped)
    federation.run()
    assert leaving
    assert federation.outcomes(1)["Enterprise 2"] == ("refused", "TRAINING_FAILED")
    assert "DATA_SET_KNOWN_ELSEWHERE" in {a.code for a in store.alarms()}
    assert store.versions("another") == ["2" * 64]
    assert store.versions(agent.desk.data_set) == [], "nothing is entered where one is another's"


def test_what_was_trained_on_is_entered_with_its_place(tmp_path) -> None:
    federation = make_federation(tmp_path)
    agent = federation.agent(2)
    federation.run()
    trained = agent.desk.train(federation.contract, 1, 1, bytes(8 * 650))
    assert agent.desk.store.versions(agent.desk.data_set) == [*agent.desk.own_file(), *trained.fingerprints]


def test_copies_among_the_rows_are_refused_before_anything_is_charged(world) -> None:
    """What leaves is the code of any failed attempt: which fault it was stays here."""
    _, _, agent, order, model = world

    def copies() -> None:
        raise InputError("DATA_DUPLICATES", "Of the 60 rows 30 are exact copies.", file="/secret/rows.csv")

    before = agent.desk.store.budget(agent.desk.data_set).charged
    ready = answer(dataclasses.replace(agent.desk, own_rows=copies), order, model, BUNDLE)
    assert (refusal(ready).code, refusal(ready).attempts, countersigned(ready)) == ("TRAINING_FAILED", 0, True)
    assert (charged(agent), agent.desk.store.budget(agent.desk.data_set).charged) == (1, before)
    assert b"DUPLICATES" not in ready.reply
    assert b"secret" not in ready.reply
    (alarm,) = [a for a in agent.desk.store.alarms() if a.code == "DATA_DUPLICATES"]
    assert "30 are exact copies" in alarm.detail


def test_of_a_broken_rule_only_the_code_leaves_and_nothing_is_charged(world) -> None:
    _, _, agent, order, model = world

    def broken() -> None:
        raise RefusedError("QUALITY_GATE", "missing: column secret, 3 of 60", file="/secret/rows.csv", field="secret")

    before = agent.desk.store.budget(agent.desk.data_set).charged
    ready = answer(dataclasses.replace(agent.desk, own_rows=broken), order, model, BUNDLE)
    assert (refusal(ready).code, refusal(ready).attempts, countersigned(ready)) == ("QUALITY_GATE", 0, True)
    assert (charged(agent), agent.desk.store.budget(agent.desk.data_set).charged) == (1, before)
    assert b"secret" not in ready.reply
    assert b"3 of 60" not in ready.reply
    (alarm,) = [a for a in agent.desk.store.alarms() if a.code == "QUALITY_GATE"]
    assert "3 of 60" in alarm.detail


def test_a_participant_with_copies_gets_through_no_round_and_costs_nothing(tmp_path) -> None:
    federation = make_federation(tmp_path)
    agent = federation.agent(2)

    def copies() -> None:
        raise InputError("DATA_DUPLICATES", "Of the 60 rows 30 are exact copies.")

    agent.desk = dataclasses.replace(agent.desk, own_rows=copies)
    federation.run()
    assert federation.outcomes(1)["Enterprise 2"] == ("refused", "TRAINING_FAILED")
    assert federation.outcomes(1)["Enterprise 1"][0] == "admitted"
    assert agent.desk.store.rows(agent.desk.data_set) == ()


@pytest.mark.parametrize("code", sorted(BEFORE_ROWS))
def test_a_database_that_does_not_answer_is_told_and_costs_nothing(world, code: str) -> None:
    """No row has anything to do with it: the code itself leaves, the details stay."""
    _, _, agent, order, model = world

    def gone() -> None:
        raise InputError(code, "Nothing answers at db.clinic.", file="postgresql://db.clinic:5432/secret")

    ready = answer(dataclasses.replace(agent.desk, own_rows=gone), order, model, BUNDLE)
    assert (refusal(ready).code, refusal(ready).attempts, countersigned(ready)) == (code, 0, True)
    assert charged(agent) == 1
    assert b"clinic" not in ready.reply
    assert [a.detail for a in agent.desk.store.alarms() if a.code == code]


@pytest.mark.parametrize(
    ("error", "code"), [(RefusedError, "DATA_SET_KNOWN_ELSEWHERE"), (InputError, "CONFIG_DATA_SET")]
)
def test_a_file_that_is_not_its_own_is_refused_before_anything_is_charged(world, error, code) -> None:
    _, _, agent, order, model = world

    def not_its_own() -> str:
        raise error(code, "The file is known as data set another.")

    ready = answer(dataclasses.replace(agent.desk, own_file=not_its_own), order, model, BUNDLE)
    assert refusal(ready).code == code
    assert charged(agent) == 1


def test_an_update_that_the_operator_forgets_is_noticed_in_the_next_order(world) -> None:
    _, operator, agent, order, model = world
    assert operator.read(order).results, "the receipt of round 1 is shown"
    entry = Entry.of(ReplyMissed(round=1, participant=agent.desk.participant, code="DEADLINE"))
    forged = operator.forge(order, results=(operator.read(order).results[0].model_copy(update={"entry": entry}),))
    assert refusal(answer(agent.desk, forged, model, BUNDLE)).code == "RECEIPT_WRONG"


def test_a_restored_ledger_is_refused(world, tmp_path) -> None:
    _, operator, agent, order, _ = world
    record = operator.read(order)
    body = record.results[0].entry.body
    update = Update.from_bytes(read_envelope(body["update"]).body)
    assert agent.desk.store.check_logged_head(agent.desk.data_set, update.ledger_head) is None
    with pytest.raises(RefusedError) as err:
        agent.desk.store.check_logged_head(agent.desk.data_set, "9" * 64)
    assert err.value.code == "LEDGER_RESTORED"


def test_an_order_shows_an_agent_whose_ledger_was_put_back_what_it_lost(world) -> None:
    federation, operator, agent, order, model = world
    place = [p.id for p in federation.contract.participants].index(agent.desk.participant)
    path = federation.home.parent / f"agent{place}" / "agent.db"
    agent.desk.store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for table in ("ledger", "outbox", "heads", "results"):  # as a copy from before the first round has them
            connection.execute(f"DELETE FROM {table}")
        for _, sql in triggers:
            connection.execute(sql)
    with Store(path) as store:
        agent.desk = dataclasses.replace(agent.desk, store=store)
        newest = Operator.read(order).heads[-1].checkpoint
        whole = operator.forge(order, since=0, heads=(HeadStep(checkpoint=newest, consistency=()),))
        ready = answer(agent.desk, whole, model, BUNDLE)
        assert refusal(ready).code == "LEDGER_RESTORED"
        assert not countersigned(ready)
        assert charged(agent) == 0


def logged(order: Order, body: Body) -> tuple[Order, Head]:
    """The order with this one result, in a log that holds nothing else."""
    entry = Entry.of(body)
    head = Head(size=1, root=merkle.root([entry.leaf_hash]).hex())
    return order.model_copy(update={"results": (Proved(entry=entry, index=0, proof=()),)}), head


def test_another_participants_missed_reply_is_no_word_on_mine(world) -> None:
    federation, _, agent, data, _ = world
    order, known = Operator.read(data), agent.desk.known(2)

    def missed(participant: str) -> tuple[Order, Head]:
        return logged(order, ReplyMissed(round=1, participant=participant, code="DEADLINE"))

    assert check_results(*missed(known.participant), known) == (None, True)
    with pytest.raises(RefusedError, match="RECEIPT_WRONG"):
        check_results(*missed(federation.agent(2).desk.participant), known)


@pytest.mark.parametrize(
    "change",
    [{"update_digest": "1" * 64}, {"round": 2}, {"participant": "1" * 64}],
    ids=lambda change: next(iter(change)),
)
def test_a_receipt_says_what_was_sent_by_whom_and_when(world, change) -> None:
    """The entry holds this agent's very update; the operator's signed receipt beside it is of something else."""
    federation, _, agent, data, _ = world
    order, known = Operator.read(data), agent.desk.known(2)
    body = UpdateDecided.parse(order.results[0].entry.body, code="X")
    receipt = Receipt.from_bytes(read_envelope(body.receipt).body)

    def shown(**changes) -> tuple[Order, Head]:
        signed = sign(receipt.model_copy(update=changes), federation.operator_run_key)
        return logged(order, body.model_copy(update={"receipt": signed.plain()}))

    update = Update.from_bytes(read_envelope(body.update).body)
    assert check_results(*shown(), known) == (update.ledger_head, False)
    with pytest.raises(RefusedError, match="RECEIPT_WRONG"):
        check_results(*shown(**change), known)


def test_rounds_only_increase_and_end_with_the_contract(world) -> None:
    _, _, agent, data, model = world
    order, known = Operator.read(data), agent.desk.known(2)
    shown, head = opened_alone(order)
    check_order(shown, model, head, known)
    with pytest.raises(RefusedError, match="ROUND_BACKWARDS"):
        check_order(shown, model, head, dataclasses.replace(known, latest=3))
    training = known.contract.training.model_copy(update={"rounds": 1})
    shorter = known.contract.model_copy(update={"training": training})
    with pytest.raises(RefusedError, match="ROUND_BEYOND_CONTRACT"):
        check_order(shown, model, head, dataclasses.replace(known, contract=shorter))


def test_an_order_that_names_another_base_than_log_and_model_is_refused(world) -> None:
    _, operator, agent, order, model = world
    ready = answer(agent.desk, operator.forge(order, base_digest="1" * 64), model, BUNDLE)
    assert refusal(ready).code == "BASE_MODEL_MISMATCH"
    assert charged(agent) == 1


def test_nobody_is_a_witness_of_what_it_saw_itself(world) -> None:
    federation, _, agent, data, _ = world
    order, known = Operator.read(data), agent.desk.known(2)
    seen = known.heads[-1]

    def witnesses(*numbers: int) -> int:
        signed = []
        for number in numbers:
            desk = federation.agent(number).desk
            record = Countersignature(
                origin=known.contract_id, size=seen.size, root=seen.root, participant=desk.participant
            )
            signed.append(sign(record, desk.run_key))
        return count_witnesses(order.model_copy(update={"countersignatures": tuple(signed)}), known)

    assert witnesses(1) == 0
    assert witnesses(1, 2) == 1
    assert witnesses(1, 2, 3, 3) == 2


def second_delegation(federation: Federation) -> Envelope[Delegation]:
    """The operator delegates another run key: which of the two would count?"""
    contract = federation.contract
    key = public_hex(generate_key())
    record = Delegation(contract_id=contract.id, party=contract.operator.id, run_key=key)
    return sign(record, federation.operator_key)


def test_a_contract_without_every_signature_is_not_opened(world) -> None:
    federation, *_ = world
    signed = federation.entries()[0].open().signed
    participant = federation.agent(1).desk.participant
    assert open_contract(signed, participant)[0].id == federation.contract.id
    fewer = signed.model_copy(update={"delegations": signed.delegations[:-1]})
    with pytest.raises(RefusedError) as err:
        open_contract(fewer, participant)
    assert err.value.code == "CONTRACT_NOT_SIGNED"
    unsigned = signed.contract.model_copy(update={"signatures": signed.contract.signatures[1:]})
    with pytest.raises(RefusedError) as err:
        open_contract(signed.model_copy(update={"contract": unsigned}), participant)
    assert err.value.code == "CONTRACT_NOT_SIGNED"
    with pytest.raises(RefusedError):
        open_contract(signed, "0" * 64)
    stranger = generate_key()
    record = Delegation.from_bytes(signed.delegations[0].body)
    theirs = sign(record.model_copy(update={"party": "0" * 64}), stranger)
    with pytest.raises(FaultError) as fault:
        open_contract(signed.model_copy(update={"delegations": (*signed.delegations, theirs)}), participant)
    assert fault.value.code == "DELEGATION_STRANGER"
    for again in (signed.delegations[0], second_delegation(federation)):
        with pytest.raises(FaultError) as fault:
            open_contract(signed.model_copy(update={"delegations": (*signed.delegations, again)}), participant)
        assert fault.value.code == "DELEGATION_TWICE"
    changed = signed.contract.model_copy(
        update={"payload": sign(federation.contract.model_copy(update={"title": "Other"})).payload}
    )
    with pytest.raises(FaultError) as fault:
        open_contract(signed.model_copy(update={"contract": changed}), participant)
    assert fault.value.code == "SIGNATURE_INVALID"


def test_the_budget_wall_holds_before_any_data_is_touched(tmp_path) -> None:
    federation = make_federation(tmp_path)
    agent = federation.agent(3)
    touched = []
    original = agent.desk.train

    def train(*a):
        touched.append(a[1])
        return original(*a)

    agent.desk = agent.desk.__class__(**{f: getattr(agent.desk, f) for f in agent.desk.__slots__} | {"train": train})
    store = agent.desk.store
    with store._db.transaction():
        spent = store.budget(agent.desk.data_set).charged + Decimal("0.0001")
        store._db.execute("UPDATE data_sets SET rdp_limit = ?", (str(spent),)) if _has(store, "rdp_limit") else (
            store._db.execute('UPDATE data_sets SET "limit" = ?', (str(spent),))
        )
    federation.run()
    assert federation.outcomes(1)["Enterprise 3"] == ("refused", "BUDGET_EXCEEDED")
    assert touched == []


def _has(store, column: str) -> bool:
    return any(row[1] == column for row in store._db.all("PRAGMA table_info(data_sets)"))
