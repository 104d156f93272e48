"""Aggregation over admitted updates: float64, in the order of participants' ids; never a mean of nothing."""

from collections.abc import Mapping, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import ClientPrivacy, Contract
from fedpact_contract.errors import FailedError
from fedpact_models.noise import Noise
from fedpact_models.weights import clipped


def weighted_steps(
    updates: Mapping[str, NDArray[np.float32]], num_examples: Mapping[str, int], server_rate: Decimal
) -> NDArray[np.float64]:
    """The steps eta w_i D_i of each participant, in the order of ids.

    Args:
        updates: Participant id -> update, float32 [P].
        num_examples: Participant id -> contracted n; the weights are n_i / sum n over `updates`.
        server_rate: eta.

    Returns:
        float64 [N, P].

    Raises:
        FailedError: there is no update.
    """
    if not updates:
        raise FailedError("AGGREGATION_EMPTY", "There is no update to aggregate.")
    ids = sorted(updates)
    total = sum(num_examples[i] for i in ids)
    return np.stack([updates[i].astype(np.float64) * (float(server_rate) * num_examples[i] / total) for i in ids])


def noised_mean(
    updates: Sequence[NDArray[np.float32]], contract: Contract, privacy: ClientPrivacy, noise: Noise
) -> NDArray[np.float64]:
    """The step eta (sum of D_i + N(0, (sigma C)^2)) / N of the central Gaussian mechanism.

    Each D_i is clipped to C here too, whatever its participant did; N is the contract's number of participants, so that
    whoever is missing counts as zeros: one participant's update moves the sum by at most C, and nothing else.

    Args:
        updates: The admitted updates, float32 [P] each, in the order of participants' ids.
        contract: eta and N.
        privacy: Its client-level terms: sigma and C.
        noise: Where the noise comes from.

    Returns:
        float64 [P].

    Raises:
        FailedError: there is no update.
    """
    if not updates:
        raise FailedError("AGGREGATION_EMPTY", "There is no update to aggregate.")
    norm = float(privacy.max_update_norm)
    total = np.zeros(len(updates[0]))
    for update in updates:
        total += clipped(update, norm)
    total += noise.normal(len(total)) * (float(privacy.noise_multiplier) * norm)
    return total * (float(contract.training.server_rate) / len(contract.participants))


def apply(base: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The next model: base plus the steps, added one after the other in their order."""
    model = base.copy()
    for step in steps:
        model += step
    return model
