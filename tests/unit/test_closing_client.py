"""The agent's side of a close: it countersigns what it has verified, and nothing else."""

import base64
import dataclasses
import json
from collections.abc import Mapping

import pytest
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.federation import make_federation
from tests.support.noise import FixedNoise

from fedpact_client.answer import Desk
from fedpact_client.closing import Closing, as_files, check_closing, close
from fedpact_client.store import EgressKind, SeenHead
from fedpact_client.views import seen
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.errors import FaultError, InputError, RefusedError, ServiceError
from fedpact_contract.keys import generate_key
from fedpact_contract.log import (
    Checkpoint,
    Entry,
    PeriodClosing,
    PeriodSettled,
    ReplyMissed,
    RevenueRecorded,
    ScoresOpened,
    UpdateDecided,
)
from fedpact_contract.messages import Objection, Receipt, Update
from fedpact_contract.record import open_signed, read_envelope, sign
from fedpact_contract.trust import Trust
from fedpact_server import closing, db, logbook
from fedpact_server.evidence import evidence_files


@pytest.fixture
def run(tmp_path) -> ClosedRun:
    """A settled run: closing, nobody has countersigned yet."""
    made = closed_run(tmp_path)
    made.settle()
    return made


def checked(run: ClosedRun, desk: Desk, files: Mapping[str, object]) -> Closing:
    """The closing in the operator's answer, if it holds."""
    return check_closing(desk, seen(desk.store, run.contract_id), as_files(files))


def look(run: ClosedRun, number: int, verified: Closing | None = None) -> str:
    """What the agent of `Enterprise number` does at one look."""
    with run.client(number) as client:
        return close(run.federation.agent(number).desk, client, verified)[0]


def countersigned(run: ClosedRun, number: int) -> set[tuple[int, str]]:
    """Heads that this agent's store holds as countersigned."""
    desk = run.federation.agent(number).desk
    return {(head.size, head.root) for head in desk.store.heads(run.contract_id) if head.countersigned}


def held_by_operator(run: ClosedRun, number: int) -> list[int]:
    """Sizes of the heads that the operator has this participant's countersignature on."""
    participant = run.federation.agent(number).desk.participant
    with run.federation.database.read() as connection:
        return [size for size, who, _ in logbook.countersignatures(connection, run.contract_id) if who == participant]


class TestHonest:
    def test_everybody_countersigns_and_the_evidence_is_verified_to_the_fen(self, run: ClosedRun) -> None:
        for number in (1, 2, 3, 4):
            assert run.phase() == "closing"
            assert run.verified().exit_code == 4
            assert look(run, number) == "countersigned"
        assert run.phase() == "closed"
        report = run.verified()
        assert (report.exit_code, report.status, report.faults) == (0, "closed", ())
        assert sum(line.fen for line in report.participants) == report.pool_fen == 100_000_000
        assert all(line.countersigned and not line.held_fen for line in report.participants)
        others = Trust.of(run.federation.contract).party[:3]
        assert run.verified(Trust(party=others)).exit_code == 4, "a trust file that does not know everybody"

    def test_before_the_close_nothing_is_done(self, tmp_path) -> None:
        run = closed_run(tmp_path)
        desk = run.federation.agent(1).desk
        with run.client(1) as client:
            assert close(desk, client) == ("none", None)
        assert [entry.kind for entry in desk.store.egress()] == [EgressKind.REQUEST]

    def test_looking_again_sends_nothing_again(self, run: ClosedRun) -> None:
        desk = run.federation.agent(1).desk
        with run.client(1) as client:
            done, verified = close(desk, client)
            assert done == "countersigned"
            run.wire.sent.clear()
            assert close(desk, client, verified) == ("waiting", verified)
            assert [path.rsplit("/", 1)[1] for path in run.wire.paths()] == ["closing"], "what was verified is known"
            assert close(desk, client) == ("waiting", verified), "after a restart it is verified once more"
        assert len([e for e in desk.store.egress() if e.kind is EgressKind.COUNTERSIGNATURE]) == 1
        assert held_by_operator(run, 1).count(verified.checkpoint.size) == 1

    def test_it_is_over_when_the_operator_has_everybodys_word(self, run: ClosedRun) -> None:
        with run.client(4) as client:
            _, verified = close(run.federation.agent(4).desk, client)
        for number in (1, 2, 3):
            look(run, number)
        assert look(run, 4, verified) == "closed"
        assert look(run, 3) == "closed"

    def test_the_head_is_kept_and_marked_before_the_countersignature_leaves(self, run: ClosedRun) -> None:
        desk = run.federation.agent(2).desk
        kept = []

        def note(content: bytes) -> bytes:
            kept.append(desk.store.heads(run.contract_id)[-1])
            return content

        run.wire.replace["POST"] = note
        look(run, 2)
        checkpoint = Checkpoint.from_bytes(read_envelope(kept[0].checkpoint).body)
        assert (checkpoint.size, checkpoint.root, kept[0].countersigned) == (kept[0].size, kept[0].root, True)
        assert desk.store.egress()[-1].kind is EgressKind.COUNTERSIGNATURE

    @pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
    def test_a_countersignature_that_was_lost_on_the_way_is_sent_again(self, run: ClosedRun, cut: str) -> None:
        setattr(run.wire, cut, "POST")
        with pytest.raises(ServiceError, match="does not answer"):
            look(run, 3)
        before = countersigned(run, 3)
        setattr(run.wire, cut, "")
        assert look(run, 3) == ("countersigned" if cut == "cut_before" else "waiting")
        assert countersigned(run, 3) == before
        assert held_by_operator(run, 3)[-1] == run.state().size

    def test_whoever_is_told_that_all_is_closed_still_looks(self, run: ClosedRun) -> None:
        """A participant that was paid nothing must be able to object to just that."""
        others = [p.id for p in run.federation.contract.participants][1:]
        size = run.state().size
        run.serve("GET /contracts/" + run.contract_id + "/closing", {"state": "closed", "size": size, "signed": others})
        assert look(run, 1) == "countersigned"
        assert held_by_operator(run, 1)[-1] == size

    @pytest.mark.parametrize("state", ["closing", "closed"])
    def test_that_it_has_signed_it_knows_better_than_the_operator(self, run: ClosedRun, state: str) -> None:
        everybody = [p.id for p in run.federation.contract.participants]
        said = {"state": state, "size": run.state().size, "signed": everybody}
        run.serve("GET /contracts/" + run.contract_id + "/closing", said)
        assert look(run, 1) == "countersigned"
        assert held_by_operator(run, 1)[-1] == run.state().size

    def test_a_head_of_an_earlier_round_is_not_taken_for_the_closing(self, run: ClosedRun) -> None:
        desk = run.federation.agent(1).desk
        early = min(size for size, _ in countersigned(run, 1))
        said = {"state": "closed", "size": early, "signed": [desk.participant]}
        run.serve("GET /contracts/" + run.contract_id + "/closing", said)
        run.serve("/evidence", run.rewritten(paid_to_others))
        assert look(run, 1) == "objected"

    @pytest.mark.parametrize("state", [{}, {"state": None}, {"state": ["closing"]}, {"state": "settled"}])
    def test_another_answer_is_no_close(self, run: ClosedRun, state: dict) -> None:
        run.serve("GET /contracts/" + run.contract_id + "/closing", state)
        assert look(run, 1) == "none"

    def test_lists_of_another_form_say_nothing(self, run: ClosedRun) -> None:
        said = {"state": "closing", "size": "22", "signed": "everybody", "objected": {"a": 1}}
        run.serve("GET /contracts/" + run.contract_id + "/closing", said)
        assert look(run, 1) == "countersigned"


# What a dishonest operator may do to the log; each takes the bodies and the number of the agent that is cheated.


def replaced(bodies, kind, change):
    return [change(body) if isinstance(body, kind) else body for body in bodies]


def paid_to_others(bodies):
    """One fen moved from the first line to the second."""

    def move(body):
        first, second, *rest = body.lines
        moved = (first.model_copy(update={"fen": first.fen - 1}), second.model_copy(update={"fen": second.fen + 1}))
        return body.model_copy(update={"lines": (*moved, *rest)})

    return replaced(bodies, PeriodSettled, move)


def smaller_pool(bodies):
    return replaced(bodies, PeriodSettled, lambda b: b.model_copy(update={"pool_fen": b.pool_fen - 1}))


def hidden_revenue(bodies):
    return replaced(bodies, RevenueRecorded, lambda b: b.model_copy(update={"revenue_fen": b.revenue_fen - 100}))


def other_scores(bodies):
    def change(body):
        losses = [list(row) for row in body.scores.losses]
        losses[1][0] -= 10**9
        scores = body.scores.model_copy(update={"losses": tuple(tuple(row) for row in losses)})
        return body.model_copy(update={"scores": scores})

    return replaced(bodies, ScoresOpened, change)


def unopened(bodies):
    return [body for body in bodies if not isinstance(body, ScoresOpened)]


def no_closing(bodies):
    return [body for body in bodies if not isinstance(body, PeriodClosing)]


DISHONEST = {
    "a fen moved": (paid_to_others, "SETTLEMENT_FEN"),
    "a smaller pool": (smaller_pool, "SETTLEMENT_POOL"),
    "less revenue than was settled": (hidden_revenue, "SETTLEMENT_POOL"),
    "other scores than committed to": (other_scores, "SCORES_COMMITMENT"),
    "scores that stay closed": (unopened, "SCORES_NOT_OPENED"),
    "no closing entry": (no_closing, "CLOSING_HEAD"),
}


def objected(run: ClosedRun, number: int, code: str, evidence: bytes | None) -> None:
    """The agent said no with this code, kept what it was shown, and countersigned nothing; its line alone is held."""
    desk = run.federation.agent(number).desk
    before = countersigned(run, number)
    assert look(run, number) == "objected"
    assert countersigned(run, number) == before
    alarms = [alarm for alarm in desk.store.alarms() if alarm.code == code]
    assert [(a.contract_id, a.evidence) for a in alarms] == [(run.contract_id, evidence)]
    sent = [e for e in desk.store.egress() if e.kind is not EgressKind.REQUEST]
    assert [e.kind for e in sent] == [EgressKind.OBJECTION]
    body = json.loads(run.wire.sent[-1].content)
    record = open_signed(read_envelope(body["objection"]), Objection, desk.run_keys[desk.participant])
    assert (record.code, record.contract_id, record.participant) == (code, run.contract_id, desk.participant)
    if evidence is not None:
        shown = Checkpoint.from_bytes(read_envelope(evidence).body)
        assert (record.size, record.root) == (shown.size, shown.root)
    run.wire.replace.clear()
    for other in {1, 2, 3, 4} - {number}:
        assert look(run, other) == "countersigned"
    assert run.phase() == "closing"
    assert run.state().held == (desk.participant,)
    with run.federation.database.read() as connection:
        assert closing.objections(connection, run.contract_id) == (desk.participant,)


def last_checkpoint(files: dict[str, str]) -> bytes:
    return files["checkpoints.jsonl"].encode().splitlines()[-1]


class TestConcerns:
    """What no evidence disproves is countersigned, and a person is told."""

    def test_an_update_that_the_log_calls_missed(self, tmp_path) -> None:
        run = closed_run(tmp_path, drop=(2, 2), participation__deadline_seconds=2)
        run.settle()
        assert look(run, 2) == "countersigned"
        assert look(run, 1) == "countersigned"
        alarms = {a.code: a.detail for a in run.federation.agent(2).desk.store.alarms()}
        assert "round 2" in alarms["CLOSING_UPDATE_MISSED"]
        assert "CLOSING_UPDATE_MISSED" not in {a.code for a in run.federation.agent(1).desk.store.alarms()}

    def test_an_update_that_was_rejected(self, tmp_path) -> None:
        """The log shows what this agent signed; whether the array came as it was sent, it cannot show."""
        run = closed_run(tmp_path, spoil=(2, 3))
        run.settle()
        assert look(run, 3) == "countersigned"
        alarms = {a.code: a.detail for a in run.federation.agent(3).desk.store.alarms()}
        assert "round 2 was rejected: UPDATE_DIGEST" in alarms["CLOSING_UPDATE_REJECTED"]


class TestUnopened:
    def test_a_fallback_for_lost_scores_is_recomputed_and_objected_to(self, tmp_path) -> None:
        """It is the operator's fault: only people can make it final."""
        run = closed_run(tmp_path)
        with run.federation.database.write() as connection:
            connection.execute(db.openings.delete().where(db.openings.c.name == "moments"))
            key = run.federation.operator_run_key
            closing.settle(connection, run.federation.contract, key, 10_000, 0, unopened=True)
        assert look(run, 1) == "objected"
        assert countersigned(run, 1) == {c for c in countersigned(run, 1) if c[0] < run.state().size}
        assert "SCORES_NOT_OPENED" in {a.code for a in run.federation.agent(1).desk.store.alarms()}
        assert run.phase() == "closing"


class TestDishonest:
    @pytest.mark.parametrize("name", DISHONEST)
    def test_a_dishonest_close_is_objected_to(self, run: ClosedRun, name: str) -> None:
        change, code = DISHONEST[name]
        files = run.rewritten(change)
        run.serve("/evidence", files)
        objected(run, 2, code, last_checkpoint(files))

    def test_an_update_that_is_missing(self, run: ClosedRun) -> None:
        mine = run.federation.agent(1).desk.participant
        files = run.rewritten(
            lambda bodies: [
                b for b in bodies if not (isinstance(b, UpdateDecided) and (b.round, b.participant) == (2, mine))
            ]
        )
        run.serve("/evidence", files)
        objected(run, 1, "OUTCOME_MISSING", last_checkpoint(files))

    def test_an_update_that_is_said_to_be_late(self, run: ClosedRun) -> None:
        mine = run.federation.agent(1).desk.participant
        late = ReplyMissed(round=2, participant=mine, code="DEADLINE")
        files = run.rewritten(
            lambda bodies: [
                late if isinstance(b, UpdateDecided) and (b.round, b.participant) == (2, mine) else b for b in bodies
            ]
        )
        run.serve("/evidence", files)
        objected(run, 1, "ADMITTED", last_checkpoint(files))

    def test_another_update_in_its_place(self, run: ClosedRun) -> None:
        """Even one that carries this agent's own signature: somebody has a copy of the key."""
        desk = run.federation.agent(3).desk

        def swap(body: UpdateDecided) -> UpdateDecided:
            if (body.round, body.participant) != (2, desk.participant):
                return body
            update = Update.from_bytes(read_envelope(body.update).body).model_copy(update={"update_digest": "7" * 64})
            receipt = Receipt.from_bytes(read_envelope(body.receipt).body).model_copy(
                update={"update_digest": "7" * 64}
            )
            receipt_signed = sign(receipt, run.federation.operator_run_key)
            signed = sign(update, desk.run_key)
            return body.model_copy(update={"update": signed.plain(), "receipt": receipt_signed.plain()})

        files = run.rewritten(lambda bodies: replaced(bodies, UpdateDecided, swap))
        run.serve("/evidence", files)
        objected(run, 3, "STATEMENT_RECEIPT_WRONG", last_checkpoint(files))

    def test_a_log_that_does_not_continue_what_this_agent_saw(self, run: ClosedRun) -> None:
        """The operator had shown this agent another log of the size at which the run was completed."""
        desk = run.federation.agent(4).desk
        size = next(i for i, entry in enumerate(run.federation.entries()) if entry.type == "run-completed") + 1
        record = Checkpoint(origin=run.contract_id, size=size, root="5" * 64)
        shown = sign(record, run.federation.operator_run_key).to_bytes()
        desk.store.add_heads(run.contract_id, [SeenHead(size=size, root="5" * 64, checkpoint=shown)])
        objected(run, 4, "STATEMENT_FORK", last_checkpoint(run.files()))

    def test_a_result_that_was_shown_and_is_gone(self, run: ClosedRun) -> None:
        desk = run.federation.agent(4).desk
        gone = Entry.of(ReplyMissed(round=2, participant=desk.participant, code="DEADLINE"))
        desk.store.add_result(run.contract_id, 2, gone.to_bytes())
        objected(run, 4, "STATEMENT_RESULT_MISSING", last_checkpoint(run.files()))

    def test_a_store_that_cannot_be_read_is_no_objection(self, run: ClosedRun, monkeypatch) -> None:
        """The fault is this agent's own: nothing is said of the operator's log, and nothing is countersigned."""
        desk = run.federation.agent(1).desk

        def damaged(_contract_id: str) -> None:
            raise InputError("STORE_DAMAGED", "The store is damaged.")

        with monkeypatch.context() as patched:
            patched.setattr(desk.store, "heads", damaged)
            with pytest.raises(InputError) as err:
                look(run, 1)
            assert err.value.code == "STORE_DAMAGED"
        assert desk.store.alarms() == []
        assert desk.participant not in run.state().signed
        with run.federation.database.read() as connection:
            assert closing.objections(connection, run.contract_id) == ()
        assert look(run, 1) == "countersigned"

    def test_a_rewritten_past(self, run: ClosedRun) -> None:
        def anew(bodies):
            opened = bodies[1]
            return [bodies[0], opened.model_copy(update={"deadline": "2030-01-01T00:00:00Z"}), *bodies[2:]]

        files = run.rewritten(anew)
        run.serve("/evidence", files)
        desk = run.federation.agent(1).desk
        with pytest.raises(FaultError) as err:
            checked(run, desk, files)
        objected(run, 1, err.value.code, last_checkpoint(files))

    def test_an_older_checkpoint(self, run: ClosedRun) -> None:
        files = run.rewritten(lambda bodies: bodies, upto=2)
        run.serve("/evidence", files)
        objected(run, 1, "STATEMENT_FORK", last_checkpoint(files))

    def test_the_end_of_the_run_is_no_closing(self, run: ClosedRun) -> None:
        files = run.rewritten(lambda bodies: bodies, upto=6)
        assert json.loads(files["log.jsonl"].splitlines()[-1])["type"] == "run-completed"
        run.serve("/evidence", files)
        objected(run, 1, "CLOSING_HEAD", last_checkpoint(files))

    def test_the_evidence_of_another_contract(self, run: ClosedRun, tmp_path) -> None:
        other = make_federation(tmp_path / "other", title="Another")
        with other.database.read() as connection:
            files = evidence_files(connection, other.contract.id)
        run.serve("/evidence", files)
        objected(run, 1, "EVIDENCE_OTHER_CONTRACT", last_checkpoint(files))

    def test_a_contract_of_the_operators_own_making(self, run: ClosedRun) -> None:
        """The whole log in order, but by a run key that this agent's contract does not name."""
        desk = run.federation.agent(1).desk
        stranger = generate_key()
        mine = dataclasses.replace(
            desk, run_keys=desk.run_keys | {desk.contract.operator.id: stranger.public_key().public_bytes_raw().hex()}
        )
        with pytest.raises(FaultError) as err:
            checked(run, mine, run.files())
        assert err.value.code == "SIGNATURE_MISSING"

    def test_updates_with_fixed_noise_are_not_paid(self, tmp_path) -> None:
        run = closed_run(tmp_path, noise=FixedNoise)
        run.settle()
        desk = run.federation.agent(1).desk
        assert look(run, 1) == "objected"
        alarm = desk.store.alarms()[-1]
        assert alarm.code == "UPDATE_MISMATCH"
        assert "noise" in alarm.detail
        assert run.verified().exit_code == 1

    def test_two_closings_of_one_size_are_never_both_countersigned(self, run: ClosedRun) -> None:
        """Both are sound in themselves: the last entry's random bytes differ."""
        first, second = twin_closing(run), run.files()
        run.serve("/evidence", first)
        assert closing_heads(run, 1) == set()
        with pytest.raises(RefusedError, match="not on the closing checkpoint"):
            look(run, 1)  # the operator's own API does not take it; the agent has given its word on this head
        (one,) = closing_heads(run, 1)
        run.serve("/evidence", second)
        assert look(run, 1) == "objected"
        assert closing_heads(run, 1) == {one}
        assert "STATEMENT_FORK" in {alarm.code for alarm in run.federation.agent(1).desk.store.alarms()}
        run.serve("/evidence", first)
        with pytest.raises(RefusedError, match="not on the closing checkpoint"):
            look(run, 1)
        assert closing_heads(run, 1) == {one}

    def test_an_objection_is_made_once_and_taken_back_when_all_is_well(self, run: ClosedRun) -> None:
        desk = run.federation.agent(2).desk
        run.serve("/evidence", run.rewritten(smaller_pool))
        assert [look(run, 2) for _ in range(3)] == ["objected"] * 3
        assert [a.code for a in desk.store.alarms()] == ["SETTLEMENT_POOL"]
        assert [e.kind for e in desk.store.egress()].count(EgressKind.OBJECTION) == 1
        run.wire.replace.clear()
        assert look(run, 2) == "countersigned"
        assert desk.participant not in run.state().held

    def test_an_objection_that_was_lost_is_sent_again(self, run: ClosedRun) -> None:
        run.serve("/evidence", run.rewritten(smaller_pool))
        run.wire.cut_before = "POST"
        with pytest.raises(ServiceError):
            look(run, 2)
        run.wire.cut_before = ""
        assert look(run, 2) == "objected"
        with run.federation.database.read() as connection:
            assert len(closing.objections(connection, run.contract_id)) == 1


GARBAGE = {
    "nothing": ({}, "EVIDENCE_FILE_MISSING"),
    "no text": ({"log.jsonl": 1}, "EVIDENCE_FILES"),
    "another file": ({"../../etc/passwd": "x"}, "EVIDENCE_FILES"),
    "a name that is no Unicode": ({"\ud800": "x"}, "EVIDENCE_FILES"),
    "empty files": (
        dict.fromkeys(("log.jsonl", "leaves.txt", "checkpoints.jsonl", "countersignatures.jsonl"), ""),
        None,
    ),
    "rubbish": (
        dict.fromkeys(("log.jsonl", "leaves.txt", "checkpoints.jsonl", "countersignatures.jsonl"), "x\n"),
        None,
    ),
    "no Unicode": (
        dict.fromkeys(("log.jsonl", "leaves.txt", "checkpoints.jsonl", "countersignatures.jsonl"), "\ud800\n"),
        None,
    ),
    "no line end": (
        dict.fromkeys(("log.jsonl", "leaves.txt", "checkpoints.jsonl", "countersignatures.jsonl"), "x"),
        None,
    ),
    "deep": (
        dict.fromkeys(("log.jsonl", "leaves.txt", "checkpoints.jsonl", "countersignatures.jsonl"), "[" * 5000 + "\n"),
        None,
    ),
}


class TestGarbage:
    @pytest.mark.parametrize("name", GARBAGE)
    def test_garbage_is_objected_to(self, run: ClosedRun, name: str) -> None:
        files, code = GARBAGE[name]
        run.serve("/evidence", json.dumps(files).encode())
        if code is None:
            with pytest.raises(FaultError) as err:
                checked(run, run.federation.agent(1).desk, files)
            code = err.value.code
        objected(run, 1, code, None)

    @pytest.mark.parametrize("content", [b"", b"[]", b"rubbish", b"\xff"])
    def test_an_answer_that_is_none_is_an_operator_that_does_not_answer(self, run: ClosedRun, content: bytes) -> None:
        run.serve("/evidence", content)
        with pytest.raises(ServiceError):
            look(run, 1)
        assert run.federation.agent(1).desk.store.alarms() == []

    def test_a_checkpoint_whose_body_is_rubbish_is_kept_by_its_head_alone(self, run: ClosedRun) -> None:
        files = run.files()
        envelope = json.loads(last_checkpoint(files)) | {"payload": base64.b64encode(b"{}").decode()}
        files["checkpoints.jsonl"] = canonical_bytes(envelope).decode() + "\n"
        run.serve("/evidence", files)
        assert look(run, 1) == "objected"
        record = Objection.from_bytes(read_envelope(json.loads(run.wire.sent[-1].content)["objection"]).body)
        assert record.size == 0


def closing_heads(run: ClosedRun, number: int) -> set[tuple[int, str]]:
    return {head for head in countersigned(run, number) if head[0] == run.state().size}


def twin_closing(run: ClosedRun) -> dict[str, str]:
    """The same log, whose last entry has other random bytes: sound in itself, and another root of the same size."""
    from fedpact_contract import merkle
    from fedpact_contract.evidence import pack

    entries = run.federation.entries()
    entries[-1] = Entry.of(PeriodClosing(period=1))
    with run.federation.database.read() as connection:
        heads = list(logbook.signed_checkpoints(connection, run.contract_id).values())
        held = [envelope for _, _, envelope in logbook.countersignatures(connection, run.contract_id)]
    root = merkle.root([entry.leaf_hash for entry in entries]).hex()
    record = Checkpoint(origin=run.contract_id, size=len(entries), root=root)
    heads[-1] = sign(record, run.federation.operator_run_key)
    return {name: data.decode() for name, data in pack(entries, heads, held).items()}
