"""A real round of a hundred participants who train an MLP of 102 thousand parameters. No tests here.

Rows are digits of scikit-learn, each pixel drawn as nine, somewhere in a picture of 27 x 29: 783 features. Training and
validation rows come of other digits. Participants have 20 to 200 rows, mostly of a few classes, and labels that are
wrong more often from one to the next, up to nine in ten. One epoch of plain SGD a round, batches of 16, rate 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tests.support.models_kit import a_model, mean_step, plain_schema

from fedpact_contract.contract import Data, Model
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import build, initial_weights
from fedpact_models.weights import flatten, load_flat

PLAYERS = 100
VALIDATION = 1000
_HEIGHT, _WIDTH, _DIGIT = 27, 29, 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MlpRound:
    """Before the round `base` [P]; everybody's weighted step, [N, P], w_i = n_i / sum n; `accuracy` of the base."""

    model: Model
    data: Data
    base: Floats
    steps: Floats
    validation: Examples
    accuracy: float


def mlp_rounds(seed: int, numbers: tuple[int, ...]) -> dict[int, MlpRound]:
    """These rounds of one training, by number; the first is 1."""
    model, data, rng = a_model(128), plain_schema(_HEIGHT * _WIDTH, 10), np.random.default_rng(seed)
    participants, validation = _rows(rng)
    counts = [len(examples) for examples in participants]
    base, rounds = initial_weights(model, data, rng), {}
    module = build(model, data)
    for number in range(1, max(numbers) + 1):
        updates = [_trained(module, base, examples, rng) - base for examples in participants]
        steps = mean_step([update.astype(np.float32) for update in updates], counts)
        if number in numbers:
            load_flat(module, base)
            right = module(torch.from_numpy(validation.x)).argmax(dim=1).numpy() == validation.y
            rounds[number] = MlpRound(
                model=model, data=data, base=base, steps=steps, validation=validation, accuracy=float(right.mean())
            )
        base = base + steps.sum(axis=0)
    return rounds


def _rows(rng: np.random.Generator) -> tuple[list[Examples], Examples]:
    from sklearn.datasets import load_digits

    source = load_digits()
    order = rng.permutation(len(source.target))
    images, labels = source.images[order], source.target[order]
    train = 1300
    sizes = np.exp(rng.uniform(np.log(20), np.log(200), PLAYERS)).astype(int).tolist()
    participants = []
    for size, wrong in zip(sizes, np.linspace(0, 0.9, PLAYERS), strict=True):
        mix = rng.dirichlet(np.full(10, 0.5))[labels[:train]]
        chosen = rng.choice(train, size, p=mix / mix.sum())
        own = _drawn(rng, images[chosen], labels[chosen])
        moved = np.flatnonzero(rng.random(size) < wrong)
        own.y[moved] = (own.y[moved] + rng.integers(1, 10, len(moved))) % 10
        participants.append(own)
    held_out = rng.integers(train, len(labels), VALIDATION)
    return participants, _drawn(rng, images[held_out], labels[held_out])


def _drawn(rng: np.random.Generator, images: Floats, labels: np.ndarray) -> Examples:
    """Each digit somewhere in the picture, encoded as `plain_schema` is: -1 to 1, the constant last, scaled."""
    pictures = np.zeros((len(labels), _HEIGHT, _WIDTH))
    for picture, image in zip(pictures, images, strict=True):
        top, left = rng.integers(_HEIGHT - _DIGIT + 1), rng.integers(_WIDTH - _DIGIT + 1)
        picture[top : top + _DIGIT, left : left + _DIGIT] = np.kron(image, np.ones((3, 3)))
    flat = pictures.reshape(len(labels), -1) / 8 - 1
    return Examples(x=np.column_stack([flat, np.ones(len(labels))]) * (2 / (flat.shape[1] + 1) ** 0.5), y=labels.copy())


def _trained(module: torch.nn.Module, base: Floats, examples: Examples, rng: np.random.Generator) -> Floats:
    load_flat(module, base)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    for batch in torch.from_numpy(rng.permutation(len(examples))).split(16):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
        optimizer.step()
    return flatten(module)
