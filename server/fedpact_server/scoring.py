"""Contribution scores of a round: coalition losses on the committed validation set, kept behind salted commitments."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from pydantic import ValidationError
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract, estimator_plan
from fedpact_contract.contribution import has_first_order, next_draws
from fedpact_contract.errors import FailedError
from fedpact_contract.estimators import Plan, coalitions, coefficients, estimate
from fedpact_contract.log import Findings, Moments, RoundScores, Sampling, commitment
from fedpact_contract.record import Part
from fedpact_contract.replay_rounds import NOT_FINITE
from fedpact_contract.sampling import round_seed
from fedpact_contract.unions import among, own_slices, places
from fedpact_models import aggregation
from fedpact_models.evaluate import (
    UNIT,
    CoalitionLosses,
    Evaluate,
    estimated_by_example,
    evaluate_coalitions,
    evaluate_round,
    gray,
    of_all,
)
from fedpact_models.features import Examples
from fedpact_models.gradient import first_order_values
from fedpact_models.renormalised import evaluate_models
from fedpact_models.tasks import task_of
from fedpact_server import db
from fedpact_server.run_state import write_array

FloatArray = NDArray[np.float64]
P = TypeVar("P", bound=Part)
Game = Callable[[Sequence[int]], CoalitionLosses]
"""The losses of a list of coalitions, by their masks."""
NO_LOSS = (NOT_FINITE, "WEIGHTS_NOT_FINITE")
"""Codes of what has no loss, whoever evaluates it; any other failure is this machine's."""


def score_round(
    contract: Contract,
    round_number: int,
    admitted: Mapping[str, str],
    base: FloatArray,
    steps: Mapping[str, NDArray[np.floating]],
    examples: Examples,
    previous: RoundScores | None,
    unions: Sequence[Sequence[str]] = (),
    evaluate: Evaluate = evaluate_coalitions,
) -> tuple[RoundScores, FloatArray]:
    """Coalition losses of one round, and the per-example Shapley values (Owen's where players are one union).

    Args:
        contract: The contract.
        round_number: The round.
        admitted: Participant id -> update digest of the admitted updates, in the order of ids.
        base: The round's base model, float64 [P].
        steps: What each player brings, [P], in the order of ids (`aggregation.server_steps`).
        examples: The validation set, slices in the contract's order.
        previous: The scores of the round that made the base model: both rounds tell of it with the same integers.
        unions: Participants that are one, as confirmed before the round.
        evaluate: What evaluates lists of coalitions of the fixed-weight game (`cluster.evaluator`).

    Returns:
        The scores, and float64 [N, V] in nat.
    """
    counts = [s.count for s in contract.contribution.validation.slices]
    own = own_slices(contract, list(steps), unions)
    game = round_game(contract, base, steps, examples, unions, evaluate)
    sampling: Sampling | None = None
    first = _first_order(contract, base, steps, examples) if has_first_order(contract) else None
    together, blocks = among(list(steps), unions), places(list(steps), unions)
    if _is_drawn(contract, len(steps)):
        seed = round_seed(round_number, list(admitted.values()))
        begun = estimator_plan(contract, len(steps), seed, blocks)
        losses, correct, values, sampling = _draw(contract, begun, game, first, examples, own, previous)
    elif together:
        plan = Plan(estimator="exact", players=len(steps), unions=blocks)
        masks = coalitions(plan)
        all_of_them = game(masks)
        losses, correct = list(all_of_them.losses), all_of_them.ends(0, masks[-1])
        values = estimated_by_example(all_of_them, masks, coefficients(plan), counts, own)
    else:
        masks = gray(len(steps))
        found = of_all(game(masks), masks, counts, own)
        losses, correct, values = list(found.losses), found.correct, found.values
    if previous is not None:
        losses[0], correct = previous.losses[-1], _chained(previous, correct)
    scores = RoundScores(
        round=round_number,
        players=tuple(steps),
        losses=tuple(losses),
        correct=correct,
        pairs=task_of(contract.data.label).pairs(examples.y),
        admitted=tuple(admitted) if contract.keeps_momentum else None,
        sampling=sampling,
        unions=together or None,
        first_order=first,
    )
    return scores, values


def round_game(
    contract: Contract,
    base: FloatArray,
    steps: Mapping[str, NDArray[np.floating]],
    examples: Examples,
    unions: Sequence[Sequence[str]],
    evaluate: Evaluate = evaluate_coalitions,
) -> Game:
    """The contract's game of a round; arguments as of `score_round`."""
    model, data, counts = contract.model, contract.data, [s.count for s in contract.contribution.validation.slices]
    if contract.contribution.game == "re-normalised":
        updates = aggregation.aggregator(contract, steps, unions)
        return lambda masks: evaluate_models(model, data, base, updates, examples, counts, masks)
    rows = aggregation.Rows(steps)
    return lambda masks: evaluate(model, data, base, rows, examples, counts, masks)


def _first_order(
    contract: Contract, base: FloatArray, steps: Mapping[str, NDArray[np.floating]], examples: Examples
) -> tuple[int, ...]:
    """-<gradient, step> of each player, in 1e-9 nat; in the re-normalised game of the step eta D_i."""
    rate = float(contract.training.server_rate) if contract.contribution.game == "re-normalised" else 1.0
    found = first_order_values(contract.model, contract.data, base, aggregation.Rows(steps), examples)
    return tuple(round(rate * value * UNIT) for value in found)


def _is_drawn(contract: Contract, players: int) -> bool:
    """Whether not every coalition of so many players is scored."""
    if contract.contribution.estimator == "exact":
        return False
    return estimator_plan(contract, players, bytes(32)).estimator != "exact"


def _draw(
    contract: Contract,
    begun: Plan,
    game: Game,
    first: tuple[int, ...] | None,
    examples: Examples,
    own: Sequence[Sequence[int]],
    previous: RoundScores | None,
) -> tuple[list[tuple[int, ...]], tuple[int, int] | None, FloatArray, Sampling]:
    """Evaluate drawn coalitions until the rule says that they are enough.

    Returns:
        Losses as in `RoundScores`, the counts of right answers before and after, per-example values, the draw.
    """
    players, counts = len(own), [s.count for s in contract.contribution.validation.slices]
    plan: Plan | None = begun
    found: CoalitionLosses | None = None
    errors: list[tuple[int, ...]] = []
    while plan is not None:
        drawn, masks = plan, coalitions(plan)
        new = masks[0 if found is None else len(found.losses) :]
        evaluated = game(new)
        found = evaluated if found is None else found.joined(evaluated)
        everywhere = estimated_by_example(found, masks, coefficients(plan), counts, [()] * players)
        spread = everywhere.std(axis=1, ddof=1) / np.sqrt(len(examples))
        errors.append(tuple(int(np.ceil(error * UNIT)) for error in spread))
        before = sum(found.losses[0] if previous is None else previous.losses[-1])
        falls = [Fraction(before - sum(row), len(examples)) for row in found.losses]
        falls[0] = Fraction(0)
        plan = next_draws(contract, plan, estimate(plan, falls), first, errors[-1])
    assert found is not None  # noqa: S101 - there is a first plan
    values = estimated_by_example(found, masks, coefficients(drawn), counts, own)
    nobody, everybody, *between = found.losses
    right = found.ends(0, 2**players - 1)
    assert drawn.estimator != "exact"  # noqa: S101 - or nothing would be drawn
    sampling = Sampling(estimator=drawn.estimator, seed=begun.seed.hex(), draws=drawn.draws, errors=tuple(errors))
    return [nobody, *between, everybody], right, values, sampling


def score_released(
    contract: Contract,
    round_number: int,
    players: Sequence[str],
    base: FloatArray,
    model: FloatArray,
    examples: Examples,
    previous: RoundScores | None,
) -> tuple[RoundScores, FloatArray]:
    """As `score_round`, from the two released models alone: the unanimity game, in which no update is read.

    Each player's value is the N-th part of the fall; the losses are those of nobody and of all.

    Args:
        contract: The contract.
        round_number: The round.
        players: Admitted participants in the order of their ids.
        base: The round's base model, float64 [P].
        model: The model that it led to, float64 [P].
        examples: The validation set.
        previous: The scores of the round before.
    """
    counts = [s.count for s in contract.contribution.validation.slices]
    step = (model - base)[None]
    result = evaluate_round(contract.model, contract.data, base, step, examples, counts, own_slice=[()])
    (before, after), correct = result.losses, result.correct
    if previous is not None:
        before, correct = previous.losses[-1], _chained(previous, correct)
    scores = RoundScores(
        round=round_number,
        players=tuple(players),
        losses=(before, after),
        correct=correct,
        pairs=task_of(contract.data.label).pairs(examples.y),
    )
    return scores, np.tile(result.values / len(players), (len(players), 1))


def _chained(previous: RoundScores, correct: tuple[int, int] | None) -> tuple[int, int] | None:
    """The counts of right answers, the first as the round before told it."""
    return (previous.correct[1], correct[1]) if previous.correct and correct else None


def values_path(arrays: Path, round_number: int) -> Path:
    """Where a round's per-example values are kept."""
    return arrays / f"values-{round_number}.f8"


def store_values(arrays: Path, round_number: int, values: FloatArray) -> None:
    """Keep a round's per-example values, float64 [N, V]."""
    write_array(values_path(arrays, round_number), values.astype("<f8").tobytes())


def values_kept(arrays: Path, contract: Contract, scores: RoundScores) -> bool:
    """Whether a round's per-example values are still there, in their size."""
    path = values_path(arrays, scores.round)
    rows = sum(s.count for s in contract.contribution.validation.slices)
    return path.is_file() and path.stat().st_size == len(scores.players) * rows * 8


def read_values(arrays: Path, contract: Contract, scores: RoundScores) -> FloatArray:
    """A round's per-example values, float64 [N, V], players in their order.

    Raises:
        FailedError: CONTRIBUTION_VALUES_LOST.
    """
    path = values_path(arrays, scores.round)
    if not values_kept(arrays, contract, scores):
        raise FailedError(
            "CONTRIBUTION_VALUES_LOST",
            f"The per-example values of round {scores.round} are lost; without them no interval can be given, and "
            "nobody's be compared.",
            file=path,
            remedy="They are made again when the run ends; `fedpact contribution show --game` shows each round's game.",
        )
    return np.fromfile(path, "<f8").reshape(len(scores.players), -1)


def moments(arrays: Path, contract: Contract, rounds: Sequence[RoundScores]) -> Moments:
    """Second moments of the per-example values summed over the run's rounds.

    Raises:
        FailedError: CONTRIBUTION_VALUES_LOST.
    """
    ids = list(contract.by_id())
    rows = sum(s.count for s in contract.contribution.validation.slices)
    total = np.zeros((len(ids), rows))
    for scores in rounds:
        total[[ids.index(p) for p in scores.players]] += read_values(arrays, contract, scores)
    return second_moments(total)


def second_moments(total: FloatArray) -> Moments:
    """Second moments of per-example values, float64 [N, V] in nat, participants in the order of their ids.

    Sums are exact and rounded once, so no thread and no BLAS moves them.
    """
    ids, scaled = range(len(total)), total * 1e9
    products = {(i, j): round(math.fsum((scaled[i] * scaled[j]).tolist())) for i in ids for j in ids if i <= j}
    return Moments(products=tuple(tuple(products[min(i, j), max(i, j)] for j in ids) for i in ids))


def keep(connection: Connection, contract_id: str, name: str, value: Part) -> str:
    """Keep a value under a fresh salt until it is opened; returns the commitment to it."""
    salt = os.urandom(32)
    connection.execute(
        db.openings.insert().values(
            contract_id=contract_id, name=name, salt=salt, value=value.model_dump_json(exclude_none=True).encode()
        )
    )
    return commitment(type(value), salt, value)


def opened_scores(connection: Connection, contract_id: str, round_number: int) -> tuple[bytes, RoundScores] | None:
    """Salt and scores of a round that was scored."""
    table = db.openings.c
    row = connection.execute(
        sa.select(table.salt, table.value).where(
            table.contract_id == contract_id, table.name == f"round:{round_number}"
        )
    ).first()
    return None if row is None else _kept(row.salt, row.value, RoundScores)


def opened_moments(connection: Connection, contract_id: str) -> tuple[bytes, Moments] | None:
    """Salt and second moments of a completed run."""
    table = db.openings.c
    row = connection.execute(
        sa.select(table.salt, table.value).where(table.contract_id == contract_id, table.name == "moments")
    ).first()
    return None if row is None else _kept(row.salt, row.value, Moments)


def all_scores(connection: Connection, contract_id: str) -> list[tuple[bytes, RoundScores]]:
    """Salt and scores of every round, in order."""
    table = db.openings.c
    rows = connection.execute(
        sa.select(table.salt, table.value).where(table.contract_id == contract_id, table.name.like("round:%"))
    )
    pairs = [_kept(row.salt, row.value, RoundScores) for row in rows]
    return sorted(pairs, key=lambda pair: pair[1].round)


def all_findings(connection: Connection, contract_id: str) -> list[tuple[bytes, Findings]]:
    """Salt and findings of every round that was committed to, in order."""
    table = db.openings.c
    rows = connection.execute(
        sa.select(table.salt, table.value).where(table.contract_id == contract_id, table.name.like("findings:%"))
    )
    pairs = [_kept(row.salt, row.value, Findings) for row in rows]
    return sorted(pairs, key=lambda pair: pair[1].round)


def _kept(salt: bytes, value: bytes, kind: type[P]) -> tuple[bytes, P]:
    """Salt and value as `keep` stored them.

    Raises:
        FailedError: DATABASE_DAMAGED.
    """
    try:
        return bytes(salt), kind.model_validate_json(bytes(value))
    except ValidationError as err:
        raise FailedError(
            "DATABASE_DAMAGED",
            f"The operator's database holds a {kind.__name__} that cannot be read.",
            field="openings",
            remedy="Restore a backup.",
        ) from err
