"""What this enterprise allows, whoever asks: checked when a contract is signed and again before every round.

Each clause reads the contract, which is signed, and the policy, which is local. A clause that is not satisfied
refuses; an empty list allows nothing. The policy can only narrow what a signed contract allows.
"""

import datetime
import re
import zoneinfo
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from fedpact_contract.contract import ClientPrivacy, Contract, Count
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.output import counted
from fedpact_contract.record import Code, Dec, Hex32, Instant, Name, Part, form
from fedpact_contract.request import instant, parse_instant


def _instant(value: object) -> object:
    if isinstance(value, datetime.datetime):
        if value.tzinfo is None:
            raise ValueError("needs a time zone: end it with Z")
        try:
            value = instant(value)
        except OverflowError as err:  # in UTC it lies before the year 1, or after 9999
            raise ValueError("must lie between the years 1 and 9999") from err
    if isinstance(value, str):
        try:
            parse_instant(value)
        except InputError as err:
            raise ValueError(err.message) from err
    return value


ClockTime = Annotated[str, form(r"^([01][0-9]|2[0-3]):[0-5][0-9]$", "a time of day such as 20:00")]


class Hours(Part):
    """A window of the day: from `begin` on, up to `end`; where that is earlier, on the next day.

    `zone` is a name of the system's time zones, such as Asia/Shanghai, or an offset such as +08:00.
    """

    begin: ClockTime
    end: ClockTime
    zone: Name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.begin == self.end:
            raise ValueError("begin and end are the same: leave `hours` out to allow the whole day")
        self.tzinfo  # noqa: B018 - a zone that is unknown here is found now, not at the first order
        return self

    @property
    def tzinfo(self) -> datetime.tzinfo:
        """The zone."""
        if offset := re.fullmatch(r"([+-])([01][0-9]|2[0-3]):([0-5][0-9])", self.zone):
            sign, hours, minutes = offset.groups()
            return datetime.timezone(int(sign + "1") * datetime.timedelta(hours=int(hours), minutes=int(minutes)))
        try:
            return zoneinfo.ZoneInfo(self.zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as err:
            raise ValueError(f"this system knows no time zone {self.zone}; write an offset such as +08:00") from err

    def open_at(self, now: datetime.datetime) -> bool:
        """Whether a moment lies within."""
        at = now.astimezone(self.tzinfo).strftime("%H:%M")
        if self.begin < self.end:
            return self.begin <= at < self.end
        return at >= self.begin or at < self.end


TrustModel = Literal["record-level-at-each-participant", "client-level-at-the-operator"]


class Policy(Part):
    """The enterprise's own limits. But for the last six none has a default: agent.toml states each one.

    `operators` are fingerprints of operators' keys, or "enrolled" for the one that `enrol` checked; `resolve` puts
    its fingerprint in place. `sectors` are those that the other participants may come from. `max_epsilon` holds for
    one contract; the data set's own limit over all contracts stands on its card. Where the last six are left out, no
    operator sees an update without noise, and a data set whose card says whose a row is takes part only where the
    contract protects all rows of one entity together, at whatever epsilon; at any hour; and each data set has its
    card's limit alone, and as many uses as its contracts plan. A use is an attempt at a round, or a measurement.
    """

    purposes: tuple[Code, ...]
    operators: tuple[Hex32, ...] | Literal["enrolled"]
    sectors: tuple[Code, ...] | Literal["*"]
    model_kinds: tuple[Code, ...]
    columns: tuple[Name, ...] | Literal["*"]
    max_epsilon: Dec
    min_participants: Count
    max_rounds: Count
    not_after: Annotated[Instant, BeforeValidator(_instant)]
    trust_models: tuple[TrustModel, ...] = ("record-level-at-each-participant",)
    require_entity: bool = True
    max_entity_epsilon: Dec | None = None
    hours: Hours | None = None
    max_data_set_epsilon: Dec | None = None
    max_data_set_uses: Count | None = None

    def resolve(self, operator_id: str) -> "Policy":
        """This policy with the enrolled operator's fingerprint in the place of "enrolled"."""
        return self.model_copy(update={"operators": (operator_id,)}) if self.operators == "enrolled" else self


Clause = Callable[[Contract, str, Policy, datetime.datetime], None]


def check(
    contract: Contract,
    participant_id: str,
    policy: Policy,
    now: datetime.datetime,
    clauses: Sequence[Clause] | None = None,
) -> None:
    """Raise unless every clause of the policy allows this contract now, for this participant.

    Args:
        contract: The contract, its signatures already verified where that matters.
        participant_id: This enterprise's id.
        policy: Resolved: an "enrolled" that still stands there allows no operator.
        now: The time, with a time zone.
        clauses: Those that are asked; all of them unless given.

    Raises:
        RefusedError: POLICY_*, with the policy's key as `rule`, the contract's as `field`, and what both say. Where
            several clauses refuse, it has the first one's code and says what all of them say.
    """
    if participant_id not in contract.by_id():
        raise _refused(
            "POLICY_NOT_A_PARTY", None, "participants", "This enterprise is not a participant of the contract."
        )
    refusals = []
    for clause in CLAUSES if clauses is None else clauses:
        try:
            clause(contract, participant_id, policy, now)
        except RefusedError as err:
            refusals.append(err)
    if refusals:
        raise _together(refusals)


def check_purpose(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """The contract's purpose is one of those allowed, letter by letter."""
    if contract.purpose not in policy.purposes:
        raise _refused(
            "POLICY_PURPOSE_MISMATCH",
            "purposes",
            "purpose",
            f"The contract's purpose is {contract.purpose}; the policy allows {_list(policy.purposes)}.",
        )


def check_operator(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """The operator's key is one of those allowed."""
    allowed = () if isinstance(policy.operators, str) else policy.operators
    if contract.operator.id not in allowed:
        raise _refused(
            "POLICY_OPERATOR",
            "operators",
            "operator.key",
            f"The operator's key {contract.operator.id} is not allowed; the policy allows {_list(allowed)}.",
        )


def check_sectors(contract: Contract, me: str, policy: Policy, _now: datetime.datetime) -> None:
    """The other participants come from the sectors allowed."""
    if policy.sectors == "*":
        return
    for place, participant in enumerate(contract.participants):
        if participant.id != me and participant.sector not in policy.sectors:
            raise _refused(
                "POLICY_SECTOR",
                "sectors",
                f"participants.{place}.sector",
                f"{participant.name} is of the sector {participant.sector}; the policy allows {_list(policy.sectors)}.",
            )


def check_model(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """The kind of model is one of those allowed."""
    if contract.model.kind not in policy.model_kinds:
        raise _refused(
            "POLICY_MODEL",
            "model_kinds",
            "model.kind",
            f"The model is a {contract.model.kind}; the policy allows {_list(policy.model_kinds)}.",
        )


def check_columns(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """Only allowed columns are read, the label among them, and the one that tells entities apart."""
    if policy.columns == "*":
        return
    places = dict(zip(contract.data.label_columns, ("data.label.name", "data.label.event"), strict=False))
    if contract.privacy.entity is not None:
        places[contract.privacy.entity.column] = "privacy.entity.column"
    for name in contract.columns_read:
        if name not in policy.columns:
            raise _refused(
                "POLICY_COLUMN",
                "columns",
                places.get(name, f"data.columns.{name}"),
                f"The contract reads the column {name}; the policy allows {_list(policy.columns)}.",
            )


def check_trust_model(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """Who adds the noise, and so who sees what, is allowed."""
    if contract.privacy.trust_model not in policy.trust_models:
        central = contract.privacy.trust_model == "client-level-at-the-operator"
        raise _refused(
            "POLICY_TRUST_MODEL",
            "trust_models",
            "privacy.trust_model",
            f"The contract's trust model is {contract.privacy.trust_model}"
            + (": the operator would see our updates without noise" if central else "")
            + f"; the policy allows {_list(policy.trust_models)}.",
        )


def check_epsilon(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """The contract's epsilon is within the limit for one contract."""
    if contract.privacy.epsilon > policy.max_epsilon:
        raise _refused(
            "POLICY_EPSILON",
            "max_epsilon",
            "privacy.epsilon",
            f"The contract costs epsilon {contract.privacy.epsilon}; the policy allows {policy.max_epsilon} for one.",
        )


def check_entity_epsilon(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """What protects all rows of one entity together is within its limit, where there is one."""
    entity = contract.privacy.entity
    if entity is not None and policy.max_entity_epsilon is not None and entity.epsilon > policy.max_entity_epsilon:
        raise _refused(
            "POLICY_ENTITY_EPSILON",
            "max_entity_epsilon",
            "privacy.entity.epsilon",
            f"All rows of one entity cost epsilon {entity.epsilon} in the contract; the policy allows "
            f"{policy.max_entity_epsilon} for one contract.",
        )


def check_minimum(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """Enough participants must be admitted in each round."""
    if contract.participation.minimum < policy.min_participants:
        raise _refused(
            "POLICY_MIN_PARTICIPANTS",
            "min_participants",
            "participation.minimum",
            f"A round counts from {contract.participation.minimum} participants on; "
            f"the policy wants at least {policy.min_participants}.",
        )


def check_rounds(contract: Contract, _me: str, policy: Policy, _now: datetime.datetime) -> None:
    """Not more rounds than allowed."""
    if contract.training.rounds > policy.max_rounds:
        raise _refused(
            "POLICY_ROUNDS",
            "max_rounds",
            "training.rounds",
            f"The contract has {counted(contract.training.rounds, 'round')}; the policy allows {policy.max_rounds}.",
        )


def check_expiry(contract: Contract, _me: str, policy: Policy, now: datetime.datetime) -> None:
    """The policy still holds, and does so until the contract's term ends."""
    limit = parse_instant(policy.not_after)
    if now > limit or parse_instant(contract.term.not_after) > limit:
        raise _refused(
            "POLICY_EXPIRED",
            "not_after",
            "term.not_after",
            f"The policy ends on {policy.not_after}; the contract runs until {contract.term.not_after}.",
        )


def check_term(contract: Contract, _me: str, _policy: Policy, now: datetime.datetime) -> None:
    """Now lies within the contract's term."""
    if not parse_instant(contract.term.not_before) <= now <= parse_instant(contract.term.not_after):
        raise _refused(
            "POLICY_TERM",
            None,
            "term",
            f"It is {instant(now)}; the contract runs from {contract.term.not_before} to {contract.term.not_after}.",
        )


def check_hours(_contract: Contract, _me: str, policy: Policy, now: datetime.datetime) -> None:
    """Now lies within the hours in which training may begin."""
    if policy.hours is not None and not policy.hours.open_at(now):
        raise RefusedError(
            "POLICY_HOURS",
            f"It is {instant(now)}; training may begin from {policy.hours.begin} to {policy.hours.end} "
            f"({policy.hours.zone}) only.",
            rule="policy.hours in agent.toml",
            remedy="Nothing is to be done: a round that opens within these hours is trained.",
        )


CLAUSES: tuple[Clause, ...] = (
    check_purpose,
    check_operator,
    check_sectors,
    check_model,
    check_columns,
    check_trust_model,
    check_epsilon,
    check_entity_epsilon,
    check_minimum,
    check_rounds,
    check_expiry,
    check_term,
)
"""Asked when a contract is signed, and before every attempt."""

ORDER_CLAUSES: tuple[Clause, ...] = (*CLAUSES, check_hours)
"""Asked before the first attempt at a round: one that began within the hours is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetUse:
    """What a data set is charged over all contracts once something more is: uses, and the Rényi sum at `alpha`."""

    data_set: str
    uses: int
    rdp: Decimal
    delta: Decimal
    alpha: Decimal


def check_data_set(policy: Policy, use: DataSetUse) -> None:
    """A data set stays within the policy's own limits over all contracts, which its card's may exceed.

    Raises:
        RefusedError: POLICY_DATA_SET_EPSILON, POLICY_DATA_SET_USES.
    """
    from fedpact_contract.privacy import filter_limit

    most = policy.max_data_set_epsilon
    if most is not None and use.rdp > (limit := filter_limit(most, use.delta, use.alpha)):
        raise _refused(
            "POLICY_DATA_SET_EPSILON",
            "max_data_set_epsilon",
            f"data set {use.data_set}",
            f"The data set would be charged {use.rdp:.6g} (Rényi divergence) by all contracts; epsilon {most} allows "
            f"{max(limit, Decimal(0)):.6g}.",
        )
    if policy.max_data_set_uses is not None and use.uses > policy.max_data_set_uses:
        raise _refused(
            "POLICY_DATA_SET_USES",
            "max_data_set_uses",
            f"data set {use.data_set}",
            f"The data set would be used {counted(use.uses, 'time')} by all contracts; the policy allows "
            f"{policy.max_data_set_uses}.",
        )


def check_entities(contract: Contract, policy: Policy, data_set: str, declared: str | None, card: str | None) -> None:
    """What tells a data set's entities apart: agent.toml says what the card says, and the contract protects them.

    Under client-level privacy the contract's unit is a participant's whole update, every entity's rows in it: no
    clause is wanted there.

    Args:
        contract: The contract.
        policy: This enterprise's.
        data_set: The id of its data set in the contract.
        declared: The column that agent.toml declares for it now, if any.
        card: The one on its signed card, if any.

    Raises:
        RefusedError: CARD_ENTITY_CHANGED, SIGN_ENTITY_COLUMN, POLICY_ENTITY.
    """
    if declared != card:
        raise RefusedError(
            "CARD_ENTITY_CHANGED",
            f"Whose a row of {data_set} is, agent.toml tells by {declared or 'no column'}, its signed card by "
            f"{card or 'no column'}.",
            file="agent.toml",
            field="data_sets.entity",
            rule="what was signed is what is declared",
            remedy=f"Put `entity` back in agent.toml, or sign a new card: fedpact-agent card {data_set}.",
        )
    entity = contract.privacy.entity
    if entity is not None and entity.column != card:
        raise RefusedError(
            "SIGN_ENTITY_COLUMN",
            f"The contract tells entities apart by {entity.column}, the signed card declares {card or 'none'}.",
            field="privacy.entity.column",
            remedy="Do not take part. Ask the operator for a contract that names the card's column.",
        )
    if (
        entity is None
        and card is not None
        and policy.require_entity
        and not isinstance(contract.privacy, ClientPrivacy)
    ):
        raise RefusedError(
            "POLICY_ENTITY",
            f"The card of {data_set} says whose a row is ({card}), and the contract protects single rows only.",
            field="privacy.entity",
            rule="policy.require_entity in agent.toml",
            remedy="Ask the operator for a contract with [privacy.entity], or write require_entity = false under "
            "[policy] in agent.toml if you mean to allow it.",
        )


def _list(allowed: tuple[str, ...]) -> str:
    return ", ".join(allowed) if allowed else "none"


def _refused(code: str, rule: str | None, field: str, message: str) -> RefusedError:
    """`rule` is a key of [policy] in agent.toml, `field` one of the contract."""
    if rule is None:
        remedy = "Do not take part; ask the operator for a contract that is right."
    else:
        remedy = "Do not take part, or change [policy] in agent.toml if you mean to allow it."
    return RefusedError(code, message, field=field, rule=rule and f"policy.{rule} in agent.toml", remedy=remedy)


def _together(refusals: Sequence[RefusedError]) -> RefusedError:
    """All refusals in one: the first one's code, everybody's words."""
    first, *others = refusals
    also = "".join(f" {err.code}: {err.message}" for err in others)
    return RefusedError(
        first.code,
        first.message + also,
        field=", ".join(err.field for err in refusals if err.field),
        rule=", ".join(err.rule for err in refusals if err.rule) or None,
        remedy=first.remedy,
    )
