"""API endpoints of the close and of the report (`api.create_api(routers=[router])`)."""

from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

from fedpact_contract import report as reports
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.messages import Objection
from fedpact_contract.record import open_signed, read_envelope
from fedpact_contract.request import API
from fedpact_server import closing, db, logbook
from fedpact_server.alarms import raise_alarm
from fedpact_server.api import Call, ReaderCall, signatory
from fedpact_server.report.html import render
from fedpact_server.report.labels import Lang
from fedpact_server.run_state import run_keys, run_row, signed_contract

router = APIRouter(prefix=API)


@router.get("/contracts/{contract_id}/closing")
def get_closing(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """Where the close stands: {"state": none | closing | closed, "size", "signed", "held"}."""
    contract = signatory(call, contract_id).contract
    with call.world.database.read() as connection:
        run = run_row(connection, contract.id)
        if run is None or run.phase not in ("closing", "closed"):
            return {"state": "none"}
        state = closing.closing_state(connection, contract)
    return {"state": str(run.phase), "size": state.size, "signed": list(state.signed), "held": list(state.held)}


@router.post("/contracts/{contract_id}/closing")
def post_closing(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """Take a countersignature on the closing checkpoint, or an objection to it."""
    contract, value = signatory(call, contract_id).contract, call.json()
    if set(value) == {"objection"}:
        _object(call, contract_id, value["objection"])
        return {"taken": "objection"}
    if set(value) != {"countersignature"}:
        raise InputError("BODY_FORM", "The body is {countersignature} or {objection}.")
    with call.world.database.write() as connection:
        keys = run_keys(signed_contract(connection, contract.id), contract)
        envelope = read_envelope(value["countersignature"])
        state = closing.countersign(connection, contract, {call.member.id: keys[call.member.id]}, envelope)
    return {"taken": "countersignature", "held": list(state.held)}


@router.get("/contracts/{contract_id}/report", response_model=None)
def get_report(
    contract_id: str,
    call: ReaderCall,
    form: Annotated[Literal["html", "json"], Query(alias="format")] = "html",
    lang: Lang = "en",
) -> Response:
    """The report of the contract's run: a pure function of its log."""
    contract = signatory(call, contract_id).contract
    with call.world.database.read() as connection:
        entries = logbook.read_entries(connection, contract.id)
    report = reports.build(entries)
    if form == "json":
        return JSONResponse(report)
    return HTMLResponse(render(report, lang))


def _object(call: Call, contract_id: str, value: Any) -> None:  # noqa: ANN401 - any JSON value
    if not isinstance(value, dict):
        raise InputError("BODY_FORM", "The objection is no signed record.", field="objection")
    envelope = read_envelope(value)
    with call.world.database.write() as connection:
        contract = signatory(call, contract_id).contract
        keys = run_keys(signed_contract(connection, contract_id), contract)
        record: Objection = open_signed(envelope, Objection, keys[call.member.id])
        if (record.contract_id, record.participant) != (contract_id, call.member.id):
            raise RefusedError("OBJECTION_PLACE", "The objection is for another contract or participant.")
        table = db.objections.c
        where = (table.contract_id == contract_id, table.participant == record.participant, table.size == record.size)
        if connection.execute(sa.select(table.size).where(*where)).first() is None:
            connection.execute(
                db.objections.insert().values(
                    contract_id=contract_id,
                    participant=record.participant,
                    size=record.size,
                    envelope=envelope.to_bytes(),
                )
            )
            detail = f"{call.member.name} objects to the closing of {contract_id[:16]}: {record.code}"
            raise_alarm(connection, "CLOSING_OBJECTED", detail, now=call.world.now())
