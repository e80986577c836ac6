"""What ``linbench advise`` answers: sentences first, then the candidates, or a line for every length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from linbench.advise import Advice, Candidate
from linbench.check_table import console
from linbench.report import units
from linbench.report.names import series_names, setting_names
from linbench.report.points import Points
from linbench.report.settings import Series

LISTED = 12


def show(advice: Sequence[Advice], points: Points) -> None:
    """Print a full answer for a single length, and a table over lengths for more."""
    out = console()
    names, settings = series_names(points.series), setting_names(points.settings)
    for setting in dict.fromkeys(one.setting for one in advice):
        of_setting = [one for one in advice if one.setting == setting]
        name = settings[setting]
        parts = [name, *(part for part in (setting.shape, setting.machine) if part not in name)]
        heading = ", ".join(parts)
        if len(of_setting) == 1:
            _single(of_setting[0], names, heading, out)
        else:
            _over_lengths(of_setting, names, heading, out)


def _single(one: Advice, names: Mapping[Series, str], heading: str, out: Console) -> None:
    for line in (f"{heading}, {units.tokens(one.length)} tokens:", _answer(one, names), *_around(one, names)):
        out.print(line, markup=False, soft_wrap=True)
    table = Table()
    for column in ("mechanism", "time", "memory", "error", "kind", "why not"):
        table.add_column(column, justify="right" if column in ("time", "memory", "error") else "left")
    for candidate in [*one.ranked[:LISTED], *one.refused]:
        table.add_row(*_row(candidate, names), style="dim" if candidate.refusal else "")
    out.print(table)
    if len(one.ranked) > LISTED:
        out.print(f"{len(one.ranked) - LISTED} slower ones are not shown.", markup=False)
    if one.unmeasured:
        out.print(f"Not measured here: {', '.join(one.unmeasured)}.", markup=False, soft_wrap=True)


def _answer(one: Advice, names: Mapping[Series, str]) -> str:
    if one.best is None:
        return "Nothing that was measured keeps to these bounds."
    point = one.best.point
    assert point.latency_ms is not None
    told = f"Take {names[point.series]}: {units.latency(point.latency_ms)}"
    if point.memory_bytes is not None:
        told += f", {units.size(point.memory_bytes.value)}"
    if one.best.error is not None:
        told += f", {point.reading} {units.error(one.best.error)}"
    if one.speedup is not None:
        gain = one.speedup
        told += f"; {units.ratio(gain.value)} [{gain.low:.2f}, {gain.high:.2f}] as fast as exact softmax attention"
    elif one.exact is None:
        told += "; exact softmax attention was not measured beside it"
    return f"{told}."


def _around(one: Advice, names: Mapping[Series, str]) -> list[str]:
    lines = []
    if one.level:
        lines.append(f"Too close to tell from it: {', '.join(names[series] for series in one.level)}.")
    if one.neighbours:
        told = ", ".join(
            f"at {units.tokens(length)} {names[series] if series else 'nothing'}"
            for length, series in one.neighbours.items()
        )
        lines.append(f"At the lengths beside it: {told}.")
    return lines


def _row(one: Candidate, names: Mapping[Series, str]) -> list[str]:
    point = one.point
    return [
        names[point.series],
        units.latency(point.latency_ms) if point.latency_ms else units.MISSING,
        units.size(point.memory_bytes.value) if point.memory_bytes else units.MISSING,
        units.MISSING if one.error is None else units.error(one.error),
        point.reading or "",
        one.refusal,
    ]


def _over_lengths(advice: Sequence[Advice], names: Mapping[Series, str], heading: str, out: Console) -> None:
    table = Table(title=heading, title_justify="left")
    for column in ("tokens", "take", "time", "memory", "error", "over exact", "as good"):
        table.add_column(column, justify="left" if column in ("take", "as good") else "right")
    for one in advice:
        best, gain = one.best, one.speedup
        cells = _row(best, names) if best else ["nothing", *[units.MISSING] * 3, "", ""]
        level = ", ".join(names[series] for series in one.level)
        table.add_row(units.tokens(one.length), *cells[:4], units.ratio(gain.value) if gain else units.MISSING, level)
    out.print(table)
