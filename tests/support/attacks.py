"""What an operator can do with the raw updates that it sees, on the digits of scikit-learn. No tests here.

The updates are the agent's own (`local_update`) under contracts of the demo's kind; "without DP" is the same path with
a noise of zeros and a clipping norm that clips nothing. The attacker knows the contract, hence model, learning rate,
denominator and clipping norm, and each round's base model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from tests.support.models_kit import a_model, digits, training_contract
from tests.support.noise import FixedNoise
from torch.nn import functional

from fedpact_contract.contract import Contract, Data
from fedpact_models.features import Examples, Flags, Floats, Integers
from fedpact_models.registry import architecture, build, initial_weights
from fedpact_models.training import local_update
from fedpact_models.weights import load_flat

NO_CLIPPING = "1000000"
MEMBERS = 150
"""Rows that a participant trains on, in the membership attack; as many others are held against them."""

CHANCE = ((2 * MEMBERS + 1) / (12 * MEMBERS**2)) ** 0.5
"""Standard error of the AUC of a guess (Mann-Whitney)."""


class Silent(FixedNoise):
    """Samples rows as ever, and adds nothing."""

    def normal(self, n: int) -> Floats:
        return np.zeros(n)


class Drawn:
    """Takes these rows and no others; the noise is another source's."""

    label = "test"

    def __init__(self, rows: Sequence[int], noise: FixedNoise) -> None:
        self._rows, self._noise = list(rows), noise

    def uniform(self, n: int) -> Floats:
        result = np.ones(n)
        result[self._rows] = 0.0
        return result

    def normal(self, n: int) -> Floats:
        return self._noise.normal(n)


@cache
def federation() -> tuple[Data, list[Examples], Examples]:
    """The demo's four participants, without false labels, and rows of nobody."""
    return digits(0, (450, 200, 350, 350), {})


def demo_contract(*, max_grad_norm: str = "1") -> Contract:
    """Five rounds of six steps and a spare attempt at epsilon 2, as the demo; but a net, and one step an update.

    One step is the attacker's best case: the update is then one clipped sum.
    """
    data, parts, _ = federation()
    return training_contract(
        data,
        a_model(32),
        [len(part) for part in parts],
        training={"rounds": 35, "local_steps": 1, "learning_rate": 4},
        privacy={
            "epsilon": 2,
            "delta": "0.00001",
            "sample_rate": "0.2",
            "noise_multiplier": "2.686",
            "max_grad_norm": max_grad_norm,
        },
    )


def observed(contract: Contract, base: Floats, rows: Sequence[int], noise: FixedNoise) -> Floats:
    """The sum of gradients that the operator reads off participant 0's update of one step on these of its rows."""
    own = federation()[1][0]
    update = local_update(contract, base, own, Drawn(rows, noise)).astype(np.float64)
    denominator = float(contract.privacy.sample_rate) * len(own)
    return -update * denominator / float(contract.training.learning_rate)


def base_model(contract: Contract) -> Floats:
    return initial_weights(contract.model, contract.data, np.random.default_rng(0))


def read_off(contract: Contract, total: Floats) -> Floats:
    """The one record of an update, up to its scale, float64 [d]: no search is needed.

    Its gradient in the first layer is an outer product of the layer's error and the record, so the record is the first
    right singular vector, and the constant feature gives the sign. Under noise this is the best linear guess.
    """
    first = architecture(contract.model, contract.data).layers[0]
    gradient = total[: first.inputs * first.outputs].reshape(first.outputs, first.inputs)
    record = np.linalg.svd(gradient, full_matrices=False)[2][0]
    return np.asarray(record * np.sign(record[-1]))


def match(contract: Contract, base: Floats, total: Floats, labels: Integers, *, steps: int) -> Floats:
    """Records whose clipped gradients add up to what was observed, float64 [n, d]: Adam on the squared difference.

    Gradient matching (Zhu et al. 2019, "Deep leakage from gradients", arXiv:1906.08935). The attacker is granted the
    labels, searches within the public bounds, and simulates the clipping.
    """
    constant = federation()[1][0].x[0, -1]
    target, generator = torch.from_numpy(total), torch.Generator().manual_seed(0)
    y = functional.one_hot(torch.from_numpy(labels), len(contract.data.label.classes)).double()
    shape = (len(labels), len(contract.data.columns))
    pixels = (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1).requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        difference = _clipped_sum(contract, base, _records(pixels, constant), y) - target
        torch.autograd.backward(difference.square().sum() / target.square().sum())
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            pixels.clamp_(-1, 1)
    return _records(pixels.detach(), constant).numpy()


def _records(pixels: torch.Tensor, constant: float) -> torch.Tensor:
    return constant * torch.cat([pixels, torch.ones(len(pixels), 1, dtype=torch.float64)], dim=1)


def _clipped_sum(contract: Contract, base: Floats, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The sum of clipped gradients [P] of a net with one hidden layer, written out so that it can be differentiated."""
    below, above = architecture(contract.model, contract.data).layers
    inputs, hidden, classes = below.inputs, below.outputs, above.outputs
    flat = torch.from_numpy(base)
    first, second, bias = flat.split([inputs * hidden, hidden * classes, classes])
    first, second = first.view(hidden, inputs), second.view(classes, hidden)
    between = functional.relu(x @ first.T)
    error = torch.softmax(between @ second.T + bias, dim=1) - y
    below = (error @ second) * (between > 0)
    norms = (below.square().sum(1) * x.square().sum(1) + error.square().sum(1) * (between.square().sum(1) + 1)).sqrt()
    factors = (float(contract.privacy.max_grad_norm) / (norms + 1e-6)).clamp(max=1)[:, None]
    parts = ((factors * below).T @ x, (factors * error).T @ between, (factors * error).sum(0))
    return torch.cat([part.reshape(-1) for part in parts])


def likeness(guess: Floats, record: Floats) -> float:
    """Cosine of the pixels alone; the constant feature is no secret."""
    a, b = guess[:-1], record[:-1]
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Membership:
    """Of each candidate whether it was trained on, bool [n], and the attacker's two scores, float64 [n].

    `loss`: minus the loss under the last local model (Yeom et al. 2018, arXiv:1709.01604). `trace`: how far the updates
    point along the candidate's own gradient at each round's base model.
    """

    member: Flags
    loss: Floats
    trace: Floats


def membership_contract(data: Data, *, private: bool) -> Contract:
    """Twenty rounds of twelve steps and a spare attempt, at epsilon 1."""
    return training_contract(
        data,
        a_model(64),
        (MEMBERS, MEMBERS + 1, MEMBERS + 2),
        training={"rounds": 20, "local_steps": 12, "learning_rate": 2},
        privacy={
            "epsilon": 1,
            "delta": "0.00001",
            "sample_rate": "0.2",
            "noise_multiplier": "11.949",
            "max_grad_norm": "1" if private else NO_CLIPPING,
        },
    )


def membership(seed: int, *, private: bool) -> Membership:
    """A participant's whole contract, three in ten of its labels false (what is learnt by heart shows most)."""
    data, (inside, outside), _ = digits(seed, (MEMBERS, MEMBERS), {0: 0.3, 1: 0.3})
    contract = membership_contract(data, private=private)
    weights = initial_weights(contract.model, data, np.random.default_rng(seed))
    noise = FixedNoise(seed) if private else Silent(seed)
    candidates = Examples(x=np.concatenate([inside.x, outside.x]), y=np.concatenate([inside.y, outside.y]))
    module, trace = build(contract.model, data), np.zeros(len(candidates))
    for _ in range(contract.training.rounds):
        update = local_update(contract, weights, inside, noise).astype(np.float64)
        load_flat(module, weights)
        trace -= _directions(module, candidates) @ update
        weights = weights + update
    load_flat(module, weights)
    with torch.no_grad():
        logits = module(torch.from_numpy(candidates.x))
        loss = functional.cross_entropy(logits, torch.from_numpy(candidates.y), reduction="none").numpy()
    return Membership(member=np.arange(2 * MEMBERS) < MEMBERS, loss=-loss, trace=trace)


def _directions(module: torch.nn.Module, examples: Examples) -> Floats:
    """Each example's gradient, scaled to norm 1, float64 [n, P]."""
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(own: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(torch.func.functional_call(module, own, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    found = each(weights, torch.from_numpy(examples.x), torch.from_numpy(examples.y))
    flat = torch.cat([found[name].reshape(len(examples), -1) for name in weights], dim=1).numpy()
    return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-12)


def roc(scores: Floats, member: Flags) -> tuple[Floats, Floats]:
    """(false positive rates, true positive rates) of every threshold, from (0, 0) to (1, 1).

    Equal scores go together: a network whose weights are mostly noise has many losses of exactly 0.
    """
    order = np.argsort(-scores)
    last = np.append(np.diff(scores[order]) != 0, True)
    rates = [np.append(0.0, (np.cumsum(side[order]) / side.sum())[last]) for side in (~member, member)]
    return rates[0], rates[1]


def auc(scores: Floats, member: Flags) -> float:
    """Area under the curve: how often a member is scored above another."""
    false, true = roc(scores, member)
    return float(((false[1:] - false[:-1]) * (true[1:] + true[:-1]) / 2).sum())
