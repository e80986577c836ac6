"""The feature maps: a tile of tokens becomes one or two tiles of features, and their gradients that of the tile.

    | FEATURE | first, second (y = x W, x̂ = x/‖x‖) | beside them |
    | --- | --- | --- |
    | turned | relu(x) cos a_t, relu(x) sin a_t, a_t = π t / 2 horizon | |
    | unit | √t x̂ (``scale`` = √t) | a constant feature, 1, of which nothing is stored |
    | positive | exp(y̅), y̅ = D^-1/4 y (``scale`` = D^-1/4) | a level for every token |
    | hyperbolic | exp(y̅), exp(−y̅) | a level for every token |
    | softmaxes | softmax(y), softmax(−y) | |
    | fourier | sin(x̂ W), cos(x̂ W) | |

Exponentials are relative to the largest of their token: the features are exp(level) times the tiles, with level = that
largest exponent − ‖x̅‖²/2. That of a query cancels where rows are divided by the sum of their weights.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import operand, rest
from linbench_kernels.features.circle import sines

LOWEST = tl.constexpr(-1e30)
"""The level of no key at all."""


@triton.jit
def load_map(
    weight,
    strides,
    head,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """W of a head, ``[BLOCK_D, BLOCK_P]`` of a ``[H, D, P]``, as an operand, and what that took from it as another.

    Some zeros where there is no W.
    """
    if weight is None:
        tile = tl.zeros([16, 16], dtype=tl.float32)
    else:
        ds, ps = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
        places = weight + head.to(tl.int64) * strides[0] + ds[:, None] * strides[1] + ps[None, :] * strides[2]
        tile = tl.load(places, mask=(ds < D)[:, None] & (ps < P)[None, :], other=0.0)
    high = operand(tile, OPERAND)
    return high, rest(tile, high, OPERAND)


@triton.jit
def turns(row, start, horizon, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Sin a_t and cos a_t of the tokens from ``row`` on, the first token of all being at ``start``."""
    tokens = (start + row + tl.arange(0, ROWS)).to(ACC)
    return sines(tokens / horizon.to(ACC) * 1.5707963267948966)


@triton.jit
def unit_rows(x):
    """x̂ and 1/‖x‖; rows of zeros stay, with 0 for the latter. The largest entry is taken out before squares are."""
    largest = tl.max(tl.abs(x), 1)
    empty = largest == 0
    largest = tl.where(empty, 1.0, largest)
    shrunk = x / largest[:, None]
    root = tl.sqrt(tl.where(empty, 1.0, tl.sum(shrunk * shrunk, 1)))
    return shrunk / root[:, None], tl.where(empty, 0.0, 1.0 / (largest * root))


@triton.jit
def softmax(y):
    """Over the columns."""
    powers = tl.exp(y - tl.max(y, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def mapped(
    x,
    y,
    row,
    start,
    length,
    horizon,
    scale,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FEATURE: tl.constexpr,
    ACC: tl.constexpr,
):
    """First, second and level of tokens x with y = x W, all in fp32 or fp64; features are 0 outside of the tensor.

    Maps without a second or a level have anything there.
    """
    valid = row + tl.arange(0, ROWS) < length
    columns = (tl.arange(0, BLOCK_P) < P)[None, :]
    level = tl.zeros([ROWS], dtype=ACC)
    if FEATURE == "turned":
        sine, cosine = turns(row, start, horizon, ROWS, ACC)
        first = tl.maximum(x, 0.0)
        first, second = first * cosine[:, None], first * sine[:, None]
    elif FEATURE == "unit":
        first, _ = unit_rows(x)
        first *= scale
        second = first
    else:
        if FEATURE == "fourier":
            _, inverse = unit_rows(x)
            first, second = sines(y * inverse[:, None])
            first, second = tl.where(columns, first, 0.0), tl.where(columns, second, 0.0)
        elif FEATURE == "softmaxes":
            first = softmax(tl.where(columns, y, LOWEST))
            second = softmax(tl.where(columns, -y, LOWEST))
        else:
            y *= scale
            if FEATURE == "hyperbolic":
                largest = tl.max(tl.abs(y), 1)
                second = tl.where(columns, tl.exp(-y - largest[:, None]), 0.0)
                first = tl.where(columns, tl.exp(y - largest[:, None]), 0.0)
            else:
                y = tl.where(columns, y, LOWEST)
                largest = tl.max(y, 1)
                first = tl.exp(y - largest[:, None])
                second = first
            level = tl.where(valid, largest - tl.sum(x * x, 1) * (0.5 * scale * scale), LOWEST)
        first, second = tl.where(valid[:, None], first, 0.0), tl.where(valid[:, None], second, 0.0)
    return first, second, level


@triton.jit
def featured(
    x,
    weight,
    lost,
    row,
    start,
    length,
    horizon,
    scale,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FEATURE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`mapped` of a tile as it was loaded, first and second as operands of products.

    An exponent without a bound needs the bits of W that bf16 or tf32 lose: its error is a factor of the feature.
    """
    wide = x.to(ACC)
    if FEATURE == "turned" or FEATURE == "unit":
        y = wide
    elif FEATURE == "positive" or FEATURE == "hyperbolic":
        PRECISE: tl.constexpr = "tf32x3" if PRECISION == "tf32" else PRECISION
        y = tl.dot(operand(x, OPERAND), weight, input_precision=PRECISE, out_dtype=ACC)
        if OPERAND == "bf16":
            y = tl.dot(operand(x, OPERAND), lost, y, input_precision=PRECISE, out_dtype=ACC)
    else:
        y = tl.dot(operand(x, OPERAND), weight, input_precision=PRECISION, out_dtype=ACC)
    first, second, level = mapped(wide, y, row, start, length, horizon, scale, ROWS, P, BLOCK_P, FEATURE, ACC)
    return operand(first, OPERAND), operand(second, OPERAND), level


@triton.jit
def pulled_back(
    x,
    weight,
    first,
    second,
    first_grad,
    second_grad,
    row,
    start,
    horizon,
    scale,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile from those of its features, and the g, an operand, of which xᵀ g is the gradient of W.

    With levels held fixed, which is all that a gradient needs: what comes out depends on level and features through
    their product alone. Because the level of a query cancels, the gradients of its exponents add up to 0.
    """
    if FEATURE == "turned":
        sine, cosine = turns(row, start, horizon, ROWS, ACC)
        x_grad = tl.where(x > 0, first_grad * cosine[:, None] + second_grad * sine[:, None], 0.0)
        y_grad = operand(x_grad, OPERAND)
    elif FEATURE == "unit":
        unit, inverse = unit_rows(x.to(ACC))
        x_grad = (first_grad - unit * tl.sum(first_grad * unit, 1)[:, None]) * (inverse * scale)[:, None]
        y_grad = operand(x_grad, OPERAND)
    else:
        first, second = first.to(ACC), second.to(ACC)
        if FEATURE == "softmaxes":
            g = first * (first_grad - tl.sum(first_grad * first, 1)[:, None])
            g -= second * (second_grad - tl.sum(second_grad * second, 1)[:, None])
        elif FEATURE == "fourier":
            unit, inverse = unit_rows(x.to(ACC))
            g = (first_grad * second - second_grad * first) * inverse[:, None]
        else:
            g = first_grad * first
            norm = tl.sum(g, 1)
            if FEATURE == "hyperbolic":
                other = second_grad * second
                g -= other
                norm += tl.sum(other, 1)
            g *= scale
        y_grad = operand(g, OPERAND)
        x_grad = tl.dot(y_grad, tl.trans(weight), input_precision=PRECISION, out_dtype=ACC)
        if FEATURE == "fourier":
            x_grad -= unit * tl.sum(x_grad * unit, 1)[:, None]
        if (FEATURE == "positive" or FEATURE == "hyperbolic") and KEYS:
            x_grad -= x.to(ACC) * (norm * scale * scale)[:, None]
    return x_grad, y_grad
