"""Operations as torch runs them, and the memory that they hold: what a cost model is held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def counted_flops(run: Callable[[Callable[[], None]], object]) -> tuple[int, int]:
    """Operations between the moment when ``run`` calls its argument and its end: those of products, and of all.

    One multiply-add is two; an elementwise operation is one for each element of its result, a reduction or a scan one
    for each of its operand's, a Fourier transform 5 n log₂ n.
    """
    counter = _Counter()
    with counter:
        run(counter.reset)
    return counter.products, counter.products + counter.others


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0
        self.others = 0

    def reset(self) -> None:
        self.products = self.others = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.products += int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet in _PRODUCTS:
            self.products += int(_PRODUCTS[packet](*args))
        elif packet not in _FREE:
            self.others += _elementwise(packet, args, out)
        return out


def _elementwise(packet: Any, args: tuple[Any, ...], out: Any) -> int:
    """One operation for each element of the largest tensor that takes part."""
    operands = [x for x in (*args, *(out if isinstance(out, tuple | list) else (out,))) if isinstance(x, Tensor)]
    elements = max((x.numel() for x in operands), default=0)
    if packet in (aten._fft_r2c, aten._fft_c2r, aten._fft_c2c):
        lengths = math.prod(operands[0].shape[dim] for dim in args[1])
        return int(5 * elements * max(math.log2(max(lengths, 2)), 1))
    return elements


def _batched(left: Tensor, right: Tensor) -> int:
    return 2 * left.numel() * right.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, passes: int) -> int:
    """Both products of every pair; the backward has five."""
    pairs = math.prod(q.shape[:-1]) * k.shape[-2]
    if passes == 1:
        return 2 * pairs * (q.shape[-1] + v.shape[-1])
    return 2 * pairs * (3 * q.shape[-1] + 2 * v.shape[-1])


_PRODUCTS: dict[Any, Callable[..., int]] = {
    aten.baddbmm_: lambda total, left, right, *rest: _batched(left, right),
    aten.addmm_: lambda total, left, right, *rest: _batched(left, right),
    aten.addbmm: lambda total, left, right, *rest: _batched(left, right),
    aten.mv: lambda matrix, vector, *rest: 2 * matrix.numel(),
    aten.dot: lambda left, right, *rest: 2 * left.numel(),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest: _attention(q, k, v, 1),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *rest: _attention(q, k, v, 2),
    aten.linalg_solve_triangular: lambda matrix, right, *rest, **named: matrix.numel() * right.shape[-1],
    aten._linalg_solve_ex: lambda matrix, right, *rest: (
        matrix.numel() * (2 * matrix.shape[-1] // 3 + 2 * right.shape[-1])
    ),
    aten.linalg_inv_ex: lambda matrix, *rest: 2 * matrix.numel() * matrix.shape[-1],
    aten.linalg_cholesky_ex: lambda matrix, *rest: matrix.numel() * matrix.shape[-1] // 3,
    aten.cholesky_solve: lambda right, matrix, *rest: 2 * matrix.numel() * right.shape[-1],
}
_VIEWS = """
    view _unsafe_view _reshape_alias as_strided expand permute transpose t detach alias slice select squeeze unsqueeze
    unbind split split_with_sizes chunk unfold empty empty_like new_empty empty_strided new_empty_strided lift_fresh
    diagonal narrow view_as_real view_as_complex
"""
_FREE = {getattr(aten, name) for name in _VIEWS.split() if hasattr(aten, name)}


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that tensors hold at once while ``run`` runs, beyond what they held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
