"""The defences against gaming for people, in English or Chinese: what is done, what was found, what is not."""

import re
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from fedpact_contract.defended import DETECTORS
from fedpact_contract.language import Lang
from fedpact_contract.record import decimal_text
from fedpact_contract.undetected import ATTACKS, HERE, MEASURED
from fedpact_server.report.labels import CENTRAL
from fedpact_server.report.spelled import number_ranges, time_text

WORDS: dict[str, tuple[str, str]] = {
    "title": ("Defences against gaming", "防范投机"),
    "central": (
        "At client level no single update is looked at, neither for its score nor for an alarm.",
        "参与方级合约不查看任何单个更新，既不评分，也不报警。",
    ),
    "without": (
        "The contract has no defences: updates count as they come, and no detector looks at them.",
        "合约未设防范措施：更新按原样计入，亦无检测程序查看。",
    ),
    "clip_median-signal": (
        "In training and in scores an update counts scaled down to the signal of the median participant.",
        "更新在训练与评分中均缩至中位参与方的信号强度计入。",
    ),
    "clip_none": ("Updates count as they come; none is scaled down.", "更新按原样计入，不作缩减。"),
    "detectors": (
        "After each round the operator's detectors look at all admitted updates and values. An alarm is a question and "
        "moves no money.",
        "每轮之后，运营方的检测程序查看全部被采纳的更新及其价值。警报只是疑问，不改变金额。",
    ),
    "detectors_of_updates": (
        "After each round the operator's detectors look at all admitted updates; in this game they look at no value. "
        "An alarm is a question and moves no money.",
        "每轮之后，运营方的检测程序查看全部被采纳的更新；在此博弈下不查看价值。警报只是疑问，不改变金额。",
    ),
    "stated": (
        "What the detectors say is the operator's statement; an auditor that evaluates all coalitions makes it again.",
        "检测结果为运营方陈述；审计方复评全部联盟时可重新得出。",
    ),
    "remade": (
        "What the detectors say was made again by {}, and agrees.",
        "检测结果已由{}重新得出，结果一致。",
    ),
    "wreckers_reject": (
        "Whose own value is far below zero in two rounds running is invited no more until the operator reviewed it.",
        "自身价值连续两轮远低于零者，在运营方复核之前不再受邀。",
    ),
    "wreckers_report": (
        "Whose own value is far below zero in two rounds running is reported, and nobody is excluded.",
        "自身价值连续两轮远低于零者仅予报告，不排除任何参与方。",
    ),
    "union_rule": (
        "Participants with near-copies can be declared one union; a member may dispute that within so many hours: {}. "
        "Once it is confirmed their examples count once.",
        "更新近似重复的参与方可被声明为一个联合体；成员可在{}小时内提出异议。确认之后，其样本只计一次。",
    ),
    "negatives": (
        "Where negative values together are above {} % of the total value, nothing is settled before a review was "
        "agreed to.",
        "负价值合计超过总价值的{}%时，复核获得同意之前不予结算。",
    ),
    "max_duplicates": (
        "At most {} % of a participant's rows may be exact copies of another of them; its own agent refuses more.",
        "参与方的样本中与自身其他样本完全相同的副本不得超过{}%；超出者由其自身的代理程序拒绝。",
    ),
    "alarms": ("Alarms", "警报"),
    "none": ("No round is scored yet: there are no findings.", "尚无已评分的轮次，故无检测结果。"),
    "committed": (
        "The findings of the detectors are committed to and not open yet: they are opened with the scores, at the "
        "close of the period.",
        "检测结果已作承诺，尚未公开：将在结算期末与得分一并公开。",
    ),
    "withheld": (
        "The operator did not open the findings that it had committed to.",
        "运营方未公开其已承诺的检测结果。",
    ),
    "quiet": (
        "The findings of all scored rounds are opened. No detector raised an alarm.",
        "各已评分轮次的检测结果均已公开，无任何警报。",
    ),
    "raised": (
        "The findings of all scored rounds are opened. Alarms: {}.",
        "各已评分轮次的检测结果均已公开。警报数：{}。",
    ),
    "round": ("Round {}", "第{}轮"),
    "who": ("Participants: {}", "参与方：{}"),
    "nobody": ("nobody", "无"),
    "test": ("Statistic {}, threshold {}", "统计量{}，阈值{}"),
    "evidence": ("Evidence: {}", "证据：{}"),
    "no_power": ("Detectors without power", "检测力不足的检测程序"),
    "no_power_note": (
        "What they look for would hardly have been found after these rounds: that they raised no alarm says nothing.",
        "在所列轮次之后，其所查找的行为即使存在也难以发现：未报警不说明任何问题。",
    ),
    "rounds": ("Rounds: {}", "轮次：{}"),
    "why": ("Power: {}", "检测力：{}"),
    "clips": ("Updates scaled down", "被缩减的更新"),
    "clips_note": ("{} of {} updates counted by a factor below 1.", "共{1}个更新，其中{0}个按小于1的系数计入。"),
    "factor": ("Round {}: {}", "第{}轮：{}"),
    "exclusions": ("Exclusions", "排除"),
    "excluded": ("Invited no more after round {}", "第{}轮之后不再受邀"),
    "readmitted": ("Readmitted after round {}: {}", "第{}轮之后恢复：{}"),
    "unions": ("Unions", "联合体"),
    "union": (
        "Rests on findings up to round {}; it can be disputed until {}",
        "依据第{}轮及之前的检测结果；异议期至{}",
    ),
    "declared": ("Declared {}: {}", "声明（{}）：{}"),
    "agreed": ("Agreed to by {}", "{}同意"),
    "disputed": ("Disputed by {}", "{}提出异议"),
    "confirmed": ("Confirmed {}", "确认（{}）"),
    "withdrawn": ("Withdrawn", "撤回"),
    "counted": ("Counted once in rounds {}", "按一方计入的轮次：{}"),
    "reviews": ("Reviews of negative values", "负价值的复核"),
    "review": (
        "Negative values were {} % of the total value. What the operator found: {}",
        "负价值为总价值的{}%。运营方的复核结论：{}",
    ),
    "enough": ("More than half of the others agreed.", "其他参与方过半数同意。"),
    "not_enough": ("Not agreed to by more than half of the others.", "未获其他参与方过半数同意。"),
    "undetected": ("Attacks that are not detected, or not always", "无法检测或未必能检测的攻击"),
    "gain": (
        "{} Its share was {} times an honest one; an alarm in {} of {} runs.",
        "{0}所得份额为诚实参与的{1}倍；{3}次中有{2}次触发警报。",
    ),
}

DETECTORS_ZH = {
    "SIGNAL_ENERGY": "扣除申报噪声后，其更新大于他人：被放大，或数据行重复。",
    "DIRECTION": "其更新与他人方向不一致：随机、相反，或标签错误。",
    "REPLAY": "其更新并非训练所得，而是重复模型的上一步。",
    "DISPERSION": "其更新与他人的差异超出其行数所能解释：行数不足，或为他人的数据行。",
    "VALUE_PER_ROW": "其每行价值高于他人：数据行重复、知悉验证样本，或数据更优。",
    "WITHOUT_VALUE": "其每行价值不足他人的三分之一：仅为噪声，或标签无意义。",
    "NEAR_COPY": "两个更新以同样方式有别于他人：相同的数据行出现两次。",
    "NEGATIVE_VALUE": "其各轮合计价值为负，非偶然所致：标签错误，或恶意更新。",
    "WRECKER": "其自身价值连续两轮远低于零。",
    "NEGATIVES": "负价值合计占总价值的比例过大。",
    "SLICE_VALUE": "其在某一提供方的验证样本上价值高于其余样本：可能知悉该部分。",
}
"""`fedpact_contract.defended.DETECTORS`, code by code."""

EVIDENCE: dict[str, tuple[str, str]] = {
    "value": ("value", "取值"),
    "against": ("compared with", "比较对象"),
    "peers": ("peers", "同行数"),
    "peers_mean": ("mean of the peers", "同行均值"),
    "peers_deviation": ("standard deviation of the peers", "同行标准差"),
    "error": ("standard error", "标准误差"),
    "rounds": ("rounds", "轮数"),
    "slice": ("part of the validation rows", "验证样本部分"),
    "negative": ("negative values", "负价值"),
    "total": ("total value", "总价值"),
}
AGAINST: dict[str, tuple[str, str]] = {"peers": ("peers", "同行"), "declared noise": ("declared noise", "申报噪声")}

POWER_ZH = (
    (r"none before (\d+) rounds that follow a step", r"无：须有\1个承接前一步的轮次"),
    (r"none before two rounds", "无：须有两轮"),
    (r"none: nobody has (\d+) peers", r"无：无人有\1个同行"),
    (r"none: nobody was there in all these rounds", "无：无人参与全部所看轮次"),
    (r"none: the validation set is one slice, and a leak shows nowhere else", "无：验证集仅一部分，泄露无从比较"),
    (r"values above (\S+); the thing itself is (\S+)", r"可发现大于\1的值；所查找者为\2"),
    (r"values below (\S+); the thing itself is (\S+)", r"可发现小于\1的值；所查找者为\2"),
)
"""How the detectors say what they would have found, as patterns, and the same in Chinese."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table of facts: what it is about, a code, and what there is to say."""

    head: str
    code: str = ""
    lines: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A heading with a note and a table of facts."""

    title: str
    note: str = ""
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What stands in the report: rules, a note, blocks."""

    title: str
    rules: list[str]
    note: str = ""
    blocks: list[Block] = field(default_factory=list)


def defence_section(report: dict[str, Any], lang: Lang) -> Section:
    """The report's `defences`, of `fedpact_contract.defended`, in one language."""
    said, found = _Said(lang), report["defences"]
    if found is None:
        central = report["privacy"]["trust_model"] == CENTRAL
        return Section(title=said.word("title"), note=said.word("central" if central else "without"), rules=[])
    blocks = [said.alarms(found), said.no_power(found), said.clips(found), said.exclusions(found)]
    blocks += [said.unions(found), said.reviews(found)]
    kept = [block for block in blocks if block.rows or block.note]
    return Section(title=said.word("title"), rules=said.rules(report), blocks=kept)


def undetected_section(report: dict[str, Any], lang: Lang) -> Section | None:
    """The attacks that no detector finds, with what was measured of each; None where the report has none."""
    if not report["undetected"]:
        return None
    said, known = _Said(lang), {attack.english: attack.chinese for attack in ATTACKS if lang == "zh"}
    rules = [
        said.word("gain").format(known.get(line["attack"], line["attack"]), line["gain"], line["alarms"], line["runs"])
        for line in report["undetected"]
    ]
    notes = [MEASURED[said.place], *(HERE[why][said.place] for why in report["undetected_here"])]
    return Section(title=said.word("undetected"), rules=rules, note=(" " if lang == "en" else "").join(notes))


class _Said:
    """The section's parts in one language."""

    def __init__(self, lang: Lang) -> None:
        self.place = 1 if lang == "zh" else 0
        self._colon, self._stop, self._comma = ("：", "；", "、") if lang == "zh" else (": ", "; ", ", ")

    def word(self, key: str) -> str:
        return WORDS[key][self.place]

    def rules(self, report: dict[str, Any]) -> list[str]:
        clause, audit = report["defences"]["clause"], report["reevaluation"]
        of_values = report["defences"]["of_values"]
        agreed = audit is not None and audit["coalitions"] == "all" and not audit["differing"]
        percent, copies = decimal_text(Decimal(clause["negatives"]) * 100), clause.get("max_duplicates")
        return [
            self.word(f"clip_{clause['clip']}"),
            self.word("detectors" if of_values else "detectors_of_updates"),
            self.word("remade").format(audit["auditor"]) if agreed else self.word("stated"),
            *([self.word(f"wreckers_{clause['wreckers']}")] if of_values else []),
            self.word("union_rule").format(clause["dispute_hours"]),
            self.word("negatives").format(percent),
            *([] if copies is None else [self.word("max_duplicates").format(decimal_text(Decimal(copies) * 100))]),
        ]

    def alarms(self, found: dict[str, Any]) -> Block:
        state, alarms = found["findings"], found["alarms"]
        key = state if state != "opened" else "raised" if alarms else "quiet"
        rows = [self._alarm(line) for line in alarms]
        return Block(title=self.word("alarms"), note=self.word(key).format(len(alarms)), rows=rows)

    def no_power(self, found: dict[str, Any]) -> Block:
        rows = [
            Row(
                head="",
                code=line["code"],
                lines=[
                    self._meaning(line["code"]),
                    self.word("rounds").format(number_ranges(line["rounds"])),
                    self.word("why").format(self._power(line["power"])),
                ],
            )
            for line in found["no_power"]
        ]
        return Block(title=self.word("no_power"), note=self.word("no_power_note") if rows else "", rows=rows)

    def clips(self, found: dict[str, Any]) -> Block:
        if found["clause"]["clip"] == "none":
            return Block(title=self.word("clips"))
        by_party: dict[str, Row] = {}
        for line in found["clipped"]:
            row = by_party.setdefault(line["participant"]["id"], Row(head=line["participant"]["name"], lines=[]))
            factor = Decimal(line["factor"]).quantize(Decimal("0.0001"), ROUND_FLOOR)
            row.lines.append(self.word("factor").format(line["round"], factor))
        note = self.word("clips_note").format(len(found["clipped"]), found["updates"])
        return Block(title=self.word("clips"), note=note, rows=list(by_party.values()))

    def exclusions(self, found: dict[str, Any]) -> Block:
        rows = []
        for line in found["exclusions"]:
            lines = [self.word("excluded").format(line["round"])]
            if line["readmitted"] is not None:
                again = line["readmitted"]
                lines.append(self.word("readmitted").format(again["round"], again["reason"]))
            rows.append(Row(head=line["participant"]["name"], code=line["code"], lines=lines))
        return Block(title=self.word("exclusions"), rows=rows)

    def unions(self, found: dict[str, Any]) -> Block:
        rows = []
        for union in found["unions"]:
            lines = [self.word("union").format(union["round"], time_text(union["until"]))]
            lines += [self._step(step) for step in union["steps"]]
            if union["rounds"]:
                lines.append(self.word("counted").format(number_ranges(union["rounds"])))
            rows.append(Row(head=self._names(union["members"]), lines=lines))
        return Block(title=self.word("unions"), rows=rows)

    def reviews(self, found: dict[str, Any]) -> Block:
        rows = []
        for review in found["reviews"]:
            percent = decimal_text(Decimal(review["ratio"]) * 100)
            lines = [self.word("review").format(percent, review["text"])]
            lines += [self._step(answer) for answer in review["answers"]]
            lines.append(self.word("enough" if review["agreed"] else "not_enough"))
            rows.append(Row(head=self._names(review["negative"]), lines=lines))
        return Block(title=self.word("reviews"), rows=rows)

    def _step(self, step: dict[str, Any]) -> str:
        if step["what"] == "declared":
            return self.word("declared").format(time_text(step["at"]), step["reason"])
        text = self.word(step["what"]).format(
            time_text(step["at"]) if step["at"] else step["by"] and step["by"]["name"]
        )
        return text if step["reason"] is None else f"{text}{self._colon}{step['reason']}"

    def _alarm(self, line: dict[str, Any]) -> Row:
        lines = [
            self._meaning(line["code"]),
            self.word("who").format(self._names(line["participants"]) or self.word("nobody")),
            self.word("test").format(line["statistic"], line["threshold"]),
        ]
        if line["evidence"]:
            known = [key for key in EVIDENCE if key in line["evidence"]]
            keys = [*known, *(key for key in line["evidence"] if key not in EVIDENCE)]
            told = [self._of(EVIDENCE, key) + self._colon + self._told(line["evidence"][key]) for key in keys]
            lines.append(self.word("evidence").format(self._stop.join(told)))
        return Row(head=self.word("round").format(line["round"]), code=line["code"], lines=lines)

    def _meaning(self, code: str) -> str:
        return (DETECTORS_ZH if self.place else DETECTORS).get(code, code)

    def _power(self, text: str) -> str:
        for pattern, chinese in POWER_ZH if self.place else ():
            if re.fullmatch(pattern, text):
                return re.sub(pattern, chinese, text)
        return text

    def _told(self, value: str | int) -> str:
        return self._of(AGAINST, str(value))

    def _of(self, known: dict[str, tuple[str, str]], key: str) -> str:
        return known.get(key, (key, key))[self.place]

    def _names(self, parties: list[dict[str, str]]) -> str:
        return self._comma.join(party["name"] for party in parties)
