"""Records -> points: what one series of one setting did at one length, over all inputs and seeds that were run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

import numpy as np

from linbench.record import Environment, Error, Record, Run, Status
from linbench.report.settings import Series, Setting, inputs_of, series_of, setting_of
from linbench.roofline import Roofline, roofline
from linbench.stats import Estimate, Samples, median_interval, pooled_median

LAUNCH_BOUND = 0.2
_Grouped = dict[tuple[Setting, Series, int, str | None], list[Record]]


@dataclass(frozen=True, eq=False)
class Point:
    """The records of one series in one setting at one length; ``inputs`` is None when families are pooled."""

    setting: Setting
    series: Series
    length: int
    inputs: str | None
    records: tuple[Record, ...]

    @cached_property
    def measured(self) -> tuple[Record, ...]:
        """The records that carry numbers. Noisy ones count only where there is no better one."""
        for status in (Status.OK, Status.NOISY):
            found = tuple(record for record in self.records if record.best_status is status)
            if found:
                return found
        return ()

    @cached_property
    def status(self) -> Status:
        """That of the measured records, or the most frequent failure."""
        if self.measured:
            return self.measured[0].best_status
        return Counter(record.status for record in self.records).most_common(1)[0][0]

    @cached_property
    def reason(self) -> str:
        """Of the status above; empty when all is well."""
        if self.status is Status.OK:
            return ""
        return next((record.reason or "" for record in self.records if record.best_status is self.status), "")

    @cached_property
    def samples_ms(self) -> list[Samples]:
        """Milliseconds of one call: one array for each server whose processes measured it.

        Cells that differ in their inputs alone, of one round, share their server's memory layout: one observation.
        """
        servers: dict[tuple[str, int], list[float]] = defaultdict(list)
        for record in self.measured:
            for server, speed in record.timings.items():
                servers[server] += speed.samples_ms
        return [np.array(samples) for samples in servers.values()]

    @cached_property
    def latency_ms(self) -> Estimate | None:
        """Median milliseconds of one call."""
        return pooled_median(self.samples_ms) if self.samples_ms else None

    @cached_property
    def tokens_per_s(self) -> Estimate | None:
        """Tokens of all sequences of the batch that a second of calls takes in; a decoding step takes one of each."""
        if self.latency_ms is None:
            return None
        tokens = 1e3 * self.setting.batch * (1 if self.setting.pass_ == "decode" else self.length)
        time = self.latency_ms
        slowest = max(samples.max() for samples in self.samples_ms)
        return Estimate(
            tokens / time.value, tokens / time.high, tokens / time.low, time.coverage, time.count, tokens / slowest
        )

    @cached_property
    def launch_overhead(self) -> float | None:
        """CUDA: the share of the host's time of a call in which its kernels do not run; None on a CPU."""
        timed = [speed for record in self.measured for speed in record.timings.values() if speed.host_ms]
        if not timed:
            return None
        shares = [1 - np.median(speed.graph_ms or speed.samples_ms) / np.median(speed.host_ms) for speed in timed]
        return max(0.0, float(np.median(shares)))

    @property
    def launch_bound(self) -> bool:
        """Launches take more than a fifth: the time is that of the host, and no mean over cells should count it."""
        return self.launch_overhead is not None and self.launch_overhead > LAUNCH_BOUND

    @cached_property
    def memory_bytes(self) -> Estimate | None:
        """Median peak bytes of one call beyond its inputs, over all processes: allocations hardly vary."""
        blocks = [record.memory for record in self.measured if record.memory]
        samples = [sample for block in blocks for sample in block.samples_bytes or [block.increment_bytes]]
        return median_interval(samples) if samples else None

    @cached_property
    def state_bytes(self) -> Estimate | None:
        """Bytes from which the next token is decoded after all N, by the cost model."""
        known = [record.cost.state_bytes for record in self.measured if record.cost and record.cost.state_bytes]
        return median_interval(known) if known else None

    @cached_property
    def errors(self) -> list[Error]:
        """One block for each seed (and family, when pooled)."""
        return [record.error for record in self.measured if record.error]

    @cached_property
    def relative_error(self) -> Estimate | None:
        """Median over seeds. The interval is the range over seeds, or over sampled rows when there is one seed."""
        if not self.errors:
            return None
        values = [block.relative_error for block in self.errors]
        value, (low, high) = float(median(values)), (min(values), max(values))
        sampled = self.errors[0].relative_error_interval
        if len(values) == 1 and sampled:
            low, high = min(sampled[0], value), max(sampled[1], value)
        return Estimate(value, low, high, 0.95, len(values), min(values))

    @cached_property
    def skill(self) -> Estimate | None:
        """Median over seeds, with the interval that the relative error's has in it."""
        value, wrong, trivial = self.error_median("skill"), self.relative_error, self.error_median("trivial_error")
        if value is None or wrong is None or not trivial:
            return None
        low, high = min(1 - wrong.high / trivial, value), max(1 - wrong.low / trivial, value)
        return Estimate(value, low, high, wrong.coverage, wrong.count, low)

    def error_median(self, field: str) -> float | None:
        """Median over seeds of a field of the error block, or None where it was not measured."""
        values = [value for block in self.errors if (value := getattr(block, field)) is not None]
        return float(median(values)) if values else None

    def roofline(self, environments: Mapping[str, Environment]) -> Roofline | None:
        """That of the record with the median share (the lower of two); None where no record has one.

        Args:
            environments: of the runs, by name.
        """
        found = [roofline(record, environments.get(record.run)) for record in self.measured]
        shares = sorted((one.share, i) for i, one in enumerate(found) if one is not None and one.share is not None)
        return found[shares[(len(shares) - 1) // 2][1]] if shares else None

    def roofline_share(self, environments: Mapping[str, Environment]) -> Estimate | None:
        """The share of the roofline, with the interval that the latency has."""
        found, time = self.roofline(environments), self.latency_ms
        if found is None or found.share is None or time is None:
            return None
        low, high = (found.share * time.value / bound for bound in (time.high, time.low))
        return Estimate(found.share, low, high, time.coverage, time.count, low)

    @cached_property
    def record_name(self) -> str:
        """``RUN/KEY`` of the first record behind the numbers, or of the first of all where there are none."""
        first = self.measured[0] if self.measured else self.records[0]
        return f"{first.run}/{first.cell.key}"

    @property
    def reading(self) -> str | None:
        """``error``, ``distance``, or None without an error block."""
        return self.errors[0].reading if self.errors else None


@dataclass(frozen=True)
class Points:
    """All points of a report, and the records that were set aside on the way."""

    pooled: tuple[Point, ...]
    """Over all families of inputs: for speed and memory, which do not depend on them."""
    by_inputs: tuple[Point, ...]
    superseded: tuple[Record, ...]
    """Records of a cell that was measured again since by other code: in no table or figure, but counted."""
    current: tuple[Record, ...]
    environments: Mapping[str, Environment] = field(default_factory=dict)
    """Of the runs, by name."""

    @cached_property
    def settings(self) -> list[Setting]:
        """In order."""
        return sorted({point.setting for point in self.pooled}, key=lambda setting: setting.order)

    @cached_property
    def series(self) -> list[Series]:
        """In order, exact attention first."""
        return sorted({point.series for point in self.pooled}, key=lambda series: series.order)

    @cached_property
    def by_setting(self) -> dict[Setting, list[Point]]:
        """Pooled points, by series and then length."""
        rank = {series: index for index, series in enumerate(self.series)}
        grouped: dict[Setting, list[Point]] = {setting: [] for setting in self.settings}
        for point in sorted(self.pooled, key=lambda point: (rank[point.series], point.length)):
            grouped[point.setting].append(point)
        return grouped

    @cached_property
    def inputs_by_setting(self) -> dict[Setting, list[Point]]:
        """The points of every family of inputs, in the order of ``by_inputs``."""
        grouped: dict[Setting, list[Point]] = {setting: [] for setting in self.settings}
        for point in self.by_inputs:
            grouped[point.setting].append(point)
        return grouped

    @cached_property
    def by_table(self) -> dict[tuple[Setting, str, int], list[Point]]:
        """Setting, family of inputs and length, in order -> the points there, by series."""
        rank = {setting: index for index, setting in enumerate(self.settings)}
        grouped: dict[tuple[Setting, str, int], list[Point]] = defaultdict(list)
        for point in sorted(self.by_inputs, key=lambda point: point.series.order):
            grouped[point.setting, point.inputs or "", point.length].append(point)
        return dict(sorted(grouped.items(), key=lambda item: (rank[item[0][0]], *item[0][1:])))


def make_points(records: Sequence[Record], runs: Sequence[Run]) -> Points:
    """Group records into points. A cell that was measured again by other code keeps only the newest code's records."""
    machines = {run.run: run.environment.machine for run in runs}
    newest: dict[tuple[str, str], Record] = {}
    keyed = [((machines.get(record.run, "unknown machine"), record.cell.key), record) for record in records]
    for key, record in keyed:
        if key not in newest or record.time >= newest[key].time:
            newest[key] = record
    current = [(machine, record) for (machine, key), record in keyed if record.code == newest[machine, key].code]
    superseded = tuple(record for key, record in keyed if record.code != newest[key].code)
    pooled: _Grouped = defaultdict(list)
    by_inputs: _Grouped = defaultdict(list)
    settings: dict[Setting, Setting] = {}
    every_series: dict[Series, Series] = {}
    for machine, record in current:
        cell = record.cell
        setting, series = setting_of(cell, machine), series_of(cell)
        # one object for all that are equal: that it is the same one is seen without a look at its fields
        setting, series = settings.setdefault(setting, setting), every_series.setdefault(series, series)
        pooled[setting, series, cell.length, None].append(record)
        by_inputs[setting, series, cell.length, inputs_of(cell)].append(record)
    environments = {run.run: run.environment for run in runs}
    kept = tuple(record for _, record in current)
    return Points(_points(pooled), _points(by_inputs), superseded, kept, environments)


def _points(grouped: _Grouped) -> tuple[Point, ...]:
    return tuple(Point(*place, tuple(found)) for place, found in grouped.items())
