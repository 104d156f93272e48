"""What people decide about gaming: unions, readmissions, reviews; participants' answers; and what verify finds."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.command import runner
from tests.support.federation import digits, make_federation, set_clocks
from tests.support.findings import alarm, say
from tests.support.noise import FixedNoise
from tests.support.readme import Script, commands, filled
from tests.support.town import Town, town

from fedpact_client import cli as agent_cli
from fedpact_client import closing as agents_closing
from fedpact_client import questions as asking
from fedpact_client.store import EgressKind
from fedpact_contract import request
from fedpact_contract.errors import FedpactError, RefusedError, ServiceError
from fedpact_contract.evidence import unpack
from fedpact_contract.keys import generate_key
from fedpact_contract.log import (
    Body,
    Entry,
    Finding,
    Findings,
    ParticipantExcluded,
    PeriodSettled,
    ReviewOpened,
    RoundOpened,
    ScoresOpened,
    StatementTaken,
    UnionConfirmed,
    UnionDeclared,
    UnionWithdrawn,
)
from fedpact_contract.messages import Objection, Statement
from fedpact_contract.parties import Place
from fedpact_contract.questions import Negatives, Question, agreed, review_due
from fedpact_contract.record import read_envelope, sign
from fedpact_contract.replay import replay
from fedpact_contract.request import instant, utc_now
from fedpact_contract.verify import verify
from fedpact_server import closing, db, defences, scoring
from fedpact_server.demo.run import Demo, Options
from fedpact_server.rounds import Loop

CLAUSE: dict[str, Any] = {
    "clip": "median-signal",
    "wreckers": "reject",
    "negatives": Decimal("0.1"),
    "dispute_hours": 72,
}
COUNTS = [60, 60, 70, 80]
WITHOUT_VALUES = {
    "settlement__contribution_weight": "0",
    "settlement__data_weight": "0.5",
    "settlement__equal_weight": "0.5",
}
"""Contribution is not paid by: however the noise falls, no review is due."""


class Quiet(FixedNoise):
    """The same noise in every run, called the system's: agents sign at the close."""

    label = "csprng"


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> tuple[int, str]:
        return self.code, str(self.json["error"]["code"])


@dataclass
class People:
    """A town, and both command lines."""

    town: Town
    run_fedpact: Callable[..., tuple[int, str, str]]
    run_agent: Callable[..., tuple[int, str, str]]

    def fedpact(self, *words: str) -> Answer:
        """The operator's person; the contract stands for RUN."""
        return Answer(*self.run_fedpact(*self._filled(words), *self.town.operator()))

    def agent(self, number: int, *words: str) -> Answer:
        """A person at `Enterprise number`."""
        end = self.town.signed(number) if words[0] == "answer" else self.town.at(number)
        return Answer(*self.run_agent(*self._filled(words), *end))

    def asked(self, number: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.agent(number, "questions", "RUN").json["questions"]
        return found

    def _filled(self, words: tuple[str, ...]) -> list[str]:
        return [self.town.contract_id if word == "RUN" else word for word in words]


@pytest.fixture
def people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., People]:
    monkeypatch.setenv("COLUMNS", "200")

    def made(counts: list[int] = COUNTS, **changes: Any) -> People:
        found = town(tmp_path, counts, **({"defences": CLAUSE} | changes))
        wire = found.run.wire
        monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: wire.handle_request(request))
        agent = runner(monkeypatch, capsys, agent_cli.main, "fedpact-agent")
        return People(found, runner(monkeypatch, capsys), agent)

    return made


def near(number: int, *who: str, code: str = "NEAR_COPY") -> Finding:
    return alarm(code, number, *who)


def keep(at: Town, line: Finding) -> None:
    findings = Findings(round=line.round, lines=(line,))
    with at.run.federation.database.write() as connection:
        scoring.keep(connection, at.contract_id, f"findings:{findings.round}", findings)


def declared(at: Town, *numbers: int, **changes: Any) -> UnionDeclared:
    body = UnionDeclared(
        round=1,
        members=tuple(sorted(at.id(n) for n in numbers)),
        declared=instant(utc_now()),
        until=instant(utc_now() + timedelta(hours=72)),
        reason="one warehouse",
    )
    return body.model_copy(update=changes)


def later(monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """The operator's clock at the command line, from now on."""
    monkeypatch.setattr("fedpact_contract.request.utc_now", lambda: utc_now() + timedelta(hours=hours))


def between(monkeypatch: pytest.MonkeyPatch, what: Callable[[int], None]) -> None:
    """People do this after a round is committed."""
    whole = Loop._commit

    def commit(self: Loop, current: Any) -> None:
        whole(self, current)
        what(int(current.round))
        self.now = lambda: request.utc_now()  # everybody's clock, which `later` sets
        set_clocks(self.transport.agents, self.now)

    monkeypatch.setattr(Loop, "_commit", commit)


def close_all(at: Town) -> None:
    for number in range(1, len(at.homes) + 1):
        done, _ = agents_closing.close(at.run.federation.agent(number).desk, at.run.client(number))
        assert done == "countersigned"
    assert at.run.phase() == "closed"
    assert at.run.verified().faults == ()


def codes(at: Town, change: Callable[[list[Body]], list[Body]]) -> set[str]:
    """What verify finds in a log that the operator changed and signed anew."""
    files = at.run.rewritten(change)
    found = verify(unpack({name: text.encode() for name, text in files.items()}), None, privacy=False).faults
    return {str(fault["code"]) for fault in found}


def statement(at: Town, number: int, subject: str, key: Any = None, **changes: Any) -> dict[str, Any]:
    home = at.homes[number - 1]
    values = {
        "contract_id": at.contract_id,
        "participant": home.participant_id,
        "subject": subject,
        "answer": "dispute",
        "reason": "other patients",
    }
    record = Statement.parse(values | changes, code="TEST")
    return sign(record, key or home.load_contract_key(b"correct horse")).plain()


def test_a_union_is_declared_disputed_confirmed_and_counts_once(people, monkeypatch) -> None:
    who = people(training__rounds=3, **WITHOUT_VALUES)
    at = who.town
    members = tuple(sorted((at.id(1), at.id(2))))
    say(monkeypatch, lambda number: [near(number, *members)] if number == 1 else [])

    def after(number: int) -> None:
        if number != 1:
            return
        assert who.asked(1) == []
        made = who.fedpact("union", "declare", "RUN", "Enterprise 1", at.id(2)[:12], "--reason", "one warehouse")
        assert (made.code, made.json["members"], made.json["round"]) == (0, list(members), 1)
        agents_closing.close(at.run.federation.agent(1).desk, at.run.client(1))
        agents_closing.close(at.run.federation.agent(1).desk, at.run.client(1))
        (asked,) = who.asked(1)
        assert (asked["kind"], asked["reason"], asked["answered"]) == ("union", "one warehouse", None)
        assert sorted(asked["members"]) == ["Enterprise 1", "Enterprise 2"]
        assert who.asked(3) == [], "it is in no union"
        early = who.fedpact("union", "confirm", "RUN", "Enterprise 2")
        assert early.error == (5, "UNION_WINDOW")
        assert asked["until"] in early.json["error"]["message"]
        told = ("--subject", asked["subject"][:8], "--dispute", "--reason", "another hospital")
        assert who.agent(1, "answer", "RUN", *told).code == 0
        (answered,) = who.asked(2)
        assert (answered["answers"], answered["answered"]) == ({"Enterprise 1": "dispute"}, None)
        assert who.asked(1)[0]["answered"] == "dispute"
        later(monkeypatch, 73)
        refused = who.fedpact("union", "confirm", "RUN", "Enterprise 2")
        assert refused.error == (2, "UNION_DISPUTED")
        assert "Enterprise 1: another hospital" in refused.json["error"]["message"]
        shown = who.fedpact("run", "status", "RUN").json["defences"]
        assert shown["alarms"] == [{"code": "NEAR_COPY", "round": 1, "participants": list(members)}]
        (pending,) = shown["unions"]
        assert (pending["state"], pending["disputed"]) == ("declared", {at.id(1): "another hospital"})
        done = who.fedpact("union", "confirm", "RUN", "Enterprise 2", "--reason", "the rows are the same")
        assert done.code == 0
        assert who.asked(1) == [], "it asks no more"

    between(monkeypatch, after)
    assert at.run.federation.run(accept_test_noise=False) == "completed"
    at.run.settle()
    assert [body.scores.unions for body in at.bodies(ScoresOpened)] == [None, (members,), (members,)]
    close_all(at)
    store = at.run.federation.agent(1).desk.store
    assert [e.contract_id for e in store.egress() if e.kind == EgressKind.STATEMENT] == [at.contract_id]
    waits = [alarm.detail for alarm in store.alarms() if alarm.code == "QUESTION_WAITS"]
    assert len(waits) == 1, "told once, however often the agent looks"
    assert f"fedpact-agent questions {at.contract_id[:12]}" in waits[0]
    assert all(alarm.code == "QUESTION_WAITS" for alarm in store.alarms())
    unasked = {n: list(at.run.federation.agent(n).desk.store.alarms()) for n in (2, 3)}
    assert [a.code for a in unasked[2]] == ["CLOSING_UNION_UNASKED"], "no agent of it looked while it could dispute"
    assert f"(union {waits[0][:12]})" in unasked[2][0].detail
    assert unasked[3] == []

    def without_reason(found: list[Body]) -> list[Body]:
        return [b.model_copy(update={"reason": None}) if isinstance(b, UnionConfirmed) else b for b in found]

    def twice(found: list[Body]) -> list[Body]:
        return [x for b in found for x in ([b, b] if isinstance(b, StatementTaken) else [b])]

    def after_it(found: list[Body]) -> list[Body]:
        (said,) = (b for b in found if isinstance(b, StatementTaken))
        rest = [b for b in found if b is not said]
        place = next(i for i, b in enumerate(rest) if isinstance(b, UnionConfirmed))
        return [*rest[: place + 1], said, *rest[place + 1 :]]

    assert "UNION_DISPUTED" in codes(at, without_reason)
    assert "STATEMENT_TWICE" in codes(at, twice)
    assert "STATEMENT_SUBJECT" in codes(at, after_it)

    def unfounded(found: list[Body]) -> list[Body]:
        """Confirmed without a finding, and withdrawn before anybody looks."""
        others = tuple(sorted((at.id(3), at.id(4))))
        made = next(b for b in found if isinstance(b, UnionDeclared))
        confirmed = next(b for b in found if isinstance(b, UnionConfirmed))
        more = [
            made.model_copy(update={"members": others}),
            confirmed.model_copy(update={"members": others}),
            UnionWithdrawn(members=others, reason="no more"),
        ]
        place = next(i for i, b in enumerate(found) if isinstance(b, UnionConfirmed))
        return [*found[: place + 1], *more, *found[place + 1 :]]

    assert "UNION_UNFOUNDED" in codes(at, unfounded)


def flipped(people: Callable[..., People], **changes: Any) -> People:
    """Four of whom one has all labels wrong; its value is below zero by more than a tenth of the whole."""
    counts = [250] * 4
    who = people(
        counts,
        data=digits(counts, flip={3: 1.0}),
        noise=Quiet,
        training__rounds=2,
        defences=CLAUSE | {"wreckers": "report"},
        settlement__contribution_weight="0.9",
        settlement__equal_weight="0.1",
        **changes,
    )
    assert who.town.run.federation.run(accept_test_noise=False) == "completed"
    return who


def test_negatives_block_the_close_until_a_review_is_agreed(people, monkeypatch) -> None:
    who = flipped(people)
    what_is_due(who)
    at, amount = who.town, ("--revenue", "10000.00")
    before = at.run.federation.kinds()
    preview = who.fedpact("settle", "preview", "RUN", *amount)
    assert preview.json["review_due"] is True
    assert "waits for a review" in preview.err
    refused = who.fedpact("settle", "close", "RUN", *amount, "--wait", "0")
    assert refused.error == (5, "SETTLE_REVIEW_DUE")
    assert refused.json["error"]["party"] == "Enterprise 4"
    assert "fedpact contribution review" in refused.json["error"]["remedy"]
    assert at.run.federation.kinds() == before, "nothing was opened"

    opened = who.fedpact("contribution", "review", "RUN", "--text", "Labels of Enterprise 4 were shifted.")
    assert (opened.code, opened.json["negative"], opened.json["period"]) == (0, [at.id(4)], 1)
    subject = who.asked(1)[0]["subject"]
    assert who.asked(1)[0]["negative"] == ["Enterprise 4"]
    assert who.agent(1, "answer", "RUN", "--subject", subject, "--agree").code == 0
    assert who.agent(4, "answer", "RUN", "--subject", subject, "--agree").code == 0, "it is asked, and does not count"
    wrong = who.agent(2, "answer", "RUN", "--subject", subject, "--dispute")
    assert wrong.error == (2, "STATEMENT_REASON")
    assert who.agent(2, "answer", "RUN", "--subject", subject, "--dispute", "--reason", "whose labels?").code == 0
    still = who.fedpact("settle", "close", "RUN", *amount, "--wait", "0")
    assert still.error == (5, "SETTLE_REVIEW_DUE")
    assert "1 of 3 other participants" in still.json["error"]["message"]
    assert "Enterprise 2: whose labels?" in still.json["error"]["message"]
    status = who.fedpact("run", "status", "RUN").json["defences"]["review"]
    assert (status["agreed"], status["disputed"]) == (False, {at.id(2): "whose labels?"})
    assert who.agent(3, "answer", "RUN", "--subject", subject, "--agree").code == 0
    assert who.fedpact("run", "status", "RUN").json["defences"]["review"]["agreed"] is True
    assert who.fedpact("contribution", "review", "RUN", "--text", "again").error == (5, "REVIEW_AGREED")
    assert who.fedpact("settle", "preview", "RUN", *amount).json["review_due"] is False
    closed = who.fedpact("settle", "close", "RUN", *amount, "--wait", "0")
    assert closed.code == 4, "recorded; lines are held until they are signed"
    assert who.fedpact("settle", "close", "RUN", *amount, "--wait", "0").code == 4, "again changes nothing"
    assert who.fedpact("contribution", "review", "RUN", "--text", "again").error == (5, "REVIEW_SETTLED")
    assert who.asked(1) == []
    close_all(at)
    paid = {line.participant: line.fen for line in at.bodies(PeriodSettled)[0].lines}
    assert paid[at.id(4)] == 25_000, "its part of equal payments: a review is no fine"
    the_rest(at)


def what_is_due(who: People) -> None:
    """Exactly: above the contract's part, not at it; only where contribution is paid by; nothing without a clause."""
    contract = who.town.run.federation.contract
    with who.town.run.federation.database.read() as connection:
        paid = closing.preview(connection, contract, 0, 0).shares
    due = review_due(contract, paid)
    values = {line.participant: line.value for line in paid.lines}
    assert due == Negatives(participants=(who.town.id(4),), ratio=-values[who.town.id(4)] / paid.total_value)

    def shares(value: Fraction) -> Any:
        lines = [
            replace(line, value=value if line.participant == who.town.id(4) else abs(line.value)) for line in paid.lines
        ]
        return replace(paid, total_value=Fraction(1000), lines=tuple(lines))

    assert review_due(contract, shares(Fraction(-100))) is None, "at the limit"
    assert review_due(contract, shares(Fraction(-100) - Fraction(1, 10**9))) is not None
    for reason in ("not-reliable", "no-positive-value", "contribution-not-paid", "not-opened"):
        assert review_due(contract, replace(paid, reason=reason)) is None
    assert review_due(contract.model_copy(update={"defences": None}), paid) is None


def the_rest(at: Town) -> None:
    """What verify finds where the review is not as it was."""

    def is_review(body: Body) -> bool:
        return isinstance(body, ReviewOpened | StatementTaken)

    def none(found: list[Body]) -> list[Body]:
        return [b for b in found if not is_review(b)]

    def too_few(found: list[Body]) -> list[Body]:
        return [b for b in found if not (isinstance(b, StatementTaken) and b.participant == at.id(3))]

    def one_more(found: list[Body]) -> list[Body]:
        """A second one, which nobody answered, takes the place of the first."""
        last = next(b for b in found if isinstance(b, ReviewOpened))
        place = max(i for i, b in enumerate(found) if is_review(b))
        return [*found[: place + 1], last.model_copy(update={"text": "another"}), *found[place + 1 :]]

    def changed(**values: Any) -> Callable[[list[Body]], list[Body]]:
        return lambda found: [b.model_copy(update=values) if isinstance(b, ReviewOpened) else b for b in found]

    def early(found: list[Body]) -> list[Body]:
        review = next(b for b in found if isinstance(b, ReviewOpened))
        place = next(i for i, b in enumerate(found) if isinstance(b, RoundOpened))
        return [*found[:place], review, *found[place:]]

    assert codes(at, lambda found: found) == set()
    assert codes(at, none) == {"REVIEW_MISSING"}
    assert codes(at, too_few) == {"REVIEW_MISSING"}
    assert codes(at, one_more) == {"REVIEW_MISSING"}
    for values in ({"ratio": "1/2"}, {"negative": (at.id(2),)}, {"negative": tuple(sorted((at.id(2), at.id(4))))}):
        assert "REVIEW_MISMATCH" in codes(at, changed(**values))
    assert "REVIEW_TIME" in codes(at, early)
    assert "REVIEW_TIME" in codes(at, changed(period=2))


def test_an_agent_objects_to_a_settlement_without_the_review(people, monkeypatch) -> None:
    who = flipped(people)
    at = who.town
    monkeypatch.setattr(defences, "waits_for_review", lambda *_: None)
    at.run.settle()
    done, _ = agents_closing.close(at.run.federation.agent(1).desk, at.run.client(1))
    assert done == "objected"
    (sent,) = (r for r in at.run.wire.sent if r.method == "POST" and r.url.path.endswith("/closing"))
    record = Objection.from_bytes(read_envelope(json.loads(sent.content)["objection"]).body)
    assert record.code == "REVIEW_MISSING"
    (fault,) = at.run.verified().faults
    assert (fault["code"], fault["party"]) == ("REVIEW_MISSING", at.run.federation.contract.operator.name)


def test_a_review_that_is_not_due_is_not_opened(people) -> None:
    who = people(training__rounds=1, **WITHOUT_VALUES)
    assert who.town.run.federation.run(accept_test_noise=False) == "completed"
    before = who.town.run.federation.kinds()
    refused = who.fedpact("contribution", "review", "RUN", "--text", "nothing")
    assert refused.error == (2, "REVIEW_NOT_DUE")
    assert who.town.run.federation.kinds() == before
    who.town.enter(ReviewOpened(period=1, negative=(who.town.id(1),), ratio="1/2", text="nothing"))
    who.town.run.settle()
    assert {str(f["code"]) for f in who.town.run.verified().faults} == {"REVIEW_MISMATCH"}


@pytest.mark.parametrize(
    ("negative", "agree", "enough"),
    [
        ((4,), (1,), False),
        ((4,), (1, 4), False),
        ((4,), (1, 2), True),
        ((3, 4), (1,), False),
        ((3, 4), (1, 2), True),
        ((2, 3, 4), (2, 3, 4), False),
        ((2, 3, 4), (1,), True),
        ((1, 2, 3, 4), (1, 2, 3, 4), False),
    ],
)
def test_more_than_half_of_the_others_must_agree(tmp_path, negative, agree, enough) -> None:
    contract = make_federation(tmp_path).contract
    ids = list(contract.by_id())
    body = ReviewOpened(period=1, negative=tuple(ids[n - 1] for n in negative), ratio="1/2", text="x")
    review = Question(body=body, place=Place(index=9, type=body.TYPE), subject="0" * 64)
    for n in range(1, 5):
        answer = "agree" if n in agree else "dispute"
        values = {"contract_id": contract.id, "participant": ids[n - 1], "subject": "0" * 64, "answer": answer}
        review.answers[ids[n - 1]] = Statement.parse(values, code="TEST")
    assert agreed(contract, review) is enough


def test_the_pages_commands_answer_a_question(asked, tmp_path) -> None:
    who, subject = asked
    text = (Path(__file__).resolve().parents[2] / "docs" / "joining.md").read_text("utf-8")
    script = Script(commands(text, "When the log asks you"))
    values = {"3f2a91c0": who.town.contract_id, "agent": str(who.town.homes[0].path), "8c01d2e4": subject}
    shown = filled(script.take("fedpact-agent questions 3f2a91c0"), values)
    assert Answer(*who.run_agent(*shown[1:], "--json")).json["questions"][0]["subject"] == subject
    said = filled(script.take("fedpact-agent answer 3f2a91c0"), values)
    signed = Answer(*who.run_agent(*said[1:], "--json", "--yes", "--passphrase-file", str(who.town.passphrase)))
    assert (signed.code, signed.json["reason"]) == (0, "another hospital, other patients")
    script.done()


def test_the_demo_writes_a_review_where_its_values_ask_for_one(tmp_path, monkeypatch) -> None:
    """By the public commands: refused, reviewed, agreed to by everybody, closed."""
    options = Options(folder=tmp_path, participants=None, rounds=None, revenue="1.00", data=None, lift=None, keep=False)
    demo, said = Demo(options=options, tell=lambda _text: None), list[str]()
    question = {"kind": "review", "subject": "ab" * 32}
    due: list[dict[str, Any]] = [{"error": {"code": "SETTLE_REVIEW_DUE"}}]

    def call(_: Any, words: list[str], *, ok: tuple[int, ...] = (0,)) -> dict[str, Any]:
        said.append(" ".join(words[:3]))
        if words[1] == "settle":
            assert due == [] or 5 in ok
            return due.pop() if due else {}
        return {"questions": [{"kind": "union", "subject": "cd" * 32}, question]} if words[1] == "questions" else {}

    def each(work: Callable[[int, Any], Any]) -> None:
        for number in range(2):
            work(number, None)

    monkeypatch.setattr(type(demo.processes), "call", call)
    monkeypatch.setattr(Demo, "_each", lambda _self, work: each(work))
    demo._settle("3f2a")
    assert said == [
        "fedpact settle close",
        "fedpact contribution review",
        *["fedpact-agent questions 3f2a", "fedpact-agent answer 3f2a"] * 2,
        "fedpact settle close",
    ]
    said.clear()
    demo._settle("3f2a")
    assert said == ["fedpact settle close"], "most demos need none"


@pytest.fixture
def asked(people) -> tuple[People, str]:
    """A declared union of 1 and 2, which nobody has answered; no round has run."""
    who = people()
    who.town.enter(declared(who.town, 1, 2))
    return who, str(who.asked(1)[0]["subject"])


def post(who: People, number: int, envelope: dict[str, Any]) -> Any:
    path = f"/fedpact/v1/contracts/{who.town.contract_id}/questions"
    return who.town.run.client(number).post(path, {"statement": envelope}, contract_id=who.town.contract_id)


def test_only_a_persons_own_answer_to_what_asks_it_is_taken(asked) -> None:
    who, subject = asked
    at = who.town
    run_key = at.run.federation.agent(1).desk.run_key
    refused: list[tuple[int, dict[str, Any], str]] = [
        (1, statement(at, 1, subject, key=run_key), "SIGNATURE_MISSING"),
        (1, statement(at, 1, subject, key=generate_key()), "SIGNATURE_MISSING"),
        (1, statement(at, 2, subject), "SIGNATURE_MISSING"),
        (1, statement(at, 1, subject, participant=at.id(2)), "STATEMENT_MISMATCH"),
        (1, statement(at, 1, subject, contract_id="0" * 64), "STATEMENT_MISMATCH"),
        (1, statement(at, 1, "0" * 64), "STATEMENT_SUBJECT"),
        (3, statement(at, 3, subject), "STATEMENT_SUBJECT"),
        (1, statement(at, 1, subject, reason=None), "STATEMENT_REASON"),
    ]
    for number, envelope, code in refused:
        with pytest.raises(FedpactError) as caught:
            post(who, number, envelope)
        assert caught.value.code == code
    assert at.bodies(StatementTaken) == []
    first = statement(at, 1, subject)
    index = post(who, 1, first)["index"]
    assert post(who, 1, first) == {"index": index}, "a lost reply: the same bytes again change nothing"
    with pytest.raises(RefusedError, match="has answered this entry already") as caught:
        post(who, 1, statement(at, 1, subject, answer="agree"))
    assert caught.value.code == "STATEMENT_TWICE"
    assert [body.participant for body in at.bodies(StatementTaken)] == [at.id(1)]


@pytest.mark.parametrize("body", [{}, {"statement": "x"}, {"statement": {}, "more": 1}, {"statement": []}])
def test_an_answer_of_another_form_is_bad_input(asked, body) -> None:
    who, _ = asked
    path = f"/fedpact/v1/contracts/{who.town.contract_id}/questions"
    with pytest.raises(FedpactError) as caught:
        who.town.run.client(1).post(path, body)
    assert caught.value.code == "BODY_FORM"


def test_what_the_operator_logs_as_an_answer_is_one(asked) -> None:
    """The same rules hold for whoever replays the log."""
    who, subject = asked
    at, entries = who.town, who.town.run.federation.entries()

    def faults(*said: tuple[int, dict[str, Any]]) -> list[str]:
        more = [Entry.of(StatementTaken(participant=at.id(n), statement=envelope)) for n, envelope in said]
        return [f.code for f in replay([*entries, *more], privacy=False).faults if f.code != "UNION_TIME"]

    good = statement(at, 1, subject)
    assert faults((1, good)) == []
    assert faults((1, good), (1, statement(at, 1, subject, answer="agree"))) == ["STATEMENT_TWICE"]
    assert faults((3, statement(at, 3, subject))) == ["STATEMENT_SUBJECT"]
    assert faults((1, statement(at, 1, subject, reason=None))) == ["STATEMENT_REASON"]
    assert faults((2, good)) == ["SIGNATURE_MISSING"]
    assert faults((1, statement(at, 1, subject, contract_id="0" * 64))) == ["STATEMENT_MISMATCH"]


def test_the_command_line_of_a_participant(asked) -> None:
    who, subject = asked
    for told in (("--agree", "--dispute"), ("--dispute", "--reason", "x", "--agree"), ()):
        assert who.agent(1, "answer", "RUN", "--subject", subject, *told).error == (2, "ANSWER_ONE")
    assert who.agent(1, "questions", "RUN").json["questions"][0]["answered"] is None, "nothing was sent"
    assert who.agent(1, "answer", "RUN", "--subject", "ffff", "--agree").error == (2, "QUESTION_UNKNOWN")
    assert who.agent(1, "answer", "RUN", "--subject", subject, "--dispute").error == (2, "STATEMENT_REASON")
    told = ("--subject", subject, "--dispute", "--reason", "x" * 201)
    assert who.agent(1, "answer", "RUN", *told).error == (2, "STATEMENT_FORM")
    code, out, _ = who.run_agent("questions", who.town.contract_id, "--home", str(who.town.homes[0].path))
    assert code == 0
    assert "the operator holds Enterprise 1 and Enterprise 2 to be one" in out or "Enterprise 2 and Enterprise 1" in out
    assert "one warehouse" in out
    assert f"--subject {subject[:12]} --agree" in out
    signed = who.agent(1, "answer", "RUN", "--subject", subject[:6], "--agree")
    assert (signed.code, signed.json["answer"], signed.json["subject"]) == (0, "agree", subject)
    _, out, _ = who.run_agent("questions", who.town.contract_id, "--home", str(who.town.homes[0].path))
    assert "Enterprise 1: agree" in out
    assert "To answer" not in out
    code, out, _ = who.run_agent("questions", who.town.contract_id, "--home", str(who.town.homes[2].path))
    assert "Nothing asks this enterprise." in out


def test_an_answer_is_signed_by_a_person_alone(asked) -> None:
    who, subject = asked
    words = ("answer", who.town.contract_id, "--subject", subject, "--agree", *who.town.at(1))
    assert Answer(*who.run_agent(*words, "--yes")).error == (2, "PASSPHRASE_NEEDED")
    assert Answer(*who.run_agent(*words, "--passphrase-file", str(who.town.passphrase))).error == (
        2,
        "CONFIRMATION_NEEDED",
    )
    assert who.town.bodies(StatementTaken) == []


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"questions": {}},
        {"questions": [7]},
        {"questions": [{"entry": {}, "answers": {}}]},
        {"questions": [{"entry": "SETTLED", "answers": {}}]},
        {"questions": [{"entry": "OTHERS", "answers": {}}]},
        {"questions": [{"entry": "STRANGER", "answers": {}}]},
        {"questions": [{"entry": "GOOD", "answers": {"0": "agree"}}]},
        {"questions": [{"entry": "GOOD", "answers": {"OWN": ["agree"]}}]},
    ],
)
def test_an_operators_answer_of_another_form_is_not_shown(asked, answer) -> None:
    who, _ = asked
    at = who.town
    entries = {
        "SETTLED": PeriodSettled(period=1, pool_fen=0, basis="fallback", lines=()),
        "OTHERS": declared(at, 2, 3),
        "STRANGER": ReviewOpened(period=1, negative=("f" * 64,), ratio="1/2", text="x"),
        "GOOD": declared(at, 1, 2),
    }
    filled = json.loads(json.dumps(answer).replace("OWN", at.id(1)))
    for item in filled.get("questions", []):
        if isinstance(item, dict) and item["entry"]:
            item["entry"] = Entry.of(entries[item["entry"]]).plain()
    at.run.serve("/questions", filled)
    with pytest.raises(ServiceError) as caught:
        asking.fetch(at.run.client(1), at.run.federation.contract, at.id(1))
    assert caught.value.code == "OPERATOR_REPLY"


def test_an_answer_that_does_not_stand_in_the_log_is_told_at_the_close(people, monkeypatch) -> None:
    who = people(training__rounds=1, **WITHOUT_VALUES)
    at = who.town
    members = tuple(sorted((at.id(1), at.id(2))))
    say(monkeypatch, lambda number: [near(number, *members)])

    def after(_number: int) -> None:
        who.fedpact("union", "declare", "RUN", "Enterprise 1", "Enterprise 2", "--reason", "one warehouse")
        at.run.serve("/questions", {"questions": [_question(at)], "index": 7})
        (subject,) = (q.subject for q in asking.fetch(at.run.client(1), at.run.federation.contract, at.id(1)))
        at.run.wire.replace.clear()
        at.run.wire.cut_before = "POST /contracts"
        cut = who.agent(1, "answer", "RUN", "--subject", subject, "--dispute", "--reason", "no")
        assert cut.error == (6, "OPERATOR_AWAY")
        at.run.wire.cut_before = ""

    between(monkeypatch, after)
    assert at.run.federation.run(accept_test_noise=False) == "completed"
    at.run.settle()
    close_all(at)
    alarms = {n: [a.code for a in at.run.federation.agent(n).desk.store.alarms()] for n in (1, 2)}
    assert alarms == {1: ["CLOSING_ANSWER_MISSED"], 2: []}


def _question(at: Town) -> dict[str, Any]:
    entry = next(e for e in at.run.federation.entries() if e.type == UnionDeclared.TYPE)
    return {"index": 0, "entry": entry.plain(), "answers": {}}


class TestOperator:
    def test_a_union_rests_on_an_alarm_and_names_participants(self, people) -> None:
        who = people()
        reason = ("--reason", "one warehouse")
        declare = ("union", "declare", "RUN")
        assert who.fedpact(*declare, "Enterprise 1", "Enterprise 2", *reason).error == (2, "UNION_NO_ROUND")
        keep(who.town, near(1, who.town.id(1), who.town.id(2)))
        keep(who.town, near(2, who.town.id(2), who.town.id(3), code="REPLAY"))
        unknown = who.fedpact(*declare, "Enterprise 1", "Hospital", *reason)
        assert unknown.error == (2, "PARTICIPANT_UNKNOWN")
        assert "Enterprise 2" in unknown.json["error"]["remedy"]
        assert who.fedpact(*declare, "Enterprise 1", *reason).error == (2, "UNION_MEMBERS")
        assert who.fedpact(*declare, "Enterprise 1", who.town.id(1), *reason).error == (2, "UNION_MEMBERS")
        for third in (("Enterprise 1", "Enterprise 3"), ("Enterprise 1", "Enterprise 2", "Enterprise 3")):
            unfounded = who.fedpact(*declare, *third, *reason)
            assert unfounded.error == (2, "UNION_UNFOUNDED")
        assert unfounded.json["error"]["party"] == "Enterprise 3"
        assert who.fedpact(*declare, "Enterprise 1", "Enterprise 2", "--reason", "x" * 201).error == (2, "REASON_FORM")
        assert who.town.bodies(UnionDeclared) == []
        assert who.fedpact(*declare, "Enterprise 2", "Enterprise 1", *reason).code == 0
        again = who.fedpact(*declare, "Enterprise 1", "Enterprise 2", *reason)
        assert again.error == (2, "UNION_MEMBERS")
        assert again.json["error"]["party"] == "Enterprise 1"
        (body,) = who.town.bodies(UnionDeclared)
        assert body.round == 2, "the newest scored round"

    def test_a_union_is_withdrawn(self, people, monkeypatch) -> None:
        who = people()
        keep(who.town, near(1, who.town.id(1), who.town.id(2)))
        for what in ("confirm", "withdraw"):
            reason = ("--reason", "why") if what == "withdraw" else ()
            assert who.fedpact("union", what, "RUN", "Enterprise 1", *reason).error == (2, "UNION_NOT_DECLARED")
        union = ("Enterprise 1", "Enterprise 2", "--reason", "one warehouse")
        assert who.fedpact("union", "declare", "RUN", *union).code == 0
        assert who.fedpact("union", "withdraw", "RUN", "Enterprise 2", "--reason", "two warehouses").code == 0
        assert who.asked(1) == []
        assert who.fedpact("union", "declare", "RUN", *union).code == 0
        later(monkeypatch, 73)
        assert who.fedpact("union", "confirm", "RUN", "Enterprise 1").code == 0
        assert who.fedpact("union", "confirm", "RUN", "Enterprise 1").error == (2, "UNION_NOT_DECLARED")
        _, out, _ = who.run_fedpact("run", "status", who.town.contract_id, "--home", str(who.town.run.home))
        assert "union: Enterprise" in out
        assert "count as one (one warehouse)" in out
        assert who.fedpact("union", "withdraw", "RUN", "Enterprise 1", "--reason", "two warehouses").code == 0
        assert [len(who.town.bodies(kind)) for kind in (UnionDeclared, UnionConfirmed, UnionWithdrawn)] == [2, 1, 2]
        assert who.fedpact("run", "status", "RUN").json["defences"]["unions"] == []

    def test_status_says_what_to_do_next(self, people, monkeypatch) -> None:
        who = people()
        at = who.town
        keep(at, near(1, at.id(1), at.id(2)))
        assert who.fedpact("union", "declare", "RUN", "Enterprise 1", "Enterprise 2", "--reason", "why").code == 0
        at.enter(ParticipantExcluded(round=1, participant=at.id(3), code="WRECKER"))
        words = ("run", "status", at.contract_id, "--home", str(at.run.home))
        _, out, _ = who.run_fedpact(*words)
        short = at.contract_id[:12]
        assert "1 alarm (NEAR_COPY), which only you see" in out
        assert f"`fedpact contribution alarms {short}`" in out
        assert "excluded since round 1: Enterprise 3" in out
        assert f"`fedpact run readmit {short}`" in out
        assert "not disputed so far" in out
        assert "it can be disputed until" in out
        assert f"`fedpact union confirm {short} MEMBER`, or `withdraw`" in out
        subject = who.asked(1)[0]["subject"]
        assert who.agent(1, "answer", "RUN", "--subject", subject, "--dispute", "--reason", "not so").code == 0
        later(monkeypatch, 73)
        _, out, _ = who.run_fedpact(*words)
        assert "disputed (Enterprise 1: not so)" in out
        assert "the time to dispute it was over" in out
        assert "MEMBER --reason TEXT`" in out

    def test_a_wrecker_is_readmitted_with_a_reason(self, people, monkeypatch) -> None:
        who = people(training__rounds=4)
        at = who.town
        say(monkeypatch, lambda number: [near(number, at.id(4), code="WRECKER")] if number == 1 else [])

        def after(number: int) -> None:
            wrong = who.fedpact("run", "readmit", "RUN", "Enterprise 3", "--reason", "labels mended")
            assert wrong.error == (2, "READMISSION")
            assert wrong.json["error"]["party"] == "Enterprise 3"
            if number == 1:
                assert who.fedpact("run", "status", "RUN").json["defences"]["excluded"] == [
                    {"participant": at.id(4), "round": 1}
                ]
            if number == 2:
                assert who.fedpact("run", "readmit", "RUN", "Enterprise 4", "--reason", "labels mended").code == 0
                assert who.fedpact("run", "readmit", "RUN", "Enterprise 4", "--reason", "again").error == (
                    2,
                    "READMISSION",
                )

        between(monkeypatch, after)
        assert at.run.federation.run(accept_test_noise=False) == "completed"
        assert [at.id(4) in body.invited for body in at.bodies(RoundOpened)] == [True, False, True, True]

    def test_after_the_run_nothing_is_decided_for_a_next_round(self, people) -> None:
        who = people()
        keep(who.town, near(1, who.town.id(1), who.town.id(2)))
        with who.town.run.federation.database.write() as connection:
            connection.execute(db.runs.update().values(phase="completed"))
        reason = ("--reason", "why")
        for words in (
            ("union", "declare", "RUN", "Enterprise 1", "Enterprise 2", *reason),
            ("union", "confirm", "RUN", "Enterprise 1"),
            ("union", "withdraw", "RUN", "Enterprise 1", *reason),
            ("run", "readmit", "RUN", "Enterprise 1", *reason),
        ):
            refused = who.fedpact(*words)
            assert refused.error == (5, "RUN_ENDED")
            assert "is completed" in refused.json["error"]["message"]

    def test_without_the_clause_there_is_nothing_to_decide(self, people) -> None:
        who = people(defences=None)
        reason = ("--reason", "why")
        for words in (
            ("union", "declare", "RUN", "Enterprise 1", "Enterprise 2", *reason),
            ("run", "readmit", "RUN", "Enterprise 1", *reason),
        ):
            refused = who.fedpact(*words)
            assert refused.error == (2, "DEFENCES_NOT_CONTRACTED")
        assert "defences" not in who.fedpact("run", "status", "RUN").json
        assert who.asked(1) == []

    def test_entries_between_rounds_are_signed_and_those_in_a_round_wait(self, asked) -> None:
        """So that whoever fetches the evidence sees them, and no round's checkpoint is another than its own."""
        who, subject = asked
        at = who.town
        post(who, 1, statement(at, 1, subject))
        assert at.run.verified().entries == len(at.run.federation.entries())
        with at.run.federation.database.write() as connection:
            connection.execute(
                db.rounds.insert().values(
                    contract_id=at.contract_id,
                    round=1,
                    phase="sent",
                    base_digest="0" * 64,
                    deadline="x",
                    opened_index=1,
                    checkpoint_size=1,
                )
            )
        post(who, 2, statement(at, 2, subject))
        assert at.run.verified().entries == len(at.run.federation.entries()) - 1
