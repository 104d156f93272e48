"""Keys: made, stored 0600, loaded, named by their fingerprint. Ed25519 signs; an auditor's X25519 opens what is sealed.

A participant's id is the fingerprint of its contract key: SHA-256 over the 32 raw public bytes, in hexadecimal.
"""

import contextlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedpact_contract.canonical import sha256_hex
from fedpact_contract.errors import InputError
from fedpact_contract.files import make_file

MIN_PASSPHRASE_BYTES = 8


def generate_key() -> Ed25519PrivateKey:
    """A fresh key from the operating system's random numbers."""
    return Ed25519PrivateKey.generate()


def public_hex(key: Ed25519PrivateKey | Ed25519PublicKey | X25519PrivateKey | X25519PublicKey) -> str:
    """The raw public key, 64 hexadecimal characters."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey | X25519PrivateKey) else key
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def fingerprint(public_key_hex: str) -> str:
    """SHA-256 over the 32 raw public bytes, in hexadecimal."""
    return sha256_hex(bytes.fromhex(public_key_hex))


def show_fingerprint(value: str) -> str:
    """A fingerprint in groups of four, for comparison by telephone."""
    return " ".join(value[i : i + 4] for i in range(0, len(value), 4))


def parse_fingerprint(text: str) -> str:
    """A fingerprint as people write it (any case, spaces, colons) in its one form.

    Raises:
        InputError: not 64 hexadecimal characters.
    """
    value = text.replace(" ", "").replace(":", "").lower()
    if len(value) != 64 or any(c not in "0123456789abcdef" for c in value):
        raise InputError(
            "KEY_FINGERPRINT_FORM",
            "A fingerprint is 64 hexadecimal characters.",
            remedy="Copy it whole, as the other party's `enrol` or `init` printed it.",
        )
    return value


def verify_raw(public_key_hex: str, signature: bytes, message: bytes) -> bool:
    """Whether the Ed25519 signature over the message is this key's."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key_hex)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_passphrase(passphrase: bytes, whose: str) -> None:
    """Raise unless the passphrase is long enough.

    Args:
        passphrase: A new one.
        whose: The key that it protects, as in "the contract key".

    Raises:
        InputError: PASSPHRASE_SHORT.
    """
    if len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise InputError(
            "PASSPHRASE_SHORT",
            f"The passphrase of {whose} needs at least {MIN_PASSPHRASE_BYTES} characters.",
            remedy="Choose a longer one; it protects the key that signs contracts.",
        )


def write_private(path: Path, data: bytes) -> None:
    """Write a secret file that only its owner can read, durably, whole or not at all; none is ever overwritten.

    Raises:
        InputError: the file exists already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        make_file(path, data)
    except FileExistsError as err:
        raise InputError(
            "KEY_EXISTS",
            "A key file exists already and is not overwritten.",
            file=path,
            remedy="Use another home folder, or move the old key away yourself.",
        ) from err


def save_key(path: Path, key: Ed25519PrivateKey | X25519PrivateKey, passphrase: bytes | None = None) -> None:
    """Store a key as PKCS#8 PEM, 0600, encrypted where a passphrase is given."""
    protection: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )
    write_private(path, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection))


def load_key(path: Path, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """Load a signing key that `save_key` stored.

    Raises:
        InputError: no such file, wrong passphrase, or not an Ed25519 key.
    """
    key = _load(path, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("KEY_KIND", "The file holds another kind of key than Ed25519.", file=path)
    return key


def load_opening_key(path: Path, passphrase: bytes) -> X25519PrivateKey:
    """Load a key that opens what is sealed, as `load_key`."""
    key = _load(path, passphrase)
    if not isinstance(key, X25519PrivateKey):
        raise InputError("KEY_KIND", "The file holds another kind of key than X25519.", file=path)
    return key


def _load(path: Path, passphrase: bytes | None) -> object:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), passphrase)
    except FileNotFoundError as err:
        raise InputError(
            "KEY_MISSING",
            "The key file is missing.",
            file=path,
            remedy="Run `init` first, or restore a backup.",
        ) from err
    except (ValueError, TypeError) as err:
        raise InputError(
            "KEY_PASSPHRASE",
            "The key cannot be opened: wrong or missing passphrase, or the file is damaged.",
            file=path,
            remedy="Give the passphrase at the prompt or with --passphrase-file.",
        ) from err
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            raise InputError("KEY_MODE", "Others can read this key file.", file=path, remedy=f"Run: chmod 600 {path}")
    return key
