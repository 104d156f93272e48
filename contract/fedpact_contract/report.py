"""The report of a run: a pure function of its log, so that any participant reproduces it byte for byte.

Everything is plain JSON: integers in a named unit, decimals and fractions as strings. What the log does not open yet
(scores before the close) is not in the report.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, TypeVar

from fedpact_contract import measured
from fedpact_contract.contract import ClientPrivacy, Contract
from fedpact_contract.contribution import agrees_with_first_order, own_slice_difference, round_values, validation_rows
from fedpact_contract.defended import defences
from fedpact_contract.errors import FaultError
from fedpact_contract.label import dp_label
from fedpact_contract.leaving import left as who_left
from fedpact_contract.log import (
    Body,
    ContractSigned,
    Entry,
    MomentsOpened,
    PeriodSettled,
    ReplyMissed,
    RevenueRecorded,
    RoundAbandoned,
    RoundAggregated,
    RoundDiscarded,
    RoundOpened,
    RoundScores,
    RunCompleted,
    ScoresOpened,
    UpdateDecided,
    UpdateRefused,
    kept_rounds,
)
from fedpact_contract.messages import Receipt, Refusal, Update
from fedpact_contract.metric import metric_name, metric_text
from fedpact_contract.record import Envelope, decimal_text, ratio_text, read_envelope
from fedpact_contract.reevaluation import Reevaluation, compared
from fedpact_contract.reevaluation import statement as statement_of
from fedpact_contract.scorecard import NOT_SCORED, nats, value_lines, without_slices
from fedpact_contract.settlement import PeriodResult, groups, settle_period, settle_unopened, statement
from fedpact_contract.undetected import undetected, unlike_measured
from fedpact_contract.unions import by_round

VERSION = 1

NOT_STOPPED = (
    "A participant that runs altered code can skip or choose its noise.",
    "Near-copies of rows, and affiliates or common control that were not declared.",
    "A biased choice of validation rows, or rows leaked to a favourite.",
    "Revenue and fees: they are the operator's statement. So is the moment at which it ends a run early, and, "
    "until an auditor evaluates it, that a round has no loss that is a number.",
    "Side payments of the operator that are not logged, or use of a model that was declared unaccepted.",
    "Updates that somebody kept: later attacks stay within the epsilon of all releases.",
    "Resale of the model, and backdoors that the validation set does not show.",
    "An operator that stops serving.",
    "Poisoned rows, and a changed copy declared as a new data set: the card's signer answers for it.",
)
"""What nothing here stops (trust.md): said in every report and in the contract's text."""

NOT_STOPPED_ZH = (
    "运行被改动代码的参与方可以不加噪声，或自选噪声。",
    "近似重复的数据行，以及未申报的关联方或共同控制关系。",
    "有偏的验证行选取，或验证行泄露给受偏袒方。",
    "收入与费用：以运营方的陈述为准；运营方何时提前结束运行亦然；某轮损失非有限数值而作废，在审计方复评之前亦然。",
    "运营方未入账的私下付款，或使用已声明不予验收的模型。",
    "有人留存的更新：其后的攻击受全部发布的 ε 总和约束。",
    "模型转售，以及验证集上看不出的后门。",
    "运营方停止服务。",
    "被投毒的数据行，以及把改动过的副本申报为新数据集：由数据卡签署方负责。",
)
"""The same in Chinese, line by line."""

CENTRAL_NOT_STOPPED = (
    "The operator: it sees each update without noise, and nothing bounds what it learns from them of rows.",
    "An operator that adds less noise, or none: that it did is its own signed word.",
)
"""The same at client level, in place of the first line: there the noise is not the participants'."""

CENTRAL_NOT_STOPPED_ZH = (
    "运营方：它看到每个未加噪声的更新，其由此获知数据行的程度不受任何限制。",
    "少加或不加噪声的运营方：是否已加噪声，仅有其自己的签名陈述。",
)
"""The same in Chinese, line by line."""

B = TypeVar("B", bound=Body)


def not_stopped(contract: Contract) -> tuple[str, ...]:
    """What nothing stops under this contract."""
    if isinstance(contract.privacy, ClientPrivacy):
        return CENTRAL_NOT_STOPPED + NOT_STOPPED[1:]
    return NOT_STOPPED


def not_stopped_zh(*, central: bool) -> tuple[str, ...]:
    """The same in Chinese, of contracts at client level (`central`) or at record level."""
    return CENTRAL_NOT_STOPPED_ZH + NOT_STOPPED_ZH[1:] if central else NOT_STOPPED_ZH


def build(entries: Sequence[Entry], reevaluation: Reevaluation | None = None) -> dict[str, Any]:
    """The report of a log.

    Args:
        entries: The log's entries in order; the first is the signed contract.
        reevaluation: An auditor's, as `reevaluation.read` took it for this log.

    Raises:
        FaultError: the log is empty or an entry is malformed.
    """
    bodies = [entry.open() for entry in entries]
    if not bodies or not isinstance(bodies[0], ContractSigned):
        raise FaultError("REPORT_NO_CONTRACT", "The log does not begin with a signed contract.")
    contract = Contract.from_bytes(bodies[0].signed.contract.body)
    steps = charged_steps(bodies, contract)
    label = dp_label(contract, steps)
    completed = _only(bodies, RunCompleted)
    report: dict[str, Any] = {
        "version": VERSION,
        "contract_id": contract.id,
        "title": contract.title,
        "purpose": contract.purpose,
        "operator": {
            "id": contract.operator.id,
            "name": contract.operator.name,
            "entity_code": contract.operator.entity_code,
        },
        "term": contract.term.plain(),
        "close_days": contract.settlement.close_days,
        "deadline_seconds": contract.participation.deadline_seconds,
        "state": _state(bodies, contract),
        "entries": len(entries),
        "rounds": _rounds(bodies, contract),
        "model": None if not completed else {"digest": completed[0].model_digest, "rounds": completed[0].rounds},
        "participants": _participants(contract, label, steps),
        "privacy": label,
        "game": contract.contribution.game,
        "utilities": "the operator's statement, not re-evaluated by an auditor",
        "reevaluation": None,
        "defences": defences(entries, bodies, contract),
        "not_stopped": list(not_stopped(contract)),
        "undetected": undetected(contract),
        "undetected_here": unlike_measured(contract),
        "loss": contract.contribution.loss,
        "metric": None,
        "settlement": None,
        "statistics": measured.statistics(bodies, contract),
        "baselines": measured.baselines(bodies, contract),
    }
    if reevaluation is not None and contract.auditor is not None:
        report["utilities"] = statement_of(reevaluation, contract.auditor)
        done, left = compared(reevaluation, contract, bodies)
        report["reevaluation"] = {
            "auditor": contract.auditor.name,
            "coalitions": reevaluation.coalitions,
            "sample": reevaluation.sample,
            "differing": reevaluation.differing,
            "evaluated_again": list(done),
            "not_evaluated_again": list(left),
        }
    if away := who_left(entries, bodies, contract):
        report["left"] = away
    _add_scores(report, bodies, contract)
    return report


def charged_steps(bodies: Sequence[Body], contract: Contract) -> dict[str, int]:
    """DP-SGD steps charged, as far as the log can tell: attempt k means k attempts, each charged in full.

    A refusal says how many attempts it cost. Where a round had no reply, or one of another round, nobody but the agent
    knows whether it trained, and how often: it counts as one attempt, and every spare attempt that is left counts too.
    So this is an upper bound, the whole plan at most (no agent's ledger pays for more); an agent's own ledger has the
    exact figure.

    At client level what counts are released models: those that an update of the participant's entered, exactly.
    """
    if isinstance(contract.privacy, ClientPrivacy):
        released = [party for body in _only(bodies, RoundAggregated) for party in body.admitted]
        return {party: released.count(party) for party in contract.by_id()}
    attempts, spares_used, silent = dict.fromkeys(contract.by_id(), 0), dict.fromkeys(contract.by_id(), 0), set()
    for body in bodies:
        if isinstance(body, UpdateDecided):
            update = Update.from_bytes(read_envelope(body.update).body)
            count = update.attempt
            if not update.is_of(contract.id, body.round):
                count = 1
                silent.add(body.participant)
        elif isinstance(body, UpdateRefused):
            count = Refusal.from_bytes(read_envelope(body.refusal).body).attempts
        elif isinstance(body, ReplyMissed):
            count = 1
            silent.add(body.participant)
        else:
            continue
        attempts[body.participant] += count
        spares_used[body.participant] += max(0, count - 1)
    spares = contract.privacy.spare_attempts
    for participant in silent:
        attempts[participant] += max(0, spares - spares_used[participant])
    plan = contract.training.rounds + spares
    return {p: min(count, plan) * contract.training.local_steps for p, count in attempts.items()}


def settled(bodies: Sequence[Body], contract: Contract) -> PeriodResult | None:
    """The settlement, recomputed from the opened scores (where none was opened: by the fallback); None before it."""
    revenue, moments = _only(bodies, RevenueRecorded), _only(bodies, MomentsOpened)
    scores = [body.scores for body in _only(bodies, ScoresOpened)]
    if not revenue or not _only(bodies, PeriodSettled):
        return None
    amounts = revenue[0].revenue_fen, revenue[0].fees_fen
    if not moments:
        rounds, unions = kept_rounds(bodies), by_round(bodies)
        admitted = [body.admitted for body in rounds]
        return settle_unopened(contract, admitted, *amounts, [unions[body.round] for body in rounds])
    return settle_period(contract, scores, moments[0].moments, *amounts)


def _only(bodies: Sequence[Body], kind: type[B]) -> list[B]:
    return [body for body in bodies if isinstance(body, kind)]


def _state(bodies: Sequence[Body], contract: Contract) -> str:
    if _only(bodies, PeriodSettled):
        return "settled"
    if any(isinstance(body, RoundAbandoned | RoundDiscarded) for body in bodies):
        return "stopped"
    if completed := _only(bodies, RunCompleted):
        return "completed" if completed[0].rounds == contract.training.rounds else "stopped"
    return "running" if _only(bodies, RoundOpened) else "signed"


def _rounds(bodies: Sequence[Body], contract: Contract) -> list[dict[str, Any]]:
    rounds: dict[int, dict[str, Any]] = {}
    for body in bodies:
        if isinstance(body, RoundOpened):
            rounds[body.round] = {
                "round": body.round,
                "deadline": body.deadline,
                "invited": len(body.invited),
                "outcomes": [],
                "admitted": 0,
            }
        elif isinstance(body, UpdateDecided):
            receipt = Receipt.from_bytes(_body(body.receipt))
            _outcome(rounds, body.round, body.participant, receipt.decision, receipt.code, contract)
        elif isinstance(body, UpdateRefused):
            refusal = Refusal.from_bytes(_body(body.refusal))
            _outcome(rounds, body.round, body.participant, "refused", refusal.code, contract)
        elif isinstance(body, ReplyMissed):
            _outcome(rounds, body.round, body.participant, "missed", body.code, contract)
        elif isinstance(body, RoundAggregated | RoundAbandoned):
            rounds[body.round]["admitted"] = len(body.admitted)
    return [rounds[number] for number in sorted(rounds)]


def _outcome(
    rounds: dict[int, dict[str, Any]], number: int, participant: str, kind: str, code: str, contract: Contract
) -> None:
    name = contract.participant(participant).name
    rounds[number]["outcomes"].append({"participant": participant, "name": name, "outcome": kind, "code": code})


def _body(plain: dict[str, Any]) -> bytes:
    envelope: Envelope[Any] = read_envelope(plain)
    return envelope.body


def _participants(contract: Contract, label: dict[str, Any], steps: dict[str, int]) -> list[dict[str, Any]]:
    """One line each, in the contract's order."""
    spent = {line["participant"]: line["epsilon_pld"] for line in label["participants"]}
    return [
        {
            "id": party.id,
            "name": party.name,
            "entity_code": party.entity_code,
            "sector": party.sector,
            "num_examples": party.num_examples,
            "epsilon_spent": spent[party.id],
            "epsilon_budget": decimal_text(contract.privacy.epsilon),
            "steps": steps[party.id],
        }
        for party in contract.participants
    ]


def _add_scores(report: dict[str, Any], bodies: Sequence[Body], contract: Contract) -> None:
    """Metric, contribution by round, shares and fen: what the openings show."""
    scores = [body.scores for body in _only(bodies, ScoresOpened)]
    if scores:
        _add_rounds(report, scores, contract)
    result = settled(bodies, contract)
    if result is None:
        return
    values = value_lines(scores, contract) if scores else {}
    for line in report["participants"]:
        paid = statement(result, contract, line["id"])["line"]
        line |= {key: paid[key] for key in ("rounds_admitted", "share_low", "share_high", "fen")}
        line["share"] = ratio_text(Fraction(paid["share"]), 9)
        line |= values.get(line["id"], NOT_SCORED)
    report["settlement"] = {
        "currency": contract.settlement.currency,
        "revenue_fen": result.revenue_fen,
        "fees_fen": result.fees_fen,
        "pool_fen": result.pool_fen,
        "basis": result.basis,
        "reason": result.shares.reason,
        "interval": result.shares.covers,
        "method": result.shares.method,
        "own_slice_difference": nats(own_slice_difference(scores, contract)) if scores else None,
        "without_slices": without_slices(scores, contract, result.shares) if scores else [],
        "common_control": groups(result, contract),
    }


def _add_rounds(report: dict[str, Any], scores: Sequence[RoundScores], contract: Contract) -> None:
    """Metric and values of every opened round."""
    rows = validation_rows(contract)

    def metric(score: RoundScores, end: Literal[0, 1]) -> str:
        """Before the round, or after it."""
        counted = None if score.correct is None else score.correct[end]
        return metric_text(contract, score.losses[-end], counted, score.pairs)

    report["metric"] = {
        "name": metric_name(contract),
        "initial": metric(scores[0], 0),
        "final": metric(scores[-1], 1),
        "rows": rows,
    }
    total = dict.fromkeys(contract.by_id(), Fraction(0))
    for line, score in zip(report["rounds"], scores, strict=False):
        values = round_values(score, contract)
        for party_id in total:
            total[party_id] += values[party_id]
        line["metric"] = metric(score, 1)
        line["loss_before"] = nats(Fraction(sum(score.losses[0]), rows))
        line["loss_after"] = nats(Fraction(sum(score.losses[-1]), rows))
        line["values"] = {p: nats(v) for p, v in values.items()}
        line["agrees_with_first_order"] = agrees_with_first_order(score, contract)
        line["cumulative"] = {p: nats(v) for p, v in total.items()}
