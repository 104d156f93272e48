"""The round loop with faulty clients, crashes and replacements, over an in-memory transport."""

import contextlib
import dataclasses
import json
import shutil
from datetime import timedelta
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import sqlalchemy as sa
from tests.support.federation import NOW, Federation, fixed_keys, make_federation, set_clocks
from tests.support.noise import FixedNoise

from fedpact_contract.arrays import update_digest
from fedpact_contract.errors import FailedError, FaultError, InputError, RefusedError, ServiceError
from fedpact_contract.evidence import unpack
from fedpact_contract.keys import generate_key
from fedpact_contract.ledger import GENESIS
from fedpact_contract.log import ReplyMissed, RoundAbandoned, RoundAggregated, RunCompleted, UpdateDecided
from fedpact_contract.messages import Order, PrivacyEvent, Receipt, Refusal, Reply, Update
from fedpact_contract.record import open_signed, read_envelope, sign
from fedpact_contract.replay import replay
from fedpact_contract.report import build
from fedpact_contract.request import utc_now
from fedpact_contract.trust import Trust
from fedpact_contract.verify import verify
from fedpact_models.evaluate import evaluate_coalitions
from fedpact_server import closing, db, driver, logbook, runs, scoring
from fedpact_server.evidence import evidence_files
from fedpact_server.run_state import SupersededError, run_row


@pytest.fixture(autouse=True)
def resend_at_once(monkeypatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)


@pytest.fixture
def federation(tmp_path) -> Federation:
    return make_federation(tmp_path)


def retry(reply: bytes, array: bytes, key, **changes) -> tuple[bytes, bytes]:
    """The same update with other fields, signed by `key`."""
    update = Update.from_bytes(Reply.from_bytes(reply).update.body)
    changed = update.model_copy(update=changes)
    countersignature = Reply.from_bytes(reply).countersignature
    return Reply(update=sign(changed, key), countersignature=countersignature).to_bytes(), array


def phase(federation: Federation) -> str:
    with federation.database.read() as connection:
        return run_row(connection, federation.contract.id).phase


def test_a_run_goes_through_its_rounds_and_completes(federation) -> None:
    assert federation.run() == "completed"
    kinds = federation.kinds()
    assert kinds[0] == "contract-signed"
    assert kinds[-1] == "run-completed"
    assert kinds.count("round-opened") == kinds.count("scores-committed") == 3
    assert all(code == "ADMITTED" for r in (1, 2, 3) for _, code in federation.outcomes(r).values())
    with federation.database.read() as connection:
        rows = connection.execute(sa.select(db.rounds.c.phase, db.rounds.c.timings)).all()
    assert {row.phase for row in rows} == {"committed"}
    assert {"orders", "admission", "aggregation", "contribution", "log"} <= json.loads(rows[0].timings).keys()


def test_receipts_are_the_operators_word_on_the_very_update(federation) -> None:
    federation.run()
    bodies = [entry.open() for entry in federation.entries()]
    decided = [body for body in bodies if isinstance(body, UpdateDecided)]
    assert len(decided) == 12
    from fedpact_contract.keys import public_hex

    key = public_hex(federation.operator_run_key)
    for body in decided:
        receipt = open_signed(read_envelope(body.receipt), Receipt, key)
        update = Update.from_bytes(read_envelope(body.update).body)
        assert receipt.update_digest == update.update_digest
        assert (receipt.decision, receipt.round) == ("admitted", body.round)


TAMPERINGS = {
    "another key": (lambda a, r: retry(r.reply, r.array, generate_key()), "missed", "UPDATE_SIGNATURE"),
    "another base": (
        lambda a, r: retry(r.reply, r.array, a.desk.run_key, base_digest="0" * 64),
        "rejected",
        "UPDATE_BASE_DIGEST",
    ),
    "another round": (lambda a, r: retry(r.reply, r.array, a.desk.run_key, round=2), "rejected", "UPDATE_ROUND"),
    "wrong shape": (
        lambda a, r: retry(r.reply, r.array[:-4], a.desk.run_key, update_digest=update_digest(r.array[:-4])),
        "rejected",
        "UPDATE_SHAPE",
    ),
    "a NaN": (lambda a, r: nan(a, r), "rejected", "UPDATE_NOT_FINITE"),
    "other bytes than signed": (lambda a, r: (r.reply, r.array[4:] + r.array[:4]), "rejected", "UPDATE_DIGEST"),
    "more examples": (
        lambda a, r: retry(r.reply, r.array, a.desk.run_key, num_examples=9999),
        "rejected",
        "UPDATE_METERING",
    ),
    "another privacy event": (
        lambda a, r: retry(
            r.reply, r.array, a.desk.run_key, privacy_event=event(r).model_copy(update={"noise_multiplier": Decimal(9)})
        ),
        "rejected",
        "UPDATE_PRIVACY_EVENT",
    ),
    "an attempt too many": (
        lambda a, r: retry(r.reply, r.array, a.desk.run_key, attempt=9),
        "rejected",
        "UPDATE_ATTEMPT",
    ),
    "the empty ledger's head": (
        lambda a, r: retry(r.reply, r.array, a.desk.run_key, ledger_head=GENESIS),
        "rejected",
        "UPDATE_LEDGER_HEAD",
    ),
    "a huge norm": (lambda a, r: huge(a, r), "rejected", "UPDATE_NORM"),
    "rubbish": (lambda a, r: (b"\x00rubbish", b""), "missed", "CANONICAL_PARSE"),
    "not canonical": (lambda a, r: (r.reply + b"\n", r.array), "missed", "CANONICAL_FORM"),
}


def in_round_one(ready) -> bool:
    update = Reply.from_bytes(ready.reply).update
    return update is not None and Update.from_bytes(update.body).round == 1


def event(ready) -> PrivacyEvent:
    return Update.from_bytes(Reply.from_bytes(ready.reply).update.body).privacy_event


def nan(agent, ready) -> tuple[bytes, bytes]:
    values = np.frombuffer(ready.array, "<f4").copy()
    values[3] = np.nan
    array = values.tobytes()
    return retry(ready.reply, array, agent.desk.run_key, update_digest=update_digest(array))


def huge(agent, ready) -> tuple[bytes, bytes]:
    array = (np.frombuffer(ready.array, "<f4") * 1e6).astype("<f4").tobytes()
    return retry(ready.reply, array, agent.desk.run_key, update_digest=update_digest(array))


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_bad_update_is_turned_away_with_its_code_and_the_round_goes_on(federation, name) -> None:
    tamper, kind, code = TAMPERINGS[name]
    agent = federation.agent(2)
    agent.tamper = lambda ready: tamper(agent, ready) if in_round_one(ready) else (ready.reply, ready.array)
    assert federation.run() in ("completed", "superseded")
    assert federation.outcomes(1)["Enterprise 2"] == (kind, code)
    aggregated = [e.body for e in federation.entries() if e.type == "round-aggregated"]
    assert len(aggregated[0]["admitted"]) == 3
    assert agent.desk.participant not in aggregated[0]["admitted"]


def test_a_replayed_update_is_rejected(federation) -> None:
    agent, kept = federation.agent(1), []

    def replay(ready):
        if in_round_one(ready):
            kept.append((ready.reply, ready.array))
            return kept[0]
        if ready.kind == "refusal":
            return ready.reply, ready.array
        first = kept[0][1]
        return retry(ready.reply, first, agent.desk.run_key, update_digest=update_digest(first))

    agent.tamper = replay
    federation.run()
    assert federation.outcomes(1)["Enterprise 1"][0] == "admitted"
    assert federation.outcomes(2)["Enterprise 1"] == ("rejected", "UPDATE_REPLAYED")


@pytest.mark.parametrize("after", [1, 2])
def test_two_charges_under_one_ledger_head_are_rejected(federation, after) -> None:
    """A head that stands still, and one that goes back over a round, each in round 3; the run goes on."""
    agent, heads = federation.agent(1), {}

    def still(ready):
        update = Update.from_bytes(Reply.from_bytes(ready.reply).update.body)
        heads[update.round] = update.ledger_head
        if update.round != 3:
            return ready.reply, ready.array
        return retry(ready.reply, ready.array, agent.desk.run_key, ledger_head=heads[after])

    agent.tamper = still
    assert federation.run() == "completed"
    assert federation.outcomes(3)["Enterprise 1"] == ("rejected", "UPDATE_LEDGER_HEAD")
    assert federation.outcomes(3)["Enterprise 2"] == ("admitted", "ADMITTED")
    replayed = replay(federation.entries(), privacy=False)
    assert {fault.code for fault in replayed.faults} == {"UPDATE_MISMATCH"}, "the tests' noise, nothing else"


def test_a_refusal_that_says_it_trained_under_an_old_head_is_no_word(federation, monkeypatch) -> None:
    agent = federation.agent(1)

    def refused(ready):
        if in_round_one(ready):
            return ready.reply, ready.array
        reply = Reply.from_bytes(ready.reply)
        update = Update.from_bytes(reply.update.body)
        refusal = Refusal(
            contract_id=update.contract_id,
            round=update.round,
            participant=update.participant,
            code="DATA_NAN",
            attempts=1,
            ledger_head=GENESIS if update.round == 2 else update.ledger_head,
            head=update.head,
        )
        signed = sign(refusal, agent.desk.run_key)
        return Reply(refusal=signed, countersignature=reply.countersignature).to_bytes(), b""

    agent.tamper = refused
    assert federation.run() == "completed"
    assert federation.outcomes(2)["Enterprise 1"] == ("missed", "REFUSAL_LEDGER_HEAD")
    assert federation.outcomes(3)["Enterprise 1"] == ("refused", "DATA_NAN")


def test_a_copy_of_anothers_update_is_rejected(federation) -> None:
    seen = []
    federation.agent(1).tamper = lambda ready: (seen.append(ready.array), (ready.reply, ready.array))[1]
    thief = federation.agent(2)

    def copy(ready):
        if not in_round_one(ready):
            return ready.reply, ready.array
        return retry(ready.reply, seen[0], thief.desk.run_key, update_digest=update_digest(seen[0])) if seen else None

    thief.tamper = copy  # nothing is sent until there is something to copy; the order comes again
    federation.run()
    assert federation.outcomes(1)["Enterprise 2"] == ("rejected", "UPDATE_REPLAYED")


def test_an_update_without_the_countersignature_of_the_head_shown_is_missed(federation) -> None:
    """Or a participant could deny later which log it saw."""
    federation.agent(3).tamper = lambda ready: (
        Reply(update=Reply.from_bytes(ready.reply).update).to_bytes(),
        ready.array,
    )
    federation.run()
    assert federation.outcomes(1)["Enterprise 3"] == ("missed", "REPLY_NOT_COUNTERSIGNED")


@pytest.mark.parametrize("days", [200, -200])
def test_a_clock_that_jumps_ends_no_round_early_and_none_late(federation, days) -> None:
    """What the log says goes by the wall clock, waiting by the monotonic one."""
    loop = federation.loop()
    hours = iter([NOW, *[NOW + timedelta(days=days)] * 1000])
    loop.now = lambda: next(hours)
    behind = timedelta(days=max(days, 0))  # an agent refuses where its clock is behind the operator's
    set_clocks(federation.agents, lambda: NOW + behind)
    assert loop.run() == "completed"
    assert all(set(federation.outcomes(r).values()) == {("admitted", "ADMITTED")} for r in (1, 2, 3))


@pytest.mark.parametrize(("when", "rounds"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_a_run_that_is_stopped_ends_with_what_it_has(federation, when, rounds) -> None:
    """The stop comes while round `when` waits for its replies (0: before the first)."""

    def stop(_node, order, model):
        if _round(order) == when:
            want_stop()
            return None
        return order, model

    def want_stop() -> None:
        with federation.database.write() as connection:
            connection.execute(db.runs.update().values(wanted="stop"))

    federation.transport.before = stop
    if when == 0:
        want_stop()
    assert federation.run() == "stopped"
    kinds = federation.kinds()
    assert kinds.count("round-aggregated") == kinds.count("scores-committed") == rounds
    assert kinds.count("run-completed") == (rounds > 0)
    bodies = [entry.open() for entry in federation.entries()]
    if when:
        missed = [body for body in bodies if isinstance(body, ReplyMissed)]
        assert [(body.round, body.code) for body in missed] == [(when, "RUN_STOPPED")] * 4
        abandoned = next(body for body in bodies if isinstance(body, RoundAbandoned))
        assert (abandoned.round, abandoned.code, abandoned.admitted) == (when, "RUN_STOPPED", ())
    if rounds:
        ended = next(body for body in bodies if isinstance(body, RunCompleted))
        last = [body for body in bodies if isinstance(body, RoundAggregated)][-1]
        assert (ended.rounds, ended.model_digest) == (rounds, last.model_digest)
    assert build(federation.entries())["state"] == ("stopped" if when else "signed")
    with federation.database.read() as connection:
        size = max(logbook.signed_checkpoints(connection, federation.contract.id))
    assert size == len(bodies), "the end is under a checkpoint"


def test_a_normal_coordinator_rejects_test_noise(federation) -> None:
    federation.run(accept_test_noise=False)
    assert set(federation.outcomes(1).values()) == {("rejected", "UPDATE_TEST_NOISE")}
    assert phase(federation) == "stopped"
    assert "round-abandoned" in federation.kinds()


def test_two_rubbish_replies_do_not_shut_out_the_honest_one(federation) -> None:
    agent = federation.agent(3)
    agent.tamper = lambda ready: (b"{}", b"") if agent.answered <= 2 else (ready.reply, ready.array)
    federation.run()
    assert federation.outcomes(1)["Enterprise 3"] == ("admitted", "ADMITTED")


def test_too_few_updates_stop_the_run_and_the_model_stays(tmp_path) -> None:
    federation = make_federation(
        tmp_path, policy={i: {"purposes": ["other"]} for i in (0, 1)}, participation__minimum=3
    )
    assert federation.run() == "stopped"
    assert set(federation.outcomes(1).values()) == {("admitted", "ADMITTED"), ("refused", "POLICY_PURPOSE_MISMATCH")}
    assert federation.kinds()[-1] == "round-abandoned"
    assert "round-aggregated" not in federation.kinds()
    with federation.database.read() as connection:
        assert "ROUND_TOO_FEW_UPDATES" in run_row(connection, federation.contract.id).detail


GROUP = [{"name": "Holding", "members": [f"{i:018d}" for i in (1, 2)]}]


def test_updates_of_one_group_count_once_towards_the_minimum(tmp_path) -> None:
    federation = make_federation(tmp_path, policy={3: {"purposes": ["other"]}}, common_control=GROUP)
    assert federation.contract.participation.minimum == 3
    assert federation.run() == "stopped"
    assert [kind for kind, _ in federation.outcomes(1).values()].count("admitted") == 3
    assert federation.kinds()[-1] == "round-abandoned", "three updates, of two parties"


def test_a_group_and_two_others_make_a_round(tmp_path) -> None:
    federation = make_federation(
        tmp_path, policy={1: {"purposes": ["other"]}}, common_control=GROUP, training__rounds=1
    )
    assert federation.run() == "completed"
    assert [kind for kind, _ in federation.outcomes(1).values()].count("admitted") == 3, "three updates, of three"


def test_with_fewer_participants_than_the_minimum_no_round_begins(federation) -> None:
    with federation.database.write() as connection:
        ids = [p.id for p in federation.contract.participants[:2]]
        connection.execute(db.participants.update().where(db.participants.c.id.in_(ids)).values(state="suspended"))
    loop, waits = federation.loop(), []

    def sleep(_seconds: float) -> None:
        waits.append("two are enough for no round, however long it waits")
        raise KeyboardInterrupt

    loop.sleep = sleep
    with contextlib.suppress(KeyboardInterrupt, SupersededError):
        loop.run()
    assert waits == []
    with federation.database.read() as connection:
        run = run_row(connection, federation.contract.id)
    assert (run.phase, run.detail) == ("stopped", "RUN_TOO_FEW_PARTICIPANTS")
    assert "round-opened" not in federation.kinds()


def test_what_protects_entities_is_asked_before_every_order_and_costs_nothing(tmp_path) -> None:
    clause = {"column": "writer", "max_rows": 2, "method": "mixture-of-gaussians", "epsilon": "9", "delta": "0.00001"}
    federation = make_federation(tmp_path, policy={0: {"max_entity_epsilon": Decimal(8)}}, privacy__entity=clause)
    agent = federation.agent(2)
    agent.desk = dataclasses.replace(agent.desk, entity=None)  # agent.toml lost it since the card was signed
    federation.run()
    codes = {name: code for name, (_, code) in federation.outcomes(1).items()}
    assert codes["Enterprise 1"] == "POLICY_ENTITY_EPSILON"
    assert codes["Enterprise 2"] == "CARD_ENTITY_CHANGED"
    assert codes["Enterprise 3"] == "ADMITTED"
    for number in (1, 2):
        desk = federation.agent(number).desk
        assert desk.store.rows(desk.data_set) == ()


def test_one_refusal_leaves_enough_and_two_in_a_row_end_the_invitations(tmp_path) -> None:
    federation = make_federation(tmp_path, policy={3: {"max_epsilon": Decimal(1)}}, training__rounds=4)
    assert federation.run() == "completed"
    assert federation.outcomes(1)["Enterprise 4"] == ("refused", "POLICY_EPSILON")
    assert federation.outcomes(2)["Enterprise 4"] == ("refused", "POLICY_EPSILON")
    assert "Enterprise 4" not in federation.outcomes(3)
    assert federation.agent(4).desk.store.rows(federation.agent(4).desk.data_set) == ()


def test_whoever_does_not_answer_is_missed_at_the_deadline(tmp_path) -> None:
    federation = make_federation(tmp_path, participation__deadline_seconds=1)
    silent = federation.agent(2)
    silent.tamper = lambda ready: None if in_round_one(ready) else (ready.reply, ready.array)
    assert federation.run() == "completed"
    assert federation.outcomes(1)["Enterprise 2"] == ("missed", "DEADLINE")
    assert federation.outcomes(2)["Enterprise 2"] == ("admitted", "ADMITTED"), "a late reply is an alarm, not the end"
    assert "REPLY_LATE" in {alarm.code for alarm in silent.desk.store.alarms()}


class CrashError(Exception):
    pass


PHASES = ("opened", "sent", "admitted", "aggregated", "evaluated", "scored", "committed")


@pytest.mark.parametrize("after", PHASES)
def test_a_crash_after_any_phase_loses_nothing_and_charges_nobody_twice(federation, monkeypatch, after) -> None:
    import fedpact_server.rounds as rounds

    original, crashed = rounds.set_phase, []

    def crash(connection, contract_id, number, name):
        original(connection, contract_id, number, name)
        if number == 2 and name == after and not crashed:
            crashed.append(name)
            connection.commit()
            raise CrashError

    monkeypatch.setattr(rounds, "set_phase", crash)
    if after == "opened":
        monkeypatch.setattr(rounds.orders, "store_orders", lambda *a: (_ for _ in ()).throw(CrashError()))
        with pytest.raises(CrashError):
            federation.run()
        monkeypatch.undo()
        monkeypatch.setattr(rounds, "set_phase", crash)
    else:
        with pytest.raises((CrashError, sa.exc.ResourceClosedError, sa.exc.InvalidRequestError)):
            federation.run()
    monkeypatch.setattr(rounds, "set_phase", original)
    federation.take_over("2")
    assert federation.run(driver="2") == "completed"
    for number in (1, 2, 3):
        assert set(federation.outcomes(number).values()) == {("admitted", "ADMITTED")}
    kinds = federation.kinds()
    assert kinds.count("round-opened") == kinds.count("round-aggregated") == kinds.count("scores-committed") == 3
    for agent in federation.agents.values():
        states = [row.state for row in agent.desk.store.rows(agent.desk.data_set)]
        assert states == ["reserved", "spent"] * 3


FAILURES = [
    FailedError("RAY_FAILED", "Coalitions could not be evaluated on Ray: it raised."),
    ServiceError("RAY_UNREACHABLE", "The Ray cluster does not answer."),
    InputError("EVALUATION_INPUT", "Sizes that do not fit."),
    MemoryError("no room for a chunk"),
    ZeroDivisionError("a library's own"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=[type(f).__name__ + getattr(f, "code", "") for f in FAILURES])
def test_an_evaluation_that_fails_scores_nothing_and_is_made_again(tmp_path, failure) -> None:
    """Whatever fails: no default value stands anywhere, and what is scored at last is what would have been."""
    keys = fixed_keys(4)
    federation, calm = (make_federation(tmp_path / name, keys=keys, training__rounds=2) for name in ("one", "two"))
    honest, loop = evaluate_coalitions, federation.loop()
    failed = []

    def evaluate(*arguments):
        if len(failed) < 2 and "scores-committed" in federation.kinds():
            failed.append(failure)
            raise failure
        return honest(*arguments)

    loop.evaluate = evaluate
    for again in (loop, federation.loop()):
        again.evaluate = evaluate
        with pytest.raises(type(failure)):
            again.run()
        with federation.database.read() as connection:
            assert [r.phase for r in connection.execute(sa.select(db.rounds))] == ["committed", "aggregated"]
            assert [s.round for _, s in scoring.all_scores(connection, federation.contract.id)] == [1]
        assert not scoring.values_path(loop.context.arrays, 2).exists()
        assert federation.kinds()[-1] == "round-aggregated"
        assert federation.kinds().count("scores-committed") == 1
    assert len(failed) == 2
    assert federation.run() == calm.run() == "completed"
    found = []
    for one in (federation, calm):
        with one.database.read() as connection:
            found.append([s for _, s in scoring.all_scores(connection, one.contract.id)])
            found.append(scoring.opened_moments(connection, one.contract.id)[1])
    assert found[:2] == found[2:], "the same integers as without a failure"


@pytest.mark.parametrize("failure", [MemoryError("no room"), FailedError("RAY_FAILED", "It raised.")])
def test_the_status_says_what_failed(tmp_path, monkeypatch, failure) -> None:
    federation = make_federation(tmp_path, training__rounds=1)

    def fails(*_arguments):
        raise failure

    home = SimpleNamespace(database=lambda: federation.database, settings=SimpleNamespace(ray=None))
    monkeypatch.setattr(driver.OperatorHome, "open", lambda _home: home)
    monkeypatch.setattr(driver.validation, "load", lambda *_: SimpleNamespace(examples=federation.validation))
    monkeypatch.setattr(driver, "evaluator", lambda _address: fails)
    set_clocks(federation.agents, utc_now)
    with pytest.raises(type(failure)):
        driver.drive(federation.home, federation.contract.id, federation.transport, 1, accept_test_noise=True)
    with federation.database.read() as connection:
        run = run_row(connection, federation.contract.id)
    assert run.phase == "running"
    assert run.detail.startswith(
        "RUN_FAILED: MemoryError: no room" if isinstance(failure, MemoryError) else "RAY_FAILED"
    )


def before_its_end(federation, monkeypatch) -> None:
    """Drive the run through its rounds; it is cut off before it ends."""
    import fedpact_server.rounds as rounds

    def cut(*_args: object) -> None:
        raise CrashError

    with monkeypatch.context() as patched:
        patched.setattr(rounds.Loop, "_end", cut)
        with pytest.raises(CrashError):
            federation.run()
    federation.take_over("2")


def test_values_that_are_lost_are_made_again(federation, monkeypatch) -> None:
    before_its_end(federation, monkeypatch)
    arrays = federation.loop(driver="2").context.arrays
    kept = {path: path.read_bytes() for path in arrays.glob("values-*.f8")}
    assert len(kept) == 3
    (arrays / "values-1.f8").unlink()
    (arrays / "values-3.f8").write_bytes(kept[arrays / "values-3.f8"][:-8])
    assert federation.run(driver="2") == "completed"
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("scored", [3, 0])
def test_what_cannot_be_scored_any_more_ends_when_the_operator_says_so(federation, monkeypatch, scored) -> None:
    """Updates and values are lost, after the last round, or in the first before it was scored."""
    if scored == 3:
        before_its_end(federation, monkeypatch)
    else:
        with monkeypatch.context() as patched:
            patched.setattr("fedpact_server.rounds.Loop._evaluate", lambda *_: (_ for _ in ()).throw(CrashError()))
            with pytest.raises(CrashError):
                federation.run()
        federation.take_over("2")
    loop = federation.loop(driver="2")
    shutil.rmtree(loop.context.arrays)
    with pytest.raises(FaultError) as caught:
        federation.run(driver="2")
    assert caught.value.code == "UPDATE_MISSING"
    driver._tell(loop.context, caught.value)
    with federation.database.write() as connection:
        assert "UPDATE_MISSING" in run_row(connection, federation.contract.id).detail
        assert runs.want(connection, federation.contract, "stop").wanted == "stop"
        assert runs.want(connection, federation.contract, "unscored").wanted == "unscored"
        with pytest.raises(RefusedError):
            runs.want(connection, federation.contract, "run")
    assert federation.run(driver="2") == "stopped"
    ended = federation.entries()[-1].open()
    assert isinstance(ended, RunCompleted)
    assert (ended.rounds, ended.commitment) == (federation.kinds().count("round-aggregated"), None)
    with federation.database.read() as connection, pytest.raises(FaultError) as caught:
        closing.preview(connection, federation.contract, 10_000, 0)
    assert caught.value.code == "OPENING_MISSING"
    with federation.database.write() as connection:
        key = federation.operator_run_key
        paid = closing.settle(connection, federation.contract, key, 10_000, 0, unopened=True)
        evidence = evidence_files(connection, federation.contract.id)
    assert (paid.basis, sum(line.fen for line in paid.lines)) == ("fallback", 10_000)
    report = verify(unpack({name: text.encode() for name, text in evidence.items()}), Trust.of(federation.contract))
    assert report.exit_code == 1
    assert {(f["code"], f["party"]) for f in report.faults if f["code"] != "UPDATE_MISMATCH"} == {  # tests' noise
        ("SCORES_NOT_COMMITTED", "Operator"),
        ("SCORES_NOT_OPENED", "Operator"),
    }
    assert build(federation.entries())["settlement"]["reason"] == "not-opened"


def test_replies_that_were_on_their_way_when_the_server_died_are_the_same_bytes_again(federation, monkeypatch) -> None:
    import fedpact_server.rounds as rounds

    replies = []
    for agent in federation.agents.values():
        agent.tamper = lambda ready: (replies.append(ready.array), (ready.reply, ready.array))[1]
    monkeypatch.setattr(rounds.replies, "take", lambda *a, **k: (_ for _ in ()).throw(CrashError()))
    with pytest.raises(CrashError):
        federation.run()
    monkeypatch.undo()
    federation.take_over("2")
    assert federation.run(driver="2") == "completed"
    assert replies[0] in replies[1:], "the outbox answered, nothing was drawn again"


def test_a_replaced_flower_run_is_fenced_off(federation) -> None:
    loop = federation.loop()
    federation.take_over("2")
    assert loop.run() == "superseded"
    assert federation.kinds() == ["contract-signed"]
    with pytest.raises(SupersededError, match="RUN_SUPERSEDED"), loop.context.write():
        raise AssertionError("never reached")


def test_a_pause_stops_the_loop_and_a_resume_goes_on(federation) -> None:
    with federation.database.write() as connection:
        connection.execute(db.runs.update().values(wanted="pause"))
    assert federation.run() == "superseded"
    with federation.database.write() as connection:
        assert run_row(connection, federation.contract.id).detail == "paused"
        connection.execute(db.runs.update().values(wanted="run"))
    assert federation.run() == "completed"


def test_a_resend_carries_the_same_order(federation) -> None:
    federation.transport.before = lambda node, order, model: None
    loop = federation.loop()
    ticks = []

    def sleep(_seconds: float) -> None:
        ticks.append(1)
        if len(ticks) > 3:
            federation.transport.before = lambda node, order, model: (order, model)

    loop.sleep = sleep
    assert loop.run() == "completed"
    first_round = [item for item in federation.transport.sent if _round(item.order) == 1]
    assert len(first_round) > 4
    assert len({item.order for item in first_round}) == 4


def test_an_order_that_is_lost_without_a_word_is_sent_again_ever_more_rarely(tmp_path, monkeypatch) -> None:
    """An agent that ends and is back before the transport looks has lost the order, and nobody says so."""
    federation = make_federation(tmp_path, participation__deadline_seconds=120)
    clock = [0.0]
    monkeypatch.setattr("fedpact_server.rounds.time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=float))
    gone = next(node for node, agent in federation.transport.agents.items() if agent is federation.agent(2))
    when: list[float] = []
    send, poll = federation.transport.send, federation.transport.poll

    def sent(outgoing, ttl_seconds):
        when.extend(clock[0] for item in outgoing if item.node == gone and _round(item.order) == 1)
        return send(outgoing, ttl_seconds)

    def polled(message_ids):
        lost = [m for m in message_ids if federation.transport.pending.get(m, (None, None))[0] == gone]
        if len(when) < 3:
            for message_id in lost:
                del federation.transport.pending[message_id]
        return poll(message_ids)

    federation.transport.send, federation.transport.poll = sent, polled
    loop = federation.loop()

    def sleep(_seconds: float) -> None:
        clock[0] += 0.5

    loop.sleep = sleep
    assert loop.run() == "completed"
    assert federation.outcomes(1)["Enterprise 2"] == ("admitted", "ADMITTED")
    assert when == [0.0, 15.5, 46.0]
    assert federation.agent(2).answered == 3, "once a round"


def _round(order: bytes) -> int:
    return Order.from_bytes(read_envelope(order).body).round


def test_a_suspended_participant_gets_no_more_orders(federation) -> None:
    gone = federation.agent(4).desk.participant
    with federation.database.write() as connection:
        connection.execute(db.participants.update().where(db.participants.c.id == gone).values(state="suspended"))
    federation.run()
    assert "Enterprise 4" not in federation.outcomes(1)
    assert phase(federation) == "completed"


def test_a_model_file_that_changed_is_noticed(federation) -> None:
    from fedpact_contract.errors import FaultError

    federation.run()
    digest = federation.contract.model.initial_digest
    path = federation.home / "models" / f"{digest}.f8"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    from fedpact_server.run_state import load_model

    with pytest.raises(FaultError) as err:
        load_model(federation.home, digest)
    assert err.value.code == "MODEL_DIGEST"


def test_renaming_a_participant_moves_nothing(tmp_path) -> None:
    from fedpact_contract.contribution import period_values
    from fedpact_server import scoring

    keys = [generate_key() for _ in range(4)]
    values = []
    for folder, names in (("a", ["A", "B", "C", "D"]), ("b", ["Z", "Y", "X", "W"])):
        federation = make_federation(tmp_path / folder, keys=keys, names=names, noise=FixedNoise)
        federation.run()
        with federation.database.read() as connection:
            rounds = [s for _, s in scoring.all_scores(connection, federation.contract.id)]
        values.append(period_values(rounds, federation.contract))
    assert values[0] == values[1]
    assert len(set(values[0].values())) == 4


def test_the_accounting_of_one_log_gives_identical_bytes_twice(federation) -> None:
    from fedpact_contract.canonical import canonical_bytes
    from fedpact_contract.report import build
    from fedpact_server import closing

    federation.run()
    with federation.database.write() as connection:
        closing.settle(connection, federation.contract, federation.operator_run_key, 100_000_000, 0)
    entries = federation.entries()
    assert canonical_bytes(build(entries)) == canonical_bytes(build(list(entries)))
    with federation.database.read() as connection:
        assert logbook.read_entries(connection, federation.contract.id) == entries
