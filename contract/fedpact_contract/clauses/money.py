"""How revenue is split, what code runs, what proves it, and what nothing here stops."""

from fedpact_contract.clauses.clause import Both, Chapter, join, percent
from fedpact_contract.contract import ClientPrivacy, Contract
from fedpact_contract.output import counted, visible
from fedpact_contract.record import decimal_text
from fedpact_contract.report import not_stopped, not_stopped_zh

MONEY = Chapter(title=Both("Money", "收益分配"))
CODE = Chapter(title=Both("Code", "程序代码"))
EVIDENCE = Chapter(title=Both("Evidence", "存证"))
LIMITS = Chapter(title=Both("What nothing here stops", "本系统无法阻止的行为"))


@MONEY.clause(
    "money.pool",
    states=("settlement.currency",),
    operator=("MONEY_FORM", "MONEY_DECIMALS"),
    verify=("SETTLEMENT_POOL", "SETTLEMENT_AMOUNT", "SETTLEMENT_FEES"),
    promise=True,
)
def _pool(contract: Contract) -> Both:
    currency = contract.settlement.currency
    return Both(
        f"Amounts are in {currency}, in whole fen. The pool of a period is its revenue less fees, as the operator "
        "states them in the log.",
        f"金额以{currency}（人民币）计，精确至分。结算期的分配池为该期收入减去费用，"
        f"收入与费用以运营方载入日志的陈述为准。",
    )


@MONEY.clause(
    "money.split",
    states=("settlement.contribution_weight", "settlement.data_weight", "settlement.equal_weight"),
    record=("CONTRACT_WEIGHTS", "CONTRACT_CENTRAL_PAYOUT"),
    verify=("SETTLEMENT_FEN", "SETTLEMENT_LINES", "SETTLEMENT_WEIGHTS"),
)
def _split(contract: Contract) -> Both:
    terms = contract.settlement
    weights = (terms.contribution_weight, terms.data_weight, terms.equal_weight)
    (a, b, c), (x, y, z) = (percent(weight) for weight in weights), (decimal_text(weight) for weight in weights)
    return Both(
        f"Of the pool, {a.en} is split by contribution (weight {x}; a negative contribution counts as 0), {b.en} by "
        f"contracted examples (weight {y}) and {c.en} equally (weight {z}); the last two pro rata to the rounds in "
        "which a participant was admitted.",
        f"分配池的{a.zh}按贡献分配（权重{x}；贡献为负的计为0），{b.zh}按约定样本数分配（权重{y}），"
        f"{c.zh}平均分配（权重{z}）；"
        "后两项按参与方被采纳的轮数比例计算。",
    )


@MONEY.clause("money.fallback", states=("settlement.fallback",), verify=("SETTLEMENT_BASIS",))
def _fallback(contract: Contract) -> Both:
    fallback = contract.settlement.fallback
    basis = {
        "metered": Both("by contracted examples, pro rata to rounds admitted", "按约定样本数并按被采纳的轮数比例"),
        "equal": Both("equally, pro rata to rounds admitted", "平均并按被采纳的轮数比例"),
    }[fallback]
    return Both(
        f'If contributions cannot be told from chance on the validation rows, the fallback is "{fallback}": the pool '
        f"is split {basis.en}.",
        f"各方贡献在验证行上与偶然无法区分的，适用备用规则“{fallback}”：分配池{basis.zh}分配。",
    )


@MONEY.clause("money.floors", states=(), verify=("SETTLEMENT_FEN", "SETTLEMENT_FLOORS", "SETTLEMENT_UNBALANCED"))
def _floors(_contract: Contract) -> Both:
    return Both(
        "Each participant gets at least its payment floor, pro rata to its rounds; what that takes comes from the "
        "others in proportion. Floors beyond the pool are paid pro rata. Fen left over in rounding go to the largest "
        "remainders, ties by fingerprint. The amounts sum to the pool, to the fen.",
        "各参与方所得不低于其按轮数比例计算的保底金额；所需款项由其余参与方按比例承担。保底金额合计超出分配池的，"
        "按比例支付。"
        "取整所余的分按最大余数法分配，余数相同的按指纹排序。各项金额之和等于分配池，精确至分。",
    )


@MONEY.clause("money.control", states=("common_control",), verify=("SETTLEMENT_FEN", "SETTLEMENT_FLOORS"))
def _control(contract: Contract) -> Both | None:
    if not contract.common_control:
        return None
    return Both(
        "A round in which several participants under common control were admitted counts once for their equal part, "
        "which they split pro rata to their own rounds. Their floor is one, in each round the largest of those "
        "admitted. What the group gets is split by the same rule: a member's own floor comes from the others of the "
        "group, and floors beyond what the group gets are paid pro rata.",
        "同一轮有受同一控制的多个参与方被采纳的，其平均分配部分只计一次，由各成员按自身被采纳的轮数比例分取。"
        "其保底金额亦只计一份，每轮取被采纳成员中最高者；该组所得按同一规则在成员间分配："
        "成员自身的保底金额由该组其余成员承担，合计超出该组所得的，按比例支付。",
    )


@MONEY.clause("money.early", verify=("SCORES_NOT_OPENED", "SETTLEMENT_BASIS"))
def _early(_contract: Contract) -> Both:
    return Both(
        "A run that ends early, for whatever reason, is settled over the rounds that were committed. Where the "
        "operator cannot open the scores that it committed to, the fallback is due: that is the operator's fault, "
        "`verify` names it, and no agent countersigns it by itself.",
        "运行提前终止的，无论何种原因，均就已作出承诺的各轮结算。运营方不能公开其已承诺的得分的，适用备用规则："
        "其过错在运营方，"
        "由`verify`指明，代理不自行副署。",
    )


@MONEY.clause(
    "money.close",
    states=("settlement.close_days",),
    agent=("OPERATOR_SILENT", "CLOSING_HEAD", "CLOSING_UPDATE_MISSED", "CLOSING_UPDATE_REJECTED"),
    operator=("CLOSING_NOT_OPEN", "CLOSING_PARTY"),
    verify=("CLOSING_EARLY", "CLOSING_CHECKPOINT", "COUNTERSIGNATURE_MISSING"),
    promise=True,
)
def _close(contract: Contract) -> Both:
    days = contract.settlement.close_days
    return Both(
        f"The operator shows the closing at most {counted(days, 'day')} after the end of the term. A participant's "
        "agent that has seen none by then raises an alarm and keeps a signed record of it, with the operator's last "
        "signatures. A period closes when the paid participants have countersigned; the line of a participant that "
        "does not sign is held, the others are paid.",
        f"运营方至迟于合约期限届满后{days}日内出示结算关账。届时仍未见关账的，参与方代理发出警报，"
        f"并保存载有运营方最后签名的签名记录。"
        "取得款项的各参与方均已副署的，结算期关闭；未副署的参与方，其款项暂予保留，其余照付。",
    )


@CODE.clause(
    "code.release",
    states=("code.release", "code.models_digest"),
    agent=("CODE_MODELS_MISMATCH",),
    operator=("CONTRACT_CODE",),
)
def _release(contract: Contract) -> Both:
    release, digest = visible(contract.code.release), contract.code.models_digest
    return Both(
        f"Training runs by the installed release {release}, whose training code has this digest: {digest}",
        f"训练由已安装的发行版{release}执行，其训练代码的摘要为：{digest}",
    )


@CODE.clause("code.bundle", states=("code.shell_digest",), agent=("CODE_BUNDLE_MISMATCH",), operator=("CONTRACT_CODE",))
def _bundle(contract: Contract) -> Both:
    digest = contract.code.shell_digest
    return Both(
        f"The bundle that Flower carries is an empty shell; no code of it runs at a participant. Its digest is: "
        f"{digest}",
        f"Flower所传送的程序包仅为空壳，其中代码不在任何参与方处运行。其摘要为：{digest}",
    )


@EVIDENCE.clause(
    "evidence.log",
    agent=(
        "HEAD_INCONSISTENT",
        "HEAD_OLDER",
        "HEAD_NOT_NEWER",
        "HEAD_FORK",
        "HEAD_SIGNATURE",
        "HEAD_ORIGIN",
        "HEAD_UNKNOWN_START",
    ),
    verify=("LOG_ROOT", "LOG_DELETED", "LOG_INSERTED", "LOG_UNSIGNED", "CHECKPOINT_ROOT"),
)
def _log(_contract: Contract) -> Both:
    return Both(
        "Everything that counts is in one append-only log (RFC 9162): this contract with all signatures, each round, "
        "each update's digest and receipt, refusals, scores, revenue and payments. Participants hold signed heads of "
        "it, so that a change afterwards is found.",
        "一切有关事项均载于同一份仅可追加的日志（RFC 9162）：本合约及全部签名、各轮、各更新的摘要与回执、各次拒绝、"
        "得分、收入与付款。"
        "参与方持有经签名的日志树头，事后改动均可发现。",
    )


@EVIDENCE.clause("evidence.recompute")
def _recompute(_contract: Contract) -> Both:
    return Both(
        "Every signatory may fetch the log and recompute every share and every fen with `fedpact verify`; each paid "
        "participant's agent does so before it countersigns. Codes that stand behind `verify` are those that it names.",
        "各签署方均可取得日志，并以`fedpact verify`重新计算每一份额与每一分；取得款项的各参与方代理在副署前均如此核算。"
        "“复核”之后所列代码，即由`verify`指明。",
    )


@EVIDENCE.clause("evidence.operator", operator=("PARTICIPANT_SUSPENDED",), verify=("LOG_ROOT", "SETTLEMENT_FEN"))
def _powers(_contract: Contract) -> Both:
    return Both(
        "The operator may suspend a participant (no more orders). It cannot change keys, thresholds or what was "
        "earned.",
        "运营方可以中止参与方（不再发送指令），但不得变更密钥、阈值或已取得的收益。",
    )


@LIMITS.clause("limits", states=("privacy.trust_model",))
def _limits(contract: Contract) -> Both:
    central = isinstance(contract.privacy, ClientPrivacy)
    lines = zip(not_stopped(contract), not_stopped_zh(central=central), strict=True)
    return Both("Nothing here stops:", "下列行为，本系统无法阻止：") + join(
        Both(f"\n    - {english}", f"\n    - {chinese}") for english, chinese in lines
    )
