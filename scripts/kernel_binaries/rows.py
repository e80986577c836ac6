"""From a call of a wrapper to objects of the table: one for every binary that it launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton

from kernel_binaries import binaries
from kernel_binaries.launches import Allocation, Call, Launch, recorded

BATCH, HEADS, LENGTH = 8, 16, 8192
"""Only sizes, strides and bytes follow from these: a binary does not."""
H200_BYTES_PER_S = 4.8e12
"""NVIDIA, H200 Tensor Core GPU, datasheet; for predictions only. Copies reach some nine tenths of it."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _unknown(launch: Launch) -> float | None:
    return None


@dataclass(frozen=True)
class Asked:
    """One call of a wrapper, and what of it no binary can tell."""

    mechanisms: tuple[str, ...]
    pass_: str
    """``forward``, ``backward`` or ``step``."""
    wrapper: Callable[..., Any]
    operands: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    """Whether the decays are data: one per token and head or more, so that they have gradients in the backward."""
    one_pass: bool = True
    """Whether it is to store no state of every chunk."""
    moved: Callable[[Launch], float | None] = _unknown
    """Tensors of B·H·N·D that cross memory in a launch; None where that is not worth a prediction."""


@dataclass
class _Found:
    """A binary, and the calls that launch it."""

    launch: Launch
    asked: list[Asked]
    calls: list[Call]


def costs(
    arch: str, dtype: str, width: int, asked: Iterable[Asked], form: str = "dense", multiprocessors: int = 1
) -> Iterator[dict[str, Any]]:
    """One object for every binary at D = M = ``width``; mechanisms that launch the same one in a pass share it.

    Args:
        form: how the calls come: dense, with heads enough to fill a device, or else.
        multiprocessors: of the device; one is always full.
    """
    found: dict[tuple[Any, ...], _Found] = {}
    for one in asked:
        call = recorded(arch, multiprocessors, one.wrapper, *one.operands, **one.options)
        for launch in call.launches:
            entry = found.setdefault((one.pass_, *launch.binary), _Found(launch, [], []))
            entry.asked.append(one)
            entry.calls.append(call)
    for entry in found.values():
        yield {**_described(arch, dtype, width, entry), "form": form}


def _described(arch: str, dtype: str, width: int, entry: _Found) -> dict[str, Any]:
    launch, asked = entry.launch, entry.asked
    binary = binaries.compiled(launch, arch)
    moved = asked[0].moved(launch)
    tensor_bytes = BATCH * HEADS * LENGTH * width * DTYPES[dtype].itemsize
    intermediates = [call.intermediates for call in entry.calls]
    strict = [call.intermediates for one, call in zip(asked, entry.calls, strict=True) if one.one_pass]
    return {
        "kernel": launch.name,
        "mechanisms": list(dict.fromkeys(name for one in asked for name in one.mechanisms)),
        "pass": asked[0].pass_,
        "gated": any(one.gated for one in asked),
        "one_pass": any(one.one_pass for one in asked),
        "arch": arch,
        "triton": triton.__version__,
        "dtype": dtype,
        "key_dim": width,
        "value_dim": width,
        "config": launch.config,
        "assembler": binaries.assembler(arch),
        **asdict(binary),
        "ctas_per_multiprocessor": binaries.ctas_per_multiprocessor(binary, arch, launch.warps),
        "intermediate_bytes": max(sum(made.bytes for made in call) for call in intermediates),
        "state_bytes": max(
            sum(made.bytes for made in call if _states(made, width)) for call in strict or intermediates
        ),
        "moved_tensors": moved,
        "predicted_h200_ms": None if moved is None else round(moved * tensor_bytes / H200_BYTES_PER_S * 1e3, 3),
    }


def _states(made: Allocation, width: int) -> bool:
    """Whether it holds more states ``[D, M]`` than heads; a normaliser is a column more."""
    if len(made.shape) < 2 or not {width} <= set(made.shape[-2:]) <= {width, width + 1}:
        return False
    states = 1
    for size in made.shape[:-2]:
        states *= size
    return states > BATCH * HEADS
