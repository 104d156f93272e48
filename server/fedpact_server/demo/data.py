"""The demo's data: scikit-learn's handwritten digits (8 x 8 pixels, 0..16), split among enterprises of unequal worth.

The first is large, the second small, the third has 30 % of its labels flipped, the fourth is plain; more participants
repeat large, small, plain. Each gets a file of another format. What is left is the operator's validation set.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from fedpact_contract.errors import InputError

SEED = 20261124
"""Seed of the split and of the flipped labels: set-up of a demonstration, not privacy noise."""

VALIDATION_ROWS = 440
FLIPPED = 0.3
MAX_PARTICIPANTS = 12
KINDS = ("csv", "parquet", "sqlite", "ndjson")
PIXELS = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
LABEL = "digit"
WEIGHTS = (450, 200, 350, 350)
ENTERPRISES = (
    ("Harbour Postal Service", "logistics"),
    ("Lakeside Clinic", "medical"),
    ("Northgate Archive", "government"),
    ("Meridian Bank", "finance"),
    ("Old Town Insurance", "finance"),
    ("Riverside Traffic", "traffic"),
    ("Summit Manufacturing", "manufacturing"),
    ("Valley Energy", "energy"),
    ("Bridge Telecom", "telecom"),
    ("Coastal Rescue", "emergency"),
    ("Garden Hospital", "medical"),
    ("Hilltop Library", "government"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One enterprise of the demo: who it is, and the file with its rows."""

    name: str
    sector: str
    file: str
    kind: str
    table: str | None
    num_examples: int


def sizes(participants: int) -> list[int]:
    """Rows of each participant.

    Raises:
        InputError: fewer than 3 or more than 12 participants.
    """
    if not 3 <= participants <= MAX_PARTICIPANTS:
        raise InputError(
            "DEMO_PARTICIPANTS",
            f"The demo runs with 3 to {MAX_PARTICIPANTS} participants.",
            field="--participants",
            remedy="Give a number in that range; the demo's data has no more rows to split.",
        )
    roles = [WEIGHTS[i] if i < len(WEIGHTS) else WEIGHTS[(0, 1, 3)[i % 3]] for i in range(participants)]
    scale = min(1.0, sum(WEIGHTS) / sum(roles))
    return [int(role * scale) for role in roles]


def write(folder: Path, participants: int) -> tuple[list[Share], Path]:
    """Write every enterprise's file and the validation file below `folder`; returns both.

    Raises:
        InputError: a number of participants that the data cannot be split among.
    """
    from sklearn.datasets import load_digits

    counts = sizes(participants)
    digits = load_digits()
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(digits.target))
    pixels, labels = digits.data[order].astype(np.int64), digits.target[order].astype(np.int64)
    shares, start = [], 0
    for index, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        own = labels[rows].copy()
        if index == 2:
            flip = rng.random(count) < FLIPPED
            own[flip] = (own[flip] + rng.integers(1, 10, int(flip.sum()))) % 10
        name, sector = ENTERPRISES[index]
        kind = KINDS[index % len(KINDS)]
        place = folder / f"enterprise-{index + 1}"
        file, table = _write_table(place, kind, _frame(pixels[rows], own))
        shares.append(Share(name=name, sector=sector, file=str(file), kind=kind, table=table, num_examples=count))
    rest = slice(start, start + VALIDATION_ROWS)
    validation, _ = _write_table(folder / "validation", "csv", _frame(pixels[rest], labels[rest]))
    return shares, validation


def _frame(pixels: np.ndarray, labels: np.ndarray) -> pl.DataFrame:
    columns = {name: pixels[:, i] for i, name in enumerate(PIXELS)}
    return pl.DataFrame(columns | {LABEL: labels})


def _write_table(folder: Path, kind: str, frame: pl.DataFrame) -> tuple[Path, str | None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"digits.{kind}"
    if kind == "csv":
        frame.write_csv(path)
    elif kind == "parquet":
        frame.write_parquet(path)
    elif kind == "ndjson":
        frame.write_ndjson(path)
    else:
        with sqlite3.connect(path) as connection:
            columns = ", ".join(f'"{name}" INTEGER NOT NULL' for name in frame.columns)
            connection.execute(f"CREATE TABLE digits ({columns})")
            marks = ", ".join("?" * frame.width)
            connection.executemany(f"INSERT INTO digits VALUES ({marks})", frame.rows())  # noqa: S608 - our own names
        connection.close()
        return path, "digits"
    return path, None
