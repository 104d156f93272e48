"""Orders: what the coordinator tells one participant in one round, built from the log as it stands."""

from collections.abc import Sequence

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from fedpact_contract.log import Countersignature
from fedpact_contract.messages import Order
from fedpact_contract.record import Envelope, sign
from fedpact_server import db, logbook


def build_order(
    connection: Connection,
    contract_id: str,
    round_row: sa.Row[tuple[object, ...]],
    participant: str,
    *,
    proofs: logbook.Proofs,
    witnesses: Sequence[Envelope[Countersignature]],
) -> Order:
    """The order of a round that is opened, for one invited participant.

    Args:
        connection: The transaction.
        contract_id: The contract.
        round_row: The round.
        participant: Whom the order is for.
        proofs: Proofs under the round's checkpoint.
        witnesses: The countersignatures on the head of the round before.
    """
    since = logbook.known_head(connection, contract_id, participant)
    results = _result_indices(connection, contract_id, int(round_row.round), participant)
    return Order(
        contract_id=contract_id,
        round=int(round_row.round),
        participant=participant,
        base_digest=str(round_row.base_digest),
        since=since,
        heads=proofs.chain(since),
        opened=proofs.entry(int(round_row.opened_index)),
        results=tuple(proofs.entry(index) for index in results),
        countersignatures=tuple(witnesses),
    )


def store_orders(
    connection: Connection,
    contract_id: str,
    round_row: sa.Row[tuple[object, ...]],
    invited: tuple[str, ...],
    key: Ed25519PrivateKey,
) -> None:
    """Sign and keep every order of the round: a resend sends these same bytes."""
    proofs = logbook.Proofs(connection, contract_id, int(round_row.checkpoint_size))
    witnesses = _witnesses(connection, contract_id, int(round_row.round))
    for participant in invited:
        order = build_order(connection, contract_id, round_row, participant, proofs=proofs, witnesses=witnesses)
        envelope: Envelope[Order] = sign(order, key)
        connection.execute(
            db.orders.insert().values(
                contract_id=contract_id,
                round=int(round_row.round),
                participant=participant,
                order=envelope.to_bytes(),
            )
        )


def _result_indices(connection: Connection, contract_id: str, before: int, participant: str) -> list[int]:
    """Log indices of this participant's outcomes, from its last reply that was received on."""
    outcome = db.outcomes.c
    query = (
        sa.select(outcome.kind, outcome.position)
        .where(outcome.contract_id == contract_id, outcome.participant == participant, outcome.round < before)
        .order_by(outcome.round)
    )
    rows = connection.execute(query).all()
    replied = [position for position, row in enumerate(rows) if row.kind != "missed"]
    return [int(row.position) for row in rows[replied[-1] if replied else 0 :]]


def _witnesses(connection: Connection, contract_id: str, round_number: int) -> list[Envelope[Countersignature]]:
    """The countersignatures on the head that the round before showed."""
    query = sa.select(db.rounds.c.checkpoint_size).where(
        db.rounds.c.contract_id == contract_id, db.rounds.c.round == round_number - 1
    )
    size = connection.execute(query).scalar()
    if size is None:
        return []
    return [envelope for _, _, envelope in logbook.countersignatures(connection, contract_id, int(size))]
