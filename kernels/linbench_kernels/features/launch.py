"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, Config, arithmetic, block
from linbench_kernels.additive.launch import arch_of, described, products, row_dots, scratch, strides
from linbench_kernels.features.configs import LEVELLED, Task, config, feature_width
from linbench_kernels.features.forward import forward_kernel
from linbench_kernels.features.keys import keys_kernel
from linbench_kernels.features.queries import queries_kernel
from linbench_kernels.features.step import step_kernel

NO_STRIDES = (0, 0, 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    initial_state: Tensor | None,
    initial_level: Tensor | None,
    feature: str,
    scale: float,
    start: int,
    horizon: int,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final state and its level (empty unless asked for), and what a backward needs.

    That is one over the sum of the weights of every row, and the largest level of a key up to it: empty for maps
    without levels.
    """
    batch, heads, length, _ = q.shape
    value_dim = v.shape[-1]
    numbers = arithmetic(q.dtype, arch_of(q))
    out = torch.empty_like(v)
    chosen = choose("forward", numbers, feature, query_map, False, (q, k, v, out))
    columns = min(chosen.columns, block(value_dim))

    def made(*shape: int, wanted: bool = True) -> Tensor | None:
        return q.new_empty(shape, dtype=numbers.state) if wanted else None

    levelled = feature in LEVELLED
    features = feature_width(feature, projections(q, query_map))
    state = made(batch, heads, features, value_dim + 1, wanted=keep_state)
    level = made(batch, heads, wanted=keep_state and levelled)
    reciprocals, levels = made(batch, heads, length), made(batch, heads, length, wanted=levelled)
    if batch * heads > 0:
        forward_kernel[(batch * heads * triton.cdiv(value_dim, columns),)](
            q,
            k,
            v,
            out,
            query_map,
            key_map,
            reciprocals,
            levels,
            initial_state,
            None if initial_level is None else initial_level.contiguous(),
            state,
            level,
            *(number for x in (q, k, v, out) for number in x.stride()),
            *map_strides(query_map),
            *map_strides(key_map),
            *strides(initial_state),
            heads,
            length,
            start,
            horizon,
            **compiled(q, v, query_map, feature, scale, numbers, chosen, columns),
        )
    return out, *(q.new_empty(0) if x is None else x for x in (state, level, reciprocals, levels))  # type: ignore[return-value]


def backward(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    initial_state: Tensor | None,
    initial_level: Tensor | None,
    reciprocals: Tensor,
    levels: Tensor | None,
    feature: str,
    scale: float,
    start: int,
    horizon: int,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, both maps (empty unless ``learns``) and the initial state; empty for None."""
    batch, heads, length, _ = q.shape
    numbers = arithmetic(q.dtype, arch_of(q))
    v_grad = torch.empty_like(v)
    delta = row_dots(out, out_grad, numbers) if batch * heads > 0 else None
    before_grad = None
    if initial_state is not None:
        before_grad = q.new_empty(initial_state.shape, dtype=numbers.state)
    if initial_level is not None:
        initial_level = initial_level.contiguous()

    queries = Parts("queries", numbers, feature, query_map, learns, q, v, (q, k, v, out_grad))
    keys = Parts("keys", numbers, feature, query_map, learns, k, v, (q, k, v, out_grad, v_grad))
    if batch * heads > 0:
        queries_kernel[(batch * heads * queries.count,)](
            q,
            k,
            v,
            out_grad,
            queries.gradient,
            query_map,
            key_map,
            queries.map_gradient,
            reciprocals,
            delta,
            levels,
            initial_state,
            initial_level,
            *(number for x in (q, k, v, out_grad) for number in x.stride()),
            *queries.strides,
            *map_strides(query_map),
            *map_strides(key_map),
            *strides(initial_state),
            heads,
            length,
            start,
            horizon,
            **compiled(q, v, query_map, feature, scale, numbers, queries.chosen, queries.columns),
        )
        keys_kernel[(batch * heads * keys.count,)](
            q,
            k,
            v,
            out_grad,
            keys.gradient,
            v_grad,
            query_map,
            key_map,
            keys.map_gradient,
            reciprocals,
            delta,
            levels,
            initial_level,
            state_grad,
            before_grad,
            *(number for x in (q, k, v, out_grad) for number in x.stride()),
            *keys.strides[:4],
            *v_grad.stride(),
            keys.strides[4],
            *map_strides(query_map),
            *map_strides(key_map),
            *strides(state_grad),
            heads,
            length,
            start,
            horizon,
            **compiled(q, v, query_map, feature, scale, numbers, keys.chosen, keys.columns),
        )
    state_result = q.new_empty(0)
    if before_grad is not None and initial_state is not None:
        state_result = before_grad.to(initial_state.dtype)
    query_map_grad, key_map_grad = queries.of_map(query_map), keys.of_map(query_map)
    if query_map is not None and key_map is None and learns:
        query_map_grad, key_map_grad = query_map_grad + key_map_grad, q.new_empty(0)
    return queries.summed(), keys.summed(), v_grad, query_map_grad, key_map_grad, state_result


class Parts:
    """Where blocks of value columns leave their parts of the gradient of q or k, and of W.

    One block writes the gradient itself. More of them, which a wide map needs, write fp32 that is summed afterwards.
    """

    def __init__(
        self,
        kernel: str,
        numbers: Arithmetic,
        feature: str,
        weight: Tensor | None,
        learns: bool,
        x: Tensor,
        v: Tensor,
        tiles: tuple[Tensor, ...],
    ) -> None:
        batch, heads, _, key_dim = x.shape
        whole = torch.empty_like(x)
        self.chosen = choose(kernel, numbers, feature, weight, learns, (*tiles, whole))
        self.columns = min(self.chosen.columns, block(v.shape[-1]))
        self.count = triton.cdiv(v.shape[-1], self.columns)
        self.gradient = whole if self.count == 1 else x.new_empty(self.count, *x.shape, dtype=numbers.state)
        self.whole = whole
        part = 0 if self.count == 1 else self.gradient.stride(0)
        self.strides = (*self.gradient.stride()[-4:], part)
        self.map_gradient = None
        if weight is not None and learns:
            shape = (self.count, batch * heads, key_dim, weight.shape[-1])
            self.map_gradient = x.new_empty(shape, dtype=numbers.state)
        self.shape = (self.count * batch, heads, key_dim)

    def summed(self) -> Tensor:
        """The gradient, in the layout and dtype of what it belongs to."""
        return self.whole if self.count == 1 else self.whole.copy_(self.gradient.sum(0))

    def of_map(self, weight: Tensor | None) -> Tensor:
        """The gradient of W ``[H, D, P]``; empty for None."""
        if weight is None or self.map_gradient is None:
            return self.whole.new_empty(0)
        return self.map_gradient.view(*self.shape, -1).sum(0).to(weight.dtype)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    level: Tensor | None,
    query_map: Tensor | None,
    key_map: Tensor | None,
    feature: str,
    scale: float,
    position: int,
    horizon: int,
) -> Tensor:
    """One token: o ``[B, H, M]``; the state and its level are changed."""
    batch, heads, key_dim = q.shape
    value_dim, width = v.shape[-1], projections(q, query_map)
    numbers = arithmetic(q.dtype, arch_of(q))
    out = v.new_empty(batch, heads, value_dim)
    if batch * heads > 0:
        step_kernel[(batch * heads,)](
            q,
            k,
            v,
            state,
            level,
            out,
            query_map,
            key_map,
            *(number for x in (q, k, v, state) for number in x.stride()),
            *map_strides(query_map),
            *map_strides(query_map if key_map is None else key_map),
            heads,
            position,
            horizon,
            scale=scale,
            D=key_dim,
            P=width,
            M=value_dim,
            BLOCK_D=block(key_dim),
            BLOCK_P=block(width),
            COLUMNS=min(16 if width > 64 else 32, block(value_dim)),
            FEATURE=feature,
            ACC=numbers.accumulator,
            num_warps=4,
        )
    return out


def projections(q: Tensor, query_map: Tensor | None) -> int:
    """P."""
    return q.shape[-1] if query_map is None else query_map.shape[-1]


def choose(
    kernel: str, numbers: Arithmetic, feature: str, weight: Tensor | None, learns: bool, tiles: tuple[Tensor, ...]
) -> Config:
    """The configuration of a kernel; ``tiles`` begin with q, k, v."""
    q, _, v = tiles[:3]
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    aligned = all(described(x) for x in tiles)
    widths = (q.shape[-1], v.shape[-1], feature, projections(q, weight))
    chosen = config(Task(kernel, arch_of(q), operand_bytes, *widths, learns and weight is not None, aligned))
    if chosen.tma:
        triton.set_allocator(scratch)
    return chosen


def map_strides(weight: Tensor | None) -> tuple[int, ...]:
    """The strides of a map; zeros for none."""
    return NO_STRIDES if weight is None else weight.stride()


def compiled(
    q: Tensor,
    v: Tensor,
    query_map: Tensor | None,
    feature: str,
    scale: float,
    numbers: Arithmetic,
    chosen: Config,
    columns: int,
) -> dict[str, Any]:
    """What a kernel is compiled for, as its arguments."""
    key_dim, width = q.shape[-1], projections(q, query_map)
    return {
        "scale": scale,
        "D": key_dim,
        "P": width,
        "M": v.shape[-1],
        "BLOCK_D": block(key_dim),
        "BLOCK_P": block(width),
        "COLUMNS": columns,
        "CHUNK": chosen.chunk,
        "STAGES": chosen.stages,
        "FEATURE": feature,
        **products(numbers),
        "TMA": chosen.tma,
        "num_warps": chosen.warps,
    }
