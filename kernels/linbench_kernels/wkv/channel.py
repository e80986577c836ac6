"""One token of a channel: sums of the past relative to a level, so that nothing overflows.

Numerator and denominator are those of the formula divided by e to the level, which is the largest logarithm of a weight
so far. Any other level would give the same: no gradient goes through it. Levels and keys are subtracted from each other
first, which is exact where they are close, so that where they are large their rounding does not become one of the rate
and the bonus.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4e38)
"""The level of no past at all, in place of −∞, of which differences are not numbers."""


@triton.jit
def seen(numerator, denominator, level, key, value, bonus):
    """The average that a token sees, one over the sum of its weights, and the weights of the past and of itself.

    The larger of the two weights is 1. Where nothing has any weight, which takes keys of −∞, the average is 0.
    """
    lead = (level - key) - bonus
    fading = tl.exp(-tl.abs(lead))
    past = tl.where(lead < 0, fading, 1.0)
    present = tl.where(lead < 0, 1.0, fading)
    total = past * denominator + present
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    return (past * numerator + present * value) * inverse, inverse, past, present


@triton.jit
def joined(level, key, rate):
    """The level after a token, and the factors of what was there and of the token."""
    after = tl.maximum(tl.maximum(level - rate, key), LOWEST)
    return after, tl.exp((level - after) - rate), tl.exp(key - after)


@triton.jit
def gate(receptance):
    """σ; nothing in it overflows."""
    fading = tl.exp(-tl.abs(receptance))
    return tl.where(receptance < 0, fading, 1.0) / (1.0 + fading)


@triton.jit
def load_state(x, stride, inside, ACC: tl.constexpr):
    """Numerator, denominator and level of channels, the three ``stride`` apart."""
    numerator = tl.load(x, mask=inside, other=0.0).to(ACC)
    denominator = tl.load(x + stride, mask=inside, other=0.0).to(ACC)
    level = tl.load(x + 2 * stride, mask=inside, other=0.0).to(ACC)
    return numerator, denominator, tl.maximum(level, LOWEST)


@triton.jit
def store_state(x, stride, inside, numerator, denominator, level):
    """The three; a level of no past at all as −∞."""
    tl.store(x, numerator, mask=inside)
    tl.store(x + stride, denominator, mask=inside)
    tl.store(x + 2 * stride, tl.where(level <= LOWEST, float("-inf"), level), mask=inside)
