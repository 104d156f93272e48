"""A round whose coalitions are drawn, scored as the server does: updates on the disk, each read when it is asked for.

`python sampled_round.py FOLDER PLAYERS HIDDEN ROWS` scores it in a process of its own and prints one JSON object:
digests of the scores and of the per-example values, seconds, and the peak of memory above what imports take, in MiB.
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests.support
from tests.support.models_kit import a_model, plain_schema, random_examples
from tests.unit.test_sampled_contract import a_sampled_contract

from fedpact_contract.arrays import update_digest
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.contract import Contract
from fedpact_contract.log import RoundScores
from fedpact_models import aggregation
from fedpact_models.evaluate import Evaluate, evaluate_coalitions
from fedpact_models.registry import parameter_count
from fedpact_server import scoring
from fedpact_server.pool import load_update
from fedpact_server.run_state import write_array

EIGHT_PAIRS = 1600
"""Coalitions that a contract of a hundred may ask for: eight antithetic pairs are 1,586, and more are not drawn."""


def a_contract(players: int, hidden: int, rows: int, features: int) -> Contract:
    data = plain_schema(features, 10).plain()
    model = a_model(hidden).plain() if hidden else a_model().plain()
    contract = a_sampled_contract(players, most=EIGHT_PAIRS, model=model, slices=((None, rows),))
    return Contract.parse(contract.plain() | {"data": data})


def store_updates(folder: Path, contract: Contract) -> dict[str, str]:
    """Random updates of everybody, as files; participant id -> digest."""
    rng, count = np.random.default_rng(0), parameter_count(contract.model, contract.data)
    digests = {}
    for participant in contract.by_id():
        data = (rng.normal(size=count) * 0.1).astype("<f4").tobytes()
        digests[participant] = update_digest(data)
        write_array(folder / f"{digests[participant]}.f4", data)
    return digests


def scored(
    folder: Path, contract: Contract, admitted: Mapping[str, str], evaluate: Evaluate = evaluate_coalitions
) -> tuple[RoundScores, np.ndarray]:
    """The round's scores and per-example values."""
    rng, rows = np.random.default_rng(1), contract.contribution.validation.slices[0].count
    count = parameter_count(contract.model, contract.data)
    base = rng.normal(size=count) * 0.05
    examples = random_examples(rng, rows, len(contract.data.columns), 10)
    updates = aggregation.Read(admitted, lambda participant: load_update(folder, admitted[participant]))
    steps, _ = aggregation.server_steps(contract, updates, aggregation.START)
    return scoring.score_round(contract, 1, admitted, base, steps, examples, None, evaluate=evaluate)


def digests_of(scores: RoundScores, values: np.ndarray) -> dict[str, str]:
    return {"scores": sha256_hex(canonical_bytes(scores.plain())), "values": sha256_hex(values.astype("<f8").tobytes())}


def _peak() -> float:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    arrays, *numbers = sys.argv[1:]
    terms = a_contract(*map(int, numbers))
    stored = json.loads((Path(arrays) / "admitted.json").read_text())
    before, started = _peak(), time.perf_counter()
    round_scores, by_example = scored(Path(arrays), terms, stored)
    found = digests_of(round_scores, by_example) | {
        "seconds": time.perf_counter() - started,
        "mib": _peak() - before,
        "coalitions": len(round_scores.losses),
    }
    sys.stdout.write(json.dumps(found) + "\n")
