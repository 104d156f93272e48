"""An auditor's re-evaluation: the signed record of it, and what it must fit before anybody takes it for one.

It covers the log up to a checkpoint, and says what was evaluated again (`Compared`) and of which coalitions: all, or so
many of each round, drawn by a seed that the auditor chose once the scores were open. Every next model is made again in
any case; second moments, findings, and what a draw rests on are for all coalitions only.

Losses are integers of 1e-9 nat. Whoever evaluates again on the same kind of processor finds the same ones; on another
the last bit of exp and log may differ, some 1e-14 nat a row, so a slice's sum may be off by one unit for each begun
100,000 rows. Digests of models and counts of right answers have no tolerance.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedpact_contract.canonical import sha256
from fedpact_contract.contract import Auditor, Contract, Count
from fedpact_contract.errors import FaultError, FedpactError, InputError
from fedpact_contract.log import (
    Body,
    Entry,
    MomentsOpened,
    RoundAggregated,
    RoundDiscarded,
    RoundScores,
    ScoresOpened,
)
from fedpact_contract.merkle import root
from fedpact_contract.parties import opened
from fedpact_contract.record import Big, Envelope, Hex32, Name, Part, Record, read_envelope

TOLERANCE = 1
"""Units of 1e-9 nat by which a slice's loss may differ, for each begun `ROWS` rows of it."""
ROWS = 100_000
LISTED = 100
"""Differences that a record lists; it counts them all."""

Number = Annotated[int, Field(ge=0, le=2**53 - 1)]


Coalitions = Literal["all", "sampled", "none"]

Compared = Literal["models", "discarded", "clips", "losses", "correct", "draws", "findings", "moments"]
"""What can be evaluated again; the words are those of `_COMPARED`."""

_COMPARED: dict[Compared, str] = {
    "models": "every next model",
    "discarded": "that the round which was given up has no losses",
    "clips": "the updates' energies and factors",
    "losses": "the losses",
    "correct": "right answers",
    "draws": "first-order values, draws and the errors that end them",
    "findings": "what the detectors say",
    "moments": "the second moments, which decide intervals and whether values are reliable",
}
_WITHOUT_ROWS: tuple[Compared, ...] = ("models", "clips")
_BY_SAMPLE: tuple[Compared, ...] = ("models", "discarded", "clips", "losses", "correct")


class Difference(Part):
    """One thing that is not as the operator stated it.

    `deposit`: what was deposited is no set of the committed rows; `model`: the model that a round led to; `loss`: of a
    coalition on a slice, in 1e-9 nat; `correct`: right answers before and after a round; `draws`: what the draw of a
    round's coalitions rests on; `clips`: an update's energy and factor; `findings`: what a detector says; `moments`: of
    two participants, in 1e-18 nat^2; `discarded`: a round that was given up has losses. Round 0 is the whole run.
    """

    what: Literal["deposit", "model", "loss", "correct", "draws", "clips", "findings", "moments", "discarded"]
    round: Number
    stated: Name
    found: Name
    coalition: tuple[Hex32, ...] | None = None
    slice: Number | None = None

    def words(self, contract: Contract) -> str:
        """The difference as a sentence."""
        names = [contract.by_id()[p].name if p in contract.by_id() else p for p in self.coalition or ()]
        who = ", ".join(names) or "nobody"
        part = f"loss of the coalition of {who} on slice {self.slice}" if self.slice is not None else "losses"
        where = {
            "deposit": "The deposit for the auditor",
            "model": f"The model that round {self.round} led to",
            "loss": f"Round {self.round}, {part}",
            "correct": f"Round {self.round}, right answers before and after",
            "draws": f"Round {self.round}, the draw of its coalitions",
            "findings": f"Round {self.round}, what the detectors say",
            "clips": f"Round {self.round}, an update's energy in 1e-12 (its factor)",
            "moments": f"The second moments of {' and '.join(names)}",
            "discarded": f"Round {self.round}, which was given up",
        }[self.what]
        return f"{where}: the operator states {self.stated}, the auditor finds {self.found}."


class Reevaluation(Record):
    """What an auditor found; signed by its key, over the log up to the checkpoint of this size and root.

    `coalitions`: "all" with the second moments, "sampled" (`sample` of each round by `seed`, beside nobody and all), or
    "none", where the deposit holds nothing to evaluate on. `evaluated` counts them over all rounds. `tolerance` is
    `TOLERANCE`; `largest` the largest difference of any loss, within it or not. `differing` counts what is beyond it.
    `compared`: what was evaluated again in every round (records made before it was said have none).
    """

    TYPE = "reevaluation"

    contract_id: Hex32
    auditor: Hex32
    size: Count
    root: Hex32
    rounds: Count
    coalitions: Coalitions
    sample: Count | None = None
    seed: Hex32 | None = None
    evaluated: Number
    tolerance: Count
    largest: Big
    differing: Number
    differences: Annotated[tuple[Difference, ...], Field(max_length=LISTED)]
    compared: tuple[Compared, ...] | None = None


def tolerance(rows: int) -> int:
    """By how many units of 1e-9 nat the loss of a slice of so many rows may differ."""
    return TOLERANCE * -(-rows // ROWS)


def drawn(scores: RoundScores, sample: int | None, seed: str | None) -> list[int]:
    """The rows of a round's loss table that are evaluated again: all, or nobody's, everybody's and `sample` between.

    Those between are the first by SHA-256(type, seed, round, row).
    """
    rows = range(len(scores.losses))
    if sample is None or seed is None:
        return list(rows)

    def rank(row: int) -> bytes:
        place = scores.round.to_bytes(8, "big") + row.to_bytes(8, "big")
        return sha256(b"fedpact.reevaluation.v1:" + bytes.fromhex(seed) + place)

    return sorted({rows[0], *sorted(rows[1:-1], key=rank)[:sample], rows[-1]})


def stated_in(contract: Contract, bodies: Iterable[Body]) -> tuple[Compared, ...]:
    """What a run states that can be evaluated again."""
    found = list(bodies)
    scores = [body.scores for body in found if isinstance(body, ScoresOpened)]
    there: dict[Compared, bool] = {
        "models": True,
        "discarded": any(isinstance(body, RoundDiscarded) for body in found),
        "clips": any(body.clips for body in found if isinstance(body, RoundAggregated)),
        "losses": True,
        "correct": any(said.correct is not None for said in scores),
        "draws": any(said.first_order is not None or said.sampling is not None for said in scores),
        "findings": contract.defences is not None,
        "moments": True,
    }
    return tuple(name for name, holds in there.items() if holds)


def compared(
    record: Reevaluation, contract: Contract, bodies: Sequence[Body]
) -> tuple[tuple[Compared, ...], tuple[Compared, ...]]:
    """What was evaluated again in every round, and what that the run states was not.

    Records that do not say it are older than looking at a round that was given up.
    """
    known = record.compared
    if known is None:
        known = tuple(name for name in comparable(contract, bodies, record.coalitions) if name != "discarded")
    stated = stated_in(contract, bodies)
    return tuple(name for name in stated if name in known), tuple(name for name in stated if name not in known)


def told(record: Reevaluation, contract: Contract, bodies: Sequence[Body]) -> tuple[str, ...]:
    """The same in sentences: what was, and, if there is any, what was not."""
    done, left = compared(record, contract, bodies)
    words = _COMPARED | ({"losses": f"the losses of {scope(record)}"} if "losses" in done else {})
    missing = ["the losses that were not drawn"] if record.coalitions == "sampled" and "losses" in done else []
    missing += [words[name] for name in left]
    again = "; ".join(words[name] for name in done) or "nothing in every round"
    rest = [f"Not evaluated again, and the operator's statement: {'; '.join(missing)}."] if missing else []
    return (f"Evaluated again: {again}.", *rest)


def comparable(contract: Contract, bodies: Iterable[Body], coalitions: Coalitions) -> tuple[Compared, ...]:
    """What of a run can be evaluated again on these coalitions, in the order in which a record names it."""
    by = {"none": _WITHOUT_ROWS, "sampled": _BY_SAMPLE, "all": tuple(_COMPARED)}[coalitions]
    return tuple(name for name in stated_in(contract, bodies) if name in by)


def read(data: bytes, contract: Contract, entries: Sequence[Entry], *, file: object = None) -> Reevaluation:
    """A signed re-evaluation of the run in this log.

    Args:
        data: The file's bytes: the envelope, and perhaps a newline.
        contract: The log's contract.
        entries: The log, verified.
        file: What faults call the file.

    Raises:
        InputError: the wrong file: no re-evaluation, one of another run or by another auditor, or none is due.
        FaultError: it is this auditor's on this run and does not verify, is not whole, or of another log, a part of
            it, or other coalitions than it says. What it found is not judged here.
    """
    envelope, auditor = _right_file(data, contract, file)
    try:
        record: Reevaluation = opened(envelope, Reevaluation, auditor.key)
        _check(record, contract, entries)
    except FedpactError as err:
        message = f"The re-evaluation: {err.message}"
        raise FaultError(err.code, message, file=file, field=err.field, party=auditor.name, rule=err.rule) from err
    return record


def _right_file(data: bytes, contract: Contract, file: object) -> tuple[Envelope[Reevaluation], Auditor]:
    """The envelope of a record that says it is of this run and by this auditor; signatures are not looked at yet.

    Raises:
        InputError: REEVALUATION_NO_AUDITOR, REEVALUATION_FORM, REEVALUATION_OTHER_RUN, REEVALUATION_OTHER_AUDITOR.
    """
    auditor = contract.auditor

    def wrong(code: str, message: str) -> InputError:
        rule = "a re-evaluation is of one contract, by the auditor that it names"
        remedy = (
            "Give the file that the auditor of this contract signed for it, or none: the evidence has no part in this."
        )
        return InputError(code, message, file=file, rule=rule, remedy=remedy)

    if auditor is None:
        message = "The wrong file: the contract names no auditor, so nobody's re-evaluation is due."
        raise wrong("REEVALUATION_NO_AUDITOR", message)
    try:
        envelope: Envelope[Any] = read_envelope(data.removesuffix(b"\n"))
        if envelope.type != Reevaluation.media_type():
            raise wrong("REEVALUATION_FORM", f"The wrong file: it is a signed {envelope.type}.")
        said = Reevaluation.from_bytes(envelope.body)
    except InputError as err:
        if err.code == "REEVALUATION_FORM":
            raise
        raise wrong(
            "REEVALUATION_FORM", f"The wrong file, or a damaged one: it is no re-evaluation. {err.message}"
        ) from err
    if said.contract_id != contract.id:
        message = f"The wrong file: it is of the contract {said.contract_id}, and the evidence is of {contract.id}."
        raise wrong("REEVALUATION_OTHER_RUN", message)
    if said.auditor != auditor.id:
        message = f"The wrong file: it is by {said.auditor}, and the contract names {auditor.name}, {auditor.id}."
        raise wrong("REEVALUATION_OTHER_AUDITOR", message)
    return envelope, auditor


def _check(record: Reevaluation, contract: Contract, entries: Sequence[Entry]) -> None:
    bodies = [(index, entry.open()) for index, entry in enumerate(entries)]
    scores = [body.scores for _, body in bodies if isinstance(body, ScoresOpened)]
    last = max((index for index, body in bodies if isinstance(body, ScoresOpened | MomentsOpened)), default=None)
    if last is None or record.size <= last:
        raise FaultError("REEVALUATION_EARLY", "It covers a log in which the scores are not open.", field="size")
    sampled = record.coalitions == "sampled"
    count = 0 if record.coalitions == "none" else sum(len(drawn(s, record.sample, record.seed)) for s in scores)
    due: dict[str, object] = {
        "rounds": len(scores),
        "tolerance": TOLERANCE,
        "evaluated": count,
    }
    wrong = [name for name, value in due.items() if getattr(record, name) != value]
    if record.size > len(entries) or record.root != root([e.leaf_hash for e in entries[: record.size]]).hex():
        wrong.append("root")
    if (record.sample is not None, record.seed is not None) != (sampled, sampled):
        wrong.append("sample")
    listed = len(record.differences)
    empty = any(difference.what == "deposit" for difference in record.differences)
    if listed != min(record.differing, LISTED) or empty != (record.coalitions == "none"):
        wrong.append("differences")
    most = comparable(contract, (body for _, body in bodies), record.coalitions)
    kept = tuple(name for name in most if name in (record.compared or ()))
    if record.compared is not None and (record.compared != kept or (not record.differing and kept != most)):
        wrong.append("compared")
    if wrong:
        raise FaultError(
            "REEVALUATION_MISMATCH",
            f"Its {wrong[0]} is not that of this contract, of this log or of its other fields.",
            field=wrong[0],
            rule="a re-evaluation is of one contract, one log, and what it says",
        )


def scope(record: Reevaluation) -> str:
    """Which coalitions, in words."""
    if record.coalitions == "sampled":
        return f"{record.sample} drawn coalitions of each round, and all together"
    return "all coalitions"


def statement(record: Reevaluation, auditor: Auditor) -> str:
    """Whose word the utilities are once this record is taken."""
    if record.differing:
        return f"the operator's statement, which {auditor.name} re-evaluated and found otherwise"
    return f"re-evaluated by {auditor.name} ({scope(record)})"


def read_file(path: Path) -> bytes:
    """A re-evaluation's bytes.

    Raises:
        InputError: REEVALUATION_MISSING.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as err:
        raise InputError(
            "REEVALUATION_MISSING",
            "There is no re-evaluation here.",
            file=path,
            remedy="Name the file that `fedpact contribution reevaluate` wrote.",
        ) from err
