"""The budget ledger of one data set: its rows, and the rules by which one row may follow another.

Every attempt at a round is charged once, in full, when it is reserved, whatever becomes of it: spent, failed, or
crashed without a word. The gate is a Rényi filter at the data set's one order alpha (Feldman and Zrnic 2021,
"Individual privacy accounting via a Rényi filter"): the sum of the divergences of all attempts, rounded up, never
exceeds the limit R. Pure: rows in, the next row or a refusal out. Whoever keeps the rows must make this check and the
append one transaction.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import Contract, Count, MeasurementKind
from fedpact_contract.errors import FaultError, RefusedError
from fedpact_contract.messages import measurement_event, release_event
from fedpact_contract.record import Code, Dec, Hex32, Part, Record

GENESIS = sha256_hex(b"fedpact.ledger.v1")
"""What stands for the hash of a previous row in the first row, and for the head of an empty ledger."""

NO_CONTRACT = "0" * 64
"""The contract id of a row that writes off charges whose contract was lost with the tail of the ledger."""

UPWARD = Context(prec=60, rounding=ROUND_CEILING)
"""Sums of charges never round down, however many digits the summands have."""

EVENT = {"data_set", "contract_id", "steps", "sample_rate", "noise_multiplier", "max_grad_norm", "rdp"}
ATTEMPT = EVENT | {"kind", "round", "attempt", "base_digest"}
"""Fields that a contract's terms fix for each attempt, and those that an attempt's last row has from its first."""

State = Literal["reserved", "spent", "failed", "restored"]
Natural = Annotated[int, Field(ge=0, le=2**53 - 1)]


class MeasurementTerms(Part):
    """What one measurement outside the rounds costs: `steps` Gaussian steps with this Rényi divergence in all."""

    kind: MeasurementKind
    steps: Count
    sample_rate: Dec
    noise_multiplier: Dec
    max_grad_norm: Dec
    rdp: Dec


class Terms(Part):
    """What a signed contract fixes for the attempts on one data set.

    At most `rounds` rounds with one attempt each and `spare_attempts` further ones over the whole contract; one
    attempt is `steps` Poisson-sampled Gaussian steps (at client level, one release of the operator's) and costs `rdp`,
    the Rényi divergence at the data set's alpha, rounded up. Each of the `measurements` may be made once, in one
    attempt.
    """

    contract_id: Hex32
    data_set: Code
    rounds: Count
    spare_attempts: Annotated[int, Field(ge=0, le=1000)]
    steps: Count
    sample_rate: Dec
    noise_multiplier: Dec
    max_grad_norm: Dec
    rdp: Dec
    measurements: tuple[MeasurementTerms, ...] = ()

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.sample_rate, self.noise_multiplier, self.max_grad_norm, self.rdp) <= 0:
            raise ValueError("privacy quantities must be greater than 0")
        return self

    @classmethod
    def of(
        cls,
        contract: Contract,
        participant: str,
        rdp: Decimal,
        measured: Mapping[MeasurementKind, Decimal] | None = None,
    ) -> Self:
        """The terms of this participant; `rdp` is the cost of one attempt, `measured` that of each measurement.

        The caller has rounded them up.

        Raises:
            InputError: not a participant of the contract, or a quantity that is not positive.
        """
        values = {
            "contract_id": contract.id,
            "data_set": contract.participant(participant).data_set,
            "rounds": contract.training.rounds,
            "spare_attempts": contract.privacy.spare_attempts,
            **release_event(contract).model_dump(exclude={"sampling"}),
            "rdp": rdp,
            "measurements": [
                measurement_event(contract, kind).model_dump(exclude={"sampling"}) | {"kind": kind, "rdp": cost}
                for kind, cost in sorted((measured or {}).items())
            ],
        }
        return cls.parse(values, code="LEDGER_TERMS")

    @property
    def planned_attempts(self) -> int:
        """Attempts that the plan, and so epsilon, covers."""
        return self.rounds + self.spare_attempts

    @property
    def planned_uses(self) -> int:
        """How often the contract may use the data: attempts, and measurements."""
        return self.planned_attempts + len(self.measurements)


class Request(Part):
    """A request to train `round` of a contract from the model with this digest; or, as round 0, for a measurement."""

    terms: Terms
    round: Natural
    base_digest: Hex32
    kind: MeasurementKind | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.round == 0) != (self.kind is not None):
            raise ValueError("a measurement, and nothing else, is of round 0")
        return self


class LedgerRow(Record):
    """One step of one attempt, chained to the row before it; signed by the contract's run key.

    `reserved` charges `rdp`; `spent` (with the update's digest) or `failed` (with a code) ends that attempt and
    charges nothing more. `restored` charges what a contract had left when an old copy of the ledger was brought back;
    it belongs to no round (round and attempt are 0) and may be unsigned, since it only takes budget away. A measurement
    has a `kind` and is an attempt of round 0.
    """

    TYPE = "ledger-row"

    data_set: Code
    contract_id: Hex32
    kind: MeasurementKind | None = None
    round: Natural
    attempt: Natural
    state: State
    base_digest: Hex32 | None = None
    steps: Natural
    sample_rate: Dec
    noise_multiplier: Dec
    max_grad_norm: Dec
    rdp: Dec
    update_digest: Hex32 | None = None
    code: Code | None = None
    seq: Natural
    previous: Hex32

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.state == "spent") != (self.update_digest is not None):
            raise ValueError("a spent row, and no other, names the update's digest")
        if (self.state == "failed") != (self.code is not None):
            raise ValueError("a failed row, and no other, has a code")
        if self.state == "restored":
            if (self.round, self.attempt, self.base_digest, self.kind) != (0, 0, None, None) or self.rdp < 0:
                raise ValueError("a restored row has no round, attempt or base model, and no negative charge")
        elif (self.round == 0) != (self.kind is not None):
            raise ValueError("a measurement, and no other attempt, is of round 0")
        elif not (self.attempt and self.base_digest and self.steps) or self.rdp <= 0:
            raise ValueError("an attempt has a round, a number, a base model, steps and a charge")
        return self

    @property
    def row_hash(self) -> str:
        """SHA-256 of the canonical bytes: what the next row names, and the ledger's head while there is none."""
        return self.digest()


def ledger_head(rows: Sequence[LedgerRow]) -> str:
    """The hash of the last row, or GENESIS."""
    return rows[-1].row_hash if rows else GENESIS


def charged(rows: Iterable[LedgerRow]) -> Decimal:
    """The sum of the Rényi divergences of all attempts, at the data set's alpha; rounded up, never down."""
    with localcontext(UPWARD):
        return sum((r.rdp for r in rows if r.state in ("reserved", "restored")), Decimal(0))


def charged_steps(rows: Iterable[LedgerRow], contract_id: str) -> int:
    """DP-SGD steps in rounds that one contract was charged."""
    charges = ("reserved", "restored")
    return sum(r.steps for r in rows if r.contract_id == contract_id and r.kind is None and r.state in charges)


def measured(rows: Iterable[LedgerRow], contract_id: str) -> list[LedgerRow]:
    """The rows that reserved a contract's measurements."""
    return [r for r in rows if r.contract_id == contract_id and r.kind is not None and r.state == "reserved"]


def attempts(rows: Iterable[LedgerRow], contract_id: str) -> int:
    """Attempts at rounds reserved so far for one contract."""
    return sum(r.contract_id == contract_id and r.state == "reserved" and r.kind is None for r in rows)


def uses(rows: Sequence[LedgerRow], contracts: Iterable[Terms]) -> int:
    """How often these contracts have used the data: attempts at rounds, and measurements; all planned once written off.

    An attempt counts whatever became of it, as its charge does.
    """
    return sum(
        terms.planned_uses
        if written_off(rows, terms.contract_id)
        else attempts(rows, terms.contract_id) + len(measured(rows, terms.contract_id))
        for terms in contracts
    )


def uses_left(rows: Sequence[LedgerRow], terms: Terms) -> int:
    """How often a contract may still use the data."""
    return terms.planned_uses - uses(rows, [terms])


def written_off(rows: Iterable[LedgerRow], contract_id: str) -> bool:
    """Whether the contract counts as fully spent since an old copy of the ledger was restored."""
    return any(r.contract_id == contract_id and r.state == "restored" for r in rows)


def committed(rows: Sequence[LedgerRow], running: Iterable[Terms]) -> Decimal:
    """What is charged, and what the running contracts may still charge."""
    with localcontext(UPWARD):
        return sum((_left(rows, terms) for terms in running), charged(rows))


def check_plans(rows: Sequence[LedgerRow], running: Iterable[Terms], new: Terms, limit: Decimal) -> None:
    """Raise unless the whole plan of a new contract fits beside what is charged and the other signed plans.

    Raises:
        RefusedError: BUDGET_EXCEEDED.
    """
    total = committed(rows, [*running, new])
    if total > limit:
        raise RefusedError(
            "BUDGET_EXCEEDED",
            f"With this contract's {new.planned_attempts} planned attempts the data set would be charged {total:.6g} "
            f"of {limit:.6g} (Rényi divergence).",
            field=f"data set {new.data_set}",
            rule="the plans of all signed contracts fit into the data set's budget",
            remedy="Sign a contract with fewer rounds or more noise, or close one that will not go on.",
        )


def next_reserved(rows: Sequence[LedgerRow], request: Request, limit: Decimal) -> LedgerRow:
    """The row that reserves one more attempt, or a measurement.

    Raises:
        RefusedError: ROUND_NOT_PLANNED, LEDGER_RESTORED, BASE_MODEL_CHANGED, ROUND_DONE, ROUND_FAILED,
            ROUND_BACKWARDS, ATTEMPTS_EXHAUSTED, MEASUREMENT_NOT_PLANNED, MEASUREMENT_DONE or BUDGET_EXCEEDED.
    """
    terms = request.terms
    event, cost = terms.model_dump(include=EVENT), terms.rdp
    own = [r for r in rows if r.contract_id == terms.contract_id and r.kind == request.kind]
    again: list[LedgerRow] = []
    if written_off(rows, terms.contract_id):
        raise _restored_error(terms.contract_id)
    if request.kind is None:
        _check_round(own, request)
        tries = [r for r in own if r.state == "reserved"]
        again = [r for r in tries if r.round == request.round]
        _check_attempts(tries, again, terms)
    else:
        measurement = _measurement(own, terms, request.kind)
        event, cost = event | measurement.model_dump(exclude={"kind"}), measurement.rdp
    with localcontext(UPWARD):
        total = charged(rows) + cost
    if total > limit:
        raise RefusedError(
            "BUDGET_EXCEEDED",
            f"This attempt would bring the data set's charge to {total:.6g}, above its limit {limit:.6g} "
            "(Rényi divergence).",
            field=f"data set {terms.data_set}",
            rule="the sum of all attempts stays within the limit on the data set's card",
            remedy="Nothing more can be trained on this data set.",
        )
    return _row(
        rows,
        event,
        kind=request.kind,
        round=request.round,
        attempt=len(again) + 1,
        state="reserved",
        base_digest=request.base_digest,
    )


def next_spent(rows: Sequence[LedgerRow], reservation: LedgerRow, update_digest: str) -> LedgerRow:
    """The row that ends an attempt with its one output.

    Raises:
        RefusedError: the attempt is not open: ATTEMPT_UNKNOWN, ATTEMPT_ENDED or ATTEMPT_SUPERSEDED.
        InputError: LEDGER_ROW, a malformed digest or code.
    """
    _check_open(rows, reservation)
    return _row(rows, reservation.model_dump(include=ATTEMPT), state="spent", update_digest=update_digest)


def next_failed(rows: Sequence[LedgerRow], reservation: LedgerRow, code: str) -> LedgerRow:
    """The row that ends an attempt that data or output made fail; the round is never tried again.

    Raises:
        RefusedError: the attempt is not open: ATTEMPT_UNKNOWN, ATTEMPT_ENDED or ATTEMPT_SUPERSEDED.
        InputError: LEDGER_ROW, a malformed digest or code.
    """
    _check_open(rows, reservation)
    return _row(rows, reservation.model_dump(include=ATTEMPT), state="failed", code=code)


def next_restored(rows: Sequence[LedgerRow], terms: Terms) -> LedgerRow:
    """The row that charges all that a contract has left, after an old copy of the ledger was restored.

    Raises:
        RefusedError: LEDGER_RESTORED, the contract is written off already.
    """
    if written_off(rows, terms.contract_id):
        raise _restored_error(terms.contract_id)
    left, rdp = _attempts_left(rows, terms), _left(rows, terms)
    event = terms.model_dump(include=EVENT) | {"steps": left * terms.steps, "rdp": rdp}
    return _row(rows, event, round=0, attempt=0, state="restored")


def next_lost(rows: Sequence[LedgerRow], data_set: str, seen: Decimal) -> LedgerRow | None:
    """The row that charges what a witness saw charged beyond these rows, by contracts that they do not know."""
    with localcontext(UPWARD):
        rdp = seen - charged(rows)
    if rdp <= 0:
        return None
    event = {"data_set": data_set, "contract_id": NO_CONTRACT, "steps": 0, "rdp": rdp}
    unknown = dict.fromkeys(("sample_rate", "noise_multiplier", "max_grad_norm"), Decimal(0))
    return _row(rows, event | unknown, round=0, attempt=0, state="restored")


class Replay:
    """Reads a ledger's rows in order; raises at the first row that may not stand where it stands.

    What it checks needs no contract: numbers and hashes, one open attempt a contract, attempts in order, rounds that
    only increase, one end an attempt, nothing after spent, failed or restored that would be a second try.
    """

    def __init__(self) -> None:
        self._seq = 0
        self._head = GENESIS
        self._data_set: str | None = None
        self._last: dict[tuple[str, MeasurementKind | None], LedgerRow] = {}  # by contract and kind: the last row

    def add(self, row: LedgerRow) -> None:
        """Take the next row.

        Raises:
            FaultError: LEDGER_CHAIN, naming the row's place and the broken rule.
        """
        last, ended = self._last.get((row.contract_id, row.kind)), self._last.get((row.contract_id, None))
        written_off = row.kind is not None and ended is not None and ended.state == "restored"
        for rule, holds in (
            ("rows are numbered from 0 without a gap", row.seq == self._seq),
            ("each row names the hash of the row before it", row.previous == self._head),
            ("all rows are of one data set", self._data_set in (None, row.data_set)),
            ("a row fits the contract's last row", _may_follow(last, row) and not written_off),
        ):
            if not holds:
                raise FaultError(
                    "LEDGER_CHAIN",
                    f"The budget ledger of {self._data_set or row.data_set} is broken at row {self._seq}.",
                    field=f"row {self._seq}",
                    rule=rule,
                    remedy="Rows were changed, removed or mixed: restore a backup, then run `fedpact-agent restore`.",
                )
        self._seq, self._head, self._data_set = row.seq + 1, row.row_hash, row.data_set
        self._last[row.contract_id, row.kind] = row


def check_chain(rows: Iterable[LedgerRow]) -> None:
    """Raise unless the rows are a whole, well-ordered ledger of one data set.

    Raises:
        FaultError: LEDGER_CHAIN, naming the first row that is wrong.
    """
    replay = Replay()
    for row in rows:
        replay.add(row)


def _attempts_left(rows: Sequence[LedgerRow], terms: Terms) -> int:
    if written_off(rows, terms.contract_id):
        return 0
    return max(0, terms.planned_attempts - attempts(rows, terms.contract_id))


def _left(rows: Sequence[LedgerRow], terms: Terms) -> Decimal:
    """What the contract may still charge."""
    if written_off(rows, terms.contract_id):
        return Decimal(0)
    done = {row.kind for row in measured(rows, terms.contract_id)}
    with localcontext(UPWARD):
        ahead = sum((m.rdp for m in terms.measurements if m.kind not in done), Decimal(0))
        return _attempts_left(rows, terms) * terms.rdp + ahead


def _measurement(own: Sequence[LedgerRow], terms: Terms, kind: MeasurementKind) -> MeasurementTerms:
    """What the measurement costs: it is planned, and was not begun before."""
    found = next((m for m in terms.measurements if m.kind == kind), None)
    if found is None:
        raise RefusedError("MEASUREMENT_NOT_PLANNED", f"The contract asks for no {kind}.", field=kind)
    if own:
        raise RefusedError(
            "MEASUREMENT_DONE",
            f"The {kind} were measured, or the attempt was lost in a crash; it is charged.",
            field=kind,
            rule="a measurement is made once, in one attempt",
        )
    return found


def _check_round(own: Sequence[LedgerRow], request: Request) -> None:
    number, where = request.round, f"round {request.round}"
    if number > request.terms.rounds:
        raise RefusedError("ROUND_NOT_PLANNED", "The contract has fewer rounds.", field=where)
    here = [r for r in own if r.round == number]
    if any(r.base_digest != request.base_digest for r in here):
        raise RefusedError(
            "BASE_MODEL_CHANGED",
            "This round was begun from another base model.",
            field=where,
            rule="one contract and round has one base model",
            remedy="Ask the operator why one round has two models; nothing is trained.",
        )
    if any(r.state == "spent" for r in here):
        raise RefusedError("ROUND_DONE", "This round has its one update already.", field=where)
    if any(r.state == "failed" for r in here):
        raise RefusedError(
            "ROUND_FAILED",
            "An attempt at this round failed because of data or output, and such a round is never tried again.",
            field=where,
        )
    if any(r.round > number for r in own):
        raise RefusedError("ROUND_BACKWARDS", "A later round of this contract was begun already.", field=where)


def _check_attempts(tries: Sequence[LedgerRow], again: Sequence[LedgerRow], terms: Terms) -> None:
    """One attempt a round is planned; each further one takes one of the contract's spares."""
    spares_used = len(tries) - len({r.round for r in tries})
    if len(tries) >= terms.planned_attempts or (again and spares_used >= terms.spare_attempts):
        raise RefusedError(
            "ATTEMPTS_EXHAUSTED",
            f"The contract's spare attempts ({terms.spare_attempts}) are used up.",
            field=f"round {again[0].round}" if again else None,
            rule="attempts never exceed rounds + spare_attempts, which the signed plan covers",
            remedy="This participant misses the round; the next one is not affected.",
        )


def _check_open(rows: Sequence[LedgerRow], reservation: LedgerRow) -> None:
    where = f"round {reservation.round}, attempt {reservation.attempt}"
    place = reservation.seq
    known = place < len(rows) and rows[place] == reservation
    if not known or reservation.state != "reserved":
        raise RefusedError("ATTEMPT_UNKNOWN", "This attempt is not reserved in the ledger.", field=where)
    for row in rows[place + 1 :]:
        if row.contract_id != reservation.contract_id or (row.kind != reservation.kind and row.state != "restored"):
            continue
        if row.state in ("spent", "failed"):
            raise RefusedError("ATTEMPT_ENDED", "This attempt has ended already.", field=where)
        raise RefusedError("ATTEMPT_SUPERSEDED", "A later attempt was begun, or the contract written off.", field=where)


def _row(rows: Sequence[LedgerRow], copied: Mapping[str, Any], **own: Any) -> LedgerRow:  # noqa: ANN401 - fields
    return LedgerRow.parse({**copied, **own, "seq": len(rows), "previous": ledger_head(rows)}, code="LEDGER_ROW")


def _restored_error(contract_id: str) -> RefusedError:
    return RefusedError(
        "LEDGER_RESTORED",
        "The contract counts as fully spent since an old copy of the ledger was restored.",
        field=f"contract {contract_id}",
        remedy="It cannot go on here; a new contract can, within what is left of the data set's budget.",
    )


def _may_follow(last: LedgerRow | None, row: LedgerRow) -> bool:
    """Whether `row` may come after `last`, the last row of the same contract."""
    if row.contract_id == NO_CONTRACT or row.state == "restored":
        return row.state == "restored" and (row.contract_id == NO_CONTRACT or last is None or last.state != "restored")
    if row.state != "reserved":  # an end: of the attempt that is open, with the same parameters
        return last is not None and last.state == "reserved" and _same_attempt(last, row)
    if last is None or row.round > last.round:
        return row.attempt == 1 and (last is None or last.state != "restored")
    crashed = last.state == "reserved" and row.round == last.round and row.attempt == last.attempt + 1
    return crashed and row.base_digest == last.base_digest


def _same_attempt(first: LedgerRow, second: LedgerRow) -> bool:
    return first.model_dump(include=ATTEMPT) == second.model_dump(include=ATTEMPT)
