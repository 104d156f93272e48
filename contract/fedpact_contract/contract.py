"""The contract: the one signed record that governs a federation.

It is parsed once, from TOML or from canonical bytes, into a frozen record; its id is the SHA-256 of those bytes.
Every setting stands in it, none has a default in code. Amounts, rates and privacy quantities are decimals or
integers, never floats.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from decimal import ROUND_FLOOR, Context, Decimal
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, StringConstraints

from fedpact_contract import estimators, sealed
from fedpact_contract.errors import InputError
from fedpact_contract.keys import fingerprint
from fedpact_contract.output import counted, visible
from fedpact_contract.record import Code, Dec, Envelope, Hex32, Instant, Name, Part, Record, decimal_text, form
from fedpact_contract.request import parse_instant
from fedpact_contract.statistics import Statistics, check_statistics
from fedpact_contract.toml_lines import naming_lines

Count = Annotated[int, Field(ge=1, le=2**31)]
MeasurementKind = Literal["statistics", "baseline"]
"""What a participant releases once, outside the rounds."""
Fen = Annotated[int, Field(ge=0, le=2**53 - 1)]
EntityCode = Annotated[
    str, form(r"^[0-9A-Z]{18}$", "18 digits and capital letters, such as a unified social credit code")
]
"""A legal-entity code: 18 digits and capitals (unified social credit code)."""


class Party(Part):
    """A legal entity with its contract key."""

    name: Name
    entity_code: EntityCode
    key: Hex32

    @property
    def id(self) -> str:
        """The fingerprint of the contract key: the party's id everywhere."""
        return fingerprint(self.key)


class Participant(Party):
    """A party that trains: its sector, data set, contracted number of examples and payment floor.

    `gate_order` is the one Rényi order at which the data set's ledger is kept, as its card declares it (contracts that
    were made before reports named it have none). It tells the signatories about how large the data set's whole budget
    is, and nothing of what is left of it. `card` is the digest of the data set's card by which the contract was made
    (contracts that were made before cards were named have none).
    """

    sector: Code
    data_set: Code
    num_examples: Count
    floor_fen: Fen
    gate_order: Dec | None = None
    card: Hex32 | None = None


class Auditor(Party):
    """Who may re-evaluate the scores: it signs with `key`, and the validation rows are sealed to `encryption_key`.

    It signs no contract, trains on nothing and is paid nothing. Its fingerprint is over both keys, so that whoever
    compares it has compared the X25519 key too.
    """

    encryption_key: Hex32

    @property
    def id(self) -> str:
        """SHA-256 over the 64 raw bytes of both public keys."""
        return fingerprint(self.key + self.encryption_key)


class Entity(Part):
    """A legal entity that signs nothing here: it is named for what it may not be, or gives."""

    name: Name
    entity_code: EntityCode


class Affiliate(Entity):
    """An entity under common control with the operator or the buyer, as it declares."""

    of: Literal["operator", "buyer"]


class ControlGroup(Part):
    """Participants under common control, as they declare: by whom, and their entity codes (docs/adr/0004).

    `entity_code`: that of who controls them, where it is a legal entity that has one.
    """

    name: Name
    entity_code: EntityCode | None = None
    members: Annotated[tuple[EntityCode, ...], Field(min_length=2, max_length=1000)]


class NumberColumn(Part):
    """A numeric feature with public bounds; values are clipped to them and scaled to [-1, 1].

    `missing` says what happens to a row in which the value is missing: the data is refused, the row is left out,
    or `fill` stands for it.
    """

    name: Name
    kind: Literal["number"]
    low: Dec
    high: Dec
    missing: Literal["refuse", "drop", "fill"]
    fill: Dec | None = None


class CategoryColumn(Part):
    """A categorical feature with a public vocabulary; one feature a value, scaled to {-1, 1}."""

    name: Name
    kind: Literal["category"]
    values: Annotated[tuple[Name, ...], Field(min_length=2, max_length=1000)]
    missing: Literal["refuse", "drop", "fill"]
    fill: Name | None = None


Column = Annotated[NumberColumn | CategoryColumn, Field(discriminator="kind")]


class _Label(Part):
    """What all labels say: the column, and that where it is `missing` the row is left out; else the data is refused."""

    name: Name
    missing: Literal["refuse", "drop"] | None = None


class ClassLabel(_Label):
    """A class is predicted. Rule `value`: the cell is one of the classes. `above`: two classes, cell > threshold."""

    TASK: ClassVar = "classification"
    LOSS: ClassVar = "cross-entropy"

    classes: Annotated[tuple[Name, ...], Field(min_length=2, max_length=1000)]
    rule: Literal["value", "above"]
    threshold: Dec | None = None

    @property
    def outputs(self) -> int:
        """What a model puts out for each row: a number for each class."""
        return len(self.classes)


class NumberLabel(_Label):
    """A number is predicted, which lies within public bounds and is scaled by them to [-1, 1] (docs/adr/0009)."""

    TASK: ClassVar = "regression"
    LOSS: ClassVar = "squared-error"

    rule: Literal["number"]
    low: Dec
    high: Dec
    outputs: ClassVar = 1


class SurvivalLabel(_Label):
    """When an event comes is predicted, interval by interval: a discrete-time hazard (docs/adr/0009).

    `name` is the column of the duration, not negative; `event` that of whether the event came then, or the row was
    censored, with these `outcomes`, censored first. `cuts` are the ends of the intervals, the first of which begins at
    0; what lies beyond the last one counts as censored there.
    """

    TASK: ClassVar = "survival"
    LOSS: ClassVar = "discrete-hazard"

    rule: Literal["survival"]
    event: Name
    outcomes: Annotated[tuple[Name, ...], Field(min_length=2, max_length=2)]
    cuts: Annotated[tuple[Dec, ...], Field(min_length=1, max_length=100)]

    @property
    def outputs(self) -> int:
        """What a model puts out for each row: a number for each interval."""
        return len(self.cuts)

    @property
    def intervals(self) -> tuple[str, ...]:
        """What a duration is told by: the interval, or that it lies beyond the last."""
        ends = [decimal_text(cut) for cut in (Decimal(0), *self.cuts)]
        return (*(f"{a} - {b}" for a, b in pairwise(ends)), f"above {ends[-1]}")


Label = Annotated[ClassLabel | NumberLabel | SurvivalLabel, Field(discriminator="rule")]
"""What is predicted: its rule says how cells become targets, and with that which task it is."""


class Data(Part):
    """The schema that every participant's data has, and how it becomes features.

    Features are scaled to [-1, 1] by the public bounds, a constant 1 is added as the last one, and all are multiplied
    by feature_scale / sqrt(number of features, the constant included).
    """

    columns: Annotated[tuple[Column, ...], Field(min_length=1, max_length=100_000)]
    label: Label
    feature_scale: Dec

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that the label is read from, its own first."""
        more = (self.label.event,) if isinstance(self.label, SurvivalLabel) else ()
        return (self.label.name, *more)


class Image(Part):
    """How a row's columns form a picture: channel by channel, of each line by line, in it pixel by pixel."""

    height: Annotated[int, Field(ge=1, le=1024)]
    width: Annotated[int, Field(ge=1, le=1024)]
    channels: Annotated[int, Field(ge=1, le=64)]


class Grid(NamedTuple):
    """Numbers on places: those of a picture, or what a convolution gives, which has its filters for channels."""

    channels: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """How many numbers."""
        return self.channels * self.height * self.width


class Convolution(Part):
    """A layer of `filters`, which look at all windows of kernel x kernel pixels, `stride` apart; no padding."""

    filters: Annotated[int, Field(ge=1, le=1024)]
    kernel: Annotated[int, Field(ge=1, le=31)]
    stride: Annotated[int, Field(ge=1, le=31)]


class Model(Part):
    """What is trained, and the initial model's digest.

    `softmax` is linear and tells classes apart, `linear` predicts anything else, and an `mlp` either, with the widths
    of its hidden layers. So does a `cnn`, of rows that are an `image`: its `convolutions` come first, the hidden
    layers, if any, behind them. ReLU follows every layer but the last.
    """

    kind: Literal["softmax", "linear", "mlp", "cnn"]
    hidden: tuple[Count, ...]
    image: Image | None = None
    convolutions: Annotated[tuple[Convolution, ...], Field(min_length=1, max_length=8)] | None = None
    initial_digest: Hex32

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The picture, and what each convolution makes of it, the last one last; nothing without convolutions.

        Raises:
            InputError: CONTRACT_IMAGE: a window is larger than what it looks at.
        """
        if self.image is None:
            return ()
        grids = [Grid(self.image.channels, self.image.height, self.image.width)]
        for index, layer in enumerate(self.convolutions or ()):
            last = grids[-1]
            if layer.kernel > min(last.height, last.width):
                raise InputError(
                    "CONTRACT_IMAGE",
                    f"The windows have {layer.kernel} x {layer.kernel} pixels, and what they look at "
                    f"{last.height} x {last.width}.",
                    field=f"model.convolutions.{index}.kernel",
                    rule="a window lies inside the picture, or inside what the convolution before it leaves",
                    remedy="Take a smaller kernel, or smaller strides before it.",
                )
            height, width = ((side - layer.kernel) // layer.stride + 1 for side in (last.height, last.width))
            grids.append(Grid(layer.filters, height, width))
        return tuple(grids)


class ServerOptimizer(Part):
    """How the server steps by the mean updates of all rounds so far (Reddi et al. 2021, arXiv:2003.00295).

    With the round's weighted mean update Delta, element by element: m <- beta_1 m + (1 - beta_1) Delta; v <- beta_2 v +
    (1 - beta_2) Delta^2 (adam), v - (1 - beta_2) Delta^2 sign(v - Delta^2) (yogi), v + Delta^2 (adagrad, whose betas
    are 0); the model moves by lr m / (sqrt v + tau). lr is `server_rate`; for adam times sqrt(1 - beta_2^(t+1)) /
    (1 - beta_1^(t+1)) in round t, as Flower's FedAdam has it.
    """

    kind: Literal["adam", "yogi", "adagrad"]
    beta_1: Dec
    beta_2: Dec
    tau: Dec


class Krum(Part):
    """The mean of the `kept` updates that lie closest to their neighbours (Blanchard et al. 2017, arXiv:1703.02757).

    `tolerated` is the paper's f: so many of the admitted may send anything. `kept` = 1 is Krum, more are multi-Krum.
    """

    tolerated: Count
    kept: Count


class Training(Part):
    """Rounds of `local_steps` steps at each participant; the server adds `server_rate` times the mean update.

    `weighted-mean`: weighted by contracted examples, over the admitted. `uniform-mean`: the sum, with the operator's
    noise, over the number of participants in the contract; whoever is missing counts as zeros. With a
    `server_optimizer` the mean is not added as it is.

    In the mean's place `median` takes the middle one, number by number (Yin et al. 2018, arXiv:1803.01498), and `krum`
    the mean of some. For both every update counts alike, whatever its number of examples.
    """

    rounds: Count
    local_steps: Count
    learning_rate: Dec
    server_rate: Dec
    aggregation: Literal["weighted-mean", "uniform-mean", "median", "krum"]
    krum: Krum | None = None
    server_optimizer: ServerOptimizer | None = None


class EntityUnit(Part):
    """A second privacy unit: everything that one entity (a person, a firm) has in a data set.

    `column` says whose a row is; it is read at the participant, is no feature, and never leaves. At most `max_rows`
    rows of one entity are trained on. All of them together are protected by (epsilon, delta), worked out by `method`:
    the exact dominating pair, a mixture of Gaussians (Ganesh 2024, arXiv:2401.10294), at the contract's delta; or the
    general formula for groups, (k epsilon, delta (e^(k epsilon) - 1) / (e^epsilon - 1)).
    """

    column: Name
    max_rows: Annotated[int, Field(ge=1, le=32)]
    method: Literal["mixture-of-gaussians", "group-formula"]
    epsilon: Dec
    delta: Dec


class _PrivacyTerms(Part):
    """What both trust models state. Batches are Poisson-sampled at the participant."""

    relation: Literal["zero-out"]
    sampling: Literal["poisson"]
    epsilon: Dec
    delta: Dec
    sample_rate: Dec
    noise_multiplier: Dec
    spare_attempts: Annotated[int, Field(ge=0, le=1000)]
    accountant: Name
    entity: EntityUnit | None = None


class RecordPrivacy(_PrivacyTerms):
    """Record-level differential privacy at each participant (docs/adr/0003), who adds the noise.

    One event is `local_steps` Poisson-sampled Gaussian steps. The plan that epsilon covers is
    rounds + spare_attempts such events; `noise_multiplier` is solved from it. `entity` adds a guarantee for whoever
    has several rows.
    """

    trust_model: Literal["record-level-at-each-participant"]
    unit: Literal["example"]
    max_grad_norm: Dec


class ClientPrivacy(_PrivacyTerms):
    """Client-level (central) differential privacy (docs/adr/0003): the operator sees the updates, and adds the noise.

    What is protected is one participant's whole update of every round, towards everybody but the operator: it is
    there, or zeros. A participant clips its update to the norm `max_update_norm`; the operator adds normal noise of
    noise_multiplier * max_update_norm to the sum. The plan that epsilon covers is one such release a round, without
    amplification: the operator knows who took part. `sample_rate` is of local batches and buys nothing.
    """

    trust_model: Literal["client-level-at-the-operator"]
    unit: Literal["participant"]
    max_update_norm: Dec


Privacy = Annotated[RecordPrivacy | ClientPrivacy, Field(discriminator="trust_model")]
"""One field of the contract: its trust model is that of every participant."""


class Baseline(Part):
    """A model that each participant trains alone and releases once: `steps` private steps from the initial model.

    It shows what joining is worth. It is charged like training, scored on the validation set and never aggregated.
    """

    steps: Count


class Participation(Part):
    """Who must take part: fewest admitted updates a round, the round's deadline, what heads must show.

    An agent that sees fewer than `head_threshold` countersignatures on earlier checkpoints raises an alarm, and with
    `strict_heads` refuses. After `missed_rounds_limit` missed or refused rounds in a row no more orders are sent.
    """

    minimum: Count
    deadline_seconds: Annotated[int, Field(ge=1, le=86_400)]
    head_threshold: Annotated[int, Field(ge=0, le=1000)]
    strict_heads: bool
    missed_rounds_limit: Count


class ValidationSlice(Part):
    """Rows of the validation set by who gave them: operator, buyer, or a participant (scored on the others' rows)."""

    source: Annotated[str, StringConstraints(pattern=r"^(operator|buyer|[0-9a-f]{64})$")]
    count: Count


class Validation(Part):
    """The committed validation set: Merkle root over salted rows, slices in the order of the leaves."""

    root: Hex32
    slices: Annotated[tuple[ValidationSlice, ...], Field(min_length=1)]


class Contribution(Part):
    """How contribution is measured (docs/adr/0004).

    `fixed-weight`: of a group only the members' parts of the round's step are added, as they are. `re-normalised`: the
    round's rule is applied to the members' updates alone, as if nobody else had been there; it is the only game of a
    rule that is no sum over participants.

    `unanimity`: it is not. Only models that everybody gets are scored; the fall of the loss is that of all who were
    admitted together, and no smaller group is looked at.

    `exact`: every group of the admitted is scored. `sampled`: so are they where few were admitted, else as many groups
    as `fedpact_contract.estimators` says, at most `max_coalitions` a round, drawn from the updates' digests.
    """

    game: Literal["fixed-weight", "re-normalised", "unanimity"]
    loss: Literal["cross-entropy", "squared-error", "discrete-hazard"]
    estimator: Literal["exact", "sampled"]
    max_coalitions: Annotated[int, Field(ge=8, le=2**16)] | None = None
    validation: Validation


class Defences(Part):
    """What is done against gaming (docs/adr/0008). Without this clause nothing of it is.

    `clip`: updates count in training and in scores scaled down to the median participant's signal (`clipping`), or as
    they are. After each round the operator's detectors look at all updates and values; what they find is committed to
    like the scores, and opened with them. `wreckers`: whoever they call a WRECKER is invited no more until it is
    reviewed, or only reported. `negatives`: where negative values together are above this part of v(N), the period is
    not settled before the participants agreed to the operator's review. `dispute_hours`: how long a participant may
    dispute that it is one union with another. `max_duplicates`: the part of a participant's contracted rows that may be
    exact copies of another of them, counted once (features and label, as the model sees them); its own agent refuses
    more, before anything is charged. None: nobody looks.
    """

    clip: Literal["median-signal", "none"]
    wreckers: Literal["reject", "report"]
    negatives: Dec
    dispute_hours: Annotated[int, Field(ge=1, le=8760)]
    max_duplicates: Dec | None = None


class Settlement(Part):
    """How revenue is split: weights of contribution (a), metered data (b) and equality (c), and the fallback."""

    currency: Literal["CNY"]
    contribution_weight: Dec
    data_weight: Dec
    equal_weight: Dec
    fallback: Literal["metered", "equal"]
    close_days: Count


class Software(Part):
    """What code runs: the release, and the digests of the training code and of the bundle that Flower carries."""

    release: Code
    models_digest: Hex32
    shell_digest: Hex32


class Term(Part):
    """When training may take place."""

    not_before: Instant
    not_after: Instant


_CLIPS = {
    "privacy.max_grad_norm": "At client level each update is clipped as a whole: give max_update_norm in its place.",
    "privacy.max_update_norm": "At record level each row's gradient is clipped: give max_grad_norm in its place.",
}
"""What to do where the other trust model's clip is given."""
_TEMPLATE = "`fedpact contract template` prints one with every key explained."
_FORM = {
    "": f"Correct the value. {_TEMPLATE}",
    "_UNKNOWN_KEY": f"Remove the key, or correct its spelling. {_TEMPLATE}",
    "_MISSING_KEY": f"Write the key: none has a default. {_TEMPLATE}",
}
"""What to do about each kind of wrong form."""


class Contract(Record):
    """The contract. `parties` are the operator and the participants; a participant's id is its key's fingerprint.

    `auditor`: validation rows are sealed to it before round 1, and it may re-evaluate the scores (docs/adr/0007).
    `defences`: what is done against gaming (docs/adr/0008). `buyer`: who buys the model. Neither it nor a declared
    affiliate of it or of the operator is paid by contribution, which it could steer. `common_control`: which
    participants are one party for equal payments, floors and the minimum (docs/adr/0004).
    """

    TYPE = "contract"

    title: Name
    purpose: Code
    operator: Party
    participants: Annotated[tuple[Participant, ...], Field(min_length=1, max_length=1000)]
    data: Data
    model: Model
    training: Training
    privacy: Privacy
    participation: Participation
    contribution: Contribution
    settlement: Settlement
    code: Software
    term: Term
    statistics: Statistics | None = None
    baseline: Baseline | None = None
    auditor: Auditor | None = None
    defences: Defences | None = None
    buyer: Entity | None = None
    affiliates: Annotated[tuple[Affiliate, ...], Field(min_length=1, max_length=1000)] | None = None
    common_control: Annotated[tuple[ControlGroup, ...], Field(min_length=1, max_length=500)] | None = None

    @classmethod
    def parse(cls, value: Any, *, code: str = "CONTRACT", file: object = None) -> Self:  # noqa: ANN401 - JSON value
        """Build from plain values and check every rule.

        Raises:
            InputError: an unknown, missing or ill-typed key, or a broken rule, by name.
        """
        try:
            contract = super().parse(value, code=code, file=file)
        except InputError as err:
            clip = _CLIPS.get(err.field or "", "") if err.code == f"{code}_UNKNOWN_KEY" else ""
            err.remedy = clip or err.remedy or _FORM.get(err.code.removeprefix(code), "")
            raise
        for check in CHECKS:
            try:
                check(contract)
            except InputError as err:
                err.file = err.file or (None if file is None else str(file))
                raise
        return contract

    @classmethod
    def from_toml(cls, text: str, *, file: object = None) -> Self:
        """Read a complete contract from TOML."""
        value = load_toml(text, file=file)
        with naming_lines(text, file):
            return cls.parse(value, file=file)

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical bytes, in hexadecimal; asked for with every message, worked out once."""
        return self.digest()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which would take the id along to what is another contract."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("id", None)
        return copied

    @property
    def planned_steps(self) -> int:
        """Noised steps that the plan covers: every round and every spare attempt.

        At client level one release a round: of several attempts at one, one enters it.
        """
        if isinstance(self.privacy, ClientPrivacy):
            return self.training.rounds
        return (self.training.rounds + self.privacy.spare_attempts) * self.training.local_steps

    @property
    def noised_steps(self) -> int:
        """Noised steps of one round: the local ones, or the operator's one release."""
        return 1 if isinstance(self.privacy, ClientPrivacy) else self.training.local_steps

    @property
    def keeps_momentum(self) -> bool:
        """Whether an update moves the model in later rounds too, so that its participant is a player there."""
        optimizer = self.training.server_optimizer
        return optimizer is not None and optimizer.beta_1 > 0

    @property
    def measurements(self) -> tuple[MeasurementKind, ...]:
        """What each participant releases once besides its updates."""
        asked: dict[MeasurementKind, Statistics | Baseline | None] = {
            "statistics": self.statistics,
            "baseline": self.baseline,
        }
        return tuple(kind for kind, clause in asked.items() if clause is not None)

    @property
    def columns_read(self) -> tuple[str, ...]:
        """Every column that training reads: the features, the label, and whose a row is."""
        entity = () if self.privacy.entity is None else (self.privacy.entity.column,)
        return (*(c.name for c in self.data.columns), *self.data.label_columns, *entity)

    def participant(self, party_id: str) -> Participant:
        """The participant with this id.

        Raises:
            InputError: no such participant.
        """
        for participant in self.participants:
            if participant.id == party_id:
                return participant
        raise InputError(
            "CONTRACT_NOT_A_PARTY",
            "This key is not a participant's in the contract.",
            party=party_id,
            remedy="Name one of the contract's participants; its text lists their fingerprints.",
        )

    def by_id(self) -> dict[str, Participant]:
        """Participants by id, in the order of ids: that of aggregation, not that in which people see them."""
        return dict(sorted((p.id, p) for p in self.participants))

    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """All participants by id: those under common control together, everybody else alone; each in order."""
        ids = {p.entity_code: p.id for p in self.participants}
        groups = [[ids.pop(code) for code in group.members] for group in self.common_control or ()]
        return tuple(sorted(tuple(sorted(block)) for block in (*groups, *([p] for p in ids.values()))))

    def controlled_by(self, party_id: str) -> str:
        """Who controls this participant and others; empty where nobody does."""
        code = self.participant(party_id).entity_code
        return next((group.name for group in self.common_control or () if code in group.members), "")

    def counted_once(self, participants: Iterable[str]) -> int:
        """How many of these count towards the minimum: those under common control once."""
        present = {*participants}
        return sum(not present.isdisjoint(block) for block in self.blocks())

    def parties(self) -> dict[str, Party]:
        """Everybody who signs, by id: the operator, then the participants in the contract's order."""
        return {self.operator.id: self.operator, **{p.id: p for p in self.participants}}

    def named(self) -> dict[str, Party]:
        """Everybody who is named by a key, by id: who signs, and the auditor."""
        return self.parties() | ({} if self.auditor is None else {self.auditor.id: self.auditor})

    def role(self, party_id: str) -> Literal["operator", "participant", "auditor"]:
        """What somebody who is `named` is in this contract."""
        if party_id == self.operator.id:
            return "operator"
        return "participant" if party_id in self.by_id() else "auditor"


class Delegation(Record):
    """A party's word that `run_key` signs for it in this contract; signed by its contract key."""

    TYPE = "delegation"

    contract_id: Hex32
    party: Hex32
    run_key: Hex32


class SignedContract(Part):
    """The contract as it travels: its envelope with everybody's signatures, and the delegations."""

    contract: Envelope[Contract]
    delegations: tuple[Envelope[Delegation], ...]


def contract_id_form(text: str) -> str:
    """A contract's id, checked before it becomes a file name or part of an address.

    Raises:
        InputError: CONTRACT_ID_FORM.
    """
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise InputError(
            "CONTRACT_ID_FORM",
            "A contract's id is 64 hexadecimal characters.",
            remedy="Copy it from the list of contracts.",
        )
    return text


def load_toml(text: str, *, file: object = None) -> dict[str, Any]:
    """TOML with exact decimals.

    Raises:
        InputError: TOML_SYNTAX, not TOML (the message names line and column), or nested too deep, or an integer of
            thousands of digits.
    """
    try:
        return tomllib.loads(text, parse_float=Decimal)
    except RecursionError as err:
        raise _no_toml("The file is nested too deep to be read.", text, file) from err
    except ValueError as err:  # TOMLDecodeError, or an integer longer than Python reads
        raise _no_toml(f"The file is not valid TOML: {err}.", text, file) from err


def _no_toml(message: str, text: str, file: object) -> InputError:
    line = re.search(r"\(at line ([0-9]+),", message)
    near = text.splitlines()[max(int(line[1]) - 2, 0) : int(line[1])] if line else []
    # Outside of texts and comments TOML is ASCII; Chinese keyboards write full-width commas and quotes.
    wide = [sign for part in near for sign in re.sub(r"\"[^\"]*\"|'[^']*'|#.*", "", part) if not sign.isascii()]
    return InputError(
        "TOML_SYNTAX",
        message,
        file=f"{file}:{line[1]}" if line and file is not None else file,
        rule="TOML 1.0: each key once, texts in quotes, a value behind each =",
        remedy=f"Write {visible(wide[0])} (U+{ord(wide[0]):04X}) as its half-width (ASCII) sign, or put it in quotes."
        if wide
        else "Correct the line named, or the one before it.",
    )


def check_parties(contract: Contract) -> None:
    """Every party has its own key and legal entity; neither operator nor auditor is a paid participant."""
    seen: dict[str, str] = {contract.operator.key: "operator", contract.operator.entity_code: "operator"}
    places: list[tuple[str, Party]] = [(f"participants.{i}", p) for i, p in enumerate(contract.participants)]
    places += [] if contract.auditor is None else [("auditor", contract.auditor)]
    for place, party in places:
        for field in ("key", "entity_code", "encryption_key")[: 3 if isinstance(party, Auditor) else 2]:
            value = getattr(party, field)
            if value in seen:
                raise InputError(
                    "CONTRACT_PARTY_TWICE",
                    f"The {field} of {party.name} is also that of {seen[value]}.",
                    field=f"{place}.{field}",
                    party=party.name,
                    rule="one legal entity is one party; the operator is no paid participant, the auditor neither",
                    remedy="Name another legal entity with a key of its own, or leave this one out.",
                )
            seen[value] = party.name
    data_sets = [p.data_set for p in contract.participants]
    if len(set(data_sets)) != len(data_sets):
        raise InputError(
            "CONTRACT_DATA_SET_TWICE",
            "Two participants name one data set.",
            field="participants.data_set",
            rule="a data set has one owner, whose budget it is",
            remedy="Write for each the data set on its own card.",
        )


def check_affiliates(contract: Contract) -> None:
    """Who could steer the scores is not paid by them; affiliates are somebody's who is named, each named once."""
    buyer, affiliates = contract.buyer, contract.affiliates or ()
    places: list[tuple[str, Entity, str]] = [] if buyer is None else [("buyer", buyer, "the buyer")]
    places += [(f"affiliates.{i}", entity, f"an affiliate of the {entity.of}") for i, entity in enumerate(affiliates)]
    codes = [entity.entity_code for _, entity, _ in places]
    paid = {p.entity_code: p.name for p in contract.participants if contract.settlement.contribution_weight > 0}
    for place, entity, role in places:
        if codes.count(entity.entity_code) > 1 or entity.entity_code == contract.operator.entity_code:
            raise InputError(
                "CONTRACT_ENTITY_TWICE",
                f"{entity.name} is named twice among operator, buyer and affiliates.",
                field=f"{place}.entity_code",
                party=entity.name,
                remedy="Name each legal entity once; leave the buyer out where the operator buys.",
            )
        if isinstance(entity, Affiliate) and entity.of == "buyer" and buyer is None:
            raise InputError(
                "CONTRACT_NO_BUYER",
                f"{entity.name} is an affiliate of the buyer, and no buyer is named.",
                field=place,
                party=entity.name,
                remedy="Name the buyer: [buyer] with name and entity_code.",
            )
        if entity.entity_code in paid:
            raise InputError(
                "CONTRACT_AFFILIATE",
                f"{paid[entity.entity_code]} is {role}, and would be paid by contribution.",
                field=f"{place}.entity_code",
                party=paid[entity.entity_code],
                rule="operator, buyer and their affiliates are not paid by scores that they could steer",
                remedy="Leave the participant out, or pay by data and equality alone (contribution_weight = 0).",
            )


def check_common_control(contract: Contract) -> None:
    """Groups are of participants, each in one at most, and not all participants are one."""
    groups = contract.common_control or ()
    known, seen = {p.entity_code for p in contract.participants}, set[str]()
    for index, group in enumerate(groups):
        for code in group.members:
            if code not in known or code in seen:
                raise InputError(
                    "CONTRACT_COMMON_CONTROL",
                    f"{code}, under common control by {group.name}, "
                    + ("is named twice." if code in known else "is no participant of the contract."),
                    field=f"common_control.{index}.members",
                    party=group.name,
                    rule="participants by their entity codes, each in one group at most",
                    remedy="Name each participant once; write two groups that overlap as one.",
                )
            seen.add(code)
        if group.entity_code in known - {*group.members}:
            raise InputError(
                "CONTRACT_COMMON_CONTROL",
                f"{group.entity_code}, the entity code of {group.name}, is a participant's that is not in the group.",
                field=f"common_control.{index}.entity_code",
                party=group.name,
                rule="a participant that controls others is under common control with them",
                remedy="Name it among the members.",
            )
        scorer = next((p for p in _scorers(contract) if _is(group, p)), None)
        if scorer is not None and contract.settlement.contribution_weight > 0:
            raise InputError(
                "CONTRACT_AFFILIATE",
                f"Participants are under common control by {scorer.name}, and would be paid by contribution.",
                field=f"common_control.{index}.name",
                party=scorer.name,
                rule="operator, buyer and their affiliates are not paid by scores that they could steer",
                remedy="Leave them out, or pay by data and equality alone (contribution_weight = 0).",
            )
    if groups and len(contract.blocks()) < 2:
        raise InputError(
            "CONTRACT_COMMON_CONTROL",
            "All participants are under common control: there are no two parties to split between.",
            field="common_control",
            rule="at least two parties that nobody controls together",
            remedy="Name as one group only those whom one party controls, or add a participant.",
        )


def _is(group: ControlGroup, party: Party | Entity) -> bool:
    """Whether this party controls the group: by its code or its name."""
    return party.entity_code == group.entity_code or party.name.casefold() == group.name.casefold()


def _scorers(contract: Contract) -> tuple[Party | Entity, ...]:
    """Who could steer the scores: operator, buyer and their affiliates."""
    buyer = () if contract.buyer is None else (contract.buyer,)
    return (contract.operator, *buyer, *(contract.affiliates or ()))


def check_auditor(contract: Contract) -> None:
    """The auditor can be given what it re-evaluates."""
    if contract.auditor is None:
        return
    if isinstance(contract.privacy, ClientPrivacy):
        raise InputError(
            "CONTRACT_CENTRAL_AUDITOR",
            "At client level nobody but the operator may read an update, and its noise is in every model: an auditor "
            "could re-evaluate nothing.",
            field="auditor",
            remedy="Leave it out, or take the trust model record-level-at-each-participant.",
        )
    try:
        sealed.check_recipient(contract.auditor.encryption_key)
    except InputError as err:
        err.field, err.party = "auditor.encryption_key", contract.auditor.name
        raise


def check_gate_orders(contract: Contract) -> None:
    """Each data set's gate has an order at which there is a Rényi divergence."""
    for index, participant in enumerate(contract.participants):
        if participant.gate_order is not None and participant.gate_order <= 1:
            raise InputError(
                "CONTRACT_GATE_ORDER",
                f"The Rényi order of {participant.name}'s gate must be above 1.",
                field=f"participants.{index}.gate_order",
                party=participant.name,
                rule="above 1",
                remedy="Take `alpha` of the data set's card, as `fedpact contract new` does.",
            )


def check_data(contract: Contract) -> None:
    """Bounds are ordered, names unique, fill values allowed, the label rule complete."""
    data = contract.data
    names = [c.name for c in data.columns] + list(data.label_columns)
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise InputError(
            "CONTRACT_COLUMN_TWICE",
            f"The column {twice[0]} stands twice.",
            field="data.columns",
            rule="each column once, and the label is no feature",
            remedy="Remove one of the two.",
        )
    for column in data.columns:
        field = f"data.columns.{column.name}"
        if (column.missing == "fill") != (column.fill is not None):
            raise InputError(
                "CONTRACT_FILL",
                '`fill` goes with missing = "fill", and only with it.',
                field=field,
                remedy='Write fill and missing = "fill", or leave fill out.',
            )
        if isinstance(column, NumberColumn):
            if column.low >= column.high:
                raise _bounds(field)
            if column.fill is not None and not column.low <= column.fill <= column.high:
                raise InputError(
                    "CONTRACT_FILL",
                    "`fill` must lie within the bounds.",
                    field=field,
                    remedy="Write a number from low to high, or wider bounds.",
                )
        else:
            if len(set(column.values)) != len(column.values):
                raise InputError(
                    "CONTRACT_VOCABULARY",
                    "A value stands twice in the vocabulary.",
                    field=field,
                    remedy="Write each of the values once.",
                )
            if column.fill is not None and column.fill not in column.values:
                raise InputError(
                    "CONTRACT_FILL",
                    "`fill` must be in the vocabulary.",
                    field=field,
                    remedy="Write one of the values, or add this one to them.",
                )
    _check_label(data.label)
    _positive(data.feature_scale, "data.feature_scale")


def _bounds(field: str) -> InputError:
    return InputError(
        "CONTRACT_BOUNDS",
        "`low` must be below `high`.",
        field=field,
        remedy="Write the least and the largest value that the column can have, known beforehand.",
    )


def _check_label(label: ClassLabel | NumberLabel | SurvivalLabel) -> None:
    if isinstance(label, NumberLabel):
        if label.low >= label.high:
            raise _bounds("data.label")
        return
    if isinstance(label, SurvivalLabel):
        if any(a >= b for a, b in pairwise((Decimal(0), *label.cuts))):
            raise InputError(
                "CONTRACT_CUTS",
                "The ends of the intervals do not rise from 0.",
                field="data.label.cuts",
                rule="above 0, each above the one before",
                remedy="Write them in rising order, such as [30, 90, 365].",
            )
        if len(set(label.outcomes)) != 2:
            raise InputError(
                "CONTRACT_OUTCOMES",
                "The two outcomes are one.",
                field="data.label.outcomes",
                remedy='Write what the cell says where no event was seen, then where one was: ["no", "yes"].',
            )
        return
    if len(set(label.classes)) != len(label.classes):
        raise InputError(
            "CONTRACT_CLASSES", "A class stands twice.", field="data.label.classes", remedy="Write each class once."
        )
    if (label.rule == "above") != (label.threshold is not None) or (label.rule == "above" and len(label.classes) != 2):
        raise InputError(
            "CONTRACT_LABEL_RULE",
            "The rule `above` needs a threshold and two classes; the rule `value` needs no threshold.",
            field="data.label",
            remedy='Write rule = "value" and no threshold, or rule = "above", two classes and a threshold.',
        )


def check_model(contract: Contract) -> None:
    """The model fits the data."""
    check_layers(contract.model, contract.data)


def check_layers(model: Model, data: Data) -> None:
    """Hidden layers belong to an mlp or a cnn; a linear model is a softmax where the label has classes, only there."""
    kind = model.kind
    if kind != "cnn" and (kind == "mlp") != bool(model.hidden):
        raise InputError(
            "CONTRACT_MODEL",
            "An mlp has hidden layers, a linear model none.",
            field="model.hidden",
            rule="hidden = [] but for an mlp, and for a cnn if you like",
            remedy="Write the widths, such as [32]." if kind == "mlp" else 'Write [], or kind = "mlp".',
        )
    for name in ("image", "convolutions"):
        if (kind == "cnn") != (getattr(model, name) is not None):
            raise InputError(
                "CONTRACT_MODEL",
                f"A cnn has `{name}`, and a model of another kind none.",
                field=f"model.{name}",
                rule="image and convolutions go with the kind cnn",
                remedy='Write both with kind = "cnn", and leave both out with any other kind.',
            )
    linear = "softmax" if isinstance(data.label, ClassLabel) else "linear"
    if kind not in (linear, "mlp", "cnn"):
        raise InputError(
            "CONTRACT_MODEL",
            f"A {kind} model does not fit the task, {data.label.TASK}.",
            field="model.kind",
            rule="softmax for classes, linear for all other labels, mlp or cnn for any",
            remedy=f'Write kind = "{linear}", "mlp" or "cnn".',
        )
    if model.image is not None:
        _check_image(data, model, model.image)
    from fedpact_contract.shape import parameter_count  # which is made of this module

    if (count := parameter_count(model, data)) > MAX_PARAMETERS:
        raise InputError(
            "CONTRACT_MODEL",
            f"The model has {count} parameters; the pipes of an agent take {MAX_PARAMETERS}.",
            field="model",
            rule=f"at most {MAX_PARAMETERS} parameters",
            remedy="Take narrower layers, fewer columns, or a smaller image.",
        )


MAX_PARAMETERS = 2**26
"""Of a model: it goes to the trainer, and to the executor, as one array of 8 bytes each."""
MAX_WINDOWS = 2**20
"""Numbers (float64) that a convolution looks at, or gives, for one row: 8 MiB. More is refused."""


def _check_image(data: Data, model: Model, image: Image) -> None:
    """The columns are the picture's pixels, all of a channel alike; the windows fit, in the picture and in memory."""
    grids, shown = model.grids, f"{image.height} x {image.width} pixels with {counted(image.channels, 'channel')}"
    if grids[0].size != len(data.columns):
        raise InputError(
            "CONTRACT_IMAGE",
            f"A picture of {shown} is {grids[0].size} numbers; the data has {counted(len(data.columns), 'column')}.",
            field="model.image",
            rule="columns = channels x height x width: channel by channel, of each line by line, pixel by pixel",
            remedy="Give the picture's true size, and one column a number; the label is none of them.",
        )
    plane = image.height * image.width
    for index, column in enumerate(data.columns):
        first = data.columns[index - index % plane]
        if _pixel(column) is None or _pixel(column) != _pixel(first):
            raise InputError(
                "CONTRACT_IMAGE",
                f"The column {column.name} is no number with the bounds of {first.name}, the first of its channel.",
                field=f"data.columns.{column.name}",
                rule="a filter looks at every place alike, so all pixels of a channel have the same bounds",
                remedy="Give all of them the bounds that a pixel can have, such as 0 and 255.",
            )
    for index, (layer, (before, after)) in enumerate(zip(model.convolutions or (), pairwise(grids), strict=True)):
        windows = after.height * after.width
        seen = windows * max(layer.kernel**2 * before.channels + (index == 0), layer.filters)
        if seen > MAX_WINDOWS:
            raise InputError(
                "CONTRACT_IMAGE",
                f"Of one row this convolution's windows, or outputs, are {seen} numbers.",
                field=f"model.convolutions.{index}",
                rule=f"at most {MAX_WINDOWS}: windows x kernel^2 x channels, and windows x filters",
                remedy="Take a larger stride, a smaller kernel, or fewer filters.",
            )


def _pixel(column: Column) -> tuple[Decimal, Decimal] | None:
    return (column.low, column.high) if isinstance(column, NumberColumn) else None


def check_training(contract: Contract) -> None:
    """Rates are positive, and a server's optimizer has a memory that fades."""
    _positive(contract.training.learning_rate, "training.learning_rate")
    _positive(contract.training.server_rate, "training.server_rate")
    optimizer, field = contract.training.server_optimizer, "training.server_optimizer"
    if optimizer is None:
        return
    if isinstance(contract.privacy, ClientPrivacy):
        raise InputError(
            "CONTRACT_SERVER_OPTIMIZER",
            "A server's optimizer is offered with record-level privacy; at client level the noised mean is added.",
            field=field,
            remedy="Leave it out, or take the trust model record-level-at-each-participant.",
        )
    _positive(optimizer.tau, f"{field}.tau")
    for name in ("beta_1", "beta_2"):
        beta = getattr(optimizer, name)
        if not 0 <= beta < 1 or (optimizer.kind == "adagrad" and beta != 0):
            raise InputError(
                "CONTRACT_BETA",
                f"{name} is {beta}; it must be 0 for adagrad, and at least 0 and below 1 for adam and yogi.",
                field=f"{field}.{name}",
                remedy="Write 0." if optimizer.kind == "adagrad" else "Write 0.9 for beta_1 and 0.99 for beta_2.",
            )


def check_privacy(contract: Contract) -> None:
    """Privacy quantities are in range; one delta for all, small enough for the largest data set, or for all clients."""
    privacy = contract.privacy
    clip = "max_grad_norm" if isinstance(privacy, RecordPrivacy) else "max_update_norm"
    for name in ("epsilon", "delta", clip, "sample_rate", "noise_multiplier"):
        _positive(getattr(privacy, name), f"privacy.{name}")
    if float(privacy.sample_rate) >= 1:
        raise InputError(
            "CONTRACT_SAMPLE_RATE",
            "The sample rate must be below 1, also as the number of 64 bits that rows are drawn by.",
            field="privacy.sample_rate",
            rule="0 < sample_rate < 1",
            remedy="Write the probability with which a row is drawn in a step, such as 0.1.",
        )
    units, words = max(p.num_examples for p in contract.participants), "max num_examples"
    if isinstance(privacy, ClientPrivacy):
        units, words = len(contract.participants), "participants"
    limit = delta_limit(units)
    if privacy.delta > limit:
        raise InputError(
            "CONTRACT_DELTA",
            f"delta must be at most {delta_text(limit)}.",
            field="privacy.delta",
            rule=f"delta <= min(1e-5, 1/(10 {words}))",
            remedy=f"Write delta = {delta_text(limit)}, or less.",
        )
    if isinstance(privacy, ClientPrivacy):
        _check_central(contract)
    elif privacy.entity is not None:
        _check_entity(contract, privacy.entity)


def delta_limit(units: int) -> Decimal:
    """The largest delta that may be promised to so many rows, or participants where these are protected as a whole."""
    return min(Decimal("1e-5"), 1 / (10 * Decimal(units)))


def delta_text(limit: Decimal) -> str:
    """A limit of delta for people: three digits, rounded down, so that what they copy is allowed."""
    return decimal_text(Context(prec=3, rounding=ROUND_FLOOR).plus(limit))


def check_trust_model(contract: Contract) -> None:
    """Rule and game are the trust model's."""
    central = isinstance(contract.privacy, ClientPrivacy)
    rules, games = ("weighted-mean", "median", "krum"), ("fixed-weight", "re-normalised")
    for field, value, due in (
        ("training.aggregation", contract.training.aggregation, ("uniform-mean",) if central else rules),
        ("contribution.game", contract.contribution.game, ("unanimity",) if central else games),
    ):
        if value not in due:
            allowed = " or ".join(f'"{name}"' for name in due)
            raise InputError(
                "CONTRACT_TRUST_MODEL",
                f'{field} must be {allowed} under the trust model "{contract.privacy.trust_model}".',
                field=field,
                rule="weights and scores that the trust model protects",
                remedy=f"Write {allowed}, or take the other trust model.",
            )


def check_aggregation(contract: Contract) -> None:
    """A rule that is no sum is scored by the game that needs none, and Krum has neighbours to compare with."""
    training, game = contract.training, contract.contribution.game
    if training.aggregation in ("median", "krum") and game != "re-normalised":
        raise InputError(
            "CONTRACT_AGGREGATION_GAME",
            f'What the rule "{training.aggregation}" makes of all updates is no sum over participants: with fixed '
            "weights there is nothing to add for a group of them.",
            field="contribution.game",
            rule="median and krum go with the re-normalised game",
            remedy='Take game = "re-normalised", or aggregation = "weighted-mean".',
        )
    if game == "re-normalised" and training.server_optimizer is not None:
        raise InputError(
            "CONTRACT_OPTIMIZER_GAME",
            "A server's optimizer steps by what the updates of earlier rounds left: no group of this round's makes "
            "that step by itself.",
            field="training.server_optimizer",
            rule="a server's optimizer goes with the fixed-weight game",
            remedy='Leave it out, or take game = "fixed-weight".',
        )
    if (training.krum is None) != (training.aggregation != "krum"):
        raise InputError(
            "CONTRACT_KRUM",
            '[training.krum] goes with aggregation = "krum", and only with it.',
            field="training.krum",
            remedy="Write tolerated and kept there, or leave the clause out.",
        )
    if training.krum is not None:
        _check_krum(training.krum, contract.participation.minimum)


def _check_krum(krum: Krum, minimum: int) -> None:
    if 2 * krum.tolerated + 2 >= minimum:
        raise InputError(
            "CONTRACT_KRUM",
            f"With at least {minimum} updates Krum cannot tolerate {krum.tolerated}.",
            field="training.krum.tolerated",
            rule="2 tolerated + 2 < participation.minimum",
            remedy=f"Tolerate fewer, or set the minimum to {2 * krum.tolerated + 3}.",
        )
    if krum.kept > (most := minimum - krum.tolerated):
        raise InputError(
            "CONTRACT_KRUM",
            f"With at least {minimum} updates, {krum.tolerated} of them tolerated, at most {most} can be kept.",
            field="training.krum.kept",
            rule="kept <= participation.minimum - tolerated",
            remedy=f"Keep {most} or fewer; 1 is Krum itself.",
        )


def _check_central(contract: Contract) -> None:
    """Nothing is paid by, or released besides, what only the operator may read."""
    if contract.settlement.contribution_weight > 0:
        raise InputError(
            "CONTRACT_CENTRAL_PAYOUT",
            "Contribution is measured on updates without noise, which client-level privacy shows to nobody but the "
            "operator: nothing can be paid by it.",
            field="settlement.contribution_weight",
            rule="contribution_weight = 0 at client level",
            remedy="Pay by data or equally, or take the trust model record-level-at-each-participant.",
        )
    for field, clause in (
        ("privacy.entity", contract.privacy.entity),
        ("statistics", contract.statistics),
        ("baseline", contract.baseline),
    ):
        if clause is not None:
            raise InputError(
                "CONTRACT_CENTRAL_CLAUSE",
                f"[{field}] rests on noise that each participant adds, and at client level the operator adds it.",
                field=field,
                remedy="Leave it out, or take the trust model record-level-at-each-participant.",
            )


def _check_entity(contract: Contract, entity: EntityUnit) -> None:
    """The column is no feature and no label; epsilon and delta promise something."""
    _positive(entity.epsilon, "privacy.entity.epsilon")
    _positive(entity.delta, "privacy.entity.delta")
    if entity.column in {c.name for c in contract.data.columns} | {*contract.data.label_columns}:
        raise InputError(
            "CONTRACT_ENTITY_COLUMN",
            f"The column {entity.column} says whose a row is, and is also a feature or the label.",
            field="privacy.entity.column",
            rule="what tells entities apart is not learned from",
            remedy="Leave it out of [data], or name another column.",
        )
    if entity.delta > (most := entity_delta_limit(contract)):
        raise InputError(
            "CONTRACT_ENTITY_DELTA",
            f"The entities' delta is {entity.delta:.3g}; it must be at most {most:.3g}.",
            field="privacy.entity.delta",
            rule="delta <= 1/(10 entities), and there may be as many entities as rows",
            remedy='Take method = "mixture-of-gaussians", which keeps the contract\'s delta, or fewer rows an entity.',
        )
    if entity.method == "mixture-of-gaussians" and entity.delta != contract.privacy.delta:
        raise InputError(
            "CONTRACT_ENTITY_DELTA",
            "With method = \"mixture-of-gaussians\" the entities' delta is the contract's.",
            field="privacy.entity.delta",
            remedy=f"Write {decimal_text(contract.privacy.delta)}.",
        )


def entity_delta_limit(contract: Contract) -> Decimal:
    """The largest delta that protects entities: there may be as many of them as rows."""
    return 1 / (10 * Decimal(max(p.num_examples for p in contract.participants)))


MAX_STEPS = 100_000
"""Steps whose privacy cost is computed in seconds; deep learning on one data set needs a few thousand."""


def check_steps(contract: Contract) -> None:
    """The plan is of a length whose cost can be computed while somebody waits for it."""
    baseline = 0 if contract.baseline is None else contract.baseline.steps
    if contract.planned_steps + baseline > MAX_STEPS:
        raise InputError(
            "CONTRACT_TOO_MANY_STEPS",
            f"The plan has {contract.planned_steps + baseline} DP-SGD steps at each participant; at most {MAX_STEPS} "
            "are offered.",
            field="training.local_steps",
            remedy="Plan fewer rounds, local steps, spare attempts or baseline steps.",
        )


def check_participation(contract: Contract) -> None:
    """The minimum can be reached, and reaches the head threshold where heads are strict."""
    participation, count = contract.participation, len(contract.blocks())
    if not 2 <= participation.minimum <= count:
        raise InputError(
            "CONTRACT_MINIMUM",
            f"The minimum must lie between 2 and {count}.",
            field="participation.minimum",
            rule="as many as there are participants, those under common control counted once",
            remedy=f"Write a number from 2 to {count}." if count >= 2 else "Name at least two participants.",
        )
    if participation.head_threshold > len(contract.participants) - 1:
        raise InputError(
            "CONTRACT_HEAD_THRESHOLD",
            "More countersignatures are asked for than other participants exist.",
            field="participation.head_threshold",
            remedy=f"Write at most {len(contract.participants) - 1}.",
        )
    if participation.strict_heads and participation.minimum <= participation.head_threshold:
        raise InputError(
            "CONTRACT_STRICT_HEADS",
            "With strict_heads the minimum must be above head_threshold, or the run can never go on.",
            field="participation.minimum",
            remedy="Raise the minimum, lower head_threshold, or write strict_heads = false.",
        )


MAX_UNSCORED = 200
"""Participants of the unanimity game, which looks at no group of them; their second moments stand in the log."""
MAX_SAMPLED = 100
"""Participants whose values are estimated."""
MAX_EXACT = 12
"""Participants whose values are exact: 4,096 groups a round."""


def check_loss(contract: Contract) -> None:
    """The loss that contribution is measured by is the label's, that is the one that is trained."""
    label = contract.data.label
    if contract.contribution.loss != label.LOSS:
        raise InputError(
            "CONTRACT_LOSS",
            f"The loss {contract.contribution.loss} does not fit the label: its rule is {label.rule}, "
            f"the task {label.TASK}.",
            field="contribution.loss",
            rule="contribution is measured by the loss that is trained",
            remedy=f'Write loss = "{label.LOSS}".',
        )


def check_contribution(contract: Contract) -> None:
    """Slices come from the operator or participants, each once; exact values need few participants."""
    sources = [s.source for s in contract.contribution.validation.slices]
    known = {"operator", *(p.id for p in contract.participants)} | ({"buyer"} if contract.buyer else set())
    if len(set(sources)) != len(sources) or not set(sources) <= known:
        raise InputError(
            "CONTRACT_SLICES",
            "A validation slice comes from the operator, the contract's buyer or a participant, one slice from each.",
            field="contribution.validation.slices",
            remedy="Give the rows of each as one file; name the buyer ([buyer]) where it gives rows.",
        )
    if set(sources) <= {p.id for p in contract.participants} and len(sources) < 2:
        raise InputError(
            "CONTRACT_SLICES",
            "A participant's own slice cannot be the only one: it is scored on the others' rows.",
            field="contribution.validation.slices",
            remedy="Add validation rows of the operator, of the buyer or of another participant.",
        )
    for party in contract.participants:
        if party.id in sources and contract.controlled_by(party.id):
            raise InputError(
                "CONTRACT_SLICES",
                f"{party.name} is under common control with participants that would be scored on its rows.",
                field="contribution.validation.slices",
                party=party.name,
                rule="a party is scored on the others' rows",
                remedy="Take validation rows of somebody outside the group, or leave that participant out of it.",
            )
    sampled = contract.contribution.estimator == "sampled"
    if sampled != (contract.contribution.max_coalitions is not None) or (
        sampled and contract.contribution.game == "unanimity"
    ):
        raise InputError(
            "CONTRACT_ESTIMATOR",
            'max_coalitions goes with estimator = "sampled", and with it alone; the unanimity game samples nothing.',
            field="contribution.estimator",
            remedy='Write "exact" and no max_coalitions, or, in another game than unanimity, "sampled" with it.',
        )
    most = MAX_SAMPLED if sampled else MAX_EXACT
    if contract.contribution.game == "unanimity":
        most = MAX_UNSCORED
    if len(contract.participants) > most:
        raise InputError(
            "CONTRACT_TOO_MANY_PLAYERS",
            f"{'Sampled' if sampled else 'Exact'} values of this game are offered for at most {most} participants.",
            field="contribution.estimator",
            remedy=f"Name at most {most} participants."
            if sampled or most == MAX_UNSCORED
            else 'Take estimator = "sampled" with max_coalitions, for up to 100 participants.',
        )
    if sampled:
        check_coalitions(contract)


def estimator_plan(
    contract: Contract, players: int, seed: bytes, unions: tuple[tuple[int, ...], ...] = ()
) -> estimators.Plan:
    """The groups that a round with so many players begins with.

    Args:
        contract: One whose estimator is `sampled`.
        players: Of the round.
        seed: `sampling.round_seed`.
        unions: Of the round's players, by their places.

    Raises:
        InputError: ESTIMATOR_BUDGET, max_coalitions is too small for so many.
    """
    return estimators.choose(
        players,
        game="re-normalised" if contract.contribution.game == "re-normalised" else "fixed-weight",
        linear=quick_to_score(contract),
        most=contract.contribution.max_coalitions or 0,
        seed=seed,
        unions=unions,
    )


def quick_to_score(contract: Contract) -> bool:
    """Whether a group's loss follows from its members' steps, so that more groups of more participants are scored."""
    return contract.model.kind in ("softmax", "linear") and contract.contribution.game == "fixed-weight"


def check_coalitions(contract: Contract) -> None:
    """The groups allowed suffice, however many are admitted."""
    for players in range(1, len(contract.participants) + 1):
        try:
            estimator_plan(contract, players, bytes(32))
        except InputError as err:
            field = "contribution.max_coalitions"
            raise InputError("CONTRACT_COALITIONS", err.message, field=field, rule=err.rule, remedy=err.remedy) from err


def check_defences(contract: Contract) -> None:
    """There are single updates to look at, and a part of v(N), or of the rows, is a part."""
    defences = contract.defences
    if defences is None:
        return
    if isinstance(contract.privacy, ClientPrivacy):
        raise InputError(
            "CONTRACT_CENTRAL_DEFENCES",
            "At client level no single update is looked at, neither for its score nor for an alarm.",
            field="defences",
            remedy="Leave it out, or take the trust model record-level-at-each-participant.",
        )
    if not 0 < defences.negatives < 1:
        raise InputError(
            "CONTRACT_NEGATIVES",
            f"negatives is {defences.negatives}, and must be a part of the total value.",
            field="defences.negatives",
            rule="above 0 and below 1",
            remedy="Write 0.1: a review where negative values are above a tenth of the total.",
        )
    if defences.max_duplicates is not None and not 0 <= defences.max_duplicates < 1:
        raise InputError(
            "CONTRACT_DUPLICATES",
            f"max_duplicates is {defences.max_duplicates}, and must be a part of a participant's rows.",
            field="defences.max_duplicates",
            rule="0 or above, and below 1",
            remedy="Write 0.05: at most a twentieth of the rows may be exact copies; or leave it out.",
        )
    if contract.contribution.game == "re-normalised":
        _check_renormalised_defences(contract, defences)


def _check_renormalised_defences(contract: Contract, defences: Defences) -> None:
    """What rests on values that are 0 for nothing, or on rows that count once, is not of this game."""
    for field, value, due, why in (
        ("defences.wreckers", defences.wreckers, "report", "a value below zero is nothing unusual"),
        ("training.aggregation", contract.training.aggregation, "weighted-mean", "a union's rows cannot count once"),
        ("contribution.estimator", contract.contribution.estimator, "exact", "no union's value is estimated"),
    ):
        if value != due:
            raise InputError(
                "CONTRACT_DEFENCES_GAME",
                f'With defences in the re-normalised game {field} must be "{due}": with "{value}" {why}.',
                field=field,
                rule='wreckers = "report", aggregation = "weighted-mean" and estimator = "exact"',
                remedy='Write so, leave [defences] out, or take game = "fixed-weight".',
            )


def check_settlement(contract: Contract) -> None:
    """Weights are not negative and sum to one."""
    settlement = contract.settlement
    weights = (settlement.contribution_weight, settlement.data_weight, settlement.equal_weight)
    if min(weights) < 0 or sum(weights) != 1:
        raise InputError(
            "CONTRACT_WEIGHTS",
            "contribution_weight, data_weight and equal_weight are not negative and sum to 1.",
            field="settlement",
            remedy="Write three parts of the pool, such as 0.7, 0.2 and 0.1.",
        )


def check_term(contract: Contract) -> None:
    """The term begins and ends on days that there are, and has a length."""
    for field, text in (("term.not_before", contract.term.not_before), ("term.not_after", contract.term.not_after)):
        try:
            parse_instant(text)
        except InputError as err:
            raise InputError(
                "CONTRACT_TERM",
                f"There is no such day or time: {text}.",
                field=field,
                remedy="Write a UTC time that there is: months have their days, and a day ends at 23:59:59.",
            ) from err
    if contract.term.not_before >= contract.term.not_after:
        raise InputError(
            "CONTRACT_TERM",
            "not_before must be earlier than not_after.",
            field="term",
            remedy="Write two UTC times, the earlier one as not_before.",
        )


CHECKS: tuple[Callable[[Contract], None], ...] = (
    check_parties,
    check_affiliates,
    check_common_control,
    check_auditor,
    check_gate_orders,
    check_data,
    check_model,
    check_training,
    check_privacy,
    check_trust_model,
    check_aggregation,
    check_steps,
    check_statistics,
    check_participation,
    check_loss,
    check_contribution,
    check_defences,
    check_settlement,
    check_term,
)


def merge(
    base: Mapping[str, Any], derived: Mapping[str, Any], *, file: object = None, under: str = ""
) -> dict[str, Any]:
    """A template, or its part `under` a place, with derived values filled in; what stands in both is an error.

    Raises:
        InputError: TEMPLATE_DERIVED_KEY, the template gives a value that is derived.
    """
    result = dict(base)
    for key, value in derived.items():
        place = f"{under}.{key}" if under else key
        if isinstance(value, Mapping) and isinstance(result.get(key, {}), Mapping):
            result[key] = merge(result.get(key, {}), value, file=file, under=place)
        elif key in result:
            raise InputError(
                "TEMPLATE_DERIVED_KEY",
                f"{place} is worked out by `contract new` and cannot be given.",
                file=file,
                field=place,
                rule="a template says what people decide, and nothing that follows from it",
                remedy=f"Remove {key} from the template.",
            )
        else:
            result[key] = value
    return result


def _positive(value: Decimal, field: str) -> None:
    if value <= 0:
        raise InputError(
            "CONTRACT_NOT_POSITIVE",
            f"{field} must be greater than 0.",
            field=field,
            rule="above 0",
            remedy="Write a number above 0.",
        )
