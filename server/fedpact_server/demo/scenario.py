"""What the demo federates: the digits, or somebody's own data described by a federation.toml beside it.

A scenario gives texts for the public commands: a contract template for `fedpact contract new`, and the blocks that
each enterprise writes into its agent.toml.
"""

import datetime
import json
import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from fedpact_contract.contract import (
    MAX_STEPS,
    Baseline,
    ClassLabel,
    Column,
    Contract,
    Data,
    EntityCode,
    Label,
    NumberColumn,
    check_data,
    load_toml,
)
from fedpact_contract.errors import InputError
from fedpact_contract.record import Code, Dec, Name, Part
from fedpact_contract.request import instant
from fedpact_contract.statistics import Statistics, check_statistics
from fedpact_server.demo import data as digits

DESCRIPTION = "federation.toml"
ROUNDS, LOCAL_STEPS, SPARE_ATTEMPTS = 5, 6, 1
"""The digits' plan."""
MAX_ROUNDS, MAX_EPSILON = 100, Decimal(3)
"""What the policy of a fresh agent allows one contract."""
Kind = Literal["csv", "parquet", "sqlite", "ndjson", "arrow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enterprise:
    """One participant: who it is, its data set, where its rows are, and what part it releases for validation."""

    name: str
    sector: str
    entity_code: str
    data_set: str
    source: dict[str, Any]
    num_examples: int
    release_fraction: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that the demo needs to know."""

    title: str
    purpose: str
    data: Data
    enterprises: tuple[Enterprise, ...]
    validation: dict[str, Any] | None  # path, kind and reading options; None: rows that participants release
    rounds: int
    local_steps: int
    learning_rate: Decimal
    privacy: "Privacy"
    statistics: Statistics | None = None
    baseline: Baseline | None = None
    max_duplicates: Decimal | None = None  # of rows that nobody looked at, any part may be alike


class Privacy(Part):
    """What the contract says of privacy, and the budget that each participant declares for its data set."""

    epsilon: Dec
    delta: Dec
    max_grad_norm: Dec
    sample_rate: Dec
    spare_attempts: Annotated[int, Field(ge=0, le=1000)]
    data_set_epsilon: Dec


class _Own(Part):
    """Defaults of every participant's file in federation.toml."""

    kind: Kind = "csv"
    column_names: tuple[Name, ...] | None = None
    delimiter: str = ","
    missing: tuple[str, ...] = ()


class _Participant(Part):
    name: Name
    sector: Code
    file: Annotated[str, Field(min_length=1)]
    entity_code: EntityCode | None = None
    table: Name | None = None


class _Validation(Part):
    file: str | None = None
    fraction: Dec | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.file is None) == (self.fraction is None):
            raise ValueError("give either `file` or `fraction`")
        if self.fraction is not None and not 0 < self.fraction <= Decimal("0.5"):
            raise ValueError("fraction must be above 0 and at most 0.5")
        return self


class _Training(Part):
    rounds: Annotated[int, Field(ge=1, le=1000)]
    local_steps: Annotated[int, Field(ge=1, le=1000)]
    learning_rate: Dec


class Description(Part):
    """federation.toml: somebody's own data for `fedpact demo --data DIR` (docs/own-data.md documents each key).

    What decides about training and privacy has no default.
    """

    title: Name
    purpose: Code
    feature_scale: Dec = Decimal(2)
    source: _Own = _Own()
    participants: Annotated[tuple[_Participant, ...], Field(min_length=2, max_length=12)]
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    label: Label
    validation: _Validation
    training: _Training
    privacy: Privacy
    statistics: Statistics | None = None
    baseline: Baseline | None = None


def of_digits(folder: Path, participants: int | None = None, rounds: int | None = None) -> Scenario:
    """Write the digits below `folder` and describe them.

    Raises:
        InputError: a number of participants that the data cannot be split among; too many rounds.
    """
    _check_rounds(rounds or ROUNDS, LOCAL_STEPS, SPARE_ATTEMPTS, field="--rounds")
    shares, validation = digits.write(folder, 4 if participants is None else participants)
    columns = tuple(
        NumberColumn(name=name, kind="number", low=Decimal(0), high=Decimal(16), missing="refuse")
        for name in digits.PIXELS
    )
    label = ClassLabel(name=digits.LABEL, classes=tuple(str(d) for d in range(10)), rule="value")
    enterprises = tuple(
        Enterprise(
            name=share.name,
            sector=share.sector,
            entity_code=entity_code(index),
            data_set=f"digits-{index + 1}",
            source={"path": share.file, "kind": share.kind} | ({"table": share.table} if share.table else {}),
            num_examples=share.num_examples,
            release_fraction=None,
        )
        for index, share in enumerate(shares)
    )
    return Scenario(
        title="Handwritten digits, read together",
        purpose="digit-recognition",
        data=Data(columns=columns, label=label, feature_scale=Decimal(2)),
        enterprises=enterprises,
        validation={"path": str(validation), "kind": "csv"},
        rounds=rounds or ROUNDS,
        local_steps=LOCAL_STEPS,
        learning_rate=Decimal(4),
        privacy=Privacy(
            epsilon=Decimal(2),
            delta=Decimal("0.00001"),
            max_grad_norm=Decimal(1),
            sample_rate=Decimal("0.2"),
            spare_attempts=SPARE_ATTEMPTS,
            data_set_epsilon=Decimal(8),
        ),
        max_duplicates=Decimal("0.05"),
    )


def of_folder(folder: Path, participants: int | None = None, rounds: int | None = None) -> Scenario:
    """The scenario that DIR/federation.toml describes; every file is read once, to count its rows.

    Args:
        folder: DIR.
        participants: How many somebody asks for; it is the file that says it.
        rounds: Other rounds than the file says.

    Raises:
        InputError: no such file, a missing, unknown or wrong key, a broken rule, or data that does not fit the schema.
    """
    path = folder / DESCRIPTION
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(
            "DATA_DESCRIPTION",
            "The description of the data cannot be read.",
            file=path,
            remedy=f"Write a {DESCRIPTION} beside the data; docs/own-data.md documents each key.",
        ) from err
    found = Description.parse(load_toml(text, file=path), code="DATA_DESCRIPTION", file=path)
    _check(found, path)
    if participants not in (None, len(found.participants)):
        raise InputError(
            "DEMO_PARTICIPANTS",
            f"The description has {len(found.participants)} participants, and {participants} are asked for.",
            file=path,
            field="--participants",
            remedy="Leave --participants out, or change the description.",
        )
    where = "training.rounds" if rounds is None else "--rounds"
    rounds = rounds or found.training.rounds
    _check_rounds(rounds, found.training.local_steps, found.privacy.spare_attempts, field=where, file=path)
    data = Data(columns=found.columns, label=found.label, feature_scale=found.feature_scale)
    fraction = found.validation.fraction
    enterprises = tuple(
        _enterprise(folder, found, data, index, participant, fraction)
        for index, participant in enumerate(found.participants)
    )
    most = max(e.num_examples for e in enterprises)
    _rule(
        found.privacy.delta <= min(Decimal("1e-5"), 1 / (10 * Decimal(most))),
        path,
        "privacy.delta",
        f"at most 1e-5, and at most 1/(10 times the largest number of rows): 1/{10 * most}",
    )
    validation = None
    if found.validation.file is not None:
        validation = {"path": str((folder / found.validation.file).absolute()), **_options(found.source)}
    return Scenario(
        title=found.title,
        purpose=found.purpose,
        data=data,
        enterprises=enterprises,
        validation=validation,
        rounds=rounds,
        local_steps=found.training.local_steps,
        learning_rate=found.training.learning_rate,
        privacy=found.privacy,
        statistics=found.statistics,
        baseline=found.baseline,
    )


def _check(found: Description, path: Path) -> None:
    """Rules over more than one key, before any data is read.

    Raises:
        InputError: naming file, field and rule.
    """
    data = Data(columns=found.columns, label=found.label, feature_scale=found.feature_scale)
    part = cast("Contract", SimpleNamespace(data=data, statistics=found.statistics))  # the checks look at nothing else
    try:
        check_data(part)
        check_statistics(part)
    except InputError as err:
        place = (err.field or "").removeprefix("data.")
        raise InputError("DATA_DESCRIPTION", err.message, file=path, field=place, rule=err.code) from err
    for key in ("name", "file", "entity_code"):
        values = [value for p in found.participants if (value := getattr(p, key)) is not None]
        twice = sorted({v for v in values if values.count(v) > 1})
        _rule(
            not twice or (key == "file" and found.source.kind == "sqlite"), path, f"participants.{key}", "no two alike"
        )
    privacy = found.privacy
    for key in ("epsilon", "delta", "max_grad_norm", "sample_rate", "data_set_epsilon"):
        _rule(getattr(privacy, key) > 0, path, f"privacy.{key}", "above 0")
    _rule(found.training.learning_rate > 0, path, "training.learning_rate", "above 0")
    _rule(privacy.sample_rate < 1, path, "privacy.sample_rate", "below 1")
    allowed = f"at most {MAX_EPSILON}: what the policy of a fresh agent allows one contract"
    _rule(privacy.epsilon <= MAX_EPSILON, path, "privacy.epsilon", allowed)
    _rule(privacy.epsilon <= privacy.data_set_epsilon, path, "privacy.epsilon", "at most privacy.data_set_epsilon")


def _check_rounds(rounds: int, local_steps: int, spare_attempts: int, *, field: str, file: Path | None = None) -> None:
    """The agents' policies and `check_steps` of the contract, before anything is made.

    Raises:
        InputError: DEMO_ROUNDS.
    """
    limit = max(0, min(MAX_ROUNDS, MAX_STEPS // local_steps - spare_attempts))
    if rounds > limit:
        raise InputError(
            "DEMO_ROUNDS",
            f"{rounds} rounds are too many: at most {limit} can be trained.",
            file=file,
            field=field,
            rule=f"at most {MAX_ROUNDS} rounds, and {MAX_STEPS} steps (local_steps for each round and spare attempt)",
            remedy="Ask for fewer rounds.",
        )


def _rule(holds: bool, path: Path, key: str, rule: str) -> None:
    if not holds:
        raise InputError(
            "DATA_DESCRIPTION",
            f"{key} breaks a rule: {rule}.",
            file=path,
            field=key,
            rule=rule,
            remedy="docs/own-data.md documents each key.",
        )


def entity_code(index: int) -> str:
    """A made-up legal-entity code of the demo, 18 characters."""
    return f"91310000MA1DEMO{index + 1:03d}"


def template(scenario: Scenario, now: datetime.datetime) -> str:
    """The contract template."""
    import tomli_w

    count = len(scenario.enterprises)
    released = scenario.validation is None
    minimum = min(3, count)
    values: dict[str, Any] = {
        "title": scenario.title,
        "purpose": scenario.purpose,
        "data": json.loads(json.dumps(scenario.data.plain()), parse_float=Decimal),
        "model": {"kind": "softmax" if isinstance(scenario.data.label, ClassLabel) else "linear", "hidden": []},
        "training": {
            "rounds": scenario.rounds,
            "local_steps": scenario.local_steps,
            "learning_rate": scenario.learning_rate,
            "server_rate": Decimal(1),
            "aggregation": "weighted-mean",
        },
        "privacy": {
            "trust_model": "record-level-at-each-participant",
            "unit": "example",
            "relation": "zero-out",
            "sampling": "poisson",
            **{key: value for key, value in scenario.privacy if key != "data_set_epsilon"},
        },
        "participation": {
            "minimum": minimum,
            "deadline_seconds": 120,
            "head_threshold": min(count - 1, count // 2 + 1),
            "strict_heads": False,
            "missed_rounds_limit": 2,
        },
        "contribution": {"game": "fixed-weight", "loss": scenario.data.label.LOSS, "estimator": "exact"},
        "defences": {
            "clip": "median-signal",
            "wreckers": "reject",
            "negatives": Decimal("0.1"),
            "dispute_hours": 72,
            **({} if scenario.max_duplicates is None else {"max_duplicates": scenario.max_duplicates}),
        },
        "settlement": {
            "currency": "CNY",
            "contribution_weight": Decimal(1),
            "data_weight": Decimal(0),
            "equal_weight": Decimal(0),
            "fallback": "metered",
            "close_days": 7,
        },
        "term": {"not_before": instant(now - datetime.timedelta(days=1)), "not_after": instant(_year_later(now))},
        "participants": [
            {"entity_code": e.entity_code, "data_set": e.data_set, "floor_fen": 0} for e in scenario.enterprises
        ],
    }
    for name, clause in (("statistics", scenario.statistics), ("baseline", scenario.baseline)):
        if clause is not None:
            values[name] = clause.plain()
    head = "# Made by `fedpact demo`"
    return f"{head}{'; the participants release the validation rows' if released else ''}.\n{tomli_w.dumps(values)}"


def agent_blocks(scenario: Scenario, enterprise: Enterprise) -> str:
    """The [[data_sets]] block of one enterprise's agent.toml."""
    import tomli_w

    block: dict[str, Any] = {
        "id": enterprise.data_set,
        "num_examples": enterprise.num_examples,
        "epsilon": scenario.privacy.data_set_epsilon,
        "delta": scenario.privacy.delta,
        "columns": [*(c.name for c in scenario.data.columns), *scenario.data.label_columns[1:]],
        "label": scenario.data.label.name,
    }
    if enterprise.release_fraction is not None:
        block["release_fraction"] = enterprise.release_fraction
    block["source"] = enterprise.source
    return tomli_w.dumps({"data_sets": [block]})


def _enterprise(
    folder: Path, found: Description, data: Data, index: int, participant: _Participant, fraction: Decimal | None
) -> Enterprise:
    from fedpact_models.features import encode
    from fedpact_models.tables import first_line, read_table

    path = (folder / participant.file).absolute()
    options = _options(found.source) | ({"table": participant.table} if participant.table else {})
    begins = first_line(options["kind"], options.get("column_names"))
    rows = len(encode(data, read_table(path, **options), file=str(path), first_line=begins))
    if fraction is not None:
        # Which rows are released is decided row by row; this many are left with room to spare (four deviations).
        share = float(fraction)
        rows -= math.ceil(rows * share + 4 * math.sqrt(rows * share * (1 - share)))
    if rows < 1:
        raise InputError("DATA_TOO_FEW_ROWS", "No row is left to train on.", file=path, party=participant.name)
    return Enterprise(
        name=participant.name,
        sector=participant.sector,
        entity_code=participant.entity_code or entity_code(index),
        data_set=f"data-{index + 1}",
        source={"path": str(path), **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}},
        num_examples=rows,
        release_fraction=fraction,
    )


def _options(own: _Own) -> dict[str, Any]:
    options: dict[str, Any] = {"kind": own.kind, "missing": own.missing}
    if own.kind == "csv":
        options["delimiter"] = own.delimiter
        if own.column_names is not None:
            options["column_names"] = own.column_names
    return options


def _year_later(now: datetime.datetime) -> datetime.datetime:
    return now + datetime.timedelta(days=365)
