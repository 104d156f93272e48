"""Why an agent refuses, in Chinese: one sentence for each code that an enterprise can meet. Codes stay as they are.

Programs and logs know the code; the English message at its place has the values at hand. Clauses of the contract name
the codes of `CONTRACTED`; those of `LOCAL` rest on this enterprise's own affairs, of which no contract speaks.
"""

from collections.abc import Mapping

from fedpact_contract.language import Lang

CONTRACTED: Mapping[str, str] = {
    "ATTEMPTS_EXHAUSTED": "合约约定的备用尝试已用尽，本轮不再训练。",
    "BASE_MODEL_CHANGED": "同一轮的再次尝试使用了另一个基础模型。",
    "BASE_MODEL_MISMATCH": "所给的基础模型不是合约或日志所载的模型。",
    "BUDGET_EXCEEDED": "该步骤将使数据集的隐私预算超出上限。",
    "BUDGET_PLAN_EXCEEDED": "整个计划连同已计入及其他已签合约的计划，超出数据集的隐私预算。",
    "CARD_ENTITY_CHANGED": "agent.toml所声明的归属列与已签署的数据卡不一致。",
    "CLOSING_HEAD": "运营方的结算关账与其日志不符。",
    "CLOSING_UPDATE_MISSED": "日志称本代理已发送的更新未曾送达。",
    "CLOSING_UPDATE_REJECTED": "本代理的更新曾被驳回，日志无法证明其理由。",
    "CODE_BUNDLE_MISMATCH": "Flower所传送的程序包不是合约约定的程序包。",
    "CODE_MODELS_MISMATCH": "此处安装的训练代码不是合约所载的训练代码。",
    "CONTRACT_ACCOUNTANT": "合约所载的隐私核算器与此处安装的不同。",
    "CONTRACT_ENTITY_EPSILON": "同一主体全部数据行的隐私消耗高于合约所承诺的数值。",
    "CONTRACT_NOISE_TOO_SMALL": "合约的噪声不足以使整个计划保持在约定的ε之内。",
    "CONTRACT_NOT_A_PARTY": "本企业不是该合约的参与方。",
    "CONTRACT_NOT_RUNNING": "该合约在本机未处于运行状态。",
    "CONTRACT_NOT_SIGNED": "尚有一方未签署该合约。",
    "DATA_COLUMN_MISSING": "数据中缺少所声明的列。",
    "DATA_DUPLICATES": "完全相同的样本多于合约所允许的比例。",
    "DATA_ENTITY_MISSING": "有数据行未标明归属何主体。",
    "DATA_LABEL_BOUNDS": "有标签超出合约所载的上下界。",
    "DATA_LABEL_MISSING": "有数据行缺失标签，而合约约定此时拒绝该数据集。",
    "DATA_MISSING_VALUE": "有单元格缺失取值，而合约约定此时拒绝该数据集。",
    "DATA_NOT_A_NUMBER": "有单元格不是数值，而合约以该列为数值列。",
    "DATA_NOT_FINITE": "有单元格为NaN或无穷大。",
    "DATA_SET_KNOWN_ELSEWHERE": "该数据已以另一数据集的名义登记。",
    "DATA_TOO_FEW_ROWS": "可用的数据行少于约定样本数。",
    "DATA_UNKNOWN_CATEGORY": "有单元格的取值不在合约的取值表内。",
    "DATA_UNKNOWN_CLASS": "有标签不属于合约所载的类别。",
    "DATA_UNKNOWN_EVENT": "事件列有取值不是合约所载的两种结果之一。",
    "EGRESS_KIND": "此类消息不在允许外传的清单之内。",
    "HEAD_FEW_WITNESSES": "其他各方对前一日志树头的副署少于合约约定的个数。",
    "HEAD_FORK": "运营方就同一大小的日志出示了两个不同的树头。",
    "HEAD_INCONSISTENT": "运营方的日志不是本代理此前所见日志的延续。",
    "HEAD_NOT_NEWER": "运营方未出示较新的日志树头。",
    "HEAD_OLDER": "运营方出示的日志旧于本代理此前所见。",
    "HEAD_ORIGIN": "所出示的检查点属于另一合约的日志。",
    "HEAD_SIGNATURE": "检查点未经运营方的运行密钥签名。",
    "HEAD_UNKNOWN_START": "运营方所出示的树头链自本代理从未见过之处开始。",
    "KEY_REVOKED": "该合约的运行密钥已吊销，不再训练。",
    "LEDGER_RESTORED": "账本是旧的备份：已按全部用尽计，或须先执行restore。",
    "MEASUREMENT_DONE": "该项统计或基线已发布过一次。",
    "MEASUREMENT_NOT_PLANNED": "合约未约定该项统计或基线。",
    "NOT_INVITED": "日志未载明本参与方受邀参加该轮。",
    "OPERATOR_SILENT": "运营方未在约定期限内出示结算关账。",
    "ORDER_SIGNATURE": "指令未经运营方的运行密钥签名。",
    "PARTICIPANT_PAUSED": "本企业已暂停该合约。",
    "PARTICIPANT_WITHDRAWN": "本企业已退出该合约。",
    "POLICY_COLUMN": "合约读取了自有策略不允许的列。",
    "POLICY_ENTITY": "数据卡标明了数据行的归属，而合约仅保护单个数据行。",
    "POLICY_ENTITY_EPSILON": "合约对同一主体全部数据行的ε高于自有策略的上限。",
    "POLICY_EPSILON": "合约的ε高于自有策略对单个合约的上限。",
    "POLICY_EXPIRED": "自有策略已到期，或先于合约期限到期。",
    "POLICY_MIN_PARTICIPANTS": "合约约定的每轮最少参与方少于自有策略的要求。",
    "POLICY_MODEL": "自有策略不允许该模型种类。",
    "POLICY_NOT_A_PARTY": "本企业不是该合约的参与方。",
    "POLICY_OPERATOR": "自有策略不允许该运营方的密钥。",
    "POLICY_PURPOSE_MISMATCH": "合约的使用目的不在自有策略所允许的目的之内。",
    "POLICY_ROUNDS": "合约的轮数多于自有策略的上限。",
    "POLICY_SECTOR": "有其他参与方来自自有策略不允许的行业。",
    "POLICY_TERM": "当前时间不在合约期限之内。",
    "POLICY_TRUST_MODEL": "自有策略不允许该信任模型。",
    "PRIVACY_RANGE": "合约的隐私参数超出可以核算的范围。",
    "QUALITY_GATE": "数据集未通过自有的质量规则，或无法检查；列、规则与计数仅留在本机。",
    "RECEIPT_MISSING": "指令未附本代理上次应答的回执。",
    "RECEIPT_WRONG": "所附回执与本代理的应答不符，或不在日志之中。",
    "ROUND_BACKWARDS": "本代理已应答过更晚的轮次。",
    "ROUND_BEYOND_CONTRACT": "该轮次超出合约约定的轮数。",
    "ROUND_DONE": "该轮已有一次更新，不再训练。",
    "ROUND_FAILED": "该轮的尝试已告失败，不再重试。",
    "ROUND_NOT_OPENED": "指令未能证明该轮已在日志中开启。",
    "ROUND_NOT_PLANNED": "该轮次不在合约计划之内。",
    "SIGN_CARD": "合约所依据的数据卡不是本机最后签署的数据卡。",
    "SIGN_COLUMNS": "合约读取了本数据集未声明的列。",
    "SIGN_ENDED": "该合约此前已在本机签署，且已结束。",
    "SIGN_ENTITY": "合约以另一统一社会信用代码登记本企业的密钥。",
    "SIGN_ENTITY_COLUMN": "合约所用的归属列不是数据卡所声明的列。",
    "SIGN_GATE_ORDER": "合约所载的雷尼阶与数据卡不一致。",
    "SIGN_LABEL": "合约预测的标签不是本数据集所声明的标签。",
    "SIGN_NUM_EXAMPLES": "约定样本数与已签署的数据卡或agent.toml不一致。",
    "SIGN_OPERATOR": "合约的运营方不是本代理所登记的运营方。",
    "SIGN_SLICE": "合约计入的本企业验证行多于已发布的行数。",
    "TRUST_CONTRADICTION": "合约中某一方的密钥与本企业所知的不符。请勿签署，并以已知的电话号码核对指纹。",
    "WITNESS_WRONG": "其他参与方的副署不能验证，或其所见为另一份日志。",
}
"""On grounds that clauses of the contract name."""

LOCAL: Mapping[str, str] = {
    "ATTEMPT_ENDED": "该次尝试已经结束。",
    "ATTEMPT_SUPERSEDED": "已有更晚的尝试，或该合约已按全部用尽计。",
    "ATTEMPT_UNKNOWN": "账本中没有该次尝试的预留。",
    "CLOCK_SET_BACK": "本机时钟落后于运营方开启本轮的时刻五分钟以上，或曾被回拨。",
    "DATA_SET_BUDGET_FIXED": "数据集的隐私预算一经数据卡声明即不得变更。",
    "DECLINED": "已回答“否”：未做任何事。",
    "ENROLLED_ELSEWHERE": "本代理已在另一运营方登记。",
    "KEY_REVOCATION": "该合约已关账，其运行密钥不再签署任何内容。",
    "ORDER_ADDRESSEE": "该指令属于另一合约或另一参与方。",
    "ORDER_FORM": "指令的格式有误。",
    "OUTBOX_TAKEN": "该轮已有另一应答待发送。",
    "POLICY_DATA_SET_EPSILON": "全部合约合计对该数据集的隐私消耗高于自有策略的上限。",
    "POLICY_DATA_SET_USES": "全部合约合计对该数据集的使用次数多于自有策略的上限。",
    "POLICY_HOURS": "当前时间不在自有策略允许开始训练的时段之内。",
    "POST_CUT": "上传的数据无法送达运营方：途中限制了消息的大小。",
    "SIGN_LOOK": "首次读取数据行所用的时间超过合约规定的每轮期限，第一轮将会错过。",
    "SIGN_MEMORY": "按该合约训练所需的内存超过agent.toml中的limits.memory。",
    "SIGN_SCRATCH": "该合约的编码后数据行所需的磁盘空间超过本机剩余空间。",
    "STORE_OF_ANOTHER": "该账本属于另一企业。",
    "TRAINING_FAILED": "训练未能完成：原因仅记载于本机。",
}
"""On this enterprise's own grounds, or because a message is not what it should be: no clause speaks of it."""

_PLACES = {"file": "文件", "field": "字段", "party": "当事方", "rule": "规则"}


def place(name: str, value: str, lang: Lang) -> str:
    """Where an error lies, or what is to be done about it, as a line under its message."""
    if name == "remedy":
        return value
    return f"{_PLACES[name]}：{value}" if lang == "zh" else f"{name}: {value}"


def chinese(code: str) -> str | None:
    """What a code says, or None where the table does not have it."""
    return CONTRACTED.get(code) or LOCAL.get(code)
