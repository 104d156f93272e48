"""The detectors on updates that are drawn: each finds its thing, says where it has no power, and leaves honest ones be.

What they find of real training, and how often they are wrong there, is measured in the benchmark of gaming.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import t as student

sys.path.append(str(Path(__file__).parents[1]))
from tests.support.gaming import Scene, trained
from tests.support.models_kit import digits
from tests.support.noise import FixedNoise

from fedpact_contract.errors import InputError
from fedpact_models.training import local_update
from fedpact_server import detectors, watch
from fedpact_server.detectors import FAMILY, TESTS, Apart, Finding, Observed, findings, looks, observe

P, V, ROUNDS = 400, 120, 6
NOISE = 400.0
"""Of a participant of 200 rows, whose signal has an energy of 20 or so."""

Change = Callable[[int, dict[str, np.ndarray], np.ndarray | None, np.random.Generator], None]


def honest(number: int, updates: dict[str, np.ndarray], last: np.ndarray | None, rng: np.random.Generator) -> None:
    pass


def a_run(
    seed: int,
    change: Change = honest,
    *,
    noise: float = NOISE,
    counts: Sequence[int] = (200,) * 8,
    claimed: dict[str, int] | None = None,
    away: dict[int, set[str]] | None = None,
    twins: bool = False,
    only: tuple[int, float] | None = None,
) -> list[Observed]:
    """Rounds of updates that share a signal; their own part goes by the rows, and the noise as DP-SGD's does.

    `claimed` has other counts than there are rows; `away` who misses which round; `only` (k, factor) multiplies what
    the first participant's update is worth on the rows from k on.
    """
    rng = np.random.default_rng(seed)
    rows = {f"p{i}": n for i, n in enumerate(counts)}
    declared = rows | (claimed or {})
    energy = {p: noise * (200 / n) ** 2 for p, n in declared.items()}
    way = rng.normal(size=P) * (16 / P) ** 0.5
    gradients = way / 20 + rng.normal(size=(V, P)) * 0.05
    own = {p: rng.normal(size=P) * (2 * 200 / n / P) ** 0.5 for p, n in rows.items()}
    if twins:  # the same rows, and noise of its own
        own["p1"] = own["p0"]
    seen, last, apart = [], None, Apart(b"")
    for number in range(1, ROUNDS + 1):
        fresh = rng.normal(size=P) * (2 / P) ** 0.5  # the signal turns a little from round to round
        updates = {
            p: (way + fresh) * 0.9**number
            + own[p]
            + rng.normal(size=P) * (200 / rows[p] / P) ** 0.5
            + rng.normal(size=P) * (energy[p] / P) ** 0.5
            for p in rows
            if p not in (away or {}).get(number, set())
        }
        change(number, updates, last, rng)
        there = {p: declared[p] for p in sorted(updates)}
        weights = {p: n / sum(there.values()) for p, n in there.items()}
        values = np.stack([gradients @ updates[p] * weights[p] for p in there])
        if only is not None:
            values[0, only[0] :] *= only[1]
        step = np.sum([updates[p] * weights[p] for p in there], axis=0)
        slope = float(np.linalg.norm(gradients.mean(axis=0)))
        told = {"examples": there, "noise": {p: energy[p] for p in there}, "values": values, "apart": apart}
        seen.append(observe(number, updates, step=last, slope=slope, **told))
        last = step
    return seen


SLICES = [("operator", 60), ("p3", 60)]


def said(seen: list[Observed], code: str, slices: Sequence[tuple[str, int]] = SLICES) -> Finding:
    (found,) = [f for f in findings(seen, ROUNDS, slices) if f.code == code]
    return found


def alarms(seen: list[Observed]) -> set[tuple[str, tuple[str, ...]]]:
    """Over all rounds, as the operator looks."""
    told = [f for k in range(1, len(seen) + 1) for f in findings(seen[:k], ROUNDS, SLICES)]
    return {(f.code, f.participants) for f in told if f.outcome == "alarm"}


def first(of: Callable[[np.ndarray, np.ndarray | None, np.random.Generator], np.ndarray]) -> Change:
    def change(number, updates, last, rng):
        updates["p0"] = of(updates["p0"], last, rng)

    return change


def replayed(update, last, rng):
    return update if last is None else last + rng.normal(size=P) * 0.05


def silent(update, last, rng):
    return rng.normal(size=P) * (NOISE / 10 / P) ** 0.5


def copied(part: float) -> Change:
    def change(number, updates, last, rng):
        size = np.linalg.norm(updates["p0"]) * part
        updates["p1"] = updates["p0"] + rng.normal(size=P) * size / P**0.5

    return change


def padded(number, updates, last, rng):
    noise = rng.normal(size=P) * (NOISE / P) ** 0.5
    shared = np.mean([update for p, update in updates.items() if p != "p0"], axis=0)
    updates["p0"] = 5 * shared + noise


@pytest.mark.parametrize(
    ("code", "noise", "change"),
    [
        ("SIGNAL_ENERGY", 0.0, first(lambda d, last, rng: 2 * d)),
        ("SIGNAL_ENERGY", NOISE, first(lambda d, last, rng: 2 * d)),
        ("SIGNAL_ENERGY", NOISE, padded),
        ("VALUE_PER_ROW", NOISE, padded),
        ("DIRECTION", 0.0, first(lambda d, last, rng: np.linalg.norm(d) / P**0.5 * rng.normal(size=P))),
        ("DIRECTION", 0.0, first(lambda d, last, rng: -d)),
        ("NEGATIVE_VALUE", 0.0, first(lambda d, last, rng: -d)),
        ("NEGATIVES", 0.0, first(lambda d, last, rng: -d)),
        ("WRECKER", 0.0, first(lambda d, last, rng: -d)),
        ("WRECKER", NOISE / 10, first(lambda d, last, rng: -4 * d)),
        ("WITHOUT_VALUE", NOISE / 10, first(silent)),
        ("REPLAY", NOISE, first(replayed)),
    ],
)
def test_each_detector_finds_its_thing_and_whose_it_is(code, noise, change) -> None:
    seen = a_run(1, change, noise=noise)
    found = said(seen, code)
    assert (found.outcome, found.participants) == ("alarm", ("p0",)), found
    assert found.statistic > found.threshold
    assert said(a_run(1, noise=noise), code).outcome != "alarm"


def test_fewer_rows_than_claimed_show_as_dispersion() -> None:
    """Without noise: forty rows of two hundred; with the false count the noise is right, and the rows are not there."""
    seen = a_run(0, noise=0.0, counts=(40, *(200,) * 7), claimed={"p0": 200})
    assert said(seen, "DISPERSION").participants == ("p0",)
    assert said(seen, "DISPERSION").outcome == "alarm"
    assert said(a_run(0, noise=0.0, counts=(40, *(200,) * 7)), "DISPERSION").outcome != "alarm", "forty as contracted"


@pytest.mark.parametrize(("noise", "part"), [(0.0, 0.0), (0.0, 0.1), (NOISE, 0.0), (NOISE, 0.3)])
def test_near_copies_are_found_where_they_share_what_is_random(noise, part) -> None:
    found = said(a_run(2, copied(part), noise=noise), "NEAR_COPY")
    assert (found.outcome, found.participants) == ("alarm", ("p0", "p1"))


def test_what_comes_of_the_same_rows_adds_up_over_rounds() -> None:
    """Two parts of three of what sets a twin apart in a round are its rows, the third its draw: after six rounds .92.

    A mean over the rounds would stay at two thirds, whose Fisher transform is .8.
    """
    found = said(a_run(3, noise=0.0, twins=True), "NEAR_COPY")
    assert (found.outcome, found.participants) == ("alarm", ("p0", "p1"))
    assert float(found.evidence["value"]) == pytest.approx(np.arctanh(2 * ROUNDS / (2 * ROUNDS + 1)), abs=0.3)


@pytest.mark.parametrize(("parameters", "off"), [(4096, 1e-12), (150_000, 5 / 64)])
def test_what_sets_updates_apart_is_kept_as_a_sketch(parameters, off) -> None:
    """Two that share half their energy beside the mean, over two rounds; of five deviations of the sketch."""
    rng, sketch = np.random.default_rng(0), Apart(b"seed")
    exact = np.zeros((4, parameters))
    same = rng.normal(size=parameters)
    rest = {"examples": dict.fromkeys("abcd", 9), "noise": dict.fromkeys("abcd", 0.0), "values": np.zeros((4, V))}
    for number in (1, 2):
        updates = rng.normal(size=(4, parameters)) + 3
        updates[:2] += same
        exact += updates - updates.mean(axis=0)
        sent = dict(zip("abcd", updates.astype(np.float32), strict=True))
        seen = observe(number, sent, step=None, slope=1.0, apart=sketch, **rest)
    norms = np.linalg.norm(exact, axis=1)
    assert seen.everyone == tuple("abcd")
    assert np.abs((seen.apart - exact @ exact.T) / np.outer(norms, norms)).max() < max(off, 1e-6)
    assert np.abs(seen.products - updates @ updates.T).max() < 1e-3 * parameters


def test_copies_are_found_among_others_that_come_and_go() -> None:
    away = {2: {"p5"}, 3: {"p4", "p6"}, 6: {"p7"}}
    found = said(a_run(2, copied(0.3), away=away), "NEAR_COPY")
    assert (found.outcome, found.participants) == ("alarm", ("p0", "p1"))
    assert said(a_run(2, away=away), "NEAR_COPY").outcome != "alarm"


def test_where_noise_is_fresh_a_detector_of_copies_says_that_it_has_no_power() -> None:
    found = said(a_run(3, twins=True), "NEAR_COPY")
    assert found.outcome == "no power"
    assert "the thing itself is" in found.power


def test_a_leaked_slice_is_found_by_its_difference_from_the_others() -> None:
    seen = a_run(4, noise=0.0, only=(60, 3.0))
    found = said(seen, "SLICE_VALUE")
    assert (found.outcome, found.participants, found.evidence["slice"]) == ("alarm", ("p0",), 1)
    told = said(seen, "SLICE_VALUE", [("operator", 120)])
    assert told.outcome == "no power"
    assert "one slice" in told.power


def test_a_set_that_is_leaked_as_a_whole_shows_in_the_value_of_a_row_alone() -> None:
    seen = a_run(4, noise=0.0, only=(0, 2.5))
    assert said(seen, "SLICE_VALUE").outcome != "alarm"
    assert said(seen, "VALUE_PER_ROW").outcome == "alarm"


def test_a_wrecker_is_found_after_its_second_round_and_not_for_one() -> None:
    def once(number, updates, last, rng):
        if number == 4:
            updates["p0"] = -3 * updates["p0"]

    seen = a_run(5, first(lambda d, last, rng: -d), noise=0.0)
    assert [said(seen[:k], "WRECKER").outcome for k in (1, 2)] == ["no power", "alarm"]
    assert all(said(a_run(5, once, noise=0.0)[:k], "WRECKER").outcome != "alarm" for k in range(1, ROUNDS + 1))
    threshold = said(seen, "WRECKER").threshold
    assert threshold == 3, "as the rule of the contract's documents says"


def test_replays_take_three_rounds_that_follow_a_step() -> None:
    seen = a_run(1, first(replayed))
    assert said(seen[:3], "REPLAY").outcome == "no power"
    assert [f.code for f in findings(seen[:4], ROUNDS, SLICES)] == ["WRECKER"], "between two looks"


def test_with_few_participants_the_tests_against_peers_have_no_power() -> None:
    seen = a_run(0, first(lambda d, last, rng: 4 * d), counts=(200, 200, 200))
    silent_codes = {f.code for f in findings(seen, ROUNDS, SLICES) if f.outcome == "no power"}
    assert silent_codes == set(TESTS) - {"WRECKER", "NEGATIVE_VALUE"}


@pytest.mark.parametrize("noise", [0.0, NOISE])
@pytest.mark.parametrize("counts", [(200,) * 8, (450, 200, 350, 350, 450, 200, 350), (200,) * 20])
def test_honest_runs_are_left_alone(noise, counts) -> None:
    """Forty of each kind; equal ones on real data are counted in the benchmark. No alarm is what 1 % a run allows."""
    raised = [alarms(a_run(seed, noise=noise, counts=counts)) for seed in range(40 if len(counts) < 20 else 5)]
    assert sum(map(bool, raised)) <= 2, [found for found in raised if found]


def test_who_is_away_for_some_rounds_is_compared_over_its_own() -> None:
    away = {2: {"p1", "p5"}, 5: {"p0"}}
    assert alarms(a_run(7, noise=0.0, away=away)) == set()
    found = said(a_run(7, padded, away={2: {"p1", "p5"}}), "SIGNAL_ENERGY")
    assert (found.outcome, found.participants) == ("alarm", ("p0",))


def test_without_anything_to_tell_apart_nothing_is_said() -> None:
    """Updates of zeros."""
    zeros = {f"p{i}": np.zeros(P) for i in range(8)}
    rest = {
        "examples": dict.fromkeys(zeros, 200),
        "noise": dict.fromkeys(zeros, 0.0),
        "slope": 0.0,
        "apart": Apart(b""),
    }
    seen = [observe(k, zeros, step=np.zeros(P), values=np.zeros((8, V)), **rest) for k in range(1, ROUNDS + 1)]
    assert not [f for f in findings(seen, ROUNDS, SLICES) if f.outcome == "alarm"]


def test_looks_are_few() -> None:
    assert [looks(n) for n in (1, 3, 5, 6, 40)] == [(1,), (3,), (3, 5), (3, 6), (3, 6, 12, 24, 40)]


def test_evidence_is_plain() -> None:
    for found in findings(a_run(1, padded), ROUNDS, SLICES):
        plain = found.plain()
        assert {type(v) for v in plain["evidence"].values()} <= {str, int}
        assert not [v for v in plain.values() if isinstance(v, float)]


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7, 14, 30])
def test_thresholds_are_student_s(degrees) -> None:
    for level in (0.4, 0.01, FAMILY / 1000):
        assert detectors._threshold(degrees, level) == pytest.approx(student.isf(level, degrees), rel=1e-6, abs=2e-6)
    assert detectors._threshold(0, 0.01) == np.inf


def test_where_no_single_update_is_scored_none_is_compared() -> None:
    """At client level."""
    contract = SimpleNamespace(contribution=SimpleNamespace(game="unanimity"))
    with pytest.raises(InputError) as caught:
        watch.look(None, contract, Path(), None)
    assert caught.value.code == "ALARMS_NO_GAME"


@pytest.mark.parametrize("scene", [Scene(epsilon=2), Scene(epsilon=None)])
def test_the_benchmark_trains_as_the_product_does(scene) -> None:
    data, parts, _ = digits(0, scene.rows, {})
    contract, base = scene.contract(data), np.random.default_rng(0).normal(size=650) * 0.1
    ours = local_update(contract, base, parts[2], FixedNoise(3))
    theirs = trained(contract, base, parts[2], FixedNoise(3), len(parts[2]))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()
