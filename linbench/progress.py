"""How far a sweep is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from linbench.plan import Step
from linbench.record import Record, Round, Status
from linbench.stats import median_interval


class SweepProgress:
    """Cells done, the current cell, the time left. The estimate learns from the cells that have ended.

    Args:
        steps: of the first round.
        repeated: of the further rounds, as many entries as times to be taken; fewer may be needed.
    """

    def __init__(self, steps: Sequence[Step], repeated: Sequence[Step] = (), console: Console | None = None) -> None:
        self._console = console or Console()
        self._left_s = sum(step.estimated_s for step in steps if not step.skip) + sum(s.repeat_s for s in repeated)
        self._total = len(steps) + len(repeated)
        self._repeats = Counter(step.cell.key for step in repeated)
        self._done = 0
        self._estimated_s = self._spent_s = 0.0
        self._bar = Progress(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total, left="")

    def starts(self, step: Step, index: int) -> None:
        """Show the cell that is about to run."""
        self._bar.update(self._task, description=_title(step, index), left=self._time_left())

    def ended(self, step: Step, result: Record | Round) -> None:
        """Count the cell, and print its line where there is no terminal."""
        self._done += 1
        index = result.index if isinstance(result, Round) else 0
        if not step.skip:
            estimated_s = step.repeat_s if index else step.estimated_s
            self._left_s -= estimated_s
            self._estimated_s += estimated_s
            self._spent_s += result.elapsed_s
        if not index and result.speed is None:  # it will not be timed again
            rounds = self._repeats.pop(step.cell.key, 0)
            self._total -= rounds
            self._left_s -= rounds * step.repeat_s
        self._bar.update(self._task, advance=1, total=self._total, left=self._time_left())
        told = f"{_title(step, index)}: {summary(result)}"
        if not self._console.is_terminal:
            line = f"[{self._done}/{self._total}] {told}; {self._time_left()}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif result.status not in (Status.OK, Status.NOISY) and not step.skip:
            self._bar.print(told, markup=False, highlight=False)

    def _time_left(self) -> str:
        pace = self._spent_s / self._estimated_s if self._estimated_s else 1.0
        return f"{duration(max(0.0, self._left_s * pace))} left"

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def _title(step: Step, index: int) -> str:
    return step.cell.label + (f" (round {index + 1})" if index else "")


def summary(result: Record | Round) -> str:
    """A record or a round in a few words."""
    words = [str(result.status)]
    if result.speed:
        words.append(f"{median_interval(result.speed.samples_ms).value:.4g} ms")
    if isinstance(result, Record):
        words += _measured(result)
    if result.reason:
        words.append(f"({result.reason})")
    return " ".join(words)


def _measured(record: Record) -> list[str]:
    words = []
    if record.memory:
        words.append(f"+{record.memory.increment_bytes / 2**20:.4g} MiB")
    if record.error:
        words.append(f"{record.error.reading} {record.error.relative_error:.3g}")
    return words


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``40 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
