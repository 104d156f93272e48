"""A round whose coalitions are drawn gives the same bytes whatever the threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import sampled_round


def test_threads_move_no_byte_of_a_round_whose_coalitions_are_drawn(tmp_path: Path) -> None:
    """In processes of their own: the threads of numpy's BLAS and of OpenMP are fixed when they start."""
    contract = sampled_round.a_contract(14, 70, 300, 200)
    (tmp_path / "admitted.json").write_text(json.dumps(sampled_round.store_updates(tmp_path, contract)))
    found = set()
    for threads in ("1", "2", "4"):
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        command = [sys.executable, sampled_round.__file__, str(tmp_path), "14", "70", "300", "200"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        told = json.loads(done.stdout)
        assert told["coalitions"] > 50
        found.add((told["scores"], told["values"]))
    assert len(found) == 1
