"""Each task on the digits of a federation in memory, and as a schema of a few numbers. No tests here."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from tests.support.federation import Federation, digits, make_federation
from tests.support.models_kit import a_schema, number

from fedpact_contract.contract import Data, Label, Model, SurvivalLabel
from fedpact_models.features import Examples, Floats, Targets
from fedpact_models.registry import parameter_count
from fedpact_models.tasks import task_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCase:
    """A task: its label on the digits, and how a digit becomes a target of it."""

    label: dict[str, Any]
    kind: str
    loss: str

    @property
    def changes(self) -> dict[str, Any]:
        """Of a contract, as `make_federation` takes them."""
        return {"data__label": self.label, "model__kind": self.kind, "contribution__loss": self.loss}

    def schema(self, features: int = 12) -> Data:
        """So many numbers and the label."""
        return a_schema(*(number(f"f{i}") for i in range(features)), label=self.label, feature_scale=2)

    def model(self, *hidden: int) -> Model:
        """Linear, or an mlp."""
        kind = "mlp" if hidden else self.kind
        return Model.parse({"kind": kind, "hidden": hidden, "initial_digest": "0" * 64}, code="MODEL")

    def examples(self, rng: np.random.Generator, rows: int, features: int = 12) -> Examples:
        """Encoded rows of `schema`; targets do not go with them."""
        x = np.column_stack([rng.uniform(-1, 1, (rows, features)), np.ones(rows)]) * (2 / (features + 1) ** 0.5)
        return Examples(x=x, y=task_of(self.schema(features).label).made_up(rng.random(rows)))

    def game(self, *hidden: int, players: int = 4, rows: int = 60) -> tuple[Model, Data, Floats, Floats, Examples]:
        """A round: model, schema, base, steps and validation rows."""
        rng, schema, model = np.random.default_rng(7), self.schema(), self.model(*hidden)
        count = parameter_count(model, schema)
        base, steps = rng.normal(size=count) * 0.5, rng.normal(size=(players, count)) * 0.1
        return model, schema, base, steps, self.examples(rng, rows)

    def targets(self, digit: Targets) -> Targets:
        """Targets from digits: the digit itself, or that it was the duration; every third is watched no longer."""
        label = task_label(self)
        if isinstance(label, SurvivalLabel):
            lived = np.searchsorted(np.array(label.cuts, dtype=np.float64), digit)
            return 2 * lived + np.where((np.arange(len(digit)) % 3 > 0) & (lived < len(label.cuts)), 1, 0)
        return (2.0 * digit - 9.0) / 9.0 if label.rule == "number" else digit

    def data(self, counts: Sequence[int]) -> tuple[list[Examples], Examples]:
        """Participants' examples and validation rows."""
        parts, validation = digits(list(counts))
        *parts, validation = [Examples(x=e.x, y=self.targets(e.y)) for e in (*parts, validation)]
        return parts, validation

    def federation(self, folder: Path, counts: Sequence[int] = (90, 60, 70, 80), **changes: Any) -> Federation:
        """A federation that has signed; `changes` as for `make_federation`."""
        base = np.zeros(65 * task_of(task_label(self)).outputs)
        options = {"training__learning_rate": Decimal("0.25"), "base": base, **self.changes}
        return make_federation(folder, list(counts), data=self.data(counts), **(options | changes))


def task_label(case: TaskCase) -> Label:
    """The case's label."""
    return case.schema().label


TASKS = {
    "classification": TaskCase(
        label={"name": "digit", "classes": [str(d) for d in range(10)], "rule": "value"},
        kind="softmax",
        loss="cross-entropy",
    ),
    "regression": TaskCase(
        label={"name": "digit", "rule": "number", "low": 0, "high": 9}, kind="linear", loss="squared-error"
    ),
    "survival": TaskCase(
        label={
            "name": "digit",
            "rule": "survival",
            "event": "seen",
            "outcomes": ["no", "yes"],
            "cuts": ["2", "4.5", "7", "8"],
        },
        kind="linear",
        loss="discrete-hazard",
    ),
}
"""By name."""
