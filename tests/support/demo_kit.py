"""The demo's own set-up in one process: its data from its files, its contract's terms, noise that is given.

And the smallest data of one's own that `fedpact demo --data` takes.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.support.federation import NOW, Federation, fixed_keys, make_federation
from tests.support.noise import FixedNoise

from fedpact_contract.contract import load_toml
from fedpact_contract.log import RunCompleted
from fedpact_contract.privacy import ACCOUNTANT, solve_noise_multiplier
from fedpact_contract.shares import PeriodShares, shares
from fedpact_models.features import Examples, encode, select_rows
from fedpact_models.tables import read_table
from fedpact_server import scoring
from fedpact_server.demo import scenario as scenarios
from fedpact_server.run_state import FloatArray, load_model

SELECTION_KEY = b"demo-kit" * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSetup:
    """Rows of each participant as its trainer has them, the validation rows, and what the contract says."""

    parts: list[Examples]
    validation: Examples
    counts: list[int]
    changes: dict[str, Any]

    def federation(self, folder: Path, seed: int, **more: Any) -> Federation:
        """The demo's federation with the noise of this seed and fixed keys; `more` goes to `make_federation`."""
        more = {"noise": lambda i: FixedNoise(100 * seed + i), "keys": fixed_keys(len(self.counts))} | more
        return make_federation(folder, self.counts, data=(self.parts, self.validation), **(self.changes | more))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: these matrices are small, and on a busy machine more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def demo_setup(folder: Path, participants: int = 4, **training: Any) -> DemoSetup:
    """Write the demo's files below `folder` and read them as agents and operator do."""
    scenario = scenarios.of_digits(folder, participants)
    terms = load_toml(scenarios.template(scenario, NOW), file="template")
    terms["training"] |= training
    plan = terms["privacy"]
    steps = (terms["training"]["rounds"] + plan["spare_attempts"]) * terms["training"]["local_steps"]
    noise = solve_noise_multiplier(plan["epsilon"], plan["delta"], plan["sample_rate"], steps)
    terms["privacy"] |= {"noise_multiplier": noise, "accountant": ACCOUNTANT}
    parts = []
    for enterprise in scenario.enterprises:
        table = read_table(**enterprise.source)
        rows = encode(scenario.data, table, file=enterprise.source["path"])
        parts.append(select_rows(rows, enterprise.num_examples, SELECTION_KEY))
    assert scenario.validation is not None
    return DemoSetup(
        parts=parts,
        validation=encode(scenario.data, read_table(**scenario.validation), file="validation"),
        counts=[e.num_examples for e in scenario.enterprises],
        changes={f"data__{key}": value for key, value in terms["data"].items()}
        | {part: terms[part] for part in ("training", "privacy", "participation", "settlement")},
    )


def paid(federation: Federation) -> PeriodShares:
    """The shares of a completed run."""
    with federation.database.read() as connection:
        rounds = [scores for _, scores in scoring.all_scores(connection, federation.contract.id)]
        moments = scoring.opened_moments(connection, federation.contract.id)
    assert moments is not None
    return shares(federation.contract, rounds, moments[1])


def delivered(federation: Federation) -> FloatArray:
    """The model that a completed run delivers, float64 [P]."""
    body = federation.entries()[-1].open()
    assert isinstance(body, RunCompleted)
    return load_model(federation.home, body.model_digest)


def number_of(federation: Federation, participant: str) -> int:
    """Which participant of the set-up this id is, from 0."""
    return int(federation.contract.participant(participant).data_set.removeprefix("digits-")) - 1


FEDERATION = """
title = "Two small offices"
purpose = "test-of-own-data"
columns = [
  { name = "height", kind = "number", low = 0, high = 1, missing = "refuse" },
  { name = "colour", kind = "category", values = ["red", "blue"], missing = "drop" },
]
label = { name = "ripe", classes = ["no", "yes"], rule = "value" }
validation = { file = "validation.csv" }
participants = [
  { name = "North", sector = "trade", file = "north.csv" },
  { name = "South", sector = "trade", file = "south.csv" },
]
[training]
rounds = 1
local_steps = 3
learning_rate = 4
[privacy]
epsilon = 2
delta = 0.00001
max_grad_norm = 1
sample_rate = 0.2
spare_attempts = 1
data_set_epsilon = 8
"""


OWN_LABELS = {
    "classification": 'name = "ripe", classes = ["no", "yes"], rule = "value"',
    "regression": 'name = "weight", rule = "number", low = 0, high = 20',
    "survival": 'name = "days", rule = "survival", event = "spoilt", outcomes = ["no", "yes"], cuts = [3, 6, 9, 12]',
}
"""Labels of one's own data, by task."""


def own_data(folder: Path, task: str = "classification", more: str = "") -> Path:
    """A folder for `fedpact demo --data`: two participants with a hundred rows each; returns it.

    `more` stands at the end of its description.
    """
    folder.mkdir(parents=True)
    text = FEDERATION.replace(OWN_LABELS["classification"], OWN_LABELS[task]) + more
    (folder / "federation.toml").write_text(text, "utf-8")
    draw = random.Random(7)
    for name, count in (("north", 100), ("south", 100), ("validation", 60)):
        rows = [(draw.random(), draw.choice(("red", "blue"))) for _ in range(count)]
        lines = [
            f"{height:.4f},{colour},{'yes' if height > 0.5 else 'no'},{20 * height:.2f},{15 * (1 - height):.1f},"
            f"{draw.choice(('yes', 'yes', 'no'))}"
            for height, colour in rows
        ]
        (folder / f"{name}.csv").write_text(
            "\n".join(["height,colour,ripe,weight,days,spoilt", *lines]) + "\n", "utf-8"
        )
    return folder
