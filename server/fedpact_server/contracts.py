"""A contract's life at the operator: draft, offered, signed by everybody, terminated.

Each party signs the contract's bytes and a delegation of one run key by its contract key. When the last signature is
in, the contract with all of them becomes entry 0 of its log, under the first checkpoint.
"""

import base64
import datetime
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract, Delegation, Party, SignedContract
from fedpact_contract.errors import FailedError, FaultError, InputError, RefusedError
from fedpact_contract.keys import public_hex
from fedpact_contract.log import ContractSigned
from fedpact_contract.privacy import check_plan
from fedpact_contract.record import Envelope, open_signed, read_envelope
from fedpact_contract.record import sign as sign_record
from fedpact_contract.request import instant
from fedpact_server import db, enrolment, logbook
from fedpact_server.alarms import raise_alarm
from fedpact_server.db import Database
from fedpact_server.home import OperatorHome
from fedpact_server.installed import installed_code
from fedpact_server.run_state import load_model

_SHORTEST_PREFIX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A contract as the operator keeps it: its record, canonical bytes, and state."""

    contract: Contract
    payload: bytes
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Who has signed. `parties` are (id, party); `signed` and `missing` are ids; all in the contract's order."""

    id: str
    title: str
    state: str
    parties: tuple[tuple[str, Party], ...]
    signed: tuple[str, ...]
    missing: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "id": self.id,
            "title": self.title,
            "state": self.state,
            "parties": [
                {"id": i, "name": p.name, "entity_code": p.entity_code, "signed": i in self.signed}
                for i, p in self.parties
            ],
            "signed": list(self.signed),
            "missing": list(self.missing),
        }


def find(connection: Connection, selector: str) -> Stored:
    """The one contract whose id begins with this (at least four characters).

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_AMBIGUOUS.
    """
    prefix = selector.strip().lower()
    usable = len(prefix) >= _SHORTEST_PREFIX and set(prefix) <= set("0123456789abcdef")
    query = sa.select(db.contracts).where(db.contracts.c.id.startswith(prefix)).limit(2)
    rows = connection.execute(query).all() if usable else []
    if len(rows) > 1:
        raise InputError(
            "CONTRACT_AMBIGUOUS",
            "More than one contract's id begins so.",
            field=selector,
            remedy="Write more of the id; `fedpact contract status` lists them.",
        )
    if not rows:
        raise InputError(
            "CONTRACT_UNKNOWN",
            "There is no contract with this id.",
            field=selector,
            remedy="`fedpact contract status` lists them.",
        )
    payload = bytes(rows[0].payload)
    return Stored(contract=Contract.from_bytes(payload), payload=payload, state=str(rows[0].state))


def every(connection: Connection) -> list[Stored]:
    """Every contract, by title, then id."""
    rows = connection.execute(sa.select(db.contracts)).all()
    found = [
        Stored(contract=Contract.from_bytes(bytes(r.payload)), payload=bytes(r.payload), state=str(r.state))
        for r in rows
    ]
    return sorted(found, key=lambda stored: (stored.contract.title, stored.contract.id))


def status(connection: Connection, stored: Stored) -> Status:
    """Who has signed a contract and whose signature is missing."""
    parties = stored.contract.parties()
    known = db.signatures.c
    signed = set(connection.execute(sa.select(known.party).where(known.contract_id == stored.contract.id)).scalars())
    return Status(
        id=stored.contract.id,
        title=stored.contract.title,
        state=stored.state,
        parties=tuple(parties.items()),
        signed=tuple(party for party in parties if party in signed),
        missing=tuple(party for party in parties if party not in signed),
    )


def offer(database: Database, contract_id: str, *, now: datetime.datetime) -> Status:
    """Show a draft to the participants that it names, for signature; again changes nothing.

    What the plan costs is recomputed: another release may have made the draft.

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_EXPIRED; CONTRACT_ACCOUNTANT, CONTRACT_NOISE_TOO_SMALL.
        RefusedError: CONTRACT_STATE (terminated), PARTICIPANT_NOT_ACTIVE.
    """
    with database.read() as connection:
        stored = find(connection, contract_id)
    if stored.state == "draft":
        check_plan(stored.contract)
    with database.write() as connection:
        stored = find(connection, contract_id)
        if stored.state in ("offered", "signed"):
            return status(connection, stored)
        _require(stored, ("draft",), now)
        for participant in stored.contract.participants:
            member = enrolment.by_entity(connection, participant.entity_code)
            if member is None or member.id != participant.id or member.state not in ("approved", "registered"):
                raise RefusedError(
                    "PARTICIPANT_NOT_ACTIVE",
                    f"{participant.name} is no longer an approved participant with this key.",
                    party=participant.name,
                    remedy="Approve it again, or make a contract without it.",
                )
        _set_state(connection, stored.contract.id, "offered")
        return status(connection, find(connection, stored.contract.id))


def signable(connection: Connection, contract_id: str, now: datetime.datetime) -> Contract:
    """A contract that parties may sign now.

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_EXPIRED.
        RefusedError: CONTRACT_STATE.
    """
    stored = find(connection, contract_id)
    _require(stored, ("offered", "signed"), now)
    return stored.contract


def sign(
    home: OperatorHome, database: Database, contract_id: str, passphrase: bytes, *, now: datetime.datetime
) -> Status:
    """Sign as the operator, and delegate a run key, which is made and kept; again changes nothing.

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_EXPIRED; a wrong passphrase.
        RefusedError: CONTRACT_STATE, CONTRACT_OPERATOR, CONTRACT_CODE.
        FaultError: the validation set or the initial model is not what the contract says.
    """
    with database.read() as connection:
        contract = signable(connection, contract_id, now)
    _check_own(home, contract)
    key = home.contract_key(passphrase)
    run_key = home.make_run_key(contract.id)
    envelope = sign_record(contract, key)
    delegation = sign_record(
        Delegation(contract_id=contract.id, party=home.fingerprint, run_key=public_hex(run_key)), key
    )
    return _take(home, database, contract.id, home.party, envelope, delegation, now)


def accept_signature(
    home: OperatorHome,
    database: Database,
    contract_id: str,
    party_id: str,
    *,
    envelope: Envelope[Contract],
    delegation: Envelope[Delegation],
    now: datetime.datetime,
) -> Status:
    """Take a participant's signature and delegation; the last one missing makes the contract signed.

    Args:
        home: The operator's home (its run key signs the first checkpoint).
        database: Its database.
        contract_id: The contract.
        party_id: The participant that sends it.
        envelope: The contract with this party's one signature.
        delegation: Its run key, signed by its contract key.
        now: The clock.

    Raises:
        InputError: CONTRACT_UNKNOWN, CONTRACT_NOT_A_PARTY, CONTRACT_EXPIRED, or a malformed record.
        RefusedError: CONTRACT_STATE; SIGNED_OTHERWISE, this party signed before, with another run key.
        FaultError: SIGNED_OTHER_BYTES, SIGNATURE_COUNT, SIGNATURE_INVALID, SIGNATURE_MISSING, DELEGATION_PLACE,
            RUN_KEY_TAKEN.
    """
    with database.read() as connection:
        party = find(connection, contract_id).contract.participant(party_id)
    return _take(home, database, contract_id, party, envelope, delegation, now)


def terminate(database: Database, contract_id: str, *, now: datetime.datetime) -> Status:
    """End a contract: nothing more is signed or trained under it; its log and what was earned stay. Final.

    Raises:
        InputError: CONTRACT_UNKNOWN.
    """
    with database.write() as connection:
        stored = find(connection, contract_id)
        if stored.state != "terminated":
            run = db.runs.c
            connection.execute(
                db.runs.update()
                .where(run.contract_id == stored.contract.id, run.phase == "running")
                .values(wanted="stop")
            )
            _set_state(connection, stored.contract.id, "terminated")
            raise_alarm(connection, "CONTRACT_TERMINATED", stored.contract.id, now=now)
        return status(connection, find(connection, stored.contract.id))


def unsigned(stored: Stored) -> Envelope[Contract]:
    """The contract's envelope, before anybody signed it."""
    payload = base64.b64encode(stored.payload).decode()
    return Envelope(type=Contract.media_type(), payload=payload, signatures=())


def envelopes(connection: Connection, stored: Stored) -> SignedContract | None:
    """The contract with the signatures so far (by key) and the delegations (by party); None where there are none."""
    known = db.signatures.c
    query = sa.select(known.contract_envelope, known.delegation).where(known.contract_id == stored.contract.id)
    rows = connection.execute(query.order_by(known.party)).all()
    if not rows:
        return None
    signed = [read_envelope(bytes(row.contract_envelope)) for row in rows]
    signatures = sorted((s for envelope in signed for s in envelope.signatures), key=lambda s: s.key)
    return SignedContract(
        contract=signed[0].model_copy(update={"signatures": tuple(signatures)}),
        delegations=tuple(read_envelope(bytes(row.delegation)) for row in rows),
    )


def _take(
    home: OperatorHome,
    database: Database,
    contract_id: str,
    party: Party,
    envelope: Envelope[Contract],
    delegation: Envelope[Delegation],
    now: datetime.datetime,
) -> Status:
    with database.write() as connection:
        stored = find(connection, contract_id)
        _require(stored, ("offered", "signed"), now)
        _check_signature(stored, party, envelope, delegation)
        if not _known(connection, stored, party, envelope, delegation):
            _check_run_key(connection, stored, delegation)
            connection.execute(
                db.signatures.insert().values(
                    contract_id=stored.contract.id,
                    party=party.id,
                    contract_envelope=envelope.to_bytes(),
                    delegation=delegation.to_bytes(),
                )
            )
            if not status(connection, stored).missing:
                _complete(connection, home, stored)
        return status(connection, find(connection, stored.contract.id))


def _known(
    connection: Connection,
    stored: Stored,
    party: Party,
    envelope: Envelope[Contract],
    delegation: Envelope[Delegation],
) -> bool:
    """Whether this very signature is kept already (a repeated request)."""
    known = db.signatures.c
    row = connection.execute(
        sa.select(known.contract_envelope, known.delegation).where(
            known.contract_id == stored.contract.id, known.party == party.id
        )
    ).first()
    if row is None:
        return False
    if (bytes(row.contract_envelope), bytes(row.delegation)) != (envelope.to_bytes(), delegation.to_bytes()):
        raise RefusedError(
            "SIGNED_OTHERWISE",
            "This party signed before, and delegated another run key.",
            party=party.name,
            remedy="Sign from the home that signed first.",
        )
    return True


def _check_signature(
    stored: Stored, party: Party, envelope: Envelope[Contract], delegation: Envelope[Delegation]
) -> None:
    """The one signature on each is this party's, on these bytes and for this contract."""
    if envelope.body != stored.payload:
        raise FaultError(
            "SIGNED_OTHER_BYTES",
            "The signed contract is not the one that was offered.",
            party=party.name,
            remedy="Fetch the contract again, read it, and sign it.",
        )
    for item, kind in ((envelope, Contract), (delegation, Delegation)):
        if len(item.signatures) != 1:
            raise FaultError(
                "SIGNATURE_COUNT", f"A {kind.TYPE} is sent with one signature, the sender's.", party=party.name
            )
    open_signed(envelope, Contract, party.key)
    record = open_signed(delegation, Delegation, party.key)
    if (record.contract_id, record.party) != (stored.contract.id, party.id):
        raise FaultError("DELEGATION_PLACE", "The delegation is for another contract or party.", party=party.name)


def _check_run_key(connection: Connection, stored: Stored, delegation: Envelope[Delegation]) -> None:
    """A run key is no contract key and nobody else's run key."""
    run_key = Delegation.from_bytes(delegation.body).run_key
    signed = envelopes(connection, stored)
    others = [] if signed is None else [Delegation.from_bytes(d.body).run_key for d in signed.delegations]
    if run_key in others or run_key in {party.key for party in stored.contract.parties().values()}:
        raise FaultError(
            "RUN_KEY_TAKEN",
            "The delegated run key is another key of this contract.",
            rule="each party has its own contract key and its own run key",
        )


def _complete(connection: Connection, home: OperatorHome, stored: Stored) -> None:
    """Everybody has signed: entry 0 and the first checkpoint."""
    signed = envelopes(connection, stored)
    assert signed is not None  # noqa: S101 - nobody's signature is missing
    try:
        run_key = home.run_key(stored.contract.id)
    except InputError as err:  # the sender of the last signature has no part in this
        raise FailedError("RUN_KEY_MISSING", f"The operator's run key cannot be used: {err.message}") from err
    logbook.append(connection, stored.contract.id, [ContractSigned(signed=signed)])
    logbook.checkpoint(connection, stored.contract.id, run_key)
    _set_state(connection, stored.contract.id, "signed")


def _check_own(home: OperatorHome, contract: Contract) -> None:
    """The contract is this operator's, and what it commits to is here."""
    from fedpact_server import validation  # reads tables: no other command about a contract pays for that

    if contract.operator != home.party:
        raise RefusedError(
            "CONTRACT_OPERATOR",
            "The contract names another operator than this home.",
            field="operator",
            remedy="Give --home the home of the operator that the contract names.",
        )
    if contract.code != installed_code():
        raise RefusedError(
            "CONTRACT_CODE",
            "The contract names other code than is installed here.",
            field="code",
            remedy="Install the release that the contract names, or make the contract anew.",
        )
    load_model(home.path, contract.model.initial_digest)
    found = validation.load(home.path, contract.contribution.validation.root)
    if found.slices != contract.contribution.validation.slices:
        raise FaultError(
            "VALIDATION_SLICES", "The stored validation slices are not the contract's.", field="contribution.validation"
        )


def _require(stored: Stored, states: tuple[str, ...], now: datetime.datetime) -> None:
    if stored.state not in states:
        raise RefusedError(
            "CONTRACT_STATE",
            f"The contract is in the state {stored.state}; this needs {' or '.join(states)}.",
            remedy=f"Offer it first: fedpact contract offer {stored.contract.id[:8]}"
            if stored.state == "draft"
            else "`fedpact contract status` shows where each contract stands.",
        )
    if stored.contract.term.not_after <= instant(now):
        raise InputError(
            "CONTRACT_EXPIRED",
            "The contract's term has ended.",
            field="term.not_after",
            remedy="Make a new contract with a later term: fedpact contract new.",
        )


def _set_state(connection: Connection, contract_id: str, state: str) -> None:
    connection.execute(db.contracts.update().where(db.contracts.c.id == contract_id).values(state=state))
