"""Sines and cosines in fp32 to their last digits, without the tables and memory of the usual reduction."""

import triton
import triton.language as tl

LONGEST = tl.constexpr(1.5703125)
MIDDLE = tl.constexpr(4.837512969970703125e-4)
SHORTEST = tl.constexpr(7.54978995489188216e-8)
"""π/2 in three parts: whole multiples of the first two are exact up to 2^13 or more."""


@triton.jit
def sines(x):
    """Sin x and cos x to 2e-7 where |x| < 8000, beyond which an angle in fp32 has lost its meaning.

    What is left of x after whole quarters of a turn goes into polynomials (those of Cephes); Triton's own are of 20
    bits. In fp64 they are as Triton has them.
    """
    if x.dtype == tl.float64:
        sine, cosine = tl.sin(x), tl.cos(x)
    else:
        quarters = tl.floor(x * 0.6366197723675814 + 0.5)
        rest = x - quarters * LONGEST
        rest = rest - quarters * MIDDLE
        rest = rest - quarters * SHORTEST
        square = rest * rest
        of_rest = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
        of_rest = of_rest * square * rest + rest
        beside = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
        beside = beside * square * square - 0.5 * square + 1.0
        quadrant = quarters.to(tl.int32) & 3
        odd = (quadrant & 1) == 1
        sine = tl.where(odd, beside, of_rest)
        cosine = tl.where(odd, of_rest, beside)
        sine = tl.where(quadrant >= 2, -sine, sine)
        cosine = tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return sine, cosine
