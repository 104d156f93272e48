"""The operator's API: who gets in, what each state may do, limits, and errors without insides."""

import asyncio
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi import APIRouter
from fastapi.testclient import TestClient
from httpx import Response
from tests.support.operator_world import (
    NOW,
    PASSPHRASE,
    ROWS,
    TEMPLATE,
    Enterprise,
    Operator,
    body_of,
    enterprise,
    operator,
)

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, FaultError, InputError, RefusedError, RejectedError, ServiceError
from fedpact_contract.log import Checkpoint
from fedpact_contract.record import open_signed, read_envelope
from fedpact_contract.request import API
from fedpact_server import contracts, enrolment
from fedpact_server.api import ActiveCall, AnyCall, create_api
from fedpact_server.api_edge import Edge, Limits, RateLimiter, error_body, status_of
from fedpact_server.drafting import ValidationFile, new
from fedpact_server.evidence import evidence_files

ONE, TWO, THREE, FOUR, FIVE = (enterprise(n) for n in (1, 2, 3, 4, 5))
FREE = Limits(address=(10**6, 1e6), node=(10**6, 1e6), enrol=(10**6, 1e6))


@pytest.fixture
def world(tmp_path: Path) -> Operator:
    made = operator(tmp_path)
    made.admit(ONE, TWO, THREE)
    return made


@pytest.fixture
def client(world: Operator) -> TestClient:
    return client_of(world)


def client_of(world: Operator, **options: Any) -> TestClient:
    given = {"limits": FREE, "now": lambda: NOW} | options
    return TestClient(create_api(world.home, world.database, **given), raise_server_exceptions=True)


def ask(client: TestClient, who: Enterprise, method: str, path: str, body: dict[str, Any] | None = None) -> Response:
    data = b"" if body is None else body_of(body)
    headers = who.headers(method, API + path, data)
    return client.request(method, API + path, content=data, headers=headers)


def code(response: Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def contract_of(world: Operator, *signers: Enterprise, operator_too: bool = False) -> Contract:
    """An offered contract with these signatures."""
    path = world.home.path.parent / "rows.csv"
    path.write_text(ROWS)
    contract = new(world.home, world.database, TEMPLATE, ValidationFile(path=path), now=NOW)
    contracts.offer(world.database, contract.id, now=NOW)
    if operator_too:
        contracts.sign(world.home, world.database, contract.id, PASSPHRASE, now=NOW)
    for who in signers:
        envelope, delegation = who.signature(contract)
        contracts.accept_signature(
            world.home, world.database, contract.id, who.id, envelope=envelope, delegation=delegation, now=NOW
        )
    return contract


class TestAuthentication:
    def test_the_operator_is_told_to_everybody(self, world: Operator, client: TestClient) -> None:
        response = client.get(f"{API}/operator")
        assert response.status_code == 200
        assert response.json() == {
            "name": "City Data",
            "entity_code": world.home.settings.entity_code,
            "key": world.home.public_key,
        }

    def test_a_signed_request_is_answered(self, client: TestClient) -> None:
        response = ask(client, ONE, "GET", "/enrolment")
        assert response.status_code == 200
        assert (response.json()["state"], response.json()["participant"]) == ("approved", ONE.id)

    def test_without_a_signature_nothing_is_answered(self, client: TestClient) -> None:
        for method, path in (
            ("GET", "/enrolment"),
            ("GET", "/contracts"),
            ("POST", "/cards"),
            ("GET", f"/contracts/{'0' * 64}"),
            ("POST", f"/contracts/{'0' * 64}/signature"),
            ("GET", f"/contracts/{'0' * 64}/head"),
            ("GET", f"/contracts/{'0' * 64}/evidence"),
        ):
            assert code(client.request(method, API + path)) == (401, "REQUEST_UNKNOWN_NODE")

    def test_an_unknown_node_is_not_let_in(self, client: TestClient) -> None:
        assert code(ask(client, FOUR, "GET", "/enrolment")) == (401, "REQUEST_UNKNOWN_NODE")

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda h: h | {"fedpact-signature": ""},
            lambda h: h | {"fedpact-signature": "zz"},
            lambda h: h | {"fedpact-node": TWO.node},
            lambda h: h | {"fedpact-date": "2026-11-24T12:00:01Z"},
            lambda h: h | {"fedpact-date": "yesterday"},
            lambda h: {k: v for k, v in h.items() if k != "fedpact-date"},
        ],
    )
    def test_a_spoiled_signature_is_refused(self, client: TestClient, spoil: Callable[[dict[str, str]], Any]) -> None:
        headers = spoil(ONE.headers("GET", f"{API}/enrolment"))
        assert code(client.get(f"{API}/enrolment", headers=headers)) == (401, "REQUEST_SIGNATURE")

    def test_a_signature_is_for_one_method_path_query_and_body(self, client: TestClient) -> None:
        headers = ONE.headers("GET", f"{API}/enrolment")
        assert code(client.get(f"{API}/contracts", headers=headers)) == (401, "REQUEST_SIGNATURE")
        assert code(client.get(f"{API}/enrolment?a=1", headers=headers)) == (401, "REQUEST_SIGNATURE")
        with_query = ONE.headers("GET", f"{API}/enrolment?a=1&b=%C3%A4")
        assert client.get(f"{API}/enrolment?a=1&b=%C3%A4", headers=with_query).status_code == 200
        body = body_of({"card": ONE.card().plain(), "released": None})
        headers = ONE.headers("POST", f"{API}/cards", body)
        assert client.post(f"{API}/cards", content=body, headers=headers).status_code == 200
        other = client.post(f"{API}/cards", content=body + b" ", headers=headers)
        assert code(other) == (401, "REQUEST_SIGNATURE")

    def test_a_request_is_good_for_five_minutes(self, client: TestClient) -> None:
        for offset, status in ((300, 200), (-300, 200), (301, 401), (-301, 401)):
            moment = NOW + datetime.timedelta(seconds=offset)
            headers = ONE.headers("GET", f"{API}/enrolment", now=moment)
            assert client.get(f"{API}/enrolment", headers=headers).status_code == status

    def test_a_suspended_participant_reads_on_and_signs_nothing_new(self, world: Operator, client: TestClient) -> None:
        contract = contract_of(world, ONE, TWO, THREE, operator_too=True)
        enrolment.suspend(world.database, selector=ONE.id, now=NOW)
        assert ask(client, ONE, "GET", "/enrolment").json()["state"] == "suspended"
        for path in ("", f"/{contract.id}", f"/{contract.id}/head", f"/{contract.id}/evidence"):
            assert ask(client, ONE, "GET", f"/contracts{path}").status_code == 200
        card = {"card": ONE.card().plain(), "released": None}
        assert code(ask(client, ONE, "POST", "/cards", card)) == (403, "PARTICIPANT_SUSPENDED")
        envelope, delegation = ONE.signature(contract)
        body = {"contract": envelope.plain(), "delegation": delegation.plain()}
        path = f"/contracts/{contract.id}/signature"
        assert code(ask(client, ONE, "POST", path, body)) == (403, "PARTICIPANT_SUSPENDED")

    def test_one_that_is_not_approved_sees_its_own_state_alone(self, world: Operator, client: TestClient) -> None:
        world.enrol(FOUR)
        assert ask(client, FOUR, "GET", "/enrolment").json()["state"] == "requested"
        for method, path in (("GET", "/contracts"), ("POST", "/cards")):
            assert code(ask(client, FOUR, method, path)) == (403, "PARTICIPANT_REQUESTED")

    def test_a_frozen_one_sees_its_own_state_alone(self, world: Operator, client: TestClient) -> None:
        invitation = world.invite(FOUR)
        for who in (FOUR, FIVE):
            signed = who.request(invitation, entity_code=FOUR.entity_code)
            body = {"token": invitation.token, "request": signed.plain()}
            response = client.post(f"{API}/enrol", content=body_of(body))
        assert code(response) == (409, "ENROLMENT_TOKEN_REUSED")
        assert ask(client, FOUR, "GET", "/enrolment").json()["state"] == "frozen"
        assert code(ask(client, FOUR, "GET", "/contracts")) == (403, "PARTICIPANT_FROZEN")


class TestEnrol:
    def test_enrol_over_http(self, world: Operator, client: TestClient) -> None:
        invitation = world.invite(FOUR)
        body = body_of({"token": invitation.token, "request": FOUR.request(invitation).plain()})
        response = client.post(f"{API}/enrol", content=body)
        assert response.status_code == 200
        assert response.json() == client.post(f"{API}/enrol", content=body).json()
        assert (response.json()["participant"], response.json()["state"]) == (FOUR.id, "requested")

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            (b"", "BODY_FORM"),
            (b"{", "BODY_FORM"),
            (b"\xff", "BODY_FORM"),
            (b"[]", "BODY_FORM"),
            (b"[" * 100_000, "BODY_FORM"),
            (b"{}", "BODY_FORM"),
            (b'{"token": 1, "request": {}}', "BODY_FORM"),
            (b'{"token": "aa", "request": {}, "more": 1}', "BODY_FORM"),
            (b'{"token": "aa", "request": []}', "ENROLMENT_FORM"),
            (b'{"token": "aa", "request": {}}', "ENROLMENT_FORM_MISSING_KEY"),
        ],
    )
    def test_a_malformed_body_is_named(self, client: TestClient, body: bytes, expected: str) -> None:
        assert code(client.post(f"{API}/enrol", content=body)) == (400, expected)

    def test_refusals_carry_code_and_remedy_and_no_insides(self, world: Operator, client: TestClient) -> None:
        invitation = world.invite(FOUR)
        signed = FOUR.request(invitation).plain()
        unknown = client.post(f"{API}/enrol", content=body_of({"token": "0" * 64, "request": signed}))
        assert code(unknown) == (403, "ENROLMENT_TOKEN_UNKNOWN")
        assert set(unknown.json()["error"]) == {"code", "message", "remedy"}
        wrong = FOUR.request(invitation, entity_code=ONE.entity_code).plain()
        response = client.post(f"{API}/enrol", content=body_of({"token": invitation.token, "request": wrong}))
        assert code(response) == (403, "ENROLMENT_ENTITY")
        assert invitation.token not in response.text


class TestCards:
    def test_a_card_with_released_rows(self, client: TestClient) -> None:
        rows = [{"age": 30, "sex": "f", "ill": "no"}]
        body = {"card": ONE.card(released_rows=1).plain(), "released": rows}
        response = ask(client, ONE, "POST", "/cards", body)
        assert (response.status_code, response.json()) == (200, {"data_set": "set-1", "released": 1})

    def test_what_is_wrong_with_a_card_is_named(self, client: TestClient) -> None:
        card = ONE.card().plain()
        for body, expected in (
            ({}, (400, "BODY_FORM")),
            ({"card": card, "more": 1}, (400, "BODY_FORM")),
            ({"card": card, "released": "all"}, (400, "BODY_FORM")),
            ({"card": "text"}, (400, "BODY_FORM")),
            ({"card": {}}, (400, "ENVELOPE_FORM_MISSING_KEY")),
            ({"card": TWO.card().plain()}, (400, "SIGNATURE_MISSING")),
            ({"card": ONE.card(participant=TWO.id).plain()}, (400, "CARD_PARTICIPANT")),
            ({"card": ONE.card(epsilon=9).plain()}, (409, "CARD_BUDGET_CHANGED")),
            ({"card": ONE.card(released_rows=3).plain()}, (400, "RELEASE_COUNT")),
        ):
            assert code(ask(client, ONE, "POST", "/cards", body)) == expected


class TestContracts:
    def test_offer_sign_head_evidence(self, world: Operator, client: TestClient) -> None:
        contract = contract_of(world, TWO, THREE)
        (listed,) = ask(client, ONE, "GET", "/contracts").json()["contracts"]
        assert (listed["id"], listed["title"], listed["state"]) == (contract.id, "Heart disease", "offered")
        assert sorted(listed["signed"]) == sorted([TWO.id, THREE.id])
        shown = ask(client, ONE, "GET", f"/contracts/{contract.id}").json()
        assert Contract.from_bytes(shown["payload"].encode()) == contract
        assert read_envelope(shown["contract"]).body == contract.to_bytes()
        assert len(shown["contract"]["signatures"]) == len(shown["delegations"]) == 2
        for path in ("head", "evidence"):
            assert code(ask(client, ONE, "GET", f"/contracts/{contract.id}/{path}")) == (409, "CONTRACT_NOT_SIGNED")
        contracts.sign(world.home, world.database, contract.id, PASSPHRASE, now=NOW)
        envelope, delegation = ONE.signature(contract)
        body = {"contract": envelope.plain(), "delegation": delegation.plain()}
        response = ask(client, ONE, "POST", f"/contracts/{contract.id}/signature", body)
        assert (response.status_code, response.json()["state"], response.json()["missing"]) == (200, "signed", [])
        head = ask(client, ONE, "GET", f"/contracts/{contract.id}/head").json()
        key = world.home.run_key(contract.id).public_key().public_bytes_raw().hex()
        assert open_signed(read_envelope(head), Checkpoint, key).size == 1
        evidence = ask(client, ONE, "GET", f"/contracts/{contract.id}/evidence").json()
        with world.database.read() as connection:
            assert evidence == evidence_files(connection, contract.id)
        assert list(evidence) == ["log.jsonl", "leaves.txt", "checkpoints.jsonl", "countersignatures.jsonl"]
        assert evidence["log.jsonl"].count("\n") == 1

    def test_nobody_has_signed_yet(self, world: Operator, client: TestClient) -> None:
        contract = contract_of(world)
        shown = ask(client, ONE, "GET", f"/contracts/{contract.id}").json()
        assert (shown["contract"]["signatures"], shown["delegations"]) == ([], [])

    def test_drafts_and_other_peoples_contracts_do_not_exist(self, world: Operator, client: TestClient) -> None:
        contract = contract_of(world, ONE, TWO, THREE, operator_too=True)
        world.admit(FOUR)
        for path in ("", "/head", "/evidence"):
            assert code(ask(client, FOUR, "GET", f"/contracts/{contract.id}{path}")) == (404, "CONTRACT_UNKNOWN")
        body = {"contract": {}, "delegation": {}}
        response = ask(client, FOUR, "POST", f"/contracts/{contract.id}/signature", body)
        assert code(response) == (404, "CONTRACT_UNKNOWN")
        assert ask(client, FOUR, "GET", "/contracts").json() == {"contracts": []}
        path = world.home.path.parent / "rows.csv"
        draft = new(world.home, world.database, TEMPLATE, ValidationFile(path=path), now=NOW)
        assert code(ask(client, ONE, "GET", f"/contracts/{draft.id}")) == (404, "CONTRACT_UNKNOWN")
        assert len(ask(client, ONE, "GET", "/contracts").json()["contracts"]) == 1

    def test_an_id_must_be_whole(self, world: Operator, client: TestClient) -> None:
        contract = contract_of(world)
        for wrong in (contract.id[:10], contract.id.upper(), "0" * 63 + "g"):
            assert code(ask(client, ONE, "GET", f"/contracts/{wrong}")) == (400, "CONTRACT_ID_FORM")

    def test_a_signature_that_does_not_hold(self, world: Operator, client: TestClient) -> None:
        contract = contract_of(world)
        path = f"/contracts/{contract.id}/signature"
        envelope, delegation = TWO.signature(contract)
        for body, expected in (
            ({}, (400, "BODY_FORM")),
            ({"contract": envelope.plain(), "delegation": "x"}, (400, "BODY_FORM")),
            ({"contract": envelope.plain(), "delegation": delegation.plain()}, (400, "SIGNATURE_MISSING")),
        ):
            assert code(ask(client, ONE, "POST", path, body)) == expected
        body = {"contract": envelope.plain(), "delegation": delegation.plain()}
        assert ask(client, TWO, "POST", path, body).status_code == 200
        contracts.terminate(world.database, contract.id, now=NOW)
        assert code(ask(client, TWO, "POST", path, body)) == (409, "CONTRACT_STATE")


class TestLimits:
    def test_a_large_body_is_refused_unread(self, world: Operator) -> None:
        client = client_of(world, limits=Limits(body=1000))
        body = b"x" * 1001
        assert code(client.post(f"{API}/enrol", content=body)) == (413, "BODY_TOO_LARGE")
        chunks = (b"x" * 100 for _ in range(11))
        assert code(client.post(f"{API}/enrol", content=chunks)) == (413, "BODY_TOO_LARGE")
        assert code(client.post(f"{API}/enrol", content=b"x" * 1000)) == (400, "BODY_FORM")
        odd = client.post(f"{API}/enrol", content=b"x", headers={"content-length": "9" * 20})
        assert code(odd) == (413, "BODY_TOO_LARGE")

    def test_a_body_that_never_ends_is_given_up(self) -> None:
        sent: list[Any] = []

        async def app(*_: Any) -> None:
            raise AssertionError("the application saw half a request")

        async def receive() -> Any:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        edge = Edge(app, limits=Limits(seconds=0.1), prefix=API)
        asyncio.run(edge({"type": "http", "path": "/", "headers": [], "client": None}, receive, send))
        assert sent[0]["status"] == 408
        assert b"BODY_SLOW" in sent[1]["body"]

    def test_requests_to_join_are_few(self, world: Operator) -> None:
        client = client_of(world, limits=Limits(enrol=(2, 0.0)))
        codes = [code(client.post(f"{API}/enrol", content=b"{}")) for _ in range(3)]
        assert codes == [(400, "BODY_FORM"), (400, "BODY_FORM"), (429, "RATE_LIMITED")]
        assert client.get(f"{API}/operator").status_code == 200

    def test_a_probe_is_thrown_away_unread_and_has_limits_of_its_own(self, world: Operator) -> None:
        limits = Limits(body=1000, probe=(3, 0.0), probe_body=5000)
        client = client_of(world, limits=limits)
        path = f"{API}/probe"
        signed = ONE.headers("POST", path)  # over no body
        answer = client.post(path, content=b"x" * 5000, headers=signed)
        assert answer.json() == {"bytes": 5000, "now": "2026-11-24T12:00:00Z"}
        assert code(client.post(path, content=b"x" * 5001, headers=signed)) == (413, "BODY_TOO_LARGE")
        assert code(client.post(path, content=b"x")) == (401, "REQUEST_UNKNOWN_NODE")
        assert code(client.post(path, content=b"x", headers=signed)) == (429, "RATE_LIMITED")
        assert client.get(f"{API}/operator").status_code == 200, "the others go on"

    def test_a_probe_is_not_kept_in_memory(self) -> None:
        kept: list[Any] = []
        left = [b"x" * 1000] * 50

        async def app(_scope: Any, receive: Any, _send: Any) -> None:
            kept.append((await receive(), _scope["fedpact.bytes"]))

        async def receive() -> Any:
            return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

        edge = Edge(app, limits=Limits(), prefix=API)
        scope = {"type": "http", "path": f"{API}/probe", "headers": [], "client": None}
        asyncio.run(edge(scope, receive, app))
        assert kept == [({"type": "http.request", "body": b"", "more_body": False}, 50_000)]

    def test_one_address_has_a_limit(self, world: Operator) -> None:
        client = client_of(world, limits=Limits(address=(2, 0.0)))
        assert [client.get(f"{API}/operator").status_code for _ in range(3)] == [200, 200, 429]

    def test_one_node_has_a_limit_that_others_cannot_use_up(self, world: Operator) -> None:
        client = client_of(world, limits=Limits(address=(10**6, 1.0), node=(2, 0.0)))
        forged = ONE.headers("GET", f"{API}/enrolment") | {"fedpact-signature": "00"}
        for _ in range(5):
            assert client.get(f"{API}/enrolment", headers=forged).status_code == 401
        assert [ask(client, ONE, "GET", "/enrolment").status_code for _ in range(3)] == [200, 200, 429]
        assert ask(client, TWO, "GET", "/enrolment").status_code == 200

    def test_a_bucket_fills_again_and_forgets_old_keys(self) -> None:
        time = [0.0]
        limiter = RateLimiter(2, 0.5, clock=lambda: time[0], keys=2)
        limiter.take("a")
        limiter.take("a")
        with pytest.raises(RefusedError):
            limiter.take("a")
        time[0] = 2.0
        limiter.take("a")
        with pytest.raises(RefusedError):
            limiter.take("a")
        limiter.take("b")
        limiter.take("c")  # forgets a
        limiter.take("a")


class TestErrors:
    def test_statuses(self) -> None:
        for error, status in (
            (InputError("X", ""), 400),
            (FaultError("X", ""), 400),
            (RefusedError("X", ""), 403),
            (RejectedError("X", ""), 403),
            (RefusedError("REQUEST_DATE", ""), 401),
            (InputError("CONTRACT_UNKNOWN", ""), 404),
            (RefusedError("CONTRACT_STATE", ""), 409),
            (RefusedError("RATE_LIMITED", ""), 429),
            (ServiceError("X", ""), 503),
            (FailedError("X", ""), 500),
        ):
            assert status_of(error) == status

    def test_paths_of_this_machine_are_not_shown(self) -> None:
        error = InputError("X", "m", file="/home/operator/keys", field="f", remedy="r")
        assert json.loads(error_body(error)) == {"error": {"code": "X", "message": "m", "field": "f", "remedy": "r"}}

    def test_unknown_addresses_and_methods(self, client: TestClient) -> None:
        assert code(client.get(f"{API}/nothing")) == (404, "NOT_FOUND")
        assert code(client.get("/docs")) == (404, "NOT_FOUND")
        assert code(client.get("/openapi.json")) == (404, "NOT_FOUND")
        assert code(client.delete(f"{API}/operator")) == (405, "METHOD_NOT_ALLOWED")

    def test_what_nobody_foresaw_becomes_a_code_and_a_log_line(self, world: Operator) -> None:
        router = APIRouter(prefix=API)

        @router.get("/broken")
        def broken() -> None:
            raise ZeroDivisionError("secret detail")

        with structlog.testing.capture_logs() as lines:
            response = client_of(world, routers=[router]).get(f"{API}/broken")
        assert code(response) == (500, "INTERNAL")
        assert "secret" not in response.text
        (line,) = (entry for entry in lines if entry["event"] == "request failed")
        assert (line["error"], line["path"]) == ("ZeroDivisionError", f"{API}/broken")
        assert "secret" not in json.dumps(line)

    def test_a_failure_after_the_answer_began_is_not_answered_twice(self) -> None:
        sent: list[Any] = []

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ZeroDivisionError

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        edge = Edge(app, limits=FREE, prefix=API)
        asyncio.run(edge({"type": "http", "path": "/", "headers": [], "client": None}, receive, send))
        assert [m["type"] for m in sent] == ["http.response.start"]


def test_other_rooms_add_endpoints_behind_the_same_door(world: Operator) -> None:
    router = APIRouter(prefix=API)

    @router.get("/extra")
    def extra(call: ActiveCall) -> dict[str, str]:
        return {"who": call.member.id}

    @router.post("/any")
    def any_state(call: AnyCall) -> dict[str, Any]:
        return call.json()

    client = client_of(world, routers=[router])
    assert ask(client, ONE, "GET", "/extra").json() == {"who": ONE.id}
    assert ask(client, ONE, "POST", "/any", {"a": 1}).json() == {"a": 1}
    assert code(client.get(f"{API}/extra")) == (401, "REQUEST_UNKNOWN_NODE")
