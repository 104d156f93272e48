"""The operator's mirror of a participant's budget ledger: what its signed words in one log say was charged."""

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract.ledger import GENESIS
from fedpact_contract.log import MeasurementTaken
from fedpact_contract.record import Envelope, read_envelope
from fedpact_server import db


def ledger_heads(connection: Connection, contract_id: str, participant: str) -> frozenset[str]:
    """The empty ledger's head, and those that this participant's logged replies and measurements name."""
    outcome, entry = db.outcomes.c, db.entries.c
    replies = sa.select(outcome.position).where(
        outcome.contract_id == contract_id, outcome.participant == participant, outcome.attempts.is_not(None)
    )
    query = sa.select(entry.data).where(
        entry.contract_id == contract_id,
        sa.or_(entry.position.in_(replies), entry.type == MeasurementTaken.TYPE),
    )
    # Written by ourselves, so that nothing is checked again: this is asked with every reply.
    bodies = [json.loads(bytes(data))["body"] for data in connection.execute(query).scalars()]
    return frozenset({GENESIS, *(_head(body) for body in bodies if body["participant"] == participant)})


def spares_used(connection: Connection, contract_id: str, participant: str) -> int:
    """Attempts beyond the first, over all rounds, that this participant's logged replies name."""
    table = db.outcomes.c
    query = sa.select(sa.func.sum(table.attempts - 1)).where(
        table.contract_id == contract_id, table.participant == participant, table.attempts > 1
    )
    return int(connection.execute(query).scalar() or 0)


def _head(body: dict[str, Any]) -> str:
    said: Envelope[Any] = read_envelope(body.get("update") or body.get("refusal") or body["measurement"])
    return str(json.loads(said.body)["ledger_head"])
