"""Speed and memory of a round's evaluation.

Tables show wall time with as many threads as there are cores. What is asserted is processor time on one thread, which
other work on the machine moves less: the best of three runs, or the median of five beside five of a plain loop.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import sampled_round
from tests.support.models_kit import a_cnn, a_model, plain_schema, random_examples
from threadpoolctl import threadpool_limits

from fedpact_contract.contract import Data, Model
from fedpact_models.evaluate import RoundEvaluation, evaluate_coalitions, evaluate_round
from fedpact_models.features import Floats
from fedpact_models.registry import architecture, build, parameter_count

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def _setting(model: Model, features: int, players: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    schema = plain_schema(features, 10)
    count = parameter_count(model, schema)
    base, steps = rng.normal(size=count) * 0.05, rng.normal(size=(players, count)) * 0.01
    return model, schema, base, steps, random_examples(rng, 1000, features, 10)


def _run(setting: tuple[Any, ...]) -> RoundEvaluation:
    return evaluate_round(*setting, [1000], own_slice=[()] * len(setting[3]))


def _processor_seconds(setting: tuple[Any, ...]) -> float:
    seconds = []
    with threadpool_limits(1):
        for _ in range(3):
            start = time.process_time()
            _run(setting)
            seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.mark.benchmark(group="evaluate_round")
def test_four_players_of_an_mlp_of_262_thousand_parameters_and_a_thousand_rows(benchmark) -> None:
    """785-330-10, 16 coalitions, float64: 0.11 s on two idle cores, 0.18 s of processor time on one."""
    setting = _setting(a_model(330), 784, 4)
    result = benchmark.pedantic(_run, args=(setting,), rounds=5, warmup_rounds=1)
    assert len(result.losses) == 16
    assert _processor_seconds(setting) < 0.3


@pytest.mark.benchmark(group="evaluate_round")
def test_twelve_players_of_a_linear_model(benchmark) -> None:
    """65-10, 4,096 coalitions, the most that a contract may ask for: 0.28 s, on one core as on two."""
    setting = _setting(a_model(), 64, 12)
    result = benchmark.pedantic(_run, args=(setting,), rounds=3, warmup_rounds=1)
    assert len(result.losses) == 4096
    assert _processor_seconds(setting) < 1.0


Tensors = dict[str, torch.Tensor]


def _plain(model: Model, schema: Data, x: Floats) -> tuple[torch.nn.Module, torch.Tensor, Callable[[Floats], Tensors]]:
    """The network as anybody would write it, what it reads, and how flat weights become its tensors."""
    module = build(model, schema)
    own = {name: parameter.shape for name, parameter in module.named_parameters()}

    def tensors(flat: Floats) -> Tensors:
        parts = torch.from_numpy(flat).split([shape.numel() for shape in own.values()])
        return {name: part.view(shape) for (name, shape), part in zip(own.items(), parts, strict=True)}

    if model.convolutions is None:
        return module, torch.from_numpy(x), tensors
    scale, grids, layers = architecture(model, schema).scale, model.grids, model.convolutions
    parts: list[torch.nn.Module] = []
    for layer, grid in zip(layers, grids, strict=False):
        convolution = torch.nn.Conv2d(grid.channels, layer.filters, layer.kernel, layer.stride, dtype=torch.float64)
        parts += [convolution, torch.nn.ReLU()]
    dense = torch.nn.Linear(grids[-1].size, 10, dtype=torch.float64)
    last, constant = 2 * len(layers), float(x[0, -1]) * scale

    def convolved(flat: Floats) -> Tensors:
        found = tensors(flat)
        first = found["0.weight"]
        found |= {"0.weight": first[:, :-1], "0.bias": first[:, -1] * constant}
        for place, (layer, grid) in enumerate(zip(layers, grids, strict=False)):
            shape = (layer.filters, grid.channels, layer.kernel, layer.kernel)
            found[f"{2 * place}.weight"] = found[f"{2 * place}.weight"].reshape(shape)
        return found | {f"{last + 1}.{name}": found.pop(f"{last}.{name}") for name in ("weight", "bias")}

    pictures = torch.from_numpy(x[:, :-1] * scale).reshape(len(x), *grids[0])
    return torch.nn.Sequential(*parts, torch.nn.Flatten(), dense), pictures, convolved


def _loop(setting: tuple[Any, ...], masks: list[int]) -> list[int]:
    """What anybody would write first: add up the coalition's tensors, load them, run the model. 1e-9 nat."""
    model, schema, base, steps, examples = setting
    module, x, tensors = _plain(model, schema, examples.x)
    start, added, losses = tensors(base), [tensors(step) for step in steps], []
    y = torch.from_numpy(examples.y)
    with torch.no_grad():
        for mask in masks:
            state = {name: tensor.clone() for name, tensor in start.items()}
            for player in range(len(steps)):
                if mask >> player & 1:
                    for name, tensor in state.items():
                        tensor += added[player][name]
            module.load_state_dict(state)
            loss = torch.nn.functional.cross_entropy(module(x), y, reduction="sum")
            losses.append(round(loss.item() * 1e9))
    return losses


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


@pytest.mark.benchmark(group="against_a_loop")
@pytest.mark.parametrize(
    ("model", "features", "sample", "ours", "least"),
    [
        pytest.param(a_model(), 783, 256, 1024, 12, id="linear-7.8k"),
        pytest.param(a_model(128), 783, 64, 1024, 2.8, id="mlp-102k"),
        pytest.param(a_model(1280), 783, 16, 128, 3.5, id="mlp-1.0M-one-hidden-layer"),
        pytest.param(a_model(768, 512), 783, 16, 32, 0.5, id="mlp-1.0M-two-hidden-layers"),
        pytest.param(a_cnn(28, 28, (8, 5, 2)), 784, 32, 64, 2.0, id="cnn-11.7k-one-convolution"),
        pytest.param(a_cnn(28, 28, (8, 3, 2), (20, 3, 2)), 784, 32, 64, 0.8, id="cnn-8.8k-two-convolutions"),
    ],
)
def test_ten_players_beside_a_loop_that_loads_each_model(
    benchmark, one_thread, model: Model, features: int, sample: int, ours: int, least: float
) -> None:
    """784 features (of a CNN 785), ten classes, 1,000 rows, float64, 1,024 coalitions, one thread, beside other work.

    Seen, beside five to twenty other busy processes: linear 22.8x and 25.7x (17x at worst), 102k 4.9x and 5.8x, a
    million parameters 5.5x and 6.9x with one hidden layer, 0.74x and 0.84x with two. Aimed at: 25x, 2.2x and 7x; what
    is asserted is what a busy machine gives too. Nearly half of a linear model's time is the exact product of the rows
    with everybody's weights, once a round. With two wide layers it is the price of the same bits everywhere: behind the
    first a product is three products (ADR 0004).

    A CNN's loop runs torch's own `Conv2d`. With one convolution, which is linear in the weights, 3.3x and 3.4x were
    seen; with two, of which three products are the second, 0.97x, and 0.92x to 1.16x in shorter runs. Aimed at: 0.95x.

    Both are timed per coalition. The loop runs a random sample, and for the models of a million parameters so do we:
    the round's fixed part (the first layer of ten steps) is timed apart, and shared by 1,024.
    """
    setting = _setting(model, features, 10)
    draw = np.random.default_rng(1).permutation(1024)[:sample].tolist()
    gray = [place ^ place >> 1 for place in range(ours)]

    def evaluate(masks: list[int]) -> tuple[tuple[int, ...], ...]:
        return evaluate_coalitions(*setting, [1000], masks).losses

    ratios = []
    for _ in range(5):
        loop, expected = _seconds(lambda: _loop(setting, draw))
        fixed, _ = _seconds(lambda: evaluate([0]))
        whole, found = _seconds(lambda: evaluate(gray))
        each = fixed / 1024 + (whole - fixed) / (ours - 1)
        ratios.append(loop / sample / each)
    known = dict(zip(gray, found, strict=True))
    for mask, loss in zip(draw, expected, strict=True):
        assert mask not in known or abs(known[mask][0] - loss) <= 20
    benchmark.extra_info.update(ratio=statistics.median(ratios), milliseconds=each * 1e3)
    benchmark.pedantic(evaluate, args=(gray[:64],), rounds=1)
    assert statistics.median(ratios) >= least


HUNDRED = """
import json, re, sys, time
import numpy as np
from tests.support import sampled_round
from tests.support.models_kit import a_cnn, a_model, plain_schema, random_examples
from fedpact_models.evaluate import evaluate_coalitions
from fedpact_models.registry import parameter_count
path, dtype = sys.argv[1:]
schema, model, rng, players = plain_schema(783, 10), a_model(128), np.random.default_rng(0), 100
count = parameter_count(model, schema)
base, examples = rng.normal(size=count) * 0.05, random_examples(rng, 1000, 783, 10)
masks = [0, 2**players - 1]
for _ in range(8):
    order = rng.permutation(players).tolist()
    for walk in (order, order[::-1]):
        for end in range(1, players):
            masks.append(sum(1 << player for player in walk[:end]))
steps = np.memmap(path, dtype, "r", shape=(players, count))
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
started = time.perf_counter()
found = evaluate_coalitions(model, schema, base, steps, examples, [1000], masks)
seconds, mib = time.perf_counter() - started, peak() - before
print(json.dumps({"masks": len(masks), "seconds": seconds, "mib": mib, "loss": found.losses[0]}))
"""


@pytest.mark.benchmark(group="hundred_players")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_hundred_players_and_eight_antithetic_pairs_of_walks(benchmark, tmp_path: Path, dtype: str) -> None:
    """784-128-10, 1,000 rows, steps in a mapped file: 4 s to 10 s on two busy cores, 190 and 229 MiB."""
    rng = np.random.default_rng(0)
    count = parameter_count(a_model(128), plain_schema(783, 10))
    with (tmp_path / "steps").open("wb") as file:
        for _ in range(100):
            file.write((rng.normal(size=count) * 1e-3).astype(dtype).tobytes())

    def child() -> dict[str, Any]:
        command = [sys.executable, "-c", HUNDRED, str(tmp_path / "steps"), dtype]
        run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return json.loads(run.stdout)

    found = benchmark.pedantic(child, rounds=1)
    benchmark.extra_info.update(found)
    assert found["masks"] == 1586
    assert found["seconds"] < 60
    assert found["mib"] < 300


@pytest.mark.benchmark(group="hundred_players")
def test_a_hundred_participants_scored_as_the_server_does_it(benchmark, tmp_path: Path) -> None:
    """As above, by `scoring.score_round`: float32 updates as files, the draw, first-order values, intervals.

    25 s on two cores with five other processes on each, and 173 MiB above what imports take.
    """
    contract = sampled_round.a_contract(100, 128, 1000, 783)
    (tmp_path / "admitted.json").write_text(json.dumps(sampled_round.store_updates(tmp_path, contract)))

    def child() -> dict[str, Any]:
        command = [sys.executable, sampled_round.__file__, str(tmp_path), "100", "128", "1000", "783"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    found = benchmark.pedantic(child, rounds=1)
    benchmark.extra_info.update(found)
    assert 1500 < found["coalitions"] <= sampled_round.EIGHT_PAIRS
    assert found["seconds"] < 60
    assert found["mib"] < 300
