"""Samples -> estimates: medians, ratios of medians and growth, each with the interval that it deserves.

Nothing here knows a unit: what goes in as milliseconds comes out as milliseconds. Every random draw is seeded, so that
the same samples always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from linbench.bootstrap import bootstrap_ratios

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054
"""Of 97.5 %: how many standard errors half an interval of 95 % is."""

Samples = NDArray[np.float64]
_ANGLES = np.linspace(0, math.pi / 2, 4001)
_COSINES = np.cos(_ANGLES)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, or a ratio of two, with its interval. All but ``coverage`` and ``count`` are in the samples' unit."""

    value: float
    low: float
    high: float
    coverage: float
    """Probability that such an interval holds the true value: below 0.95 where there are too few samples for more."""
    count: int
    """Samples behind the estimate; for a ratio, those of its smaller side."""
    minimum: float
    """The smallest sample; for a ratio, that of the two minima."""

    @property
    def sign(self) -> int:
        """Of the logarithm of a ratio: −1 below one, +1 above one, 0 when the interval does not tell."""
        return -1 if self.high < 1 else 1 if self.low > 1 else 0


def median_interval(samples: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """The median with its order-statistic interval, which assumes independent samples and no distribution.

    The number of samples below the median is Binomial(n, 1/2), so the interval from the k-th smallest to the k-th
    largest holds it with a known probability; k is the largest for which that is at least ``confidence``. Five samples
    or fewer cannot reach 95 %: the interval is then their range, and ``coverage`` says what it is worth.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64).ravel())
    count = ordered.size
    if count == 0:
        raise ValueError("the median of no samples")
    rank, coverage = _symmetric_rank(count, confidence)
    return Estimate(
        value=_middle(ordered),
        low=float(ordered[rank - 1]),
        high=float(ordered[count - rank]),
        coverage=coverage,
        count=count,
        minimum=float(ordered[0]),
    )


def pooled_median(groups: Sequence[ArrayLike], confidence: float = CONFIDENCE) -> Estimate:
    """The median over several processes that measured the same thing: the median of their medians.

    One process is one draw of memory layout and machine state, so that its samples, however many, are one observation:
    the interval is Student's over the logarithms of the processes' medians. Two or three medians that agree by chance
    do not make it narrower than the samples within a process allow. A single group has its order-statistic interval.

    Args:
        groups: positive samples of each process.
    """
    arrays = _arrays(groups)
    if len(arrays) == 1:
        return median_interval(arrays[0], confidence)
    value, spread = _median_of_medians(arrays), _log_spread(arrays, confidence)
    reach = student_quantile((1 + confidence) / 2, spread.freedom) * spread.error
    return Estimate(
        value=value,
        low=min(math.exp(spread.mean - reach), value),
        high=max(math.exp(spread.mean + reach), value),
        coverage=confidence,
        count=sum(group.size for group in arrays),
        minimum=min(float(group.min()) for group in arrays),
    )


def ratio_of_medians(top: Sequence[ArrayLike], bottom: Sequence[ArrayLike], confidence: float = CONFIDENCE) -> Estimate:
    """The median of ``top`` over that of ``bottom``, each a list of groups as in :func:`pooled_median`.

    With several processes on both sides the interval is Welch's over the logarithms of their medians. With one on a
    side it is a percentile bootstrap, which knows nothing of other processes. With five samples or fewer on a side a
    bootstrap is too sure of itself: the interval is then the quotient of the ranges, provided that the sides are large
    enough for a rank test to call separate ranges different (two of the C(n + m, n) arrangements are that extreme), and
    otherwise from 0 to infinity.
    """
    above, below = _arrays(top), _arrays(bottom)
    if min(len(above), len(below)) > 1:
        return _welch(above, below, confidence)
    counts = [sum(group.size for group in side) for side in (above, below)]
    value = _median_of_medians(above) / _median_of_medians(below)
    lowest_above, highest_above = _range(above)
    lowest_below, highest_below = _range(below)
    if min(counts) >= _smallest_count(confidence):
        draws = bootstrap_ratios(above, below)
        low, high = _quantiles(draws, _tails(confidence))
    elif 2 / math.comb(sum(counts), counts[0]) <= 1 - confidence:
        low, high = lowest_above / highest_below, highest_above / lowest_below
    else:
        low, high = 0.0, math.inf
    return Estimate(
        value=value,
        low=min(low, value),
        high=max(high, value),
        coverage=confidence,
        count=min(counts),
        minimum=lowest_above / lowest_below,
    )


def paired_ratio(top: Sequence[ArrayLike], bottom: Sequence[ArrayLike], confidence: float = CONFIDENCE) -> Estimate:
    """The median of ``top`` over that of ``bottom`` where their groups were measured in turns, each beside its partner.

    The interval is Student's over the logarithms of the partners' ratios, and no narrower than the samples within a
    process allow. Without two pairs, or with groups of which some have no partner, it is :func:`ratio_of_medians`.
    """
    above, below = _arrays(top), _arrays(bottom)
    if len(above) != len(below) or len(above) < 2:
        return ratio_of_medians(top, bottom, confidence)
    ratios = np.log([np.median(one) / np.median(other) for one, other in zip(above, below, strict=True)])
    within = np.mean([_log_error(group, confidence) ** 2 for side in (above, below) for group in side]) * 2
    error = math.sqrt(max(float(ratios.var(ddof=1)), float(within)) / len(ratios))
    reach = student_quantile((1 + confidence) / 2, len(ratios) - 1) * error
    centre = float(ratios.mean())
    return Estimate(
        value=math.exp(centre),
        low=math.exp(centre - reach),
        high=math.exp(centre + reach),
        coverage=confidence,
        count=min(sum(group.size for group in side) for side in (above, below)),
        minimum=_range(above)[0] / _range(below)[0],
    )


def divided(top: Estimate, bottom: Estimate) -> Estimate:
    """The quotient of two independent estimates: the reaches of their logarithms add as squares."""

    def reach(estimate: Estimate, bound: float) -> float:
        return math.inf if bound in (0.0, math.inf) else abs(math.log(bound / estimate.value))

    value = top.value / bottom.value
    return Estimate(
        value=value,
        low=value * math.exp(-math.hypot(reach(top, top.low), reach(bottom, bottom.high))),
        high=value * math.exp(math.hypot(reach(top, top.high), reach(bottom, bottom.low))),
        coverage=min(top.coverage, bottom.coverage),
        count=min(top.count, bottom.count),
        minimum=top.minimum / bottom.minimum,
    )


@lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution for a probability above one half.

    With t = √ν·tan θ the density is a power of cos θ, which is summed by Simpson's rule; its integral is then inverted.
    """
    density = _COSINES ** (freedom - 1)
    pairs = (density[:-2:2] + 4 * density[1:-1:2] + density[2::2]) * (_ANGLES[1] / 3)
    integral = np.concatenate([[0.0], np.cumsum(pairs)])
    reached = (2 * probability - 1) * integral[-1]
    return math.sqrt(freedom) * math.tan(float(np.interp(reached, integral, _ANGLES[::2])))


def scaling_exponent(lengths: ArrayLike, values: ArrayLike) -> float | None:
    """The exponent p of values ∝ lengths^p by least squares on logarithms, or None without two positive points."""
    x, y = np.asarray(lengths, dtype=np.float64), np.asarray(values, dtype=np.float64)
    usable = (x > 0) & (y > 0)
    x, y = np.log(x[usable]), np.log(y[usable])
    if x.size == 0 or x.min() == x.max():
        return None
    centred = x - x.mean()
    return float(centred @ (y - y.mean()) / (centred @ centred))


@lru_cache(maxsize=4096)
def _symmetric_rank(count: int, confidence: float) -> tuple[int, float]:
    """The largest k for which the k-th smallest to the k-th largest of ``count`` reach ``confidence``, and coverage.

    k is at least one: the range is the widest interval there is.
    """
    tail, rank = 0.0, 0
    for below in range(count // 2):
        weight = math.exp(
            math.lgamma(count + 1) - math.lgamma(below + 1) - math.lgamma(count - below + 1) - count * math.log(2)
        )
        if 2 * (tail + weight) > 1 - confidence:
            break
        tail, rank = tail + weight, below + 1
    return (rank, 1 - 2 * tail) if rank else (1, 1 - 2.0 ** (1 - count))


@lru_cache(maxsize=16)
def _smallest_count(confidence: float) -> int:
    """The fewest samples whose range reaches ``confidence``: six for 95 %."""
    return math.ceil(1 - math.log2(1 - confidence))


@dataclass(frozen=True)
class _LogSpread:
    """Mean, standard error and degrees of freedom of the logarithms of processes' medians."""

    mean: float
    error: float
    freedom: int


def _log_spread(groups: list[Samples], confidence: float) -> _LogSpread:
    medians = np.log([_median(group) for group in groups])
    errors = [_log_error(group, confidence) for group in groups]
    variance = max(float(medians.var(ddof=1)), float(np.square(errors).mean()))
    return _LogSpread(float(medians.mean()), math.sqrt(variance / len(groups)), len(groups) - 1)


def _log_error(group: Samples, confidence: float) -> float:
    """Standard error of the logarithm of one process's median, by its order-statistic interval."""
    interval = median_interval(group, confidence)
    return math.log(interval.high / interval.low) / (2 * NORMAL_QUANTILE)


def _welch(above: list[Samples], below: list[Samples], confidence: float) -> Estimate:
    value = _median_of_medians(above) / _median_of_medians(below)
    top, bottom = _log_spread(above, confidence), _log_spread(below, confidence)
    error = math.hypot(top.error, bottom.error)
    parts = top.error**4 / top.freedom + bottom.error**4 / bottom.freedom
    freedom = error**4 / parts if parts else float(top.freedom + bottom.freedom)
    reach = student_quantile((1 + confidence) / 2, freedom) * error
    centre = top.mean - bottom.mean
    return Estimate(
        value=value,
        low=min(math.exp(centre - reach), value),
        high=max(math.exp(centre + reach), value),
        coverage=confidence,
        count=min(sum(group.size for group in side) for side in (above, below)),
        minimum=_range(above)[0] / _range(below)[0],
    )


def _arrays(groups: Sequence[ArrayLike]) -> list[Samples]:
    arrays = [np.asarray(group, dtype=np.float64).ravel() for group in groups]
    arrays = [group for group in arrays if group.size]
    if not arrays:
        raise ValueError("the median of no samples")
    return arrays


def _median_of_medians(groups: list[Samples]) -> float:
    return _median(np.array([_median(group) for group in groups]))


def _median(samples: Samples) -> float:
    return _middle(np.sort(samples))


def _middle(ordered: Samples) -> float:
    """The median of sorted samples: numpy's own takes ten times as long on a few, and a report needs millions."""
    half = ordered.size // 2
    return float(ordered[half]) if ordered.size % 2 else float((ordered[half - 1] + ordered[half]) / 2)


def _quantiles(draws: Samples, levels: tuple[float, float]) -> tuple[float, float]:
    """Between neighbours in order, as numpy's own."""
    ordered = np.sort(draws)
    found = []
    for level in levels:
        place = level * (ordered.size - 1)
        below = int(place)
        above = min(below + 1, ordered.size - 1)
        found.append(float(ordered[below] + (place - below) * (ordered[above] - ordered[below])))
    return found[0], found[1]


def _range(groups: list[Samples]) -> tuple[float, float]:
    return min(float(group.min()) for group in groups), max(float(group.max()) for group in groups)


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2
