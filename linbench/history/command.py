"""``linbench history``: a metric over commits, as a person reads it, as JSON and as a picture."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from linbench.check_table import console
from linbench.errors import UsageError
from linbench.gate.statistics import LEVEL, THRESHOLD
from linbench.history.causes import Cause, Move, moves_of
from linbench.history.series import METRICS, Series, commits_of, every_series
from linbench.history.steps import FEWEST, steps_of_all
from linbench.store import read_history, results_files
from linbench.verbs import VERBS, Parser

STYLES = {
    Cause.REAL: "bold red",
    Cause.METHOD: "yellow",
    Cause.HARDWARE: "cyan",
    Cause.NOISE: "dim",
    Cause.OPEN: "bold",
}
BARS = "▁▂▃▄▅▆▇█"
WIDEST = 40
"""Points of a line that are drawn: the newest."""


def run(argv: Sequence[str]) -> int:
    """Print series and moves.

    Returns:
        0: a history judges nothing.

    Raises:
        UsageError: no records, or none that fit.
    """
    parser = Parser(prog="linbench history", description=VERBS["history"])
    parser.add_argument("paths", nargs="*", default=["results"], help="results files or folders (default: results)")
    parser.add_argument("--metric", choices=list(METRICS), default="latency", help="default: %(default)s")
    parser.add_argument("--mechanism", nargs="+", help="only these (default: all)")
    parser.add_argument("--machine", help="a folder of results/ (default: all)")
    parser.add_argument("--repository", type=Path, default=Path(), help="whose HEAD orders the commits (default: here)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="smallest move (default: %(default)g)")
    parser.add_argument("--all", action="store_true", help="series that did not move, too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the moves there (.png or .svg)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write series and moves there, too")
    options = parser.parse_args(argv)
    if not options.threshold > 0:
        raise UsageError(f"history: --threshold {options.threshold:g}: a share above 0 is needed, as 0.05")
    everything = _read([Path(path) for path in options.paths], options.metric, options.repository)
    shown = [
        one
        for one in everything
        if (not options.mechanism or one.cell.mechanism in options.mechanism)
        and (not options.machine or one.machine == options.machine)
    ]
    if not shown:
        names = ", ".join(sorted({f"{one.cell.mechanism} on {one.machine}" for one in everything}))
        raise UsageError(f"history: no such mechanism or machine; there are {names}")
    found = steps_of_all([one.values for one in shown], LEVEL)
    moves = [
        move
        for one, steps in zip(shown, found, strict=True)
        for move in moves_of(one, steps, everything, options.threshold)
    ]
    show(shown, moves, options.metric, everything=options.all)
    if options.json is not None:
        options.json.write_text(json.dumps(plain(shown, moves, options.metric), indent=1) + "\n", encoding="utf-8")
    if options.output is not None:
        from linbench.history.picture import draw

        draw(shown, moves, METRICS[options.metric][0], options.output)
        print(f"Picture: {options.output}")
    return 0


def _read(paths: Sequence[Path], metric: str, repository: Path) -> list[Series]:
    runs, records = read_history(results_files(paths))
    order = commits_of(repository)
    known = {run.environment.commit for run in runs} & set(order)
    if not known:
        told = "no record is of a commit that HEAD has here" if order else f"{repository} is no git repository"
        print(f"linbench: {told}: records go by their time", file=sys.stderr)
    found = every_series(runs, records, METRICS[metric][1], order if known else [])
    if not found:
        raise UsageError(f"history: no record has a {metric} at a commit; runs with uncommitted changes do not count")
    return found


def show(series: Sequence[Series], moves: Sequence[Move], metric: str, *, everything: bool) -> None:
    """A line for each series that moved (for all, if so asked), a line for each move, and how many there are."""
    out = console()
    moved = {id(move.series) for move in moves}
    lines = [one for one in series if everything or id(one) in moved]
    if lines:
        table = Table(title=f"{metric} in {METRICS[metric][0]}, by commit", title_justify="left")
        for heading in ("cell", "machine", "points", "first", "last", ""):
            table.add_column(heading, justify="right" if heading in ("points", "first", "last") else "left")
        for one in lines:
            ends = (f"{value:.4g}" for value in (one.values[0], one.values[-1]))
            table.add_row(one.cell.label, one.machine, str(len(one.points)), *ends, bars(one.values))
        out.print(table)
    if moves:
        table = Table(title="moves", title_justify="left")
        for heading in ("cell", "from", "to", "after over before", "p", "cause", "why"):
            table.add_column(heading, justify="left", overflow="fold")
        for move in moves:
            table.add_row(*_row(move), style=STYLES[move.cause])
        out.print(table)
    counts = Counter(move.cause for move in moves)
    told = ", ".join(f"{counts[cause]} {cause}" for cause in Cause if counts[cause]) or "none"
    short = sum(len(one.points) < 2 * FEWEST for one in series)
    few = f"; {short} have fewer than {2 * FEWEST} points, in which no move can be told" if short else ""
    out.print(f"{len(series)} series{few}. Moves: {told}.", markup=False, soft_wrap=True)


def bars(values: Sequence[float]) -> str:
    """One block for each of the newest values, from the smallest of them to the largest."""
    newest = values[-WIDEST:]
    low, high = min(newest), max(newest)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in newest)


def plain(series: Sequence[Series], moves: Sequence[Move], metric: str) -> dict[str, Any]:
    """The same for a machine."""
    return {
        "metric": metric,
        "unit": METRICS[metric][0],
        "series": [
            {
                "machine": one.machine,
                "cell": one.cell.model_dump(mode="json", by_alias=True),
                "points": [
                    {"commit": point.environment.commit, "time": point.record.time, "value": point.value}
                    for point in one.points
                ],
                "moves": [_plain(move) for move in moves if move.series is one],
            }
            for one in series
        ],
    }


def _plain(move: Move) -> dict[str, Any]:
    before, after = move.series.points[move.index - 1], move.series.points[move.index]
    return {
        "index": move.index,
        "before": before.environment.commit,
        "after": after.environment.commit,
        "ratio": asdict(move.ratio),
        "p": move.p,
        "cause": str(move.cause),
        "reason": move.reason,
    }


def _row(move: Move) -> list[str]:
    before, after = move.series.points[move.index - 1], move.series.points[move.index]
    ratio = f"{move.ratio.value:.3f} [{move.ratio.low:.3f}, {move.ratio.high:.3f}]"
    return [move.series.cell.label, before.commit, after.commit, ratio, f"{move.p:.4f}", str(move.cause), move.reason]
