"""An audit of a contract's private training, in one run of it (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).

Canaries stand beside made-up rows. Each is included by a fair coin; an included one is drawn in each step at the
contract's rate, and its gradient, far above the clip, points along one coordinate of its own. It passes through the
clip, the sum and the noise of `dp_sgd` as every record does. From the updates that a server would get it is guessed
which were included; too many right guesses refute the contract's privacy (`audit_bounds`). The noise of each step is
looked at itself (`audit_noise`). No private data is needed.
"""

import time
from dataclasses import dataclass, replace
from decimal import Decimal
from math import comb, exp, log, log1p, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpact_contract.contract import Contract, RecordPrivacy
from fedpact_contract.errors import InputError
from fedpact_contract.messages import release_event
from fedpact_contract.privacy import check_plan, epsilon_pld, profile_pld
from fedpact_contract.shape import feature_count
from fedpact_models.audit_bounds import (
    Guesses,
    binomial_chance,
    epsilon_delta_bound,
    inverse_blow_up,
    refuted,
)
from fedpact_models.audit_noise import NoiseSeen, NoiseTests
from fedpact_models.dp import Mode, Noise, SecureDPOptimizer, dp_sgd, mode_of
from fedpact_models.features import Examples, Flags, Floats, Integers
from fedpact_models.registry import build, initial_weights
from fedpact_models.tasks import task_of
from fedpact_models.training import GRADIENT_ELEMENTS, LOSSES, train
from fedpact_models.weights import flatten, load_flat

CANARIES = 5_000
"""Canaries, and so coordinates: a smaller network gets further ones."""
GUESSED = 8
"""One canary in so many is guessed, those of which the scores are surest: a number fixed before anything is seen. With
one in 6 to one in 10 half noise is found most often, for epsilon 1 to 4."""
ERROR = 0.05
"""Chance that one of the two bounds says too much: half of it each. Together they hold with 95 % confidence."""
BATCH_ERROR = 1e-6
"""Chance that the test of the batch sizes speaks of a fault where there is none."""
FAR = 1e3
"""A canary's gradient, and a probe's features, in multiples of what the clip lets through: a missing clip is seen."""

_STEPS_OF_NOISE = 32  # noise multipliers a doubling
_LEAST, _MOST = -2 * _STEPS_OF_NOISE, 3 * _STEPS_OF_NOISE
_EPSILONS = [k / 100 for k in range(2000)] + [20 + k / 4 for k in range(321)]
_PROBES = 8
_MEDIAN = 0.4549364  # of the square of a standard normal number
_ENOUGH = 64  # coordinates; of fewer no variance is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was run and what it showed.

    `claimed` is epsilon of the steps that were run (`epsilon_pld`); `largest_contribution` what one record moved the
    sum of gradients, in multiples of the clip; `rows_chance` the two-sided binomial chance of the rows drawn.
    """

    noise: str
    mode: str
    num_examples: int
    steps: int
    planned_steps: int
    appended: int
    guesses: Guesses
    delta: Decimal
    claimed: Decimal
    epsilon_delta: float
    f_dp: float
    rows_drawn: int
    rows_expected: float
    rows_chance: float
    largest_contribution: float
    noise_tests: NoiseTests
    seconds: float

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong, by code; nothing where nothing was found, which proves nothing."""
        found = {}
        if max(self.f_dp, self.epsilon_delta) >= self.claimed:
            found["AUDIT_EPSILON"] = "The updates give away more than the contract's epsilon allows."
        if self.rows_chance < BATCH_ERROR:
            found["AUDIT_SAMPLING"] = "The batches are not drawn at the contract's sample rate."
        if self.largest_contribution > 1 + 1e-6:
            found["AUDIT_CLIP"] = "One record moves the sum of gradients by more than the contract's clip."
        if self.noise_tests.failed:
            worst = self.noise_tests
            found["AUDIT_NOISE"] = f"The noise is not the contract's, or not independent: {worst.tensor}, {worst.test}."
        return found


class _Carrier(nn.Module):
    """The network, and coordinates beside it that it does not use."""

    def __init__(self, module: nn.Module, appended: int) -> None:
        super().__init__()
        self.module = module
        self.appended = nn.Linear(appended, 1, bias=False, dtype=torch.float64) if appended else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(x)
        return result


class _Canaries:
    """The canaries' part in each step; counts the rows that the steps drew."""

    def __init__(self, contract: Contract, noise: Noise, places: Integers, included: Flags) -> None:
        self._noise, self._places, self._included = noise, places, included
        self._rate = float(contract.privacy.sample_rate)
        self._norm = FAR * float(release_event(contract).max_grad_norm)
        self.steps = self.rows = 0

    def __call__(self, optimizer: SecureDPOptimizer, rows: int) -> None:
        """Draw among the included ones, and add their clipped gradients to the batch's sum."""
        self.steps += 1
        self.rows += rows
        drawn = self._places[self._included & (self._noise.uniform(len(self._places)) < self._rate)]
        at_a_time = max(1, GRADIENT_ELEMENTS // sum(p.numel() for p in optimizer.params))
        for start in range(0, len(drawn), at_a_time):
            self._accumulate(optimizer, torch.from_numpy(drawn[start : start + at_a_time]))

    def _accumulate(self, optimizer: SecureDPOptimizer, drawn: torch.Tensor) -> None:
        begin = 0
        for p in optimizer.params:
            gradients = p.new_zeros(len(drawn), p.numel())
            here = ((drawn >= begin) & (drawn < begin + p.numel())).nonzero().flatten()
            gradients[here, drawn[here] - begin] = self._norm
            p.grad_sample = gradients.view(-1, *p.shape)
            begin += p.numel()
        optimizer.accumulate()


def audit(contract: Contract, *, noise: Noise, coins: Noise, seconds: float, canaries: int = CANARIES) -> Audit:
    """Audit the contract's training: its network, rates and noise, of the participant with the fewest rows.

    Runs the planned rounds, spare attempts included, as far as `seconds` allow (one at least). The result speaks of
    the steps that were run.

    Args:
        contract: The contract.
        noise: Where the training takes its sampling and noise from: what is audited.
        coins: Where the audit's own coins and rows come from; they must be fair whatever `noise` does.
        seconds: Time for the rounds.
        canaries: How many, at least 16.

    Raises:
        InputError: CONTRACT_NOISE_TOO_SMALL, CONTRACT_ACCOUNTANT (the plan does not keep its own epsilon);
            MODEL_UNKNOWN, MODEL_NOT_PRIVATE; AUDIT_TRUST_MODEL, at client level.
    """
    if not isinstance(contract.privacy, RecordPrivacy):
        raise InputError(
            "AUDIT_TRUST_MODEL",
            "At client level participants train without noise: there is none to audit.",
            field="privacy.trust_model",
            rule="what is audited is the noise of each participant",
            remedy="Audit a contract whose trust model is record-level-at-each-participant.",
        )
    check_plan(contract)
    begun = time.monotonic()
    privacy, rows = contract.privacy, min(p.num_examples for p in contract.participants)
    examples = _rows(contract, rows, coins)
    module = build(contract.model, contract.data)
    load_flat(module, initial_weights(contract.model, contract.data, np.random.default_rng(0)))  # public in any case
    mode, size = mode_of(module, torch.from_numpy(examples.x)), sum(p.numel() for p in module.parameters())
    largest = _largest_contribution(contract, module, examples, noise, mode)
    carrier = _Carrier(module, max(0, canaries - size))
    places = np.linspace(0, max(size, canaries) - 1, canaries).astype(np.int64)
    included = coins.uniform(canaries) < 0.5
    hook = _Canaries(contract, noise, places, included)
    names = [name.removeprefix("module.") for name, _ in carrier.named_parameters()]
    scale = float(privacy.sample_rate) * rows / float(contract.training.learning_rate)
    seen = NoiseSeen(names, deviation=float(privacy.noise_multiplier * privacy.max_grad_norm), scale=scale)

    def look(optimizer: SecureDPOptimizer, drawn: int) -> None:
        hook(optimizer, drawn)
        seen(optimizer, drawn)

    scores = np.zeros(canaries)
    for _ in range(contract.training.rounds + privacy.spare_attempts):
        before = flatten(carrier)
        train(contract, carrier, examples, noise, contract.training.local_steps, mode=mode, before_noise=look)
        update = (flatten(carrier) - before).astype(np.float32)[places]
        for part in (places < size, places >= size):
            scores[part] += _scores(contract, rows, update[part])
        if time.monotonic() - begun > seconds:
            break
    guesses = _guess(scores, included)
    found = Audit(
        noise=noise.label,
        mode=mode,
        num_examples=rows,
        steps=hook.steps,
        planned_steps=contract.planned_steps,
        appended=max(0, canaries - size),
        guesses=guesses,
        delta=privacy.delta,
        claimed=epsilon_pld([(privacy.noise_multiplier, privacy.sample_rate, hook.steps)], privacy.delta),
        epsilon_delta=epsilon_delta_bound(guesses, float(privacy.delta), ERROR / 2),
        f_dp=0.0,
        rows_drawn=hook.rows,
        rows_expected=rows * hook.steps * float(privacy.sample_rate),
        rows_chance=binomial_chance(hook.rows, rows * hook.steps, float(privacy.sample_rate)),
        largest_contribution=largest,
        noise_tests=seen.result(),
        seconds=0.0,
    )
    found = replace(found, f_dp=_f_dp_bound(contract, found))
    return replace(found, seconds=time.monotonic() - begun)


def _rows(contract: Contract, count: int, coins: Noise) -> Examples:
    """Made-up rows over the whole public range, encoded as `features.encode` does; targets without regard to them."""
    width = feature_count(contract.data)
    x = np.column_stack([2 * coins.uniform(count * (width - 1)).reshape(count, width - 1) - 1, np.ones(count)])
    y = task_of(contract.data.label).made_up(coins.uniform(count))
    return Examples(x=x * (float(contract.data.feature_scale) / sqrt(width)), y=y)


def _largest_contribution(contract: Contract, module: nn.Module, examples: Examples, noise: Noise, mode: Mode) -> float:
    """The most that one of a few rows, far out of range, adds to a step's sum, in multiples of the clip.

    Each is a data set of its own, drawn in (almost) every step; the network is left as it was.
    """
    before, limit = flatten(module), float(release_event(contract).max_grad_norm)
    norms = [0.0]

    def look(optimizer: SecureDPOptimizer, _: int) -> None:
        norms.append(float(torch.cat([p.summed_grad.flatten() for p in optimizer.params]).norm()))

    for k in range(min(_PROBES, len(examples))):
        dp_sgd(
            module,
            torch.from_numpy(FAR * examples.x[k : k + 1]),
            torch.from_numpy(examples.y[k : k + 1]),
            steps=1,
            sample_rate=1 - 1e-9,
            noise_multiplier=float(contract.privacy.noise_multiplier),
            max_grad_norm=limit,
            denominator=1.0,
            learning_rate=float(contract.training.learning_rate),
            noise=noise,
            physical_batch=1,
            mode=mode,
            loss=LOSSES[contract.contribution.loss],
            before_noise=look,
        )
        load_flat(module, before)
    return max(norms) / limit


def _scores(contract: Contract, rows: int, update: NDArray[np.float32]) -> Floats:
    """How much likelier a round's update is with the canary than without, as a logarithm, from the update alone.

    In units of the clip each coordinate holds what all have in common and, with the canary, one for each step in which
    it was drawn. What they have in common is taken to be normal about zero, its variance from the values below zero:
    the contract's noise, or what is there in its place, and on the network's own coordinates the rows' gradients. Any
    score gives a valid bound; this one gives much of what can be had.
    """
    steps, rate = contract.training.local_steps, float(contract.privacy.sample_rate)
    values = -update.astype(np.float64) * (rate * rows)
    values /= float(contract.training.learning_rate) * float(release_event(contract).max_grad_norm)
    expected, below = float(contract.privacy.noise_multiplier) ** 2 * steps, values[values < 0]
    found = float(np.median(below**2)) / _MEDIAN if len(below) else 0.0
    variance = max(found, 1e-4 * expected) if len(values) >= _ENOUGH else expected
    most = min(steps, int(rate * steps + 10 * sqrt(rate * steps) + 5))
    times = np.arange(most + 1)
    chance = [log(comb(steps, j)) + j * log(rate) + (steps - j) * log1p(-rate) for j in range(most + 1)]
    terms = np.array(chance) + (np.outer(values, times) - times**2 / 2) / variance
    result: Floats = np.logaddexp.reduce(terms, axis=1)
    return result


def _guess(scores: Floats, included: Flags) -> Guesses:
    """The scores furthest from zero are guessed, as included where they are above it; nothing is said of the rest."""
    made = max(1, len(scores) // GUESSED)
    chosen = np.argsort(-np.abs(scores), kind="stable")[:made]
    correct = int(((scores[chosen] > 0) == included[chosen]).sum())
    return Guesses(canaries=len(scores), made=made, correct=correct)


def _f_dp_bound(contract: Contract, found: Audit) -> float:
    """Epsilon of the contract's steps at the least noise under which so many right guesses are refuted; 0 if none is.

    With more noise they are refuted the sooner. Between a quarter and eight times the contract's noise; a quarter is
    thus the end of what is told apart. Rounded down to the grid of epsilons.
    """
    noise, rate = contract.privacy.noise_multiplier, contract.privacy.sample_rate

    def profile(k: int) -> list[float]:
        scaled = Decimal(round(1000 * float(noise) * exp(log(2) * k / _STEPS_OF_NOISE))) / 1000 if k else noise
        return profile_pld([(max(scaled, Decimal("0.25")), rate, found.steps)], _EPSILONS)

    def too_private(k: int) -> bool:
        return refuted(found.guesses, inverse_blow_up(_EPSILONS, profile(k)), ERROR / 2)

    low, high = (_LEAST - 1, 0) if too_private(0) else (0, _MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if too_private(middle) else (middle, high)
    if high > _MOST:
        return 0.0
    above = [e for e, d in zip(_EPSILONS, profile(high), strict=True) if d > float(found.delta)]
    bound = above[-1] if above else 0.0
    return max(bound, float(found.claimed)) if high <= 0 else bound
