"""Two other ways to score participants, written anew from their papers, to stand beside ours in tests. No tests here.

- GTG-Shapley: Liu, Chen, Yu, Liu and Cui 2022, "GTG-Shapley: Efficient and accurate participant contribution
  evaluation in federated learning" (arXiv:2109.02053), Algorithm 1.
- FedCE: Jiang, Roth, Li, Yang, Zhao, Nath, Xu, Dou and Xu 2023, "Fair federated medical image segmentation via client
  contribution estimation" (CVPR 2023).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from fedpact_models.features import Floats


def gtg_shapley(
    value: Callable[[int], float],
    players: int,
    evaluations: int,
    rng: np.random.Generator,
    *,
    between: float = 0.01,
    within: float = 0.001,
    criterion: float | None = 0.05,
) -> Floats:
    """Guided truncation: each player in turn leads a random permutation; walks end once little is left to gain.

    Args:
        value: v by mask; each mask is asked for once.
        players: N.
        evaluations: Coalitions that may be evaluated, nobody and all not counted.
        rng: Of the permutations.
        between: A round whose whole gain is at most this gives everybody 0.
        within: A walk that is nearer than this to v(N) ends; whoever comes later gets 0 from it.
        criterion: Mean relative change over the last ten permutations at which sampling ends; None: never.
    """
    full = 2**players - 1
    known = {0: value(0), full: value(full)}
    if abs(known[full] - known[0]) <= between:
        return np.zeros(players)
    records: list[Floats] = []
    most = 100 * evaluations  # walks that are cut at once may meet nothing new
    while len(records) < most and not (criterion and _converged(records, players, criterion)):
        for leader in range(players):
            others = rng.permutation([i for i in range(players) if i != leader]).tolist()
            gains, mask, last = np.zeros(players), 0, known[0]
            for player in (leader, *others):
                mask |= 1 << player
                if abs(known[full] - last) >= within:
                    if mask not in known:
                        if len(known) - 2 == evaluations:
                            return np.mean(records, axis=0) if records else gains
                        known[mask] = value(mask)
                    gains[player], last = known[mask] - last, known[mask]
            records.append(gains)
    return np.asarray(np.mean(records, axis=0))


def _converged(records: list[Floats], players: int, criterion: float) -> bool:
    if len(records) <= max(30, players):
        return False
    means = np.cumsum(records, axis=0) / np.arange(1, len(records) + 1)[:, None]
    change = np.abs(means[-10:] - means[-1]) / (np.abs(means[-1]) + 1e-12)
    return bool(change.mean(axis=1).max() <= criterion)


def fedce(
    updates: Floats, coefficients: Floats, losses_without: Floats, mode: Literal["plus", "times"] = "plus"
) -> Floats:
    """Each participant's coefficient in one round; they sum to 1.

    Args:
        updates: [N, P].
        coefficients: [N], those the updates are averaged by.
        losses_without: [N], of the model without participant i, on data of participant i.
        mode: How distance in gradients and loss in data are put together.
    """
    consensus = coefficients @ updates
    away = []
    for update, coefficient in zip(updates, coefficients, strict=True):
        rest = consensus - coefficient * update
        away.append(1 - update @ rest / (np.linalg.norm(update) * np.linalg.norm(rest)))
    gradient, data = np.array(away) / np.sum(away), losses_without / losses_without.sum()
    both = gradient + data if mode == "plus" else gradient * data
    return np.asarray(both / both.sum())
