"""What every report says of attacks that the detectors do not find, measured anew: gain and alarms of each."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from decimal import Decimal
from multiprocessing import get_context
from statistics import mean

import pytest
from tests.support import gaming

from fedpact_contract.undetected import ATTACKS, RUNS

pytestmark = pytest.mark.slow

GAIN, ALARMS = 0.1, 4
"""How far a figure may be from what is said: another machine's sums round otherwise."""
SCENE = gaming.Scene(epsilon=2)
NAMES = ("honest", *(attack.name for attack in ATTACKS))


def measured() -> dict[str, tuple[float, int]]:
    """Gain, and runs with an alarm, of each attack."""
    runs = [(name, seed, SCENE) for name in NAMES for seed in range(RUNS)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(pool.map(gaming.outcome, *zip(*runs, strict=True), chunksize=4))
    parts = [found[k : k + RUNS] for k in range(0, len(found), RUNS)]
    honest = mean(outcome.share for outcome in parts[0])
    return {
        name: (mean(o.share for o in outcomes) / honest, sum(bool(o.codes) for o in outcomes))
        for name, outcomes in zip(NAMES, parts, strict=True)
    }


def test_what_the_report_says_of_undetected_attacks(benchmark, capsys) -> None:
    found = benchmark.pedantic(measured, rounds=1)
    benchmark.extra_info.update({name: {"gain": gain, "alarmed": alarms} for name, (gain, alarms) in found.items()})
    with capsys.disabled():
        for name, (gain, alarms) in found.items():
            sys.stdout.write(f"\n  {name:30} {gain:5.2f} | {alarms} of {RUNS}")
    for attack in ATTACKS:
        gain, alarms = found[attack.name]
        assert abs(gain - float(Decimal(attack.gain))) <= GAIN, attack.name
        assert abs(alarms - attack.alarms) <= ALARMS, attack.name
