"""The operator's HTTP API for agents, under /fedpact/v1 on the one port.

A request is signed by the agent's node key (`fedpact_contract.request`); what it carries is signed by contract or run
keys and checked where it is used. Errors: 400 input, 401 not authenticated (REQUEST_…), 403 refused, 404, 409
conflicts with what is there, 413 too large, 429 too often, 503 something is away, 500 ours.

A suspended participant gets no orders and signs nothing new, but still reads its contracts, the log and the
evidence: what it earned stays provable. A frozen one only sees its own state.

Endpoints of other rooms come as routers (`create_api(routers=…)`) on the same dependencies: `AnyCall`, `ReaderCall`,
`ActiveCall`, `signatory`. Endpoints are plain functions, so that they run in threads: the database blocks.
"""

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from fedpact_contract.contract import contract_id_form
from fedpact_contract.errors import FedpactError, InputError, RefusedError
from fedpact_contract.messages import SignedEnrolment
from fedpact_contract.record import Envelope, read_envelope
from fedpact_contract.request import API, NODE_HEADER, PROBE, check_request, instant, utc_now
from fedpact_server import cards, contracts, enrolment, logbook
from fedpact_server.api_edge import Edge, Limits, RateLimiter, error_body, status_of
from fedpact_server.db import Database
from fedpact_server.enrolment import Member
from fedpact_server.evidence import evidence_files
from fedpact_server.home import OperatorHome

ACTIVE = ("approved", "registered")
READERS = (*ACTIVE, "suspended")
_VISIBLE = ("offered", "signed", "terminated")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What endpoints work with."""

    home: OperatorHome
    database: Database
    now: Callable[[], datetime.datetime]
    nodes: RateLimiter


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One authenticated request: who asks, and the body's bytes."""

    world: World
    member: Member
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            InputError: BODY_FORM.
        """
        return _json(self.body)


async def read_body(request: Request) -> bytes:
    """The body's bytes (dependency)."""
    return await request.body()


Body = Annotated[bytes, Depends(read_body)]


def world_of(request: Request) -> World:
    """The application's world (dependency)."""
    world: World = request.app.state.world
    return world


def _caller(request: Request, body: Body) -> Call:
    """Authenticate: the node key of an enrolled participant signed exactly this request, within five minutes."""
    world = world_of(request)
    node = request.headers.get(NODE_HEADER, "")
    with world.database.read() as connection:
        found = enrolment.by_node(connection, node)
    if found is None:
        raise RefusedError(
            "REQUEST_UNKNOWN_NODE",
            "No participant has enrolled with this node key.",
            remedy="Run `fedpact-agent enrol INVITATION`.",
        )
    member, pem = found
    query = request.scope["query_string"].decode("latin-1")
    path = (request.scope.get("raw_path") or request.scope["path"].encode()).decode("latin-1")
    target = f"{path}?{query}" if query else path
    check_request(pem, request.headers, request.method, target, body, world.now())
    world.nodes.take(member.node)
    return Call(world=world, member=member, body=body)


AnyCall = Annotated[Call, Depends(_caller)]
"""A request of any enrolled participant, whatever its state."""


def _reader(call: AnyCall) -> Call:
    return _in_state(call, READERS)


def _active(call: AnyCall) -> Call:
    return _in_state(call, ACTIVE)


ReaderCall = Annotated[Call, Depends(_reader)]
"""A request of a participant that was approved, also of a suspended one."""

ActiveCall = Annotated[Call, Depends(_active)]
"""A request of an approved participant that is neither suspended nor frozen."""


def signatory(call: Call, contract_id: str) -> contracts.Stored:
    """The contract, if the caller is a participant of it and it was offered.

    Raises:
        InputError: CONTRACT_ID_FORM, CONTRACT_UNKNOWN (also for other people's contracts and drafts).
    """
    contract_id_form(contract_id)
    with call.world.database.read() as connection:
        stored = contracts.find(connection, contract_id)
    if stored.state not in _VISIBLE or call.member.id not in stored.contract.by_id():
        raise InputError(
            "CONTRACT_UNKNOWN",
            "There is no contract with this id.",
            field="contract_id",
            remedy="Ask the operator for the id of a contract that it offers you.",
        )
    return stored


router = APIRouter(prefix=API)


@router.get("/operator")
def get_operator(request: Request) -> dict[str, Any]:
    """Who answers here; unsigned, for everybody."""
    return world_of(request).home.party.plain()


@router.post("/enrol")
def post_enrol(request: Request, body: Body) -> dict[str, Any]:
    """Take a request to join: {"token": hex, "request": SignedEnrolment}; unsigned, for whoever has a token."""
    world, value = world_of(request), _json(body)
    token = value.get("token")
    if set(value) != {"token", "request"} or not isinstance(token, str):
        raise InputError("BODY_FORM", "The body is {token, request}.", field="token")
    signed = SignedEnrolment.parse(value["request"], code="ENROLMENT_FORM")
    member = enrolment.enrol(world.home, world.database, token=token, signed=signed, now=world.now())
    return _own(member)


@router.post(PROBE.removeprefix(API))
def post_probe(request: Request, call: AnyCall) -> dict[str, Any]:
    """How many bytes of the body came through; the edge threw them away. For `fedpact-agent preflight`."""
    return {"bytes": request.scope["fedpact.bytes"], "now": instant(call.world.now())}


@router.get("/enrolment")
def get_enrolment(call: AnyCall) -> dict[str, Any]:
    """The caller's own state: requested, approved, registered, suspended, frozen."""
    return _own(call.member)


@router.post("/cards")
def post_card(call: ActiveCall) -> dict[str, Any]:
    """Keep a card: {"card": envelope, "released": [rows] or null}."""
    value = call.json()
    released = value.get("released")
    if not {"card"} <= set(value) <= {"card", "released"} or not (released is None or isinstance(released, list)):
        raise InputError("BODY_FORM", "The body is {card, released}.", field="released")
    envelope = _envelope(value, "card")
    with call.world.database.write() as connection:
        card = cards.accept_card(connection, call.member, envelope, released or [], now=call.world.now())
    return {"data_set": card.data_set, "released": card.released_rows}


@router.get("/contracts")
def get_contracts(call: ReaderCall) -> dict[str, Any]:
    """The contracts that name the caller: id, title, state, who has signed."""
    with call.world.database.read() as connection:
        found = [
            contracts.status(connection, stored).plain()
            for stored in contracts.every(connection)
            if stored.state in _VISIBLE and call.member.id in stored.contract.by_id()
        ]
    return {"contracts": found}


@router.get("/contracts/{contract_id}")
def get_contract(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """A contract's canonical text, its state, and the signatures and delegations so far."""
    stored = signatory(call, contract_id)
    with call.world.database.read() as connection:
        signed = contracts.envelopes(connection, stored)
    unsigned = contracts.unsigned(stored)
    return {
        "payload": stored.payload.decode(),
        "state": stored.state,
        "contract": (unsigned if signed is None else signed.contract).plain(),
        "delegations": [] if signed is None else [d.plain() for d in signed.delegations],
    }


@router.post("/contracts/{contract_id}/signature")
def post_signature(contract_id: str, call: ActiveCall) -> dict[str, Any]:
    """Take the caller's signature and delegation: {"contract": envelope, "delegation": envelope}."""
    stored, value = signatory(call, contract_id), call.json()
    if set(value) != {"contract", "delegation"}:
        raise InputError("BODY_FORM", "The body is {contract, delegation}.")
    status = contracts.accept_signature(
        call.world.home,
        call.world.database,
        stored.contract.id,
        call.member.id,
        envelope=_envelope(value, "contract"),
        delegation=_envelope(value, "delegation"),
        now=call.world.now(),
    )
    return status.plain()


@router.get("/contracts/{contract_id}/head")
def get_head(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """The log's latest signed checkpoint, an envelope."""
    stored = _logged(call, contract_id)
    with call.world.database.read() as connection:
        heads = logbook.signed_checkpoints(connection, stored.contract.id)
    return heads[max(heads)].plain()


@router.get("/contracts/{contract_id}/evidence")
def get_evidence(contract_id: str, call: ReaderCall) -> dict[str, str]:
    """The evidence: file name -> text."""
    stored = _logged(call, contract_id)
    with call.world.database.read() as connection:
        return evidence_files(connection, stored.contract.id)


def create_api(
    home: OperatorHome,
    database: Database,
    *,
    routers: Sequence[APIRouter] = (),
    limits: Limits | None = None,
    now: Callable[[], datetime.datetime] = utc_now,
) -> FastAPI:
    """The application.

    Args:
        home: The operator's home.
        database: Its database.
        routers: Further endpoints, with the whole path in their prefix (`API`).
        limits: Size and rate limits.
        now: The clock.
    """
    limits = limits or Limits()
    app = FastAPI(title="Fedpact", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.world = World(home=home, database=database, now=now, nodes=RateLimiter(*limits.node))
    for part in (router, *routers):
        app.include_router(part)
    app.add_middleware(Edge, limits=limits, prefix=API)
    app.add_exception_handler(FedpactError, _fedpact_error)
    app.add_exception_handler(HTTPException, _http_error)
    return app


def _logged(call: Call, contract_id: str) -> contracts.Stored:
    stored = signatory(call, contract_id)
    with call.world.database.read() as connection:
        if not logbook.size(connection, stored.contract.id):
            raise InputError(
                "CONTRACT_NOT_SIGNED",
                "The contract is not signed by everybody yet: it has no log.",
                remedy="`fedpact-agent contract` shows whose signature is missing.",
            )
    return stored


def _in_state(call: Call, states: Sequence[str]) -> Call:
    if call.member.state not in states:
        raise RefusedError(
            f"PARTICIPANT_{call.member.state.upper()}",
            f"This participant's enrolment is in the state {call.member.state}.",
            party=call.member.name,
            remedy="Ask the operator.",
        )
    return call


def _own(member: Member) -> dict[str, Any]:
    return {
        "participant": member.id,
        "name": member.name,
        "entity_code": member.entity_code,
        "sector": member.sector,
        "node": member.node,
        "state": member.state,
    }


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as err:
        raise InputError("BODY_FORM", "The body is not JSON.") from err
    if not isinstance(value, dict):
        raise InputError("BODY_FORM", "The body is not a JSON object.")
    return value


def _envelope(value: dict[str, Any], key: str) -> Envelope[Any]:
    if not isinstance(value[key], dict):
        raise InputError("BODY_FORM", f"{key} is no signed record.", field=key)
    return read_envelope(value[key])


async def _fedpact_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, FedpactError)  # noqa: S101 - registered for it alone
    return Response(error_body(error), status_code=status_of(error), media_type="application/json")


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
    code, message = ("NOT_FOUND", "There is nothing here.")
    if error.status_code == 405:
        code, message = ("METHOD_NOT_ALLOWED", "This address does not take this method.")
    shown = InputError(code, message)
    return JSONResponse({"error": shown.as_dict()}, status_code=status_of(shown))
