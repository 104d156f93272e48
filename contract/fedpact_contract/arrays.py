"""Digests of arrays, over a header that names type and length: the model (float64) and an update (float32).

No numpy: the caller hands over little-endian bytes.
"""

from fedpact_contract.canonical import sha256_hex


def model_digest(data: bytes | bytearray | memoryview) -> str:
    """Digest of a model: its parameters as one flat little-endian float64 array."""
    return sha256_hex(b"fedpact.model.v1:f8:%d:" % (len(data) // 8) + bytes(data))


def update_digest(data: bytes | bytearray | memoryview) -> str:
    """Digest of an update (local minus base): one flat little-endian float32 array."""
    return sha256_hex(b"fedpact.update.v1:f4:%d:" % (len(data) // 4) + bytes(data))
