"""The trainer with fixed noise, for bit-exact comparisons: `trainer_fixed.py SEED`. Its updates are marked `test`.

The package has no such choice: noise comes into `main` as an object, and only this program's code hands one over.
"""

import os
import sys
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy comes in here, and may start no thread before the process is closed in
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.noise import FixedNoise

from fedpact_client.trainer import main

if __name__ == "__main__":
    main(lambda: FixedNoise(int(sys.argv[1])))
