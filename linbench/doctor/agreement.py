"""Does the same thing take the same time again? Within a process, and in one process after another."""

from __future__ import annotations

from statistics import median

from linbench.cell import Cell
from linbench.doctor.finding import Finding
from linbench.protocol import ClockTrial, Measure, MeasureRequest
from linbench.runner import Runner
from linbench.stats import median_interval, ratio_of_medians

SPREAD_BOUND = 0.05
ROUNDS = 8
"""Processes that time the same thing: their medians should agree."""
WITHIN_BOUND = 0.02
"""Twice the precision that a cell's median is sampled to: as far as two such medians may lie apart."""
CHANCE_SHARE = 0.15
"""Pairs of equal series that may differ beyond their 95 % interval: of twenty, four or more happen once in sixty."""


def within_a_process(device: str, trial: ClockTrial) -> Finding:
    """How often, and how far, two series of the same call differ that took turns."""
    ratios = [ratio_of_medians([first], [second]) for first, second in trial.pairs_ms]
    apart = [abs(ratio.value - 1) for ratio in ratios]
    beyond = sum(ratio.sign != 0 for ratio in ratios)
    seen = (
        f"{trial.call}, {len(ratios)} pairs of series: medians differ by {median(apart):.1%}, "
        f"at most {max(apart):.1%}; {beyond} of {len(ratios)} beyond the 95 % interval"
    )
    subject = f"{device} A/A, one process"
    if beyond > CHANCE_SHARE * len(ratios):
        return Finding(subject, seen, "intervals promise more than they hold: something disturbs the machine by turns")
    if median(apart) > WITHIN_BOUND:
        return Finding(subject, seen, "times scatter too much to tell small differences: quiet the machine")
    return Finding(subject, seen)


def between_processes(runner: Runner, threads: int) -> Finding:
    """The same cell in several processes: how far do their medians lie apart?"""
    subject = "cpu A/A, processes"
    cell = Cell(mechanism="softmax", length=512)
    speed = Measure(target="linbench.measure.clock.measure_speed", parameters={"budget_s": 0.3})
    request = MeasureRequest(cell=cell, measures={"speed": speed}, threads=threads, memory_limit_bytes=None)
    medians = []
    for _ in range(ROUNDS):
        outcome = runner.measure(request, time_limit_s=60)
        if outcome.speed is None:
            return Finding(subject, f"{outcome.status}: {outcome.reason}", "repair this first")
        medians.append(median_interval(outcome.speed.samples_ms).value)
    middle = median(medians)
    spread = (max(medians) - min(medians)) / middle
    seen = f"exact attention at {cell.length} tokens took {middle:.2f} ms; {ROUNDS} processes lie within {spread:.1%}"
    advice = f"differences below {spread:.0%} mean nothing here: quiet the machine, or compare over many processes"
    return Finding(subject, seen, advice if spread > SPREAD_BOUND else None)
