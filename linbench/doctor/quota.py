"""The processor time that the control groups of this process grant it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def quota_cores(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Cores worth of time in each period: the least that this process's group and those above it grant.

    Reads control groups of both versions. A container often sees its own group as the root of the hierarchy, so every
    folder from the group up to the root counts.

    Returns:
        None without a limit, and where there are no control groups.
    """
    grants = [_granted(folder) for folder in _folders(root, own)]
    return min((grant for grant in grants if grant is not None), default=None)


def _folders(root: Path, own: Path) -> Iterator[Path]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        names = [""] if number == "0" else [controllers, "cpu"]  # the second version has one hierarchy for everything
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for name in dict.fromkeys(names):
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(name, *parts[:depth])


def _granted(folder: Path) -> float | None:
    """Quota over period, of either version; None without a limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError):
        return None
