"""The delta family for `scripts/kernel_costs`: what its wrappers launch by default, compiled and read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import triton
from linbench_kernels.additive.configs import Config
from linbench_kernels.delta import launch
from linbench_kernels.delta.configs import KERNELS, Task
from torch import Tensor

from kernel_binaries import binaries
from kernel_binaries.launches import Call, Launch, _Allocations, _Recorder, empty

BATCH, HEADS, LENGTH = 8, 16, 8192
"""Only sizes, strides and bytes follow from these: a binary does not."""
H200_BYTES_PER_S = 4.3e12
"""Of a copy; for predictions only."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MECHANISMS = {False: "deltanet", True: "gated_deltanet"}
MOVED = {
    ("forward", "inverse"): (2, 0, 1),
    ("forward", "forward"): (5, 0, 1),
    ("backward", "inverse"): (1, 0, 1),
    ("backward", "states"): (2, 1, 0),
    ("backward", "reverse"): (5, 1, 1),
    ("backward", "gradients"): (7, 2, 0),
}
"""Tensors of B·H·N·D that cross memory with D = M, states of all chunks, and inverses of all chunks, the residuals that
the forward keeps for the backward among them. Programs of one head or chunk find each other's in the cache."""


def costs(arch: str, dtype: str, width: int) -> Iterator[dict[str, Any]]:
    """One object for every launch at D = M = ``width``, as those of the additive family."""
    for decay, mechanism in MECHANISMS.items():
        for pass_, made, chosen in calls(arch, DTYPES[dtype], width, decay):
            for one in made.launches:
                name = one.name.removesuffix("_kernel")
                binary = binaries.compiled(one, arch)
                config = chosen.get(name)
                moved = None if config is None else moved_tensors(pass_, name, config.chunk, width, DTYPES[dtype])
                tensor_bytes = BATCH * HEADS * LENGTH * width * DTYPES[dtype].itemsize
                yield {
                    "kernel": f"delta_{name}",
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


def moved_tensors(pass_: str, kernel: str, chunk: int, width: int, dtype: torch.dtype) -> float:
    """U, tensors of B·H·N·D: a state of every chunk is D / C of one, an inverse C / D."""
    tensors, states, inverses = MOVED[pass_, kernel]
    wider = 2 if dtype is torch.float16 else 1  # fp16 is multiplied, and stored between kernels, in fp32
    return round(tensors + wider * (states * width / chunk + inverses * chunk / width), 2)


def calls(arch: str, dtype: torch.dtype, width: int, decay: bool) -> Iterator[tuple[str, Call, dict[str, Config]]]:
    """The calls of forward (that keeps what a backward needs), backward and step, and the configuration by kernel."""
    q, k, v, out_grad = (empty(BATCH, HEADS, LENGTH, width, dtype=dtype) for _ in range(4))
    beta, factors = empty(BATCH, HEADS, LENGTH), empty(2, BATCH, HEADS, LENGTH)
    rates = empty(BATCH, HEADS, LENGTH) if decay else None
    yield "forward", *recorded(arch, launch.forward, q, k, v, beta, rates, None, 0.125, True, False, True)
    yield "backward", *recorded(arch, launch.backward, out_grad, None, q, k, v, factors, beta, rates, None, 0.125)
    row = [x[:, :, 0] for x in (q, k, v, beta)]
    rate = None if rates is None else rates[:, :, 0]
    state = empty(BATCH, HEADS, width, width)
    yield "step", *recorded(arch, launch.step, *row, state, rate, 0.125, True)


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
