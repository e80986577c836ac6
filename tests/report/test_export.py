"""What other tools read is what was measured: the same cells, numbers and units."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from linbench.errors import UsageError
from linbench.export import FORMATS, export
from linbench.export.frame import flat
from linbench.export.latex import escaped


@pytest.fixture
def measured(record):
    """A few cells, one of them without a time."""
    return [
        record("softmax", 256, ms=2.0, hyperparameters={}),
        record("linear", 256, ms=0.5, hyperparameters={"map": "elu"}),
        record("linear", 512, ms=1.0, hyperparameters={"map": "elu"}, causal=True),
        record("softmax", 512, status="oom", reason="8 GiB are too many"),
    ]


def test_the_table_has_a_line_for_every_cell_and_its_numbers(measured, run):
    table = flat(measured, [run()])
    assert list(table["mechanism"]) == ["softmax", "linear", "linear", "softmax"]
    assert list(table["length"]) == [256, 256, 512, 512]
    assert table["latency_ms"].iloc[1] == pytest.approx(np.median(measured[1].speed.samples_ms))
    assert (table["latency_low_ms"] <= table["latency_ms"]).iloc[:3].all()
    assert table["memory.increment_bytes"].iloc[0] == measured[0].memory.increment_bytes
    assert table["error.relative_error"].iloc[0] == measured[0].error.relative_error
    assert json.loads(table["hyperparameters"].iloc[1]) == {"map": "elu"}
    assert table["status"].iloc[3] == "oom"
    assert pd.isna(table["latency_ms"].iloc[3])
    assert not any(isinstance(value, (list, dict)) for value in table.to_numpy().ravel())


@pytest.mark.parametrize(("suffix", "read"), [(".csv", pd.read_csv), (".parquet", pd.read_parquet)])
def test_files_for_pandas_hold_the_table(measured, run, tmp_path, suffix, read):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "deep" / f"cells{suffix}"
    export(measured, [run()], path)
    found, expected = read(path), flat(measured, [run()])
    assert list(found.columns) == list(expected.columns)
    assert list(found["latency_ms"].iloc[:3]) == pytest.approx(list(expected["latency_ms"].iloc[:3].astype(float)))
    assert list(found["cell_key"]) == [one.cell.key for one in measured]


def test_latex_has_a_row_for_every_series_and_marks_what_there_is_not(measured, run, tmp_path):
    path = tmp_path / "table.tex"
    export(measured, [run()], path)
    text = path.read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}") >= 2
    assert "OOM" in text
    assert r"\textbf{500 $\mu$s}" in text
    bodies = [line for line in text.splitlines() if line.startswith(("softmax", "linear"))]
    assert all(line.endswith(r"\\") for line in bodies)


def test_latex_typesets_and_no_table_is_wider_than_a_line(sweep, record, run, tmp_path):
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("no pdflatex on this machine")
    wide = {"a_long_name": 123456, "another": "with_words", "b": True}
    records = [*sweep(), *(record("rfa", 1024, ms=3, hyperparameters=wide | {"features": n}) for n in (64, 128))]
    export(records, [run()], tmp_path / "cells.tex")
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{cells}\end{document}"
    (tmp_path / "paper.tex").write_text(head)
    words = ["-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000


def test_latex_special_characters_are_escaped():
    assert escaped("5 % of a_b & {c} ~ ^ \\ $1 #2") == (
        r"5 \% of a\_b \& \{c\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$1 \#2"
    )


def test_bencher_has_nanoseconds_with_bounds(measured, run, tmp_path):
    path = tmp_path / "b.json"
    export(measured, [run()], path, "bencher")
    found = json.loads(path.read_text())
    assert len(found) == 3
    latency = next(iter(found.values()))["latency"]
    assert latency["lower_value"] <= latency["value"] <= latency["upper_value"]
    assert latency["value"] == pytest.approx(1e6 * np.median(measured[0].speed.samples_ms))
    assert next(iter(found.values()))["error"]["value"] == measured[0].error.relative_error


def test_pytest_benchmark_compares_what_was_written(measured, run, tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "saved.json"
    export(measured, [run()], path, "pytest-benchmark")
    stats = json.loads(path.read_text())["benchmarks"][1]["stats"]
    samples_s = np.asarray(measured[1].speed.samples_ms) / 1e3
    assert stats["median"] == pytest.approx(np.median(samples_s))
    assert stats["stddev"] == pytest.approx(samples_s.std(ddof=1))
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=min,median,max"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "linear[" in done.stdout + done.stderr


def test_asv_results_lie_over_the_product_of_their_axes(measured, run, tmp_path):
    more = [*measured, measured[1].model_copy(update={"cell": measured[1].cell.model_copy(update={"length": 1024})})]
    machine = run(commit="0123456789abcdef")
    export(more, [machine], tmp_path / "asv", "asv")
    folder = tmp_path / "asv" / machine.environment.machine
    (file,) = folder.glob("*-linbench.json")
    results = json.loads(file.read_text())
    benchmarks = json.loads((tmp_path / "asv" / "benchmarks.json").read_text())
    columns = dict(zip(results["result_columns"], results["results"]["linear.forward"], strict=True))
    axes = dict(zip(benchmarks["linear.forward"]["param_names"], columns["params"], strict=True))
    assert axes["length"] == ["256", "512", "1024"]
    assert len(columns["result"]) == np.prod([len(values) for values in axes.values()])
    assert sum(value is not None for value in columns["result"]) == 3
    assert json.loads((folder / "machine.json").read_text())["machine"] == machine.environment.machine


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("cells.xls", None, "has none of the suffixes"),
        ("cells.csv", "feather", "no format 'feather'; choose from csv"),
    ],
)
def test_a_form_that_there_is_not_is_refused_with_the_choices(tmp_path, name, form, said):
    with pytest.raises(UsageError, match=said):
        export([], [], tmp_path / name, form)
    assert "asv" in FORMATS


def test_one_pytest_benchmark_file_is_of_one_machine(measured, run, tmp_path):
    other = run("day", machine="elsewhere")
    moved = [measured[0], measured[1].model_copy(update={"run": "day"})]
    with pytest.raises(UsageError, match="is of one machine and commit"):
        export(moved, [run(), other], tmp_path / "x.json", "pytest-benchmark")
