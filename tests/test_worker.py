"""The worker: every exception means one status, with its reason in one line."""

from __future__ import annotations

import pytest
import torch

from linbench import worker
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.measure.error import UndefinedError
from linbench.protocol import ForeseeRequest, Measure, MeasureRequest
from linbench.record import Status

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
    first, second = worker.foresee(request).prospects
    assert (first.code == second.code) is same


def test_other_threads_or_measures_are_other_numbers() -> None:
    def code(**changes: object) -> str:
        base = {"cells": [cell()], "measures": {"error": ERROR}, "threads": 1}
        return worker.foresee(ForeseeRequest(**(base | changes))).prospects[0].code  # type: ignore[arg-type]

    assert len({code(), code(threads=2), code(measures={"speed": SPEED})}) == 3


def test_the_prospect_says_what_a_cell_costs_and_why_it_cannot_run() -> None:
    cells = [cell(), cell(implementation="fla"), cell().model_copy(update={"mechanism": "nothing"})]
    good, lacking, unknown = worker.foresee(ForeseeRequest(cells=cells, measures={}, threads=1)).prospects
    assert good.cost is not None
    assert good.cost.flops > 0
    assert "only reference, torch, triton" in (lacking.unsupported or "")
    assert "unknown mechanism 'nothing'" in (unknown.usage_error or "")
