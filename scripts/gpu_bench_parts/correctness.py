"""Does every kernel compute its operator on this device? Every mechanism, width, dtype and layout, against fp64.

Each item calls the operator three times: a difference in one bit is a race. It covers every configuration of the tables
that this device takes; those that were chosen are in the record.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts.bench import Bench, Given, RefusedError, build, draw, relative, told
from gpu_bench_parts.plan import Extent, Item
from linbench import registry
from linbench.cell import Cell
from linbench.mechanisms import fused
from linbench.mechanisms.base import Mechanism, extras_at

BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-5, "float64": 1e-11}
"""Relative errors, those of gradients on the scale of a hundredth of all gradients together at least."""
NEGLIGIBLE = 0.01
STEPS = 3
"""Tokens that are decoded after the prompt."""
REPEATS = 3
HEADS, BATCH = 3, 2


def items(extent: Extent) -> list[Item]:
    """Widths and dtypes that most people have first, of every mechanism; then long sequences, and all the rest."""
    every = [
        _item(name, widths, dtype, extent.tokens)
        for dtype, widths in product(extent.dtypes, extent.widths)
        for name in extent.mechanisms
    ]
    first = extent.dtypes[0], extent.widths[0]
    long = [_item(name, first[1], first[0], extent.long_tokens) for name in extent.mechanisms]
    single = [_item(name, first[1], first[0], 1) for name in extent.mechanisms]
    common = 2 * len(extent.mechanisms)
    return [*every[:common], *long, *single, *every[common:]]


def _item(name: str, widths: tuple[int, int], dtype: str, tokens: int) -> Item:
    return Item(
        "correctness",
        f"{name} D={widths[0]} M={widths[1]} {dtype} N={tokens}",
        {"mechanism": name, "widths": widths, "dtype": dtype, "tokens": tokens},
        modules=(registry.load(name).__module__,),
        expected_s=6,
        limit_s=150,
    )


def run(item: Item, bench: Bench) -> dict[str, Any]:
    """Errors of the output, of every gradient, of tokens after a prompt, and whether every call gives the same bits."""
    name, (key_dim, value_dim) = item.values["mechanism"], item.values["widths"]
    dtype, tokens = getattr(torch, item.values["dtype"]), item.values["tokens"]
    sizes = {"heads": HEADS, "key_dim": key_dim, "value_dim": value_dim, "device": bench.device}
    ours = build(name, "triton", **sizes)
    _require_support(ours, item, bench)
    judged = tokens <= bench.extent.tokens
    given = draw(ours, BATCH, tokens, dtype, bench.device, grad=judged)
    toward = torch.randn(BATCH, tokens, HEADS, value_dim, device=bench.device).to(dtype)
    with fused.configurations("triton") as chosen:
        results = [_results(given, toward if judged else None) for _ in range(REPEATS)]
        generated = _generated(given, tokens)
    exact = build(name, "reference" if judged else "torch", **sizes).double()
    wide = Given(exact, {key: x.detach().double().requires_grad_(judged) for key, x in given.leaves.items()})
    expected = _results(wide, toward.double() if judged else None)
    names = ["o", *(f"d{key}" for key in given.leaves), *(f"d{key}" for key, _ in ours.named_parameters())]
    joint = float(torch.stack([x.norm() for x in expected[1:]]).norm()) if judged else 0.0
    scales = [1e-300] + [NEGLIGIBLE * joint] * len(expected[1:])
    errors = {
        key: relative(x, y, scale)
        for key, x, y, scale in zip(names[: len(expected)], results[0], expected, scales, strict=True)
    }
    if generated is not None:
        errors["decoded"] = relative(generated, expected[0][:, -STEPS:])
    bound = BOUNDS[item.values["dtype"]]
    same = all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    over = [f"{key} {x:.2g}" for key, x in errors.items() if not x <= bound]
    reasons = [f"relative error over {bound:g}: {', '.join(over)}"] * bool(over)
    reasons += ["repeated calls differ: a race"] * (not same)
    status = {"status": "wrong", "reason": "; ".join(reasons)} if reasons else {}
    return {**status, "errors": told(errors), "bound": bound, "same_bits": same, "configurations": chosen}


def _require_support(mechanism: Mechanism, item: Item, bench: Bench) -> None:
    key_dim, value_dim = item.values["widths"]
    shape = {"batch": BATCH, "heads": HEADS, "length": item.values["tokens"], "causal": True}
    shape |= {"head_dim": key_dim, "value_dim": value_dim, "dtype": item.values["dtype"], "device": bench.device.type}
    cell = Cell(mechanism=item.values["mechanism"], implementation="triton", **shape)
    if (reason := mechanism.unsupported(cell)) is not None:
        raise RefusedError(reason)


def _results(given: Given, toward: Tensor | None) -> list[Tensor]:
    """The output, and with a ``toward`` all gradients."""
    if toward is None:
        with torch.no_grad():
            return [given.ours(*given.tensors)]
    out = given.ours(*given.tensors)
    asked = [*given.tensors, *given.mechanism.parameters()]
    gradients = torch.autograd.grad(out, asked, toward, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(asked, gradients, strict=True))]


@torch.no_grad()
def _generated(given: Given, tokens: int) -> Tensor | None:
    """The last tokens, decoded after a prefill of all before them; None where the kernels have no state."""
    mechanism = given.mechanism
    if "triton" not in type(mechanism).generating() or tokens <= STEPS:
        return None
    x = given.heads_first(*given.tensors)
    prompt = {name: tensor[:, :, : tokens - STEPS] for name, tensor in x.items()}
    _, state = mechanism.prefill(**prompt)
    state, rows = copy.deepcopy(state), []
    for token in range(tokens - STEPS, tokens):
        extras = extras_at({name: x[name] for name in list(x)[3:]}, token)
        row, state = mechanism.step(x["q"][:, :, token], x["k"][:, :, token], x["v"][:, :, token], state, **extras)
        rows.append(row)
    return torch.stack(rows, 1)
