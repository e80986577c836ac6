"""From tensors to launches: tensors are taken in their strides, results come in those of what they belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, Config, arithmetic, block, cdiv
from linbench_kernels.additive.launch import arch_of, multiprocessors_of, products, row_dots
from linbench_kernels.noncausal.configs import Task, config, splits, tiles
from linbench_kernels.noncausal.keys import keys_kernel
from linbench_kernels.noncausal.queries import queries_kernel
from linbench_kernels.noncausal.read import read_kernel
from linbench_kernels.noncausal.sums import sums_kernel


def pool(k: Tensor, v: Tensor, feature: str, value: str, horizon: int) -> tuple[Tensor, Tensor]:
    """Σ_t [φ(k_t), 1] ⊗ [v_t, 1], ``[B, H, F + 1, M + 1]``, and the levels ``[B, H, F]``, empty without any."""
    return summed(k, v, None, None, feature, value, horizon)


def summed(
    b: Tensor, c: Tensor, weights: Tensor | None, ones: Tensor | None, feature: str, value: str, horizon: int
) -> tuple[Tensor, Tensor]:
    """Σ_t [φ(b_t), 1] ⊗ [w_t c_t, e_t], see :mod:`linbench_kernels.noncausal.sums`."""
    (batch, heads, length, _), value_dim = b.shape, c.shape[-1]
    numbers, chosen = _choose("sums", b, c, feature, value)
    columns = min(chosen.columns, block(value_dim))
    programs = batch * heads * cdiv(value_dim, columns)
    runs = splits(programs, length, chosen.chunk, multiprocessors_of(b))
    width = b.shape[-1] * tiles(feature)
    parts = b.new_empty(runs, batch, heads, width + 1, value_dim + 1, dtype=numbers.state)
    levels = b.new_empty(runs, batch, heads, width, dtype=numbers.state) if feature == "exponential" else None
    if programs:
        sums_kernel[(programs * runs,)](
            b,
            c,
            weights,
            ones,
            parts,
            levels,
            *b.stride(),
            *c.stride(),
            heads,
            length,
            runs,
            horizon,
            COLUMNS=columns,
            VALUE=value,
            **_compiled(b, c, feature, numbers, chosen),
        )
    level = b.new_empty(0, dtype=numbers.state)
    if levels is not None:
        level = levels.amax(0)
        parts[..., :-1, :] *= (levels - level).exp_()[..., None]
    sums = parts[0] if runs == 1 else parts.sum(0)
    sums[..., -1, -1] = float(length) if ones is None else ones.sum(-1)
    return sums, level


def read(
    q: Tensor, sums: Tensor, value_dim: int, feature: str, constant: bool, normalised: bool, horizon: int
) -> tuple[Tensor, Tensor]:
    """Rows ``[B, H, N, M]``, laid out as q is, and one over the divisors ``[B, H, N]``, empty where there are none."""
    batch, heads, length, _ = q.shape
    out = rows_like(q, value_dim)
    numbers, chosen = _choose("read", q, out, feature, "identity")
    columns = min(chosen.columns, block(value_dim))
    programs = batch * heads * cdiv(value_dim, columns)
    runs = splits(programs, length, chosen.chunk, multiprocessors_of(q))
    reciprocals = q.new_empty(batch, heads, length, dtype=numbers.state) if normalised else None
    if programs:
        read_kernel[(programs * runs,)](
            q,
            sums.contiguous(),
            out,
            reciprocals,
            *q.stride(),
            *out.stride(),
            heads,
            length,
            runs,
            horizon,
            COLUMNS=columns,
            CONSTANT=constant,
            NORMALISED=normalised,
            **_compiled(q, out, feature, numbers, chosen),
        )
    return out, q.new_empty(0, dtype=numbers.state) if reciprocals is None else reciprocals


def read_backward(
    out_grad: Tensor,
    q: Tensor,
    sums: Tensor,
    out: Tensor | None,
    reciprocals: Tensor | None,
    feature: str,
    constant: bool,
    horizon: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of the sums; ``out`` and ``reciprocals`` where rows were divided."""
    batch, heads, length, _ = q.shape
    q_grad = torch.empty_like(q)
    numbers, chosen = _choose("queries", q, out_grad, feature, "identity")
    delta = None if out is None else row_dots(out, out_grad, numbers)
    runs = splits(batch * heads, length, chosen.chunk, multiprocessors_of(q))
    if batch * heads:
        queries_kernel[(batch * heads * runs,)](
            q,
            sums.contiguous(),
            out_grad,
            q_grad,
            reciprocals,
            delta,
            *q.stride(),
            *out_grad.stride(),
            *q_grad.stride(),
            heads,
            length,
            runs,
            horizon,
            COLUMNS=min(chosen.columns, block(out_grad.shape[-1])),
            NORMALISED=delta is not None,
            **_compiled(q, out_grad, feature, numbers, chosen),
        )
    ones = None if delta is None or reciprocals is None else delta * reciprocals
    sums_grad, _ = summed(q, out_grad, reciprocals, ones, feature, "identity", horizon)
    if ones is None:
        sums_grad[..., -1] = 0
    if not constant:
        sums_grad[..., -1, :] = 0
    return q_grad, sums_grad


def pool_backward(
    sums_grad: Tensor, k: Tensor, v: Tensor, levels: Tensor | None, feature: str, value: str, horizon: int
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    batch, heads, length, _ = k.shape
    k_grad, v_grad = torch.empty_like(k), torch.empty_like(v)
    numbers, chosen = _choose("keys", k, v, feature, value)
    runs = splits(batch * heads, length, chosen.chunk, multiprocessors_of(k))
    if batch * heads:
        keys_kernel[(batch * heads * runs,)](
            k,
            v,
            sums_grad.contiguous(),
            levels,
            k_grad,
            v_grad,
            *k.stride(),
            *v.stride(),
            *k_grad.stride(),
            *v_grad.stride(),
            heads,
            length,
            runs,
            horizon,
            COLUMNS=min(chosen.columns, block(v.shape[-1])),
            VALUE=value,
            **_compiled(k, v, feature, numbers, chosen),
        )
    return k_grad, v_grad


def rows_like(q: Tensor, width: int) -> Tensor:
    """New memory for rows of ``width``, tokens before heads where those of q are."""
    batch, heads, length, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, length, heads, width).transpose(1, 2)
    return q.new_empty(batch, heads, length, width)


def _choose(kernel: str, b: Tensor, c: Tensor, feature: str, value: str) -> tuple[Arithmetic, Config]:
    arch = arch_of(b)
    numbers = arithmetic(b.dtype, arch)
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    return numbers, config(Task(kernel, arch, operand_bytes, b.shape[-1], c.shape[-1], feature, value))


def _compiled(b: Tensor, c: Tensor, feature: str, numbers: Arithmetic, chosen: Config) -> dict[str, Any]:
    """What a kernel is compiled for, as its arguments."""
    return {
        "D": b.shape[-1],
        "M": c.shape[-1],
        "BLOCK_D": block(b.shape[-1]),
        "CHUNK": chosen.chunk,
        "STAGES": chosen.stages,
        "FEATURE": feature,
        **products(numbers),
        "num_warps": chosen.warps,
    }
