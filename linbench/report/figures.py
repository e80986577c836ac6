"""Points -> the figures of a report that compare series with each other: fronts and crossovers, after the curves."""

from __future__ import annotations

from dataclasses import dataclass

from linbench.report.axes import Quantity, make_scale
from linbench.report.charts import TEXTS, Look
from linbench.report.crossover import Crossover
from linbench.report.curves import curves, ends, error_scale, shown_series
from linbench.report.fronts import ROW_POINTS, Brackets, Front
from linbench.report.names import listing, series_names, setting_names
from linbench.report.panel import Chart, Panel
from linbench.report.pareto import Across, Trade, trades
from linbench.report.points import Points
from linbench.report.settings import Setting
from linbench.report.structures import structure_charts
from linbench.report.style import make_styles
from linbench.report.units import error, tokens


@dataclass(frozen=True)
class Cost:
    """What an error is held against in a figure."""

    slug: str
    heading: str
    quantity: Quantity
    across: Across
    cheaper: str
    """What left means."""


COSTS = (
    Cost("pareto", "Speed against error", "time", lambda point: point.latency_ms, "faster"),
    Cost("memory-error", "Memory against error", "bytes", lambda point: point.memory_bytes, "less memory"),
    Cost("state-error", "Decoding state against error", "bytes", lambda point: point.state_bytes, "a smaller state"),
)


def make_look(points: Points) -> Look:
    """Styles and names of all series of a report."""
    return Look(make_styles(points.series), series_names(points.series))


def make_charts(points: Points, crossings: dict[Setting, list[Crossover]], look: Look) -> list[Chart]:
    """The figures that the records have numbers for, in the order of the page."""
    charts = [
        _crossover(points, crossings, look),
        *curves(points, look),
        *(_trade(points, look, cost) for cost in COSTS),
        *structure_charts(points, look),
    ]
    return [chart for chart in charts if chart.panels]


def _trade(points: Points, look: Look, cost: Cost) -> Chart:
    found = trades(points.by_inputs, cost.across)
    names = setting_names(points.settings)
    several = len({trade.inputs for trade in found}) > 1
    notes = [
        "Each mark is a series at the longest length that all of them answered, or that most did; left is "
        f"{cost.cheaper}, down is closer to softmax. The stair is the Pareto front: no other series has both. Pale "
        "marks are distances of other operators and never on the front; the thick grey line is the trivial predictor."
    ]
    panels = []
    for trade in found:
        scales = make_scale(ends(map(cost.across, trade.points)), cost.quantity), error_scale(trade.points)
        title = f"{names[trade.setting]}{f': {trade.inputs}' if several else ''} at {tokens(trade.length)}"
        note = _front_sentence(trade, look, cost)
        panels.append(Panel(title, Front(trade, look, *scales), trade.setting, trade.inputs, note))
    shown = shown_series((point for trade in found for point in trade.points), lambda point: point.relative_error)
    return Chart(cost.slug, cost.heading, notes, panels, shown, "relative error")


def _front_sentence(trade: Trade, look: Look, cost: Cost) -> str:
    words = TEXTS[cost.quantity]
    members = [
        f"{look.names[point.series]} ({words(paid).partition(' [')[0]}, error {error(point.relative_error.value)})"
        for point in trade.front
        if (paid := cost.across(point)) and point.relative_error
    ]
    return f"On the front: {listing(members)}." if members else "Nothing here has an error, so there is no front."


def _crossover(points: Points, crossings: dict[Setting, list[Crossover]], look: Look) -> Chart:
    names = setting_names(points.settings)
    groups = {setting: found for setting, found in crossings.items() if any(one.ratios for one in found)}
    lengths = sorted({length for found in groups.values() for one in found for length in one.ratios})
    everything = [one for found in groups.values() for one in found]
    passing = [one for one in everything if one.high is not None]
    notes = [
        "The fastest implementation of exact softmax attention at each length is the line to pass. Pale: the bracket "
        "between the longest length that is slower for sure and the shortest from which on it is faster for sure. "
        "Solid: faster. Thin grey: the lengths compared.",
        f"{len(passing)} of {len(everything)} comparisons end with the mechanism faster than exact attention.",
    ]
    panels = [
        Panel(
            names[setting],
            Brackets(found, points.by_setting[setting], look, lengths),
            setting,
            height=ROW_POINTS * (len(found) + 0.5) + 32,
            left=10,
        )
        for setting, found in groups.items()
    ]
    # the rows carry the names themselves: no legend
    return Chart("crossover", "Where exact attention is passed", notes, panels, [], "latency over that of exact")
