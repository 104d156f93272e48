"""agent.toml: parsed once, into a frozen record; unknown keys are refused, faults are named by file, line and key."""

import datetime
import json
import re
from collections import Counter
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from fedpact_client.policy import Policy
from fedpact_client.rules import CardPart, Rule
from fedpact_client.sources import Source
from fedpact_contract.contract import Count, EntityCode, load_toml
from fedpact_contract.errors import InputError
from fedpact_contract.record import Code, Dec, Name, Part, form
from fedpact_contract.toml_lines import naming_lines

TEMPLATE = "agent.toml"
POLICY_DAYS = 730
"""How long a fresh home's policy allows contracts: twice the term that the template of a contract has."""


class AgentPart(Part):
    """Who this enterprise is."""

    name: Name
    entity_code: EntityCode
    sector: Code


class OperatorPart(Part):
    """Where the operator's API answers; empty until `enrol`."""

    url: Annotated[
        str,
        form(
            r"^(https://[A-Za-z0-9.\-]+(:[0-9]{1,5})?|https://\[[0-9a-fA-F:]+\](:[0-9]{1,5})?)?$",
            "an address of the form https://host:port",
        ),
    ]


class DataSet(Part):
    """A data set: what stands on its card, and where its rows are. `epsilon` at `delta` bounds all contracts on it.

    `entity` is the column that says whose a row is, where one person or firm may have several rows. `rules` are those
    of its quality gate, `card` what the card declares besides.
    """

    id: Code
    num_examples: Count
    epsilon: Dec
    delta: Dec
    columns: Annotated[tuple[Name, ...], Field(min_length=1)]
    label: Name
    entity: Name | None = None
    source: Source
    release_fraction: Dec | None = None
    release_file: Annotated[str, StringConstraints(min_length=1)] | None = None
    rules: Annotated[tuple[Rule, ...], Field(max_length=200)] = ()
    card: CardPart | None = None

    @field_validator("epsilon")
    @classmethod
    def _check_epsilon(cls, epsilon: Decimal) -> Decimal:
        if epsilon <= 0:
            raise ValueError("must be greater than 0")
        return epsilon

    @field_validator("delta")
    @classmethod
    def _check_delta(cls, delta: Decimal) -> Decimal:
        if not 0 < delta < 1:
            raise ValueError("must lie between 0 and 1")
        return delta

    @field_validator("release_fraction")
    @classmethod
    def _check_fraction(cls, fraction: Decimal | None) -> Decimal | None:
        if fraction is not None and not 0 < fraction <= Decimal("0.5"):
            raise ValueError("must be above 0 and at most 0.5")
        return fraction

    @property
    def names(self) -> tuple[str, ...]:
        """The features and the label: what a table of this data set is known again by."""
        return (*self.columns, self.label)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = (*self.columns, self.label, *([] if self.entity is None else [self.entity]))
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise ValueError(
                f"the column {twice[0]} stands twice among columns, label and entity (neither of these is a feature)"
            )
        if self.release_fraction is not None and self.release_file is not None:
            raise ValueError("give release_fraction or release_file, not both")
        if self.release_file is not None and self.source.is_database:
            raise ValueError("release_file goes with a source that is files; of a database give release_fraction")
        return self


class Limits(Part):
    """What training may use: `threads`, and `memory` in MiB; of the machine, so many `processors`, and how `nice`ly."""

    threads: Annotated[int, Field(ge=1, le=1024)]
    processors: Annotated[int, Field(ge=1, le=1024)] | None = None
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    memory: Annotated[int, Field(ge=256, le=2**24)]


class Network(Part):
    """Seconds between questions when nothing runs; whether Flower's waits are shortened by patching it."""

    poll_seconds: Annotated[int, Field(ge=1, le=3600)]
    patched: bool


class Paths(Part):
    """`witness`: a file outside the home that gets the ledger's head."""

    witness: Annotated[str, StringConstraints(min_length=1)] | None = None

    @field_validator("witness")
    @classmethod
    def _check_witness(cls, witness: str | None) -> str | None:
        try:
            Path(witness or "").expanduser()
        except RuntimeError as err:
            raise ValueError("begins with ~, and this system knows no such home folder: write it in full") from err
        return witness


class AgentConfig(Part):
    """The whole of agent.toml."""

    agent: AgentPart
    operator: OperatorPart
    data_sets: tuple[DataSet, ...] = ()
    policy: Policy
    limits: Limits
    network: Network
    paths: Paths

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [d.id for d in self.data_sets]
        if len(set(ids)) != len(ids):
            raise ValueError("two data sets have one id")
        return self

    def data_set(self, data_set_id: str) -> DataSet:
        """The data set with this id.

        Raises:
            InputError: CONFIG_DATA_SET, naming the ids that there are.
        """
        for data_set in self.data_sets:
            if data_set.id == data_set_id:
                return data_set
        known = ", ".join(d.id for d in self.data_sets) or "none"
        raise InputError(
            "CONFIG_DATA_SET",
            f"agent.toml describes no data set {data_set_id}; it describes {known}.",
            field="data_sets",
            remedy="Add a [[data_sets]] block with this id.",
        )


def load(path: Path) -> AgentConfig:
    """Read agent.toml.

    Raises:
        InputError: no such file, not TOML, or a key that is unknown, missing or wrong; `file` is FILE:LINE.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError("CONFIG_FILE", "The configuration cannot be read as UTF-8 text.", file=path) from err
    return parse(text, path)


def parse(text: str, path: Path) -> AgentConfig:
    """Read the text of an agent.toml; relative paths are taken from `path`'s folder.

    Raises:
        InputError: as `load`.
    """
    value = load_toml(text, file=path)
    try:
        with naming_lines(text, path):
            config = AgentConfig.parse(value, code="CONFIG", file=path)
    except InputError as err:
        err.remedy = err.remedy or "configs/agent.toml documents each key."
        raise
    return _absolute(config, path.parent.absolute())


def _absolute(config: AgentConfig, folder: Path) -> AgentConfig:
    """Paths outside the sources made absolute (a source's path is taken from the home where it is read)."""
    witness = config.paths.witness
    data_sets = tuple(
        d if d.release_file is None else d.model_copy(update={"release_file": str(folder / d.release_file)})
        for d in config.data_sets
    )
    paths = config.paths if witness is None else Paths(witness=str(folder / Path(witness).expanduser()))
    return config.model_copy(update={"data_sets": data_sets, "paths": paths})


def template() -> str:
    """The documented configuration of a fresh home."""
    return (resources.files("fedpact_client") / "templates" / TEMPLATE).read_text("utf-8")


def fill_template(agent: dict[str, str], today: datetime.date) -> str:
    """The documented configuration with the [agent] values filled in, and a policy that ends `POLICY_DAYS` from today.

    Raises:
        InputError: a value of the wrong form.
    """
    AgentPart.parse(agent, code="AGENT")
    end = today + datetime.timedelta(days=POLICY_DAYS)
    text = re.sub("(?m)^not_after = .{10}", f"not_after = {end:%Y-%m-%d}", template())
    for key, value in agent.items():
        text = set_value(text, "agent", key, value)
    return text


def set_value(text: str, table: str, key: str, value: str) -> str:
    """The TOML text with one string value replaced, every comment kept.

    Raises:
        InputError: CONFIG_KEY, the table has no such key.
    """
    lines = text.splitlines(keepends=True)
    here = ""
    for index, line in enumerate(lines):
        if header := re.match(r"^\s*\[\s*([A-Za-z0-9_-]+)\s*\]", line):
            here = header.group(1)
        elif here == table and re.match(rf"^\s*{re.escape(key)}\s*=", line):
            # A JSON string is a TOML basic string, apart from DEL, which no Name or address has.
            lines[index] = f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
            return "".join(lines)
    raise InputError("CONFIG_KEY", f"[{table}] has no key {key}.", field=f"{table}.{key}", remedy=f"Add `{key} = ...`.")
