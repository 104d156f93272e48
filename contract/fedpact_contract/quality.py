"""Data quality on a data set's card: what its enterprise declares, and what it lets out of what it counted.

The codes are those of TC609-5-2025-04, the dimensions those of GB/T 36344-2018, as docs/dataspace.md of the project has
them (second-hand: compare the official texts before claiming conformance).
"""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from fedpact_contract.language import Lang
from fedpact_contract.record import Code, Hex32, Name, Part, Words, form

MINIMUM = 10
"""A count that leaves is rounded down to a multiple of this; of fewer it is only said that they are fewer."""

TC609: dict[str, tuple[str, str]] = {
    "0101": ("basic information", "基本信息"),
    "0102": ("content features", "内容特征"),
    "0103": ("construction", "建设过程"),
    "0104": ("application", "应用信息"),
    "0201": ("format", "格式"),
    "0202": ("security", "安全"),
    "0203": ("annotation", "标注"),
    "0204": ("completeness of structure", "结构完整性"),
    "0205": ("truth", "真实性"),
    "0206": ("content consistency", "内容一致性"),
    "0207": ("type consistency", "类型一致性"),
    "0208": ("cleanliness", "清洁度"),
    "0301": ("diversity", "多样性"),
    "0302": ("scale", "规模"),
    "0303": ("timeliness", "时效性"),
    "0304": ("annotation accuracy", "标注准确性"),
    "0305": ("fitness for the model", "模型适配性"),
}
"""Quality codes: what each is about, in English and Chinese."""

Dimension = Literal["conformity", "completeness", "accuracy", "consistency", "timeliness", "accessibility"]
DIMENSIONS: dict[Dimension, str] = {
    "conformity": "规范性",
    "completeness": "完整性",
    "accuracy": "准确性",
    "consistency": "一致性",
    "timeliness": "时效性",
    "accessibility": "可访问性",
}

Right = Literal["hold", "process", "operate"]
"""持有权, 加工使用权, 产品经营权: to hold the data, to process and use it, to operate its products."""


def _day(value: object) -> object:
    return value.isoformat() if type(value) is date else value  # TOML has dates of its own


def _real(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError as err:
        raise ValueError("must be a day of the calendar such as 2026-11-24") from err
    return text


Day = Annotated[
    str,
    form(r"^\d{4}-\d\d-\d\d$", "a day such as 2026-11-24"),
    AfterValidator(_real),
    BeforeValidator(_day),
]
Address = Annotated[Name, form(r"^https?://[^\s<>\"]+$", "an address that begins with https:// or http://")]
Rights = Annotated[tuple[Right, ...], Field(min_length=1)]


class Declared(Part):
    """What an enterprise says of a data set; nothing of it is computed from the rows, and each may be left out.

    `published` is the day since which it is offered; `origin` where the rows come from; `annotation` who labelled them
    and how; `retention` how long the rows are kept; `rights` what it declares to have, `registration` their number in
    a register.
    """

    title: Name | None = None
    description: Words | None = None
    license: Name | None = None
    creator: Name | None = None
    url: Address | None = None
    published: Day | None = None
    origin: Words | None = None
    annotation: Words | None = None
    retention: Name | None = None
    rights: Rights | None = None
    registration: Code | None = None

    @field_validator("rights")
    @classmethod
    def _check_rights(cls, rights: Rights | None) -> Rights | None:
        if rights is not None and len(set(rights)) != len(rights):
            raise ValueError("has a right twice")
        return rights


class Facts(Declared):
    """The declared facts as they stand on a card: of files (cleaning recipe, evidence of rights) their SHA-256."""

    recipe: Hex32 | None = None
    rights_evidence: Annotated[tuple[Hex32, ...], Field(min_length=1)] | None = None


FACTS: dict[str, tuple[str, str]] = {
    "title": ("0101", "名称"),
    "description": ("0101", "说明"),
    "license": ("0101", "许可"),
    "creator": ("0101", "编制者"),
    "url": ("0101", "网址"),
    "published": ("0101", "发布日期"),
    "origin": ("0103", "来源"),
    "annotation": ("0203", "标注情况"),
    "recipe": ("0103", "清洗方案的摘要值"),
    "retention": ("0202", "保存期限"),
    "rights": ("0101", "权利"),
    "rights_evidence": ("0101", "权利证明的摘要值"),
    "registration": ("0101", "登记编号"),
}
"""By fact, the quality code that it is about, and its name in Chinese."""

Item = Literal["rows", "missing-cells", "not-finite-cells", "duplicates", "smallest-class", "entities"]
ITEMS: dict[Item, tuple[str, str, str]] = {
    "rows": ("0302", "rows of the source", "数据源行数"),
    "missing-cells": ("0204", "cells without a value", "缺失单元格数"),
    "not-finite-cells": ("0208", "cells that are NaN or infinite", "非有限数值单元格数"),
    "duplicates": ("0208", "rows that are exact copies of another", "完全重复行数"),
    "smallest-class": ("0301", "rows of the rarest label", "最少标签的行数"),
    "entities": ("0302", "entities that rows belong to", "主体数"),
}
"""Counts that a person may let out on a card: quality code, and what is counted, in English and Chinese."""


class Measured(Part):
    """A count of the rows that a person let out: rounded down to a multiple of `MINIMUM`, without noise.

    No differential privacy covers it: it stands on the card as outside the guarantee.
    """

    item: Item
    at_least: Annotated[int, Field(ge=0, multiple_of=MINIMUM)]
    basis: Literal["outside-the-guarantee"]

    @classmethod
    def of(cls, item: Item, count: int) -> Self:
        """What may leave of an exact count."""
        return cls(item=item, at_least=count - count % MINIMUM, basis="outside-the-guarantee")

    def words(self, lang: Lang) -> str:
        """The count as people read it."""
        if lang == "zh":
            return f"至少{self.at_least}" if self.at_least else f"少于{MINIMUM}"
        return f"at least {self.at_least}" if self.at_least else f"fewer than {MINIMUM}"


def card_lines(
    facts: Facts | None, measured: tuple[Measured, ...] | None, lang: Lang = "en"
) -> list[tuple[str, str, str]]:
    """What a card says beyond rows and budget: what, its value, and where it comes from, with its quality code."""
    place = lang == "zh"
    declared = ("declared; ", "申报；")[place]
    counted = ("counted; outside the privacy guarantee; ", "由数据清点得出，不受隐私保障；")[place]
    said = {} if facts is None else facts.plain()
    return [
        *(
            ((name.replace("_", " "), FACTS[name][1])[place], _one_line(value), declared + _code(FACTS[name][0], lang))
            for name, value in said.items()
        ),
        *((ITEMS[m.item][1 + place], m.words(lang), counted + _code(ITEMS[m.item][0], lang)) for m in measured or ()),
    ]


def _one_line(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _code(code: str, lang: Lang) -> str:
    return f"{code} {TC609[code][lang == 'zh']}"
