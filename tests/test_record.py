"""A record cannot contradict itself, and what is written is read again, whole or without its cut-off last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.record import SCHEMA_VERSION, Check, Environment, Memory, Record, Round, Run, Speed, Status
from linbench.store import RunFile, read, read_all, results_files

PASSED = Check(passed=True, rows=5, rows_total=5, relative_error=1e-7, worst_row_error=1e-6, tolerance=1e-4)
FAILED = Check(passed=False, rows=5, rows_total=5, relative_error=0.5, worst_row_error=1.0, tolerance=1e-4, finding="x")
SPEED = Speed(
    clock="perf_counter", warmup_ms=[3.0], samples_ms=[1.0, 1.5, 2.0], calls_per_sample=1, stop="converged", threads=1
)
MEMORY = Memory(method="VmHWM", increment_bytes=4096, samples_bytes=[4096], inputs_bytes=100)


def record(status: Status = Status.OK, **changes: Any) -> Record:
    base: dict[str, Any] = {
        "run": "r1",
        "time": "2026-01-01T00:00:00+00:00",
        "cell": Cell(mechanism="linear", length=5),
        "code": "c",
        "measures": ["speed"],
        "status": status,
        "time_limit_s": 60,
        "elapsed_s": 0.5,
    }
    return Record(**(base | changes))


def run(name: str = "r1", time: str = "2026-01-01T00:00:00+00:00") -> Run:
    environment = Environment(
        machine="some-cpu-2-cpu",
        cpu="Some CPU",
        cpu_flags=["avx2"],
        cores_physical=2,
        cores_logical=4,
        threads=1,
        memory_bytes=2**34,
        gpus=[],
        python="3.11",
        torch="2.13",
        blas="mkl",
        os="Linux",
        clock="tsc",
        linbench="0.1.0",
    )
    return Run(run=name, time=time, command="linbench run", cells=1, environment=environment)


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.OK])
def test_only_ok_needs_no_reason(status: Status) -> None:
    with pytest.raises(ValidationError, match="needs a reason"):
        record(status, check=PASSED)


@pytest.mark.parametrize("status", [s for s in Status if s not in (Status.OK, Status.NOISY)])
@pytest.mark.parametrize("block", [{"speed": SPEED}, {"memory": MEMORY}])
def test_a_failed_cell_carries_no_measurement(status: Status, block: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="cannot carry a measurement"):
        record(status, reason="because", check=FAILED, **block)


@pytest.mark.parametrize("check", [None, FAILED])
def test_a_measured_cell_has_passed_its_check(check: Check | None) -> None:
    with pytest.raises(ValidationError, match="check that passed"):
        record(check=check, speed=SPEED)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_nan_or_infinite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        PASSED.model_validate(PASSED.model_dump() | {"relative_error": value})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = [record(check=PASSED, speed=SPEED, memory=MEMORY), record(Status.OOM, reason="too large")]
    with RunFile(tmp_path, run()) as results:
        for line in written:
            results.append(line)
    assert read(results.path) == (run(), written, [], [])


def again(index: int = 1, time: str = "2026-01-01T00:01:00+00:00", **changes: Any) -> Round:
    base: dict[str, Any] = {
        "run": "r1",
        "time": time,
        "cell_key": Cell(mechanism="linear", length=5).key,
        "code": "c",
        "index": index,
        "order": 0,
        "status": Status.OK,
        "elapsed_s": 0.25,
        "speed": SPEED,
    }
    return Round(**(base | changes))


def test_rounds_join_the_record_that_they_time_again(tmp_path: Path) -> None:
    """In the same file and in a later one; not those of other code, another cell, or an older record of the cell."""
    with RunFile(tmp_path, run()) as results:
        results.append(again(time="2025-12-31T23:59:59+00:00"))
        results.append(record(check=PASSED, speed=SPEED))
        results.append(again())
        results.append(again(2, code="other"))
        results.append(again(2, cell_key="0" * 16))
    with RunFile(tmp_path, run("r2", "2026-01-02T00:00:00+00:00")) as later:
        later.append(again(2, run="r2", time="2026-01-02T00:00:01+00:00"))
    runs, (joined,) = read_all([results.path, later.path])
    assert [found.run for found in runs] == ["r1", "r2"]
    assert [(found.run, found.index) for found in joined.rounds] == [("r1", 1), ("r2", 2)]
    assert set(joined.timings) == {("r1", 0), ("r1", 1), ("r2", 2)}


def test_a_quiet_round_counts_for_more_than_a_disturbed_one() -> None:
    disturbed = record(Status.NOISY, reason="others", check=PASSED, speed=SPEED)
    assert (disturbed.best_status, set(disturbed.timings)) == (Status.NOISY, {("r1", 0)})
    disturbed.rounds.append(again(1, status=Status.CRASH, reason="SIGSEGV", speed=None))
    assert set(disturbed.timings) == {("r1", 0)}
    disturbed.rounds.append(again(2))
    assert (disturbed.best_status, set(disturbed.timings)) == (Status.OK, {("r1", 2)})


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_cut_off_in_mid_write_is_dropped_with_a_warning(tmp_path: Path, cut: int) -> None:
    with RunFile(tmp_path, run()) as results:
        results.append(record(check=PASSED))
        results.append(record(Status.CRASH, reason="SIGSEGV"))
    results.path.write_bytes(results.path.read_bytes()[:-cut])
    with pytest.warns(UserWarning, match="cut off"):
        records = read(results.path).records
    assert [line.status for line in records] == [Status.OK]


@pytest.mark.parametrize(
    "text", ["", "{}\n", "hello\n", '{"kind":"run"}\n', "[1]\n", '{"kind":"run","schema_version":1}\n']
)
def test_a_file_that_is_not_ours_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match="not a linbench results file"):
        read(path)


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(run().model_dump(mode="json") | {"schema_version": SCHEMA_VERSION + 1}) + "\n")
    with pytest.raises(UsageError, match="upgrade"):
        read(path)


def test_a_run_never_overwrites_a_file(tmp_path: Path) -> None:
    with RunFile(tmp_path, run()):
        pass
    with pytest.raises(UsageError, match="cannot write"):
        RunFile(tmp_path, run())


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="results_dir: cannot write"):
        RunFile(tmp_path / "file" / "folder", run())


def test_the_newest_record_of_a_cell_counts(tmp_path: Path) -> None:
    for name, time, status in (("b", "2026-01-02", Status.CRASH), ("a", "2026-01-03", Status.TIMEOUT)):
        with RunFile(tmp_path, run(name, time)) as results:
            results.append(record(status, reason="because", run=name))
    runs, records = read_all(results_files([tmp_path]))
    assert [r.run for r in runs] == ["b", "a"]
    assert [r.status for r in records] == [Status.TIMEOUT]


def test_missing_and_empty_places_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results"):
        results_files([tmp_path])
    with pytest.raises(UsageError, match="does not exist"):
        results_files([tmp_path / "nowhere"])
