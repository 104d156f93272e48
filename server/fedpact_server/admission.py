"""Admission: may this update enter the aggregate? Pure checks that return None or raise `RejectedError`.

An update whose signature is not the participant's is nobody's word: the caller logs it as missed, with the code.
"""

import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.arrays import salt_bytes, update_digest
from fedpact_contract.contract import ClientPrivacy, Contract
from fedpact_contract.errors import FaultError, InputError, RejectedError
from fedpact_contract.messages import Head, Metering, Update, update_event
from fedpact_contract.parties import opened
from fedpact_contract.record import Envelope
from fedpact_server import noise_floor

ROUNDING = 1e-6
"""How much a norm may grow, relatively, by rounding to float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the coordinator expects of one participant's update in one round.

    The mirror of the participant's ledger is `spares_used` and `ledger_heads`: what its earlier replies in this
    contract say. `ratios` are the energies of its last updates (`noise_floor`), as many as are pooled with this one.
    """

    contract: Contract
    contract_id: str
    round: int
    participant: str
    run_key: str
    base_digest: str
    head: Head
    parameters: int
    known_digests: frozenset[str]
    spares_used: int
    ledger_heads: frozenset[str]
    ratios: tuple[float, ...]
    accept_test_noise: bool = False


def open_update(envelope: Envelope[Update], expected: Expected) -> Update:
    """The update, if this participant's run key signed it, once, and nobody else: the log takes no more.

    Raises:
        RejectedError: UPDATE_SIGNATURE.
    """
    try:
        return opened(envelope, Update, expected.run_key)
    except (FaultError, InputError) as err:
        raise RejectedError(
            "UPDATE_SIGNATURE", "The update is not signed by this participant's run key.", party=expected.participant
        ) from err


def admit(update: Update, array: bytes, expected: Expected) -> None:
    """Raise unless the update is the contracted one for this round and may be aggregated.

    Args:
        update: What the participant signed.
        array: The update itself, little-endian float32, and its salt.
        expected: The round's facts.

    Raises:
        RejectedError: with the code of the first rule broken.
    """
    for check in (_check_place, _check_ledger, _check_terms, _check_privacy):
        check(update, expected)
    _check_noise(_checked_array(update, array, expected), expected)


def norm_bound(contract: Contract, num_examples: int, parameters: int, *, steps: int | None = None) -> float:
    """The largest norm an honest update can have: every row in every batch, noise six deviations out.

    `steps` are those of a round where nothing else is said. At client level the norm is the contracted one, and what
    rounding to float32 adds.
    """
    privacy, training = contract.privacy, contract.training
    if isinstance(privacy, ClientPrivacy):
        return float(privacy.max_update_norm) * (1 + ROUNDING)
    signal = float(privacy.max_grad_norm) * num_examples
    noise = 6 * float(privacy.noise_multiplier * privacy.max_grad_norm) * math.sqrt(max(parameters, 36))
    scale = training.learning_rate / (privacy.sample_rate * Decimal(num_examples))
    return (steps or training.local_steps) * float(scale) * (signal + noise)


def _check_place(update: Update, expected: Expected) -> None:
    places = {
        "contract_id": expected.contract_id,
        "round": expected.round,
        "participant": expected.participant,
        "base_digest": expected.base_digest,
        "head": expected.head,
    }
    for field, value in places.items():
        if getattr(update, field) != value:
            raise RejectedError(
                f"UPDATE_{field.upper()}",
                f"The update names another {field.replace('_', ' ')} than this round's.",
                party=expected.participant,
                field=field,
            )


def _check_ledger(update: Update, expected: Expected) -> None:
    """Every charge is a row, and every row moves the head: two updates never have one head between them."""
    left = expected.contract.privacy.spare_attempts - expected.spares_used
    if update.attempt > 1 + left:
        raise RejectedError(
            "UPDATE_ATTEMPT",
            f"The update is attempt {update.attempt}; {left} spare attempts of the contract are left.",
            party=expected.participant,
            rule="privacy.spare_attempts, over the whole contract",
        )
    if update.ledger_head in expected.ledger_heads:
        raise RejectedError(
            "UPDATE_LEDGER_HEAD",
            "An earlier reply named the same ledger head: this update's charge is not in the ledger.",
            party=expected.participant,
            field="ledger_head",
            rule="a charge is a row, and moves the head",
        )


def _check_terms(update: Update, expected: Expected) -> None:
    rows = expected.contract.participant(expected.participant).num_examples
    metering = Metering(rows=rows, steps=expected.contract.training.local_steps)
    if update.num_examples != rows or update.metering != metering:
        raise RejectedError(
            "UPDATE_METERING",
            "The update meters other rows or steps than contracted.",
            party=expected.participant,
            field="metering",
        )


def _check_privacy(update: Update, expected: Expected) -> None:
    if update.privacy_event != update_event(expected.contract):
        raise RejectedError(
            "UPDATE_PRIVACY_EVENT",
            "The update claims another privacy event than contracted.",
            party=expected.participant,
            field="privacy_event",
        )
    if update.noise != "csprng" and not expected.accept_test_noise:
        raise RejectedError(
            "UPDATE_TEST_NOISE", "The update was made with test noise.", party=expected.participant, field="noise"
        )


def _checked_array(update: Update, array: bytes, expected: Expected) -> NDArray[np.float64]:
    if len(array) != 4 * expected.parameters + salt_bytes(expected.contract):
        raise RejectedError(
            "UPDATE_SHAPE",
            f"The update has {len(array)} bytes, the model has {expected.parameters} parameters.",
            party=expected.participant,
        )
    if update_digest(array) != update.update_digest:
        raise RejectedError("UPDATE_DIGEST", "The update is not the one that was signed.", party=expected.participant)
    if update.update_digest in expected.known_digests:
        raise RejectedError("UPDATE_REPLAYED", "The same update was received before.", party=expected.participant)
    values = np.frombuffer(array, "<f4", expected.parameters).astype(np.float64)
    if not np.isfinite(values).all():
        raise RejectedError("UPDATE_NOT_FINITE", "The update holds a NaN or an infinity.", party=expected.participant)
    bound = norm_bound(expected.contract, update.num_examples, expected.parameters)
    if float(np.linalg.norm(values)) > bound:
        raise RejectedError(
            "UPDATE_NORM",
            f"The update's norm is beyond {bound:.3g}, the largest that contracted training can give.",
            party=expected.participant,
        )
    return values


def _check_noise(values: NDArray[np.float64], expected: Expected) -> None:
    if isinstance(expected.contract.privacy, ClientPrivacy):  # an update has none
        return
    rows = expected.contract.participant(expected.participant).num_examples
    ratio = noise_floor.energy_ratio(values, expected.contract, rows)
    found = noise_floor.pooled([*expected.ratios, ratio], expected.contract, expected.parameters)
    if found.outcome == "failed":
        which = "The update has" if found.updates == 1 else f"The last {found.updates} updates together have"
        raise RejectedError(
            noise_floor.CODE,
            f"{which} {found.ratio:.3f} of the energy that the contracted noise alone brings.",
            party=expected.participant,
            rule=f"at least {found.floor:.3f} of it",
        )
