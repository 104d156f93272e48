"""Coalitions on Ray: the same integers and the same bits as in one process, also when a process dies."""

import importlib.util
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from tests.support.closed_run import open_run
from tests.support.models_kit import a_model, plain_schema, random_examples
from tests.support.operator_world import NOW, OPERATOR_CODE, PASSPHRASE
from tests.support.sampled_round import a_contract, digests_of, scored, store_updates

from fedpact_contract.errors import FailedError, InputError, ServiceError
from fedpact_models.evaluate import CoalitionLosses, Evaluate, evaluate_coalitions
from fedpact_models.registry import parameter_count
from fedpact_server import cluster, driver
from fedpact_server.home import OperatorHome, init
from fedpact_server.serve import serve

NO_RAY = "Ray is not installed: pip install -c constraints.txt -e '.[ray]'"
"""`make setup-dev` leaves it out for its size, and so does .ci/run."""


def _setting(hidden: tuple[int, ...], players: int = 6, rows: int = 301, features: int = 40):
    rng = np.random.default_rng(7)
    schema, model = plain_schema(features, 5), a_model(*hidden)
    count = parameter_count(model, schema)
    base, steps = rng.normal(size=count) * 0.5, rng.normal(size=(players, count)) * 0.1
    return model, schema, base, steps, random_examples(rng, rows, features, 5)


def _same(one: CoalitionLosses, two: CoalitionLosses) -> bool:
    return (one.losses, one.correct, one.by_example.tobytes()) == (two.losses, two.correct, two.by_example.tobytes())


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Evaluate]:
    """Two processes of this machine."""
    ray = pytest.importorskip("ray", reason=NO_RAY)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield cluster.evaluator("local")
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(), (9,), (9, 6)])
def test_two_processes_give_the_same_bits_as_one(on_ray: Evaluate, hidden: tuple[int, ...]) -> None:
    setting = _setting(hidden)
    for masks in (list(range(64)), [63, 0, 5, 5, 63, 17], [9]):
        assert _same(on_ray(*setting, [101, 200], masks), evaluate_coalitions(*setting, [101, 200], masks))


@pytest.mark.slow
def test_a_list_on_few_rows_is_dealt_out_by_coalitions(on_ray: Evaluate) -> None:
    setting = _setting((9,), rows=130)
    masks = [63, *range(40), 0]
    assert cluster._dealt(130, len(masks), 2) == ([0, 130], [0, 21, 42])
    assert _same(on_ray(*setting, [130], masks), evaluate_coalitions(*setting, [130], masks))


@pytest.mark.slow
def test_a_process_that_is_killed_moves_no_bit(on_ray: Evaluate) -> None:
    setting, masks = _setting((256, 64), players=9, rows=600, features=200), [m ^ m >> 1 for m in range(512)]
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not done.is_set() and not killed:
            time.sleep(0.3)
            for process in _tasks()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = on_ray(*setting, [600], masks)
    finally:
        done.set()
        killer.join()
    assert killed
    assert _same(found, evaluate_coalitions(*setting, [600], masks))


@pytest.mark.slow
def test_a_round_whose_coalitions_are_drawn_has_the_same_scores(on_ray: Evaluate, tmp_path: Path) -> None:
    contract = a_contract(14, 9, 300, 40)
    admitted = store_updates(tmp_path, contract)
    here, there = scored(tmp_path, contract, admitted), scored(tmp_path, contract, admitted, on_ray)
    assert here[0].sampling is not None
    assert digests_of(*here) == digests_of(*there)


def _tasks() -> list[int]:
    """Processes under this one that work on a task of ours."""
    parents, busy = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ray::_evaluate" in (folder / "cmdline").read_bytes():
                busy.append(int(folder.name))
        except OSError:
            continue

    def ours(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    return [process for process in busy if ours(process)]


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused_as_in_one_process(on_ray: Evaluate) -> None:
    model, schema, base, steps, examples = _setting((9,))
    with pytest.raises(InputError, match="61 rows") as wrong:
        on_ray(model, schema, base, steps, examples, [61], [0])
    assert wrong.value.code == "EVALUATION_INPUT"
    steps[2] *= 1e16
    with pytest.raises(FailedError, match="EVALUATION_NOT_FINITE") as diverged:
        on_ray(model, schema, base, steps, examples, [301], [0, 4])
    assert diverged.value.message.startswith("A coalition's loss")


@pytest.mark.slow
def test_a_task_that_fails_by_itself_says_what_every_machine_needs(
    on_ray: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_evaluate", lambda *_: 1 / 0)
    with pytest.raises(FailedError, match="ZeroDivisionError") as failed:
        on_ray(*_setting(()), [301], [0, 4])
    assert failed.value.code == "RAY_FAILED"
    assert "same version" in failed.value.remedy


def test_other_arithmetic_is_refused() -> None:
    losses, marks = np.ones((1, 3)), {0: np.array([1.0, 0.0, 1.0])}
    found, marked = cluster._joined([(slice(0, 1), slice(0, 3), ((losses, marks), cluster.arithmetic()))], 1, 3)
    assert (found.tolist(), marked[0].tolist()) == ([[1.0] * 3], [1.0, 0.0, 1.0])
    with pytest.raises(FailedError, match="RAY_ARITHMETIC"):
        cluster._joined([(slice(0, 1), slice(0, 3), ((losses, marks), "0" * 64))], 1, 3)


@pytest.mark.parametrize(("rows", "masks", "processors"), [(1000, 5, 4), (1000, 4096, 64), (50, 3, 16), (129, 1, 1)])
def test_work_is_dealt_out_whole(rows: int, masks: int, processors: int) -> None:
    by_rows, by_masks = cluster._dealt(rows, masks, processors)
    assert (by_rows[0], by_rows[-1], by_masks[0], by_masks[-1]) == (0, rows, 0, masks)
    assert all(a < b for edges in (by_rows, by_masks) for a, b in pairwise(edges))
    assert len(by_rows) == 2 or min(b - a for a, b in pairwise(by_rows)) >= cluster.LEAST_ROWS
    assert (len(by_rows) - 1) * (len(by_masks) - 1) >= min(processors, masks)


def test_without_a_setting_there_is_no_ray_and_with_one_it_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.evaluator(None) is evaluate_coalitions
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert cluster.evaluator(None) is evaluate_coalitions
    with pytest.raises(InputError, match="RAY_MISSING") as missing:
        cluster.evaluator("local")
    assert "fedpact[ray]" in missing.value.remedy


def _home_with(folder: Path, line: str) -> Path:
    home = init(
        folder, name="City", entity_code=OPERATOR_CODE, hosts=("a.cn",), port=8443, passphrase=PASSPHRASE, now=NOW
    )
    with (home.path / "operator.toml").open("a") as settings:
        settings.write(line)
    return home.path


def test_serve_asks_for_ray_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = _home_with(tmp_path / "op", 'ray = "local"\n')
    assert OperatorHome.open(home).settings.ray == "local"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="RAY_MISSING"):
        serve(home, host="127.0.0.1", port=None, health_port=None, ready=lambda *_: None)


@pytest.mark.parametrize("address", ["", "cluster", "ray://10.0.0.5:10001", "10.0.0.5:", "a b:1"])
def test_an_address_of_another_form_is_refused(tmp_path: Path, address: str) -> None:
    home = _home_with(tmp_path / "op", f'ray = "{address}"\n')
    with pytest.raises(InputError, match="SETTINGS") as wrong:
        OperatorHome.open(home)
    assert wrong.value.field == "ray"


def test_a_run_is_driven_with_what_the_setting_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, given = _home_with(tmp_path / "op", 'ray = "10.0.0.5:6379"\n'), {}

    class Looked:
        def __init__(self, **parts: object) -> None:
            given.update(parts)

        def run(self) -> str:
            return "completed"

    monkeypatch.setattr(driver, "Loop", Looked)
    monkeypatch.setattr(driver, "run_context", MagicMock())
    monkeypatch.setattr(driver.validation, "load", MagicMock())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    driver.drive(home, "0" * 64, MagicMock(), 1)
    assert isinstance(given["evaluate"], cluster._Cluster)


def test_a_run_scores_by_what_it_is_given(tmp_path: Path) -> None:
    loop, lists = open_run(tmp_path).federation.loop(), []

    def counted(*arguments: Any) -> CoalitionLosses:
        lists.append(len(arguments[-1]))
        return evaluate_coalitions(*arguments)

    loop.evaluate = counted
    assert loop.run() == "completed"
    assert lists
    assert set(lists) == {2 ** len(loop.context.contract.participants)}


def test_a_cluster_that_does_not_answer_is_named_at_once() -> None:
    ray = pytest.importorskip("ray", reason=NO_RAY)
    ray.shutdown()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ServiceError, match=address) as away:
        cluster.evaluator(address)(*_setting(()), [301], [0])
    assert (away.value.code, away.value.exit_code, away.value.field) == ("RAY_UNREACHABLE", 6, "ray")
    assert time.monotonic() - started < 30


def test_an_error_is_the_same_in_another_process() -> None:
    error = InputError("SOME_CODE", "Bad.", remedy="Better.", file="a", field="b", party="c", rule="d")
    again = pickle.loads(pickle.dumps(error))  # as Ray does with what its own tasks raise
    assert (type(again), str(again), again.as_dict()) == (InputError, str(error), error.as_dict())
