"""Memory as it comes: any strides, any garbage in new memory, and numbers at the edge of what is sensible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config  # torch imports it to turn determinism on: 2 s in every child that a server forks without
from torch import Tensor

from linbench.conformance.finding import Finding, failed, not_applicable, passed, within, worst
from linbench.conformance.gradients import gradient_errors, gradients
from linbench.conformance.subject import ROUNDING_FLOOR, Operands, Subject, dtype_name, relative_error

_deterministic: Any = torch.utils.deterministic  # a module whose attributes are made on access
LARGEST_TO_TEST = 1e30
"""A reference with larger numbers than this overflows in fp32 by itself."""
CHAOTIC = 1e-2
"""An operator whose own reference is off by this in fp32 cannot be compared at such inputs."""


def any_strides(subject: Subject) -> Finding:
    """Heads split off a projection, heads repeated by stride 0, slices of larger tensors: outputs and gradients."""
    x = subject.draw(subject.size(2, 3, subject.tokens(70), 6, 5))
    findings = []
    for name, layout in LAYOUTS.items():
        strided = x.tokenwise(layout)
        packed = strided.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
        output, expected = subject.run(strided), subject.run(packed)
        bound = subject.bound(packed)
        findings.append(within(relative_error(output, expected), bound, f"output, {name}"))
        _, found = gradients(subject, strided, subject.implementation)
        _, exact = gradients(subject, packed, subject.implementation)
        for operand, error in gradient_errors(found, exact).items():
            findings.append(within(error, 10 * bound, f"gradient of {operand}, {name}"))
    findings += _gradient_layouts(subject, x)
    return worst(findings)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _repeated_heads(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def _slice(x: Tensor) -> Tensor:
    larger = torch.full((*x.shape[:2], x.shape[2] + 5, *(size + 2 for size in x.shape[3:])), 7, dtype=x.dtype)
    inside = larger.to(x.device)[:, :, 3 : 3 + x.shape[2]]
    for dim in range(3, x.ndim):
        inside = inside.narrow(dim, 1, x.shape[dim])
    return inside.copy_(x)


def _backwards(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 3 else _tokens_first(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[B, N, H, ·] transposed": _tokens_first,
    "heads expanded from one": _repeated_heads,
    "an offset slice": _slice,
    "[B, H, ·, N] transposed": _backwards,
}


def _gradient_layouts(subject: Subject, x: Operands) -> Iterator[Finding]:
    """The gradient that arrives has strides of its own: 0 after a sum, transposed before a projection."""
    outputs = []
    for layout in (lambda g: g, lambda g: g[:, :, :1, :1].expand(g.shape), _tokens_first):
        leaves = x.leaves()
        output = subject.build(x)(leaves.q, leaves.k, leaves.v, **leaves.extras)
        if not output.requires_grad:
            return
        toward = layout(torch.ones_like(output, memory_format=torch.contiguous_format))
        names, tensors = zip(*leaves.named().items(), strict=True)
        outputs.append(dict(zip(names, torch.autograd.grad(output, tensors, toward, allow_unused=True), strict=True)))
    for told, found in zip(("expanded", "transposed"), outputs[1:], strict=True):
        for name, error in gradient_errors(found, outputs[0]).items():
            yield within(error, 10 * ROUNDING_FLOOR[torch.float64], f"gradient of {name}, output gradient {told}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN (the largest number in tensors of integers) until something is written to it."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        _deterministic.fill_uninitialized_memory,
    )
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill


def unwritten_memory(subject: Subject) -> Finding:
    """Outputs and gradients are the same when the allocator hands out memory full of NaN."""
    findings = []
    for size in subject.sizes():
        if size.tokens > 500:
            continue
        x = subject.draw(size, torch.float32)
        output, found = gradients(subject, x, subject.implementation)
        with poisoned_memory():
            again, poisoned = gradients(subject, x, subject.implementation)
        for name, error in {"output": relative_error(again, output), **gradient_errors(poisoned, found)}.items():
            findings.append(within(error, ROUNDING_FLOOR[torch.float32], f"{name}, memory full of NaN, {size}"))
    return worst(findings)


def extreme_numbers(subject: Subject) -> Finding:
    """Logits of 1e3, all zeros, gates wide open and shut: finite wherever the reference is, and in fp64 the same."""
    findings = []
    size = subject.size(1, 2, 70 if subject.quick and subject.cls.sequential_reference else 150, 6, 5)
    for dtype in (torch.float64, torch.float32):
        for told, x in _extremes(subject, subject.draw(size, dtype)):
            findings.append(_finite(subject, x, f"{dtype_name(dtype)}, {told}"))
    return worst(findings)


def _extremes(subject: Subject, x: Operands) -> Iterator[tuple[str, Operands]]:
    yield "logits of 1e3", x._replace(q=1e3**0.5 * x.q, k=1e3**0.5 * x.k)
    yield "zeros", x._replace(q=0 * x.q, k=0 * x.k, v=0 * x.v)
    yield "queries and keys of zeros", x._replace(q=0 * x.q, k=0 * x.k)
    yield (
        "tokens all alike",
        x._replace(**{name: getattr(x, name)[:, :, :1].expand(getattr(x, name).shape) for name in "qkv"}),
    )
    gates = subject.build(x).gates()
    for raw in (-40.0, 40.0) if gates else ():
        extras = dict(x.extras)
        for name, gate in gates.items():
            if name in extras:
                value = torch.full(extras[name].shape, raw, dtype=torch.float64, device=x.q.device)
                extras[name] = gate.activation(value).to(extras[name].dtype)
        yield f"every gate at {raw:g}", x._replace(extras=extras)


def _finite(subject: Subject, x: Operands, where: str) -> Finding:
    expected, exact = gradients(subject, x.widened(), "reference")
    if not _representable([expected, *exact.values()]):
        return not_applicable(f"the reference itself overflows: {where}")
    output, found = gradients(subject, x, subject.implementation)
    for name, tensor in {"output": output, **found}.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            return failed(f"NaN or infinity in {name if name == 'output' else f'the gradient of {name}'}: {where}")
    if x.q.dtype is not torch.float64:
        return passed(where)
    narrow = x.narrowed()
    own = relative_error(subject.run(narrow, "reference"), subject.reference(narrow))
    if own > CHAOTIC:
        return passed(where)
    return within(relative_error(output, expected), max(subject.bound(x), 1e-9), where)


def _representable(tensors: list[Tensor | None]) -> bool:
    return all(
        bool(x.isfinite().all()) and float(x.abs().max()) < LARGEST_TO_TEST
        for x in tensors
        if x is not None and x.numel()
    )
