"""The section on the longest sequence that fits: a table for each setting, the longest first, with what stopped it."""

from linbench.cell import Cell
from linbench.record import Frontier, Probe
from linbench.report.frontiers import frontier_section
from linbench.report.page import write_report


def frontier(mechanism, fits, fails, status, **changes):
    probes = [Probe(length_tokens=fits, status="ok", peak_bytes=3 * 2**20, elapsed_s=1.0)] if fits else []
    probes += [Probe(length_tokens=fails, status=status, reason="full", elapsed_s=1.0)] if fails else []
    cell = Cell(mechanism=mechanism, length=fits or fails or 1024, causal=changes.pop("causal", False))
    options = {"memory_limit_bytes": 2**30, "complete": True, "reason": "full"} | changes
    return Frontier(
        run="night", time="t", cell=cell, code="c", status=status, longest_fitting_tokens=fits,
        shortest_failing_tokens=fails, largest_tokens=2**24, relative_gap=0.1, time_limit_s=20, probes=probes,
        **options,
    )  # fmt: skip


LINES = [
    frontier("softmax", 2048, 2304, "timeout"),
    frontier("linear", 2**20, 2**21, "oom"),
    frontier("hyena", 2**17, None, "unsupported", reason="a cap", causal=True),
    frontier("mesa", None, 1, "crash", causal=True, complete=False, memory_limit_bytes=None),
]


def test_the_longest_comes_first_with_its_bracket_and_what_stopped_it(run):
    full, causal = frontier_section(LINES, [run()]).grids
    assert (full.caption, causal.caption) == (
        "cpu, float32, non-causal, forward, gaussian inputs",
        "cpu, float32, causal, forward, gaussian inputs",
    )
    assert full.rows == [
        ["linear · torch", "1M", "2M", "3 MiB", "1 GiB", "20 s", "oom: full"],
        ["softmax · torch", "2k", "2,304", "3 MiB", "1 GiB", "20 s", "timeout: full"],
    ]
    assert causal.rows == [
        ["hyena · torch", "128k", "–", "3 MiB", "1 GiB", "20 s", "unsupported: a cap"],
        ["mesa · torch", "–", "1", "–", "–", "20 s", "crash: full (the search was interrupted)"],
    ]


def test_there_is_no_section_without_frontiers_and_one_in_both_forms_with_them(run, record, tmp_path):
    assert frontier_section([], [run()]) is None
    page = write_report([record()], [run()], tmp_path, "title", LINES)
    for path in (page, tmp_path / "report.md"):
        assert path.read_text().count("Longest sequence that fits") >= 1
    only = write_report([], [run()], tmp_path, "title", LINES)
    assert "4 of 100 series" in only.read_text()
    assert "4 series, searched for the longest" in only.read_text()
    assert "League tables</h2>" not in only.read_text()
