"""What the attacks of docs/privacy.md get out of raw updates, over more records and federations than the unit tests."""

import sys

import numpy as np
import pytest
from tests.support import attacks
from tests.support.noise import FixedNoise

pytestmark = pytest.mark.slow

CASES = {
    "no DP": (attacks.NO_CLIPPING, attacks.Silent),
    "clipped, no noise": ("1", attacks.Silent),
    "epsilon 2": ("1", FixedNoise),
}
FEDERATIONS, BATCHES, RECORDS = 12, 4, 200


def inversion(max_grad_norm: str, noise: type[FixedNoise]) -> tuple[float, float]:
    """(mean cosine of records read off updates of one, of records searched for in updates of eight)."""
    contract, own = attacks.demo_contract(max_grad_norm=max_grad_norm), attacks.federation()[1][0]
    base = attacks.base_model(contract)
    single = [
        attacks.likeness(attacks.read_off(contract, attacks.observed(contract, base, [row], noise(row))), own.x[row])
        for row in range(RECORDS)
    ]
    eight = []
    for number in range(BATCHES):
        rows = list(range(8 * number, 8 * number + 8))
        total = attacks.observed(contract, base, rows, noise(number))
        guesses = attacks.match(contract, base, total, own.y[rows], steps=1500)
        eight += [attacks.likeness(guess, own.x[row]) for guess, row in zip(guesses, rows, strict=True)]
    return float(np.mean(single)), float(np.mean(eight))


def test_inversion(benchmark, capsys) -> None:
    found = benchmark.pedantic(lambda: {name: inversion(*case) for name, case in CASES.items()}, rounds=1)
    rest, own = attacks.federation()[2], attacks.federation()[1][0]
    blind = np.mean([attacks.likeness(rest.x.mean(axis=0), record) for record in own.x[:RECORDS]])
    with capsys.disabled():
        sys.stdout.write(f"\nInversion, mean cosine; the mean picture, without any update: {blind:.3f}\n")
        for name, (single, eight) in found.items():
            sys.stdout.write(f"  {name}: one record an update {single:.3f}, eight {eight:.3f}\n")
    benchmark.extra_info.update(found)
    assert min(found["no DP"][0], found["clipped, no noise"][0]) > 0.99
    assert abs(found["epsilon 2"][0]) < 4 / 64**0.5 / RECORDS**0.5  # as a random picture
    assert found["epsilon 2"][1] < 0.15  # the search is granted the labels, and these say a little


def test_membership(benchmark, capsys) -> None:
    def aucs(private: bool) -> np.ndarray:
        runs = [attacks.membership(seed, private=private) for seed in range(FEDERATIONS)]
        return np.array([[attacks.auc(s, run.member) for s in (run.loss, run.trace)] for run in runs])

    without, private = benchmark.pedantic(lambda: (aucs(False), aucs(True)), rounds=1)
    limit = np.e / (1 + np.e)
    with capsys.disabled():
        sys.stdout.write(f"\nMembership, AUC in {FEDERATIONS} federations: by loss, by trace\n")
        for name, found in (("no DP", without), ("epsilon 1", private)):
            (a, b), (c, d) = found.mean(axis=0), found.std(axis=0, ddof=1)
            sys.stdout.write(f"  {name}: {a:.3f} (s.d. {c:.3f}), {b:.3f} (s.d. {d:.3f})\n")
        sys.stdout.write(f"  one federation's chance: s.d. {attacks.CHANCE:.3f}; no attack can pass {limit:.3f}\n")
    benchmark.extra_info.update({"no DP": without.mean(axis=0).tolist(), "epsilon 1": private.mean(axis=0).tolist()})
    assert without.mean(axis=0).min() > 0.65
    assert private.mean(axis=0).max() < 0.5 + 2.58 * attacks.CHANCE
    assert private.max() < limit
