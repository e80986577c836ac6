"""The plan as a person reads it: what will run, how long it will take, what is left out and why."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from rich.console import Console
from rich.table import Table

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
    table = Table(title="Estimated seconds per cell", title_justify="left", caption_justify="left")
    for heading in ("mechanism", "implementation", "form"):
        table.add_column(heading)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for (mechanism, implementation, form), steps in _rows(plan.steps).items():
        cells = [_entry([step for step in steps if step.cell.length == length], plan) for length in lengths]
        table.add_row(mechanism, implementation, form, *cells)
    console.print(table)
    for line in _totals(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rows(steps: Iterable[Step]) -> dict[tuple[str, str, str], list[Step]]:
    rows: dict[tuple[str, str, str], list[Step]] = {}
    for step in steps:
        cell = step.cell
        form = f"{'causal' if cell.causal else 'full'} {cell.pass_} {cell.dtype} {cell.inputs} {cell.device}"
        rows.setdefault((cell.variant, cell.implementation, form), []).append(step)
    return rows


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
    seconds = sum(step.estimated_s for step in pending)
    largest = max((inputs_bytes(step.cell) for step in pending), default=0)
    lines = [
        f"{len(plan.steps)} cells: {len(pending)} to run in about {duration(seconds)}, {len(skipped)} left out, "
        f"{len(plan.finished)} finished already. Largest q, k, v: {largest / 2**20:.4g} MiB. "
        f"Time limit per cell: {plan.config.time_limit_s:g} s. Results: {plan.folder}"
    ]
    reasons: dict[str, list[Step]] = {}
    for step in skipped:
        assert step.skip is not None
        reasons.setdefault(step.skip.reason, []).append(step)
    if reasons:
        lines.append("Left out:")
    for reason, steps in reasons.items():
        names = ", ".join(dict.fromkeys(step.cell.variant for step in steps))
        lengths = ", ".join(f"{length:,}" for length in dict.fromkeys(step.cell.length for step in steps))
        lines.append(f"  {names} at {lengths} tokens: {reason}")
    lines += [f"Could not be asked, will be tried: {problem}" for problem in plan.problems]
    return lines
