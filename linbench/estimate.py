"""How long a cell will take, roughly: enough to plan with, not to publish."""

from __future__ import annotations

from linbench.cell import BACKWARD_PASSES, Cell, Scalar
from linbench.prospect import Prospect, Rates
from linbench.record import Cost

SUSTAINED_SHARE = 0.4
"""Share of the rates that a real mechanism reaches; the estimates are for planning only."""
STARTUP_S = 0.3
FRESH_PROCESS_S = 4.0
"""An interpreter that imports everything, where a cell's process is forked from one that has."""
SEQUENTIAL_STEP_S = 1.5e-4
"""One token of a reference that walks them: a handful of small operations."""
WARMUP_CALLS = 3
FEWEST_SAMPLES = 10
LONGEST_BUDGETS = 4
"""The three as in :mod:`linbench.measure.clock`, which this module may not import."""


def estimate_seconds(cell: Cell, prospect: Prospect, rates: Rates, measures: dict[str, dict[str, Scalar]]) -> float:
    """Seconds that the cell will take: check, warm-up, samples, memory, error. A rough guide, for the plan only."""
    if prospect.cost is None or prospect.unsupported:
        return 0.0
    call = max(prospect.cost.flops / rates.flops_per_s, prospect.cost.min_bytes / rates.bytes_per_s) / SUSTAINED_SHARE
    wide = 2 * cell.batch * cell.heads * cell.length * (cell.head_dim + cell.value_dim)
    reference = prospect.check_rows * wide * (4 if cell.pass_ in BACKWARD_PASSES else 1) / (rates.flops_per_s / 8)
    if prospect.sequential_check:
        state = cell.batch * cell.heads * cell.head_dim * cell.value_dim
        step = SEQUENTIAL_STEP_S + 8 * 8 * state / rates.bytes_per_s
        reference = cell.length * step * (4 if cell.pass_ in BACKWARD_PASSES else 1)
    seconds = STARTUP_S + call + reference + prospect.setup_flops / rates.flops_per_s / SUSTAINED_SHARE
    if (speed := measures.get("speed")) is not None:
        seconds += WARMUP_CALLS * call + _sampling_seconds(call, speed)
    if (memory := measures.get("memory")) is not None:
        seconds += float(memory.get("repeats") or 3) * call
    if (cold := measures.get("cold_start")) is not None:
        processes, calls = float(cold.get("repeats") or 3), 1 + float(cold.get("steady_calls") or 5)
        seconds += processes * (FRESH_PROCESS_S + calls * call)
    if cell.pass_ != "decode":
        seconds += _judging_seconds(cell, prospect.cost, call, rates, measures)
    return seconds


def _judging_seconds(
    cell: Cell, cost: Cost, call: float, rates: Rates, measures: dict[str, dict[str, Scalar]]
) -> float:
    """What the measures take that look at the whole output: error, structure, fit."""
    wide, seconds = 2 * cell.batch * cell.heads * cell.length * (cell.head_dim + cell.value_dim), 0.0
    if (error := measures.get("error")) is not None:
        whole = cell.length <= float(error.get("full_up_to_tokens") or 0)
        rows = cell.length if whole else float(error.get("rows") or 512)
        seconds += call + rows * wide / (rates.flops_per_s / 4)
        if cell.pass_ in BACKWARD_PASSES and cell.length <= float(error.get("gradient_tokens") or 0):
            seconds += call + 3 * cell.length * wide / (rates.flops_per_s / 4)
    if (structure := measures.get("structure")) is not None:
        probes = cell.length / cell.value_dim if float(structure.get("map_rows") or 0) else 0
        seconds += probes * call + cell.length * wide / (rates.flops_per_s / 4)
    if (fit := measures.get("fit")) is not None:
        forward = cost.flops / (3 if cell.pass_ in BACKWARD_PASSES else 1) / rates.flops_per_s
        exact = cell.length * wide / rates.flops_per_s
        seconds += float(fit.get("steps") or 300) * (4 * forward + exact) / SUSTAINED_SHARE
    return seconds


def _sampling_seconds(call: float, speed: dict[str, Scalar]) -> float:
    """What the clock allows itself for calls of ``call`` seconds."""
    budget = float(speed.get("budget_s") or 3)
    least, most = float(speed.get("min_samples") or 30) * call, float(speed.get("max_samples") or 1000) * call
    return max(min(least, LONGEST_BUDGETS * budget), FEWEST_SAMPLES * call, min(budget, most))
