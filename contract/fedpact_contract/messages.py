"""The signed records that travel while a contract runs (docs/adr/0005, 0006).

order (operator -> agent) -> update or refusal, with a countersignature (agent -> operator) -> receipt, in the log.
"""

from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedpact_contract.canonical import canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.contract import (
    ClientPrivacy,
    Contract,
    Count,
    EntityCode,
    MeasurementKind,
    delta_limit,
    delta_text,
)
from fedpact_contract.errors import InputError
from fedpact_contract.log import Checkpoint, Countersignature, Proved
from fedpact_contract.quality import Facts, Measured
from fedpact_contract.record import Code, Dec, Envelope, Hex32, Instant, Name, Part, Record, decimal_text


class PrivacyEvent(Part):
    """What one attempt costs: `steps` Gaussian steps, Poisson-sampled or (sample rate 1) over all rows.

    At client level an update is one step that is clipped as a whole, to `max_grad_norm`; the noise is the operator's.
    """

    sampling: Literal["poisson", "none"]
    sample_rate: Dec
    noise_multiplier: Dec
    max_grad_norm: Dec
    steps: Count


class Metering(Part):
    """Planned work of one attempt, never realised batches or seconds."""

    rows: Count
    steps: Count


class Head(Part):
    """Size and root of a log, without a signature."""

    size: Annotated[int, Field(ge=0)]
    root: Hex32


class HeadStep(Part):
    """A signed checkpoint, and the proof that it only appends to the one before it."""

    checkpoint: Envelope[Checkpoint]
    consistency: tuple[Hex32, ...]


class Order(Record):
    """The operator's word: train round `round` from the model with this digest; signed by its run key.

    `heads` lead from the head of size `since`, which this agent is known to hold (0: the empty log), to K_r, the
    checkpoint that covers `opened`. `results` are the log's words on this agent, from the last reply that the
    operator received on; empty only where none was. `countersignatures` are the participants' on earlier heads.
    """

    TYPE = "order"

    contract_id: Hex32
    round: Count
    participant: Hex32
    base_digest: Hex32
    since: Annotated[int, Field(ge=0)]
    heads: Annotated[tuple[HeadStep, ...], Field(min_length=1, max_length=10_000)]
    opened: Proved
    results: tuple[Proved, ...]
    countersignatures: tuple[Envelope[Countersignature], ...]


class Update(Record):
    """What an agent says of the update it sends; signed by its run key. Digests: `fedpact_contract.arrays`."""

    TYPE = "update"

    contract_id: Hex32
    round: Count
    attempt: Count
    participant: Hex32
    base_digest: Hex32
    update_digest: Hex32
    num_examples: Count
    privacy_event: PrivacyEvent
    noise: Literal["csprng", "test"]
    metering: Metering
    ledger_head: Hex32
    head: Head

    def is_of(self, contract_id: str, round_number: int) -> bool:
        """Whether it names this contract and round. Where it does not, its `attempt` counts for nothing there."""
        return (self.contract_id, self.round) == (contract_id, round_number)


class Measurement(Record):
    """What an agent says of what it releases outside the rounds, once of each kind; signed by its run key.

    `array_digest` is of the noised sums of the contract's statistics, or a baseline model minus the initial
    one (`fedpact_contract.arrays.update_digest`).
    """

    TYPE = "measurement"

    contract_id: Hex32
    participant: Hex32
    kind: MeasurementKind
    array_digest: Hex32
    num_examples: Count
    privacy_event: PrivacyEvent
    noise: Literal["csprng", "test"]
    ledger_head: Hex32


def release_event(contract: Contract) -> PrivacyEvent:
    """What one attempt is charged for: noised local steps, or the operator's noised sum of clipped updates."""
    privacy = contract.privacy
    if isinstance(privacy, ClientPrivacy):
        return PrivacyEvent(
            sampling="none",
            sample_rate=Decimal(1),
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_update_norm,
            steps=contract.noised_steps,
        )
    return PrivacyEvent(
        sampling=privacy.sampling,
        sample_rate=privacy.sample_rate,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        steps=contract.noised_steps,
    )


def update_event(contract: Contract) -> PrivacyEvent:
    """What an update says of itself: at client level it is clipped and has no noise."""
    event = release_event(contract)
    central = isinstance(contract.privacy, ClientPrivacy)
    return event.model_copy(update={"noise_multiplier": Decimal(0)}) if central else event


def measurement_event(contract: Contract, kind: MeasurementKind) -> PrivacyEvent:
    """What one measurement costs, as the contract has it.

    Raises:
        InputError: MEASUREMENT_NOT_PLANNED.
    """
    statistics, baseline = contract.statistics, contract.baseline
    if kind == "statistics" and statistics is not None:
        return PrivacyEvent(
            sampling="none",
            sample_rate=Decimal(1),
            noise_multiplier=statistics.noise_multiplier,
            max_grad_norm=Decimal(1),
            steps=len(statistics.queries),
        )
    if kind == "baseline" and baseline is not None:
        return release_event(contract).model_copy(update={"steps": baseline.steps})
    raise InputError("MEASUREMENT_NOT_PLANNED", f"The contract asks for no {kind}.", field=kind)


def measurement_base(contract: Contract, kind: MeasurementKind) -> str:
    """What stands for a base model in the ledger's row of a measurement: it is of this contract and kind."""
    return sha256_hex(f"fedpact.measurement.v1:{kind}:{contract.id}".encode())


class Refusal(Record):
    """An agent's no, with a fixed code; signed by its run key.

    `attempts` are those that this round cost before it was refused: 0 where nothing was trained.
    """

    TYPE = "refusal"

    contract_id: Hex32
    round: Count
    participant: Hex32
    code: Code
    attempts: Annotated[int, Field(ge=0, le=2**31)]
    ledger_head: Hex32
    head: Head


class Receipt(Record):
    """The operator's word on one update; signed by its run key."""

    TYPE = "receipt"

    contract_id: Hex32
    round: Count
    attempt: Count
    participant: Hex32
    update_digest: Hex32
    decision: Literal["admitted", "rejected"]
    code: Code


class Reply(Part):
    """What an agent answers: an update or a refusal, and its countersignature on the head it was shown.

    A refusal of a head that does not fit countersigns nothing.
    """

    update: Envelope[Update] | None = None
    refusal: Envelope[Refusal] | None = None
    countersignature: Envelope[Countersignature] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.update is None) == (self.refusal is None):
            raise ValueError("a reply is either an update or a refusal")
        return self

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return canonical_bytes(self.plain())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read canonical bytes."""
        return cls.parse(parse_canonical(data, what="reply"), code="REPLY_FORM")


class DataSetCard(Record):
    """A participant's declaration of a data set: its rows, columns and privacy budget; signed by its contract key.

    (epsilon, delta, alpha) bound all contracts on this data set together: a Rényi filter at the one order `alpha`.
    `entity` is the column that says whose a row is, where several rows may be one person's or firm's. `facts` are what
    the participant says of the data set, `measured` the counts that it let out, outside the privacy guarantee.
    """

    TYPE = "data-set-card"

    data_set: Code
    participant: Hex32
    num_examples: Count
    columns: Annotated[tuple[Name, ...], Field(min_length=1)]
    label: Name
    entity: Name | None = None
    epsilon: Dec
    delta: Dec
    alpha: Dec
    released_rows: Annotated[int, Field(ge=0)]
    facts: Facts | None = None
    measured: Annotated[tuple[Measured, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        items = [m.item for m in self.measured or ()]
        if len(set(items)) != len(items):
            raise ValueError("`measured` has an item twice")
        return self


def check_card_delta(delta: Decimal, num_examples: int, *, file: object = None, party: str | None = None) -> None:
    """A data set's delta keeps the rule of contracts: it is a chance of no protection at all, for each row.

    Raises:
        InputError: CARD_DELTA.
    """
    limit = delta_limit(num_examples)
    if delta > limit:
        raise InputError(
            "CARD_DELTA",
            f"delta is {decimal_text(delta)}; for {num_examples} examples it must be at most {delta_text(limit)}.",
            file=file,
            field="delta",
            party=party,
            rule="delta <= min(1e-5, 1/(10 num_examples))",
            remedy=f"Write delta = {delta_text(limit)}, or less; after the first card, which fixed it, fewer examples.",
        )


class Invitation(Part):
    """What an operator hands to an enterprise: where to enrol, whom to expect there, and the one-time token."""

    url: str
    ca_pem: str
    operator: Hex32
    entity_code: EntityCode
    token: Hex32
    expires: Instant


class Enrolment(Record):
    """An enterprise's request to join; signed by its contract key, and by its node key (`Enrolled.node_signature`)."""

    TYPE = "enrolment"

    operator: Hex32
    name: Name
    entity_code: EntityCode
    sector: Code
    token_digest: Hex32
    contract_key: Hex32
    node_key_pem: str


class SignedEnrolment(Part):
    """The enrolment with its two signatures."""

    enrolment: Envelope[Enrolment]
    node_signature: str


class Statement(Record):
    """What a person at a participant says to an entry of the log that asks for an answer; by the contract key.

    `subject`: the entry's leaf hash: a declared union's, or a review's. A dispute carries a reason.
    """

    TYPE = "statement"

    contract_id: Hex32
    participant: Hex32
    subject: Hex32
    answer: Literal["agree", "dispute"]
    reason: Name | None = None


TakingPart = Literal["running", "paused", "withdrawn"]


class Notice(Record):
    """What a participant says of its own taking part; signed by its run key, once that is revoked by its contract key.

    `paused`: it answers no orders until it says `running`; `withdrawn`: none any more. `number` grows with each notice
    of a participant, so that an old one cannot be brought again. `code` says why, in a fixed word.
    """

    TYPE = "notice"

    contract_id: Hex32
    participant: Hex32
    number: Count
    state: TakingPart
    code: Code

    def is_of(self, contract_id: str, participant: str) -> bool:
        """Whether it names this contract and participant."""
        return (self.contract_id, self.participant) == (contract_id, participant)


class KeyRevocation(Record):
    """From this record's entry in the log on nothing that the run key signs counts; signed by the contract key."""

    TYPE = "key-revocation"

    contract_id: Hex32
    participant: Hex32
    run_key: Hex32


class Held(Part):
    """So many things of one kind, and where they are kept: why."""

    kind: Code
    count: Annotated[int, Field(ge=0)]
    reason: Code | None = None


class RoundDigest(Part):
    """A round, and the digest of an update in it or of the model that it led to."""

    round: Count
    digest: Hex32


class DestructionReceipt(Record):
    """What one side destroyed when a participant withdrew, and what it keeps; signed by its run key.

    `updates` are the participant's: those that it sent, or those that the operator admitted. `models`, which the
    operator's receipt lists, are all that were made since the first of them: what the updates changed stays in these,
    and in every later one.
    """

    TYPE = "destruction-receipt"

    contract_id: Hex32
    participant: Hex32
    by: Literal["participant", "operator"]
    destroyed: tuple[Held, ...]
    kept: tuple[Held, ...]
    updates: tuple[RoundDigest, ...]
    models: tuple[RoundDigest, ...] = ()


class Objection(Record):
    """A participant's no to a closing checkpoint, with a fixed code; signed by its run key."""

    TYPE = "objection"

    contract_id: Hex32
    size: Annotated[int, Field(ge=0)]
    root: Hex32
    participant: Hex32
    code: Code


Found = Literal["away", "open", "objected"]
"""What an agent meets that asks for a closing: no answer, none yet, or one that does not hold."""


class OperatorSilent(Record):
    """A participant's word that no closing came in time; signed by its run key, kept by it, sent to nobody.

    `due` is the end of the contract's term and its `close_days` after that; `found` is what the participant met when
    it asked at `at`. The operator's own last signatures stand in it: the checkpoint of `head`, the newest head that
    the participant saw (the empty log's where it saw none), and the last receipt that it was shown.
    """

    TYPE = "operator-silent"

    contract_id: Hex32
    participant: Hex32
    due: Instant
    at: Instant
    found: Found
    head: Head
    checkpoint: Envelope[Checkpoint] | None = None
    receipt: Envelope[Receipt] | None = None
