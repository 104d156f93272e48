"""`contract new`: from a template to a draft contract, with everything filled in that is derived, not chosen.

The template gives what people decide. Derived are: the operator, the participants' names, keys and sectors (from
their enrolment), their numbers of examples and gate orders (from their signed cards, whose digests are named), the
noise multiplier (from the whole plan), the accountant, the initial model, the validation set's root and slices, and the
digests of the installed code.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract import privacy
from fedpact_contract import sketch as sketches
from fedpact_contract.contract import ClientPrivacy, Contract, load_toml, merge
from fedpact_contract.errors import InputError
from fedpact_contract.messages import DataSetCard
from fedpact_contract.record import read_envelope
from fedpact_contract.request import instant
from fedpact_models.registry import initial_weights, parameter_count
from fedpact_models.tables import first_line, read_table
from fedpact_server import db, enrolment, validation
from fedpact_server.db import Database
from fedpact_server.home import OperatorHome
from fedpact_server.installed import installed_code
from fedpact_server.measurements import BASELINE_PARAMETERS
from fedpact_server.run_state import store_model


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationFile:
    """Validation rows in a file, and how to read it (`fedpact_models.tables.read_table`)."""

    path: Path
    kind: Literal["csv", "parquet", "sqlite", "ndjson", "arrow"] = "csv"
    table: str | None = None
    column_names: tuple[str, ...] | None = None
    delimiter: str = ","
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signatory:
    """A participant of the draft, as enrolled, with the card of the data set that the template names."""

    member: enrolment.Member
    card: DataSetCard


def new(
    home: OperatorHome,
    database: Database,
    template: str,
    validation_file: ValidationFile | None,
    *,
    now: datetime.datetime,
    released: bool = False,
    buyer_file: ValidationFile | None = None,
    file: object = None,
) -> Contract:
    """Make a draft contract from a template and keep it, with its validation set and initial model.

    Args:
        home: The operator's home.
        database: Its database.
        template: TOML (see templates/).
        validation_file: The operator's validation rows, if it has any.
        now: The clock.
        released: Also take the validation rows that participants released from the data sets of this contract.
        buyer_file: The rows that the buyer gave for it, if it gave any.
        file: What errors call the template.

    Raises:
        InputError: an unknown, missing, derived or ill-typed key; an enterprise that is not approved or has no card
            for its data set; a schema that does not fit the cards or the validation rows; a term that has ended.
    """
    values = load_toml(template, file=file)
    with database.read() as connection:
        signatories, values = _participants(connection, values, file)
        tables = [*_file_rows("operator", validation_file), *_file_rows("buyer", buyer_file)]
        tables += _released_rows(connection, signatories) if released else []
    software = installed_code()
    sketch = sketches.sketch(values, home.party, software, file=file)
    _check_control(sketch)
    _check_cards(sketch, signatories)
    if sketch.term.not_after <= instant(now):
        raise InputError(
            "CONTRACT_EXPIRED",
            "The term has ended already.",
            file=file,
            field="term.not_after",
            remedy="Write a later not_after under [term].",
        )
    rows = validation.build(sketch.data, tables)
    weights = initial_weights(sketch.model, sketch.data, np.random.default_rng())
    _check_baseline(sketch)
    derived = sketches.solve(sketch, file=file).plain()
    derived["model"]["initial_digest"] = store_model(home.path, weights)
    derived["contribution"]["validation"] = {"root": rows.root, "slices": [s.plain() for s in rows.slices]}
    contract = Contract.parse(derived, file=file)
    privacy.check_plan(contract)
    validation.save(home.path, rows)
    with database.write() as connection:
        connection.execute(db.contracts.insert().values(id=contract.id, payload=contract.to_bytes(), state="draft"))
    return contract


def _check_control(contract: Contract) -> None:
    """Participants that are all affiliates of the operator, or of the buyer, are named as under common control too."""
    groups = [{*group.members} for group in contract.common_control or ()]
    for of in ("operator", "buyer"):
        codes = {a.entity_code for a in contract.affiliates or () if a.of == of}
        if of == "buyer" and contract.buyer is not None:
            codes.add(contract.buyer.entity_code)
        linked = [p for p in contract.participants if p.entity_code in codes]
        if len(linked) > 1 and not any({p.entity_code for p in linked} <= group for group in groups):
            raise InputError(
                "TEMPLATE_COMMON_CONTROL",
                f"{', '.join(p.name for p in linked)} are under common control, by way of the {of}.",
                field="common_control",
                party=linked[0].name,
                rule="affiliates of one party are one group of common control",
                remedy="Name them in one [[common_control]] with name and members (their entity codes).",
            )


def _check_baseline(sketch: Contract) -> None:
    """A baseline's model fits into one request."""
    size = parameter_count(sketch.model, sketch.data)
    if sketch.baseline is not None and size > BASELINE_PARAMETERS:
        raise InputError(
            "TEMPLATE_BASELINE_SIZE",
            f"The model has {size} parameters; a baseline is offered for at most {BASELINE_PARAMETERS}.",
            field="baseline",
            remedy="Leave [baseline] out, or take a smaller model.",
        )


def _participants(
    connection: Connection, values: dict[str, Any], file: object
) -> tuple[list[_Signatory], dict[str, Any]]:
    """The signatories, and the template's values with their participants filled in."""
    given = values.get("participants")
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise InputError(
            "TEMPLATE_PARTICIPANTS",
            "The template names no participants.",
            file=file,
            field="participants",
            remedy="Give one [[participants]] table with entity_code, data_set and floor_fen for each.",
        )
    signatories, filled = [], []
    for index, item in enumerate(given):
        signatory = _signatory(connection, item, f"participants.{index}", file)
        member, card = signatory.member, signatory.card
        derived: dict[str, Any] = {"name": member.name, "key": member.contract_key, "sector": member.sector}
        derived = {**derived, "num_examples": card.num_examples, "gate_order": card.alpha, "card": card.digest()}
        filled.append(merge(item, derived, file=file, under=f"participants.{index}"))
        signatories.append(signatory)
    return signatories, values | {"participants": filled}


def _signatory(connection: Connection, item: Mapping[str, Any], field: str, file: object) -> _Signatory:
    for key in ("entity_code", "data_set"):
        if not isinstance(item.get(key), str):
            raise InputError(
                "CONTRACT_MISSING_KEY",
                f"The key {field}.{key} is missing.",
                file=file,
                field=f"{field}.{key}",
                remedy="Write it: each of [[participants]] has entity_code, data_set and floor_fen.",
            )
    member = enrolment.by_entity(connection, item["entity_code"])
    if member is None or member.state not in ("approved", "registered"):
        raise InputError(
            "TEMPLATE_NOT_APPROVED",
            "No approved participant has this entity code.",
            file=file,
            field=f"{field}.entity_code",
            party=item["entity_code"],
            remedy="`fedpact participant list` shows who is approved.",
        )
    card = _card(connection, member.id, item["data_set"])
    if card is None:
        raise InputError(
            "TEMPLATE_NO_CARD",
            f"{member.name} has sent no card for this data set.",
            file=file,
            field=f"{field}.data_set",
            party=member.name,
            remedy="Ask the enterprise to sign and send the card of its data set.",
        )
    return _Signatory(member=member, card=card)


def _check_cards(contract: Contract, signatories: Sequence[_Signatory]) -> None:
    """Every data set has the contract's columns and label, as its card says."""
    names = [*(column.name for column in contract.data.columns), *contract.data.label_columns[1:]]
    for signatory in signatories:
        card, party = signatory.card, signatory.member.name
        if missing := [name for name in names if name not in card.columns]:
            raise InputError(
                "TEMPLATE_CARD_COLUMN",
                f"The data set {card.data_set} of {party} has no column {missing[0]}.",
                field="data.label.event" if missing[0] in contract.data.label_columns else "data.columns",
                party=party,
                remedy="Name columns that every card has, or ask the enterprise to sign a card with this one.",
            )
        if card.label != contract.data.label.name:
            raise InputError(
                "TEMPLATE_CARD_LABEL",
                f"The label of the data set {card.data_set} of {party} is {card.label}.",
                field="data.label.name",
                party=party,
                remedy="Predict the label that all cards name, or ask the enterprise to sign another card.",
            )
        if contract.privacy.entity is not None and card.entity != contract.privacy.entity.column:
            raise InputError(
                "TEMPLATE_CARD_ENTITY",
                f"The data set {card.data_set} of {party} tells entities apart by {card.entity or 'nothing'}.",
                field="privacy.entity.column",
                party=party,
                remedy="Name the column that all cards declare as `entity`, or leave [privacy.entity] out.",
            )


def without_entities(database: Database, contract: Contract) -> list[tuple[str, str]]:
    """Whom the contract leaves without a clause though their cards tell entities apart: names and columns.

    None at client level, where a participant's whole update is the unit.
    """
    if contract.privacy.entity is not None or isinstance(contract.privacy, ClientPrivacy):
        return []
    with database.read() as connection:
        cards = [(p.name, _card(connection, p.id, p.data_set)) for p in contract.participants]
    return [(name, card.entity) for name, card in cards if card is not None and card.entity is not None]


def _card(connection: Connection, participant: str, data_set: str) -> DataSetCard | None:
    """The newest card of a participant's data set."""
    stored = connection.execute(
        sa.select(db.cards.c.envelope).where(db.cards.c.participant == participant, db.cards.c.data_set == data_set)
    ).scalar()
    return None if stored is None else DataSetCard.from_bytes(read_envelope(bytes(stored)).body)


def _file_rows(giver: str, given: ValidationFile | None) -> list[validation.Source]:
    if given is None:
        return []
    table = read_table(
        given.path,
        kind=given.kind,
        table=given.table,
        column_names=given.column_names,
        delimiter=given.delimiter,
        missing=given.missing,
    )
    begins = first_line(given.kind, given.column_names)
    return [validation.Source(giver=giver, table=table, name=str(given.path), first_line=begins)]


def _released_rows(connection: Connection, signatories: Sequence[_Signatory]) -> list[validation.Source]:
    sources = []
    for signatory in signatories:
        card = signatory.card
        table = validation.released_table(connection, signatory.member.id, card.data_set)
        if table is not None:
            name = f"rows released by {signatory.member.name}"
            sources.append(validation.Source(giver=signatory.member.id, table=table, name=name))
    return sources
