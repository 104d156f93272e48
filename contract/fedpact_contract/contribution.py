"""What each participant contributed: Shapley values of each round's game on validation loss (docs/adr/0004).

The game of one round: v(S) = mean loss of the round's base model minus mean loss of the base model plus the weighted
updates of S; in the re-normalised game minus that of the model that the round's rule makes of S alone, so that a zero
update has a value other than 0 there. A participant that gave a validation slice is scored on the other slices only, by
the mean over the rows that remain. Where the server's optimizer keeps momentum, a player's part of the step is its own
momentum's, and whoever was admitted before is a player still. The unanimity game has two coalitions, nobody and all:
each of all has the same part of the fall, on all rows. Values are exact fractions in 1e-9 nat; who is no player in a
round has 0 there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

from fedpact_contract.contract import Contract, NumberLabel, SurvivalLabel, estimator_plan
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.estimators import Estimate, Plan, agrees, coalitions, estimate, most_draws, next_plan
from fedpact_contract.log import RoundScores
from fedpact_contract.output import counted
from fedpact_contract.sampling import round_seed, standard_error
from fedpact_contract.shapley import banzhaf, shapley
from fedpact_contract.unions import among, of_scores, own_slices

T = TypeVar("T")

DRAWN = {"pairs": "permutation pairs", "stratified": "complementary pairs of coalitions"}
"""What the draws of an estimator are."""

_LARGEST = 10**30


def validation_rows(contract: Contract) -> int:
    """Number of rows of the committed validation set, over all slices."""
    return sum(s.count for s in contract.contribution.validation.slices)


def players_of(contract: Contract, admitted: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Whose updates move the model in the last of these rounds, in the order of ids: the players of its game.

    Args:
        contract: The contract.
        admitted: Whose updates were admitted, for every round so far.
    """
    moving = [p for names in admitted for p in names] if contract.keeps_momentum else admitted[-1]
    return tuple(sorted(set(moving)))


def admitted_in(scores: RoundScores) -> tuple[str, ...]:
    """Whose updates were admitted in the round."""
    return scores.players if scores.admitted is None else scores.admitted


def check_scores(scores: RoundScores, contract: Contract) -> None:
    """The scores of a round are a complete loss table over known players and all slices.

    Raises:
        FaultError: players, table or counts are not what the contract calls for.
    """
    field, known = f"round {scores.round}", contract.by_id()
    if scores.round > contract.training.rounds:
        raise FaultError("SCORES_ROUND", f"The contract has {counted(contract.training.rounds, 'round')}.", field=field)
    if not scores.players or list(scores.players) != sorted(set(scores.players)):
        raise FaultError("SCORES_PLAYERS", "The players are not at least one, each once, in order.", field=field)
    for player in scores.players:
        if player not in known:
            raise FaultError("SCORES_PLAYERS", "A player is no participant.", field=field, party=player)
    if (scores.admitted is not None) != contract.keeps_momentum or not {*admitted_in(scores)} <= {*scores.players}:
        message = "Who was admitted is named beside the players where the server's optimizer keeps momentum, else not."
        raise FaultError("SCORES_PLAYERS", message, field=field)
    _check_unions(scores, contract, field)
    slices = len(contract.contribution.validation.slices)
    if contract.contribution.game == "unanimity":
        coalitions = 2  # nobody, and all together: no smaller group was looked at
    else:
        _check_sampled(scores, contract, field)
        coalitions = len(masks(scores))
    if len(scores.losses) != coalitions:
        message = f"The table has {len(scores.losses)} coalitions, not {coalitions}."
        raise FaultError("SCORES_SHAPE", message, field=field)
    for mask, row in enumerate(scores.losses):
        if len(row) != slices:
            message = f"Coalition {mask} has {len(row)} slices, not {slices}."
            raise FaultError("SCORES_SHAPE", message, field=field)
        if not 0 <= min(row) <= max(row) <= _LARGEST:
            message = f"Coalition {mask} has a loss that is negative or beyond reason."
            raise FaultError("SCORES_RANGE", message, field=field)
    for count in scores.correct or (None,):
        check_correct(count, scores.pairs, contract, field)


def check_correct(correct: int | None, pairs: int | None, contract: Contract, field: str) -> None:
    """Right answers of a model are counted where the metric is such a count, and there are no more than questions.

    Raises:
        FaultError: SCORES_CORRECT, SCORES_PAIRS.
    """
    label, rows = contract.data.label, validation_rows(contract)
    if (pairs is not None) != isinstance(label, SurvivalLabel):
        raise FaultError("SCORES_PAIRS", "Pairs are counted of survival, and only of it.", field=field)
    if pairs is not None and not 0 < pairs <= rows * (rows - 1) // 2:
        raise FaultError("SCORES_PAIRS", "There are not so many pairs of rows, or none.", field=field)
    if (correct is None) != isinstance(label, NumberLabel):
        raise FaultError("SCORES_CORRECT", "Right answers are counted, but not where a number is told.", field=field)
    if correct is not None and not 0 <= correct <= (rows if pairs is None else 2 * pairs):
        raise FaultError("SCORES_CORRECT", "More is counted right than there is, or less than 0.", field=field)


def _check_unions(scores: RoundScores, contract: Contract, field: str) -> None:
    """Unions are at least two players each, nobody in two, where the contract knows them."""
    if scores.unions is not None and (not scores.unions or scores.unions != among(scores.players, scores.unions)):
        message = "The unions are not at least two players each, in the order of ids."
        raise FaultError("SCORES_UNIONS", message, field=field)
    together = [p for union in scores.unions or () for p in union]
    if len(set(together)) != len(together) or (together and contract.defences is None):
        message = "A player is in two unions, or the contract knows none."
        raise FaultError("SCORES_UNIONS", message, field=field)


def _check_sampled(scores: RoundScores, contract: Contract, field: str) -> None:
    """Coalitions were drawn where the contract says so, of as many players as were scored; first-order values fit."""
    if scores.first_order is not None and len(scores.first_order) != len(scores.players):
        raise FaultError("SCORES_FIRST_ORDER", "First-order values are not one for each player.", field=field)
    sampling = scores.sampling
    if sampling is not None and has_first_order(contract) != (scores.first_order is not None):
        message = "Coalitions are drawn by first-order values too where the round's rule is a mean, else not."
        raise FaultError("SCORES_FIRST_ORDER", message, field=field)
    if contract.contribution.estimator == "exact":
        if sampling is not None:
            raise FaultError("SCORES_SAMPLING", "Coalitions were drawn; the contract wants all of them.", field=field)
        return
    start = estimator_plan(contract, len(scores.players), bytes(32))
    if (start.estimator == "exact") != (sampling is None):
        message = f"{len(scores.players)} players are scored by the estimator {start.estimator}."
        raise FaultError("SCORES_SAMPLING", message, field=field)
    if sampling is None:
        return
    if sampling.estimator != start.estimator:
        message = f"The coalitions are those of {sampling.estimator}; the contract's game calls for {start.estimator}."
        raise FaultError("SCORES_SAMPLING", message, field=field)
    if not sampling.errors or {*map(len, sampling.errors)} != {len(scores.players)}:
        message = "Errors are not one for each player."
        raise FaultError("SCORES_SAMPLING", message, field=field)
    if not start.draws <= sampling.draws <= most_draws(start.estimator, len(scores.players)):
        raise FaultError("SCORES_DRAWS", f"{sampling.draws} {DRAWN[start.estimator]} were drawn.", field=field)


def check_draws(scores: RoundScores, contract: Contract, update_digests: Sequence[str]) -> None:
    """Draws came from the admitted updates, and stopped where the rule says.

    Raises:
        FaultError: SCORES_SEED, SCORES_DRAWS, or `check_scores`.
    """
    check_scores(scores, contract)
    field, sampling = f"round {scores.round}", scores.sampling
    if sampling is None:
        return
    seed = round_seed(scores.round, update_digests)
    if seed.hex() != sampling.seed:
        message = "The seed is not that of the round's admitted updates."
        raise FaultError("SCORES_SEED", message, field=field)
    due: Plan | None = estimator_plan(contract, len(scores.players), seed, of_scores(scores))
    plan = _plan(scores)
    for errors in sampling.errors:
        if due is None or due.draws > sampling.draws:
            break
        plan = due
        found = estimate(plan, utilities(scores, contract)[: len(coalitions(plan))])
        due = next_draws(contract, plan, found, scores.first_order, errors)
    else:
        if due is None and plan.draws == sampling.draws:
            return
    message = f"{sampling.draws} {DRAWN[plan.estimator]} were drawn, not as many as the rule that stops calls for."
    raise FaultError("SCORES_DRAWS", message, field=field)


def has_first_order(contract: Contract) -> bool:
    """Whether first-order values say something of the contract's game: its rule is a mean of scored updates."""
    return contract.training.aggregation == "weighted-mean"


def agrees_with_first_order(scores: RoundScores, contract: Contract) -> bool | None:
    """The cross-check of a round: whether its values go along with its first-order values. None where there are none.

    On all rows, also of those who gave some.
    """
    if scores.first_order is None:
        return None
    found = [value for value, _ in _values(scores, _SHAPLEY, [-sum(row) for row in scores.losses])]
    return agrees([value / validation_rows(contract) for value in found], list(map(Fraction, scores.first_order)))


def first_order_values(rounds: Sequence[RoundScores], contract: Contract) -> dict[str, Fraction] | None:
    """Diagnostic, never paid: the sum over rounds of the first-order values, by id, in 1e-9 nat, on all rows.

    None where they are no parts of one step: in any game but the fixed-weight one.

    Raises:
        FaultError: `check_rounds`.
    """
    if contract.contribution.game != "fixed-weight" or any(scores.first_order is None for scores in rounds):
        return None
    check_rounds(rounds, contract)
    result = dict.fromkeys(contract.by_id(), Fraction(0))
    for scores in rounds:
        for player, value in zip(scores.players, scores.first_order or (), strict=True):
            result[player] += value
    return result


def next_draws(
    contract: Contract, plan: Plan, found: Estimate, first_order: Sequence[int] | None, errors: Sequence[int]
) -> Plan | None:
    """`estimators.next_plan` by the contract's terms, from what stands in `RoundScores`."""
    return next_plan(
        plan,
        found,
        most=contract.contribution.max_coalitions or 0,
        validation_errors=[Decimal(error) for error in errors],
        first_order=None if first_order is None else [Fraction(value) for value in first_order],
    )


def masks(scores: RoundScores) -> tuple[int, ...]:
    """The coalition of each row of `losses`: nobody first, all last, between them rising or in the order of draws."""
    if scores.sampling is None:
        return tuple(range(2 ** len(scores.players)))
    nobody, everybody, *drawn = coalitions(_plan(scores))
    return (nobody, *drawn, everybody)


def utilities(scores: RoundScores, contract: Contract) -> list[Fraction]:
    """By how much each coalition lowers the mean loss, in 1e-9 nat, in the order of `estimators.coalitions`."""
    rows, before = validation_rows(contract), sum(scores.losses[0])
    return [Fraction(before - sum(row), rows) for row in _in_order(scores, scores.losses)]


def _in_order(scores: RoundScores, rows: Sequence[T]) -> list[T]:
    """What is given for each row of `losses`, in the order of `estimators.coalitions`."""
    return list(rows) if scores.sampling is None else [rows[0], rows[-1], *rows[1:-1]]


def _plan(scores: RoundScores) -> Plan:
    """Which coalitions the scores are of."""
    sampling, players, unions = scores.sampling, len(scores.players), of_scores(scores)
    if sampling is None:
        return Plan(estimator="exact", players=players, unions=unions)
    seed = bytes.fromhex(sampling.seed)
    return Plan(estimator=sampling.estimator, players=players, draws=sampling.draws, seed=seed, unions=unions)


def check_rounds(rounds: Sequence[RoundScores], contract: Contract) -> None:
    """Each round is complete, rounds only increase, and each begins with the losses that the last one ended with.

    Raises:
        FaultError: otherwise; it names the round.
    """
    for scores in rounds:
        check_scores(scores, contract)
    for before, after in pairwise(rounds):
        field = f"round {after.round}"
        if after.round <= before.round:
            raise FaultError("SCORES_ORDER", f"Round {after.round} stands after round {before.round}.", field=field)
        for k, (left, begun) in enumerate(zip(before.losses[-1], after.losses[0], strict=True)):
            if left != begun:
                message = f"Round {after.round} begins at another loss than round {before.round} ended with, slice {k}."
                raise FaultError("SCORES_CHAIN", message, field=field)


def round_values(scores: RoundScores, contract: Contract) -> dict[str, Fraction]:
    """Every participant's Shapley value of one round, by id, in 1e-9 nat.

    Raises:
        FaultError: `check_scores`.
    """
    check_scores(scores, contract)
    return dict.fromkeys(contract.by_id(), Fraction(0)) | {
        player: value for player, (value, _) in _round(scores, contract, _SHAPLEY).items()
    }


def period_values(
    rounds: Sequence[RoundScores], contract: Contract, *, without: int | None = None
) -> dict[str, Fraction]:
    """Every participant's Phi: the sum of its round values, by id, in 1e-9 nat.

    Args:
        rounds: The scores of every round.
        contract: The contract.
        without: A slice to leave out, for whoever wants to see what hangs on its rows.

    Raises:
        FaultError: `check_rounds`.
        InputError: SLICE_NEEDED: without that slice a participant would be scored on no row.
    """
    return _period(rounds, contract, _SHAPLEY, without)


def total_value(rounds: Sequence[RoundScores], contract: Contract) -> Fraction:
    """v(N) summed over rounds on all rows: mean loss before the first round minus after the last, in 1e-9 nat.

    Raises:
        FaultError: `check_rounds`.
    """
    check_rounds(rounds, contract)
    if not rounds:
        return Fraction(0)
    return Fraction(sum(rounds[0].losses[0]) - sum(rounds[-1].losses[-1]), validation_rows(contract))


def own_slice_difference(rounds: Sequence[RoundScores], contract: Contract) -> Fraction:
    """Sum of Phi minus the total value, in 1e-9 nat: what leaving out own slices moves. 0 where nobody gave one.

    Raises:
        FaultError: `check_rounds`.
    """
    return sum(period_values(rounds, contract).values(), Fraction(0)) - total_value(rounds, contract)


def leave_one_out(rounds: Sequence[RoundScores], contract: Contract) -> dict[str, Fraction] | None:
    """Diagnostic, never paid: the sum over rounds of v(N) - v(N without i), by id, in 1e-9 nat, same rows as Phi.

    None where coalitions were drawn: then these are not among them.

    Raises:
        FaultError: `check_rounds`.
    """
    return None if _drawn(rounds) else _period(rounds, contract, _LEAVE_ONE_OUT)


def banzhaf_values(rounds: Sequence[RoundScores], contract: Contract) -> dict[str, Fraction] | None:
    """Diagnostic, never paid: the sum over rounds of Banzhaf values, by id, in 1e-9 nat, same rows as Phi.

    None where coalitions were drawn.

    Raises:
        FaultError: `check_rounds`.
    """
    return None if _drawn(rounds) else _period(rounds, contract, _BANZHAF)


def monte_carlo(rounds: Sequence[RoundScores], contract: Contract) -> dict[str, Decimal] | None:
    """Half-widths of the 95 % intervals of Phi for the draw of coalitions alone, by id, in 1e-9 nat, rounded up.

    Rounds draw independently, so squares add up. None where every coalition was scored.

    Raises:
        FaultError: `check_rounds`.
    """
    if not _drawn(rounds):
        return None
    check_rounds(rounds, contract)
    squares = dict.fromkeys(contract.by_id(), Fraction(0))
    for scores in rounds:
        for player, (_, half) in _round(scores, contract, _SHAPLEY).items():
            squares[player] += half**2
    return {player: standard_error(square) for player, square in squares.items()}


def _drawn(rounds: Sequence[RoundScores]) -> bool:
    return any(scores.sampling is not None for scores in rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """What a table of 2^N values says of each player, linear in them; and its part where only all together count."""

    of_table: Callable[[Sequence[int]], Sequence[Fraction]]
    of_unanimity: Callable[[int], Fraction]


def _last(values: Sequence[int]) -> tuple[Fraction, ...]:
    """v(N) - v(N without i)."""
    full = len(values) - 1
    return tuple(Fraction(values[full] - values[full ^ 1 << i]) for i in range(full.bit_length()))


_SHAPLEY = _Index(of_table=shapley, of_unanimity=lambda n: Fraction(1, n))
_BANZHAF = _Index(of_table=banzhaf, of_unanimity=lambda n: Fraction(1, 2 ** (n - 1)))
_LEAVE_ONE_OUT = _Index(of_table=_last, of_unanimity=lambda _: Fraction(1))


def _period(
    rounds: Sequence[RoundScores], contract: Contract, index: _Index, without: int | None = None
) -> dict[str, Fraction]:
    check_rounds(rounds, contract)
    result = dict.fromkeys(contract.by_id(), Fraction(0))
    for scores in rounds:
        for player, (value, _) in _round(scores, contract, index, without).items():
            result[player] += value
    return result


def _round(
    scores: RoundScores, contract: Contract, index: _Index, without: int | None = None
) -> dict[str, tuple[Fraction, Fraction]]:
    """Of each player by id, in 1e-9 nat: one round's index, and the half-width of its Monte Carlo interval.

    On the mean loss over every row that neither the participant gave nor who is one with it (`unions.own_slices`).
    """
    slices = contract.contribution.validation.slices
    kept = [k for k in range(len(slices)) if k != without]
    if contract.contribution.game == "unanimity":
        fall = sum(scores.losses[0][k] - scores.losses[1][k] for k in kept)
        part = index.of_unanimity(len(scores.players)) * fall / _rows(contract, kept, scores.players[0])
        return dict.fromkeys(scores.players, (part, Fraction(0)))
    found: dict[tuple[int, ...], list[tuple[Fraction, Fraction]]] = {}
    result = {}
    given = own_slices(contract, scores.players, scores.unions or ())
    for i, (player, own) in enumerate(zip(scores.players, given, strict=True)):
        others = [k for k in kept if k not in own]
        rows = _rows(contract, others, player)
        if own not in found:
            found[own] = _values(scores, index, [-sum(row[k] for k in others) for row in scores.losses])
        value, half = found[own][i]
        result[player] = (value / rows, half / rows)
    return result


def _values(scores: RoundScores, index: _Index, table: Sequence[int]) -> list[tuple[Fraction, Fraction]]:
    """Of each player: the index of what is given for each row of `losses`, and its half-width, 0 where it is exact."""
    if index is not _SHAPLEY:
        return [(value, Fraction(0)) for value in index.of_table(table)]
    estimated = estimate(_plan(scores), _in_order(scores, table))
    return list(zip(estimated.values, map(Fraction, estimated.half_widths), strict=True))


def _rows(contract: Contract, kept: Sequence[int], player: str) -> int:
    """Number of rows in these slices.

    Raises:
        InputError: SLICE_NEEDED.
    """
    rows = sum(contract.contribution.validation.slices[k].count for k in kept)
    if rows == 0:
        message = "Without this slice there is no row left to score a participant on."
        raise InputError("SLICE_NEEDED", message, field="contribution.validation.slices", party=player)
    return rows
