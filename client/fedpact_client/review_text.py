"""What a person sees before signing, in English and Chinese: the contract, who signs, what it costs, what is checked.

Codes stay as they are; in Chinese a sentence stands beside each, and what was found stands below it as it was said.
"""

from decimal import Decimal
from typing import TYPE_CHECKING

from fedpact_contract import output
from fedpact_contract.clauses.clause import Both
from fedpact_contract.keys import show_fingerprint
from fedpact_contract.output import counted, line
from fedpact_contract.record import decimal_text
from fedpact_contract.refusals import chinese, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedpact_client.plan import Plan
    from fedpact_client.review import Check, Cost, Review
    from fedpact_client.signing import Offer
    from fedpact_contract.contract import Contract
    from fedpact_contract.errors import FedpactError
    from fedpact_contract.language import Lang

STANDING = {
    "self": Both("ourselves", "本企业"),
    "known": Both("matches trust.toml", "与trust.toml一致"),
    "operator only": Both("vouched for by the operator only", "仅由运营方担保"),
}
"""How this enterprise knows a party's key."""

CHECKS = {
    "enrolled operator": "所登记的运营方",
    "fingerprints": "各方指纹",
    "own data": "本企业的数据",
    "entities": "数据行的归属",
    "columns": "列",
    "installed code": "已安装的代码",
    "noise covers the plan": "噪声足以覆盖整个计划",
    "budget": "隐私预算",
    "policy": "自有策略",
    "policy for the data set": "自有策略对该数据集的限制",
    "not ended here": "未在本机结束",
    "memory and disk": "内存与磁盘",
    "rows fit the schema": "数据行符合约定的结构",
}
"""What is checked, in Chinese, by its name."""

_COLUMNS = (
    Both("party", "当事方"),
    Both("entity code", "统一社会信用代码"),
    Both("fingerprint", "密钥指纹"),
    Both("we know this key", "本企业如何知悉该密钥"),
    Both("signed", "是否已签"),
)
_YES, _NO = Both("yes", "是"), Both("no", "否")


def show_review(review: "Review", offer: "Offer", lang: "Lang") -> None:
    """A contract in full, and all that was checked."""
    from fedpact_contract.text import render

    auditor = review.contract.auditor
    line(render(review.contract, lang))
    line()
    line((Both("WHO SIGNS", "签署方") if auditor is None else _AUDITED).of(lang))
    rows = [
        [
            s.party.name,
            s.party.entity_code,
            show_fingerprint(s.party.id),
            STANDING[s.standing].of(lang),
            "-" if s.party == auditor else (_YES if s.party.id in offer.signed else _NO).of(lang),
        ]
        for s in review.parties
    ]
    output.table(output.console(), [column.of(lang) for column in _COLUMNS], rows)
    if offer.complete:
        line(_COMPLETE.of(lang))
    if review.cost is not None:
        show_cost(review.contract, review.cost, lang)
    show_checks(review.checks, lang)


_AUDITED = Both("WHO SIGNS, AND WHO AUDITS", "签署方与审计方")
_COMPLETE = Both(
    "Every party has signed and delegated its run key; every signature was verified here.",
    "各方均已签署并授权其运行密钥；全部签名均已在此验证。",
)


def show_checks(checks: "Sequence[Check]", lang: "Lang") -> None:
    """Each check, and what refuses."""
    line(Both("WHAT WAS CHECKED HERE", "本机核对事项").of(lang))
    for check in checks:
        verdict = _verdict(check.error, lang)
        line(f"  {CHECKS[check.name]}：{verdict}" if lang == "zh" else f"  {check.name}: {verdict}")
        for name, value in () if check.error is None else check.error.as_dict().items():
            if name not in ("code", "message"):
                line(f"    {place(name, value, lang)}")


def _verdict(error: "FedpactError | None", lang: "Lang") -> str:
    """Whether it fits; in Chinese the code's sentence, and under it what was found."""
    if error is None:
        return Both("fits", "相符").of(lang)
    said = chinese(error.code) if lang == "zh" else None
    words = error.message if said is None else f"{said}\n    {error.message}"
    if error.code == "SIGN_ENDED":
        return words  # nothing is refused: it is over
    return Both(f"REFUSED, {error.code}: {words}", f"拒绝，{error.code}：{words}").of(lang)


def show_cost(contract: "Contract", cost: "Cost", lang: "Lang") -> None:
    """What the plan costs this enterprise's data set."""
    for said in _cost(contract, cost):
        line(said.of(lang))


def _cost(contract: "Contract", cost: "Cost") -> "list[Both]":
    from fedpact_contract.privacy import plan_words, plan_words_zh

    epsilon, delta = epsilon_text(cost.epsilon), decimal_text(contract.privacy.delta)
    alpha, before, after, limit = decimal_text(cost.alpha), *(f"{v:.4f}" for v in (cost.before, cost.after, cost.limit))
    lines = [
        Both("PRIVACY COST FOR OUR DATA SET", "本企业数据集的隐私消耗"),
        Both(
            f"  epsilon of the whole plan ({plan_words(contract)}): {epsilon.en} at delta {delta}",
            f"  整个计划（{plan_words_zh(contract)}）的ε：{epsilon.zh}（δ={delta}）",
        ),
    ]
    if (entity := contract.privacy.entity) is not None:
        most, promised = decimal_text(entity.epsilon), decimal_text(entity.delta)
        lines.append(
            Both(
                f"  for all rows of one entity, at most {entity.max_rows}: epsilon {most} at delta {promised}",
                f"  同一主体的全部数据行（至多{entity.max_rows}行）：ε={most}（δ={promised}）",
            )
        )
    lines.append(
        Both(
            f"  At most {counted(cost.attempts, 'attempt')} charged; Rényi sum at alpha {alpha}: {before} charged or "
            f"promised, {after} with this contract, limit {limit}",
            f"  至多计入{cost.attempts}次尝试；雷尼阶α={alpha}的累计值："
            f"已计入或已承诺{before}，加上本合约{after}，上限{limit}",
        )
    )
    if contract.privacy.unit == "participant":
        lines.append(
            Both(
                "  Epsilon is for all our updates together, the Rényi sum for any row. Both bound what released models"
                "\n  tell. The operator sees our updates without noise: nothing bounds what they tell it.",
                "  ε就本企业的全部更新合计而言，雷尼累计值就任一数据行而言。二者约束已发布模型所透露的内容；"
                "\n  运营方可见本企业未加噪声的更新：其由此获知的内容不受任何约束。",
            )
        )
    return lines


NOT_CHECKED = {
    "rows": "数据行",
    "operator": "运营方",
    "other participants": "其他参与方",
    "code": "代码",
    "purpose": "使用目的",
    "columns": "列",
    "model": "模型",
    "term": "期限",
    "the signed card": "已签署的数据卡",
}
"""What a plan did not look at, in Chinese."""


def show_plan(plan: "Plan", lang: "Lang") -> None:
    """What a contract would cost, and what refuses it."""
    contract, noise = plan.contract, decimal_text(plan.contract.privacy.noise_multiplier)
    name, asked = plan.data_set, contract.training.rounds
    line(Both(f"data set {name}, noise multiplier {noise}", f"数据集{name}，噪声倍数{noise}").of(lang))
    if plan.cost is not None and plan.gate is not None:
        show_cost(contract, plan.cost, lang)
        line(_once_charged(plan.cost, plan.gate).of(lang))
    line(
        Both(
            f"With this noise the budget pays for {counted(plan.rounds_that_fit, 'round')}; asked are {asked}.",
            f"以此噪声，隐私预算足够{plan.rounds_that_fit}轮；所求为{asked}轮。",
        ).of(lang)
    )
    show_checks(plan.checks, lang)
    left_out = Both(", ".join(plan.not_checked), "、".join(NOT_CHECKED[item] for item in plan.not_checked))
    line(Both(f"  not looked at: {left_out.en}", f"  未核对：{left_out.zh}").of(lang))
    line((Both("It would be refused.", "将被拒绝。") if plan.refused else Both("It fits.", "相符。")).of(lang))


def _once_charged(cost: "Cost", gate: Decimal) -> Both:
    from fedpact_client.views import share_text

    share, epsilon = share_text(cost.after, cost.limit), epsilon_text(gate)
    part = Both("without bound", "无上界") if share is None else Both(*[f"{100 * Decimal(share):.1f} %"] * 2)
    return Both(
        f"  sum / R {part.en} and epsilon_gate {epsilon.en} once all of it is charged",
        f"  全部计入之后，累计值／上限R为{part.zh}，epsilon_gate为{epsilon.zh}",
    )


def epsilon_text(value: Decimal) -> Both:
    """An epsilon, or that it is beyond what is worked out."""
    return Both(decimal_text(value), decimal_text(value)) if value.is_finite() else Both("more than 100", "大于100")
