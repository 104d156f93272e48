"""The guard's store: one SQLite file with the budget ledger, the outbox and what else must outlive a crash.

Transaction 1 (`reserve`) charges an attempt before it sees the data. Transaction 2 (`complete`, `fail`) ends it: the
row that says so and the bytes that will leave are one commit, and only then may they leave. A crash anywhere leaves
either nothing, or a charge without output, or output that is sent again byte for byte: it over-counts and never
under-counts.

Whoever reserves holds the `HomeLock`. Reservations without an end count as crashed: never ask again for a round that
is still training.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client import store_witness
from fedpact_client.store_chain import Chains
from fedpact_client.store_db import Database
from fedpact_client.store_lock import HomeLock
from fedpact_client.store_outbox import Outbox, Ready, taken
from fedpact_client.store_records import (
    OVER,
    Agreement,
    Alarm,
    ContractState,
    DataSet,
    EgressEntry,
    EgressKind,
    Records,
    SeenHead,
    utc_now,
)
from fedpact_contract import ledger
from fedpact_contract.arrays import update_digest as digest_of_update
from fedpact_contract.canonical import parse_canonical, sha256_hex
from fedpact_contract.contract import Contract, Delegation, MeasurementKind, SignedContract
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_contract.ledger import LedgerRow, Request, Terms
from fedpact_contract.messages import DataSetCard
from fedpact_contract.privacy import filter_limit
from fedpact_contract.record import read_envelope, signers

__all__ = [
    "Agreement",
    "Alarm",
    "Budget",
    "ContractState",
    "DataSet",
    "EgressEntry",
    "EgressKind",
    "HomeLock",
    "Ready",
    "Reservation",
    "SeenHead",
    "Store",
]

Reservation = LedgerRow
"""A reserved attempt is its ledger row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Where a data set stands: Rényi divergence at alpha. `committed` adds what signed contracts may still charge."""

    alpha: Decimal
    limit: Decimal
    charged: Decimal
    committed: Decimal


class Store(Records):
    """The agent's store.

    Args:
        path: The SQLite file.
        witness: Where each ledger's head is written after each commit: on another disk than `path`, outside the backup.
        create: Make a new store (`init` only): a missing file is otherwise an error, never an empty ledger.
        read_only: For commands beside a running guard.
        restoring: For `restore` only: open an old copy, to `write_off` what it may have forgotten.
        participant: Whose home it is: a store with data sets that somebody else declared is not taken, nor one in
            which another budget or plan stands than this participant signed.
        clock: UTC instants for the egress ledger and alarms.

    Raises:
        InputError, FailedError: the file (`store_db.Database`) or the witness (`store_witness`) cannot be used.
        FaultError: LEDGER_CHAIN or a bad signature, in any data set's ledger.
        RefusedError: LEDGER_RESTORED, the witness is ahead of the ledger; STORE_OF_ANOTHER, it is not this home's.
    """

    def __init__(
        self,
        path: Path,
        *,
        witness: Path | None = None,
        create: bool = False,
        read_only: bool = False,
        restoring: bool = False,
        participant: str | None = None,
        clock: Callable[[], str] = utc_now,
    ) -> None:
        # Read before the ledger: a guard that commits in between is then ahead of the witness, which is no fault.
        seen = store_witness.read_witness(witness) if witness else None
        super().__init__(Database(path, create=create, read_only=read_only), clock)
        self._witness = witness
        self._witnessed = seen
        self._chains = Chains(self._db)
        self._outbox = Outbox(self._db)
        self._restoring = restoring
        self._behind = False
        try:
            with self._db.reading():
                _check_owner(participant, self.data_sets(), path)
                hashes = {data_set: chain.hashes for data_set, chain in self._chains.every()}
            if seen is not None and not restoring:
                store_witness.check_witness(seen, hashes, witness)
            self._check_signed(participant)
            # A crash may have come between a commit and the witness. An absent one stays a fact for `status` until the
            # next commit.
            if seen is not None and not restoring and not read_only:
                self._publish()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Contracts that charge

    def add_contract(self, signed: bytes, terms: Terms, run_key_name: str, run_public: str) -> None:
        """Keep a contract that is about to be signed here, if its whole plan fits into the data set's budget.

        Args:
            signed: The contract as it travels (`SignedContract`, canonical bytes).
            terms: What it fixes for this agent (`Terms.of`).
            run_key_name: Where the run key is kept.
            run_public: The run key's public half, hexadecimal.

        Raises:
            InputError: DATA_SET_UNKNOWN; CONTRACT_ID, the terms are another contract's; CONTRACT_KNOWN; RUN_KEY_FORM.
            RefusedError: BUDGET_EXCEEDED.
        """
        travelling = SignedContract.parse(parse_canonical(signed, what="signed contract"), code="SIGNED_CONTRACT")
        if sha256_hex(travelling.contract.body) != terms.contract_id:
            raise InputError(
                "CONTRACT_ID",
                "The terms are those of another contract.",
                field="contract_id",
                remedy="Sign with terms made from the same contract.",
            )
        if not re.fullmatch("[0-9a-f]{64}", run_public):
            raise InputError(
                "RUN_KEY_FORM", "A run key's public half is 64 hexadecimal characters.", field="run_public"
            )
        agreement = Agreement(
            contract_id=terms.contract_id,
            state="signed",
            terms=terms,
            run_key_name=run_key_name,
            run_public=run_public,
            signed=signed,
        )
        with self._db.transaction():
            if self._db.one("SELECT 1 FROM contracts WHERE contract_id = ?", (terms.contract_id,)):
                raise InputError(
                    "CONTRACT_KNOWN",
                    "This contract was signed here before.",
                    field=terms.contract_id,
                    remedy="`fedpact-agent contract list` shows it; there is nothing more to sign.",
                )
            limit = self._data_set(terms.data_set).limit
            ledger.check_plans(self._chains.get(terms.data_set).rows, self._running(terms.data_set), terms, limit)
            self._insert_contract(agreement)

    def replace_signed(self, contract_id: str, signed: bytes) -> None:
        """Keep the same contract with more signatures on it.

        Raises:
            InputError: CONTRACT_UNKNOWN; CONTRACT_ID, these are another contract's bytes.
        """
        travelling = SignedContract.parse(parse_canonical(signed, what="signed contract"), code="SIGNED_CONTRACT")
        if sha256_hex(travelling.contract.body) != contract_id:
            raise InputError(
                "CONTRACT_ID",
                "These are the bytes of another contract.",
                field="contract_id",
                remedy="Fetch the contract again from the operator.",
            )
        with self._db.transaction():
            self._contract(contract_id)
            self._db.execute("UPDATE contracts SET signed = ? WHERE contract_id = ?", (signed, contract_id))

    def check_running(self, contract_id: str) -> None:
        """Raise where the contract has ended here, or a person has paused it.

        Raises:
            InputError: CONTRACT_UNKNOWN.
            RefusedError: PARTICIPANT_PAUSED, PARTICIPANT_WITHDRAWN, CONTRACT_NOT_RUNNING.
        """
        _check_state(self.contract(contract_id), OVER | {"paused"})

    # The budget ledger

    def reserve(
        self,
        contract_id: str,
        round_number: int,
        base_digest: str,
        run_key: Ed25519PrivateKey,
        kind: MeasurementKind | None = None,
    ) -> Reservation | Ready:
        """Transaction 1: charge one attempt, or hand out the bytes that answer this round already.

        A measurement has a `kind` and the round 0.

        Raises:
            InputError: CONTRACT_UNKNOWN, RUN_KEY_WRONG, LEDGER_REQUEST.
            RefusedError: as `check_running`, or what `ledger.next_reserved` refuses.
            FailedError: the disk or the witness failed; the attempt may be charged, nothing may leave.
        """
        with self._committing():
            agreement = self._contract(contract_id)
            _check_state(agreement, OVER)
            if ready := self._outbox.get(contract_id, round_number, base_digest):
                return ready
            _check_state(agreement, OVER | {"signed", "paused"})
            request = Request.parse(
                {"terms": agreement.terms, "round": round_number, "base_digest": base_digest, "kind": kind},
                code="LEDGER_REQUEST",
            )
            data_set = self._data_set(agreement.terms.data_set)
            row = ledger.next_reserved(self._chains.get(data_set.data_set).rows, request, data_set.limit)
            self._append(row, agreement, run_key)
        return row

    def complete(
        self,
        reservation: Reservation,
        build: Callable[[str], tuple[bytes, bytes]],
        update_digest: str,
        run_key: Ed25519PrivateKey,
    ) -> Ready:
        """Transaction 2: end the attempt with its one output; what it returns may leave.

        `build` gets the new ledger head and returns the signed reply and the array (little-endian float32). It runs
        inside the transaction: it signs, and does nothing slow. If it raises, nothing has happened.

        Raises:
            InputError: RUN_KEY_WRONG; UPDATE_DIGEST, the array is not the one that the ledger row names.
            RefusedError: ATTEMPT_UNKNOWN, ATTEMPT_ENDED, ATTEMPT_SUPERSEDED, OUTBOX_TAKEN, or as `check_running`.
            FailedError: the disk or the witness failed; ask `reserve` again.
        """
        with self._committing():
            agreement = self._contract(reservation.contract_id)
            _check_state(agreement, OVER | {"paused"})
            row = ledger.next_spent(self._chains.get(reservation.data_set).rows, reservation, update_digest)
            self._append(row, agreement, run_key)
            reply, array = build(row.row_hash)
            if digest_of_update(array) != update_digest:
                raise InputError("UPDATE_DIGEST", "The array is not the one that the ledger names.", field="array")
            ready = Ready(kind="update", reply=reply, array=array)
            self._outbox.put(row.contract_id, row.round, str(row.base_digest), ready, update_digest)
        return ready

    def fail(
        self, reservation: Reservation, code: str, build: Callable[[str], bytes], run_key: Ed25519PrivateKey
    ) -> Ready:
        """Transaction 2 of an attempt that data or output made fail: charged, refused, never tried again.

        Raises:
            InputError: RUN_KEY_WRONG, CONTRACT_UNKNOWN.
            RefusedError: ATTEMPT_UNKNOWN, ATTEMPT_ENDED, ATTEMPT_SUPERSEDED, OUTBOX_TAKEN.
            FailedError: the disk or the witness failed; ask `reserve` again.
        """
        with self._committing():
            agreement = self._contract(reservation.contract_id)
            row = ledger.next_failed(self._chains.get(reservation.data_set).rows, reservation, code)
            self._append(row, agreement, run_key)
            ready = Ready(kind="refusal", reply=build(row.row_hash), array=b"")
            self._outbox.put(row.contract_id, row.round, str(row.base_digest), ready)
        return ready

    def refuse(self, contract_id: str, round_number: int, base_digest: str, build: Callable[[str], bytes]) -> Ready:
        """Keep a refusal that costs nothing: policy, or an order that does not fit. It is final for this order.

        The operator logs it, so asking again for this round and base gets the same bytes. Only for orders whose
        signature is the operator's: others get no answer that is kept.

        Raises:
            InputError: CONTRACT_UNKNOWN.
            RefusedError: OUTBOX_TAKEN or ROUND_DONE, an update answers this order already; nothing more is sent.
        """
        with self._committing():
            agreement = self._contract(contract_id)
            if known := self._outbox.get(contract_id, round_number, base_digest):
                if known.kind == "update":
                    raise taken(round_number)
                return known
            head = ledger.ledger_head(self._chains.get(agreement.terms.data_set).rows)
            ready = Ready(kind="refusal", reply=build(head), array=b"")
            self._outbox.put(contract_id, round_number, base_digest, ready)
        return ready

    def discard_arrays(self, contract_id: str, before_round: int) -> int:
        """Drop the arrays of updates that the log has decided, to free the disk; how many. Replies and digests stay.

        A round without its array is answered with ROUND_DONE.
        """
        with self._db.transaction():
            return self._outbox.discard_arrays(contract_id, before_round)

    def destroy_arrays(self, contract_id: str) -> int:
        """Overwrite every array that was made for a contract that is over; how many. Replies and digests stay."""
        with self._db.transaction():
            return self._outbox.destroy_arrays(contract_id)

    def rows(self, data_set: str) -> tuple[LedgerRow, ...]:
        """The data set's ledger."""
        with self._db.reading():
            return tuple(self._chains.get(data_set).rows)

    def ledger_head(self, data_set: str) -> str:
        """The hash of the data set's last row; GENESIS while there is none."""
        return ledger.ledger_head(self.rows(data_set))

    def budget(self, data_set: str) -> Budget:
        """Where the data set stands.

        Raises:
            InputError: DATA_SET_UNKNOWN.
        """
        with self._db.reading():
            declared, rows = self._data_set(data_set), self._chains.get(data_set).rows
            return Budget(
                alpha=declared.alpha,
                limit=declared.limit,
                charged=ledger.charged(rows),
                committed=ledger.committed(rows, self._running(data_set)),
            )

    def uses(self, data_set: str) -> int:
        """How often all contracts together have used the data set (`ledger.uses`)."""
        with self._db.reading():
            every = [a.terms for a in self._agreements() if a.terms.data_set == data_set]
            return ledger.uses(self._chains.get(data_set).rows, every)

    def answers(self, contract_id: str) -> list[int]:
        """Rounds of the contract that this agent answered, by an update or a refusal, ascending."""
        with self._db.reading():
            return self._outbox.rounds(contract_id)

    def sent_updates(self, contract_id: str) -> dict[int, str]:
        """By round, the digest of the one update that this agent made for the contract.

        Raises:
            InputError: CONTRACT_UNKNOWN.
        """
        with self._db.reading():
            rows = self._chains.get(self._contract(contract_id).terms.data_set).rows
            own = [r for r in rows if r.contract_id == contract_id and r.state == "spent" and r.kind is None]
            return {r.round: str(r.update_digest) for r in own}

    def sent_measurements(self, contract_id: str) -> dict[MeasurementKind, str]:
        """By kind, the digest of what this agent measured for the contract.

        Raises:
            InputError: CONTRACT_UNKNOWN.
        """
        with self._db.reading():
            rows = self._chains.get(self._contract(contract_id).terms.data_set).rows
            own = [r for r in rows if r.contract_id == contract_id and r.state == "spent"]
            return {r.kind: str(r.update_digest) for r in own if r.kind is not None}

    # Old copies

    def check_logged_head(self, data_set: str, head: str) -> None:
        """Raise unless the head that the log last showed of this agent is on our chain (which may be longer).

        Raises:
            RefusedError: LEDGER_RESTORED.
        """
        with self._db.reading():
            store_witness.check_logged(data_set, self._chains.get(data_set).hashes, head)

    def witness_status(self) -> Literal["none", "absent", "behind", "current"]:
        """For `status`: no witness is configured, its file is not there, or it is behind the ledger, or current."""
        if self._witness is None:
            return "none"
        found = store_witness.read_witness(self._witness)
        if found is None:
            return "absent"
        with self._db.reading():
            return "current" if found == self._chains.marks() else "behind"

    def write_off(self, run_keys: Mapping[str, Ed25519PrivateKey]) -> list[LedgerRow]:
        """After an old copy was restored: charge all that the contracts in it have left; the rows appended.

        A contract whose run key (by contract id) is not at hand gets an unsigned row. Where the witness saw more
        charged than even that, by contracts that this copy does not know, the difference is charged too.

        Raises:
            InputError: RUN_KEY_WRONG; DATA_SET_UNKNOWN, the witness saw a data set that must be declared again first.
        """
        added: list[LedgerRow] = []
        with self._committing(writing_off=True):
            for agreement in self._agreements():
                rows = self._chains.get(agreement.terms.data_set).rows
                if agreement.state in OVER or ledger.written_off(rows, agreement.contract_id):
                    continue
                added.append(ledger.next_restored(rows, agreement.terms))
                if key := run_keys.get(agreement.contract_id):
                    self._append(added[-1], agreement, key)
                else:
                    self._chains.append(added[-1], [])
            for data_set, mark in sorted(self._witnessed.marks.items() if self._witnessed else ()):
                self._data_set(data_set)
                if row := ledger.next_lost(self._chains.get(data_set).rows, data_set, mark.charged):
                    added.append(row)
                    self._chains.append(row, [])
        return added

    def backup(self, target: Path) -> None:
        """Copy the store as of its last commit to a new file; the witness stays out of backups.

        Raises:
            InputError: STORE_EXISTS.
        """
        self._db.copy_to(target)

    def check_integrity(self) -> None:
        """Read the whole file; the ledgers were verified when it was opened.

        Raises:
            InputError: STORE_DAMAGED.
        """
        self._db.check_integrity()

    # Inside a transaction

    def _check_signed(self, participant: str | None) -> None:
        """What stands beside a signed card or contract follows from it: writing into the file buys no budget.

        Raises:
            InputError: STORE_DAMAGED.
        """
        if participant is None:
            return
        checks = [
            *((f"data set {d.data_set}", partial(_card_says, d, participant)) for d in self.data_sets()),
            *(
                (
                    f"contract {a.contract_id}",
                    partial(_contract_says, a, participant, self._chains.get(a.terms.data_set).rows),
                )
                for a in self._agreements()
                if a.state not in OVER
            ),
        ]
        for what, says in checks:
            try:
                if says():
                    continue
            except (FaultError, InputError) as err:
                raise self._db.damaged(f"what was signed for {what} does not hold ({err.code})") from err
            raise self._db.damaged(f"it says something else of {what} than was signed here")

    @contextmanager
    def _committing(self, *, writing_off: bool = False) -> Iterator[None]:
        """A transaction over the ledger or the outbox; the witness is current before anything may leave.

        Nothing is charged that could then not be witnessed, nor while an earlier commit is not. An old copy's witness
        stays as it is until the copy is written off.
        """
        with self._db.lock:
            if self._restoring and not writing_off:
                raise RuntimeError("this old copy must be written off before it is used")
            if self._witness:
                store_witness.check_writable(self._witness)
            if self._behind:
                self._publish()
            try:
                with self._db.transaction():
                    yield
            except BaseException:
                self._chains.forget()
                raise
            self._chains.settle()
            self._restoring, self._behind = False, True
            self._publish()

    def _running(self, data_set: str) -> list[Terms]:
        """Terms of the contracts that may still charge this data set."""
        return [a.terms for a in self._agreements() if a.terms.data_set == data_set and a.state not in OVER]

    def _append(self, row: LedgerRow, agreement: Agreement, run_key: Ed25519PrivateKey) -> None:
        if public_hex(run_key) != agreement.run_public:
            raise InputError(
                "RUN_KEY_WRONG",
                "This is not the run key that was delegated for the contract.",
                field=f"contract {row.contract_id}",
                file=agreement.run_key_name,
            )
        self._chains.append(row, [run_key])

    def _publish(self) -> None:
        """Bring the witness up to the ledger. The write lock keeps two processes from writing it in the wrong order."""
        if self._witness is None:
            self._behind = False
            return
        with self._db.transaction():
            marks = self._chains.marks()
            if marks != self._witnessed:
                store_witness.write_witness(self._witness, marks)
                self._witnessed = marks
            self._behind = False


def _check_owner(participant: str | None, data_sets: Iterable[DataSet], path: Path) -> None:
    for data_set in data_sets:
        if participant is not None and data_set.participant != participant:
            raise RefusedError(
                "STORE_OF_ANOTHER",
                f"The data set {data_set.data_set} in this store was declared by another participant.",
                file=path,
                field=f"participant {data_set.participant}",
                rule="what was spent on a data set stands in the ledger of its own home",
                remedy="Put this home's own agent.db back; if it is lost, a backup, then run `fedpact-agent restore`.",
            )


def _card_says(data_set: DataSet, participant: str) -> bool:
    """Whether this is the data set, and the budget, of its newest card, which its participant signed."""
    envelope = read_envelope(data_set.card)
    card, keys = DataSetCard.from_bytes(envelope.body), signers(envelope, DataSetCard)
    limit = filter_limit(card.epsilon, card.delta, card.alpha)
    said = (card.data_set, card.participant, card.epsilon, card.delta, card.alpha, limit)
    here = (data_set.data_set, participant, data_set.epsilon, data_set.delta, data_set.alpha, data_set.limit)
    return said == here and participant in {fingerprint(key) for key in keys}


def _contract_says(agreement: Agreement, participant: str, rows: Iterable[LedgerRow]) -> bool:
    """Whether these are the terms of the contract that the participant signed, and the key that it delegated.

    What one attempt costs takes the accountant to work out; here it must be what earlier ones were charged.
    """
    travelling = SignedContract.parse(parse_canonical(agreement.signed, what="signed contract"), code="SIGNED_CONTRACT")
    contract, terms = Contract.from_bytes(travelling.contract.body), agreement.terms
    own_key = contract.participant(participant).key
    keys = [Delegation.from_bytes(d.body) for d in travelling.delegations if own_key in signers(d, Delegation)]
    costs = {row.rdp for row in rows if (row.contract_id, row.kind, row.state) == (contract.id, None, "reserved")}
    return (
        own_key in signers(travelling.contract, Contract)
        and (contract.id, agreement.run_public) in {(k.contract_id, k.run_key) for k in keys}
        and (contract.id, costs | {terms.rdp}) == (agreement.contract_id, {terms.rdp})
        and Terms.of(contract, participant, terms.rdp, {m.kind: m.rdp for m in terms.measurements}) == terms
    )


STATE_CODES: dict[ContractState, str] = {"paused": "PARTICIPANT_PAUSED", "withdrawn": "PARTICIPANT_WITHDRAWN"}
"""The codes with which a contract that this enterprise itself has stopped refuses orders."""


def _check_state(agreement: Agreement, not_in: frozenset[ContractState]) -> None:
    if agreement.state in not_in:
        raise RefusedError(
            STATE_CODES.get(agreement.state, "CONTRACT_NOT_RUNNING"),
            f"The contract is {agreement.state}.",
            field=f"contract {agreement.contract_id}",
            remedy="`fedpact-agent resume` continues a paused contract; a withdrawn or closed one has ended.",
        )
