"""The operator's side of a contract's log: append, sign checkpoints, prove.

Every function works inside a transaction that the caller opened, so that an entry and the state that it records
become durable together.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from fedpact_contract import merkle
from fedpact_contract.errors import FailedError
from fedpact_contract.log import Body, Checkpoint, Countersignature, Entry, Proved
from fedpact_contract.messages import HeadStep
from fedpact_contract.record import Envelope, read_envelope, sign
from fedpact_server import db


def append(connection: Connection, contract_id: str, bodies: Sequence[Body]) -> list[int]:
    """Append entries; returns their indices."""
    first = size(connection, contract_id)
    rows = []
    for offset, body in enumerate(bodies):
        entry = Entry.of(body)
        rows.append(
            {
                "contract_id": contract_id,
                "position": first + offset,
                "type": entry.type,
                "data": entry.to_bytes(),
                "leaf_hash": entry.leaf_hash,
            }
        )
    if rows:
        connection.execute(db.entries.insert(), rows)
    return [first + offset for offset in range(len(rows))]


def size(connection: Connection, contract_id: str) -> int:
    """Number of entries."""
    query = sa.select(sa.func.count()).select_from(db.entries).where(db.entries.c.contract_id == contract_id)
    return int(connection.execute(query).scalar_one())


def leaves(connection: Connection, contract_id: str) -> list[bytes]:
    """Leaf hashes in order."""
    query = sa.select(db.entries.c.leaf_hash).where(db.entries.c.contract_id == contract_id)
    return [bytes(row[0]) for row in connection.execute(query.order_by(db.entries.c.position))]


def root_of(hashes: Sequence[bytes]) -> str:
    """Merkle root over leaf hashes, in hexadecimal."""
    return merkle.root(hashes).hex()


def checkpoint(connection: Connection, contract_id: str, key: Ed25519PrivateKey) -> Checkpoint:
    """Sign the log as it stands and keep the checkpoint; the same size keeps its first checkpoint."""
    hashes = leaves(connection, contract_id)
    record = Checkpoint(origin=contract_id, size=len(hashes), root=merkle.root(hashes).hex())
    stored = connection.execute(
        sa.select(db.checkpoints.c.envelope).where(
            db.checkpoints.c.contract_id == contract_id, db.checkpoints.c.size == len(hashes)
        )
    ).scalar()
    if stored is None:
        envelope = sign(record, key).to_bytes()
        connection.execute(db.checkpoints.insert().values(contract_id=contract_id, size=len(hashes), envelope=envelope))
    elif Checkpoint.from_bytes(read_envelope(bytes(stored)).body) != record:
        raise FailedError("LOG_DIVERGED", "The log differs from a checkpoint signed before; restore a backup.")
    return record


def signed_checkpoints(connection: Connection, contract_id: str) -> dict[int, Envelope[Checkpoint]]:
    """Every signed checkpoint, by size."""
    query = sa.select(db.checkpoints.c.size, db.checkpoints.c.envelope)
    rows = connection.execute(query.where(db.checkpoints.c.contract_id == contract_id).order_by(db.checkpoints.c.size))
    return {int(row.size): read_envelope(bytes(row.envelope)) for row in rows}


def head_chain(connection: Connection, contract_id: str, known: int, upto: int) -> tuple[HeadStep, ...]:
    """Checkpoints after the size `known` up to the size `upto`, each with its consistency proof to the one before.

    With `known` 0 the chain begins at the first checkpoint (an empty log is a prefix of every log).
    """
    hashes = leaves(connection, contract_id)
    steps, before = [], known
    for tree_size, envelope in signed_checkpoints(connection, contract_id).items():
        if known < tree_size <= upto:
            proof = merkle.consistency_proof(hashes[:tree_size], before)
            steps.append(HeadStep(checkpoint=envelope, consistency=tuple(p.hex() for p in proof)))
            before = tree_size
    if before != upto:
        raise FailedError("LOG_CHECKPOINT_MISSING", f"There is no checkpoint of size {upto}.")
    return tuple(steps)


def prove(connection: Connection, contract_id: str, index: int, tree_size: int) -> Proved:
    """An entry with its inclusion proof under the checkpoint of this size."""
    data = connection.execute(
        sa.select(db.entries.c.data).where(db.entries.c.contract_id == contract_id, db.entries.c.position == index)
    ).scalar_one()
    proof = merkle.inclusion_proof(leaves(connection, contract_id)[:tree_size], index)
    return Proved(entry=Entry.from_bytes(bytes(data)), index=index, proof=tuple(p.hex() for p in proof))


def read_entries(connection: Connection, contract_id: str) -> list[Entry]:
    """Every entry, in order."""
    query = sa.select(db.entries.c.data).where(db.entries.c.contract_id == contract_id)
    return [Entry.from_bytes(bytes(row[0])) for row in connection.execute(query.order_by(db.entries.c.position))]


def add_countersignature(
    connection: Connection, contract_id: str, envelope: Envelope[Countersignature], record: Countersignature
) -> None:
    """Keep a countersignature that the caller has verified; a second one on the same head changes nothing."""
    known = db.countersignatures.c
    exists = connection.execute(
        sa.select(known.size).where(
            known.contract_id == contract_id, known.size == record.size, known.participant == record.participant
        )
    ).first()
    if exists is None:
        connection.execute(
            db.countersignatures.insert().values(
                contract_id=contract_id,
                size=record.size,
                participant=record.participant,
                envelope=envelope.to_bytes(),
            )
        )


def countersignatures(connection: Connection, contract_id: str) -> list[tuple[int, str, Envelope[Countersignature]]]:
    """(size, participant, envelope) of every countersignature, by size, then participant."""
    known = db.countersignatures.c
    rows = connection.execute(
        sa.select(known.size, known.participant, known.envelope)
        .where(known.contract_id == contract_id)
        .order_by(known.size, known.participant)
    )
    return [(int(r.size), str(r.participant), read_envelope(bytes(r.envelope))) for r in rows]


def known_head(connection: Connection, contract_id: str, participant: str) -> int:
    """The size of the latest head that this participant is known to hold (it countersigned it); 0 for none."""
    known = db.countersignatures.c
    query = sa.select(sa.func.max(known.size)).where(known.contract_id == contract_id, known.participant == participant)
    return int(connection.execute(query).scalar() or 0)
