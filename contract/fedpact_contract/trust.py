"""The trust file: whom its reader knows, by legal entity and key fingerprint, learnt by another way than the operator.

TOML, one table a party:

    [[party]]
    role = "participant"            # operator, participant or auditor
    name = "Hospital A"
    entity_code = "91310000MA1K000001"
    fingerprint = "3f2a ... 64 hexadecimal characters, spaces and colons allowed"
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from fedpact_contract.contract import Contract, EntityCode, Party, load_toml
from fedpact_contract.errors import FaultError, FedpactError, InputError
from fedpact_contract.files import only_writer, replace_file
from fedpact_contract.keys import parse_fingerprint, show_fingerprint
from fedpact_contract.record import Hex32, Name, Part
from fedpact_contract.toml_lines import naming_lines

Role = Literal["operator", "participant", "auditor"]


def _fingerprint(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_fingerprint(value)
    except FedpactError as err:
        raise ValueError(err.message.rstrip(".")) from err


class TrustedParty(Part):
    """A legal entity in a role, and the fingerprint of its contract key; an auditor's is over both of its keys."""

    role: Role
    name: Name
    entity_code: EntityCode
    fingerprint: Annotated[Hex32, BeforeValidator(_fingerprint)]


class Trust(Part):
    """Everybody whom the reader of the evidence knows."""

    party: Annotated[tuple[TrustedParty, ...], Field(min_length=1, max_length=10_000)]

    @classmethod
    def from_toml(cls, text: str, *, file: object = None) -> Self:
        """Read a trust file's text.

        Raises:
            InputError: TOML_SYNTAX, TRUST..., naming the field; TRUST_PARTY_TWICE, entries that contradict each other.
        """
        value = load_toml(text, file=file)
        with naming_lines(text, file):
            trust = cls.parse(value, code="TRUST", file=file)
        _refuse_contradictions(trust, file)
        return trust

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a trust file.

        Raises:
            InputError: TRUST_MISSING, TRUST_ENCODING, or as `from_toml`.
        """
        return cls.from_toml(_read(path), file=path)

    @classmethod
    def of(cls, contract: Contract) -> Self:
        """What a contract itself says of its parties: shows the mechanism (the demo), proves nothing."""

        def entry(party: Party) -> dict[str, Any]:
            role = contract.role(party.id)
            return {"role": role, "name": party.name, "entity_code": party.entity_code, "fingerprint": party.id}

        return cls.parse({"party": [entry(party) for party in contract.named().values()]}, code="TRUST")

    def to_toml(self) -> str:
        """The file's text; `from_toml` reads it back."""
        tables = []
        for party in self.party:
            lines = [
                f'role = "{party.role}"',
                f"name = {json.dumps(party.name, ensure_ascii=False)}",
                f'entity_code = "{party.entity_code}"',
                f'fingerprint = "{show_fingerprint(party.fingerprint)}"',
            ]
            tables.append("\n".join(["[[party]]", *lines]) + "\n")
        return "\n".join(tables)

    def entries(self, entity_code: str) -> tuple[TrustedParty, ...]:
        """What is known of a legal entity."""
        return tuple(p for p in self.party if p.entity_code == entity_code)

    def knows(self, role: Role, party: Party) -> bool:
        """Whether this party of a contract is here in this role, with its key."""
        return any(entry.role == role and entry.fingerprint == party.id for entry in self.entries(party.entity_code))

    def contradictions(self, contract: Contract, *, file: object, field: str) -> Iterator[FaultError]:
        """Where the contract names a legal entity, or a key, that is known here with another key, or entity.

        Args:
            contract: Its parties, and its auditor.
            file: What faults call the file that it stands in.
            field: And where in it.
        """
        for party in contract.named().values():
            entries = self.entries(party.entity_code)
            if party is contract.auditor:  # who audits has keys of its own for it, whatever else it is elsewhere
                entries = tuple(entry for entry in entries if entry.role == "auditor")
            other = next(
                (e for e in self.party if e.fingerprint == party.id and e.entity_code != party.entity_code), None
            )
            if other is not None:
                message = f"The contract gives the key of {other.name} ({other.entity_code}) to {party.entity_code}."
            elif entries and all(entry.fingerprint != party.id for entry in entries):
                message = f"The contract has another key for {party.entity_code} than the trust file."
            else:
                continue
            yield FaultError(
                "TRUST_CONTRADICTION",
                message,
                file=file,
                field=field,
                party=party.name,
                rule="entity code and fingerprint of the contract are those of the trust file",
                remedy="Ask that party for its fingerprint by another way than the operator.",
            )


def write(path: Path, trust: Trust) -> None:
    """Write a trust file, whole or not at all; one that exists is replaced."""
    replace_file(path, trust.to_toml().encode())


def with_party(text: str, party: TrustedParty, *, file: object = None) -> str:
    """A trust file's text with one more party at its end; what people wrote there stays. Again changes nothing.

    Args:
        text: The file's text; it may be empty.
        party: Whom its reader knows.
        file: What errors call the file.

    Raises:
        InputError: TRUST_PARTY_TWICE, the file has another key for it, or another owner of its key; malformed.
    """
    known = Trust.from_toml(text, file=file).party if text.strip() else ()
    place = (party.role, party.entity_code, party.fingerprint)
    if any((p.role, p.entity_code, p.fingerprint) == place for p in known):
        return text
    entry = Trust(party=(party,)).to_toml()
    longer = f"{text.rstrip()}\n\n{entry}" if text.strip() else entry
    Trust.from_toml(longer, file=file)
    return longer


def add_party(path: Path, party: TrustedParty) -> None:
    """Enter a party in a trust file; the file is made where there is none.

    Raises:
        InputError: as `with_party`; TRUST_ENCODING; TRUST_FOLDER, there is no folder for it.
    """
    if not path.parent.is_dir():
        raise InputError(
            "TRUST_FOLDER", "There is no folder for the trust file.", file=path, remedy="Correct the path."
        )
    with only_writer(path.parent):
        text = _read(path) if path.exists() else ""
        replace_file(path, with_party(text, party, file=path).encode())


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError) as err:
        raise InputError(
            "TRUST_MISSING",
            "There is no trust file here.",
            file=path,
            remedy="Write one, with `fedpact trust add`, of the fingerprints that the parties told you themselves.",
        ) from err
    except UnicodeDecodeError as err:
        raise InputError("TRUST_ENCODING", "The trust file is not UTF-8 text.", file=path) from err


def _refuse_contradictions(trust: Trust, file: object) -> None:
    """One entity has one key in a role; one key belongs to one entity."""
    keys: dict[tuple[str, str], int] = {}
    owners: dict[str, str] = {}
    for index, party in enumerate(trust.party):
        place, owner = (party.role, party.entity_code), owners.setdefault(party.fingerprint, party.entity_code)
        if place in keys or owner != party.entity_code:
            what = (
                f"The {party.role} {party.entity_code} stands twice (also as entry {keys[place]})."
                if place in keys
                else f"One key is given to two legal entities, {owner} and {party.entity_code}."
            )
            raise InputError(
                "TRUST_PARTY_TWICE",
                what,
                file=file,
                field=f"party.{index}",
                party=party.name,
                rule="one key for each legal entity and role, one legal entity for each key",
                remedy="Ask the party which entry is right, and remove the other.",
            )
        keys[place] = index
