"""What agent.toml says of a data set's quality: the rules of its gate, and the facts that its card declares.

Limits are shares of the rows unless their names say otherwise. Each rule names the quality code (TC609-5-2025-04) and
the dimension (GB/T 36344) that it is about.
"""

import hashlib
from decimal import Decimal
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from fedpact_contract.contract import Count
from fedpact_contract.errors import InputError
from fedpact_contract.quality import Declared, Dimension, Facts
from fedpact_contract.record import Dec, Name, Part


def _share(value: Decimal) -> Decimal:
    if not 0 <= value <= 1:
        raise ValueError("must lie between 0 and 1")
    return value


def _apart(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("has a name twice")
    return names


Share = Annotated[Dec, AfterValidator(_share)]
FilePath = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Names = Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_apart)]


class _Rule(Part):
    """What all rules have: their code and dimension."""

    CODE: ClassVar[str]
    DIMENSION: ClassVar[Dimension]


class MissingRule(_Rule):
    """Of each column, at most this share of the cells has no value. All columns of the data set unless named."""

    CODE, DIMENSION = "0204", "completeness"
    rule: Literal["missing"]
    columns: Names | None = None
    at_most: Share


class TypeRule(_Rule):
    """Of each column, at most this share of the values is not of this type. Text is anything that is no number."""

    CODE, DIMENSION = "0207", "conformity"
    rule: Literal["type"]
    columns: Names
    type: Literal["number", "integer", "text", "day"]
    at_most: Share


class FiniteRule(_Rule):
    """Of each column, at most this share of the cells is NaN or infinite. All columns unless named."""

    CODE, DIMENSION = "0208", "accuracy"
    rule: Literal["finite"]
    columns: Names | None = None
    at_most: Share


class BoundsRule(_Rule):
    """At most this share of a column's numbers lies outside its public bounds."""

    CODE, DIMENSION = "0205", "accuracy"
    rule: Literal["bounds"]
    column: Name
    low: Dec
    high: Dec
    at_most: Share

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError("`low` must be below `high`")
        return self


class VocabularyRule(_Rule):
    """At most this share of a column's values is none of these. As in contracts, 3 and 3.0 are one value."""

    CODE, DIMENSION = "0206", "conformity"
    rule: Literal["vocabulary"]
    column: Name
    values: Names
    at_most: Share


class DuplicatesRule(_Rule):
    """At most this share of the rows is an exact copy of another, in the card's columns."""

    CODE, DIMENSION = "0208", "accuracy"
    rule: Literal["duplicates"]
    at_most: Share


class VariesRule(_Rule):
    """Each column has more than one value. All columns unless named."""

    CODE, DIMENSION = "0301", "accuracy"
    rule: Literal["varies"]
    columns: Names | None = None


class BalanceRule(_Rule):
    """The rarest label has at least this share of the rows that have one."""

    CODE, DIMENSION = "0301", "conformity"
    rule: Literal["balance"]
    at_least: Share


class RowsRule(_Rule):
    """The source has at least so many rows."""

    CODE, DIMENSION = "0302", "completeness"
    rule: Literal["rows"]
    at_least: Count


class EntitiesRule(_Rule):
    """The rows belong to at least so many entities."""

    CODE, DIMENSION = "0302", "completeness"
    rule: Literal["entities"]
    at_least: Count


class RecentRule(_Rule):
    """At most this share of the rows has no day in this column within the last so many days."""

    CODE, DIMENSION = "0303", "timeliness"
    rule: Literal["recent"]
    column: Name
    days: Count
    at_most: Share


class DriftRule(_Rule):
    """Of each column, at most this share of the cells has moved since the profile of the last signed card.

    It is the total variation distance between both histograms, over bins that do not depend on the data.
    """

    CODE, DIMENSION = "0206", "consistency"
    rule: Literal["drift"]
    columns: Names | None = None
    at_most: Share


Rule = Annotated[
    MissingRule
    | TypeRule
    | FiniteRule
    | BoundsRule
    | VocabularyRule
    | DuplicatesRule
    | VariesRule
    | BalanceRule
    | RowsRule
    | EntitiesRule
    | RecentRule
    | DriftRule,
    Field(discriminator="rule"),
]


def named_columns(rule: Rule) -> tuple[str, ...]:
    """The columns that a rule names; none where it is about the rows, or about all columns."""
    if isinstance(rule, BoundsRule | VocabularyRule | RecentRule):
        return (rule.column,)
    if isinstance(rule, MissingRule | TypeRule | FiniteRule | VariesRule | DriftRule):
        return rule.columns or ()
    return ()


class CardPart(Declared):
    """`[data_sets.card]`: what the next card declares. Of recipe and evidence, which are files, the SHA-256 leaves."""

    cleaning_recipe: FilePath | None = None
    rights_evidence: Annotated[tuple[FilePath, ...], Field(min_length=1)] | None = None

    def facts(self, base_dir: Path) -> Facts:
        """The facts; relative paths are taken from `base_dir`.

        Raises:
            InputError: CARD_FILE, a file cannot be read.
        """
        said = {name: getattr(self, name) for name in Declared.model_fields}
        recipe = None if self.cleaning_recipe is None else _digest(base_dir / self.cleaning_recipe, "cleaning_recipe")
        shown = tuple(_digest(base_dir / path, "rights_evidence") for path in self.rights_evidence or ())
        return Facts(**said, recipe=recipe, rights_evidence=shown or None)


def _digest(path: Path, key: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise InputError(
            "CARD_FILE",
            f"A file that the card declares cannot be read: {err.strerror}.",
            file=path,
            field=f"data_sets.card.{key}",
            remedy="Correct the path in agent.toml, or remove the key.",
        ) from err
