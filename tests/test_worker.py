"""The worker: every exception means one status, with its reason in one line."""

from __future__ import annotations

import pytest
import torch

from linbench import worker
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.foresight import foresee
from linbench.measure.error import UndefinedError
from linbench.protocol import ForeseeRequest, Measure, MeasureRequest, Outcome, SurveyRequest
from linbench.record import Peaks, Status

ERROR = Measure(target="linbench.measure.judge.judge_error")
SPEED = Measure(target="linbench.measure.clock.measure_speed", parameters={"budget_s": 0.01})


def from_module(module: str) -> Exception:
    """An exception of a class that a library defines."""
    return type("SomeError", (Exception,), {"__module__": module})("it does not compile\nat all")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), Status.OOM),
        (torch.OutOfMemoryError("CUDA out of memory"), Status.OOM),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), Status.OOM),
        (RuntimeError("std::bad_alloc"), Status.OOM),
        (from_module("triton.compiler.errors"), Status.COMPILE_ERROR),
        (from_module("torch._inductor.exc"), Status.COMPILE_ERROR),
        (UsageError("it has no causal form"), Status.UNSUPPORTED),
        (NotImplementedError("not on this device"), Status.UNSUPPORTED),
        (UndefinedError("exact attention is zero"), Status.UNSUPPORTED),
        (ValueError("an odd value"), Status.CRASH),
    ],
)
def test_every_exception_means_one_status(error: Exception, status: Status) -> None:
    try:
        raise error
    except Exception as raised:
        found, reason = worker.classify(raised)
    assert found is status
    assert reason
    assert "\n" not in reason


def cell(**changes: object) -> Cell:
    return Cell(mechanism="linear", length=20, heads=2, head_dim=5, value_dim=3, **changes)  # type: ignore[arg-type]


def test_a_cell_goes_through_its_stages_in_order() -> None:
    stages: list[str] = []
    request = MeasureRequest(cell=cell(), measures={"speed": SPEED, "error": ERROR}, threads=1, memory_limit_bytes=None)
    outcome = worker.measure(request, stages.append)
    assert stages == ["build", "check", "speed", "error"]
    assert outcome.status in (Status.OK, Status.NOISY)
    assert set(outcome.stages_s) == {"start", *stages}
    assert outcome.check is not None
    assert outcome.speed is not None
    assert outcome.error is not None
    assert outcome.memory is None


def test_a_time_under_the_floor_of_measured_peaks_is_impossible() -> None:
    """A real mechanism, on a device that is said to copy one byte a second."""

    def outcome(bytes_per_s: float) -> Outcome:
        rates = {"copy_bytes_per_s": {"65536": bytes_per_s}, "product_flops_per_s": {"float32": 1.0}}
        peaks = Peaks(threads=1, product_shapes={}, method="by hand", **rates)  # type: ignore[arg-type]
        request = MeasureRequest(
            cell=cell(), measures={"speed": SPEED}, threads=1, memory_limit_bytes=None, peaks=peaks
        )
        return worker.measure(request, lambda _: None)

    slow = outcome(1.0)
    assert slow.status is Status.IMPOSSIBLE
    assert "faster than this device can move the mechanism's bytes" in (slow.reason or "")
    assert slow.speed is None
    assert outcome(1e15).status in (Status.OK, Status.NOISY)


def test_values_that_are_all_zero_have_no_error_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = lambda cell: tuple(torch.zeros(1, 2, 20, width) for width in (5, 5, 3))  # noqa: E731
    monkeypatch.setattr("linbench.inputs.draw", zeros)
    request = MeasureRequest(cell=cell(), measures={"error": ERROR}, threads=1, memory_limit_bytes=None)
    outcome = worker.measure(request, lambda _: None)
    assert outcome.status is Status.UNSUPPORTED
    assert "zero" in (outcome.reason or "")


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"hyperparameters": {}}, True),
        ({"seed": 3}, True),  # the code is the same; the cell's key differs
        ({"mechanism": "retnet", "causal": True}, False),
        ({"inputs": "smooth"}, False),
    ],
)
def test_the_code_hash_covers_what_runs_and_nothing_else(changed: dict[str, object], same: bool) -> None:
    changed_cell = cell().model_copy(update=changed)
    request = ForeseeRequest(cells=[cell(), changed_cell], measures={"error": ERROR}, threads=1)
    first, second = foresee(request).prospects
    assert (first.code == second.code) is same


def test_other_threads_or_measures_are_other_numbers() -> None:
    def code(**changes: object) -> str:
        base = {"cells": [cell()], "measures": {"error": ERROR}, "threads": 1}
        return foresee(ForeseeRequest(**(base | changes))).prospects[0].code  # type: ignore[arg-type]

    assert len({code(), code(threads=2), code(measures={"speed": SPEED})}) == 3


def test_the_prospect_says_what_a_cell_costs_and_why_it_cannot_run() -> None:
    cells = [cell(), cell(implementation="fla"), cell().model_copy(update={"mechanism": "nothing"})]
    good, lacking, unknown = foresee(ForeseeRequest(cells=cells, measures={}, threads=1)).prospects
    assert good.cost is not None
    assert good.cost.flops > 0
    assert "only reference, torch, triton" in (lacking.unsupported or "")
    assert "unknown mechanism 'nothing'" in (unknown.usage_error or "")


def test_the_survey_measures_the_devices_that_are_there_and_names_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Peaks(
        threads=1,
        copy_bytes_per_s={"65536": 2e10, "1048576": 3e9},
        product_flops_per_s={"float32": 7e10},
        product_shapes={},
        method="by hand",
    )
    monkeypatch.setattr(worker, "measure_peaks", lambda _device: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    survey = worker.survey(SurveyRequest(devices=["cpu", "cuda"], threads=1))
    assert survey.environment.peaks == {"cpu": known}
    assert survey.rates["cpu"].model_dump() == {"flops_per_s": 7e10, "bytes_per_s": 3e9}
    assert "sees no CUDA device" in survey.missing_devices["cuda"]
