"""What the wrappers launch by default: recorded on tensors without memory, so that no table can drift from the code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from linbench_kernels.additive import launch
from linbench_kernels.additive.configs import Config, Task
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = ("forward_kernel", "backward_kernel", "row_dots_kernel", "decay_gradient_kernel", "step_kernel")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    """``num_warps`` and the like."""


@dataclass
class Call:
    """What one call of a wrapper launches, and what it allocates besides its results."""

    launches: list[Launch] = field(default_factory=list)
    intermediate_bytes: int = 0


class _Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, name: str, kept: list[Launch]) -> None:
        self.kernel, self.name, self.kept = kernel, name, kept

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*positional: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            arguments = dict(zip(names, positional, strict=False))
            arguments |= {name: value for name, value in named.items() if name in names}
            options = {name: value for name, value in named.items() if name not in names}
            self.kept.append(Launch(self.kernel, self.name, grid, arguments, options))

        return record


class _Allocations(TorchDispatchMode):
    """Bytes of new memory, by the storage that has them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.made[x.untyped_storage()._cdata] = x.untyped_storage()
        return result


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Wrappers believe that they run on ``arch``, and launch nothing."""
    kept: list[Launch] = []
    with mock.patch.object(launch, "arch_of", return_value=arch):
        patches = [mock.patch.object(launch, n, _Recorder(getattr(launch, n), n, kept)) for n in KERNELS]
        for patch in patches:
            patch.start()
        try:
            yield kept
        finally:
            for patch in patches:
                patch.stop()


@contextmanager
def chosen() -> Iterator[list[Config]]:
    """The configurations that wrappers choose, in order."""
    kept: list[Config] = []
    choose = launch.config

    def noted(task: Task) -> Config:
        kept.append(choose(task))
        return kept[-1]

    with mock.patch.object(launch, "config", noted):
        yield kept


def call(arch: str, wrapper: Callable[..., Any], *operands: Any) -> Call:
    """The launches of one call, and its intermediate bytes."""
    with recorded(arch) as kept, _Allocations() as allocations:
        results = wrapper(*operands)
    results = results if isinstance(results, tuple) else (results,)
    returned = {x.untyped_storage()._cdata for x in results}
    given = {x.untyped_storage()._cdata for x in operands if isinstance(x, Tensor)}
    inside = [s.nbytes() for key, s in allocations.made.items() if key not in returned | given]
    return Call(kept, sum(inside))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")
