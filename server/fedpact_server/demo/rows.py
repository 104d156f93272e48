"""A contract's rows out of files as `fedpact demo` has them: for simulations in one process, outside every ledger."""

import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fedpact_contract.contract import Contract, ValidationSlice
from fedpact_contract.errors import InputError
from fedpact_contract.settlement import largest_remainder
from fedpact_models.features import Examples, encode, select_rows
from fedpact_models.tables import first_line, read_table
from fedpact_server.demo import scenario as scenarios
from fedpact_server.demo.scenario import Enterprise, Scenario

Rows = tuple[dict[str, Examples], Examples, tuple[ValidationSlice, ...]]
"""Participant id -> exactly the contracted number of rows; the validation rows; whose they are, as in the contract."""


def of_folder(contract: Contract, folder: Path) -> Rows:
    """The rows that DIR/federation.toml describes, each participant's by its legal-entity code.

    Raises:
        InputError: as `scenario.of_folder`; RETRAIN_PARTICIPANT, a participant without a file; DATA_*.
    """
    found = scenarios.of_folder(folder)
    known = {e.entity_code: e for e in found.enterprises}
    owners = {party_id: known.get(party.entity_code) for party_id, party in contract.by_id().items()}
    for party_id, owner in owners.items():
        if owner is None:
            party = contract.participant(party_id)
            raise InputError(
                "RETRAIN_PARTICIPANT",
                f"{party.name} ({party.entity_code}) has no file in this description.",
                file=folder / scenarios.DESCRIPTION,
                field="participants.entity_code",
                party=party.name,
                remedy="Give each participant of the contract a file, and its entity_code.",
            )
    return _rows(contract, found, lambda party_id: owners[party_id])


def of_digits(contract: Contract, folder: Path) -> Rows:
    """The demo's digits, written below `folder`: to each participant the rows of its place in the contract.

    Raises:
        InputError: RETRAIN_SCHEMA, the contract is of other data; DEMO_PARTICIPANTS, DATA_TOO_FEW_ROWS.
    """
    found = scenarios.of_digits(folder, len(contract.participants))
    if (contract.data.columns, contract.data.label) != (found.data.columns, found.data.label):
        raise InputError(
            "RETRAIN_SCHEMA",
            "The contract's schema is not that of the demo's digits.",
            field="data.columns",
            remedy="Name files of the contract's schema with --data DIR.",
        )
    place = {party.id: index for index, party in enumerate(contract.participants)}
    return _rows(contract, found, lambda party_id: found.enterprises[place[party_id]])


def _rows(contract: Contract, found: Scenario, owner: Callable[[str], Enterprise | None]) -> Rows:
    rows: dict[str, Examples] = {}
    released: dict[str, Examples] = {}
    for party_id, party in contract.by_id().items():
        enterprise = owner(party_id)
        assert enterprise is not None  # noqa: S101 - the caller looked
        own = _encoded(contract, enterprise.source)
        if found.validation is None:
            own, given = _without_released(own, float(enterprise.release_fraction or 0))
            released[party_id] = given
        if len(own) < party.num_examples:
            raise InputError(
                "DATA_TOO_FEW_ROWS",
                f"The contract says {party.num_examples} rows, and {len(own)} are there for training.",
                file=enterprise.source["path"],
                party=party.name,
                rule="train on exactly the contracted number of rows",
                remedy="Name the files that the contract was made for.",
            )
        rows[party_id] = select_rows(own, party.num_examples, os.urandom(32))
    givers = contract.contribution.validation.slices
    if found.validation is not None:
        validation = _encoded(contract, found.validation)
        counts = largest_remainder(len(validation), {s.source: Fraction(s.count) for s in givers})
        return rows, validation, _slices((s.source, counts[s.source]) for s in givers)
    known = {s.source for s in givers}
    slices = _slices((p if p in known else "operator", len(given)) for p, given in released.items())
    x, y = (np.concatenate([getattr(given, part) for given in released.values()]) for part in ("x", "y"))
    return rows, Examples(x=x, y=y), slices


def _slices(givers: Iterable[tuple[str, int]]) -> tuple[ValidationSlice, ...]:
    """Whose the validation rows are, in their order; a slice without rows is none."""
    return tuple(ValidationSlice(source=source, count=count) for source, count in givers if count)


def _encoded(contract: Contract, source: dict[str, Any]) -> Examples:
    """A file's rows, encoded under the contract's schema."""
    begins = first_line(source["kind"], source.get("column_names"))
    return encode(contract.data, read_table(**source), file=str(source["path"]), first_line=begins)


def _without_released(own: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Rows to train on, and rows that are released for validation: each with this chance, as an agent chooses them."""
    given = np.random.default_rng().random(len(own)) < fraction
    return own.take(np.flatnonzero(~given)), own.take(np.flatnonzero(given))
