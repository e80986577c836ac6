"""Is this machine fit to measure? Facts, a few quick measurements, and a verdict in plain words."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from linbench.cell import Cell
from linbench.environment import FOREIGN_CPU_BOUND, available_memory_bytes, default_threads
from linbench.protocol import Measure, MeasureRequest, SurveyRequest
from linbench.record import Environment
from linbench.runner import Runner
from linbench.stats import median_interval

SPREAD_BOUND = 0.05
ROUNDS = 8
"""Processes that time the same thing: their medians should agree."""


class Finding(NamedTuple):
    """One line of the table: what was looked at, what was seen, and what to change (None when it is well)."""

    subject: str
    seen: str
    advice: str | None = None


def examine(console: Console | None = None) -> int:
    """Print the findings and the verdict. Returns 0 when the machine is fit, 1 when something should change first."""
    console = console or Console()
    with Runner() as runner:
        survey = runner.survey(SurveyRequest(devices=["cpu", "cuda"], threads=default_threads()))
        findings = [*_machine(survey.environment), *_devices(survey.environment, survey.missing_devices)]
        for device, rates in survey.rates.items():
            seen = (
                f"{rates.flops_per_s / 1e9:.0f} GFLOP/s in fp32 products, {rates.bytes_per_s / 1e9:.1f} GB/s in copies"
            )
            findings.append(Finding(f"speed of {device}", seen))
        findings += [_idle(), _spread(runner)]
    table = Table("what", "seen", "advice", title="linbench doctor", title_justify="left")
    for finding in findings:
        table.add_row(finding.subject, finding.seen, finding.advice or "well")
    console.print(table)
    advice = [finding for finding in findings if finding.advice]
    if not advice:
        console.print("This machine is fit to measure.")
        return 0
    subjects = ", ".join(finding.subject for finding in advice)
    console.print(f"Numbers from this machine deserve doubt until this is looked at: {subjects}.")
    return 1


def _machine(environment: Environment) -> list[Finding]:
    resolution = _clock_resolution_ns()
    return [
        Finding(
            "processor", f"{environment.cpu}, {environment.cores_physical} cores, {' '.join(environment.cpu_flags)}"
        ),
        Finding(
            "threads",
            f"{environment.threads} of {environment.cores_logical} for CPU cells",
            None if environment.cores_physical > 1 else "one core is shared with everything else: expect noise",
        ),
        Finding(
            "memory", f"{available_memory_bytes() / 2**30:.1f} of {environment.memory_bytes / 2**30:.1f} GiB available"
        ),
        Finding(
            "software",
            f"torch {environment.torch}, triton {environment.triton or 'not installed'}, Python {environment.python}",
        ),
        Finding(
            "clock",
            f"{environment.clock}, resolution {resolution:.0f} ns",
            None if resolution < 1000 else "the timer is too coarse for calls under a millisecond",
        ),
        Finding(
            "governor",
            environment.governor or "not told by this system",
            "use the performance governor" if environment.governor in ("powersave", "ondemand") else None,
        ),
        _high_water_mark(),
    ]


def _devices(environment: Environment, missing: dict[str, str]) -> list[Finding]:
    gpus = ", ".join(environment.gpus) or missing.get("cuda", "none")
    return [Finding("GPU", f"{gpus}{f', driver {environment.driver}' if environment.driver else ''}")]


def _high_water_mark() -> Finding:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        return Finding(
            "CPU memory", f"no resettable high-water mark ({error})", "measure=memory needs Linux on the CPU"
        )
    return Finding("CPU memory", "the process's high-water mark can be reset")


def _clock_resolution_ns() -> float:
    """Smallest step that the timer is seen to take."""
    steps = []
    for _ in range(1000):
        start = end = time.perf_counter_ns()
        while end == start:
            end = time.perf_counter_ns()
        steps.append(end - start)
    return statistics.median(steps)


def _idle() -> Finding:
    percent = psutil.cpu_percent(interval=1.0)
    cores = percent / 100 * (psutil.cpu_count() or 1)
    busy = cores > FOREIGN_CPU_BOUND
    return Finding("other load", f"{cores:.2f} cores busy over a second", "stop what else is running" if busy else None)


def _spread(runner: Runner) -> Finding:
    """The same cell in several processes: how far do their medians lie apart?"""
    cell = Cell(mechanism="softmax", length=512, heads=8, head_dim=64, value_dim=64)
    speed = Measure(target="linbench.measure.clock.measure_speed", parameters={"budget_s": 0.3})
    request = MeasureRequest(cell=cell, measures={"speed": speed}, threads=default_threads(), memory_limit_bytes=None)
    medians = []
    for _ in range(ROUNDS):
        outcome = runner.measure(request, time_limit_s=60)
        if outcome.speed is None:
            return Finding("spread between processes", f"{outcome.status}: {outcome.reason}", "repair this first")
        medians.append(median_interval(outcome.speed.samples_ms).value)
    middle = statistics.median(medians)
    spread = (max(medians) - min(medians)) / middle
    seen = f"exact attention at 512 tokens took {middle:.2f} ms; {ROUNDS} processes lie within {spread:.1%}"
    noisy = spread > SPREAD_BOUND
    return Finding("spread between processes", seen, "differences below that spread mean nothing" if noisy else None)
