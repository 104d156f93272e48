"""Drawing that anybody can repeat, and how far what was drawn may be off.

A stream of words: SHA-256(label, key, 8-byte big-endian counter from 0), each block read as four big-endian words of
64 bits. Labels end in a colon and keys have one length a label, so no two streams share a block.
"""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from math import ceil, isqrt

from fedpact_contract.canonical import sha256
from fedpact_contract.errors import InputError

MOST_DEGREES = 63
"""Degrees of freedom up to which `t_quantile` knows the quantile."""

_DIGEST_BYTES = 32
_ROOT_SCALE = 10**18
_T = (
    127063, 43027, 31825, 27765, 25706, 24470, 23647, 23061, 22622, 22282, 22010, 21789, 21604, 21448, 21315, 21200,
    21099, 21010, 20931, 20860, 20797, 20739, 20687, 20639, 20596, 20556, 20519, 20485, 20453, 20423, 20396, 20370,
    20346, 20323, 20302, 20281, 20262, 20244, 20227, 20211, 20196, 20181, 20167, 20154, 20142, 20129, 20118, 20107,
    20096, 20086, 20076, 20067, 20058, 20049, 20041, 20033, 20025, 20018, 20010, 20003, 19997, 19990, 19984,
)  # fmt: skip
"""Student's 97.5 % quantiles for 1, 2, ... degrees of freedom, in 1e-4, rounded up."""


def round_seed(number: int, update_digests: Sequence[str]) -> bytes:
    """The seed of a round: SHA-256("fedpact.round-seed.v1:", the number in decimal, ":", the sorted raw digests).

    Nothing in it holds a name, and it is fixed only once the updates are.

    Args:
        number: Of the round.
        update_digests: Of the round's admitted updates, in hexadecimal, in any order.

    Raises:
        InputError: no digest, or one that is not 32 bytes in hexadecimal.
    """
    try:
        digests = sorted(bytes.fromhex(digest) for digest in update_digests)
    except ValueError:
        digests = []
    if not digests or any(len(digest) != _DIGEST_BYTES for digest in digests):
        raise InputError(
            "ROUND_SEED",
            "A round's seed is made of at least one update digest, 64 hexadecimal characters each.",
            field=f"round {number}",
            remedy="Hand over the digests of the round's admitted updates.",
        )
    return sha256(b"fedpact.round-seed.v1:%d:" % number + b"".join(digests))


def words(label: bytes, key: bytes) -> Iterator[int]:
    """The endless stream of 64-bit words of this label and key."""
    counter = 0
    while True:
        block = sha256(label + key + counter.to_bytes(8, "big"))
        for start in range(0, 32, 8):
            yield int.from_bytes(block[start : start + 8], "big")
        counter += 1


def below(stream: Iterator[int], bound: int) -> int:
    """A number in [0, bound), each equally likely: the first word below the largest multiple of bound, modulo bound."""
    most = 2**64 - 2**64 % bound
    return next(word for word in stream if word < most) % bound


def permutation(seed: bytes, index: int, count: int) -> tuple[int, ...]:
    """The `index`-th permutation of 0 .. count-1 under this seed, each equally likely.

    Fisher and Yates: from 0, 1, ..., count-1, for i from count-1 down to 1, places i and below(i + 1) change places.
    The label is "fedpact.permutation.v1:", the key the 32 bytes of the seed and the index as 8 big-endian bytes.
    """
    stream = words(b"fedpact.permutation.v1:", seed + index.to_bytes(8, "big"))
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = below(stream, i + 1)
        order[i], order[j] = order[j], order[i]
    return tuple(order)


def t_quantile(degrees: int) -> Fraction:
    """Student's 97.5 % quantile, rounded up at 1e-4; 1 to 63 degrees of freedom."""
    if not 1 <= degrees <= MOST_DEGREES:
        raise ValueError(f"no quantile of {degrees} degrees of freedom")
    return Fraction(_T[degrees - 1], 10**4)


def root(square: Fraction) -> Fraction:
    """The square root, rounded up at 1e-18."""
    scaled = ceil(square * _ROOT_SCALE**2)
    whole = isqrt(scaled)
    return Fraction(whole if whole**2 == scaled else whole + 1, _ROOT_SCALE)


def standard_error(variance: Fraction) -> Decimal:
    """The root of a variance in (1e-9 nat)^2, rounded up to 1e-3 of that unit."""
    return Decimal(f"{ceil(root(variance) * 1000)}E-3")
