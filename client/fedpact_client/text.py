"""The agent's results as text for people. Names and texts of other parties are made visible, never obeyed."""

import itertools
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from fedpact_contract import output
from fedpact_contract.keys import show_fingerprint
from fedpact_contract.output import counted, line
from fedpact_contract.record import decimal_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedpact_client.cards import Draft
    from fedpact_client.plan import Plan
    from fedpact_client.review import Check, Cost, Review
    from fedpact_client.signing import Offer
    from fedpact_contract.clauses.clause import Both
    from fedpact_contract.language import Lang

SHOWN_ROWS = 5
SHORT = 12
FEW = 10

ENROLMENT = {
    "requested": ": the operator has still to approve it, by the fingerprint above",
    "suspended": ": the operator takes nothing more from this key; ask it why",
    "frozen": ": the invitation's token was used a second time, by other keys; call the operator and compare the "
    "fingerprint above, which it approves again where they agree",
}
"""What an enrolment's state means to its enterprise, where something is to be done."""


def say(lang: "Lang", en: str, zh: str) -> None:
    """A line in one of both languages."""
    line(zh if lang == "zh" else en)


def show_init(values: dict[str, Any]) -> None:
    """What `init` made."""
    line(f"Home: {values['home']}")
    line("Fingerprint of the contract key (this enterprise's id):")
    line(f"  {show_fingerprint(values['participant'])}")
    line("Next: describe data sets and policy in agent.toml; then, with the operator's invitation,")
    line("`fedpact-agent preflight --invitation INVITATION` and `fedpact-agent enrol INVITATION`.")


def show_enrolled(values: dict[str, Any]) -> None:
    """What `enrol` did, and the fingerprints to read out."""
    operator = values["operator"]
    line(f"Enrolled with {operator['name']} at {operator['url']}: {values['state']}.")
    line("Compare the fingerprints by telephone, on a number that you know:")
    line(f"  the operator's  {show_fingerprint(operator['id'])}")
    for certificate in operator["ca"]:
        line(f"  its authority's {show_fingerprint(certificate)}")
    line(f"  ours            {show_fingerprint(values['participant'])}")
    line("The operator approves after that call. Its fingerprint is pinned in trust.toml.")


def show_preflight(values: dict[str, Any]) -> None:
    """Each check with what it found and, where something is amiss, what to do."""
    for found in values["checks"]:
        line(f"{found['state'].upper():4}  {found['name']}: {found['detail']}")
        if remedy := found.get("remedy"):
            line(f"      -> {remedy}")
    count = values["count"]
    line(f"{count['pass']} passed, {count['warn']} to look at, {count['fail']} failed, {count['skip']} not tried.")


def show_card(draft: "Draft", lang: "Lang" = "en") -> None:
    """A card, item by item, before it is signed."""

    def columns(en: str, zh: str) -> list[str]:
        return (zh if lang == "zh" else en).split("|")

    say(lang, "This card leaves your premises, signed by the contract key:", "以下卡片将以合约密钥签名后离开本机：")
    heads = columns("item|value|where it comes from", "项目|内容|来源")
    output.table(output.console(), heads, draft.items(lang))
    for contract in draft.superseded:
        say(
            lang,
            f"Mind: contract {contract[:SHORT]} names an earlier card of this data set; the operator notices.",
            f"注意：合约{contract[:SHORT]}引用的是本数据集较早的卡片，运营方会察觉。",
        )
    say(
        lang,
        f"It stays here: {draft.source} has {counted(draft.available, 'row')} for training beside the released ones.",
        f"以下不离开本机：{draft.source}除交出的行外，有{draft.available}行可供训练。",
    )
    for remark in _remarks(draft):
        say(
            lang,
            f"Mind (computed from the data; stays here): {remark.en}.",
            f"注意（由数据算出，不离开本机）：{remark.zh}。",
        )
    if draft.capped:
        say(
            lang,
            "Rows left where a contract caps those of one entity (computed from the data; stays here):",
            "合约限制同一主体的行数时，剩余可用的行数（由数据算出，不离开本机）：",
        )
        few, enough = columns("too few|enough", "不足|足够")
        rows = [
            [str(cap), str(left), enough if left >= draft.card.num_examples else few]
            for cap, left in draft.capped.items()
        ]
        heads = columns("at most|rows left|for the examples on the card", "每主体至多|剩余行数|对卡片上的样本数而言")
        output.table(output.console(), heads, rows)
    limit, alpha = decimal_text(draft.limit), draft.card.alpha
    say(
        lang,
        f"Rényi limit of the data set over all contracts: {limit} at alpha {alpha}.",
        f"本数据集全部合约合计的Rényi上限：{limit}（alpha为{alpha}）。",
    )


def _remarks(draft: "Draft") -> "list[Both]":
    """What the enterprise may want to look into before it signs; nothing is refused for it."""
    from fedpact_contract.clauses.clause import Both

    found = []
    if draft.one_class:
        found.append(
            Both("all rows are of one class: there is nothing to tell apart", "所有行同属一个类别，没有可区分的内容")
        )
    if draft.duplicates:
        count, part = draft.duplicates, f"{draft.duplicates / draft.available:.1%}"
        what = "is an exact copy" if count == 1 else "are exact copies"
        found.append(
            Both(
                f"{counted(count, 'row')} {what} of another ({part}): a contract may allow fewer (max_duplicates)",
                f"有{count}行与另一行完全相同（{part}）：合约允许的比例可能更低（max_duplicates）",
            )
        )
    if draft.card.num_examples < FEW:
        found.append(
            Both(
                f"fewer than {FEW} examples: beside the noise so few rows teach a model next to nothing",
                f"样本少于{FEW}个：在噪声之下，这么少的行几乎教不会模型任何东西",
            )
        )
    for name, count in draft.not_finite.items():
        found.append(
            Both(
                f"column {name} has {counted(count, 'cell')} that {'is' if count == 1 else 'are'} NaN or infinite: a "
                "contract that reads it as a number is refused",
                f"列{name}有{count}个单元格为NaN或无穷大：把该列作为数值读取的合约将被拒绝",
            )
        )
    return found


def show_released(draft: "Draft", lang: "Lang" = "en") -> None:
    """The rows that would leave: their number, and the first of them."""
    names, chinese = [*draft.card.columns, draft.card.label], lang == "zh"
    said = (
        f"将原样离开本机的行：共{len(draft.rows)}行，前{SHOWN_ROWS}行如下："
        if chinese
        else f"Rows that leave your premises, as they are: {len(draft.rows)}; the first {SHOWN_ROWS}:"
    )
    line(said)
    rows = [["" if row[name] is None else str(row[name]) for name in names] for row in draft.rows[:SHOWN_ROWS]]
    output.table(output.console(), names, rows)
    line(
        "它们不受任何隐私保障，今后的训练不再使用它们。"
        if chinese
        else "They are outside every privacy guarantee, and training leaves them out from now on."
    )


def show_contracts(values: dict[str, Any]) -> None:
    """The list of contracts."""
    rows = [[c["id"], c["title"], c["state"], str(c["signed"]), c["here"] or "-"] for c in values["contracts"]]
    if not rows:
        line("The operator offers no contract.")
        return
    output.table(output.console(), ["contract", "title", "at the operator", "signatures", "here"], rows)


def review_values(review: "Review", offer: "Offer") -> dict[str, Any]:
    """A review as plain values."""
    cost = review.cost
    return {
        "contract": review.contract.id,
        "title": review.contract.title,
        "state": offer.state,
        "signed_here": review.signed_here,
        "signed": sorted(offer.signed),
        "complete": offer.complete,
        "parties": [
            {
                "id": s.party.id,
                "name": s.party.name,
                "entity_code": s.party.entity_code,
                "role": review.contract.role(s.party.id),
                "standing": s.standing,
                "signed": s.party.id in offer.signed,
            }
            for s in review.parties
        ],
        "checks": check_values(review.checks),
        "cost": None if cost is None else cost_values(cost),
        "terms": review.contract.plain(),
    }


def check_values(checks: "Sequence[Check]") -> list[dict[str, Any]]:
    """What was checked, as plain values."""
    return [
        {"name": c.name, "ok": c.error is None, **({} if c.error is None else {"error": c.error.as_dict()})}
        for c in checks
    ]


def cost_values(cost: "Cost") -> dict[str, Any]:
    """A plan's cost as plain values."""
    return {
        "epsilon": _epsilon(cost.epsilon),
        "alpha": decimal_text(cost.alpha),
        "attempts": cost.attempts,
        "before": decimal_text(cost.before),
        "after": decimal_text(cost.after),
        "limit": decimal_text(cost.limit),
    }


RESTART: dict["Lang", str] = {
    "en": "agent.toml was changed since the running agent read it: restart the agent, or it goes on by the old one.",
    "zh": "运行中的代理启动之后，agent.toml已被修改：请重新启动代理，否则仍按修改前的策略拒绝与允许。",
}


def show_signed(values: dict[str, Any], lang: "Lang") -> None:
    """That a contract is signed, and what has to be done before its first round."""
    line("已在本机签署并发送给运营方。" if lang == "zh" else "Signed here and sent to the operator.")
    if values["restart"]:
        line(RESTART[lang])


def show_status(values: dict[str, Any], lang: "Lang" = "en") -> None:
    """The agent's status; in Chinese a sentence stands under each alarm whose code has one."""
    from fedpact_contract.refusals import chinese

    operator = values["operator"]
    line(f"{values['name']} ({values['entity_code']})")
    line(f"fingerprint  {show_fingerprint(values['participant'])}")
    line(f"operator     {operator['name'] + ' at ' + str(values['url']) if operator else '-'}")
    line(f"enrolment    {values['enrolment']}{ENROLMENT.get(values['enrolment'], '')}")
    line(f"running      {'process ' + str(values['running']) if values['running'] else 'no'}")
    if values["restart"]:
        line(RESTART[lang])
    line(f"connected    {values['connected'] or 'no'}{'; ' + values['waiting'] if values['waiting'] else ''}")
    for child, found in values["isolation"].items():
        line(f"{child:<12} {'-' if found is None else found['sentence']}")
    line(f"witness      {values['witness']}")
    for data_set in values["data_sets"]:
        line(f"data set     {data_set['id']}: {'declared' if data_set['declared'] else 'no card yet'}")
    columns = ["contract", "title", "state", "data set", "updates", "rounds", "last round"]
    rows = [
        [
            c["id"][:SHORT],
            c["title"],
            "ready" if c["state"] == "running" and not c["last_round"] else c["state"],
            c["data_set"],
            str(c["updates"]),
            str(c["rounds"]),
            str(c["last_round"]),
        ]
        for c in values["contracts"]
    ]
    if rows:
        output.table(output.console(), columns, rows, right=(4, 5, 6))
    for contract in values["contracts"]:
        if silence := contract["silence"]:
            later = "it closed later" if silence["closed_since"] else "it has not closed it yet"
            line(f"SILENT {silence['at']} contract {contract['id'][:SHORT]}: the operator did not close it by")
            line(f"  {silence['due']}; {later}. Our signed record, for anybody to verify with the contract beside it:")
            line(f"  fedpact verify {silence['file']} --contract {silence['contract_file']}")
    for alarm in values["alarms"]:
        said = chinese(alarm["code"]) if lang == "zh" else None
        detail = alarm["detail"].removeprefix(f"{alarm['code']}: ")
        line(f"ALARM {alarm['at']} {alarm['code']}: {detail}" + ("" if said is None else f"\n  {said}"))


def show_questions(values: dict[str, Any]) -> None:
    """What the log asks this enterprise, in words."""
    if not values["questions"]:
        line("Nothing asks this enterprise.")
    for question in values["questions"]:
        subject = question["subject"][:SHORT]
        if question["kind"] == "union":
            line(f"UNION {subject}: the operator holds {' and '.join(question['members'])} to be one.")
            line(f"  it says why: {question['reason']}")
            line(
                "  If it confirms it, from the next round on their examples count once, and so do their parts of equal "
                f"payments and floors. It cannot before {question['until']}; a dispute it must answer in the log."
            )
        else:
            named, ratio = ", ".join(question["negative"]), float(Fraction(question["ratio"]))
            line(f"REVIEW {subject}: values of {named} are negative, together {ratio:.3f} of the total value.")
            line(f"  the operator found out: {question['text']}")
            line(
                "  No amount changes by it. The period is settled once more than half of the others have agreed. "
                "Scores are not open yet; whom it names, and the ratio, every agent recomputes at the close."
            )
        for name, answer in question["answers"].items():
            line(f"  {name}: {answer}")
        if question["answered"] is None:
            line(f"  To answer: fedpact-agent answer {values['contract'][:SHORT]} --subject {subject} --agree")
            line("  or --dispute --reason TEXT")


def show_ready(values: dict[str, Any]) -> None:
    """The agent is connected."""
    line(f"Connected to {values['url']} and serving; participant {values['participant']}. Ctrl-C ends it.")


def show_heads(values: dict[str, Any]) -> None:
    """Heads, in groups of four for the telephone."""
    for head in values["heads"]:
        line(f"contract {head['contract']}")
        line(f"  size {head['size']}, {'countersigned' if head['countersigned'] else 'not countersigned'}")
        line(f"  root {head['root_shown']}")
    if not values["heads"]:
        line("No contract was signed here yet.")


def show_withdrawn(values: dict[str, Any], lang: "Lang" = "en") -> None:
    """What each side destroyed and keeps, and what nobody can take back; kinds and reasons as the receipt has them."""
    say(lang, f"Withdrawn from the contract {values['contract']}.", f"已退出合约{values['contract']}。")
    for by, name, place in (("participant", "here", "本机"), ("operator", "at the operator", "运营方")):
        receipt = values["receipts"][by]
        if receipt is None:
            say(
                lang,
                f"  Nothing is said yet of what was destroyed {name}: the same command again asks.",
                f"  {place}尚未说明销毁了什么：再次执行同一命令即可询问。",
            )
            continue
        destroyed, kept = _held(receipt["destroyed"]), _held(receipt["kept"])
        say(
            lang,
            f"  Destroyed {name}: {destroyed}. Kept: {kept}.",
            f"  {place}已销毁：{destroyed or '无'}。保留：{kept or '无'}。",
        )
        say(lang, f"  Signed receipt: {receipt['file']}", f"  已签名的销毁回执：{receipt['file']}")
    operators = values["receipts"]["operator"]
    for model in operators["models"] if operators else ():
        say(
            lang,
            f"  With our updates: the model of round {model['round']}, {model['digest']}",
            f"  含有本方更新的模型：第{model['round']}轮，{model['digest']}",
        )
    say(
        lang,
        "  What our updates changed stays in these models, and in every later one. What was earned is paid.",
        "  本方更新所改变的内容仍留在上述模型及其后的模型中。已取得的收益照付。",
    )


def _held(things: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{thing['count']} {thing['kind']}" + (f" ({thing['reason']})" if "reason" in thing else "") for thing in things
    )


def show_budget(values: dict[str, Any]) -> None:
    """Budgets, with both epsilons named."""
    for data_set in values["data_sets"]:
        line(f"data set {data_set['data_set']}: epsilon {data_set['epsilon']} at delta {data_set['delta']}")
        line(
            f"  Rényi sum at alpha {data_set['alpha']}: {_rounded(Decimal(data_set['charged']))} charged, "
            f"{_rounded(Decimal(data_set['committed']))} with what signed contracts may still charge, "
            f"limit R {_rounded(Decimal(data_set['limit']))}; charged sum / R {_percent(data_set['sum_of_limit'])}"
        )
        line(
            f"  All contracts together cost at most epsilon {data_set['epsilon_gate']} "
            "(epsilon_gate: a coarse bound, large even where little was spent)"
        )
        own = data_set["policy"]
        line(
            f"  Uses (attempts and measurements): {data_set['uses']}"
            + ("" if own["max_uses"] is None else f" of the {own['max_uses']} that the policy allows")
            + ("" if own["max_epsilon"] is None else f"; the policy's own limit is epsilon {own['max_epsilon']}")
        )
        rows = [
            [
                c["contract"][:SHORT],
                c["title"],
                c["state"],
                f"{c['epsilon_pld']} of {c['epsilon']}",
                " + ".join([f"{c['steps']} of {c['planned_steps']}", *c["measured"]]),
                f"{c['rounds_left']} of {c['rounds']}",
                str(c["attempts_left"]),
                f"{c['uses']}, {c['uses_left']} left",
                c["not_after"],
            ]
            for c in data_set["contracts"]
        ]
        if rows:
            columns = ["contract", "title", "state", "epsilon_pld", "steps charged", "rounds left", "attempts left"]
            output.table(output.console(), [*columns, "uses", "ends"], rows, right=(3, 4, 5, 6, 7))
    if not values["data_sets"]:
        line("No data set was declared here yet.")


def plan_values(plan: "Plan") -> dict[str, Any]:
    """A plan as plain values; quantities are decimal strings."""
    from fedpact_client.views import share_text

    contract, cost = plan.contract, plan.cost
    privacy, entity = contract.privacy, contract.privacy.entity
    return {
        "data_set": plan.data_set,
        "trust_model": privacy.trust_model,
        "rounds": contract.training.rounds,
        "noised_steps": contract.planned_steps,
        "measurements": list(contract.measurements),
        "noise_multiplier": decimal_text(privacy.noise_multiplier),
        "epsilon": decimal_text(privacy.epsilon),
        "delta": decimal_text(privacy.delta),
        "entity": None if entity is None else entity.plain(),
        "cost": None if cost is None else cost_values(cost),
        "sum_of_limit": None if cost is None else share_text(cost.after, cost.limit),
        "epsilon_gate": None if plan.gate is None else _epsilon(plan.gate),
        "rounds_that_fit": plan.rounds_that_fit,
        "checks": check_values(plan.checks),
        "not_checked": list(plan.not_checked),
        "refused": plan.refused,
    }


def show_egress(values: dict[str, Any], *, fold: bool) -> None:
    """The egress ledger; `fold`: requests that follow each other are one line."""
    entries: list[dict[str, Any]] = values["egress"]

    def one_line(entry: dict[str, Any]) -> object:
        return "requests" if fold and entry["kind"] == "request" else entry["seq"]

    rows = [_egress_row(list(run)) for _, run in itertools.groupby(entries, one_line)]
    columns = ["no.", "time (UTC)", "kind", "contract", "round", "bytes", "sha256", "detail"]
    output.table(output.console(), columns, rows, right=(0, 4, 5))
    line(f"{sum(e['times'] for e in entries)} messages, {sum(e['bytes'] * e['times'] for e in entries)} bytes")


def _egress_row(run: list[dict[str, Any]]) -> list[str]:
    """A message, however often it left, or several requests: when the last one left, whose contracts, all bytes."""
    first, last = run[0], run[-1]
    single, contracts = len(run) == 1, {e["contract"] for e in run}
    detail = first["detail"] if single else f"{len(run)} requests since {first['at']}"
    if first["times"] > 1:
        detail = f"{detail} {first['times']} times since {first['at']}".strip()
    return [
        str(first["seq"]) if single else f"{first['seq']}-{last['seq']}",
        last["last"] or last["at"],
        first["kind"],
        "several" if len(contracts) > 1 else (first["contract"] or "-")[:SHORT],
        "-" if first["round"] is None else str(first["round"]),
        str(sum(e["bytes"] * e["times"] for e in run)),
        first["sha256"][:SHORT] if single else "-",
        detail,
    ]


_RUN_STATES = {
    "running": "进行中",
    "stopped": "已中止",
    "completed": "训练已完成，尚未结算",
    "settled": "已结算",
    "closing": "结算中，尚有暂扣款项",
    "closed": "已结清",
}
_OUTCOMES = {"refused": "参与方拒绝", "missed": "逾期未应答", "rejected": "运营方驳回"}
_COVERS = {"validation sampling only": "仅反映验证集的抽样误差"}
_VERDICTS = {
    0: "已核验：金额重算至分，一致，且经信任文件认证。",
    1: "发现差错：除差错本身外，本证据不能证明任何事项。",
    4: "部分认证：未发现差错；上列说明指出尚缺什么，或依赖哪一把密钥。",
}
"""By exit code, the verdict of `fedpact verify`."""


def show_statement(values: dict[str, Any], lang: "Lang" = "en") -> None:
    """This participant's lines; notes as `verify` has them."""
    from fedpact_contract.settlement import format_fen

    own, status = values["participant"], values["status"]
    say(lang, f"contract {values['contract']}", f"合约{values['contract']}")
    line(values["title"])
    say(
        lang,
        f"{own['name']} ({own['entity_code']}): admitted in {counted(own['rounds_admitted'], 'round')}; "
        f"the run is {status}",
        f"{own['name']}（{own['entity_code']}）：{own['rounds_admitted']}轮更新被采纳；"
        f"合约运行状态：{_RUN_STATES.get(status, status)}",
    )
    for entry in values["rounds"]:
        if (outcome := entry["outcome"]) != "admitted":
            say(
                lang,
                f"  round {entry['round']}: {outcome} ({entry['code']})",
                f"  第{entry['round']}轮：{_OUTCOMES.get(outcome, outcome)}（{entry['code']}）",
            )
    for number in values["sent_but_missed"]:
        say(
            lang,
            f"  round {number}: this agent made an update; the operator says that none came in time",
            f"  第{number}轮：本代理已作出更新，运营方称未按时收到",
        )
    if own["fen"] is not None:
        paid, held = format_fen(own["fen"], lang), format_fen(own["held_fen"], lang)
        share, interval = output.format_share(own["share"]), output.format_interval(own["low"], own["high"])
        say(lang, f"share {share} (95 % interval {interval})", f"份额 {share}（95 %区间 {interval}）")
        say(
            lang,
            f"paid {paid}{f', of which {held} are held' if own['held_fen'] else ''}",
            f"应付{paid}{f'，其中暂扣{held}' if own['held_fen'] else ''}",
        )
    if values["settlement"] is not None:
        exact, covers = values["settlement"]["line"], values["settlement"]["interval"]["covers"]
        say(
            lang,
            f"  interval: {covers}; {output.OUTWARD}",
            f"  区间的含义：{_COVERS.get(covers, covers)}；两端向外取整",
        )
        say(
            lang,
            f"  exact {exact['exact_fen']} fen, whole {exact['whole_fen']}, remainder {exact['remainder']} "
            f"(rank {exact['remainder_rank']}), floor {exact['floor_fen']}",
            f"  精确值{exact['exact_fen']}分，整数部分{exact['whole_fen']}分，余数{exact['remainder']}"
            f"（排第{exact['remainder_rank']}位），保底{exact['floor_fen']}分",
        )
        for group in values["settlement"]["common_control"]:
            if own["id"] in group["members"]:
                say(
                    lang,
                    f"  {group['name']} controls {', '.join(group['names'])}: they have one equal part and one floor",
                    f"  {group['name']}控制{'、'.join(group['names'])}：合计只有一份均等份额和一份保底",
                )
    for note in values["notes"]:
        line(f"- {note}")
    say(lang, values["verdict"], _VERDICTS.get(values["exit_code"], values["verdict"]))


def _epsilon(value: Decimal) -> str:
    return decimal_text(value) if value.is_finite() else "more than 100"


def _percent(share: str | None) -> str:
    return "without bound" if share is None else f"{100 * Decimal(share):.1f} %"


def _rounded(value: Decimal) -> str:
    return f"{value:.4f}"
