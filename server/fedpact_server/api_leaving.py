"""API endpoints of a participant that leaves for a while or for good (`api.create_api(routers=[router])`)."""

from typing import Any

from fastapi import APIRouter

from fedpact_contract.errors import InputError
from fedpact_contract.leaving import Standing
from fedpact_contract.record import read_envelope
from fedpact_contract.request import API
from fedpact_server import leaving
from fedpact_server.api import ReaderCall, signatory

router = APIRouter(prefix=API)


@router.get("/contracts/{contract_id}/standing")
def get_standing(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """What the log has of the caller: its last notice, the signed receipts, and the models that its updates are in."""
    contract = signatory(call, contract_id).contract
    with call.world.database.read() as connection:
        found = leaving.standing(connection, contract.id).get(call.member.id, Standing())
        models = leaving.models_with(connection, contract.id, call.member.id)
        receipts = leaving.receipts(connection, contract.id, call.member.id)
    return found.plain() | {"models": [model.plain() for model in models], "receipts": receipts}


@router.post("/contracts/{contract_id}/standing")
def post_standing(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """Log {"notice": envelope}, {"revocation": envelope} or {"receipt": envelope}: {"index": of its entry}."""
    contract, value = signatory(call, contract_id).contract, call.json()
    kind = next(iter(value), "")
    if set(value) not in ({"notice"}, {"revocation"}, {"receipt"}) or not isinstance(value[kind], dict):
        raise InputError("BODY_FORM", "The body is {notice}, {revocation} or {receipt}, a signed record.")
    envelope, member, home = read_envelope(value[kind]), call.member.id, call.world.home
    with call.world.database.write() as connection:
        key = home.run_key(contract.id)
        if kind == "notice":
            arrays = home.path / "arrays" / contract.id
            return {"index": leaving.take_notice(connection, contract, key, member, envelope, arrays)}
        if kind == "revocation":
            return {"index": leaving.take_revocation(connection, contract, key, member, envelope)}
        return {"index": leaving.take_receipt(connection, contract, key, member, envelope)}
