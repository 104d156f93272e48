"""Digests of arrays, over a header that names type and length: the model (float64) and an update (float32).

No numpy: the caller hands over little-endian bytes.

The log shows digests to every signatory. An update with its own noise has nothing to hide behind one; of an update
without noise a digest would tell whether a guess at it is right, whatever noise the model has. So at client level 32
random bytes follow the values, and only the operator ever sees them.
"""

import os

from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import ClientPrivacy, Contract

SALT_BYTES = 32


def model_digest(data: bytes | bytearray | memoryview) -> str:
    """Digest of a model: its parameters as one flat little-endian float64 array."""
    return sha256_hex(b"fedpact.model.v1:f8:%d:" % (len(data) // 8) + bytes(data))


def update_digest(data: bytes | bytearray | memoryview) -> str:
    """Digest of an update (local minus base): one flat little-endian float32 array, with `update_salt` at its end."""
    return sha256_hex(b"fedpact.update.v1:f4:%d:" % (len(data) // 4) + bytes(data))


def salt_bytes(contract: Contract) -> int:
    """How many random bytes follow an update's values."""
    return SALT_BYTES if isinstance(contract.privacy, ClientPrivacy) else 0


def update_salt(contract: Contract) -> bytes:
    """Fresh random bytes to follow an update's values."""
    return os.urandom(salt_bytes(contract))
