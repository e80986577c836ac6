"""The gate's statistics: exact where they can be, at their level where they are simulated, and right on recorded noise.

``noise.json``: medians of processes in the order in which they ran, of softmax (sdpa) and linear attention (lin) on one
or two threads of a virtual machine with two cores: quiet, with a busy loop beside (load), or among other work.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from linbench.gate.statistics import (
    QUANTILES,
    THRESHOLD,
    Block,
    Verdict,
    controlled_level,
    decided,
    floor,
    interval,
    order,
    p_value,
    ratio,
    smaller_p,
)

NOISE = {name: one["median_us"] for name, one in json.loads((Path(__file__).parent / "noise.json").read_text()).items()}
ONE_THREAD = ["quiet_sdpa1", "quiet_lin1", "load_sdpa1", "contended_sdpa1"]


def blocks_of(series, count, factor, seed):
    """Blocks as the gate makes them of processes that ran one after the other; head is slower by a factor."""
    blocks = []
    for index, sides in enumerate(order(count, seed)):
        four = list(zip(series[4 * index : 4 * index + 4], sides, strict=True))
        base = tuple(median for median, side in four if side == "base")
        blocks.append(Block(base, tuple(factor * median for median, side in four if side == "head")))
    return blocks


def gate(series, start, factor, most=12):
    """What the gate says of a window of a series: floor, six blocks, three more while it is undecided."""
    window = list(itertools.islice(itertools.cycle(series), start, start + 12 + 4 * most))
    same = blocks_of(window[:12], 3, 1.0, start)
    for count in range(6, most + 1, 3):
        blocks = blocks_of(window[12:], count, factor, start + 1)
        threshold = max(THRESHOLD, floor(same, blocks))
        verdict = decided(blocks, threshold, controlled_level(smaller_p(blocks)))
        if verdict is not Verdict.UNDECIDED:
            break
    return verdict


@pytest.mark.parametrize("name", NOISE)
def test_identical_code_is_never_called_slower_on_recorded_noise(name):
    series = NOISE[name]
    found = [gate(series, start, 1.0) for start in range(0, len(series), 11)]
    assert np.mean([verdict is Verdict.SLOWER for verdict in found]) <= 0.05


@pytest.mark.parametrize("name", ONE_THREAD)
def test_a_tenth_more_is_found_on_recorded_noise_of_one_thread(name):
    series = NOISE[name]
    found = [gate(series, start, 1.1) for start in range(0, len(series), 7)]
    assert np.mean([verdict is Verdict.SLOWER for verdict in found]) >= 0.8


@pytest.mark.parametrize("quantile", QUANTILES)
def test_the_permutation_test_counts_all_arrangements(quantile):
    generator = np.random.default_rng(3)
    blocks = [Block(tuple(generator.lognormal(size=2)), tuple(generator.lognormal(size=2))) for _ in range(3)]
    observed = math.log(ratio(blocks, quantile))
    statistics = []
    for choices in itertools.product(itertools.combinations(range(4), 2), repeat=3):
        base, head = [], []
        for block, choice in zip(blocks, choices, strict=True):
            for index, median in enumerate((*block.base, *block.head)):
                (base if index in choice else head).append(median)
        place = math.floor(quantile * 5)
        statistics.append(math.log(sorted(head)[place] / sorted(base)[place]))
    expected = (
        np.mean([one >= observed - 1e-12 for one in statistics]),
        np.mean([one <= observed + 1e-12 for one in statistics]),
    )
    assert p_value(blocks, quantile) == pytest.approx(expected)


def test_the_test_keeps_its_level_whatever_the_noise():
    generator = np.random.default_rng(5)
    found = []
    for _ in range(200):
        slow = generator.random((5, 4)) < 0.3
        drift = np.exp(np.linspace(0, generator.normal(0, 0.1), 5))[:, None]
        times = drift * np.where(slow, 2.0, 1.0) * np.exp(generator.normal(0, 0.02, (5, 4)))
        found.append(smaller_p([Block(tuple(row[[0, 3]]), tuple(row[[1, 2]])) for row in times])[0])
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_the_interval_covers_the_true_ratio():
    generator = np.random.default_rng(7)
    inside = []
    for _ in range(1500):
        blocks = [
            Block(tuple(generator.lognormal(0, 0.05, 2)), tuple(1.2 * generator.lognormal(0, 0.05, 2)))
            for _ in range(6)
        ]
        found = interval(blocks)
        inside.append(found.low <= 1.2 <= found.high)
    assert np.mean(inside) >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / 1500)


def test_a_drift_that_is_linear_over_a_block_cancels():
    blocks = [blocks_of([1.0, 1.1, 1.2, 1.3], 1, 1.0, seed)[0] for seed in range(4)]
    assert {round(sum(block.base), 12) for block in blocks} == {2.3}
    assert {round(sum(block.head), 12) for block in blocks} == {2.3}


def test_orders_are_abba_or_baab_and_drawn():
    orders = order(40, 1)
    assert {"".join(side[0] for side in one) for one in orders} == {"bhhb", "hbbh"}
    assert orders == order(40, 1)
    assert orders != order(40, 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_level_over_cells_is_that_of_benjamini_and_hochberg(seed):
    p_values = np.random.default_rng(seed).beta(0.4, 1.0, 30)
    discovered = p_values <= controlled_level(list(p_values), 0.05)
    assert list(discovered) == list(scipy_stats.false_discovery_control(p_values) <= 0.05)


def test_a_wide_floor_takes_more_to_be_slower():
    blocks = [Block((1.0, 1.001), (1.1, 1.101))] * 6
    assert decided(blocks, 0.05, 0.05) is Verdict.SLOWER
    assert decided(blocks, 0.12, 0.05) is Verdict.PASS
    assert decided([Block(block.head, block.base) for block in blocks], 0.05, 0.05) is Verdict.FASTER


def test_what_scatters_more_than_the_threshold_is_undecided():
    blocks = [Block((1.0, 1.3), (1.04, 0.9)), Block((1.2, 1.0), (1.4, 1.04))]
    assert decided(blocks, 0.05, 0.0) is Verdict.PASS or interval(blocks).high > 1.05
    assert decided([Block((1.0, 1.0), (1.04, 1.2)), Block((1.0, 1.0), (1.05, 1.3))], 0.05, 0.0) is Verdict.UNDECIDED


def test_the_floor_sinks_with_further_processes_of_base():
    same = [Block((1.0, 1.0), (1.08, 1.08))]
    assert floor(same) == pytest.approx(0.08)
    assert floor(same, [Block((0.99, 1.0), (2.0, 2.0))]) == pytest.approx(1.0 / 0.99 - 1)
