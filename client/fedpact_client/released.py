"""Rows that an enterprise releases for validation: chosen, recorded, and left out of training for ever.

The record is a file of the home, one released row a line: canonical JSON, column -> text or null, the very cells that
were sent. It only grows. The trainer encodes it under the contract's schema, as it does the source, and leaves out of
the source one equal row for each recorded one (`trainer`): sorting, renaming or converting the source brings no
released row back.

The choice looks at one row at a time and never at the others: equal rows go together, and adding or removing a row
changes the fate of no other, so that the privacy unit stays one row. `exclude` is the card's own count before there
is a contract with a schema. There, equal means the same text without surrounding blanks, or the same number however it
is written (3, 3.0, 03), and every copy of a recorded row is left out.
"""

import hmac
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpact_client.sources import one_spelling
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.files import replace_file

if TYPE_CHECKING:
    import polars as pl

Row = dict[str, str | None]


def choose(table: "pl.DataFrame", names: list[str], fraction: Decimal, key: bytes) -> "pl.DataFrame":
    """About `fraction` of the rows, by HMAC-SHA-256 under `key` of each row's own cells: copies go together.

    Args:
        table: The source's rows.
        names: The columns that the card names, the label among them.
        fraction: Above 0, below 1.
        key: The enterprise's secret; the same key chooses the same rows again.
    """
    import polars as pl

    limit = int(fraction * 2**64)
    rows = one_spelling(table, names).rows()
    chosen = [_rank(key, row) < limit for row in rows]
    return table.filter(pl.Series(chosen, dtype=pl.Boolean))


def cells(table: "pl.DataFrame", names: list[str]) -> list[Row]:
    """The rows as they are sent: every cell as text, or null.

    Raises:
        InputError: RELEASE_CELL, a column that holds neither text, numbers, booleans nor dates.
    """
    import polars as pl

    for name in names:
        kind = table[name].dtype
        if kind.is_nested() or kind in (pl.Binary, pl.Object):
            raise InputError("RELEASE_CELL", "The column holds neither text nor numbers.", field=name)
    return table.select(pl.col(name).cast(pl.String) for name in names).to_dicts()


def record(path: Path, rows: list[Row]) -> None:
    """Add rows to the record, durably. The same release again adds nothing: of equal lines the greater count stands."""
    before = Counter(path.read_text("utf-8").splitlines() if path.exists() else [])
    together = before | Counter(canonical_bytes(row).decode() for row in rows)
    replace_file(path, "".join(line + "\n" for line in together.elements()).encode())


def read(path: Path) -> list[Row]:
    """The recorded rows; none where nothing was ever released.

    Raises:
        FaultError: RELEASED_DAMAGED; training without the record would train on released rows.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as err:
        raise _damaged(path, 0) from err
    return [_row(line, path, number) for number, line in enumerate(lines, 1)]


def check(path: Path, at_least: int) -> None:
    """The record has as many rows as the signed cards say that left.

    Raises:
        FaultError: RELEASED_DAMAGED.
    """
    if len(read(path)) < at_least:
        raise _damaged(path, 0)


def exclude(table: "pl.DataFrame", rows: list[Row]) -> "pl.DataFrame":
    """The table without the rows that equal a recorded one, in the table's order.

    Of a recorded row, the columns that the table still has are compared.

    Raises:
        InputError: RELEASED_COLUMNS, a recorded row has no column in common with the table.
    """
    import polars as pl

    by_columns: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = tuple(sorted(name for name in row if name in table.columns))
        by_columns.setdefault(names, []).append(row)
    for names, group in by_columns.items():
        if not names:
            raise InputError(
                "RELEASED_COLUMNS",
                "The source has no column of the rows that were released from this data set.",
                remedy="Name the source that has them: column names are compared exactly.",
            )
        texts = pl.DataFrame(
            {name: [row[name] for row in group] for name in names}, schema=dict.fromkeys(names, pl.String)
        )
        known = one_spelling(texts, list(names)).unique()
        found = one_spelling(table, list(names)).with_row_index("_row").join(known, on=list(names), nulls_equal=True)
        drop = set(found["_row"].to_list())
        table = table.filter(pl.Series([index not in drop for index in range(table.height)], dtype=pl.Boolean))
    return table


def _rank(key: bytes, row: tuple[Any, ...]) -> int:
    digest = hmac.digest(key, b"fedpact.release.v1:" + json.dumps(row).encode(), "sha256")
    return int.from_bytes(digest[:8], "big")


def _row(line: str, path: Path, number: int) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise _damaged(path, number) from err
    if not isinstance(value, dict) or not value or not all(v is None or isinstance(v, str) for v in value.values()):
        raise _damaged(path, number)
    return value


def _damaged(path: Path, number: int) -> FaultError:
    return FaultError(
        "RELEASED_DAMAGED",
        "The record of released rows is damaged.",
        file=path,
        field=f"line {number}" if number else None,
        remedy="Restore a backup of the agent's home: without the record, training would use released rows.",
    )
