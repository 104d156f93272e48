"""The evidence of one contract: four text files from which anybody recomputes what happened.

    log.jsonl                one entry's canonical bytes a line, in the order of the log
    leaves.txt               their leaf hashes in hexadecimal, one a line: they locate a changed entry
    checkpoints.jsonl        every checkpoint that the operator signed, ascending by size
    countersignatures.jsonl  the participants' countersignatures, by size, then participant

Every byte counts: lines end with one newline, there is no other file, no byte-order mark, no link. One more may lie
there, from the auditor that the contract names: reevaluation.json, its signed re-evaluation of the run. What the lines
say is judged by `verify`.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.log import Checkpoint, Countersignature, Entry
from fedpact_contract.record import Envelope, read_envelope

LOG, LEAVES = "log.jsonl", "leaves.txt"
CHECKPOINTS, COUNTERSIGNATURES = "checkpoints.jsonl", "countersignatures.jsonl"
FILES = (LOG, LEAVES, CHECKPOINTS, COUNTERSIGNATURES)
REEVALUATION = "reevaluation.json"
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The lines of the four files, without their newlines; and an auditor's re-evaluation, where there is one."""

    log: tuple[bytes, ...]
    leaves: tuple[bytes, ...]
    checkpoints: tuple[bytes, ...]
    countersignatures: tuple[bytes, ...]
    reevaluation: bytes | None = None


def pack(
    entries: Sequence[Entry],
    checkpoints: Sequence[Envelope[Checkpoint]],
    countersignatures: Sequence[Envelope[Countersignature]],
) -> dict[str, bytes]:
    """The four files' bytes by name; checkpoints and countersignatures in any order, the same one twice stands once.

    Raises:
        InputError: a checkpoint or countersignature is malformed.
    """
    heads = {e.to_bytes(): Checkpoint.from_bytes(e.body).size for e in checkpoints}
    seen = {e.to_bytes(): Countersignature.from_bytes(e.body) for e in countersignatures}
    lines: dict[str, list[bytes]] = {
        LOG: [entry.to_bytes() for entry in entries],
        LEAVES: [entry.leaf_hash.hex().encode() for entry in entries],
        CHECKPOINTS: sorted(heads, key=lambda line: (heads[line], line)),
        COUNTERSIGNATURES: sorted(seen, key=lambda line: (seen[line].size, seen[line].participant, line)),
    }
    return {name: b"".join(line + b"\n" for line in lines[name]) for name in FILES}


def unpack(files: Mapping[str, bytes], *, where: object = None) -> Evidence:
    """The evidence from its files' bytes by name.

    Args:
        files: The four files, and a re-evaluation if there is one.
        where: The folder they came from, to be named in faults.

    Raises:
        FaultError: EVIDENCE_FILE_MISSING, EVIDENCE_FILE_EXTRA, EVIDENCE_LINE (file and line named).
    """

    def place(name: str) -> str:
        return name if where is None else str(Path(str(where)) / name)

    for name in FILES:
        if name not in files:
            raise FaultError("EVIDENCE_FILE_MISSING", f"The evidence lacks {name}.", file=place(name))
    for name in sorted(files):
        if name not in (*FILES, REEVALUATION):
            raise FaultError("EVIDENCE_FILE_EXTRA", "This file does not belong to the evidence.", file=place(name))
    lines = {name: _lines(files[name], place(name)) for name in FILES}
    return Evidence(
        log=lines[LOG],
        leaves=lines[LEAVES],
        checkpoints=lines[CHECKPOINTS],
        countersignatures=lines[COUNTERSIGNATURES],
        reevaluation=files.get(REEVALUATION),
    )


def write_evidence(
    folder: Path,
    entries: Sequence[Entry],
    checkpoints: Sequence[Envelope[Checkpoint]],
    countersignatures: Sequence[Envelope[Countersignature]],
) -> None:
    """Write the evidence into a new folder, whole or not at all.

    Raises:
        InputError: EVIDENCE_EXISTS, something is at this path already.
    """
    if folder.is_symlink() or folder.exists():
        raise InputError(
            "EVIDENCE_EXISTS",
            "Something is here already, and evidence is never overwritten.",
            file=folder,
            remedy="Name a new folder.",
        )
    files = pack(entries, checkpoints, countersignatures)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, data in files.items():
        with (part / name).open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    part.rename(folder)


def read_evidence(folder: Path) -> Evidence:
    """Read the evidence in a folder.

    Raises:
        InputError: EVIDENCE_MISSING, no such folder, or none of the four files is in it.
        FaultError: EVIDENCE_FILE_KIND, a link or something else than a plain file; EVIDENCE_FILE_SIZE; or as `unpack`.
    """
    if not folder.is_dir():
        raise InputError(
            "EVIDENCE_MISSING",
            "There is no evidence folder here.",
            file=folder,
            remedy="Name the folder that `fedpact evidence` or the agent wrote.",
        )
    names = sorted(entry.name for entry in folder.iterdir())
    if not set(names) & set(FILES):
        raise InputError(
            "EVIDENCE_MISSING", f"This folder is no evidence: it holds none of {', '.join(FILES)}.", file=folder
        )
    files: dict[str, bytes] = {}
    for name in names:
        path = folder / name
        if name not in (*FILES, REEVALUATION):
            raise FaultError("EVIDENCE_FILE_EXTRA", "This file does not belong to the evidence.", file=path)
        if path.is_symlink() or not path.is_file():
            raise FaultError("EVIDENCE_FILE_KIND", "This is no plain file but a link, a folder or a device.", file=path)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FaultError("EVIDENCE_FILE_SIZE", "The file is larger than evidence can be.", file=path)
        files[name] = path.read_bytes()
    return unpack(files, where=folder)


def read_line(line: bytes, file: str, number: int, what: str) -> Envelope[Any]:
    """The envelope in a line of checkpoints.jsonl or countersignatures.jsonl (`number` from 1).

    Raises:
        FaultError: EVIDENCE_LINE, not an envelope in canonical form.
    """
    try:
        return read_envelope(line)
    except InputError as err:
        message = f"The {what} is not readable: {err.message}"
        raise FaultError("EVIDENCE_LINE", message, file=file, field=f"line {number}") from err


def _lines(data: bytes, place: str) -> tuple[bytes, ...]:
    if not data:
        return ()

    def fault(line: int, message: str) -> FaultError:
        return FaultError("EVIDENCE_LINE", message, file=place, field=f"line {line}")

    *lines, rest = data.split(b"\n")
    if lines and lines[0].startswith(b"\xef\xbb\xbf"):
        raise fault(1, "The file begins with a byte-order mark.")
    for number, line in enumerate(lines, start=1):
        if b"\r" in line:
            raise fault(
                number,
                "The line holds a carriage return, and lines end with one newline alone: a mail program or an editor "
                "may have converted the line ends.",
            )
        if not line:
            raise fault(number, "The line is empty.")
    if rest:
        raise fault(len(lines) + 1, "The last line does not end with a newline.")
    return tuple(lines)
