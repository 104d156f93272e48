"""A contract as a document for people: complete, clause by clause, in English or Chinese, numbered alike.

What is signed is the record, not its rendering; the document therefore prints every value of the record and ends with
the contract's id. Under each clause stand the codes by which software refuses what it excludes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from fedpact_contract.clauses import CHAPTERS
from fedpact_contract.clauses.clause import Both, Clause
from fedpact_contract.contract import Contract
from fedpact_contract.language import Lang
from fedpact_contract.output import visible
from fedpact_contract.page import document, paragraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """A clause as it stands in one contract, with its number there."""

    number: str
    clause: Clause
    text: Both


def stated(contract: Contract) -> Iterator[tuple[str, Both, list[Stated]]]:
    """The contract's chapters, each with its number, its title and its clauses."""
    number = 0
    for chapter in CHAPTERS:
        written = [(clause, text) for clause in chapter.clauses if (text := clause.write(contract)) is not None]
        if written:
            number += 1
            clauses = [
                Stated(number=f"{number}.{item}", clause=clause, text=text)
                for item, (clause, text) in enumerate(written, start=1)
            ]
            yield str(number), chapter.title, clauses


def render(contract: Contract, lang: Lang = "en") -> str:
    """The whole document; lines end in a newline."""
    lines = [_heading(contract).of(lang)]
    for note in _preamble(contract):
        lines += ["", note.of(lang)]
    for number, title, clauses in stated(contract):
        lines += ["", f"{number}. {title.of(lang)}"]
        for one in clauses:
            marks = one.clause.marks(lang)
            lines.append(f"{one.number} {one.text.of(lang)}" + (f"\n    {marks}" if marks else ""))
    lines += ["", _ID.of(lang), contract.id]
    return "\n".join(lines) + "\n"


def page(contract: Contract, lang: Lang = "en") -> str:
    """The same as one HTML page, to be printed or kept."""
    parts = [_paragraph(note.of(lang)) for note in _preamble(contract)]
    for number, title, clauses in stated(contract):
        parts.append(f"<h2>{escape(f'{number}. {title.of(lang)}')}</h2>")
        for one in clauses:
            parts.append(_paragraph(f"{one.number} {one.text.of(lang)}"))
            parts += [paragraph(marks)] if (marks := one.clause.marks(lang)) else []
    return document(_heading(contract).of(lang), lang, *parts, _paragraph(f"{_ID.of(lang)}\n{contract.id}"))


def _paragraph(text: str) -> str:
    """A clause, its lines as they are."""
    return f'<p style="white-space: pre-wrap">{escape(text)}</p>'


_ID = Both(
    "Contract id (SHA-256 of the record's canonical bytes):",
    "合约编号（记录规范字节的SHA-256）：",
)


def _heading(contract: Contract) -> Both:
    title = visible(contract.title)
    return Both(f"FEDERATED LEARNING CONTRACT: {title}", f"联邦学习技术契约（数字合约）：{title}")


def _preamble(contract: Contract) -> tuple[Both, ...]:
    return (
        Both(
            f"This document renders a record of the type {contract.TYPE}, version {contract.VERSION}. The record is "
            "what is signed, not its rendering in either language; its id stands at the end.",
            f"本文件为类型{contract.TYPE}、版本{contract.VERSION}之记录的文字表述。各方所签署的是该记录本身，"
            "而非其任何一种语言的文字表述；其编号载于文末。",
        ),
        Both(
            "In brackets stand the codes by which software refuses what a clause excludes, or raises an alarm over it: "
            "a participant's own agent; the operator's coordinator; the check that every program makes of the record; "
            "`verify`, by which each "
            "agent and every signatory recomputes the log. Whatever is marked [not enforced by software] is in whole "
            "or in part a party's promise, or its word.",
            "括号内为软件对条款所不允许的事项予以拒绝或发出警报时使用的代码：代理，即参与方自有的代理；运营方，"
            "即运营方的协调程序；"
            "合约校验，即各程序对本记录所作的校验；复核，即各代理及各签署方据以重新计算日志的`verify`。"
            "标明〔不由软件执行〕的，其全部或部分内容为一方的承诺或陈述。",
        ),
    )
