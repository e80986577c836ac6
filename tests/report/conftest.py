"""Synthetic records: what a run would have written, without a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Browser

from linbench.cell import Cell
from linbench.record import Check, Environment, Error, Memory, Record, Run, Speed, Status
from linbench.report.page import write_report

BLOCKS = ("speed", "memory", "error")


def make_record(
    mechanism: str = "softmax",
    length: int = 1024,
    *,
    ms: float | list[float] = 1.0,
    increment_bytes: int = 2**20,
    relative_error: float = 0.3,
    trivial_error: float = 1.0,
    reading: str = "error",
    status: str = "ok",
    reason: str | None = None,
    blocks: tuple[str, ...] = BLOCKS,
    run: str = "night",
    code: str = "c0de",
    time: str = "2026-11-23T10:00:00Z",
    **cell: Any,
) -> Record:
    """A record of ``cell``; a single number for ``ms`` becomes twenty samples within ± 1 % of it."""
    measured = status in ("ok", "noisy")
    samples = ms if isinstance(ms, list) else [ms * (1 + 0.01 * math.sin(3 * index)) for index in range(20)]
    parts: dict[str, Any] = {"speed": _speed(samples), "memory": _memory(increment_bytes)}
    parts["error"] = _error(reading, relative_error, trivial_error)
    return Record(
        run=run,
        time=time,
        cell=Cell(mechanism=mechanism, length=length, **cell),
        code=code,
        measures=list(blocks),
        status=Status(status),
        reason=reason or (None if status == "ok" else f"it was {status}"),
        time_limit_s=60,
        elapsed_s=1.0,
        check=_check(measured) if measured or status == "incorrect" else None,
        **{name: part for name, part in parts.items() if measured and name in blocks},
    )


def _check(passed: bool) -> Check:
    return Check(passed=passed, rows=64, rows_total=1024, relative_error=1e-6, worst_row_error=1e-5, tolerance=1e-4)


def _speed(samples: list[float]) -> Speed:
    return Speed(
        clock="perf_counter",
        warmup_ms=[5.0, 2.0, 1.0],
        samples_ms=samples,
        calls_per_sample=1,
        stop="converged",
        threads=1,
        foreign_cpu_cores=0.01,
    )


def _memory(increment_bytes: int) -> Memory:
    return Memory(
        method="VmHWM", increment_bytes=increment_bytes, samples_bytes=[increment_bytes] * 3, inputs_bytes=2**20
    )


def _error(reading: str, relative_error: float, trivial_error: float) -> Error:
    return Error(
        protocol=1,
        reading=reading,
        rows=64,
        rows_total=1024,
        relative_error=relative_error,
        relative_error_interval=(relative_error * 0.95, relative_error * 1.05) if relative_error else None,
        trivial_error=trivial_error,
        exact_error=1e-6,
        skill=1 - relative_error / trivial_error,
        excess=relative_error / 1e-6,
        row_cosine_mean=0.9,
        row_error_quantiles={"p50": relative_error},
    )


def make_run(name: str = "night", machine: str = "xeon-2", **environment: Any) -> Run:
    """The first line of a results file."""
    known: dict[str, Any] = {
        "machine": machine,
        "cpu": "Intel Xeon",
        "cpu_flags": ["avx2"],
        "cores_physical": 2,
        "cores_logical": 2,
        "threads": 1,
        "memory_bytes": 8 * 2**30,
        "gpus": [],
        "python": "3.11.9",
        "torch": "2.13.0",
        "blas": "MKL",
        "os": "Linux 6.1",
        "clock": "tsc",
        "linbench": "0.1.0",
    }
    return Run(
        run=name,
        time="2026-11-23T09:00:00Z",
        command=f"linbench run +sweep={name} device=cpu",
        cells=100,
        environment=Environment(**(known | environment)),
    )


# mechanism -> (milliseconds at 1k, exponent of length, relative error at 1k, reading, bytes per token, hyperparameters)
SHAPES: dict[str, tuple[float, float, float, str, int, dict[str, Any]]] = {
    "softmax": (0.9, 2.0, 4e-7, "error", 4096, {}),
    "linear": (1.4, 1.0, 1.05, "distance", 1024, {}),
    "linformer": (1.1, 1.0, 0.61, "error", 700, {"rank": 256}),
    "performer": (2.9, 1.0, 0.42, "error", 3000, {"features": 256}),
    "longformer": (2.2, 1.05, 0.18, "error", 9000, {"window": 512}),
    "retnet": (1.9, 1.0, 1.4, "distance", 1500, {}),
}


def make_sweep(
    lengths: tuple[int, ...] = tuple(1024 * 2**power for power in range(8)),
    masks: tuple[bool, ...] = (False, True),
    **cell: Any,
) -> list[Record]:
    """Six mechanisms over ``lengths`` with realistic growth, some of which run out of memory or time."""
    rng = np.random.default_rng(0)
    records = []
    for causal in masks:
        for mechanism, (start, exponent, wrong, reading, per_token, hyperparameters) in SHAPES.items():
            for length in lengths:
                options = dict(cell, causal=causal, hyperparameters=hyperparameters, reading=reading)
                scale = length / 1024
                ms = start * scale**exponent * (1.3 if causal and mechanism != "softmax" else 1.0)
                if mechanism == "linformer" and causal:
                    options |= {"status": "unsupported", "reason": "linformer has no causal form"}
                elif ms > 9000:
                    options |= {"status": "timeout", "reason": "no answer within 60 s"}
                elif mechanism == "longformer" and length > 65536:
                    options |= {"status": "oom", "reason": "tried to allocate 9.00 GiB with 3.10 GiB free"}
                elif mechanism == "retnet" and length == 4096:
                    options |= {"status": "noisy", "reason": "interval of ± 8 % after 200 samples"}
                samples = (ms * (1 + 0.04 * rng.gamma(1.5, size=15 if ms < 500 else 10))).tolist()
                records.append(
                    make_record(
                        mechanism,
                        length,
                        ms=samples,
                        increment_bytes=0 if mechanism == "softmax" and length < 2048 else int(per_token * length),
                        relative_error=wrong * scale**0.08,
                        trivial_error=0.8 * scale**0.05,
                        **options,
                    )
                )
    return records


@pytest.fixture
def record() -> Callable[..., Record]:
    return make_record


@pytest.fixture
def run() -> Callable[..., Run]:
    return make_run


@pytest.fixture
def sweep() -> Callable[..., list[Record]]:
    return make_sweep


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


@pytest.fixture
def opened(browser, tmp_path, run, monkeypatch):
    """Writes a report, opens its page, and finds nothing to complain of when all is done."""

    def write(records, runs=None, **options):
        # the page draws its figures itself; those of the files take most of the time of a report
        monkeypatch.setattr("linbench.report.page.save_files", lambda *_: None)
        page = write_report(records, [run()] if runs is None else runs, tmp_path / "report", "A title")
        browser.open(page, **options)
        return browser

    yield write
    assert browser.complaints() == []
    assert all(url.startswith("file:///") for url in browser.requests())
    assert len(browser.requests()) == 1


@pytest.fixture
def small(sweep):
    return sweep(lengths=(1024, 2048, 4096, 8192))
