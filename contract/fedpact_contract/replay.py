"""The run read again from its log: every rule that one entry must keep towards those before it.

Each kind of entry has one function that yields what is wrong with it and then takes it into the state, so that one
fault hides no other. Deadlines are not judged: they went by the operator's clock.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedpact_contract import replay_close, replay_defences, replay_leaving, replay_rounds
from fedpact_contract.errors import FaultError, FedpactError
from fedpact_contract.log import (
    BaselinesScored,
    Body,
    Checkpoint,
    ContractSigned,
    DestructionStated,
    Entry,
    FindingsOpened,
    KeyRevoked,
    MeasurementTaken,
    MomentsOpened,
    NoticeTaken,
    ParticipantExcluded,
    ParticipantReadmitted,
    PeriodClosing,
    PeriodSettled,
    ReplyMissed,
    RevenueRecorded,
    ReviewOpened,
    RoundAbandoned,
    RoundAggregated,
    RoundDiscarded,
    RoundOpened,
    RunCompleted,
    ScoresCommitted,
    ScoresOpened,
    StatementTaken,
    UnionConfirmed,
    UnionDeclared,
    UnionWithdrawn,
    UpdateDecided,
    UpdateRefused,
    ValidationDeposited,
)
from fedpact_contract.logcheck import prefix_roots
from fedpact_contract.parties import Place, open_parties
from fedpact_contract.replay_state import Faults, Run


def replay(
    entries: Sequence[Entry], *, checkpoints: Mapping[int, Checkpoint] | None = None, privacy: bool = True
) -> Run:
    """Read a log from its first entry on; faults are in the result.

    Args:
        entries: Every entry, in order.
        checkpoints: The signed checkpoints by size, which the heads named in updates must be; without them the heads
            are compared with the log's own roots alone.
        privacy: Whether to recompute that the plan keeps the contract's epsilon (half a second or more).

    Raises:
        FaultError: entry 0 is missing or holds no contract with every party's run key; nothing can be read then.
    """
    if not entries:
        raise FaultError("LOG_EMPTY", "The log has no entries.", file="log.jsonl")
    parties, faults = open_parties(entries[0])
    if parties is None:
        raise faults[0]
    leaves = [entry.leaf_hash for entry in entries]
    run = Run(
        parties=parties,
        roots=prefix_roots(leaves),
        leaves=tuple(leaf.hex() for leaf in leaves),
        checkpoints=checkpoints,
        model_digest=parties.contract.model.initial_digest,
        faults=faults,
    )
    if privacy:
        run.faults += _plan(run)
    for index, entry in enumerate(entries[1:], start=1):
        place = Place(index=index, type=entry.type)
        try:
            body = entry.open()
        except FedpactError as err:
            run.faults.append(place.within(err))
            continue
        run.faults += _take(run, place, body)
    return run


def _plan(run: Run) -> Faults:
    from fedpact_contract.privacy import check_plan

    try:
        check_plan(run.parties.contract)
    except FedpactError as err:
        yield Place(index=0, type=ContractSigned.TYPE).within(err, field="signed.contract")


def _take(run: Run, place: Place, body: Body) -> Faults:
    if run.closed and not isinstance(body, RevenueRecorded):
        yield place.fault("ENTRY_AFTER_CLOSING", "After a period's closing only the next period can begin.")
    yield from HANDLERS[type(body)](run, place, body)


def _contract_again(_run: Run, place: Place, _body: ContractSigned) -> Faults:
    yield place.fault("CONTRACT_TWICE", "A signed contract stands only at the beginning of its log.")


HANDLERS: dict[type[Body], Callable[[Run, Place, Any], Faults]] = {
    ContractSigned: _contract_again,
    ValidationDeposited: replay_rounds.validation_deposited,
    RoundOpened: replay_rounds.round_opened,
    UpdateDecided: replay_rounds.update_decided,
    UpdateRefused: replay_rounds.update_refused,
    ReplyMissed: replay_rounds.reply_missed,
    MeasurementTaken: replay_rounds.measurement_taken,
    BaselinesScored: replay_close.baselines_scored,
    RoundAggregated: replay_rounds.round_aggregated,
    RoundAbandoned: replay_rounds.round_abandoned,
    RoundDiscarded: replay_rounds.round_discarded,
    ScoresCommitted: replay_close.scores_committed,
    ParticipantExcluded: replay_defences.participant_excluded,
    ParticipantReadmitted: replay_defences.participant_readmitted,
    UnionDeclared: replay_defences.union_declared,
    UnionConfirmed: replay_defences.union_confirmed,
    UnionWithdrawn: replay_defences.union_withdrawn,
    ReviewOpened: replay_defences.review_opened,
    StatementTaken: replay_defences.statement_taken,
    FindingsOpened: replay_defences.findings_opened,
    NoticeTaken: replay_leaving.notice_taken,
    KeyRevoked: replay_leaving.key_revoked,
    DestructionStated: replay_leaving.destruction_stated,
    RunCompleted: replay_close.run_completed,
    ScoresOpened: replay_close.scores_opened,
    MomentsOpened: replay_close.moments_opened,
    RevenueRecorded: replay_close.revenue_recorded,
    PeriodSettled: replay_close.period_settled,
    PeriodClosing: replay_close.period_closing,
}
