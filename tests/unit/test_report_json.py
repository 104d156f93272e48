"""The report as JSON: a pure function of the log, exact, at every length of the log."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from tests.support.closed_run import REVENUE, ClosedRun, closed_run
from tests.support.federation import make_federation

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.errors import FaultError
from fedpact_contract.log import Entry, UpdateDecided
from fedpact_contract.messages import Update
from fedpact_contract.record import ratio_text, read_envelope, sign
from fedpact_contract.report import NOT_STOPPED, build, charged_steps, settled
from fedpact_server.report.html import render


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ClosedRun:
    made = closed_run(tmp_path_factory.mktemp("report"))
    made.settle()
    return made


@pytest.fixture(scope="module")
def entries(run: ClosedRun) -> list[Entry]:
    return run.federation.entries()


@pytest.fixture(scope="module")
def report(entries: list[Entry]) -> dict[str, Any]:
    return build(entries)


def test_it_has_only_exact_values_and_the_same_bytes_every_time(report: dict[str, Any], entries: list[Entry]) -> None:
    data = canonical_bytes(report)  # refuses floats
    assert canonical_bytes(build([Entry.from_bytes(entry.to_bytes()) for entry in entries])) == data


def test_every_fen_of_the_pool_is_somebodys(run: ClosedRun, report: dict[str, Any]) -> None:
    lines = report["participants"]
    assert sum(line["fen"] for line in lines) == report["settlement"]["pool_fen"] == REVENUE
    assert abs(sum(Decimal(line["share"]) for line in lines) - 1) < Decimal("1e-8")
    for line in lines:
        assert Decimal(line["share_low"]) <= Decimal(line["share"]) <= Decimal(line["share_high"])
        assert line["rounds_admitted"] == 2
        assert line["epsilon_budget"] == "2"
        assert 0 < Decimal(line["epsilon_spent"]) <= 2
        assert line["steps"] == 12
    assert [line["id"] for line in lines] == [p.id for p in run.federation.contract.participants]


def test_contributions_add_up_by_round(report: dict[str, Any]) -> None:
    first, second = report["rounds"]
    for line in report["participants"]:
        steps = [Decimal(number["values"][line["id"]]) for number in (first, second)]
        assert abs(Decimal(second["cumulative"][line["id"]]) - sum(steps)) <= Decimal("1e-9")
        assert abs(Decimal(line["value"]) - sum(steps)) <= Decimal("1e-9")
    gained = Decimal(first["loss_before"]) - Decimal(first["loss_after"])
    assert abs(sum(Decimal(v) for v in first["values"].values()) - gained) < Decimal("1e-8"), "nothing is lost or made"
    assert first["loss_after"] == second["loss_before"]


def test_the_metric_begins_before_the_first_round(report: dict[str, Any]) -> None:
    metric = report["metric"]
    assert (metric["name"], metric["rows"]) == ("accuracy", 220)
    assert metric["final"] == report["rounds"][-1]["metric"]
    assert 0 <= Decimal(metric["initial"]) <= 1


@pytest.mark.parametrize("count", range(1, 23))
def test_a_log_of_any_length_has_a_report(entries: list[Entry], count: int) -> None:
    found = build(entries[:count])
    assert found["entries"] == count
    kinds = [entry.type for entry in entries[:count]]
    if "period-settled" in kinds:
        state = "settled"
    elif "run-completed" in kinds:
        state = "completed"
    else:
        state = "running" if "round-opened" in kinds else "signed"
    assert found["state"] == state
    assert (found["model"] is None) == ("run-completed" not in kinds)
    assert (found["settlement"] is None) == ("period-settled" not in kinds)
    assert (found["metric"] is None) == ("scores-opened" not in kinds)
    if found["metric"] is None:
        text = canonical_bytes(found).decode()
        assert "loss_before" not in text
        assert '"values"' not in text, "scores stay closed until the close"
    assert len(found["rounds"]) == kinds.count("round-opened")
    assert sum(len(line["outcomes"]) for line in found["rounds"]) == kinds.count("update-decided")


def test_what_did_not_work_is_in_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)
    federation = make_federation(
        tmp_path,
        policy={3: {"max_epsilon": Decimal(1)}},
        participation__deadline_seconds=1,
        participation__minimum=3,
        training__rounds=2,
    )
    silent = federation.agent(2)
    silent.tamper = lambda _ready: None
    assert federation.run() == "stopped"
    found = build(federation.entries())
    outcomes = {o["name"]: (o["outcome"], o["code"]) for o in found["rounds"][0]["outcomes"]}
    assert outcomes == {
        "Enterprise 1": ("admitted", "ADMITTED"),
        "Enterprise 2": ("missed", "DEADLINE"),
        "Enterprise 3": ("admitted", "ADMITTED"),
        "Enterprise 4": ("refused", "POLICY_EPSILON"),
    }
    assert (found["state"], found["rounds"][0]["admitted"], found["rounds"][0]["invited"]) == ("stopped", 2, 4)
    spent = {line["name"]: Decimal(line["epsilon_spent"]) for line in found["participants"]}
    assert spent["Enterprise 1"] > 0
    assert spent["Enterprise 4"] == 0
    contract = federation.contract
    steps = charged_steps([entry.open() for entry in federation.entries()], contract)
    silent_id = federation.agent(2).desk.participant
    assert steps[silent_id] == 2 * contract.training.local_steps, "it may have trained, and used the spare attempt"
    assert spent["Enterprise 2"] > spent["Enterprise 1"]


def test_an_attempt_that_nobody_can_have_made_breaks_nothing(run: ClosedRun, entries: list[Entry]) -> None:
    agent = run.federation.agent(1)

    def huge(entry: Entry) -> Entry:
        body = entry.open()
        if not (isinstance(body, UpdateDecided) and (body.round, body.participant) == (1, agent.desk.participant)):
            return entry
        update = Update.from_bytes(read_envelope(body.update).body).model_copy(update={"attempt": 2**31})
        return Entry.of(body.model_copy(update={"update": sign(update, agent.desk.run_key).plain()}))

    contract = run.federation.contract
    found = build([huge(entry) for entry in entries])
    line = next(line for line in found["participants"] if line["id"] == agent.desk.participant)
    assert line["steps"] == contract.planned_steps
    assert Decimal(line["epsilon_spent"]) <= contract.privacy.epsilon
    assert render(found, "en")


def test_attempts_that_end_in_a_refusal_are_charged(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)
    federation = make_federation(tmp_path, training__rounds=1)
    agent = federation.agent(2)
    agent.crash = lambda _attempt: True
    assert federation.run() == "completed"
    charged = sum(row.state == "reserved" for row in agent.desk.store.rows(agent.desk.data_set))
    steps = charged_steps([entry.open() for entry in federation.entries()], federation.contract)
    assert charged > 0
    assert steps[agent.desk.participant] == charged * federation.contract.training.local_steps


def test_a_second_attempt_costs_as_much_as_the_first(run: ClosedRun, entries: list[Entry]) -> None:
    agent = run.federation.agent(1)

    def second(entry: Entry) -> Entry:
        body = entry.open()
        if not (isinstance(body, UpdateDecided) and (body.round, body.participant) == (1, agent.desk.participant)):
            return entry
        update = Update.from_bytes(read_envelope(body.update).body).model_copy(update={"attempt": 2})
        return Entry.of(body.model_copy(update={"update": sign(update, agent.desk.run_key).plain()}))

    changed = [second(entry) for entry in entries]
    steps = charged_steps([entry.open() for entry in changed], run.federation.contract)
    assert steps[agent.desk.participant] == 18
    lines = {line["id"]: line for line in build(changed)["participants"]}
    others = {line["id"]: line for line in build(entries)["participants"]}
    mine = agent.desk.participant
    assert Decimal(lines[mine]["epsilon_spent"]) > Decimal(others[mine]["epsilon_spent"])


def test_the_settlement_is_recomputed_and_not_read(run: ClosedRun, entries: list[Entry]) -> None:
    bodies = [entry.open() for entry in entries]
    result = settled(bodies, run.federation.contract)
    assert {line.participant: line.fen for line in result.lines} == {
        line["id"]: line["fen"] for line in build(entries)["participants"]
    }
    assert settled(bodies[:16], run.federation.contract) is None


def test_what_nothing_stops_is_said(report: dict[str, Any]) -> None:
    assert report["not_stopped"] == list(NOT_STOPPED)
    assert len(NOT_STOPPED) >= 8
    assert "not re-evaluated" in report["utilities"]


def test_a_log_without_a_contract_has_no_report(entries: list[Entry]) -> None:
    for log in ([], entries[1:]):
        with pytest.raises(FaultError) as err:
            build(log)
        assert err.value.code == "REPORT_NO_CONTRACT"


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [
        (Fraction(1, 3), 6, "0.333333"),
        (Fraction(2, 3), 2, "0.67"),
        (Fraction(1, 8), 2, "0.12"),
        (Fraction(3, 8), 2, "0.38"),
        (Fraction(-1, 10**12), 6, "0"),
        (Fraction(5), 9, "5"),
        (Fraction(10**40, 3), 2, "3" * 40 + ".33"),
        (Fraction(5 * 10**30 - 1, 10**36), 6, "0.000005"),
        (Fraction(5 * 10**29 - 1, 10**36), 6, "0"),
    ],
)
def test_fractions_are_shown_rounded_half_to_even(value: Fraction, places: int, text: str) -> None:
    assert ratio_text(value, places) == text
