"""Contracts, scores and moments for tests of contribution and settlement. No tests here."""

from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256
from typing import Any

from fedpact_contract.contract import Contract
from fedpact_contract.keys import fingerprint
from fedpact_contract.log import Moments, RoundScores


def a_contract(
    counts: Sequence[int] = (100, 200, 300),
    *,
    floors: Sequence[int] | None = None,
    weights: tuple[str, str, str] = ("1", "0", "0"),
    fallback: str = "metered",
    slices: Sequence[tuple[int | None, int]] = ((None, 50),),
    rounds: int = 8,
    label: str = "kit",
) -> Contract:
    """A contract; participants in the order of their ids, slices as (participant's place or None, rows)."""
    keys = sorted((sha256(f"{label} {i}".encode()).hexdigest() for i in range(len(counts))), key=fingerprint)
    ids = [fingerprint(k) for k in keys]
    participants = [
        {
            "name": f"{label} company {i}",
            "entity_code": f"{i:018d}",
            "key": key,
            "sector": "retail",
            "data_set": f"set-{i}",
            "num_examples": count,
            "floor_fen": floors[i] if floors else 0,
        }
        for i, (key, count) in enumerate(zip(keys, counts, strict=True))
    ]
    text: dict[str, Any] = {
        "title": "Test",
        "purpose": "test",
        "operator": {"name": "Operator", "entity_code": "O" * 18, "key": sha256(b"operator").hexdigest()},
        "participants": participants,
        "data": {
            "columns": [{"name": "x", "kind": "number", "low": 0, "high": 1, "missing": "refuse"}],
            "label": {"name": "y", "classes": ["0", "1"], "rule": "value"},
            "feature_scale": 1,
        },
        "model": {"kind": "softmax", "hidden": [], "initial_digest": "0" * 64},
        "training": {
            "rounds": rounds,
            "local_steps": 1,
            "learning_rate": "0.1",
            "server_rate": 1,
            "aggregation": "weighted-mean",
        },
        "privacy": {
            "trust_model": "record-level-at-each-participant",
            "unit": "example",
            "relation": "zero-out",
            "sampling": "poisson",
            "epsilon": 8,
            "delta": "0.000001",
            "max_grad_norm": 1,
            "sample_rate": "0.1",
            "noise_multiplier": 1,
            "spare_attempts": 1,
            "accountant": "test",
        },
        "participation": {
            "minimum": 2,
            "deadline_seconds": 60,
            "head_threshold": 1,
            "strict_heads": False,
            "missed_rounds_limit": 2,
        },
        "contribution": {
            "game": "fixed-weight",
            "loss": "cross-entropy",
            "estimator": "exact",
            "validation": {
                "root": "0" * 64,
                "slices": [{"source": "operator" if p is None else ids[p], "count": c} for p, c in slices],
            },
        },
        "settlement": {
            "currency": "CNY",
            "contribution_weight": weights[0],
            "data_weight": weights[1],
            "equal_weight": weights[2],
            "fallback": fallback,
            "close_days": 7,
        },
        "code": {"release": "test", "models_digest": "0" * 64, "shell_digest": "0" * 64},
        "term": {"not_before": "2026-01-01T00:00:00Z", "not_after": "2027-01-01T00:00:00Z"},
    }
    return Contract.parse(text)


def a_round(
    contract: Contract, losses: Sequence[Sequence[int]], *, number: int = 1, places: Sequence[int] | None = None
) -> RoundScores:
    """Scores from a loss table; players by their places in the contract (all of them by default)."""
    ids = list(contract.by_id())
    players = tuple(ids) if places is None else tuple(ids[i] for i in places)
    return RoundScores(round=number, players=players, losses=tuple(map(tuple, losses)), correct=(0, 0))


def linear_round(
    contract: Contract,
    gains: Sequence[Sequence[int]],
    *,
    number: int = 1,
    places: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> RoundScores:
    """Scores of a game in which each player lowers the summed loss of each slice by so much: gains[player][slice]."""
    start = start or [10**12] * len(gains[0])
    losses = [
        [first - sum(g[k] for i, g in enumerate(gains) if mask >> i & 1) for k, first in enumerate(start)]
        for mask in range(2 ** len(gains))
    ]
    return a_round(contract, losses, number=number, places=places)


def example_period(contract: Contract, rows: Sequence[Sequence[int]]) -> tuple[list[RoundScores], Moments]:
    """One round, one slice, from the per-example values rows[x][i] in 1e-9 nat; and their exact second moments."""
    n = len(contract.participants)
    moments = Moments(products=tuple(tuple(sum(r[i] * r[j] for r in rows) for j in range(n)) for i in range(n)))
    return [linear_round(contract, [[sum(r[i] for r in rows)] for i in range(n)])], moments


def steady_moments(contract: Contract, values: Sequence[Fraction], spread: Sequence[int] | int = 0) -> Moments:
    """Moments of independent per-example values with these means, and so much variance above the squared mean."""
    count = sum(s.count for s in contract.contribution.validation.slices)
    spreads = [spread] * len(values) if isinstance(spread, int) else list(spread)
    return Moments(
        products=tuple(
            tuple(round(count * (a * b + (spreads[i] ** 2 if i == j else 0))) for j, b in enumerate(values))
            for i, a in enumerate(values)
        )
    )
