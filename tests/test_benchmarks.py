"""The cells under pytest-benchmark, as their users call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "benchmarks"


def benchmarked(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_a_cell_is_timed_and_its_coordinates_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    file = str(FOLDER / "bench_torch.py")
    done = benchmarked(tmp_path, file, "-k", "retnet and forward and 256 and not backward", f"--benchmark-json={kept}")
    assert done.returncode == 0, done.stdout
    (found,) = json.loads(kept.read_text())["benchmarks"]
    assert found["group"] == "retnet forward"
    assert (found["extra_info"]["mechanism"], found["extra_info"]["length"]) == ("retnet", 256)
    assert found["stats"]["min"] > 0
    assert found["stats"]["rounds"] >= 5


def test_every_mechanism_is_among_them_and_the_tests_of_linbench_time_none(tmp_path: Path) -> None:
    from linbench.registry import BUILT_IN

    listed = benchmarked(tmp_path, str(FOLDER), "--collect-only").stdout
    assert all(f"bench_torch[{name}-forward-256]" in listed for name in BUILT_IN)
    assert "bench_kernels[retnet-decode-2048]" in listed
    config = f"--rootdir={FOLDER.parents[1]}", "-c", str(FOLDER.parents[1] / "pyproject.toml")
    assert "bench_" not in benchmarked(tmp_path, *config, str(FOLDER), "--collect-only").stdout
