"""The longest sequence that fits: a search over lengths, one isolated child for each that is tried.

From a first length the search doubles until one fails (or halves until one fits), then bisects the bracket to a
relative gap. It is monotone: no length above a failed one is ever tried, and none below one that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import Protocol

from linbench.cell import Cell
from linbench.config import Choice, Config
from linbench.environment import default_threads
from linbench.execution import new_run
from linbench.plan import Step
from linbench.protocol import Nearest, NearestRequest, ProbeRequest
from linbench.record import Frontier, Probe, Run, Status
from linbench.runner import Runner
from linbench.store import RunFile, read_frontiers
from linbench.sweep import Plan, memory_limit, outline

SOURCE = Choice(name="probe", target="linbench.probing.probe")
"""Stands in for the measures, so that a change of the probe's source makes another ``code``."""
AUTOMATIC_SLACK = 0.1
"""A memory limit that follows what is available differs a little from run to run."""


class Progress(Protocol):
    """Whoever shows how far the searches are."""

    def probing(self, cell: Cell) -> None:
        """A length is about to be tried."""

    def ended(self, frontier: Frontier) -> None:
        """A search is over, or was interrupted."""


@dataclass
class Search:
    """The bracket of one series while it narrows.

    Args:
        first: the length to begin at, tokens.
        largest: no length above it is tried.
        relative_gap: the bracket is narrow enough at this share of its upper end.
        nearest: ``(wanted, above, below)`` -> the length strictly between the latter two that is there to be tried.
        probe: tries a length.
    """

    first: int
    largest: int
    relative_gap: float
    nearest: Callable[[int, int, int], Nearest]
    probe: Callable[[int], Probe]
    probes: list[Probe] = field(default_factory=list)
    complete: bool = False
    refusal: str | None = None
    """Why no length that is left can be tried, where that ended the search."""

    @property
    def fits(self) -> Probe | None:
        """The longest that is ok."""
        return max((p for p in self.probes if p.status is Status.OK), key=lambda p: p.length_tokens, default=None)

    @property
    def fails(self) -> Probe | None:
        """The shortest that is not."""
        return min((p for p in self.probes if p.status is not Status.OK), key=lambda p: p.length_tokens, default=None)

    def run(self) -> None:
        """Probe until the bracket is narrow, or nothing is left to try. May be interrupted after any probe."""
        while (wanted := self._wanted()) is not None:
            above = self.fits.length_tokens if self.fits else 0
            below = self.fails.length_tokens if self.fails else self.largest + 1
            found = self.nearest(wanted, above, below)
            if found.length_tokens is None:
                self.refusal = found.reason or "no length between can be tried"
                break
            self.probes.append(self.probe(found.length_tokens))
        self.complete = True

    def _wanted(self) -> int | None:
        """The length to try next; None when there is nothing left to find out."""
        low = self.fits.length_tokens if self.fits else 0
        if self.fails is None:
            wanted = 2 * low if low else self.first
            return min(wanted, self.largest) if low < self.largest else None
        high = self.fails.length_tokens
        if high - low <= 1 or (low and high - low <= self.relative_gap * high):
            return None
        return (low + high) // 2

    def verdict(self) -> tuple[Status, str]:
        """What stopped the search, and its reason."""
        if self.fails is not None:
            return self.fails.status, self.fails.reason or str(self.fails.status)
        if not self.complete:
            return Status.OK, "interrupted before any length failed"
        if self.refusal is not None:
            return Status.UNSUPPORTED, self.refusal
        return Status.OK, f"nothing failed up to {self.largest:,} tokens, frontier.largest"


@dataclass
class Searches:
    """All series of a configuration, and what is known of them."""

    plan: Plan
    """Each series as one step, at the largest configured length."""
    earlier: dict[str, Frontier]
    """Series -> what an earlier run found with the same code and limits, finished or not."""
    done: dict[str, Frontier]
    """Series -> its frontier."""

    @property
    def pending(self) -> list[Step]:
        """The series whose search is not over, in order."""
        return [step for step in self.plan.steps if step.cell.series() not in self.done]

    @property
    def frontiers(self) -> list[Frontier]:
        """Those that there are, in the plan's order."""
        return [self.done[series] for step in self.plan.steps if (series := step.cell.series()) in self.done]


def prepare(config: Config, runner: Runner) -> Searches:
    """Outline the series, and find what is known of them.

    Raises:
        UsageError: see :func:`linbench.sweep.outline`.
    """
    longest = config.axes.model_copy(update={"length": [max(config.axes.length)]})
    plan = outline(config.model_copy(update={"axes": longest, "measures": [SOURCE]}), runner)
    lines = read_frontiers(plan.folder.glob("*.jsonl")) if config.resume else []
    known = {step.cell.series(): _known(step, plan, lines) for step in plan.steps}
    earlier = {series: line for series, line in known.items() if line}
    done = {series: line for series, line in earlier.items() if _finished(line, config)}
    return Searches(plan, earlier, done)


def execute(searches: Searches, runner: Runner, command: str, progress: Progress) -> None:
    """Search what is pending, one line after the other onto the disk and into ``searches.done``.

    An interrupted search is written as far as it has come, before the interruption goes on.
    """
    plan = searches.plan
    run = new_run(plan, command)
    with RunFile(plan.folder, run) as results:
        for step in searches.pending:
            series = step.cell.series()
            search = _search(step, plan, runner, searches.earlier.get(series), progress)
            for frontier in _lines(search, step, plan, run):
                results.append(frontier)
                searches.done[series] = frontier
                progress.ended(frontier)


def _search(step: Step, plan: Plan, runner: Runner, earlier: Frontier | None, progress: Progress) -> Search:
    """The search of one series, which goes on from what an earlier run found."""
    asked = plan.config.frontier

    def at(length: int) -> Cell:
        return step.cell.model_copy(update={"length": length})

    def nearest(wanted: int, above: int, below: int) -> Nearest:
        try:
            return runner.nearest(NearestRequest(cell=at(wanted), above=above, below=below))
        except RuntimeError:  # the mechanism's own code ended the child: the probe will say how
            return Nearest(length_tokens=wanted)

    def probe(length: int) -> Probe:
        progress.probing(at(length))
        began = perf_counter()
        found = runner.probe(_request(at(length), plan), plan.config.time_limit_s)
        return Probe(length_tokens=length, elapsed_s=perf_counter() - began, **dict(found))

    return Search(
        first=min(step.cell.length, asked.largest),
        largest=asked.largest,
        relative_gap=asked.relative_gap,
        nearest=nearest,
        probe=probe,
        probes=[one for one in earlier.probes if one.length_tokens <= asked.largest] if earlier else [],
    )


def _lines(search: Search, step: Step, plan: Plan, run: Run) -> Iterator[Frontier]:
    """The frontier of one series; of an interrupted search as far as it has come, and then the interruption."""
    try:
        search.run()
    except KeyboardInterrupt:
        if search.probes:
            yield _line(search, step, plan, run)
        raise
    yield _line(search, step, plan, run)


def _request(cell: Cell, plan: Plan) -> ProbeRequest:
    return ProbeRequest(
        cell=cell,
        threads=int(cell.device_parameters.get("threads") or default_threads()),
        memory_limit_bytes=_memory_limit(cell, plan),
        drawing_limit_bytes=plan.memory_limit_bytes,
    )


def _memory_limit(cell: Cell, plan: Plan) -> int | None:
    return memory_limit(cell, plan) if cell.device == "cpu" else None


def _line(search: Search, step: Step, plan: Plan, run: Run) -> Frontier:
    status, reason = search.verdict()
    shown = search.fits or search.fails
    return Frontier(
        run=run.run,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        cell=step.cell.model_copy(update={"length": shown.length_tokens}) if shown else step.cell,
        code=step.prospect.code,
        status=status,
        reason=reason,
        complete=search.complete,
        longest_fitting_tokens=search.fits.length_tokens if search.fits else None,
        shortest_failing_tokens=search.fails.length_tokens if search.fails else None,
        largest_tokens=search.largest,
        relative_gap=search.relative_gap,
        memory_limit_bytes=_memory_limit(step.cell, plan),
        time_limit_s=plan.config.time_limit_s,
        probes=search.probes,
    )


def _known(step: Step, plan: Plan, lines: Sequence[Frontier]) -> Frontier | None:
    """What an earlier run found of this series with the same code and the same limits, finished or not."""
    limit = _memory_limit(step.cell, plan)
    found = [
        line
        for line in lines
        if line.cell.series() == step.cell.series()
        and line.code == step.prospect.code
        and line.time_limit_s == plan.config.time_limit_s
        and (line.memory_limit_bytes == limit or (limit and _near(line.memory_limit_bytes, limit)))
    ]
    return found[-1] if found else None


def _near(earlier: int | None, limit: int) -> bool:
    return earlier is not None and abs(earlier - limit) <= AUTOMATIC_SLACK * limit


def _finished(line: Frontier, config: Config) -> bool:
    """Whether a search that went on from this line would end at once."""
    asked = config.frontier
    return line.complete and line.largest_tokens == asked.largest and line.relative_gap == asked.relative_gap
