"""A source of 5 GB under a cap of 2 GB: profile and card count it, the trainer, closed in, trains on it (issue 6).

    FEDPACT_LARGE_GB=5 python -m pytest tests/benchmarks/test_bench_larger_than_memory.py -s

Without the variable a tenth of it; FEDPACT_CAP_MIB is another cap. Nearly half of the rows are contracted; they lie in
a file without a name.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.support.models_kit import a_model, a_schema, category, number, training_contract

from fedpact_client.home import init
from fedpact_client.spawn import spawn
from fedpact_client.trainer import ANSWERS
from fedpact_contract.contract import Contract, Data
from fedpact_contract.shape import feature_count
from fedpact_models.registry import parameter_count

GIGABYTES = float(os.environ.get("FEDPACT_LARGE_GB", "0.5"))
MEMORY = int(os.environ.get("FEDPACT_CAP_MIB", "2048"))
COLUMNS, FEATURES, GROUP = 100, 10, 50_000
"""Columns of the file beside the label, and those of them that card and contract name: the others are not read."""
COUNT = int(GIGABYTES * 1e9 / (8 * COLUMNS + 16)) // GROUP * GROUP
CONTRACTED = COUNT * 9 // 10 // 2


def make(path: Path) -> None:
    """Rows of uniform numbers, which no compression makes smaller."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, names = np.random.default_rng(1), [f"f{i}" for i in range(COLUMNS)]
    schema = pa.schema([*((name, pa.float64()) for name in names), ("y", pa.int64()), ("who", pa.int64())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(COUNT // GROUP):
            columns = [
                *(rng.random(GROUP) for _ in names),
                rng.integers(0, 2, GROUP),
                rng.integers(0, COUNT // 3, GROUP),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _contract(data: Data, rows: int) -> Contract:
    """The kit's contract, for as many rows as this takes."""
    values = training_contract(data, a_model(), (20, 30, 40), training={"rounds": 2, "local_steps": 5}).plain()
    values["participants"][0]["num_examples"] = rows
    values["privacy"] |= {"sample_rate": "0.001", "delta": "0.00000001"}
    return Contract.parse(values)


def measure(folder: Path, columns: list[dict[str, Any]], contracted: int, memory: int) -> dict[str, float]:
    """Train one attempt, twice: seconds of each, and what the trainer's process took at most, in MiB."""
    data = a_schema(*columns, label={"name": "y", "classes": ["0", "1"], "rule": "value"})
    agreed = _contract(data, contracted)
    (folder / "scratch").mkdir(exist_ok=True)
    order = {
        "contract": agreed.to_bytes().decode(),
        "participant": agreed.participants[0].id,
        "source": {"path": "rows.parquet", "kind": "parquet"},
        "base_dir": str(folder),
        "columns": [*(column["name"] for column in columns), "y"],
        "selection_key": "07" * 32,
    }
    setup = {
        "read_paths": [str(folder / "rows.parquet")],
        "threads": 2,
        "idle_seconds": 3600,
        "memory": memory,
        "scratch": str(folder / "scratch"),
    }
    base = np.zeros(parameter_count(agreed.model, agreed.data)).tobytes()
    found: dict[str, float] = {"file_gb": (folder / "rows.parquet").stat().st_size / 1e9, "cap_mib": memory}
    found |= {"contracted": contracted, "encoded_mib": contracted * feature_count(data) * 8 / 2**20}
    with spawn("fedpact_client.trainer", log=folder / "log", kinds=ANSWERS) as child:
        child.pipe.send("setup", setup)
        assert child.pipe.receive(300) is not None
        for number_ in (1, 2):
            began = time.monotonic()
            child.pipe.send("train", order | {"round": number_, "attempt": 1}, base)
            frame = child.pipe.receive(7200)
            assert frame is not None, (folder / "log").read_text()
            assert frame.kind == "update", frame.header
            assert frame.header["num_examples"] == contracted
            found[f"round_{number_}_seconds"] = time.monotonic() - began
        lines = Path(f"/proc/{child.process.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        for name in ("VmHWM", "VmData", "RssAnon", "RssFile"):
            found[f"{name}_mib"] = int(status[name].split()[0]) / 1024
    assert list((folder / "scratch").iterdir()) == []
    return found


DATA_SET = """
[[data_sets]]
id = "large"
num_examples = 1000
epsilon = 8
delta = 0.00001
columns = [{columns}]
label = "y"
entity = "who"
release_fraction = 0.00001
[data_sets.source]
path = "{path}"
kind = "parquet"
[[data_sets.rules]]
rule = "duplicates"
at_most = 0
[[data_sets.rules]]
rule = "drift"
at_most = 0.5
[[data_sets.rules]]
rule = "balance"
at_least = 0.4
[[data_sets.rules]]
rule = "bounds"
column = "f1"
low = 0
high = 1
at_most = 0
"""
CARD = """
import sys
from pathlib import Path
from fedpact_client import cards
from fedpact_client.home import AgentHome
from fedpact_client.store import Store
home = AgentHome(Path(sys.argv[1]))
with Store(home.db_path) as store:
    print(cards.prepare(home, home.config(), store, "large").available)
"""


def count(folder: Path) -> dict[str, float]:
    """Profile the data set by the command, and draft its card: seconds, and the most that was resident, in MiB."""
    home = init(
        folder / "agent", name="A", entity_code="91310000MA1K000001", sector="medical", passphrase=b"long enough"
    )
    columns = ", ".join(f'"f{i}"' for i in range(FEATURES))
    text = home.config_path.read_text().replace("memory = 4096", f"memory = {MEMORY}")
    block = DATA_SET.format(columns=columns, path=folder / "rows.parquet")
    home.config_path.write_text(text.replace("[policy]\n", block + "[policy]\n", 1))
    profile = [str(Path(sys.executable).with_name("fedpact-agent")), "profile", "large", "--json", "--home", home.path]
    found: dict[str, float] = {"cap_mib": MEMORY, "rows": COUNT}
    for what, line in (("profile", profile), ("card", [sys.executable, "-c", CARD, home.path])):
        began = time.monotonic()
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, preexec_fn=_cap) as child:
            assert child.stdout is not None
            said = child.stdout.read()
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        found |= {f"{what}_seconds": time.monotonic() - began, f"{what}_rss_mib": used.ru_maxrss / 1024}
        if what == "profile":
            counts = json.loads(said)
            assert (counts["rows"], counts["duplicates"], counts["passed"]) == (COUNT, 0, True)
        else:
            assert 0.9999 * COUNT < int(said) < COUNT
    assert list(home.scratch.iterdir()) == []
    return found


def _cap() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY << 20, MEMORY << 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("large")
    make(made / "rows.parquet")
    return made


def show(found: dict[str, float]) -> None:
    print(" ".join(f"{name}={value:.4g}" for name, value in found.items()))  # noqa: T201 - the figures


@pytest.mark.slow
def test_a_source_beyond_memory_is_counted(folder: Path) -> None:
    found = count(folder)
    show(found)
    assert max(found["profile_rss_mib"], found["card_rss_mib"]) <= MEMORY


@pytest.mark.slow
def test_a_source_beyond_memory_trains(folder: Path) -> None:
    found = measure(folder, [number(f"f{i}", 0, 1) for i in range(FEATURES)], CONTRACTED, MEMORY)
    show(found)
    assert found["VmData_mib"] <= MEMORY


@pytest.mark.slow
def test_rows_that_are_beyond_memory_when_encoded_train(tmp_path: Path) -> None:
    """A small file, of which a vocabulary of a thousand makes more than the memory: the rows lie in a file."""
    values = [str(value) for value in range(1000)]
    rng, rows = np.random.default_rng(1), 170_000
    table = pl.DataFrame({"c": rng.integers(0, 1000, rows).astype(str), "y": rng.integers(0, 2, rows)})
    table.write_parquet(tmp_path / "rows.parquet", row_group_size=GROUP)
    found = measure(tmp_path, [category("c", values)], 160_000, 1024)
    show(found)
    assert found["encoded_mib"] > 1024 >= found["VmData_mib"]
