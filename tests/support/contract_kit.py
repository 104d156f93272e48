"""The one contract that the tests' contracts are variations of. No tests here."""

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from fedpact_contract.privacy import ACCOUNTANT
from fedpact_contract.request import instant, utc_now

DROP = object()
"""In the place of a value: the key is left out."""


def a_year_from_now() -> str:
    """The end of a term, for processes that go by the real clock; a fresh agent's policy allows two years."""
    return instant(utc_now() + datetime.timedelta(days=365))


def party(name: str, entity_code: str, key: str, data_set: str, num_examples: int, **values: Any) -> dict[str, Any]:
    """A participant's entry."""
    base = {
        "name": name,
        "entity_code": entity_code,
        "key": key,
        "sector": "medical",
        "data_set": data_set,
        "num_examples": num_examples,
        "floor_fen": 0,
    }
    return base | values


def plain_contract(participants: Iterable[Mapping[str, Any]], operator_key: str, **changes: Any) -> dict[str, Any]:
    """A contract as plain values; `changes` are paths with double underscores: `training__rounds=5`."""
    values: dict[str, Any] = {
        "title": "Test",
        "purpose": "test",
        "operator": {"name": "Operator", "entity_code": "9" * 18, "key": operator_key},
        "participants": list(participants),
        "data": {
            "columns": [{"name": "age", "kind": "number", "low": 0, "high": 120, "missing": "drop"}],
            "label": {"name": "again", "classes": ["no", "yes"], "rule": "value"},
            "feature_scale": 1,
        },
        "model": {"kind": "softmax", "hidden": [], "initial_digest": "0" * 64},
        "training": {
            "rounds": 3,
            "local_steps": 3,
            "learning_rate": "0.5",
            "server_rate": 1,
            "aggregation": "weighted-mean",
        },
        "privacy": {
            "trust_model": "record-level-at-each-participant",
            "unit": "example",
            "relation": "zero-out",
            "sampling": "poisson",
            "epsilon": 2,
            "delta": "0.00001",
            "max_grad_norm": 1,
            "sample_rate": "0.1",
            "noise_multiplier": "1.25",
            "spare_attempts": 1,
            "accountant": ACCOUNTANT,
        },
        "participation": {
            "minimum": 2,
            "deadline_seconds": 60,
            "head_threshold": 1,
            "strict_heads": False,
            "missed_rounds_limit": 2,
        },
        "contribution": {
            "game": "fixed-weight",
            "loss": "cross-entropy",
            "estimator": "exact",
            "validation": {"root": "1" * 64, "slices": [{"source": "operator", "count": 20}]},
        },
        "settlement": {
            "currency": "CNY",
            "contribution_weight": "0.7",
            "data_weight": "0.2",
            "equal_weight": "0.1",
            "fallback": "metered",
            "close_days": 7,
        },
        "code": {"release": "0.1.0", "models_digest": "2" * 64, "shell_digest": "3" * 64},
        "term": {"not_before": "2026-01-01T00:00:00Z", "not_after": "2099-12-31T00:00:00Z"},
    }
    return change(values, changes, "__")


def change(values: dict[str, Any], changes: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """The values with others at these paths; a part of a path that is a number is a place in a list."""
    for path, value in changes.items():
        target: Any = values
        *parents, last = path.split(separator)
        for name in parents:
            target = target[int(name) if name.isdigit() else name]
        if value is DROP:
            target.pop(last, None)
        else:
            target[last] = value
    return values
