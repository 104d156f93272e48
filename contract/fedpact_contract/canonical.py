"""Canonical bytes (RFC 8785) of plain values, and their strict reading.

What is signed or hashed is always these bytes. Floats are refused: quantities are integers in a named unit or
decimal strings, and integers that a double cannot hold must be strings already (RFC 8785 numbers are doubles).
"""

import hashlib
import json
from typing import Any

import rfc8785

from fedpact_contract.errors import InputError

HIDDEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""Unicode categories without a glyph: controls, formats (bidi marks among them), private use, line separators.

Not "unassigned": what is unassigned differs between versions of Python, and the same bytes must parse everywhere.
"""

MAX_SAFE_INTEGER = 2**53 - 1
MAX_DEPTH = 64
"""Records nest a dozen deep; hostile values could nest until Python's stack ends."""


def canonical_bytes(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """RFC 8785 bytes of a JSON value without floats.

    Raises:
        InputError: a float, an integer beyond 2**53 - 1, a type that JSON does not have, text that is not Unicode,
            or nesting beyond Python's stack.
    """
    try:
        _refuse_floats(value, "$")
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as err:
        raise InputError("CANONICAL_VALUE", f"The value has no canonical form: {err}.") from err


def parse_canonical(data: bytes, *, what: str = "record") -> Any:  # noqa: ANN401 - any JSON value
    """Read JSON that must already be in canonical form: one value has one spelling.

    Raises:
        InputError: not JSON, not UTF-8, or not canonical.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, ValueError, RecursionError) as err:
        raise InputError("CANONICAL_PARSE", f"The {what} is not readable JSON: {err}.") from err
    if canonical_bytes(value) != data:
        raise InputError("CANONICAL_FORM", f"The {what} is not in canonical form (RFC 8785).")
    return value


def sha256(data: bytes) -> bytes:
    """SHA-256 of the bytes."""
    return hashlib.sha256(data).digest()


def sha256_hex(data: bytes) -> str:
    """SHA-256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has one key twice")
    return result


def _refuse_floats(value: Any, where: str, depth: int = 0) -> None:  # noqa: ANN401 - any JSON value
    if depth > MAX_DEPTH:
        raise InputError("CANONICAL_DEPTH", f"The value is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, float):
        raise InputError("CANONICAL_FLOAT", f"A float stands at {where}; use an integer or a decimal string.")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_SAFE_INTEGER:
        raise InputError("CANONICAL_INTEGER", f"An integer beyond 2^53 stands at {where}; use a string.")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_floats(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_floats(item, f"{where}[{index}]", depth + 1)
