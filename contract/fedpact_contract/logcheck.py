"""Is the log the one that the operator signed? What was changed, deleted, inserted or swapped, and where.

Three things tell of one another: the entries, the leaf hashes beside them, and the roots in the signed checkpoints.
Where two agree, the third is at fault, and the place is known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from fedpact_contract import merkle
from fedpact_contract.errors import FaultError, FedpactError
from fedpact_contract.evidence import CHECKPOINTS, COUNTERSIGNATURES, LEAVES, LOG, Evidence, read_line
from fedpact_contract.log import Checkpoint, Countersignature, Entry, KeyRevoked
from fedpact_contract.parties import Parties, open_parties, opened
from fedpact_contract.record import Envelope


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """A log as read: `sound` says that every entry is the signed one; where it is not, `entries` is empty.

    `checkpoints` are those that the operator signed, by size, `complete` where every line is one; `countersignatures`
    are those that hold.
    """

    entries: tuple[Entry, ...]
    parties: Parties | None
    checkpoints: Mapping[int, Checkpoint]
    complete: bool
    countersignatures: tuple[Countersignature, ...]
    faults: tuple[FaultError, ...]

    @property
    def sound(self) -> bool:
        """Whether the entries may be replayed."""
        return bool(self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A readable line of checkpoints.jsonl."""

    number: int
    envelope: Envelope[Any]
    record: Checkpoint


def verify_log(evidence: Evidence) -> Log:
    """Check lines, leaf hashes, roots, and the signatures of checkpoints and countersignatures; never raises."""
    computed = [merkle.leaf_hash(line) for line in evidence.log]
    claimed, faults = _leaf_lines(evidence.leaves)
    lines, unreadable = _checkpoint_lines(evidence.checkpoints)
    faults += unreadable
    entry, form = _first_entry(evidence.log)
    parties, broken = open_parties(entry) if entry is not None else (None, form)
    genuine = computed[:1] == claimed[:1] or _covers(computed, lines)
    good = lines
    if parties is not None and genuine:
        good, forged = _operator_signed(lines, parties)
        faults += forged
    complete = len(good) == len(evidence.checkpoints)
    located = list(_compare(computed, claimed, good, complete=complete))
    faults += located
    entries: tuple[Entry, ...] = ()
    if (good or not lines) and all(f.file != LOG for f in located):
        entries, malformed = _entries(evidence.log)
        faults += broken or malformed
    checkpoints = {line.record.size: line.record for line in good}
    revoked = _revoked(entries, parties)
    held, forged = _countersignatures(evidence, parties if genuine else None, checkpoints, revoked, complete=complete)
    faults += forged
    return Log(
        entries=entries,
        parties=parties,
        checkpoints=checkpoints,
        complete=complete,
        countersignatures=held,
        faults=tuple(faults),
    )


def prefix_roots(hashes: Sequence[bytes]) -> tuple[str, ...]:
    """The Merkle root, in hexadecimal, of the first 0, 1, 2, ... leaves (RFC 9162, 2.1.1), all in one pass."""
    roots = [merkle.EMPTY_ROOT.hex()]
    stack: list[tuple[int, bytes]] = []  # complete subtrees from the left: (leaves, root)
    for leaf in hashes:
        leaves, value = 1, leaf
        while stack and stack[-1][0] == leaves:
            value = merkle.node_hash(stack.pop()[1], value)
            leaves *= 2
        stack.append((leaves, value))
        for _, left in reversed(stack[:-1]):
            value = merkle.node_hash(left, value)
        roots.append(value.hex())
    return tuple(roots)


def _leaf_lines(lines: Sequence[bytes]) -> tuple[list[bytes], list[FaultError]]:
    """The leaf hashes; a line that is none stands as empty bytes (no hash is)."""
    hashes, faults = [], []
    for number, line in enumerate(lines, start=1):
        if len(line) == 64 and not set(line) - set(b"0123456789abcdef"):
            hashes.append(bytes.fromhex(line.decode()))
            continue
        hashes.append(b"")
        message = "The line is no hash: 64 hexadecimal digits, small letters."
        faults.append(FaultError("EVIDENCE_LINE", message, file=LEAVES, field=f"line {number}"))
    return hashes, faults


def _checkpoint_lines(lines: Sequence[bytes]) -> tuple[list[_Line], list[FaultError]]:
    """The readable checkpoints, and faults of those that are not or that do not ascend."""
    result: list[_Line] = []
    faults = []
    for number, data in enumerate(lines, start=1):
        place = f"line {number}"
        try:
            envelope = read_line(data, CHECKPOINTS, number, "checkpoint")
            record = Checkpoint.from_bytes(envelope.body)
        except FedpactError as err:
            faults.append(FaultError(err.code, err.message, file=CHECKPOINTS, field=place))
            continue
        if result and record.size <= result[-1].record.size:
            message = f"Checkpoints must ascend; size {record.size} follows {result[-1].record.size}."
            faults.append(FaultError("EVIDENCE_ORDER", message, file=CHECKPOINTS, field=place))
        result.append(_Line(number=number, envelope=envelope, record=record))
    return result, faults


def _first_entry(lines: Sequence[bytes]) -> tuple[Entry | None, list[FaultError]]:
    if not lines:
        return None, [FaultError("LOG_EMPTY", "The log has no entries.", file=LOG)]
    try:
        return Entry.from_bytes(lines[0]), []
    except FedpactError as err:
        return None, [_malformed(0, err)]


def _operator_signed(lines: Sequence[_Line], parties: Parties) -> tuple[list[_Line], list[FaultError]]:
    """The checkpoints of this log by its operator's run key, and the faults of the others."""
    good, faults = [], []
    for line in lines:
        place = f"line {line.number}"
        try:
            if line.record.origin != parties.contract.id:
                raise FaultError(
                    "CHECKPOINT_ORIGIN", "The checkpoint is of another contract's log.", rule="origin = contract id"
                )
            opened(line.envelope, Checkpoint, parties.operator_key)
        except FedpactError as err:
            party = parties.contract.operator.name
            faults.append(FaultError(err.code, err.message, file=CHECKPOINTS, field=place, party=party, rule=err.rule))
        else:
            good.append(line)
    return good, faults


def _covers(hashes: Sequence[bytes], lines: Sequence[_Line]) -> bool:
    """Whether the checkpoints sign exactly these leaves, to the last."""
    if not lines or max(line.record.size for line in lines) != len(hashes) or b"" in hashes:
        return False
    roots = prefix_roots(hashes)
    return all(roots[line.record.size] == line.record.root for line in lines)


def _compare(
    computed: Sequence[bytes], claimed: Sequence[bytes], lines: Sequence[_Line], *, complete: bool
) -> Iterator[FaultError]:
    """Faults of the log, located; of leaves.txt alone where the log is as signed."""
    if list(computed) == list(claimed):
        yield from _root_faults(computed, lines, complete=complete)
    elif _covers(computed, lines):
        yield from _difference(computed, claimed, LEAVES, "according to the signed root")
    elif _covers(claimed, lines):
        yield from _difference(claimed, computed, LOG, "according to the signed root and leaves.txt")
    else:
        yield from _difference(
            claimed, computed, LOG, "according to leaves.txt (no signed root tells which of the two is right)"
        )


def _difference(right: Sequence[bytes], found: Sequence[bytes], file: str, standard: str) -> Iterator[FaultError]:
    """What was done to `right` to make `found`."""
    name = "Entry" if file == LOG else "Line"
    shift = 0 if file == LOG else 1  # entries count from 0, lines from 1

    def fault(code: str, first: int, last: int, what: str) -> FaultError:
        many = f"{name} {first + shift}" if first == last else f"{name} {first + shift} to {last + shift}"
        field = f"entries.{first}" if file == LOG else f"line {first + shift}"
        what = what if first == last else what.replace("was ", "were ", 1)
        return FaultError(f"{'LOG' if file == LOG else 'LEAVES'}_{code}", f"{many} {what}.", file=file, field=field)

    moved = [i for i, (a, b) in enumerate(zip(right, found, strict=False)) if a != b]
    if len(right) == len(found) and sorted(right) == sorted(found):
        if len(moved) == 2:
            first, second = moved
            yield fault("SWAPPED", first, first, f"and {name.lower()} {second + shift} were swapped, {standard}")
        else:
            yield fault("REORDERED", moved[0], moved[-1], f"were put in another order, {standard}")
        return
    matcher = SequenceMatcher(None, right, found, autojunk=False)
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        if kind == "replace" and a_end - a == b_end - b:
            for index in range(a, a_end):
                yield fault("CHANGED", index, index, f"was changed, {standard}")
        elif kind == "replace":
            yield fault("CHANGED", a, a_end - 1, f"was replaced by {b_end - b} other(s), {standard}")
        elif kind == "delete":
            yield fault("DELETED", a, a_end - 1, f"was deleted, {standard}")
        elif kind == "insert":
            where = "appended" if a == len(right) else "inserted"
            yield fault("INSERTED", b, b_end - 1, f"was {where}, {standard}")


def _root_faults(hashes: Sequence[bytes], lines: Sequence[_Line], *, complete: bool) -> Iterator[FaultError]:
    """Entries and leaves agree with each other; do they agree with the signed roots?"""
    if not lines:
        if complete:
            yield FaultError("LOG_UNSIGNED", "No checkpoint is there: nobody signed this log.", file=CHECKPOINTS)
        return
    within = [line for line in lines if line.record.size <= len(hashes)]
    roots = prefix_roots(hashes)
    bad = [line for line in within if roots[line.record.size] != line.record.root]
    good = [line.record.size for line in within if line not in bad]
    largest = max(line.record.size for line in lines)
    for line in bad:
        if any(size > line.record.size for size in good):
            message = f"The operator signed another log of size {line.record.size}: a root that is not this log's."
            yield FaultError("CHECKPOINT_ROOT", message, file=CHECKPOINTS, field=f"line {line.number}")
            continue
        first = max([size for size in good if size < line.record.size], default=0)
        last = line.record.size - 1
        which = f"Entry {last} is" if first == last else f"One or more of the entries {first} to {last} are"
        message = (
            f"{which} not what the operator signed in the checkpoint of size {line.record.size}; leaves.txt was "
            "changed with it, or the checkpoint is of another log."
        )
        yield FaultError("LOG_ROOT", message, file=LOG, field=f"entries.{first}")
        break
    if largest > len(hashes):
        message = f"The operator signed a log of size {largest} and {len(hashes)} of it are there: the end was deleted."
        yield FaultError("LOG_DELETED", message, file=LOG, field=f"entries.{len(hashes)}")
    elif largest < len(hashes) and complete and not bad:
        message = (
            f"The entries from {largest} on are under no signed checkpoint: they were appended, "
            "or a checkpoint was removed."
        )
        yield FaultError("LOG_INSERTED", message, file=LOG, field=f"entries.{largest}")


def _entries(lines: Sequence[bytes]) -> tuple[tuple[Entry, ...], list[FaultError]]:
    entries, faults = [], []
    for index, line in enumerate(lines):
        try:
            entries.append(Entry.from_bytes(line))
        except FedpactError as err:
            faults.append(_malformed(index, err))
    return (() if faults else tuple(entries)), faults


def _malformed(index: int, err: FedpactError) -> FaultError:
    message = f"Entry {index} is no log entry in canonical form: {err.message}"
    return FaultError("ENTRY_FORM", message, file=LOG, field=f"entries.{index}")


def _revoked(entries: Sequence[Entry], parties: Parties | None) -> dict[str, int]:
    """Participant -> index of the entry that revoked its run key; what is wrong with that entry, the replay says."""
    revoked: dict[str, int] = {}
    for index, entry in enumerate(entries if parties is not None else ()):
        if entry.type == KeyRevoked.TYPE:
            revoked.setdefault(str(entry.body.get("participant")), index)
    return revoked


def _countersignatures(
    evidence: Evidence,
    parties: Parties | None,
    checkpoints: Mapping[int, Checkpoint],
    revoked: Mapping[str, int],
    *,
    complete: bool,
) -> tuple[tuple[Countersignature, ...], list[FaultError]]:
    """The countersignatures by participants' keys on the operator's checkpoints, and the faults of the others."""
    held: list[Countersignature] = []
    faults = []
    last: tuple[int, str] = (-1, "")
    for number, data in enumerate(evidence.countersignatures, start=1):
        party = None
        try:
            envelope = read_line(data, COUNTERSIGNATURES, number, "countersignature")
            record = Countersignature.from_bytes(envelope.body)
            if parties is None:
                continue
            party = parties.name(record.participant)
            _check_countersignature(envelope, record, parties, revoked)
            if complete or record.size in checkpoints:
                _check_head(record, checkpoints)
            if (record.size, record.participant) <= last:
                raise FaultError("EVIDENCE_ORDER", "Countersignatures ascend by size, then participant, each once.")
        except FedpactError as err:
            place = f"line {number}"
            faults.append(
                FaultError(err.code, err.message, file=COUNTERSIGNATURES, field=place, party=party, rule=err.rule)
            )
        else:
            last = (record.size, record.participant)
            held.append(record)
    return tuple(held), faults


def _check_countersignature(
    envelope: Envelope[Any], record: Countersignature, parties: Parties, revoked: Mapping[str, int]
) -> None:
    """By the run key, on a head that covers that key's revocation by the contract key."""
    if record.participant not in parties.contract.by_id():
        raise FaultError("COUNTERSIGNATURE_STRANGER", "A countersignature is by somebody who is no participant.")
    key = parties.run_keys[record.participant]
    if record.size > revoked.get(record.participant, record.size):
        key = parties.contract.participant(record.participant).key
    opened(envelope, Countersignature, key)
    if record.origin != parties.contract.id:
        raise FaultError("COUNTERSIGNATURE_ORIGIN", "A countersignature is on another contract's log.")


def _check_head(record: Countersignature, checkpoints: Mapping[int, Checkpoint]) -> None:
    checkpoint = checkpoints.get(record.size)
    if checkpoint is None:
        raise FaultError(
            "COUNTERSIGNATURE_HEAD",
            f"A participant countersigned a log of size {record.size}; no checkpoint has that size.",
        )
    if checkpoint.root != record.root:
        raise FaultError(
            "COUNTERSIGNATURE_ROOT", f"A participant was shown another log of size {record.size} than this one."
        )
