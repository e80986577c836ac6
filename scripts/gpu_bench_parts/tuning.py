"""Would a neighbouring configuration be faster? One number of a table changed at a time, beside what the table has.

A neighbour that is faster is changed again, as long as that helps. What wins is proposed in ``tables.json``, and
``tuned/ARCH.json`` beside it is the table of that class of devices as ``linbench_kernels/tuned`` has it. Nothing is
read from here: whoever takes it over puts it there, and the costs of its binaries into theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from linbench_kernels import tables
from linbench_kernels.autotune import SAME, neighbours
from linbench_kernels.choices import Choice, noted, replaced
from torch import Tensor

from gpu_bench_parts.bench import Bench, RefusedError, build, draw, relative
from gpu_bench_parts.plan import CENTRE, Extent, Item, Shape
from gpu_bench_parts.side_by_side import PASSES, call_of, cell_of, results, why
from gpu_bench_parts.timing import Side, timed
from linbench import registry
from linbench.stats import ratio_of_medians

CLIMBS = 3
TUNED = (Shape(CENTRE, 8192, 128), Shape(CENTRE, 8192, 64))


def items(extent: Extent) -> list[Item]:
    """Every mechanism, both passes, at two widths."""
    shapes = extent.shapes[:1] if extent.rehearsal else TUNED
    return [
        Item(
            "tuning",
            f"{name} {pass_} {shape}",
            {"mechanism": name, "pass": pass_, "shape": shape},
            modules=(registry.load(name).__module__,),
            expected_s=60,
            limit_s=300,
        )
        for shape in shapes
        for pass_ in PASSES
        for name in extent.mechanisms
    ]


def run(item: Item, bench: Bench) -> dict[str, Any]:
    """What was tried, each with the time of the table's configuration over its own, and the best of every kernel."""
    name, shape, pass_ = item.values["mechanism"], item.values["shape"], item.values["pass"]
    batch, heads = shape.split
    cell = cell_of(name, "triton", shape, pass_, bench)
    mechanism = build(name, "triton", heads, shape.width, shape.width, bench.device)
    if (reason := mechanism.unsupported(cell)) is not None:
        raise RefusedError(reason)
    dtype = getattr(torch, cell.dtype)
    backward = pass_ == "forward_backward"
    given = draw(mechanism, batch, shape.tokens, dtype, bench.device, grad=backward)
    toward = torch.randn(batch, shape.tokens, heads, shape.width, device=bench.device).to(dtype) if backward else None
    call = call_of(given.ours, given, toward)
    with noted() as choices:
        expected = results(call())
    trials: list[dict[str, Any]] = []
    best = []
    for choice in choices:
        if backward and choice.kernel == "forward":
            continue  # tried in its own pass
        best.append({**named(choice, choice.config), **climb(choice, call, expected, bench, trials)})
    return {"mechanism": name, "pass": pass_, "shape": str(shape), "trials": trials, "best": best}


def climb(
    choice: Choice, call: Callable[[], object], expected: list[Tensor], bench: Bench, trials: list[dict[str, Any]]
) -> dict[str, Any]:
    """The best configuration found for one kernel, and how many times faster the whole call is with it."""
    at, gain, seen = choice.config, 1.0, {choice.config}
    for _ in range(CLIMBS):
        ahead = None
        for candidate in neighbours(dataclasses.replace(choice, config=at))[: 2 if bench.extent.rehearsal else None]:
            if candidate in seen or bench.left_s < 10:
                continue
            seen.add(candidate)
            found = trial(choice, candidate, call, expected, bench)
            trials.append({**named(choice, candidate), **found})
            if found.get("low", 0.0) > 1 and found["ratio"] > gain:
                ahead, gain = candidate, found["ratio"]
        if ahead is None:
            break
        at = ahead
    return {"best": dataclasses.asdict(at), "ratio": gain, "changed": at != choice.config}


def named(choice: Choice, config: Any) -> dict[str, Any]:
    """Which kernel, for which task, and a configuration of it."""
    task = tables.described(choice.given, tables.rule_of(choice.family))
    return {"family": choice.family, "kernel": choice.kernel, "task": task, "config": dataclasses.asdict(config)}


def trial(
    choice: Choice, candidate: Any, call: Callable[[], object], expected: list[Tensor], bench: Bench
) -> dict[str, Any]:
    """The time with the table's configuration over that with the candidate, or why that is none."""

    def changed(one: Choice) -> Any:
        return candidate if (one.family, one.task) == (choice.family, choice.task) else one.config

    def with_candidate() -> object:
        with replaced(changed):
            return call()

    try:
        distance = max(relative(x, y) for x, y in zip(results(with_candidate()), expected, strict=True))
    except Exception as error:  # too much shared memory, or whatever a compiler says
        return {"refused": why(error)}
    if not distance <= SAME:
        return {"wrong": f"relative distance {distance:.2g}"}
    times = timed([Side("table", call, "tried"), Side("candidate", with_candidate, "tried")], bench, device_alone=True)
    table, tried = (times[side]["samples_ms"] for side in ("table", "candidate"))
    if not tried:
        return {"untimed": "a rehearsal"}
    ratio = ratio_of_medians([table], [tried])
    told = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "table_ms": median(table)}
    return {key: float(f"{x:.5g}") for key, x in told.items()}
