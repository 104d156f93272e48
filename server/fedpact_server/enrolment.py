"""How an enterprise joins: invitation, enrolment, approval, suspension (trust: keys and enrolment).

    open invitation -> enrol -> requested -> approve -> approved -> (supervisor) -> registered
                                any state -> suspend -> suspended      second use of a token -> frozen

A token is 256 bits, for one use, one legal entity and 24 hours; only its SHA-256 is kept. `approve` asks for the
participant's fingerprint, obtained by another way than this system; that also lifts a freeze or a suspension.
"""

import datetime
import os
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from fedpact_contract.canonical import canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.contract import EntityCode
from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError
from fedpact_contract.keys import parse_fingerprint
from fedpact_contract.messages import Enrolment, Invitation, SignedEnrolment
from fedpact_contract.record import Code, Name, Part, open_signed
from fedpact_contract.request import instant, node_id, node_verify, parse_instant
from fedpact_server import db
from fedpact_server.alarms import raise_alarm
from fedpact_server.db import Database
from fedpact_server.home import OperatorHome

NODE_PREFIX = b"fedpact.enrolment.node.v1\n"
"""What stands before the enrolment's bytes in what the node key signs."""

TOKEN_LIFE = datetime.timedelta(hours=24)
LIFT_FREEZE = (
    "Call the enterprise and compare fingerprints: `participant approve` lifts the freeze where they agree, "
    "`participant invite --replace` discards the enrolment where they do not."
)
_NODE_PEM_LENGTH = 1000
_SHORTEST_PREFIX = 4


class _Invited(Part):
    name: Name
    entity_code: EntityCode
    sector: Code


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A participant as the operator knows it. `id` is the fingerprint of its contract key."""

    id: str
    name: str
    entity_code: str
    sector: str
    contract_key: str
    node: str
    state: str
    approved: str | None
    flower_node: str | None

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def invite(
    home: OperatorHome,
    database: Database,
    *,
    name: str,
    entity_code: str,
    sector: str,
    now: datetime.datetime,
    replace: bool = False,
) -> Invitation:
    """Make an invitation for one legal entity; an earlier open one of the entity ends.

    Args:
        home: The operator's home.
        database: Its database.
        name: The enterprise's name, as the operator knows it.
        entity_code: The one legal-entity code that may use the token.
        sector: Its sector.
        now: The clock.
        replace: Discard an enrolment of this entity that was never approved (a stranger used its token first).

    Raises:
        InputError: a value of the wrong form; ENTITY_IS_OPERATOR; ENTITY_KNOWN, it is enrolled already.
    """
    invited = _Invited.parse({"name": name, "entity_code": entity_code, "sector": sector}, code="INVITATION")
    if entity_code == home.settings.entity_code:
        raise InputError(
            "ENTITY_IS_OPERATOR",
            "This is the operator's own entity code; the operator is no participant.",
            field="entity_code",
        )
    token = os.urandom(32)
    expires = instant(now + TOKEN_LIFE)
    with database.write() as connection:
        _make_room(connection, entity_code, now=now, replace=replace)
        connection.execute(
            db.invitations.insert().values(
                token_digest=sha256_hex(token), expires=expires, state="open", **invited.plain()
            )
        )
    return Invitation(
        url=home.url,
        ca_pem=home.ca_pem(),
        operator=home.fingerprint,
        entity_code=entity_code,
        token=token.hex(),
        expires=expires,
    )


def enrol(
    home: OperatorHome, database: Database, *, token: str, signed: SignedEnrolment, now: datetime.datetime
) -> Member:
    """Take an enterprise's request to join.

    The same enterprise again (the same two keys signed) is answered as before: a reply was lost, or somebody repeated
    the command. Any other second use of a token freezes its enrolment and raises an alarm.

    Raises:
        RefusedError: ENROLMENT_TOKEN_UNKNOWN, _EXPIRED, _MISMATCH, _CLOSED, _REUSED; ENROLMENT_ENTITY,
            ENROLMENT_SECTOR, ENROLMENT_OPERATOR, ENROLMENT_KEY_KNOWN, ENROLMENT_CHANGED.
        FaultError: a signature that does not verify.
        InputError: a malformed record or node key.
    """
    digest = _token_digest(token)
    sent = canonical_bytes(signed.plain())
    with database.write() as connection:
        invitation = connection.execute(
            sa.select(db.invitations).where(db.invitations.c.token_digest == digest)
        ).first()
        if invitation is None:
            raise RefusedError(
                "ENROLMENT_TOKEN_UNKNOWN",
                "The operator issued no such token.",
                remedy="Ask the operator for a new invitation.",
            )
        if invitation.state == "open":
            return _first_use(connection, home, invitation, signed, sent, now)
        known = _participant(connection, invitation.participant) if invitation.participant else None
        if known is not None and _same_again(home, invitation, known, signed):
            return _member(known)
        refusal = _second_use(connection, invitation, known, signed, now)
    raise refusal  # after the freeze is durable


def approve(database: Database, *, selector: str, fingerprint: str, now: datetime.datetime) -> Member:
    """Admit a participant whose fingerprint, obtained by another way, the operator typed in.

    Raises:
        InputError: PARTICIPANT_UNKNOWN, PARTICIPANT_AMBIGUOUS, KEY_FINGERPRINT_FORM.
        RefusedError: FINGERPRINT_MISMATCH.
    """
    typed = parse_fingerprint(fingerprint)
    with database.write() as connection:
        member = find(connection, selector)
        if typed != member.id:
            raise RefusedError(
                "FINGERPRINT_MISMATCH",
                "The fingerprint is not that of the key with which this enterprise enrolled.",
                party=member.name,
                remedy="Do not approve. Ask the enterprise by telephone for what its `fedpact-agent enrol` printed.",
            )
        if member.state in ("approved", "registered"):
            return member
        if member.state == "frozen":
            raise_alarm(connection, "ENROLMENT_UNFROZEN", _who(member), now=now)
        connection.execute(
            db.invitations.update()
            .where(db.invitations.c.participant == member.id, db.invitations.c.state == "frozen")
            .values(state="closed")
        )
        state = "registered" if member.flower_node else "approved"
        _update(connection, member.id, state=state, approved=member.approved or instant(now))
        return find(connection, member.id)


def suspend(database: Database, *, selector: str, now: datetime.datetime) -> Member:
    """Send a participant no more orders. Its keys, signatures and earned shares stay as they are.

    Raises:
        InputError: PARTICIPANT_UNKNOWN, PARTICIPANT_AMBIGUOUS.
    """
    with database.write() as connection:
        member = find(connection, selector)
        if member.state != "suspended":
            raise_alarm(connection, "PARTICIPANT_SUSPENDED", _who(member), now=now)
            _update(connection, member.id, state="suspended")
        return find(connection, member.id)


def set_registered(connection: Connection, member_id: str, flower_node: str) -> None:
    """Note that Flower knows an approved participant's node (supervisor)."""
    known = db.participants.c
    connection.execute(db.participants.update().where(known.id == member_id).values(flower_node=flower_node))
    connection.execute(
        db.participants.update().where(known.id == member_id, known.state == "approved").values(state="registered")
    )


def members(connection: Connection) -> list[Member]:
    """Every participant, by name, then id."""
    query = sa.select(db.participants).order_by(db.participants.c.name, db.participants.c.id)
    return [_member(row) for row in connection.execute(query)]


def open_invitations(connection: Connection) -> list[dict[str, str]]:
    """Invitations that nobody used yet: name, entity_code, sector, expires."""
    known = db.invitations.c
    query = sa.select(known.name, known.entity_code, known.sector, known.expires).where(known.state == "open")
    return [dict(row._mapping) for row in connection.execute(query.order_by(known.name))]


def by_node(connection: Connection, node: str) -> tuple[Member, str] | None:
    """The participant with this node id, and its node's public key as PEM."""
    row = connection.execute(sa.select(db.participants).where(db.participants.c.node == node)).first()
    return None if row is None else (_member(row), str(row.node_key_pem))


def by_entity(connection: Connection, entity_code: str) -> Member | None:
    """The participant with this legal-entity code."""
    row = connection.execute(sa.select(db.participants).where(db.participants.c.entity_code == entity_code)).first()
    return None if row is None else _member(row)


def find(connection: Connection, selector: str) -> Member:
    """The one participant with this name, legal-entity code, id, or beginning of an id.

    Raises:
        InputError: PARTICIPANT_UNKNOWN, PARTICIPANT_AMBIGUOUS.
    """
    prefix = selector.replace(" ", "").lower()
    found = [
        member
        for member in members(connection)
        if selector in (member.name, member.entity_code)
        or (len(prefix) >= _SHORTEST_PREFIX and member.id.startswith(prefix))
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            "PARTICIPANT_UNKNOWN",
            "No participant has this id, name or entity code.",
            party=selector,
            remedy="`fedpact participant list` shows them.",
        )
    raise InputError(
        "PARTICIPANT_AMBIGUOUS",
        f"{len(found)} participants match.",
        party=selector,
        remedy="Give more of the id, as `fedpact participant list` shows it.",
    )


def _make_room(connection: Connection, entity_code: str, *, now: datetime.datetime, replace: bool) -> None:
    known = by_entity(connection, entity_code)
    if known is not None and (known.approved or not replace):
        raise InputError(
            "ENTITY_KNOWN",
            f"This entity is enrolled already ({known.state}).",
            party=known.name,
            remedy=_known_remedy(known),
        )
    table = db.invitations.c
    connection.execute(
        db.invitations.update().where(table.entity_code == entity_code).values(state="closed", participant=None)
    )
    if known is not None:
        raise_alarm(connection, "ENROLMENT_DISCARDED", _who(known), now=now)
        connection.execute(db.participants.delete().where(db.participants.c.id == known.id))


def _known_remedy(known: Member) -> str:
    if known.state in ("frozen", "suspended"):
        return LIFT_FREEZE if known.approved is None else "`participant approve` takes it in again."
    if known.approved:
        return "It needs no invitation."
    return "Approve it, or give --replace to discard a request that did not come from this enterprise."


def _first_use(
    connection: Connection,
    home: OperatorHome,
    invitation: Row[Any],
    signed: SignedEnrolment,
    sent: bytes,
    now: datetime.datetime,
) -> Member:
    if parse_instant(invitation.expires) < now:
        raise RefusedError(
            "ENROLMENT_TOKEN_EXPIRED",
            "The invitation was good for 24 hours and has ended.",
            remedy="Ask the operator for a new invitation.",
        )
    record = _check(home, invitation, signed)
    node = node_id(record.node_key_pem)
    known = db.participants.c
    taken = connection.execute(
        sa.select(known.id).where(sa.or_(known.contract_key == record.contract_key, known.node == node))
    ).first()
    if taken is not None or record.contract_key == home.public_key:
        raise RefusedError(
            "ENROLMENT_KEY_KNOWN",
            "One of the keys is another party's already; each party has its own.",
            remedy="Run `fedpact-agent init` in a new home, and enrol with its keys.",
        )
    member_id = _id(record)
    connection.execute(
        db.participants.insert().values(
            id=member_id,
            name=record.name,
            entity_code=record.entity_code,
            sector=record.sector,
            contract_key=record.contract_key,
            node_key_pem=record.node_key_pem,
            node=node,
            enrolment=sent,
            state="requested",
        )
    )
    connection.execute(
        db.invitations.update()
        .where(db.invitations.c.token_digest == invitation.token_digest)
        .values(state="used", participant=member_id)
    )
    return find(connection, member_id)


def _check(home: OperatorHome, invitation: Row[Any], signed: SignedEnrolment) -> Enrolment:
    """The enrolment, if both keys signed it and it answers this invitation of this operator."""
    record = Enrolment.from_bytes(signed.enrolment.body)
    if len(signed.enrolment.signatures) != 1:
        raise FaultError("SIGNATURE_COUNT", "An enrolment carries one signature, the contract key's.")
    open_signed(signed.enrolment, Enrolment, record.contract_key)
    if len(record.node_key_pem) > _NODE_PEM_LENGTH:
        raise InputError("NODE_KEY_FORM", "The node key is too long for a P-384 key in PEM.", field="node_key_pem")
    if not node_verify(record.node_key_pem, signed.node_signature, NODE_PREFIX + signed.enrolment.body):
        raise FaultError(
            "ENROLMENT_NODE_SIGNATURE", "The enrolment is not signed by the node key in it.", field="node_signature"
        )
    if record.token_digest != invitation.token_digest:
        raise RefusedError(
            "ENROLMENT_TOKEN_MISMATCH", "The signed enrolment belongs to another token.", field="token_digest"
        )
    if record.operator != home.fingerprint:
        raise RefusedError("ENROLMENT_OPERATOR", "The enrolment is addressed to another operator.", field="operator")
    if record.entity_code != invitation.entity_code:
        raise RefusedError(
            "ENROLMENT_ENTITY",
            "The invitation is for another legal entity.",
            field="entity_code",
            remedy="Set the entity code in agent.toml, or ask for an invitation for this one.",
        )
    if record.sector != invitation.sector:
        raise RefusedError(
            "ENROLMENT_SECTOR",
            f"The invitation is for the sector {invitation.sector}; the enrolment says {record.sector}.",
            field="sector",
            remedy="Agree with the operator on one: set the sector in agent.toml, or ask for another invitation.",
        )
    return record


def _same_again(home: OperatorHome, invitation: Row[Any], known: Row[Any], signed: SignedEnrolment) -> bool:
    """Whether this is the request of the enterprise that enrolled: its two keys signed it, and it says the same.

    Raises:
        RefusedError: ENROLMENT_CHANGED, its keys signed something else.
    """
    first = SignedEnrolment.parse(parse_canonical(bytes(known.enrolment)), code="ENROLMENT").enrolment.body
    try:
        record = _check(home, invitation, signed)
    except FedpactError:
        return False  # not theirs: the caller freezes
    if signed.enrolment.body != first and _id(record) == known.id and node_id(record.node_key_pem) == known.node:
        raise RefusedError(
            "ENROLMENT_CHANGED",
            "This enterprise has enrolled already, with another name or sector.",
            party=known.name,
            remedy="Set name and sector in agent.toml as they were, or ask the operator for a new invitation.",
        )
    return signed.enrolment.body == first


def _second_use(
    connection: Connection,
    invitation: Row[Any],
    known: Row[Any] | None,
    signed: SignedEnrolment,
    now: datetime.datetime,
) -> RefusedError:
    who = "" if known is None else f"{_who(_member(known))}; the second request {_claimed(signed)}"
    if invitation.state == "closed" or known is None:
        if known is not None:
            raise_alarm(connection, "ENROLMENT_TOKEN_REUSED", who + ", after a review", now=now)
        return RefusedError(
            "ENROLMENT_TOKEN_CLOSED",
            "The invitation is closed.",
            remedy="Ask the operator for a new invitation.",
        )
    connection.execute(
        db.invitations.update().where(db.invitations.c.token_digest == invitation.token_digest).values(state="frozen")
    )
    if known.state != "suspended":
        _update(connection, known.id, state="frozen")
    raise_alarm(connection, "ENROLMENT_TOKEN_REUSED", who + ". " + LIFT_FREEZE, now=now)
    return RefusedError(
        "ENROLMENT_TOKEN_REUSED",
        "The invitation was used before; the enrolment is frozen until the operator has looked into it.",
        remedy="Tell the operator by telephone: somebody else may have had the invitation.",
    )


def _claimed(signed: SignedEnrolment) -> str:
    """Which key a request claims to be from; the signature may be false."""
    try:
        return f"is signed as {_id(Enrolment.from_bytes(signed.enrolment.body))}"
    except FedpactError:
        return "is malformed"


def _token_digest(token: str) -> str:
    try:
        data = bytes.fromhex(token)
    except ValueError:
        data = b""
    if len(data) != 32:
        raise InputError("ENROLMENT_TOKEN_FORM", "A token is 64 hexadecimal characters.", field="token")
    return sha256_hex(data)


def _id(record: Enrolment) -> str:
    return sha256_hex(bytes.fromhex(record.contract_key))


def _who(member: Member) -> str:
    return f"{member.name} ({member.entity_code}, {member.id})"


def _participant(connection: Connection, member_id: str) -> Row[Any] | None:
    return connection.execute(sa.select(db.participants).where(db.participants.c.id == member_id)).first()


def _update(connection: Connection, member_id: str, **values: object) -> None:
    connection.execute(db.participants.update().where(db.participants.c.id == member_id).values(**values))


def _member(row: Row[Any]) -> Member:
    return Member(
        id=row.id,
        name=row.name,
        entity_code=row.entity_code,
        sector=row.sector,
        contract_key=row.contract_key,
        node=row.node,
        state=row.state,
        approved=row.approved,
        flower_node=row.flower_node,
    )
