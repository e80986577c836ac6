"""Times of our kernels beside those of others, on the same tensors, by turns: who is faster at which size?

Tensors lie in memory as models have them, ``[B, N, H, ·]``, which is how the others want them; ours take any strides.
What disagrees with ours is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts import rivals
from gpu_bench_parts.bench import POISONED, Bench, Given, RefusedError, build, draw, relative
from gpu_bench_parts.plan import Extent, Item, Shape
from gpu_bench_parts.timing import Side, first_call_s, timed
from linbench import registry
from linbench.cell import Cell
from linbench.mechanisms import fused

PASSES = ("forward", "forward_backward")
AGREE = 3e-2
"""Relative distance of outputs, and of gradients of q, k and v, in bf16."""
HELD = {"forward": 12, "forward_backward": 45}
"""Tensors of q's size that the worst of the sides may hold at once: inputs, results, states of chunks in fp32."""


def items(extent: Extent) -> list[Item]:
    """Shapes in the order of their value; at each both passes of exact attention and of every mechanism."""
    return [
        Item(
            "side_by_side",
            f"{name} {pass_} {shape}",
            {"mechanism": name, "pass": pass_, "shape": shape},
            modules=(registry.load(name).__module__,),
            expected_s=15,
            limit_s=150,
        )
        for shape in extent.shapes
        for pass_ in PASSES
        for name in dict.fromkeys(("softmax", *extent.mechanisms))
    ]


def run(item: Item, bench: Bench) -> dict[str, Any]:
    """Raw samples of every side that can be asked and agrees, and why the others are left out."""
    name, shape, pass_ = item.values["mechanism"], item.values["shape"], item.values["pass"]
    batch, heads = shape.split
    _require_room(shape, pass_, bench)
    implementation = "torch" if name == "softmax" else "triton"
    mechanism = build(name, implementation, heads, shape.width, shape.width, bench.device)
    cell = cell_of(name, implementation, shape, pass_, bench)
    if (reason := mechanism.unsupported(cell)) is not None:
        raise RefusedError(reason)
    dtype = getattr(torch, cell.dtype)
    backward = pass_ == "forward_backward"
    given = draw(mechanism, batch, shape.tokens, dtype, bench.device, grad=backward)
    toward = torch.randn(batch, shape.tokens, heads, shape.width, device=bench.device).to(dtype) if backward else None
    ours = call_of(given.ours, given, toward)
    sides, first = [Side("ours", ours, pass_)], {}
    with fused.configurations(implementation) as chosen:
        first["ours"] = round(first_call_s(ours, bench.device), 3)
    distances, left_out = add_rivals(name, sides, first, given, toward, bench)
    return {
        **described(shape, pass_, name, cell),
        "cost": {"flops": mechanism.pass_flops(cell), "min_bytes": mechanism.pass_bytes(cell)},
        "configurations": chosen,
        "first_call_s": first,
        "distances": distances,
        "left_out": left_out,
        "times": timed(sides, bench),
    }


def described(shape: Shape, pass_: str, name: str, cell: Cell) -> dict[str, Any]:
    """What was timed, for whoever reads the line."""
    sizes = {"batch": cell.batch, "heads": cell.heads, "tokens": shape.tokens, "width": shape.width}
    return {"mechanism": name, "pass": pass_, "dtype": cell.dtype, **sizes}


def cell_of(name: str, implementation: str, shape: Shape, pass_: str, bench: Bench) -> Cell:
    """The same as a cell of linbench, for its costs."""
    batch, heads = shape.split
    sizes = {"batch": batch, "heads": heads, "length": shape.tokens, "head_dim": shape.width, "value_dim": shape.width}
    dtype = "float32" if bench.extent.rehearsal else "bfloat16"
    told = {"mechanism": name, "implementation": implementation, "causal": True, "dtype": dtype, "pass": pass_}
    return Cell.model_validate({**told, **sizes, "device": bench.device.type})


def _require_room(shape: Shape, pass_: str, bench: Bench) -> None:
    if bench.extent.rehearsal:
        return
    free, needed = torch.cuda.mem_get_info(bench.device)[0], HELD[pass_] * shape.tensor_bytes
    if needed > free:
        raise RefusedError(f"about {needed / 2**30:.0f} GiB are needed, {free / 2**30:.0f} are free")


def add_rivals(
    name: str, sides: list[Side], first: dict[str, float], given: Given, toward: Tensor | None, bench: Bench
) -> tuple[dict[str, float], dict[str, str]]:
    """Append those that can be asked and agree; their distances, and the reasons of all others."""
    distances: dict[str, float] = {}
    left_out: dict[str, str] = {}
    expected = results(sides[0].call())
    for rival in (rival for rival in rivals.rivals() if rival.mechanism == name):
        try:
            if toward is not None and not rival.backward:
                raise RefusedError("it has no backward")
            call = call_of(rival.make(given.mechanism), *laid_out(rival, given, toward))
            began = first_call_s(call, bench.device)
            found = [x.transpose(1, 2) if rival.heads_first else x for x in results(call())]
            distance = max(relative(x, y) for x, y in zip(found, expected, strict=True))
            if not rival.unlike and not distance <= AGREE:
                raise RefusedError(f"disagrees: relative distance {distance:.2g}")
        except ImportError as error:
            left_out[rival.name] = f"absent: {error}"
            continue
        except Exception as error:  # whatever a package of others raises where it does not work
            left_out[rival.name] = why(error)
            continue
        first[rival.name] = round(began, 3)
        if not rival.unlike:
            distances[rival.name] = float(f"{distance:.3g}")
        sides.append(Side(rival.name, call, sides[0].pass_))
    return distances, left_out


def laid_out(rival: rivals.Rival, given: Given, toward: Tensor | None) -> tuple[Given, Tensor | None]:
    """The same numbers as a rival wants them in memory; copied before anything is timed."""
    if not rival.heads_first:
        return given, toward
    leaves = {
        name: x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)
        for name, x in given.leaves.items()
    }
    other = None if toward is None else toward.transpose(1, 2).contiguous()
    return Given(given.mechanism, leaves), other


def why(error: Exception) -> str:
    """The reason in a line.

    Raises:
        Exception: the error itself, where the device is of no more use after it.
    """
    if any(sign in str(error) for sign in POISONED):
        raise error
    said = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return said if isinstance(error, RefusedError) else f"{type(error).__name__}: {said}"


def call_of(operator: rivals.Operator, given: Given, toward: Tensor | None) -> Callable[[], object]:
    """One call on the leaves: the output, or with a ``toward`` the gradients of all of them."""
    tensors = given.tensors
    if toward is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return operator(*tensors)

        return forward
    return lambda: torch.autograd.grad(operator(*tensors), tensors, toward, allow_unused=True)


def results(found: object) -> list[Tensor]:
    """What is compared: the output, or the gradients of q, k and v."""
    if isinstance(found, Tensor):
        return [found]
    assert isinstance(found, tuple), "gradients come in a tuple"
    if any(x is None for x in found[:3]):
        raise RefusedError("q, k or v has no gradient")
    return list(found[:3])
