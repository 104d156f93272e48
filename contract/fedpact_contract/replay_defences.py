"""The entries of the defences against gaming: clips, exclusions, findings, unions, reviews (docs/adr/0008).

Each function yields what is wrong with its entry and then takes it into the state. What the detectors say is the
operator's statement; here it is held to it: committed to after each round, opened at the close, and acted on.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from fractions import Fraction

from fedpact_contract.clipping import contract_factors
from fedpact_contract.contribution import round_values
from fedpact_contract.errors import FedpactError, RefusedError
from fedpact_contract.log import (
    Findings,
    FindingsOpened,
    ParticipantExcluded,
    ParticipantReadmitted,
    ReviewOpened,
    RoundAggregated,
    ScoresCommitted,
    StatementTaken,
    UnionConfirmed,
    UnionDeclared,
    UnionWithdrawn,
    commitment,
)
from fedpact_contract.looks import NEAR_COPY, malformed, refuted, wreckers
from fedpact_contract.messages import Statement
from fedpact_contract.parties import Place
from fedpact_contract.questions import Question, agreed, answered, review_due
from fedpact_contract.replay_state import Faults, Run, open_inside
from fedpact_contract.request import parse_instant
from fedpact_contract.shares import PeriodShares


def clips(run: Run, place: Place, body: RoundAggregated) -> Faults:
    """Updates are clipped where the contract says so, by the factors that their energies lead to."""
    contract, operator = run.parties.contract, run.parties.contract.operator.name
    due = contract.defences is not None and contract.defences.clip != "none"
    if (body.clips is not None) != due or (body.clips is not None and len(body.clips) != len(body.admitted)):
        message = "Energies and factors stand beside each admitted update where the contract clips, else not."
        yield place.fault("CLIP_MISSING", message, field="clips", party=operator, rule="defences.clip")
        return
    if body.clips is None or not set(body.admitted) <= contract.by_id().keys():
        return
    energies = {p: clip.energy for p, clip in zip(body.admitted, body.clips, strict=True)}
    try:
        factors = contract_factors(contract, energies)
    except FedpactError as err:
        yield place.within(err, field="clips")
        return
    for number, (participant, clip) in enumerate(zip(body.admitted, body.clips, strict=True)):
        if clip.factor != factors[participant]:
            message = f"An update is said to count by {clip.factor}; by the energies it does by {factors[participant]}."
            name = run.parties.name(participant)
            yield place.fault("CLIP_FACTOR", message, field=f"clips.{number}.factor", party=name, rule="defences.clip")


def findings_committed(run: Run, place: Place, body: ScoresCommitted) -> Faults:
    """What the detectors said is committed to where the contract has defences, else not."""
    contract = run.parties.contract
    if (body.findings is not None) != (contract.defences is not None):
        message = "The detectors' findings are committed to where the contract has defences, else not."
        yield place.fault("FINDINGS_NOT_COMMITTED", message, field="findings", party=contract.operator.name)
    if body.findings is not None:
        run.findings_committed.setdefault(body.round, body.findings)


def participant_excluded(run: Run, place: Place, body: ParticipantExcluded) -> Faults:
    """Right after the scores of the last round, where the contract lets wreckers be rejected, and once."""
    contract, name = run.parties.contract, run.parties.name(body.participant)
    if contract.defences is None or contract.defences.wreckers != "reject":
        message = "A participant is excluded, and the contract excludes nobody."
        yield place.fault("EXCLUSION_NOT_CONTRACTED", message, party=name, rule="defences.wreckers")
    if body.round != max(run.committed, default=0) or run.open_round or run.completed:
        message = "A participant is excluded otherwise than right after the scores of the last round."
        yield place.fault("EXCLUSION_TIME", message, field="round", party=name)
    if body.participant in run.excluded:
        yield place.fault("EXCLUSION_TWICE", "The participant is excluded already.", field="participant", party=name)
    if body.participant not in contract.by_id():
        message = "Somebody is excluded who is no participant of the contract."
        yield place.fault("PARTICIPANT_UNKNOWN", message, field="participant", party=name)
    run.excluded.add(body.participant)
    run.exclusions[body.round, body.participant] = place


def participant_readmitted(run: Run, place: Place, body: ParticipantReadmitted) -> Faults:
    """Only who was excluded can be readmitted, and only while the run goes on."""
    if body.participant not in run.excluded or run.completed:
        name = run.parties.name(body.participant)
        message = "A participant is readmitted that is not excluded, or after the run has ended."
        yield place.fault("READMISSION", message, field="participant", party=name)
    run.excluded.discard(body.participant)


def findings_opened(run: Run, place: Place, body: FindingsOpened) -> Faults:
    """The opened findings are those committed to; a wrecker that they name was excluded."""
    operator, number = run.parties.contract.operator.name, body.round
    if run.completed is None:
        yield place.fault("OPENED_EARLY", "Findings are opened before the run is completed.", party=operator)
    if number in run.findings:
        message = f"The findings of round {number} are opened already."
        yield place.fault("FINDINGS_OPENED_TWICE", message, field="round", party=operator)
        return
    if commitment(Findings, bytes.fromhex(body.salt), body.findings) != run.findings_committed.get(number):
        message = f"The findings of round {number} are not those that were committed to."
        yield place.fault("FINDINGS_COMMITMENT", message, field="findings", party=operator)
    if wrong := malformed(body.findings, run.parties.contract, number):
        message = f"The findings of round {number} are not what the detectors say: {wrong}."
        yield place.fault("FINDINGS_FORM", message, field="findings", party=operator)
    run.findings[number] = body.findings
    defences = run.parties.contract.defences
    if defences is None or defences.wreckers != "reject":
        return
    for wrecker in wreckers(body.findings):
        if (number, wrecker) not in run.exclusions:
            message = f"The findings of round {number} name a wrecker, and it was not excluded."
            party = run.parties.name(wrecker)
            yield place.fault("EXCLUSION_MISSING", message, field="findings", party=party, rule="defences.wreckers")


def union_declared(run: Run, place: Place, body: UnionDeclared) -> Faults:
    """At least two participants that are in no union yet, and the contract's time to dispute it."""
    contract, operator = run.parties.contract, run.parties.contract.operator.name
    taken = {p for members in (*run.unions, *run.pending) for p in members}
    if contract.defences is None:
        message = "A union is declared, and the contract has no defences."
        yield place.fault("UNION_NOT_CONTRACTED", message, party=operator, rule="defences")
        return
    if list(body.members) != sorted(set(body.members)) or len(body.members) < 2:
        message = "A union is at least two participants, each once, in the order of ids."
        yield place.fault("UNION_MEMBERS", message, field="members", party=operator)
    for member in body.members:
        if member not in contract.by_id() or member in taken:
            message = "A member of the union is no participant, or in another union."
            yield place.fault("UNION_MEMBERS", message, field="members", party=run.parties.name(member))
    hours = (parse_instant(body.until) - parse_instant(body.declared)).total_seconds() / 3600
    if hours < contract.defences.dispute_hours:
        message = f"The union can be disputed for {hours:g} hours, not for {contract.defences.dispute_hours}."
        yield place.fault("UNION_WINDOW", message, field="until", party=operator, rule="defences.dispute_hours")
    opened = opened_at(run)
    if body.round not in run.committed or run.completed or (opened and parse_instant(body.declared) < opened):
        message = (
            "A union is declared before the scores of the round that it rests on, before the last round was opened, or "
            "after the run has ended."
        )
        yield place.fault("UNION_TIME", message, field="declared", party=operator)
    run.pending[body.members] = Question(body=body, place=place, subject=run.leaves[place.index])


def opened_at(run: Run) -> datetime | None:
    """When the last round was opened: before its deadline, which the agents were given, by what the contract gives."""
    if not run.rounds:
        return None
    seconds = run.parties.contract.participation.deadline_seconds
    return parse_instant(run.rounds[-1].deadline) - timedelta(seconds=seconds)


def unions_in_time(run: Run, place: Place) -> Faults:
    """A round that counts a union as one was opened after that was confirmed."""
    opened = opened_at(run)
    for union in run.unions.values():
        if opened and union.confirmed and opened < parse_instant(union.confirmed):
            message = "The round was opened before the moment at which a union that it counts is said to be confirmed."
            operator = run.parties.contract.operator.name
            yield place.fault("UNION_TIME", message, field="deadline", party=operator, rule="defences.dispute_hours")


def union_confirmed(run: Run, place: Place, body: UnionConfirmed) -> Faults:
    """After the time to dispute it; where a member disputes it, with the operator's reason."""
    operator, pending = run.parties.contract.operator.name, run.pending.pop(body.members, None)
    if pending is None:
        message = "A union is confirmed that was not declared."
        yield place.fault("UNION_NOT_DECLARED", message, field="members", party=operator)
        return
    if parse_instant(body.at) < parse_instant(pending.body.until):
        message = "A union is confirmed while it can still be disputed."
        yield place.fault("UNION_WINDOW", message, field="at", party=operator, rule="defences.dispute_hours")
    if pending.said("dispute") and body.reason is None:
        message = "A member disputes the union, and it is confirmed without a reason."
        yield place.fault("UNION_DISPUTED", message, field="reason", party=operator)
    pending.confirmed = body.at
    run.unions[body.members] = pending
    run.united.append(pending)


def union_withdrawn(run: Run, place: Place, body: UnionWithdrawn) -> Faults:
    """One that was declared, or confirmed."""
    if run.pending.pop(body.members, None) is None and run.unions.pop(body.members, None) is None:
        message = "A union is withdrawn that was not declared."
        operator = run.parties.contract.operator.name
        yield place.fault("UNION_NOT_DECLARED", message, field="members", party=operator)


def statement_taken(run: Run, place: Place, body: StatementTaken) -> Faults:
    """A participant's own word, by its contract key, on an entry that asks for one."""
    contract, name = run.parties.contract, run.parties.name(body.participant)
    key = contract.by_id()[body.participant].key if body.participant in contract.by_id() else ""
    record, fault = open_inside(place, body.statement, Statement, key, "statement", name)
    if fault:
        yield fault
    if record is None:
        return
    try:
        question = answered(record, contract.id, body.participant, run.questions)
    except RefusedError as err:
        yield place.within(err, field="statement", party=name)
        return
    question.answers[body.participant] = record


def review_opened(run: Run, place: Place, body: ReviewOpened) -> Faults:
    """After the run, before its period is settled. Whom it names, and the ratio, are recomputed at the settlement."""
    operator = run.parties.contract.operator.name
    if run.parties.contract.defences is None:
        message = "A review is opened, and the contract has no defences."
        yield place.fault("REVIEW_NOT_CONTRACTED", message, party=operator, rule="defences")
    if run.completed is None or run.periods or body.period != 1:
        message = "A review is opened before the run is completed, or not for the period that is due."
        yield place.fault("REVIEW_TIME", message, field="period", party=operator)
    run.reviews.append(Question(body=body, place=place, subject=run.leaves[place.index]))


def reviewed(run: Run, place: Place, paid: PeriodShares) -> Faults:
    """At the settlement: where negative values ask for a review, the last one is agreed; each one tells the truth."""
    contract, operator = run.parties.contract, run.parties.contract.operator.name
    due, reviews = review_due(contract, paid), run.reviews
    told = None if due is None else (due.participants, str(due.ratio))
    for review in reviews:
        if (review.body.negative, review.body.ratio) != told:
            message = "The review names other participants or another ratio than the opened scores, or none is due."
            yield review.place.fault("REVIEW_MISMATCH", message, party=operator, rule="defences.negatives")
    if due is not None and not (reviews and agreed(contract, reviews[-1])):
        names = ", ".join(run.parties.name(p) for p in due.participants)
        message = f"Negative values ({names}) ask for a review, and the period is settled without one that is agreed."
        yield place.fault("REVIEW_MISSING", message, party=operator, rule="defences.negatives")
    run.reviews = []


def all_founded(run: Run, place: Place) -> Faults:
    """At the settlement: every commitment to findings is opened, and every exclusion rests on one."""
    operator = run.parties.contract.operator.name
    for number in sorted(run.findings_committed.keys() - run.findings.keys()):
        message = f"The period is settled and the findings of round {number} are not opened."
        yield place.fault("FINDINGS_NOT_OPENED", message, party=operator)
    values = _values(run)
    for (number, participant), where in run.exclusions.items():
        named = number not in run.findings or participant in wreckers(run.findings[number])
        if not named or (number in values and refuted(participant, number, values)):
            message = (
                f"A participant was excluded, and the findings of round {number} name it no wrecker, or its opened "
                "values are not negative in two rounds running."
            )
            name = run.parties.name(participant)
            yield where.fault("EXCLUSION_UNFOUNDED", message, field="participant", party=name, rule="defences.wreckers")
    for union in run.united:
        before = [said for number, said in run.findings.items() if number <= union.body.round]
        for member in unlike(union.body.members, before):
            message = "No finding before the union calls this participant near to another member."
            name = run.parties.name(member)
            yield union.place.fault("UNION_UNFOUNDED", message, field="members", party=name, rule="NEAR_COPY")


def unlike(members: Sequence[str], findings: Iterable[Findings]) -> list[str]:
    """The members that none of these findings calls a near-copy of another member."""
    lines = [line for said in findings for line in said.lines if line.code == NEAR_COPY and line.outcome == "alarm"]
    return [m for m in members if not any({m} < set(line.participants) <= {*members} for line in lines)]


def _values(run: Run) -> dict[int, dict[str, Fraction]]:
    """Values of each round whose scores are open and can be read; what is wrong with others is told there."""
    found: dict[int, dict[str, Fraction]] = {}
    for number, scores in run.scores.items():
        with suppress(FedpactError):
            found[number] = round_values(scores, run.parties.contract)
    return found
