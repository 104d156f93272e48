"""The words of the report, in English and Chinese."""

from fedpact_contract.language import Lang
from fedpact_contract.output import OUTWARD
from fedpact_contract.privacy import ACCOUNTANT, CENTRAL_ACCOUNTANT

CENTRAL = "client-level-at-the-operator"
"""The trust model in which the operator adds the noise."""

LABELS: dict[str, tuple[str, str]] = {
    "report": ("Contribution report", "贡献与收益报告"),
    "contract": ("Contract", "合约"),
    "parties": ("Parties", "各方"),
    "operator": ("Operator", "运营方"),
    "buyer": ("Buyer", "购买方"),
    "name": ("Name", "名称"),
    "entity_code": ("Entity code", "统一社会信用代码"),
    "role": ("Role, or sector", "角色或行业"),
    "fingerprint": ("Key fingerprint", "密钥指纹"),
    "term": ("Term of the contract", "合约期限"),
    "to": ("to", "至"),
    "close_by": ("Settlement due", "结算期限"),
    "close_days": ("within {} days after the term", "合约期限届满后{}天内"),
    "close_day": ("within {} day after the term", "合约期限届满后{}天内"),
    "first_opened": ("First round opened", "首轮开启"),
    "last_opened": ("Last round opened", "末轮开启"),
    "times_note": (
        "Times of rounds are by the operator's clock. The log proves the order in which things were done; it holds no "
        "time of the run's end, of the settlement or of the close.",
        "各轮时间以运营方时钟为准。日志证明各事项的先后次序，不记载运行结束、结算与关账的时间。",
    ),
    "left": ("Paused or withdrawn", "暂停或退出"),
    "left_paused": ("paused by participant", "参与方已暂停"),
    "left_withdrawn": ("withdrawn by participant", "参与方已退出"),
    "left_revoked": ("its run key is revoked", "运行密钥已吊销"),
    "affected": ("Models with its updates (SHA-256)", "含其更新的模型（SHA-256）"),
    "left_note": (
        "What a participant's updates changed stays in the models listed, and in every later one. What it earned is "
        "paid.",
        "参与方的更新所作的改变保留在所列模型及其后的各模型中；退出前应得的收益照常支付。",
    ),
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
    "reevaluated_all": (
        "Utilities were re-evaluated by {} (all coalitions).",
        "效用值已由{}复评（全部联盟）。",
    ),
    "reevaluated_sampled": (
        "Utilities were re-evaluated by {} ({} drawn coalitions of each round, and all together); the rest is the "
        "operator's statement.",
        "效用值已由{}复评（每轮抽取{}个联盟，并含全体联盟）；其余为运营方陈述。",
    ),
    "reevaluated_otherwise": (
        "Utilities are the operator's statement; {} re-evaluated them and found otherwise; differences: {}.",
        "效用值为运营方陈述；{}复评后发现{}处不符。",
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
        "The interval covers validation sampling only: not the noise of training, not other data. "
        f"Wherever an interval is shown, {OUTWARD}: the low end down, the high end up.",
        "区间仅反映验证集抽样误差，不含训练噪声与其他数据的影响。凡显示区间，两端均向外取整：下限舍去，上限进位。",
    ),
    "nat_note": (
        "A nat is the unit of the loss, the mean over the validation rows of -ln(probability that the model gives to "
        "the right class): a contribution of 0.1 nat lowered the loss by 0.1.",
        "nat是损失的单位：损失为模型赋予正确类别的概率取负自然对数后，在验证集各行上的平均值；"
        "贡献0.1 nat即令损失降低0.1。",
    ),
    "loo_note": (
        "Leave-one-out is how much higher the loss would have been without this participant's updates alone, round by "
        "round, all added up; it is shown for comparison, and nothing is paid by it.",
        "留一法指逐轮仅去掉该参与方的更新时损失会高出多少，各轮相加；仅供对照，不作为分配依据。",
    ),
    "renormalised_note": (
        "Contribution is by the re-normalised game: for every group the rule by which updates are combined is applied "
        "to its updates alone. So one more update makes each other one count for less, and an update that changes "
        "nothing has a contribution other than 0, mostly a negative one.",
        "贡献按重新归一化博弈计算：对每个子集，仅对其成员的更新应用聚合规则。因此多一个更新会使其余更新的作用变小；"
        "毫无改动的更新其贡献亦不为0，通常为负。",
    ),
    "cumulative": ("Cumulative contribution by round (nat)", "各轮累计贡献（nat）"),
    "privacy": ("Privacy: epsilon spent against the contract's budget", "隐私：已用ε与合约预算"),
    "privacy_note_central": (
        "Client-level differential privacy by the operator's noise, towards everybody but the operator; red: the "
        "contract's epsilon.",
        "由运营方加噪的参与方级差分隐私，对运营方以外各方有效；红线为合约ε上限。",
    ),
    "cumulative_note_central": (
        "Contribution was not measured: scoring single updates would show what only the operator may see. Each "
        "admitted participant has the same part of what the released models gained.",
        "未度量贡献：对单个更新评分会泄露仅运营方可见的内容。各被采纳参与方平分已发布模型的改进。",
    ),
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
    "range": ("lowest - highest", "最低 - 最高"),
    "together": ("together", "联合"),
    "gain": ("gain", "提升"),
    "statement": ("Statement", "结算单"),
    "participant": ("Participant", "参与方"),
    "examples": ("Examples", "样本数"),
    "rounds": ("Rounds", "轮数"),
    "value": ("Contribution (nat)", "贡献值（nat）"),
    "loo": ("Leave-one-out (nat)", "留一法（nat）"),
    "share": ("Share", "份额"),
    "without_slices": ("What hangs on each part of the validation set", "验证集各部分的影响"),
    "without": ("without", "去除"),
    "common_control": ("Common control", "共同控制"),
    "common_control_note": (
        "Participants that one party controls, as they declare, have one equal part and one floor; contribution and "
        "data are paid to each.",
        "申报受同一方控制的参与方合计一份均分部分与一份保底金额；贡献与数据部分各自计付。",
    ),
    "floor_once": ("floor", "保底金额"),
    "without_slices_note": (
        "Shares if that part of the validation rows (their number in brackets) had never been there. Never paid by.",
        "若从无该部分验证样本（括号内为条数）时的份额；不用于分配。",
    ),
    "interval": ("95 % interval", "95%区间"),
    "paid": ("Paid", "金额"),
    "total": ("Total", "合计"),
    "pool": ("Pool", "分配池"),
    "revenue": ("Revenue", "收入"),
    "fees": ("Fees", "费用"),
    "statistics": ("Statistics", "统计量"),
    "statistics_note": (
        "The participant adds noise to each sum (its standard deviation, in rows: {}), charged to the contract's "
        "epsilon. Under each value stands its 95 % interval, of the noise only, not of sampling, and of each value by "
        "itself: where the same answer without noise lies. A quantile's ends are edges of its histogram's parts. "
        "Digits finer than the noise are left out.",
        "每个求和项由参与方添加噪声（标准差，以行计：{}），并计入合约的ε。各值之下为其95%区间，仅反映噪声，不含抽样误差，且各值单独计：即无噪声时同一结果所在的范围。"
        "分位数区间的两端为其直方图分段的边界。小于噪声精度的位数不予显示。",
    ),
    "query_mean": ("mean", "均值"),
    "query_histogram": ("rows", "行数"),
    "query_count": ("rows", "行数"),
    "query_quantile": ("quantiles", "分位数"),
    "noise_error": ("standard deviation of the noise", "噪声标准差"),
    "accuracy_alone": ("alone, one model", "单独，一个模型"),
    "baselines": ("Trained alone", "单独训练"),
    "baselines_note": (
        "Each participant's own model, trained alone with the contract's noise and released once; accuracy on the "
        "validation rows, the operator's statement. No money follows from it.",
        "各参与方以合约噪声单独训练并一次性发布的模型在验证行上的准确率；以运营方陈述为准，不影响分配。",
    ),
    "outcomes": ("What became of each order", "各轮指令结果"),
    "outcome": ("Outcome", "结果"),
    "code": ("Code", "代码"),
    "label": ("Privacy label (NIST SP 800-226)", "隐私标签（NIST SP 800-226）"),
    "dp_standard": ("Standard", "标准"),
    "dp_mechanism": ("Mechanism", "机制"),
    "dp_epsilon": ("Epsilon", "ε"),
    "dp_epsilon_pld": ("epsilon by privacy loss distributions", "按隐私损失分布计算的ε"),
    "dp_delta": ("Delta", "δ"),
    "dp_privacy_unit": ("Privacy unit", "隐私单元"),
    "dp_neighbours": ("Neighbouring data sets", "相邻数据集"),
    "dp_trust_model": ("Trust model", "信任模型"),
    "dp_accountant": ("Accountant", "隐私核算器"),
    "dp_sampling": ("Sampling", "抽样"),
    "dp_clip": ("Clipping", "裁剪"),
    "dp_noise": ("Noise", "噪声"),
    "dp_randomness": ("Randomness", "随机源"),
    "dp_plan": ("Plan", "计划"),
    "dp_entity": ("All rows of one entity", "同一主体的全部行"),
    "dp_column": ("column", "列"),
    "dp_max_rows": ("rows at most", "行数上限"),
    "dp_composition": ("Composition", "组合"),
    "dp_within_contract": ("within the contract", "合约之内"),
    "dp_across_contracts": ("across contracts", "合约之间"),
    "dp_hyperparameters": ("Hyperparameters", "超参数"),
    "dp_method": ("method", "方法"),
    "dp_rate": ("rate", "比率"),
    "dp_not_protected_from": ("Not protected from", "不受保护的对象"),
    "dp_max_update_norm": ("largest update norm", "更新范数上限"),
    "dp_max_grad_norm": ("largest gradient norm", "梯度范数上限"),
    "dp_distribution": ("distribution", "分布"),
    "dp_multiplier": ("multiplier", "倍数"),
    "dp_steps": ("steps", "步数"),
    "dp_measurements": ("Released once besides", "另行一次性发布"),
    "dp_adversary": ("Adversary", "攻击者"),
    "dp_accounting": ("Accounting", "核算"),
    "dp_outside": ("Outside the guarantee", "保障范围之外"),
    "dp_participants": ("Charged", "已计入"),
    "dp_source": ("source", "来源"),
    "dp_arithmetic": ("arithmetic", "运算"),
    "dp_kind": ("what", "内容"),
    "dp_value": ("value", "取值"),
    "dp_noise_multiplier": ("noise multiplier", "噪声倍数"),
    "dp_sample_rate": ("sample rate", "抽样率"),
    "dp_quantity": ("quantity", "量"),
    "dp_library": ("library", "程序库"),
    "dp_orders": ("Rényi orders", "雷尼阶"),
    "dp_gate_order": ("Rényi order of the data set's gate", "数据集门限的雷尼阶"),
    "dp_gates": ("Whole plan at each data set's gate", "整个计划在各数据集门限处"),
    "dp_renyi_plan": ("Rényi divergence of the whole plan at it", "整个计划在该阶的雷尼散度"),
    "dp_low": ("lower bound", "下界"),
    "dp_high": ("upper bound", "上界"),
    "dp_bins": ("bins", "分箱数"),
    "dp_probabilities": ("probabilities", "分位点"),
    "dp_entity_epsilon": ("epsilon for one entity", "单个主体的ε"),
    "dp_entity_delta": ("delta for one entity", "单个主体的δ"),
    "dp_releases": ("releases", "发布次数"),
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

OF_LOSS: dict[str, dict[str, tuple[str, str]]] = {
    "discrete-hazard": {
        "metric": ("Concordance by round", "各轮一致性指数"),
        "metric_note": (
            "Measured at the operator on the committed validation set: of the pairs of rows of which it is known whose "
            "event came first, the part that the model puts in this order (0.5: chance).",
            "由运营方在已承诺的验证集上测得：在可判定事件先后的各对数据行中，模型排序正确的比例（0.5为随机水平）。",
        ),
        "nat_note": (
            "A nat is the unit of the loss, the mean over the validation rows of -ln(probability that the model gives "
            "to what was seen of the row: each interval that it lived through, and the one in which the event came): a "
            "contribution of 0.1 nat lowered the loss by 0.1.",
            "nat是损失的单位：损失为模型赋予各行所观察到的结果（所存续的各区间及事件发生的区间）的概率取负自然对数后，"
            "在验证集各行上的平均值；贡献0.1 nat即令损失降低0.1。",
        ),
        "baselines_note": (
            "Each participant's own model, trained alone with the contract's noise and released once; concordance on "
            "the validation rows, the operator's statement. No money follows from it.",
            "各参与方以合约噪声单独训练并一次性发布的模型在验证行上的一致性指数；以运营方陈述为准，不影响分配。",
        ),
    },
    "squared-error": {
        "metric": ("Root mean squared error by round", "各轮均方根误差"),
        "metric_note": (
            "Measured at the operator on the committed validation set, in the label's unit; less is better.",
            "由运营方在已承诺的验证集上测得，以标签的单位计；越小越好。",
        ),
        "nat_note": (
            "The loss is half the mean squared error on the validation rows, of the label scaled by its public bounds "
            "to [-1, 1]: a contribution of 0.1 lowered it by 0.1.",
            "损失为标签按公开上下界缩放至[-1, 1]后，在验证集各行上均方误差的一半；贡献0.1即令损失降低0.1。",
        ),
        "cumulative": ("Cumulative contribution by round", "各轮累计贡献"),
        "value": ("Contribution", "贡献值"),
        "loo": ("Leave-one-out", "留一法"),
        "baselines_note": (
            "Each participant's own model, trained alone with the contract's noise and released once; root mean "
            "squared error on the validation rows, the operator's statement. No money follows from it.",
            "各参与方以合约噪声单独训练并一次性发布的模型在验证行上的均方根误差；以运营方陈述为准，不影响分配。",
        ),
    },
}
"""What is said otherwise where the contract's loss is another."""

SAID: dict[str, tuple[str, str]] = {
    "signed": ("signed", "已签署"),
    "running": ("running", "运行中"),
    "completed": ("completed", "已完成"),
    "stopped": ("stopped", "已停止"),
    "settled": ("settled", "已结算"),
    "admitted": ("admitted", "采纳"),
    "rejected": ("rejected by the operator", "运营方驳回"),
    "refused": ("refused by the participant", "参与方拒绝"),
    "missed": ("no reply in time", "逾期未应答"),
    "accuracy": ("accuracy", "准确率"),
    "concordance": ("concordance", "一致性指数"),
    "root mean squared error": ("root mean squared error", "均方根误差"),
    "example": ("one example (row)", "单个样本（一行）"),
    "zero-out": ("one row set to zero", "将一行置零"),
    "record-level-at-each-participant": ("record level, at each participant", "各参与方本地，记录级"),
    "participant": ("one participant: all its updates", "一个参与方：其全部更新"),
    "client-level-at-the-operator": (
        "client level, at the operator, who sees updates without noise",
        "参与方级，由运营方加噪；运营方可见未加噪声的更新",
    ),
    "gaussian-sum-of-clipped-updates": (
        "Gaussian noise on the sum of clipped updates",
        "对裁剪后更新之和加高斯噪声",
    ),
    "the-operator": ("the operator, who sees updates without noise", "运营方，其可见未加噪声的更新"),
    "no-amplification": ("none, no amplification", "无，不计抽样放大"),
    "whole-update": ("whole update", "整个更新"),
    "rdp-of-the-whole-plan": ("Rényi divergence of the whole plan", "整个计划的雷尼散度"),
    "poisson": ("Poisson", "泊松"),
    "flat": ("flat", "整体裁剪"),
    "gaussian": ("Gaussian", "高斯"),
    "mean": ("mean", "均值"),
    "histogram": ("histogram", "直方图"),
    "count": ("count", "计数"),
    "quantile": ("quantile", "分位数"),
    "baseline": ("baseline, a model trained alone", "单独训练的基线模型"),
    "more than 100": ("more than 100", "大于100"),
    "unbounded": ("unbounded", "无上界"),
    "epsilon": ("epsilon of the contract", "合约的ε"),
    "epsilon_pld": ("epsilon_pld, of the plan and of what was spent", "计划及已用的ε（epsilon_pld）"),
    "epsilon_gate": ("epsilon_gate, of a data set over all contracts", "数据集在全部合约中的ε（epsilon_gate）"),
    "privacy-loss-distributions": ("privacy loss distributions", "隐私损失分布"),
    "renyi-least-of-orders": ("Rényi divergence, the least over the orders", "雷尼散度，取各阶最小值"),
    "renyi-filter": ("Rényi filter at the one order of each data set", "雷尼散度过滤器，每个数据集固定一个阶"),
    "sees-all-releases-and-knows-all-else": (
        "sees all that is released, knows everything but the unit, and may collude with the others",
        "可见全部发布内容，知悉隐私单元以外的一切，并可与其他各方串通",
    ),
    "float64-four-draws-then-float32": (
        "float64, each normal number from four draws, then float32: the guarantee is proved for real numbers, not "
        "for floating point",
        "双精度浮点，每个正态数由四次抽取合成，再转为单精度；保障以实数证明，未对浮点运算证明",
    ),
    "participants-with-altered-code": (
        "rows of a participant that runs altered code: its noise is its own",
        "运行被改动代码的参与方的数据行：其噪声由其自定",
    ),
    "noise-by-the-operators-word": (
        "whether the operator added the noise: its signed word alone",
        "运营方是否确已加噪：仅有其签名陈述",
    ),
    "several-rows-of-one-person": (
        "several rows of one person together: they have less (contract, clause on the unit)",
        "同一人的多行数据合计：保障较弱（见合约隐私单元条款）",
    ),
    "entity-in-several-data-sets": (
        "an entity with rows in several data sets: its epsilons add up, and its deltas",
        "在多个数据集中有数据行的主体：其各ε相加，各δ亦相加",
    ),
    "entity-under-several-names": (
        "somebody under two names, who counts as two entities",
        "以两个名称出现的同一人：按两个主体计",
    ),
    "rows-that-the-column-gives-to-others": (
        "rows about an entity that the column gives to another: only those that it gives to the entity are counted",
        "与某主体有关、但列中归于他人的数据行：仅计入该列归于该主体的行",
    ),
    "counts-and-who-takes-part": (
        "numbers of rows, who takes part, refuses or is missing: public",
        "行数，以及谁参与、拒绝或缺席：均为公开信息",
    ),
    "validation-rows": (
        "validation rows: they lie at the operator, and their scores are opened",
        "验证行：存于运营方，其得分将公开",
    ),
    "timing": ("how long an answer takes, and other side channels", "应答时长及其他旁路信息"),
    "data-where-they-are-kept": (
        "the data where they are collected and kept",
        "数据在采集与存放之处的安全",
    ),
    "dp-sgd-and-gaussian-sums": (
        "DP-SGD, and Gaussian noise on sums (statistics)",
        "差分隐私随机梯度下降；统计量为加高斯噪声的求和",
    ),
    ACCOUNTANT: (ACCOUNTANT, "dp-accounting 0.6，隐私损失分布（PLD），置零相邻（REPLACE_SPECIAL）"),
    CENTRAL_ACCOUNTANT: (
        CENTRAL_ACCOUNTANT,
        "dp-accounting 0.6，雷尼散度（RDP），置零相邻，不计抽样放大（flwr 1.41 RdpAccountant）",
    ),
    "dp-sgd": ("DP-SGD", "差分隐私随机梯度下降"),
    "aes-256-ctr": ("AES-256-CTR, keyed by the operating system", "密码学随机数，密钥由操作系统产生"),
    "mixture-of-gaussians": ("mixture of Gaussians", "高斯混合"),
    "group-formula": ("formula for groups", "群组公式"),
    "pld-of-the-whole-plan": ("privacy loss distributions of the whole plan", "整个计划的隐私损失分布"),
    "renyi-filter-of-each-data-set": (
        "Rényi filter of each data set, kept by its agent",
        "各数据集的雷尼散度过滤器，由其代理维护",
    ),
    "fixed-at-signature": ("fixed by the contract, none chosen on private data", "由合约固定，不在私有数据上选择"),
}
"""Words of the log and of the contract, as the report says them; a word that is not here stands as it is."""


def words(lang: Lang, loss: str = "cross-entropy") -> dict[str, str]:
    """Every label in one language, for a contract of this loss."""
    return {key: pair[1 if lang == "zh" else 0] for key, pair in (LABELS | OF_LOSS.get(loss, {})).items()}


def said(word: str, lang: Lang) -> str:
    """A word of the log in one language."""
    return SAID.get(word, (word, word))[1 if lang == "zh" else 0]
