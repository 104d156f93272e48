"""What training and measurements may tell of anybody, under either trust model."""

from collections.abc import Callable
from decimal import ROUND_CEILING, Context, Decimal
from itertools import count

from fedpact_contract.clauses.clause import Both, Chapter, Write, join, listed
from fedpact_contract.contract import ClientPrivacy, Contract, MeasurementKind, RecordPrivacy
from fedpact_contract.output import counted, visible
from fedpact_contract.record import decimal_text
from fedpact_contract.statistics import CountQuery, MeanQuery, QuantileQuery, Query

PRIVACY = Chapter(title=Both("Privacy", "隐私保护"))

_CONTEXT = Context(prec=30)
_FAR = Decimal(20)
"""Epsilons from here on promise nothing that words could tell."""

_MEASURED: dict[MeasurementKind, Both] = {
    "statistics": Both("statistics", "统计量"),
    "baseline": Both("baseline", "基线模型"),
}

TERMS = ("privacy.epsilon", "privacy.delta")
NOISE = (
    "privacy.sample_rate",
    "privacy.sampling",
    "privacy.noise_multiplier",
    "privacy.max_grad_norm",
    "privacy.max_update_norm",
)
PLAN = ("training.rounds", "training.local_steps", "privacy.spare_attempts", "privacy.accountant")
COVERED = ("CONTRACT_ACCOUNTANT", "CONTRACT_NOISE_TOO_SMALL", "PRIVACY_RANGE")


def _at_record_level(write: Callable[[Contract, RecordPrivacy], Both | None]) -> Write:
    """A clause of contracts in which the participants add the noise."""
    return lambda contract: write(contract, contract.privacy) if isinstance(contract.privacy, RecordPrivacy) else None


def _at_client_level(write: Callable[[Contract, ClientPrivacy], Both | None]) -> Write:
    """A clause of contracts in which the operator adds the noise."""
    return lambda contract: write(contract, contract.privacy) if isinstance(contract.privacy, ClientPrivacy) else None


@PRIVACY.clause(
    "privacy.central.trust",
    states=("privacy.trust_model",),
    agent=("POLICY_TRUST_MODEL",),
    verify=("MODEL_NOISE",),
    promise=True,
)
@_at_client_level
def _central_trust(_contract: Contract, privacy: ClientPrivacy) -> Both:
    return Both(
        f'Trust model "{privacy.trust_model}", the same for every participant: THE OPERATOR SEES EACH PARTICIPANT\'S '
        "CHANGE OF THE MODEL WITHOUT NOISE, and rows can be learned from such changes. Nothing here bounds what the "
        "operator learns. It adds the noise before anybody else sees a model; that it does is its signed word alone.",
        f"信任模型为“{privacy.trust_model}”（由运营方加噪的参与方级），各参与方相同："
        f"【运营方可见各参与方未加噪声的模型更新】，"
        f"从此类更新可以获知数据行。"
        "本合约对运营方由此获知的内容不作任何限制。运营方在他人见到模型之前加入噪声；其是否确已加噪，仅有其签名陈述。",
    )


@PRIVACY.clause(
    "privacy.central.epsilon",
    states=TERMS,
    agent=("POLICY_EPSILON", *COVERED),
    operator=(*COVERED, "RUN_PRIVACY_EXHAUSTED"),
    record=("CONTRACT_DELTA",),
)
@_at_client_level
def _central_epsilon(_contract: Contract, privacy: ClientPrivacy) -> Both:
    epsilon, delta = decimal_text(privacy.epsilon), decimal_text(privacy.delta)
    return Both(
        f"Towards everybody else, the whole contract costs at most epsilon {epsilon} at delta {delta} for each "
        "participant.",
        f"对运营方以外的任何人，整个合约对每一参与方的隐私消耗至多为ε={epsilon}（δ={delta}）。",
    )


_CHANGES = Both("all changes of any one participant", "任一参与方的全部更新")
_THEM = Both("whether they were", "该等更新是否被采用")
_ROW = Both("any one row", "任一数据行")
_THE_ROW = Both("whether a certain row was", "某一数据行是否被采用")
_ROWS = Both("any rows of one entity", "某一主体的任何数据行")
_THE_ROWS = Both("whether they were", "该等数据行是否被采用")


@PRIVACY.clause("privacy.central.meaning", states=TERMS)
@_at_client_level
def _central_meaning(_contract: Contract, privacy: ClientPrivacy) -> Both:
    return _meaning(privacy.epsilon, decimal_text(privacy.delta), _CHANGES, _THEM, "them")


@PRIVACY.clause("privacy.central.unit", states=("privacy.unit", "privacy.relation"))
@_at_client_level
def _central_unit(_contract: Contract, privacy: ClientPrivacy) -> Both:
    return Both(
        f'What is protected (the unit) is one "{privacy.unit}": all that its changes of all rounds tell. Neighbouring '
        f'runs are taken by "{privacy.relation}": its changes are there, or zeros stand in their place. Who takes '
        "part, who is admitted, refuses or is missing, and the number of participants are public.",
        f"受保护的对象（隐私单元）为一个“{privacy.unit}”，即一个参与方：其各轮更新所透露的全部内容。"
        f"相邻运行按“{privacy.relation}”（置零）界定：其更新存在，或以零代之。何者参与，何者被采纳、拒绝或缺席，"
        f"以及参与方的个数，均为公开信息。",
    )


@PRIVACY.clause(
    "privacy.central.noise",
    states=NOISE,
    agent=("CODE_MODELS_MISMATCH",),
    operator=("UPDATE_NORM", "UPDATE_PRIVACY_EVENT", "UPDATE_TEST_NOISE"),
    record=("CONTRACT_SAMPLE_RATE", "CONTRACT_TRUST_MODEL", "CONTRACT_NOT_POSITIVE"),
    promise=True,
)
@_at_client_level
def _central_noise(_contract: Contract, privacy: ClientPrivacy) -> Both:
    rate, norm, noise = _noise(privacy, privacy.max_update_norm)
    return Both(
        f"In each step a participant draws every row by itself with probability {rate} "
        f'("{privacy.sampling}" sampling), which lessens no cost. It clips its change of a round as a whole to the '
        f"norm {norm}; the operator checks that, and adds to the sum of the changes Gaussian noise of {noise} times "
        "that norm, once a round. The noise comes from the operating system's random numbers and is never drawn from "
        "a fixed seed.",
        f"每一步中，参与方以概率{rate}独立抽取各数据行（“{privacy.sampling}”抽样，即泊松抽样），该抽样不减少隐私消耗。"
        f"参与方将其每轮更新整体裁剪至范数{norm}；运营方对此予以核查，并在更新之和上每轮加入一次高斯噪声，"
        f"噪声为该范数的{noise}倍。"
        "噪声取自操作系统的随机数，从不由固定种子产生。",
    )


@PRIVACY.clause(
    "privacy.central.plan",
    states=PLAN,
    agent=("ATTEMPTS_EXHAUSTED", *COVERED),
    operator=("RUN_PRIVACY_EXHAUSTED", "UPDATE_ATTEMPT"),
    verify=("UPDATE_ATTEMPT",),
)
@_at_client_level
def _central_plan(contract: Contract, privacy: ClientPrivacy) -> Both:
    accountant = visible(privacy.accountant)
    return Both(
        f"The plan is {counted(contract.planned_steps, 'released model')}, one a round, without amplification by "
        f"sampling. Epsilon covers all of them, and was computed by {accountant}; before each round "
        "Flower's own accountant must agree, or the run ends. A participant may repeat "
        f"{counted(privacy.spare_attempts, 'attempt')} after a crash, of which one enters the model.",
        f"计划共发布{contract.planned_steps}个模型，每轮一个，不计抽样放大。ε涵盖全部发布，由{accountant}核算；"
        f"每轮之前须与Flower自有的核算器一致，否则运行终止。参与方在故障之后可重试{privacy.spare_attempts}次，"
        f"其中仅有一次进入模型。",
    )


@PRIVACY.clause(
    "privacy.central.digests",
    states=PLAN,
    agent=("BUDGET_EXCEEDED",),
    operator=("UPDATE_DIGEST",),
    verify=("UPDATE_DIGEST",),
)
@_at_client_level
def _central_digests(contract: Contract, privacy: ClientPrivacy) -> Both:
    attempts = contract.training.rounds + privacy.spare_attempts
    return Both(
        "The log shows digests of the changes with 32 random bytes behind each, so that nobody can try guesses on "
        "them. A row changes a change by at most twice the norm: a data set's ledger is charged for that, for each of "
        f"{counted(attempts, 'attempt')}. It bounds what released models tell of a "
        "row, never what the operator sees.",
        "日志仅载明各更新的摘要，每个更新末尾各附32个随机字节一并计入摘要，使任何人均无法以猜测逐一试验。"
        "一个数据行对一次更新的改变至多为范数的两倍："
        f"数据集的账本按此计入{attempts}次尝试中的每一次。该账本约束已发布模型所透露的数据行信息，"
        f"而不约束运营方所见的内容。",
    )


@PRIVACY.clause("privacy.record.trust", states=("privacy.trust_model",), agent=("POLICY_TRUST_MODEL",))
@_at_record_level
def _record_trust(_contract: Contract, privacy: RecordPrivacy) -> Both:
    return Both(
        f'Trust model "{privacy.trust_model}": the noise is added by the participant, before anything leaves. Neither '
        "the operator nor the others see anything without it.",
        f"信任模型为“{privacy.trust_model}”（各参与方本地的记录级）：噪声由参与方在任何内容外传之前加入。"
        f"运营方及其他各方均不可见未加噪声的内容。",
    )


@PRIVACY.clause(
    "privacy.record.epsilon",
    states=(*TERMS, "statistics", "baseline"),
    agent=("POLICY_EPSILON", "BUDGET_PLAN_EXCEEDED", *COVERED),
    operator=COVERED,
    record=("CONTRACT_DELTA",),
)
@_at_record_level
def _record_epsilon(contract: Contract, privacy: RecordPrivacy) -> Both:
    epsilon, delta = decimal_text(privacy.epsilon), decimal_text(privacy.delta)
    what = Both(
        ", ".join(["every round and spare attempt", *(_MEASURED[kind].en for kind in contract.measurements)]),
        "、".join(["各轮与各次备用尝试", *(_MEASURED[kind].zh for kind in contract.measurements)]),
    )
    return Both(
        f"The whole contract, {what.en}, costs at most epsilon {epsilon} at delta {delta} for each data set, for one "
        "row.",
        f"整个合约（{what.zh}）对每一数据集、就一个数据行而言，隐私消耗至多为ε={epsilon}（δ={delta}）。",
    )


@PRIVACY.clause("privacy.record.meaning", states=TERMS)
@_at_record_level
def _record_meaning(_contract: Contract, privacy: RecordPrivacy) -> Both:
    return _meaning(privacy.epsilon, decimal_text(privacy.delta), _ROW, _THE_ROW, "the row")


@PRIVACY.clause(
    "privacy.record.unit", states=("privacy.unit", "privacy.relation", "privacy.entity"), agent=("POLICY_ENTITY",)
)
@_at_record_level
def _record_unit(_contract: Contract, privacy: RecordPrivacy) -> Both:
    several = (
        Both(
            "A person with k rows has less: k times epsilon, and delta times (e^(k epsilon) - 1) / (e^epsilon - 1).",
            "同一人有k行的，其保障较弱：ε为k倍，δ为(e^(kε) - 1) / (e^ε - 1)倍。",
        )
        if privacy.entity is None
        else Both(
            "This and the two clauses before are of one row by itself; the next is of all rows of one entity.",
            "本条与前两条均就单个数据行而言；下一条就同一主体的全部数据行而言。",
        )
    )
    return (
        Both(
            f'What is protected (the unit) is one "{privacy.unit}", that is one row; neighbouring data sets are taken '
            f'by "{privacy.relation}": the row is there, or zeros stand in its place. The number of rows is public. ',
            f"受保护的对象（隐私单元）为一个“{privacy.unit}”，即一个数据行；相邻数据集按“{privacy.relation}”（置零）"
            f"界定："
            "该行存在，或以零代之。行数为公开信息。",
        )
        + several
    )


@PRIVACY.clause(
    "privacy.record.entity",
    states=("privacy.entity",),
    agent=("POLICY_ENTITY_EPSILON", "CONTRACT_ENTITY_EPSILON"),
    operator=("CONTRACT_ENTITY_EPSILON",),
    record=("CONTRACT_ENTITY_DELTA",),
)
@_at_record_level
def _record_entity(_contract: Contract, privacy: RecordPrivacy) -> Both | None:
    """What holds for all rows of one entity: one clause, in place of the formula for any number of rows."""
    if (entity := privacy.entity) is None:
        return None
    epsilon, delta, column = decimal_text(entity.epsilon), decimal_text(entity.delta), visible(entity.column)
    return Both(
        f"The second unit is one entity: all its rows together, at most {entity.max_rows} by the column {column}, are "
        f'protected by epsilon {epsilon} at delta {delta} (method "{entity.method}"); neighbouring data sets have '
        "them, or zeros in their place. That covers all that the whole contract releases of one data set. For an "
        "entity with rows in several data sets the epsilons add up, and the deltas. Rows that the column does not give "
        "to it are not counted with it. ",
        f"第二隐私单元为一个主体：按列“{column}”归属于该主体的全部数据行（至多{entity.max_rows}行）"
        f"合计受ε={epsilon}（δ={delta}）"
        f"的保护（方法“{entity.method}”）；相邻数据集含有该等数据行，或以零代之。"
        f"该保护涵盖整个合约就一个数据集所发布的全部内容。"
        "同一主体在多个数据集中均有数据行的，各ε相加，各δ亦相加。该列未归于该主体的数据行，不计入该主体。",
    ) + _meaning(entity.epsilon, delta, _ROWS, _THE_ROWS, "them")


@PRIVACY.clause(
    "privacy.record.noise",
    states=NOISE,
    agent=("CODE_MODELS_MISMATCH",),
    operator=("UPDATE_NOISE_FLOOR", "UPDATE_PRIVACY_EVENT", "UPDATE_TEST_NOISE"),
    record=("CONTRACT_SAMPLE_RATE", "CONTRACT_NOT_POSITIVE"),
    verify=("UPDATE_PRIVACY_EVENT", "UPDATE_TEST_NOISE"),
)
@_at_record_level
def _record_noise(_contract: Contract, privacy: RecordPrivacy) -> Both:
    rate, norm, noise = _noise(privacy, privacy.max_grad_norm)
    return Both(
        f'In each step every row is drawn by itself with probability {rate} ("{privacy.sampling}" sampling); its '
        f"gradient is clipped to the norm {norm}; Gaussian noise of {noise} times that norm is added to the sum. The "
        "noise comes from the operating system's random numbers and is never drawn from a fixed seed.",
        f"每一步中，各数据行以概率{rate}独立抽取（“{privacy.sampling}”抽样，即泊松抽样）；其梯度裁剪至范数{norm}；"
        f"在其和上加入高斯噪声，噪声为该范数的{noise}倍。噪声取自操作系统的随机数，从不由固定种子产生。",
    )


@PRIVACY.clause(
    "privacy.statistics",
    states=("statistics",),
    agent=("MEASUREMENT_NOT_PLANNED", "MEASUREMENT_DONE"),
    operator=("MEASUREMENT_TAKEN",),
    record=("CONTRACT_STATISTICS", "CONTRACT_CENTRAL_CLAUSE"),
    verify=(
        "MEASUREMENT_NOT_PLANNED",
        "MEASUREMENT_TWICE",
        "MEASUREMENT_MISMATCH",
        "MEASUREMENT_LATE",
        "MEASUREMENT_NOISE_FLOOR",
    ),
)
def _statistics(contract: Contract) -> Both | None:
    if (statistics := contract.statistics) is None:
        return None
    noise = decimal_text(statistics.noise_multiplier)
    return Both(
        "Each participant also releases statistics of its contracted rows, once; they stand in the log for all "
        f"signatories. Noise is added to each sum; its standard deviation, in rows, is {noise}:",
        f"各参与方另就其约定的数据行一次性发布统计量；该统计量载于日志，供各签署方查阅。每个求和项均加噪声，"
        f"其标准差（以行计）为{noise}：",
    ) + join(_query(query) for query in statistics.queries)


def _query(query: Query) -> Both:
    column = visible(query.column)
    if isinstance(query, MeanQuery):
        said = Both(f"the mean of {column}, clipped to its bounds", f"“{column}”的均值，截断至其上下界")
    elif isinstance(query, CountQuery):
        if query.value is not None:
            value = visible(query.value)
            said = Both(f"how many rows have {column}: {value}", f"“{column}”取值为{value}的行数")
        else:
            least = f"{query.at_least:f}"
            said = Both(f"how many rows have {column}: at least {least}", f"“{column}”不小于{least}的行数")
    elif isinstance(query, QuantileQuery):
        wanted = listed(decimal_text(p) for p in query.probabilities)
        said = Both(
            f"the quantiles {wanted.en} of {column}, from a histogram of {query.bins} parts",
            f"“{column}”的分位数（{wanted.zh}），取自{query.bins}段的直方图",
        )
    else:
        bins = Both("", "") if query.bins is None else Both(f" in {query.bins} parts", f"（{query.bins}段）")
        said = Both(f"the histogram of {column}{bins.en}", f"“{column}”的直方图{bins.zh}")
    return Both(f"\n    - {said.en}", f"\n    - {said.zh}")


@PRIVACY.clause(
    "privacy.baseline",
    states=("baseline",),
    agent=("MEASUREMENT_NOT_PLANNED", "MEASUREMENT_DONE", "BASE_MODEL_MISMATCH"),
    operator=("MEASUREMENT_TAKEN",),
    record=("CONTRACT_TOO_MANY_STEPS", "CONTRACT_CENTRAL_CLAUSE"),
    verify=(
        "MEASUREMENT_NOT_PLANNED",
        "MEASUREMENT_TWICE",
        "MEASUREMENT_MISMATCH",
        "MEASUREMENT_LATE",
        "BASELINES_MISSING",
        "BASELINES_LINES",
    ),
)
def _baseline(contract: Contract) -> Both | None:
    if (baseline := contract.baseline) is None:
        return None
    return Both(
        "Each participant also trains a model alone, with the same clipping and noise, "
        f"{counted(baseline.steps, 'step')} from the initial model, and releases it once to the operator. It is "
        "never aggregated; how it does on the validation rows stands in the log, and no money follows from it.",
        f"各参与方另以相同的裁剪与噪声，自初始模型起单独训练{baseline.steps}步，并将所得模型一次性发布给运营方。"
        "该模型从不参与合并；其在验证行上的表现载于日志，不影响任何款项。",
    )


@PRIVACY.clause(
    "privacy.record.plan",
    states=(*PLAN, "statistics", "baseline"),
    agent=("ATTEMPTS_EXHAUSTED", "ROUND_FAILED", *COVERED),
    operator=("UPDATE_ATTEMPT", "UPDATE_LEDGER_HEAD"),
    record=("CONTRACT_TOO_MANY_STEPS",),
    verify=("UPDATE_ATTEMPT", "UPDATE_LEDGER_HEAD", "REFUSAL_ATTEMPTS", "REFUSAL_LEDGER_HEAD"),
)
@_at_record_level
def _record_plan(contract: Contract, privacy: RecordPrivacy) -> Both:
    training, accountant = contract.training, visible(privacy.accountant)
    steps, spares = contract.planned_steps, privacy.spare_attempts
    also = join(
        Both(f", and the {_MEASURED[kind].en}", f"，另加{_MEASURED[kind].zh}") for kind in contract.measurements
    )
    return Both(
        f"The plan is {counted(training.rounds, 'round')} and {counted(spares, 'spare attempt')} (after a crash) of "
        f"{counted(training.local_steps, 'step')} each: {steps} in all{also.en}. Epsilon covers all of them, and was "
        f"computed by {accountant}. An attempt is charged in full even where its result never arrived.",
        f"计划为{training.rounds}轮及{spares}次备用尝试（故障之后），每次{training.local_steps}步，"
        f"共{steps}步{also.zh}。"
        f"ε涵盖全部内容，由{accountant}核算。尝试的结果即便从未送达，亦全额计入。",
    )


@PRIVACY.clause(
    "privacy.ledger",
    agent=(
        "BUDGET_EXCEEDED",
        "BUDGET_PLAN_EXCEEDED",
        "DATA_SET_KNOWN_ELSEWHERE",
        "LEDGER_RESTORED",
        "BASE_MODEL_CHANGED",
    ),
)
def _ledger(_contract: Contract) -> Both:
    return Both(
        "Each participant's agent keeps its own ledger of what was spent on its data set over all contracts, and "
        "refuses the step that would exceed the limit on the data set's card. The ledger adds Rényi divergences at the "
        "one order that the card declares.",
        "各参与方代理自行保管账本，记载其数据集在全部合约中的隐私消耗；将使消耗超过数据卡所载上限的步骤，代理予以拒绝。"
        "账本按数据卡所申报的单一雷尼阶累加雷尼散度。",
    )


def _noise(privacy: ClientPrivacy | RecordPrivacy, norm: Decimal) -> tuple[str, str, str]:
    return decimal_text(privacy.sample_rate), decimal_text(norm), decimal_text(privacy.noise_multiplier)


def _meaning(epsilon: Decimal, delta: str, what: Both, whether: Both, it: str) -> Both:
    """What epsilon and delta promise, of `what` (in English again `it`): how much more likely, how good a guess."""
    if epsilon >= _FAR:
        return Both(
            "In words: an epsilon of this size is no protection that words could describe.",
            "释义：ε如此之大，已无可用文字描述的保护。",
        )
    factor = _CONTEXT.exp(epsilon)
    guess = _below_100(_CONTEXT.divide(factor, _CONTEXT.add(factor, Decimal(1))) * 100)
    times = _rounded(factor, "0.01")
    return Both(
        f"In words: whatever anybody learns from this training, it is at most {times} times as likely (e^epsilon) as "
        f"it would be without {what.en}, apart from a chance of {delta}. Someone who held it for even {whether.en} "
        f"used guesses right at most {guess} % of the time instead of 50 %, apart from the same chance. What is true "
        f"of people in general, and would be learned without {it} too, is not protected.",
        f"释义：任何人由本次训练获知任何事项的可能性，至多为无{what.zh}时的{times}倍（e^ε），除{delta}的概率之外。"
        f"原本认为{whether.zh}的可能性各半之人，猜中的比例至多由50%升至{guess}%，除同一概率之外。"
        "就一般人而言成立、无此数据亦可获知的事项，不在保护之列。",
    )


def _below_100(value: Decimal) -> str:
    """A percentage rounded up, with the digits that it takes not to read 100."""
    places = next(places for places in count(1) if value.quantize(Decimal(10) ** -places, ROUND_CEILING) < 100)
    return _rounded(value, f"1e-{places}")


def _rounded(value: Decimal, step: str) -> str:
    return str(value.quantize(Decimal(step), ROUND_CEILING))
