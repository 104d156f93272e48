"""Aggregation over admitted updates: float64, in the order of participants' ids; never a mean of nothing."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.clipping import UNIT, contract_factors
from fedpact_contract.contract import ClientPrivacy, Contract, ServerOptimizer
from fedpact_contract.errors import FailedError
from fedpact_contract.log import Clip
from fedpact_contract.unions import counted_rows
from fedpact_models.noise import Noise
from fedpact_models.renormalised import Aggregator
from fedpact_models.weights import clipped, energy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """What a server's optimizer keeps after a round: each participant's part of the momentum, and the second moment.

    `momenta`: participant id -> m_i, float64 [P], of all that were admitted so far; their sum is the momentum m. They
    lie on the disk.
    """

    round: int
    momenta: Mapping[str, NDArray[np.float64]]
    second: NDArray[np.float64] | float


START = Memory(round=0, momenta={}, second=0.0)
"""Before the first round."""


class Read(Mapping[str, NDArray[Any]]):
    """Arrays by participant id, in the order of ids, each made when it is asked for: never all of them in memory."""

    def __init__(self, ids: Iterable[str], make: Callable[[str], NDArray[Any]]) -> None:
        self._ids, self._make = sorted(ids), make

    def __getitem__(self, participant: str, /) -> NDArray[Any]:
        """Make it.

        Raises:
            KeyError: nobody of these.
        """
        if participant not in self._ids:
            raise KeyError(participant)
        return self._make(participant)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def clips(contract: Contract, updates: Mapping[str, NDArray[np.floating]]) -> tuple[Clip, ...] | None:
    """The energy and the factor of each update, in the order of ids; None where the contract clips none.

    Raises:
        InputError: WEIGHTS_NOT_FINITE.
    """
    if contract.defences is None or contract.defences.clip == "none":
        return None
    energies = {p: round(energy(update) * UNIT) for p, update in sorted(updates.items())}
    factors = contract_factors(contract, energies)
    return tuple(Clip(energy=energies[p], factor=factors[p]) for p in energies)


def counted_updates(
    contract: Contract, updates: Mapping[str, NDArray[np.floating]]
) -> Mapping[str, NDArray[np.floating]]:
    """The updates [P] as they count, in training and in scores alike: scaled down where the contract clips."""
    made = clips(contract, updates)
    if made is None:
        return updates
    factors = {p: float(clip.factor) for p, clip in zip(sorted(updates), made, strict=True)}
    return Read(factors, lambda p: updates[p].astype(np.float64) * factors[p])


def weighted_steps(
    updates: Mapping[str, NDArray[np.floating]], num_examples: Mapping[str, int | Fraction], rate: Decimal
) -> Mapping[str, NDArray[np.float64]]:
    """The steps eta w_i D_i of each participant, float64 [P], in the order of ids, each made when it is asked for.

    Args:
        updates: Participant id -> update [P].
        num_examples: Participant id -> what its examples count for; the weights are n_i / sum n over `updates`.
        rate: eta.

    Raises:
        FailedError: there is no update.
    """
    if not updates:
        raise FailedError("AGGREGATION_EMPTY", "There is no update to aggregate.")
    total = sum(num_examples[i] for i in updates)

    def step(participant: str) -> NDArray[np.float64]:
        weight = float(rate) * num_examples[participant] / total
        return updates[participant].astype(np.float64) * weight

    return Read(updates, step)


def server_steps(
    contract: Contract,
    updates: Mapping[str, NDArray[np.floating]],
    memory: Memory,
    unions: Sequence[Sequence[str]] = (),
) -> tuple[Mapping[str, NDArray[np.floating]], Memory]:
    """Each player's part of the step that the server makes in a round, in the order of ids, and what it keeps.

    In the re-normalised game there are no such parts: each player's update stands for it, and `next_model` knows.

    Without an optimizer, or with one that keeps no momentum, the players are those of `updates`. With momentum they
    are all that were admitted so far: the momentum is a sum over participants, and so is the step, once the second
    moment is what it is (docs/adr/0004). The parts sum to the step that is made, so that v(nobody) = 0.

    Args:
        contract: eta, n, the clip and the optimizer.
        updates: Participant id -> admitted update of this round as it came, float32 [P].
        memory: What was kept after the round before.
        unions: Participants whose examples count once (docs/adr/0008).

    Raises:
        FailedError: there is no update.
    """
    optimizer, rate = contract.training.server_optimizer, contract.training.server_rate
    updates = counted_updates(contract, updates)
    if contract.contribution.game == "re-normalised":
        return Read(updates, updates.__getitem__), Memory(round=memory.round + 1, momenta={}, second=0.0)
    counts = counted_rows(contract, list(updates), unions)
    if optimizer is None:
        return weighted_steps(updates, counts, rate), Memory(round=memory.round + 1, momenta={}, second=0.0)
    means = weighted_steps(updates, counts, Decimal(1))  # each is made when it is asked for
    square = sum(means.values(), np.zeros(len(next(iter(updates.values()))))) ** 2
    keep, take = float(optimizer.beta_1), float(1 - optimizer.beta_1)
    before = memory.momenta if contract.keeps_momentum else {}
    momenta = _on_disk(sorted({*before, *means}), len(square))
    for participant, own in momenta.items():
        if participant in before:
            own[:] = before[participant] * keep
        if participant in means:
            own += take * means[participant]
    number, second = memory.round + 1, _second_moment(optimizer, memory.second, square)
    scale = _learning_rate(optimizer, rate, number) / (np.sqrt(second) + float(optimizer.tau))
    steps = Read(momenta, lambda p: np.asarray(momenta[p] * scale))
    return steps, Memory(round=number, momenta=momenta, second=second)


def _on_disk(ids: Sequence[str], parameters: int) -> dict[str, NDArray[np.float64]]:
    """Zeros [P] for each, in a file without a name: what is not being read need not be in memory."""
    with tempfile.TemporaryFile() as file:
        every = np.memmap(file, np.float64, "w+", shape=(len(ids), parameters))
    return dict(zip(ids, every, strict=True))


def _second_moment(
    optimizer: ServerOptimizer, before: NDArray[np.float64] | float, square: NDArray[np.float64]
) -> NDArray[np.float64]:
    take = float(1 - optimizer.beta_2)
    if optimizer.kind == "adam":
        return np.asarray(before * float(optimizer.beta_2) + take * square)
    if optimizer.kind == "yogi":
        return np.asarray(before - take * square * np.sign(before - square))
    return np.asarray(before + square)


def _learning_rate(optimizer: ServerOptimizer, rate: Decimal, number: int) -> float:
    """`rate`, for adam with its correction in this round; no library's powers enter it."""
    if optimizer.kind != "adam":
        return float(rate)
    first, second = (1 - Fraction(beta) ** (number + 1) for beta in (optimizer.beta_1, optimizer.beta_2))
    return float(rate) * math.sqrt(float(second)) / float(first)


def noised_mean(
    updates: Sequence[NDArray[np.float32]], contract: Contract, privacy: ClientPrivacy, noise: Noise
) -> NDArray[np.float64]:
    """The step eta (sum of D_i + N(0, (sigma C)^2)) / N of the central Gaussian mechanism.

    Each D_i is clipped to C here too, whatever its participant did; N is the contract's number of participants, so that
    whoever is missing counts as zeros: one participant's update moves the sum by at most C, and nothing else.

    Args:
        updates: The admitted updates, float32 [P] each, in the order of participants' ids.
        contract: eta and N.
        privacy: Its client-level terms: sigma and C.
        noise: Where the noise comes from.

    Returns:
        float64 [P].

    Raises:
        FailedError: there is no update.
    """
    if not updates:
        raise FailedError("AGGREGATION_EMPTY", "There is no update to aggregate.")
    norm = float(privacy.max_update_norm)
    total = np.zeros(len(updates[0]))
    for update in updates:
        total += clipped(update, norm)
    total += noise.normal(len(total)) * (float(privacy.noise_multiplier) * norm)
    return total * (float(contract.training.server_rate) / len(contract.participants))


def next_model(
    contract: Contract,
    base: NDArray[np.float64],
    steps: Mapping[str, NDArray[np.floating]],
    unions: Sequence[Sequence[str]] = (),
) -> NDArray[np.float64]:
    """What a round leads to, from its base model, float64 [P], and what `server_steps` gives for these unions.

    Raises:
        FailedError: there is no update.
    """
    if contract.contribution.game != "re-normalised":
        return apply(base, steps.values())
    if not steps:
        raise FailedError("AGGREGATION_EMPTY", "There is no update to aggregate.")
    (model,) = aggregator(contract, steps, unions).models(base, [2 ** len(steps) - 1])
    return model


def aggregator(
    contract: Contract, updates: Mapping[str, NDArray[np.floating]], unions: Sequence[Sequence[str]] = ()
) -> Aggregator:
    """The contract's rule over a round's updates as they count, for any coalition: the re-normalised game."""
    counts = counted_rows(contract, list(updates), unions)
    return Aggregator(contract.training, [counts[p] for p in updates], Rows(updates))


class Rows:
    """Arrays by the player's place; each is read when it is asked for."""

    def __init__(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        self._arrays, self._ids = arrays, list(arrays)

    def __getitem__(self, player: int, /) -> NDArray[np.floating]:
        return self._arrays[self._ids[player]]

    def __len__(self) -> int:
        return len(self._ids)


def apply(base: NDArray[np.float64], steps: Iterable[NDArray[np.floating]]) -> NDArray[np.float64]:
    """The next model: base plus the steps, added one after the other in their order."""
    model = base.copy()
    for step in steps:
        model += step
    return model
