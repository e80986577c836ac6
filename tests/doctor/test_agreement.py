"""A/A: equal series are found equal, unequal ones unequal, and processes that disagree are named."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from linbench.doctor.agreement import ROUNDS, between_processes, within_a_process
from linbench.protocol import ClockTrial, MeasureRequest, Outcome
from linbench.record import Check, Speed, Status
from linbench.runner import Runner


def trial(scatter: float, difference: float, seed: int = 3) -> ClockTrial:
    """Twenty pairs around 2 ms with one-sided noise; the second series of each is slower by ``difference``."""
    rng = np.random.default_rng(seed)
    noise = 2 * (1 + scatter * rng.exponential(size=(20, 2, 15)))
    pairs = [(first.tolist(), ((1 + difference) * second).tolist()) for first, second in noise]
    return ClockTrial(kernels=[], call="something", pairs_ms=pairs)


@pytest.mark.parametrize("seed", range(5))
def test_equal_series_are_well(seed: int) -> None:
    assert within_a_process("cpu", trial(0.02, 0.0, seed)).advice is None


def test_series_that_differ_beyond_their_intervals_are_found() -> None:
    finding = within_a_process("cpu", trial(0.005, 0.015))
    assert "promise more than they hold" in (finding.advice or "")
    assert "20 pairs of series" in finding.seen


def test_series_that_scatter_are_found_even_where_intervals_are_honest() -> None:
    finding = within_a_process("cpu", trial(0.5, 0.0))
    assert "scatter too much" in (finding.advice or "")


class Processes:
    """A runner whose processes take what the script says."""

    def __init__(self, medians_ms: list[float], status: Status = Status.OK) -> None:
        self.medians_ms = iter(medians_ms)
        self.status = status
        self.threads: set[int] = set()

    def measure(self, request: MeasureRequest, time_limit_s: float) -> Outcome:
        self.threads.add(request.threads)
        if self.status is Status.CRASH:
            return Outcome(status=self.status, reason="SIGILL")
        speed = Speed(
            clock="perf_counter",
            warmup_ms=[9.0],
            samples_ms=[next(self.medians_ms)] * 7,
            calls_per_sample=1,
            stop="converged",
            threads=request.threads,
        )
        return Outcome(status=self.status, check=Check(passed=True, rows=1, rows_total=1, tolerance=1.0), speed=speed)


def test_processes_that_agree_are_well() -> None:
    processes = Processes([5.0, 5.1, 5.05, 5.2] * 2)
    finding = between_processes(cast(Runner, processes), threads=3)
    assert finding.advice is None
    assert "within 3.9%" in finding.seen
    assert processes.threads == {3}


def test_one_process_that_disagrees_is_found() -> None:
    finding = between_processes(cast(Runner, Processes([5.0] * (ROUNDS - 1) + [6.0])), threads=1)
    assert "below 20% mean nothing" in (finding.advice or "")


def test_a_cell_that_fails_is_the_finding() -> None:
    finding = between_processes(cast(Runner, Processes([], Status.CRASH)), threads=1)
    assert finding.seen == "crash: SIGILL"
    assert finding.advice is not None
