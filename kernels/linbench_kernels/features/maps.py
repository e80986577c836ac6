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

Tiles of tokens have a row for every token, tiles of features a column. So W is the operand from the left, whose rows,
and with them the features, are shared out among the warps; W itself stays in shared memory, where products of Hopper
read it. Were the rows tokens, short chunks would be made by several warps at once, with all features in registers.
"""

import triton
import triton.language as tl

from linbench_kernels.additive.tiles import load_placed, operand, places, store_placed
from linbench_kernels.features.circle import sines

LOWEST = tl.constexpr(-1e30)
"""The level of no key at all."""


@triton.jit
def load_map(
    weight,
    first,
    D: tl.constexpr,
    P: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Columns ``first`` to ``first + DEPTH`` of Wᵀ, the contiguous ``[P, D]`` at ``weight``, as an operand.

    Nothing may be done to it on the way: products read in shared memory only what was loaded as they take it.
    """
    ps, ds = tl.arange(0, BLOCK_P), first + tl.arange(0, DEPTH)
    inside = (ps < P)[:, None] & (ds < D)[None, :]
    tile = tl.load(places(weight, (D, 1), 0, first, BLOCK_P, DEPTH), mask=inside, other=0.0)
    return operand(tile, OPERAND)


@triton.jit
def kept_map(
    weight,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """:func:`load_map` of all of W where it is kept, DEPTH being BLOCK_D; else, or where there is no W, some zeros."""
    if weight is None or DEPTH != BLOCK_D:
        return operand(tl.zeros([16, 16], dtype=tl.float32), OPERAND)
    else:
        return load_map(weight, 0, D, P, DEPTH, BLOCK_P, OPERAND)


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
    """Over the rows."""
    powers = tl.exp(y - tl.max(y, 0)[None, :])
    return powers / tl.sum(powers, 0)[None, :]


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
    """First, second and level of tokens x ``[ROWS, D]`` with y = (x W)ᵀ ``[BLOCK_P, ROWS]``, all in fp32 or fp64.

    Features are 0 outside of the tensor. Maps without a second or a level have anything there.
    """
    valid = row + tl.arange(0, ROWS) < length
    inside = (tl.arange(0, BLOCK_P) < P)[:, None]
    level = tl.zeros([ROWS], dtype=ACC)
    if FEATURE == "turned":
        sine, cosine = turns(row, start, horizon, ROWS, ACC)
        first = tl.maximum(x, 0.0)
        first, second = tl.trans(first * cosine[:, None]), tl.trans(first * sine[:, None])
    elif FEATURE == "unit":
        first, _ = unit_rows(x)
        first = tl.trans(first * scale)
        second = first
    else:
        if FEATURE == "fourier":
            _, inverse = unit_rows(x)
            first, second = sines(y * inverse[None, :])
            first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
        elif FEATURE == "softmaxes":
            first = softmax(tl.where(inside, y, LOWEST))
            second = softmax(tl.where(inside, -y, LOWEST))
        else:
            y *= scale
            if FEATURE == "hyperbolic":
                largest = tl.max(tl.abs(y), 0)
                second = tl.where(inside, tl.exp(-y - largest[None, :]), 0.0)
                first = tl.where(inside, tl.exp(y - largest[None, :]), 0.0)
            else:
                y = tl.where(inside, y, LOWEST)
                largest = tl.max(y, 0)
                first = tl.exp(y - largest[None, :])
                second = first
            level = tl.where(valid, largest - tl.sum(x * x, 1) * (0.5 * scale * scale), LOWEST)
        first, second = tl.where(valid[None, :], first, 0.0), tl.where(valid[None, :], second, 0.0)
    return first, second, level


@triton.jit
def projected(
    x,
    high,
    low,
    y,
    FEATURE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y + (x W)ᵀ from columns of x and as many rows of W.

    An exponent without a bound needs the bits of W that bf16 or tf32 lose: its error is a factor of the feature.
    """
    columns = tl.trans(operand(x, OPERAND))
    if FEATURE == "positive" or FEATURE == "hyperbolic":
        PRECISE: tl.constexpr = "tf32x3" if PRECISION == "tf32" else PRECISION
        y = tl.dot(high, columns, y, input_precision=PRECISE, out_dtype=ACC)
        if OPERAND == "bf16":
            y = tl.dot(low, columns, y, input_precision=PRECISE, out_dtype=ACC)
    else:
        y = tl.dot(high, columns, y, input_precision=PRECISION, out_dtype=ACC)
    return y


@triton.jit
def featured(
    x,
    rows,
    steps,
    weight,
    lost,
    high,
    low,
    row,
    start,
    length,
    horizon,
    scale,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    FEATURE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`mapped` of a tile as it was loaded, first and second as operands of products.

    Args:
        x: ``[ROWS, BLOCK_D]``, at ``row`` of the rows ``rows`` with strides ``steps``.
        weight: Wᵀ, of which ``high`` is all where DEPTH is BLOCK_D, else it is read in parts; ``lost`` and ``low`` the
            same of what rounding took from it, or None.
    """
    wide = x.to(ACC)
    if FEATURE == "turned" or FEATURE == "unit":
        y = wide
    else:
        y = tl.zeros([BLOCK_P, ROWS], dtype=ACC)
        if DEPTH == BLOCK_D:
            y = projected(x, high, low, y, FEATURE, OPERAND, ACC, PRECISION)
        else:
            for column in tl.range(0, D, DEPTH, num_stages=1):
                part_high = load_map(weight, column, D, P, DEPTH, BLOCK_P, OPERAND)
                part_low = part_high
                if lost is not None:
                    part_low = load_map(lost, column, D, P, DEPTH, BLOCK_P, OPERAND)
                part = load_placed(rows, steps, row, column, length, ROWS, DEPTH, D, False)
                y = projected(part, part_high, part_low, y, FEATURE, OPERAND, ACC, PRECISION)
    first, second, level = mapped(wide, y, row, start, length, horizon, scale, ROWS, P, BLOCK_P, FEATURE, ACC)
    return operand(first, OPERAND), operand(second, OPERAND), level


@triton.jit
def pulled_back(
    x,
    rows,
    steps,
    weight,
    high,
    first,
    second,
    first_grad,
    second_grad,
    x_grad,
    x_grad_steps,
    map_grad,
    row,
    start,
    length,
    horizon,
    scale,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    FEATURE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Writes the gradient of a tile from those of its features; the g, an operand, with which (g x)ᵀ is that of W.

    With levels held fixed, which is all that a gradient needs: what comes out depends on level and features through
    their product alone. Because the level of a query cancels, the gradients of its exponents add up to 0.

    Args:
        x_grad: where it goes, a descriptor where TMA; other arguments are those of :func:`featured`.
        map_grad: ``[D, P]`` or None: where W is read in parts, its gradient is too much for registers as well, and what
            the tile adds to it is added there.
    """
    LONG: tl.constexpr = FEATURE == "fourier" or (KEYS and (FEATURE == "positive" or FEATURE == "hyperbolic"))
    if FEATURE == "turned" or FEATURE == "unit":
        first_grad, second_grad = tl.trans(first_grad), tl.trans(second_grad)
        if FEATURE == "turned":
            sine, cosine = turns(row, start, horizon, ROWS, ACC)
            result = tl.where(x > 0, first_grad * cosine[:, None] + second_grad * sine[:, None], 0.0)
        else:
            unit, inverse = unit_rows(x.to(ACC))
            result = (first_grad - unit * tl.sum(first_grad * unit, 1)[:, None]) * (inverse * scale)[:, None]
        y_grad = operand(result, OPERAND)
        store_placed(x_grad, x_grad_steps, row, 0, length, result, ROWS, BLOCK_D, D, TMA)
    else:
        first, second = first.to(ACC), second.to(ACC)
        wide, inverse, along = x.to(ACC), tl.full([ROWS], 1.0, dtype=ACC), tl.zeros([ROWS], dtype=ACC)
        if FEATURE == "softmaxes":
            g = first * (first_grad - tl.sum(first_grad * first, 0)[None, :])
            g -= second * (second_grad - tl.sum(second_grad * second, 0)[None, :])
        elif FEATURE == "fourier":
            _, inverse = unit_rows(wide)
            g = (first_grad * second - second_grad * first) * inverse[None, :]
        else:
            g = first_grad * first
            along = tl.sum(g, 0)
            if FEATURE == "hyperbolic":
                other = second_grad * second
                g -= other
                along += tl.sum(other, 0)
            g *= scale
            along *= scale * scale
        y_grad = operand(g, OPERAND)
        if DEPTH == BLOCK_D:
            result = tl.trans(tl.dot(tl.trans(high), y_grad, input_precision=PRECISION, out_dtype=ACC))
            if FEATURE == "fourier":
                along = tl.sum(result * (wide * inverse[:, None]), 1)
            if LONG:
                result -= wide * inverse[:, None] * along[:, None]
            store_placed(x_grad, x_grad_steps, row, 0, length, result, ROWS, BLOCK_D, D, TMA)
        else:
            if FEATURE == "fourier":  # what of the gradient lies along x̂ is known when all of it is
                for column in tl.range(0, D, DEPTH, num_stages=1):
                    part_high = load_map(weight, column, D, P, DEPTH, BLOCK_P, OPERAND)
                    part = load_placed(rows, steps, row, column, length, ROWS, DEPTH, D, False).to(ACC)
                    product = tl.dot(tl.trans(part_high), y_grad, input_precision=PRECISION, out_dtype=ACC)
                    along += tl.sum(tl.trans(product) * (part * inverse[:, None]), 1)
            for column in tl.range(0, D, DEPTH, num_stages=1):
                part_high = load_map(weight, column, D, P, DEPTH, BLOCK_P, OPERAND)
                part = load_placed(rows, steps, row, column, length, ROWS, DEPTH, D, False).to(ACC)
                product = tl.dot(tl.trans(part_high), y_grad, input_precision=PRECISION, out_dtype=ACC)
                if LONG:
                    product -= tl.trans(part * inverse[:, None] * along[:, None])
                store_placed(x_grad, x_grad_steps, row, column, length, tl.trans(product), ROWS, DEPTH, D, False)
                if map_grad is not None:
                    inside = (tl.arange(0, BLOCK_P) < P)[:, None] & (column + tl.arange(0, DEPTH) < D)[None, :]
                    grad_places = places(map_grad, (1, P), 0, column, BLOCK_P, DEPTH)
                    before = tl.load(grad_places, mask=inside, other=0.0)
                    columns = operand(part, OPERAND)
                    product = tl.dot(y_grad, columns, before, input_precision=PRECISION, out_dtype=ACC)
                    tl.store(grad_places, product, mask=inside)
    return y_grad
