"""The API's endpoints of the close and of the report: whose word is taken, in what form, and what is answered."""

import json
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from httpx import Response
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.federation import make_federation

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.keys import generate_key
from fedpact_contract.log import Checkpoint, Countersignature
from fedpact_contract.messages import Objection
from fedpact_contract.record import sign
from fedpact_contract.report import build
from fedpact_contract.request import API, sign_request, utc_now
from fedpact_server import db, logbook
from fedpact_server.alarms import latest
from fedpact_server.api import create_api
from fedpact_server.api_closing import router
from fedpact_server.api_edge import Limits

FREE = Limits(address=(10**6, 1e6), node=(10**6, 1e6), enrol=(10**6, 1e6))


class World:
    """The API of a run, and its participants as callers."""

    def __init__(self, run: ClosedRun) -> None:
        from fedpact_server.home import OperatorHome

        self.run = run
        home = OperatorHome.open(run.home)
        self.app = TestClient(create_api(home, run.federation.database, routers=[router], limits=FREE))

    def ask(self, number: int, method: str, path: str, body: Any = None) -> Response:
        participant = self.run.federation.agent(number).desk.participant
        data = b"" if body is None else body if isinstance(body, bytes) else canonical_bytes(body)
        target = f"{API}/contracts/{self.run.contract_id}{path}"
        headers = sign_request(self.run.node_keys[participant], method, target, data, utc_now())
        return self.app.request(method, target, content=data, headers=headers)

    def head(self) -> Checkpoint:
        with self.run.federation.database.read() as connection:
            hashes = logbook.leaves(connection, self.run.contract_id)
        return Checkpoint(origin=self.run.contract_id, size=len(hashes), root=logbook.root_of(hashes))

    def word(self, number: int, key: Any = None, **changes: Any) -> dict[str, Any]:
        desk = self.run.federation.agent(number).desk
        values = self.head().model_dump() | {"participant": desk.participant} | changes
        return {"countersignature": sign(Countersignature(**values), key or desk.run_key).plain()}

    def no(self, number: int, key: Any = None, **changes: Any) -> dict[str, Any]:
        desk = self.run.federation.agent(number).desk
        head = self.head()
        values = {
            "contract_id": self.run.contract_id,
            "size": head.size,
            "root": head.root,
            "participant": desk.participant,
            "code": "SETTLEMENT_FEN",
        }
        return {"objection": sign(Objection(**(values | changes)), key or desk.run_key).plain()}

    def objections(self) -> int:
        with self.run.federation.database.read() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(db.objections)).scalar_one())

    def alarms(self) -> list[str]:
        with self.run.federation.database.read() as connection:
            return [alarm["code"] for alarm in latest(connection)]


def code(response: Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.fixture
def completed(tmp_path) -> World:
    return World(closed_run(tmp_path))


@pytest.fixture
def world(completed: World) -> World:
    completed.run.settle()
    return completed


class TestState:
    def test_before_the_close(self, completed: World) -> None:
        assert completed.ask(1, "GET", "/closing").json() == {"state": "none", "questions": []}
        with completed.run.federation.database.write() as connection:
            connection.execute(db.runs.delete())
        never_started = completed.ask(1, "GET", "/closing").json()
        assert never_started == {"state": "none", "questions": []}

    def test_it_names_who_signed_who_is_waited_for_and_who_objected(self, world: World) -> None:
        ids = {n: world.run.federation.agent(n).desk.participant for n in (1, 2, 3, 4)}
        state = world.ask(1, "GET", "/closing").json()
        assert state == {
            "state": "closing",
            "size": world.head().size,
            "signed": [],
            "held": sorted(ids.values()),
            "objected": [],
        }
        assert world.ask(2, "POST", "/closing", world.word(2)).json()["held"] == sorted(set(ids.values()) - {ids[2]})
        assert world.ask(3, "POST", "/closing", world.no(3)).json() == {"taken": "objection"}
        state = world.ask(4, "GET", "/closing").json()
        assert (state["signed"], state["objected"]) == ([ids[2]], [ids[3]])
        for number in (1, 3, 4):
            world.ask(number, "POST", "/closing", world.word(number))
        state = world.ask(4, "GET", "/closing").json()
        assert (state["state"], state["held"]) == ("closed", [])

    def test_strangers_are_told_nothing(self, world: World) -> None:
        target = f"{API}/contracts/{world.run.contract_id}/closing"
        assert world.app.get(target).status_code == 401
        assert world.app.post(target, content=b"{}").status_code == 401
        with world.run.federation.database.write() as connection:
            connection.execute(db.contracts.update().values(state="draft"))
        assert code(world.ask(1, "GET", "/closing")) == (404, "CONTRACT_UNKNOWN")
        assert code(world.ask(1, "GET", "/report")) == (404, "CONTRACT_UNKNOWN")

    def test_a_suspended_participant_still_closes(self, world: World) -> None:
        who = world.run.federation.agent(1).desk.participant
        with world.run.federation.database.write() as connection:
            connection.execute(db.participants.update().where(db.participants.c.id == who).values(state="suspended"))
        assert world.ask(1, "POST", "/closing", world.word(1)).status_code == 200
        assert world.ask(1, "GET", "/report?format=json").status_code == 200
        with world.run.federation.database.write() as connection:
            connection.execute(db.participants.update().where(db.participants.c.id == who).values(state="frozen"))
        assert code(world.ask(1, "GET", "/closing")) == (403, "PARTICIPANT_FROZEN")


FORMS = {
    "empty": b"",
    "no JSON": b"{",
    "a list": [],
    "nothing": {},
    "another key": {"signature": {}},
    "both": {"countersignature": {}, "objection": {}},
    "text": {"countersignature": "x"},
    "a number": {"countersignature": 7},
    "a list inside": {"objection": []},
    "null": {"objection": None},
    "deep": b'{"objection":' * 3000,
}


class TestTaken:
    @pytest.mark.parametrize("name", FORMS)
    def test_a_body_of_another_form_is_bad_input(self, world: World, name: str) -> None:
        assert code(world.ask(1, "POST", "/closing", FORMS[name])) == (400, "BODY_FORM")

    def test_a_record_of_another_form_is_bad_input(self, world: World) -> None:
        for kind in ("countersignature", "objection"):
            response = world.ask(1, "POST", "/closing", {kind: {"type": "x"}})
            assert (response.status_code, response.json()["error"]["code"]) == (400, "ENVELOPE_FORM_MISSING_KEY")
        swapped = {"objection": world.word(1)["countersignature"]}
        assert world.ask(1, "POST", "/closing", swapped).status_code == 400
        assert world.objections() == 0

    def test_a_countersignature_counts_only_in_ones_own_name(self, world: World) -> None:
        assert code(world.ask(1, "POST", "/closing", world.word(2))) == (403, "CLOSING_PARTY")
        assert code(world.ask(1, "POST", "/closing", world.word(1, root="0" * 64))) == (403, "CLOSING_HEAD")
        assert code(world.ask(1, "POST", "/closing", world.word(1, key=generate_key()))) == (400, "SIGNATURE_MISSING")
        assert world.run.state().signed == ()

    def test_an_objection_is_recorded_and_alarmed_once(self, world: World) -> None:
        for _ in range(3):
            assert world.ask(1, "POST", "/closing", world.no(1)).status_code == 200
        assert world.objections() == 1
        assert world.alarms() == ["CLOSING_OBJECTED"]
        with world.run.federation.database.read() as connection:
            (alarm,) = latest(connection)
        assert "Enterprise 1" in alarm["detail"]
        assert "SETTLEMENT_FEN" in alarm["detail"]
        assert world.ask(1, "POST", "/closing", world.no(1, size=3)).status_code == 200, "to another head: another one"
        assert (world.objections(), len(world.alarms())) == (2, 2)
        assert len(world.run.state().held) == 4, "an objection is no countersignature"

    def test_nobody_objects_in_anothers_name(self, world: World) -> None:
        other = world.run.federation.agent(2).desk
        assert code(world.ask(1, "POST", "/closing", world.no(2))) == (400, "SIGNATURE_MISSING")
        assert code(world.ask(1, "POST", "/closing", world.no(1, participant=other.participant))) == (
            403,
            "OBJECTION_PLACE",
        )
        assert code(world.ask(1, "POST", "/closing", world.no(1, contract_id="0" * 64))) == (403, "OBJECTION_PLACE")
        assert (world.objections(), world.alarms()) == (0, [])

    def test_before_the_close_nothing_is_taken(self, completed: World) -> None:
        assert code(completed.ask(1, "POST", "/closing", completed.no(1))) == (400, "CLOSING_NOT_OPEN")
        assert code(completed.ask(1, "POST", "/closing", completed.word(1))) == (400, "CLOSING_NOT_OPEN")
        assert completed.objections() == 0


class TestReport:
    def test_it_is_the_report_of_the_log(self, world: World) -> None:
        response = world.ask(1, "GET", "/report?format=json")
        assert response.json() == json.loads(json.dumps(build(world.run.federation.entries())))

    def test_as_a_page_in_two_languages(self, world: World) -> None:
        for query, lang in (("", "en"), ("?lang=zh", "zh-CN"), ("?format=html&lang=en", "en")):
            response = world.ask(1, "GET", f"/report{query}")
            assert response.headers["content-type"].startswith("text/html")
            assert f'<html lang="{lang}">' in response.text

    @pytest.mark.parametrize("query", ["?format=pdf", "?lang=fr", "?format=", "?format=json&lang=%3Cscript%3E"])
    def test_another_form_is_bad_input(self, world: World, query: str) -> None:
        assert code(world.ask(1, "GET", f"/report{query}")) == (400, "REPORT_FORMAT")

    def test_it_ends_where_the_operators_word_ends(self, completed: World) -> None:
        """Evidence and report of a running round hold what is under a checkpoint: an agent can verify both."""
        with completed.run.federation.database.write() as connection:
            sizes = sorted(logbook.signed_checkpoints(connection, completed.run.contract_id))
            last = db.checkpoints.c.size == sizes[-1]
            connection.execute(db.checkpoints.delete().where(last))
        assert completed.run.verified().faults == ()
        report = completed.ask(1, "GET", "/report?format=json").json()
        assert (report["state"], report["entries"]) == ("running", sizes[-2])

    def test_a_contract_that_is_not_signed_has_none(self, tmp_path) -> None:
        world = World(closed_run(tmp_path))
        with world.run.federation.database.write() as connection:
            for table in (db.runs, db.orders, db.rounds, db.outcomes, db.entries, db.checkpoints, db.countersignatures):
                connection.execute(table.delete())
        assert code(world.ask(1, "GET", "/report")) == (409, "CONTRACT_NOT_SIGNED")
        assert code(world.ask(1, "GET", "/evidence")) == (409, "CONTRACT_NOT_SIGNED")


def test_the_evidence_of_a_round_that_runs_has_no_fault(tmp_path, monkeypatch) -> None:
    """Replies are logged as they come; until the round's checkpoint they are nobody's word."""
    from fedpact_contract.evidence import unpack
    from fedpact_contract.verify import verify
    from fedpact_server.evidence import evidence_files

    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)
    federation = make_federation(tmp_path, training__rounds=1)
    seen: list[tuple[int, tuple[Any, ...]]] = []
    late = federation.contract.participants[0].id

    def before(node: str, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        if federation.transport.agents[node].desk.participant != late:
            return order, model
        with federation.database.read() as connection:
            logged = logbook.size(connection, federation.contract.id)
            files = evidence_files(connection, federation.contract.id)
        report = verify(unpack({name: text.encode() for name, text in files.items()}), None, privacy=False)
        seen.append((logged - report.entries, report.faults))
        return (order, model) if len(seen) > 1 else None

    federation.transport.before = before
    assert federation.run() == "completed"
    assert [faults for _, faults in seen] == [(), ()]
    assert seen[1][0] == 3, "three replies were logged when the fourth was asked for again"
