"""The budget ledgers as they stand in the file: each row verified once, then kept in memory.

A row is believed if its run key signed it, its columns agree with it, and `ledger.Replay` lets it follow.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client.store_db import Database
from fedpact_client.store_witness import Mark, Witness
from fedpact_contract import ledger
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.ledger import LedgerRow, Replay
from fedpact_contract.record import Envelope, open_signed, read_envelope, sign


@dataclass(slots=True)
class Chain:
    """One data set's ledger as far as it was read: rows and their hashes."""

    rows: list[LedgerRow] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    replay: Replay = field(default_factory=Replay)


class Chains:
    """The ledgers of every data set; used inside a transaction of `db`, which makes a view and an append one step."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._chains: dict[str, Chain] = {}
        self._touched: set[str] = set()

    def get(self, data_set: str) -> Chain:
        """The ledger, with whatever was appended since it was last read, by whomever.

        Raises:
            FaultError: LEDGER_CHAIN, naming the row and the broken rule.
        """
        chain = self._chains.setdefault(data_set, Chain())
        first = max(0, len(chain.rows) - 1)
        found = self._db.all(
            "SELECT data_set, seq, contract_id, kind, round, attempt, state, row_hash, envelope FROM ledger "
            "WHERE data_set = ? AND seq >= ? ORDER BY seq",
            (data_set, first),
        )
        if chain.rows and (not found or found[0][7] != chain.hashes[first]):
            raise _broken(data_set, first, "a row once read stays as it was")
        for *columns, row_hash, envelope in found[1 if chain.rows else 0 :]:
            row = self._verified(envelope, data_set, columns[1])
            if list(_columns(row)) != columns or row.row_hash != row_hash:
                raise _broken(data_set, columns[1], "the columns beside a row are the row's")
            chain.replay.add(row)
            chain.rows.append(row)
            chain.hashes.append(row_hash)
        return chain

    def every(self) -> Iterator[tuple[str, Chain]]:
        """Every declared data set and its ledger."""
        for (data_set,) in self._db.all("SELECT data_set FROM data_sets ORDER BY data_set"):
            yield data_set, self.get(data_set)

    def append(self, row: LedgerRow, keys: Iterable[Ed25519PrivateKey]) -> None:
        """Sign and insert a row; until the transaction is committed it may yet be `forget`-ten."""
        self._touched.add(row.data_set)
        self._db.execute(
            "INSERT INTO ledger (data_set, seq, contract_id, kind, round, attempt, state, row_hash, envelope) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*_columns(row), row.row_hash, sign(row, *keys).to_bytes()),
        )

    def settle(self) -> None:
        """The transaction is committed."""
        self._touched.clear()

    def forget(self) -> None:
        """The transaction never happened: read again what it touched."""
        for data_set in self._touched:
            self._chains.pop(data_set, None)
        self._touched.clear()

    def marks(self) -> Witness:
        """How far every ledger that has rows has come."""
        return Witness(
            marks={
                data_set: Mark(rows=len(chain.rows), head=chain.hashes[-1], charged=ledger.charged(chain.rows))
                for data_set, chain in self.every()
                if chain.rows
            }
        )

    def _verified(self, data: bytes, data_set: str, seq: int) -> LedgerRow:
        try:
            envelope: Envelope[LedgerRow] = read_envelope(data)
            row = LedgerRow.from_bytes(envelope.body)
            if row.state == "restored" and not envelope.signatures and envelope.type == LedgerRow.media_type():
                return row  # it only takes budget away
            known = self._db.one("SELECT run_public FROM contracts WHERE contract_id = ?", (row.contract_id,))
            if known is None:
                raise _broken(data_set, seq, "a row belongs to a contract that was signed here")
            return open_signed(envelope, LedgerRow, known[0])
        except InputError as err:
            raise _broken(data_set, seq, f"a row is a record in canonical form: {err.code}") from err
        except FaultError as err:
            rule = err.rule or f"a row is signed by its contract's run key: {err.code}"
            raise _broken(data_set, seq, rule) from err


def _columns(row: LedgerRow) -> tuple[object, ...]:
    return (row.data_set, row.seq, row.contract_id, row.kind or "", row.round, row.attempt, row.state)


def _broken(data_set: str, seq: int, rule: str) -> FaultError:
    return FaultError(
        "LEDGER_CHAIN",
        f"The budget ledger of {data_set} is broken at row {seq}.",
        field=f"row {seq}",
        rule=rule,
        remedy="Rows were changed or removed: restore a backup, then run `fedpact-agent restore`.",
    )
