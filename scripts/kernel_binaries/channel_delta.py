"""The delta rule with a decay per channel for `scripts/kernel_costs`: what its wrappers launch, compiled and read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import triton
from linbench_kernels.additive.configs import Config
from linbench_kernels.channel_delta import launch
from linbench_kernels.channel_delta.configs import CHUNK, KERNELS, SEGMENT, Task
from torch import Tensor

from kernel_binaries import binaries
from kernel_binaries.launches import Call, Launch, _Allocations, _Recorder, empty

BATCH, HEADS, LENGTH = 8, 16, 8192
"""Only sizes, strides and bytes follow from these: a binary does not."""
H200_BYTES_PER_S = 4.3e12
"""Of a copy; for predictions only."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MECHANISMS = {False: "kda", True: "rwkv7"}
MOVED = {
    False: {
        ("forward", "prepare"): (2, 1, 0, 0, 2),
        ("forward", "forward"): (5, 1, 0, 1, 2),
        ("backward", "prepare"): (2, 1, 0, 0, 2),
        ("backward", "reverse"): (5, 1, 0, 1, 2),
        ("backward", "reading"): (7, 2, 1, 2, 0),
        ("backward", "writing"): (7, 3, 1, 1, 0),
    },
    True: {
        ("forward", "prepare"): (4, 1, 0, 0, 4),
        ("forward", "forward"): (7, 1, 0, 1, 4),
        ("backward", "prepare"): (4, 1, 0, 0, 4),
        ("backward", "reverse"): (7, 1, 0, 1, 4),
        ("backward", "reading"): (10, 2, 0, 2, 0),
        ("backward", "writing"): (12, 3, 0, 1, 0),
    },
}
"""By whether what is removed is a tensor of its own: tensors of B·H·N·D that cross memory with D = M, in the dtype of
the values, in fp32 and in that of products; states of all segments; and matrices of pairs of all chunks. Programs of
one head or segment find each other's in the cache."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every launch at D = M = ``width``, as those of the additive family."""
    for separate, mechanism in MECHANISMS.items():
        for pass_, made, chosen in calls(arch, DTYPES[dtype], width, separate):
            for one in made.launches:
                name = one.name.removesuffix("_kernel")
                binary = binaries.compiled(one, arch)
                config = chosen.get(name)
                moved = None if config is None else moved_tensors(separate, pass_, name, width, DTYPES[dtype])
                tensor_bytes = BATCH * HEADS * LENGTH * width * DTYPES[dtype].itemsize
                yield {
                    "kernel": f"channel_delta_{name}",
                    "mechanisms": [mechanism],
                    "pass": pass_,
                    "arch": arch,
                    "triton": triton.__version__,
                    "dtype": dtype,
                    "key_dim": width,
                    "value_dim": width,
                    "config": {"warps": one.options["num_warps"]} if config is None else asdict(config),
                    **asdict(binary),
                    "ctas_per_multiprocessor": binaries.ctas_per_multiprocessor(binary, arch, one.options["num_warps"]),
                    "intermediate_bytes": made.intermediate_bytes if one is made.launches[0] else 0,
                    "moved_tensors": moved,
                    "predicted_h200_ms": None
                    if moved is None
                    else round(moved * tensor_bytes / H200_BYTES_PER_S * 1e3, 3),
                }


def moved_tensors(separate: bool, pass_: str, kernel: str, width: int, dtype: torch.dtype) -> float:
    """U, tensors of B·H·N·D: all states are D / 128 of one, the matrices of all chunks 16 / D."""
    tensors, precise, between, states, matrices = MOVED[separate][pass_, kernel]
    wide = 4 / dtype.itemsize  # of fp32
    stored = 1 if dtype is torch.bfloat16 else wide
    shares = between + states * width / (CHUNK * SEGMENT) + matrices * CHUNK / width
    return round(tensors + wide * precise + stored * shares, 2)


def calls(arch: str, dtype: torch.dtype, width: int, separate: bool) -> Iterator[tuple[str, Call, dict[str, Config]]]:
    """The calls of forward (that keeps what a backward needs), backward and step, and the configuration by kernel."""
    tile, tokens = (BATCH, HEADS, LENGTH, width), (BATCH, HEADS, LENGTH)
    q, k, v, out, residuals, out_grad, removed, written = (empty(*tile, dtype=dtype) for _ in range(8))
    factors, states = empty(2, *tokens), empty(BATCH, HEADS, -(-LENGTH // (CHUNK * SEGMENT)), width, width, dtype=dtype)
    if dtype is torch.float16:
        states = states.float()
    beta = None if separate else empty(*tokens)
    pair = (removed, written) if separate else (None, None)
    operands = (q, k, v, empty(*tile), beta, *pair)
    unit = not separate
    yield "forward", *recorded(arch, launch.forward, *operands, None, 0.125, unit, False, True)
    kept = (out if unit else None, residuals, states, factors if unit else None)
    yield "backward", *recorded(arch, launch.backward, out_grad, None, *operands, None, *kept, 0.125, True)
    row = [None if x is None else x[:, :, 0] for x in operands]
    state = empty(BATCH, HEADS, width, width)
    yield "step", *recorded(arch, launch.step, *row[:3], state, *row[3:], 0.125, unit)


def recorded(arch: str, wrapper: Callable[..., Any], *operands: Any) -> tuple[Call, dict[str, Config]]:
    """One call of a wrapper that believes to run on ``arch`` and launches nothing."""
    kept: list[Launch] = []
    chosen: dict[str, Config] = {}
    choose = launch.config

    def noted(task: Task) -> Config:
        chosen[task.kernel] = choose(task)
        return chosen[task.kernel]

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(launch, "arch_of", return_value=arch))
        patches.enter_context(mock.patch.object(launch, "config", noted))
        for name in (f"{kernel}_kernel" for kernel in (*KERNELS, "step")):
            recorder = _Recorder(getattr(launch, name), name, kept)
            patches.enter_context(mock.patch.object(launch, name, recorder))
        allocations = patches.enter_context(_Allocations())
        results = wrapper(*operands)
    results = results if isinstance(results, tuple) else (results,)
    outside = {x.untyped_storage()._cdata for x in (*results, *operands) if isinstance(x, Tensor)}
    inside = [storage.nbytes() for key, storage in allocations.made.items() if key not in outside]
    return Call(kept, sum(inside)), chosen
