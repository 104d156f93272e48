"""`fedpact-agent quote`: what joining a contract would cost this enterprise, and what it might bring. No promise.

From the data set's card, the budget ledger and the contract alone: no row is read and nothing leaves. Epsilon is exact,
bytes are counted from records of the same form, hours and shares are estimates whose assumptions stand beside them.
"""

import base64
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpact_client.config import AgentConfig
from fedpact_client.home import AgentHome
from fedpact_client.review import limits, price
from fedpact_client.store import Store
from fedpact_client.views import epsilon_text, share_text
from fedpact_contract.arrays import salt_bytes
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.clauses.clause import Both
from fedpact_contract.contract import Contract, Delegation, MeasurementKind, Participant
from fedpact_contract.errors import InputError
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.language import Lang
from fedpact_contract.log import Countersignature
from fedpact_contract.messages import Head, Measurement, Metering, Reply, Update, measurement_event, update_event
from fedpact_contract.record import decimal_text, ratio_text, sign
from fedpact_contract.settlement import largest_remainder, split_pool
from fedpact_contract.shares import Parts, everybody, fallback_shares, projected
from fedpact_contract.statistics import total_cells

if TYPE_CHECKING:
    from fedpact_client.cli import Desk

NO_PROMISE = Both(
    "This is an estimate and no promise: nobody owes what it says. Epsilon and bytes follow from the contract; hours "
    "and shares rest on the assumptions named.",
    "本报价仅为估算，不构成承诺，任何一方均不因此负有义务。epsilon与字节数由合约得出；时间与份额取决于所列假设。",
)
LABEL_NOISE = (0.0, 0.5)
MIN_DRAWS, MAX_DRAWS = 3, 20
ROUND_SECONDS = 2.0
"""Assumed of each round beside training and transfer: waiting for the order, checks, ledgers, the operator's work."""

MIN_ID, MAX_MBIT = 4, 1_000_000
"""Characters that name a contract, as in `views.resolve_id`."""

_NOT_COUNTED = Both(
    "TLS and HTTP headers, questions whether there is news, replies sent again after a lost link",
    "TLS与HTTP头部、询问有无新消息的请求、断线后重发的答复",
)
_ZERO = Fraction(0)
_HASH = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one run would pay this enterprise; `fen` where a pool is given; `reason` as `shares.Reason`."""

    share: Fraction
    fen: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Simulated runs, by the part of this enterprise's labels that is wrong; `why_not` where there are none."""

    by_label_noise: Mapping[float, Sequence[Share]]
    why_not: str = ""


def from_file(path: Path) -> Contract:
    """The contract in a file or in evidence; a signature on it that does not hold is a fault.

    Raises:
        InputError, FaultError: as `read_contract`.
    """
    from fedpact_contract.contract_file import read_contract

    return read_contract(path)[0]


def here_or_offered(at: "Desk", text: str) -> Contract:
    """The contract of this id, or its beginning: one that was signed here, without a question; else one offered.

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_AMBIGUOUS.
        FaultError, ServiceError: as `fetch_offer`.
    """
    from fedpact_client.signing import fetch_offer

    beginning = text.strip().lower()
    here = [a for a in at.store.contracts() if len(beginning) >= MIN_ID and a.contract_id.startswith(beginning)]
    if len(here) == 1:
        return here[0].contract
    with at.client() as client:
        return fetch_offer(client, at.resolve(text, client)).contract


def transfer_rate(text: str) -> Decimal:
    """Mbit/s.

    Raises:
        InputError: QUOTE_RATE.
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal(0)
    if not (value.is_finite() and 0 < value <= MAX_MBIT):
        raise InputError(
            "QUOTE_RATE",
            f"{text[:40]} is no transfer rate.",
            field="--mbit",
            rule=f"above 0, at most {MAX_MBIT}",
            remedy="Give Mbit/s, such as 10.",
        )
    return value


def quote(
    home: AgentHome,
    config: AgentConfig,
    store: Store,
    contract: Contract,
    participant: str,
    *,
    seconds: int,
    mbit: Decimal,
    pool_fen: int | None,
    lang: Lang = "en",
) -> dict[str, Any]:
    """The whole quote as plain values: quantities are decimal strings, bytes and fen integers.

    Args:
        home: The agent's; faults of agent.toml name it.
        config: The agent's settings: its data sets, and how many threads training may use.
        store: The agent's ledgers; only read.
        contract: A contract that names this enterprise.
        participant: Its id.
        seconds: How long the simulation may take; 0: none.
        mbit: Assumed transfer rate, Mbit/s.
        pool_fen: What would be shared, if somebody says it.
        lang: The language of what is said in sentences.

    Raises:
        InputError: CONTRACT_NOT_A_PARTY; CONFIG_DATA_SET, CARD_BUDGET, CARD_DELTA, PRIVACY_RANGE.
        RefusedError: BUDGET_PLAN_EXCEEDED, one attempt alone has no bound.
    """
    me, threads = contract.participant(participant), config.limits.threads
    privacy, moved = privacy_cost(home, config, store, contract, participant), traffic(contract, me, lang)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is loaded, below

    from fedpact_client.simulation import seconds_a_step
    from fedpact_models.dp import SystemNoise

    step = seconds_a_step(contract, participant, SystemNoise())
    return {
        "contract": contract.id,
        "title": contract.title,
        "participant": participant,
        "data_set": me.data_set,
        "no_promise": NO_PROMISE.of(lang),
        "privacy": privacy,
        "bytes": moved,
        "time": duration(contract, me, step, moved["in"]["total"] + moved["out"]["total"], mbit, threads, lang),
        "share": plausible_share(
            contract, me, simulate(contract, participant, seconds, pool_fen, lang), pool_fen, lang
        ),
    }


def privacy_cost(
    home: AgentHome, config: AgentConfig, store: Store, contract: Contract, participant: str
) -> dict[str, Any]:
    """What the plan costs the data set, and what would be left of its budget; `fits` is the check of `sign`.

    Raises:
        InputError, RefusedError: as `quote`.
    """
    from fedpact_contract.privacy import entity_guarantee, epsilon_gate, epsilon_pld, plan_groups

    _, found, budget = price(home, config, store, contract, participant)
    if found is None:
        assert budget.error is not None  # noqa: S101 - why there is no cost
        raise budget.error
    declared = limits(home, config, store, contract.participant(participant).data_set)
    entity = contract.privacy.entity
    protected = None if entity is None else entity_guarantee(contract, contract.planned_steps)
    return {
        "trust_model": contract.privacy.trust_model,
        "delta": decimal_text(contract.privacy.delta),
        "epsilon": epsilon_text(found.epsilon),
        "epsilon_pld": epsilon_text(epsilon_pld(plan_groups(contract), contract.privacy.delta)),
        "attempts": found.attempts,
        "entity": None
        if entity is None or protected is None
        else {
            "max_rows": entity.max_rows,
            "epsilon": epsilon_text(protected[0]),
            "delta": decimal_text(protected[1]),
        },
        "alpha": decimal_text(found.alpha),
        "limit": decimal_text(found.limit),
        "before": decimal_text(found.before),
        "after": decimal_text(found.after),
        "left": decimal_text(max(Decimal(0), found.limit - found.after)),
        "sum_of_limit": share_text(found.after, found.limit),
        "epsilon_gate": epsilon_text(epsilon_gate(found.after, declared.delta, found.alpha)),
        "data_set_delta": decimal_text(declared.delta),
        "fits": budget.error is None,
    }


def traffic(contract: Contract, me: Participant, lang: Lang = "en") -> dict[str, Any]:
    """Bytes of messages each way over the whole run, as the egress ledger counts what leaves (without TLS and HTTP).

    What leaves is counted from records like those that will: to a few digits. Models are exact; the operator's words
    around them, and the evidence that is read at the close, grow with the log and are estimated.
    """
    from fedpact_models.registry import parameter_count

    rounds, size = contract.training.rounds, parameter_count(contract.model, contract.data)
    update = _reply_bytes(contract, me) + 4 * size + salt_bytes(contract)
    measured = {kind: _measurement_bytes(contract, me, kind, size) for kind in contract.measurements}
    baseline = 8 * size * 4 // 3 if "baseline" in measured else 0  # base64 in JSON
    orders, evidence, offer = _order_bytes(contract), _evidence_bytes(contract), len(contract.to_bytes())
    signing, closing = _signature_bytes(contract, me), _countersignature_bytes(me)
    return {
        "parameters": size,
        "per_round": {"in": 8 * size + orders // rounds, "out": update},
        "in": {
            "models": 8 * size * rounds,
            "orders_about": orders,
            "contract": offer,
            "initial_model": baseline,
            "evidence_about": evidence,
            "total": 8 * size * rounds + orders + offer + baseline + evidence,
        },
        "out": {
            "updates": update * rounds,
            "measurements": measured,
            "signature": signing,
            "countersignature": closing,
            "total": update * rounds + sum(measured.values()) + signing + closing,
        },
        "not_counted": _NOT_COUNTED.of(lang),
    }


def duration(
    contract: Contract,
    me: Participant,
    step_seconds: float,
    moved: int,
    mbit: Decimal,
    threads: int,
    lang: Lang = "en",
) -> dict[str, Any]:
    """How long training, transfer and the whole run may take, with what is assumed."""
    training, most = contract.training, max(p.num_examples for p in contract.participants)
    steps = training.rounds * training.local_steps + (0 if contract.baseline is None else contract.baseline.steps)
    spare = contract.privacy.spare_attempts * training.local_steps
    slowest = step_seconds * max(1.0, most / me.num_examples)
    transfer = moved * 8 / (float(mbit) * 1e6)
    run = training.rounds * (training.local_steps * slowest + ROUND_SECONDS) + transfer
    return {
        "step_seconds": _seconds(step_seconds, 4),
        "steps": steps,
        "training_seconds": _seconds(steps * step_seconds),
        "spare_attempts_seconds": _seconds(spare * step_seconds),
        "transfer_seconds": _seconds(transfer),
        "run_seconds": _seconds(run),
        "longest_rounds_seconds": training.rounds * contract.participation.deadline_seconds,
        "close_days": contract.settlement.close_days,
        "assumptions": [
            said.of(lang)
            for said in (
                Both(
                    f"a step was timed on made-up rows on this machine, in {threads} of its threads "
                    "(`limits.threads`) and beside whatever else runs on it",
                    f"单步时间在本机以虚构数据测得，使用{threads}个线程（`limits.threads`），并受本机其他负载影响",
                ),
                Both(
                    f"the others' machines are like this one; a round waits for the largest data set ({most} rows)",
                    f"其他各方的机器与本机相当；每轮须等待最大的数据集（{most}行）",
                ),
                Both(
                    f"{mbit} Mbit/s each way, one way after the other, and {ROUND_SECONDS:g} s a round for "
                    "everything else",
                    f"上下行各{mbit} Mbit/s，先后进行；每轮其他事项{ROUND_SECONDS:g}秒",
                ),
                Both(
                    "no participant is away; a round ends at its deadline at the latest",
                    "各参与方均在线；每轮最迟于截止时间结束",
                ),
            )
        ],
    }


def simulate(contract: Contract, participant: str, seconds: int, pool_fen: int | None, lang: Lang = "en") -> Simulated:
    """Runs of the contract on made-up, like data, in so many seconds; none where no share depends on them.

    Each draw is run with this enterprise's labels right and half wrong; a pair that time cuts off does not count.
    """
    if contract.settlement.contribution_weight == 0:
        return Simulated(
            by_label_noise={}, why_not=Both("nothing is paid by contribution", "本合约不按贡献付款").of(lang)
        )
    if seconds == 0:
        return Simulated(by_label_noise={}, why_not=Both("no simulation was asked for", "未要求模拟").of(lang))

    import numpy as np

    from fedpact_client.simulation import simulated_run, too_large
    from fedpact_models.dp import SystemNoise

    if too_large(contract):
        many = Both("the participants' rows are too many to be made up here", "参与方的行数过多，无法在本机虚构")
        return Simulated(by_label_noise={}, why_not=many.of(lang))
    until, noise = time.monotonic() + seconds, SystemNoise()
    found: dict[float, list[Share]] = {part: [] for part in LABEL_NOISE}

    def in_time() -> bool:
        return time.monotonic() < until

    while len(found[LABEL_NOISE[0]]) < MAX_DRAWS and in_time():
        pair = []
        for part in LABEL_NOISE:
            draw = simulated_run(contract, participant, part, noise=noise, rng=np.random.default_rng(), in_time=in_time)
            if draw is None:
                break
            reason, parts = projected(contract, draw.values, draw.total, draw.variance)
            pair.append(_share(contract, participant, parts, reason, pool_fen))
        if len(pair) == len(LABEL_NOISE):
            for part, share in zip(LABEL_NOISE, pair, strict=True):
                found[part].append(share)
    if len(found[LABEL_NOISE[0]]) < MIN_DRAWS:
        why = Both(
            f"{MIN_DRAWS} simulated runs did not fit into {seconds} s; --seconds gives them more",
            f"{seconds}秒内未能完成{MIN_DRAWS}次模拟；可用--seconds延长",
        )
        return Simulated(by_label_noise={}, why_not=why.of(lang))
    return Simulated(by_label_noise=found)


def plausible_share(
    contract: Contract, me: Participant, simulated: Simulated, pool_fen: int | None, lang: Lang = "en"
) -> dict[str, Any]:
    """This enterprise's share of the pool: its exact parts, and the range of the part that contribution decides.

    Everybody is taken to be admitted in every round.
    """
    settlement = contract.settlement
    counts = {i: Fraction(p.num_examples) for i, p in contract.by_id().items()}
    _, by_rows = projected(contract, counts, Fraction(1), _ZERO)  # as if contribution went by rows
    own, fallback = by_rows[me.id], fallback_shares(contract)[me.id]
    return {
        "weights": {
            "contribution": decimal_text(settlement.contribution_weight),
            "data": decimal_text(settlement.data_weight),
            "equal": decimal_text(settlement.equal_weight),
        },
        "exact_parts": {"data": ratio_text(own.data, 9), "equal": ratio_text(own.equal, 9)},
        "contribution_by_rows": ratio_text(own.contribution, 9),
        "share_by_rows": _money(_share(contract, me.id, by_rows, "", pool_fen)),
        "simulated": None if simulated.why_not else _ranges(simulated, contract, lang),
        "not_simulated": simulated.why_not or None,
        "bounds": {
            "low": ratio_text(own.data + own.equal, 9),
            "high": ratio_text(own.data + own.equal + Fraction(settlement.contribution_weight), 9),
        },
        "fallback": {"rule": settlement.fallback, "share": ratio_text(fallback, 9)},
        "floor_fen": me.floor_fen,
        "pool_fen": pool_fen,
        "reasons": [reason.of(lang) for reason in _reasons(contract)],
    }


def _ranges(simulated: Simulated, contract: Contract, lang: Lang) -> dict[str, Any]:
    model = Both(
        "what parties with like data would get, on a made-up task, with the contract's rows, noise and rounds",
        "在虚构任务上，以合约的行数、噪声与轮数，数据同质的各方会得到的份额",
    )
    if contract.contribution.game == "re-normalised":
        model += Both(
            "; values of the re-normalised game are estimated from sixteen orders of arrival a round",
            "；重新归一化博弈的价值按每轮十六种到达次序估算",
        )
    return {
        "model": model.of(lang),
        "draws": len(simulated.by_label_noise[LABEL_NOISE[0]]),
        "by_own_label_noise": [
            {
                "label_noise": f"{part:g}",
                "low": _money(min(found, key=lambda s: s.share)),
                "mean": ratio_text(sum((s.share for s in found), _ZERO) / len(found), 9),
                "high": _money(max(found, key=lambda s: s.share)),
                "fallback_draws": sum(s.reason == "not-reliable" for s in found),
            }
            for part, found in simulated.by_label_noise.items()
        ],
        "range": Both("lowest and highest draw", "最低与最高一次").of(lang),
    }


def _reasons(contract: Contract) -> list[Both]:
    weights = contract.settlement
    found = [
        Both(
            "everybody is taken to be admitted in every round; a round missed takes its part of data and equality",
            "假定各方每轮均被采纳；缺席一轮即失去该轮的数据部分与均等部分",
        )
    ]
    if weights.contribution_weight > 0:
        measured = Both(
            "contribution is measured by what an update does to the loss on the operator's validation rows: ",
            "贡献按更新对运营方验证集损失的影响计量：",
        )
        if contract.contribution.game == "re-normalised":
            found += [
                measured
                + Both(
                    'game "re-normalised", in which the rule that combines updates is applied to every group alone: '
                    "it goes by what an update is worth beside the others', the noise in it included, and not by the "
                    "part of all rows",
                    "采用重新归一化博弈，聚合规则分别适用于每个组合：取决于更新（含其噪声）相对其他更新的价值，而非行数占比",
                ),
                Both(
                    "who adds nothing to the others' updates has a negative value there, and is paid nothing for it",
                    "未能增益其他更新者，其价值为负，不因此获得付款",
                ),
            ]
        else:
            found.append(
                measured
                + Both(
                    "where data are alike, by the part of all rows; noise for privacy spreads it, the more the fewer "
                    "rows there are",
                    "数据同质时取决于行数占比；隐私噪声使其离散，行数越少越离散",
                )
            )
        found += [
            Both(
                "unlike data, a task harder than the made-up one, or labels of others that are wrong move it either "
                "way, within the bounds",
                "数据不同质、任务难于虚构任务或他方标签有误，会使其在上下限内向任一方向变动",
            ),
            Both(
                f'where no share is reliable the contract\'s fallback pays, "{weights.fallback}"',
                f"无可靠份额时，按合约的替代规则“{weights.fallback}”付款",
            ),
        ]
    if any(p.floor_fen for p in contract.participants):
        found.append(
            Both(
                "floors of the contract move money between participants after the shares",
                "合约的保底金额在份额之后于参与方之间调整款项",
            )
        )
    if contract.common_control:
        found.append(
            Both(
                "participants that the contract names as under common control have one equal part and one floor",
                "合约列明受同一控制的参与方合计只有一份均等份额和一份保底",
            )
        )
    return found


def _share(
    contract: Contract, participant: str, parts: Mapping[str, Parts], reason: str, pool_fen: int | None
) -> Share:
    """A share by its parts, and in fen by the contract's floors and rounding."""
    weights, fen = {i: part.total for i, part in parts.items()}, None
    if pool_fen is not None:
        fen = largest_remainder(pool_fen, split_pool(contract, pool_fen, weights, everybody(contract)).exact)[
            participant
        ]
    return Share(share=weights[participant], fen=fen, reason=reason)


def _money(share: Share) -> dict[str, Any]:
    return {"share": ratio_text(share.share, 9)} | ({} if share.fen is None else {"fen": share.fen})


def _seconds(value: float, places: int = 1) -> str:
    return f"{value:.{places}f}"


# Sizes of messages, from records of their form


def _reply_bytes(contract: Contract, me: Participant) -> int:
    key, head = generate_key(), Head(size=_log_size(contract), root=_HASH)
    update = Update(
        contract_id=_HASH,
        round=contract.training.rounds,
        attempt=1,
        participant=me.id,
        base_digest=_HASH,
        update_digest=_HASH,
        num_examples=me.num_examples,
        privacy_event=update_event(contract),
        noise="csprng",
        metering=Metering(rows=me.num_examples, steps=contract.training.local_steps),
        ledger_head=_HASH,
        head=head,
    )
    signed = Countersignature(origin=_HASH, size=head.size, root=_HASH, participant=me.id)
    return len(Reply(update=sign(update, key), countersignature=sign(signed, key)).to_bytes())


def _measurement_bytes(contract: Contract, me: Participant, kind: MeasurementKind, parameters: int) -> int:
    record = Measurement(
        contract_id=_HASH,
        participant=me.id,
        kind=kind,
        array_digest=_HASH,
        num_examples=me.num_examples,
        privacy_event=measurement_event(contract, kind),
        noise="csprng",
        ledger_head=_HASH,
    )
    array = bytes(4 * (total_cells(contract) if kind == "statistics" else parameters))
    body = {"measurement": sign(record, generate_key()).plain(), "array": base64.b64encode(array).decode()}
    return len(canonical_bytes(body))


def _signature_bytes(contract: Contract, me: Participant) -> int:
    key = generate_key()
    delegation = Delegation(contract_id=_HASH, party=me.id, run_key=public_hex(key))
    return len(canonical_bytes({"contract": sign(contract, key).plain(), "delegation": sign(delegation, key).plain()}))


def _countersignature_bytes(me: Participant) -> int:
    record = Countersignature(origin=_HASH, size=9999, root=_HASH, participant=me.id)
    return len(canonical_bytes({"countersignature": sign(record, generate_key()).plain()}))


def _order_bytes(contract: Contract) -> int:
    """All orders without their models, about: heads and proofs, the last receipt, everybody's countersignatures."""
    parties, rounds = len(contract.participants), contract.training.rounds
    return 2_700 + 90 * parties + (rounds - 1) * (6_600 + 960 * parties)


def _evidence_bytes(contract: Contract) -> int:
    """The evidence at the close, about: the contract, each round's entries, the tables that are opened."""
    parties, rounds = len(contract.participants), contract.training.rounds
    coalitions = 2 if contract.contribution.game == "unanimity" else 2**parties
    coalitions = min(coalitions, contract.contribution.max_coalitions or coalitions)
    table = coalitions * len(contract.contribution.validation.slices) * 16
    opened = 2_000 + 22 * parties**2 + 800 * parties
    return (
        len(contract.to_bytes()) * 4 // 3 + 2_000 + 900 * parties + opened + rounds * (1_850 + 2_980 * parties + table)
    )


def _log_size(contract: Contract) -> int:
    return 1 + contract.training.rounds * (4 + len(contract.participants))
