"""The retraining audit: what participants are worth where every coalition is trained anew, beside the online values.

A simulation. A coalition trains from the initial model over all rounds as the contract says: its own trainer and
noise, its own server, weights among its members. v(S) = L(initial model) - L(the model that S ends with), for whoever
gave a slice of the validation rows on the others' rows, as online. Of up to five participants all coalitions are
trained and Shapley values taken, of more those that lack nobody or one.

In one draw a participant has the same batches and the same noise in a round whichever coalition it trains in (common
random numbers), so that differences between coalitions are not those of the noise. That noise is seeded: its label is
`test`, and no coordinator takes an update that is made with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.arrays import update_digest
from fedpact_contract.contract import ClientPrivacy, Contract, ValidationSlice
from fedpact_contract.contribution import period_values, validation_rows
from fedpact_contract.errors import InputError
from fedpact_contract.log import RoundScores
from fedpact_contract.shapley import shapley
from fedpact_models import aggregation
from fedpact_models.evaluate import UNIT, evaluate
from fedpact_models.features import Examples, Floats
from fedpact_models.training import local_update
from fedpact_server import scoring

EXACT_PLAYERS = 5
"""Up to so many participants every coalition is trained: 31 of five."""

Steps = Mapping[str, Floats]


class SeededNoise:
    """Reproducible batches and noise for a simulation; its label keeps what is made with it out of every run."""

    label = "test"

    def __init__(self, *seed: int) -> None:
        self._batches, self._noise = (np.random.default_rng([*seed, stream]) for stream in (0, 1))

    def uniform(self, n: int) -> Floats:
        """Draw n numbers, uniform in [0, 1)."""
        return self._batches.random(n)

    def normal(self, n: int) -> Floats:
        """Draw n standard normal numbers."""
        return self._noise.standard_normal(n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One draw of batches and noise: values by id in the order of ids, and v of all together, in 1e-9 nat."""

    retrained: Mapping[str, Fraction]
    online: Mapping[str, Fraction]
    total: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The draws; `method` is that of the retrained values, `trainings` how many coalitions were trained in all."""

    method: str
    draws: tuple[Draw, ...]
    trainings: int

    @property
    def agreement(self) -> tuple[float | None, ...]:
        """Spearman's rank correlation of both columns, draw by draw; None where one of them has no order."""
        return tuple(spearman(list(d.retrained.values()), list(d.online.values())) for d in self.draws)

    @property
    def agreement_of_means(self) -> float | None:
        """Spearman's rank correlation of both columns' means over the draws."""
        ids = list(self.draws[0].retrained)
        means = [[sum((by[i] for by in column), Fraction(0)) for i in ids] for column in self._columns()]
        return spearman(*means)

    def _columns(self) -> tuple[list[Mapping[str, Fraction]], list[Mapping[str, Fraction]]]:
        return [d.retrained for d in self.draws], [d.online for d in self.draws]


def audit(
    contract: Contract,
    rows: Mapping[str, Examples],
    validation: Examples,
    initial: Floats,
    *,
    draws: int,
    seed: int,
    tell: Callable[[int, int], None] = lambda _done, _all: None,
) -> Audit:
    """Retrain coalitions on these rows and score them on these validation rows, in so many draws.

    Args:
        contract: The contract, at record level; its slices are those of `validation` (`with_slices`).
        rows: Participant id -> exactly the contracted number of rows.
        validation: Rows that everybody is scored on but for its own slice.
        initial: The initial model, float64 [P].
        draws: How many; two at least.
        seed: Of batches and noise.
        tell: Hears after each training how many are done, of how many.

    Raises:
        InputError: RETRAIN_CENTRAL, RETRAIN_DRAWS, RETRAIN_VALIDATION; what `local_update` finds wrong.
        FailedError: TRAINING_NOT_FINITE, EVALUATION_NOT_FINITE.
    """
    if isinstance(contract.privacy, ClientPrivacy):
        raise InputError(
            "RETRAIN_CENTRAL",
            "At client level no participant's contribution is measured: there is nothing to compare with.",
            field="privacy.trust_model",
            rule="a game that scores single updates",
        )
    if draws < 2:
        raise InputError("RETRAIN_DRAWS", "Standard errors need two draws at least.", field="--draws")
    if len(validation) != validation_rows(contract):
        raise InputError(
            "RETRAIN_VALIDATION",
            f"There are {len(validation)} validation rows, and the contract's slices have {validation_rows(contract)}.",
            field="contribution.validation.slices",
            remedy="Say whose these rows are (`with_slices`).",
        )
    ids, parts = list(contract.by_id()), _parts(contract, validation)
    wanted = list(coalitions(ids))
    found, every = [], draws * len(wanted)
    for number in range(draws):
        losses = {frozenset[str](): _losses(contract, initial, parts)}
        online: Sequence[RoundScores] = ()
        for place, members in enumerate(wanted, start=1):
            score = validation if len(members) == len(ids) else None
            model, scores = train(contract, {i: rows[i] for i in members}, initial, (seed, number), score)
            losses[members] = _losses(contract, model, parts)
            online = scores or online
            tell(number * len(wanted) + place, every)
        found.append(
            Draw(
                retrained=_values(ids, losses),
                online=period_values(online, contract),
                total=losses[frozenset()][None] - losses[frozenset(ids)][None],
            )
        )
    method = "shapley" if len(ids) <= EXACT_PLAYERS else "leave-one-out"
    return Audit(method=method, draws=tuple(found), trainings=every)


def coalitions(ids: Sequence[str]) -> Iterator[frozenset[str]]:
    """Those that are trained: every one but nobody, or of many participants those that lack nobody or one."""
    if len(ids) <= EXACT_PLAYERS:
        for mask in range(1, 2 ** len(ids)):
            yield frozenset(i for bit, i in enumerate(ids) if mask >> bit & 1)
    else:
        yield frozenset(ids)
        for i in ids:
            yield frozenset(ids) - {i}


def train(
    contract: Contract, rows: Mapping[str, Examples], initial: Floats, seed: Sequence[int], score: Examples | None
) -> tuple[Floats, list[RoundScores]]:
    """All rounds of the participants that have rows here: the last model, and with `score` each round's scores.

    Raises:
        InputError, FailedError: as `audit`.
    """
    base, memory, scores = initial, aggregation.START, list[RoundScores]()
    places = {i: place for place, i in enumerate(contract.by_id())}
    for number in range(1, contract.training.rounds + 1):
        updates: dict[str, NDArray[np.float32]] = {
            i: local_update(contract, base, own, SeededNoise(*seed, places[i], number)) for i, own in rows.items()
        }
        steps, memory = aggregation.server_steps(contract, updates, memory)
        if score is not None:
            before = scores[-1] if scores else None
            admitted = {i: update_digest(updates[i].astype("<f4").tobytes()) for i in sorted(updates)}
            scored, _ = scoring.score_round(contract, number, admitted, base, steps, score, before)
            scores.append(scored)
        base = aggregation.next_model(contract, base, steps)
    return base, scores


def spearman(first: Sequence[Fraction], second: Sequence[Fraction]) -> float | None:
    """Rank correlation, ties by their mean rank; None where all of one are equal."""
    a, b = _ranks(first), _ranks(second)
    mean_a, mean_b = fmean(a), fmean(b)
    spread = sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    if spread == 0:
        return None
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / spread


def mean_and_error(values: Sequence[Fraction] | Sequence[float]) -> tuple[float, float]:
    """Mean over draws, and its standard error; of two values at least."""
    numbers = [float(value) for value in values]
    return fmean(numbers), stdev(numbers) / sqrt(len(numbers))


def with_slices(contract: Contract, slices: Sequence[ValidationSlice]) -> Contract:
    """The contract with other validation rows: whose they are, in their order."""
    validation = contract.contribution.validation.model_copy(update={"slices": tuple(slices)})
    contribution = contract.contribution.model_copy(update={"validation": validation})
    return contract.model_copy(update={"contribution": contribution})


Parts = Mapping[str | None, Examples]
"""The validation rows: all of them at None, and for each participant that gave some, the others'."""
Losses = Mapping[str | None, Fraction]
"""A model's mean loss on each of `Parts`, in 1e-9 nat."""


def _parts(contract: Contract, validation: Examples) -> Parts:
    slices = contract.contribution.validation.slices
    givers = np.repeat([s.source for s in slices], [s.count for s in slices])
    own = {s.source for s in slices} & contract.by_id().keys()
    return {None: validation} | {i: validation.take(np.flatnonzero(givers != i)) for i in sorted(own)}


def _losses(contract: Contract, model: Floats, parts: Parts) -> Losses:
    found = {i: evaluate(contract.model, contract.data, model, part)[0] for i, part in parts.items()}
    return {i: Fraction(round(mean * UNIT)) for i, mean in found.items()}


def _values(ids: Sequence[str], losses: Mapping[frozenset[str], Losses]) -> dict[str, Fraction]:
    """Shapley values where all coalitions were trained, else leave-one-out values; each on the rows that it is due."""
    whole, result = frozenset(ids), dict[str, Fraction]()
    for place, i in enumerate(ids):
        own = i if i in losses[whole] else None
        if len(ids) > EXACT_PLAYERS:
            result[i] = losses[whole - {i}][own] - losses[whole][own]
        else:
            members = [frozenset(j for bit, j in enumerate(ids) if mask >> bit & 1) for mask in range(2 ** len(ids))]
            result[i] = shapley([losses[frozenset()][own] - losses[m][own] for m in members])[place]
    return result


def _ranks(values: Sequence[Fraction]) -> list[float]:
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]
