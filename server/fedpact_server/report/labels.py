"""The words of the report, in English and Chinese."""

from typing import Literal

Lang = Literal["en", "zh"]

LABELS: dict[str, tuple[str, str]] = {
    "report": ("Contribution report", "贡献与收益报告"),
    "contract": ("Contract", "合约"),
    "operator": ("Operator", "运营方"),
    "purpose": ("Purpose", "使用目的"),
    "state": ("State", "状态"),
    "model": ("Model (SHA-256)", "模型（SHA-256）"),
    "evidence_note": (
        "Everything here is computed from the log. Recompute it offline: fedpact verify EVIDENCE --trust FILE.",
        "本报告全部由日志计算得出，可离线复核：fedpact verify EVIDENCE --trust FILE。",
    ),
    "utilities": (
        "Utilities are the operator's statement; no auditor has re-evaluated them.",
        "效用值为运营方陈述，尚未经审计方复评。",
    ),
    "metric": ("Accuracy by round", "各轮准确率"),
    "metric_note": (
        "Measured at the operator on the committed validation set.",
        "由运营方在已承诺的验证集上测得。",
    ),
    "round": ("Round", "轮次"),
    "before": ("before", "训练前"),
    "shares": ("Share of the pool, 95 % interval", "分配份额及95%区间"),
    "interval_note": (
        "The interval covers validation sampling only: not the noise of training, not other data.",
        "区间仅反映验证集抽样误差，不含训练噪声与其他数据的影响。",
    ),
    "cumulative": ("Cumulative contribution by round (nat)", "各轮累计贡献（nat）"),
    "privacy": ("Privacy: epsilon spent against the contract's budget", "隐私：已用ε与合约预算"),
    "privacy_note": (
        "Record-level differential privacy at each participant; red: the contract's epsilon.",
        "各参与方本地记录级差分隐私；红线为合约ε上限。",
    ),
    "lift": ("Lift: together against alone", "提升：联合训练对比单独训练"),
    "lift_note": (
        "Each participant's own DP model with the same budget and steps, three independent draws of noise, trained "
        "again in this process. Not covered by the contract's epsilon: a demonstration where all data is at hand.",
        "各参与方以相同预算与步数单独训练的DP模型，三次独立噪声；仅供演示，不在合约ε保障之内。",
    ),
    "alone": ("alone (mean of draws)", "单独（三次均值）"),
    "together": ("together", "联合"),
    "gain": ("gain", "提升"),
    "statement": ("Statement", "结算单"),
    "participant": ("Participant", "参与方"),
    "examples": ("Examples", "样本数"),
    "rounds": ("Rounds", "轮数"),
    "value": ("Contribution (nat)", "贡献值（nat）"),
    "loo": ("Leave-one-out (nat)", "留一法（nat）"),
    "share": ("Share", "份额"),
    "paid": ("Paid", "金额"),
    "total": ("Total", "合计"),
    "pool": ("Pool", "分配池"),
    "revenue": ("Revenue", "收入"),
    "fees": ("Fees", "费用"),
    "outcomes": ("What became of each order", "各轮指令结果"),
    "outcome": ("Outcome", "结果"),
    "code": ("Code", "代码"),
    "label": ("Privacy label (NIST SP 800-226)", "隐私标签（NIST SP 800-226）"),
    "not_stopped": ("What nothing here stops", "本系统无法阻止的行为"),
    "unsettled": ("Not settled yet: scores are opened at the close of the period.", "尚未结算：得分在结算期末公开。"),
    "fallback": (
        "No share is reliable: the contract's fallback was applied.",
        "无可靠份额：已按合约的备用规则分配。",
    ),
    "unopened": (
        "The operator did not open the scores that it had committed to: the contract's fallback was applied.",
        "运营方未公开其已承诺的得分：已按合约的备用规则分配。",
    ),
}


NOT_STOPPED_ZH = (
    "运行被改动代码的参与方可以不加噪声，或自选噪声。",
    "近似重复的数据行，以及未申报的关联方。",
    "有偏的验证行选取，或验证行泄露给受偏袒方。",
    "收入与费用：以运营方的陈述为准；运营方何时提前结束运行亦然。",
    "运营方未入账的私下付款，或使用已声明不予验收的模型。",
    "有人留存的更新：其后的攻击受全部发布的 ε 总和约束。",
    "模型转售，以及验证集上看不出的后门。",
    "运营方停止服务。",
    "被投毒的数据行，以及把改动过的副本申报为新数据集：由数据卡签署方负责。",
)
"""`fedpact_contract.report.NOT_STOPPED`, line by line."""


def words(lang: Lang) -> dict[str, str]:
    """Every label in one language."""
    return {key: pair[1 if lang == "zh" else 0] for key, pair in LABELS.items()}
