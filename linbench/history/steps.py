"""Change points of a series: a rank test for one, and halves after it.

The statistic is the largest standardised sum of ranks up to a point (Pettitt 1979, weighted so that a step near an end
counts as one in the middle). Ranks, because a night with other load is an outlier and no step. Its probability comes
from permutations of the series, which are seeded: the same records always give the same answer. It is right where
nothing but a step ties the points to their order; a slow drift is found as steps, too. Outliers right before a small
step can move the place that is found by a few points; `linbench bisect` finds the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from linbench.gate.statistics import LEVEL, controlled_level

FEWEST = 3
"""Points on either side of a step."""
DRAWS = 4000
SEED = 20_27


@dataclass(frozen=True)
class Step:
    """A place where a series may have moved."""

    index: int
    """Of the first point after it."""
    p: float


def strongest(values: Sequence[float]) -> Step | None:
    """The most likely step, with the probability of one so clear in points of no order; None of fewer than six."""
    count = len(values)
    if count < 2 * FEWEST:
        return None
    ranks = _centred_ranks(np.asarray(values, dtype=np.float64))
    places = np.arange(FEWEST, count - FEWEST + 1)
    weights = np.sqrt(places * (count - places))
    observed = np.abs(np.cumsum(ranks)[places - 1]) / weights
    shuffled = np.random.default_rng(SEED).permuted(np.tile(ranks, (DRAWS, 1)), axis=1)
    drawn = (np.abs(np.cumsum(shuffled, axis=1)[:, places - 1]) / weights).max(axis=1)
    reached = int(np.sum(drawn >= observed.max() - 1e-9))
    return Step(int(places[observed.argmax()]), (1 + reached) / (1 + DRAWS))


def steps(values: Sequence[float], level: float) -> list[Step]:
    """All steps in order: the strongest, and those of the parts before and after it, each at half the level."""
    found = strongest(values)
    if found is None or found.p > level:
        return []
    before = steps(values[: found.index], level / 2)
    after = steps(values[found.index :], level / 2)
    return [*before, found, *(Step(step.index + found.index, step.p) for step in after)]


def steps_of_all(series: Sequence[Sequence[float]], level: float = LEVEL) -> list[list[Step]]:
    """The steps of each series, the level shared among them (Benjamini and Hochberg over the strongest of each)."""
    strong = [strongest(values) for values in series]
    shared = controlled_level([step.p if step else 1.0 for step in strong], level)
    return [
        steps(values, shared) if step and step.p <= shared else [] for values, step in zip(series, strong, strict=True)
    ]


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place]
    return np.asarray(ranks - ranks.mean(), dtype=np.float64)
