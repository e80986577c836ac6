"""Points -> the figures over the length: latency, throughput, memory, error, skill and the share of the roofline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from linbench.report.axes import Quantity, Scale, make_error_scale, make_scale
from linbench.report.charts import Lines, Look, Value, failing, strip_height
from linbench.report.names import listing, setting_names
from linbench.report.panel import Chart
from linbench.report.pareto import common_length
from linbench.report.points import Point, Points
from linbench.report.settings import EXACT, Series, Setting
from linbench.report.units import error, size, tokens
from linbench.stats import Estimate, scaling_exponent

_MOST_NAMED = 6
DECODE = "decode"

Notes = Callable[[Points, Look, Value], list[str]]


@dataclass(frozen=True)
class Curve:
    """A figure over the length of what does not depend on the inputs: one panel for each setting."""

    slug: str
    heading: str
    quantity: Quantity
    unit: str
    value: Value
    notes: Notes
    passes: Callable[[str], bool] = lambda _: True
    """Which passes it shows."""


def curves(points: Points, look: Look) -> list[Chart]:
    """In the order of the page; some may be without panels."""
    return [
        *(_pooled(points, look, curve) for curve in _make_curves(points)),
        _error(points, look),
        _skill(points, look),
    ]


def _make_curves(points: Points) -> tuple[Curve, ...]:
    def share(point: Point) -> Estimate | None:
        return point.roofline_share(points.environments)

    return (
        Curve("latency", "Latency over length", "time", "ms", _latency, _latency_notes, lambda pass_: pass_ != DECODE),
        Curve("decode", "Decode latency over context", "time", "ms", _latency, _decode_notes, DECODE.__eq__),
        Curve("throughput", "Throughput over length", "rate", "tokens/s", _rate, _throughput_notes),
        Curve("memory", "Memory increment over length", "bytes", "bytes", _memory, _memory_notes),
        Curve("roofline", "Share of the roofline over length", "share", "1", share, _roofline_notes),
    )


def _latency(point: Point) -> Estimate | None:
    return point.latency_ms


def _rate(point: Point) -> Estimate | None:
    return point.tokens_per_s


def _memory(point: Point) -> Estimate | None:
    return point.memory_bytes


def _pooled(points: Points, look: Look, curve: Curve) -> Chart:
    """One panel for each setting; those of one device share their axes, so that they can be compared by eye."""
    names = setting_names(points.settings)
    groups = [
        (setting, names[setting], group)
        for setting, group in points.by_setting.items()
        if curve.passes(setting.pass_) and any(curve.value(point) for point in group)
    ]
    of_device: dict[tuple[str, str], list[list[Point]]] = defaultdict(list)
    for setting, _, group in groups:
        of_device[setting.machine, setting.device].append(group)
    shared = {device: _shared(every, curve.value, curve.quantity) for device, every in of_device.items()}
    panels = [
        Lines(group, curve.value, look, *shared[setting.machine, setting.device]).panel(name)
        for setting, name, group in groups
    ]
    shown = shown_series((point for _, _, group in groups for point in group), curve.value)
    notes = curve.notes(points, look, curve.value) if panels else []
    if curve.quantity in ("time", "rate") and any(point.launch_bound for _, _, group in groups for point in group):
        notes.append("A ring marks cells that launches decide: they say more of Python and the driver.")
    return Chart(curve.slug, curve.heading, notes, panels, shown, curve.unit)


def _latency_notes(points: Points, look: Look, _: Value) -> list[str]:
    return [
        "Median time of one call over the number of tokens; vertical bars are 95 % intervals (often smaller than the "
        "mark). A word in the strip above the lines marks where a series failed instead of answering.",
        *_slopes(points, look),
    ]


def _decode_notes(_: Points, __: Look, ___: Value) -> list[str]:
    return ["Median time of one decoding step, the N-th token from the state of those before it, over N."]


def _throughput_notes(_: Points, __: Look, ___: Value) -> list[str]:
    return [
        "Tokens of all sequences of the batch over the median time of one call; a decoding step counts one token for "
        "each sequence. Level is linear growth of the time, falling is faster growth."
    ]


def _roofline_notes(_: Points, __: Look, ___: Value) -> list[str]:
    return [
        "The least time that the measured peaks of the device allow the arithmetic and the bytes of the mechanism's "
        "cost model, over the latency: 100 % is as fast as the peaks allow."
    ]


def _slopes(points: Points, look: Look) -> list[str]:
    """How time grows over the upper half of the lengths, in the setting with the most points."""
    setting, group = max(points.by_setting.items(), key=lambda item: len(item[1]), default=(None, []))
    timed: dict[Series, list[tuple[int, float]]] = {}
    for point in group:
        if point.latency_ms:
            timed.setdefault(point.series, []).append((point.length, point.latency_ms.value))
    growth = []
    for series, known in timed.items():
        upper = sorted(known)[-max(3, (len(known) + 1) // 2) :]
        exponent = scaling_exponent([x for x, _ in upper], [y for _, y in upper]) if len(upper) > 2 else None
        if exponent is not None:
            growth.append(f"{look.names[series]} N^{exponent:.2f}".replace("-", "−"))
    if not growth or setting is None:
        return []
    more = f" and {len(growth) - _MOST_NAMED} more" if len(growth) > _MOST_NAMED else ""
    name = setting_names(points.settings)[setting]
    return [f"Growth over the upper half of the lengths measured ({name}): {', '.join(growth[:_MOST_NAMED])}{more}."]


def _memory_notes(points: Points, look: Look, _: Value) -> list[str]:
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
    return notes


def _shared(groups: Sequence[Sequence[Point]], value: Value, quantity: Quantity) -> tuple[Scale, list[int], float]:
    """Scale, lengths and height of the strip of failures for panels that share their axes."""
    estimates = [estimate for group in groups for point in group if (estimate := value(point))]
    lengths = sorted({point.length for group in groups for point in group})
    strip = strip_height(max(len(failing(group)) for group in groups))
    return make_scale(ends(estimates), quantity), lengths, strip


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
    if any(error_scale(group).edge_label == "exact" for group in groups.values()):
        rounding = [estimate.value for group in groups.values() for estimate in _exact_errors(group)]
        notes.append(
            f"Exact attention errs by rounding alone, by {error(min(rounding))} to {error(max(rounding))}: far below "
            "the others, so its marks lie on the lower edge."
        )
    panels = []
    for title, group in groups.items():
        _, lengths, strip = _shared([group], _wrong, "error")
        panels.append(Lines(group, _wrong, look, error_scale(group), lengths, strip, trivial=True).panel(title))
    shown = shown_series((point for group in groups.values() for point in group), _wrong)
    return Chart("error", "Error over length", notes, panels, shown, "relative error")


def _skill(points: Points, look: Look) -> Chart:
    groups = _error_groups(points)
    notes = [
        "1 − error / error of the mean of the visible values: 1 is exact softmax, 0 is no better than that mean. "
        "What lies below −1 is drawn there."
    ]
    panels = [
        Lines(group, _gain, look, *_shared([group], _gain, "skill")).panel(title)
        for title, group in groups.items()
        if any(_gain(point) for point in group)
    ]
    shown = shown_series((point for group in groups.values() for point in group), _gain)
    return Chart("skill", "Skill over length", notes, panels, shown, "skill")


def _wrong(point: Point) -> Estimate | None:
    return point.relative_error


def _gain(point: Point) -> Estimate | None:
    return point.skill


def error_scale(points: Sequence[Point]) -> Scale:
    """Of the errors of these points, which belong to one family of inputs."""
    others = ends(point.relative_error for point in points if point.series.mechanism != EXACT)
    trivial = [value for point in points if (value := point.error_median("trivial_error"))]
    return make_error_scale(ends(_exact_errors(points)), others + trivial if others else [])


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


def shown_series(points: Iterable[Point], value: Value) -> list[Series]:
    """The series with a value or a failure to show, in order."""
    group = list(points)
    found = {point.series for point in group if value(point)} | set(failing(group))
    return sorted(found, key=lambda series: series.order)


def ends(estimates: Iterable[Estimate | None]) -> list[float]:
    """Both bounds of every estimate."""
    return [bound for estimate in estimates if estimate for bound in (estimate.low, estimate.high)]
