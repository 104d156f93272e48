"""A quote and a dry run as text for people, in English and Chinese. Sentences in the values are in that language."""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from fedpact_client.review_text import CHECKS
from fedpact_client.text import say
from fedpact_contract import output
from fedpact_contract.clauses.clause import Both
from fedpact_contract.language import Lang
from fedpact_contract.output import line
from fedpact_contract.refusals import chinese

_PRIVACY, _BYTES, _TIME = Both("PRIVACY", "隐私"), Both("BYTES", "字节数"), Both("TIME", "时间")


def show_quote(values: dict[str, Any], lang: Lang = "en") -> None:
    """What joining would cost and might bring."""
    say(lang, f"Quote for contract {values['contract']}", f"合约{values['contract']}的报价")
    ours = values["data_set"]
    say(lang, f"{values['title']}; our data set {ours}", f"{values['title']}；本方数据集{ours}")
    line()
    line(values["no_promise"])
    _part(lang, _PRIVACY, _privacy(values))
    _part(lang, _BYTES, _bytes(values["bytes"]))
    _part(lang, _TIME, _time(values["time"]))
    line()
    _show_share(values["share"], lang)


def show_dry_run(values: dict[str, Any], lang: Lang = "en") -> None:
    """What a contract would do here."""
    data, leaving = values["data"], values["leaves"]
    say(lang, f"Dry run of contract {values['contract']}", f"合约{values['contract']}的演练")
    say(lang, f"{values['title']}. {values['nothing']}", f"{values['title']}。{values['nothing']}")
    line()
    say(lang, "CHECKS", "核对事项")
    for check in values["checks"]:
        fits = Both("ok", "相符") if check["ok"] else Both("REFUSED", "拒绝")
        line(f"  {fits.of(lang)}  {CHECKS[check['name']] if lang == 'zh' else check['name']}")
        if error := check.get("error"):
            said = chinese(error["code"]) if lang == "zh" else None
            line(f"      {error['code']}: {error['message'] if said is None else said}")
    rows, used = data["rows_that_fit"], data["rows_used"]
    fit = (
        Both("the rows cannot be used", "数据行无法使用") if rows is None else Both(f"{rows} rows fit", f"{rows}行相符")
    )
    columns, label = ", ".join(data["columns"]), ", ".join(data["label"])
    _part(
        lang,
        Both("DATA", "数据"),
        (
            Both(f"data set {data['data_set']}: ", f"数据集{data['data_set']}：")
            + fit
            + Both(f", {used} are trained on", f"，其中{used}行用于训练"),
            Both(f"columns {columns}; predicted {label}", f"特征列{columns}；预测{label}"),
        ),
    )
    _part(lang, _PRIVACY, _privacy({**values, **data}))
    _part(lang, _TIME, _time(values["time"]))
    line()
    say(lang, "WHAT WOULD LEAVE", "将离开本机的内容")
    rows = [[k["kind"], str(k["times"]), _size(k["bytes"]), _size(k["total"]), k["what"]] for k in leaving["kinds"]]
    heads = Both("kind|times|each|in all|what", "类别|次数|每次|合计|内容").of(lang).split("|")
    output.table(output.console(), heads, rows, right=(1, 2, 3))
    each, total = _size(leaving["per_round"]), _size(leaving["total"])
    say(lang, f"  {each} a round, {total} in all", f"  每轮{each}，合计{total}")
    say(lang, f"  not counted: {leaving['not_counted']}", f"  未计入：{leaving['not_counted']}")


def _part(lang: Lang, title: Both, words: Iterator[Both] | Sequence[Both]) -> None:
    line()
    line(title.of(lang))
    for text in words:
        line(f"  {text.of(lang)}")


def _privacy(values: dict[str, Any]) -> Iterator[Both]:
    cost, name = values["privacy"], values["data_set"]
    delta = cost["delta"]
    if cost["trust_model"] == "record-level-at-each-participant":
        found = cost["epsilon_pld"]
        yield Both(
            f"epsilon_pld {found} at delta {delta}: this contract alone, its whole plan",
            f"epsilon_pld {found}（delta为{delta}）：仅本合约，其完整计划",
        )
    else:
        yield Both(
            f"epsilon {cost['epsilon']} at delta {delta}, of all our updates, in what is released",
            f"对外发布的内容，就本方全部更新而言：epsilon {cost['epsilon']}（delta为{delta}）",
        )
        yield Both(
            "The operator sees our updates without noise: nothing bounds what they tell it.",
            "运营方可见未加噪声的本方更新：其中泄露的信息没有上限。",
        )
    if (entity := cost["entity"]) is not None:
        most, own = entity["max_rows"], f"{entity['epsilon']}"
        yield Both(
            f"all rows of one entity, at most {most}: epsilon {own} at delta {entity['delta']}",
            f"同一主体的全部行（至多{most}行）：epsilon {own}（delta为{entity['delta']}）",
        )
    before, after, limit, left = (_short(cost[key]) for key in ("before", "after", "limit", "left"))
    yield Both(
        f"data set {name} over all contracts: Rényi sum at alpha {cost['alpha']} {before} of other contracts, {after} "
        f"with this one ({cost['attempts']} attempts), limit {limit}, {left} left",
        f"数据集{name}全部合约合计：alpha为{cost['alpha']}的Rényi和，其他合约{before}，加上本合约{after}"
        f"（{cost['attempts']}次尝试），上限{limit}，剩余{left}",
    )
    yield Both(
        f"epsilon_gate {cost['epsilon_gate']} at the data set's delta {cost['data_set_delta']}: a coarse bound for all "
        "contracts together",
        f"epsilon_gate {cost['epsilon_gate']}（数据集的delta为{cost['data_set_delta']}）：全部合约合计的粗略上界",
    )
    if cost["fits"]:
        yield Both("The budget pays for it.", "预算足以支付。")
    else:
        yield Both("The budget does not pay for it: `sign` would refuse.", "预算不足：`sign`将拒绝。")


def _bytes(moved: dict[str, Any]) -> Iterator[Both]:
    into, out, each = moved["in"], moved["out"], moved["per_round"]
    measured = "".join(f", {kind} {_size(size)}" for kind, size in out["measurements"].items())
    also = measured.replace(", ", "，")
    signing, updates = _size(out["signature"] + out["countersignature"]), _size(out["updates"])
    yield Both(
        f"out {_size(out['total'])} in all: updates {updates}, {_size(each['out'])} a round{measured}, signatures "
        f"{signing}",
        f"发出合计{_size(out['total'])}：更新{updates}，每轮{_size(each['out'])}{also}，签名{signing}",
    )
    models, orders, evidence = _size(into["models"]), _size(into["orders_about"]), _size(into["evidence_about"])
    yield Both(
        f"in about {_size(into['total'])} in all: models {models}, orders around them about {orders} "
        f"({_size(each['in'])} a round with the model), evidence at the close about {evidence}",
        f"收到合计约{_size(into['total'])}：模型{models}，随附指令约{orders}（连同模型每轮{_size(each['in'])}），"
        f"结算时的证据约{evidence}",
    )
    yield Both(f"not counted: {moved['not_counted']}", f"未计入：{moved['not_counted']}")


def _time(spent: dict[str, Any]) -> Iterator[Both]:
    keys = ("training_seconds", "spare_attempts_seconds", "transfer_seconds", "run_seconds", "longest_rounds_seconds")
    training, spare, transfer, run, longest = (_duration(spent[key]) for key in keys)
    steps, step, days = spent["steps"], spent["step_seconds"], spent["close_days"]
    yield Both(
        f"our training {training}: {steps} steps of {step} s; spare attempts {spare} more if they are needed",
        f"本方训练{training}：{steps}步，每步{step} s；如需备用尝试，另加{spare}",
    )
    yield Both(
        f"transfer {transfer}; the whole run about {run}, at most {longest} by its deadlines; then up to {days} days "
        "to close",
        f"传输{transfer}；整个运行约{run}，按截止时间至多{longest}；随后至多{days}天结清",
    )
    for text in spent["assumptions"]:
        yield Both(f"- {text}", f"- {text}")


def _show_share(share: dict[str, Any], lang: Lang) -> None:
    say(lang, "SHARE OF THE POOL", "收益池份额")
    weights, exact = share["weights"], share["exact_parts"]
    data, equal = output.format_share(exact["data"]), output.format_share(exact["equal"])
    say(
        lang,
        f"  exact: for data {data} (weight {weights['data']}), for equality {equal} (weight {weights['equal']})",
        f"  确定部分：数据{data}（权重{weights['data']}），均等{equal}（权重{weights['equal']}）",
    )
    whole = _paid(share["share_by_rows"], lang)
    if Decimal(weights["contribution"]) > 0:
        weight, by_rows = weights["contribution"], output.format_share(share["contribution_by_rows"])
        say(
            lang,
            f"  for contribution (weight {weight}): {by_rows} if it went by rows; the whole share then {whole}",
            f"  贡献部分（权重{weight}）：若按行数为{by_rows}，则全部份额为{whole}",
        )
        bounds = output.format_interval(share["bounds"]["low"], share["bounds"]["high"])
        say(
            lang,
            f"  whatever happens, while every round admits everybody and no fallback or floor pays: {bounds}",
            f"  只要每轮各方均被采纳，且不适用替代规则或保底，无论如何在{bounds}之间",
        )
    else:
        say(lang, f"  the whole share: {whole}", f"  全部份额：{whole}")
    if share["simulated"] is not None:
        _show_simulated(share["simulated"], lang)
    elif Decimal(weights["contribution"]) > 0:
        why = share["not_simulated"]
        say(lang, f"  no range was simulated: {why}", f"  未模拟区间：{why}")
    rule, paid = share["fallback"]["rule"], output.format_share(share["fallback"]["share"])
    say(lang, f'  the fallback "{rule}" would pay {paid}', f"  替代规则“{rule}”会支付{paid}")
    if share["floor_fen"]:
        floor = _yuan(share["floor_fen"], lang)
        say(
            lang,
            f"  our floor: {floor} where every round admits us and the pool is large enough",
            f"  本方保底：{floor}，以每轮均被采纳且收益池足够为前提",
        )
    for text in share["reasons"]:
        line(f"  - {text}")


def _show_simulated(found: dict[str, Any], lang: Lang) -> None:
    model, ends, draws = found["model"], found["range"], found["draws"]
    say(lang, f"  plausible range: {model}; {ends} of {draws}", f"  可能的区间：{model}；{draws}次中{ends}")
    rows = [
        [
            f"{100 * Decimal(part['label_noise']):.0f} %",
            _paid(part["low"], lang),
            output.format_share(part["mean"]),
            _paid(part["high"], lang),
            str(part["fallback_draws"]),
        ]
        for part in found["by_own_label_noise"]
    ]
    heads = Both("our labels wrong|lowest|mean|highest|no reliable share", "本方标签错误|最低|平均|最高|无可靠份额")
    output.table(output.console(), heads.of(lang).split("|"), rows, right=(1, 2, 3, 4))


def _paid(part: dict[str, Any], lang: Lang) -> str:
    separator = "，" if lang == "zh" else ", "
    return output.format_share(part["share"]) + (f"{separator}{_yuan(part['fen'], lang)}" if "fen" in part else "")


def _yuan(fen: int, lang: Lang) -> str:
    from fedpact_contract.settlement import format_fen

    return format_fen(fen, lang)


def _size(count: int) -> str:
    """Bytes for people: decimal units, as networks have them."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _duration(seconds: str | int) -> str:
    value = float(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if value >= 2 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.1f} s"


def _short(value: str) -> str:
    return f"{Decimal(value):.4f}"
