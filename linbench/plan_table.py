"""The plan as a person reads it: what will run, how long it will take, what is left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from linbench.cell import Cell, Scalar
from linbench.plan import Step, inputs_bytes
from linbench.progress import duration
from linbench.record import Status
from linbench.sweep import Plan

SIGNS = {Status.UNSUPPORTED: "–", Status.TIMEOUT: "too long", Status.OOM: "too large"}


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan: a row per mechanism and form, a column per length, then totals and what is left out."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 200))  # a pipe has no width to keep to
    lengths = sorted({step.cell.length for step in plan.steps})
    table = Table(title="Estimated seconds per cell", title_justify="left")
    for heading in ("mechanism", "implementation", "form"):
        table.add_column(heading)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for row, steps in _rows(plan.steps).items():
        cells = [_entry([step for step in steps if step.cell.length == length], plan) for length in lengths]
        table.add_row(*row, *cells)
    console.print(table)
    for line in _totals(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rows(steps: Sequence[Step]) -> dict[tuple[str, str, str], list[Step]]:
    """Steps by mechanism, implementation and form, each named by what sets it apart in this plan."""
    names = _variants(step.cell for step in steps)
    forms = {step.cell.key: _form(step.cell) for step in steps}
    common = set.intersection(*(set(form) for form in forms.values())) if len(steps) > 1 else set()
    rows: dict[tuple[str, str, str], list[Step]] = {}
    for step in steps:
        form = " ".join(word for word in forms[step.cell.key] if word not in common)
        rows.setdefault((names[step.cell.key], step.cell.implementation, form), []).append(step)
    return rows


def _form(cell: Cell) -> list[str]:
    inputs = ", ".join(f"{name}={value}" for name, value in cell.inputs_parameters.items())
    shape = f"B={cell.batch} H={cell.heads} D={cell.head_dim} M={cell.value_dim}"
    mask = "causal" if cell.causal else "full"
    return [mask, cell.pass_, cell.dtype, f"{cell.inputs}({inputs})", shape, f"seed={cell.seed}", cell.device]


def _variants(cells: Iterable[Cell]) -> dict[str, str]:
    """Cell key -> mechanism, with those hyperparameters that take several values in this plan."""
    listed = list(cells)
    values: dict[tuple[str, str], set[Scalar]] = {}
    for cell in listed:
        for name, value in cell.hyperparameters.items():
            values.setdefault((cell.mechanism, name), set()).add(value)
    names = {}
    for cell in listed:
        varying = {n: v for n, v in cell.hyperparameters.items() if len(values[cell.mechanism, n]) > 1}
        names[cell.key] = cell.model_copy(update={"hyperparameters": varying}).variant
    return names


def _entry(steps: list[Step], plan: Plan) -> str:
    if not steps:
        return ""
    if all(step.cell.key in plan.finished for step in steps):
        return "finished"
    if skipped := next((step.skip for step in steps if step.skip), None):
        return SIGNS[skipped.status]
    if any(step.prospect.cost is None for step in steps):
        return "unknown"
    return f"{fmean(step.estimated_s for step in steps):.1f}"


def _totals(plan: Plan) -> list[str]:
    pending = [step for step in plan.pending if not step.skip]
    skipped = [step for step in plan.pending if step.skip]
    seconds = sum(step.estimated_s for step in pending) + sum(step.repeat_s for step in plan.repeated)
    largest = max((inputs_bytes(step.cell) for step in pending), default=0)
    return [
        f"{len(plan.steps)} cells: {len(pending)} to run in about {duration(seconds)}, {len(skipped)} left out, "
        f"{len(plan.finished)} finished already; {plan.config.rounds} rounds of timing. "
        f"Largest q, k, v: {largest / 2**20:.4g} MiB. "
        f"Time limit per cell: {plan.config.time_limit_s:g} s. Results: {plan.folder}",
        *(["Left out:"] if skipped else []),
        *_left_out(skipped),
        *(f"Could not be asked, will be tried: {problem}" for problem in plan.problems),
    ]


def _left_out(skipped: Sequence[Step]) -> list[str]:
    """A line per mechanism and kind of reason; the reasons of one kind differ in their numbers only."""
    groups: dict[tuple[str, str, Status], dict[int, str]] = {}
    names = _variants(step.cell for step in skipped)
    for step in skipped:
        assert step.skip is not None
        group = (names[step.cell.key], "causal" if step.cell.causal else "full", step.skip.status)
        groups.setdefault(group, {}).setdefault(step.cell.length, step.skip.reason)
    lines = []
    for (name, mask, _), reasons in groups.items():
        lengths = ", ".join(f"{length:,}" for length in sorted(reasons))
        told = list(dict.fromkeys(reasons.values()))
        more = f" (and longer: up to {told[-1].removeprefix('not started: ')})" if len(told) > 1 else ""
        lines.append(f"  {name} {mask} at {lengths} tokens: {told[0]}{more}")
    return lines
