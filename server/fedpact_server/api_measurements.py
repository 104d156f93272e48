"""API endpoints of what participants release outside the rounds (`api.create_api(routers=[router])`)."""

import base64
from typing import Any

from fastapi import APIRouter

from fedpact_contract.request import API
from fedpact_server import leaving, measurements
from fedpact_server.api import ActiveCall, ReaderCall, signatory
from fedpact_server.run_state import load_model, run_keys, signed_contract

router = APIRouter(prefix=API)


@router.get("/contracts/{contract_id}/measurements")
def get_measurements(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """Which kinds the log has of the caller: {"taken": [statistics, baseline]}."""
    contract = signatory(call, contract_id).contract
    with call.world.database.read() as connection:
        signed_contract(connection, contract.id)
        found = measurements.taken(connection, contract.id)
    return {"taken": sorted(kind for participant, kind in found if participant == call.member.id)}


@router.post("/contracts/{contract_id}/measurements")
def post_measurement(contract_id: str, call: ActiveCall) -> dict[str, Any]:
    """Take a measurement: {"measurement": envelope, "array": base64 of little-endian float32}."""
    contract, value = signatory(call, contract_id).contract, call.json()
    with call.world.database.write() as connection:
        keys = run_keys(signed_contract(connection, contract.id), contract)
        leaving.check_not_gone(connection, contract, call.member.id)
        kind = measurements.take(call.world.home, connection, contract, call.member.id, keys[call.member.id], value)
    return {"taken": kind}


@router.get("/contracts/{contract_id}/initial-model")
def get_initial_model(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """The contract's initial model: {"model": base64 of little-endian float64}."""
    contract = signatory(call, contract_id).contract
    model = load_model(call.world.home.path, contract.model.initial_digest)
    return {"model": base64.b64encode(model.astype("<f8").tobytes()).decode()}
