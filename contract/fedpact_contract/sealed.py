"""Bytes sealed to one public key: HPKE (RFC 9180) in its base mode, one message a sealing.

The suite is DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305; the RFC's test vectors (A.2.1) are a test.
Sealed bytes are the ephemeral public key (32 bytes), then the ciphertext with its tag (16 bytes more than the plain
bytes). Whoever opens needs the same `info` and `aad` as whoever sealed. Nobody is authenticated as the sender: what
lies inside must be checked against something signed.
"""

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedpact_contract.errors import FaultError, InputError

KEY_BYTES = 32
_KEM = b"KEM\x00\x20"  # DHKEM(X25519, HKDF-SHA256)
_SUITE = b"HPKE\x00\x20\x00\x01\x00\x03"  # with HKDF-SHA256 and ChaCha20-Poly1305


def seal(recipient: str, data: bytes, *, info: bytes, aad: bytes) -> bytes:
    """Seal bytes to an X25519 public key (64 hexadecimal characters), with a fresh ephemeral key.

    Args:
        recipient: Who can open it.
        data: What is sealed.
        info: What it is for.
        aad: What it belongs to; not inside, but authenticated.

    Raises:
        InputError: SEAL_KEY, no key that anything can be sealed to.
    """
    ephemeral = X25519PrivateKey.generate()
    own = ephemeral.public_key().public_bytes_raw()
    key, nonce = _schedule(_exchange(ephemeral, recipient), own + bytes.fromhex(recipient), info)
    return own + ChaCha20Poly1305(key).encrypt(nonce, data, aad)


def unseal(key: X25519PrivateKey, data: bytes, *, info: bytes, aad: bytes) -> bytes:
    """What was sealed to this key.

    Raises:
        FaultError: SEAL_BROKEN: sealed to another key, for or with something else, or changed.
    """
    try:
        shared = _exchange(key, data[:KEY_BYTES].hex())
        secret, nonce = _schedule(shared, data[:KEY_BYTES] + key.public_key().public_bytes_raw(), info)
        return ChaCha20Poly1305(secret).decrypt(nonce, data[KEY_BYTES:], aad)
    except (InvalidTag, InputError) as err:
        raise FaultError(
            "SEAL_BROKEN", "The sealed bytes do not open: they are for another key or another place, or were changed."
        ) from err


def check_recipient(recipient: str) -> None:
    """Raise unless something can be sealed to this key: a point of low order would share no secret.

    Raises:
        InputError: SEAL_KEY.
    """
    _exchange(X25519PrivateKey.generate(), recipient)


def _exchange(key: X25519PrivateKey, public: str) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    except ValueError as err:
        raise InputError(
            "SEAL_KEY",
            "This is no X25519 public key that anything can be sealed to.",
            remedy="Take the encryption_key that `fedpact auditor init` printed.",
        ) from err


def _schedule(shared: bytes, context: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and nonce of the one message (RFC 9180, 4.1 ExtractAndExpand and 5.1 KeySchedule)."""
    secret = _expand(_KEM, _extract(_KEM, b"", b"eae_prk", shared), b"shared_secret", context, 32)
    schedule = b"\x00" + _extract(_SUITE, b"", b"psk_id_hash", b"") + _extract(_SUITE, b"", b"info_hash", info)
    prk = _extract(_SUITE, secret, b"secret", b"")
    return _expand(_SUITE, prk, b"key", schedule, 32), _expand(_SUITE, prk, b"base_nonce", schedule, 12)


def _extract(suite: bytes, salt: bytes, label: bytes, material: bytes) -> bytes:
    return hmac.new(salt, b"HPKE-v1" + suite + label + material, hashlib.sha256).digest()


def _expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return HKDFExpand(algorithm=SHA256(), length=length, info=labelled).derive(prk)
