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
from linbench.cell import Cell, digest
from linbench.errors import UsageError
from linbench.limits import die_with_parent, limit_memory
from linbench.measure.call import Call
from linbench.measure.check import check, check_rows
from linbench.measure.error import NonFiniteOutputError, UndefinedError
from linbench.measure.honesty import DishonestTimingError
from linbench.measure.memory import UnmeasurableMemoryError
from linbench.mechanisms import fused
from linbench.mechanisms.base import Mechanism
from linbench.plan import Prospect, Rates
from linbench.protocol import (
    Examined,
    ExamineRequest,
    ForeseeRequest,
    Foresight,
    Measure,
    MeasureRequest,
    Outcome,
    Survey,
    SurveyRequest,
)
from linbench.provenance import source_hash
from linbench.record import MEASURED, Cost, Speed, Status


def main(connection: Connection, task: str, request: str, log: str) -> None:
    """Entry point of the process: do one task and send one answer (a cell also sends the name of each stage)."""
    os.setsid()  # Ctrl-C goes to the parent alone, and a kill reaches whatever a mechanism has started
    die_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(file=descriptor)
    sys.path.insert(0, str(Path.cwd()))  # a mechanism of the user's own lies beside the command that names it
    tasks: dict[str, Callable[[], str]] = {
        "survey": lambda: survey(SurveyRequest.model_validate_json(request)).model_dump_json(),
        "foresee": lambda: foresee(ForeseeRequest.model_validate_json(request)).model_dump_json(),
        "measure": lambda: measure(
            MeasureRequest.model_validate_json(request), lambda stage: connection.send(("stage", stage))
        ).model_dump_json(by_alias=True),
        "examine": lambda: examine(
            ExamineRequest.model_validate_json(request), lambda stage: connection.send(("stage", stage))
        ).model_dump_json(),
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
        block, output = check(call)
        blocks: dict[str, Any] = {}
        for name, wanted in request.measures.items() if block.passed else ():
            stages.enter(name)
            blocks[name] = _function(wanted)(call, output, **wanted.parameters)
        if block.passed:
            status, reason = _verdict(request, call.mechanism, blocks.get("speed"))
        else:
            status, reason = Status.INCORRECT, block.finding
        kept = blocks if status in MEASURED else {}
        return Outcome(status=status, reason=reason, check=block, stages_s=stages.leave(), **kept)
    except (NonFiniteOutputError, DishonestTimingError) as error:  # what the check did not see
        failed = block.model_copy(update={"passed": False, "finding": str(error)})
        return Outcome(status=Status.INCORRECT, reason=str(error), check=failed, stages_s=stages.leave())
    except Exception as error:
        status, why = classify(error)
        return Outcome(status=status, reason=f"{why} (stage: {stages.current})", stages_s=stages.leave())


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
    backward = cell.pass_ != "forward"
    q, k, v = (tensor.to(device).requires_grad_(backward) for tensor in inputs.draw(cell))
    generator = torch.Generator().manual_seed(int(digest(["extras", cell.seed]), 16) % 2**63)
    extras = mechanism.make_extras(q, k, v, generator)
    gradient = None
    if backward:
        shape = (cell.batch, cell.heads, cell.length, cell.value_dim)
        gradient = torch.randn(shape, generator=generator).to(device, v.dtype)
    return Call(cell, mechanism, q, k, v, extras, gradient)


def foresee(request: ForeseeRequest) -> Foresight:
    """What each cell costs, whether it can run, and which source would make its numbers."""
    return Foresight(prospects=[_prospect(cell, request) for cell in request.cells])


def _prospect(cell: Cell, request: ForeseeRequest) -> Prospect:
    try:
        cls = registry.load(cell.mechanism, cell.target)
    except UsageError as error:
        if cell.mechanism in registry.plug_ins():  # it joins every sweep, and must not take it with it
            return Prospect(unsupported=str(error), code="none")
        return Prospect(usage_error=str(error))
    try:
        if cell.implementation not in cls.implementations():
            choices = ", ".join(cls.implementations())
            reason = f"{cell.mechanism} has no implementation '{cell.implementation}', only {choices}"
            return Prospect(unsupported=reason, code="none")
        mechanism = registry.of_cell(cell)
        lacking = mechanism.unsupported(cell) or inputs.unsupported(cell) or fused.untimed(cell)
        family = cell.inputs_target or inputs.families()[cell.inputs].replace(":", ".")
        modules = [cls.__module__, family.rpartition(".")[0], "linbench.measure.check"]
        modules += [wanted.target.rpartition(".")[0] for wanted in request.measures.values()]
        made_with = [source_hash(modules), torch.__version__, request.threads, _settings(request.measures)]
        if (data := inputs.fingerprint(cell)) is not None:
            made_with.append(data)
        if lacking:
            return Prospect(unsupported=lacking, code=digest(made_with))
        state = mechanism.state_bytes(cell.length, getattr(torch, cell.dtype))
        cost = Cost(
            flops=mechanism.flops(cell),
            min_bytes=mechanism.min_bytes(cell),
            state_bytes=state,
            claimed_time=cls.description.time,
            claimed_memory=cls.description.memory,
        )
        rows = check_rows(cell.length, cell.batch * cell.heads)
        return Prospect(cost=cost, code=digest(made_with), check_rows=rows, sequential_check=cls.sequential_reference)
    except UsageError as error:
        return Prospect(usage_error=str(error))


def _settings(measures: dict[str, Measure]) -> object:
    return {name: measure.model_dump(mode="json") for name, measure in measures.items()}


def survey(request: SurveyRequest) -> Survey:
    """The machine, and how fast it is, roughly."""
    torch.set_num_threads(request.threads)
    missing = {}
    if "cuda" in request.devices and not torch.cuda.is_available():
        missing["cuda"] = f"torch {torch.__version__} sees no CUDA device"
    present = [device for device in request.devices if device not in missing]
    return Survey(
        environment=environment.describe(present, request.threads),
        rates={device: _rates(torch.device(device)) for device in present},
        missing_devices=missing,
    )


def _rates(device: torch.device) -> Rates:
    """Matrix-product and copy rates from a few milliseconds of each."""

    def fastest(action: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    width = 512 if device.type == "cpu" else 4096
    square = torch.randn(width, width, device=device)
    source = torch.randn(2**22 if device.type == "cpu" else 2**27, device=device)
    target = torch.empty_like(source)
    return Rates(
        flops_per_s=2 * width**3 / fastest(lambda: square @ square),
        bytes_per_s=8 * source.numel() / fastest(lambda: target.copy_(source)),
    )


def _function(wanted: Measure) -> Callable[..., object]:
    module, _, name = wanted.target.rpartition(".")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return function


def _verdict(request: MeasureRequest, mechanism: Mechanism, speed: Speed | None) -> tuple[Status, str | None]:
    """``impossible`` if the time is under the hardware's floor, ``noisy`` if others used the machine, else ``ok``."""
    if speed is None:
        return Status.OK, None
    fastest = min(speed.samples_ms)
    ceiling = environment.flops_ceiling(request.cell, speed.threads)
    if ceiling is not None and fastest < (floor := mechanism.flops(request.cell) / ceiling * 1e3):
        reason = f"{fastest:.4g} ms is faster than this device can do the mechanism's arithmetic ({floor:.4g} ms)"
        return Status.IMPOSSIBLE, reason
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
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("can't allocate memory", "out of memory", "bad_alloc", "not enough memory")
    ):
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
