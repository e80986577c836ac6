"""Two runs: what moves all cells is told once, and what moves one of them is found beside it."""

from itertools import pairwise

import numpy as np
import pytest

from linbench.compare import FEWEST_CELLS, compare
from linbench.record import Round, Status

CELLS = 24


def run(record, seed, factors, scatter=0.01, rounds=3):
    """Cells of one run, each timed in some processes that lie apart by chance."""
    generator = np.random.default_rng(seed)
    records = []
    for index, factor in enumerate(factors):
        times = factor * (1 + index) * np.exp(generator.normal(0, scatter, rounds))
        samples = [list(time * np.exp(generator.normal(0, 0.005, 30))) for time in times]
        first = record("softmax", 128 + index, ms=samples[0])
        again = [
            Round(
                run=first.run,
                time=first.time,
                cell_key=first.cell.key,
                code=first.code,
                index=place,
                order=0,
                status=Status.OK,
                elapsed_s=0.1,
                speed=first.speed.model_copy(update={"samples_ms": more}),
            )
            for place, more in enumerate(samples[1:], 1)
        ]
        records.append(first.model_copy(update={"rounds": again}))
    return records


def test_a_move_of_all_cells_is_told_once_and_is_none_of_theirs(record):
    found = compare(run(record, 1, [1.0] * CELLS), run(record, 2, [1.08] * CELLS))
    assert found.common.low < 1.08 < found.common.high
    assert found.common.sign == 1
    assert sum(one.ratio.sign == 1 for one in found.cells) > CELLS / 2
    assert sum(bool(one.beside.sign) for one in found.cells) <= 2


def test_a_quarter_of_the_cells_that_becomes_slower_is_found_beside_the_move_of_all(record):
    slower = [1.08 * (1.2 if index % 4 == 0 else 1.0) for index in range(CELLS)]
    found = compare(run(record, 3, [1.0] * CELLS), run(record, 4, slower))
    signs = [one.beside.sign for one in found.cells]
    assert all(sign == 1 for sign in signs[::4])
    assert sum(bool(sign) for index, sign in enumerate(signs) if index % 4) <= 1


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_the_same_code_in_another_run_is_rarely_called_different(record, drift):
    generator = np.random.default_rng(5)
    runs = [run(record, 100 + seed, [np.exp(generator.normal(0, drift))] * CELLS) for seed in range(20)]
    found = [one.beside.sign for first, second in pairwise(runs) for one in compare(first, second).cells]
    assert np.mean(np.abs(found)) <= 0.05


def test_only_cells_that_both_runs_timed_undisturbed_are_compared(record):
    first = run(record, 6, [1.0] * 4)
    second = run(record, 7, [1.0] * 5)
    second[1] = record("softmax", 129, status="oom")
    second[2] = second[2].model_copy(update={"rounds": [], "status": Status.NOISY, "reason": "others"})
    found = compare(first, second)
    assert [one.cell.length for one in found.cells] == [128, 131]
    assert found.common is None
    assert all(one.beside is None for one in found.cells)
    assert FEWEST_CELLS > 4
