"""The fresh interpreter of a cold start: it goes through the stages once and prints their times as one line of JSON.

Started by :mod:`linbench.measure.cold_start` through ``BOOTSTRAP``, which reads the clock before anything is imported.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

BOOTSTRAP = (
    "import time; entered = time.monotonic_ns(); import torch; imported = time.monotonic_ns(); "
    "from linbench.measure.cold_start_process import main; main(entered, imported)"
)
COMPILERS = ("triton", "torch._inductor.codecache")
"""Modules whose caches make a second start shorter than the first."""


def main(entered_ns: int, imported_ns: int) -> None:
    """Read the request from the standard input, answer on the standard output: times in ns, or a stage and its error.

    Args:
        entered_ns: monotonic clock at the interpreter's first line.
        imported_ns: after ``import torch``.
    """
    answer = sys.stdout
    sys.stdout = sys.stderr  # a mechanism may print; the answer stays alone
    stages = _Stages(imported_ns)
    try:
        found = _stages(json.load(sys.stdin), stages)
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        found = {"stage": stages.current, "error": f"{type(error).__name__}: {text}"}
    print(json.dumps({"entered_ns": entered_ns, "import_torch_ns": imported_ns - entered_ns, **found}), file=answer)


class _Stages:
    """The stage that is under way, and the time since it began."""

    def __init__(self, since_ns: int) -> None:
        self.current = "import_mechanism"
        self._since_ns = since_ns

    def begin(self, name: str) -> None:
        self.current = name
        self._since_ns = time.monotonic_ns()

    def end(self) -> int:
        return time.monotonic_ns() - self._since_ns


def _stages(request: dict[str, Any], stages: _Stages) -> dict[str, Any]:
    sys.path.insert(0, str(Path.cwd()))  # as the worker does
    from linbench import registry

    named = request["cell"]
    registry.load(named["mechanism"], named.get("target"))
    times: dict[str, Any] = {"import_mechanism_ns": stages.end()}

    import torch

    from linbench import worker  # draws a cell's inputs; needs the whole harness, and is timed nowhere
    from linbench.cell import Cell
    from linbench.limits import die_with_parent

    die_with_parent()
    torch.set_num_threads(request["threads"])
    cell = Cell.model_validate(named)
    device = torch.device(cell.device, int(cell.device_parameters.get("index") or 0))
    times["device_ns"] = None
    if device.type == "cuda":
        stages.begin("device")
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
        times["device_ns"] = stages.end()
    stages.begin("build")
    mechanism = registry.of_cell(cell).to(device)
    times["build_ns"] = stages.end()
    stages.begin("inputs")
    call = replace(worker.prepare(cell), mechanism=mechanism)
    before = {name: _cache_state(name) for name in COMPILERS}
    calls = []
    for index in range(1 + request["steady_calls"]):
        part = call.timed_part()
        stages.begin("first_call" if index == 0 else "steady_calls")
        part()
        if device.type == "cuda":
            torch.cuda.synchronize()
        calls.append(stages.end())
    used = [before[name] for name in COMPILERS if name in sys.modules]
    state = None if not used else "filled" if "filled" in used else "empty"
    return {**times, "calls_ns": calls, "autotune_ns": _autotune_ns(), "compiler_cache": state}


def _cache_state(compiler: str) -> Literal["empty", "filled"]:
    """Whether the folder in which a compiler keeps what it has compiled holds anything."""
    if compiler == "triton":
        folder = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    else:
        user = "".join(c if c.isalnum() else "_" for c in _user())
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(Path(tempfile.gettempdir(), f"torchinductor_{user}"))
    with contextlib.suppress(OSError):
        return "filled" if any(Path(folder).iterdir()) else "empty"
    return "empty"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _autotune_ns() -> int | None:
    """Time that Triton's autotuners have spent on trying configurations; None where none has tuned."""
    module = sys.modules.get("triton.runtime.autotuner")
    if module is None:
        return None
    tuners = [one for one in gc.get_objects() if issubclass(type(one), module.Autotuner)]
    spent = [one.bench_time for one in tuners if getattr(one, "bench_time", None) is not None]
    return round(sum(spent) * 1e9) if spent else None
