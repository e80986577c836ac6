"""What comes out has the right shape, is new memory, and what went in is unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from linbench.conformance.finding import Finding, failed, passed, worst
from linbench.conformance.subject import Operands, Subject, dtype_name


def output_shape(subject: Subject) -> Finding:
    """``[B, H, N, M]`` in the dtype of v, for every odd size."""
    for size in subject.sizes():
        for dtype in (torch.float64, torch.float32):
            x = subject.draw(size, dtype)
            output = subject.run(x)
            expected = (*x.q.shape[:3], x.v.shape[3])
            if tuple(output.shape) != expected or output.dtype is not dtype:
                got = f"{dtype_name(output.dtype)} {list(output.shape)}"
                return failed(f"{got} instead of {dtype_name(dtype)} {list(expected)}")
    return passed()


def operands_intact(subject: Subject) -> Finding:
    """Neither pass writes to its operands, and the output is no view of one."""
    size = subject.size(1, 2, 70, 6, 5)
    return worst(_intact(subject, subject.draw(size, dtype)) for dtype in (torch.float64, torch.float32))


def _intact(subject: Subject, x: Operands) -> Finding:
    before = x.map(torch.clone)
    leaves = x.leaves()
    output = subject.build(x)(leaves.q, leaves.k, leaves.v, **leaves.extras)
    for name, tensor in leaves.named().items():
        if output.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            return failed(f"the output is a view of {name}")
    if _distinct_elements(output) < output.numel():
        return failed("elements of the output share memory (an expanded tensor?)")
    if output.requires_grad:
        toward = torch.ones_like(output)
        torch.autograd.grad(output, list(leaves.named().values()), toward, allow_unused=True)
        if not bool((toward == 1).all()):
            return failed("the backward writes to the gradient that it is given")
    for name, tensor in leaves.named().items():
        if not torch.equal(tensor.detach(), before.named()[name]):
            return failed(f"{name} is changed")
    return passed()


def _distinct_elements(x: Tensor) -> int:
    distinct = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= size if stride != 0 else 1
    return distinct
