"""A small world for the agent's tests: keys, contracts, a home, an operator behind a mock transport. No tests here."""

import datetime
import functools
from decimal import Decimal
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_contract.contract import Contract
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.privacy import ACCOUNTANT, solve_noise_multiplier

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
OWN_CODE, OPERATOR_CODE = "91310000MA1K000000", "91310000MA1K999999"


@functools.cache
def key(name: str) -> Ed25519PrivateKey:
    """One key a name, as long as the tests run."""
    return generate_key()


@functools.cache
def noise(epsilon: str, delta: str, rate: str, steps: int) -> Decimal:
    return solve_noise_multiplier(Decimal(epsilon), Decimal(delta), Decimal(rate), steps)


def participant(name: str, public: str, code: str, **values: Any) -> dict[str, Any]:
    base = {
        "name": name,
        "entity_code": code,
        "key": public,
        "sector": "medical",
        "data_set": f"set-{name}",
        "num_examples": 40,
        "floor_fen": 0,
    }
    return base | values


def contract_values(own_public: str | None = None, **own: Any) -> dict[str, Any]:
    """A whole contract as plain values: `own` changes this enterprise's entry."""
    public = own_public or public_hex(key("own"))
    return {
        "title": "Heart disease",
        "purpose": "disease-prediction",
        "operator": {"name": "City Data", "entity_code": OPERATOR_CODE, "key": public_hex(key("operator"))},
        "participants": [
            participant("own", public, OWN_CODE, **own),
            participant("beta", public_hex(key("beta")), "91310000MA1K000002"),
            participant("gamma", public_hex(key("gamma")), "91310000MA1K000003", sector="finance"),
        ],
        "data": {
            "columns": [
                {"name": "age", "kind": "number", "low": "0", "high": "100", "missing": "drop"},
                {"name": "sex", "kind": "category", "values": ["f", "m"], "missing": "refuse"},
            ],
            "label": {"name": "ill", "classes": ["no", "yes"], "rule": "value"},
            "feature_scale": "1",
        },
        "model": {"kind": "softmax", "hidden": [], "initial_digest": "0" * 64},
        "training": {
            "rounds": 4,
            "local_steps": 2,
            "learning_rate": "0.5",
            "server_rate": "1",
            "aggregation": "weighted-mean",
        },
        "privacy": {
            "trust_model": "record-level-at-each-participant",
            "unit": "example",
            "relation": "zero-out",
            "sampling": "poisson",
            "epsilon": "2",
            "delta": "0.00001",
            "max_grad_norm": "1",
            "sample_rate": "0.2",
            "noise_multiplier": str(noise("2", "0.00001", "0.2", 10)),
            "spare_attempts": 1,
            "accountant": ACCOUNTANT,
        },
        "participation": {
            "minimum": 3,
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
        "term": {"not_before": "2026-11-01T00:00:00Z", "not_after": "2026-12-31T00:00:00Z"},
    }


def contract(own_public: str | None = None, changes: dict[str, Any] | None = None, **own: Any) -> Contract:
    """A contract; `changes` are dotted paths to other values."""
    values = contract_values(own_public, **own)
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place: Any = values
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    return Contract.parse(values)
