"""Participants that are one: their rows are the same ones, or one owner's, and count once (docs/adr/0008)."""

from collections.abc import Iterable, Sequence
from fractions import Fraction

from fedpact_contract.contract import Contract
from fedpact_contract.log import Body, RoundOpened, RoundScores, UnionConfirmed, UnionWithdrawn
from fedpact_contract.shapley import union_counts

Unions = tuple[tuple[str, ...], ...]
"""Each by its members, in the order of ids."""


def among(players: Sequence[str], unions: Sequence[Sequence[str]]) -> Unions:
    """What is left of unions where only these take part: those of which at least two do, in order."""
    left = (tuple(sorted({*union} & {*players})) for union in unions)
    return tuple(sorted(union for union in left if len(union) > 1))


def places(players: Sequence[str], unions: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """The unions that are left among players in the order of ids, by their places."""
    at = {p: i for i, p in enumerate(players)}
    return tuple(tuple(at[p] for p in union) for union in among(players, unions))


def of_scores(scores: RoundScores) -> tuple[tuple[int, ...], ...]:
    """The unions of a round, by the places of their players."""
    return places(scores.players, scores.unions or ())


def own_slices(
    contract: Contract, players: Sequence[str], unions: Sequence[Sequence[str]] = ()
) -> tuple[tuple[int, ...], ...]:
    """For each player the slices of the validation set that it gave, or who takes part and is one with it.

    Where that is the whole set, the one that it gave itself.
    """
    slices = contract.contribution.validation.slices
    given = {part.source: k for k, part in enumerate(slices)}
    one = {p: union for union in among(players, unions) for p in union}

    def by(members: Iterable[str]) -> tuple[int, ...]:
        return tuple(sorted(given[p] for p in members if p in given))

    together = [by(one.get(p, (p,))) for p in players]
    return tuple(own if len(own) < len(slices) else by([p]) for p, own in zip(players, together, strict=True))


def counted_rows(
    contract: Contract, admitted: Sequence[str], unions: Sequence[Sequence[str]] = ()
) -> dict[str, Fraction]:
    """What each one's examples count for in a round: those of a union together as its largest member's."""
    ids, parties = sorted(admitted), contract.by_id()
    return dict(zip(ids, union_counts([parties[p].num_examples for p in ids], places(ids, unions)), strict=True))


def by_round(bodies: Iterable[Body]) -> dict[int, Unions]:
    """Round -> the unions that were confirmed, and not withdrawn, before it opened."""
    standing: set[tuple[str, ...]] = set()
    result: dict[int, Unions] = {}
    for body in bodies:
        if isinstance(body, UnionConfirmed):
            standing.add(body.members)
        elif isinstance(body, UnionWithdrawn):
            standing.discard(body.members)
        elif isinstance(body, RoundOpened):
            result[body.round] = tuple(sorted(standing))
    return result
