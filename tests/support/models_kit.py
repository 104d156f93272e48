"""Schemas, models and the digits federation for tests of fedpact_models. No tests here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.support.settlement_kit import a_contract

from fedpact_contract.contract import Contract, Data, Model
from fedpact_models.features import Examples, Floats, row_bytes


def number(name: str, low: Any = 0, high: Any = 16, missing: str = "refuse", **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "number", "low": low, "high": high, "missing": missing, **more}


def category(name: str, values: Sequence[str], missing: str = "refuse", **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "category", "values": list(values), "missing": missing, **more}


def a_schema(*columns: dict[str, Any], label: dict[str, Any] | None = None, feature_scale: Any = 1) -> Data:
    label = label or {"name": "y", "classes": ["0", "1"], "rule": "value"}
    return Data.parse({"columns": columns, "label": label, "feature_scale": feature_scale}, code="SCHEMA")


def plain_schema(features: int, classes: int, feature_scale: Any = 2) -> Data:
    label = {"name": "y", "classes": [str(c) for c in range(classes)], "rule": "value"}
    return a_schema(*(number(f"f{i}") for i in range(features)), label=label, feature_scale=feature_scale)


def a_model(*hidden: int) -> Model:
    kind = "mlp" if hidden else "softmax"
    return Model.parse({"kind": kind, "hidden": hidden, "initial_digest": "0" * 64}, code="MODEL")


def a_cnn(
    height: int, width: int, *convolutions: tuple[int, int, int], hidden: Sequence[int] = (), channels: int = 1
) -> Model:
    """Convolutions as (filters, kernel, stride)."""
    values = {
        "kind": "cnn",
        "hidden": hidden,
        "image": {"height": height, "width": width, "channels": channels},
        "convolutions": [{"filters": f, "kernel": k, "stride": s} for f, k, s in convolutions],
        "initial_digest": "0" * 64,
    }
    return Model.parse(values, code="MODEL")


def random_examples(rng: np.random.Generator, count: int, features: int, classes: int) -> Examples:
    """Encoded rows of `plain_schema(features, classes)`: x is [count, features + 1], the constant last."""
    x = np.column_stack([rng.uniform(-1, 1, (count, features)), np.ones(count)]) * (2 / (features + 1) ** 0.5)
    return Examples(x=x, y=rng.integers(0, classes, count))


def training_contract(data: Data, model: Model, counts: Sequence[int], **changes: dict[str, Any]) -> Contract:
    """The kit's contract with this schema and model; `changes`: part -> values to replace."""
    values = a_contract(counts).plain() | {"data": data.plain(), "model": model.plain()}
    for part, change in changes.items():
        values[part] = values[part] | change
    return Contract.parse(values)


def digits(seed: int, sizes: Sequence[int], flipped: dict[int, float]) -> tuple[Data, list[Examples], Examples]:
    """The digits of scikit-learn: schema, participants' examples (some labels moved to another class), other rows."""
    import polars as pl
    from sklearn.datasets import load_digits

    from fedpact_models.features import encode

    source, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(source.target))
    x, y = source.data[order], source.target[order].copy()
    edges = np.cumsum([0, *sizes])
    for participant, rate in flipped.items():
        rows = np.arange(edges[participant], edges[participant + 1])
        moved = rows[rng.random(len(rows)) < rate]
        y[moved] = (y[moved] + rng.integers(1, 10, len(moved))) % 10
    data = plain_schema(64, 10)
    table = pl.DataFrame({f"f{i}": x[:, i] for i in range(64)} | {"y": y})
    whole = encode(data, table, file="digits")
    parts = [Examples(x=whole.x[a:b], y=whole.y[a:b]) for a, b in zip(edges, [*edges[1:], len(y)], strict=True)]
    return data, parts[:-1], parts[-1]


def mean_step(updates: Sequence[Floats], counts: Sequence[int]) -> Floats:
    """Each participant's weighted step, float64 [N, P]: w_i D_i."""
    weights = np.array(counts) / sum(counts)
    return np.array([w * np.asarray(u, dtype=np.float64) for w, u in zip(weights, updates, strict=True)])


def duplicate_count(examples: Examples) -> int:
    """How many rows are exact copies (features and label) of another row that is counted once."""
    return len(examples) - len({row_bytes(x, y) for x, y in zip(examples.x, examples.y, strict=True)})
