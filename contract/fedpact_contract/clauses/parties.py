"""Who the parties are, and what for and how long their data is used."""

from fedpact_contract.clauses.clause import NOTHING, Both, Chapter, entity, fen, join, listed, moment, party
from fedpact_contract.contract import Contract, ControlGroup, Participant
from fedpact_contract.output import visible
from fedpact_contract.record import decimal_text

PARTIES = Chapter(title=Both("Parties", "合约各方"))
PURPOSE = Chapter(title=Both("Purpose and term", "使用目的与期限"))


@PARTIES.clause(
    "parties.operator",
    states=("operator",),
    agent=("SIGN_OPERATOR", "POLICY_OPERATOR", "ORDER_SIGNATURE"),
    operator=("CONTRACT_OPERATOR",),
)
def _operator(contract: Contract) -> Both:
    return Both(
        "The operator coordinates training, keeps the log and the validation set, and pays. ",
        "运营方负责协调训练、保管日志与验证集，并支付款项。运营方为：",
    ) + party(contract.operator)


@PARTIES.clause(
    "parties.participants",
    states=("participants",),
    agent=(
        "CONTRACT_NOT_A_PARTY",
        "POLICY_NOT_A_PARTY",
        "POLICY_SECTOR",
        "SIGN_CARD",
        "SIGN_ENTITY",
        "SIGN_GATE_ORDER",
        "SIGN_NUM_EXAMPLES",
    ),
    operator=("PARTICIPANT_NOT_ACTIVE",),
    record=("CONTRACT_PARTY_TWICE", "CONTRACT_ENTITY_TWICE", "CONTRACT_DATA_SET_TWICE", "CONTRACT_GATE_ORDER"),
)
def _participants(contract: Contract) -> Both:
    count = len(contract.participants)
    return Both(
        f"The participants are {count} enterprises that train, each on its own premises. They are:",
        f"参与方为下列{count}家企业，各在其自有场所内训练：",
    ) + join(_participant(p) for p in contract.participants)


def _participant(who: Participant) -> Both:
    sector, data_set, floor = visible(who.sector), visible(who.data_set), fen(who.floor_fen)
    order = None if who.gate_order is None else decimal_text(who.gate_order)
    return (
        Both("\n    - ", "\n    - ")
        + party(who)
        + Both(
            f"\n      Sector: {sector}. Data set: {data_set}. Contracted examples: {who.num_examples}. "
            f"Payment floor: {floor.en}.",
            f"\n      行业：{sector}。数据集：{data_set}。约定样本数：{who.num_examples}。保底金额：{floor.zh}。",
        )
        + (NOTHING if order is None else Both(f" Rényi order of its ledger: {order}.", f"其账本的雷尼阶：{order}。"))
        + (NOTHING if who.card is None else Both(f"\n      Card of it: {who.card}", f"\n      其数据卡：{who.card}"))
    )


@PARTIES.clause("parties.buyer", states=("buyer",))
def _buyer(contract: Contract) -> Both | None:
    if contract.buyer is None:
        return None
    who = entity(contract.buyer)
    return Both(
        f"The buyer of the model signs nothing here. It is {who.en}.", f"模型的购买方不签署本合约。购买方为{who.zh}。"
    )


@PARTIES.clause("parties.affiliates", states=("affiliates",), record=("CONTRACT_AFFILIATE", "CONTRACT_NO_BUYER"))
def _affiliates(contract: Contract) -> Both | None:
    if not contract.affiliates:
        return None
    of = {"operator": "运营方", "buyer": "购买方"}
    named = [(entity(a), a.of) for a in contract.affiliates]
    return (
        Both(
            "Under common control with the operator or the buyer, as they declare, are:",
            "经运营方或购买方申报，下列主体与其受同一控制：",
        )
        + join(Both(f"\n    - {e.en}, with the {who}", f"\n    - {e.zh}，与{of[who]}受同一控制") for e, who in named)
        + Both("\n    None of them is paid by contribution.", "\n    上述主体均不按贡献取得收益。")
    )


@PARTIES.clause("parties.control", states=("common_control", "participants"), record=("CONTRACT_COMMON_CONTROL",))
def _control(contract: Contract) -> Both | None:
    if not contract.common_control:
        return None
    names = {p.entity_code: p.name for p in contract.participants}
    groups = [(_who(g), listed(names[code] for code in g.members)) for g in contract.common_control]
    return (
        Both(
            "Under common control, as they declare, are these participants:",
            "经申报，下列参与方受同一控制：",
        )
        + join(Both(f"\n    - {name}: {members.en}", f"\n    - {name}：{members.zh}") for name, members in groups)
        + Both(
            "\n    Each group is one party for the equal part, for floors and for the minimum of a round (below).",
            "\n    就平均分配部分、保底金额及每轮最低数目（见下文）而言，每组视为一方。",
        )
    )


def _who(group: ControlGroup) -> str:
    return visible(group.name) + ("" if group.entity_code is None else f" ({group.entity_code})")


@PARTIES.clause(
    "parties.auditor", states=("auditor",), agent=("TRUST_CONTRADICTION",), record=("CONTRACT_CENTRAL_AUDITOR",)
)
def _auditor(contract: Contract) -> Both | None:
    if (auditor := contract.auditor) is None:
        return None
    who = party(auditor)
    return Both(
        "The auditor signs nothing here, trains on nothing and is paid nothing; it may re-evaluate the scores. "
        f"{who.en}\n      Key for deposits: {auditor.encryption_key}\n      The fingerprint is that of both keys.",
        f"审计方不签署本合约，不参与训练，不取得报酬；其可复评得分。审计方为：{who.zh}"
        f"\n      寄存加密公钥：{auditor.encryption_key}\n      该指纹为上述两个公钥的指纹。",
    )


@PARTIES.clause(
    "parties.keys",
    agent=("TRUST_CONTRADICTION", "CONTRACT_NOT_SIGNED"),
    operator=("UPDATE_SIGNATURE",),
    verify=(
        "CONTRACT_UNSIGNED",
        "CONTRACT_SIGNED_BY_STRANGER",
        "DELEGATION_MISSING",
        "DELEGATION_STRANGER",
        "DELEGATION_TWICE",
        "DELEGATION_KEY",
    ),
)
def _keys(_contract: Contract) -> Both:
    return Both(
        "A party is its key: whoever signs must compare the fingerprints above with what the other parties told it "
        "directly. Names are labels. Each party delegates one run key for this contract with its signature.",
        "各方以其密钥为准：签署人应将上列指纹与其他各方直接告知者逐一核对。名称仅为标识。"
        "各方签署时为本合约授权一个运行密钥。",
    )


@PURPOSE.clause("purpose.purpose", states=("purpose",), agent=("POLICY_PURPOSE_MISMATCH",), promise=True)
def _purpose(contract: Contract) -> Both:
    purpose = visible(contract.purpose)
    return Both(
        f"The data may be used for this purpose only: {purpose}. Each participant's agent refuses where its own policy "
        "does not name this purpose, letter by letter. What is done with the finished model is a promise of whoever "
        "receives it; no software enforces that.",
        f"数据仅可用于下列目的：{purpose}。参与方自有策略未逐字列明该目的的，其代理予以拒绝。"
        "训练所得模型的后续使用，以取得模型者的承诺为准，不由软件执行。",
    )


@PURPOSE.clause(
    "purpose.term",
    states=("term",),
    agent=("POLICY_TERM", "POLICY_EXPIRED"),
    operator=("CONTRACT_TERM", "CONTRACT_EXPIRED"),
    record=("CONTRACT_TERM",),
)
def _term(contract: Contract) -> Both:
    start, end = contract.term.not_before, contract.term.not_after
    begins, ends = moment(start), moment(end)
    return Both(
        f"Training may take place from {start} to {end} (UTC), in Beijing's time (UTC+8) from {begins.en} to "
        f"{ends.en}. Each participant's agent refuses every order outside this term.",
        f"训练期限自{begins.zh}起至{ends.zh}止（北京时间，UTC+8），即{start}至{end}（UTC）。期限以外的指令，"
        f"参与方代理一律拒绝。",
    )


@PURPOSE.clause(
    "purpose.run",
    agent=("CONTRACT_NOT_RUNNING", "PARTICIPANT_PAUSED", "PARTICIPANT_WITHDRAWN", "SIGN_ENDED"),
    operator=("RUN_ENDED", "NOTICE_WITHDRAWN"),
    verify=("CONTRACT_TWICE", "RUN_COMPLETED_TWICE", "ROUND_AFTER_END", "INVITED_AWAY", "NOTICE_OLD"),
)
def _run(_contract: Contract) -> Both:
    return Both(
        "The contract has one run. Any participant may pause or withdraw at any time: its agent then trains nothing "
        "more, ends a training that runs, and says so in the log; whoever paused or withdrew is not invited. What it "
        "has sent stays in the model, and what it has earned is paid.",
        "本合约仅运行一次。任何参与方均可随时暂停或退出：其代理即不再训练，终止进行中的训练，并在日志中声明；"
        "已暂停或退出的参与方不再受邀。此前已发送的内容仍保留于模型之中，已取得的收益照常支付。",
    )


@PURPOSE.clause(
    "purpose.revocation",
    agent=("KEY_REVOKED",),
    operator=("KEY_REVOKED", "REVOCATION_MISMATCH"),
    verify=("KEY_REVOKED", "REVOKED_TWICE"),
)
def _revocation(_contract: Contract) -> Both:
    return Both(
        "A participant may revoke its run key with its contract key: what the run key signs counts only before that "
        "entry of the log. It is then invited no more, and signs what is left with its contract key.",
        "参与方可以其合约密钥吊销其运行密钥：运行密钥所作签名，仅在该日志条目之前者有效。"
        "此后该参与方不再受邀，其余事项以合约密钥签署。",
    )


@PURPOSE.clause("purpose.policy")
def _policy(_contract: Contract) -> Both:
    return Both(
        "Each participant also has a policy of its own, which is no part of this contract. It may narrow what this "
        "contract allows and never widens it. Its agent holds this contract against it before it signs, and again "
        "before every round; what the policy does not allow is refused by a code that begins with POLICY_.",
        "各参与方另有其自有策略，不属于本合约内容。自有策略只能收窄、不得放宽本合约所允许的事项。"
        "参与方代理在签署前及每轮训练前均以自有策略核对本合约；策略不允许的，以POLICY_开头的代码予以拒绝。",
    )
