"""Which mechanism to take, from records alone: the fastest that keeps to a bound on error and memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from linbench.errors import UsageError
from linbench.report.crossover import fastest_exact
from linbench.report.points import Point, Points
from linbench.report.settings import EXACT, Series, Setting, inputs_of
from linbench.report.units import error as told_error
from linbench.report.units import size, tokens
from linbench.stats import Estimate, ratio_of_medians

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Asked:
    """What the user has and tolerates. None: whatever there is."""

    causal: bool
    pass_: str = "forward"
    length: int | None = None
    device: str | None = None
    machine: str | None = None
    dtype: str | None = None
    batch: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    max_error: float | None = None
    """Of an approximation, on the worst family of inputs; a replacement's distance is no error and is let pass."""
    max_memory_bytes: int | None = None

    def fits(self, setting: Setting) -> bool:
        """Whether a setting is one that was asked for."""
        named = ("machine", "dtype", "batch", "heads", "head_dim")
        wanted = all(getattr(self, name) in (None, getattr(setting, name)) for name in named)
        device = self.device is None or setting.device.partition("(")[0] == self.device
        return wanted and device and (setting.causal, setting.pass_) == (self.causal, self.pass_)


@dataclass(frozen=True)
class Candidate:
    """One series at the length asked for."""

    point: Point
    refusal: str
    """Why it is not to be taken; empty when it may be."""

    @cached_property
    def error(self) -> float | None:
        """Relative error on the worst family of inputs."""
        return worst_error(self.point)


@dataclass(frozen=True)
class Advice:
    """For one setting at one length."""

    setting: Setting
    length: int
    ranked: list[Candidate]
    """Those that may be taken, the fastest first."""
    refused: list[Candidate]
    exact: Point | None
    """The fastest implementation of exact attention."""
    level: list[Series]
    """Too close to the best to be told from it."""
    neighbours: dict[int, Series | None]
    """The best at the next shorter and longer length that was measured."""
    unmeasured: list[str]
    """Mechanisms without a record of this setting and length."""

    @property
    def best(self) -> Candidate | None:
        """The fastest that may be taken."""
        return self.ranked[0] if self.ranked else None

    @property
    def speedup(self) -> Estimate | None:
        """Time of exact attention over that of the best."""
        if self.best is None or self.exact is None or self.best.point.series == self.exact.series:
            return None
        return ratio_of_medians(self.exact.samples_ms, self.best.point.samples_ms)


def advise(points: Points, asked: Asked, known: Iterable[str] = ()) -> list[Advice]:
    """One answer for every setting and length that fits; lengths in order.

    Args:
        known: names of all mechanisms, to say which of them were not measured.

    Raises:
        UsageError: nothing fits; says what there is.
    """
    settings = [setting for setting in points.settings if asked.fits(setting)]
    if not settings:
        raise UsageError(f"advise: no record fits; there are {_offers(points)}")
    found = []
    for setting in settings:
        by_length: dict[int, list[Point]] = defaultdict(list)
        for point in points.by_setting[setting]:
            by_length[point.length].append(point)
        lengths = [asked.length] if asked.length is not None else sorted(by_length)
        found += [_advice(setting, length, by_length, asked, known) for length in lengths if length in by_length]
    if not found:
        measured = sorted({point.length for setting in settings for point in points.by_setting[setting]})
        near = ", ".join(tokens(length) for length in measured)
        raise UsageError(f"advise: nothing was measured at {tokens(asked.length or 0)} tokens; there are {near}")
    return found


def _advice(
    setting: Setting, length: int, by_length: dict[int, list[Point]], asked: Asked, known: Iterable[str]
) -> Advice:
    ranked, refused = _judged(by_length[length], asked)
    best = ranked[0].point if ranked else None
    level = [
        other.point.series
        for other in ranked[1:]
        if best is not None and ratio_of_medians(other.point.samples_ms, best.samples_ms).sign == 0
    ]
    shorter = [n for n in by_length if n < length]
    longer = [n for n in by_length if n > length]
    neighbours = {}
    for near in ([max(shorter)] if shorter else []) + ([min(longer)] if longer else []):
        there = _judged(by_length[near], asked)[0]
        neighbours[near] = there[0].point.series if there else None
    measured = {point.series.mechanism for point in by_length[length]}
    exact = fastest_exact(by_length[length]).get(length)
    return Advice(setting, length, ranked, refused, exact, level, neighbours, sorted(set(known) - measured))


def _judged(points: Sequence[Point], asked: Asked) -> tuple[list[Candidate], list[Candidate]]:
    candidates = [Candidate(point, _refusal(point, asked)) for point in points]
    ranked = [one for one in candidates if not one.refusal]
    ranked.sort(key=lambda one: one.point.latency_ms.value if one.point.latency_ms else 0.0)
    return ranked, [one for one in candidates if one.refusal]


def _refusal(point: Point, asked: Asked) -> str:
    if point.latency_ms is None:
        return f"{point.status}: {point.reason}" if point.reason else "its time was not measured"
    memory, error = point.memory_bytes, worst_error(point)
    if asked.max_memory_bytes is not None:
        if memory is None:
            return "its memory was not measured"
        if memory.value > asked.max_memory_bytes:
            return f"{size(memory.value)} are more than {size(asked.max_memory_bytes)}"
    if asked.max_error is not None and point.series.mechanism != EXACT and point.reading != "distance":
        if error is None:
            return "its error was not measured"
        if error > asked.max_error:
            return f"error {told_error(error)} is over {told_error(asked.max_error)}"
    return ""


def worst_error(point: Point) -> float | None:
    """The largest over families of inputs of the median over seeds of the relative error; None without one."""
    by_family: dict[str, list[float]] = defaultdict(list)
    for record in point.measured:
        if record.error is not None:
            by_family[inputs_of(record.cell)].append(record.error.relative_error)
    return max((float(np.median(values)) for values in by_family.values()), default=None)


def _offers(points: Points) -> str:
    """The settings of the records in a few words each."""
    told = dict.fromkeys(
        f"{one.machine} {one.device} {one.dtype} {'causal' if one.causal else 'full'} {one.pass_} D={one.head_dim}"
        for one in points.settings
    )
    return "; ".join(told) or "none at all"


def read_bytes(text: str) -> int:
    """``2GiB``, ``500MB`` or a number of bytes.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise UsageError(f"advise: '{text}' is no size; write a number with one of {units}")
    return int(float(match[1]) * _UNITS[match[2]])
