"""The tests of the kernels on this device: a line for each test as it ends, so that the next run leaves it out."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_bench_parts.bench import Bench, UnfinishedError
from gpu_bench_parts.plan import Extent, Item
from gpu_bench_parts.records import Records

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "kernels"
WORKERS = 8
"""Processes, where pytest-xdist is installed: most of the time of a test is compilation, on the host."""
ROOM_S = 15.0
"""Kept back for pytest to end in, when the time of a run is over."""


def items(extent: Extent) -> list[Item]:
    """One for every file."""
    names = extent.tests or sorted(path.name for path in TESTS.glob("test_*.py"))
    return [Item("kernel_tests", name, files=(TESTS / name,), expected_s=40, limit_s=600) for name in names]


def run(item: Item, bench: Bench) -> dict[str, Any]:
    """Those tests of the file that no line has, slow ones too on a device.

    Raises:
        UnfinishedError: the time of this run was over before the last of them.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_bench_parts.test_lines", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default", str(TESTS / item.key)]  # other versions of torch warn of other things
    command += ["-m", "not slow"] if bench.extent.rehearsal else []
    if not bench.extent.rehearsal and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(WORKERS)]
    paths = [str(ROOT / "scripts"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    told = {"GPU_BENCH_TESTS": str(Records(bench.folder, "kernel_tests").path), "GPU_BENCH_CODE": item.code}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **told, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=max(bench.left_s - ROOM_S, 1.0),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnfinishedError(f"{item.key}: not all of its tests") from error
    newest = {line["test"]: line["outcome"] for line in lines(bench.folder, item) if line["code"] == item.code}
    outcomes = Counter(newest.values())
    found = {"outcomes": dict(outcomes), "exit_code": done.returncode}
    if done.returncode in (0, 5) and not outcomes["failed"]:  # 5: no test was left to run
        return found
    last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    return {**found, "status": "wrong", "reason": "; ".join(last) or "pytest ended without a word"}


def lines(folder: Path, item: Item) -> list[dict[str, Any]]:
    """Those of the tests of one file."""
    return [line for line in Records(folder, "kernel_tests").read() if line.get("file") == item.key]
