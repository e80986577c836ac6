r"""Tables for a paper: one for every setting and quantity, a row for every series, a column for every length.

They need ``\usepackage{booktabs,graphicx}``: what is wider than a line is made as wide as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from linbench.errors import UsageError
from linbench.record import Record, Run, Status
from linbench.report import units
from linbench.report.names import series_names, setting_names
from linbench.report.points import Point, Points, make_points
from linbench.report.settings import Setting

_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "·": r"$\cdot$",
    "−": r"$-$",
    "–": "--",
    "µ": r"$\mu$",
    "\u00a0": "~",
    "×": r"$\times$",
}
_FAILED = {Status.OOM: "OOM", Status.TIMEOUT: "time", Status.UNSUPPORTED: "--"}
"""What stands for a number that there is not; other failures are named."""


def _time(point: Point) -> tuple[float, str] | None:
    latency = point.latency_ms
    return None if latency is None else (latency.value, units.milliseconds(latency.value))


def _memory(point: Point) -> tuple[float, str] | None:
    memory = point.memory_bytes
    return None if memory is None else (memory.value, units.size(memory.value))


def _error(point: Point) -> tuple[float, str] | None:
    error = point.relative_error
    return None if error is None else (error.value, units.error(error.value))


QUANTITIES: dict[str, tuple[str, Callable[[Point], tuple[float, str] | None]]] = {
    "time": ("median time of one call", _time),
    "memory": ("peak memory of one call beyond its inputs", _memory),
    "error": ("relative error (replacements: distance) against exact softmax attention", _error),
}


def write(records: Sequence[Record], runs: Sequence[Run], path: Path) -> None:
    """All tables in one file; the smallest time and memory of a column are bold.

    Raises:
        UsageError: there is no record.
    """
    points = make_points(records, runs)
    names = setting_names(points.settings)
    tables = [
        table
        for setting in points.settings
        for quantity in QUANTITIES
        if (table := _table(points, setting, names[setting], quantity)) is not None
    ]
    if not tables:
        raise UsageError("export: no cell with a number, so there is no table to write")
    path.write_text("\n".join(tables), encoding="utf-8")


def _table(points: Points, setting: Setting, name: str, quantity: str) -> str | None:
    found = points.by_setting[setting]
    words, value = QUANTITIES[quantity]
    values = {(point.series, point.length): value(point) for point in found}
    if not any(values.values()):
        return None
    lengths = sorted({point.length for point in found})
    smallest = {
        length: min((one[0] for (_, n), one in values.items() if one and n == length), default=None)
        for length in lengths
    }
    statuses = {(point.series, point.length): point.status for point in found}
    rows = []
    names = series_names(list(dict.fromkeys(point.series for point in found)))
    for series in dict.fromkeys(point.series for point in found if value(point) or _answered(point.status)):
        cells = [escaped(names[series])]
        for length in lengths:
            one = values.get((series, length))
            if one is None:
                cells.append(_missing(statuses.get((series, length))))
            else:
                told = escaped(one[1])
                cells.append(rf"\textbf{{{told}}}" if one[0] == smallest[length] and quantity != "error" else told)
        rows.append(" & ".join(cells) + r" \\")
    head = " & ".join(["mechanism", *(escaped(units.tokens(length)) for length in lengths)]) + r" \\"
    shape = "" if setting.shape in name else f", {setting.shape}"
    caption = escaped(f"{words[0].upper()}{words[1:]}, by tokens: {name}{shape}.")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(lengths)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def _answered(status: Status) -> bool:
    """Whether it failed: a cell that only was not asked for this quantity is no row."""
    return status not in (Status.OK, Status.NOISY, Status.UNSUPPORTED)


def _missing(status: Status | None) -> str:
    if status is None or status in (Status.OK, Status.NOISY):
        return "--"
    return _FAILED.get(status, escaped(str(status)))


def escaped(text: str) -> str:
    """Text as LaTeX sets it."""
    return "".join(_SPECIAL.get(character, character) for character in text)
