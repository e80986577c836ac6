"""The longest length that fits: found to its gap, never tried above a failure, and told with what stopped it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.frontier import Search
from linbench.probing import nearest
from linbench.protocol import Nearest, NearestRequest, ProbeRequest
from linbench.record import Frontier, Probe, Status
from linbench.runner import Runner
from linbench.store import read, read_frontiers, results_files

PLUG_INS = Path(__file__).parent / "plug_ins"
LIMIT = 700
LARGEST = 5000
lengths = st.integers(1, LARGEST)


def search(first: int, fits: Callable[[int], bool], takes: Callable[[int], bool], gap: float) -> Search:
    """A search over a world in which ``fits`` and ``takes`` say what a length does; it checks the back-stop itself."""

    def nearby(wanted: int, above: int, below: int) -> Nearest:
        found = [length for length in range(above + 1, below) if takes(length)]
        return Nearest(length_tokens=min(found, key=lambda length: abs(length - wanted)) if found else None, reason="r")

    def probe(length: int) -> Probe:
        assert takes(length)
        for earlier in one.probes:
            if earlier.status is Status.OK:
                assert length > earlier.length_tokens
            else:
                assert length < earlier.length_tokens
        status = Status.OK if fits(length) else Status.OOM
        return Probe(length_tokens=length, status=status, reason=None if fits(length) else "full", elapsed_s=0.0)

    one = Search(first, LARGEST, gap, nearby, probe)
    one.run()
    return one


@given(first=lengths, edge=lengths, gap=st.floats(0.001, 0.5))
def test_the_bracket_holds_the_edge_and_is_as_narrow_as_asked(first: int, edge: int, gap: float) -> None:
    found = search(first, lambda n: n <= edge, lambda n: True, gap)
    assert found.complete
    assert found.fits
    assert found.fits.length_tokens <= edge
    if found.fails is None:
        assert edge == found.fits.length_tokens == LARGEST
        assert found.verdict() == (Status.OK, "nothing failed up to 5,000 tokens, frontier.largest")
    else:
        high, low = found.fails.length_tokens, found.fits.length_tokens
        assert edge < high
        assert high - low <= max(1, gap * high)
        assert found.verdict() == (Status.OOM, "full")
    assert len(found.probes) <= 2 * math.log2(LARGEST) + math.log2(1 / gap) + 3


@given(first=lengths, edge=lengths)
def test_only_lengths_that_are_taken_are_tried(first: int, edge: int) -> None:
    squares = [n * n for n in range(1, 71)]
    found = search(first, lambda n: n <= edge, lambda n: n in squares, 0.001)
    assert found.fits
    assert found.fits.length_tokens == max(n for n in squares if n <= edge)
    assert found.verdict()[0] is (Status.OOM if edge < max(squares) else Status.UNSUPPORTED)


def test_what_fits_nowhere_is_found_to_fit_nowhere() -> None:
    found = search(1024, lambda n: False, lambda n: True, 0.1)
    assert found.complete
    assert found.fits is None
    assert found.fails is not None
    assert found.fails.length_tokens == 1
    assert found.verdict() == (Status.OOM, "full")


def test_what_is_taken_nowhere_is_unsupported() -> None:
    found = search(1024, lambda n: True, lambda n: False, 0.1)
    assert found.complete
    assert found.probes == []
    assert found.verdict() == (Status.UNSUPPORTED, "r")


def test_an_earlier_search_is_gone_on_with() -> None:
    whole = search(64, lambda n: n <= 1234, lambda n: True, 0.01)

    def never(length: int) -> Probe:
        raise AssertionError(length)

    again = Search(64, LARGEST, 0.01, lambda wanted, above, below: Nearest(length_tokens=wanted), never)
    again.probes = list(whole.probes)
    again.run()
    assert again.complete


def ask(cell: Cell, above: int = 0, below: int = 2**24 + 1) -> Nearest:
    return nearest(NearestRequest(cell=cell, above=above, below=below))


@pytest.mark.parametrize(("wanted", "found"), [(960, 960), (1024, 1032), (1000, 1008), (5, 24)])
def test_images_get_the_nearest_length_that_fills_them(wanted: int, found: int) -> None:
    cell = Cell(mechanism="flatten", hyperparameters={"height": 24}, length=wanted, heads=2, head_dim=8, value_dim=8)
    assert ask(cell) == Nearest(length_tokens=found)


def test_where_support_ends_is_found_exactly() -> None:
    cell = Cell(mechanism="hyena", hyperparameters={"max_length": 100_000}, causal=True, length=131_072, heads=2)
    assert ask(cell, above=65_536).length_tokens == 100_000
    beyond = ask(cell, above=100_000)
    assert beyond.length_tokens is None
    assert "more than max_length=100000" in (beyond.reason or "")
    assert ask(cell).length_tokens == 65_536  # nothing is known to be taken: the half of what was wanted is tried next


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": True}, "no causal form"),
        ({"implementation": "cuda"}, "no implementation 'cuda'"),
        ({"device": "cuda"}, "sees no CUDA device"),
    ],
)
def test_what_no_length_cures_is_said(changes: dict[str, object], reason: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    found = ask(Cell(mechanism="linformer", length=4096, **changes))  # type: ignore[arg-type]
    assert found.length_tokens is None
    assert reason in (found.reason or "")


@pytest.mark.parametrize(("kills", "status"), [([3, 3], Status.CRASH), ([3, 4], Status.OOM), ([None], Status.OOM)])
def test_the_kernel_says_which_sigkill_was_its_own(
    kills: list[int | None], status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(kills)
    monkeypatch.setattr("linbench.runner.kernel_kills", lambda: next(told))
    monkeypatch.syspath_prepend(str(PLUG_INS))
    cell = Cell(mechanism="killed", target="limited_mechanisms.Killed", length=LIMIT + 1, heads=1, head_dim=4)
    with Runner() as runner:
        request = ProbeRequest(cell=cell, threads=1, memory_limit_bytes=None, drawing_limit_bytes=0)
        assert runner.probe(request, 60).status is status


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(PLUG_INS), os.environ.get("PYTHONPATH", "")])}


def linbench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "linbench", *words]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )


def asked(*names: str) -> tuple[str, ...]:
    targets = ",".join(f"limited_mechanisms.{name}" for name in names)
    shape = ("heads=1", "head_dim=4", "length=256", "causal=false", "inputs=gaussian", "mechanism=[linformer]")
    return ("frontier", f"mechanism._target_=[{targets}]", *shape, "frontier.largest=4096", "time_limit_s=4")


def found_in(folder: Path) -> dict[str, Frontier]:
    lines = read_frontiers(results_files([folder / "results"]))
    return {line.cell.mechanism: line for line in lines if not line.cell.causal}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One command with mechanisms that end in every way, under a limit of 100 MiB."""
    folder = tmp_path_factory.mktemp("frontier")
    memory = f"device.cpu.memory_limit_bytes={100 * 2**20}"
    names = ("Weighty", "Limited", "Slow", "Killed", "Never", "Squares")
    return folder, linbench(folder, *asked(*names), memory, "causal=[false,true]")


def test_every_end_is_told_apart(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = swept
    assert done.returncode == 0, done.stderr
    lines = read_frontiers(results_files([folder / "results"]))
    causal = [line for line in lines if line.cell.causal]
    assert len(causal) == 7
    for line in causal:
        assert line.status is Status.UNSUPPORTED
        assert "no causal form" in line.reason
        assert line.longest_fitting_tokens is line.shortest_failing_tokens is None
    found = found_in(folder)
    ends = {name: line.status for name, line in found.items()}
    assert ends == {
        "weighty": Status.OOM,
        "limited": Status.CRASH,
        "slow": Status.TIMEOUT,
        "killed": Status.CRASH,
        "never": Status.CRASH,
        "squares": Status.CRASH,
        "linformer": Status.OK,
    }
    for name in ("limited", "slow", "killed"):
        low, high = found[name].longest_fitting_tokens, found[name].shortest_failing_tokens
        assert low is not None
        assert high is not None
        assert low <= LIMIT < high
        assert high - low <= high / 16
    assert (found["squares"].longest_fitting_tokens, found["squares"].shortest_failing_tokens) == (676, 729)
    assert (found["never"].longest_fitting_tokens, found["never"].shortest_failing_tokens) == (None, 1)
    assert found["linformer"].longest_fitting_tokens == 4096


def test_the_memory_limit_is_where_the_mechanism_says(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """64 KiB a token under 100 MiB: 1,600 tokens, less what the call itself needs."""
    line = found_in(swept[0])["weighty"]
    assert line.memory_limit_bytes == 100 * 2**20
    assert line.longest_fitting_tokens is not None
    assert line.shortest_failing_tokens is not None
    assert 1600 * 0.85 < line.longest_fitting_tokens <= 1600
    assert line.shortest_failing_tokens < 1600 * 17 / 16
    assert "allocation of" in line.reason
    for probe in line.probes:
        assert (probe.peak_bytes is not None) is (probe.status is Status.OK)
        if probe.peak_bytes is not None:
            assert probe.peak_bytes == pytest.approx(probe.length_tokens * 65_536, abs=4 * 2**20)


def test_a_line_is_printed_for_each_series_and_the_report_shows_them(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = swept
    assert done.stdout.count("slow/torch full") == 1
    assert "timeout: no result within 4 s; it was in stage 'call'" in done.stdout
    page = Path(folder / done.stdout.rpartition("Report: ")[2].strip())
    for text in (page.read_text(), (page.parent / "report.md").read_text()):
        assert "Longest sequence that fits" in text
        assert "no result within 4 s" in text
        assert "100 MiB" in text
    again = linbench(folder, "report", "results", "--output", "page")
    assert again.returncode == 0, again.stderr
    assert "14 frontiers" in again.stdout
    assert "Longest sequence that fits" in (folder / "page" / "index.html").read_text()


def test_cells_are_read_as_if_there_were_no_frontiers(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    (path,) = results_files([swept[0] / "results"])
    run, records, _, frontiers = read(path)
    assert records == []
    assert (run.cells, len(frontiers)) == (14, 14)


def test_a_search_is_interrupted_without_loss_and_resumed_without_repetition(tmp_path: Path) -> None:
    (tmp_path / "wait").write_text("")
    words = (*asked("Limited", "Waits"), "time_limit_s=100")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = [sys.executable, "-m", "linbench", *words]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _finished_lines(tmp_path) >= 2:
        time.sleep(0.05)
    time.sleep(2)  # the next series has tried the lengths that do not wait, and waits
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "this goes on from there: linbench frontier" in told
    cut = found_in(tmp_path)["waits"]
    assert not cut.complete
    assert cut.longest_fitting_tokens == 512
    (tmp_path / "wait").unlink()
    done = linbench(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "1 series, 2 more are finished already" in done.stdout
    whole = found_in(tmp_path)["waits"]
    assert whole.complete
    assert whole.status is Status.CRASH
    assert whole.probes[: len(cut.probes)] == cut.probes
    assert linbench(tmp_path, *words).stdout.startswith("0 series, 3 more are finished already")
    finer = linbench(tmp_path, *words, "frontier.relative_gap=0.01")
    assert "3 series." in finer.stdout
    assert found_in(tmp_path)["waits"].probes[: len(whole.probes)] == whole.probes


def _finished_lines(folder: Path) -> int:
    return sum(path.read_text().count('"kind":"frontier"') for path in folder.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("frontier.largest=0",), "frontier.largest=0"),
        (("frontier.relative_gap=2",), "frontier.relative_gap=2"),
        (("frontier.smallest=2",), "unknown key 'frontier.smallest'"),
        (("mechanism=lineer",), "unknown mechanism 'lineer'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, words: tuple[str, ...], part: str) -> None:
    done = linbench(tmp_path, "frontier", *words)
    assert done.returncode == 2
    assert part in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def line(**changes: object) -> dict[str, object]:
    probes = [
        {"length_tokens": 8, "status": "ok", "peak_bytes": 1, "elapsed_s": 0.1},
        {"length_tokens": 16, "status": "oom", "reason": "full", "elapsed_s": 0.1},
    ]
    base: dict[str, object] = {
        "run": "r", "time": "t", "cell": {"mechanism": "linear", "length": 8}, "code": "c", "status": "oom",
        "reason": "full", "complete": True, "longest_fitting_tokens": 8, "shortest_failing_tokens": 16,
        "largest_tokens": 32, "relative_gap": 0.5, "time_limit_s": 1.0, "probes": probes,
    }  # fmt: skip
    return base | changes


@pytest.mark.parametrize("change", [{"longest_fitting_tokens": 9}, {"shortest_failing_tokens": None}])
def test_a_bracket_is_that_of_its_probes(change: dict[str, object]) -> None:
    assert Frontier.model_validate(line()).longest_fitting_tokens == 8
    with pytest.raises(ValidationError, match="probe that is"):
        Frontier.model_validate(line(**change))


def test_a_line_of_an_unknown_kind_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"kind":"strange","schema_version":4}\n')
    with pytest.raises(UsageError, match="kind 'strange'"):
        read(path)
