"""The bootstrap of ratios of medians: seeded, so that the same samples always give the same draws."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
SEED = 20_17_06

Samples = NDArray[np.float64]


class _Draws(NamedTuple):
    """Which group, and which two of its samples in ascending order have the median of a resample between them."""

    chosen: NDArray[np.intp]
    lower: NDArray[np.intp]
    upper: NDArray[np.intp]


def bootstrap_ratios(above: list[Samples], below: list[Samples]) -> Samples:
    """``DRAWS`` bootstrap replicates of the ratio of the medians of both sides."""
    if len(above) == len(below) == 1:
        top, bottom = _draws_of_one(above[0].size, below[0].size)
        return _at(above, top) / _at(below, bottom)
    rng = np.random.default_rng(SEED)
    return _bootstrap_medians(above, rng) / _bootstrap_medians(below, rng)


@lru_cache(maxsize=256)
def _draws_of_one(above: int, below: int) -> tuple[_Draws, _Draws]:
    """The draws for one process on each side: they depend on the numbers of samples alone, which most cells share."""
    rng = np.random.default_rng(SEED)
    chosen = np.zeros(DRAWS, dtype=np.intp)
    return _draw([above], chosen, rng), _draw([below], chosen, rng)


def _bootstrap_medians(groups: list[Samples], rng: np.random.Generator) -> Samples:
    """``DRAWS`` bootstrap replicates of the median of the groups' medians."""
    sizes = [group.size for group in groups]
    if len(groups) == 1:
        return _at(groups, _draw(sizes, np.zeros(DRAWS, dtype=np.intp), rng))
    picks = [_at(groups, _draw(sizes, rng.integers(len(groups), size=DRAWS), rng)) for _ in groups]
    return np.asarray(np.median(np.stack(picks), axis=0), dtype=np.float64)


def _draw(sizes: list[int], chosen: NDArray[np.intp], rng: np.random.Generator) -> _Draws:
    """For each draw where the median of a resample of the chosen group lies.

    The m-th smallest of n samples drawn with replacement is the ⌈n·U⌉-th smallest of the originals, where U is the m-th
    smallest of n uniform numbers, a Beta(m, n − m + 1). One draw therefore costs one or two numbers instead of n, and
    has exactly the distribution of the usual bootstrap.
    """
    counts = np.array(sizes)
    count = counts[chosen] if counts.min() < counts.max() else counts[:1]  # one size for all draws is twice as fast
    middle = (count + 1) // 2
    lower = rng.beta(middle, count - middle + 1, size=chosen.size)
    # the next order statistic of the uniforms, needed for even counts: the smallest of those left above `lower`
    gap = 1 - rng.random(chosen.size) ** (1 / np.maximum(count - middle, 1))
    upper = np.where(count % 2 == 1, lower, lower + (1 - lower) * gap)
    places = [np.minimum((count * uniform).astype(np.intp), count - 1) for uniform in (lower, upper)]
    return _Draws(chosen, *places)


def _at(groups: list[Samples], draws: _Draws) -> Samples:
    """The medians of the resamples."""
    if len(groups) == 1:
        ordered = np.sort(groups[0])
        return np.asarray((ordered[draws.lower] + ordered[draws.upper]) / 2, dtype=np.float64)
    table = np.zeros((len(groups), max(group.size for group in groups)))
    for row, group in zip(table, groups, strict=True):
        row[: group.size] = np.sort(group)
    return np.asarray((table[draws.chosen, draws.lower] + table[draws.chosen, draws.upper]) / 2, dtype=np.float64)
