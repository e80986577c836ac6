"""Records of eighteen made-up nights: what moved them is what the history says, through the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from linbench.cell import Cell
from linbench.cli import main
from linbench.history.series import METRICS, every_series
from linbench.record import (
    Check,
    Conditions,
    DeviceConditions,
    Environment,
    Memory,
    Record,
    Round,
    Run,
    Speed,
    Status,
)
from linbench.store import RunFile, read_all, read_history

NIGHTS, CHANGE = 18, 9
KNOWN = {
    "machine": "xeon-2",
    "cpu": "Intel Xeon",
    "cpu_flags": ["avx2"],
    "cores_physical": 2,
    "cores_logical": 2,
    "threads": 1,
    "memory_bytes": 2**33,
    "gpus": [],
    "python": "3.11.9",
    "torch": "2.13.0",
    "blas": "MKL",
    "os": "Linux 6.1",
    "clock": "tsc",
    "linbench": "0.1.0",
}


def environment(night, **changes):
    return Environment(**(KNOWN | {"commit": f"{night:040x}"} | changes))


def speed(ms, threads=1, host_share=None, sm_clock_mhz=None, frequency_mhz=None):
    device = None
    if sm_clock_mhz is not None:
        device = DeviceConditions(
            sm_clock_mhz=[sm_clock_mhz],
            memory_clock_mhz=[1],
            power_watts=[1.0],
            temperature_celsius=[1],
            throttle_reasons=[],
        )
    return Speed(
        clock="perf_counter" if host_share is None else "cuda_event",
        warmup_ms=[1.0],
        samples_ms=[ms, ms * 1.001, ms * 0.999],
        calls_per_sample=1,
        stop="converged",
        threads=threads,
        conditions=None if frequency_mhz is None else Conditions(frequency_mhz=frequency_mhz),
        device_conditions=device,
        host_ms=[] if host_share is None else [host_share * ms],
    )


def record(night, mechanism, took, code):
    check = Check(passed=True, rows=1, rows_total=1, relative_error=0.0, worst_row_error=0.0, tolerance=1e-4)
    size = 2**20 * (2 if mechanism == "linear" and night >= CHANGE else 1)
    return Record(
        run=f"night{night:02}",
        time=f"2026-10-{night + 1:02}T02:00:00Z",
        cell=Cell(mechanism=mechanism, length=512, heads=2),
        code=code,
        measures=["speed"],
        status=Status.OK,
        time_limit_s=60.0,
        elapsed_s=1.0,
        check=check,
        speed=took,
        memory=Memory(method="VmHWM", increment_bytes=size, samples_bytes=[size], inputs_bytes=1),
    )


@pytest.fixture
def nights(tmp_path, monkeypatch):
    """Writes a file for every night; the arguments say what is other from the change on, of linear and softmax."""
    monkeypatch.chdir(tmp_path)

    def write(factors=(1.0, 1.0), code=True, softmax_code=False, baseline=True, machine=None, **how):
        generator = np.random.default_rng(21)
        for night in range(NIGHTS):
            late = night >= CHANGE
            where = environment(night, **(machine if late and machine else {}))
            began = f"2026-10-{night + 1:02}T01:00:00Z"
            run = Run(run=f"night{night:02}", time=began, command="c", cells=2, environment=where)
            noise = np.exp(generator.normal(0, 0.005, 2))
            linear, softmax = np.array([2.0, 5.0]) * noise * (factors if late else 1.0)
            told = how.get("after" if late else "before", {})
            with RunFile(tmp_path / "results" / "xeon-2", run) as file:
                file.append(record(night, "linear", speed(linear, **told), "new" if late and code else "old"))
                if baseline:
                    file.append(record(night, "softmax", speed(softmax), "new" if late and softmax_code else "old"))
        return tmp_path / "results"

    return write


def causes(capsys, *words):
    assert main(["history", "results", "--json", "found.json", *words]) == 0
    printed = capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    moves = {one["cell"]["mechanism"]: [(m["index"], m["cause"]) for m in one["moves"]] for one in found["series"]}
    return moves, printed


def test_a_mechanism_whose_code_changed_beside_a_calm_baseline_moved_for_real(nights, capsys):
    nights(factors=(1.1, 1.0))
    moves, printed = causes(capsys)
    assert moves == {"linear": [(CHANGE, "real")], "softmax": []}
    assert re.search(r"1\.1\d\d|1\.09\d", printed)
    assert "Moves: 1 real." in printed


def test_without_a_move_there_is_none(nights, capsys):
    nights()
    moves, printed = causes(capsys)
    assert moves == {"linear": [], "softmax": []}
    assert "Moves: none." in printed


def test_a_move_below_the_threshold_is_none(nights, capsys):
    nights(factors=(1.03, 1.0))
    assert causes(capsys)[0]["linear"] == []
    assert causes(capsys, "--threshold", "0.01")[0]["linear"] == [(CHANGE, "real")]


def test_the_same_code_on_the_same_machine_moved_by_chance(nights, capsys):
    nights(factors=(1.3, 1.0), code=False)
    assert causes(capsys)[0]["linear"] == [(CHANGE, "noise")]


def test_what_moves_the_unchanged_baseline_as_well_is_the_machine(nights, capsys):
    nights(factors=(1.2, 1.18))
    assert causes(capsys)[0]["linear"] == [(CHANGE, "hardware")]


def test_what_moves_a_changed_baseline_as_well_is_the_method(nights, capsys):
    nights(factors=(1.2, 1.18), softmax_code=True)
    assert causes(capsys)[0]["linear"] == [(CHANGE, "method")]


def test_a_baseline_that_moves_the_other_way_is_no_excuse(nights, capsys):
    nights(factors=(1.2, 0.8))
    assert causes(capsys)[0]["linear"] == [(CHANGE, "real")]


@pytest.mark.parametrize(
    ("changes", "code", "cause"),
    [
        ({"driver": "999"}, False, "hardware"),
        ({"governor": "powersave"}, True, "open"),
        ({"torch": "2.14.0"}, True, "method"),
    ],
)
def test_an_environment_that_changed_is_named(nights, capsys, changes, code, cause):
    nights(factors=(1.2, 1.0), code=code, machine=changes)
    moves, printed = causes(capsys)
    assert moves["linear"] == [(CHANGE, cause)]
    assert next(iter(changes)) in printed


def test_without_a_baseline_a_change_of_code_leaves_the_cause_open(nights, capsys):
    nights(factors=(1.2, 1.0), baseline=False)
    assert causes(capsys)[0]["linear"] == [(CHANGE, "open")]


def test_another_number_of_threads_is_another_method(nights, capsys):
    nights(factors=(0.6, 1.0), after={"threads": 2})
    assert causes(capsys)[0]["linear"] == [(CHANGE, "method")]


@pytest.mark.parametrize("reading", ["frequency_mhz", "sm_clock_mhz"])
def test_a_time_that_moved_as_the_clock_did_is_the_machine(nights, capsys, reading):
    nights(factors=(1.25, 1.0), before={reading: 2000}, after={reading: 1600})
    assert causes(capsys)[0]["linear"] == [(CHANGE, "hardware")]


def test_a_time_that_moved_at_a_steady_clock_is_real(nights, capsys):
    nights(factors=(1.25, 1.0), before={"frequency_mhz": 2000.0}, after={"frequency_mhz": 1990.0})
    assert causes(capsys)[0]["linear"] == [(CHANGE, "real")]


def test_a_move_that_only_one_of_two_clocks_tells_of_is_the_method(nights, capsys):
    nights(factors=(1.25, 1.0), before={"host_share": 1.1}, after={"host_share": 1.1 / 1.25})
    assert causes(capsys)[0]["linear"] == [(CHANGE, "method")]


def test_a_move_that_both_clocks_tell_of_is_real(nights, capsys):
    nights(factors=(1.25, 1.0), before={"host_share": 1.1}, after={"host_share": 1.1})
    assert causes(capsys)[0]["linear"] == [(CHANGE, "real")]


def test_where_launches_take_longer_the_host_clock_says_nothing_of_the_kernel(nights, capsys):
    nights(factors=(1.25, 1.0), before={"host_share": 4.0}, after={"host_share": 4.0 / 1.25})
    assert causes(capsys)[0]["linear"] == [(CHANGE, "real")]


def test_memory_has_a_history_too(nights, capsys):
    nights()
    moves, _ = causes(capsys, "--metric", "memory")
    assert moves == {"linear": [(CHANGE, "real")], "softmax": []}


def test_the_picture_has_a_panel_for_each_series(nights, capsys):
    nights(factors=(1.1, 1.0))
    main(["history", "results", "--output", "moves.svg"])
    drawn = Path("moves.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "Picture: moves.svg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["results", "--metric", "error"], "no record has a error at a commit"),
        (["results", "--mechanism", "retnet"], "there are linear on xeon-2, softmax on xeon-2"),
        (["results", "--threshold", "0"], "a share above 0"),
        (["results", "--output", "moves.gif"], "a .png or an .svg"),
    ],
)
def test_bad_words_are_refused(nights, capsys, words, said):
    nights()
    assert main(["history", *words]) == 2
    assert said in capsys.readouterr().err


def test_commits_order_the_points_and_runs_with_changes_on_top_do_not_count():
    runs = [
        Run(run=f"night{night:02}", time="t", command="c", cells=1, environment=environment(night, dirty=dirty))
        for night, dirty in [(3, None), (1, None), (2, "abc"), (0, None)]
    ]
    records = [record(night, "linear", speed(1.0 + night), "c") for night in (3, 1, 2, 0)]
    order = [f"{night:040x}" for night in (1, 3)]
    (found,) = every_series(runs, records, METRICS["latency"][1], order)
    assert found.values == [2.0, 4.0]
    (found,) = every_series(runs, records, METRICS["latency"][1], [])
    assert found.values == [1.0, 2.0, 4.0]


def test_every_night_keeps_its_record_and_its_rounds(nights):
    files = sorted(nights().rglob("*.jsonl"))
    late = Run(run="late", time="2026-10-30T01:00:00Z", command="c", cells=1, environment=environment(NIGHTS - 1))
    again = Round(
        run="late",
        time="2026-10-30T02:00:00Z",
        cell_key=record(0, "softmax", speed(1.0), "c").cell.key,
        code="old",
        index=1,
        order=0,
        status=Status.OK,
        elapsed_s=1.0,
        speed=speed(7.0),
    )
    with RunFile(files[0].parent, late) as file:
        file.append(again)
    files = sorted(files[0].parent.glob("*.jsonl"))
    runs, every = read_history(files)
    assert (len(runs), len(every)) == (NIGHTS + 1, 2 * NIGHTS)
    assert [one.run for one in every if one.rounds] == [f"night{NIGHTS - 1:02}"]
    assert [one.run for one in read_all(files)[1]] == [f"night{NIGHTS - 1:02}"] * 2
