"""What makes a contract of the tests one at client level. No tests here."""

from decimal import Decimal
from typing import Any

from tests.support.contract_kit import DROP

from fedpact_contract.privacy import CENTRAL_ACCOUNTANT

NORM = Decimal("0.5")
CENTRAL: dict[str, Any] = {
    "training__aggregation": "uniform-mean",
    "privacy__trust_model": "client-level-at-the-operator",
    "privacy__unit": "participant",
    "privacy__max_grad_norm": DROP,
    "privacy__max_update_norm": NORM,
    "privacy__noise_multiplier": Decimal("3.723"),
    "privacy__accountant": CENTRAL_ACCOUNTANT,
    "contribution__game": "unanimity",
    "settlement__contribution_weight": Decimal(0),
    "settlement__data_weight": Decimal("0.6"),
    "settlement__equal_weight": Decimal("0.4"),
}
"""Changes, as paths; the noise is that of three rounds at epsilon 2 and delta 1e-5."""

_IN_TOML = {
    'aggregation = "weighted-mean"': 'aggregation = "uniform-mean"',
    'trust_model = "record-level-at-each-participant"': 'trust_model = "client-level-at-the-operator"',
    'unit = "example"': 'unit = "participant"',
    "max_grad_norm = 1": "max_update_norm = 0.5",
    'game = "fixed-weight"': 'game = "unanimity"',
    "contribution_weight = 0.7": "contribution_weight = 0",
    "equal_weight = 0.1": "equal_weight = 0.8",
}


def central_toml(text: str) -> str:
    """A template at record level as one at client level."""
    for old, new in _IN_TOML.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
