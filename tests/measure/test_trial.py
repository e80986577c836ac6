"""The clock on trial: known kernels through the functions that time a cell, on made-up clocks and a made-up device."""

from __future__ import annotations

import itertools
import statistics
import time

import pytest

from linbench.cell import Cell
from linbench.measure import clock, trial
from linbench.measure.call import Call
from linbench.worker import prepare


@pytest.fixture
def call() -> Call:
    return prepare(Cell(mechanism="linear", length=6, heads=2, head_dim=4, value_dim=3))


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by 20 ns whenever it is read."""
    now_ns = itertools.count(0, 20)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(now_ns))


@pytest.mark.usefixtures("_ticking")
def test_a_known_kernel_takes_what_it_says_and_the_clock_adds_its_own_readings(call: Call) -> None:
    for kernel in trial.known_kernels(call):
        assert len(kernel.measured_us) == len(kernel.lengths_us) == trial.SAMPLES
        assert set(kernel.lengths_us) == {kernel.nominal_us}
        added = {round(m - n, 6) for m, n in zip(kernel.measured_us, kernel.lengths_us, strict=True)}
        (added_us,) = added
        assert 0 < added_us <= 0.04  # two readings around each sample, and one before each wait


def test_the_kernels_go_through_the_clock_of_cells(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = clock._wall
    asked: dict[int, int] = {}

    def slow(one: Call, calls: int) -> float:
        asked[calls] = asked.get(calls, 0) + 1
        return real(one, calls) + 0.003

    monkeypatch.setattr(clock, "_wall", slow)
    monkeypatch.setattr(trial, "KNOWN_US", (10.0, 500.0))
    for kernel in trial.known_kernels(call):
        differences = [m - n for m, n in zip(kernel.measured_us, kernel.lengths_us, strict=True)]
        assert statistics.median(differences) >= 3.0
        assert min(kernel.lengths_us) >= kernel.nominal_us
    assert asked == {100: trial.SAMPLES + 1, 2: trial.SAMPLES + 1}  # a millisecond a sample


def test_the_series_of_a_pair_take_turns_and_each_goes_first_as_often(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(clock, "_wall", lambda _call, _calls: float(next(numbers)))
    monkeypatch.setattr(trial, "WARMUP_S", 0.0)
    monkeypatch.setattr(trial, "PAIRS", 2)
    monkeypatch.setattr(trial, "PAIR_SAMPLES", 4)
    assert trial.against_itself(call) == [
        ([1.0, 4.0, 5.0, 8.0], [2.0, 3.0, 6.0, 7.0]),
        ([9.0, 12.0, 13.0, 16.0], [10.0, 11.0, 14.0, 15.0]),
    ]


def test_cycles_of_a_device_are_calibrated_without_what_a_launch_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_slept_ms", lambda cycles: 0.007 + cycles / 1.5e6)  # 1.5 GHz
    assert trial._cuda_wait(100.0).cycles == 150_000
    monkeypatch.setattr(trial, "_slept_ms", lambda _cycles: 0.007)
    with pytest.raises(RuntimeError, match="does not grow"):
        trial._cuda_wait(100.0)


def test_a_wait_on_the_device_has_the_length_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr("torch.cuda._sleep", slept.append)
    wait = trial._CudaWait(25.0, 40_000)
    wait()
    assert (slept, wait.lengths_us) == ([40_000], [25.0])
