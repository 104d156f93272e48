"""A quality profile for people, in English and Chinese: on the terminal and as one HTML file. Never a value."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpact_client.quality import Finding, Profile
from fedpact_contract import output, page
from fedpact_contract.language import Lang
from fedpact_contract.output import line
from fedpact_contract.quality import DIMENSIONS, TC609, Dimension

if TYPE_CHECKING:
    from fedpact_models.profile import ColumnCounts

WORDS: dict[str, tuple[str, str]] = {
    "title": ("Quality of the data set {}", "数据集 {} 的质量报告"),
    "stays": (
        "Counts, and no value of any cell. This report stays on the premises; nothing of it was sent.",
        "仅含计数，不含任何单元格的值。本报告只留在本地，未发送任何内容。",
    ),
    "source": ("Source: {}; read on {}", "数据源：{}；读取日期：{}"),
    "kept": ("Every rule is kept ({} checked).", "全部规则均通过（共检查 {} 条）。"),
    "broken": (
        "Rules broken: {}. A rule of agent.toml that is broken keeps the data set from card, contract and training.",
        "未通过的规则：{} 条。agent.toml 中的规则未通过时，该数据集不能出具数据卡、签署合约或参加训练。",
    ),
    "few": (
        "agent.toml declares {} examples (num_examples) and the source has {} rows: `card` refuses the data set so.",
        "agent.toml申报{}个样本（num_examples），而数据源只有{}行：这样的数据集不能出具数据卡。",
    ),
    "no_rules": (
        "agent.toml has no rule for this data set ([[data_sets.rules]]): nothing is refused for its quality.",
        "agent.toml 未为该数据集声明规则（[[data_sets.rules]]）：不会因质量而拒绝。",
    ),
    "no_reference": (
        "No card of this data set was signed with a profile yet: there is no drift to tell.",
        "该数据集尚无带画像的已签数据卡：无从比较漂移。",
    ),
    "standards": (
        "Codes: TC609-5-2025-04; dimensions: GB/T 36344. The mapping is ours.",
        "代码依据 TC609-5-2025-04，维度依据 GB/T 36344；对应关系由本软件给出。",
    ),
    "rules": ("Rules", "规则"),
    "columns": ("Columns", "列"),
    "whole": ("The whole table", "整张表"),
    "verdict": ("result", "结果"),
    "rule": ("rule", "规则"),
    "column": ("column", "列"),
    "count": ("count", "计数"),
    "limit": ("limit", "限值"),
    "code": ("TC609", "TC609 代码"),
    "dimension": ("GB/T 36344", "GB/T 36344 维度"),
    "both": ("TC609, GB/T 36344", "TC609 与 GB/T 36344"),
    "whose": ("declared in", "出处"),
    "contract": ("contract", "合约"),
    "missing": ("missing", "缺失"),
    "type": ("type", "类型"),
    "not_finite": ("NaN or infinite", "非有限数"),
    "constant": ("one value only", "仅一个取值"),
    "what": ("what", "项目"),
    "passed": ("kept", "通过"),
    "failed": ("BROKEN", "未通过"),
    "open": ("not compared", "无可比较"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "rows": ("rows", "行数"),
    "duplicates": ("rows that are exact copies of another", "完全重复的行"),
    "labels": ("different labels", "标签取值数"),
    "rarest": ("rows of the rarest label", "最少标签的行数"),
    "commonest": ("rows of the commonest label", "最多标签的行数"),
    "entities": ("entities that rows belong to", "主体数"),
    "most": ("most rows of one entity", "单一主体的最多行数"),
    "readable": ("source readable", "数据源可读"),
    "number": ("number", "数值"),
    "integer": ("integer", "整数"),
    "text": ("text", "文本"),
    "day": ("day", "日期"),
    "mixed": ("mixed", "混合"),
    "empty": ("empty", "空"),
}
RULES: dict[str, tuple[str, str]] = {
    "missing": ("cells without a value", "缺失单元格"),
    "type": ("values of another type", "类型不符的值"),
    "finite": ("cells that are NaN or infinite", "非有限数值"),
    "bounds": ("numbers outside the bounds", "超出界限的数值"),
    "vocabulary": ("values outside the vocabulary", "词表之外的取值"),
    "duplicates": ("rows that are exact copies", "完全重复的行"),
    "varies": ("cells of a column with one value", "仅一个取值的列"),
    "balance": ("rows of the rarest label", "最少标签的行数"),
    "rows": ("rows", "行数"),
    "entities": ("entities", "主体数"),
    "recent": ("rows without a recent day", "无近期日期的行"),
    "drift": ("cells moved since the last card", "自上次数据卡以来移动的单元格"),
}
"""What each rule counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """A heading, the names of the columns, the rows, and which columns are set flush right."""

    heading: str
    columns: list[str]
    rows: list[list[str]]
    right: tuple[int, ...]


def show(found: Profile, lang: Lang, today: str) -> None:
    """The report on the terminal."""
    title, notes, tables = _report(found, lang, today, wide=False)
    line(title)
    for note in notes:
        line(note)
    for table in tables:
        line()
        line(table.heading)
        output.table(output.console(), table.columns, table.rows, right=table.right)


def render(found: Profile, lang: Lang, today: str) -> str:
    """The report as one HTML document."""
    title, notes, tables = _report(found, lang, today, wide=True)
    parts = [page.paragraph(note) for note in notes]
    for table in tables:
        parts += [f"<h2>{table.heading}</h2>", page.table(table.columns, table.rows, right=table.right)]
    return page.document(title, lang, *parts)


def _report(found: Profile, lang: Lang, today: str, *, wide: bool) -> tuple[str, list[str], list[_Table]]:
    def word(key: str, *values: object) -> str:
        return WORDS[key][lang == "zh"].format(*values)

    own = [f for f in found.findings if f.whose == "agent.toml"]
    notes = [
        word("broken", len(found.failed)) if found.failed else word("kept", len(found.findings)),
        *([word("few", found.declared, found.counts.rows)] if found.counts.rows < found.declared else []),
        *([] if own else [word("no_rules")]),
        *([] if found.compared else [word("no_reference")]),
        word("source", found.source, today),
        word("stays"),
        word("standards"),
    ]
    heads = ("verdict", "rule", "column", "count", "limit", *(("code", "dimension", "whose") if wide else ("both",)))
    rules = _Table(
        heading=word("rules"),
        columns=[word(head) for head in heads],
        rows=[_readable(found, lang, wide), *(_rule(f, lang, wide) for f in found.findings)],
        right=(3,),
    )
    columns = _Table(
        heading=word("columns"),
        columns=[word(k) for k in ("column", "missing", "type", "not_finite", "constant")],
        rows=[
            [c.name, str(c.missing), word(_type(c, found.counts.rows)), str(c.not_finite), word(_yes(c.constant))]
            for c in found.counts.columns
        ],
        right=(1, 3),
    )
    whole = _Table(
        heading=word("whole"),
        columns=[word("what"), word("count")],
        rows=[[word(key), str(value)] for key, value in _whole(found).items()],
        right=(1,),
    )
    return word("title", found.data_set), notes, [rules, columns, whole]


def _readable(found: Profile, lang: Lang, wide: bool) -> list[str]:
    """What every profile shows by itself: the source could be opened and read as what it is said to be."""
    rows, place = found.counts.rows, lang == "zh"
    about = _about("0201", "accessibility", lang, wide)
    said = [WORDS["passed"][place], WORDS["readable"][place], "-", f"{rows} / {rows}", "-", *about]
    return [*said, "-"] if wide else said


def _rule(finding: Finding, lang: Lang, wide: bool) -> list[str]:
    place, rule = lang == "zh", finding.rule
    verdict = {True: "passed", False: "failed", None: "open"}[finding.passed]
    said = f"{'：' if place else ': '}{RULES[rule.rule][place]}" if wide else ""
    row = [
        WORDS[verdict][place],
        rule.rule + said,
        finding.column or "-",
        f"{finding.count} / {finding.of}",
        finding.limit,
        *_about(rule.CODE, rule.DIMENSION, lang, wide),
    ]
    return [*row, WORDS["contract"][place] if finding.whose == "contract" else finding.whose] if wide else row


def _about(code: str, dimension: Dimension, lang: Lang, wide: bool) -> list[str]:
    """Quality code and dimension: in two cells, or briefly in one."""
    place = lang == "zh"
    named = DIMENSIONS[dimension] if place else dimension
    return [f"{code} {TC609[code][place]}", named] if wide else [f"{code} {named}"]


def _type(column: "ColumnCounts", rows: int) -> str:
    values = rows - column.missing
    if values == 0:
        return "empty"
    if column.numbers == values:
        return "integer" if column.integers == values else "number"
    if column.days == values:
        return "day"
    return "mixed" if column.numbers else "text"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _whole(found: Profile) -> dict[str, int]:
    counts = found.counts
    result = {"rows": counts.rows, "duplicates": counts.duplicates}
    labels, entities = counts.labels, counts.entities
    if labels.number:
        result |= {"labels": labels.number, "rarest": labels.smallest, "commonest": labels.largest}
    if entities.number:
        result |= {"entities": entities.number, "most": entities.largest}
    return result
