"""Contribution scores of a round: coalition losses on the committed validation set, kept behind salted commitments."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from pydantic import ValidationError
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError
from fedpact_contract.log import Moments, RoundScores, commitment
from fedpact_contract.record import Part
from fedpact_models.evaluate import evaluate_round
from fedpact_models.features import Examples
from fedpact_server import db
from fedpact_server.run_state import write_array

FloatArray = NDArray[np.float64]
P = TypeVar("P", bound=Part)


def score_round(
    contract: Contract,
    round_number: int,
    admitted: Sequence[str],
    base: FloatArray,
    steps: Mapping[str, FloatArray],
    examples: Examples,
    previous: RoundScores | None,
) -> tuple[RoundScores, FloatArray]:
    """Coalition losses of one round, and the per-example Shapley values.

    Args:
        contract: The contract.
        round_number: The round.
        admitted: Admitted participants in the order of their ids.
        base: The round's base model, float64 [P].
        steps: Each player's part of the step, float64 [P], in the order of ids (`aggregation.server_steps`).
        examples: The validation set, slices in the contract's order.
        previous: The scores of the round that made the base model: both rounds tell of it with the same integers.

    Returns:
        The scores, and float64 [N, V] in nat.
    """
    slices = contract.contribution.validation.slices
    sources = [s.source for s in slices]
    own = [sources.index(p) if p in sources else None for p in steps]
    parts = np.stack(list(steps.values()))
    result = evaluate_round(
        contract.model, contract.data, base, parts, examples, [s.count for s in slices], own_slice=own
    )
    losses, correct = list(result.losses), result.correct
    if previous is not None:
        losses[0], correct = previous.losses[-1], (previous.correct[1], correct[1])
    scores = RoundScores(
        round=round_number,
        players=tuple(steps),
        losses=tuple(losses),
        correct=correct,
        admitted=tuple(admitted) if contract.keeps_momentum else None,
    )
    return scores, result.values


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
    result = evaluate_round(contract.model, contract.data, base, step, examples, counts, own_slice=[None])
    (before, after), correct = result.losses, result.correct
    if previous is not None:
        before, correct = previous.losses[-1], (previous.correct[1], correct[1])
    scores = RoundScores(round=round_number, players=tuple(players), losses=(before, after), correct=correct)
    return scores, np.tile(result.values / len(players), (len(players), 1))


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


def moments(arrays: Path, contract: Contract, rounds: Sequence[RoundScores]) -> Moments:
    """Second moments of the per-example values summed over the run's rounds.

    `values_kept` holds for each round.
    """
    ids = list(contract.by_id())
    rows = sum(s.count for s in contract.contribution.validation.slices)
    total = np.zeros((len(ids), rows))
    for scores in rounds:
        values = np.fromfile(values_path(arrays, scores.round), "<f8")
        total[[ids.index(p) for p in scores.players]] += values.reshape(len(scores.players), rows)
    scaled = total * 1e9
    products = [[round(float(scaled[i] @ scaled[j])) for j in range(len(ids))] for i in range(len(ids))]
    return Moments(
        products=tuple(tuple(products[min(i, j)][max(i, j)] for j in range(len(ids))) for i in range(len(ids)))
    )


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
