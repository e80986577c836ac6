"""The feature maps: a tile of tokens becomes one or two tiles of features, and their gradients that of the tile.

| FEATURE | first, second |
| --- | --- |
| identity | x |
| elu_plus_one | elu(x) + 1 |
| layer_norm | (x − mean)/√(variance + 1e-5) over the channels |
| softmax | softmax over the channels |
| exponential | exp(x − level), with a level for every channel, its largest key: softmax over the tokens, undivided |
| unit | x/‖x‖, rows of zeros stay |
| turned | relu(x) cos a_t, relu(x) sin a_t, a_t = π t / 2 horizon |
"""

import triton
import triton.language as tl

from linbench_kernels.features.maps import LOWEST, turns, unit_rows

EPSILON = tl.constexpr(1e-5)
"""Added to the variance of a layer norm."""


@triton.jit
def inside(row, length, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Which entries of a tile belong to the tensor."""
    return (row + tl.arange(0, ROWS) < length)[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]


@triton.jit
def softmax(y):
    """Over the columns."""
    powers = tl.exp(y - tl.max(y, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def layer_norm(x, there, WIDTH: tl.constexpr):
    """Rows with mean 0 and variance 1, and one over their deviation."""
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(there, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + EPSILON)
    return centred * inverse[:, None], inverse


@triton.jit
def layer_norm_gradient(normed, inverse, grad, there, WIDTH: tl.constexpr):
    """Of what was normalised."""
    mean = tl.sum(grad, 1) / WIDTH
    along = tl.sum(grad * normed, 1) / WIDTH
    return tl.where(there, (grad - mean[:, None] - normed * along[:, None]) * inverse[:, None], 0.0)


@triton.jit
def mapped(
    x,
    level,
    row,
    length,
    horizon,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURE: tl.constexpr,
    ACC: tl.constexpr,
):
    """First and second of tokens in fp32 or fp64, 0 outside of the tensor; without a second the first stands there."""
    there = inside(row, length, ROWS, BLOCK, WIDTH)
    if FEATURE == "turned":
        sine, cosine = turns(row, 0, horizon, ROWS, ACC)
        x = tl.maximum(x, 0.0)
        return x * cosine[:, None], x * sine[:, None]
    if FEATURE == "elu_plus_one":
        x = tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)
    if FEATURE == "layer_norm":
        x, _ = layer_norm(x, there, WIDTH)
    if FEATURE == "softmax":
        x = softmax(tl.where((tl.arange(0, BLOCK) < WIDTH)[None, :], x, LOWEST))
    if FEATURE == "exponential":
        x = tl.exp(tl.minimum(x - level[None, :], 0.0))
    if FEATURE == "unit":
        x, _ = unit_rows(x)
    x = tl.where(there, x, 0.0)
    return x, x


@triton.jit
def pulled_back(
    x,
    first,
    first_grad,
    second_grad,
    row,
    length,
    horizon,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of a tile from those of its features, levels held fixed: they cancel in what is made of sums."""
    grad = first_grad
    if FEATURE == "turned":
        sine, cosine = turns(row, 0, horizon, ROWS, ACC)
        grad = tl.where(x > 0, first_grad * cosine[:, None] + second_grad * sine[:, None], 0.0)
    if FEATURE == "elu_plus_one":
        grad = first_grad * tl.exp(tl.minimum(x, 0.0))
    if FEATURE == "layer_norm":
        there = inside(row, length, ROWS, BLOCK, WIDTH)
        normed, inverse = layer_norm(x, there, WIDTH)
        grad = layer_norm_gradient(normed, inverse, first_grad, there, WIDTH)
    if FEATURE == "softmax":
        grad = first * (first_grad - tl.sum(first_grad * first, 1)[:, None])
    if FEATURE == "exponential":
        grad = first_grad * first
    if FEATURE == "unit":
        unit, inverse = unit_rows(x)
        grad = (first_grad - unit * tl.sum(first_grad * unit, 1)[:, None]) * inverse[:, None]
    return grad
