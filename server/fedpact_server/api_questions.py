"""API endpoints of what asks participants (`api.create_api(routers=[router])`): shown, and answered by a person."""

from typing import Any

from fastapi import APIRouter

from fedpact_contract.errors import InputError
from fedpact_contract.record import read_envelope
from fedpact_contract.request import API
from fedpact_server import defences, logbook
from fedpact_server.api import ReaderCall, signatory
from fedpact_server.run_state import signed_contract

router = APIRouter(prefix=API)


@router.get("/contracts/{contract_id}/questions")
def get_questions(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """The entries that ask the caller: {"questions": [{"index", "entry", "answers": {participant: answer}}]}."""
    contract = signatory(call, contract_id).contract
    with call.world.database.read() as connection:
        asked = defences.standing(connection, contract).asked(call.member.id)
        return {
            "questions": [
                {
                    "index": question.place.index,
                    "entry": logbook.read_entry(connection, contract.id, question.place.index).plain(),
                    "answers": {p: record.answer for p, record in sorted(question.answers.items())},
                }
                for question in asked
            ]
        }


@router.post("/contracts/{contract_id}/questions")
def post_answer(contract_id: str, call: ReaderCall) -> dict[str, Any]:
    """Log the caller's answer: {"statement": envelope}, signed with its contract key."""
    contract, value = signatory(call, contract_id).contract, call.json()
    if set(value) != {"statement"} or not isinstance(value["statement"], dict):
        raise InputError("BODY_FORM", "The body is {statement}, a signed record.", field="statement")
    envelope = read_envelope(value["statement"])
    with call.world.database.write() as connection:
        signed_contract(connection, contract.id)
        key = call.world.home.run_key(contract.id)
        return {"index": defences.take_statement(connection, contract, key, call.member.id, envelope)}
