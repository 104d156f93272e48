"""A contract's one run as the operator's commands see it: what may be wanted of it, and where it stands."""

from datetime import UTC, datetime

import pytest
from tests.support.federation import Federation, make_federation

from fedpact_contract.contract import Contract, Software
from fedpact_contract.errors import FedpactError, InputError, RefusedError
from fedpact_server import db, runs


@pytest.fixture
def federation(tmp_path, monkeypatch) -> Federation:
    """A contract that everybody has signed, whose run was never started."""
    made = make_federation(tmp_path)
    with made.database.write() as connection:
        connection.execute(db.runs.delete())
    monkeypatch.setattr(runs, "installed_code", lambda: made.contract.code)
    return made


def start(federation: Federation, state: str = "signed") -> runs.RunStatus:
    with federation.database.write() as connection:
        return runs.start(connection, federation.contract, state)


def want(federation: Federation, wanted: str) -> runs.RunStatus:
    with federation.database.write() as connection:
        return runs.want(connection, federation.contract, wanted)


def status(federation: Federation) -> runs.RunStatus:
    with federation.database.read() as connection:
        return runs.status(connection, federation.contract)


def set_run(federation: Federation, **values: str) -> None:
    with federation.database.write() as connection:
        connection.execute(db.runs.update().values(**values))


def fails(code: str, call, *arguments) -> FedpactError:
    with pytest.raises(FedpactError) as err:
        call(*arguments)
    assert err.value.code == code
    return err.value


class TestStart:
    def test_a_signed_contract_starts_and_nobody_drives_it_yet(self, federation: Federation) -> None:
        found = start(federation)
        assert (found.phase, found.wanted, found.round, found.round_phase, found.rounds) == ("running", "run", 0, "", 3)
        assert found.run_id == f"run-{federation.contract.id[:16]}"
        with federation.database.read() as connection:
            assert runs.run_row(connection, federation.contract.id).driver is None

    def test_again_changes_nothing(self, federation: Federation) -> None:
        first = start(federation)
        with federation.database.read() as connection:
            before = runs.run_row(connection, federation.contract.id)
        assert start(federation) == first
        want(federation, "pause")
        assert start(federation).wanted == "pause", "starting does not resume"
        with federation.database.read() as connection:
            assert runs.run_row(connection, federation.contract.id).started == before.started

    def test_a_contract_that_somebody_has_not_signed_does_not_run(self, federation: Federation) -> None:
        with federation.database.write() as connection:
            connection.execute(db.entries.delete())
        assert isinstance(fails("CONTRACT_NOT_SIGNED", start, federation), InputError)

    def test_a_terminated_contract_does_not_run(self, federation: Federation) -> None:
        assert isinstance(fails("CONTRACT_STATE", start, federation, "terminated"), RefusedError)

    @pytest.mark.parametrize(
        ("now", "runs_now"),
        [
            (datetime(2025, 12, 31, 23, 59, 59, tzinfo=UTC), False),
            (datetime(2026, 1, 1, tzinfo=UTC), True),
            (datetime(2099, 12, 31, tzinfo=UTC), True),
            (datetime(2099, 12, 31, 0, 0, 1, tzinfo=UTC), False),
        ],
    )
    def test_only_in_the_contracts_term(
        self, federation: Federation, monkeypatch, now: datetime, runs_now: bool
    ) -> None:
        monkeypatch.setattr(runs, "utc_now", lambda: now)
        if runs_now:
            assert start(federation).phase == "running"
        else:
            assert "2026-01-01T00:00:00Z" in fails("CONTRACT_TERM", start, federation).message

    def test_only_with_the_code_that_the_contract_names(self, federation: Federation, monkeypatch) -> None:
        other = Software(release="0.1.0", models_digest="0" * 64, shell_digest=federation.contract.code.shell_digest)
        monkeypatch.setattr(runs, "installed_code", lambda: other)
        assert fails("CONTRACT_CODE", start, federation).remedy

    def test_not_a_plan_that_costs_more_than_its_epsilon(self, federation: Federation) -> None:
        plain = federation.contract.plain()
        plain["privacy"]["epsilon"] = "0.5"
        cheap = Contract.parse(plain)
        with federation.database.write() as connection:
            connection.execute(db.contracts.insert().values(id=cheap.id, payload=cheap.to_bytes(), state="signed"))
            connection.execute(db.entries.update().values(contract_id=cheap.id))
        federation.contract = cheap
        fails("CONTRACT_NOISE_TOO_SMALL", start, federation)

    @pytest.mark.parametrize("phase", ["completed", "stopped", "closing", "closed"])
    def test_a_contract_has_one_run(self, federation: Federation, phase: str) -> None:
        start(federation)
        set_run(federation, phase=phase)
        assert phase in fails("RUN_ENDED", start, federation).message

    def test_a_run_that_is_being_stopped_is_not_started_again(self, federation: Federation) -> None:
        start(federation)
        want(federation, "stop")
        fails("RUN_ENDED", start, federation)


class TestWant:
    def test_pause_resume_and_stop(self, federation: Federation) -> None:
        start(federation)
        assert [want(federation, wanted).wanted for wanted in ("pause", "pause", "run", "stop")] == [
            *("pause", "pause", "run", "stop")
        ]

    @pytest.mark.parametrize("wanted", ["pause", "run", "stop"])
    def test_a_stop_is_final(self, federation: Federation, wanted: str) -> None:
        start(federation)
        want(federation, "stop")
        fails("RUN_ENDED", want, federation, wanted)
        assert status(federation).wanted == "stop"

    @pytest.mark.parametrize("phase", ["completed", "stopped", "closing", "closed"])
    def test_an_ended_run_is_left_alone(self, federation: Federation, phase: str) -> None:
        start(federation)
        set_run(federation, phase=phase)
        fails("RUN_ENDED", want, federation, "run")

    def test_what_was_never_started_is_not_known(self, federation: Federation) -> None:
        assert "run start" in fails("RUN_UNKNOWN", want, federation, "stop").remedy
        fails("RUN_UNKNOWN", status, federation)

    def test_it_is_only_this_contracts_run(self, federation: Federation) -> None:
        start(federation)
        with federation.database.write() as connection:
            connection.execute(db.contracts.insert().values(id="7" * 64, payload=b"", state="signed"))
            values = {"contract_id": "7" * 64, "phase": "running", "wanted": "run", "detail": "", "started": "x"}
            connection.execute(db.runs.insert().values(**values))
        want(federation, "pause")
        with federation.database.read() as connection:
            assert runs.run_row(connection, "7" * 64).wanted == "run"


class TestStatus:
    def test_it_tells_rounds_outcomes_and_times(self, federation: Federation, monkeypatch) -> None:
        monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)
        start(federation)
        federation.take_over("1")
        assert federation.run() == "completed"
        found = status(federation)
        assert (found.phase, found.round, found.round_phase, found.detail) == ("completed", 3, "committed", "")
        assert set(found.outcomes) == set(federation.contract.by_id())
        assert set(found.outcomes.values()) == {("admitted", "ADMITTED")}
        assert sorted(found.timings) == [1, 2, 3]
        assert {"orders", "admission", "aggregation", "contribution", "log"} <= found.timings[1].keys()
        plain = found.plain()
        assert plain["milliseconds"]["1"] == found.timings[1]
        assert plain["outcomes"][federation.contract.participants[0].id] == {"outcome": "admitted", "code": "ADMITTED"}

    def test_damaged_times_are_a_failure_that_is_named(self, federation: Federation) -> None:
        start(federation)
        values = {"round": 1, "phase": "sent", "base_digest": "0" * 64, "deadline": "x", "timings": b"\xff"}
        values |= {"contract_id": federation.contract.id, "opened_index": 1, "checkpoint_size": 2}
        with federation.database.write() as connection:
            connection.execute(db.rounds.insert().values(**values))
        fails("DATABASE_DAMAGED", status, federation)


@pytest.mark.parametrize("text", ["run-3f2a91", "3f2a91"])
def test_a_run_is_named_as_its_contract(text: str) -> None:
    assert runs.contract_selector(text) == "3f2a91"
