"""One attacker among eight equal participants on the digits: its updates, the defence, what it gains. No tests here.

Record-level DP is `local_update`, mostly at epsilon 2 over five rounds and a spare attempt, the demo's terms, with the
tests' fixed noise; "without DP" the same path with silent noise and a norm that clips nothing. So that hundreds of runs
take minutes it is written out for softmax (`trained`); tests/unit/test_detectors.py compares the two.
Whoever cheats alters its own agent, so it may do what it likes to what it sends: but the weights are contracted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from tests.support.attacks import NO_CLIPPING, Silent
from tests.support.models_kit import a_model, digits, training_contract
from tests.support.noise import FixedNoise

from fedpact_contract.clipping import clip_factors, noise_energy
from fedpact_contract.contract import Contract, Data, RecordPrivacy
from fedpact_contract.privacy import solve_noise_multiplier
from fedpact_models.evaluate import evaluate, evaluate_round
from fedpact_models.features import Examples, Floats
from fedpact_models.gradient import gradient
from fedpact_models.registry import parameter_count
from fedpact_server.detectors import Apart, Finding, Observed, findings, observe

PARTICIPANTS, ROWS, VALIDATION, GIVEN, GIVER = 8, 175, 397, 130, 3
"""Of the validation rows the operator holds all but the last 130, which the fourth participant gave."""

RATE, DELTA = Decimal("0.2"), Decimal("0.00001")
PRIVATE = {"local_steps": 6, "learning_rate": 4}
PLAIN = {"local_steps": 10, "learning_rate": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Who takes part, under which terms. An attacker is the first of eight equal participants.

    Attributes:
        epsilon: None: no DP.
        rounds: Of the contract; one more may be attempted.
        rows: Contracted, by participant.
        clipped: Whether updates are clipped to the median signal, in training and in scoring.
    """

    epsilon: int | None
    rounds: int = 5
    rows: tuple[int, ...] = (ROWS,) * PARTICIPANTS
    clipped: bool = True

    @property
    def private(self) -> bool:
        return self.epsilon is not None

    def contract(self, data: Data) -> Contract:
        training = (PRIVATE if self.private else PLAIN) | {"rounds": self.rounds}
        privacy = {
            "epsilon": self.epsilon or 2,
            "delta": str(DELTA),
            "sample_rate": str(RATE),
            "noise_multiplier": str(_noise(self.epsilon, self.rounds) if self.epsilon else 1),
            "max_grad_norm": "1" if self.private else NO_CLIPPING,
        }
        return training_contract(data, a_model(), list(self.rows), training=training, privacy=privacy)


@lru_cache
def _noise(epsilon: int, rounds: int) -> Decimal:
    """For five rounds at epsilon 2: 2.686."""
    return solve_noise_multiplier(Decimal(epsilon), DELTA, RATE, (rounds + 1) * PRIVATE["local_steps"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """What the attacker knows in a round, and what it has: its rows, its honest update, its own source of draws."""

    contract: Contract
    base: Floats
    own: Examples
    honest: Floats
    last: Floats | None
    validation: Examples
    private: bool
    noise: FixedNoise
    rng: np.random.Generator

    def silence(self) -> Floats:
        """The contracted noise alone; nothing without DP."""
        energy = float(noise_energy(self.contract, ROWS, len(self.base))) if self.private else 0.0
        return np.asarray(self.rng.normal(size=len(self.base)) * (energy / len(self.base)) ** 0.5)

    def rough(self, part: float) -> Floats:
        """A random direction, with this part of the honest update's norm."""
        size = float(np.linalg.norm(self.honest)) / len(self.base) ** 0.5
        return np.asarray(self.rng.normal(size=len(self.base)) * part * size)

    def trained(self, rows: Examples, contracted: int = ROWS) -> Floats:
        """Trained on these rows, whatever their number, with the denominator and the noise of a contracted number."""
        return trained(self.contract, self.base, rows, self.noise, contracted)


def trained(contract: Contract, base: Floats, rows: Examples, noise: FixedNoise, contracted: int) -> Floats:
    """The update of `local_update` on softmax, from any number of rows, float32 in float64."""
    privacy = contract.privacy
    assert isinstance(privacy, RecordPrivacy)
    norm, rate = float(privacy.max_grad_norm), float(privacy.sample_rate)
    scale = float(contract.training.learning_rate) / (rate * contracted)
    model, lengths = base.reshape(len(contract.data.label.classes), -1).copy(), np.linalg.norm(rows.x, axis=1)
    for _ in range(contract.training.local_steps):
        chosen = np.flatnonzero(noise.uniform(len(rows)) < rate)
        x, logits = rows.x[chosen], rows.x[chosen] @ model.T
        error = np.exp(logits - logits.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(chosen)), rows.y[chosen]] -= 1
        factors = np.minimum(1, norm / (np.linalg.norm(error, axis=1) * lengths[chosen] + 1e-6))
        total = (error * factors[:, None]).T @ x
        model -= scale * (
            total + noise.normal(base.size).reshape(model.shape) * (float(privacy.noise_multiplier) * norm)
        )
    return (model.reshape(-1) - base).astype(np.float32).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Behaviour:
    """What an attacker sends: an update for each of its identities, and the rows that each has contracted.

    By default it is one, and contracts what it has.
    """

    send: Callable[[State], list[Floats]]
    contracted: tuple[int, ...] = ()


def _drawn(state: State, times: int) -> list[Floats]:
    """The draw whose model has the least loss on the attacker's own rows."""
    draws = [state.honest, *(state.trained(state.own) for _ in range(times - 1))]
    contract = state.contract
    losses = [evaluate(contract.model, contract.data, state.base + d / PARTICIPANTS, state.own)[0] for d in draws]
    return [draws[int(np.argmin(losses))]]


def _repeated(rows: Examples, times: int) -> Examples:
    return rows.take(np.tile(np.arange(len(rows)), times))


def _to(rows: Examples, count: int) -> Examples:
    """So many of these rows, again and again."""
    return rows.take(np.arange(count) % len(rows))


def _false_count(state: State) -> list[Floats]:
    """Five times the rows claimed: with DP they are the denominator, and of the noise."""
    return [state.trained(state.own, 5 * ROWS) if state.private else state.honest]


def _flipped(state: State) -> list[Floats]:
    return [state.trained(Examples(x=state.own.x, y=(state.own.y + 1) % 10))]


def _halves(state: State) -> list[Floats]:
    return [state.trained(state.own.take(np.arange(k, ROWS, 2)), n) for k, n in enumerate(HALVES)]


HALVES = ((ROWS + 1) // 2, ROWS // 2)
TWICE = (ROWS, ROWS)
BEHAVIOURS: dict[str, Behaviour] = {
    "honest": Behaviour(send=lambda s: [s.honest]),
    "zero update": Behaviour(send=lambda s: [np.zeros_like(s.honest)]),
    "noise alone": Behaviour(send=lambda s: [s.silence()]),
    "replay of the last step": Behaviour(
        send=lambda s: [s.silence() + s.rough(0.1) if s.last is None else s.last + s.rough(0.1)]
    ),
    "replay, contracted noise": Behaviour(send=lambda s: [s.silence() if s.last is None else s.last + s.silence()]),
    "random, same norm": Behaviour(send=lambda s: [s.rough(1.0)]),
    "update x2": Behaviour(send=lambda s: [2 * s.honest]),
    "update x4": Behaviour(send=lambda s: [4 * s.honest]),
    "claims n x5": Behaviour(send=_false_count, contracted=(5 * ROWS,)),
    "rows padded x2": Behaviour(send=lambda s: [s.trained(_repeated(s.own, 2))]),
    "rows padded x5": Behaviour(send=lambda s: [s.trained(_repeated(s.own, 5))]),
    "labels flipped": Behaviour(send=_flipped),
    "best of 2, the spare attempt": Behaviour(send=lambda s: _drawn(s, 2 if s.last is None else 1)),
    "best of 4 draws": Behaviour(send=lambda s: _drawn(s, 4)),
    "best of 16 draws": Behaviour(send=lambda s: _drawn(s, 16)),
    "full copy": Behaviour(send=lambda s: [s.honest, s.honest], contracted=TWICE),
    "near-copy, 1 % noise": Behaviour(send=lambda s: [s.honest, s.honest + s.rough(0.01)], contracted=TWICE),
    "near-copy, 50 % noise": Behaviour(send=lambda s: [s.honest, s.honest + s.rough(0.5)], contracted=TWICE),
    "same rows, fresh noise": Behaviour(send=lambda s: [s.honest, s.trained(s.own)], contracted=TWICE),
    "rows split in two": Behaviour(send=_halves, contracted=HALVES),
    "leaked validation set": Behaviour(send=lambda s: [s.trained(_to(s.validation, ROWS))]),
    "leaked slice": Behaviour(send=lambda s: [s.trained(_to(s.validation.take(np.arange(397 - GIVEN, 397)), ROWS))]),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One run: the share (of values above 0) of the attacker's identities together, and what was seen in each round."""

    share: float
    observed: list[Observed]
    slices: list[tuple[str, int]]

    @property
    def findings(self) -> list[Finding]:
        """What the detectors said, round after round."""
        rounds = len(self.observed)
        return [f for k in range(1, rounds + 1) for f in findings(self.observed[:k], rounds, self.slices)]

    @property
    def alarms(self) -> list[Finding]:
        return [f for f in self.findings if f.outcome == "alarm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run in two words: the attacker's share, and the codes of its alarms."""

    share: float
    codes: tuple[str, ...]


def outcome(name: str, seed: int, scene: Scene) -> Outcome:
    """Of `run`."""
    torch.set_num_threads(1)
    return _outcome(run(name, seed, scene))


def wrecker(seed: int, scene: Scene, hostile: bool) -> Outcome:
    """Of `wrecked`."""
    return _outcome(wrecked(seed, scene, hostile=hostile))


def _outcome(found: Run) -> Outcome:
    return Outcome(share=found.share, codes=tuple(sorted({f.code for f in found.alarms})))


def run(name: str, seed: int, scene: Scene) -> Run:
    """The contract's rounds, the first participant behaving so; the others honest."""
    data, parts, rest = digits(seed, scene.rows, {})
    behaviour, validation = BEHAVIOURS[name], rest.take(np.arange(VALIDATION))
    return simulate(scene, data, parts, validation, seed, send=behaviour.send, counts=behaviour.contracted)


def simulate(
    scene: Scene,
    data: Data,
    parts: Sequence[Examples],
    validation: Examples,
    seed: int,
    *,
    send: Callable[[State], list[Floats]],
    attacker: int = 0,
    counts: Sequence[int] = (),
    paid: int | None = None,
) -> Run:
    """Train, clip, aggregate, score and look, as the whole defence does; the share is that of `paid` or the attacker.

    The attacker's identities are the first one in its place and the others at the end; `counts` are the rows that each
    has contracted, by default those of its place.
    """
    contract, private = scene.contract(data), scene.private
    counts = counts or (len(parts[attacker]),)
    honest = [i for i in range(len(parts)) if i != attacker]
    names = {i: f"p{i}" for i in range(len(parts))}
    own = [names[attacker], *(f"q{k}" for k in range(1, len(counts)))]
    examples = {names[i]: len(parts[i]) for i in honest} | dict(zip(own, counts, strict=True))
    ids, parameters = sorted(examples), parameter_count(contract.model, contract.data)
    declared = {i: noise_energy(contract, n, parameters) if private else Fraction(0) for i, n in examples.items()}
    noises = [(FixedNoise if private else Silent)(1000 * seed + i) for i in range(len(parts))]
    other, rng = (FixedNoise if private else Silent)(1000 * seed + 999), np.random.default_rng(seed)
    base, step, apart = np.zeros(parameters), None, Apart(b"")
    slices = [("operator", len(validation) - GIVEN), (names[GIVER], GIVEN)]
    seen: list[Observed] = []
    total = dict.fromkeys(ids, 0.0)
    for number in range(1, contract.training.rounds + 1):
        made = [trained(contract, base, part, noise, len(part)) for part, noise in zip(parts, noises, strict=True)]
        state = State(
            contract=contract,
            base=base,
            own=parts[attacker],
            honest=made[attacker],
            last=step,
            validation=validation,
            private=private,
            noise=other,
            rng=rng,
        )
        updates = {names[i]: made[i] for i in honest} | dict(zip(own, send(state), strict=True))
        energies = {i: Fraction(float(d @ d)) for i, d in updates.items()}
        factors = clip_factors(energies, declared, parameters) if scene.clipped else dict.fromkeys(ids, Decimal(1))
        whole = sum(examples.values())
        steps = np.stack([updates[i] * (float(factors[i]) * examples[i] / whole) for i in ids])
        result = evaluate_round(
            contract.model,
            contract.data,
            base,
            steps,
            validation,
            [count for _, count in slices],
            own_slice=[(1,) if i == names[GIVER] else () for i in ids],
        )
        seen.append(
            observe(
                number,
                updates,
                examples=examples,
                noise={i: float(e) for i, e in declared.items()},
                step=step,
                slope=float(np.linalg.norm(gradient(contract.model, contract.data, base, validation))),
                values=result.values,
                apart=apart,
            )
        )
        for i, values in zip(ids, result.values, strict=True):
            total[i] += float(values.mean())
        step = steps.sum(axis=0)
        base = base + step
    positive = {i: max(0.0, value) for i, value in total.items()}
    shown = own if paid is None else [names[paid]]
    return Run(share=sum(positive[i] for i in shown) / sum(positive.values()), observed=seen, slices=slices)


def wrecked(seed: int, scene: Scene, *, hostile: bool) -> Run:
    """Digits 0 and 1 are nearly all the first one's; the last one is its fake, and sends noise, or against them.

    The share is the first one's.
    """
    _, (rows,), rest = digits(seed, [ROWS * PARTICIPANTS], {})
    data, _, _ = digits(seed, [ROWS], {})
    scarce, others = np.flatnonzero(rows.y < 2), np.flatnonzero(rows.y >= 2)
    mine = np.concatenate([scarce[:120], others[: ROWS - 120]])
    left = np.concatenate([scarce[120:140], others[ROWS - 120 :]])
    left = np.random.default_rng(seed).permutation(left)
    parts = [rows.take(mine), *(rows.take(left[k * ROWS : (k + 1) * ROWS]) for k in range(PARTICIPANTS - 2))]
    parts.append(parts[1])  # the fake trains on nothing of its own

    def send(state: State) -> list[Floats]:
        target = state.validation.x[state.validation.y < 2].mean(axis=0)
        push = np.zeros((10, len(target)))
        push[:2] = -target
        size = np.linalg.norm(state.honest) if state.private else 1.5 * np.linalg.norm(state.honest)
        against = push.reshape(-1) * (size / np.linalg.norm(push))
        return [against if hostile else state.silence()]

    return simulate(scene, data, parts, rest, seed, send=send, attacker=PARTICIPANTS - 1, paid=0)
