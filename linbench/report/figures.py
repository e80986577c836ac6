"""Points -> the five figures of a report, each with the sentences that explain it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from linbench.report.axes import Quantity, Scale, make_error_scale, make_scale
from linbench.report.charts import ROW_POINTS, Lines, Look, Value, draw_crossovers, draw_trade, failing, strip_height
from linbench.report.crossover import Crossover
from linbench.report.names import listing, series_names, setting_names
from linbench.report.panel import Panel
from linbench.report.pareto import Trade, common_length, trades
from linbench.report.points import EXACT, Point, Points, Series, Setting
from linbench.report.style import make_styles
from linbench.report.units import error, milliseconds, size, tokens
from linbench.stats import Estimate, scaling_exponent

_MOST_NAMED = 6


@dataclass(frozen=True)
class Chart:
    """A figure: panels, the series that they show, and what to see in them."""

    slug: str
    """File name of its PNG."""
    heading: str
    notes: list[str]
    panels: list[Panel]
    legend: list[Series]


def make_look(points: Points) -> Look:
    """Styles and names of all series of a report."""
    return Look(make_styles(points.series), series_names(points.series))


def make_charts(points: Points, crossings: dict[Setting, list[Crossover]], look: Look) -> list[Chart]:
    """The figures that the records have numbers for, in the order of the page."""
    charts = [
        _latency(points, look),
        _memory(points, look),
        _error(points, look),
        _trade(points, look),
        _crossover(points, crossings, look),
    ]
    return [chart for chart in charts if chart.panels]


def _latency(points: Points, look: Look) -> Chart:
    notes = [
        "Median time of one call over the number of tokens; vertical bars are 95 % intervals (often smaller than the "
        "mark). A word in the strip above the lines marks where a series failed instead of answering.",
        *_slopes(points, look),
    ]
    panels = _line_panels(points, look, lambda point: point.latency_ms, "time")
    return Chart("latency", "Latency over length", notes, panels, _shown(points.pooled, lambda point: point.latency_ms))


def _slopes(points: Points, look: Look) -> list[str]:
    """How time grows over the upper half of the lengths, in the setting with the most points."""
    setting, group = max(points.by_setting.items(), key=lambda item: len(item[1]), default=(None, []))
    growth = []
    for series in points.series:
        timed = [
            (point.length, point.latency_ms.value) for point in group if point.series == series and point.latency_ms
        ]
        upper = sorted(timed)[-max(3, (len(timed) + 1) // 2) :]
        exponent = scaling_exponent([x for x, _ in upper], [y for _, y in upper]) if len(upper) > 2 else None
        if exponent is not None:
            growth.append(f"{look.names[series]} N^{exponent:.2f}".replace("-", "−"))
    if not growth or setting is None:
        return []
    more = f" and {len(growth) - _MOST_NAMED} more" if len(growth) > _MOST_NAMED else ""
    name = setting_names(points.settings)[setting]
    return [f"Growth over the upper half of the lengths measured ({name}): {', '.join(growth[:_MOST_NAMED])}{more}."]


def _memory(points: Points, look: Look) -> Chart:
    notes = ["Peak memory of one call beyond what was there before it: inputs and parameters are not counted."]
    known = [(point, point.memory_bytes.value) for point in points.pooled if point.memory_bytes]
    length = common_length([point for point, _ in known]) if known else 0
    there = sorted((pair for pair in known if pair[0].length == length), key=lambda pair: pair[1])
    if len(there) > 1:
        (least, lowest), (most, highest) = there[0], there[-1]
        notes.append(
            f"At {tokens(length)} the least was {size(lowest)} ({look.names[least.series]}) and the most "
            f"{size(highest)} ({look.names[most.series]})."
        )
    if any(value <= 0 for _, value in known):
        notes.append("Where the system saw no increment, the mark lies on the lower edge, at 0.")
    panels = _line_panels(points, look, lambda point: point.memory_bytes, "bytes")
    shown = _shown(points.pooled, lambda point: point.memory_bytes)
    return Chart("memory", "Memory increment over length", notes, panels, shown)


def _line_panels(points: Points, look: Look, value: Value, quantity: Quantity) -> list[Panel]:
    """One panel for each setting; those of one device share their axes, so that they can be compared by eye."""
    names = setting_names(points.settings)
    groups = [(s, names[s], group) for s, group in points.by_setting.items() if any(value(point) for point in group)]
    panels = []
    for setting, name, group in groups:
        shared = [other for s, _, other in groups if (s.machine, s.device) == (setting.machine, setting.device)]
        lines = Lines(group, value, look, *_shared(shared, value, quantity))
        panels.append(lines.panel(name))
    return panels


def _shared(groups: Sequence[Sequence[Point]], value: Value, quantity: Quantity) -> tuple[Scale, list[int], float]:
    """Scale, lengths and height of the strip of failures for panels that share their axes."""
    estimates = [estimate for group in groups for point in group if (estimate := value(point))]
    lengths = sorted({point.length for group in groups for point in group})
    strip = strip_height(max(len(failing(group)) for group in groups))
    return make_scale(_ends(estimates), quantity), lengths, strip


def _error(points: Points, look: Look) -> Chart:
    groups = _error_groups(points)
    notes = [
        "Relative Frobenius error against exact softmax attention in fp64, by family of inputs. The thick grey line is "
        "the trivial predictor, the mean of the visible values: at or above it nothing of the attention is left. "
        "For a mechanism that is another operator than softmax the number is a distance, not an error.",
    ]
    distances = sorted({point.series.mechanism for point in points.pooled if point.reading == "distance"})
    if distances:
        notes.append(f"Distances, not errors: {listing(distances)}.")
    if any(_error_scale(group).edge_label == "exact" for group in groups.values()):
        rounding = [estimate.value for group in groups.values() for estimate in _exact_errors(group)]
        notes.append(
            f"Exact attention errs by rounding alone, by {error(min(rounding))} to {error(max(rounding))}: far below "
            "the others, so its marks lie on the lower edge."
        )
    panels = []
    for title, group in groups.items():
        _, lengths, strip = _shared([group], lambda point: point.relative_error, "error")
        lines = Lines(group, lambda p: p.relative_error, look, _error_scale(group), lengths, strip, trivial=True)
        panels.append(lines.panel(title))
    shown = _shown((point for group in groups.values() for point in group), lambda point: point.relative_error)
    return Chart("error", "Error over length", notes, panels, shown)


def _error_scale(points: Sequence[Point]) -> Scale:
    others = _ends(point.relative_error for point in points if point.series.mechanism != EXACT)
    trivial = [value for point in points if (value := point.error_median("trivial_error"))]
    return make_error_scale(_ends(_exact_errors(points)), others + trivial if others else [])


def _exact_errors(points: Sequence[Point]) -> list[Estimate]:
    return [estimate for p in points if p.series.mechanism == EXACT and (estimate := p.relative_error)]


def _error_groups(points: Points) -> dict[str, list[Point]]:
    """Title -> points with one family of inputs; of several passes, whose error is the same, only the first."""
    names = setting_names(points.settings, with_pass=False)
    several = len({point.inputs for point in points.by_inputs}) > 1
    chosen: dict[tuple[str, str], Setting] = {}
    groups: dict[str, list[Point]] = {}
    with_error = {(point.setting, point.inputs) for point in points.by_inputs if point.errors}
    for point in sorted(points.by_inputs, key=lambda point: (point.setting.order, point.inputs or "")):
        name, inputs = names[point.setting], point.inputs or ""
        if (point.setting, inputs) in with_error and chosen.setdefault((name, inputs), point.setting) == point.setting:
            groups.setdefault(f"{name}: {inputs}" if several else name, []).append(point)
    return groups


def _trade(points: Points, look: Look) -> Chart:
    found = trades(points.by_inputs)
    names = setting_names(points.settings)
    several = len({trade.inputs for trade in found}) > 1
    notes = [
        "Each mark is a series at the longest length that all of them answered, or that most did; left is faster, down "
        "is closer to softmax. The stair is the Pareto front: no other series is both as fast and as close. Pale marks "
        "are distances of other operators and never on the front; the thick grey line is the trivial predictor."
    ]
    panels = []
    for trade in found:
        speeds = make_scale(_ends(point.latency_ms for point in trade.points), "time")
        wrong = _error_scale(trade.points)
        title = f"{names[trade.setting]}{f': {trade.inputs}' if several else ''} at {tokens(trade.length)}"
        panels.append(Panel(title, partial(draw_trade, trade=trade, look=look, speed=speeds, error=wrong)))
    notes += [_front_sentence(trade, names[trade.setting], look) for trade in found[:_MOST_NAMED]]
    shown = _shown((point for trade in found for point in trade.points), lambda point: point.relative_error)
    return Chart("pareto", "Speed against error", notes, panels, shown)


def _front_sentence(trade: Trade, name: str, look: Look) -> str:
    where = f"{name}, {trade.inputs}, {tokens(trade.length)}"
    members = [
        f"{look.names[p.series]} ({milliseconds(p.latency_ms.value)}, error {error(p.relative_error.value)})"
        for p in trade.front
        if p.latency_ms and p.relative_error
    ]
    return f"On the front ({where}): {listing(members)}." if members else f"On the front ({where}): none has an error."


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
            partial(draw_crossovers, found=found, look=look, lengths=lengths),
            height=ROW_POINTS * (len(found) + 0.5) + 32,
            left=10,
        )
        for setting, found in groups.items()
    ]
    # the rows carry the names themselves: no legend
    return Chart("crossover", "Where exact attention is passed", notes, panels, [])


def _shown(points: Iterable[Point], value: Callable[[Point], Estimate | None]) -> list[Series]:
    """The series with a value or a failure to show, in order."""
    group = list(points)
    found = {point.series for point in group if value(point)} | set(failing(group))
    return sorted(found, key=lambda series: series.order)


def _ends(estimates: Iterable[Estimate | None]) -> list[float]:
    return [bound for estimate in estimates if estimate for bound in (estimate.low, estimate.high)]
