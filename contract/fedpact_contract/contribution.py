"""What each participant contributed: Shapley values of the fixed-weight game on validation loss (docs/adr/0004).

The game of one round: v(S) = mean loss of the round's base model minus mean loss of the base model plus the weighted
updates of S. A participant that gave a validation slice is scored on the other slices only, by the mean over the
rows that remain. The unanimity game has two coalitions, nobody and all: each of all has the same part of the fall, on
all rows. Values are exact fractions in 1e-9 nat; whoever was not admitted in a round has 0 there.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError
from fedpact_contract.log import RoundScores
from fedpact_contract.output import counted
from fedpact_contract.shapley import shapley

_LARGEST = 10**30


def validation_rows(contract: Contract) -> int:
    """Number of rows of the committed validation set, over all slices."""
    return sum(s.count for s in contract.contribution.validation.slices)


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
    coalitions, slices = 2 ** len(scores.players), len(contract.contribution.validation.slices)
    if contract.contribution.game == "unanimity":
        coalitions = 2  # nobody, and all together: no smaller group was looked at
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
    if not 0 <= min(scores.correct) <= max(scores.correct) <= validation_rows(contract):
        raise FaultError("SCORES_CORRECT", "More rows are counted right than there are, or fewer than 0.", field=field)


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
    return _round_values(scores, contract)


def period_values(rounds: Sequence[RoundScores], contract: Contract) -> dict[str, Fraction]:
    """Every participant's Phi: the sum of its round values, by id, in 1e-9 nat.

    Raises:
        FaultError: `check_rounds`.
    """
    check_rounds(rounds, contract)
    return _summed((_round_values(scores, contract) for scores in rounds), contract)


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


def leave_one_out(rounds: Sequence[RoundScores], contract: Contract) -> dict[str, Fraction]:
    """Diagnostic, never paid: the sum over rounds of v(N) - v(N without i), by id, in 1e-9 nat, same rows as Phi.

    Raises:
        FaultError: `check_rounds`.
    """
    check_rounds(rounds, contract)
    return _summed((_round_without(scores, contract) for scores in rounds), contract)


def _round_values(scores: RoundScores, contract: Contract) -> dict[str, Fraction]:
    result = dict.fromkeys(contract.by_id(), Fraction(0))
    if contract.contribution.game == "unanimity":
        part = Fraction(sum(scores.losses[0]) - sum(scores.losses[1]), len(scores.players))
        return result | dict.fromkeys(scores.players, part / validation_rows(contract))
    everywhere = shapley([sum(row) for row in scores.losses])
    for i, player, own, rows in _scored_on(scores, contract):
        rise = everywhere[i]
        if own is not None:
            rise -= shapley([row[own] for row in scores.losses])[i]
        result[player] = -rise / rows
    return result


def _round_without(scores: RoundScores, contract: Contract) -> dict[str, Fraction]:
    result = dict.fromkeys(contract.by_id(), Fraction(0))
    if contract.contribution.game == "unanimity":
        fall = Fraction(sum(scores.losses[0]) - sum(scores.losses[1]), validation_rows(contract))
        return result | dict.fromkeys(scores.players, fall)
    full = len(scores.losses) - 1
    for i, player, own, rows in _scored_on(scores, contract):
        rises = [a - b for a, b in zip(scores.losses[full ^ (1 << i)], scores.losses[full], strict=True)]
        result[player] = Fraction(sum(rises) - (0 if own is None else rises[own]), rows)
    return result


def _scored_on(scores: RoundScores, contract: Contract) -> Iterator[tuple[int, str, int | None, int]]:
    """For each player: its bit, its id, the slice that it gave (or None), and the number of rows of the others."""
    slices = contract.contribution.validation.slices
    given = {s.source: k for k, s in enumerate(slices)}
    rows = validation_rows(contract)
    for i, player in enumerate(scores.players):
        own = given.get(player)
        yield i, player, own, rows if own is None else rows - slices[own].count


def _summed(parts: Iterator[dict[str, Fraction]], contract: Contract) -> dict[str, Fraction]:
    result = dict.fromkeys(contract.by_id(), Fraction(0))
    for part in parts:
        for player, value in part.items():
            result[player] += value
    return result
