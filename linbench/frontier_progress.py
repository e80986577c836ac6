"""How far the searches for frontiers are: the length that is being tried on a terminal, a line for each series."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape

from linbench.cell import Cell
from linbench.record import Frontier, Status


class FrontierProgress:
    """Series done, and the length that is being tried."""

    def __init__(self, series: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total = series
        self._done = 0
        self._status = self._console.status("")

    def probing(self, cell: Cell) -> None:
        """Show the length that is about to be tried."""
        self._status.update(f"{self._done}/{self._total} {escape(cell.label)}")

    def ended(self, frontier: Frontier) -> None:
        """Print the line of a series whose search is over."""
        self._done += 1
        cell = frontier.cell
        mask = "causal" if cell.causal else "full"
        name = f"{cell.variant}/{cell.implementation} {mask} {cell.pass_} {cell.dtype} {cell.inputs} {cell.device}"
        line = f"[{self._done}/{self._total}] {name}: {summary(frontier)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> FrontierProgress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._status.stop()


def summary(frontier: Frontier) -> str:
    """A frontier in a few words: ``fits at 6,144 tokens (+812 MiB), at 6,656 oom: …``."""
    fits, fails = frontier.longest_fitting_tokens, frontier.shortest_failing_tokens
    words = f"fits at {fits:,} tokens" if fits else "fits at no length that was tried"
    peak = next((probe.peak_bytes for probe in frontier.probes if probe.length_tokens == fits), None)
    if peak is not None:
        words += f" (+{peak / 2**20:.4g} MiB)"
    if fails is not None:
        words += f", at {fails:,} {frontier.status}"
    elif frontier.status is Status.UNSUPPORTED:
        words += ", no longer one is supported" if fits else "; unsupported"
    return f"{words}: {frontier.reason}{'' if frontier.complete else ' (interrupted)'}"
