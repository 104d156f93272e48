"""An operator that does not close: the signed record, the alarm, what `status` says, and that it happens once."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from tests.support.agent_world import ENTITY, PASSPHRASE
from tests.support.closed_run import ClosedRun, closed_run

from fedpact_client import silence, views
from fedpact_client.answer import Desk
from fedpact_client.api import error_of
from fedpact_client.guard import Guard
from fedpact_client.home import init
from fedpact_client.text import show_status
from fedpact_contract.errors import FailedError, FaultError, FedpactError, InputError, ServiceError
from fedpact_contract.keys import public_hex, save_key
from fedpact_contract.messages import OperatorSilent, Receipt
from fedpact_contract.record import open_signed, read_envelope
from fedpact_contract.request import instant, parse_instant
from fedpact_contract.standalone import verify_record
from fedpact_contract.trust import Trust

DAY = datetime.timedelta(days=1)


@dataclasses.dataclass
class World:
    """The agent of `Enterprise 1` after a completed run, with a clock that the test sets."""

    run: ClosedRun
    guard: Guard
    now: datetime.datetime

    @property
    def desk(self) -> Desk:
        return self.run.federation.agent(1).desk

    @property
    def path(self) -> Path:
        return self.guard.home.silence_path(self.run.contract_id)

    @property
    def beside(self) -> Path:
        """The contract, for whoever verifies the record."""
        return self.path.with_name(f"{self.run.contract_id}.contract.json")

    @property
    def due(self) -> datetime.datetime:
        return parse_instant(self.desk.contract.term.not_after) + self.desk.contract.settlement.close_days * DAY

    def look(self) -> None:
        with self.run.client(1) as client:
            self.guard._look(client)

    def record(self) -> OperatorSilent:
        record: OperatorSilent = open_signed(
            read_envelope(self.path.read_bytes()), OperatorSilent, public_hex(self.desk.run_key)
        )
        return record

    def alarms(self) -> list[Any]:
        return [alarm for alarm in self.guard.store.alarms() if alarm.code == "OPERATOR_SILENT"]

    def status(self) -> dict[str, Any]:
        values = views.status(self.guard.home, self.guard.store, "not asked")
        found: dict[str, Any] = values["contracts"][0]["silence"]
        return found

    def shown(self, capsys: pytest.CaptureFixture[str]) -> str:
        show_status(views.status(self.guard.home, self.guard.store, "not asked"))
        return capsys.readouterr().out.replace("\n", " ")


@pytest.fixture
def world(tmp_path: Path) -> World:
    run = closed_run(tmp_path)
    desk = run.federation.agent(1).desk
    home = init(tmp_path / "agent", name="Enterprise 1", entity_code=ENTITY, sector="finance", passphrase=PASSPHRASE)
    (home.path / "keys" / "contract.pub").write_text(desk.contract.participant(desk.participant).key)
    save_key(home.run_key_path(run.contract_id), desk.run_key)
    made = World(run, Guard(home=home, config=home.config(), store=desk.store), desk.now())
    made.guard.now = lambda: made.now
    made.guard.desks[run.contract_id] = desk
    return made


def test_until_the_day_nothing_is_said(world: World) -> None:
    for moment in (parse_instant(world.desk.contract.term.not_after) + DAY, world.due):
        world.now = moment
        world.look()
    assert (world.path.exists(), world.alarms(), world.status()) == (False, [], None)


def test_afterwards_there_is_a_signed_record_and_an_alarm(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.now = world.due + DAY / 24
    world.look()
    record = world.record()
    assert (record.contract_id, record.participant) == (world.run.contract_id, world.desk.participant)
    assert (record.due, record.at, record.found) == (instant(world.due), instant(world.now), "open")
    (alarm,) = world.alarms()
    assert (alarm.contract_id, alarm.evidence) == (world.run.contract_id, world.path.read_bytes())
    assert str(world.path) in alarm.detail
    assert world.path.stat().st_mode & 0o777 == 0o600
    assert world.path.parent.stat().st_mode & 0o777 == 0o700
    assert world.status() == {
        "due": instant(world.due),
        "at": instant(world.now),
        "found": "open",
        "file": str(world.path),
        "contract_file": str(world.beside),
        "closed_since": False,
    }
    json.dumps(views.status(world.guard.home, world.guard.store, "x"))
    shown = world.shown(capsys)
    assert "the operator did not close it by" in shown
    assert "it has not closed it yet" in shown
    assert "ALARM" in shown


def test_anybody_can_verify_it(world: World) -> None:
    """By the two files alone: who complains, and what the operator itself had signed."""
    world.now = world.due + DAY
    world.look()
    contract, record = world.desk.contract, world.record()
    word = verify_record(world.path, world.beside, Trust.of(contract))
    assert (word.exit_code, word.faults, word.record) == (0, (), record.plain())
    assert record.head.size == world.desk.store.heads(contract.id)[-1].size > 0
    assert record.receipt is not None
    receipt = Receipt.from_bytes(record.receipt.body)
    assert receipt.update_digest == world.desk.store.sent_updates(contract.id)[receipt.round]
    assert world.beside.stat().st_mode & 0o777 == 0o600


def test_the_contract_comes_beside_a_record_of_before(world: World) -> None:
    world.now = world.due + DAY
    world.look()
    world.beside.unlink()
    world.look()
    assert verify_record(world.path, world.beside, None).exit_code == 3


def test_it_is_said_once(world: World) -> None:
    world.now = world.due + DAY
    world.look()
    first = world.path.read_bytes()
    world.now += 30 * DAY
    world.look()
    again = Guard(home=world.guard.home, config=world.guard.config, store=world.guard.store, now=lambda: world.now)
    world.guard = again
    world.look()
    assert (len(world.alarms()), world.path.read_bytes()) == (1, first)


def test_a_crash_before_the_file_was_written_loses_nothing(world: World) -> None:
    world.now = world.due + DAY
    world.look()
    first = world.path.read_bytes()
    world.path.unlink()
    world.now += DAY
    world.look()
    assert (len(world.alarms()), world.path.read_bytes()) == (1, first), "the same bytes"


def away() -> Any:
    raise ServiceError("OPERATOR_AWAY", "nobody answers")


def unknown() -> Any:
    raise error_of(404, b'{"error": {"code": "CONTRACT_UNKNOWN", "message": "never heard of it"}}')


def forbidden() -> Any:
    raise error_of(403, b'{"error": {"code": "NOT_A_PARTY", "message": "not yours"}}')


@pytest.mark.parametrize(("answer", "found"), [(away, "away"), (unknown, "open"), (forbidden, "open"), (dict, "open")])
def test_whatever_it_answers_but_a_closing(world: World, answer: Callable[[], Any], found: str) -> None:
    class Client:
        def get(self, _path: str, **_options: Any) -> Any:
            return answer()

    world.now = world.due + DAY
    world.guard._look(Client())  # type: ignore[arg-type]  # stands for the real one
    assert world.record().found == found


@pytest.mark.parametrize(
    "fault",
    [
        FailedError("STORE_FULL", "no space is left"),
        InputError("STORE_DAMAGED", "not a database"),
        FaultError("OUTBOX_DAMAGED", "other bytes"),
        InputError("KEY_MISSING", "no run key"),
    ],
    ids=lambda fault: fault.code,
)
def test_what_fails_here_says_nothing_of_the_operator(
    world: World, fault: FedpactError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator has closed; this agent's disk, store or keys failed before it could look."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise fault

    world.run.settle()
    world.now = world.due + DAY
    with monkeypatch.context() as patched, structlog.testing.capture_logs() as logged:
        patched.setattr(type(world.guard.store), "record_egress", fail)
        world.look()
    assert (world.alarms(), world.path.exists(), world.status()) == ([], False, None)
    assert [(each["log_level"], each["code"]) for each in logged if "code" in each] == [("error", fault.code)]
    world.look()
    assert (world.alarms(), world.path.exists()) == ([], False), "countersigned, once the fault is mended"


def test_a_closing_that_does_not_hold_is_none(world: World) -> None:
    world.run.settle()
    world.run.serve("/evidence", {})
    world.now = world.due + DAY
    world.look()
    assert world.record().found == "objected"


def test_an_operator_that_is_away_owes_every_contract(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked about the first one alone; the others are overdue all the same."""
    noted: list[tuple[str, str]] = []
    (agreement,) = world.guard.store.contracts()
    other = dataclasses.replace(agreement, contract_id="7" * 64)
    monkeypatch.setattr(type(world.guard.store), "contracts", lambda _self: [agreement, other])
    monkeypatch.setattr(silence, "note", lambda *a: bool(noted.append((a[2].contract_id, a[3]))))
    asked: list[str] = []

    class Client:
        def get(self, path: str, **_options: Any) -> Any:
            asked.append(path)
            return away()

    world.guard._look(Client())  # type: ignore[arg-type]  # stands for the real one
    assert noted == [(agreement.contract_id, "away"), (other.contract_id, "away")]
    assert len(asked) == 1


def test_a_closing_that_comes_in_time_is_no_silence(world: World) -> None:
    world.run.settle()
    world.look()
    world.now = world.due + DAY
    world.look()
    assert (world.alarms(), world.path.exists()) == ([], False), "countersigned; the others may be late"


def test_an_operator_that_closes_later(world: World, capsys: pytest.CaptureFixture[str], home_of: Any) -> None:
    world.now = world.due + DAY
    world.look()
    first = world.path.read_bytes()
    world.run.settle()
    world.look()
    for number in (2, 3, 4):
        with world.run.client(number) as client:
            home_of(number)._look(client)
    world.look()
    assert world.guard.store.contract(world.run.contract_id).state == "closed"
    assert (world.path.read_bytes(), len(world.alarms())) == (first, 1), "the record stays"
    assert world.status()["closed_since"]
    assert "it closed later" in world.shown(capsys)


@pytest.fixture
def home_of(world: World) -> Callable[[int], Guard]:
    def make(number: int) -> Guard:
        desk = world.run.federation.agent(number).desk
        made = Guard(home=world.guard.home, config=world.guard.config, store=desk.store)
        made.desks[world.run.contract_id] = desk
        return made

    return make


def test_a_contract_that_never_ran_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(world.guard.store), "answers", lambda _self, _contract: [])
    world.now = world.due + DAY
    world.look()
    assert (world.alarms(), world.path.exists()) == ([], False)


def test_a_withdrawn_contract_is_owed_its_close_too(world: World) -> None:
    world.guard.store.set_state(world.run.contract_id, "withdrawn")
    world.now = world.due + DAY
    world.look()
    assert world.record().found == "open"


def test_what_cannot_be_written_ends_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    world.now = world.due + DAY
    monkeypatch.setattr(silence, "replace_file", full)
    world.look()
    assert not world.path.exists()
    monkeypatch.undo()
    world.look()
    assert len(world.alarms()) == 1
    world.record()


def test_a_run_key_that_is_gone_ends_nothing(world: World) -> None:
    world.guard.home.run_key_path(world.run.contract_id).unlink()
    world.now = world.due + DAY
    world.look()
    assert world.alarms() == []
    (agreement,) = world.guard.store.contracts()
    with pytest.raises(FedpactError, match="KEY_MISSING"):
        silence.note(world.guard.home, world.guard.store, agreement, "open", world.now)


def test_a_contract_of_a_million_years_is_never_overdue(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (agreement,) = world.guard.store.contracts()
    contract = agreement.contract
    long = contract.model_copy(update={"settlement": contract.settlement.model_copy(update={"close_days": 2**31})})
    monkeypatch.setattr(type(agreement), "contract", property(lambda _self: long))
    silence.due.cache_clear()
    assert silence.due(agreement).year == 9999
    silence.due.cache_clear()
