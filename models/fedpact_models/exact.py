"""Sums and matrix products that do not depend on how they are computed.

The last bits of a float64 sum depend on the order of its terms, and those of a BLAS product on the matrices' sizes, the
threads and the library. Utilities become money, so here numbers are rounded to a grid first: multiples of one power of
two, few enough bits that no sum of them is ever rounded, in whatever order. For products both factors are cut into two
such halves (Ozaki, Ogita, Oishi and Rump, Numer. Algorithms 59, 2012, "Error-free transformations of matrix
multiplication"). BLAS does the work; the result is the same bits everywhere.

A grid is named by a scale, a power of two above every |number| that is to be summed, and by the bits of a half.
"""

from dataclasses import dataclass

import numpy as np

from fedpact_models.features import Floats

SMALLEST = 2.0**-300
"""The least scale: products of what is smaller would leave float64's range, in which alone they are exact."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Halves:
    """Numbers as a sum of two: multiples of scale 2^-bits, and of scale 2^-(2 bits + 1), integers of `bits` bits.

    `parts`: the high halves and then the low ones, [2, ...].
    """

    parts: Floats

    @property
    def high(self) -> Floats:
        """Multiples of scale 2^-bits."""
        return np.asarray(self.parts[0])

    @property
    def low(self) -> Floats:
        """What is left, multiples of scale 2^-(2 bits + 1)."""
        return np.asarray(self.parts[1])


def half_bits(terms: int) -> int:
    """Bits a half may have, so that a sum of `terms` products of two halves fits the 53 bits of a float64.

    At most 25: then the whole number has 51 bits, and sums of numbers below the scale are exact too.
    """
    return min(25, (53 - (terms - 1).bit_length()) // 2)


def scale_above(bound: Floats) -> Floats:
    """Powers of two above these bounds."""
    return np.asarray(np.ldexp(1.0, np.frexp(np.maximum(bound, SMALLEST))[1]))


def largest(a: Floats, axis: int | tuple[int, ...]) -> Floats:
    """The largest |a| over the axes, which stay as size 1."""
    return np.asarray(np.maximum(a.max(axis=axis, keepdims=True), -a.min(axis=axis, keepdims=True)))


def highest(a: Floats) -> Floats:
    """The largest number of each column, [k, n] -> [1, n]: by halves, which is quicker than numpy's reduction."""
    while len(a) > 1:
        half = (len(a) + 1) // 2
        a = np.maximum(a[:half], a[-half:])
    return a


def to_grid(a: Floats, scale: Floats | float, bits: int, out: Floats | None = None) -> Floats:
    """Round in place, or into `out`, to multiples of scale 2^-(2 bits + 1): half-even, as additions round."""
    grid = scale * (1.5 * 2.0 ** (51 - 2 * bits))
    out = np.add(a, grid, out=a if out is None else out)
    out -= grid
    return out


def cut(parts: Floats, scale: Floats | float, bits: int) -> None:
    """Cut numbers of a grid, `parts[1]`, in place and exactly; what `parts[0]` held is gone."""
    high, low = parts
    grid = scale * (1.5 * 2.0 ** (52 - bits))
    np.add(low, grid, out=high)
    high -= grid
    low -= high


def halves(a: Floats, scale: Floats | float, bits: int) -> Halves:
    """Cut numbers of a grid, exactly."""
    parts = np.empty((2, *a.shape))
    parts[1] = a
    cut(parts, scale, bits)
    return Halves(parts=parts)


def rounded_halves(a: Floats, axis: int | tuple[int, ...], terms: int) -> Halves:
    """Cut any numbers, a few bits below the largest of each group (over `axis`), for sums of `terms` products."""
    parts = np.empty((2, *a.shape))
    round_and_cut(a, axis, terms, parts)
    return Halves(parts=parts)


def round_and_cut(a: Floats, axis: int | tuple[int, ...], terms: int, parts: Floats) -> None:
    """As `rounded_halves`, into `parts`."""
    _round_and_cut(a, largest(a, axis), terms, parts)


def positive_halves(a: Floats, terms: int) -> Halves:
    """As `rounded_halves` by columns, of numbers that are not negative, [k, n]."""
    parts = np.empty((2, *a.shape))
    _round_and_cut(a, highest(a), terms, parts)
    return Halves(parts=parts)


def _round_and_cut(a: Floats, bound: Floats, terms: int, parts: Floats) -> None:
    bits, scale = half_bits(terms), scale_above(bound)
    to_grid(a, scale, bits, parts[1])
    cut(parts, scale, bits)


def product(a: Halves, b: Halves) -> Floats:
    """The matrix product of [m, k] and [k, n], cut for k terms; what is left out is low times low.

    The error is below 3 k 2^-(2 half_bits(k)) times both scales: 5e-10 at worst for k = 784 and scales of 1, in
    practice (errors of both signs) near 1e-13. A zero matrix gives exact zeros.
    """
    rows, terms = a.parts.shape[1:]
    with_high, with_low = a.parts.reshape(2 * rows, terms) @ b.parts[0], a.parts[0] @ b.parts[1]
    return joined(with_high, with_low)


def joined(with_high: Floats, with_low: Floats) -> Floats:
    """A product from those of both halves of `a` with the high half of `b` [2 m, n], and of high with low [m, n].

    Each of these is exact, and so is a sum of them over parts of the k terms.
    """
    rows = len(with_low)
    with_low += with_high[rows:]
    with_low += with_high[:rows]
    return with_low
