"""Committed validation sets: made once, kept in the operator's home, checked against their root at every load.

A set is encoded rows with 32 random bytes each; its root (RFC 9162) stands in the contract. Slices stand in the
order of the leaves: the operator's rows, the buyer's, then those that participants released, by participant id.
The rows never leave the operator.
"""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract.contract import ClassLabel, Data, ValidationSlice
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.files import replace_file
from fedpact_models.features import Examples, encode, validation_root
from fedpact_models.tasks import task_of
from fedpact_server import db

SALT_BYTES = 32
_FILE = "rows.npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValidationSet:
    """Encoded rows and their salts (one of 32 bytes a row), the root over them, and the slices they come in."""

    examples: Examples
    salts: tuple[bytes, ...]
    root: str
    slices: tuple[ValidationSlice, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Rows from one giver: `operator`, `buyer` or a participant's id.

    `name` is what errors call it (a file); `first_line` as `tables.first_line`.
    """

    giver: str
    table: pl.DataFrame
    name: str
    first_line: int | None = None


def build(data: Data, sources: Sequence[Source]) -> ValidationSet:
    """Encode the sources under the contract's schema, with fresh salts; the operator first, then the buyer, then by id.

    Raises:
        InputError: VALIDATION_EMPTY, VALIDATION_TWICE, VALIDATION_ONE_CLASS, or what `features.encode` finds wrong
            with the rows.
    """
    first = ("operator", "buyer")
    ordered = sorted(sources, key=lambda source: (*(source.giver != name for name in first), source.giver))
    if not ordered:
        raise InputError(
            "VALIDATION_EMPTY",
            "There are no validation rows.",
            remedy="Name a file with --validation, or take what participants released with --released.",
        )
    if len({source.giver for source in ordered}) != len(ordered):
        raise InputError("VALIDATION_TWICE", "One giver has two slices.", field="validation.slices")
    parts = [encode(data, source.table, file=source.name, first_line=source.first_line) for source in ordered]
    examples = Examples(x=np.concatenate([p.x for p in parts]), y=np.concatenate([p.y for p in parts]))
    if len(found := np.unique(examples.y)) < 2:
        label = data.label
        what = f"of the class {label.classes[int(found[0])]!r}" if isinstance(label, ClassLabel) else "of one value"
        raise InputError(
            "VALIDATION_ONE_CLASS",
            f"All {len(examples)} validation rows are {what}: "
            "a model that always says so would be perfect, and nobody's contribution could be measured.",
            field="data.label",
            remedy="Correct the label in the template, or take other validation rows.",
        )
    if task_of(data.label).pairs(examples.y) == 0:
        raise InputError(
            "VALIDATION_NO_PAIRS",
            f"Of no two of the {len(examples)} validation rows is it known whose event came first: no model could be "
            "told from another by the order that it puts them in.",
            field="data.label",
            remedy="Correct the label's cuts or outcomes in the template, or take other validation rows.",
        )
    salts = tuple(os.urandom(SALT_BYTES) for _ in range(len(examples)))
    slices = tuple(ValidationSlice(source=s.giver, count=len(p)) for s, p in zip(ordered, parts, strict=True))
    return ValidationSet(examples=examples, salts=salts, root=validation_root(examples, salts), slices=slices)


def save(home: Path, validation: ValidationSet) -> Path:
    """Keep a set in the home, durably; returns its folder."""
    folder = home / "validation" / validation.root
    folder.mkdir(mode=0o700, exist_ok=True)
    salts = np.frombuffer(b"".join(validation.salts), np.uint8).reshape(-1, SALT_BYTES)
    givers = json.dumps([s.plain() for s in validation.slices])
    buffer = io.BytesIO()
    np.savez(
        buffer,
        x=validation.examples.x.astype("<f8"),
        y=validation.examples.y.astype("<f8" if validation.examples.y.dtype.kind == "f" else "<i8"),
        salts=salts,
        slices=np.frombuffer(givers.encode(), np.uint8),
    )
    replace_file(folder / _FILE, buffer.getvalue())
    return folder


def load(home: Path, root: str) -> ValidationSet:
    """The set with this root, every row and salt of it checked against the root.

    Raises:
        FaultError: VALIDATION_MISSING, VALIDATION_DAMAGED, VALIDATION_ROOT.
    """
    path = home / "validation" / root / _FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            x, y, salts, givers = (stored[name] for name in ("x", "y", "salts", "slices"))
            slices = _slices(json.loads(givers.astype(np.uint8).tobytes()))
    except FileNotFoundError as err:
        raise FaultError(
            "VALIDATION_MISSING", "The validation set is missing.", file=path, remedy="Restore a backup of the home."
        ) from err
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, InputError) as err:
        raise _damaged(path) from err
    if (
        x.ndim != 2
        or y.shape != (len(x),)
        or salts.shape != (len(x), SALT_BYTES)
        or x.dtype != "<f8"
        or y.dtype not in ("<i8", "<f8")
    ):
        raise _damaged(path)
    if sum(s.count for s in slices) != len(x):
        raise _damaged(path)
    examples = Examples(x=x.astype(np.float64), y=y.astype(y.dtype.newbyteorder("=")))
    salt_list = tuple(row.astype(np.uint8).tobytes() for row in salts)
    try:
        found = validation_root(examples, salt_list)
    except InputError as err:
        raise _damaged(path) from err
    if found != root:
        raise FaultError(
            "VALIDATION_ROOT",
            "The stored validation rows are not those that the contract commits to.",
            file=path,
            rule="Merkle root of the salted rows = contribution.validation.root",
            remedy="Restore a backup of the home.",
        )
    return ValidationSet(examples=examples, salts=salt_list, root=root, slices=slices)


def released_table(connection: Connection, participant: str, data_set: str) -> pl.DataFrame | None:
    """The rows that a participant released from this data set, every cell as text; None where there are none."""
    known = db.releases.c
    stored = connection.execute(
        sa.select(known.table).where(known.participant == participant, known.data_set == data_set)
    ).scalar()
    if stored is None:
        return None
    rows = [json.loads(line) for line in bytes(stored).decode().splitlines()]
    names = list(rows[0])
    cells = {name: [None if row[name] is None else str(row[name]) for row in rows] for name in names}
    return pl.DataFrame(cells, schema=dict.fromkeys(names, pl.String))


def _slices(values: list[Any]) -> tuple[ValidationSlice, ...]:
    return tuple(ValidationSlice.parse(value, code="VALIDATION_SLICE") for value in values)


def _damaged(path: Path) -> FaultError:
    return FaultError(
        "VALIDATION_DAMAGED", "The stored validation set is damaged.", file=path, remedy="Restore a backup of the home."
    )
