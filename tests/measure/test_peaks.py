"""Measured peaks: on a device of a known speed they are that speed, and what a device lacks is left out."""

from __future__ import annotations

import time

import pytest
import torch

from linbench.measure import peaks
from linbench.measure.peaks import best_s, measure_peaks, working_sets

CPU = torch.device("cpu")
MIB = 2**20


class Device:
    """A fake clock: every call of an action takes what the script says."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def read_ns(self) -> int:
        return round(1e9 * self.now_s)

    def read(self) -> float:
        return self.now_s


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    monkeypatch.setattr(time, "perf_counter_ns", fake.read_ns)
    monkeypatch.setattr(time, "perf_counter", fake.read)
    return fake


def test_the_best_of_several_calls_counts_and_the_first_never(device: Device) -> None:
    seconds = iter([0.001, 0.009, 0.007, 0.004])  # the warm-up is the fastest, as if it had done nothing

    def action() -> None:
        device.now_s += next(seconds)

    assert best_s(action, CPU, box_s=0.0) == pytest.approx(0.004)


def test_short_calls_are_timed_many_at_once(device: Device) -> None:
    calls = 0

    def action() -> None:
        nonlocal calls
        calls += 1
        device.now_s += 1e-6

    assert best_s(action, CPU, box_s=0.0) == pytest.approx(1e-6)
    assert 2 + 2 * 100 <= calls <= 2 + 2 * 101


def test_a_device_of_known_speed_gets_that_speed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products at 20 GFLOP/s in all dtypes but one, copies at 5 GB/s."""

    def multiply(left: torch.Tensor, right: torch.Tensor) -> object:
        rate = 0.5e9 if left.dtype == torch.float16 else 2e10
        flops = 2 * left.numel() * right.shape[-1]

        def action() -> None:
            device.now_s += flops / rate

        return action

    def copy(written: torch.Tensor, read: torch.Tensor) -> object:
        def action() -> None:
            device.now_s += 4 * (written.numel() + read.numel()) / 5e9

        return action

    monkeypatch.setattr(peaks, "_multiplying", multiply)
    monkeypatch.setattr(peaks, "_copying", copy)
    monkeypatch.setattr(peaks, "_available_bytes", lambda _: 128 * MIB)
    found = measure_peaks(CPU)
    assert found.product_flops_per_s == pytest.approx(dict.fromkeys(("float64", "float32", "bfloat16"), 2e10), rel=1e-3)
    assert found.copy_bytes_per_s == pytest.approx(dict.fromkeys(found.copy_bytes_per_s, 5e9), rel=1e-3)
    assert max(map(int, found.copy_bytes_per_s)) == 32 * MIB
    assert found.product_shapes.keys() == found.product_flops_per_s.keys()


def test_a_dtype_that_the_device_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(left: torch.Tensor, right: torch.Tensor) -> object:
        if left.dtype != torch.float32:
            raise RuntimeError('"addmm" not implemented for this type')
        return lambda: left @ right

    monkeypatch.setattr(peaks, "_multiplying", multiply)
    monkeypatch.setattr(peaks, "_available_bytes", lambda _: 4 * MIB)
    monkeypatch.setattr(peaks, "WIDTHS", (64, 128))
    assert list(measure_peaks(CPU).product_flops_per_s) == ["float32"]


@pytest.mark.parametrize(
    ("cache", "available", "largest"),
    [
        (0, 2**36, 2**28),
        (32 * MIB, 2**36, 2**28),  # 256 MiB are eight such caches
        (192 * MIB, 2**36, 384 * MIB),
        (2**30, 2**36, 2**29),
        (32 * MIB, 2**27, 2**25),  # a quarter of what there is
        (32 * MIB, 1000, 2**16),
    ],
)
def test_working_sets_end_beyond_the_cache_and_within_the_memory(cache: int, available: int, largest: int) -> None:
    sizes = working_sets(cache, available, "cpu")
    assert sizes[0] == 2**16
    assert sizes[-1] == largest
    assert sizes == sorted(set(sizes))
    assert all(size % 8 == 0 for size in sizes)


def test_precision_of_float32_is_full_while_measuring_and_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()

    def product(_device: torch.device, _dtype: str) -> None:
        seen.add(torch.get_float32_matmul_precision())

    monkeypatch.setattr(peaks, "_fastest_product", product)
    monkeypatch.setattr(peaks, "_copy_rates", lambda _: {})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert measure_peaks(CPU).product_flops_per_s == {}
        assert seen == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
