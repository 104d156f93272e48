"""Coalition losses and per-example values: against a plain loop in torch, and the same bits whatever computes them."""

import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_cnn, a_model, plain_schema, random_examples
from threadpoolctl import threadpool_limits

from fedpact_contract.contract import Model
from fedpact_contract.errors import FailedError, InputError
from fedpact_models.evaluate import (
    CoalitionLosses,
    RoundEvaluation,
    evaluate,
    evaluate_coalitions,
    evaluate_round,
    logits,
    shapley_by_example,
    unit_sums,
)
from fedpact_models.exact import half_bits, halves, product, rounded_halves, to_grid
from fedpact_models.features import Examples, Floats
from fedpact_models.registry import build, parameter_count
from fedpact_models.weights import load_flat

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [
    pytest.param(a_model(), id="softmax"),
    *(pytest.param(a_model(*hidden), id=f"mlp-{len(hidden)}") for hidden in ((9,), (9, 6))),
    pytest.param(a_cnn(3, 4, (5, 2, 1)), id="cnn-1"),
    pytest.param(a_cnn(3, 2, (4, 2, 1), (3, 1, 1), channels=2, hidden=(6,)), id="cnn-2"),
]


def _setting(model: Model, players: int = 4, rows: int = 60, features: int = 12):
    rng = np.random.default_rng(7)
    schema = plain_schema(features, 5)
    count = parameter_count(model, schema)
    base, steps = rng.normal(size=count) * 0.5, rng.normal(size=(players, count)) * 0.1
    return model, schema, base, steps, random_examples(rng, rows, features, 5)


def _loop(model, schema, base, steps, examples: Examples) -> Floats:
    """Per-example losses of every coalition by loading each model: [2^N, V]."""
    module, result = build(model, schema), []
    for mask in range(2 ** len(steps)):
        load_flat(module, base + sum(s for i, s in enumerate(steps) if mask >> i & 1))
        with torch.no_grad():
            scores = module(torch.from_numpy(examples.x))
        result.append(torch.nn.functional.cross_entropy(scores, torch.from_numpy(examples.y), reduction="none").numpy())
    return np.array(result)


def _same(one: RoundEvaluation, two: RoundEvaluation) -> bool:
    return (one.losses, one.correct, one.values.tobytes()) == (two.losses, two.correct, two.values.tobytes())


@pytest.mark.parametrize("model", SHAPES)
def test_losses_values_and_counts_are_those_of_a_loop_over_models(model: Model) -> None:
    model, schema, base, steps, examples = _setting(model)
    result = evaluate_round(model, schema, base, steps, examples, [25, 35], own_slice=[()] * 4)
    loop = _loop(model, schema, base, steps, examples)
    for mask, (first, second) in enumerate(result.losses):
        assert first == pytest.approx(loop[mask, :25].sum() * 1e9, abs=2)
        assert second == pytest.approx(loop[mask, 25:].sum() * 1e9, abs=2)
    by_orders = np.zeros((4, 60))
    for order in itertools.permutations(range(4)):
        for place, player in enumerate(order):
            before = sum(1 << p for p in order[:place])
            by_orders[player] += (loop[before] - loop[before | 1 << player]) / 24
    np.testing.assert_allclose(result.values, by_orders, atol=1e-12)
    np.testing.assert_allclose(result.values.sum(axis=0), loop[0] - loop[-1], atol=1e-11)
    for flat, count in ((base, result.correct[0]), (base + steps.sum(axis=0), result.correct[1])):
        module = build(model, schema)
        load_flat(module, flat)
        assert count == int((module(torch.from_numpy(examples.x)).argmax(1).numpy() == examples.y).sum())


@pytest.mark.parametrize("model", SHAPES)
def test_plain_evaluation_is_the_empty_coalitions(model: Model) -> None:
    model, schema, base, steps, examples = _setting(model)
    result = evaluate_round(model, schema, base, steps, examples, [60], own_slice=[()] * 4)
    loss, right = evaluate(model, schema, base, examples)
    assert round(Fraction(math.fsum([loss] * 60)) * 10**9) == pytest.approx(result.losses[0][0], abs=1)
    assert right == result.correct[0]
    after, _ = evaluate(model, schema, base + steps.sum(axis=0), examples)
    assert after * 60e9 == pytest.approx(result.losses[-1][0], abs=2)
    module = build(model, schema)
    load_flat(module, base)
    np.testing.assert_allclose(
        logits(model, schema, base, examples.x), module(torch.from_numpy(examples.x)).detach().numpy(), atol=1e-12
    )


@pytest.mark.parametrize("model", SHAPES)
def test_neither_chunk_nor_block_moves_a_bit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = _setting(model, players=5)
    sizes = [(None, None), (1, 1), (3, 7), (8, 60), (64, 59), (None, 13)]
    results = [evaluate_round(*setting, [60], own_slice=[()] * 5, chunk=c, block=b) for c, b in sizes]
    for name, value in (
        ("PART_ELEMENTS", 6 * 9 * 11),
        ("NARROWEST", 1),
        ("WINDOWED", 1),
        ("TILE_ELEMENTS", 64),
        ("LINEAR_ELEMENTS", 320),
        ("STACKED", 7),
        ("TAIL_ELEMENTS", 1),
    ):
        monkeypatch.setattr(f"fedpact_models.coalitions.{name}", value)
        results.append(evaluate_round(*setting, [60], own_slice=[()] * 5))
    assert all(_same(results[0], other) for other in results[1:])


def _walks(players: int, pairs: int, rng: np.random.Generator) -> list[int]:
    """The prefixes of random orders and of the same orders backwards; the ends once each."""
    masks = [0, 2**players - 1]
    for _ in range(pairs):
        order = rng.permutation(players).tolist()
        for walk in (order, order[::-1]):
            masks += [sum(1 << p for p in walk[:end]) for end in range(1, players)]
    return masks


@pytest.mark.parametrize("model", SHAPES)
def test_a_coalition_has_the_same_bits_on_any_way_to_it(model: Model) -> None:
    setting = _setting(model, players=6)
    whole = evaluate_round(*setting, [25, 35], own_slice=[()] * 6)
    rng = np.random.default_rng(3)
    loop = _loop(*setting)
    for masks in (_walks(6, 3, rng), rng.integers(0, 64, 40).tolist(), [63, 0, 63, 21, 21], [5]):
        found = evaluate_coalitions(*setting, [25, 35], masks)
        assert found.losses == tuple(whole.losses[mask] for mask in masks)
        np.testing.assert_allclose(found.by_example, loop[masks], atol=1e-11)
        ends = dict(zip((0, 63), whole.correct, strict=True))
        assert found.correct == {mask: ends[mask] for mask in {0, 63} & set(masks)}
        for one, sums in zip(found.by_example, found.losses, strict=True):
            parts = (one[:25], one[25:])
            assert sums == tuple(round(Fraction(sum(map(Fraction, part.tolist()))) * 10**9) for part in parts)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_hundred_and_twenty_eight_players_in_a_mapped_file(tmp_path: Path, dtype: str) -> None:
    model, schema, base, steps, examples = _setting(a_model(9, 6), players=128)
    steps = steps.astype(dtype) / 16
    steps.tofile(tmp_path / "steps")
    mapped = np.memmap(tmp_path / "steps", dtype, "r", shape=steps.shape)
    masks = _walks(128, 1, np.random.default_rng(5))
    found = evaluate_coalitions(model, schema, base, mapped, examples, [60], masks)
    assert len(found.losses) == 256
    for mask in (masks[1], masks[77], masks[200]):
        flat = base + sum(step.astype(np.float64) for i, step in enumerate(steps) if mask >> i & 1)
        loss, _ = evaluate(model, schema, flat, examples)
        assert found.losses[masks.index(mask)][0] == pytest.approx(loss * 60e9, abs=2)
    backwards = evaluate_coalitions(model, schema, base, steps, examples, [60], masks[::-1])
    assert backwards.losses == found.losses[::-1]


@pytest.mark.parametrize("model", SHAPES)
def test_equal_twins_are_worth_the_same_to_the_last_bit(model: Model) -> None:
    model, schema, base, steps, examples = _setting(model, players=5)
    steps[3] = steps[1]
    result = evaluate_round(model, schema, base, steps, examples, [60], own_slice=[()] * 5)
    assert result.values[1].tobytes() == result.values[3].tobytes()
    assert all(result.losses[m | 2] == result.losses[m | 8] for m in range(32) if not m & 10)
    # Another order of the players changes nothing but the order of the values.
    order = [4, 2, 0, 3, 1]
    renamed = evaluate_round(model, schema, base, steps[order], examples, [60], own_slice=[()] * 5)
    assert renamed.values.tobytes() == result.values[order].tobytes()


def test_of_any_equal_steps_no_bit_depends_on_whose_they_are() -> None:
    """A linear model's players are in two parts by their steps' digests: equal ones must not be in both."""
    for equal in ([0, 1], [0, 5], [1, 2, 3], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]):
        model, schema, base, steps, examples = _setting(a_model(), players=6)
        steps[equal] = steps[equal[0]]
        result = evaluate_round(model, schema, base, steps, examples, [60], own_slice=[()] * 6)
        assert len({result.values[player].tobytes() for player in equal}) == 1
        assert len({result.losses[1 << player] for player in equal}) == 1


@pytest.mark.parametrize("model", [a_model(), a_model(33), a_cnn(10, 20, (4, 3, 1), (5, 3, 2))])
def test_threads_move_no_bit(model: Model) -> None:
    setting = _setting(model, rows=301, features=200)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with threadpool_limits(threads):  # numpy's BLAS, which does the work
                results.append(evaluate_round(*setting, [301], own_slice=[()] * 4))
    finally:
        torch.set_num_threads(before)
    assert _same(*results)


def test_another_kernel_and_instruction_set_move_no_bit_of_a_product() -> None:
    """Another BLAS kernel, in a process of its own: seen to change the last bits of the plain product, not of ours."""
    code = (
        "import hashlib, numpy as np; from fedpact_models.exact import product, rounded_halves;"
        "r = np.random.default_rng(0); a, b = r.normal(size=(57, 301)), r.normal(size=(301, 23));"
        "c = product(rounded_halves(a, (0, 1), 301), rounded_halves(b, 0, 301));"
        "print(hashlib.sha256(c.tobytes()).hexdigest())"
    )
    digests = set()
    for kernel in ("Prescott", "Haswell"):
        environment = os.environ | {"OPENBLAS_CORETYPE": kernel}
        run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        digests.add(run.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 64


@pytest.mark.parametrize("model", ["a_model(33, 20)", "a_cnn(10, 20, (8, 3, 1), (9, 3, 2))"])
def test_another_kernel_and_other_threads_move_no_bit_of_a_list(model: str) -> None:
    code = (
        "import hashlib, numpy as np; from tests.unit.test_evaluate import _setting, _walks, a_cnn, a_model;"
        "from fedpact_models.evaluate import evaluate_coalitions;"
        "masks = _walks(7, 2, np.random.default_rng(0));"
        f"found = evaluate_coalitions(*_setting({model}, players=7, rows=301, features=200), [301], masks);"
        "print(hashlib.sha256(found.by_example.tobytes() + str(found.losses).encode()).hexdigest())"
    )
    digests = set()
    for kernel, threads in (("Prescott", "1"), ("Haswell", "2")):
        environment = os.environ | {"OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_a_null_player_is_worth_exactly_nothing_on_every_example() -> None:
    for shape in SHAPES:
        model, schema, base, steps, examples = _setting(*shape.values)
        steps[2] = 0
        result = evaluate_round(model, schema, base, steps, examples, [60], own_slice=[()] * 4)
        assert not result.values[2].any()
        assert all(result.losses[mask] == result.losses[mask | 4] for mask in range(16))
        without = evaluate_round(model, schema, base, steps[[0, 1, 3]], examples, [60], own_slice=[()] * 3)
        assert without.losses == tuple(result.losses[mask & 3 | (mask & 4) << 1] for mask in range(8))
        assert result.values[[0, 1, 3]].all()


def test_a_givers_own_rows_are_left_out_and_the_others_rescaled() -> None:
    setting = _setting(a_model(9), players=3)
    slices_, own = [10, 20, 30], [(1,), (), (0,)]
    free = evaluate_round(*setting, slices_, own_slice=[()] * 3)
    bound = evaluate_round(*setting, slices_, own_slice=own)
    assert bound.losses == free.losses
    np.testing.assert_array_equal(bound.values[1], free.values[1])
    assert not bound.values[0, 10:30].any()
    assert not bound.values[2, :10].any()
    others = np.r_[free.values[0, :10], free.values[0, 30:]]
    assert bound.values[0].mean() == pytest.approx(others.mean(), rel=1e-12)
    np.testing.assert_allclose(bound.values[2, 10:], free.values[2, 10:] * (60 / 50), rtol=1e-15)


def test_slice_sums_are_integers_of_a_billionth_nat() -> None:
    model, schema, examples = a_model(), plain_schema(2, 2), Examples(x=np.zeros((3, 3)), y=np.array([0, 1, 0]))
    result = evaluate_round(model, schema, np.zeros(6), np.zeros((1, 6)), examples, [1, 2], own_slice=[()])
    assert result.losses == ((693147181, 1386294361),) * 2
    assert result.correct == (2, 2)


@pytest.mark.parametrize("largest", [3.0, 1023.0, 1025.0, 2.0**29])
def test_slice_sums_are_exact_whatever_their_size(largest: float) -> None:
    rng = np.random.default_rng(0)
    losses = rng.uniform(-1e-9, largest, (40, 9001))
    losses[7] = largest
    for sums, row in zip(unit_sums(losses, [1, 4000, 5000]), losses, strict=True):
        cut = [int(loss * 2.0**52) for loss in row.tolist()]
        wanted = [Fraction(sum(part), 2**52) * 10**9 for part in (cut[:1], cut[1:4001], cut[4001:])]
        assert sums == tuple(map(round, wanted))


def test_shapley_of_known_games() -> None:
    def values(game: list[float]) -> list[float]:
        return shapley_by_example(-np.array(game)[:, None])[:, 0].tolist()

    glove = [float(bool(m & 1) and bool(m & 6)) for m in range(8)]
    assert values(glove) == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    costs = [8, 11, 13, 18]
    airport = [-float(max([c for i, c in enumerate(costs) if m >> i & 1], default=0)) for m in range(16)]
    assert values(airport) == pytest.approx([-2, -3, -4, -9])
    assert values([0.0, 5.0]) == [5.0]


def _product(a: Floats, b: Floats) -> Floats:
    return product(rounded_halves(a, (0, 1), a.shape[1]), rounded_halves(b, 0, a.shape[1]))


def test_the_exact_product_is_exact_and_close() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 300)) * 1e3, rng.normal(size=(300, 20)) * 1e-5
    np.testing.assert_allclose(_product(a, b), a @ b, atol=1e-13)
    assert not _product(a, np.zeros((300, 20))).any()
    assert _product(np.array([[3.0]]), np.array([[1 / 4]])).tolist() == [[0.75]]
    for terms in (1, 2, 3, 64, 784, 785, 100_000):
        assert terms * 2 ** (2 * half_bits(terms)) <= 2**53
    one = np.concatenate([rng.uniform(-1, 1, 1000), [1.0, -1.0, 0.0, 2.0**-60, 1 - 2.0**-53]])
    for scale in (1.0, 2.0**-300, 2.0**40):
        for bits in (21, 25):
            grid = to_grid(one * scale, np.array(scale), bits)
            assert np.abs(grid - one * scale).max() <= scale * 2.0 ** -(2 * bits + 2)
            cut = halves(grid, np.array(scale), bits)
            assert np.array_equal(cut.high + cut.low, grid)
            for part, unit in ((cut.high, 2.0**-bits), (cut.low, 2.0 ** -(2 * bits + 1))):
                assert np.array_equal(part / (scale * unit), np.rint(part / (scale * unit)))
                assert np.abs(part / (scale * unit)).max() <= 2**bits


BAD = [
    ({"slices": [30, 29]}, "EVALUATION_INPUT"),
    ({"slices": [60, 0]}, "EVALUATION_INPUT"),
    ({"slices": []}, "EVALUATION_INPUT"),
    ({"own_slice": [()] * 3}, "EVALUATION_INPUT"),
    ({"own_slice": [(), (), (), (1,)]}, "EVALUATION_INPUT"),
    ({"own_slice": [(), (), (), (0,)]}, "EVALUATION_INPUT"),
    ({"block": 0}, "EVALUATION_INPUT"),
    ({"chunk": 0}, "EVALUATION_INPUT"),
    ({"steps": np.zeros((0, 65))}, "EVALUATION_INPUT"),
    ({"steps": np.zeros(65)}, "EVALUATION_INPUT"),
    ({"steps": np.zeros((4, 64))}, "WEIGHTS_SHAPE"),
    ({"steps": np.full((4, 65), np.nan)}, "WEIGHTS_NOT_FINITE"),
    ({"base": np.zeros(64)}, "WEIGHTS_SHAPE"),
    ({"base": np.full(65, np.inf)}, "WEIGHTS_NOT_FINITE"),
    ({"examples": Examples(x=np.zeros((60, 12)), y=np.zeros(60, dtype=np.int64))}, "EVALUATION_INPUT"),
]


@pytest.mark.parametrize(("change", "code"), BAD)
def test_what_does_not_fit_is_refused(change: dict, code: str) -> None:
    model, schema, base, steps, examples = _setting(a_model())
    arguments = {"base": base, "steps": steps, "examples": examples, "slices": [60], "own_slice": [()] * 4} | change
    with pytest.raises(InputError, match=code):
        evaluate_round(model, schema, **arguments)


def test_evaluate_refuses_no_rows_and_a_loss_that_is_not_finite() -> None:
    model, schema, base, steps, examples = _setting(a_model(9))
    with pytest.raises(InputError, match="EVALUATION_INPUT"):
        evaluate(model, schema, base, Examples(x=np.zeros((0, 13)), y=np.zeros(0, dtype=np.int64)))
    huge = np.full_like(base, 1e200)
    with pytest.raises(FailedError, match="EVALUATION_NOT_FINITE"):
        evaluate(model, schema, huge, examples)
    with pytest.raises(FailedError, match="EVALUATION_NOT_FINITE"):
        evaluate_round(model, schema, huge, steps, examples, [60], own_slice=[()] * 4)


BAD_LISTS = [
    ({"masks": []}, "no coalition"),
    ({"masks": [0, 16]}, "of the 4 players"),
    ({"masks": [-1]}, "of the 4 players"),
    ({"chunk": 0}, "at least 1"),
    ({"block": 0}, "at least 1"),
    ({"slices": [61]}, "61 rows"),
    ({"steps": np.zeros((129, 65))}, "129 steps"),
]


@pytest.mark.parametrize(("change", "words"), BAD_LISTS)
def test_a_list_that_does_not_fit_is_refused(change: dict, words: str) -> None:
    model, schema, base, steps, examples = _setting(a_model())
    arguments = {"base": base, "steps": steps, "examples": examples, "slices": [60], "masks": [0, 5]} | change
    with pytest.raises(InputError, match=words) as caught:
        evaluate_coalitions(model, schema, **arguments)
    assert caught.value.code == "EVALUATION_INPUT"


@pytest.mark.parametrize("model", SHAPES)
def test_a_list_with_a_loss_that_is_not_a_number_is_refused(model: Model) -> None:
    model, schema, base, steps, examples = _setting(model)
    steps[2] *= 1e16
    assert isinstance(evaluate_coalitions(model, schema, base, steps[:2], examples, [60], [3]), CoalitionLosses)
    with pytest.raises(FailedError, match="EVALUATION_NOT_FINITE"):
        evaluate_coalitions(model, schema, base, steps, examples, [60], [3, 4])
