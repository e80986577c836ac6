"""Records of many runs -> one series for each cell on each machine, in the order of the commits."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from linbench.cell import Cell
from linbench.record import Environment, Record, Run

Metric = Callable[[Record], float | None]


@dataclass(frozen=True)
class Point:
    """A cell as it was measured at one commit."""

    record: Record
    environment: Environment
    value: float

    @property
    def commit(self) -> str:
        """Seven digits of it."""
        return (self.environment.commit or "")[:7]


@dataclass(frozen=True)
class Series:
    """One cell on one machine, oldest commit first; the same commit as often as it was measured."""

    machine: str
    cell: Cell
    points: list[Point]

    @property
    def values(self) -> list[float]:
        """In order."""
        return [point.value for point in self.points]


def host_ms(record: Record) -> float | None:
    """Milliseconds of a call on the host's clock; None where that is the only clock."""
    found = [median(speed.host_ms) for speed in record.timings.values() if speed.host_ms]
    return median(found) if found else None


METRICS: dict[str, tuple[str, Metric]] = {
    "latency": ("ms", lambda record: record.latency_ms),
    "host": ("ms of the host", host_ms),
    "memory": ("bytes", lambda record: record.memory.increment_bytes if record.memory else None),
    "error": ("relative", lambda record: record.error.relative_error if record.error else None),
}
"""Name -> unit, and the number in a record."""


def every_series(runs: Sequence[Run], records: Iterable[Record], metric: Metric, order: Sequence[str]) -> list[Series]:
    """Points with a commit, without changes on top of it, and with a number above 0.

    Args:
        order: commits, oldest first; points of others are left out. Empty: points go by the time of their record.
    """
    environments = {run.run: run.environment for run in runs}
    places = {commit: place for place, commit in enumerate(order)}
    found: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for record in records:
        environment, value = environments[record.run], metric(record)
        if environment.commit is None or environment.dirty or not value:
            continue
        if not places or environment.commit in places:
            found[environment.machine, record.cell.key].append(Point(record, environment, value))
    series = [Series(machine, points[0].record.cell, points) for (machine, _), points in found.items()]
    for one in series:
        one.points.sort(key=lambda point: (places.get(point.environment.commit or "", 0), point.record.time))
    return series


def commits_of(repository: Path, tip: str = "HEAD") -> list[str]:
    """Commits up to ``tip``, oldest first, none before its parents; empty where there is no repository."""
    words = ["git", "-C", str(repository), "rev-list", "--topo-order", "--reverse", tip]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []
