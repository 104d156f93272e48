"""What a clause is: one function that says it in English and in Chinese, beside what it states and what enforces it.

Both languages stand in the same function, so that they cannot drift apart; the registry below them says which fields
of the contract a clause states and the codes by which software refuses what it excludes. Values come from several
parties: characters that a terminal would act on are shown as escapes.
"""

import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from fedpact_contract.contract import Contract, Entity, Party
from fedpact_contract.errors import InputError
from fedpact_contract.language import Lang
from fedpact_contract.output import visible
from fedpact_contract.record import decimal_text
from fedpact_contract.request import parse_instant
from fedpact_contract.settlement import format_fen

Enforcer = Literal["agent", "operator", "record", "verify"]

ENFORCERS: dict[Enforcer, tuple[str, str]] = {
    "agent": ("agent", "代理"),
    "operator": ("operator", "运营方"),
    "record": ("contract check", "合约校验"),
    "verify": ("verify", "复核"),
}
"""Who refuses: a participant's agent; the operator's coordinator; every program that reads the record; whoever
verifies the log."""
PROMISE = ("not enforced by software", "不由软件执行")
"""How a clause is marked that software does not enforce."""

BEIJING = datetime.timezone(datetime.timedelta(hours=8))


@dataclass(frozen=True, slots=True)
class Both:
    """The same in both languages."""

    en: str
    zh: str

    def of(self, lang: Lang) -> str:
        """In one of them."""
        return self.zh if lang == "zh" else self.en

    def __add__(self, other: "Both") -> "Both":
        """One behind the other."""
        return Both(self.en + other.en, self.zh + other.zh)


NOTHING = Both("", "")


def join(parts: Iterable[Both]) -> Both:
    """All of them, one behind the other."""
    return sum(parts, NOTHING)


Write = Callable[[Contract], Both | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One clause.

    Attributes:
        id: Stable: its place in the document may move, its id does not.
        states: Fields of the contract that it prints, as paths; a path stands for all that is below it.
        codes: By whom, and by which stable codes, what it excludes is refused.
        promise: Whether it says something that no software enforces.
        write: Says it; None where it does not stand in this contract.
    """

    id: str
    states: tuple[str, ...]
    codes: dict[Enforcer, tuple[str, ...]]
    promise: bool
    write: Write

    def marks(self, lang: Lang) -> str:
        """What enforces it, as it stands under the clause; empty where it only explains."""
        place, (left, colon, comma, right) = (1, "〔：、〕") if lang == "zh" else (0, ("[", ": ", ", ", "]"))
        marks = [f"{left}{ENFORCERS[who][place]}{colon}{comma.join(codes)}{right}" for who, codes in self.codes.items()]
        return " ".join([*marks, *([f"{left}{PROMISE[place]}{right}"] if self.promise else [])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """A chapter: its title, and its clauses in the order in which they are declared."""

    title: Both
    clauses: list[Clause] = field(default_factory=list)

    def clause(
        self,
        id: str,  # noqa: A002 - what it is
        *,
        states: Iterable[str] = (),
        agent: Iterable[str] = (),
        operator: Iterable[str] = (),
        record: Iterable[str] = (),
        verify: Iterable[str] = (),
        promise: bool = False,
    ) -> Callable[[Write], Write]:
        """Declare a clause by the function that writes it."""
        every: dict[Enforcer, Iterable[str]] = {
            "agent": agent,
            "operator": operator,
            "record": record,
            "verify": verify,
        }
        codes = {who: found for who, named in every.items() if (found := tuple(named))}

        def declare(write: Write) -> Write:
            self.clauses.append(Clause(id=id, states=tuple(states), codes=codes, promise=promise, write=write))
            return write

        return declare


def party(who: Party) -> Both:
    """A party: name, entity code, fingerprint and key."""
    name = visible(who.name)
    return Both(
        f"{name}, legal-entity code {who.entity_code}.\n      Key fingerprint: {who.id}\n      Key: {who.key}",
        f"{name}，统一社会信用代码{who.entity_code}。\n      密钥指纹：{who.id}\n      公钥：{who.key}",
    )


def entity(who: Entity) -> Both:
    """An entity that signs nothing."""
    name = visible(who.name)
    return Both(f"{name}, entity code {who.entity_code}", f"{name}，统一社会信用代码{who.entity_code}")


def listed(values: Iterable[str]) -> Both:
    """Words of the contract, one after the other."""
    shown = [visible(value) for value in values]
    return Both(", ".join(shown), "、".join(shown))


def percent(part: Decimal) -> Both:
    """A part of a whole."""
    return Both(f"{decimal_text(part * 100)} %", f"{decimal_text(part * 100)}%")


def fen(amount: int) -> Both:
    """An amount, in fen and in yuan."""
    return Both(f"{amount} fen ({format_fen(amount, 'en')})", f"{format_fen(amount, 'zh')}（{amount}分）")


def moment(text: str) -> Both:
    """An instant by Beijing's clock; as the contract has it where that names no moment."""
    try:
        at = parse_instant(text).astimezone(BEIJING)
    except (InputError, OverflowError):
        return Both(text, text)
    return Both(f"{at:%Y-%m-%d %H:%M:%S}", f"{at.year}年{at.month}月{at.day}日{at:%H:%M:%S}")
