"""Matrix products that do not depend on how they are computed.

A BLAS product's last bits depend on the matrices' sizes, the threads and the library. Utilities become money, so here
both factors are cut into slices of few bits whose products add up without rounding, in whatever order (Ozaki, Ogita,
Oishi and Rump, Numer. Algorithms 59, 2012, "Error-free transformations of matrix multiplication"). BLAS does the work;
the result is the same bits everywhere.
"""

import numpy as np

from fedpact_models.features import Floats


def slice_bits(terms: int) -> int:
    """Bits a slice may have, so that a sum of `terms` products of two slices fits the 53 bits of a float64."""
    return (53 - (terms - 1).bit_length()) // 2


def exponents(a: Floats, axes: tuple[int, ...]) -> Floats:
    """Powers of two above every |a|, over `axes`, which stay as size 1. Zero arrays get 1."""
    largest = np.maximum(a.max(axis=axes, keepdims=True, initial=0.0), -a.min(axis=axes, keepdims=True, initial=0.0))
    return np.asarray(np.ldexp(1.0, np.frexp(largest)[1]))


def slices(a: Floats, bits: int) -> tuple[Floats, Floats]:
    """The two leading slices of numbers in [-1, 1]: integers of at most `bits` bits times 2^-bits and 2^-(2 bits + 1).

    What is left out is at most 2^-(2 bits + 2).
    """
    high = _rounded(a, bits)
    rest = a - high
    return high, _rounded(rest, 2 * bits + 1, out=rest)


def matmul_transposed(a: Floats, b: Floats) -> Floats:
    """The product of a [..., n, k] and b [..., m, k] transposed, float64 [..., n, m].

    The error is below 3 k 2^-(2 slice_bits(k)) max|a| max|b|, with the maxima of each matrix: 5e-10 at worst for k =
    784, in practice (errors of both signs) near 1e-13. A zero matrix gives exact zeros.
    """
    bits = slice_bits(a.shape[-1])
    scale_a, scale_b = exponents(a, (-2, -1)), exponents(b, (-2, -1))
    a_high, a_low = slices(a / scale_a, bits)
    b_high, b_low = (part.swapaxes(-2, -1) for part in slices(b / scale_b, bits))
    small = a_high @ b_low
    small += a_low @ b_high
    product = a_high @ b_high
    product += small
    product *= scale_a * scale_b
    return product


def _rounded(a: Floats, bits: int, out: Floats | None = None) -> Floats:
    """To the nearest multiple of 2^-bits, by the rounding of the addition itself; |a| <= 1."""
    grid = 1.5 * 2.0 ** (52 - bits)
    result = np.add(a, grid, out=out)
    result -= grid
    return result
