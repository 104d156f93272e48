"""From shares to fen: the pool, floors, rounding, double-entry postings and each participant's statement.

Everything is exact; amounts are integer fen (1 yuan = 100 fen). Steps (docs/adr/0004):

1. pool = revenue - fees.
2. A floor is due pro rata to rounds admitted, in whole fen, rounded down: floor_fen * r // (rounds of the period). Of a
   union's round each member has an even part.
3. exact_i = max(floor_i, level * share_i), with the one level at which the amounts add up to the pool. Floors that
   exceed the pool are paid pro rata, and nothing else is. Participants under common control stand here as one, with
   the sum of their shares and one floor, in each round the largest among those admitted; what they get together is
   then split between them by this same step, with the floors of each: what these take comes from the group's own.
4. Whole fen of exact_i first; the fen left over go one each to the largest remainders, ties by id (the fingerprint of
   the contract key, so that a new name moves nothing).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any, Literal

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.log import Moments, RoundScores
from fedpact_contract.record import decimal_text
from fedpact_contract.shares import Basis, Counted, ParticipantShare, PeriodShares, shares, unopened_shares

MAX_FEN = 2**53 - 1

_ZERO = Fraction(0)
_YUAN = re.compile(r"([0-9]+)(?:\.([0-9]+))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posting:
    """One line of double entry: an account and what it receives in fen (negative: what it gives)."""

    account: str
    fen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PayLine:
    """What one participant is paid: its floor (as due, whole fen), the exact amount, and the fen after rounding."""

    share: ParticipantShare
    floor_fen: int
    exact: Fraction
    fen: int

    @property
    def participant(self) -> str:
        """The participant's id."""
        return self.share.participant


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLine:
    """What participants under common control get together: their one floor, the exact amount, the level inside."""

    name: str
    members: tuple[str, ...]
    floor_fen: int
    exact: Fraction
    level: Fraction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A pool split by shares and floors; `floors`, in whole fen, and `exact` by participant. `groups`: see above.

    `level` is None where the floors exceed the pool.
    """

    floors: dict[str, int]
    exact: dict[str, Fraction]
    level: Fraction | None
    groups: tuple[GroupLine, ...]

    @property
    def floors_fen(self) -> int:
        """All floors, those of participants under common control once."""
        grouped = {p for group in self.groups for p in group.members}
        alone = sum(fen for p, fen in self.floors.items() if p not in grouped)
        return alone + sum(group.floor_fen for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodResult:
    """A settled period, lines in the order of ids. `level` is None where the floors exceed the pool."""

    contract_id: str
    revenue_fen: int
    fees_fen: int
    pool_fen: int
    shares: PeriodShares
    split: Split
    lines: tuple[PayLine, ...]
    postings: tuple[Posting, ...]

    @property
    def level(self) -> Fraction | None:
        """The level of the floors; None where they exceed the pool."""
        return self.split.level

    @property
    def basis(self) -> Basis:
        """Whether the contract's weights hold, or its fallback."""
        return self.shares.basis


def largest_remainder(total_fen: int, weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Split an amount by weights into whole fen that add up to it, each within 1 fen of its exact part.

    Args:
        total_fen: The amount, in fen, not negative.
        weights: By id, not negative, any scale; they may all be 0 only where the amount is 0.

    Raises:
        InputError: otherwise.
    """
    _refuse_negative(total_fen, weights, {})
    whole = sum(weights.values(), _ZERO)
    if whole == 0:
        if total_fen:
            raise InputError("SETTLEMENT_WEIGHTS", "An amount cannot be split where every weight is 0.")
        return dict.fromkeys(weights, 0)
    exact = {key: total_fen * weight / whole for key, weight in weights.items()}
    result = {key: floor(amount) for key, amount in exact.items()}
    left = total_fen - sum(result.values())
    for key in sorted(exact, key=lambda k: (result[k] - exact[k], k))[:left]:
        result[key] += 1
    return result


def water_fill(pool: int | Fraction, weights: Mapping[str, Fraction], floors: Mapping[str, int]) -> dict[str, Fraction]:
    """max(floor, level * weight) for each id, with the one level at which they add up to the pool.

    Floors that exceed the pool are paid pro rata. Amounts are in the pool's unit.

    Raises:
        InputError: a negative amount, other ids in floors than in weights, or all weights 0 and pool left over.
    """
    level = water_level(pool, weights, floors)
    if level is None:
        due = sum(floors.values())
        return {key: Fraction(pool) * floors[key] / due for key in weights}
    return {key: max(Fraction(floors[key]), level * weight) for key, weight in weights.items()}


def water_level(pool: int | Fraction, weights: Mapping[str, Fraction], floors: Mapping[str, int]) -> Fraction | None:
    """The level of `water_fill`, or None where the floors exceed the pool.

    Raises:
        InputError: as `water_fill`.
    """
    _refuse_negative(pool, weights, floors)
    if set(floors) != set(weights):
        raise InputError("SETTLEMENT_FLOORS", "Floors and weights are not those of the same participants.")
    if sum(floors.values()) > pool:
        return None
    rest, above = Fraction(pool), {key: weight for key, weight in weights.items() if weight > 0}
    rest -= sum(floors[key] for key in weights if key not in above)
    while above:
        level = rest / sum(above.values(), _ZERO)
        short = [key for key, weight in above.items() if level * weight < floors[key]]
        if not short:
            return level
        # The level only falls, so whoever is short stays at the floor.
        for key in short:
            rest -= floors[key]
            del above[key]
    if rest:
        raise InputError("SETTLEMENT_WEIGHTS", "An amount cannot be split where every weight is 0.")
    return _ZERO


def settle_period(
    contract: Contract, rounds: Sequence[RoundScores], moments: Moments, revenue_fen: int, fees_fen: int
) -> PeriodResult:
    """Settle a period: shares, floors, fen and postings.

    Args:
        contract: The contract.
        rounds: The opened scores of the period's rounds, in order.
        moments: The opened second moments.
        revenue_fen: The period's revenue.
        fees_fen: Taxes, fees and reimbursements taken off it first.

    Raises:
        InputError: amounts out of range, fees above revenue, or no round.
        FaultError: scores or moments that do not fit.
    """
    pool = _pool(revenue_fen, fees_fen)
    return _settled(contract, shares(contract, rounds, moments), pool, revenue_fen, fees_fen)


def settle_unopened(
    contract: Contract,
    admitted: Sequence[Sequence[str]],
    revenue_fen: int,
    fees_fen: int,
    unions: Sequence[Sequence[Sequence[str]]] = (),
) -> PeriodResult:
    """Settle a period whose scores the operator cannot open, by the contract's fallback.

    Args:
        contract: The contract.
        admitted: For each round that led to a model, the participants whose updates were admitted.
        revenue_fen: The period's revenue.
        fees_fen: Taxes, fees and reimbursements taken off it first.
        unions: For each of those rounds who was one with whom (docs/adr/0008); by default nobody.

    Raises:
        InputError: amounts out of range, fees above revenue, or no round.
    """
    pool = _pool(revenue_fen, fees_fen)
    return _settled(contract, unopened_shares(contract, admitted, unions), pool, revenue_fen, fees_fen)


def _pool(revenue_fen: int, fees_fen: int) -> int:
    """What is shared, once the amounts make sense."""
    for field, amount in (("revenue_fen", revenue_fen), ("fees_fen", fees_fen)):
        if not 0 <= amount <= MAX_FEN:
            raise InputError("SETTLEMENT_AMOUNT", f"The amount must lie between 0 and {MAX_FEN} fen.", field=field)
    if fees_fen > revenue_fen:
        raise InputError(
            "SETTLEMENT_FEES",
            f"The fees, {fees_fen} fen, exceed the revenue, {revenue_fen} fen.",
            field="fees_fen",
            remedy="Correct the amounts, or carry the loss into the next period.",
        )
    return revenue_fen - fees_fen


def _settled(contract: Contract, result: PeriodShares, pool: int, revenue_fen: int, fees_fen: int) -> PeriodResult:
    """Floors, fen and postings for known shares."""
    weights = {line.participant: line.share for line in result.lines}
    split = split_pool(contract, pool, weights, {line.participant: line.counted for line in result.lines})
    fen = largest_remainder(pool, split.exact)
    lines = tuple(
        PayLine(share=line, floor_fen=split.floors[p], exact=split.exact[p], fen=fen[p])
        for p, line in zip(weights, result.lines, strict=True)
    )
    postings = (
        Posting(account="revenue", fen=-revenue_fen),
        Posting(account="fees", fen=fees_fen),
        *(Posting(account=f"participant:{line.participant}", fen=line.fen) for line in lines),
    )
    check_postings(postings)
    return PeriodResult(
        contract_id=contract.id,
        revenue_fen=revenue_fen,
        fees_fen=fees_fen,
        pool_fen=pool,
        shares=result,
        split=split,
        lines=lines,
        postings=postings,
    )


def split_pool(contract: Contract, pool: int, weights: Mapping[str, Fraction], counted: Mapping[str, Counted]) -> Split:
    """The pool by shares and floors, before rounding to fen.

    Args:
        contract: The contract.
        pool: In fen.
        weights: Each participant's share, by id.
        counted: Where each was present.
    """
    floor_of = {p: party.floor_fen for p, party in contract.by_id().items()}
    floors = {p: floor(floor_of[p] * sum(c.presence) / len(c.presence)) for p, c in counted.items()}
    blocks = {block[0]: block for block in contract.blocks()}
    together = {first: sum((weights[p] for p in block), _ZERO) for first, block in blocks.items()}
    once = {first: _floor_once(block, floor_of, floors, counted) for first, block in blocks.items()}
    amounts = water_fill(pool, together, once)
    exact, groups = dict.fromkeys(weights, _ZERO), []
    for first, block in blocks.items():
        inside = amounts[first], {p: weights[p] for p in block}, {p: floors[p] for p in block}
        exact |= water_fill(*inside)
        if len(block) > 1:
            line = GroupLine(
                name=contract.controlled_by(first),
                members=block,
                floor_fen=once[first],
                exact=amounts[first],
                level=water_level(*inside),
            )
            groups.append(line)
    return Split(floors=floors, exact=exact, level=water_level(pool, together, once), groups=tuple(groups))


def _floor_once(
    block: Sequence[str], floor_of: Mapping[str, int], floors: Mapping[str, int], counted: Mapping[str, Counted]
) -> int:
    """The one floor of participants under common control: in each round the largest of those admitted."""
    rounds = list(zip(*(counted[p].presence for p in block), strict=True))
    due = _ZERO
    for parts in rounds:
        own = [(floor_of[p], part) for p, part in zip(block, parts, strict=True) if part]
        due += min(Fraction(max((fen for fen, _ in own), default=0)), sum((fen * part for fen, part in own), _ZERO))
    return min(floor(due / len(rounds)), sum(floors[p] for p in block))


def check_postings(postings: Sequence[Posting]) -> None:
    """Postings sum to zero.

    Raises:
        FaultError: they do not.
    """
    if balance := sum(p.fen for p in postings):
        raise FaultError("SETTLEMENT_UNBALANCED", f"The postings sum to {balance} fen, not to 0.", rule="double entry")


def statement(result: PeriodResult, contract: Contract, participant_id: str) -> dict[str, Any]:
    """A participant's statement as plain JSON values, from which each fen is recomputed by hand.

    Fen are integers, fractions are exact strings ("5/2"), values and standard errors are in 1e-9 nat. `lines` holds
    everybody's, because rounding compares remainders; `line` is this participant's.

    Raises:
        InputError: no such participant, or a result of another contract.
    """
    if result.contract_id != contract.id:
        raise InputError("STATEMENT_CONTRACT", "The result is of another contract.", party=participant_id)
    party = contract.participant(participant_id)
    lines, paid, settlement = _statement_lines(result, contract), result.shares, contract.settlement
    return {
        "contract": result.contract_id,
        "participant": participant_id,
        "name": party.name,
        "currency": settlement.currency,
        "rounds": list(paid.rounds),
        "pool": {"revenue_fen": result.revenue_fen, "fees_fen": result.fees_fen, "pool_fen": result.pool_fen},
        "basis": paid.basis,
        "reason": paid.reason,
        "fallback": settlement.fallback,
        "weights_agreed": {
            "contribution": decimal_text(settlement.contribution_weight),
            "data": decimal_text(settlement.data_weight),
            "equal": decimal_text(settlement.equal_weight),
        },
        "weights_applied": {
            "contribution": str(paid.weights.contribution),
            "data": str(paid.weights.data),
            "equal": str(paid.weights.equal),
        },
        "totals": _statement_totals(result),
        "common_control": groups(result, contract),
        "interval": {"level": "0.95", "method": paid.method, "covers": paid.covers},
        "line": next(line for line in lines if line["participant"] == participant_id),
        "lines": lines,
        "postings": [{"account": p.account, "fen": p.fen} for p in result.postings],
    }


def groups(result: PeriodResult, contract: Contract) -> list[dict[str, Any]]:
    """Whose equal part and floor were paid once, for being under common control: plain JSON values.

    Inside a group the amount is max(floor_fen, level_fen * share) of each member.
    """
    names = {p: party.name for p, party in contract.by_id().items()}
    return [
        {
            "name": line.name,
            "members": list(line.members),
            "names": [names[p] for p in line.members],
            "floor_fen": line.floor_fen,
            "exact_fen": str(line.exact),
            "level_fen": None if line.level is None else str(line.level),
        }
        for line in result.split.groups
    ]


def _statement_totals(result: PeriodResult) -> dict[str, Any]:
    paid, values = result.shares, [line.value for line in result.shares.lines]
    return {
        "total_value": str(paid.total_value),
        "total_value_se": decimal_text(paid.total_se),
        "values_sum": str(sum(values, _ZERO)),
        "own_slice_difference": str(sum(values, _ZERO) - paid.total_value),
        "positive_values": str(sum((v for v in values if v > 0), _ZERO)),
        "negative_values": str(sum((v for v in values if v < 0), _ZERO)),
        "metered_rows": str(sum((line.counted.rows for line in paid.lines), _ZERO)),
        "counted_rounds": str(sum((line.counted.rounds for line in paid.lines), _ZERO)),
        "rounds_admitted": sum(line.rounds_admitted for line in paid.lines),
        "floors_fen": result.split.floors_fen,
        "floors_paid_pro_rata": result.level is None,
        "level_fen": None if result.level is None else str(result.level),
        "left_over_fen": result.pool_fen - sum(floor(line.exact) for line in result.lines),
    }


def _statement_lines(result: PeriodResult, contract: Contract) -> list[dict[str, Any]]:
    ranked = sorted(result.lines, key=lambda line: (floor(line.exact) - line.exact, line.participant))
    rank = {line.participant: place for place, line in enumerate(ranked, start=1)}
    lines = {line.participant: line for line in result.lines}
    return [
        {
            "participant": line.participant,
            "name": contract.participant(line.participant).name,
            "num_examples": line.share.num_examples,
            "rounds_admitted": line.share.rounds_admitted,
            "metered_rows": str(line.share.counted.rows),
            "counted_rounds": str(line.share.counted.rounds),
            "value": str(line.share.value),
            "value_se": decimal_text(line.share.value_se),
            "share_contribution": str(line.share.parts.contribution),
            "share_data": str(line.share.parts.data),
            "share_equal": str(line.share.parts.equal),
            "share": str(line.share.share),
            "share_low": decimal_text(line.share.low),
            "share_high": decimal_text(line.share.high),
            "floor_contract_fen": contract.participant(line.participant).floor_fen,
            "floor_fen": line.floor_fen,
            "exact_fen": str(line.exact),
            "whole_fen": floor(line.exact),
            "remainder": str(line.exact - floor(line.exact)),
            "remainder_rank": rank[line.participant],
            "fen": line.fen,
        }
        for line in (lines[party.id] for party in contract.participants)
    ]


def format_fen(fen: int, lang: Literal["zh", "en"]) -> str:
    """An amount for people: ¥12,345.67 (zh), CNY 12,345.67 (en).

    Raises:
        InputError: another language.
    """
    if lang not in ("zh", "en"):
        raise InputError("LANGUAGE_UNKNOWN", f"Amounts are shown in zh and en, not in {lang}.", field="lang")
    yuan, rest = divmod(abs(fen), 100)
    return f"{'-' if fen < 0 else ''}{'¥' if lang == 'zh' else 'CNY '}{yuan:,}.{rest:02d}"


def parse_yuan(text: str, *, file: object = None, field: str | None = None) -> int:
    """An amount in yuan ("1000000.00") as fen: digits, at most two decimals, no sign, no separators.

    Raises:
        InputError: anything else, or more than 2**53 - 1 fen.
    """

    def refused(code: str, message: str) -> InputError:
        return InputError(code, message, file=file, field=field, remedy="Write yuan like 1000000.00.")

    if text.startswith("-") and _YUAN.fullmatch(text[1:]):
        raise refused("MONEY_NEGATIVE", f"{text} is negative.")
    match = _YUAN.fullmatch(text)
    if match is None or len(text) > 100:
        raise refused("MONEY_FORM", f"{text[:40]!r} is no amount of money.")
    decimals = match[2] or ""
    if len(decimals) > 2:
        raise refused("MONEY_DECIMALS", f"{text} has more than two decimals; a fen is not divided.")
    fen = int(match[1]) * 100 + int(decimals.ljust(2, "0"))
    if fen > MAX_FEN:
        raise refused("MONEY_TOO_LARGE", f"{text} is beyond {MAX_FEN} fen.")
    return fen


def _refuse_negative(amount: int | Fraction, weights: Mapping[str, Fraction], floors: Mapping[str, int]) -> None:
    if amount < 0:
        raise InputError("SETTLEMENT_AMOUNT", "An amount to split is not negative.")
    for key in (*(k for k, v in weights.items() if v < 0), *(k for k, v in floors.items() if v < 0)):
        raise InputError("SETTLEMENT_WEIGHTS", "A weight or floor is negative.", party=key)
