"""The accounting depends on the log alone: not on names, process, hash seed, number of threads, or who asks again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.accounting_child import account, large
from tests.support.demo_kit import DemoSetup, demo_setup, number_of, one_thread
from tests.support.federation import Federation
from tests.support.models_kit import plain_schema

from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import Model
from fedpact_contract.settlement import PeriodResult
from fedpact_models.registry import initial_weights
from fedpact_server import closing, scoring

CHILD = Path(__file__).resolve().parent.parent / "support" / "accounting_child.py"
REVENUE_FEN, FEES_FEN = 100_000_003, 7  # nothing divides it: the fen left over must go somewhere
ENVIRONMENTS = [
    {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    {"PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
]


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> DemoSetup:
    return demo_setup(tmp_path_factory.mktemp("data"))


def settled(federation: Federation) -> PeriodResult:
    with one_thread():
        assert federation.run() == "completed"
    with federation.database.write() as connection:
        return closing.settle(connection, federation.contract, federation.operator_run_key, REVENUE_FEN, FEES_FEN)


def test_a_new_name_moves_no_value_no_share_and_no_fen(setup, tmp_path) -> None:
    """Not even where names change places: everything hangs on the key."""
    found, contracts = [], set()
    for folder, names in (("a", ["A", "B", "C", "D"]), ("b", ["D", "C", "B", "A"]), ("c", ["天", "地", "玄", "黄"])):
        federation = setup.federation(tmp_path / folder, 3, names=names)
        result = settled(federation)
        contracts.add(federation.contract.id)
        found.append(
            {
                number_of(federation, line.participant): (
                    line.share.value,
                    line.share.share,
                    line.share.value_se,
                    line.exact,
                    line.fen,
                )
                for line in result.lines
            }
        )
        assert sum(line.fen for line in result.lines) == REVENUE_FEN - FEES_FEN
        if result.shares.method == "delta":  # the other one draws from a generator that the contract's id seeds
            found[-1]["bounds"] = {
                number_of(federation, x.participant): (x.share.low, x.share.high) for x in result.lines
            }
    assert found[0] == found[1] == found[2]
    assert len(contracts) == 3, "the names stand in the contract: these are three contracts"
    assert len({fen for *_, fen in (v for k, v in found[0].items() if k != "bounds")}) == 4


@pytest.fixture(scope="module")
def run(setup, tmp_path_factory) -> tuple[Federation, Path, PeriodResult]:
    """A settled run of an mlp, whose products are large enough for several threads, and its validation rows."""
    folder = tmp_path_factory.mktemp("run")
    model = Model.parse({"kind": "mlp", "hidden": [96], "initial_digest": "0" * 64}, code="MODEL")
    weights = initial_weights(model, plain_schema(64, 10), np.random.default_rng(0))
    changes = setup.changes["training"] | {"rounds": 2}
    federation = setup.federation(
        folder / "run", 1, base=weights, training=changes, model__kind="mlp", model__hidden=[96]
    )
    result = settled(federation)
    rows = folder / "validation.npz"
    np.savez(rows, x=setup.validation.x, y=setup.validation.y)
    return federation, rows, result


def child(federation: Federation, rows: Path, environment: dict[str, str]) -> bytes:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(federation.home), federation.contract.id, str(rows)],
        capture_output=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_two_accountings_of_one_log_give_the_same_bytes_in_any_process(run, setup) -> None:
    federation, rows, _ = run
    one, other = (child(federation, rows, environment) for environment in ENVIRONMENTS)
    assert one == other
    here = account(federation.home, federation.contract.id, setup.validation) | {"large": large()}
    assert json.loads(one) == json.loads(json.dumps(here)), "and as in this process, with its threads"


def test_the_evaluation_done_again_is_the_one_in_the_log(run) -> None:
    """All but the base's losses, which a later round takes from the round before (the very same model)."""
    federation, rows, _ = run
    again = json.loads(child(federation, rows, ENVIRONMENTS[1]))["evaluation"]
    with federation.database.read() as connection:
        logged = [scores.plain() for _, scores in scoring.all_scores(connection, federation.contract.id)]
    assert len(logged) == len(again) == 2
    for scores, found in zip(logged, again, strict=True):
        assert found["scores"] == scores
        values = (federation.home / "arrays" / federation.contract.id / f"values-{scores['round']}.f8").read_bytes()
        assert found["values"] == sha256_hex(values)
