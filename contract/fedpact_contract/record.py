"""The base of every record, and signed envelopes around records.

A record is frozen, refuses unknown keys, and has one canonical spelling. A signature is DSSE
(https://github.com/secure-systems-lab/dsse): it covers the record's type and version before its bytes, so that a
signature of one type never verifies as another.
"""

import base64
import binascii
import difflib
import unicodedata
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from types import UnionType
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, Union, get_args, get_origin

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    StringConstraints,
    ValidationError,
)

from fedpact_contract.canonical import HIDDEN, canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.keys import fingerprint, public_hex, verify_raw

MAX_DIGITS = 100
"""Digits of a quantity before its point, and after it."""


def decimal_text(value: Decimal) -> str:
    """A decimal in its one plain spelling: no exponent, no trailing zeros, no negative zero.

    Raises:
        ValueError: it is not finite, or more than `MAX_DIGITS` digits away from the point: 1e99999999999 in full
            would fill every memory.
    """
    if not value.is_finite():
        raise ValueError("a quantity must be finite")
    if value and max(abs(value.adjusted()), -int(value.as_tuple().exponent)) > MAX_DIGITS:
        raise ValueError(f"must have at most {MAX_DIGITS} digits before and after the point")
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def ratio_text(value: Fraction, places: int = 6) -> str:
    """A fraction as a decimal string with this many places, half to even, however large it is."""
    return decimal_text(Decimal(f"{round(value * 10**places)}E-{places}"))


def _to_decimal(value: object) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("must be a decimal number")  # noqa: TRY004 - pydantic turns ValueError into its error
    try:
        number = Decimal(value)
    except InvalidOperation as err:
        raise ValueError("must be a decimal number") from err
    if isinstance(value, str) and decimal_text(number) != value:
        raise ValueError(f"must be written {decimal_text(number)}")
    return number


def _to_big(value: object) -> int:
    if isinstance(value, str):
        if str(number := int(value)) != value:
            raise ValueError("must be a plain integer")
        return number
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be an integer")  # noqa: TRY004 - pydantic turns ValueError into its error
    return value


def _finite(value: Decimal) -> Decimal:
    decimal_text(value)
    return value


def _printable(value: str) -> str:
    if any(unicodedata.category(c) in HIDDEN for c in value):
        raise ValueError("must be one line of visible characters")
    return value


Dec = Annotated[
    Decimal,
    BeforeValidator(_to_decimal),
    AfterValidator(_finite),
    PlainSerializer(decimal_text, return_type=str),
]
"""A decimal quantity, a plain decimal string in canonical form."""

Big = Annotated[int, BeforeValidator(_to_big), PlainSerializer(str, return_type=str)]
"""An integer of any size, a string in canonical form."""

_FORMS: dict[str, str] = {}
"""What each pattern asks for, in words."""


def form(pattern: str, words: str) -> StringConstraints:
    """A pattern for text, with the words that tell people what it asks for."""
    _FORMS[pattern] = words
    return StringConstraints(pattern=pattern)


Hex32 = Annotated[str, form(r"^[0-9a-f]{64}$", "64 hexadecimal digits (0 to 9, a to f)")]
"""32 bytes in hexadecimal: a digest, a public key, a salt."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_printable)]
"""A name for people: one line, no character that is invisible, steers a terminal or turns the direction of text."""

Words = Annotated[str, StringConstraints(min_length=1, max_length=2000), AfterValidator(_printable)]
"""A text for people, longer than a name: one line all the same."""

Code = Annotated[
    str,
    StringConstraints(min_length=1, max_length=80),
    form(r"^[A-Za-z0-9._:-]+$", "one word of letters, digits, and . _ : -"),
]
"""An identifier: letters, digits, and . _ : -"""

Instant = Annotated[str, form(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", "a UTC time such as 2026-11-24T12:00:00Z")]
"""A UTC instant, to the second."""


class Part(BaseModel):
    """A frozen part of a record: unknown keys refused, types not coerced."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    @classmethod
    def parse(cls, value: Any, *, code: str, file: object = None) -> Self:  # noqa: ANN401 - any JSON value
        """Build from plain values.

        Raises:
            InputError: with `code`, naming the first field that is wrong.
        """
        try:
            return cls.model_validate(_tuples(value))
        except ValidationError as err:
            raise _input_error(err, cls, code, file) from err

    def plain(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.model_dump(mode="json", exclude_none=True)


class Record(Part):
    """A record with a type and a version: what is hashed and signed."""

    TYPE: ClassVar[str]
    VERSION: ClassVar[int] = 1

    @classmethod
    def media_type(cls) -> str:
        """The DSSE payload type: record type and version."""
        return f"application/vnd.fedpact.{cls.TYPE}.v{cls.VERSION}+json"

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return canonical_bytes(self.plain())

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hexadecimal."""
        return sha256_hex(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read canonical bytes.

        Raises:
            InputError: not canonical, unknown or missing keys, wrong types.
        """
        record = cls.parse(parse_canonical(data, what=cls.TYPE), code=f"{cls.TYPE.upper().replace('-', '_')}_FORM")
        if record.to_bytes() != data:
            raise InputError("CANONICAL_FORM", f"The {cls.TYPE} is not in its canonical form.")
        return record


R = TypeVar("R", bound=Record)


class Signature(Part):
    """One signature: the signing key's public bytes and the Ed25519 signature, in hexadecimal."""

    key: Hex32
    value: Annotated[str, form(r"^[0-9a-f]{128}$", "128 hexadecimal digits (0 to 9, a to f)")]


class Envelope(Part, Generic[R]):
    """A record's bytes with their type and signatures, as they travel."""

    type: str
    payload: str
    signatures: tuple[Signature, ...]

    @property
    def body(self) -> bytes:
        """The signed record's canonical bytes."""
        try:
            body = base64.b64decode(self.payload.encode(), validate=True)
        except (binascii.Error, ValueError) as err:
            raise InputError("ENVELOPE_PAYLOAD", "An envelope's payload is not base64.") from err
        if base64.b64encode(body).decode() != self.payload:  # unused bits of the last character
            raise InputError("ENVELOPE_PAYLOAD", "An envelope's payload is not in its one base64 spelling.")
        return body

    def to_bytes(self) -> bytes:
        """The envelope's canonical bytes."""
        return canonical_bytes(self.plain())


def pae(media_type: str, body: bytes) -> bytes:
    """DSSE pre-authentication encoding: what is really signed."""
    kind = media_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def sign(record: R, *keys: Ed25519PrivateKey) -> Envelope[R]:
    """Sign a record with one or several keys."""
    body, kind = record.to_bytes(), record.media_type()
    signatures = tuple(Signature(key=public_hex(k), value=k.sign(pae(kind, body)).hex()) for k in keys)
    return Envelope(type=kind, payload=base64.b64encode(body).decode(), signatures=signatures)


def signers(envelope: Envelope[Any], kind: type[Record]) -> set[str]:
    """Public keys whose signature on the envelope is valid for this record type.

    Raises:
        FaultError: another type, or any signature that does not verify (one bad signature taints the whole).
    """
    if envelope.type != kind.media_type():
        raise FaultError(
            "ENVELOPE_TYPE",
            f"A signed {envelope.type} stands where a {kind.media_type()} is due.",
            field="type",
        )
    message = pae(envelope.type, envelope.body)
    for signature in envelope.signatures:
        if not verify_raw(signature.key, bytes.fromhex(signature.value), message):
            raise FaultError(
                "SIGNATURE_INVALID",
                f"A signature on a {kind.TYPE} does not verify.",
                party=fingerprint(signature.key),
                field="signatures",
            )
    return {s.key for s in envelope.signatures}


def open_signed(envelope: Envelope[R], kind: type[R], key: str) -> R:
    """The record in the envelope, if `key` signed it.

    Raises:
        FaultError: another type, a bad signature, or not signed by this key.
        InputError: the record is malformed.
    """
    if key not in signers(envelope, kind):
        raise FaultError(
            "SIGNATURE_MISSING",
            f"A {kind.TYPE} is not signed by the key that should sign it.",
            party=fingerprint(key),
        )
    return kind.from_bytes(envelope.body)


def read_envelope(data: bytes | str | dict[str, Any]) -> Envelope[Any]:
    """Read an envelope from its canonical bytes or from plain values.

    Raises:
        InputError: malformed.
    """
    value = data if isinstance(data, dict) else parse_canonical(_encoded(data), what="envelope")
    return Envelope[Any].parse(value, code="ENVELOPE_FORM")


_WORDS = {
    "string_type": "must be text",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "tuple_type": "must be a list",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "model_type": "must be a table of keys and values",
    "dict_type": "must be a table of keys and values",
    "union_tag_invalid": "its key {discriminator} must be one of {expected_tags}",
}
"""pydantic's kinds of faults, as people read them; none shows the value."""


def _input_error(err: ValidationError, model: type[BaseModel], code: str, file: object) -> InputError:
    """The first fault of a pydantic error, as ours: field path and what is due there, never the value.

    An unknown key comes before everything else: where a key is misspelt, it is also missing.
    """
    faults = err.errors(include_url=False, include_input=False)
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    place = _place(model, first["loc"], whole=first["type"] == "extra_forbidden")
    path = ".".join(map(str, place)) or "(whole)"
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        near = difflib.get_close_matches(key, _keys(model, first["loc"][:-1]) - {key}, 1, 0.75)
        message = f"Unknown key {path}" + (f"; perhaps {near[0]} is meant." if near else ".")
        return InputError(code + "_UNKNOWN_KEY", message, file=file, field=path, rule="no key but the known ones")
    if first["type"] == "union_tag_not_found":
        path += "." + first["ctx"]["discriminator"].strip("'")
    if first["type"] in ("missing", "union_tag_not_found"):
        message = f"The key {path} is missing."
        return InputError(code + "_MISSING_KEY", message, file=file, field=path, rule="no key is left out")
    here = [fault for fault in faults if _place(model, fault["loc"]) == place]  # one of each kind that it may be
    words = " or ".join(dict.fromkeys(_words(f["type"], f["msg"], f.get("ctx", {})) for f in here))
    return InputError(code, f"{path}: {words}.", file=file, field=path, rule=words)


def _words(kind: str, message: str, context: dict[str, Any]) -> str:
    if kind == "string_pattern_mismatch":
        words = _FORMS.get(context["pattern"])
        return f"must be {words}" if words else "has the wrong form"
    if context.get("min_length") == 1:
        return "must not be empty"
    return _WORDS[kind].format(**context) if kind in _WORDS else message.removeprefix("Value error, ").removesuffix(".")


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The keys that are known at a place; of a union, those of all its members."""
    models = {model}
    for step in path:
        models = _below(models, step) or models
    return {key for m in models for key in m.model_fields}


def _place(model: type[BaseModel], path: tuple[int | str, ...], *, whole: bool = False) -> list[int | str]:
    """A place as people write it: pydantic also names the kind of a union's member, which is no key.

    `whole`: the last step is a key, though an unknown one.
    """
    models, place, choice = {model}, list[int | str](), False
    for number, step in enumerate(path, start=1):
        found = [m.model_fields[step].annotation for m in models if isinstance(step, str) and step in m.model_fields]
        if isinstance(step, int) or found or (number == len(path) and (whole or not choice)):
            place.append(step)
        choice = bool(found) and all(get_origin(kind) in (Union, UnionType) for kind in found)
        models = _below(models, step) or models
    return place


def _below(models: set[type[BaseModel]], step: int | str) -> set[type[BaseModel]]:
    """The models at a key of these; none where a step is a place in a list, or the kind of a union's member."""
    fields = [m.model_fields[step] for m in models if isinstance(step, str) and step in m.model_fields]
    return {inner for field in fields for inner in _models(field.annotation)}


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _encoded(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


def _tuples(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Lists as tuples, so that strict parsing takes plain JSON and TOML values."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    return value
