"""The roofline: which side binds, what is unknown, and that no real kernel is called impossible."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from linbench.cell import Cell
from linbench.config import Config
from linbench.prospect import Rates
from linbench.record import Cost, Environment, Peaks, Record, Speed, Status
from linbench.roofline import copy_rate, impossible_below_ms, product_rate, roofline
from linbench.sweep import Plan, request_for

KIB, MIB = 2**10, 2**20


def peaks(copies: dict[int, float] | None = None, products: dict[str, float] | None = None, threads: int = 2) -> Peaks:
    copies = {64 * KIB: 8e10, MIB: 4e10, 16 * MIB: 1e10} if copies is None else copies
    return Peaks(
        threads=threads,
        copy_bytes_per_s={str(size): rate for size, rate in copies.items()},
        product_flops_per_s={"float32": 1e11, "bfloat16": 4e11} if products is None else products,
        product_shapes={},
        method="by hand",
    )


def environment(measured: dict[str, Peaks], threads: int = 2) -> Environment:
    return Environment(
        machine="m",
        cpu="c",
        cpu_flags=[],
        cores_physical=3,
        cores_logical=3,
        threads=threads,
        memory_bytes=2**34,
        gpus=[],
        python="3.11",
        torch="2.13",
        blas="mkl",
        os="Linux",
        clock="tsc",
        linbench="0.1.0",
        peaks=measured,
    )


def record(cost: Cost | None, ms: float | None = 4.0, threads: int = 2, **cell: Any) -> Record:
    speed = Speed(
        clock="perf_counter",
        warmup_ms=[9.0],
        samples_ms=[ms, 3 * ms, 0.9 * ms] if ms else [],
        calls_per_sample=1,
        stop="converged",
        threads=threads,
    )
    return Record(
        run="r",
        time="2026-01-01T00:00:00Z",
        cell=Cell(mechanism="linear", length=7, **cell),
        code="c",
        measures=["speed"],
        status=Status.OK if ms else Status.TIMEOUT,
        reason=None if ms else "too long",
        time_limit_s=60,
        elapsed_s=1.0,
        cost=cost,
        check={"passed": True, "rows": 1, "rows_total": 1, "tolerance": 1.0} if ms else None,
        speed=speed if ms else None,
    )


def test_the_longer_side_binds_and_the_median_is_held_against_it() -> None:
    here = environment({"cpu": peaks()})
    busy = roofline(record(Cost(flops=10**8, min_bytes=MIB)), here)
    assert busy is not None
    assert (busy.bound, busy.floor_ms, busy.share) == ("flops", pytest.approx(1.0), pytest.approx(1.0 / 4.0))
    streaming = roofline(record(Cost(flops=10**3, min_bytes=16 * MIB)), here)
    assert streaming is not None
    floor_ms = 1e3 * 16 * MIB / 1e10
    assert (streaming.bound, streaming.floor_ms) == ("bytes", pytest.approx(floor_ms))
    assert streaming.share == pytest.approx(floor_ms / 4.0)


@pytest.mark.parametrize(
    ("size", "rate"),
    [
        (1, 8e10),
        (64 * KIB, 8e10),
        (256 * KIB, 6e10),  # half-way to 1 MiB in the logarithm
        (MIB, 4e10),
        (2 * MIB, 4e10 - 3e10 / 4),
        (16 * MIB, 1e10),
        (900 * MIB, 1e10),
    ],
)
def test_copy_rates_are_interpolated_over_the_logarithm_and_clamped(size: int, rate: float) -> None:
    assert copy_rate(peaks(), size) == pytest.approx(rate)


def test_no_size_is_slower_than_a_larger_one() -> None:
    seen = peaks({64 * KIB: 1e9, 256 * KIB: 5e9, MIB: 9e9, 64 * MIB: 2e9})
    rates = [copy_rate(seen, 2**power) for power in range(10, 30)]
    assert rates[:11] == [9e9] * 11  # up to 1 MiB
    assert all(a is not None and b is not None and a >= b for a, b in itertools.pairwise(rates))


def test_a_dtype_without_products_has_the_roof_of_float32() -> None:
    assert product_rate(peaks(), "bfloat16") == 4e11
    assert product_rate(peaks(), "float16") == 1e11
    assert product_rate(peaks(products={"float64": 5e10}), "float16") is None


def test_the_cells_own_dtype_sets_the_roof() -> None:
    cost = Cost(flops=10**9, min_bytes=1)
    floors = [roofline(record(cost, dtype=dtype), environment({"cpu": peaks()})) for dtype in ("float32", "bfloat16")]
    assert [one.floor_ms for one in floors if one] == pytest.approx([10.0, 2.5])


@pytest.mark.parametrize(
    ("cost", "measured", "threads"),
    [
        (Cost(flops=5, min_bytes=5), {}, 2),
        (Cost(flops=5, min_bytes=5), {"cuda": peaks()}, 2),
        (None, {"cpu": peaks()}, 2),
        (Cost(flops=5, min_bytes=5), {"cpu": peaks()}, 3),
        (Cost(flops=0, min_bytes=0), {"cpu": peaks()}, 2),
        (Cost(flops=5, min_bytes=5), {"cpu": peaks(copies={})}, 2),
        (Cost(flops=5, min_bytes=5), {"cpu": peaks(products={})}, 2),
    ],
)
def test_what_is_unknown_is_none(cost: Cost | None, measured: dict[str, Peaks], threads: int) -> None:
    assert roofline(record(cost, threads=threads), environment(measured)) is None
    assert roofline(record(cost, threads=threads), None) is None


def test_a_cell_without_a_time_has_a_floor_and_no_share() -> None:
    found = roofline(record(Cost(flops=10**8, min_bytes=1), ms=None), environment({"cpu": peaks()}))
    assert found is not None
    assert (found.floor_ms, found.share) == (pytest.approx(1.0), None)
    other = record(Cost(flops=10**8, min_bytes=1), ms=None, device_parameters={"threads": 3})
    assert roofline(other, environment({"cpu": peaks()})) is None


def test_threads_do_not_matter_on_a_gpu() -> None:
    one = record(Cost(flops=10**8, min_bytes=1), threads=9, device="cuda")
    assert roofline(one, environment({"cuda": peaks()})) is not None


def floor_of_bytes(min_bytes: int, seen: Peaks, device: str = "cpu", threads: int = 2) -> float:
    cell = Cell(mechanism="x", length=7, device=device)
    return impossible_below_ms(cell, 0, min_bytes, seen, threads)["move the mechanism's bytes"]


def test_nobody_is_judged_by_peaks_that_nobody_measured() -> None:
    assert impossible_below_ms(Cell(mechanism="x", length=7), 10, 10, None, 2) == {}


CACHES = {48 * KIB: 3.8e11, 2 * MIB: 1.1e11, 30 * MIB: 6e10, 2**40: 1.2e10}
"""A made-up processor: bytes per second of a copy in each of its caches, and in memory."""


def copied(size: int) -> float:
    """What a copy of that working set reaches on it; calls cost a microsecond."""
    rate = next(rate for cache, rate in CACHES.items() if size <= cache)
    return size / (size / rate + 1e-6)


@pytest.mark.parametrize(("gain", "disturbed"), [(1.2, 1.0), (1.2, 2.0), (1.5, 1.0), (1.5, 1.95)])
def test_a_kernel_with_hot_caches_is_never_impossible(gain: float, disturbed: float) -> None:
    """Its working set is anything between two sizes that were measured, it reads three times what it writes (or only
    reads), and a neighbour may have slowed down what cores share throughout the survey."""
    sizes = [64 * KIB * 4**step for step in range(8)]
    seen = peaks({size: copied(size) / (disturbed if size > 2 * MIB else 1) for size in sizes})
    for size in [int(2 ** (power / 8)) for power in range(8 * 10, 8 * 32)]:
        rate = next(rate for cache, rate in CACHES.items() if size <= cache)
        taken_ms = 1e3 * (size / (gain * rate) + 1e-6)
        assert taken_ms > floor_of_bytes(size, seen), size


def test_a_kernel_that_skips_most_of_its_bytes_is_impossible() -> None:
    seen = peaks({64 * KIB * 4**step: copied(64 * KIB * 4**step) for step in range(8)})
    size = 512 * MIB
    for part, caught in ((4, True), (2, False)):
        assert (1e3 * (size / part) / CACHES[2**40] < floor_of_bytes(size, seen)) is caught


def test_more_threads_than_the_peaks_had_may_move_more_and_fewer_get_no_discount() -> None:
    assert floor_of_bytes(MIB, peaks(), threads=6) == pytest.approx(floor_of_bytes(MIB, peaks()) / 3)
    assert floor_of_bytes(MIB, peaks(), threads=1) == pytest.approx(floor_of_bytes(MIB, peaks()))


def test_on_a_gpu_arithmetic_counts_at_the_fastest_dtype_with_a_fifth_to_spare() -> None:
    cell = Cell(mechanism="x", length=7, device="cuda", dtype="float32")
    floors = impossible_below_ms(cell, 10**9, 0, peaks(), 1)
    assert floors["do the mechanism's arithmetic"] == pytest.approx(1e3 * 1e9 / 4e11 / 1.2)
    assert "do the mechanism's arithmetic" not in impossible_below_ms(Cell(mechanism="x", length=7), 1, 1, peaks(), 1)


def test_the_plan_takes_its_rates_from_the_peaks() -> None:
    assert Rates.of(peaks()) == Rates(flops_per_s=1e11, bytes_per_s=1e10)
    assert Rates.of(peaks(copies={}, products={})) == Rates()


def test_a_cell_is_sent_with_the_peaks_of_its_device() -> None:
    plan = Plan([], {}, environment({"cpu": peaks()}), {}, cast(Config, None), memory_limit_bytes=2**30)
    assert request_for(Cell(mechanism="x", length=7), plan).peaks == peaks()
    assert request_for(Cell(mechanism="x", length=7, device="cuda"), plan).peaks is None
