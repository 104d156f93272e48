"""The witness: a small file outside the backup that remembers how far each budget ledger had come.

Whoever brings back an old copy of the store does not bring back the old witness, so a witness ahead of the ledger
shows that charges are missing. It also says how much was charged, so that `restore` can charge it again.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedpact_contract.errors import FailedError, InputError, RefusedError
from fedpact_contract.files import sync_folder
from fedpact_contract.ledger import GENESIS
from fedpact_contract.record import Code, Dec, Hex32, Part, Record


class Mark(Part):
    """How far one data set's ledger had come: its number of rows, its head, and the sum charged."""

    rows: Annotated[int, Field(ge=1)]
    head: Hex32
    charged: Dec


class Witness(Record):
    """The marks of every data set that has rows."""

    TYPE = "ledger-witness"

    marks: dict[Code, Mark]


def read_witness(path: Path) -> Witness | None:
    """The witness, or None where the file does not exist.

    Raises:
        InputError: WITNESS_DAMAGED.
        FailedError: WITNESS_UNREADABLE.
    """
    try:
        return Witness.from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except InputError as err:
        raise InputError(
            "WITNESS_DAMAGED",
            f"The witness file is not readable: {err.message}",
            file=path,
            remedy="If nobody restored an old copy of the store, delete the witness: the next commit writes it anew.",
        ) from err
    except OSError as err:
        raise FailedError(
            "WITNESS_UNREADABLE",
            f"The witness file cannot be read: {err.strerror}.",
            file=path,
            remedy="Make it readable for the agent's user.",
        ) from err


def write_witness(path: Path, witness: Witness) -> None:
    """Replace the witness at once and durably.

    The folder is not made: where the disk that should hold it is not mounted, writing beside it would hide that.

    Raises:
        FailedError: WITNESS_UNWRITABLE.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as out:
            out.write(witness.to_bytes())
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as err:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise _unwritable(path, str(err.strerror)) from err


def check_writable(path: Path) -> None:
    """Raise where `write_witness` is bound to fail: its folder is away (not mounted?) or closed to this user.

    Raises:
        FailedError: WITNESS_UNWRITABLE.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, "its folder is missing or closed to this user")


def check_witness(witness: Witness, hashes: Mapping[str, Sequence[str]], file: object = None) -> None:
    """Raise unless every ledger contains the row that the witness saw last.

    Args:
        witness: What was seen.
        hashes: By data set, the row hashes of its ledger in order.
        file: The witness file, for the message.

    Raises:
        RefusedError: LEDGER_RESTORED.
    """
    for data_set, mark in sorted(witness.marks.items()):
        chain = hashes.get(data_set, ())
        if len(chain) < mark.rows or chain[mark.rows - 1] != mark.head:
            raise restored_error(data_set, f"the witness saw row {mark.rows - 1}, which is not in it", file)


def check_logged(data_set: str, chain: Sequence[str], head: str) -> None:
    """Raise unless `head`, which the operator's log shows as this agent's last one, is on the chain.

    Raises:
        RefusedError: LEDGER_RESTORED.
    """
    if head != GENESIS and head not in chain:
        raise restored_error(data_set, "the log shows a head of this agent that is not in it", None)


def restored_error(data_set: str, why: str, file: object) -> RefusedError:
    """The refusal of a store that is not the newest."""
    return RefusedError(
        "LEDGER_RESTORED",
        f"The budget ledger of {data_set} is an old copy: {why}.",
        file=file,
        field=f"data set {data_set}",
        rule="what was spent stays spent",
        remedy="Run `fedpact-agent restore`: every running contract then counts as fully spent.",
    )


def _unwritable(path: Path, why: str) -> FailedError:
    return FailedError(
        "WITNESS_UNWRITABLE",
        f"The witness file cannot be written: {why}.",
        file=path,
        remedy="Mount or free the disk that holds it; nothing leaves before it is written.",
    )
