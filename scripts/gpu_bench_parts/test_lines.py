"""A plugin of pytest: appends a line for each test when it has ended, and leaves out those that have one already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gpu_bench_parts.records import Records


def records() -> Records:
    """Where the lines go: named by whoever starts pytest."""
    path = Path(os.environ["GPU_BENCH_TESTS"])
    return Records(path.parent, path.stem)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has ended, by the same code; what failed is run again."""
    code = os.environ["GPU_BENCH_CODE"]
    ended = {
        x["test"] for x in records().read() if x["kind"] == "test" and (x["code"], x["outcome"]) == (code, "passed")
    }
    left_out = [item for item in items if item.nodeid in ended]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid not in ended]


def pytest_runtest_logreport(report: Any) -> None:
    """A test has ended with its call, or before it where it was skipped or could not be set up."""
    ended = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
    if not ended or "PYTEST_XDIST_WORKER" in os.environ:  # what a worker reports comes to its parent too
        return
    told = {"reason": str(report.longrepr).strip().splitlines()[-1][:300]} if report.outcome == "failed" else {}
    where = {"test": report.nodeid, "file": Path(report.nodeid.partition("::")[0]).name}
    told |= {"outcome": report.outcome, "elapsed_s": round(report.duration, 3)}
    records().append("test", code=os.environ["GPU_BENCH_CODE"], **where, **told)
