"""Numbers and durations through every process: own data, cards, training, close, verify, what the model predicts."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_demo import fedpact, finish, start
from tests.support.demo_kit import own_data

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MORE = """
[baseline]
steps = 2
[statistics]
noise_multiplier = 20
queries = [{}]
"""
QUERIES = {
    "regression": '{ kind = "mean", column = "weight" }',
    "survival": '{ kind = "histogram", column = "days" }, { kind = "count", column = "spoilt", value = "yes" }',
}


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[dict[str, Any], Path]]]:
    """Both side by side."""
    place = tmp_path_factory.mktemp("tasks")
    started = {}
    for task, queries in QUERIES.items():
        folder = own_data(place / f"own-{task}", task, MORE.format(queries))
        started[task] = start("--data", str(folder), "--dir", str(place / task), "--no-lift", "--json")
    try:
        yield {task: (finish(process), place / f"own-{task}") for task, process in started.items()}
    finally:
        for process in started.values():
            process.terminate()
            process.communicate()


@pytest.mark.parametrize("task", QUERIES)
def test_a_federation_of_the_task_verifies_and_its_model_predicts(
    demos: dict[str, tuple[dict[str, Any], Path]], task: str, tmp_path: Path
) -> None:
    result, data = demos[task]
    assert sum(line["fen"] for line in result["participants"]) == result["pool_fen"]
    verified = fedpact("fedpact", "verify", result["evidence"], "--trust", result["trust"])
    assert verified.returncode == 0, verified.stdout
    report = json.loads((Path(result["report"]).parent / "report.json").read_text("utf-8"))
    assert report["metric"]["name"] == {"regression": "root mean squared error", "survival": "concordance"}[task]
    assert [float(line["metric"]) > 0 for line in report["baselines"]] == [True, True]
    assert len(report["statistics"]["queries"]) == len(QUERIES[task].split("},"))
    shown = fedpact("fedpact", "predict", result["model"], str(data / "north.csv"))
    assert (shown.returncode, "predicted" in shown.stdout) == (0, True), shown.stderr
    out = tmp_path / "told.csv"
    assert fedpact("fedpact", "predict", result["model"], str(data / "north.csv"), "--out", str(out)).returncode == 0
    with out.open() as lines:
        told = [{key: float(value) for key, value in line.items()} for line in csv.DictReader(lines)]
    assert len(told) == 100
    assert all(0 <= line["predicted"] <= {"regression": 20, "survival": 12}[task] for line in told)
    assert all(0 <= line.get("survival", 0) <= 1 for line in told)
