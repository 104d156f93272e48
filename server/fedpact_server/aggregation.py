"""Aggregation over admitted updates: float64, in the order of participants' ids; never a mean of nothing."""

from collections.abc import Mapping
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.errors import FailedError


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


def apply(base: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The next model: base plus the steps, added one after the other in their order."""
    model = base.copy()
    for step in steps:
        model += step
    return model
