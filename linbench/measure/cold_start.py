"""Cold start: what a first call costs in a process that has done nothing before."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.measure.cold_start_process import BOOTSTRAP
from linbench.record import ColdStart


class ColdStartError(RuntimeError):
    """A fresh process did not get through its stages."""


def measure_cold_start(call: Call, _output: Tensor, *, repeats: int = 3, steady_calls: int = 5) -> ColdStart:
    """Time the stages of ``repeats`` fresh interpreters, one after the other, from their start to a steady call.

    The environment is that of this process, and the working directory is on the path. Operating system and compilers
    keep caches between the repeats: the first one is not like the others, so all are kept. The device stage has not
    been taken on CUDA yet.

    Raises:
        ColdStartError: a process ended without an answer, or failed in a stage.
    """
    request = json.dumps(
        {
            "cell": call.cell.model_dump(mode="json", by_alias=True),
            "threads": torch.get_num_threads(),
            "steady_calls": steady_calls,
        }
    )
    answers = [_fresh_process(request) for _ in range(repeats)]
    steady = [[_ms(value) for value in answer["calls_ns"][1:]] for answer in answers]
    first = [_ms(answer["calls_ns"][0]) for answer in answers]
    return ColdStart(
        interpreter_ms=[_ms(answer["interpreter_ns"]) for answer in answers],
        import_torch_ms=[_ms(answer["import_torch_ns"]) for answer in answers],
        import_mechanism_ms=[_ms(answer["import_mechanism_ns"]) for answer in answers],
        device_ms=_all_ms(answers, "device_ns"),
        build_ms=[_ms(answer["build_ns"]) for answer in answers],
        first_call_ms=first,
        steady_calls_ms=steady,
        compile_ms=[one - statistics.median(later) for one, later in zip(first, steady, strict=True)],
        autotune_ms=_all_ms(answers, "autotune_ns"),
        compiler_cache=None if answers[0]["compiler_cache"] is None else [one["compiler_cache"] for one in answers],
    )


def _fresh_process(request: str) -> dict[str, Any]:
    started_ns = time.monotonic_ns()
    done = subprocess.run(
        [sys.executable, "-c", BOOTSTRAP], input=request, capture_output=True, text=True, check=False, errors="replace"
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        how = f"exit code {done.returncode}" if done.returncode >= 0 else f"signal {-done.returncode}"
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = f": {words[-1][:300]}" if words else ""
        raise ColdStartError(f"a fresh process ended with {how} and gave no answer{said}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise ColdStartError(f"a fresh process failed in its stage '{answer['stage']}': {answer['error']}")
    answer["interpreter_ns"] = answer["entered_ns"] - started_ns
    return answer


def _all_ms(answers: list[dict[str, Any]], name: str) -> list[float] | None:
    """One number for each process; None where a process did not have that stage."""
    values = [answer[name] for answer in answers]
    return None if any(value is None for value in values) else [_ms(value) for value in values]


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6
