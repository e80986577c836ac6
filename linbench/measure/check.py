"""The check before every measurement: does the implementation compute what its mechanism's reference computes?"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.record import Check

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
"""Bound on the relative error by dtype. Rounding alone stays well below it; a wrong mask, scale or tail does not."""
WORST_ROW = 10.0
"""A single row may be off by this many times the bound: rows differ in norm, and a few are badly conditioned."""
NEGLIGIBLE = 0.1
"""A gradient smaller than this share of all gradients together is judged on that scale: one that is zero in exact
arithmetic (dq of a single token, say) is rounding noise in any other."""
FULL_UP_TO_TOKENS = 2048
WEIGHTS_AT_ONCE = 2**24
"""Rows × keys × heads that the reference may hold in fp64: 128 MiB a copy."""


def check_rows(length: int, heads: int) -> int:
    """How many query rows the reference is asked for: all of short sequences, then as many as memory and time allow.

    Args:
        length: N, tokens.
        heads: B · H.
    """
    if length <= FULL_UP_TO_TOKENS and heads * length * length <= 4 * WEIGHTS_AT_ONCE:
        return length
    return min(length, 256, max(8, WEIGHTS_AT_ONCE // (heads * length)))


def check(call: Call) -> tuple[Check, Tensor]:
    """Compare output and gradients with the reference in fp64 on the inputs as rounded.

    Long sequences are judged on sampled query rows, the first and the last among them; the gradients are then those
    of the sampled rows' share of the loss, which is exact.

    Returns:
        the block, and the output that was checked, ``[B, H, N, M]``, for the measures that need it.
    """
    cell = call.cell
    count = check_rows(cell.length, cell.batch * cell.heads)
    rows = sampled_rows(cell.length, count, cell.seed) if call.rows is None else call.rows
    rows = rows.to(call.q.device)
    output = call.forward()
    shape = (cell.batch, cell.heads, cell.length if call.rows is None else len(rows), cell.value_dim)
    if tuple(output.shape) != shape or output.dtype != call.v.dtype:
        told = f"the output is {output.dtype} {tuple(output.shape)}, not {call.v.dtype} {shape}"
        return _failed(call, rows, told), output.detach()
    expected, exact_gradients = _reference(call, rows)
    found = output.detach() if call.rows is not None else output.detach()[:, :, rows]
    difference = found.double() - expected
    gradient_errors: dict[str, float] = {}
    if exact_gradients:
        gradients = torch.autograd.grad(
            output, list(call.differentiable.values()), _only(rows, call.output_gradient), allow_unused=True
        )
        joint = torch.stack([exact.norm() for exact in exact_gradients.values()]).norm()
        for (name, exact), gradient in zip(exact_gradients.items(), gradients, strict=True):
            computed = torch.zeros_like(exact) if gradient is None else gradient.double()
            gradient_errors[name] = _relative(computed - exact, exact, at_least=NEGLIGIBLE * float(joint))
    scale = expected.norm(dim=-1).square().mean().sqrt().clamp_min(_tiny(expected))
    worst = float(difference.norm(dim=-1).max() / scale)
    return _judged(call, rows, _relative(difference, expected), worst, gradient_errors), output.detach()


def sampled_rows(length: int, count: int, seed: int) -> Tensor:
    """Sorted int64 positions: all of them, or ``count`` drawn from ``seed`` with the first and the last included."""
    if count >= length:
        return torch.arange(length)
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(length - 2, generator=generator)[: count - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([length - 1])])


def _judged(call: Call, rows: Tensor, relative: float, worst: float, gradient_errors: dict[str, float]) -> Check:
    figures = {"output": relative, "worst row": worst / WORST_ROW, **gradient_errors}
    broken = [name for name, figure in figures.items() if not math.isfinite(figure)]
    if broken:
        return _failed(call, rows, f"not finite where the reference is: {', '.join(broken)}")
    tolerance = TOLERANCE[call.cell.dtype]
    over = [f"{name} {figure:.3g}" for name, figure in figures.items() if figure > tolerance]
    return Check(
        passed=not over,
        rows=len(rows),
        rows_total=call.cell.length,
        relative_error=relative,
        worst_row_error=worst,
        gradient_errors=gradient_errors,
        tolerance=tolerance,
        finding=f"relative error against the reference over {tolerance:g}: {', '.join(over)}" if over else None,
    )


def _failed(call: Call, rows: Tensor, finding: str) -> Check:
    return Check(
        passed=False,
        rows=len(rows),
        rows_total=call.cell.length,
        tolerance=TOLERANCE[call.cell.dtype],
        finding=finding,
    )


def _reference(call: Call, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's rows in fp64, and its gradients by name where the pass has them."""
    exact = copy.deepcopy(call.mechanism).double()
    names = list(call.differentiable)
    operands = [_exact(tensor) for tensor in (call.q, call.k, call.v)]
    extras = {name: _exact(tensor) for name, tensor in call.extras.items()}
    with torch.set_grad_enabled(bool(names)):
        expected = exact.reference(operands[0], operands[1], operands[2], rows, **extras)
    if call.output_gradient is None:
        return expected, {}
    leaves = [tensor for tensor in (*operands, *extras.values()) if tensor.requires_grad]
    gradients = torch.autograd.grad(expected, leaves, call.output_gradient[:, :, rows].double(), materialize_grads=True)
    return expected.detach(), dict(zip(names, gradients, strict=True))


def _exact(tensor: Tensor) -> Tensor:
    """A leaf of its own in fp64; what is not of floating type stays as it is."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def _only(rows: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient at ``rows``, zero elsewhere."""
    if gradient is None:
        return None
    kept = torch.zeros_like(gradient)
    kept[:, :, rows] = gradient[:, :, rows]
    return kept


def _relative(difference: Tensor, expected: Tensor, at_least: float = 0.0) -> float:
    return float(difference.norm() / expected.norm().clamp_min(max(at_least, _tiny(expected))))


def _tiny(expected: Tensor) -> float:
    """Keeps an all-zero expectation (exact and legal) from dividing by zero."""
    return torch.finfo(expected.dtype).tiny
