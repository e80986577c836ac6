"""The next token: our step, in place, beside those of others, from the same state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts import rivals
from gpu_bench_parts.bench import Bench, RefusedError, build, draw, relative
from gpu_bench_parts.plan import Extent, Item, Shape
from gpu_bench_parts.side_by_side import AGREE, cell_of, described, why
from gpu_bench_parts.timing import Side, first_call_s, timed
from linbench import registry
from linbench.mechanisms.base import extras_at

PROMPT = 64
"""Tokens before the one that is timed: a state has one size, however many they are."""


def items(extent: Extent) -> list[Item]:
    """Every mechanism that decodes through kernels, over widths and B·H."""
    names = [name for name in extent.mechanisms if "triton" in registry.load(name).generating()]
    places = dict.fromkeys((shape.heads, shape.width) for shape in extent.shapes)
    tokens = min(PROMPT, extent.tokens)
    return [
        Item(
            "decode",
            f"{name} BH={heads} D={width}",
            {"mechanism": name, "shape": Shape(heads, tokens + 1, width)},
            modules=(registry.load(name).__module__,),
            expected_s=8,
            limit_s=120,
        )
        for heads, width in places
        for name in names
    ]


def run(item: Item, bench: Bench) -> dict[str, Any]:
    """Raw samples of every side that can be asked and agrees, and why the others are left out."""
    name, shape = item.values["mechanism"], item.values["shape"]
    batch, heads = shape.split
    cell = cell_of(name, "triton", shape, "decode", bench)
    ways = {way: build(name, way, heads, shape.width, shape.width, bench.device) for way in ("triton", "torch")}
    mechanism = ways["triton"]
    if (reason := mechanism.unsupported(cell)) is not None:
        raise RefusedError(reason)
    given = draw(mechanism, batch, shape.tokens, getattr(torch, cell.dtype), bench.device, grad=False)
    x = given.heads_first(*given.tensors)
    _, state = mechanism.prefill(**{key: tensor[:, :, :-1] for key, tensor in x.items()})
    row = [x[key][:, :, -1].contiguous() for key in ("q", "k", "v")]
    extras = {key: tensor.contiguous() for key, tensor in extras_at(dict(list(x.items())[3:]), -1).items()}
    steps: dict[str, rivals.Step] = {"ours": mechanism.step, "linbench torch": ways["torch"].step}
    left_out: dict[str, str] = {}
    for rival in (rival for rival in rivals.step_rivals() if rival.mechanism == name):
        try:
            steps[rival.name] = _positional(rival.make(mechanism))
        except ImportError as error:
            left_out[rival.name] = f"absent: {error}"
        except Exception as error:  # whatever a package of others raises where it does not work
            left_out[rival.name] = why(error)
    sides, first, distances = [], {}, {}
    expected = _output(mechanism.step(*row, copy.deepcopy(state), **extras))
    for side, step in steps.items():
        call = _call(step, row, copy.deepcopy(state), extras)
        try:
            distance = relative(_output(step(*row, copy.deepcopy(state), **extras)), expected)
            if not distance <= AGREE:
                raise RefusedError(f"disagrees: relative distance {distance:.2g}")
            first[side] = round(first_call_s(call, bench.device), 3)
        except Exception as error:  # the same
            left_out[side] = why(error)
            continue
        distances[side] = float(f"{distance:.3g}")
        sides.append(Side(side, call, "decode"))
    return {
        **described(shape, "decode", name, cell),
        "cost": {"flops": mechanism.pass_flops(cell), "min_bytes": mechanism.pass_bytes(cell)},
        "first_call_s": first,
        "distances": distances,
        "left_out": left_out,
        "times": timed(sides, bench),
    }


def _positional(step: rivals.Step) -> rivals.Step:
    """A rival's step, called as ours are: with the extras by name."""
    return lambda q, k, v, state, **extras: step(q, k, v, state, *extras.values())


def _call(step: rivals.Step, row: list[Tensor], state: Any, extras: dict[str, Tensor]) -> Callable[[], object]:
    """The same token again and again; ours goes on from the state that it has changed."""

    def call() -> object:
        with torch.no_grad():
            return step(*row, state, **extras)

    return call


def _output(found: Any) -> Tensor:
    """The output of a step that may give its state as well."""
    return found[0] if isinstance(found, tuple) else found
