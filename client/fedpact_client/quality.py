"""The quality gate: a data set is profiled where it lies and held against the rules of agent.toml, or of a contract.

A profile is counts: of columns, rules and rows, never a value. It stays here. What a card may say of it is in
`fedpact_contract.quality`; the profile of the last signed card is kept in the home, as counts by bin, so that `drift`
has something to be held against.
"""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedpact_client import rules as kinds
from fedpact_client import sources
from fedpact_client.config import DataSet
from fedpact_client.home import read_json
from fedpact_client.rules import Rule, named_columns
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract, Count, NumberColumn, NumberLabel, SurvivalLabel
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.files import replace_file
from fedpact_contract.output import counted
from fedpact_contract.quality import Item
from fedpact_contract.record import Dec, Name, Part, decimal_text

if TYPE_CHECKING:
    from fedpact_models.profile import ColumnCounts, Counting, Counts
    from fedpact_models.scratch import Scratch
    from fedpact_models.tables import Batch

GATE = "QUALITY_GATE"
"""The code of a refusal by the gate: all that may leave of it."""
Whose = Literal["agent.toml", "contract"]
_Cells = Annotated[int, Field(ge=0)]
_ALL = Decimal(1)
"""The limit of what is only shown: a contract clips numbers to their bounds, and leaves rows out or fills them."""


class Histogram(Part):
    """Cells by bin (`fedpact_models.profile.histograms`), and the bounds that the bins are parts of, if any."""

    bounds: tuple[Dec, Dec] | None = None
    bins: dict[str, _Cells]


class Reference(Part):
    """The profile of the last signed card: what later ones are held against. Counts alone, in the home alone."""

    rows: Count
    columns: dict[Name, Histogram]

    @classmethod
    def read(cls, path: Path) -> "Reference | None":
        """The reference in this file; None where no card was signed yet.

        Raises:
            InputError: PROFILE_FILE, it is damaged or cannot be read.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as err:
            raise _unreadable(path, f"cannot be read: {err.strerror}", None) from err
        try:
            return cls.parse(read_json(data, "profile", path), code="PROFILE_FILE", file=path)
        except InputError as err:
            raise _unreadable(path, "is damaged", err.field) from err

    def write(self, path: Path) -> None:
        """Keep it, in place of an earlier one."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_file(path, canonical_bytes(self.plain()))


def _unreadable(path: Path, what: str, field: str | None) -> InputError:
    return InputError(
        "PROFILE_FILE",
        f"The profile of the last signed card {what}.",
        file=path,
        field=field,
        remedy="Restore it from a backup, or remove it: the next signed card writes another.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule held against one column, or against the rows: `count` of `of`, and whether that is within the limit.

    What is counted is what the rule is about: cells or rows at fault, or (balance, rows, entities) what there is.
    `passed` is None where there is nothing to compare with.
    """

    rule: Rule
    whose: Whose
    column: str | None
    count: int
    of: int
    passed: bool | None

    @property
    def limit(self) -> str:
        """What the rule allows, as agent.toml spells it."""
        for key in ("at_most", "at_least"):
            if (value := getattr(self.rule, key, None)) is not None:
                return f"{key} {decimal_text(value) if isinstance(value, Decimal) else value}"
        return "several values"

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "rule": self.rule.rule,
            "whose": self.whose,
            "column": self.column,
            "count": self.count,
            "of": self.of,
            "limit": self.limit,
            "passed": self.passed,
            "tc609": self.rule.CODE,
            "dimension": self.rule.DIMENSION,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A data set's counts, and what became of each rule. It stays on the premises."""

    data_set: str
    source: str
    declared: int  # examples, in agent.toml
    names: tuple[str, ...]
    label: str
    entity: str | None
    counts: "Counts"
    findings: tuple[Finding, ...]
    reference: Reference | None
    compared: bool

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The rules that are broken."""
        return tuple(f for f in self.findings if f.passed is False)

    def items(self) -> dict[Item, int]:
        """What a card may say of it, exactly (`fedpact_contract.quality.Measured` rounds)."""
        counts = self.counts
        columns = [c for c in counts.columns if c.name in self.names]
        found: dict[Item, int] = {
            "rows": counts.rows,
            "missing-cells": sum(c.missing for c in columns),
            "not-finite-cells": sum(c.not_finite for c in columns),
            "duplicates": counts.duplicates,
        }
        if counts.labels.number:
            found["smallest-class"] = counts.labels.smallest
        if counts.entities.number:
            found["entities"] = counts.entities.number
        return found

    def plain(self) -> dict[str, Any]:
        """As plain values, for the person at this machine."""
        counts = self.counts
        return {
            "data_set": self.data_set,
            "source": self.source,
            "rows": counts.rows,
            "declared_examples": self.declared,
            "duplicates": counts.duplicates,
            "label": {"column": self.label, "values": counts.labels.number or None, "rows_each": counts.labels.each()},
            "entities": None
            if self.entity is None
            else {"column": self.entity, "count": counts.entities.number, "most_rows": counts.entities.largest},
            "columns": [asdict(column) for column in counts.columns],
            "rules": [finding.plain() for finding in self.findings],
            "compared_with_last_card": self.compared,
            "passed": not self.failed,
        }


def profile(
    data_set: DataSet,
    base_dir: Path,
    reference: Reference | None,
    today: datetime.date,
    contract: Contract | None = None,
    *,
    loaded: Path | None = None,
    scratch: "Scratch | None" = None,
    keep: bool = False,
    also: "Callable[[Batch], object] | None" = None,
    columns: Iterable[str] = (),
) -> Profile:
    """Read a data set in batches and count; nothing is kept, and nothing leaves.

    Args:
        data_set: What agent.toml says of it: its rules are the gate.
        base_dir: The home, from which its paths are taken.
        reference: The profile of the last signed card.
        today: The day that `recent` counts back from.
        contract: Its schema's demands are rules too.
        loaded: The file that a database's rows are in (`loading.rows_of`).
        scratch: Where lies what is noted of rows; None: in memory.
        keep: Whether it is to be a reference itself; else histograms are made for `drift` alone.
        also: Is given each batch too, first.
        columns: What `also` needs beside the data set's own columns, where it is there.

    Raises:
        InputError: DATA_*: the source cannot be read, or lacks a column that is declared or that a rule names;
            QUALITY_ENTITY: a rule about entities, and no column tells them apart.
        FailedError: DATA_SCRATCH.
    """
    path, own = sources.place(data_set.source, base_dir), len(data_set.rules)
    rules = (*data_set.rules, *demands(contract))
    wanted = {*data_set.names, *(name for rule in rules for name in named_columns(rule)), *columns}
    wanted |= set() if data_set.entity is None else {data_set.entity}
    where, name = sources.loaded(data_set.source, loaded), path if data_set.source.is_database else None
    counted = _counting(data_set, rules, today, scratch, keep=keep)
    for batch in sources.batches(where, base_dir, sources.rows_at_once(len(wanted)), name=name, columns=wanted):
        if also is not None:
            also(batch)
        _check_columns(data_set, rules, batch.frame.columns, path)
        counted.add(batch.frame)
    seen = _see(data_set, counted, reference)
    whose: list[Whose] = ["agent.toml" if place < own else "contract" for place in range(len(rules))]
    return Profile(
        data_set=data_set.id,
        source=path,
        declared=data_set.num_examples,
        names=data_set.names,
        label=data_set.label,
        entity=data_set.entity,
        counts=seen.counts,
        findings=tuple(f for key, rule in enumerate(rules) for f in _held(key, rule, whose[key], seen)),
        reference=seen.now,
        compared=reference is not None,
    )


def check(
    data_set: DataSet,
    base_dir: Path,
    reference: Path,
    today: datetime.date,
    *,
    loaded: Path | None = None,
    scratch: "Scratch | None" = None,
) -> None:
    """Raise unless the data set keeps every rule of agent.toml. Without rules nothing is read.

    `loaded` and `scratch` as in `profile`.

    Raises:
        RefusedError: QUALITY_GATE: a rule is broken, by column and count; or the rules could not be checked.
    """
    if not data_set.rules:
        return
    try:
        found = profile(data_set, base_dir, Reference.read(reference), today, loaded=loaded, scratch=scratch)
    except InputError as err:
        raise RefusedError(
            GATE,
            f"The rules of {data_set.id} could not be checked: {err.code}: {err.message}",
            file=err.file,
            field=err.field,
            rule=err.rule or "what cannot be checked is refused",
            remedy=err.remedy,
        ) from err
    refuse(found)


def refuse(found: Profile) -> None:
    """Raise unless every rule is kept.

    Raises:
        RefusedError: QUALITY_GATE, with the first broken rule: column, rule and count, never a value.
    """
    if not found.failed:
        return
    first, broken = found.failed[0], len(found.failed)
    where = "the rows" if first.column is None else f"column {first.column}"
    more = f"; {counted(broken - 1, 'other rule')} broken too" if broken > 1 else ""
    raise RefusedError(
        GATE,
        f"The data set {found.data_set} breaks the rule {first.rule.rule}: {where}, {first.count} of {first.of}{more}.",
        file=found.source,
        field=first.column,
        rule=f"{first.rule.rule}, {first.limit} ({first.whose})",
        remedy=f"Correct the rows, or the rule: `fedpact-agent profile {found.data_set}` shows every one.",
    )


def demands(contract: Contract | None) -> list[Rule]:
    """What a contract's schema asks of the rows, as rules. What it clips, leaves out or fills is counted and passes."""
    if contract is None:
        return []
    made: list[Rule] = []
    zero = Decimal(0)
    for column in contract.data.columns:
        one, refused = (column.name,), zero if column.missing == "refuse" else _ALL
        made.append(kinds.MissingRule(rule="missing", columns=one, at_most=refused))
        if isinstance(column, NumberColumn):
            made += _numbers(column.name, column.low, column.high, _ALL)
        else:
            made.append(_vocabulary(column.name, column.values))
    label = contract.data.label
    missing = _ALL if label.missing == "drop" else zero
    made.append(kinds.MissingRule(rule="missing", columns=contract.data.label_columns, at_most=missing))
    if isinstance(label, NumberLabel):
        made += _numbers(label.name, label.low, label.high, zero)
    elif isinstance(label, SurvivalLabel):
        made.append(kinds.TypeRule(rule="type", columns=(label.name,), type="number", at_most=zero))
        made.append(_vocabulary(label.event, label.outcomes))
    elif label.threshold is None:
        made.append(_vocabulary(label.name, label.classes))
    else:
        made.append(kinds.TypeRule(rule="type", columns=(label.name,), type="number", at_most=zero))
    return made


def _numbers(name: str, low: Decimal, high: Decimal, outside: Decimal) -> list[Rule]:
    zero = Decimal(0)
    return [
        kinds.TypeRule(rule="type", columns=(name,), type="number", at_most=zero),
        kinds.FiniteRule(rule="finite", columns=(name,), at_most=zero),
        kinds.BoundsRule(rule="bounds", column=name, low=low, high=high, at_most=outside),
    ]


def _vocabulary(name: str, values: tuple[str, ...]) -> Rule:
    return kinds.VocabularyRule(rule="vocabulary", column=name, values=values, at_most=Decimal(0))


def _check_columns(data_set: DataSet, rules: Sequence[Rule], there: Sequence[str], file: str) -> None:
    """Every column that is declared, or that a rule names, is there.

    Raises:
        InputError: DATA_LABEL_MISSING, DATA_COLUMN_MISSING, QUALITY_ENTITY.
    """
    hint = ""
    if data_set.source.kind == "csv":
        hint = " The first line of a CSV file names them (else `column_names`), in UTF-8, set apart by `delimiter`."
    if data_set.label not in there:
        raise InputError(
            "DATA_LABEL_MISSING",
            f"The table lacks the label column {data_set.label}.",
            file=file,
            field=data_set.label,
            rule="label",
            remedy=f"Name the source that has it, or correct `label` or `rename`; names are compared exactly.{hint}",
        )
    declared = [*data_set.columns, *([] if data_set.entity is None else [data_set.entity])]
    wanted = [(name, "agent.toml names") for name in declared]
    wanted += [(name, f"the rule {rule.rule} names") for rule in rules for name in named_columns(rule)]
    for name, whose in wanted:
        if name not in there:
            raise InputError(
                "DATA_COLUMN_MISSING",
                f"The table lacks the column {name}, which {whose}.",
                file=file,
                field=name,
                remedy=f"Correct the rule, `columns`, `entity` or the source's `rename` in agent.toml.{hint}",
            )
    if data_set.entity is None and any(isinstance(rule, kinds.EntitiesRule) for rule in rules):
        raise InputError(
            "QUALITY_ENTITY",
            f"A rule is about entities, and agent.toml does not say which column of {data_set.id} tells them apart.",
            field="data_sets.entity",
            rule="entities",
            remedy="Name the column as `entity` in the data set's block, or remove the rule.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What rules are held against: the counts, the answers by the rule's place, this profile and the last card's."""

    names: tuple[str, ...]
    counts: "Counts"
    columns: "Mapping[str, ColumnCounts]"
    answers: Mapping[int, int]
    now: Reference | None
    before: Reference | None


def _counting(
    data_set: DataSet, rules: Sequence[Rule], today: datetime.date, scratch: "Scratch | None", *, keep: bool
) -> "Counting":
    """What counts all that the rules ask for. Only bounds of agent.toml make bins: a contract's would change them."""
    from fedpact_models.profile import Counting, Questions

    names = data_set.names
    others = tuple(dict.fromkeys(n for rule in rules for n in named_columns(rule) if n not in names))
    bounds = {r.column: (r.low, r.high) for r in data_set.rules if isinstance(r, kinds.BoundsRule)}
    moved = keep or any(isinstance(rule, kinds.DriftRule) for rule in rules)
    asked = Questions(
        today=today,
        outside={k: (r.column, (r.low, r.high)) for k, r in enumerate(rules) if isinstance(r, kinds.BoundsRule)},
        unknown={k: (r.column, r.values) for k, r in enumerate(rules) if isinstance(r, kinds.VocabularyRule)},
        recent={k: (r.column, r.days) for k, r in enumerate(rules) if isinstance(r, kinds.RecentRule)},
        bins={n: bounds.get(n) for n in (*names, *others)} if moved else {},
    )
    balance = any(isinstance(rule, kinds.BalanceRule) for rule in rules)
    entity = data_set.entity
    return Counting(names, data_set.label, entity, others=others, classes=balance, asked=asked, scratch=scratch)


def _see(data_set: DataSet, counted: "Counting", before: Reference | None) -> _Seen:
    """What was counted, once all batches were."""
    counts, now = counted.counts(), None
    if counted.asked.bins:
        columns = {
            name: Histogram(bounds=counted.asked.bins[name], bins={str(k): size for k, size in bins.items()})
            for name, bins in counted.histograms().items()
        }
        now = Reference(rows=counts.rows, columns=columns)
    return _Seen(
        names=data_set.names,
        counts=counts,
        columns={c.name: c for c in counts.columns},
        answers=counted.answers(),
        now=now,
        before=before,
    )


def _held(key: int, rule: Rule, whose: Whose, seen: _Seen) -> list[Finding]:
    """A rule held against each column that it is about, or against the rows."""
    columns: tuple[str | None, ...] = named_columns(rule) or (
        seen.names if "columns" in type(rule).model_fields else (None,)
    )
    return [
        Finding(rule=rule, whose=whose, column=column, count=count, of=of, passed=passed)
        for column in columns
        for count, of, passed in (_verdict(key, rule, column, seen),)
    ]


def _verdict(key: int, rule: Rule, column: str | None, seen: _Seen) -> tuple[int, int, bool | None]:
    """What was counted, of how many, and whether it is within the rule's limit."""
    rows, counts = seen.counts.rows, seen.counts
    if isinstance(rule, kinds.RowsRule):
        return rows, rows, rows >= rule.at_least
    if isinstance(rule, kinds.EntitiesRule):
        return counts.entities.number, rows, counts.entities.number >= rule.at_least
    if isinstance(rule, kinds.BalanceRule):
        labels = counts.labels
        labelled, rarest = labels.rows, labels.smallest if labels.number > 1 else 0
        return rarest, labelled, rarest >= rule.at_least * labelled and rarest > 0
    if isinstance(rule, kinds.DuplicatesRule):
        return _share(counts.duplicates, rows, rule.at_most)
    if isinstance(rule, kinds.RecentRule):
        return _share(seen.answers[key], rows, rule.at_most)
    assert column is not None  # noqa: S101 - all others are about columns
    cells = seen.columns[column]
    values = rows - cells.missing
    if isinstance(rule, kinds.VariesRule):
        return values if cells.constant else 0, rows, not cells.constant
    if isinstance(rule, kinds.DriftRule):
        return (0, rows, None) if seen.now is None else _moved(seen.now, seen.before, column, rule.at_most)
    if isinstance(rule, kinds.MissingRule):
        return _share(cells.missing, rows, rule.at_most)
    if isinstance(rule, kinds.FiniteRule):
        return _share(cells.not_finite, rows, rule.at_most)
    if isinstance(rule, kinds.TypeRule):
        of_type = {"number": cells.numbers, "integer": cells.integers, "day": cells.days}
        return _share(values - of_type.get(rule.type, values - cells.numbers), values, rule.at_most)
    return _share(seen.answers[key], cells.numbers if isinstance(rule, kinds.BoundsRule) else values, rule.at_most)


def _share(count: int, of: int, at_most: Decimal) -> tuple[int, int, bool]:
    return count, of, count <= at_most * of


def _moved(now: Reference, before: Reference | None, column: str, at_most: Decimal) -> tuple[int, int, bool | None]:
    """Cells that would have to move to have the earlier histogram again; None where there is none of the same bins."""
    from fedpact_models.profile import distance

    new, old = now.columns.get(column), None if before is None else before.columns.get(column)
    if new is None or old is None or new.bounds != old.bounds:
        return 0, now.rows, None
    moved = distance(old.bins, new.bins)
    return int((moved * now.rows).to_integral_value(ROUND_CEILING)), now.rows, moved <= at_most
