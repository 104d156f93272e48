"""API endpoints of the close and of the report (`api.create_api(routers=[router])`)."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

from fedpact_contract import report as reports
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.messages import Objection
from fedpact_contract.parties import opened
from fedpact_contract.record import Envelope, read_envelope
from fedpact_contract.request import API
from fedpact_server import closing, db, defences, leaving, logbook
from fedpact_server.alarms import raise_alarm
from fedpact_server.api import Call, ReaderCall, signatory
from fedpact_server.report.html import render
from fedpact_server.run_state import run_row, signed_contract

router = APIRouter(prefix=API)


@router.get("/contracts/{contract_id}/closing")
def get_closing(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """Where the close stands: {"state": none | closing | closed, "size", "signed", "held", "objected"}.

    Before it: {"state": none, "questions"}, the entries that wait for the caller's answer, by their leaf hashes.
    """
    contract = signatory(call, contract_id).contract
    with call.world.database.read() as connection:
        run = run_row(connection, contract.id)
        if run is None or run.phase not in ("closing", "closed"):
            waiting = defences.standing(connection, contract).waiting(call.member.id)
            return {"state": "none", "questions": waiting}
        state = closing.closing_state(connection, contract)
        objected = closing.objections(connection, contract.id)
    return {
        "state": str(run.phase),
        "size": state.size,
        "signed": list(state.signed),
        "held": list(state.held),
        "objected": list(objected),
    }


@router.post("/contracts/{contract_id}/closing")
def post_closing(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """Take a countersignature on the closing checkpoint, or an objection to it."""
    contract, value = signatory(call, contract_id).contract, call.json()
    kind = next(iter(value), "")
    if set(value) not in ({"countersignature"}, {"objection"}) or not isinstance(value[kind], dict):
        raise InputError("BODY_FORM", "The body is {countersignature} or {objection}, a signed record.")
    envelope = read_envelope(value[kind])
    if kind == "objection":
        _object(call, contract, envelope)
        return {"taken": "objection"}
    with call.world.database.write() as connection:
        key = leaving.signing_key(connection, contract, call.member.id)
        state = closing.countersign(connection, contract, {call.member.id: key}, envelope)
    return {"taken": "countersignature", "held": list(state.held)}


@router.get("/contracts/{contract_id}/report", response_model=None)
def get_report(
    contract_id: str, call: ReaderCall, form: Annotated[str, Query(alias="format")] = "html", lang: str = "en"
) -> Response:
    """The report of the contract's run: a pure function of its log, as far as that is signed."""
    contract = signatory(call, contract_id).contract
    if form not in ("html", "json") or lang not in ("en", "zh"):
        raise InputError("REPORT_FORMAT", "A report is html or json, in en or zh.", field="format")
    with call.world.database.read() as connection:
        signed_contract(connection, contract.id)
        entries = logbook.signed_entries(connection, contract.id)
    report = reports.build(entries)
    if form == "json":
        return JSONResponse(report)
    return HTMLResponse(render(report, "zh" if lang == "zh" else "en"))


def _object(call: Call, contract: Contract, envelope: Envelope[Objection]) -> None:
    """Keep an objection, and raise an alarm; the same one again changes nothing.

    Raises:
        InputError: the period is not being closed.
        FaultError: not signed by the caller's run key.
        RefusedError: for another contract or participant.
    """
    with call.world.database.write() as connection:
        closing.closing_state(connection, contract)
        record: Objection = opened(envelope, Objection, leaving.signing_key(connection, contract, call.member.id))
        if (record.contract_id, record.participant) != (contract.id, call.member.id):
            raise RefusedError("OBJECTION_PLACE", "The objection is for another contract or participant.")
        place = {"contract_id": contract.id, "participant": record.participant, "size": record.size}
        table = db.objections.c
        where = [table[name] == value for name, value in place.items()]
        if connection.execute(sa.select(table.size).where(*where)).first() is None:
            connection.execute(db.objections.insert().values(**place, envelope=envelope.to_bytes()))
            detail = f"{call.member.name} objects to the closing of {contract.id[:16]}: {record.code}"
            raise_alarm(connection, "CLOSING_OBJECTED", detail, now=call.world.now())
