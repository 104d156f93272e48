"""What the guard keeps besides the budget ledger: data sets, contracts, heads, results, egress, alarms.

Every method that writes is one transaction of its own: when it returns, what it wrote is on the disk.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Literal

from fedpact_client.store_db import Database, Row
from fedpact_contract.canonical import canonical_bytes, parse_canonical
from fedpact_contract.contract import Contract, SignedContract
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.keys import fingerprint
from fedpact_contract.ledger import Terms
from fedpact_contract.messages import DataSetCard
from fedpact_contract.record import decimal_text, read_envelope, signers

ContractState = Literal["signed", "running", "paused", "withdrawn", "closed"]
OVER: frozenset[ContractState] = frozenset({"withdrawn", "closed"})
MAY_BECOME: dict[ContractState, frozenset[ContractState]] = {
    "signed": frozenset({"running", "paused", "withdrawn", "closed"}),
    "running": frozenset({"paused", "withdrawn", "closed"}),
    "paused": frozenset({"running", "withdrawn", "closed"}),
    "withdrawn": frozenset({"closed"}),
    "closed": frozenset(),
}


class EgressKind(StrEnum):
    """Everything that may leave the enterprise; what is not in this list cannot be entered, and so cannot leave."""

    ENROLMENT = "enrolment"
    CARD = "card"
    SIGNATURE = "signature"
    UPDATE = "update"
    REFUSAL = "refusal"
    NO_REPLY = "no-reply"
    MEASUREMENT = "measurement"
    COUNTERSIGNATURE = "countersignature"
    OBJECTION = "objection"
    STATEMENT = "statement"
    NOTICE = "notice"
    REVOCATION = "revocation"
    RECEIPT = "receipt"
    REQUEST = "request"


REPLIES = frozenset({EgressKind.UPDATE, EgressKind.REFUSAL, EgressKind.NO_REPLY})
"""What answers an order. Whoever hands over orders can have the same answer for ever: it is counted on one row."""


def egress_kind(name: str) -> EgressKind:
    """The kind of this name.

    Raises:
        InputError: EGRESS_KIND, not one of the kinds that may leave.
    """
    try:
        return EgressKind(name)
    except ValueError as err:
        raise InputError("EGRESS_KIND", f"Only these may leave: {', '.join(EgressKind)}.", field="kind") from err


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A declared data set: its budget, the Rényi limit that follows from it, and its newest card (an envelope)."""

    data_set: str
    participant: str
    epsilon: Decimal
    delta: Decimal
    alpha: Decimal
    limit: Decimal
    card: bytes

    @property
    def declaration(self) -> DataSetCard:
        """What the newest card says."""
        return DataSetCard.from_bytes(read_envelope(self.card).body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A signed contract as the agent keeps it: its bytes, the terms for this agent, its run key, its state."""

    contract_id: str
    state: ContractState
    terms: Terms
    run_key_name: str
    run_public: str
    signed: bytes

    @property
    def contract(self) -> Contract:
        """The contract's record, from the bytes that were signed here."""
        value = parse_canonical(self.signed, what="signed contract")
        return Contract.from_bytes(SignedContract.parse(value, code="SIGNED_CONTRACT").contract.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenHead:
    """A head of a contract's log that this agent saw: root in hexadecimal, the signed checkpoint's bytes."""

    size: int
    root: str
    checkpoint: bytes
    countersigned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressEntry:
    """Something that left, or was about to; `times` so often, of which `last` names the last time after `at`."""

    seq: int
    at: str
    kind: EgressKind
    contract_id: str | None
    round: int | None
    size: int
    sha256: str
    detail: str
    times: int = 1
    last: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that a person should look at, with the signed bytes that show it, where there are any."""

    seq: int
    at: str
    code: str
    contract_id: str | None
    detail: str
    evidence: bytes | None


_SAME = (
    "SELECT seq FROM egress WHERE kind = ? AND contract_id IS ? AND round IS ? "
    "AND size = ? AND sha256 = ? AND detail = ?"
)


def utc_now() -> str:
    """The system clock, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Records:
    """The store without the budget ledger (`fedpact_client.store.Store` adds it)."""

    def __init__(self, db: Database, clock: Callable[[], str]) -> None:
        self._db = db
        self._clock = clock

    # Data sets

    def declare(self, card: bytes, limit: Decimal) -> DataSet:
        """Declare a data set by its signed card (an envelope's bytes), or give it a newer card.

        `limit` is R, the bound on the Rényi sum that follows from the card's epsilon, delta and alpha. A budget is
        declared once: a newer card changes none of them.

        Raises:
            InputError: a malformed card; DATA_SET_LIMIT.
            FaultError: CARD_SIGNER, or a bad signature.
            RefusedError: DATA_SET_BUDGET_FIXED.
        """
        envelope = read_envelope(card)
        keys = {fingerprint(key) for key in signers(envelope, DataSetCard)}
        body = DataSetCard.from_bytes(envelope.body)
        if body.participant not in keys:
            raise FaultError(
                "CARD_SIGNER", "The card is not signed by the participant that it names.", party=body.participant
            )
        if not limit.is_finite() or limit <= 0:
            raise InputError("DATA_SET_LIMIT", "The limit of a data set must be greater than 0.", field="limit")
        budget = tuple(decimal_text(v) for v in (body.epsilon, body.delta, body.alpha, limit))
        new = (body.data_set, body.participant, *budget)
        with self._db.transaction():
            found = self._db.one("SELECT * FROM data_sets WHERE data_set = ?", (body.data_set,))
            if found is None:
                self._db.execute("INSERT INTO data_sets VALUES (?, ?, ?, ?, ?, ?)", new)
            elif found != new:
                raise RefusedError(
                    "DATA_SET_BUDGET_FIXED",
                    "The data set was declared with another budget or participant.",
                    field=f"data set {body.data_set}",
                    rule="epsilon, delta and alpha are declared once for a data set",
                    remedy="Keep the budget of the first card.",
                )
            self._db.execute("DELETE FROM cards WHERE data_set = ? AND card = ?", (body.data_set, card))
            self._db.execute("INSERT INTO cards (data_set, card) VALUES (?, ?)", (body.data_set, card))
            return self._data_set(body.data_set)

    def data_set(self, data_set: str) -> DataSet:
        """One declared data set.

        Raises:
            InputError: DATA_SET_UNKNOWN.
        """
        with self._db.reading():
            return self._data_set(data_set)

    def data_sets(self) -> list[DataSet]:
        """Every declared data set, by its id."""
        with self._db.reading():
            return [self._data_set(row[0]) for row in self._db.all("SELECT data_set FROM data_sets ORDER BY data_set")]

    def declared(self, data_set: str) -> DataSet | None:
        """The data set with this id; None where no card of it was signed yet."""
        return next((known for known in self.data_sets() if known.data_set == data_set), None)

    def released_rows(self, data_set: str) -> int:
        """The most rows that a signed card of the data set says were released; 0 where none was signed."""
        with self._db.reading():
            cards = self._db.all("SELECT card FROM cards WHERE data_set = ?", (data_set,))
        return max((DataSetCard.from_bytes(read_envelope(card).body).released_rows for (card,) in cards), default=0)

    def add_version(self, data_set: str, *fingerprints: str) -> None:
        """Remember what a version of this data set is known by, all or none; it inherits all that was spent.

        Raises:
            RefusedError: DATA_SET_KNOWN_ELSEWHERE.
            InputError: DATA_SET_UNKNOWN.
        """
        with self._db.transaction():
            self._data_set(data_set)
            for fingerprint in fingerprints:
                known = self._db.one("SELECT data_set FROM versions WHERE fingerprint = ?", (fingerprint,))
                if known is None:
                    self._db.execute(
                        "INSERT INTO versions (fingerprint, data_set) VALUES (?, ?)", (fingerprint, data_set)
                    )
                elif known[0] != data_set:
                    raise RefusedError(
                        "DATA_SET_KNOWN_ELSEWHERE",
                        f"These rows are known as data set {known[0]}.",
                        field=f"data set {data_set}",
                        rule="one source has one budget",
                        remedy=f"Use {known[0]}: renaming or converting a source buys no budget.",
                    )

    def versions(self, data_set: str) -> list[str]:
        """Fingerprints of the data set's versions, oldest first."""
        with self._db.reading():
            rows = self._db.all("SELECT fingerprint FROM versions WHERE data_set = ? ORDER BY seq", (data_set,))
            return [row[0] for row in rows]

    # Contracts

    def contract(self, contract_id: str) -> Agreement:
        """One signed contract.

        Raises:
            InputError: CONTRACT_UNKNOWN.
        """
        with self._db.reading():
            return self._contract(contract_id)

    def contracts(self) -> list[Agreement]:
        """Every signed contract, in the order of signing."""
        with self._db.reading():
            return self._agreements()

    def set_state(self, contract_id: str, state: ContractState) -> None:
        """Move a contract to another state.

        Raises:
            InputError: CONTRACT_UNKNOWN; CONTRACT_STATE, it cannot go from where it is to there.
        """
        with self._db.transaction():
            now = self._contract(contract_id).state
            if state != now and state not in MAY_BECOME[now]:
                raise InputError(
                    "CONTRACT_STATE",
                    f"A contract that is {now} cannot become {state}.",
                    field=f"contract {contract_id}",
                    remedy="`fedpact-agent contract list` shows where each contract stands.",
                )
            self._db.execute("UPDATE contracts SET state = ? WHERE contract_id = ?", (state, contract_id))

    # Heads

    def add_heads(self, contract_id: str, heads: Iterable[SeenHead]) -> None:
        """Keep heads of the contract's log, all or none. A head seen before is kept as it was.

        Raises:
            FaultError: HEAD_FORK, another root of that size was seen before.
            InputError: CONTRACT_UNKNOWN.
        """
        with self._db.transaction():
            self._contract(contract_id)
            for head in heads:
                known = self._head_root(contract_id, head.size)
                if known is None:
                    self._db.execute(
                        "INSERT INTO heads (contract_id, size, root, checkpoint) VALUES (?, ?, ?, ?)",
                        (contract_id, head.size, head.root, head.checkpoint),
                    )
                elif known != head.root:
                    raise _fork(contract_id, head.size)

    def heads(self, contract_id: str) -> list[SeenHead]:
        """Every head of the contract's log that this agent saw, smallest first."""
        with self._db.reading():
            rows = self._db.all(
                "SELECT size, root, checkpoint, countersigned FROM heads WHERE contract_id = ? ORDER BY size",
                (contract_id,),
            )
        return [SeenHead(size=r[0], root=r[1], checkpoint=r[2], countersigned=bool(r[3])) for r in rows]

    def countersign(self, contract_id: str, size: int, root: str) -> None:
        """Mark a head as countersigned, before the countersignature leaves.

        Raises:
            FaultError: HEAD_FORK, another root of that size was seen.
            InputError: HEAD_UNKNOWN.
        """
        with self._db.transaction():
            known = self._head_root(contract_id, size)
            if known is None:
                raise InputError(
                    "HEAD_UNKNOWN", "This head was not kept before it was to be signed.", field=f"size {size}"
                )
            if known != root:
                raise _fork(contract_id, size)
            self._db.execute(
                "UPDATE heads SET countersigned = 1 WHERE contract_id = ? AND size = ?", (contract_id, size)
            )

    # Results, egress, alarms

    def add_result(self, contract_id: str, round_number: int, body: bytes) -> None:
        """Keep the log's word on this agent's reply. The same bytes again change nothing; other bytes are kept too.

        Raises:
            InputError: CONTRACT_UNKNOWN.
        """
        with self._db.transaction():
            self._contract(contract_id)
            self._db.execute(
                "INSERT OR IGNORE INTO results (contract_id, round, body) VALUES (?, ?, ?)",
                (contract_id, round_number, body),
            )

    def results(self, contract_id: str) -> list[tuple[int, bytes]]:
        """Round and bytes of every result of the contract, in the order of arrival."""
        with self._db.reading():
            rows = self._db.all("SELECT round, body FROM results WHERE contract_id = ? ORDER BY seq", (contract_id,))
            return [(row[0], row[1]) for row in rows]

    def record_egress(
        self,
        kind: EgressKind,
        contract_id: str | None,
        round_number: int | None,
        size: int,
        sha256: str,
        *,
        detail: str = "",
    ) -> int:
        """Enter what is about to leave; call it, and only then send. The entry's number.

        An answer that leaves again (`REPLIES`) is counted where it was entered first: the ledger has at most as many
        rows of them as there are answers, whatever repeats an order.

        Raises:
            InputError: EGRESS_KIND, not one of the kinds that may leave.
        """
        kind = egress_kind(kind)
        entry = (kind.value, contract_id, round_number, size, sha256, detail)
        with self._db.transaction():
            known = self._db.one(_SAME, entry) if kind in REPLIES else None
            if known is not None:
                self._db.execute(
                    "UPDATE egress SET times = times + 1, last = ? WHERE seq = ?", (self._clock(), known[0])
                )
                return int(known[0])
            return self._db.insert(
                "INSERT INTO egress (at, kind, contract_id, round, size, sha256, detail) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (self._clock(), *entry),
            )

    def count_egress(self, kind: EgressKind, contract_id: str) -> int:
        """How many different messages of a kind about a contract left, or were about to."""
        with self._db.reading():
            row = self._db.one(
                "SELECT COUNT(*) FROM egress WHERE kind = ? AND contract_id = ?", (kind.value, contract_id)
            )
        return int(row[0]) if row else 0

    def egress(
        self, contract_id: str | None = None, kinds: Iterable[EgressKind] = (), last: int | None = None
    ) -> list[EgressEntry]:
        """Everything that left or was about to, oldest first: one contract's, of these kinds, the last so many."""
        wanted = [kind.value for kind in kinds] or [kind.value for kind in EgressKind]
        with self._db.reading():
            rows = self._db.all(
                "SELECT * FROM (SELECT seq, at, kind, contract_id, round, size, sha256, detail, times, last "  # noqa: S608 - marks alone
                f"FROM egress WHERE kind IN ({', '.join('?' * len(wanted))}) AND (? IS NULL OR contract_id = ?) "
                "ORDER BY seq DESC LIMIT ?) ORDER BY seq",
                (*wanted, contract_id, contract_id, -1 if last is None else last),
            )
        return [
            EgressEntry(
                seq=r[0],
                at=r[1],
                kind=EgressKind(r[2]),
                contract_id=r[3],
                round=r[4],
                size=r[5],
                sha256=r[6],
                detail=r[7],
                times=r[8],
                last=r[9],
            )
            for r in rows
        ]

    def add_alarm(self, code: str, contract_id: str | None, detail: str, evidence: bytes | None = None) -> int:
        """Keep an alarm, with the signed bytes that show it; its number."""
        with self._db.transaction():
            return self._db.insert(
                "INSERT INTO alarms (at, code, contract_id, detail, evidence) VALUES (?, ?, ?, ?, ?)",
                (self._clock(), code, contract_id, detail, evidence),
            )

    def alarms(self) -> list[Alarm]:
        """Every alarm, oldest first."""
        with self._db.reading():
            rows = self._db.all("SELECT seq, at, code, contract_id, detail, evidence FROM alarms ORDER BY seq")
        return [Alarm(seq=r[0], at=r[1], code=r[2], contract_id=r[3], detail=r[4], evidence=r[5]) for r in rows]

    # Inside a transaction

    def _data_set(self, data_set: str) -> DataSet:
        row = self._db.one("SELECT * FROM data_sets WHERE data_set = ?", (data_set,))
        if row is None:
            raise InputError(
                "DATA_SET_UNKNOWN",
                "This data set was never declared here.",
                field=f"data set {data_set}",
                remedy="Declare it first: its card is signed with the contract key.",
            )
        card = self._db.one("SELECT card FROM cards WHERE data_set = ? ORDER BY seq DESC", (data_set,))
        try:
            epsilon, delta, alpha, limit = (Decimal(value) for value in row[2:])
        except (ArithmeticError, TypeError, ValueError) as err:
            raise self._db.damaged(f"the budget of the data set {data_set} is no number") from err
        return DataSet(
            data_set=data_set,
            participant=row[1],
            epsilon=epsilon,
            delta=delta,
            alpha=alpha,
            limit=limit,
            card=card[0] if card else b"",
        )

    def _contract(self, contract_id: str) -> Agreement:
        row = self._db.one("SELECT * FROM contracts WHERE contract_id = ?", (contract_id,))
        if row is None:
            raise InputError(
                "CONTRACT_UNKNOWN",
                "This contract was never signed here.",
                field=f"contract {contract_id}",
                remedy="Sign it first, or answer the operator that you are no party to it.",
            )
        return _agreement(row)

    def _agreements(self) -> list[Agreement]:
        return [_agreement(row) for row in self._db.all("SELECT * FROM contracts ORDER BY rowid")]

    def _head_root(self, contract_id: str, size: int) -> str | None:
        row = self._db.one("SELECT root FROM heads WHERE contract_id = ? AND size = ?", (contract_id, size))
        return None if row is None else str(row[0])

    def _insert_contract(self, agreement: Agreement) -> None:
        self._db.execute(
            "INSERT INTO contracts (contract_id, data_set, state, terms, run_key_name, run_public, signed) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                agreement.contract_id,
                agreement.terms.data_set,
                agreement.state,
                canonical_bytes(agreement.terms.plain()),
                agreement.run_key_name,
                agreement.run_public,
                agreement.signed,
            ),
        )


def _agreement(row: Row) -> Agreement:
    contract_id, _, state, terms, run_key_name, run_public, signed = row
    return Agreement(
        contract_id=contract_id,
        state=state,
        terms=Terms.parse(parse_canonical(terms, what="contract terms"), code="LEDGER_TERMS"),
        run_key_name=run_key_name,
        run_public=run_public,
        signed=signed,
    )


def _fork(contract_id: str, size: int) -> FaultError:
    return FaultError(
        "HEAD_FORK",
        "The operator showed two different logs of one size.",
        field=f"contract {contract_id}, size {size}",
        rule="one size has one root",
        remedy="Keep both signed checkpoints and show them to the other participants; nothing is countersigned.",
    )
