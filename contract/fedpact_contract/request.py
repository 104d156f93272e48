"""Requests to the operator's API, signed by the agent's node key (ECDSA P-384, the key that authenticates transport).

A request proves who asks; what is asked for is proved by the signed records inside. Headers:
`Fedpact-Node` (hex SHA-256 of the key's DER SubjectPublicKeyInfo), `Fedpact-Date`, `Fedpact-Signature` (hex, over
method, path with query, date and SHA-256 of the body). A date more than five minutes off is refused.
"""

import datetime
import hashlib
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpact_contract.errors import InputError, RefusedError

API = "/fedpact/v1"
PROBE = f"{API}/probe"
"""Takes a body as large as an update's and throws it away unread; its signature is over no body."""
NODE_HEADER, DATE_HEADER, SIGNATURE_HEADER = "fedpact-node", "fedpact-date", "fedpact-signature"
MAX_SKEW_SECONDS = 300
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def utc_now() -> datetime.datetime:
    """The clock at the rim: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def instant(moment: datetime.datetime) -> str:
    """A UTC instant as records spell it."""
    return moment.astimezone(datetime.UTC).strftime(_TIME)


def parse_instant(text: str) -> datetime.datetime:
    """The moment that a record's instant names.

    Raises:
        InputError: not of the form 2026-01-31T12:00:00Z.
    """
    try:
        return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
    except ValueError as err:
        raise InputError("INSTANT_FORM", "An instant has the form 2026-01-31T12:00:00Z.") from err


def node_public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The node's public key as PEM SubjectPublicKeyInfo (what Flower registers)."""
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, form).decode()


def load_node_public(pem: str) -> ec.EllipticCurvePublicKey:
    """Read a node's public key.

    Raises:
        InputError: not a P-384 public key in PEM.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except ValueError as err:
        raise InputError("NODE_KEY_FORM", "The node key is not a public key in PEM.") from err
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise InputError("NODE_KEY_FORM", "The node key must be an ECDSA key on P-384.")
    return key


def node_id(pem: str) -> str:
    """The node's id: hex SHA-256 of the DER SubjectPublicKeyInfo."""
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(load_node_public(pem).public_bytes(encoding, form)).hexdigest()


def node_sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> str:
    """ECDSA signature with SHA-384, in hexadecimal (DER)."""
    return key.sign(message, ec.ECDSA(hashes.SHA384())).hex()


def node_verify(pem: str, signature: str, message: bytes) -> bool:
    """Whether the node key signed the message."""
    try:
        load_node_public(pem).verify(bytes.fromhex(signature), message, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


def sign_request(
    key: ec.EllipticCurvePrivateKey, method: str, path: str, body: bytes, now: datetime.datetime
) -> dict[str, str]:
    """The three headers of a request."""
    date = instant(now)
    return {
        NODE_HEADER: node_id(node_public_pem(key)),
        DATE_HEADER: date,
        SIGNATURE_HEADER: node_sign(key, _message(method, path, date, body)),
    }


def check_request(
    pem: str, headers: Mapping[str, str], method: str, path: str, body: bytes, now: datetime.datetime
) -> None:
    """Raise unless this node key signed this request within the last five minutes.

    Raises:
        RefusedError: REQUEST_SIGNATURE or REQUEST_DATE.
    """
    date = headers.get(DATE_HEADER, "")
    if not node_verify(pem, headers.get(SIGNATURE_HEADER, ""), _message(method, path, date, body)):
        raise RefusedError("REQUEST_SIGNATURE", "The request is not signed by this agent's node key.")
    if abs((parse_instant(date) - now).total_seconds()) > MAX_SKEW_SECONDS:
        raise RefusedError(
            "REQUEST_DATE",
            "The request's date is more than five minutes off the operator's clock.",
            remedy="Set this machine's clock (NTP).",
        )


def _message(method: str, path: str, date: str, body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return f"fedpact.request.v1\n{method.upper()}\n{path}\n{date}\n{digest}\n".encode()
