"""The operator's side of a contract's log: append, sign checkpoints, prove.

Every function works inside a transaction that the caller opened, so that an entry and the state that it records
become durable together. What the round loop asks in every round reads few entries, however long the log is.
"""

from collections.abc import Sequence
from functools import cached_property

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from fedpact_contract import merkle
from fedpact_contract.errors import FailedError
from fedpact_contract.log import Body, Checkpoint, Countersignature, Entry, Proved
from fedpact_contract.messages import Head, HeadStep
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


def signed_checkpoints(
    connection: Connection, contract_id: str, *, after: int = -1, upto: int | None = None
) -> dict[int, Envelope[Checkpoint]]:
    """Signed checkpoints by size: every one, or those above the size `after` up to the size `upto`."""
    table = db.checkpoints.c
    query = sa.select(table.size, table.envelope).where(table.contract_id == contract_id, table.size > after)
    if upto is not None:
        query = query.where(table.size <= upto)
    return {int(row.size): read_envelope(bytes(row.envelope)) for row in connection.execute(query.order_by(table.size))}


def head(connection: Connection, contract_id: str, tree_size: int) -> Head:
    """The head of this size, as it was signed.

    Raises:
        FailedError: LOG_CHECKPOINT_MISSING.
    """
    found = signed_checkpoints(connection, contract_id, after=tree_size - 1, upto=tree_size)
    if tree_size not in found:
        raise _no_checkpoint(tree_size)
    record = Checkpoint.from_bytes(found[tree_size].body)
    return Head(size=record.size, root=record.root)


class Proofs:
    """Proofs under the checkpoint of one size, for one transaction; the leaf hashes are read once.

    Args:
        connection: The transaction.
        contract_id: The contract.
        upto: Size of the checkpoint.
    """

    def __init__(self, connection: Connection, contract_id: str, upto: int) -> None:
        self._connection, self._contract_id, self._upto = connection, contract_id, upto
        self._chains: dict[int, tuple[HeadStep, ...]] = {}

    @cached_property
    def _leaves(self) -> list[bytes]:
        return leaves(self._connection, self._contract_id)[: self._upto]

    def chain(self, known: int) -> tuple[HeadStep, ...]:
        """Checkpoints after the size `known`, each with its consistency proof to the one before.

        With `known` 0 the chain begins at the first checkpoint (an empty log is a prefix of every log).

        Raises:
            FailedError: LOG_CHECKPOINT_MISSING.
        """
        if known not in self._chains:
            steps, before = [], known
            found = signed_checkpoints(self._connection, self._contract_id, after=known, upto=self._upto)
            for tree_size, envelope in found.items():
                proof = merkle.consistency_proof(self._leaves[:tree_size], before)
                steps.append(HeadStep(checkpoint=envelope, consistency=tuple(p.hex() for p in proof)))
                before = tree_size
            if before != self._upto:
                raise _no_checkpoint(self._upto)
            self._chains[known] = tuple(steps)
        return self._chains[known]

    def entry(self, index: int) -> Proved:
        """An entry with its inclusion proof."""
        proof = merkle.inclusion_proof(self._leaves, index)
        entry = read_entry(self._connection, self._contract_id, index)
        return Proved(entry=entry, index=index, proof=tuple(p.hex() for p in proof))


def head_chain(connection: Connection, contract_id: str, known: int, upto: int) -> tuple[HeadStep, ...]:
    """`Proofs.chain` under the checkpoint of size `upto`."""
    return Proofs(connection, contract_id, upto).chain(known)


def prove(connection: Connection, contract_id: str, index: int, tree_size: int) -> Proved:
    """`Proofs.entry` under the checkpoint of size `tree_size`."""
    return Proofs(connection, contract_id, tree_size).entry(index)


def read_entry(connection: Connection, contract_id: str, index: int) -> Entry:
    """The entry at an index that the log is known to have."""
    table = db.entries.c
    query = sa.select(table.data).where(table.contract_id == contract_id, table.position == index)
    return Entry.from_bytes(bytes(connection.execute(query).scalar_one()))


def last_of(connection: Connection, contract_id: str, kind: str) -> Entry | None:
    """The latest entry of a type, if there is one."""
    table = db.entries.c
    query = sa.select(table.data).where(table.contract_id == contract_id, table.type == kind)
    data = connection.execute(query.order_by(table.position.desc()).limit(1)).scalar()
    return None if data is None else Entry.from_bytes(bytes(data))


def bodies_of(
    connection: Connection, contract_id: str, kinds: Sequence[type[Body]], *, before: int | None = None
) -> list[Body]:
    """The bodies of all entries of these types, in order; `before`: those that stand before this index."""
    return [entry.open() for _, entry in entries_of(connection, contract_id, kinds, before=before)]


def entries_of(
    connection: Connection, contract_id: str, kinds: Sequence[type[Body]], *, before: int | None = None
) -> list[tuple[int, Entry]]:
    """Index and entry of all entries of these types, in order; `before`: those that stand before this index."""
    table = db.entries.c
    where = [table.contract_id == contract_id, table.type.in_([kind.TYPE for kind in kinds])]
    if before is not None:
        where.append(table.position < before)
    rows = connection.execute(sa.select(table.position, table.data).where(*where).order_by(table.position))
    return [(int(row.position), Entry.from_bytes(bytes(row.data))) for row in rows]


def count_of(connection: Connection, contract_id: str, kind: str) -> int:
    """How many entries of a type there are."""
    table = db.entries.c
    where = (table.contract_id == contract_id, table.type == kind)
    return int(connection.execute(sa.select(sa.func.count()).select_from(db.entries).where(*where)).scalar_one())


def read_entries(connection: Connection, contract_id: str) -> list[Entry]:
    """Every entry, in order."""
    query = sa.select(db.entries.c.data).where(db.entries.c.contract_id == contract_id)
    return [Entry.from_bytes(bytes(row[0])) for row in connection.execute(query.order_by(db.entries.c.position))]


def signed_entries(connection: Connection, contract_id: str) -> list[Entry]:
    """The entries that a checkpoint covers, in order: what the operator has given its word on so far.

    While a round runs, the log has entries beyond its latest checkpoint; evidence with them would be called forged.
    """
    query = sa.select(sa.func.max(db.checkpoints.c.size)).where(db.checkpoints.c.contract_id == contract_id)
    return read_entries(connection, contract_id)[: int(connection.execute(query).scalar() or 0)]


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


def countersignatures(
    connection: Connection, contract_id: str, tree_size: int | None = None
) -> list[tuple[int, str, Envelope[Countersignature]]]:
    """(size, participant, envelope) of every countersignature, or those on one head; by size, then participant."""
    known = db.countersignatures.c
    query = sa.select(known.size, known.participant, known.envelope).where(known.contract_id == contract_id)
    if tree_size is not None:
        query = query.where(known.size == tree_size)
    rows = connection.execute(query.order_by(known.size, known.participant))
    return [(int(r.size), str(r.participant), read_envelope(bytes(r.envelope))) for r in rows]


def known_head(connection: Connection, contract_id: str, participant: str) -> int:
    """The size of the latest head that this participant is known to hold (it countersigned it); 0 for none."""
    known = db.countersignatures.c
    query = sa.select(sa.func.max(known.size)).where(known.contract_id == contract_id, known.participant == participant)
    return int(connection.execute(query).scalar() or 0)


def _no_checkpoint(tree_size: int) -> FailedError:
    return FailedError("LOG_CHECKPOINT_MISSING", f"There is no checkpoint of size {tree_size}.")
