"""A CUDA device's clocks and state, with a device and a management library that follow a script.

No test here has met a real device; what is tested is the order of what is asked of it, and what is made of the answers.
"""

# ruff: noqa: N802 (the management library names its functions so)

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.measure import clock, device_clock
from linbench.measure.call import Call
from linbench.measure.clock import measure_speed
from linbench.measure.device_clock import DeviceClock
from linbench.measure.device_watch import DeviceWatch
from linbench.mechanisms.base import Geometry
from linbench.mechanisms.linear import Linear

POWER, IDLE = 0x04, 0x01


def call(pass_: str = "forward") -> Call:
    cell = Cell(mechanism="linear", length=7, heads=2, head_dim=4, value_dim=3, pass_=pass_)  # type: ignore[arg-type]
    q, k, v = (torch.randn(1, 2, 7, width) for width in (4, 4, 3))
    return Call(cell, Linear(Geometry(2, 4, 3, False)), q, k, v)


class Timeline:
    """What was asked of the device, in order; events are a millisecond of kernels apart for each entry in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        properties = SimpleNamespace(L2_cache_size=50 * 2**20, clock_rate=1_500_000)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _device=None: self.log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append(f"hold {cycles}"))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.event())

    def event(self) -> Any:
        place: list[int] = []

        def record() -> None:
            place.append(len(self.log))
            self.log.append("event")

        return SimpleNamespace(
            record=record,
            synchronize=lambda: self.log.append("wait"),
            place=place,
            elapsed_time=lambda end: float(end.place[0] - place[0]),
        )


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    return Timeline(monkeypatch)


def test_a_call_is_timed_behind_a_held_queue_and_nothing_waits_in_between(timeline: Timeline) -> None:
    timed = call()
    timed.timed_part = lambda: lambda: timeline.log.append("kernel")  # type: ignore[method-assign, return-value, assignment]
    assert DeviceClock(torch.device("cpu")).events(timed, 1) == 2.0
    kinds = [entry.split()[0] for entry in timeline.log]
    assert kinds == ["synchronize", "hold", "event", "kernel", "event", "wait"]


def test_the_flush_is_larger_than_the_cache(timeline: Timeline) -> None:
    assert DeviceClock(torch.device("cpu"))._flush.nbytes >= 2 * 50 * 2**20


def test_the_queue_is_held_for_longer_than_handing_over_takes(timeline: Timeline) -> None:
    device = DeviceClock(torch.device("cpu"))
    device._handover_ms = 3.0
    device.events(call(), 1)
    (hold,) = [int(entry.split()[1]) for entry in timeline.log if entry.startswith("hold")]
    assert hold == 2 * 3 * 1_500_000


def test_the_hosts_clock_runs_over_many_short_calls_and_one_wait(timeline: Timeline) -> None:
    timed = call()
    timed.timed_part = lambda: lambda: timeline.log.append("kernel")  # type: ignore[method-assign, return-value, assignment]
    samples = DeviceClock(torch.device("cpu")).host(timed, expected_ms=0.5)
    assert len(samples) == device_clock.HOST_SAMPLES
    assert timeline.log[:12] == ["synchronize", *["kernel"] * 10, "synchronize"]


def test_what_cannot_be_captured_says_why(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    device = DeviceClock(torch.device("cpu"))
    assert device.graph(call()) == ([], "RuntimeError: operation not permitted when stream is capturing")
    assert device.graph(call("backward")) == ([], "the forward would have to be captured with it")


class Library:
    """A management library whose clocks are lowered as a script says, one reading after the other."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = PermissionError

    def __init__(self, reasons: Iterator[int], may_lock: bool = True) -> None:
        self._reasons, self._may_lock = reasons, may_lock
        self.locks: list[str] = []

    def nvmlDeviceGetClockInfo(self, _handle: object, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, _handle: object) -> int:
        return 412_500

    def nvmlDeviceGetTemperature(self, _handle: object, _sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, _handle: object) -> int:
        return next(self._reasons)

    def nvmlDeviceSetGpuLockedClocks(self, _handle: object, low: int, high: int) -> None:
        if not self._may_lock:
            raise PermissionError("insufficient permissions")
        self.locks.append(f"{low}-{high}")

    def nvmlDeviceResetGpuLockedClocks(self, _handle: object) -> None:
        self.locks.append("reset")


def watched(monkeypatch: pytest.MonkeyPatch, reasons: Iterator[int]) -> None:
    """Cells on the CPU, timed as if they lay on a device in the state that the script tells."""

    class Clock:
        def host(self, _call: Call, _expected_ms: float) -> list[float]:
            return [2.0, 2.0]

        def graph(self, _call: Call) -> tuple[list[float], str | None]:
            return [0.5], None

    @contextlib.contextmanager
    def timer(_call: Call) -> Iterator[tuple[Any, Any]]:
        counter = itertools.count(1)
        device = clock._Device(Clock(), DeviceWatch(Library(reasons), None), None)  # type: ignore[arg-type]
        yield (lambda _c, _n: float(next(counter))), device

    monkeypatch.setattr(clock, "_timer", timer)
    monkeypatch.setattr(clock, "BACK_OFF_S", 0.0)
    monkeypatch.setattr(clock, "WARMUP_S", 0.0)
    monkeypatch.setattr(clock, "WARMUP_LIMIT_S", 0.0)


def test_samples_with_lowered_clocks_are_set_aside_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, itertools.chain([POWER, POWER], itertools.repeat(IDLE)))
    one = call()
    speed = measure_speed(one, one.forward(), min_samples=12, max_samples=12, budget_s=60)
    assert speed.samples_ms == [float(i) for i in range(6, 18)]  # after three of warm-up and two set aside
    state = speed.device_conditions
    assert state is not None
    assert (state.discarded_samples, state.lowered_samples) == (2, 0)
    assert state.throttle_reasons == ["SwPowerCap"]
    assert (state.sm_clock_mhz[0], state.power_watts[0], state.temperature_celsius[0]) == (1980, 412.5, 61)
    assert (speed.host_ms, speed.graph_ms) == ([2.0, 2.0], [0.5])


def test_clocks_that_never_recover_leave_their_samples_and_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, itertools.repeat(POWER))
    one = call()
    speed = measure_speed(one, one.forward(), min_samples=12, max_samples=12, budget_s=0)
    assert len(speed.samples_ms) >= clock.FEWEST_SAMPLES
    assert speed.device_conditions is not None
    assert speed.device_conditions.lowered_samples > 0


def test_a_clock_is_locked_only_on_request_and_let_go_whatever_happens() -> None:
    library = Library(itertools.repeat(0))
    watch = DeviceWatch(library, None)
    with watch.locked(None):
        pass
    assert library.locks == []
    with pytest.raises(ZeroDivisionError), watch.locked(1500):
        1 / 0  # noqa: B018
    assert library.locks == ["1500-1500", "reset"]


def test_a_refused_lock_is_said_in_one_sentence() -> None:
    watch = DeviceWatch(Library(itertools.repeat(0), may_lock=False), None)
    with (
        pytest.raises(UsageError, match=r"lock_clock_mhz=1500: the driver refuses .*it needs root"),
        watch.locked(1500),
    ):
        pass
