"""The entries after a round is aggregated: commitments and their openings, revenue, settlement, closing.

Each function yields what is wrong with its entry and then takes it into the state.
"""

from fedpact_contract.contribution import admitted_in, check_correct, check_draws, has_first_order, players_of
from fedpact_contract.errors import FaultError, FedpactError
from fedpact_contract.log import (
    BaselinesScored,
    Moments,
    MomentsOpened,
    PeriodClosing,
    PeriodSettled,
    RevenueRecorded,
    RoundScores,
    RunCompleted,
    ScoresCommitted,
    ScoresOpened,
    commitment,
)
from fedpact_contract.output import counted
from fedpact_contract.parties import Place
from fedpact_contract.replay_defences import all_founded, findings_committed, reviewed
from fedpact_contract.replay_state import Faults, Period, Run
from fedpact_contract.settlement import PeriodResult, settle_period, settle_unopened
from fedpact_contract.unions import among


def scores_committed(run: Run, place: Place, body: ScoresCommitted) -> Faults:
    """The round is aggregated, and committed to once."""
    if body.round not in run.aggregated:
        yield place.fault("SCORES_ROUND", f"Round {body.round} is not aggregated.", field="round")
    elif body.round in run.committed:
        message = f"The scores of round {body.round} are committed to already."
        yield place.fault("SCORES_COMMITTED_TWICE", message, field="round")
    run.committed.setdefault(body.round, body.commitment)
    yield from findings_committed(run, place, body)


def baselines_scored(run: Run, place: Place, body: BaselinesScored) -> Faults:
    """The operator states, at the end of the run, what each baseline in the log is worth; every slice has its loss."""
    contract, operator = run.parties.contract, run.parties.contract.operator.name
    if run.completed or run.baselines is not None:
        yield place.fault("BASELINES_TIME", "Baselines are scored once, before the run is completed.", party=operator)
    due = sorted(participant for participant, kind in run.measured if kind == "baseline")
    if [line.participant for line in body.lines] != due:
        message = "The baselines scored are not those that the log has, in the order of ids."
        yield place.fault("BASELINES_LINES", message, field="lines", party=operator)
    slices = len(contract.contribution.validation.slices)
    if any(len(line.losses) != slices for line in body.lines):
        yield place.fault(
            "BASELINES_LINES", "A baseline has not one loss for each slice.", field="lines", party=operator
        )
    for line in body.lines:
        try:
            check_correct(line.correct, line.pairs, contract, "lines")
        except FaultError as err:
            yield place.fault(err.code, err.message, field="lines", party=operator)
    run.baselines = body


def run_completed(run: Run, place: Place, body: RunCompleted) -> Faults:
    """No round is open, every aggregated round is committed to, the delivered model is the last one."""
    if run.completed:
        yield place.fault("RUN_COMPLETED_TWICE", "The run was completed before.")
    if run.open_round:
        yield place.fault("ROUND_NOT_CLOSED", f"Round {run.open_round.number} is still open.", field="rounds")
    operator = run.parties.contract.operator.name
    if run.baselines is None and run.parties.contract.baseline is not None:
        message = "The run ended without a word on the baselines."
        yield place.fault("BASELINES_MISSING", message, party=operator)
    if body.commitment is None:
        message = "The run ended without a commitment to its scores."
        yield place.fault("SCORES_NOT_COMMITTED", message, field="commitment", party=operator)
    elif missing := sorted(run.aggregated.keys() - run.committed.keys()):
        message = f"The scores of round {missing[0]} are not committed to."
        yield place.fault("SCORES_NOT_COMMITTED", message, field="rounds", party=operator)
    if body.rounds != len(run.aggregated):
        message = f"The run is said to have {counted(body.rounds, 'round')}; aggregated: {len(run.aggregated)}."
        yield place.fault("RUN_ROUNDS", message, field="rounds")
    if body.model_digest != run.model_digest:
        message = "The delivered model is not the one that the last round led to."
        yield place.fault("MODEL_DELIVERED", message, field="model_digest")
    run.completed = body


def scores_opened(run: Run, place: Place, body: ScoresOpened) -> Faults:
    """The opened scores are those committed to, of the admitted players, and continue the round before."""
    yield from _after_completion(run, place)
    number, scores = body.round, body.scores
    if number in run.scores:
        yield place.fault("SCORES_OPENED_TWICE", f"The scores of round {number} are opened already.", field="round")
    promised = run.committed.get(number)
    if promised is None:
        yield place.fault("SCORES_ROUND", f"Nothing was committed to for round {number}.", field="round")
    elif commitment(RoundScores, bytes.fromhex(body.salt), scores) != promised:
        message = f"The scores of round {number} are not those that were committed to."
        party = run.parties.contract.operator.name
        yield place.fault("SCORES_COMMITMENT", message, field="scores", party=party)
    if scores.round != number:
        yield place.fault("SCORES_ROUND", f"The scores are of round {scores.round}.", field="scores.round")
    digests, unions = next(((list(r.digests.values()), r.unions) for r in run.rounds if r.number == number), ([], ()))
    contract = run.parties.contract
    if has_first_order(contract) != (scores.first_order is not None):
        message = "First-order values stand beside the scores where the round's rule is a mean, else not."
        yield place.fault("SCORES_FIRST_ORDER", message, field="scores.first_order", party=contract.operator.name)
    if number in run.aggregated:
        so_far = [names for k, names in sorted(run.aggregated.items()) if k <= number]
        if scores.players != players_of(run.parties.contract, so_far):
            message = "The players are not those whose updates moved the model."
            yield place.fault("SCORES_PLAYERS", message, field="scores.players")
        if admitted_in(scores) != run.aggregated[number]:
            message = "Others are named as admitted than the log admitted in this round."
            yield place.fault("SCORES_PLAYERS", message, field="scores.admitted")
        if (scores.unions or ()) != among(scores.players, unions):
            message = "The unions are not those that were confirmed before the round."
            yield place.fault("SCORES_UNIONS", message, field="scores.unions")
    if scores.sampling is not None and digests:
        try:
            check_draws(scores, run.parties.contract, digests)
        except FedpactError as err:
            yield place.within(err, field="scores")
    run.scores.setdefault(number, scores)
    yield from _scores_chain(run, place, number)


def _scores_chain(run: Run, place: Place, number: int) -> Faults:
    """A round begins where the one before it ended: the same losses, the same count of right answers."""
    before, after = run.scores.get(number - 1), run.scores[number]
    if before is None or not before.losses or not after.losses:
        return
    if before.losses[-1] != after.losses[0]:
        message = f"Round {number} begins at other losses than round {number - 1} ended with."
        yield place.fault("SCORES_CHAIN", message, field="scores.losses.0")
    if before.correct and after.correct and before.correct[1] != after.correct[0]:
        message = f"Round {number} begins with another count of right answers than round {number - 1} ended with."
        yield place.fault("SCORES_CHAIN", message, field="scores.correct.0")
    if before.pairs != after.pairs:
        message = f"Round {number} counts other pairs of rows than round {number - 1} did."
        yield place.fault("SCORES_CHAIN", message, field="scores.pairs")


def moments_opened(run: Run, place: Place, body: MomentsOpened) -> Faults:
    """The opened second moments are those committed to."""
    yield from _after_completion(run, place)
    if run.moments is not None:
        yield place.fault("MOMENTS_OPENED_TWICE", "The second moments are opened already.")
    if run.completed and commitment(Moments, bytes.fromhex(body.salt), body.moments) != run.completed.commitment:
        message = "The second moments are not those that were committed to."
        party = run.parties.contract.operator.name
        yield place.fault("MOMENTS_COMMITMENT", message, field="moments", party=party)
    run.moments = run.moments or body.moments


def _after_completion(run: Run, place: Place) -> Faults:
    if run.completed is None:
        yield place.fault("OPENED_EARLY", "Scores are opened before the run is completed.")


def revenue_recorded(run: Run, place: Place, body: RevenueRecorded) -> Faults:
    """A period begins after the run and after the period before it."""
    if run.completed is None:
        yield place.fault("REVENUE_EARLY", "Revenue is recorded before the run is completed.")
    if run.periods and not run.closed:
        message = f"Period {run.periods[-1].revenue.period} is not closed yet."
        yield place.fault("PERIOD_NOT_CLOSED", message, field="period")
    if body.period != len(run.periods) + 1:
        message = f"Period {body.period} begins where period {len(run.periods) + 1} is due."
        yield place.fault("PERIOD_ORDER", message, field="period")
    run.periods.append(Period(revenue=body))


def period_settled(run: Run, place: Place, body: PeriodSettled) -> Faults:
    """Everything is opened, and every fen is recomputed."""
    period = run.periods[-1] if run.periods else None
    if period is None or period.revenue.period != body.period:
        message = f"No revenue is recorded for period {body.period}."
        yield place.fault("REVENUE_MISSING", message, field="period")
        return
    if period.settled:
        yield place.fault("PERIOD_SETTLED_TWICE", f"Period {body.period} is settled already.", field="period")
        return
    period.settled = body
    if body.basis == "fallback" and not run.scores and run.moments is None:
        yield from _settled_unopened(run, place, body, period)
        return
    yield from all_founded(run, place)
    unopened = sorted(run.aggregated.keys() - run.scores.keys())
    for number in unopened:
        message = f"The period is settled and the scores of round {number} are not opened."
        yield place.fault("SCORES_NOT_OPENED", message, party=run.parties.contract.operator.name)
    if run.moments is None:
        message = "The period is settled and the second moments are not opened."
        yield place.fault("MOMENTS_NOT_OPENED", message, party=run.parties.contract.operator.name)
    if unopened or run.moments is None:
        return
    rounds, revenue = [run.scores[n] for n in sorted(run.scores)], period.revenue
    try:
        period.result = settle_period(run.parties.contract, rounds, run.moments, revenue.revenue_fen, revenue.fees_fen)
    except FedpactError as err:
        yield place.within(err)
        return
    yield from reviewed(run, place, period.result.shares)
    yield from _settlement(run, place, body, period.result)


def _settled_unopened(run: Run, place: Place, body: PeriodSettled, period: Period) -> Faults:
    """Nothing was opened: the operator's fault. The fallback's fen are recomputed, and nobody's agent signs them."""
    run.unopened = True
    message = "The period is settled, and the operator opened none of the scores that it had committed to."
    operator = run.parties.contract.operator.name
    yield place.fault("SCORES_NOT_OPENED", message, party=operator, rule="what was committed to is opened")
    admitted = [run.aggregated[number] for number in sorted(run.aggregated)]
    unions = [round_.unions for round_ in run.rounds if round_.number in run.aggregated]
    revenue, contract = period.revenue, run.parties.contract
    try:
        period.result = settle_unopened(contract, admitted, revenue.revenue_fen, revenue.fees_fen, unions)
    except FedpactError as err:
        yield place.within(err)
        return
    yield from _settlement(run, place, body, period.result)


def _settlement(run: Run, place: Place, body: PeriodSettled, result: PeriodResult) -> Faults:
    """Every fen, recomputed."""
    operator = run.parties.contract.operator.name
    if body.pool_fen != result.pool_fen:
        message = f"The pool is said to be {body.pool_fen} fen and is {result.pool_fen}."
        yield place.fault("SETTLEMENT_POOL", message, field="pool_fen", party=operator)
    if body.basis != result.basis:
        message = f"The basis is said to be {body.basis} and is {result.basis}."
        yield place.fault("SETTLEMENT_BASIS", message, field="basis", party=operator)
    if [line.participant for line in body.lines] != [line.participant for line in result.lines]:
        message = "The lines are not one for each participant, in the order of ids."
        yield place.fault("SETTLEMENT_LINES", message, field="lines", party=operator)
        return
    for number, (line, due) in enumerate(zip(body.lines, result.lines, strict=True)):
        if line.fen != due.fen:
            name = run.parties.name(line.participant)
            message = f"{name} is paid {line.fen} fen; recomputed from the scores it is {due.fen}."
            yield place.fault("SETTLEMENT_FEN", message, field=f"lines.{number}.fen", party=name)


def period_closing(run: Run, place: Place, body: PeriodClosing) -> Faults:
    """The period is settled, and a checkpoint stands right after this entry."""
    period = run.periods[-1] if run.periods else None
    if period is None or period.revenue.period != body.period or period.settled is None:
        yield place.fault("CLOSING_EARLY", f"Period {body.period} is not settled.", field="period")
        return
    if period.closing_index is None:
        period.closing_index = place.index
    if run.checkpoints is not None and place.index + 1 not in run.checkpoints:
        message = "No checkpoint stands right after the closing entry: there is nothing to countersign."
        yield place.fault("CLOSING_CHECKPOINT", message, party=run.parties.contract.operator.name)
