"""Configuration -> list of cells, and what they will cost. Pure: no device, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from linbench.cell import Cell, Scalar
from linbench.config import Choice, Config
from linbench.record import Cost, Status


class Rates(BaseModel):
    """What the device does in a second, roughly: enough to estimate, not to publish."""

    flops_per_s: float = 2e10
    bytes_per_s: float = 5e9


class Prospect(BaseModel):
    """What a worker says of a cell before it runs."""

    cost: Cost | None = None
    code: str = Field("", description="hash of the source that will make the numbers")
    unsupported: str | None = None
    usage_error: str | None = None
    check_rows: int = 0
    sequential_check: bool = False
    """The mechanism's reference walks the tokens one by one."""


class Skip(NamedTuple):
    """A cell that will not be started: the status and the reason that its record gets."""

    status: Literal[Status.UNSUPPORTED, Status.TIMEOUT, Status.OOM]
    reason: str


class Step(NamedTuple):
    """A cell of the plan with what is known before it runs."""

    cell: Cell
    prospect: Prospect
    estimated_s: float
    skip: Skip | None


def expand(config: Config) -> list[Cell]:
    """Every cell of the configuration. Short lengths come first, and the mechanisms take turns at each length.

    A shard takes every ``shard.count``-th cell, so that each shard sees all lengths.
    """
    axes = config.axes
    shapes = itertools.product(
        axes.length,
        axes.pass_,
        axes.causal,
        axes.dtype,
        axes.batch,
        axes.heads,
        axes.head_dim,
        axes.value_dim,
        axes.seed,
    )
    cells = []
    for length, pass_, causal, dtype, batch, heads, head_dim, value_dim, seed in sorted(shapes, key=lambda s: s[0]):
        for device, inputs, mechanism, implementation in itertools.product(
            _variants(config.devices), _variants(config.inputs), _variants(config.mechanisms), axes.implementation
        ):
            cell = Cell(
                mechanism=mechanism.name,
                target=_foreign(mechanism.target),
                hyperparameters=mechanism.parameters,
                implementation=implementation,
                length=length,
                batch=batch,
                heads=heads,
                head_dim=head_dim,
                value_dim=value_dim or head_dim,
                dtype=dtype,
                causal=causal,
                pass_=pass_,
                inputs=inputs.name,
                inputs_target=_foreign(inputs.target),
                inputs_parameters=inputs.parameters,
                device=device.name,
                device_parameters=device.parameters,
                seed=seed,
            )
            cells.append(cell)
    return cells[config.shard.index :: config.shard.count]


def _foreign(target: str | None) -> str | None:
    """A target that has to be named in the cell, since its name alone does not lead to it."""
    return None if target is None or target.startswith("linbench.") else target


class _Variant(NamedTuple):
    name: str
    target: str | None
    parameters: dict[str, Scalar]


def _variants(choices: Iterable[Choice]) -> list[_Variant]:
    return [
        _Variant(choice.name, choice.target, dict(zip(choice.parameters, values, strict=True)))
        for choice in choices
        for values in itertools.product(*choice.parameters.values())
    ]


def foresee(
    cells: Sequence[Cell],
    prospects: Sequence[Prospect],
    rates: Mapping[str, Rates],
    *,
    measures: dict[str, dict[str, Scalar]],
    time_limit_s: float,
    memory_limit_bytes: int | None,
) -> list[Step]:
    """Join cells with what is known of them; decide what will not be started, and why.

    Args:
        rates: of each device, by its name.
    """
    steps = []
    for cell, prospect in zip(cells, prospects, strict=True):
        seconds = estimate_seconds(cell, prospect, rates.get(cell.device, Rates()), measures)
        steps.append(Step(cell, prospect, seconds, _skip(cell, prospect, seconds, time_limit_s, memory_limit_bytes)))
    return steps


def _skip(
    cell: Cell, prospect: Prospect, seconds: float, time_limit_s: float, memory_limit_bytes: int | None
) -> Skip | None:
    if prospect.unsupported:
        return Skip(Status.UNSUPPORTED, prospect.unsupported)
    if memory_limit_bytes is not None and inputs_bytes(cell) > memory_limit_bytes:
        needed, limit = inputs_bytes(cell) / 2**30, memory_limit_bytes / 2**30
        return Skip(Status.OOM, f"not started: q, k, v alone take {needed:.3g} GiB, the limit is {limit:.3g} GiB")
    if seconds > time_limit_s:
        return Skip(Status.TIMEOUT, f"not started: estimated {seconds:.0f} s, time_limit_s is {time_limit_s:g}")
    return None


def inputs_bytes(cell: Cell) -> int:
    """Bytes of q, k and v."""
    return cell.element_bytes * cell.batch * cell.heads * cell.length * (2 * cell.head_dim + cell.value_dim)


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
    reference = prospect.check_rows * wide * (1 if cell.pass_ == "forward" else 4) / (rates.flops_per_s / 8)
    if prospect.sequential_check:
        state = cell.batch * cell.heads * cell.head_dim * cell.value_dim
        step = SEQUENTIAL_STEP_S + 8 * 8 * state / rates.bytes_per_s
        reference = cell.length * step * (1 if cell.pass_ == "forward" else 4)
    seconds = STARTUP_S + call + reference
    if (speed := measures.get("speed")) is not None:
        seconds += WARMUP_CALLS * call + _sampling_seconds(call, speed)
    if (memory := measures.get("memory")) is not None:
        seconds += float(memory.get("repeats") or 3) * call
    if (error := measures.get("error")) is not None:
        whole = cell.length <= float(error.get("full_up_to_tokens") or 0)
        rows = cell.length if whole else float(error.get("rows") or 512)
        seconds += call + rows * wide / (rates.flops_per_s / 4)
        if cell.pass_ != "forward" and cell.length <= float(error.get("gradient_tokens") or 0):
            seconds += call + 3 * cell.length * wide / (rates.flops_per_s / 4)
    if (structure := measures.get("structure")) is not None:
        probes = cell.length / cell.value_dim if float(structure.get("map_rows") or 0) else 0
        seconds += probes * call + cell.length * wide / (rates.flops_per_s / 4)
    if (cold := measures.get("cold_start")) is not None:
        processes, calls = float(cold.get("repeats") or 3), 1 + float(cold.get("steady_calls") or 5)
        seconds += processes * (FRESH_PROCESS_S + calls * call)
    if (fit := measures.get("fit")) is not None:
        forward = prospect.cost.flops / (1 if cell.pass_ == "forward" else 3) / rates.flops_per_s
        exact = cell.length * wide / rates.flops_per_s
        seconds += float(fit.get("steps") or 300) * (4 * forward + exact) / SUSTAINED_SHARE
    return seconds


def _sampling_seconds(call: float, speed: dict[str, Scalar]) -> float:
    """What the clock allows itself for calls of ``call`` seconds."""
    budget = float(speed.get("budget_s") or 3)
    least, most = float(speed.get("min_samples") or 30) * call, float(speed.get("max_samples") or 1000) * call
    return max(min(least, LONGEST_BUDGETS * budget), FEWEST_SAMPLES * call, min(budget, most))


def backstop(failed: Cell, status: Status, reason: str, remaining: Iterable[Step]) -> Iterator[tuple[str, Skip]]:
    """Cells that need not be tried: the same as one that ran out of time or memory, but longer.

    Yields:
        the key of each such cell, and what its record will say.
    """
    if status not in (Status.OOM, Status.TIMEOUT):
        return
    series = failed.series()
    for step in remaining:
        if step.cell.length > failed.length and step.cell.series() == series and step.skip is None:
            told = f"not started: at {failed.length:,} tokens it ended in {status}: {reason}"
            yield step.cell.key, Skip(status, told)
