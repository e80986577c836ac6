"""Load and stolen time, from made-up counters."""

from __future__ import annotations

from collections import namedtuple

import pytest

from linbench.doctor import load
from linbench.doctor.load import Load, judge_foreign, steal

LinuxTimes = namedtuple("LinuxTimes", "user nice system idle iowait irq softirq steal guest guest_nice")
MacTimes = namedtuple("MacTimes", "user nice system idle")


def test_time_of_guests_counts_once_and_resting_and_stolen_time_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_times", lambda: LinuxTimes(100, 20, 30, 1000, 500, 4, 6, 7, 40, 10))
    assert load.read()[1:] == (160, 7)
    monkeypatch.setattr("psutil.cpu_times", lambda: MacTimes(100, 20, 30, 1000))
    assert load.read()[1:] == (150, None)


@pytest.mark.parametrize(("busy_s", "wrong"), [(0.0, False), (0.18, False), (0.3, True)])
def test_others_may_keep_a_tenth_of_a_core_busy(busy_s: float, wrong: bool) -> None:
    finding = judge_foreign(Load(10.0, 50.0, 1.0), Load(12.0, 50.0 + busy_s, 1.0))
    assert (finding.advice is not None) is wrong
    assert f"{busy_s / 2:.2f} cores busy" in finding.seen


@pytest.mark.parametrize(
    ("before", "after", "seconds", "wrong"),
    [(1.0, 1.04, 5, False), (1.0, 1.06, 5, True), (1.0, 1.02, 0.5, False), (None, None, 5, False)],
)
def test_the_host_may_keep_back_a_hundredth_of_a_core(
    before: float | None, after: float | None, seconds: float, wrong: bool
) -> None:
    finding = steal(Load(0.0, 0.0, before), Load(seconds, 1.0, after))
    assert (finding.advice is not None) is wrong
    assert before is not None or "not told" in finding.seen
