"""Which data are read, what is predicted, and how the model is trained on them."""

from decimal import Decimal

from fedpact_contract.clauses.clause import NOTHING, Both, Chapter, join, listed
from fedpact_contract.contract import (
    ClientPrivacy,
    Column,
    Contract,
    Krum,
    Model,
    NumberColumn,
    NumberLabel,
    SurvivalLabel,
)
from fedpact_contract.output import counted, visible
from fedpact_contract.record import decimal_text

DATA = Chapter(title=Both("Data", "数据"))
TRAINING = Chapter(title=Both("Model and training", "模型与训练"))


@DATA.clause(
    "data.columns",
    states=("data.columns", "privacy.entity"),
    agent=(
        "POLICY_COLUMN",
        "SIGN_COLUMNS",
        "EGRESS_KIND",
        "DATA_COLUMN_MISSING",
        "DATA_MISSING_VALUE",
        "DATA_NOT_A_NUMBER",
        "DATA_NOT_FINITE",
        "DATA_UNKNOWN_CATEGORY",
    ),
    record=("CONTRACT_COLUMN_TWICE", "CONTRACT_BOUNDS", "CONTRACT_FILL", "CONTRACT_VOCABULARY"),
)
def _columns(contract: Contract) -> Both:
    columns = contract.data.columns
    whose = NOTHING if contract.privacy.entity is None else Both("the label and whose a row is (below), ", "")
    also = "" if contract.privacy.entity is None else "、标签及标明数据行归属的列（见下）"
    return Both(
        "Rows of the data sets do not leave the participants' premises, but for validation rows that a participant "
        f"released by itself. Training reads {counted(len(columns), 'column')}, {whose.en}and no other:",
        f"数据集的数据行不离开参与方场所，但参与方自行发布的验证行除外。训练仅读取下列{len(columns)}列{also}，"
        f"不读取其他列：",
    ) + join(_column(column) for column in columns)


def _column(column: Column) -> Both:
    name, fill = visible(column.name), ""
    if column.fill is not None:
        fill = visible(decimal_text(column.fill) if isinstance(column.fill, Decimal) else column.fill)
    missing = {
        "refuse": Both("the data set is refused", "拒绝该数据集"),
        "drop": Both("the row is left out", "舍弃该行"),
        "fill": Both(f"it is taken as {fill}", f"以{fill}代之"),
    }[column.missing]
    if isinstance(column, NumberColumn):
        low, high = decimal_text(column.low), decimal_text(column.high)
        what = Both(f"a {column.kind}, clipped to {low} to {high}", f"数值（{column.kind}），截断至{low}至{high}")
    else:
        values = listed(column.values)
        what = Both(f"a {column.kind}, one of {values.en}", f"类别（{column.kind}），取值为{values.zh}之一")
    return Both(
        f'\n    - {name}: {what.en}; where it is missing ("{column.missing}"), {missing.en}',
        f"\n    - {name}：{what.zh}；缺失时（{column.missing}）{missing.zh}",
    )


@DATA.clause(
    "data.entity",
    states=("privacy.entity.column", "privacy.entity.max_rows"),
    agent=("SIGN_ENTITY_COLUMN", "CARD_ENTITY_CHANGED", "POLICY_COLUMN", "DATA_ENTITY_MISSING"),
    record=("CONTRACT_ENTITY_COLUMN",),
)
def _entity(contract: Contract) -> Both | None:
    if (entity := contract.privacy.entity) is None:
        return None
    name = visible(entity.column)
    return Both(
        f"The column {name} says whose a row is. It is no feature and never leaves; training takes at most "
        f"{counted(entity.max_rows, 'row')} of one entity (a person, a firm).",
        f"列“{name}”标明数据行归属何主体。该列不作为特征，亦不外传；同一主体（个人或企业）"
        f"用于训练的数据至多{entity.max_rows}行。",
    )


@DATA.clause(
    "data.label",
    states=("data.label",),
    agent=(
        "SIGN_LABEL",
        "POLICY_COLUMN",
        "DATA_LABEL_BOUNDS",
        "DATA_LABEL_MISSING",
        "DATA_UNKNOWN_CLASS",
        "DATA_UNKNOWN_EVENT",
    ),
    record=("CONTRACT_LABEL_RULE", "CONTRACT_CLASSES", "CONTRACT_CUTS", "CONTRACT_OUTCOMES"),
)
def _label(contract: Contract) -> Both:
    what, drop = _predicted(contract), contract.data.label.missing == "drop"
    return Both(
        f"Predicted is {what.en}. Where the label is missing, "
        + ("the row is left out." if drop else "the data set is refused."),
        f"预测对象为{what.zh}。标签缺失的，" + ("舍弃该行。" if drop else "拒绝该数据集。"),
    )


def _predicted(contract: Contract) -> Both:
    label = contract.data.label
    name = visible(label.name)
    if isinstance(label, NumberLabel):
        low, high = decimal_text(label.low), decimal_text(label.high)
        return Both(
            f'the column {name}, a number from {low} to {high} (rule "{label.rule}"); a data set with a number outside '
            "these bounds is refused. It is scaled by them to [-1, 1]",
            f"列“{name}”，取值{low}至{high}的数值（规则“{label.rule}”）；含有超出上下界数值的数据集予以拒绝。"
            "该数值按上下界缩放至[-1, 1]",
        )
    if isinstance(label, SurvivalLabel):
        event, (censored, came) = visible(label.event), (visible(outcome) for outcome in label.outcomes)
        intervals = label.intervals
        *until, beyond = intervals
        return Both(
            f"when an event comes: the column {name} is the duration, and {event} says whether the event came then "
            f'({came}) or the row was watched no longer ({censored}; rule "{label.rule}"). Durations are told apart by '
            f"these intervals only: {', '.join(intervals)}; an event beyond the last counts as not seen, and a row "
            "that was watched beyond the middle of an interval as having lived through it",
            f"事件何时发生：列“{name}”为时长，列“{event}”标明该时点事件已发生（{came}）或观察至此为止（{censored}；"
            f"规则“{label.rule}”）。时长仅按下列区间区分：{'、'.join(until)}、{beyond.replace('above ', '大于')}；"
            "在末区间之后发生的事件视为未观察到，观察超过某区间中点的视为存续过该区间",
        )
    classes = listed(label.classes)
    if label.threshold is None:
        rule = Both("the cell is the class", "单元格取值即为类别")
    else:
        threshold, (no, yes) = decimal_text(label.threshold), (visible(one) for one in label.classes[:2])
        rule = Both(f"a number above {threshold} is {yes}, else {no}", f"数值大于{threshold}的为{yes}，否则为{no}")
    return Both(
        f'the column {name}, with the classes {classes.en} (rule "{label.rule}": {rule.en})',
        f"列“{name}”，类别为{classes.zh}（规则“{label.rule}”：{rule.zh}）",
    )


@DATA.clause("data.scaling", states=("data.feature_scale",), agent=("CODE_MODELS_MISMATCH",))
def _scaling(contract: Contract) -> Both:
    scale = decimal_text(contract.data.feature_scale)
    return Both(
        "Bounds and vocabularies are public and part of this contract; nothing is learned from the data to scale it. "
        "Features are scaled to [-1, 1], a constant 1 is added as the last one, and all are multiplied by "
        f"{scale} / sqrt(number of features, the constant included).",
        "上下界与取值表均为公开信息，属于本合约内容；缩放不从数据中学习任何信息。特征缩放至[-1, 1]，末尾添加常数1，"
        f"全部乘以{scale} / sqrt(特征个数，含常数)。",
    )


@DATA.clause(
    "data.examples",
    states=(),
    agent=("SIGN_NUM_EXAMPLES", "DATA_TOO_FEW_ROWS", "DATA_SET_KNOWN_ELSEWHERE"),
    operator=("UPDATE_METERING",),
    verify=("UPDATE_METERING",),
)
def _examples(_contract: Contract) -> Both:
    return Both(
        "Each participant trains on exactly its contracted number of examples. More rows change nothing; fewer are "
        "refused before the first round.",
        "各参与方恰以其约定样本数训练。多出的数据行不产生影响；不足的，在首轮之前予以拒绝。",
    )


@DATA.clause("data.quality", agent=("QUALITY_GATE",))
def _quality(_contract: Contract) -> Both:
    return Both(
        "A participant may hold its rows against rules of its own, at signature and before its first attempt. Where "
        "one is broken it refuses with the code QUALITY_GATE, and nothing is charged. The code rests on the rows: so "
        "much is told beside the epsilon, and no column, count or value.",
        "参与方可于签署时及首次训练之前，以其自定的质量规则检查数据行。规则未满足的，以代码QUALITY_GATE拒绝，不计入任何隐私消耗。"
        "该代码取决于数据行：此项信息在ε之外透露，但不透露任何列、计数或取值。",
    )


@TRAINING.clause(
    "training.model",
    states=("model",),
    agent=("POLICY_MODEL", "BASE_MODEL_MISMATCH"),
    record=("CONTRACT_MODEL", "CONTRACT_IMAGE"),
    verify=("BASE_MODEL",),
)
def _model(contract: Contract) -> Both:
    model = contract.model
    widths = listed(str(width) for width in model.hidden)
    hidden = (
        Both(f" with hidden layers of {widths.en} units", f"，隐藏层宽度为{widths.zh}") if model.hidden else NOTHING
    )
    layers = _convolutions(model) + hidden
    return Both(
        f'The model is of the kind "{model.kind}"{layers.en}. The first round starts from the model with this digest: '
        f"{model.initial_digest}",
        f"模型种类为“{model.kind}”{layers.zh}。首轮自具有下列摘要的模型开始：{model.initial_digest}",
    )


def _convolutions(model: Model) -> Both:
    """Of a cnn how a row is a picture, and what looks at it."""
    if model.image is None:
        return NOTHING
    image, layers = model.image, model.convolutions or ()
    english = (f"{c.filters} filters of {c.kernel} x {c.kernel} at a stride of {c.stride}" for c in layers)
    chinese = (f"{c.filters}个{c.kernel} x {c.kernel}滤波器，步幅{c.stride}" for c in layers)
    return Both(
        f": the columns are a picture, {counted(image.height, 'line')} of {counted(image.width, 'pixel')} with "
        f"{counted(image.channels, 'channel')} (channel by channel, line by line), at whose windows, without padding, "
        f"these convolutions look one after another: {', '.join(english)}; dense layers come behind them",
        f"：各列依次构成一幅图像，共{image.height}行，每行{image.width}像素，{image.channels}个通道（逐通道、逐行排列）；"
        f"其窗口上依次有下列不加填充的卷积层：{'；'.join(chinese)}；其后为全连接层",
    )


@TRAINING.clause(
    "training.rounds",
    states=("training.rounds", "training.local_steps", "training.learning_rate", "privacy.trust_model"),
    agent=(
        "POLICY_ROUNDS",
        "ROUND_BEYOND_CONTRACT",
        "ROUND_NOT_PLANNED",
        "ROUND_BACKWARDS",
        "ROUND_DONE",
        "ROUND_NOT_OPENED",
        "NOT_INVITED",
    ),
    operator=("UPDATE_METERING", "UPDATE_ROUND"),
    record=("CONTRACT_NOT_POSITIVE",),
    verify=("ROUND_BEYOND_CONTRACT", "ROUND_ORDER", "RUN_ROUNDS", "UPDATE_ROUND"),
)
def _rounds(contract: Contract) -> Both:
    training, central = contract.training, isinstance(contract.privacy, ClientPrivacy)
    rate = decimal_text(training.learning_rate)
    return Both(
        f"The run has {counted(training.rounds, 'round')}. In each, every participant makes "
        f"{counted(training.local_steps, 'training step')} at the learning rate {rate} and sends the change of the "
        f"model, {'clipped and without' if central else 'with'} noise.",
        f"运行共{training.rounds}轮。每轮各参与方以学习率{rate}进行{training.local_steps}步训练，"
        f"并发送模型的改动（更新），" + ("该更新经裁剪而不加噪声。" if central else "该更新已加噪声。"),
    )


@TRAINING.clause(
    "training.aggregation",
    states=(
        "training.aggregation",
        "training.krum",
        "training.server_rate",
        "training.server_optimizer",
        "participants",
    ),
    operator=("AGGREGATION_EMPTY",),
    record=(
        "CONTRACT_AGGREGATION_GAME",
        "CONTRACT_OPTIMIZER_GAME",
        "CONTRACT_SERVER_OPTIMIZER",
        "CONTRACT_BETA",
        "CONTRACT_KRUM",
        "CONTRACT_NOT_POSITIVE",
    ),
)
def _aggregation(contract: Contract) -> Both:
    rule, combined, step = contract.training.aggregation, _combined(contract), _step(contract)
    return Both(
        f'The operator combines the admitted changes by the rule "{rule}": {combined.en}, {step.en}',
        f"运营方按规则“{rule}”合并所采纳的更新：{combined.zh}，{step.zh}",
    )


@TRAINING.clause("training.word", promise=True)
def _word(contract: Contract) -> Both | None:
    if contract.auditor is not None:
        return None
    return Both(
        "That it combines them so is the operator's word: it alone holds the updates. The log shows their digests, and "
        "that each round begins at the model that the one before led to.",
        "运营方是否如此合并，以其陈述为准：更新仅由其持有。日志载明各更新的摘要，并载明每轮自上一轮所得的模型开始。",
    )


@TRAINING.clause("training.audited", verify=("REEVALUATION_DIFFERS",))
def _audited(contract: Contract) -> Both | None:
    if contract.auditor is None:
        return None
    return Both(
        "That it combines them so is the operator's word, until the auditor has computed every model again from the "
        "updates, whose digests stand in the log.",
        "运营方是否如此合并，在审计方依各更新（其摘要载于日志）重新计算各模型之前，以运营方的陈述为准。",
    )


def _step(contract: Contract) -> Both:
    """How the combined change moves the model."""
    optimizer, rate = contract.training.server_optimizer, decimal_text(contract.training.server_rate)
    if optimizer is None:
        return Both(f"times {rate}, is added to the model.", f"乘以{rate}后加入模型。")
    first, second, tau = (decimal_text(value) for value in (optimizer.beta_1, optimizer.beta_2, optimizer.tau))
    return Both(
        f'is what the server\'s optimizer "{optimizer.kind}" steps by (rate {rate}, beta_1 {first}, beta_2 {second}, '
        f"tau {tau}); it remembers the changes of earlier rounds.",
        f"由服务端优化器“{optimizer.kind}”据以更新模型（学习率{rate}，beta_1为{first}，beta_2为{second}，tau为{tau}）；"
        "该优化器记忆此前各轮的更新。",
    )


def _combined(contract: Contract) -> Both:
    """What the rule makes of the admitted changes."""
    if contract.training.krum is not None:
        return _krum(contract.training.krum)
    count = len(contract.participants)
    return {
        "weighted-mean": Both("the mean weighted by the contracted examples", "按约定样本数加权的平均值"),
        "uniform-mean": Both(
            f"their sum with the operator's noise, divided by {count} (whoever is missing counts as 0)",
            f"更新之和加运营方噪声后除以{count}（缺席者计为0）",
        ),
        "median": Both(
            "for each number of the model the middle one of them (of an even number the mean of both middle ones), "
            "each participant's counting alike",
            "对模型的每个数取各更新的中位数（个数为偶数时取中间两数的平均值），各参与方的更新同等计算",
        ),
    }[contract.training.aggregation]


def _krum(krum: Krum) -> Both:
    tolerated, kept = krum.tolerated, krum.kept
    return Both(
        f"the plain mean of the {kept} that lie closest to their neighbours (the least sum of squared distances to the "
        f"nearest others, the number of changes less {tolerated + 2} of them; ties by fingerprint), each participant's "
        f"counting alike; {tolerated} of the admitted may send anything (tolerated {tolerated}, kept {kept})",
        f"取与邻近更新最接近的{kept}个更新的算术平均值（即至最近若干更新的平方距离之和最小者，"
        f"所取最近更新的个数为更新总数减{tolerated + 2}；"
        f"相同时按指纹排序），各参与方的更新同等计算；所采纳者中容许{tolerated}个发送任意内容"
        f"（tolerated为{tolerated}，kept为{kept}）",
    )
