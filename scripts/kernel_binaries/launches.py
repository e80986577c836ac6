"""What the wrappers launch by default: recorded on tensors without memory, so that no table can drift from the code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

PACKAGE = "linbench_kernels"
TILES = {
    "chunk": ("CHUNK",),
    "columns": ("COLUMNS", "COLUMNS_D", "COLUMNS_M"),
    "rows": ("ROWS",),
    "keys": ("KEYS",),
    "left": ("LEFT",),
    "part": ("PART",),
    "stages": ("STAGES",),
    "tma": ("TMA",),
}
"""What of a configuration reaches a kernel, and under which names; the widest where there are several."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    """``num_warps`` and the like."""

    @property
    def name(self) -> str:
        """Its family and its own name, as in ``delta.reverse``."""
        family = self.kernel.fn.__module__.removeprefix(f"{PACKAGE}.").partition(".")[0]
        return f"{family}.{self.kernel.fn.__name__.removesuffix('_kernel')}"

    @property
    def warps(self) -> int:
        """Of a program; Triton's default where none are asked for."""
        return int(self.options.get("num_warps", 4))

    @property
    def config(self) -> dict[str, int | bool]:
        """Tiles, warps and stages as they reached the kernel."""
        found: dict[str, int | bool] = {}
        for key, names in TILES.items():
            values = [self.arguments[name] for name in names if name in self.arguments]
            if values:
                found[key] = max(values)
        return {**found, "warps": self.warps}

    @property
    def binary(self) -> tuple[Any, ...]:
        """What two launches of one binary have in common: types, constants, and which integers 16 divides."""
        return (self.name, self.warps, *((name, _specialised(name, x)) for name, x in self.arguments.items()))


def _specialised(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, int) and not isinstance(value, bool) and not name.isupper():
        return value == 1, value % 16 == 0
    return str(value)


@dataclass(frozen=True)
class Allocation:
    """Memory that a call asked for and did not return."""

    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Call:
    """What one call of a wrapper launches, and what it allocates besides its results."""

    launches: list[Launch]
    intermediates: list[Allocation]


class _Allocations(TorchDispatchMode):
    """New memory by the storage that has it, with the shape that was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Any, Allocation]] = {}
        """With the storage itself, without which the next one could have its address."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                allocation = Allocation(tuple(x.shape), storage.nbytes())
                self.made.setdefault(storage._cdata, (storage, allocation))
        return result


def recorded(arch: str, multiprocessors: int, wrapper: Callable[..., Any], *operands: Any, **options: Any) -> Call:
    """One call of a wrapper that believes to run on so many multiprocessors of ``arch``, and launches nothing."""
    kept: list[Launch] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*positional: Any, **named: Any) -> None:
            names = kernel.arg_names
            arguments = dict(zip(names, positional, strict=False))
            arguments |= {name: value for name, value in named.items() if name in names}
            kept.append(Launch(kernel, grid, arguments, {n: value for n, value in named.items() if n not in names}))

        return record

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(KernelInterface, "__getitem__", launcher))
        for module in [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]:
            for name, value in (("architecture", arch), ("multiprocessors", multiprocessors)):
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, return_value=value))
        allocations = patches.enter_context(_Allocations())
        results = wrapper(*operands, **options)
    results = results if isinstance(results, tuple) else (results,)
    outside = {x.untyped_storage()._cdata for x in (*results, *operands, *options.values()) if isinstance(x, Tensor)}
    return Call(kept, [made for key, (_, made) in allocations.made.items() if key not in outside])


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")
