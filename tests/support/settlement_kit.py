"""Contracts, scores and moments for tests of contribution and settlement. No tests here."""

from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256

from tests.support.contract_kit import party, plain_contract

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
    control: Sequence[Sequence[int]] = (),
) -> Contract:
    """A contract; participants in the order of their ids, slices as (participant's place or None, rows).

    `control`: groups of common control, by their members' places.
    """
    keys = sorted((sha256(f"{label} {i}".encode()).hexdigest() for i in range(len(counts))), key=fingerprint)
    ids = [fingerprint(k) for k in keys]
    participants = [
        party(f"{label} company {i}", f"{i:018d}", key, f"set-{i}", count, floor_fen=floors[i] if floors else 0)
        for i, (key, count) in enumerate(zip(keys, counts, strict=True))
    ]
    values = plain_contract(
        participants,
        sha256(b"operator").hexdigest(),
        training__rounds=rounds,
        privacy__delta="0.000001",
        contribution__validation__slices=[
            {"source": "operator" if p is None else ids[p], "count": c} for p, c in slices
        ],
        settlement__contribution_weight=weights[0],
        settlement__data_weight=weights[1],
        settlement__equal_weight=weights[2],
        settlement__fallback=fallback,
    )
    if control:
        values["common_control"] = [
            {"name": f"holding {number}", "members": [f"{i:018d}" for i in places]}
            for number, places in enumerate(control)
        ]
    return Contract.parse(values)


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
