"""League tables: for each setting, family of inputs and length, what every series needed and lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from linbench.record import Environment
from linbench.report import units
from linbench.report.crossover import fastest_exact
from linbench.report.names import setting_names, variant_name
from linbench.report.pareto import common_length
from linbench.report.points import Point, Points
from linbench.report.settings import Series, Setting
from linbench.stats import Estimate, Samples, ratio_of_medians

_ENOUGH_SAMPLES = 6
"""Of fewer a ratio has no bootstrap."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: text that is ready to be shown."""

    point: Point
    variant: str
    latency: str = units.MISSING
    ratio: str = units.MISSING
    roofline: str = units.MISSING
    """Share of the roofline, and which of its sides binds."""
    memory: str = units.MISSING
    skill: str = units.MISSING
    error: str = units.MISSING
    excess: str = units.MISSING
    reading: str = units.MISSING
    status: str = ""
    reason: str = ""
    best: frozenset[str] = field(default_factory=frozenset)
    """Names of the columns in which no row of the table is better."""

    @property
    def series(self) -> Series:
        """Whose row it is."""
        return self.point.series


@dataclass(frozen=True)
class Table:
    """All series at one length."""

    length_tokens: int
    rows: list[Row]
    first_seen: bool
    """Whether it is the one that is shown first: at the longest length that most series answered."""

    @property
    def length(self) -> str:
        """In words."""
        return units.tokens(self.length_tokens)


@dataclass(frozen=True)
class League:
    """The tables of one setting and one family of inputs, from the shortest length to the longest."""

    heading: str
    setting: Setting
    inputs: str
    tables: list[Table]


def make_leagues(points: Points) -> list[League]:
    """One league for each setting and family of inputs."""
    names = setting_names(points.settings)
    grouped: dict[tuple[Setting, str], list[Point]] = defaultdict(list)
    for point in points.by_inputs:
        grouped[point.setting, point.inputs or ""].append(point)
    leagues = []
    for (setting, inputs), group in sorted(grouped.items(), key=lambda item: (item[0][0].order, item[0][1])):
        opened = common_length([point for point in group if point.measured] or group)
        by_length: dict[int, list[Point]] = defaultdict(list)
        for point in group:
            by_length[point.length].append(point)
        tables = [Table(n, make_rows(by_length[n], points.environments), n == opened) for n in sorted(by_length)]
        leagues.append(League(f"{names[setting]}, {inputs} inputs", setting, inputs, tables))
    return leagues


def has_rooflines(leagues: Sequence[League]) -> bool:
    """Whether any row has a share of its roofline; without one there is no such column."""
    return any(row.roofline != units.MISSING for league in leagues for table in league.tables for row in table.rows)


def make_rows(points: Sequence[Point], environments: Mapping[str, Environment]) -> list[Row]:
    """The rows of one table: timed ones by latency, then the others that were measured, then what failed."""
    exact = next(iter(fastest_exact(points).values()), None)
    best = _best(points)
    ordered = sorted(points, key=lambda p: (not p.measured, _value(p.latency_ms), p.series.order))
    return [
        _row(point, exact, environments, frozenset(name for name, winner in best.items() if winner is point))
        for point in ordered
    ]


def _row(point: Point, exact: Point | None, environments: Mapping[str, Environment], best: frozenset[str]) -> Row:
    latency, memory, wrong = point.latency_ms, point.memory_bytes, point.relative_error
    skill, excess = point.error_median("skill"), point.error_median("excess")
    return Row(
        point=point,
        variant=variant_name(point.series),
        latency=_latency(latency) if latency else units.MISSING,
        ratio=_ratio(point, exact) if latency and exact else units.MISSING,
        roofline=_roofline(point, environments),
        memory=units.size(memory.value) if memory else units.MISSING,
        skill=units.skill(skill) if skill is not None else units.MISSING,
        error=_error(wrong) if wrong else units.MISSING,
        excess=units.ratio(excess) if excess is not None else units.MISSING,
        reading=point.reading or units.MISSING,
        status=point.status.replace("_", " ") + (", launch-bound" if point.launch_bound else ""),
        reason=point.reason,
        best=best,
    )


def _best(points: Sequence[Point]) -> dict[str, Point]:
    """Column -> the point that is best in it. A distance cannot win a prize for accuracy."""
    ranked = {
        "latency": {point: estimate.value for point in points if (estimate := point.latency_ms)},
        "memory": {point: estimate.value for point in points if (estimate := point.memory_bytes)},
        "error": {p: e.value for p in points if (e := p.relative_error) and p.reading == "error"},
        "skill": {p: -s for p in points if p.reading == "error" and (s := p.error_median("skill")) is not None},
    }
    return {name: min(values, key=lambda point: values[point]) for name, values in ranked.items() if len(values) > 1}


def _latency(estimate: Estimate) -> str:
    """A dagger says that there were too few samples for 95 %."""
    return units.latency(estimate) + ("" if estimate.coverage >= 0.95 else " †")


def _ratio(point: Point, exact: Point) -> str:
    """Against the fastest exact implementation; ≈ where the interval of the ratio holds 1."""
    if point is exact:
        return "1×"
    assert point.latency_ms is not None
    assert exact.latency_ms is not None
    told = _apart(point.samples_ms, exact.samples_ms) or ratio_of_medians(point.samples_ms, exact.samples_ms).sign
    return f"{'' if told else '≈ '}{units.ratio(point.latency_ms.value / exact.latency_ms.value)}"


def _apart(one: Sequence[Samples], other: Sequence[Samples]) -> bool:
    """Whether all samples of one process lie above all of another's: then no draw of a bootstrap can hold 1."""
    if len(one) > 1 or len(other) > 1 or min(one[0].size, other[0].size) < _ENOUGH_SAMPLES:
        return False
    return bool(one[0].min() > other[0].max() or other[0].min() > one[0].max())


def _roofline(point: Point, environments: Mapping[str, Environment]) -> str:
    found = point.roofline(environments)
    return units.MISSING if found is None or found.share is None else f"{units.share(found.share)} ({found.bound})"


def _error(estimate: Estimate) -> str:
    if estimate.low == estimate.high:
        return units.error(estimate.value)
    return f"{units.error(estimate.value)} [{units.error(estimate.low)}, {units.error(estimate.high)}]"


def _value(estimate: Estimate | None) -> float:
    return estimate.value if estimate else float("inf")
