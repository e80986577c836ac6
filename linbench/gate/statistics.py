"""Base against head, process by process: order, test, interval and verdict.

Four fresh processes are a block, base and head in the order ABBA or BAAB, so that a drift that is linear over a block
cancels. What is compared is the smallest and the lower quartile of the processes' medians of each side: other load only
ever makes a process slower, and the fast ones are what the code costs. The smallest is best where few processes are
undisturbed, the quartile where all scatter a little. Under the null the labels within a block are exchangeable,
whatever the distribution and however the machine drifts between blocks, so that permuting them gives an exact test.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from linbench.stats import CONFIDENCE, Estimate, student_quantile

THRESHOLD = 0.05
"""A smaller difference is none that the gate speaks of."""
LEVEL = 0.05
"""False discoveries among the cells that are called different, at most."""
EXACT_DRAWS = 50_000
"""Arrangements that are counted out; of more, so many are drawn."""
QUANTILES = (0.0, 0.25)
"""Of the processes' medians, that are compared."""
SEED = 20_26
Side = Literal["base", "head"]
_CHOICES = tuple(itertools.combinations(range(4), 2))
"""Which two of a block's four processes are called base."""


class Verdict(StrEnum):
    """Of one cell, and of a gate as a whole."""

    PASS = "PASS"
    SLOWER = "SLOWER"
    FASTER = "FASTER"
    UNDECIDED = "UNDECIDED"
    INVALID = "INVALID"
    WRONG = "WRONG"
    """Head fails, is incorrect or takes more memory where base does not: never FASTER, whatever its time."""


@dataclass(frozen=True)
class Block:
    """Medians of four processes that ran one after the other, in milliseconds."""

    base: tuple[float, float]
    head: tuple[float, float]

    @property
    def log_ratio(self) -> float:
        """Of the faster process of head over the faster one of base."""
        return math.log(min(self.head) / min(self.base))


def order(blocks: int, seed: int) -> list[tuple[Side, Side, Side, Side]]:
    """The order of the processes of each block: ABBA or BAAB, drawn."""
    generator = random.Random(seed)
    abba: tuple[Side, Side, Side, Side] = ("base", "head", "head", "base")
    baab: tuple[Side, Side, Side, Side] = ("head", "base", "base", "head")
    return [generator.choice((abba, baab)) for _ in range(blocks)]


def ratio(blocks: Sequence[Block], quantile: float = 0.0) -> float:
    """A quantile of the medians of head over that of base; 0 is the smallest."""
    base = [median for block in blocks for median in block.base]
    head = [median for block in blocks for median in block.head]
    return float(_quantile(np.array(head), quantile) / _quantile(np.array(base), quantile))


def p_value(blocks: Sequence[Block], quantile: float = 0.0) -> tuple[float, float]:
    """One-sided probabilities under the null: of a ratio that is as large, and of one that is as small.

    Exact, by all 6^n arrangements of the labels within n blocks, up to ``EXACT_DRAWS``; beyond, by as many draws and
    the arrangement that was observed.
    """
    return _p_value(tuple(blocks), quantile)


@lru_cache(maxsize=1024)
def _p_value(blocks: tuple[Block, ...], quantile: float) -> tuple[float, float]:
    """Kept: control over cells, decision and table ask for the same."""
    logs = np.log(np.array([[*block.base, *block.head] for block in blocks]))
    base = np.array([[row[list(choice)] for choice in _CHOICES] for row in logs])
    head = np.array([[np.delete(row, list(choice)) for choice in _CHOICES] for row in logs])
    chosen, places = _arrangements(len(blocks)), np.arange(len(blocks))
    above, below = (_quantile(side[places, chosen].reshape(len(chosen), -1), quantile) for side in (head, base))
    statistics: NDArray[np.float64] = above - below
    observed = statistics[0]  # the first choice of every block is as it was
    return float(np.mean(statistics >= observed - 1e-12)), float(np.mean(statistics <= observed + 1e-12))


def _quantile(values: NDArray[np.float64], quantile: float) -> NDArray[np.float64]:
    """The order statistic at or below a quantile, along the last axis."""
    place = math.floor(quantile * (values.shape[-1] - 1))
    return np.asarray(np.partition(values, place, axis=-1)[..., place])


def smaller_p(blocks: Sequence[Block]) -> tuple[float, float]:
    """As :func:`p_value`, over all ``QUANTILES``: the smaller one, times their number (Bonferroni)."""
    found = [p_value(blocks, quantile) for quantile in QUANTILES]
    larger, smaller = (min(1.0, len(QUANTILES) * min(one[side] for one in found)) for side in (0, 1))
    return larger, smaller


@lru_cache(maxsize=64)
def _arrangements(blocks: int) -> NDArray[np.intp]:
    """Rows of choices, one for each block; the first row leaves every label where it was."""
    if len(_CHOICES) ** blocks <= EXACT_DRAWS:
        return np.array(list(itertools.product(range(len(_CHOICES)), repeat=blocks)), dtype=np.intp)
    drawn = np.random.default_rng(SEED).integers(len(_CHOICES), size=(EXACT_DRAWS, blocks))
    return np.vstack([np.zeros((1, blocks), dtype=np.intp), drawn])


def interval(blocks: Sequence[Block], confidence: float = CONFIDENCE) -> Estimate:
    """The ratio of head over base with Student's interval over the blocks' log ratios."""
    logs = np.array([block.log_ratio for block in blocks])
    centre = float(logs.mean())
    if len(blocks) < 2:
        return Estimate(math.exp(centre), 0.0, math.inf, confidence, len(blocks), math.exp(centre))
    error = float(logs.std(ddof=1)) / math.sqrt(logs.size)
    reach = student_quantile((1 + confidence) / 2, logs.size - 1) * error
    return Estimate(
        value=math.exp(centre),
        low=math.exp(centre - reach),
        high=math.exp(centre + reach),
        coverage=confidence,
        count=len(blocks),
        minimum=float(np.exp(logs.min())),
    )


def floor(same: Sequence[Block], blocks: Sequence[Block] = ()) -> float:
    """What the machine makes of identical code: how far a ratio lies from one where both sides are base.

    Args:
        same: blocks of base on both sides.
        blocks: of base and head; the two processes of base in each are one more pair of the same, so that the floor
            sinks with every block.
    """
    pairs = [Block((block.base[0],) * 2, (block.base[1],) * 2) for block in blocks]
    return math.exp(abs(math.log(ratio([*same, *pairs])))) - 1


def decided(blocks: Sequence[Block], threshold: float, level: float) -> Verdict:
    """What the blocks of one cell say.

    SLOWER and FASTER take two things of one quantile: labels that cannot be exchanged at ``level``, and a ratio beyond
    the threshold. PASS takes an interval within the threshold, or ratios that lie within half of it.

    Args:
        threshold: the larger of the practical one and the cell's floor, as 0.05.
        level: of the one-sided test, after the control over cells.
    """
    ratios = [ratio(blocks, quantile) for quantile in QUANTILES]
    tests = [p_value(blocks, quantile) for quantile in QUANTILES]
    share = level / len(QUANTILES)
    if any(p <= share and one > 1 + threshold for (p, _), one in zip(tests, ratios, strict=True)):
        return Verdict.SLOWER
    if any(p <= share and one < 1 / (1 + threshold) for (_, p), one in zip(tests, ratios, strict=True)):
        return Verdict.FASTER
    near = all(one <= 1 + threshold / 2 for one in ratios)
    return Verdict.PASS if near or interval(blocks).high <= 1 + threshold else Verdict.UNDECIDED


def controlled_level(p_values: Sequence[float], level: float = LEVEL) -> float:
    """The largest p that is called a discovery (Benjamini and Hochberg 1995); 0 when none is."""
    ordered = sorted(p_values)
    passing = [p for rank, p in enumerate(ordered, 1) if p <= level * rank / len(ordered)]
    return max(passing, default=0.0)
