"""Other configurations tried on the device at hand; nothing does that unless it is asked for."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linbench_kernels import tables
from linbench_kernels.choices import Choice, noted, replaced
from linbench_kernels.device import INTERPRETED

TRIED: dict[str, tuple[Any, ...]] = {
    "chunk": (16, 32, 64, 128),
    "columns": (16, 32, 64, 128, 256),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4),
}
"""Values that a setting may have; its neighbours are the next ones."""
FIXED_CHUNK = ("channel_decay", "delta")
"""Families whose chunk is no choice of a configuration alone."""
SAME = 5e-3
"""Relative distance of results in bf16: another order of sums, and no other result."""
CLIMBS, REPEATS = 3, 10
WORTH = 0.98
"""Share of the time that a configuration may take to be taken: less is noise."""


def autotune(
    call: Callable[[], Any], *, seconds: Callable[[Callable[[], Any]], float] | None = None, path: Path | None = None
) -> list[dict[str, Any]]:
    """Try neighbours of every configuration that a call of kernels takes, and keep the fastest for this device.

    What is found lies in the user's cache (:func:`~linbench_kernels.tables.cache_file`) and is taken from then on, in
    later processes too.

    Args:
        call: calls operators of this package, backward included where that is to be tuned, and returns tensors: one,
            or several in a tuple.
        seconds: the time of a call; that of the device when None.
        path: the file that is written; that of the device when None.

    Returns:
        What was written: ``family``, ``task``, ``config`` and ``gain``, the time before over that after.

    Raises:
        ValueError: there is no GPU to time kernels on.
    """
    if seconds is None and (INTERPRETED or not torch.cuda.is_available()):
        raise ValueError("autotuning times kernels on a GPU, and there is none here for them")
    clock = seconds or device_seconds
    with noted() as choices:
        expected = results(call())
    found = [_climbed(choice, call, expected, clock) for choice in choices]
    path = path or tables.cache_file()
    if path is not None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a clock of the caller's"
        tables.write(path, f"autotuned on {name}", found)
    tables.forget()
    return found


def _climbed(
    choice: Choice, call: Callable[[], Any], expected: list[Tensor], seconds: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    at, before, seen = choice.config, seconds(call), {choice.config}
    least = before
    for _ in range(CLIMBS):
        start = at
        for candidate in neighbours(dataclasses.replace(choice, config=start)):
            if candidate in seen:
                continue
            seen.add(candidate)
            took = _trial(choice, candidate, call, expected, seconds)
            if took is not None and took < WORTH * least:
                at, least = candidate, took
        if at == start:
            break
    task = tables.described(choice.given, tables.rule_of(choice.family))
    return {"family": choice.family, "task": task, "config": dataclasses.asdict(at), "gain": before / least}


def _trial(
    choice: Choice,
    candidate: Any,
    call: Callable[[], Any],
    expected: list[Tensor],
    seconds: Callable[[Callable[[], Any]], float],
) -> float | None:
    """The time with a candidate; None where it cannot be compiled, or computes something else."""

    def changed(one: Choice) -> Any:
        return candidate if (one.family, one.task) == (choice.family, choice.task) else one.config

    with replaced(changed):
        try:
            found = results(call())
        except Exception:  # too much shared memory, or whatever a compiler says: no candidate
            return None
        if not all(_distance(x, y) <= SAME for x, y in zip(found, expected, strict=True)):
            return None
        return seconds(call)


def neighbours(choice: Choice) -> list[Any]:
    """Configurations that differ in one setting, by one place."""
    if not dataclasses.is_dataclass(choice.config) or isinstance(choice.config, type):
        return []
    found = []
    for setting, values in TRIED.items():
        now = getattr(choice.config, setting, None)
        if now not in values or (setting == "chunk" and choice.family in FIXED_CHUNK):
            continue
        place = values.index(now)
        found += [{setting: value} for value in (*values[max(place - 1, 0) : place], *values[place + 1 : place + 2])]
    if hasattr(choice.config, "tma") and getattr(choice.task, "aligned", False):
        found.append({"tma": not choice.config.tma})
    return [dataclasses.replace(choice.config, **change) for change in found]


def results(returned: Any) -> list[Tensor]:
    """The tensors of what a call returns."""
    several = returned if isinstance(returned, tuple | list) else (returned,)
    return [x.detach().clone() for x in several if isinstance(x, Tensor)]


def device_seconds(call: Callable[[], Any]) -> float:
    """The median time of a call on the device, by events of CUDA, after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return float(statistics.median(times))


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30))
