"""What is done against gaming, where the contract has `[defences]`."""

from collections.abc import Callable

from fedpact_contract.clauses.clause import NOTHING, Both, Chapter, Write, percent
from fedpact_contract.contract import Contract, Defences
from fedpact_contract.output import counted
from fedpact_contract.record import decimal_text
from fedpact_contract.undetected import FEW

DEFENCES = Chapter(title=Both("Defences against gaming", "防止操纵"))


def _where_defended(write: Callable[[Contract, Defences], Both | None]) -> Write:
    """A clause of contracts with defences."""
    return lambda contract: None if contract.defences is None else write(contract, contract.defences)


@DEFENCES.clause(
    "defences.clip",
    states=("defences.clip",),
    record=("CONTRACT_CENTRAL_DEFENCES", "CONTRACT_DEFENCES_GAME"),
    verify=("CLIP_MISSING", "CLIP_FACTOR"),
)
@_where_defended
def _clip(_contract: Contract, defences: Defences) -> Both:
    if defences.clip == "median-signal":
        return Both(
            "In training and in scores an update counts scaled down to the signal of the median participant: its "
            "energy beyond that of the contracted noise, with three deviations of that noise left to everybody. "
            "Energies and factors are logged (clip: median-signal).",
            "在训练与评分中，更新均缩减至中位参与方的信号计算：信号为更新的能量超出约定噪声能量的部分，"
            "每一参与方均另留三倍该噪声的标准差。"
            "能量与缩减系数载于日志（clip：median-signal）。",
        )
    return Both(
        "Updates count as they come; none is scaled down (clip: none).", "更新按原样计算，不予缩减（clip：none）。"
    )


@DEFENCES.clause(
    "defences.detectors",
    states=("defences", "contribution.game"),
    verify=("FINDINGS_NOT_COMMITTED", "FINDINGS_COMMITMENT", "FINDINGS_NOT_OPENED"),
)
@_where_defended
def _detectors(contract: Contract, _defences: Defences) -> Both:
    values = NOTHING if _renormalised(contract) else Both(" and values", "与贡献值")
    return Both(
        f"After each round the operator's detectors look at all admitted updates{values.en}. What they find is "
        "committed to with the scores and opened with them. An alarm is a question and moves no money.",
        f"每轮之后，运营方的检测程序检视全部被采纳的更新{values.zh}。检测结果与得分一并承诺、一并公开。警报仅系询问，"
        f"不影响任何款项。",
    )


@DEFENCES.clause("defences.few", states=("participants", "defences"))
@_where_defended
def _few(contract: Contract, _defences: Defences) -> Both | None:
    if len(contract.participants) >= FEW:
        return None
    return Both(
        f"There are fewer than {FEW} participants: the detectors that compare somebody with the others have no power "
        "here, that of near-copies among them. Only values that are negative are told.",
        f"参与方少于{FEW}个：需与其他各方比较的检测程序（含近似副本的检测）在此没有检测力，仅告知为负的贡献值。",
    )


@DEFENCES.clause(
    "defences.wreckers",
    states=("defences.wreckers", "contribution.game"),
    record=("CONTRACT_DEFENCES_GAME",),
    verify=(
        "EXCLUSION_MISSING",
        "EXCLUSION_NOT_CONTRACTED",
        "EXCLUSION_TIME",
        "EXCLUSION_UNFOUNDED",
        "INVITED_EXCLUDED",
        "READMISSION",
    ),
)
@_where_defended
def _wreckers(contract: Contract, defences: Defences) -> Both:
    if _renormalised(contract):
        return Both(
            f"A value below zero is nothing unusual in this game: it raises no alarm (wreckers: {defences.wreckers}).",
            f"在本博弈中，贡献值低于零并非异常，不触发警报（wreckers：{defences.wreckers}）。",
        )
    done = (
        Both(
            "invited no more, until the operator has reviewed it and logged why it is readmitted. It is paid for the "
            "rounds in which it was admitted (wreckers: reject).",
            "不再受邀，直至运营方复核并将重新准许的理由载入日志。其被采纳的各轮仍予支付（wreckers：reject）。",
        )
        if defences.wreckers == "reject"
        else Both(
            "named by an alarm, and invited as before (wreckers: report).",
            "以警报指明，并照常受邀（wreckers：report）。",
        )
    )
    return Both(
        f"Whose own value is below minus three standard errors in two rounds running is {done.en}",
        f"连续两轮自身贡献值低于负三倍标准误者，{done.zh}",
    )


@DEFENCES.clause(
    "defences.unions",
    states=("defences.dispute_hours",),
    operator=("UNION_WINDOW", "UNION_DISPUTED", "UNION_UNFOUNDED"),
    verify=(
        "UNION_NOT_CONTRACTED",
        "UNION_MEMBERS",
        "UNION_TIME",
        "UNION_WINDOW",
        "UNION_DISPUTED",
        "UNION_UNFOUNDED",
        "SCORES_UNIONS",
    ),
)
@_where_defended
def _unions(_contract: Contract, defences: Defences) -> Both:
    hours = defences.dispute_hours
    return Both(
        "Participants whose updates are near-copies of each other can be declared one union by the operator, which "
        f"names the reason. A member may dispute that for {counted(hours, 'hour')}, signed with its contract key; then "
        "the operator may confirm it, with a reason where it was disputed. From the next round on the union's examples "
        "count once, as many as its largest member's, its part of equal payments and of floors counts once, and its "
        "members share what it is worth (Owen values).",
        f"更新互为近似副本的参与方，运营方可载明理由，宣告其为一个联合体。"
        f"成员可在{hours}小时内以其合约密钥签名提出异议；"
        "期满后运营方可予确认，有异议的应载明理由。自下一轮起，联合体的样本仅计一次，以样本最多的成员为准；"
        "其平均分配部分与保底部分仅计一次；其价值由成员分享（欧文值，Owen values）。",
    )


@DEFENCES.clause(
    "defences.negatives",
    states=("defences.negatives",),
    operator=("SETTLE_REVIEW_DUE",),
    record=("CONTRACT_NEGATIVES",),
    verify=("REVIEW_MISSING", "REVIEW_MISMATCH", "REVIEW_TIME"),
)
@_where_defended
def _negatives(_contract: Contract, defences: Defences) -> Both:
    part, exact = percent(defences.negatives), decimal_text(defences.negatives)
    return Both(
        f"Where negative values together are above {part.en} of the total value (negatives: {exact}), the period is "
        "not settled before more than half of the other participants have agreed to the operator's review.",
        f"负贡献值合计超过总价值的{part.zh}（negatives：{exact}）的，在其余参与方过半数同意运营方的复核意见之前，"
        f"不予结算。",
    )


@DEFENCES.clause(
    "defences.duplicates",
    states=("defences.max_duplicates",),
    agent=("DATA_DUPLICATES",),
    record=("CONTRACT_DUPLICATES",),
)
@_where_defended
def _duplicates(_contract: Contract, defences: Defences) -> Both | None:
    if defences.max_duplicates is None:
        return None
    part, exact = percent(defences.max_duplicates), decimal_text(defences.max_duplicates)
    return Both(
        f"At most {part.en} of a participant's contracted examples may be exact copies of another of them, features "
        f"and label (max_duplicates: {exact}). Its own agent counts them before it signs and before each attempt, and "
        "refuses more before its privacy budget is charged; that it refuses is seen, how many there are is not. An "
        "altered agent need not count.",
        f"参与方的约定样本中，特征与标签均与另一样本完全相同者至多占{part.zh}（max_duplicates：{exact}）。"
        f"其自有代理在签署前及每次尝试前予以清点，"
        "超出的，在计入隐私预算之前即予拒绝；他人可见其拒绝，不可见其数量。被改动的代理可以不予清点。",
    )


def _renormalised(contract: Contract) -> bool:
    return contract.contribution.game == "re-normalised"
