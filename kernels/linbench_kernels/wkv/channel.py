"""One token of a channel: the past as its average, the sum of its weights, and the level that they are relative to.

Weights are divided by e to the level, which is the largest logarithm of one so far, so that nothing overflows. Any
other level would give the same: no gradient goes through it. Levels and keys are subtracted from each other first,
which is exact where they are close: where they are large their rounding is none of the rate and the bonus.

With a share s of a token in an average a, the next one is a + s (v − a). Gradients of keys and rates are sums of such
differences. From a numerator they would be differences of two sums over all later tokens, each as large as v.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4e38)
"""The level of no past at all, in place of −∞, of which differences are not numbers."""


@triton.jit
def reciprocal(x):
    """1 / x; 1 where x is 0, which takes keys of −∞ and no past."""
    return 1.0 / tl.where(x == 0, 1.0, x)


@triton.jit
def seen(weight, level, key, bonus):
    """What a token sees: one over the sum of all weights, that of the past, and its own. The larger factor is 1."""
    lead = (level - key) - bonus
    fading = tl.exp(-tl.abs(lead))
    past = tl.where(lead < 0, fading, 1.0)
    present = tl.where(lead < 0, 1.0, fading)
    return reciprocal(past * weight + present), past, present


@triton.jit
def joined(weight, level, key, rate):
    """The sum of weights and the level after a token, the factors of what was there and of the token, its share."""
    after = tl.maximum(tl.maximum(level - rate, key), LOWEST)
    faded, joining = tl.exp((level - after) - rate), tl.exp(key - after)
    weight = faded * weight + joining
    return weight, after, faded, joining, joining * reciprocal(weight)


@triton.jit
def gate(receptance):
    """σ; nothing in it overflows."""
    fading = tl.exp(-tl.abs(receptance))
    return tl.where(receptance < 0, fading, 1.0) / (1.0 + fading)


@triton.jit
def load_state(x, stride, inside, ACC: tl.constexpr):
    """Average, weight and level of channels, from numerator, denominator and level, which are ``stride`` apart."""
    numerator = tl.load(x, mask=inside, other=0.0).to(ACC)
    weight = tl.load(x + stride, mask=inside, other=0.0).to(ACC)
    level = tl.load(x + 2 * stride, mask=inside, other=0.0).to(ACC)
    return numerator * reciprocal(weight), weight, tl.maximum(level, LOWEST)


@triton.jit
def store_state(x, stride, inside, average, weight, level):
    """The other way round; a level of no past at all as −∞."""
    tl.store(x, average * weight, mask=inside)
    tl.store(x + stride, weight, mask=inside)
    tl.store(x + 2 * stride, tl.where(level <= LOWEST, float("-inf"), level), mask=inside)
