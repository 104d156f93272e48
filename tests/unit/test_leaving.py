"""A participant pauses, withdraws, revokes its run key: the run goes on without it, and what it earned is paid."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.closed_run import EVERYBODY_IS_PAID, REVENUE, ClosedRun, copy, open_run
from tests.support.federation import Federation

from fedpact_client import leaving
from fedpact_client.closing import close
from fedpact_client.policy import Hours
from fedpact_client.store import EgressKind
from fedpact_contract.errors import FedpactError, RefusedError
from fedpact_contract.evidence import unpack
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.log import (
    DestructionStated,
    KeyRevoked,
    NoticeTaken,
    RoundAggregated,
    RoundOpened,
    UpdateDecided,
    UpdateRefused,
)
from fedpact_contract.messages import DestructionReceipt, Held, KeyRevocation, Notice, Order, Refusal, Reply, Update
from fedpact_contract.record import read_envelope, sign
from fedpact_contract.report import build
from fedpact_contract.request import utc_now
from fedpact_contract.trust import Trust
from fedpact_contract.verify import verify
from fedpact_server import enrolment, rounds, runs
from fedpact_server.report.html import render

LEAVER = 4
KEYS = [generate_key() for _ in range(4)]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "RESEND_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "LOOK_SECONDS", 0.0)


TERMS = {"training__rounds": 4, "participation__head_threshold": 1, **EVERYBODY_IS_PAID}
FOLDER = tempfile.TemporaryDirectory(prefix="fedpact-leaving-")


@pytest.fixture
def run(tmp_path: Path) -> ClosedRun:
    """Four enterprises, of which three suffice; nothing has begun."""
    return open_run(tmp_path, keys=KEYS, **TERMS)


@functools.cache
def made(when: str, step: Callable[[ClosedRun], None]) -> Federation:
    """A completed run in which something was done at this order (`during`); made once for each kind, then copied."""
    run = open_run(Path(tempfile.mkdtemp(dir=FOLDER.name)), keys=KEYS, **TERMS)
    during(run, **{when: lambda: step(run)})
    assert run.federation.run(accept_test_noise=False) == "completed"
    run.federation.database.dispose()
    return run.federation


def desk(run: ClosedRun, number: int = LEAVER) -> Any:
    return run.federation.agent(number).desk


def path(run: ClosedRun) -> str:
    return f"/fedpact/v1/contracts/{run.contract_id}/standing"


def say(run: ClosedRun, state: str, *, number: int = LEAVER, key: Ed25519PrivateKey | None = None) -> None:
    """What the guard does when a person has moved the contract to this state."""
    at = desk(run, number)
    at.store.set_state(run.contract_id, state)
    agreement = at.store.contract(run.contract_id)
    with run.client(number) as client:
        said = leaving.said_of(agreement, in_hours=True)
        leaving.tell(at.store, client, agreement, at.participant, said, key or at.run_key)


def withdraw(run: ClosedRun) -> None:
    say(run, "withdrawn")


def revoke(run: ClosedRun) -> None:
    """What `revoke-key` sends, twice."""
    at = desk(run)
    record = KeyRevocation(contract_id=run.contract_id, participant=at.participant, run_key=public_hex(at.run_key))
    with run.client(LEAVER) as client:
        body = {"revocation": sign(record, KEYS[LEAVER - 1]).plain()}
        first = client.post(path(run), body, EgressKind.REVOCATION)
        assert client.post(path(run), body, EgressKind.REVOCATION) == first, "again changes nothing"


def during(run: ClosedRun, **steps: Callable[[], None]) -> None:
    """Do something when the first order of a round reaches an enterprise: `r2e4=...`; before it is answered."""
    done: set[str] = set()
    numbers = {run.federation.agent(n).desk.participant: n for n in range(1, 5)}

    def before(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes]:
        record = Order.from_bytes(read_envelope(order).body)
        name = f"r{record.round}e{numbers[record.participant]}"
        if name in steps and name not in done:
            done.add(name)
            steps[name]()
        return order, model

    run.federation.transport.before = before


def codes(run: ClosedRun, number: int = LEAVER) -> list[tuple[str, str] | None]:
    """What became of an enterprise in each round; None where it was not invited."""
    name = f"Enterprise {number}"
    return [run.federation.outcomes(n).get(name) for n in range(1, 5)]


def status(run: ClosedRun) -> dict[str, Any]:
    with run.federation.database.read() as connection:
        return runs.status(connection, run.federation.contract).plain()


def faults(run: ClosedRun, change: Callable[[list[Any]], list[Any]]) -> set[str]:
    """Codes of what verification finds in evidence that an operator rewrote."""
    files = {name: text.encode() for name, text in run.rewritten(change).items()}
    return {fault["code"] for fault in verify(unpack(files), Trust.of(run.federation.contract)).faults}


def _round(ready: Any) -> int:
    return Update.from_bytes(Reply.from_bytes(ready.reply).update.body).round


def settle(run: ClosedRun) -> None:
    """Settle, and have every agent look at the close."""
    run.settle()
    for number in range(1, 5):
        with run.client(number) as client:
            assert close(desk(run, number), client)[0] == "countersigned"


ADMITTED = ("admitted", "ADMITTED")
PAUSED = ("refused", "PARTICIPANT_PAUSED")


class TestPause:
    def test_it_is_refused_once_then_not_invited_and_comes_back(self, run: ClosedRun) -> None:
        seen: list[dict[str, Any]] = []
        during(
            run,
            r2e4=lambda: say(run, "paused"),
            r3e1=lambda: (seen.append(status(run)), say(run, "running")),
        )
        assert run.federation.run(accept_test_noise=False) == "completed"
        assert codes(run) == [ADMITTED, PAUSED, None, ADMITTED]
        (standing,) = seen[0]["standing"].items()
        assert standing[0] == desk(run).participant
        assert (standing[1]["standing"], standing[1]["code"]) == ("paused by participant", "PARTICIPANT_PAUSED")
        assert status(run)["standing"] == {}
        assert desk(run).store.alarms() == [], "what a person here wanted is no alarm"
        settle(run)
        report = run.verified()
        assert report.exit_code == 0, report
        assert "left" not in build(run.federation.entries())

    def test_in_the_middle_of_training_it_is_charged_and_refused(self, run: ClosedRun) -> None:
        at, trained = desk(run), []

        def train(*_: Any) -> None:
            trained.append(1)
            at.store.set_state(run.contract_id, "paused")
            at.store.check_running(run.contract_id)  # what the guard asks while a trainer works

        object.__setattr__(at, "train", train)
        assert run.federation.run(accept_test_noise=False) == "completed"
        assert trained == [1]
        rows = [(row.state, row.code) for row in at.store.rows(at.data_set) if row.round == 1]
        assert rows == [("reserved", None), ("failed", "PARTICIPANT_PAUSED")]
        refused = next(b for e in run.federation.entries() if isinstance(b := e.open(), UpdateRefused))
        record = Refusal.from_bytes(read_envelope(refused.refusal).body)
        assert (record.code, record.attempts) == ("PARTICIPANT_PAUSED", 1)

    def test_a_run_waits_for_a_minimum_that_has_paused(self, run: ClosedRun, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in (3, LEAVER):
            say(run, "paused", number=number)
        loop, waited = run.federation.loop(accept_test_noise=False), []

        def sleep(_seconds: float) -> None:
            waited.append(status(run)["detail"])
            if len(waited) == 3:
                say(run, "running", number=3)

        loop.sleep = sleep
        assert loop.run() == "completed"
        assert waited[2] == (
            "waiting: 2 of at least 3 participants online; paused by participant: Enterprise 3, Enterprise 4"
        )
        assert codes(run, 3) == [ADMITTED] * 4
        assert codes(run) == [None] * 4

    def test_who_pauses_between_the_question_and_the_opening_is_not_invited(
        self, run: ClosedRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gather = rounds.Loop._gather

        def gathered(loop: rounds.Loop) -> set[str]:
            present = gather(loop)
            if status(run)["round"] == 1 and not status(run)["standing"]:
                say(run, "paused")
            return present

        monkeypatch.setattr(rounds.Loop, "_gather", gathered)
        assert run.federation.run(accept_test_noise=False) == "completed"
        assert codes(run) == [ADMITTED, None, None, None]
        assert not run.verified().faults

    def test_the_same_again_is_not_logged_twice_and_an_old_one_is_refused(self, run: ClosedRun) -> None:
        at = desk(run)
        say(run, "paused")
        say(run, "paused")
        assert run.federation.kinds().count("notice-taken") == 1
        assert at.store.count_egress(EgressKind.NOTICE, run.contract_id) == 2
        old = Notice(contract_id=run.contract_id, participant=at.participant, number=1, state="running", code="X")
        for key, number, error, code in (
            (at.run_key, 1, RefusedError, "NOTICE_OLD"),
            (generate_key(), 9, FedpactError, "SIGNATURE_MISSING"),
        ):
            body = {"notice": sign(old.model_copy(update={"number": number}), key).plain()}
            with run.client(LEAVER) as client, pytest.raises(error) as err:
                client.post(path(run), body, EgressKind.NOTICE)
            assert err.value.code == code
        other = old.model_copy(update={"number": 9, "participant": desk(run, 1).participant})
        with run.client(LEAVER) as client, pytest.raises(RefusedError) as err:
            client.post(path(run), {"notice": sign(other, at.run_key).plain()}, EgressKind.NOTICE)
        assert err.value.code == "NOTICE_MISMATCH"


class TestHours:
    def hours(self, run: ClosedRun, begin: str, end: str) -> None:
        """Another window in the policy, and what the guard then says of it; it is 12:01 in UTC."""
        at = desk(run)
        window = Hours(begin=begin, end=end, zone="UTC")
        object.__setattr__(at, "policy", at.policy.model_copy(update={"hours": window}))
        self.tell(run)

    def tell(self, run: ClosedRun) -> None:
        at = desk(run)
        agreement = at.store.contract(run.contract_id)
        said = leaving.said_of(agreement, in_hours=at.policy.hours.open_at(at.now()))
        with run.client(LEAVER) as client:
            leaving.tell(at.store, client, agreement, at.participant, said, at.run_key)

    def test_outside_it_is_refused_once_and_invited_again_when_they_begin(self, run: ClosedRun) -> None:
        seen: list[dict[str, Any]] = []
        during(
            run,
            r2e4=lambda: self.hours(run, "13:00", "14:00"),
            r3e1=lambda: (seen.append(status(run)), self.hours(run, "12:00", "14:00")),
        )
        assert run.federation.run(accept_test_noise=False) == "completed"
        assert codes(run) == [ADMITTED, ("refused", "POLICY_HOURS"), None, ADMITTED]
        (standing,) = seen[0]["standing"].values()
        assert (standing["standing"], standing["code"]) == ("paused by participant", "POLICY_HOURS")
        assert desk(run).store.alarms() == []
        assert not run.verified().faults

    def test_a_round_that_began_within_them_is_finished(self, run: ClosedRun) -> None:
        at, agent = desk(run), run.federation.agent(LEAVER)
        closed = Hours(begin="13:00", end="14:00", zone="UTC")

        def crash(attempt: int) -> bool:
            """The first attempt is lost, and the window ends."""
            object.__setattr__(at, "policy", at.policy.model_copy(update={"hours": closed}))
            return attempt == 1 and not at.store.sent_updates(run.contract_id)

        agent.crash = crash
        run.federation.run(accept_test_noise=False)
        assert codes(run)[:2] == [ADMITTED, ("refused", "POLICY_HOURS")]
        assert [(r.attempt, r.state) for r in at.store.rows(at.data_set) if r.round == 1] == [
            (1, "reserved"),
            (2, "reserved"),
            (2, "spent"),
        ]


def test_whom_the_operator_suspends_is_sent_nothing_and_keeps_what_it_earned(run: ClosedRun) -> None:
    database = run.federation.database

    def suspend() -> None:
        enrolment.suspend(database, selector="Enterprise 4", now=utc_now())

    during(run, r2e1=suspend)
    run.federation.agent(LEAVER).tamper = lambda ready: (ready.reply, ready.array)
    assert run.federation.run(accept_test_noise=False) == "completed"
    assert codes(run)[0] == ADMITTED
    assert codes(run)[2:] == [None, None]
    assert status(run)["standing"][desk(run).participant]["standing"] == "suspended by operator"
    settle(run)
    report = run.verified()
    assert report.exit_code == 0, report
    assert next(p for p in report.participants if p.id == desk(run).participant).fen > 0


class TestWithdraw:
    @pytest.fixture
    def withdrawn(self, tmp_path: Path) -> ClosedRun:
        """A completed run that the fourth left when the order of round 3 came."""
        return copy(made("r3e4", withdraw), tmp_path)

    def test_it_is_invited_no_more_and_paid_what_it_earned(self, withdrawn: ClosedRun) -> None:
        run = withdrawn
        assert codes(run) == [ADMITTED, ADMITTED, ("refused", "PARTICIPANT_WITHDRAWN"), None]
        settle(run)
        report = run.verified()
        assert report.exit_code == 0, report
        line = next(p for p in report.participants if p.id == desk(run).participant)
        assert line.countersigned
        assert 0 < line.fen < REVENUE
        assert line.rounds_admitted == 2
        assert any("Enterprise 4 has withdrawn" in note for note in report.notes)

    def test_the_models_with_its_updates_are_listed(self, withdrawn: ClosedRun) -> None:
        run = withdrawn
        made = [b for e in run.federation.entries() if isinstance(b := e.open(), RoundAggregated)]
        due = [{"round": b.round, "digest": b.model_digest} for b in made]
        standing = status(run)["standing"][desk(run).participant]
        assert standing["standing"] == "withdrawn by participant"
        assert standing["models"] == due, "every model since its first update, also those made without it"
        (left,) = build(run.federation.entries())["left"]
        assert (left["name"], left["said"], left["models"]) == ("Enterprise 4", "withdrawn", due)
        assert due[3]["digest"] in render(build(run.federation.entries()), "en")
        assert "参与方已退出" in render(build(run.federation.entries()), "zh")

    def test_the_operators_receipt_names_updates_and_models_so_far(self, withdrawn: ClosedRun) -> None:
        run = withdrawn
        body = next(b for e in run.federation.entries() if isinstance(b := e.open(), DestructionStated))
        receipt = DestructionReceipt.from_bytes(read_envelope(body.receipt).body)
        assert [u.round for u in receipt.updates] == [m.round for m in receipt.models] == [1, 2]
        assert {u.digest for u in receipt.updates} == set(desk(run).store.sent_updates(run.contract_id).values())
        kept = {held.kind: (held.count, held.reason) for held in receipt.kept}
        assert kept["updates-admitted"] == (2, "SCORES_AND_REEVALUATION")

    def test_withdrawing_is_final(self, withdrawn: ClosedRun) -> None:
        run, at = withdrawn, desk(withdrawn)
        back = Notice(contract_id=run.contract_id, participant=at.participant, number=99, state="running", code="X")
        with run.client(LEAVER) as client, pytest.raises(RefusedError) as err:
            client.post(path(run), {"notice": sign(back, at.run_key).plain()}, EgressKind.NOTICE)
        assert err.value.code == "NOTICE_WITHDRAWN"

    def test_the_agents_receipt_is_logged_once(self, withdrawn: ClosedRun) -> None:
        run, at = withdrawn, desk(withdrawn)
        receipt = DestructionReceipt(
            contract_id=run.contract_id,
            participant=at.participant,
            by="participant",
            destroyed=(Held(kind="arrays-in-the-outbox", count=at.store.destroy_arrays(run.contract_id)),),
            kept=(),
            updates=(),
        )
        assert receipt.destroyed[0].count == 2
        with run.client(LEAVER) as client:
            for _ in range(2):
                client.post(path(run), {"receipt": sign(receipt, at.run_key).plain()}, EgressKind.RECEIPT)
        assert run.federation.kinds().count("destruction-stated") == 2, "the operator's, and the agent's"
        early = receipt.model_copy(update={"participant": desk(run, 1).participant})
        with run.client(1) as client, pytest.raises(RefusedError) as err:
            client.post(path(run), {"receipt": sign(early, desk(run, 1).run_key).plain()}, EgressKind.RECEIPT)
        assert err.value.code == "RECEIPT_MISMATCH"
        settle(run)
        assert run.verified().exit_code == 0

    def test_evidence_that_says_otherwise_is_faulty(self, withdrawn: ClosedRun) -> None:
        run, me, key = withdrawn, desk(withdrawn).participant, withdrawn.federation.operator_run_key

        def invited(bodies: list[Any]) -> list[Any]:
            return [
                b.model_copy(update={"invited": tuple(sorted({*b.invited, me}))})
                if isinstance(b, RoundOpened) and b.round == 4
                else b
                for b in bodies
            ]

        assert "INVITED_AWAY" in faults(run, invited)

        def fewer_models(bodies: list[Any]) -> list[Any]:
            def other(body: DestructionStated) -> DestructionStated:
                record = DestructionReceipt.from_bytes(read_envelope(body.receipt).body)
                record = record.model_copy(update={"models": record.models[1:], "updates": record.updates[:1]})
                return body.model_copy(update={"receipt": sign(record, key).plain()})

            return [other(b) if isinstance(b, DestructionStated) else b for b in bodies]

        assert {"DESTRUCTION_MODELS", "DESTRUCTION_UPDATES"} <= faults(run, fewer_models)
        assert "DESTRUCTION_TIME" in faults(run, lambda bodies: [b for b in bodies if not isinstance(b, NoticeTaken)])

        def forged(bodies: list[Any]) -> list[Any]:
            def by_operator(body: NoticeTaken) -> NoticeTaken:
                notice = Notice.from_bytes(read_envelope(body.notice).body)
                return body.model_copy(update={"notice": sign(notice, key).plain()})

            return [by_operator(b) if isinstance(b, NoticeTaken) else b for b in bodies]

        assert "SIGNATURE_MISSING" in faults(run, forged)

        def twice(bodies: list[Any]) -> list[Any]:
            at = next(i for i, b in enumerate(bodies) if isinstance(b, DestructionStated))
            return [*bodies[: at + 1], bodies[at - 1], bodies[at], *bodies[at + 1 :]]

        assert {"NOTICE_OLD", "DESTRUCTION_TWICE"} <= faults(run, twice)


class TestRevokeKey:
    @pytest.fixture
    def revoked(self, tmp_path: Path) -> ClosedRun:
        """A completed run; the key was revoked when the order of round 2 came, and the update was made all the same."""
        return copy(made("r2e4", revoke), tmp_path)

    def test_nothing_that_it_signs_counts_from_the_entry_on(self, revoked: ClosedRun) -> None:
        run = revoked
        assert codes(run) == [ADMITTED, ("missed", "KEY_REVOKED"), None, None]
        assert 2 in desk(run).store.sent_updates(run.contract_id), "whoever has the key may well sign"
        standing = status(run)["standing"][desk(run).participant]
        assert (standing["standing"], standing["models"]) == ("run key revoked", [])
        assert run.verified().exit_code == 4, "what it signed before stands; the run is not closed"

    def test_whoever_is_silent_after_it_is_not_waited_for(self, run: ClosedRun) -> None:
        during(run, r2e1=lambda: revoke(run))
        run.federation.agent(LEAVER).tamper = lambda ready: None if _round(ready) == 2 else (ready.reply, ready.array)
        assert run.federation.run(accept_test_noise=False) == "completed"
        assert codes(run)[1] == ("missed", "KEY_REVOKED")

    def test_the_closing_is_countersigned_by_the_contract_key(self, revoked: ClosedRun) -> None:
        run, at = revoked, desk(revoked)
        run.settle()
        for number in (1, 2, 3):
            with run.client(number) as client:
                assert close(desk(run, number), client)[0] == "countersigned"
        with run.client(LEAVER) as client, pytest.raises(FedpactError) as err:
            close(at, client)
        assert err.value.code == "SIGNATURE_MISSING"
        assert run.phase() == "closing"
        object.__setattr__(at, "run_key", KEYS[LEAVER - 1])
        with run.client(LEAVER) as client:
            assert close(at, client)[0] == "countersigned"
        assert run.phase() == "closed"
        report = run.verified()
        assert report.exit_code == 0, report
        line = next(p for p in report.participants if p.id == at.participant)
        assert line.fen > 0
        assert any("revoked its run key" in note for note in report.notes)

    def test_it_withdraws_by_the_contract_key(self, revoked: ClosedRun) -> None:
        with pytest.raises(FedpactError) as err:
            say(revoked, "withdrawn")
        assert err.value.code == "SIGNATURE_MISSING"
        say(revoked, "withdrawn", key=KEYS[LEAVER - 1])
        assert status(revoked)["standing"][desk(revoked).participant]["standing"] == (
            "withdrawn by participant, run key revoked"
        )
        assert not revoked.verified().faults

    @pytest.mark.parametrize(
        ("key", "changes", "code"),
        [
            (KEYS[0], {}, "SIGNATURE_MISSING"),
            (KEYS[LEAVER - 1], {"run_key": "1" * 64}, "REVOCATION_MISMATCH"),
            (KEYS[LEAVER - 1], {"contract_id": "1" * 64}, "REVOCATION_MISMATCH"),
        ],
    )
    def test_only_the_contract_key_revokes_and_only_this_key(
        self, run: ClosedRun, key: Ed25519PrivateKey, changes: dict[str, str], code: str
    ) -> None:
        at = desk(run)
        values = {"contract_id": run.contract_id, "participant": at.participant, "run_key": public_hex(at.run_key)}
        record = KeyRevocation(**(values | changes))
        with run.client(LEAVER) as client, pytest.raises(FedpactError) as err:
            client.post(path(run), {"revocation": sign(record, key).plain()}, EgressKind.REVOCATION)
        assert err.value.code == code
        assert run.federation.kinds() == ["contract-signed"]

    def test_evidence_that_says_otherwise_is_faulty(self, revoked: ClosedRun) -> None:
        run = revoked

        def earlier(bodies: list[Any]) -> list[Any]:
            """The operator puts the revocation before an update that it had admitted."""
            at = next(i for i, b in enumerate(bodies) if isinstance(b, KeyRevoked))
            first = next(i for i, b in enumerate(bodies) if isinstance(b, UpdateDecided))
            return [*bodies[:first], bodies[at], *bodies[first:at], *bodies[at + 1 :]]

        assert "KEY_REVOKED" in faults(run, earlier)

        def forged(bodies: list[Any]) -> list[Any]:
            """The operator revokes a key by itself."""
            key = run.federation.operator_run_key

            def by_operator(body: KeyRevoked) -> KeyRevoked:
                record = KeyRevocation.from_bytes(read_envelope(body.revocation).body)
                return body.model_copy(update={"revocation": sign(record, key).plain()})

            return [by_operator(b) if isinstance(b, KeyRevoked) else b for b in bodies]

        assert "SIGNATURE_MISSING" in faults(run, forged)


def test_a_closed_run_takes_nothing_more(run: ClosedRun) -> None:
    assert run.federation.run(accept_test_noise=False) == "completed"
    settle(run)
    with pytest.raises(RefusedError) as err:
        say(run, "withdrawn")
    assert err.value.code == "RUN_CLOSED"
    assert run.verified().exit_code == 0
