"""Enrolment: join an operator by its invitation, checking by ourselves that it is that operator.

What is believed: the invitation file, as it came. Its certificate authority makes the TLS connection, its fingerprint
must be that of the key that answers there. A wrong invitation is noticed by the telephone comparison at the end:
both sides read their fingerprints to each other.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client.api import Egress, OperatorClient, ca_fingerprints, printable
from fedpact_client.config import OperatorPart, set_value
from fedpact_client.home import AgentHome, OperatorData, read_json
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.files import replace_file
from fedpact_contract.messages import Enrolment, Invitation, SignedEnrolment
from fedpact_contract.record import sign
from fedpact_contract.request import node_public_pem, node_sign, parse_instant, utc_now
from fedpact_contract.trust import Trust, TrustedParty, with_party

if TYPE_CHECKING:
    import httpx

NODE_CONTEXT = b"fedpact.enrolment.node.v1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """What `enrol` did: the operator, fingerprints to read out (`ca`: of its authority), the state at the operator."""

    operator: OperatorData
    ca: tuple[str, ...]
    url: str
    own_fingerprint: str
    state: str


def read_invitation(path: Path, entity_code: str, now: datetime.datetime) -> Invitation:
    """The invitation, if it is for this enterprise and has not expired.

    Raises:
        InputError: unreadable, malformed, for another entity code, expired, or with an address that is not HTTPS.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise InputError(
            "INVITATION_FILE", f"The invitation cannot be read: {err.strerror}.", file=path, remedy="Give its path."
        ) from err
    invitation = Invitation.parse(read_json(data, "invitation", path), code="INVITATION", file=path)
    if not invitation.url:
        raise InputError("INVITATION_URL", "The invitation names no address.", file=path, field="url")
    try:
        OperatorPart.parse({"url": invitation.url}, code="URL")
    except InputError as err:
        raise InputError(
            "INVITATION_URL",
            "The operator's address must have the form https://host:port.",
            file=path,
            field="url",
            remedy="Ask the operator for a new invitation.",
        ) from err
    if invitation.entity_code != entity_code:
        raise InputError(
            "INVITATION_ENTITY",
            f"The invitation is for the entity code {invitation.entity_code}; agent.toml says {entity_code}.",
            file=path,
            field="entity_code",
            remedy="Correct [agent] entity_code, or ask the operator for an invitation for it.",
        )
    if now > parse_instant(invitation.expires):
        raise InputError(
            "INVITATION_EXPIRED",
            f"The invitation expired at {invitation.expires}.",
            file=path,
            field="expires",
            remedy="Ask the operator for a new invitation.",
        )
    return invitation


def fetch_operator(client: OperatorClient, invitation: Invitation) -> OperatorData:
    """Who answers at the invitation's address, if its key is the one that the invitation names.

    Raises:
        FaultError: OPERATOR_FINGERPRINT.
        ServiceError: no answer, or none of this form.
    """
    answer = OperatorData.parse(client.operator(), code="OPERATOR_DATA")
    if answer.id != invitation.operator:
        raise FaultError(
            "OPERATOR_FINGERPRINT",
            f"The key that answers at {invitation.url} has the fingerprint {answer.id}; "
            f"the invitation names {invitation.operator}.",
            party=printable(answer.name),
            rule="fingerprint(key) = invitation.operator",
            remedy="Do not enrol. Call the operator on a number that you know and compare.",
        )
    return answer


def request(
    home: AgentHome, invitation: Invitation, key: Ed25519PrivateKey, *, name: str, sector: str
) -> SignedEnrolment:
    """The request to join: signed by the contract key, and by the node key over the same bytes."""
    node_key = home.load_node_key()
    envelope = sign(
        Enrolment(
            operator=invitation.operator,
            name=name,
            entity_code=invitation.entity_code,
            sector=sector,
            token_digest=sha256_hex(bytes.fromhex(invitation.token)),
            contract_key=home.contract_public,
            node_key_pem=node_public_pem(node_key),
        ),
        key,
    )
    return SignedEnrolment(enrolment=envelope, node_signature=node_sign(node_key, NODE_CONTEXT + envelope.body))


def enrol(
    home: AgentHome,
    invitation_path: Path,
    passphrase: bytes,
    record: Egress,
    *,
    now: datetime.datetime | None = None,
    transport: "httpx.BaseTransport | None" = None,
) -> Enrolled:
    """Join the operator of the invitation; the operator's person then approves.

    The signed request is kept until the operator's answer came, so that a token is never spent on a second, different
    request (the operator freezes such an enrolment): run again after a lost connection, it asks what became of the
    first one, and sends the same bytes only if that never arrived. A home that is enrolled asks likewise.

    Args:
        home: The agent's home.
        invitation_path: The operator's invitation file.
        passphrase: Opens the contract key.
        record: Enters outgoing messages in the egress ledger.
        now: The time; the system's clock by default.
        transport: Stands for the network in tests.

    Raises:
        InputError: a wrong invitation or passphrase; the operator found the request wrong.
        FaultError: OPERATOR_FINGERPRINT.
        RefusedError: ENROLLED_ELSEWHERE, or the operator refused.
        ServiceError: OPERATOR_AWAY.
    """
    config = home.config()
    invitation = read_invitation(invitation_path, config.agent.entity_code, now or utc_now())
    _check_same_operator(home, invitation)
    ca = ca_fingerprints(invitation.ca_pem)
    key = home.load_contract_key(passphrase)
    node_key = home.load_node_key()
    with OperatorClient(invitation.url, invitation.ca_pem, node_key, record, transport=transport) as client:
        operator = fetch_operator(client, invitation)
        pinned(home.trust_path, home.trust_path.read_text("utf-8"), operator)  # a contradiction stops here
        state = _ask(home, client, invitation, key)
    remember(home, invitation, operator)
    _pending_path(home).unlink(missing_ok=True)
    return Enrolled(operator=operator, ca=ca, url=invitation.url, own_fingerprint=home.participant_id, state=state)


def remember(home: AgentHome, invitation: Invitation, operator: OperatorData) -> None:
    """Keep the operator's address, certificates, name and key, and pin its fingerprint in trust.toml."""
    trust = pinned(home.trust_path, home.trust_path.read_text("utf-8"), operator)
    config = set_value(home.config_path.read_text("utf-8"), "operator", "url", invitation.url)
    replace_file(home.trust_path, trust.encode())
    replace_file(home.ca_path, invitation.ca_pem.encode())
    replace_file(home.config_path, config.encode())
    replace_file(home.operator_path, canonical_bytes(operator.plain()))  # last: its presence means enrolled


def pinned(path: Path, text: str, operator: OperatorData) -> str:
    """The trust file's text with the operator in it; what people wrote there stays.

    Raises:
        RefusedError: TRUST_CONTRADICTION, the file has another key for this operator, or another owner of this key.
        InputError: the file is malformed.
    """
    entry = TrustedParty(role="operator", name=operator.name, entity_code=operator.entity_code, fingerprint=operator.id)
    Trust.from_toml(text, file=path)  # its own mistakes are not a contradiction
    try:
        return with_party(text, entry, file=path)
    except InputError as err:
        raise RefusedError(
            "TRUST_CONTRADICTION",
            f"trust.toml contradicts the invitation: {err.message}",
            file=path,
            party=printable(operator.name),
            rule=err.rule,
            remedy="Ask the operator by telephone for its fingerprint before you go on.",
        ) from err


def _ask(home: AgentHome, client: OperatorClient, invitation: Invitation, key: Ed25519PrivateKey) -> str:
    path = _pending_path(home)
    body = read_json(path.read_bytes(), "pending enrolment", path) if path.exists() else {}
    sent = body.get("token") == invitation.token or home.operator_path.exists()
    if sent and (state := _known_state(client)) is not None:
        return state
    if body.get("token") != invitation.token:
        agent = home.config().agent
        signed = request(home, invitation, key, name=agent.name, sector=agent.sector)
        body = {"token": invitation.token, "request": signed.plain()}
        replace_file(path, canonical_bytes(body))
    try:
        client.enrol(body)
    except (InputError, RefusedError):
        path.unlink()
        raise
    return client.enrolment()


def _known_state(client: OperatorClient) -> str | None:
    """What the operator knows of this node, or None where it never heard of it."""
    try:
        return client.enrolment()
    except RefusedError as err:
        if err.code == "REQUEST_UNKNOWN_NODE":
            return None
        raise


def _check_same_operator(home: AgentHome, invitation: Invitation) -> None:
    if not home.operator_path.exists():
        return
    known = home.operator()
    if known.id != invitation.operator:
        raise RefusedError(
            "ENROLLED_ELSEWHERE",
            f"This home is enrolled with {known.name}; the invitation is another operator's.",
            party=known.id,
            remedy="One home has one operator: make another home with `fedpact-agent init`.",
        )


def _pending_path(home: AgentHome) -> Path:
    return home.operator_path.with_name("enrolment-pending.json")
