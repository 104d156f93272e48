"""What a private step costs beside a plain one: gradient paths and the whole step, side by side in one run.

An MLP of a million parameters and a batch of 256, and the demo's softmax; on one thread. The plain step is autograd and
SGD on the same rows. The figures of the issue: the gradient path at most 3.5 times the plain step and 100 MB more; the
full step with the system's noise at most 8 times.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tests.support.models_kit import a_model, plain_schema, random_examples
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional

from fedpact_models import dp
from fedpact_models.dp import SystemNoise, dp_sgd
from fedpact_models.features import Floats
from fedpact_models.registry import build

LARGE, BATCH = (784, (1024, 200), 10), 256
MIDDLE, SMALL = (784, (), 10), (64, (), 10)
ROUNDS = 7


class AllRows:
    """Every row is drawn, and there is no noise: the gradient path alone."""

    label = "test"

    def uniform(self, n: int) -> Floats:
        return np.zeros(n)

    def normal(self, n: int) -> Floats:
        return np.zeros(n)


class AllRowsAndNoise(AllRows):
    """Every row is drawn, and the noise is the system's."""

    def __init__(self) -> None:
        self._noise = SystemNoise()

    def normal(self, n: int) -> Floats:
        return self._noise.normal(n)


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def made(shape: tuple[int, tuple[int, ...], int]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    features, hidden, classes = shape
    module = build(a_model(*hidden), plain_schema(features, classes)).float()
    for p in module.parameters():
        nn.init.normal_(p, std=0.05)
    rows = random_examples(np.random.default_rng(1), BATCH, features, classes)
    return module, torch.from_numpy(rows.x).float(), torch.from_numpy(rows.y)


def private(shape: tuple[int, tuple[int, ...], int], noise: dp.Noise, mode: dp.Mode | None) -> Callable[[], None]:
    module, x, y = made(shape)
    return lambda: dp_sgd(
        module,
        x,
        y,
        steps=1,
        sample_rate=0.5,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        denominator=float(BATCH),
        learning_rate=0.1,
        noise=noise,
        physical_batch=BATCH,
        mode=mode,
    )


def plain(shape: tuple[int, tuple[int, ...], int]) -> Callable[[], None]:
    module, x, y = made(shape)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        optimizer.step()

    return step


def side_by_side(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median milliseconds of processor time, one of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            if number:  # the first one warms up
                times[name].append(1000 * (time.process_time() - begun))
    return {name: statistics.median(found) for name, found in times.items()}


def told(title: str, found: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        parts = (f"{name} {ms:.2f} ms (x{ms / found['plain']:.1f})" for name, ms in found.items())
        sys.stdout.write(f"\n{title}: {', '.join(parts)}\n")


def test_a_private_step_of_a_million_parameters(benchmark, capsys) -> None:
    steps = {
        "plain": plain(LARGE),
        "ghost": private(LARGE, AllRows(), "ghost"),
        "hooks": private(LARGE, AllRows(), "hooks"),
        "full": private(LARGE, AllRowsAndNoise(), None),
    }
    found = benchmark.pedantic(side_by_side, args=(steps,), rounds=1)
    told("MLP of 1,010,834 parameters, batch 256", found, capsys)
    assert found["ghost"] <= 3.5 * found["plain"]
    assert found["ghost"] < found["hooks"]
    assert found["full"] <= 8 * found["plain"]


@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=["650", "7850"])
def test_the_rule_takes_the_faster_way_for_a_softmax(benchmark, capsys, shape) -> None:
    ways: tuple[dp.Mode, ...] = ("hooks", "ghost")
    steps = {"plain": plain(shape), **{mode: private(shape, AllRows(), mode) for mode in ways}}
    found = benchmark.pedantic(side_by_side, args=(steps,), rounds=1)
    told(f"softmax on {shape[0]} features, batch 256", found, capsys)
    taken = found[dp.mode_of(made(shape)[0])]
    assert taken <= 1.1 * min(found[mode] for mode in ways)


MEMORY = """
import re, sys
from tests.benchmarks.test_bench_dp import LARGE, AllRows, plain, private
import torch
torch.set_num_threads(1)
step = {"plain": lambda: plain(LARGE), "ghost": lambda: private(LARGE, AllRows(), "ghost")}[sys.argv[1]]()
for _ in range(3):
    step()
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_the_memory_of_a_private_step(benchmark, capsys) -> None:
    def peak(kind: str) -> float:
        line = [sys.executable, "-c", MEMORY, kind]
        return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) / 1024

    found = benchmark.pedantic(lambda: {kind: peak(kind) for kind in ("plain", "ghost")}, rounds=1)
    more = found["ghost"] - found["plain"]
    with capsys.disabled():
        sys.stdout.write(f"\npeak memory of a process: plain {found['plain']:.0f} MB, ghost {more:+.0f} MB\n")
    assert more <= 100
