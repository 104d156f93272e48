"""Who takes part in a round, and how contribution is measured."""

from fedpact_contract.clauses.clause import NOTHING, Both, Chapter, join
from fedpact_contract.contract import Contract, quick_to_score
from fedpact_contract.estimators import EXACT_LINEAR_PLAYERS, EXACT_PLAYERS
from fedpact_contract.output import counted, visible

PARTICIPATION = Chapter(title=Both("Taking part", "参与"))
CONTRIBUTION = Chapter(title=Both("Contribution", "贡献度量"))


@PARTICIPATION.clause(
    "participation.minimum",
    states=("participation.minimum", "participation.deadline_seconds", "common_control"),
    agent=("POLICY_MIN_PARTICIPANTS",),
    operator=("ROUND_TOO_FEW_UPDATES", "RUN_TOO_FEW_PARTICIPANTS"),
    record=("CONTRACT_MINIMUM",),
    verify=("ADMITTED_TOO_FEW", "ABANDONED_WITHOUT_NEED"),
)
def _minimum(contract: Contract) -> Both:
    part = contract.participation
    return Both(
        f"A round counts with at least {counted(part.minimum, 'admitted update')}; with fewer the run stops and the "
        f"model stays as it was. A participant has {counted(part.deadline_seconds, 'second')} to answer an order.",
        f"每轮须有至少{part.minimum}个被采纳的更新方为有效；不足的，运行停止，模型保持不变。"
        f"参与方应在{part.deadline_seconds}秒内应答指令。",
    ) + (
        Both(
            " Updates of participants under common control count once there.", "受同一控制的参与方的更新在此只计一次。"
        )
        if contract.common_control
        else NOTHING
    )


@PARTICIPATION.clause("participation.missed", states=("participation.missed_rounds_limit",), verify=("INVITED_SILENT",))
def _missed(contract: Contract) -> Both:
    limit = contract.participation.missed_rounds_limit
    return Both(
        f"A participant that misses or refuses {counted(limit, 'round')} in a row gets no more orders.",
        f"参与方连续{limit}轮缺席或拒绝的，不再收到指令。",
    )


@PARTICIPATION.clause(
    "participation.heads",
    states=("participation.head_threshold", "participation.strict_heads"),
    agent=("HEAD_FEW_WITNESSES", "WITNESS_WRONG"),
    operator=("REPLY_NOT_COUNTERSIGNED",),
    record=("CONTRACT_HEAD_THRESHOLD", "CONTRACT_STRICT_HEADS"),
    verify=("COUNTERSIGNATURE_ROOT", "COUNTERSIGNATURE_ORIGIN", "COUNTERSIGNATURE_STRANGER"),
)
def _heads(contract: Contract) -> Both:
    part = contract.participation
    strict = (
        Both("refuses the order (strict heads: yes)", "拒绝该指令（strict heads：是）")
        if part.strict_heads
        else Both("raises an alarm (strict heads: no)", "发出警报（strict heads：否）")
    )
    return Both(
        "With every reply an agent countersigns the log's head that it was shown. An agent that sees fewer than "
        f"{counted(part.head_threshold, 'countersignature')} of the others on the head before {strict.en}.",
        "代理每次应答均对所见的日志树头（head）副署。代理在前一树头上所见其他各方的副署少于"
        f"{part.head_threshold}个的，{strict.zh}。",
    )


@PARTICIPATION.clause(
    "participation.admission",
    agent=("RECEIPT_MISSING", "RECEIPT_WRONG"),
    operator=(
        "UPDATE_SIGNATURE",
        "UPDATE_REPLAYED",
        "UPDATE_SHAPE",
        "UPDATE_NOT_FINITE",
        "UPDATE_NORM",
        "UPDATE_DIGEST",
        "UPDATE_HEAD",
        "UPDATE_BASE_DIGEST",
        "UPDATE_CONTRACT_ID",
        "UPDATE_PARTICIPANT",
    ),
    verify=("REJECTION_UNFOUNDED", "RECEIPT_MISMATCH", "OUTCOME_MISSING", "OUTCOME_TWICE"),
)
def _admission(_contract: Contract) -> Both:
    return Both(
        "An update is rejected, with a signed receipt that says why, if it is not signed, was sent before, has another "
        "shape, is not finite, or is larger than contracted training can give. A refusal by an agent is a recorded "
        "result, not a breach.",
        "更新未经签名、此前已发送、形状不符、含非有限数值，或大于约定训练所能得出者，予以驳回，"
        "并出具载明理由的签名回执。"
        "代理的拒绝系记录在案的结果，不构成违约。",
    )


LOSSES = {
    "cross-entropy": Both(
        "minus the logarithm of the probability that the model gives to the right class",
        "模型赋予正确类别的概率的负对数",
    ),
    "squared-error": Both(
        "half the squared error of the scaled label; a prediction beyond the label's bounds counts as the bound",
        "缩放后标签平方误差的一半；预测值超出标签上下界的，按该界计",
    ),
    "discrete-hazard": Both(
        "minus the logarithm of the probability that the model gives to what was seen of it: each interval that it "
        "lived through, and the one in which the event came",
        "模型赋予该行所观察到的结果（所存续的各区间，以及事件发生的区间）的概率的负对数",
    ),
}


@CONTRIBUTION.clause(
    "contribution.game",
    states=(
        "contribution.game",
        "contribution.estimator",
        "contribution.loss",
        "training.server_optimizer",
        "training.krum",
    ),
    record=("CONTRACT_AGGREGATION_GAME", "CONTRACT_ESTIMATOR", "CONTRACT_CENTRAL_PAYOUT", "CONTRACT_TOO_MANY_PLAYERS"),
    verify=("SCORES_PLAYERS", "SCORES_SHAPE", "SCORES_FIRST_ORDER"),
)
def _game(contract: Contract) -> Both:
    contribution = contract.contribution
    game, loss, estimator = contribution.game, contribution.loss, contribution.estimator
    if game == "unanimity":
        return Both(
            f'Contribution is not measured (game "{game}"): scoring single changes would show what only the operator '
            f'may see. The loss "{loss}" on the validation rows is that of released models; its fall in a round is of '
            f'all who were admitted together, the same part for each (estimator "{estimator}"), and no money follows '
            "from it.",
            f"不度量贡献（博弈“{game}”）：对单个更新评分会泄露仅运营方可见的内容。"
            f"验证行上的损失“{loss}”为已发布模型的损失；"
            f"其在一轮中的下降归全体被采纳者共有，各占相同部分（估计方法“{estimator}”），不影响任何款项。",
        )
    moved = _moved(contract)
    return Both(
        f'Contribution is the Shapley value, estimator "{estimator}", of the game "{game}": for every group of '
        f'participants, how much the loss "{loss}" on the validation rows falls when {moved.en}',
        f"贡献为博弈“{game}”的沙普利值（Shapley value），估计方法“{estimator}”：对参与方的每个子集，"
        f"计算验证行上的损失“{loss}”"
        f"在下列情形下的下降：{moved.zh}",
    )


def _moved(contract: Contract) -> Both:
    """When a group's members alone move the model."""
    krum = contract.training.krum
    if contract.contribution.game == "re-normalised":
        alone = Both(
            "the rule by which changes are combined is applied to their changes alone, as if nobody else had been in "
            "the round. So a contribution depends on who else is there: one more change makes each other one count "
            "for less, and whoever sends zeros, or a change that is worth less than the others', may have a negative "
            "contribution. Whoever was not admitted in a round has contributed 0 in it.",
            "仅对其成员的更新适用合并规则，如同该轮中并无他人。因此贡献取决于同轮尚有何人：多一个更新，"
            "其余更新的作用即变小；"
            "发送全零更新或价值低于他人的更新者，其贡献可能为负。某轮未被采纳者，该轮贡献为0。",
        )
        if krum is None:
            return alone
        return alone + Both(
            f" For a group of fewer than {2 * krum.tolerated + 3} the rule stands for the plain mean of its changes; a "
            f"larger one keeps no more than its number less {krum.tolerated}.",
            f"子集成员少于{2 * krum.tolerated + 3}个的，该规则即为其更新的算术平均值；成员更多的，"
            f"保留的个数不超过其成员数减{krum.tolerated}。",
        )
    if contract.keeps_momentum:
        return Both(
            "only their parts of the server's momentum move the model. Whoever was admitted has a part in all later "
            "rounds too; before that it has contributed 0.",
            "仅以其成员在服务端动量中的部分更新模型。曾被采纳者在此后各轮中亦占有部分；此前贡献为0。",
        )
    return Both(
        "only their updates of the round are added, with their weights unchanged. Whoever was not admitted in a round "
        "has contributed 0 in it.",
        "仅加入其成员在该轮的更新，权重不变。某轮未被采纳者，该轮贡献为0。",
    )


@CONTRIBUTION.clause(
    "contribution.loss", states=("contribution.loss",), record=("CONTRACT_LOSS",), verify=("SCORES_RANGE",)
)
def _loss(contract: Contract) -> Both:
    loss = contract.contribution.loss
    what = LOSSES[loss]
    return Both(f'The loss "{loss}" of a row is {what.en}.', f"一行的损失“{loss}”为{what.zh}。")


@CONTRIBUTION.clause(
    "contribution.sampling",
    states=("contribution.max_coalitions", "model.kind", "contribution.game"),
    record=("CONTRACT_COALITIONS", "CONTRACT_ESTIMATOR"),
    verify=("SCORES_SAMPLING", "SCORES_DRAWS", "SCORES_SEED"),
)
def _sampling(contract: Contract) -> Both | None:
    if (coalitions := contract.contribution.max_coalitions) is None:
        return None
    most = EXACT_LINEAR_PLAYERS if quick_to_score(contract) else EXACT_PLAYERS
    return Both(
        f"In a round all groups are scored if at most {most} were admitted and there are no more than {coalitions}. "
        "Otherwise no more than so many are, drawn by the admitted updates' digests; the Shapley value is then "
        "estimated, what the draw leaves open is reported beside it, and every party recomputes the draw.",
        f"一轮中被采纳者至多{most}个且子集不超过{coalitions}个的，对全部子集评分。否则评分的子集不超过该数，"
        f"由被采纳更新的摘要抽定；"
        "此时沙普利值为估计值，抽样所致的不确定程度一并报告，抽样由各方重新计算核对。",
    )


@CONTRIBUTION.clause(
    "contribution.validation",
    states=("contribution.validation.root",),
    operator=("VALIDATION_ROOT", "VALIDATION_MISSING"),
    promise=True,
)
def _validation(contract: Contract) -> Both:
    root = contract.contribution.validation.root
    return Both(
        "The validation rows are fixed before the first round and stay at the operator. Their salted Merkle root is: "
        f"{root}",
        f"验证行在首轮之前固定，并存于运营方。其加盐默克尔根为：{root}",
    )


@CONTRIBUTION.clause(
    "contribution.slices",
    states=("contribution.validation.slices", "participants"),
    agent=("SIGN_SLICE",),
    operator=("VALIDATION_SLICES",),
    record=("CONTRACT_SLICES",),
)
def _slices(contract: Contract) -> Both:
    names = {p.id: visible(p.name) for p in contract.participants}
    known = {"operator": Both("the operator", "运营方"), "buyer": Both("the buyer", "购买方")}
    sources = [
        (known.get(s.source) or Both(f"{names[s.source]}, {s.source}", f"{names[s.source]}，{s.source}"), s.count)
        for s in contract.contribution.validation.slices
    ]
    return Both("They come from:", "验证行来自：") + join(
        Both(f"\n    - {who.en}: {counted(rows, 'row')}", f"\n    - {who.zh}：{rows}行") for who, rows in sources
    )


@CONTRIBUTION.clause(
    "contribution.commitment",
    states=("contribution.game",),
    verify=(
        "SCORES_NOT_COMMITTED",
        "SCORES_COMMITMENT",
        "SCORES_NOT_OPENED",
        "SCORES_CHAIN",
        "OPENED_EARLY",
        "MOMENTS_COMMITMENT",
        "MOMENTS_NOT_OPENED",
    ),
)
def _commitment(contract: Contract) -> Both:
    own = (
        NOTHING
        if contract.contribution.game == "unanimity"
        else Both(
            "A participant that gave validation rows is scored on the others' rows only. ",
            "提供验证行的参与方，仅以其他来源的验证行评分。",
        )
    )
    if contract.defences is not None and own is not NOTHING:
        own += Both(
            "So are those that are confirmed to be one with it, in rounds in which both take part. ",
            "经确认与其为一体的参与方，在双方均参与的轮次亦同。",
        )
    return own + Both(
        "Scores are committed in each round and opened to all signatories at the close of the period; that uses the "
        "validation rows up.",
        "得分逐轮作出密码学承诺，并于结算期末向全体签署方公开；验证行即因此用尽。",
    )


@CONTRIBUTION.clause("contribution.statement", states=("contribution.game",), promise=True)
def _statement(contract: Contract) -> Both | None:
    if contract.auditor is not None:
        return None
    unmeasured = contract.contribution.game == "unanimity"
    what = Both("the released models", "已发布的模型") if unmeasured else Both("the logged updates", "日志所载的更新")
    return Both(
        f"Scores are the operator's statement, computed from {what.en}; whoever holds them and the validation rows "
        "can compute the scores again.",
        f"得分为运营方陈述，由{what.zh}计算得出；持有该等内容及验证行者可重新计算得分。",
    )


@CONTRIBUTION.clause(
    "contribution.audited",
    states=("auditor",),
    verify=(
        "DEPOSIT_MISSING",
        "DEPOSIT_LATE",
        "DEPOSIT_TWICE",
        "REEVALUATION_DIFFERS",
        "REEVALUATION_EARLY",
        "REEVALUATION_MISMATCH",
    ),
)
def _audited(contract: Contract) -> Both | None:
    if (auditor := contract.auditor) is None:
        return None
    name = visible(auditor.name)
    return Both(
        f"Scores are the operator's statement, computed from the logged updates, until the auditor {name} has "
        "re-evaluated them. Before the first round the operator deposits the validation rows, sealed to the auditor's "
        "key, and logs the digest of what it sealed. In a dispute it hands the auditor that deposit, the models, and "
        "every admitted update with its noise; the auditor computes every loss and every next model again and signs "
        "what it found. The operator keeps all of it until the period is closed and undisputed.",
        f"在审计方{name}复评之前，得分为运营方陈述，由日志所载的更新计算得出。首轮之前，"
        f"运营方以审计方的公钥加密寄存验证行，"
        "并将所寄存内容的摘要载入日志。发生争议的，运营方向审计方交付该寄存内容、各模型及每个被采纳的更新（含其噪声）；"
        "审计方重新计算全部损失及每个后续模型，并就其结论签名。运营方应保存上述内容直至该结算期结清且无争议。",
    )
