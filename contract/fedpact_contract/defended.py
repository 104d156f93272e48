"""What a log says of the defences against gaming: clips, findings, exclusions, unions and reviews, for the report."""

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from fedpact_contract.contract import Contract
from fedpact_contract.log import (
    Body,
    Entry,
    Finding,
    FindingsOpened,
    ParticipantExcluded,
    ParticipantReadmitted,
    PeriodSettled,
    ReviewOpened,
    RoundOpened,
    ScoresCommitted,
    StatementTaken,
    UnionConfirmed,
    UnionDeclared,
    UnionWithdrawn,
    kept_rounds,
)
from fedpact_contract.messages import Statement
from fedpact_contract.parties import Place
from fedpact_contract.questions import Question, agreed
from fedpact_contract.record import decimal_text, ratio_text, read_envelope

DETECTORS = {
    "SIGNAL_ENERGY": "Its update is larger than the others', beyond the declared noise: boosted, or rows repeated.",
    "DIRECTION": "Its update does not go where the others' go: random, against them, or wrong labels.",
    "REPLAY": "Its update repeats the last step of the model in place of training.",
    "DISPERSION": "Its update differs from the others' by more than its rows explain: it has fewer, or others'.",
    "VALUE_PER_ROW": "Its rows are worth more than the others': repeated rows, known validation rows, or better data.",
    "WITHOUT_VALUE": "Its rows are worth less than a third of the others': noise, or labels of nothing.",
    "NEAR_COPY": "Two updates differ from the others' in the same way: the same rows twice.",
    "NEGATIVE_VALUE": "Its value over the rounds is negative beyond chance: wrong labels, or a hostile update.",
    "WRECKER": "Its own value was far below zero in two rounds running.",
    "NEGATIVES": "Negative values together are a large part of the total value.",
    "SLICE_VALUE": "It is worth more on one giver's part of the validation rows than on the others: it may know them.",
}
"""What an alarm of each detector says (`fedpact_server.detectors`), in a sentence."""


ANSWERS = {"agree": "agreed", "dispute": "disputed"}
"""What became of a question by an answer."""


def defences(entries: Sequence[Entry], bodies: Sequence[Body], contract: Contract) -> dict[str, Any] | None:
    """The section of the report; None where the contract has no defences. The log was checked before.

    `of_values`: whether detectors look at values too; in the re-normalised game they do not. `findings`: none, as long
    as no round is scored; committed, until all of them are opened; opened; withheld, where the period was settled and
    they were not. Alarms and detectors without power are those of what is opened.

    Args:
        entries: The log's.
        bodies: The same, opened.
        contract: The contract.
    """
    if contract.defences is None:
        return None
    opened = [body for body in bodies if isinstance(body, FindingsOpened)]
    closed = {b.round for b in bodies if isinstance(b, ScoresCommitted)} - {body.round for body in opened}
    settled = any(isinstance(body, PeriodSettled) for body in bodies)
    lines = [line for body in opened for line in body.findings.lines]
    aggregated = kept_rounds(bodies)
    return {
        "clause": contract.defences.plain(),
        "of_values": contract.contribution.game != "re-normalised",
        "findings": ("withheld" if settled else "committed") if closed else "opened" if opened else "none",
        "alarms": [_alarm(line, contract) for line in lines if line.outcome == "alarm"],
        "no_power": _without_power(lines),
        "updates": sum(len(body.admitted) for body in aggregated),
        "clipped": [
            {"round": body.round, "participant": _named(party, contract), "factor": decimal_text(clip.factor)}
            for body in aggregated
            for party, clip in zip(body.admitted, body.clips or (), strict=False)
            if clip.factor < Decimal(1)
        ],
        "exclusions": _exclusions(bodies, contract),
        "unions": _unions(entries, bodies, contract),
        "reviews": _reviews(entries, bodies, contract),
    }


def _named(party: str, contract: Contract) -> dict[str, str]:
    known = contract.by_id().get(party)
    return {"id": party, "name": party if known is None else known.name}


def _alarm(line: Finding, contract: Contract) -> dict[str, Any]:
    return {
        "round": line.round,
        "code": line.code,
        "meaning": DETECTORS.get(line.code, ""),
        "participants": [_named(party, contract) for party in line.participants],
        "statistic": line.statistic,
        "threshold": line.threshold,
        "evidence": dict(line.evidence),
    }


def _without_power(lines: Sequence[Finding]) -> list[dict[str, Any]]:
    """Each detector that would hardly have found what it looks for: after which rounds, and why after the last."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.outcome == "no power":
            known = found.setdefault(line.code, {"code": line.code, "meaning": DETECTORS.get(line.code, "")})
            known["rounds"] = [*known.get("rounds", ()), line.round]
            known["power"] = line.power
    return list(found.values())


def _exclusions(bodies: Sequence[Body], contract: Contract) -> list[dict[str, Any]]:
    """Who was invited no more after which round's scores, and where it was readmitted why, after which one."""
    found: list[dict[str, Any]] = []
    scored = 0
    for body in bodies:
        if isinstance(body, ScoresCommitted):
            scored = body.round
        elif isinstance(body, ParticipantExcluded):
            who = _named(body.participant, contract)
            found.append({"participant": who, "round": body.round, "code": body.code, "readmitted": None})
        elif isinstance(body, ParticipantReadmitted):
            for line in found:
                if line["participant"]["id"] == body.participant and line["readmitted"] is None:
                    line["readmitted"] = {"round": scored, "reason": body.reason}
    return found


def _unions(entries: Sequence[Entry], bodies: Sequence[Body], contract: Contract) -> list[dict[str, Any]]:
    """Each union with what became of it: steps in their order, and the rounds in which it counted as one."""
    found: list[dict[str, Any]] = []
    subjects: dict[str, dict[str, Any]] = {}
    for entry, body in zip(entries, bodies, strict=True):
        if isinstance(body, UnionDeclared):
            union: dict[str, Any] = {"members": [_named(p, contract) for p in body.members], "round": body.round}
            union |= {"until": body.until, "state": "declared", "rounds": [], "steps": []}
            union["steps"].append(_step("declared", at=body.declared, reason=body.reason))
            subjects[entry.leaf_hash.hex()] = union
            found.append(union)
        elif isinstance(body, StatementTaken):
            record = said(body.statement)
            if record.subject in subjects:
                by = _named(body.participant, contract)
                subjects[record.subject]["steps"].append(_step(ANSWERS[record.answer], by=by, reason=record.reason))
        elif isinstance(body, UnionConfirmed | UnionWithdrawn):
            what = "confirmed" if isinstance(body, UnionConfirmed) else "withdrawn"
            for union in found:
                if _ids(union) == body.members and union["state"] != "withdrawn":
                    union["state"] = what
                    union["steps"].append(_step(what, at=getattr(body, "at", None), reason=body.reason))
        elif isinstance(body, RoundOpened):
            for union in found:
                if union["state"] == "confirmed":
                    union["rounds"].append(body.round)
    return found


def _reviews(entries: Sequence[Entry], bodies: Sequence[Body], contract: Contract) -> list[dict[str, Any]]:
    """What the operator found out about negative values, who agreed to it, and whether that is enough."""
    found: dict[str, Question[ReviewOpened]] = {}
    for index, (entry, body) in enumerate(zip(entries, bodies, strict=True)):
        if isinstance(body, ReviewOpened):
            subject = entry.leaf_hash.hex()
            found[subject] = Question(body=body, place=Place(index=index, type=entry.type), subject=subject)
        elif isinstance(body, StatementTaken):
            record = said(body.statement)
            if record.subject in found:
                found[record.subject].answers[body.participant] = record
    return [
        {
            "period": review.body.period,
            "negative": [_named(party, contract) for party in review.body.negative],
            "ratio": ratio_text(Fraction(review.body.ratio)),
            "text": review.body.text,
            "answers": [
                _step(ANSWERS[record.answer], by=_named(party, contract), reason=record.reason)
                for party, record in review.answers.items()
            ],
            "agreed": agreed(contract, review),
        }
        for review in found.values()
    ]


def said(statement: dict[str, Any]) -> Statement:
    """The record in an answer that was taken; its signature is looked at by `replay`."""
    return Statement.from_bytes(read_envelope(statement).body)


def _ids(union: dict[str, Any]) -> tuple[str, ...]:
    return tuple(member["id"] for member in union["members"])


def _step(
    what: str, *, at: str | None = None, by: dict[str, str] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"what": what, "at": at, "by": by, "reason": reason}
