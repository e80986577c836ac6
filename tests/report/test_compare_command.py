"""``linbench compare``: what a word selects, what must not be compared, and what differs."""

import json

import pytest

from linbench.cli import main
from linbench.store import RunFile


@pytest.fixture
def results(tmp_path, monkeypatch, record, run):
    """A results folder of two runs on one machine and one on another, made from factors by mechanism."""

    def write(name, factors, machine="xeon-2", time="2026-11-23T10:00:00Z", **environment):
        first = run(name, machine=machine, **environment).model_copy(update={"time": time})
        with RunFile(tmp_path / "results" / machine, first) as file:
            for mechanism, factor in factors.items():
                file.append(record(mechanism, 256, ms=factor, run=name, time=time))

    monkeypatch.chdir(tmp_path)
    write("before", {"softmax": 1.0, "linear": 2.0}, commit="aaaaaaaaaa", torch="2.13.0")
    write("after", {"softmax": 1.0, "linear": 2.5}, commit="bbbbbbbbbb", torch="2.14.0", time="2026-11-24T10:00:00Z")
    write("there", {"softmax": 0.5, "linear": 0.7}, machine="epyc-8", cpu="AMD EPYC", time="2026-11-25T10:00:00Z")
    return tmp_path / "results"


def compared(capsys, *words):
    """The exit code, and what was printed."""
    code = main(["compare", *words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize(
    ("first", "second"), [("before", "after"), ("aaaaaaa", "bbbbbbbbbb"), ("results/xeon-2/before.jsonl", "after")]
)
def test_runs_commits_and_files_name_the_same(results, capsys, first, second):
    code, printed = compared(capsys, first, second, "--json")
    assert code == 0
    found = {one["cell"]["mechanism"]: one for one in json.loads(printed)["cells"]}
    assert found["linear"]["ratio"]["value"] == pytest.approx(1.25)
    assert found["linear"]["verdict"] == "slower"
    assert found["softmax"]["ratio"]["value"] == pytest.approx(1.0)
    assert found["softmax"]["verdict"] == "same"
    assert json.loads(printed)["environment"]["torch"] == ["2.13.0", "2.14.0"]


def test_the_table_tells_verdicts_and_what_else_differs(results, capsys):
    code, printed = compared(capsys, "before", "after")
    assert code == 0
    assert "1.250 [" in printed
    assert "2 cells: 0 faster, 1 slower, 1 same, 0 undecided." in printed
    assert "torch: 2.13.0, now 2.14.0" in printed
    assert "Fewer than 10 cells" in printed


def test_other_devices_are_refused_unless_forced(results, capsys):
    code, printed = compared(capsys, "before", "epyc-8")
    assert code == 2
    assert "different cpu: Intel Xeon and AMD EPYC" in printed
    code, printed = compared(capsys, "before", "epyc-8", "--force")
    assert code == 0
    assert "compared all the same: different cpu" in printed


def test_other_timers_are_refused(results, capsys, record, run, tmp_path):
    first = run("events").model_copy(update={"time": "2026-11-26T10:00:00Z"})
    with RunFile(tmp_path / "results" / "xeon-2", first) as file:
        one = record("softmax", 256, run="events")
        file.append(one.model_copy(update={"speed": one.speed.model_copy(update={"clock": "cuda_event"})}))
    code, printed = compared(capsys, "before", "events")
    assert code == 2
    assert "different timers: perf_counter and cuda_event" in printed


def test_a_word_that_means_nothing_names_the_newest_runs(results, capsys):
    code, printed = compared(capsys, "before", "yesterday")
    assert code == 2
    assert "'yesterday' is no file, run, commit or machine" in printed
    assert "before, after, there" in printed


def test_runs_without_a_common_cell_are_told(results, capsys, record, run, tmp_path):
    with RunFile(tmp_path / "results" / "xeon-2", run("longer")) as file:
        file.append(record("softmax", 8192, run="longer"))
    code, printed = compared(capsys, "before", "longer")
    assert code == 2
    assert "no cell in common" in printed


def test_what_failed_since_is_told(results, capsys, record, run, tmp_path):
    first = run("failing").model_copy(update={"time": "2026-11-27T10:00:00Z"})
    with RunFile(tmp_path / "results" / "xeon-2", first) as file:
        file.append(record("softmax", 256, run="failing"))
        file.append(record("linear", 256, run="failing", status="incorrect"))
    code, printed = compared(capsys, "before", "failing")
    assert code == 0
    assert "linear/torch N=256 full forward float32 gaussian cpu: ok, now incorrect" in printed
