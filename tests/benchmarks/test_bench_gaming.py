"""The attack table, re-measured on the whole defence: one attacker among eight equal participants on the digits.

The defence: contracted n, the clip to the median signal in training and in scoring, the detectors. Gain is the
attacker's share of what is above 0, all its identities together, over the share of the same participant had it been
honest, with the same data and seeds. The figures of the issue: no attack gains more than 1.2 without an alarm (the mean
gain over its runs without one), except a leaked validation set, and copies, splits and near-copies under local DP; and
honest participants raise an alarm in at most 6 of 200 honest runs. What is not reached stands in NOT_REACHED. Beside
each gain stands the one without the clip, of a few seeds.

Measured: of 200 honest runs alarms in 0 (eight equal participants, four) and 1 (eight of 90 to 300 rows) at epsilon 2,
and in 0 without DP. All of it takes some ten minutes of processor time, of which 200 honest runs take under one.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import mean

import pytest
from tests.support import gaming
from tests.support.gaming import BEHAVIOURS, ROWS, Outcome, Scene

from fedpact_contract.undetected import ATTACKS

pytestmark = pytest.mark.slow

HONEST_RUNS, HONEST_ALARMS, MOST = 200, 6, 1.2
SCENES = {"epsilon 2": Scene(epsilon=2), "epsilon 8": Scene(epsilon=8), "no DP": Scene(epsilon=None)}
SEEDS = {"epsilon 2": range(40), "epsilon 8": range(12), "no DP": range(12)}
UNCLIPPED = range(6)
LAYOUTS = {
    "eight equal participants": (ROWS,) * 8,
    "four": (ROWS,) * 4,
    "eight of 90 to 300 rows": (90, 110, 120, 150, 175, 200, 240, 300),
}

LEAKED = {"leaked validation set", "leaked slice"}
UNDETECTABLE = {
    "epsilon 2": LEAKED | {"same rows, fresh noise"},
    "epsilon 8": LEAKED | {"same rows, fresh noise"},
    "no DP": LEAKED,
}
"""What the contract's report lists as such, with what is measured here."""

NOT_REACHED: dict[str, set[str]] = {
    "epsilon 2": {"rows padded x2", "best of 4 draws", "best of 16 draws"},
    "epsilon 8": set(),
    "no DP": set(),
}
"""Attacks that gain more than 1.2 in runs without an alarm, beside those.

Only an agent whose code was changed can do them: the one that we ship trains on the contracted rows, refuses more exact
copies among them than the contract's `max_duplicates`, where it has one, and books each attempt before it draws. In
five rounds at epsilon 2 their gain is within what noise does to honest shares, whose standard deviation is 0.19 of the
mean.

Best of k: it chooses by the loss on its own rows, so that the noise's part along its own gradient is 1.8 deviations a
round (of 16 draws). Along the validation gradient, which is what the operator knows, it is 1.0: over five rounds, next
to seven others, 2.2. With eight participants 1 % a run is 3.0 deviations, had one test the level for itself; and values
are that projection, so VALUE_PER_ROW is the test. Tried beside it: weights of rounds by their noise or by their signal
over noise (2.2 and 2.1), declared noise brought nearer to what values show (2.3; false alarms at epsilon 8), twelve and
twenty rounds (2.8 and 3.3, found in 1 of 30: there values are mostly noise, and honest shares as far apart).

Rows padded x2: tried were Student's t alone (fewer found), the signal's energy and its agreement with the others
(weaker than values), a tighter clip (noise is then taken for signal), half of the level for VALUE_PER_ROW (34 of 40 at
best, and honest runs at epsilon 8 come near).
"""


def told(capsys: pytest.CaptureFixture[str], lines: Iterable[str]) -> None:
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")


def all_of(arguments: Sequence[tuple[str, int, Scene]]) -> list[Outcome]:
    """Every run, two at a time where there are processors: a run's result does not depend on it."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(gaming.outcome, *zip(*arguments, strict=True), chunksize=4))


Table = dict[str, list[Outcome]]


def table(scene: Scene, seeds: range) -> Table:
    arguments = [(name, seed, scene) for name in BEHAVIOURS for seed in seeds]
    found: Table = {name: [] for name in BEHAVIOURS}
    for (name, _, _), outcome in zip(arguments, all_of(arguments), strict=True):
        found[name].append(outcome)
    return found


def gain(found: Table, name: str) -> float:
    return mean(o.share for o in found[name]) / mean(o.share for o in found["honest"])


@pytest.mark.parametrize("kind", list(SCENES))
def test_no_attack_gains_without_an_alarm(benchmark, capsys, kind) -> None:
    scene, seeds = SCENES[kind], SEEDS[kind]
    found = benchmark.pedantic(table, args=(scene, seeds), rounds=1)
    loose = table(replace(scene, clipped=False), UNCLIPPED)
    honest = mean(o.share for o in found["honest"])
    title = f"{kind}, {len(seeds)} seeds, honest share {honest:.3f}: gain | without the clip"
    lines, beyond = [f"{title} | alarms in | gain without one | codes"], set()
    for name, outcomes in found.items():
        quiet = [o.share / honest for o in outcomes if not o.codes]
        codes = Counter(code for o in outcomes for code in o.codes)
        unseen, alarmed = mean(quiet) if quiet else 0.0, len(outcomes) - len(quiet)
        rest = ", ".join(f"{code} {count}" for code, count in codes.most_common())
        gains = f"{gain(found, name):5.2f} | {gain(loose, name):5.2f}"
        lines.append(f"  {name:28} {gains} | {alarmed:2} of {len(outcomes)} | {unseen:5.2f} | {rest}")
        benchmark.extra_info[name] = {"gain": gain(found, name), "alarmed": alarmed, "unseen": unseen}
        if unseen > MOST:
            beyond.add(name)
    told(capsys, lines)
    assert beyond <= UNDETECTABLE[kind] | NOT_REACHED[kind]
    assert beyond <= {attack.name for attack in ATTACKS}, "every report says so"
    if not scene.private:
        assert gain(found, "update x4") < MOST < gain(loose, "update x4"), "what the clip is for"


@pytest.mark.parametrize("kind", ["epsilon 2", "no DP"])
def test_a_wrecker_raises_an_alarm(benchmark, capsys, kind) -> None:
    """Whose fake pushes against what it alone holds; beside it the same fake that sends noise."""

    def both() -> dict[bool, list[Outcome]]:
        return {
            hostile: [gaming.wrecker(seed, SCENES[kind], hostile) for seed in range(4)] for hostile in (False, True)
        }

    found = benchmark.pedantic(both, rounds=1)
    shares = {hostile: mean(o.share for o in outcomes) for hostile, outcomes in found.items()}
    named = sum("WRECKER" in o.codes for o in found[True])
    words = f"share {shares[False]:.3f} with a fake that sends noise, {shares[True]:.3f} with one that wrecks"
    told(capsys, [f"{kind}, a wrecker: {words}; found in {named} of {len(found[True])}"])
    assert named == len(found[True])


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("kind", ["epsilon 2", "no DP"])
def test_honest_runs_raise_few_alarms(benchmark, capsys, kind, layout) -> None:
    scene = replace(SCENES[kind], rows=LAYOUTS[layout])
    arguments = [("honest", seed, scene) for seed in range(HONEST_RUNS)]
    found = benchmark.pedantic(all_of, args=(arguments,), rounds=1)
    raised = [o for o in found if o.codes]
    codes = dict(Counter(code for o in raised for code in o.codes))
    told(capsys, [f"{kind}, {layout}: alarms in {len(raised)} of {HONEST_RUNS} honest runs, {codes}"])
    benchmark.extra_info["alarmed"] = len(raised)
    assert len(raised) <= HONEST_ALARMS
