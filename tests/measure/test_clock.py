"""The clock: enough samples, an honest reason to stop, known sleeps recovered, and foreign load noticed."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.measure import clock
from linbench.measure.call import Call
from linbench.measure.clock import measure_speed
from linbench.measure.conditions import Watch
from linbench.mechanisms.base import Description, Geometry, Mechanism
from linbench.record import Speed


class Sleeper(Mechanism):
    """Takes a known time and returns its values."""

    description = Description("sleeps", "replacement", (False,), "none", "none", 2026)
    seconds = 0.004
    slept_ms: ClassVar[list[float]] = []
    """What every sleep took: at least as long as asked, and longer where timers are coarse or the machine is loaded."""

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return v if rows is None else v[:, :, rows]

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.sleep()
        return v * 1

    def sleep(self) -> None:
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.slept_ms.append(1e3 * (time.perf_counter() - start))

    def flops(self, cell: Cell) -> int:
        return 0

    def min_bytes(self, cell: Cell) -> int:
        return 0


def call(pass_: str = "forward") -> Call:
    cell = Cell(mechanism="sleeper", length=7, heads=2, head_dim=4, value_dim=3, pass_=pass_)  # type: ignore[arg-type]
    backward = pass_ != "forward"
    q, k, v = (torch.randn(1, 2, 7, width, requires_grad=backward) for width in (4, 4, 3))
    return Call(cell, _UsesAll(Geometry(2, 4, 3, False)), q, k, v, {}, torch.ones(1, 2, 7, 3))


def speed_of(one: Call, **settings: float) -> Speed:
    return measure_speed(one, one.forward().detach(), **settings)  # type: ignore[arg-type]


class _UsesAll(Sleeper):
    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.sleep()
        return v + q.sum(-1, keepdim=True) + k.sum(-1, keepdim=True)


@pytest.fixture
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "WARMUP_S", 0.0)
    monkeypatch.setattr(clock, "WARMUP_LIMIT_S", 0.0)


def scripted(times: Iterator[float]) -> object:
    """A timer that reads its times from a script instead of a clock."""
    return lambda _call, _calls: next(times)


@pytest.mark.usefixtures("_no_warm_up")
def test_equal_samples_converge_at_the_smallest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_wall", scripted(itertools.repeat(5.0)))
    speed = speed_of(call(), min_samples=11)
    assert speed.samples_ms == [5.0] * 11
    assert speed.stop == "converged"


@pytest.mark.usefixtures("_no_warm_up")
def test_scattered_samples_go_on_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_wall", scripted(itertools.cycle([1.0, 9.0, 2.0])))
    speed = speed_of(call(), min_samples=10, max_samples=37, budget_s=60)
    assert len(speed.samples_ms) == 37
    assert speed.stop == "sample_limit"


@pytest.mark.usefixtures("_no_warm_up")
def test_a_spent_budget_stops_only_after_the_smallest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LONGEST_BUDGETS", float("inf"))
    monkeypatch.setattr(clock, "_wall", scripted(itertools.cycle([1.0, 9.0, 2.0])))
    speed = speed_of(call(), min_samples=13, max_samples=1000, budget_s=0)
    assert len(speed.samples_ms) == 13
    assert speed.stop == "time_budget"


@pytest.mark.usefixtures("_no_warm_up")
def test_calls_that_take_many_budgets_are_fewer_and_never_called_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_wall", scripted(itertools.repeat(5.0)))
    speed = speed_of(call(), min_samples=30, budget_s=0)
    assert len(speed.samples_ms) == clock.FEWEST_SAMPLES
    assert speed.stop == "time_budget"


def test_a_warm_up_ends_when_calls_are_steady_and_says_when_they_never_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "WARMUP_S", 0.0)
    falling = [9.0, 7.0, 5.0, 4.0, 3.0, *[2.0] * 8]
    monkeypatch.setattr(clock, "_wall", scripted(itertools.chain(falling, itertools.repeat(2.0))))
    speed = speed_of(call(), min_samples=10, max_samples=10)
    assert speed.warmup_ms == falling  # only then are three of the five calls before the last five twos
    assert speed.warmup_stop == "steady"
    monkeypatch.setattr(clock, "WARMUP_LIMIT_S", 0.05)
    monkeypatch.setattr(clock, "_wall", scripted(itertools.cycle([1.0] * 5 + [2.0] * 5)))
    assert speed_of(call(), min_samples=10, max_samples=10).warmup_stop == "limit"


def test_warm_up_and_samples_are_kept_apart_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(1.0)
    monkeypatch.setattr(clock, "_wall", lambda _call, _calls: next(times))
    monkeypatch.setattr(clock, "WARMUP_S", 0.0)
    monkeypatch.setattr(clock, "WARMUP_LIMIT_S", 0.0)
    speed = speed_of(call(), min_samples=5, max_samples=5, budget_s=60)
    assert speed.warmup_ms + speed.samples_ms == [float(i) for i in range(1, 9)]


@pytest.mark.parametrize("pass_", ["forward", "forward_backward"])
def test_a_sleep_of_known_length_is_recovered(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sleeper, "slept_ms", [])
    monkeypatch.setattr(Sleeper, "seconds", 0.03)  # so that the arithmetic around it does not count
    speed = speed_of(call(pass_), min_samples=10, budget_s=0.1)
    first = 1 + len(speed.warmup_ms)  # after the call that gave the output
    slept = Sleeper.slept_ms[first : first + len(speed.samples_ms)]
    assert min(slept) >= 30.0
    assert min(speed.samples_ms) >= min(slept)
    assert statistics.median(speed.samples_ms) <= 1.05 * statistics.median(slept)


def test_the_backward_is_timed_without_its_forward() -> None:
    speed = speed_of(call("backward"), min_samples=10, budget_s=0.1)
    assert statistics.median(speed.samples_ms) < 4.0


def test_short_calls_are_timed_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sleeper, "seconds", 0.0)
    speed = speed_of(call(), min_samples=10, budget_s=0.05)
    assert speed.calls_per_sample > 1


def test_gradients_are_returned_and_never_accumulate() -> None:
    timed = call("forward_backward")
    timed.timed_part()()
    timed.timed_part()()
    assert timed.q.grad is None
    assert timed.v.grad is None


def test_a_busy_neighbour_is_noticed() -> None:
    spin = "import time; end = time.time() + 3\nwhile time.time() < end: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", spin])
    time.sleep(0.3)
    load = Watch()
    time.sleep(1.0)
    cores = load.foreign_cores()
    neighbour.kill()
    neighbour.wait()
    assert cores is not None
    assert cores > 0.3


def test_our_own_work_is_not_foreign() -> None:
    """Compared with what the neighbours did in the second before, since the machine may not be ours alone."""
    before = Watch()
    time.sleep(0.7)
    idle = before.foreign_cores()
    load = Watch()
    end = time.perf_counter() + 0.7
    while time.perf_counter() < end:
        pass
    cores = load.foreign_cores()
    assert cores is not None
    assert idle is not None
    assert cores < idle + 0.5
