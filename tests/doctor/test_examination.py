"""The verdict, the exit code, and a table that fits the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from linbench.doctor import examination
from linbench.doctor.examination import show
from linbench.doctor.finding import Finding
from linbench.doctor.speed import describe
from linbench.protocol import Survey
from linbench.record import Environment, Peaks

LONG = (
    "a long sentence of what was seen, with a [bracket] in it, and a good deal more than fits into one line of eighty"
)


def printed(findings: list[Finding], width: int = 80) -> tuple[int, str]:
    out = io.StringIO()
    return show(findings, Console(file=out, width=width, highlight=False)), out.getvalue()


def test_a_fit_machine_is_told_so_and_exits_with_0() -> None:
    code, text = printed([Finding("clock", "tsc"), Finding("load", "none")])
    assert code == 0
    assert "This machine is fit to measure." in text


def test_every_advice_is_told_whole_and_exits_with_1() -> None:
    advice = "stop the other processes, wait until the machine is quiet, and then look at all of this once again"
    code, text = printed([Finding("clock", "tsc"), Finding("load", LONG, advice)])
    assert code == 1
    assert "deserve doubt" in text
    assert f"- load: {advice}" in text
    assert "clock:" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_loses_no_word(width: int) -> None:
    _, text = printed([Finding("cpu A/A, one process", LONG)], width)
    assert max(map(len, text.splitlines())) <= width
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert " ".join(row.split("│")[2].strip() for row in rows).split() == LONG.split()


def test_peaks_are_told_from_the_smallest_set_to_the_largest() -> None:
    rates = {2**16 * 4**step: 8e10 / (step + 1) for step in range(8)}
    peaks = Peaks(
        threads=2,
        copy_bytes_per_s={str(size): rate for size, rate in rates.items()},
        product_flops_per_s={"float64": 1.234e12, "bfloat16": 5e9},
        product_shapes={},
        method="by hand",
    )
    copies, products = describe("cpu", peaks)
    assert copies.seen.startswith("GB/s: 80 in 64 KiB, ")
    assert copies.seen.endswith(" in 1 GiB")
    assert products.seen == "GFLOP/s with 2 threads: float64 1,234, bfloat16 5"
    nothing = peaks.model_copy(update={"copy_bytes_per_s": {}, "product_flops_per_s": {}})
    assert [finding.seen for finding in describe("cuda", nothing)] == ["none measured", "none above 1 GFLOP/s"]


class Broken:
    """A runner whose clock cannot be tried."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def survey(self, _request: object) -> Survey:
        return Survey(environment=self.environment, rates={}, missing_devices={})

    def try_clock(self, _request: object) -> object:
        raise RuntimeError("the clock of cuda cannot be tried: killed by SIGSEGV")


def test_a_clock_that_cannot_be_tried_is_a_finding_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[..., Environment]
) -> None:
    peaks = Peaks(threads=1, copy_bytes_per_s={}, product_flops_per_s={}, product_shapes={}, method="by hand")
    broken = Broken(environment(peaks={"cuda": peaks}))
    monkeypatch.setattr(examination.load, "foreign_load", lambda: Finding("other load", "none"))
    monkeypatch.setattr(examination.agreement, "between_processes", lambda *_: Finding("cpu A/A, processes", "well"))
    findings = {finding.subject: finding for finding in examination._findings(broken)}  # type: ignore[arg-type]
    assert findings["cuda timer bias"].seen.endswith("killed by SIGSEGV")
    assert findings["cuda timer bias"].advice
    assert "steal time" in findings
