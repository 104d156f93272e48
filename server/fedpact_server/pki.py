"""The operator's own certificate authority and the certificate of its one port.

ECDSA on P-256, X.509 as RFC 5280 wants it, accepted by Python's `ssl` with `check_hostname` (and with
VERIFY_X509_STRICT). Agents trust this CA and no other for the operator; the certificate itself is public and is no
credential.

    ca.crt, ca.key           the authority, ten years
    server.crt, server.key   the certificate of the port, two years, renewed by `serve` before it ends

Files are 0600.
"""

import datetime
import ipaddress
import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpact_contract.errors import InputError
from fedpact_contract.keys import write_private

CA_DAYS, SERVER_DAYS, RENEW_DAYS = 3650, 730, 30
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_BACKDATE = datetime.timedelta(hours=1)
"""Clocks of agents may be a little behind."""

_COMMON_NAME_LENGTH = 64


def create(folder: Path, *, name: str, hosts: tuple[str, ...], now: datetime.datetime) -> None:
    """Make the authority and the first server certificate in an empty folder.

    Args:
        folder: Where the four files go.
        name: The operator's name, for people who look at the certificate.
        hosts: DNS names and IP addresses under which agents reach the port; the local names are added.
        now: The clock.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Fedpact CA {name}"[:_COMMON_NAME_LENGTH])])
    usage = _usage(signature=False, certificates=True)
    builder = _builder(subject, subject, key.public_key(), now, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    write_private(folder / "ca.key", _key_pem(key))
    write_private(folder / "ca.crt", builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    issue(folder, hosts=hosts, now=now)


def issue(folder: Path, *, hosts: tuple[str, ...], now: datetime.datetime) -> None:
    """Make a fresh server key and certificate by the folder's authority, in place of those that are there."""
    authority, authority_key = _load_certificate(folder / "ca.crt"), _load_key(folder / "ca.key")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:_COMMON_NAME_LENGTH])])
    names = [_general_name(host) for host in _all_names(hosts)]
    builder = _builder(subject, authority.subject, key.public_key(), now, SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signature=True, certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
    )
    certificate = builder.sign(authority_key, hashes.SHA256())
    _replace(folder / "server.key", _key_pem(key))
    _replace(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def ensure(folder: Path, *, hosts: tuple[str, ...], now: datetime.datetime) -> bool:
    """Renew the server certificate if it ends within a month, or lacks one of the names; says whether it did.

    Raises:
        InputError: a file is missing or damaged, or the authority itself ends within a month.
    """
    soon = now + datetime.timedelta(days=RENEW_DAYS)
    if _load_certificate(folder / "ca.crt").not_valid_after_utc < soon:
        raise InputError(
            "CA_EXPIRED",
            "The operator's certificate authority has ended, or ends within a month.",
            file=folder / "ca.crt",
            remedy="Make a new operator home; agents must enrol again.",
        )
    certificate = _load_certificate(folder / "server.crt")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    wanted = {_general_name(host) for host in _all_names(hosts)}
    matches = certificate.public_key() == _load_key(folder / "server.key").public_key()
    if matches and wanted <= set(names) and certificate.not_valid_after_utc >= soon:
        return False
    issue(folder, hosts=hosts, now=now)
    return True


def host_form(text: str) -> str:
    """A DNS name or an IP address in its one form.

    Raises:
        InputError: HOST_FORM.
    """
    host = text.strip().lower()
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    labels = host.split(".")
    sound = len(host) <= 253 and all(
        0 < len(label) <= 63
        and set(label) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        and not label.startswith("-")
        and not label.endswith("-")
        for label in labels
    )
    if not sound or labels[-1].isdigit():
        raise InputError(
            "HOST_FORM",
            "A host is a DNS name (fl.example.cn) or an IP address, without scheme and port.",
            field="host",
        )
    return host


def _all_names(hosts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*hosts, *LOCAL_NAMES)))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signature: bool, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as err:
        raise _damaged(path) from err


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as err:
        raise _damaged(path) from err
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _damaged(path)
    return key


def _damaged(path: Path) -> InputError:
    return InputError(
        "TLS_FILE", "A TLS file is missing or cannot be read.", file=path, remedy="Restore it from a backup."
    )


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_private(draft, data)
        os.replace(draft, path)  # noqa: PTH105 - one step, over what is there
    finally:
        draft.unlink(missing_ok=True)
