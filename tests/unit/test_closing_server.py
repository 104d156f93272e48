"""The operator's side of a close: when it may settle, whose word counts, and when it is final."""

import html
from typing import get_args

import pytest
import sqlalchemy as sa
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.federation import Federation, make_federation

from fedpact_contract.errors import FailedError, FaultError, InputError, RejectedError
from fedpact_contract.keys import generate_key
from fedpact_contract.language import Lang
from fedpact_contract.log import Checkpoint, Countersignature, PeriodClosing, PeriodSettled, RevenueRecorded
from fedpact_contract.record import open_signed, sign
from fedpact_contract.report import build
from fedpact_server import closing, db, logbook
from fedpact_server.report.html import render
from fedpact_server.report.labels import words


@pytest.fixture
def run(tmp_path) -> ClosedRun:
    """A completed run, not settled."""
    return closed_run(tmp_path)


def settle(federation: Federation, revenue: int = 10_000, fees: int = 0, *, unopened: bool = False):
    key = federation.operator_run_key
    with federation.database.write() as connection:
        return closing.settle(connection, federation.contract, key, revenue, fees, unopened=unopened)


def preview(federation: Federation, revenue: int = 10_000, fees: int = 0):
    with federation.database.read() as connection:
        return closing.preview(connection, federation.contract, revenue, fees)


def word(run: ClosedRun, number: int, key=None, **changes) -> "object":
    """The countersignature of `Enterprise number` on the closing checkpoint; `changes` and `key` make it another."""
    desk = run.federation.agent(number).desk
    with run.federation.database.read() as connection:
        hashes = logbook.leaves(connection, run.contract_id)
    values = {
        "origin": run.contract_id,
        "size": len(hashes),
        "root": logbook.root_of(hashes),
        "participant": desk.participant,
    }
    return sign(Countersignature(**(values | changes)), key or desk.run_key)


def countersign(run: ClosedRun, number: int, envelope=None):
    """As the API does: the caller's own run key is the one that counts."""
    desk = run.federation.agent(number).desk
    keys = {desk.participant: desk.run_keys[desk.participant]}
    with run.federation.database.write() as connection:
        return closing.countersign(connection, run.federation.contract, keys, envelope or word(run, number))


class TestSettle:
    def test_everything_is_opened_and_the_closing_checkpoint_is_signed(self, run: ClosedRun) -> None:
        before = run.federation.kinds()
        result = settle(run.federation, 1_234_567, 67)
        assert run.federation.kinds() == [
            *before,
            *("scores-opened", "scores-opened", "moments-opened", "revenue-recorded"),
            *("period-settled", "period-closing"),
        ]
        bodies = [entry.open() for entry in run.federation.entries()]
        settled = next(body for body in bodies if isinstance(body, PeriodSettled))
        assert settled.pool_fen == result.pool_fen == 1_234_500 == sum(line.fen for line in settled.lines)
        assert [line.participant for line in settled.lines] == sorted(run.federation.contract.by_id())
        with run.federation.database.read() as connection:
            heads = logbook.signed_checkpoints(connection, run.contract_id)
        key = run.federation.operator_run_key.public_key().public_bytes_raw().hex()
        assert open_signed(heads[max(heads)], Checkpoint, key).size == len(bodies)
        assert isinstance(bodies[-1], PeriodClosing)
        assert run.phase() == "closing"

    def test_a_preview_says_the_same_and_records_nothing(self, run: ClosedRun) -> None:
        before = run.federation.entries()
        shown = preview(run.federation)
        assert run.federation.entries() == before
        assert run.phase() == "completed"
        assert [(line.participant, line.fen) for line in settle(run.federation).lines] == [
            (line.participant, line.fen) for line in shown.lines
        ]
        assert preview(run.federation) == shown, "also afterwards"

    def test_again_with_the_same_amounts_changes_nothing(self, run: ClosedRun) -> None:
        first = settle(run.federation, 10_000, 1)
        before = run.federation.entries()
        assert settle(run.federation, 10_000, 1) == first
        assert run.federation.entries() == before

    @pytest.mark.parametrize(("revenue", "fees"), [(10_001, 1), (10_000, 0), (9_999, 0)])
    def test_again_with_other_amounts_is_refused(self, run: ClosedRun, revenue: int, fees: int) -> None:
        settle(run.federation, 10_000, 1)
        before = run.federation.entries()
        with pytest.raises(InputError) as err:
            settle(run.federation, revenue, fees)
        assert err.value.code == "SETTLE_TWICE"
        assert run.federation.entries() == before

    def test_fees_above_the_revenue_are_refused_and_nothing_is_recorded(self, run: ClosedRun) -> None:
        before = run.federation.entries()
        with pytest.raises(InputError) as err:
            settle(run.federation, 100, 101)
        assert err.value.code == "SETTLEMENT_FEES"
        assert (run.federation.entries(), run.phase()) == (before, "completed")

    def test_a_crash_while_settling_leaves_nothing(self, run: ClosedRun, monkeypatch) -> None:
        def crash(*_arguments):
            raise RuntimeError

        before = run.federation.entries()
        monkeypatch.setattr(logbook, "checkpoint", crash)
        with pytest.raises(RuntimeError):
            settle(run.federation)
        monkeypatch.undo()
        assert (run.federation.entries(), run.phase()) == (before, "completed")
        settle(run.federation)
        assert run.phase() == "closing"

    def test_a_run_that_goes_on_is_not_settled(self, tmp_path) -> None:
        federation = make_federation(tmp_path)
        for call in (settle, preview):
            with pytest.raises(InputError) as err:
                call(federation)
            assert err.value.code == "SETTLE_RUN_NOT_ENDED"
            assert "running" in err.value.message
        with federation.database.write() as connection:
            connection.execute(db.runs.delete())
        with pytest.raises(InputError, match="never started"):
            preview(federation)

    def test_an_abandoned_run_is_refused_and_says_why(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)
        federation = make_federation(tmp_path, policy={i: {"purposes": ["other"]} for i in (0, 1)})
        assert federation.run() == "stopped"
        assert federation.kinds()[-1] == "round-abandoned"
        for call in (settle, preview):
            with pytest.raises(InputError) as err:
                call(federation)
            assert err.value.code == "SETTLE_NO_ROUND"
            assert "ROUND_TOO_FEW_UPDATES in round 1" in err.value.message
        assert federation.kinds()[-1] == "round-abandoned"

    def test_scores_that_can_be_opened_are_not_left_out(self, run: ClosedRun) -> None:
        """The operator knows them: it could choose who is paid."""
        before = run.federation.entries()
        with pytest.raises(InputError) as err:
            settle(run.federation, unopened=True)
        assert err.value.code == "OPENINGS_INTACT"
        assert (run.federation.entries(), run.phase()) == (before, "completed")

    def test_a_stopped_run_is_settled_over_its_committed_rounds(self, tmp_path) -> None:
        run = closed_run(tmp_path, stop_in=3, training__rounds=4)
        assert run.phase() == "stopped"
        paid = settle(run.federation)
        assert (paid.shares.rounds, sum(line.fen for line in paid.lines)) == ((1, 2), 10_000)
        for number in (1, 2, 3, 4):
            countersign(run, number)
        report = run.verified()
        assert (report.exit_code, report.status, report.faults) == (0, "closed", ())
        assert any("given up" in note for note in report.notes)

    @pytest.mark.parametrize(("name", "what"), [("moments", "the second moments"), ("round:1", "round 1")])
    def test_an_opening_that_is_lost_or_changed_is_named_and_the_fallback_pays(
        self, run: ClosedRun, name: str, what: str
    ) -> None:
        before = run.federation.entries()
        row = db.openings.c.name == name
        with run.federation.database.write() as connection:
            connection.execute(db.openings.update().where(row).values(salt=bytes(32)))
        with pytest.raises(FaultError) as err:
            settle(run.federation)
        assert (err.value.code, err.value.field) == ("OPENING_MISMATCH", what)
        with run.federation.database.write() as connection:
            connection.execute(db.openings.delete().where(row))
        with pytest.raises(FaultError) as err:
            settle(run.federation)
        assert (err.value.code, err.value.field) == ("OPENING_MISSING", what)
        assert "--unopened" in (err.value.remedy or "")
        assert (run.federation.entries(), run.phase()) == (before, "completed")
        paid = settle(run.federation, unopened=True)
        assert (paid.basis, paid.shares.reason) == ("fallback", "not-opened")
        assert sum(line.fen for line in paid.lines) == 10_000
        assert run.federation.kinds()[len(before) :] == ["revenue-recorded", "period-settled", "period-closing"]
        assert settle(run.federation) == paid, "asked again, what was settled"
        for number in (1, 2, 3, 4):
            countersign(run, number)
        assert run.phase() == "closed"
        report = run.verified()
        (fault,) = report.faults
        assert (report.exit_code, fault["code"], fault["party"]) == (1, "SCORES_NOT_OPENED", "Operator")
        assert any("opened none of its commitments" in note for note in report.notes)
        assert {p.id: p.fen for p in report.participants} == {line.participant: line.fen for line in paid.lines}
        page = build(run.federation.entries())
        assert page["settlement"]["reason"] == "not-opened"
        assert {line["id"]: line["fen"] for line in page["participants"]} == {
            line.participant: line.fen for line in paid.lines
        }
        for lang in get_args(Lang):
            assert words(lang)["unopened"] in html.unescape(render(page, lang))

    @pytest.mark.parametrize("value", [b"\xff\x00", b"{}", b"[]", b""])
    def test_a_damaged_database_is_a_failure_that_is_named(self, run: ClosedRun, value: bytes) -> None:
        for name in ("moments", "round:1"):
            with run.federation.database.write() as connection:
                connection.execute(db.openings.update().where(db.openings.c.name == name).values(value=value))
            with pytest.raises(FailedError) as err:
                settle(run.federation)
            assert err.value.code == "DATABASE_DAMAGED"
        assert run.phase() == "completed"


class TestCountersignatures:
    @pytest.fixture
    def run(self, run: ClosedRun) -> ClosedRun:
        settle(run.federation)
        return run

    def test_it_is_closed_when_all_who_are_paid_have_signed(self, run: ClosedRun) -> None:
        everybody = {run.federation.agent(n).desk.participant for n in (1, 2, 3, 4)}
        assert set(run.state().held) == everybody
        for number in (1, 2, 3):
            state = countersign(run, number)
            everybody.discard(run.federation.agent(number).desk.participant)
            assert set(state.held) == everybody
            assert run.phase() == "closing"
        assert countersign(run, 4).held == ()
        assert run.phase() == "closed"
        assert len(run.state().signed) == 4

    def test_whoever_is_paid_nothing_is_not_waited_for_and_may_sign_later(self, run: ClosedRun) -> None:
        mine = run.federation.agent(4).desk.participant

        def unpaid(line):
            return line.model_copy(update={"fen": 0}) if line.participant == mine else line

        bodies = [entry.open() for entry in run.federation.entries()]
        settled = next(body for body in bodies if isinstance(body, PeriodSettled))
        changed = settled.model_copy(update={"lines": tuple(unpaid(line) for line in settled.lines)})
        from fedpact_contract.log import Entry

        where = (db.entries.c.contract_id == run.contract_id, db.entries.c.type == PeriodSettled.TYPE)
        with run.federation.database.write() as connection:
            connection.execute(db.entries.update().where(*where).values(data=Entry.of(changed).to_bytes()))
        assert mine not in run.state().held
        for number in (1, 2, 3):
            countersign(run, number)
        assert run.phase() == "closed"
        assert mine in countersign(run, 4).signed

    def test_twice_is_once(self, run: ClosedRun) -> None:
        assert countersign(run, 1) == countersign(run, 1)
        with run.federation.database.read() as connection:
            rows = connection.execute(sa.select(db.countersignatures.c.size, db.countersignatures.c.participant)).all()
        assert len(rows) == len(set(rows))

    @pytest.mark.parametrize(
        "changes",
        [{"root": "0" * 64}, {"size": 5}, {"size": 10**6}, {"origin": "1" * 64}],
        ids=["another root", "an earlier head", "a later head", "another log"],
    )
    def test_another_head_is_rejected(self, run: ClosedRun, changes: dict) -> None:
        before = run.state()
        with pytest.raises(RejectedError) as err:
            countersign(run, 1, word(run, 1, **changes))
        assert err.value.code == "CLOSING_HEAD"
        assert run.state() == before

    def test_another_key_is_a_fault(self, run: ClosedRun) -> None:
        for key in (generate_key(), run.federation.agent(2).desk.run_key, run.federation.operator_run_key):
            with pytest.raises(FaultError) as err:
                countersign(run, 1, word(run, 1, key=key))
            assert err.value.code == "SIGNATURE_MISSING"
        assert run.state().signed == ()

    def test_signed_by_two_it_would_spoil_the_evidence(self, run: ClosedRun) -> None:
        desk = run.federation.agent(1).desk
        good = word(run, 1)
        both = sign(Countersignature.from_bytes(good.body), desk.run_key, generate_key())
        twice = good.model_copy(update={"signatures": good.signatures * 2})
        for envelope in (both, twice):
            with pytest.raises(FaultError) as err:
                countersign(run, 1, envelope)
            assert err.value.code == "SIGNATURE_EXTRA"
        countersign(run, 1)
        assert run.verified().faults == ()

    def test_nobody_signs_in_anothers_name(self, run: ClosedRun) -> None:
        other = run.federation.agent(2)
        for envelope in (
            word(run, 2),
            word(run, 1, participant=other.desk.participant),
            word(run, 1, participant="0" * 64),
        ):
            with pytest.raises(RejectedError) as err:
                countersign(run, 1, envelope)
            assert err.value.code == "CLOSING_PARTY"
        assert run.state().signed == ()

    def test_a_record_of_another_type_is_no_countersignature(self, run: ClosedRun) -> None:
        head = word(run, 1)
        record = Checkpoint(origin=run.contract_id, size=1, root="0" * 64)
        with pytest.raises((FaultError, InputError)):
            countersign(run, 1, sign(record, run.federation.agent(1).desk.run_key))
        relabelled = head.model_copy(update={"type": "application/vnd.fedpact.checkpoint.v1+json"})
        with pytest.raises(FaultError) as err:
            countersign(run, 1, relabelled)
        assert err.value.code == "ENVELOPE_TYPE"

    def test_the_countersignatures_of_rounds_do_not_close(self, run: ClosedRun) -> None:
        with run.federation.database.read() as connection:
            signed = {size for size, _, _ in logbook.countersignatures(connection, run.contract_id)}
        assert signed
        assert run.state().size not in signed
        assert run.state().signed == ()


def test_before_the_close_there_is_nothing_to_countersign(run: ClosedRun) -> None:
    with pytest.raises(InputError) as err:
        countersign(run, 1)
    assert err.value.code == "CLOSING_NOT_OPEN"
    with run.federation.database.read() as connection:
        sizes = {size for size, _, _ in logbook.countersignatures(connection, run.contract_id)}
        assert logbook.size(connection, run.contract_id) not in sizes, "nor is it kept for later"
        with pytest.raises(InputError):
            closing.closing_state(connection, run.federation.contract)


def test_without_a_pool_everybody_who_took_part_is_waited_for(run: ClosedRun) -> None:
    settle(run.federation, 500, 500)
    everybody = {run.federation.agent(n).desk.participant for n in (1, 2, 3, 4)}
    assert set(run.state().held) == everybody
    for number in (1, 2, 3, 4):
        assert run.phase() == "closing"
        countersign(run, number)
    assert run.phase() == "closed"
    bodies = [entry.open() for entry in run.federation.entries()]
    assert [body.revenue_fen for body in bodies if isinstance(body, RevenueRecorded)] == [500]


def test_objections_are_named_once_each(run: ClosedRun) -> None:
    settle(run.federation)
    who = run.federation.agent(1).desk.participant
    with run.federation.database.write() as connection:
        for size in (1, 2):
            values = {"contract_id": run.contract_id, "participant": who, "size": size, "envelope": b""}
            connection.execute(db.objections.insert().values(**values))
        assert closing.objections(connection, run.contract_id) == (who,)
        assert closing.objections(connection, "0" * 64) == ()
