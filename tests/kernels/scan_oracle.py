"""What the tests of the elementwise scans share: layouts, sequences that are packed, and errors of all results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from oracle import relative
from torch import Tensor

NEGLIGIBLE = 0.01
"""A gradient smaller than this share of all together is judged on that scale: that of a decay of e^-40 is rounding."""
LAYOUTS = ("BHN", "BNH", "slice", "columns")
Results = tuple[Tensor, Tensor]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in memory as the layout says."""
    if layout == "BNH":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        larger = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), 7.0, dtype=x.dtype, device=x.device)
        return larger[:, :, 2:-1, 3:-2].copy_(x)
    if layout == "columns":
        return x.mT.contiguous().mT
    return x


def one_by_one(
    recurrence: Callable[..., Results], x: dict[str, Tensor], ends: list[int], per_token: tuple[str, ...]
) -> Results:
    """Packed sequences by a recurrence that knows of no packing: each alone, from its own initial state."""
    outs, states = [], []
    for index, (first, end) in enumerate(itertools.pairwise(ends)):
        cut = {name: tensor[:, :, first:end] if name in per_token else tensor for name, tensor in x.items()}
        if "initial_state" in cut:
            cut["initial_state"] = x["initial_state"][index : index + 1]
        out, state = recurrence(**cut)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 2), torch.cat(states)


def errors(
    scan: Callable[..., tuple[Tensor, Tensor | None]],
    exact_scan: Callable[[dict[str, Tensor]], Results],
    operands: dict[str, Tensor],
    **options: Any,
) -> dict[str, float]:
    """Relative error of o, of the final state, and of every gradient through both, by name.

    Args:
        options: for ``scan`` alone.
    """
    given = {name: x.requires_grad_() for name, x in operands.items()}
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in given.items()}
    out, state = scan(**given, **options, return_state=True)
    assert state is not None
    assert out.dtype == given["v"].dtype
    expected_out, expected_state = exact_scan(exact)
    generator = torch.Generator().manual_seed(4)
    toward = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, state)]
    found = torch.autograd.grad([out, state], list(given.values()), [x.to(out.device) for x in toward])
    wide = [x.double() for x in toward]
    expected = torch.autograd.grad([expected_out, expected_state], list(exact.values()), wide)
    joint = float(torch.stack([x.norm() for x in expected]).norm())
    results = {"o": relative(out, expected_out), "final state": relative(state, expected_state)}
    for name, gradient, exact_gradient in zip(given, found, expected, strict=True):
        assert gradient.dtype == given[name].dtype
        results[name] = relative(gradient, exact_gradient, at_least=NEGLIGIBLE * joint)
    return results
