"""The command as a person types it: real processes, real files, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from linbench.config import config_dir
from linbench.record import Record, Status
from linbench.store import read_all, results_files
from linbench.verbs import VERBS

PLUG_INS = Path(__file__).parent / "plug_ins"
TINY = (
    "length=[24,40]",
    "heads=2",
    "head_dim=8",
    "causal=false",
    "measure.speed.budget_s=0.02",
    "measure=[speed,error]",
    "rounds=1",
    "retries=0",
)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PLUG_INS), **changes}


def linbench(folder: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "linbench", *words]
    return subprocess.run(
        command, cwd=folder, env=environment(**changes), capture_output=True, text=True, timeout=200, check=False
    )


def records(folder: Path) -> list[Record]:
    return read_all(results_files([folder / "results"]))[1]


def lines(folder: Path, kind: str = '"kind":"cell"') -> int:
    """Lines of a kind in all files, repeated ones counted again."""
    return sum(path.read_text().count(kind) for path in (folder / "results").rglob("*.jsonl"))


def start(folder: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "linbench", *words]
    # whatever a shell starts in the background ignores SIGINT, and hands that on
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_records(folder: Path, count: int, kind: str = '"kind":"cell"') -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "results").is_dir() and lines(folder, kind) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} lines {kind} in time")


def test_a_sweep_survives_every_broken_mechanism(tmp_path: Path) -> None:
    ends = {
        "mean": {Status.OK, Status.NOISY},
        "segfaults": {Status.CRASH},
        "sleeps": {Status.TIMEOUT},
        "hoards": {Status.OOM},
        "zeros": {Status.INCORRECT},
        "not_a_number": {Status.INCORRECT},
        "raises": {Status.CRASH},
        "exits": {Status.CRASH},
        "remembers": {Status.INCORRECT},
        "boasts": {Status.IMPOSSIBLE},
        "dies_when_built": {Status.CRASH},
        "linear": {Status.OK, Status.NOISY},
    }
    asked = (f"mechanism=[{','.join(ends)}]", "length=96", "heads=2", "head_dim=16", "causal=false", "time_limit_s=8")
    more = ("device.cpu.memory_limit_bytes=1500000000", "rounds=1", "retries=0")
    done = linbench(tmp_path, "run", "--config-dir", str(PLUG_INS / "configs"), *asked, *more)
    assert done.returncode == 0, done.stderr
    found = {record.cell.mechanism: record for record in records(tmp_path)}
    assert {name: record.status for name, record in found.items() if record.status not in ends[name]} == {}
    assert "SIGSEGV in stage 'check': broken_mechanisms.py" in (found["segfaults"].reason or "")
    assert "broken_mechanisms.py" in (found["raises"].reason or "")
    assert "exit code 7" in (found["exits"].reason or "")
    assert "it is remembered, not computed" in (found["remembers"].reason or "")
    page = Path(tmp_path / done.stdout.rpartition("Report: ")[2].strip()).read_text()
    assert all(name in page for name in ends)


def test_a_killed_sweep_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    words = ("run", "mechanism=[softmax,linear,linformer]", *TINY)
    process = start(tmp_path, words)
    wait_for_records(tmp_path, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = lines(tmp_path)
    assert 2 <= kept < 6
    done = linbench(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert f"{kept} more are finished already" in done.stdout
    assert lines(tmp_path) == 6
    again = linbench(tmp_path, *words)
    assert "0 cells, 6 more are finished already" in again.stdout
    assert lines(tmp_path) == 6
    assert lines_after(tmp_path, *words, "resume=false") == 12


def test_rounds_come_from_servers_of_their_own_and_go_on_after_a_kill(tmp_path: Path) -> None:
    words = ("run", "mechanism=[softmax,linear]", *TINY[:-2], "rounds=3", "retries=0")
    process = start(tmp_path, words)
    wait_for_records(tmp_path, 5, '"kind":"round"')
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lines(tmp_path) == 4
    kept = lines(tmp_path, '"kind":"round"')
    assert 5 <= kept < 8
    assert linbench(tmp_path, *words).returncode == 0
    assert (lines(tmp_path), lines(tmp_path, '"kind":"round"')) == (4, 8)
    assert [sorted(again.index for again in record.rounds) for record in records(tmp_path)] == [[1, 2]] * 4


def lines_after(folder: Path, *words: str) -> int:
    assert linbench(folder, *words).returncode == 0
    return lines(folder)


def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    process = start(tmp_path, ["run", "--config-dir", str(PLUG_INS / "configs"), "mechanism=stalls", *TINY])
    wait_for_records(tmp_path, 1)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while (left := _working_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def _working_in(folder: Path) -> list[str]:
    """Processes whose working directory is ``folder``."""
    return [str(process) for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder.resolve())]


def test_ctrl_c_keeps_what_was_measured_and_names_the_command(tmp_path: Path) -> None:
    words = ["run", "--config-dir", str(PLUG_INS / "configs"), "mechanism=stalls", *TINY]
    process = start(tmp_path, words)
    wait_for_records(tmp_path, 1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "linbench run --config-dir" in errors
    assert "mechanism=stalls" in errors
    assert "'length=[24,40]'" in errors
    assert [record.cell.length for record in records(tmp_path)] == [24]


def test_changed_code_invalidates_its_own_cells_only(tmp_path: Path) -> None:
    source = tmp_path / "broken_mechanisms.py"
    shutil.copy(PLUG_INS / "broken_mechanisms.py", source)
    shutil.copytree(PLUG_INS / "configs", tmp_path / "configs")
    words = ("run", "--config-dir", "configs", "mechanism=[mean,linear]", *TINY)
    path = {"PYTHONPATH": str(tmp_path)}
    assert linbench(tmp_path, *words, **path).returncode == 0
    source.write_text(source.read_text() + "\n# a comment changes nothing\n")
    assert "0 cells, 4 more" in linbench(tmp_path, *words, **path).stdout
    source.write_text(source.read_text().replace("v.mean(dim=2, keepdim=True)", "v.sum(2, True) / v.shape[2]"))
    assert "2 cells, 2 more" in linbench(tmp_path, *words, **path).stdout


def test_a_raised_time_limit_tries_again(tmp_path: Path) -> None:
    words = ("run", "--config-dir", str(PLUG_INS / "configs"), "mechanism=[mean,sleeps]", *TINY)
    first = linbench(tmp_path, *words, "time_limit_s=4")
    assert "2 timeout" in first.stdout, first.stderr
    (longer,) = [r.reason for r in records(tmp_path) if r.cell.length == 40 and r.status is Status.TIMEOUT]
    assert "not started: at 24 tokens" in (longer or "")
    assert "2 cells, 2 more" in linbench(tmp_path, *words, "time_limit_s=5").stdout
    assert "0 cells, 4 more" in linbench(tmp_path, *words, "time_limit_s=5").stdout


def test_hydra_writes_no_stray_folders(tmp_path: Path) -> None:
    assert linbench(tmp_path, "run", "mechanism=linear", *TINY).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_shards_of_a_multirun_fill_one_plan(tmp_path: Path) -> None:
    words = ("mechanism=[softmax,linear]", *TINY)
    done = linbench(tmp_path, "run", "--multirun", *words, "shard.count=2", "shard.index=0,1")
    assert done.returncode == 0, done.stderr
    assert "0 cells, 4 more" in linbench(tmp_path, "run", *words).stdout


def test_plan_runs_nothing_and_says_what_is_left_out(tmp_path: Path) -> None:
    done = linbench(tmp_path, "plan", "+sweep=long_seq", "time_limit_s=30")
    assert done.returncode == 0, done.stderr
    assert "131,072" in done.stdout
    assert "retnet has no non-causal form" in done.stdout
    assert "time_limit_s is 30" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_lists_on_the_command_line_multiply(tmp_path: Path) -> None:
    words = ("mechanism=[linear,performer]", "mechanism.performer.features=[4,8]", "length=[24,40]", "causal=false")
    assert "6 cells: 6 to run" in linbench(tmp_path, "plan", *words).stdout


def test_a_users_own_folder_adds_sweeps_and_mechanisms(tmp_path: Path) -> None:
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    shutil.copytree(PLUG_INS / "configs" / "mechanism", tmp_path / "mine" / "mechanism")
    (tmp_path / "mine" / "sweep" / "tiny.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /mechanism: [mean, softmax]\nlength: 24\ncausal: false\n"
    )
    done = linbench(tmp_path, "plan", "+sweep=tiny", "--config-dir", "mine")  # the flag may also come last
    assert "2 cells: 2 to run" in done.stdout, done.stderr
    wrong = linbench(tmp_path, "plan", "--config-dir", "mine", "+sweep=tin")
    ours = [path.stem for path in (config_dir() / "sweep").glob("*.yaml")]
    assert wrong.stderr.strip() == f"linbench: unknown sweep 'tin'; choose from {', '.join(sorted([*ours, 'tiny']))}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run", "--cfg", "job", "+sweep=smoke"), "head_dim: 32"),
        (("run", "+sweep=smoke", "--cfg", "job"), "head_dim: 32"),
        (("run", "--info", "searchpath"), "configs"),
        (("run", "--info", "mechanism=linear"), "defaults"),
        (("plan", "--help"), "linbench plan"),
        (("--help",), "doctor"),
        (("--version",), "linbench 0"),
        (("report", "--help"), "--output"),
    ],
)
def test_flags_behave_as_hydra_users_expect(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    done = linbench(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("linbench ru", ["run"]),
        ("linbench ", list(VERBS)),
        ("linbench run +sweep=lo", ["+sweep=long_seq"]),
        ("linbench plan mechanism=perf", ["mechanism=performer"]),
        ("linbench run dty", ["dtype="]),
        ("linbench frontier frontier.la", ["frontier.largest="]),
    ],
)
def test_completion_knows_verbs_and_choices(tmp_path: Path, typed: str, expected: list[str]) -> None:
    done = linbench(tmp_path, "-sc", "query=bash", COMP_LINE=typed, COMP_POINT=str(len(typed)), SHELL="/bin/bash")
    assert done.stdout.split() == expected, done.stderr


def test_the_completion_script_can_be_installed(tmp_path: Path) -> None:
    assert "linbench" in linbench(tmp_path, "-sc", "install=bash").stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("run", "mechanism=foo"), ["unknown mechanism 'foo'", "linear, linformer"]),
        (("run", "mechanism=[linear,foo]"), ["unknown mechanism 'foo'", "linear, linformer"]),
        (("plan", "+sweep=foo"), ["unknown sweep 'foo'", "long_seq, maps, paper_based"]),
        (("plan", "sweep=smoke"), ["+sweep=NAME"]),
        (("run", "device=tpu"), ["unknown device 'tpu'", "cpu, cuda"]),
        (("run", "measure=speeed"), ["unknown measure 'speeed'", "memory, speed"]),
        (("run", "lenght=3"), ["unknown key 'lenght'", "did you mean 'length'"]),
        (("run", "+lenght=3"), ["unknown key 'lenght'", "did you mean 'length'"]),
        (("run", "length=-4"), ["length=-4"]),
        (("run", "length=1.5"), ["length=1.5"]),
        (("run", "rounds=0"), ["rounds=0", "greater than or equal to 1"]),
        (("run", "retries=-1"), ["retries=-1", "greater than or equal to 0"]),
        (("run", "length=[1,"), ["cannot read the override"]),
        (("run", "mechanism.performer.featurs=3"), ["featurs", "features, kernel"]),
        (("run", "mechanism=linear", "mechanism.performer.features=3"), ["performer is not among the chosen"]),
        (("run", "--config-dir", "/nowhere"), ["/nowhere"]),
        (("run", "--config-dir"), ["--config-dir needs a value"]),
        (("frobnicate",), ["unknown verb 'frobnicate'", "run, plan, frontier, check, capture, report"]),
        (("report", "nowhere"), ["nowhere does not exist"]),
        (("list", "foo"), ["foo", "mechanisms", "sweeps"]),
        (("doctor", "--fast"), ["--fast"]),
        (("report", str(Path(__file__))), ["is not a linbench results file"]),
        (("run", "mechanism.performer.features=-3"), ["mechanism.performer.features=-3"]),
        (("run", "inputs.gaussian.sharpness=-1"), ["inputs.gaussian.sharpness=-1"]),
        (("run", "inputs=minilm", "heads=5", "head_dim=32", "length=128"), ["heads=5", "choose from 1, 2, 3, 6"]),
        (("run", "inputs=none.safetensors"), ["there is no file none.safetensors", "linbench capture"]),
        (("run", "inputs=trace"), ["inputs=trace needs inputs.trace.file=FILE"]),
        (("capture", "model", "--out", "x.safetensors"), ["--text"]),
        (("capture", "model", "--text", "none.txt", "--out", "x.safetensors"), ["the text none.txt cannot be read"]),
        (("run", "mechanism=linformer", "causal=true"), ["nothing can run", "no causal form"]),
        (("run", "implementation=cuda"), ["no implementation 'cuda'", "reference"]),
        (("run", "results_dir=/proc/nowhere", "mechanism=linear", "length=24"), ["cannot write /proc/nowhere"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path, words: tuple[str, ...], parts: list[str]) -> None:
    done = linbench(tmp_path, *words)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_among_the_results_stops_a_run_before_it_measures(tmp_path: Path) -> None:
    assert linbench(tmp_path, "run", "mechanism=linear", *TINY).returncode == 0
    (machine,) = (tmp_path / "results").iterdir()
    (machine / "notes.jsonl").write_text("mine\n")
    done = linbench(tmp_path, "run", "mechanism=linear", *TINY)
    assert done.returncode == 2
    assert "notes.jsonl is not a linbench results file" in done.stderr
    assert lines(tmp_path) == 2


def test_report_reads_a_folder(tmp_path: Path) -> None:
    assert linbench(tmp_path, "run", "mechanism=[linear,softmax]", *TINY).returncode == 0
    done = linbench(tmp_path, "report", "results", "--output", "page", "--title", "A & B")
    assert done.returncode == 0, done.stderr
    assert "A &amp; B" in (tmp_path / "page" / "index.html").read_text()
    assert "Share of roofline" in (tmp_path / "page" / "report.md").read_text()


def test_list_names_every_choice(tmp_path: Path) -> None:
    listed = json.loads(linbench(tmp_path, "list", "--json").stdout)
    assert {"softmax", "linear", "linformer", "performer", "longformer", "retnet"} <= set(listed["mechanisms"])
    assert listed["mechanisms"]["performer"]["hyperparameters"]["features"]["default"] == 256
    assert {"smoke", "long_seq"} <= set(listed["sweeps"])
    assert all(
        entry["about"] for group in ("inputs", "measures", "devices", "sweeps") for entry in listed[group].values()
    )


def test_doctor_gives_a_verdict(tmp_path: Path) -> None:
    done = linbench(tmp_path, "doctor")
    assert done.returncode in (0, 1)
    assert "fit to measure" in done.stdout or "deserve doubt" in done.stdout
