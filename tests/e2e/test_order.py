"""The demo's set-up pays bad data least: every part of the product but transport and processes, ten fixed noises.

The figure of the issue: whoever has flipped labels gets the lowest share per example in at least 9 of 10 runs.
"""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tests.support.demo_kit import demo_setup, number_of, one_thread, paid

from fedpact_contract.shares import COVERS, ParticipantShare, PeriodShares

pytestmark = pytest.mark.slow

SEEDS = range(10)
FLIPPED = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[tuple[PeriodShares, list[ParticipantShare]]]:
    """Of each seed: the shares, and their lines in the order of the set-up's participants."""
    folder: Path = tmp_path_factory.mktemp("order")
    setup = demo_setup(folder / "data")
    assert (setup.counts, len(setup.validation)) == ([450, 200, 350, 350], 440)
    assert setup.changes["privacy"]["epsilon"] == 2
    assert [setup.changes["training"][key] for key in ("rounds", "local_steps")] == [5, 6]
    found = []
    for seed in SEEDS:
        federation = setup.federation(folder / str(seed), seed)
        with one_thread():
            assert federation.run() == "completed"
        period = paid(federation)
        found.append((period, sorted(period.lines, key=lambda line: number_of(federation, line.participant))))
    return found


def per_example(lines: list[ParticipantShare]) -> list[Fraction]:
    return [line.share / line.num_examples for line in lines]


def test_the_flipped_participant_has_the_lowest_share_per_example_in_nine_of_ten_runs(runs) -> None:
    lowest = [min(range(4), key=per_example(lines).__getitem__) for _, lines in runs]
    assert lowest.count(FLIPPED) >= 9, lowest


def test_flipped_labels_cost_a_fifth_of_the_share_per_example_or_more_on_average(runs) -> None:
    """Observed: .62 of the others' mean. 30 % of the labels are wrong."""
    means = np.mean([[float(v) for v in per_example(lines)] for _, lines in runs], axis=0)
    others = np.delete(means, FLIPPED).mean()
    assert means[FLIPPED] < 0.8 * others


def test_every_run_pays_by_contribution_and_its_intervals_hold_the_shares(runs) -> None:
    for period, lines in runs:
        assert (period.basis, period.reason, period.covers) == ("contribution", "reliable", COVERS)
        assert sum(line.share for line in lines) == 1
        for line in lines:
            assert Decimal(0) <= line.low < Fraction(line.share) < line.high <= 1
            assert line.high - line.low < Decimal("0.1")


def test_shares_move_with_the_noise_about_as_much_as_their_intervals_are_wide(runs) -> None:
    """The interval covers the choice of validation rows alone; the noise's own spread is not in it, and is no larger.

    Observed standard deviations over seeds: .016 to .021; half an interval: .02.
    """
    shares = np.array([[float(line.share) for line in lines] for _, lines in runs])
    widths = np.array([[float(line.high - line.low) for line in lines] for _, lines in runs])
    spread = shares.std(axis=0, ddof=1)
    assert (spread > 0.005).all(), "another seed is another noise"
    assert (spread < widths.mean(axis=0)).all()
