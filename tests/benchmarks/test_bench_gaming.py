"""The attack table, re-measured on the whole defence: one attacker among eight equal participants on the digits.

The defence: contracted n, the clip to the median signal in training and in scoring, the detectors. Gain is the
attacker's share of what is above 0, all its identities together, over the share of the same participant had it been
honest, with the same data and seeds. The figures of the issue: no attack gains more than 1.2 without an alarm (the mean
gain over its runs without one), except a leaked validation set, and copies, splits and near-copies under local DP; and
honest participants raise an alarm in at most 6 of 200 honest runs. What is not reached stands in NOT_REACHED.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import mean

import pytest
from tests.support import gaming
from tests.support.gaming import BEHAVIOURS, Outcome

pytestmark = pytest.mark.slow

HONEST_RUNS, HONEST_ALARMS, MOST = 200, 6, 1.2
SEEDS = {True: range(6), False: range(4)}
KINDS = {True: "epsilon 2", False: "no DP"}

UNDETECTABLE = {
    True: {"leaked validation set", "leaked slice", "same rows, fresh noise"},
    False: {"leaked validation set", "leaked slice"},
}
"""What the contract's report lists as such, with what is measured here."""

NOT_REACHED = {True: {"rows padded x2", "best of 4 draws", "best of 16 draws"}, False: {"same rows, fresh noise"}}
"""Attacks that gain more than 1.2 in runs without an alarm, beside those.

Only an agent whose code was changed can do them: the one that we ship trains on the contracted rows, refuses duplicates
and books each attempt before it draws. In five rounds their gain is within what noise does to honest shares, whose
standard deviation is 0.12 of the mean: no test at 1 % a run can tell. Tried: Student's t alone (fewer found), the
signal's energy and its agreement with the others (weaker than values), a tighter clip (noise is then taken for signal).
Without DP, which no contract that pays by contribution has, two runs on the same rows are found in most runs: what they
share lies in few directions. Tried: each coordinate in its own deviation (no better).
"""


def told(capsys: pytest.CaptureFixture[str], lines: Iterable[str]) -> None:
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")


def all_of(arguments: list[tuple[str, int, bool]]) -> list[Outcome]:
    """Every run, two at a time where there are processors: a run's result does not depend on it."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(gaming.outcome, *zip(*arguments, strict=True), chunksize=4))


def table(private: bool) -> dict[str, list[Outcome]]:
    arguments = [(name, seed, private) for name in BEHAVIOURS for seed in SEEDS[private]]
    found: dict[str, list[Outcome]] = {name: [] for name in BEHAVIOURS}
    for (name, _, _), outcome in zip(arguments, all_of(arguments), strict=True):
        found[name].append(outcome)
    return found


@pytest.mark.parametrize("private", [True, False], ids=["dp", "no-dp"])
def test_no_attack_gains_without_an_alarm(benchmark, capsys, private) -> None:
    found = benchmark.pedantic(table, args=(private,), rounds=1)
    honest = mean(o.share for o in found["honest"])
    lines, beyond = (
        [f"{KINDS[private]}, {len(SEEDS[private])} seeds: gain | alarms in | gain without one | codes"],
        set(),
    )
    for name, outcomes in found.items():
        quiet = [o.share / honest for o in outcomes if not o.codes]
        codes = Counter(code for o in outcomes for code in o.codes)
        gain, unseen = mean(o.share for o in outcomes) / honest, mean(quiet) if quiet else 0.0
        alarmed = len(outcomes) - len(quiet)
        rest = ", ".join(f"{code} {count}" for code, count in codes.most_common())
        lines.append(f"  {name:26} {gain:5.2f} | {alarmed} of {len(outcomes)} | {unseen:5.2f} | {rest}")
        benchmark.extra_info[name] = {"gain": gain, "alarmed": alarmed, "unseen": unseen}
        if unseen > MOST:
            beyond.add(name)
    told(capsys, lines)
    assert beyond <= UNDETECTABLE[private] | NOT_REACHED[private]
    assert not found["honest"][0].codes


@pytest.mark.parametrize("private", [True, False], ids=["dp", "no-dp"])
def test_a_wrecker_raises_an_alarm(benchmark, capsys, private) -> None:
    """Whose fake pushes against what it alone holds; beside it the same fake that sends noise."""

    def both() -> dict[bool, list[Outcome]]:
        return {hostile: [gaming.wrecker(seed, private, hostile) for seed in range(4)] for hostile in (False, True)}

    found = benchmark.pedantic(both, rounds=1)
    shares = {hostile: mean(o.share for o in outcomes) for hostile, outcomes in found.items()}
    named = sum("WRECKER" in o.codes for o in found[True])
    words = f"share {shares[False]:.3f} with a fake that sends noise, {shares[True]:.3f} with one that wrecks"
    told(capsys, [f"{KINDS[private]}, a wrecker: {words}; found in {named} of {len(found[True])}"])
    assert named == len(found[True])


@pytest.mark.parametrize("private", [True, False], ids=["dp", "no-dp"])
def test_honest_runs_raise_few_alarms(benchmark, capsys, private) -> None:
    arguments = [("honest", seed, private) for seed in range(HONEST_RUNS)]
    found = benchmark.pedantic(all_of, args=(arguments,), rounds=1)
    raised = [o for o in found if o.codes]
    codes = Counter(code for o in raised for code in o.codes)
    told(capsys, [f"{KINDS[private]}: alarms in {len(raised)} of {HONEST_RUNS} honest runs, {dict(codes)}"])
    benchmark.extra_info["alarmed"] = len(raised)
    assert len(raised) <= HONEST_ALARMS
