"""The share of the pool that each participant is paid, with its interval (docs/adr/0004).

Rule, with Phi+ = max(0, Phi), n the contracted examples, r the rounds admitted, a, b, c the contract's weights:

    share_i = a Phi+_i / sum Phi+  +  b n_i r_i / sum n r  +  c r_i / sum r

Data and equality are paid pro rata to rounds admitted: whoever did not train is paid for neither. Where participants
were one union in a round, n is the union's largest, split by their n, and its round counts once, split evenly. Of
participants under common control a round counts once for equality; inside they split it pro rata to their own. If no
Phi is positive, b and c are renormalised; if both are 0 the contract's fallback holds: "metered" is b = 1, "equal" is
c = 1. It also holds where the total value is at most twice its standard error: then no share is reliable.

Floors are no part of the share. They move fen between participants after it (`settlement.water_fill`); so the
interval covers the share alone, before floors and rounding to fen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from fedpact_contract.contract import Contract, Settlement
from fedpact_contract.contribution import admitted_in, period_values, total_value
from fedpact_contract.errors import InputError
from fedpact_contract.intervals import Bounds, Matrix, Method, Rule, covariance, intervals, outward
from fedpact_contract.log import Moments, RoundScores
from fedpact_contract.sampling import standard_error
from fedpact_contract.unions import among, counted_rows

COVERS = "validation sampling only"
"""What the interval covers; it stands beside every interval that is shown."""

_ZERO = Fraction(0)

Basis = Literal["contribution", "fallback"]
Reason = Literal["reliable", "not-reliable", "no-positive-value", "contribution-not-paid", "not-opened"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much of the pool follows contribution, metered data and equality; they sum to 1."""

    contribution: Fraction
    data: Fraction
    equal: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A share by what it is paid for."""

    contribution: Fraction
    data: Fraction
    equal: Fraction

    @property
    def total(self) -> Fraction:
        """The share."""
        return self.contribution + self.data + self.equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What data and equality are paid by: examples and rounds, summed over the rounds admitted; a union's once.

    `presence` is what of each round is this participant's: 1, in a union an even part, 0 where it was not admitted.
    `rounds` is the sum of it; under common control its part of the rounds in which the group was there, each once.
    """

    rows: Fraction
    rounds: Fraction
    presence: tuple[Fraction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticipantShare:
    """One participant's share, its parts and its interval. `value` (Phi) and its standard error are in 1e-9 nat."""

    participant: str
    num_examples: int
    rounds_admitted: int
    counted: Counted
    value: Fraction
    value_se: Decimal
    parts: Parts
    share: Fraction
    low: Decimal
    high: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodShares:
    """The shares of a period, in the order of ids, and what they rest on.

    `basis` is "contribution" where the contract's weights hold and "fallback" where its fallback does; `reason` says
    why. `weights` are the ones applied. `total_value` and its standard error (that of the sum of the values, rounded
    up) are in 1e-9 nat. `method` is that of the intervals; "none": the share does not depend on the validation rows,
    and its interval is the share itself.
    """

    basis: Basis
    reason: Reason
    weights: Weights
    total_value: Fraction
    total_se: Decimal
    method: Method
    covers: str
    rounds: tuple[int, ...]
    lines: tuple[ParticipantShare, ...]


def shares(contract: Contract, rounds: Sequence[RoundScores], moments: Moments) -> PeriodShares:
    """The paid share of every participant of the contract over these rounds, with its interval.

    Raises:
        InputError: no round, or fewer than two validation rows.
        FaultError: scores that do not fit the contract or each other, or impossible second moments.
    """
    if not rounds:
        raise InputError("SHARES_NO_ROUNDS", "No round was completed: there is nothing to share by.")
    values, total = period_values(rounds, contract), total_value(rounds, contract)
    admitted = {p: sum(p in admitted_in(r) for r in rounds) for p in values}
    counted = _counted(contract, [(admitted_in(r), r.unions or ()) for r in rounds])
    cov = covariance(contract, rounds, values, moments)
    total_variance = max(_ZERO, sum((sum(row, _ZERO) for row in cov), _ZERO))
    basis, reason, weights = _choose(contract.settlement, values, total, total_variance)
    parts = _parts(values, counted, weights)
    method, bounds = _bounds(contract, values, counted, cov, reason, [p.total for p in parts])
    errors = [standard_error(cov[i][i]) for i in range(len(values))]
    return PeriodShares(
        basis=basis,
        reason=reason,
        weights=weights,
        total_value=total,
        total_se=standard_error(total_variance),
        method=method,
        covers=COVERS,
        rounds=tuple(r.round for r in rounds),
        lines=_lines(contract, admitted, counted, values, errors, parts, bounds),
    )


def projected(
    contract: Contract, values: Mapping[str, Fraction], total: Fraction, total_variance: Fraction
) -> tuple[Reason, dict[str, Parts]]:
    """By what the shares would be paid, and their parts, were these the values and everybody admitted in every round.

    Args:
        contract: The contract.
        values: Phi of each participant in the order of ids, as `total` in any one unit.
        total: v(N).
        total_variance: Its squared standard error.
    """
    _, reason, weights = _choose(contract.settlement, values, total, total_variance)
    return reason, dict(zip(values, _parts(values, everybody(contract), weights), strict=True))


def fallback_shares(contract: Contract) -> dict[str, Fraction]:
    """By id, what the contract's fallback pays where everybody is admitted in every round."""
    nothing = dict.fromkeys(contract.by_id(), _ZERO)
    parts = _parts(nothing, everybody(contract), _fallback(contract.settlement))
    return {player: part.total for player, part in zip(nothing, parts, strict=True)}


def shares_without(
    contract: Contract, rounds: Sequence[RoundScores], paid: PeriodShares, index: int
) -> dict[str, Fraction]:
    """What the shares would be if a slice of the validation set had never been there: by the same weights, by id.

    Raises:
        InputError: SLICE_NEEDED: without it a participant would be scored on no row.
        FaultError: scores that do not fit the contract or each other.
    """
    values = period_values(rounds, contract, without=index)
    weights = paid.weights
    if weights.contribution and not any(v > 0 for v in values.values()):
        weights = _without_value(contract.settlement)
    counted = {line.participant: line.counted for line in paid.lines}
    parts = _parts(values, counted, weights)
    return {player: part.total for player, part in zip(values, parts, strict=True)}


def unopened_shares(
    contract: Contract, admitted: Sequence[Sequence[str]], unions: Sequence[Sequence[Sequence[str]]] = ()
) -> PeriodShares:
    """The shares where the operator cannot open what it committed to: the contract's fallback.

    Where contribution is not paid at all, no score is missed, and the agreed weights hold.

    Args:
        contract: The contract.
        admitted: For each round that led to a model, the participants whose updates were admitted.
        unions: For each of them, who was one with whom; by default nobody.

    Raises:
        InputError: no round.
    """
    if not admitted:
        raise InputError("SHARES_NO_ROUNDS", "No round was completed: there is nothing to share by.")
    counts = {p: sum(p in names for names in admitted) for p in contract.by_id()}
    counted = _counted(contract, list(zip(admitted, unions or [()] * len(admitted), strict=True)))
    nothing, agreed = dict.fromkeys(counts, _ZERO), _agreed(contract.settlement)
    weights = agreed if agreed.contribution == 0 else _fallback(contract.settlement)
    parts = _parts(nothing, counted, weights)
    bounds = [outward(part.total, part.total) for part in parts]
    return PeriodShares(
        basis="fallback",
        reason="not-opened",
        weights=weights,
        total_value=_ZERO,
        total_se=Decimal(0),
        method="none",
        covers=COVERS,
        rounds=tuple(range(1, len(admitted) + 1)),
        lines=_lines(contract, counts, counted, nothing, [Decimal(0)] * len(counts), parts, bounds),
    )


def _lines(
    contract: Contract,
    admitted: Mapping[str, int],
    counted: Mapping[str, Counted],
    values: Mapping[str, Fraction],
    errors: Sequence[Decimal],
    parts: Sequence[Parts],
    bounds: Sequence[tuple[Decimal, Decimal]],
) -> tuple[ParticipantShare, ...]:
    """Each participant's line, in the order of ids."""
    participants = contract.by_id()
    return tuple(
        ParticipantShare(
            participant=player,
            num_examples=participants[player].num_examples,
            rounds_admitted=admitted[player],
            counted=counted[player],
            value=value,
            value_se=errors[i],
            parts=parts[i],
            share=parts[i].total,
            low=bounds[i][0],
            high=bounds[i][1],
        )
        for i, (player, value) in enumerate(values.items())
    )


def _choose(
    settlement: Settlement, values: Mapping[str, Fraction], total: Fraction, total_variance: Fraction
) -> tuple[Basis, Reason, Weights]:
    """What is paid by, and why."""
    weights = _agreed(settlement)
    if weights.contribution == 0:
        return "contribution", "contribution-not-paid", weights
    if not any(v > 0 for v in values.values()):
        basis: Basis = "contribution" if weights.data + weights.equal > 0 else "fallback"
        return basis, "no-positive-value", _without_value(settlement)
    if total <= 0 or total**2 <= 4 * total_variance:
        return "fallback", "not-reliable", _fallback(settlement)
    return "contribution", "reliable", weights


def _agreed(settlement: Settlement) -> Weights:
    return Weights(
        contribution=Fraction(settlement.contribution_weight),
        data=Fraction(settlement.data_weight),
        equal=Fraction(settlement.equal_weight),
    )


def _fallback(settlement: Settlement) -> Weights:
    metered = settlement.fallback == "metered"
    return Weights(contribution=_ZERO, data=Fraction(metered), equal=Fraction(not metered))


def _without_value(settlement: Settlement) -> Weights:
    """The weights where no value is positive."""
    agreed = _agreed(settlement)
    rest = agreed.data + agreed.equal
    if rest == 0:
        return _fallback(settlement)
    return Weights(contribution=_ZERO, data=agreed.data / rest, equal=agreed.equal / rest)


def _parts(values: Mapping[str, Fraction], counted: Mapping[str, Counted], weights: Weights) -> list[Parts]:
    """Each participant's share by its parts, in the order of ids."""
    gained = sum(max(_ZERO, v) for v in values.values())
    metered = sum((c.rows for c in counted.values()), _ZERO)
    attended = sum((c.rounds for c in counted.values()), _ZERO)
    return [
        Parts(
            contribution=weights.contribution * max(_ZERO, values[p]) / gained if gained else _ZERO,
            data=weights.data * counted[p].rows / metered,
            equal=weights.equal * counted[p].rounds / attended,
        )
        for p in values
    ]


def _counted(contract: Contract, rounds: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]) -> dict[str, Counted]:
    """What is counted of everybody, from who was admitted in each round and who was one with whom."""
    rows = dict.fromkeys(contract.by_id(), _ZERO)
    presence: dict[str, list[Fraction]] = {p: [] for p in rows}
    for admitted, unions in rounds:
        sizes = {p: len(union) for union in among(admitted, unions) for p in union}
        counts = counted_rows(contract, admitted, unions)
        for p in rows:
            rows[p] += counts.get(p, 0)
            presence[p].append(Fraction(p in counts, sizes.get(p, 1)))
    once = dict.fromkeys(rows, _ZERO)
    for block in contract.blocks():
        own = {p: sum(presence[p], _ZERO) for p in block}
        together = sum(
            (min(Fraction(1), sum(parts)) for parts in zip(*(presence[p] for p in block), strict=True)), _ZERO
        )
        once |= {p: rounds_ * together / sum(own.values()) for p, rounds_ in own.items() if rounds_}
    return {p: Counted(rows=rows[p], rounds=once[p], presence=tuple(presence[p])) for p in rows}


def everybody(contract: Contract) -> dict[str, Counted]:
    """What is counted where everybody is admitted in every round."""
    return _counted(contract, [(tuple(contract.by_id()), ())] * contract.training.rounds)


def _bounds(
    contract: Contract,
    values: Mapping[str, Fraction],
    counted: Mapping[str, Counted],
    cov: Matrix,
    reason: Reason,
    paid: Sequence[Fraction],
) -> tuple[Method, list[Bounds]]:
    """The intervals; where the validation rows do not enter the share, the share itself."""
    if reason in ("contribution-not-paid", "not-reliable"):
        return "none", [outward(share, share) for share in paid]
    nobody = dict.fromkeys(values, _ZERO)
    agreed, without = _agreed(contract.settlement), _without_value(contract.settlement)
    rule = Rule(
        contribution=agreed.contribution,
        fixed=tuple(p.total for p in _parts(nobody, counted, agreed)),
        otherwise=tuple(p.total for p in _parts(nobody, counted, without)),
    )
    return intervals(contract.id, list(values.values()), cov, rule, paid)
