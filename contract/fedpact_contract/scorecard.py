"""What each participant contributed so far, with everything that helps to judge it: a pure function of the scores.

Beside the Shapley value, which is paid by, stand leave-one-out and Banzhaf values (never paid by), the share that the
paying rule gives with its interval, and what the shares would be without each slice of the validation set.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from fedpact_contract.contract import Contract
from fedpact_contract.contribution import (
    agrees_with_first_order,
    banzhaf_values,
    first_order_values,
    leave_one_out,
    monte_carlo,
    own_slice_difference,
    period_values,
    round_values,
    validation_rows,
)
from fedpact_contract.errors import InputError
from fedpact_contract.log import Moments, RoundScores
from fedpact_contract.record import decimal_text, ratio_text
from fedpact_contract.shares import PeriodShares, shares, shares_without

NOT_SCORED = {"value": None, "leave_one_out": None, "banzhaf": None, "first_order": None, "monte_carlo": None}
"""The line of `value_lines` where no scores are known."""


def scorecard(contract: Contract, rounds: Sequence[RoundScores], moments: Moments) -> dict[str, Any]:
    """Plain JSON values, participants in the contract's order: values in nat and shares as decimal strings.

    Args:
        contract: The contract.
        rounds: The scores of the rounds so far; at least one.
        moments: Second moments of the per-example values over these rounds.

    Raises:
        InputError: no round, or fewer than two validation rows.
        FaultError: scores that do not fit the contract or each other, or impossible second moments.
    """
    paid = shares(contract, rounds, moments)
    values, lines = value_lines(rounds, contract), {line.participant: line for line in paid.lines}
    rows = validation_rows(contract)
    return {
        "contract_id": contract.id,
        "game": contract.contribution.game,
        "loss": contract.contribution.loss,
        "estimator": contract.contribution.estimator,
        "validation_rows": rows,
        "rounds": [
            {
                "round": scores.round,
                "loss_before": nats(Fraction(sum(scores.losses[0]), rows)),
                "loss_after": nats(Fraction(sum(scores.losses[-1]), rows)),
                "values": {player: nats(value) for player, value in round_values(scores, contract).items()},
                "agrees_with_first_order": agrees_with_first_order(scores, contract),
            }
            for scores in rounds
        ],
        "total_value": nats(paid.total_value),
        "total_value_se": nats(Fraction(paid.total_se)),
        "own_slice_difference": nats(own_slice_difference(rounds, contract)),
        "basis": paid.basis,
        "reason": paid.reason,
        "interval": {"level": "0.95", "method": paid.method, "covers": paid.covers},
        "participants": [
            {
                "id": party.id,
                "name": party.name,
                "num_examples": party.num_examples,
                "rounds_admitted": lines[party.id].rounds_admitted,
                **values[party.id],
                "value_se": nats(Fraction(lines[party.id].value_se)),
                "share": ratio_text(lines[party.id].share, 9),
                "share_low": decimal_text(lines[party.id].low),
                "share_high": decimal_text(lines[party.id].high),
            }
            for party in contract.participants
        ],
        "without_slices": without_slices(rounds, contract, paid),
    }


def value_lines(rounds: Sequence[RoundScores], contract: Contract) -> dict[str, dict[str, str | None]]:
    """By id: `value` (Shapley), `leave_one_out`, `banzhaf` and `first_order` values over the rounds, in nat.

    None where they are not known.

    `monte_carlo`: half-width of the value's 95 % interval for the draw of coalitions alone; None where none was drawn.

    Raises:
        FaultError: `contribution.check_rounds`.
    """
    found = {
        "value": period_values(rounds, contract),
        "leave_one_out": leave_one_out(rounds, contract),
        "banzhaf": banzhaf_values(rounds, contract),
        "first_order": first_order_values(rounds, contract),
        "monte_carlo": monte_carlo(rounds, contract),
    }
    return {
        player: {name: None if by is None else nats(Fraction(by[player])) for name, by in found.items()}
        for player in contract.by_id()
    }


def without_slices(rounds: Sequence[RoundScores], contract: Contract, paid: PeriodShares) -> list[dict[str, Any]]:
    """For each slice of the validation set, if there are several: the shares if it had never been there, by id.

    None where a participant could not be scored without it; nothing where the shares do not rest on the rows.

    Raises:
        FaultError: `contribution.check_rounds`.
    """
    slices = contract.contribution.validation.slices
    if len(slices) == 1 or paid.weights.contribution == 0:
        return []
    result: list[dict[str, Any]] = []
    for index, part in enumerate(slices):
        try:
            found = shares_without(contract, rounds, paid, index)
        except InputError:  # SLICE_NEEDED
            found = None
        shown = None if found is None else {player: ratio_text(share, 9) for player, share in found.items()}
        result.append({"source": part.source, "rows": part.count, "shares": shown})
    return result


def game_table(scores: RoundScores) -> dict[str, Any]:
    """One round's game as `fedpact contribution recompute` reads it.

    A value is by how much a coalition lowers the loss, summed over all validation rows, in 1e-9 nat; players by id.

    Raises:
        InputError: GAME_NOT_COMPLETE: the contract's game has no table of all coalitions.
    """
    if len(scores.losses) != 2 ** len(scores.players):
        message = "No table of all coalitions exists: not all of them were scored."
        raise InputError("GAME_NOT_COMPLETE", message, field="contribution.game")
    before = sum(scores.losses[0])
    names = [
        ",".join(player for i, player in enumerate(scores.players) if mask >> i & 1)
        for mask in range(len(scores.losses))
    ]
    values = {name: before - sum(row) for name, row in zip(names, scores.losses, strict=True)}
    return {"players": list(scores.players), "values": values}


def nats(value: Fraction) -> str:
    """A value in 1e-9 nat, shown in nat."""
    return ratio_text(value / 10**9, 9)
