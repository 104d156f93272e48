"""The outbox: the one answer to an order (contract, round, base model), kept byte for byte to be sent again.

Round 0 holds measurements, one of each kind, told apart by what stands for their base model.
"""

from dataclasses import dataclass
from typing import Literal

from fedpact_client.store_db import Database
from fedpact_contract.arrays import update_digest
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.errors import FaultError, RefusedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Bytes in the outbox: the reply, and the update's array (empty beside a refusal). They are always the same."""

    kind: Literal["update", "refusal"]
    reply: bytes
    array: bytes


class Outbox:
    """Used inside a transaction of `db`."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def rounds(self, contract_id: str) -> list[int]:
        """Rounds of the contract that were answered, by an update or a refusal, ascending."""
        rows = self._db.all(
            "SELECT DISTINCT round FROM outbox WHERE contract_id = ? AND round > 0 ORDER BY round", (contract_id,)
        )
        return [int(row[0]) for row in rows]

    def get(self, contract_id: str, round_number: int, base_digest: str) -> Ready | None:
        """The answer to this order, if there is one.

        Raises:
            RefusedError: ROUND_DONE, an update whose array was discarded after the log decided on it.
            FaultError: OUTBOX_DAMAGED.
        """
        row = self._db.one(
            "SELECT kind, reply_digest, array_digest, reply, array FROM outbox "
            "WHERE contract_id = ? AND round = ? AND base_digest = ?",
            (contract_id, round_number, base_digest),
        )
        if row is None:
            return None
        kind, reply_digest, array_digest, reply, array = row
        if kind == "update" and array is None:
            raise RefusedError(
                "ROUND_DONE",
                "This round has its one update already, and the log's decision on it.",
                field=f"round {round_number}",
            )
        array = array or b""
        if sha256_hex(reply) != reply_digest or (kind == "update" and update_digest(array) != array_digest):
            raise FaultError(
                "OUTBOX_DAMAGED",
                "The bytes in the outbox are not those that were put there; they are not sent.",
                file=self._db.path,
                field=f"contract {contract_id}, round {round_number}",
                remedy="Restore a backup of the agent's home, then run `fedpact-agent restore`.",
            )
        return Ready(kind=kind, reply=reply, array=array)

    def put(
        self, contract_id: str, round_number: int, base_digest: str, ready: Ready, array_digest: str | None = None
    ) -> None:
        """Put in the one answer to this order; an update is also the only one of its round.

        `array_digest` is that of an update's array, as the ledger row names it.

        Raises:
            RefusedError: OUTBOX_TAKEN.
        """
        if self._db.one(
            "SELECT 1 FROM outbox WHERE contract_id = ? AND round = ? "
            "AND (base_digest = ? OR (round > 0 AND ? = 'update' AND kind = 'update'))",
            (contract_id, round_number, base_digest, ready.kind),
        ):
            raise taken(round_number)
        self._db.execute(
            "INSERT INTO outbox (contract_id, round, base_digest, kind, reply_digest, array_digest, reply, array) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                contract_id,
                round_number,
                base_digest,
                ready.kind,
                sha256_hex(ready.reply),
                array_digest,
                ready.reply,
                None if ready.kind == "refusal" else ready.array,
            ),
        )

    def discard_arrays(self, contract_id: str, before_round: int) -> int:
        """Drop the arrays of updates of earlier rounds; how many."""
        return self._db.execute(
            "UPDATE outbox SET array = NULL "
            "WHERE contract_id = ? AND round < ? AND round > 0 AND kind = 'update' AND array IS NOT NULL",
            (contract_id, before_round),
        )

    def destroy_arrays(self, contract_id: str) -> int:
        """Drop the arrays of all updates and measurements; how many (SQLite overwrites what it held: `store_db`)."""
        return self._db.execute(
            "UPDATE outbox SET array = NULL WHERE contract_id = ? AND kind = 'update' AND array IS NOT NULL",
            (contract_id,),
        )


def taken(round_number: int) -> RefusedError:
    """The refusal of a second answer."""
    return RefusedError(
        "OUTBOX_TAKEN",
        "This order has its one answer already.",
        field=f"round {round_number}",
        rule="never two answers to one order, never two updates of one round",
    )
