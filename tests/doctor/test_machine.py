"""What is read from the system, from made-up systems."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from linbench.doctor import machine
from linbench.doctor.machine import affinity, quota, simultaneous_threads
from linbench.doctor.quota import quota_cores
from linbench.record import Environment


def control_groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A made-up ``/sys/fs/cgroup`` and ``/proc/self/cgroup``."""
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    return folder / "root", folder / "own"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "50000 25000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/../outside\n", {"cpu.max": "250000 100000\n"}, 2.5),  # a container's view
        ("0::/a\n", {}, None),
        ("0::/a\n", {"a/cpu.max": "\n"}, None),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "70000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 0.7),
        ("4:cpu,cpuacct:/x\n", {"cpu/cpu.cfs_quota_us": "70000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.7),
        ("4:cpu:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("5:memory:/x\n3:cpuset:/y\n", {"cpu/cpu.cfs_quota_us": "7\n", "cpu/cpu.cfs_period_us": "10\n"}, None),
    ],
)
def test_the_least_quota_of_all_groups_above_counts(
    tmp_path: Path, own: str, files: dict[str, str], cores: float | None
) -> None:
    assert quota_cores(*control_groups(tmp_path, own, files)) == cores


def test_no_control_groups_are_no_quota(tmp_path: Path) -> None:
    assert quota_cores(tmp_path / "none", tmp_path / "neither") is None


@pytest.mark.parametrize(("cores", "wrong"), [(None, False), (4.0, False), (3.99, True), (0.5, True)])
def test_a_quota_has_room_for_the_threads_and_their_parent(cores: float | None, wrong: bool) -> None:
    finding = quota(cores, threads=3)
    assert (finding.advice is not None) is wrong
    assert not wrong or "4 cores or more" in (finding.advice or "")


@pytest.mark.parametrize(
    ("usable", "cpus", "seen", "wrong"),
    [
        (None, 4, "not told by this system", False),
        ([0, 1, 2, 3], 4, "all 4 CPUs", False),
        ([2, 3], 4, "2 of 4 CPUs: 2, 3", False),
        ([7], 8, "1 of 8 CPUs: 7", True),
        ([0], 1, "all 1 CPUs", False),  # the threads' finding speaks of it
    ],
)
def test_a_pinned_process_needs_a_cpu_beside_its_own(usable: list[int], cpus: int, seen: str, wrong: bool) -> None:
    finding = affinity(usable, cpus)
    assert finding.seen == seen
    assert (finding.advice is not None) is wrong


def test_simultaneous_threads_are_told_and_no_fault() -> None:
    findings = [simultaneous_threads(active) for active in ("1", "0", None)]
    assert [finding.seen.split(";")[0] for finding in findings] == ["on", "off", "not told by this system"]
    assert all(finding.advice is None for finding in findings)


def advised(monkeypatch: pytest.MonkeyPatch, environment: Environment, step_ns: float = 50) -> set[str]:
    monkeypatch.setattr(machine, "_clock_step_ns", lambda: step_ns)
    monkeypatch.setattr(machine, "quota_cores", lambda: None)
    monkeypatch.setattr(machine, "_usable_cpus", lambda: None)
    findings = machine.describe(environment)
    return {finding.subject for finding in findings if finding.advice and finding.subject != "peak memory"}


def test_each_fault_of_a_machine_has_its_advice(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[..., Environment]
) -> None:
    assert advised(monkeypatch, environment(governor="performance")) == set()
    assert advised(monkeypatch, environment(governor="powersave")) == {"governor"}
    assert advised(monkeypatch, environment(cores_physical=1)) == {"threads"}
    assert advised(monkeypatch, environment(), step_ns=2000) == {"clock"}
