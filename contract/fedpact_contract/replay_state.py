"""What a replay knows of a run after the entries read so far."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedpact_contract.contract import MeasurementKind
from fedpact_contract.errors import FaultError, FedpactError
from fedpact_contract.log import (
    BaselinesScored,
    Checkpoint,
    Findings,
    Moments,
    PeriodSettled,
    RevenueRecorded,
    ReviewOpened,
    RoundScores,
    RunCompleted,
    UnionDeclared,
    ValidationDeposited,
)
from fedpact_contract.messages import Notice
from fedpact_contract.parties import Parties, Place, opened
from fedpact_contract.questions import Asking, Question
from fedpact_contract.record import Record, read_envelope
from fedpact_contract.settlement import PeriodResult

R = TypeVar("R", bound=Record)
Faults = Iterator[FaultError]


@dataclass(slots=True, kw_only=True)
class Round:
    """A round as logged: outcomes by participant are admitted, rejected, refused or missed."""

    number: int
    index: int
    base_digest: str
    invited: tuple[str, ...]
    deadline: str
    outcomes: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # participant -> digest of its admitted update
    unions: tuple[tuple[str, ...], ...] = ()  # confirmed before it opened
    closed: bool = False

    @property
    def admitted(self) -> tuple[str, ...]:
        """The admitted participants in the order of their ids."""
        return tuple(sorted(p for p, outcome in self.outcomes.items() if outcome == "admitted"))


@dataclass(slots=True, kw_only=True)
class Period:
    """A period: what the operator stated, what it settled, what is recomputed (None where that failed)."""

    revenue: RevenueRecorded
    settled: PeriodSettled | None = None
    result: PeriodResult | None = None
    closing_index: int | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """The state after the entries read so far, and every fault found in them."""

    parties: Parties
    roots: tuple[str, ...]
    leaves: tuple[str, ...]  # leaf hashes
    checkpoints: Mapping[int, Checkpoint] | None
    model_digest: str
    deposited: ValidationDeposited | None = None
    rounds: list[Round] = field(default_factory=list)
    abandoned: bool = False
    discarded: list[int] = field(default_factory=list)  # rounds whose model was given up
    aggregated: dict[int, tuple[str, ...]] = field(default_factory=dict)  # round -> admitted
    models: dict[int, str] = field(default_factory=dict)  # round -> digest of the model that it led to
    committed: dict[int, str] = field(default_factory=dict)
    completed: RunCompleted | None = None
    scores: dict[int, RoundScores] = field(default_factory=dict)
    moments: Moments | None = None
    unopened: bool = False  # settled by the fallback, because the operator opened nothing
    periods: list[Period] = field(default_factory=list)
    ledger_heads: dict[str, list[str]] = field(default_factory=dict)  # participant -> GENESIS, then those logged
    spares: dict[str, int] = field(default_factory=dict)  # participant -> spare attempts used
    silent: dict[str, int] = field(default_factory=dict)  # participant -> rounds missed or refused in a row
    measured: set[tuple[str, MeasurementKind]] = field(default_factory=set)  # (participant, kind) in the log
    baselines: BaselinesScored | None = None
    findings_committed: dict[int, str] = field(default_factory=dict)
    findings: dict[int, Findings] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)  # who is invited no more
    exclusions: dict[tuple[int, str], Place] = field(default_factory=dict)  # (round, participant): after its scores
    pending: dict[tuple[str, ...], Question[UnionDeclared]] = field(default_factory=dict)  # unions declared
    unions: dict[tuple[str, ...], Question[UnionDeclared]] = field(default_factory=dict)  # unions confirmed
    united: list[Question[UnionDeclared]] = field(default_factory=list)  # those ever confirmed
    reviews: list[Question[ReviewOpened]] = field(default_factory=list)  # of this period; the last one asks
    notices: dict[str, Notice] = field(default_factory=dict)  # participant -> what it last said of its taking part
    revoked: dict[str, int] = field(default_factory=dict)  # participant -> index at which its run key was revoked
    destroyed: set[tuple[str, str]] = field(default_factory=set)  # (participant, whose receipt)
    updates: set[str] = field(default_factory=set)  # digests of admitted updates
    decided: set[str] = field(default_factory=set)  # digests of all updates that the log holds
    heads: dict[tuple[int, str], Place] = field(default_factory=dict)  # (size, participant): a reply that countersigned
    faults: list[FaultError] = field(default_factory=list)

    @property
    def open_round(self) -> Round | None:
        """The round that is under way."""
        return self.rounds[-1] if self.rounds and not self.rounds[-1].closed else None

    def key_of(self, participant: str) -> str:
        """What a participant signs with now beside its replies: its run key, once that is revoked its contract key."""
        if participant in self.revoked:
            return self.parties.contract.participant(participant).key
        return self.parties.run_keys.get(participant, "")

    @property
    def questions(self) -> tuple[Question[Asking], ...]:
        """What still asks participants."""
        return (*self.pending.values(), *self.reviews[-1:])

    @property
    def closed(self) -> bool:
        """Whether the last period has its closing entry."""
        return bool(self.periods) and self.periods[-1].closing_index is not None


def open_inside(
    place: Place, plain: dict[str, Any], kind: type[R], key: str, where: str, name: str
) -> tuple[R | None, FaultError | None]:
    """The signed record inside an entry, or the fault that keeps it shut."""
    try:
        return opened(read_envelope(plain), kind, key), None
    except FedpactError as err:
        fault = place.within(err, field=where)
        fault.party = name
        return None, fault


def differing(record: Record, due: Mapping[str, object]) -> list[str]:
    """The fields of a record that are not what they should be."""
    return [name for name, value in due.items() if getattr(record, name) != value]
