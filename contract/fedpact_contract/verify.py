"""`fedpact verify`: what does this evidence prove, to whom, and on whose word does the rest stand?

Exit codes: 0 verified and authenticated; 1 a fault; 3 internally consistent, not authenticated (no trust file);
4 partly authenticated, naming what rests on which key. Nothing here evaluates a model: utilities are the operator's
statement, unless the auditor that the contract names signed a re-evaluation and the reader knows its key.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpact_contract import reevaluation
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.evidence import REEVALUATION, Evidence, read_evidence
from fedpact_contract.log import (
    ContractSigned,
    Countersignature,
    Entry,
    PeriodClosing,
    RoundOpened,
    RunCompleted,
    ScoresCommitted,
)
from fedpact_contract.logcheck import Log, verify_log
from fedpact_contract.parties import Place
from fedpact_contract.record import decimal_text, ratio_text
from fedpact_contract.reevaluation import Reevaluation
from fedpact_contract.replay import replay
from fedpact_contract.replay_state import Run
from fedpact_contract.settlement import format_fen
from fedpact_contract.trust import Trust

__all__ = ["ParticipantResult", "Report", "Run", "replay", "verify", "verify_folder", "verify_log"]

UTILITIES = (
    "Utilities (coalition losses on the validation set) are the operator's statement; no auditor re-evaluated them."
)
STATED = "the operator's statement"
OF_THE_RECORD = (
    "FAULT: the re-evaluation is not what it should be, and counts for nothing; in the evidence itself none was found."
)

REVENUE = "Revenue and fees are the operator's statement."

BINDING = {ContractSigned.TYPE, RoundOpened.TYPE, ScoresCommitted.TYPE, RunCompleted.TYPE, PeriodClosing.TYPE}
"""Entries after which the operator signs a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticipantResult:
    """One participant's line: share and its interval (None before the settlement), fen, and what supports them.

    `fen` and `held_fen` are sums over periods; fen are held while the period's closing checkpoint lacks this
    participant's countersignature. `countersigned`: it signed every closing checkpoint that pays it, and at least one.
    """

    id: str
    name: str
    entity_code: str
    rounds_admitted: int
    share: str | None
    low: str | None
    high: str | None
    fen: int | None
    held_fen: int
    countersigned: bool
    authenticated: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What verifying found.

    `status` is how far the run is: unreadable, running, stopped, completed, settled, closing (fen are held), closed.
    `interval` says what the shares' 95 % intervals cover, `utilities` on whose word the losses stand. A fault has code,
    message, and where there are any, file, field (entries.7.lines.0.fen, or line 3), party, rule and remedy.
    """

    exit_code: int
    verdict: str
    status: str
    contract_id: str | None
    title: str | None
    entries: int
    checkpoints: int
    countersignatures: int
    rounds_planned: int | None
    rounds_aggregated: int | None
    pool_fen: int | None
    basis: str | None
    interval: str | None
    utilities: str
    participants: tuple[ParticipantResult, ...]
    faults: tuple[dict[str, str], ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["participants"] = [p.as_dict() for p in self.participants]
        values["faults"] = list(self.faults)
        values["notes"] = list(self.notes)
        return values


def verify_folder(folder: Path, trust: Trust | None, *, privacy: bool = True, record: Path | None = None) -> Report:
    """Verify the evidence in a folder, with the re-evaluation in this file, or else the one that lies in the folder.

    Raises:
        InputError: REEVALUATION_MISSING; the file given is the wrong one (`reevaluation.read`).
        InputError: there is no evidence here. Everything that is wrong with evidence is a fault in the report.
    """
    given = None if record is None else reevaluation.read_file(record)
    try:
        evidence = read_evidence(folder)
    except FaultError as err:
        return _report(None, None, (err,), (), None, _sizes(None), None)
    file = record or folder / REEVALUATION
    if given is not None:
        evidence = replace(evidence, reevaluation=given)
    return verify(evidence, trust, privacy=privacy, file=file, carried=given is None)


def verify(
    evidence: Evidence,
    trust: Trust | None,
    *,
    privacy: bool = True,
    file: object = REEVALUATION,
    carried: bool = True,
) -> Report:
    """Verify evidence: log, signatures, rounds, openings, settlement; then who vouches for what.

    Args:
        evidence: The four files' lines, and a re-evaluation if there is one.
        trust: Whom the reader knows; None: nobody.
        privacy: Whether to recompute that the plan keeps the contract's epsilon.
        file: What faults call the re-evaluation's file.
        carried: Whether the evidence itself carries it: then the wrong file is a fault.

    Raises:
        InputError: the wrong file (`reevaluation.read`), which somebody gave beside the evidence.
    """
    log = verify_log(evidence)
    faults = list(log.faults)
    run = None
    if log.sound and log.parties is not None:
        # With checkpoints missing, every head that names one of them would be a fault too.
        run = replay(log.entries, checkpoints=log.checkpoints if log.complete else None, privacy=privacy)
        if not log.faults:  # a line that could not be read is no missing one
            run.faults += _countersignatures(run, log.countersignatures)
            run.faults += () if run.faults else _checkpoints(run, log)
        faults += [fault for fault in run.faults if fault.as_dict() not in [known.as_dict() for known in log.faults]]
    if trust is not None and log.parties is not None:
        faults += trust.contradictions(log.parties.contract, file="log.jsonl", field="entries.0.signed.contract")
    record, sound = None, not faults
    if run is not None and sound and evidence.reevaluation is not None:
        try:
            record = reevaluation.read(evidence.reevaluation, run.parties.contract, log.entries, file=file)
            faults += _found_otherwise(run, record, file)
        except FaultError as err:
            faults.append(err)
        except InputError as err:
            if not carried:
                raise
            faults.append(FaultError(err.code, err.message, file=file, rule=err.rule, remedy=err.remedy))
    report = _report(log, run, tuple(faults), log.countersignatures, trust, _sizes(evidence), record)
    return replace(report, verdict=OF_THE_RECORD) if faults and sound and record is None else report


def _found_otherwise(run: Run, record: Reevaluation, file: object) -> Iterator[FaultError]:
    """What the auditor found otherwise than the operator stated it."""
    contract = run.parties.contract
    for number, difference in enumerate(record.differences):
        yield FaultError(
            "REEVALUATION_DIFFERS",
            difference.words(contract),
            file=file,
            field=f"differences.{number}",
            party=contract.operator.name,
            rule="scores and models are those that the updates and the deposited rows give",
        )


def _countersignatures(run: Run, held: tuple[Countersignature, ...]) -> Iterator[FaultError]:
    """Every reply that named the head it was shown countersigned it, and the countersignature is here."""
    signed = {(record.size, record.participant) for record in held}
    for (size, participant), place in run.heads.items():
        if (size, participant) not in signed:
            name = run.parties.name(participant)
            message = f"A reply of {name} names the head of size {size}; its countersignature on that was left out."
            yield place.fault(
                "COUNTERSIGNATURE_MISSING",
                message,
                party=run.parties.contract.operator.name,
                rule="every reply countersigns the head that it was shown",
            )


def _checkpoints(run: Run, log: Log) -> Iterator[FaultError]:
    """There is a checkpoint after each entry that somebody was bound to, up to the last checkpoint."""
    last = max(log.checkpoints, default=0)
    for index, entry in enumerate(log.entries[:last]):
        if entry.type in BINDING and index + 1 not in log.checkpoints:
            yield Place(index=index, type=entry.type).fault(
                "CHECKPOINT_MISSING",
                f"The operator's checkpoint of size {index + 1} was left out.",
                party=run.parties.contract.operator.name,
                rule="a checkpoint follows each entry that binds somebody",
            )


def _sizes(evidence: Evidence | None) -> dict[str, int]:
    lines = {"entries": "log", "checkpoints": "checkpoints", "countersignatures": "countersignatures"}
    return {name: len(getattr(evidence, field)) if evidence else 0 for name, field in lines.items()}


def _report(
    log: Log | None,
    run: Run | None,
    faults: tuple[FaultError, ...],
    held: tuple[Countersignature, ...],
    trust: Trust | None,
    sizes: dict[str, int],
    record: Reevaluation | None,
) -> Report:
    contract = log.parties.contract if log and log.parties else None
    participants = tuple(_participants(run, held, trust)) if run else ()
    missing = tuple(_missing(run, participants, trust)) if run and trust is not None else ()
    exit_code, verdict = _verdict(faults, trust, missing)
    settled = [p for p in run.periods if p.settled] if run else []
    utilities, audited = _utilities(contract, record, trust, log.entries if log else ())
    evaluated = record is not None and utilities != STATED and "discarded" in (record.compared or ())
    return Report(
        exit_code=exit_code,
        verdict=verdict,
        status=_status(run, participants),
        contract_id=contract.id if contract else None,
        title=contract.title if contract else None,
        **sizes,
        rounds_planned=contract.training.rounds if contract else None,
        rounds_aggregated=len(run.aggregated) if run else None,
        pool_fen=sum(p.settled.pool_fen for p in settled if p.settled) if settled else None,
        basis=settled[-1].settled.basis if settled and settled[-1].settled else None,
        interval=settled[-1].result.shares.covers if settled and settled[-1].result else None,
        utilities=utilities,
        participants=participants,
        faults=tuple(fault.as_dict() for fault in faults),
        notes=(*missing, *_notes(run, participants, trust, evaluated), *audited),
    )


def _utilities(
    contract: Contract | None, record: Reevaluation | None, trust: Trust | None, entries: Sequence[Entry]
) -> tuple[str, tuple[str, ...]]:
    """On whose word the losses stand, in short and in sentences."""
    auditor = contract.auditor if contract else None
    if contract is None or record is None or auditor is None:
        return STATED, (UTILITIES,)
    who = f"{auditor.name} ({auditor.entity_code})"
    if trust is None or not trust.knows("auditor", auditor):
        why = "no trust file names" if trust is None else "the trust file does not name"
        return STATED, (
            f"A re-evaluation by {who} rests on the keys {auditor.id}, which {why} as an auditor's; without it "
            "utilities are the operator's statement.",
        )
    found = "found otherwise" if record.differing else "found the same"
    words = (
        f"Utilities (coalition losses on the validation set) were re-evaluated by {who}, which {found}: "
        f"{reevaluation.scope(record)} in {_rounds(list(range(1, record.rounds + 1)))}."
    )
    told = reevaluation.told(record, contract, [entry.open() for entry in entries])
    return reevaluation.statement(record, auditor), (words, *told)


def _status(run: Run | None, participants: tuple[ParticipantResult, ...]) -> str:
    if run is None:
        return "unreadable"
    if run.closed:
        return "closing" if any(line.held_fen for line in participants) else "closed"
    if run.periods and run.periods[-1].settled:
        return "settled"
    if run.completed:
        return "completed"
    return "stopped" if run.abandoned else "running"


def _verdict(faults: tuple[FaultError, ...], trust: Trust | None, missing: tuple[str, ...]) -> tuple[int, str]:
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        return 1, f"FAULT: {count} found; this evidence proves nothing beyond it."
    if trust is None:
        return 3, "INTERNALLY CONSISTENT, NOT AUTHENTICATED: no trust file was given, so all of it may be invented."
    if missing:
        return 4, "PARTLY AUTHENTICATED: no fault was found; the notes name what is missing or rests on which key."
    return 0, "VERIFIED: recomputed to the fen, and authenticated by the trust file."


def _participants(run: Run, held: tuple[Countersignature, ...], trust: Trust | None) -> Iterator[ParticipantResult]:
    signed = {(record.size, record.participant) for record in held}
    result = run.periods[-1].result if run.periods else None
    lines = {line.participant: line.share for line in result.lines} if result else {}
    for party in run.parties.contract.participants:
        party_id = party.id
        paid = [
            (line.fen, period.closing_index is not None and (period.closing_index + 1, party_id) in signed)
            for period in run.periods
            if period.settled
            for line in period.settled.lines
            if line.participant == party_id
        ]
        line = lines.get(party_id)
        yield ParticipantResult(
            id=party_id,
            name=party.name,
            entity_code=party.entity_code,
            rounds_admitted=sum(party_id in admitted for admitted in run.aggregated.values()),
            share=ratio_text(line.share, 9) if line else None,
            low=decimal_text(line.low) if line else None,
            high=decimal_text(line.high) if line else None,
            fen=sum(fen for fen, _ in paid) if paid else None,
            held_fen=sum(fen for fen, countersigned in paid if not countersigned),
            countersigned=any(done for _, done in paid) and all(done for fen, done in paid if fen),
            authenticated=trust is not None and trust.knows("participant", party),
        )


def _missing(run: Run, participants: tuple[ParticipantResult, ...], trust: Trust) -> Iterator[str]:
    """What keeps the evidence from being wholly authenticated, in sentences."""
    contract = run.parties.contract
    operator = contract.operator
    if not trust.knows("operator", operator):
        yield (
            f"The log, its decisions and the settlement rest on the operator's key {operator.id} ({operator.name}, "
            f"{operator.entity_code}), which the trust file does not name as an operator's."
        )
    for line in participants:
        outcomes = [r.number for r in run.rounds if r.outcomes.get(line.id, "missed") != "missed"]
        if not line.authenticated and (outcomes or line.fen):
            on = [f"the replies in {_rounds(outcomes)}"] if outcomes else []
            on += [f"the line of {format_fen(line.fen, 'en')}"] if line.fen else []
            yield (
                f"Of {line.name} ({line.entity_code}), {' and '.join(on)} rest on the key {line.id}, which the trust "
                "file does not name as a participant's."
            )
        if line.held_fen:
            yield _held(line)
        elif run.closed and not line.countersigned and line.rounds_admitted and not any(p.fen for p in participants):
            yield f"Nobody is paid, and {line.name}, who took part, has not countersigned that."
    if not run.closed:
        status = _status(run, participants)
        yield f"The run is not closed yet ({status}): nothing is final, and the rest verifies as far as it goes."


def _notes(
    run: Run | None, participants: tuple[ParticipantResult, ...], trust: Trust | None, evaluated: bool
) -> Iterator[str]:
    """What a reader must know beside the verdict; `evaluated`: an auditor looked at rounds that were given up."""
    if run is None:
        return
    if trust is None:
        yield from _unfinished(run, participants)
    planned = run.parties.contract.training.rounds
    if run.completed and len(run.aggregated) < planned:
        yield f"The run ended after {len(run.aggregated)} of {planned} rounds."
    for number in run.discarded:
        whose = "That is the operator's statement, until an auditor evaluates it."
        yield (
            f"Round {number} was given up as one whose losses are no numbers. "
            f"{'The auditor evaluated it again.' if evaluated else whose}"
        )
    if run.abandoned:
        yield "A round was given up (too few admitted updates, or stopped by the operator), and the run ended."
    settled = [period.settled for period in run.periods if period.settled]
    yield from (f"The pool of period {body.period} is empty: nobody is paid." for body in settled if not body.pool_fen)
    if settled:
        yield REVENUE
    if run.unopened:
        yield "The operator opened none of its commitments: the contract's fallback settled, not contribution."
    for party in run.parties.contract.participants:
        if (said := run.notices.get(party.id)) is not None and said.state == "withdrawn":
            yield f"{party.name} has withdrawn; what its updates changed stays in the models since."
        if party.id in run.revoked:
            yield f"{party.name} revoked its run key (entry {run.revoked[party.id]}): what it signed before stands."
        left_out = [r.number for r in run.rounds if party.id not in r.invited]
        if left_out:
            yield f"{party.name} was not invited in {_rounds(left_out)}."


def _unfinished(run: Run, participants: tuple[ParticipantResult, ...]) -> Iterator[str]:
    for line in participants:
        if line.held_fen:
            yield _held(line)
    if not run.closed:
        yield f"The run is not closed yet ({_status(run, participants)}): the log verifies as far as it goes."


def _held(line: ParticipantResult) -> str:
    return f"{line.name} has not countersigned the closing checkpoint: {format_fen(line.held_fen, 'en')} is held."


def _rounds(numbers: list[int]) -> str:
    """Rounds as ranges: "rounds 1-3, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    text = ", ".join("-".join(map(str, part)) for part in parts)
    return f"round {text}" if len(numbers) == 1 else f"rounds {text}"
