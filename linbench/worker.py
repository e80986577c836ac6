"""The child: one task from start to end. For a cell: registry → inputs → check → measures.

Runs in a process of its own that was forked from the server of :mod:`linbench.runner`. Nothing here writes a result:
the answer goes back over the pipe, and a process that dies gives no answer.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from linbench import environment, inputs, registry
from linbench.cell import BACKWARD_PASSES, Cell, digest
from linbench.errors import UsageError
from linbench.foresight import foresee
from linbench.limits import MEMORY_SIGNS, die_with_parent, limit_memory
from linbench.measure.call import Call
from linbench.measure.check import check
from linbench.measure.error import NonFiniteOutputError, UndefinedError
from linbench.measure.honesty import DishonestTimingError
from linbench.measure.levels import UnmeasurableMemoryError
from linbench.measure.peaks import measure_peaks
from linbench.mechanisms import fused
from linbench.mechanisms.base import Mechanism
from linbench.prospect import Rates
from linbench.protocol import (
    ClockTrial,
    Examined,
    ExamineRequest,
    ForeseeRequest,
    Measure,
    MeasureRequest,
    NearestRequest,
    Outcome,
    ProbeRequest,
    Survey,
    SurveyRequest,
    TryClockRequest,
)
from linbench.record import MEASURED, Speed, Status
from linbench.roofline import impossible_below_ms

OF_MANY_TOKENS = ("error", "fit", "structure", "kernel")
"""Measures that judge the output of a sequence: a decoded token is checked, and not judged by them."""


def main(connection: Connection, task: str, request: str, log: str) -> None:
    """Entry point of the process: do one task and send one answer (a cell also sends the name of each stage)."""
    from linbench import probing  # it is built on this module

    os.setsid()  # Ctrl-C goes to the parent alone, and a kill reaches whatever a mechanism has started
    die_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(file=descriptor)
    sys.path.insert(0, str(Path.cwd()))  # a mechanism of the user's own lies beside the command that names it
    tasks: dict[str, Callable[[], str]] = {
        "survey": lambda: survey(SurveyRequest.model_validate_json(request)).model_dump_json(),
        "try_clock": lambda: try_clock(TryClockRequest.model_validate_json(request)).model_dump_json(),
        "foresee": lambda: foresee(ForeseeRequest.model_validate_json(request)).model_dump_json(),
        "measure": lambda: measure(
            MeasureRequest.model_validate_json(request), lambda stage: connection.send(("stage", stage))
        ).model_dump_json(by_alias=True),
        "examine": lambda: examine(
            ExamineRequest.model_validate_json(request), lambda stage: connection.send(("stage", stage))
        ).model_dump_json(),
        "probe": lambda: probing.probe(
            ProbeRequest.model_validate_json(request), lambda stage: connection.send(("stage", stage))
        ).model_dump_json(),
        "nearest": lambda: probing.nearest(NearestRequest.model_validate_json(request)).model_dump_json(),
    }
    connection.send(("answer", tasks[task]()))
    connection.close()


def measure(request: MeasureRequest, enter: Callable[[str], None]) -> Outcome:
    """One cell from start to end; ``enter`` is told the name of every stage."""
    stages = _Stages(enter)
    try:
        torch.set_num_threads(request.threads)
        if request.memory_limit_bytes is not None:
            limit_memory(request.memory_limit_bytes)
        stages.enter("build")
        call = prepare(request.cell)
        stages.enter("check")
        with fused.configurations(request.cell.implementation) as configurations:
            block, output = check(call)
        blocks: dict[str, Any] = {}
        for name, wanted in _applying(request).items() if block.passed else ():
            stages.enter(name)
            blocks[name] = _function(wanted)(call, output, **wanted.parameters)
        if block.passed:
            status, reason = _verdict(request, call.mechanism, blocks.get("speed"))
        else:
            status, reason = Status.INCORRECT, block.finding
        kept = blocks if status in MEASURED else {}
        told = {"check": block, "configurations": configurations or None}
        return Outcome(status=status, reason=reason, stages_s=stages.leave(), **told, **kept)
    except (NonFiniteOutputError, DishonestTimingError) as error:  # what the check did not see
        failed = block.model_copy(update={"passed": False, "finding": str(error)})
        return Outcome(status=Status.INCORRECT, reason=str(error), check=failed, stages_s=stages.leave())
    except Exception as error:
        status, why = classify(error)
        return Outcome(status=status, reason=f"{why} (stage: {stages.current})", stages_s=stages.leave())


def _applying(request: MeasureRequest) -> dict[str, Measure]:
    """The measures that say something of the cell's pass: of one token only what it costs."""
    single = request.cell.pass_ == "decode"
    return {name: wanted for name, wanted in request.measures.items() if not (single and name in OF_MANY_TOKENS)}


def examine(request: ExamineRequest, enter: Callable[[str], None]) -> Examined:
    """One property of a mechanism, or the list of them; ``enter`` is told the implementation and form."""
    from linbench.conformance import kit

    torch.set_num_threads(request.threads)
    if request.memory_limit_bytes is not None:
        limit_memory(request.memory_limit_bytes)
    asked = kit.Examination(
        request.mechanism,
        request.target,
        request.hyperparameters,
        tuple(request.implementations),
        request.quick,
        request.device,
    )
    try:
        if request.property is None:
            meanings = {name: known.meaning for name, known in kit.PROPERTIES.items()}
            return Examined(properties=meanings, notes=asked.notes())
        return Examined(finding=kit.examine(asked, request.property, enter))
    except UsageError as error:
        return Examined(usage_error=str(error))


def prepare(cell: Cell) -> Call:
    """Build the mechanism, draw the inputs, move both to the device."""
    device = torch.device(cell.device, int(cell.device_parameters.get("index") or 0))
    mechanism = registry.of_cell(cell).to(device)
    backward = cell.pass_ in BACKWARD_PASSES
    q, k, v = (tensor.to(device).requires_grad_(backward) for tensor in inputs.draw(cell))
    generator = torch.Generator().manual_seed(int(digest(["extras", cell.seed]), 16) % 2**63)
    extras = mechanism.make_extras(q, k, v, generator)
    gradient = None
    if backward:
        shape = (cell.batch, cell.heads, cell.length, cell.value_dim)
        gradient = torch.randn(shape, generator=generator).to(device, v.dtype)
    return Call(cell, mechanism, q, k, v, extras, gradient)


def survey(request: SurveyRequest) -> Survey:
    """The machine, and how fast it is."""
    torch.set_num_threads(request.threads)
    missing = {}
    if "cuda" in request.devices and not torch.cuda.is_available():
        missing["cuda"] = f"torch {torch.__version__} sees no CUDA device"
    present = [device for device in request.devices if device not in missing]
    peaks = {device: measure_peaks(torch.device(device)) for device in present}
    found = environment.describe(present, request.threads).model_copy(update={"peaks": peaks})
    rates = {device: Rates.of(seen) for device, seen in peaks.items()}
    return Survey(environment=found, rates=rates, missing_devices=missing)


def try_clock(request: TryClockRequest) -> ClockTrial:
    """What the clock says of kernels of known length, and of one short call against itself."""
    from linbench.measure.trial import against_itself, known_kernels

    torch.set_num_threads(request.threads)
    cell = Cell(mechanism="softmax", length=256, device=request.device)
    call = prepare(cell)
    told = f"exact attention at {cell.length} tokens"
    return ClockTrial(kernels=known_kernels(call), call=told, pairs_ms=against_itself(call))


def _function(wanted: Measure) -> Callable[..., object]:
    module, _, name = wanted.target.rpartition(".")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return function


def _verdict(request: MeasureRequest, mechanism: Mechanism, speed: Speed | None) -> tuple[Status, str | None]:
    """``impossible`` if the time is under the hardware's floor, ``noisy`` if others used the machine, else ``ok``."""
    if speed is None:
        return Status.OK, None
    fastest = min(speed.samples_ms)
    flops, min_bytes = mechanism.pass_flops(request.cell), mechanism.pass_bytes(request.cell)
    floors = impossible_below_ms(request.cell, flops, min_bytes, request.peaks, speed.threads)
    if (ceiling := environment.flops_ceiling(request.cell, speed.threads)) is not None:
        floors["do the mechanism's arithmetic"] = flops / ceiling * 1e3
    work, floor = max(floors.items(), key=lambda known: known[1], default=("", 0.0))
    if fastest < floor:
        return Status.IMPOSSIBLE, f"{fastest:.4g} ms is faster than this device can {work} ({floor:.4g} ms)"
    device = speed.device_conditions
    if device is not None and device.lowered_samples:
        told = ", ".join(device.throttle_reasons)
        return Status.NOISY, f"{device.lowered_samples} samples were taken with lowered clocks ({told})"
    foreign = speed.foreign_cpu_cores
    if request.cell.device == "cpu" and foreign is not None and foreign > environment.FOREIGN_CPU_BOUND:
        return Status.NOISY, f"other processes kept {foreign:.2f} cores busy while this was timed"
    return Status.OK, None


def classify(error: Exception) -> tuple[Status, str]:
    """The status that an exception means, and its reason in one line."""
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    module = type(error).__module__
    if isinstance(error, UsageError | NotImplementedError | UndefinedError | UnmeasurableMemoryError):
        return Status.UNSUPPORTED, str(error) or text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in MEMORY_SIGNS):
        return Status.OOM, text
    if module.startswith(("triton.", "torch._dynamo", "torch._inductor")):
        return Status.COMPILE_ERROR, text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return Status.CRASH, f"{text} at {Path(place.filename).name}:{place.lineno}"


class _Stages:
    """Seconds spent in each stage."""

    def __init__(self, enter: Callable[[str], None]) -> None:
        self._tell = enter
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self.current = "start"

    def enter(self, name: str) -> None:
        self.leave()
        self.current = name
        self._tell(name)

    def leave(self) -> dict[str, float]:
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self._since = now
        return self._seconds
