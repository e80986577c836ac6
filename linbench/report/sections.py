"""Sections of plain tables that a report has only where its records fill them: growth, targets, fits, ranks, papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from linbench.record import Block, ColdStart, Error, Fit, Memory, Record, Structure
from linbench.report.names import series_names, setting_names, variant_names
from linbench.report.points import Point, Points
from linbench.report.settings import Series
from linbench.report.units import MISSING, error, milliseconds, size, skill, tokens

Kind = TypeVar("Kind", bound=Block)


@dataclass(frozen=True)
class Grid:
    """A table of text: the first column names the rows, the others are numbers ready to be shown."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A heading, what is to be known before reading, and tables."""

    slug: str
    heading: str
    notes: list[str]
    grids: list[Grid] = field(default_factory=list)


def target_section(points: Points) -> Section | None:
    """Errors against what a mechanism approximates, where that is not softmax of the same q and k."""

    def row(block: Error) -> list[str]:
        if block.target_error is None or block.target_trivial_error is None:
            return []
        gained = 1 - block.target_error / block.target_trivial_error if block.target_trivial_error else None
        own = [error(block.target_error), skill(gained) if gained is not None else MISSING]
        return [*own, error(block.relative_error)]

    grids = _grids(points, lambda record: record.error, row, ["Error, own target", "Skill, own target", "Softmax"])
    notes = [
        "Some mechanisms approximate another operator than softmax of q·kᵀ/√D: the first two columns judge them "
        "against that, as their documentation defines it, the last one against softmax."
    ]
    return Section("targets", "Against their own target", notes, grids) if grids else None


def fit_section(points: Points) -> Section | None:
    """Errors before and after fitting."""

    def row(block: Fit) -> list[str]:
        skills = [skill(value) if value is not None else MISSING for value in (block.initial_skill, block.fitted_skill)]
        errors = (error(block.initial_error), error(block.fitted_error))
        selected = block.steps if block.selected_step is None else block.selected_step
        return [*errors, *skills, f"{block.parameters:,}", f"{selected} of {block.steps}"]

    columns = ["Error as initialised", "Error after fitting", "Skill as initialised", "Skill after fitting"]
    columns += ["Fitted", "Steps"]
    grids = _grids(points, lambda record: record.fit, row, columns)
    notes = [
        "Projections of q, k, v and the output, gates and the mechanism's own parameters were fitted to exact softmax "
        "on other draws of the same inputs; the draw that judges was not seen. “Fitted” counts the numbers learned, "
        "“Steps” those after which a further draw, kept for that, had the least loss: 0 of them if nothing helped. "
        "Before the first step the projections are identities and the gates half-way open."
    ]
    return Section("fits", "After fitting", notes, grids) if grids else None


def rank_section(points: Points) -> Section | None:
    """Ranks of outputs beside those of exact softmax."""

    def row(block: Structure) -> list[str]:
        ranks = (block.output_effective_rank, block.output_numerical_rank)
        exact = (block.exact_effective_rank, block.exact_numerical_rank)
        return [*(f"{value:.1f}" for value in (*ranks, *exact)), str(block.largest_rank)]

    columns = ["Effective rank", "Numerical rank", "Softmax, effective", "Softmax, numerical", "Largest possible"]
    grids = _grids(points, lambda record: record.structure, row, columns)
    notes = [
        "Of the output of a head, mean over heads. The effective rank is exp of the entropy of the singular values; "
        "the numerical rank counts those above one hundredth of the largest."
    ]
    return Section("ranks", "Rank of the output", notes, grids) if grids else None


def map_section(points: Points) -> Section | None:
    """Implied attention maps beside those of exact softmax, and which mechanisms have none."""

    def row(block: Structure) -> list[str]:
        found = block.attention
        if found is None:
            return []
        entropy = MISSING if found.entropy_nats is None else f"{found.entropy_nats:.2f}"
        divergence = MISSING if found.divergence_nats is None else f"{round(found.divergence_nats, 2) + 0.0:.2f}"
        return [
            f"{entropy} ({found.exact_entropy_nats:.2f})",
            f"{found.total_variation:.2f}",
            divergence,
            MISSING if found.top_overlap is None else f"{found.top_overlap:.0%}",
            f"{found.row_sum_min:.3g} … {found.row_sum_max:.3g}",
            f"{found.negative_mass:.1%}",
            f"{found.effective_rank:.1f} ({found.exact_effective_rank:.1f})",
            f"{found.distance_tokens:.0f} ({found.exact_distance_tokens:.0f})",
        ]

    columns = ["Entropy, nats", "Total variation", "Divergence, nats", "Top keys found", "Row sums", "Negative"]
    columns += ["Effective rank", "Distance, tokens"]
    grids = _grids(points, lambda record: record.structure, row, columns)
    notes = [
        "The matrix that the mechanism applies to the values, probed with columns of the identity at sampled rows; "
        "what exact softmax has stands in brackets. Entropy and divergence (from softmax) need rows that are "
        "distributions. Total variation is half the sum of the sizes of the differences to softmax's row, “top keys "
        "found” the share of softmax's largest weights among the largest of the map, “distance” the mean number of "
        "tokens between query and key."
    ]
    names = variant_names(points.series)
    reasons = {
        f"{names[point.series]} ({record.structure.attention_reason})": None
        for point in points.by_inputs
        for record in point.measured
        if record.structure is not None and record.structure.attention_reason is not None
    }
    if reasons:
        notes.append(f"Without a map: {'; '.join(reasons)}.")
    return Section("maps", "Attention maps", notes, grids) if grids else None


def kept_section(points: Points) -> Section | None:
    """Memory during a call beside what is kept after it: for the backward, and for the next token."""

    def row(block: Memory) -> list[str]:
        kept = (block.saved_for_backward_bytes, block.state_bytes)
        if kept == (None, None):
            return []
        figures = (block.increment_bytes, *kept, block.total_peak_bytes, block.reserved_bytes, block.driver_bytes)
        told = [MISSING if value is None else size(value) for value in figures]
        told[2] += f" at {tokens(block.state_tokens)}" if block.state_tokens else ""
        return told

    columns = ["Memory", "Saved for backward", "Decoding state", "Peak in all", "Reserved", "Driver"]
    grids = _grids(points, lambda record: record.memory, row, columns, series_names)
    notes = [
        "“Memory” is the rise of one call above the level before it, “saved for backward” what stays allocated after a "
        "forward beyond its output, “decoding state” what the next token needs of those before it, after as many "
        "tokens as are named. “Peak in all” counts the inputs, on the CPU also the libraries of the process. Reserved "
        "(by torch's allocator) and driver are of CUDA."
    ]
    return Section("kept", "Memory that is kept", notes, grids) if grids else None


def cold_start_section(points: Points) -> Section | None:
    """The stages of a fresh process up to a steady call."""

    def row(block: ColdStart) -> list[str]:
        steady = [value for calls in block.steady_calls_ms for value in calls]
        before = (block.interpreter_ms, block.import_torch_ms, block.import_mechanism_ms, block.device_ms)
        stages = (*before, block.build_ms, block.first_call_ms, steady, block.compile_ms, block.autotune_ms)
        told = [MISSING if values is None else milliseconds(median(values)) for values in stages]
        cache = MISSING if block.compiler_cache is None else ", ".join(block.compiler_cache)
        return [*told, cache, str(len(block.first_call_ms))]

    columns = ["Interpreter", "Import torch", "Import mechanism", "Device", "Build", "First call", "Steady call"]
    columns += ["Compile", "Autotune", "Compiler cache", "Processes"]
    grids = _grids(points, lambda record: record.cold_start, row, columns, series_names)
    notes = [
        "Medians over fresh processes. “Interpreter” is the time to the first line that runs, “import mechanism” that "
        "of its module after torch, “compile” what the first call takes longer than a steady one of the same process. "
        "The operating system, and the compiler where there is one, keep caches between processes."
    ]
    return Section("cold-start", "Cold start", notes, grids) if grids else None


def _grids(
    points: Points,
    block: Callable[[Record], Kind | None],
    row: Callable[[Kind], list[str]],
    columns: list[str],
    naming: Callable[[Sequence[Series]], dict[Series, str]] = variant_names,
) -> list[Grid]:
    """One grid for each setting, family of inputs and length in which some record has the block.

    ``naming`` is :func:`series_names` for numbers that depend on the implementation.
    """
    names, settings = naming(points.series), setting_names(points.settings)
    grids = []
    for (setting, inputs, length), ordered in points.by_table.items():
        filled = [(names[point.series], _cells(point, block, row)) for point in ordered]
        rows = [[name, *cells] for name, cells in filled if cells]
        if rows:
            caption = f"{settings[setting]}, {inputs} inputs, {tokens(length)} tokens"
            grids.append(Grid(caption, ["Mechanism", *columns], rows))
    return grids


def _cells(point: Point, block: Callable[[Record], Kind | None], row: Callable[[Kind], list[str]]) -> list[str]:
    for record in point.measured:
        found = block(record)
        if found is not None:
            return row(found)
    return []
