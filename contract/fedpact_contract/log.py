"""The log of one contract: entries, checkpoints, countersignatures, commitments (docs/adr/0005).

Each contract has a log of its own; its origin is the contract's id. A leaf is the canonical bytes of an `Entry`: a
type, 32 random bytes (so that a leaf hash tells nothing to whom the entry is not shown), and a body.
"""

import os
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints

from fedpact_contract import merkle
from fedpact_contract.canonical import canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.contract import Count, Fen, SignedContract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.record import Big, Code, Dec, Hex32, Instant, Name, Part, Record, Words, form

NoiseLabel = Literal["csprng", "test"]
"""Where noise came from: the operating system, or a test."""


class Checkpoint(Record):
    """The operator's signed word on its log: so many entries, this root (RFC 9162 tree)."""

    TYPE = "checkpoint"

    origin: Hex32
    size: Annotated[int, Field(ge=0)]
    root: Hex32


class Countersignature(Record):
    """A participant's word that it saw this checkpoint as a continuation of all it saw before."""

    TYPE = "countersignature"

    origin: Hex32
    size: Annotated[int, Field(ge=0)]
    root: Hex32
    participant: Hex32


class Body(Part):
    """The body of an entry."""

    TYPE: ClassVar[str]


class Entry(Part):
    """One entry: `type` names the class of `body`."""

    type: Code
    salt: Hex32
    body: dict[str, Any]

    @classmethod
    def of(cls, body: Body, salt: bytes | None = None) -> Self:
        """An entry around a body, with fresh random bytes."""
        return cls(type=body.TYPE, salt=(salt or os.urandom(32)).hex(), body=body.plain())

    def to_bytes(self) -> bytes:
        """The leaf: canonical bytes."""
        return canonical_bytes(self.plain())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a leaf.

        Raises:
            InputError: malformed.
        """
        return cls.parse(parse_canonical(data, what="log entry"), code="ENTRY_FORM")

    @property
    def leaf_hash(self) -> bytes:
        """RFC 9162 leaf hash, 32 bytes."""
        return merkle.leaf_hash(self.to_bytes())

    def open(self) -> Body:
        """The typed body.

        Raises:
            FaultError: unknown type, or a body that is not of its type.
        """
        kind = ENTRY_TYPES.get(self.type)
        if kind is None:
            raise FaultError("ENTRY_TYPE", f"Unknown entry type {self.type}.", field="type")
        try:
            return kind.parse(self.body, code="ENTRY_BODY")
        except InputError as err:
            raise FaultError("ENTRY_BODY", f"A {self.type} entry: {err.message}", field=err.field) from err


class Proved(Part):
    """An entry with its place in the log and the proof that it stands there."""

    entry: Entry
    index: Annotated[int, Field(ge=0)]
    proof: tuple[Hex32, ...]

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise unless the entry stands at its index under this checkpoint.

        Raises:
            FaultError: it does not.
        """
        path = [bytes.fromhex(p) for p in self.proof]
        if not merkle.verify_inclusion(
            self.entry.leaf_hash, self.index, checkpoint.size, path, bytes.fromhex(checkpoint.root)
        ):
            raise FaultError(
                "LOG_INCLUSION",
                "An entry is not in the log under the checkpoint shown.",
                field=f"entry {self.index}",
            )


class ContractSigned(Body):
    """Entry 0: the contract with every signature and delegation."""

    TYPE = "contract-signed"
    signed: SignedContract


class ValidationDeposited(Body):
    """The validation rows and their salts, sealed to the auditor that the contract names: digest and size in bytes.

    The operator keeps what it sealed. It stands in the log before the first round.
    """

    TYPE = "validation-deposited"
    digest: Hex32
    size: Count


class RoundOpened(Body):
    """A round begins from this base model; these participants are invited, until the deadline."""

    TYPE = "round-opened"
    round: Count
    base_digest: Hex32
    deadline: Instant
    invited: tuple[Hex32, ...]


class UpdateDecided(Body):
    """A participant's signed update and the operator's receipt. Envelopes of `messages.Update` and `Receipt`."""

    TYPE = "update-decided"
    round: Count
    participant: Hex32
    update: dict[str, Any]
    receipt: dict[str, Any]


class UpdateRefused(Body):
    """A participant's signed refusal. An envelope of `messages.Refusal`."""

    TYPE = "update-refused"
    round: Count
    participant: Hex32
    refusal: dict[str, Any]


class ReplyMissed(Body):
    """No valid reply by the deadline (by the operator's clock), or one that nobody could attribute."""

    TYPE = "reply-missed"
    round: Count
    participant: Hex32
    code: Code


class MeasurementTaken(Body):
    """What a participant released outside the rounds: an envelope of `messages.Measurement`.

    `array`, base64, holds the noised sums of statistics, little-endian float32; a baseline's model stays at the
    operator.
    """

    TYPE = "measurement-taken"
    participant: Hex32
    measurement: dict[str, Any]
    array: Annotated[str, StringConstraints(max_length=2**20)] | None = None


class BaselineLoss(Part):
    """A participant's model trained alone, on the validation rows: losses by slice, right answers as in RoundScores."""

    participant: Hex32
    losses: tuple[Big, ...]
    correct: Annotated[int, Field(ge=0)] | None = None
    pairs: Big | None = None


class BaselinesScored(Body):
    """The operator's statement on the baselines it was given, at the end of the run; no money follows from it."""

    TYPE = "baselines-scored"
    lines: tuple[BaselineLoss, ...]


class Clip(Part):
    """How an update counts: its energy ||D||^2 in 1e-12, and the factor that follows from all of these (`clipping`)."""

    energy: Big
    factor: Dec


class RoundAggregated(Body):
    """The admitted updates, in the order of participants' ids, and the model they led to.

    `noise`: at client level, and only there, where the noise that the operator added came from. `clips`: one for each
    of the admitted, where the contract clips to the median signal.
    """

    TYPE = "round-aggregated"
    round: Count
    admitted: tuple[Hex32, ...]
    model_digest: Hex32
    noise: NoiseLabel | None = None
    clips: tuple[Clip, ...] | None = None


class RoundAbandoned(Body):
    """Fewer admitted updates than the contract's minimum: the model stays as it was and the run stops."""

    TYPE = "round-abandoned"
    round: Count
    admitted: tuple[Hex32, ...]
    code: Code


class RoundDiscarded(Body):
    """A loss of the round is no finite number: it has no scores, its model is given up and the run ends before it."""

    TYPE = "round-discarded"
    round: Count
    code: Code


class Sampling(Part):
    """How a round's coalitions were drawn, where not all were scored (fedpact_contract.estimators).

    `seed` is that of the round's admitted updates. In the end so many `draws`: permutation pairs of `pairs`,
    complementary pairs of coalitions of `stratified`, the estimator of the re-normalised game. The rule that stops
    rests on the round's `first_order` values and on `errors`, in 1e-9 nat: for each plan that was tried, the standard
    error of each value as a mean over validation rows.
    """

    estimator: Literal["pairs", "stratified"]
    seed: Hex32
    draws: Count
    errors: tuple[tuple[Big, ...], ...]


class RoundScores(Part):
    """Coalition losses of one round, as integers.

    `unions`: players that count as one in this round, in the order of ids, where there are any (docs/adr/0008).

    `players` are the admitted participants in the order of their ids. With a server's optimizer that keeps momentum
    they are all that were admitted in this round or before, and `admitted` names this round's. (Of the unanimity game
    `losses` has two rows, the base model's and the next one's.) `losses[mask][k]` is the sum, in 1e-9 nat, of the loss
    over validation slice k of the model with the updates of the coalition `mask` (bit i: players[i]). With `sampling`
    the rows are those of `contribution.masks`. `correct` counts right answers before and after the round: of classes,
    rightly classified rows; of survival, twice the `pairs` that are put in the right order, ties once, `pairs` being
    all that can be ordered; of a number none. (Where it says nat,
    the unit is that of the contract's loss, `metric`.) `first_order`, in 1e-9 nat: minus the gradient of the mean
    validation loss times each player's step (in the re-normalised game: the one that it would make alone); none where
    the round's rule is no mean, of whose values it says nothing, or no update is looked at.
    """

    round: Count
    players: tuple[Hex32, ...]
    losses: tuple[tuple[Big, ...], ...]
    correct: tuple[Big, Big] | None = None
    pairs: Big | None = None
    admitted: tuple[Hex32, ...] | None = None
    sampling: Sampling | None = None
    unions: tuple[tuple[Hex32, ...], ...] | None = None
    first_order: tuple[Big, ...] | None = None


class Moments(Part):
    """Second moments of the per-example values of the whole run.

    `products[i][j]` = sum over validation rows x of Phi_i(x) Phi_j(x), in 1e-18 nat^2, participants in the order of
    their ids (contract order of `by_id`). Phi_i(x) is participant i's value on row x, 0 on rows it gave itself and
    there rescaled on the others, so that its mean over all rows is Phi_i.
    """

    products: tuple[tuple[Big, ...], ...]


class Finding(Part):
    """What one detector says after a round, of whoever stands out most (fedpact_server.detectors).

    `outcome`: alarm; quiet; no power, where even the thing itself would hardly have been found. Numbers are decimal
    texts of six digits, or inf: they are the operator's statement, and nothing is computed from them.
    """

    code: Code
    round: Count
    outcome: Literal["alarm", "quiet", "no power"]
    participants: tuple[Hex32, ...]
    statistic: Name
    threshold: Name
    power: Name
    evidence: dict[Code, str | int]


class Findings(Part):
    """What all detectors said after a round."""

    round: Count
    lines: tuple[Finding, ...]


class ScoresCommitted(Body):
    """A salted commitment to a `RoundScores`, opened at the close of the period.

    `findings`: one to what the detectors said, where the contract has defences; opened at the close, too.
    """

    TYPE = "scores-committed"
    round: Count
    commitment: Hex32
    findings: Hex32 | None = None


class ParticipantExcluded(Body):
    """After this round's scores the participant is invited no more, until it is readmitted.

    Its own value was far below zero twice running; the finding that says so is opened at the close.
    """

    TYPE = "participant-excluded"
    round: Count
    participant: Hex32
    code: Literal["WRECKER"]


class ParticipantReadmitted(Body):
    """The operator's review found that the participant may train again, and why."""

    TYPE = "participant-readmitted"
    participant: Hex32
    reason: Name


class UnionDeclared(Body):
    """The operator holds these participants to be one: their rows are the same ones, or one owner's.

    It rests on a finding of this round or before. Until `until` a member may dispute it.
    """

    TYPE = "union-declared"
    round: Count
    members: tuple[Hex32, ...]
    declared: Instant
    until: Instant
    reason: Name


class UnionConfirmed(Body):
    """From the next round on the union's examples count once; `reason` where a member disputed it."""

    TYPE = "union-confirmed"
    members: tuple[Hex32, ...]
    at: Instant
    reason: Name | None = None


class UnionWithdrawn(Body):
    """From the next round on these participants count for themselves again."""

    TYPE = "union-withdrawn"
    members: tuple[Hex32, ...]
    reason: Name


class ReviewOpened(Body):
    """Negative values are more than the contract's part of v(N): what the operator found out about them.

    It stands before the scores are open, and tells whose values are negative. `ratio`: their sum over v(N), without its
    sign; whoever verifies recomputes both. More than half of the other participants must agree before the close.
    """

    TYPE = "review-opened"
    period: Count
    negative: Annotated[tuple[Hex32, ...], Field(min_length=1)]
    ratio: Annotated[str, StringConstraints(max_length=2000), form(r"^[0-9]+(/[0-9]+)?$", "a fraction such as 5/2")]
    text: Words


class StatementTaken(Body):
    """What a person at a participant says to an entry that asks: an envelope of `messages.Statement`."""

    TYPE = "statement-taken"
    participant: Hex32
    statement: dict[str, Any]


class NoticeTaken(Body):
    """What a participant says of its own taking part: an envelope of `messages.Notice`."""

    TYPE = "notice-taken"
    participant: Hex32
    notice: dict[str, Any]


class KeyRevoked(Body):
    """A participant's run key signs nothing from here on: an envelope of `messages.KeyRevocation`."""

    TYPE = "key-revoked"
    participant: Hex32
    revocation: dict[str, Any]


class DestructionStated(Body):
    """What one side destroyed when a participant withdrew: an envelope of `messages.DestructionReceipt`."""

    TYPE = "destruction-stated"
    participant: Hex32
    receipt: dict[str, Any]


class RunCompleted(Body):
    """The last round is done: the delivered model, and a commitment to the `Moments`.

    Without a commitment where the operator lost what makes the scores: a fault of the operator.
    """

    TYPE = "run-completed"
    rounds: Annotated[int, Field(ge=0)]
    model_digest: Hex32
    commitment: Hex32 | None = None


class ScoresOpened(Body):
    """The opening of a round's commitment."""

    TYPE = "scores-opened"
    round: Count
    salt: Hex32
    scores: RoundScores


class FindingsOpened(Body):
    """The opening of the commitment to a round's findings."""

    TYPE = "findings-opened"
    round: Count
    salt: Hex32
    findings: Findings


class MomentsOpened(Body):
    """The opening of the commitment in `RunCompleted`."""

    TYPE = "moments-opened"
    salt: Hex32
    moments: Moments


class RevenueRecorded(Body):
    """The operator's statement of the period's revenue and its deductions, in fen."""

    TYPE = "revenue-recorded"
    period: Count
    revenue_fen: Fen
    fees_fen: Fen


class PeriodSettled(Body):
    """The pool and what each participant is paid, in fen; recomputed by whoever verifies."""

    TYPE = "period-settled"
    period: Count
    pool_fen: Fen
    basis: Literal["contribution", "fallback"]
    lines: tuple["SettledLine", ...]


class SettledLine(Part):
    """One participant's payment."""

    participant: Hex32
    fen: Fen


class PeriodClosing(Body):
    """The closing entry: the checkpoint right after it is the one that paid participants countersign."""

    TYPE = "period-closing"
    period: Count


PeriodSettled.model_rebuild()

ENTRY_TYPES: dict[str, type[Body]] = {
    kind.TYPE: kind
    for kind in (
        ContractSigned,
        ValidationDeposited,
        RoundOpened,
        UpdateDecided,
        UpdateRefused,
        ReplyMissed,
        MeasurementTaken,
        BaselinesScored,
        RoundAggregated,
        RoundAbandoned,
        RoundDiscarded,
        ScoresCommitted,
        ParticipantExcluded,
        ParticipantReadmitted,
        UnionDeclared,
        UnionConfirmed,
        UnionWithdrawn,
        ReviewOpened,
        StatementTaken,
        NoticeTaken,
        KeyRevoked,
        DestructionStated,
        RunCompleted,
        ScoresOpened,
        FindingsOpened,
        MomentsOpened,
        RevenueRecorded,
        PeriodSettled,
        PeriodClosing,
    )
}


def kept_rounds(bodies: Iterable[Body]) -> list[RoundAggregated]:
    """The rounds that led to a model which was not given up, in order."""
    result: list[RoundAggregated] = []
    for body in bodies:
        if isinstance(body, RoundAggregated):
            result.append(body)
        elif isinstance(body, RoundDiscarded):
            result = [kept for kept in result if kept.round != body.round]
    return result


def affected_models(bodies: Iterable[Body], participant: str) -> list[RoundAggregated]:
    """The kept rounds from the first on that a participant's update entered: what they led to rests on that update."""
    rounds = kept_rounds(bodies)
    first = next((number for number, body in enumerate(rounds) if participant in body.admitted), len(rounds))
    return rounds[first:]


def commitment(kind: type[Part], salt: bytes, value: Part) -> str:
    """SHA-256(type || 32 salt bytes || canonical bytes), in hexadecimal (trust.md, "Log")."""
    if len(salt) != 32:
        raise InputError("COMMITMENT_SALT", "A commitment's salt has 32 bytes.")
    return sha256_hex(f"fedpact.{kind.__name__}.v1".encode() + salt + canonical_bytes(value.plain()))


def validation_leaf(salt: bytes, row: bytes) -> bytes:
    """The leaf hash of one validation row: its 32 random bytes, then its canonical bytes."""
    return merkle.leaf_hash(salt + row)
