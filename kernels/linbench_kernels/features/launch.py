"""From tensors to launches: shapes and strides in, results allocated in the layout of what they belong to."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from linbench_kernels.additive.configs import Arithmetic, arithmetic, block, cdiv
from linbench_kernels.additive.launch import (
    arch_of,
    described,
    multiprocessors_of,
    of_every_head,
    of_groups,
    products,
    row_dots,
    scratch,
    sequences_of,
    small,
    strides,
)
from linbench_kernels.features.configs import LEVELLED, Task, Tiles, config, feature_width, filled
from linbench_kernels.features.forward import forward_kernel
from linbench_kernels.features.keys import keys_kernel
from linbench_kernels.features.queries import queries_kernel
from linbench_kernels.features.step import step_kernel
from linbench_kernels.features.values import values_kernel

NO_STRIDES = (0, 0, 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    initial_state: Tensor | None,
    initial_level: Tensor | None,
    cu_seqlens: Tensor | None,
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
    batch, heads, length, value_dim = v.shape
    sequences = sequences_of(v, cu_seqlens)
    numbers = arithmetic(q.dtype, arch_of(q))
    out = torch.empty_like(v)
    chosen = choose("forward", numbers, feature, (query_map, key_map), False, (q, k, v, out), sequences)
    columns = min(chosen.columns, block(value_dim))

    def made(*shape: int, wanted: bool = True) -> Tensor | None:
        return q.new_empty(shape, dtype=numbers.state) if wanted else None

    levelled = feature in LEVELLED
    features = feature_width(feature, projections(q, query_map))
    state = made(sequences, heads, features, value_dim + 1, wanted=keep_state)
    level = made(sequences, heads, wanted=keep_state and levelled)
    reciprocals, levels = made(batch, heads, length), made(batch, heads, length, wanted=levelled)
    if sequences * heads > 0:
        forward_kernel[(sequences * heads * cdiv(value_dim, columns),)](
            q,
            k,
            v,
            out,
            *operands_of_maps(query_map, key_map, numbers, feature),
            reciprocals,
            levels,
            initial_state,
            small(initial_level),
            state,
            level,
            small(cu_seqlens),
            *(number for x in (q, k, v, out) for number in x.stride()),
            *strides(initial_state),
            heads,
            heads // q.shape[1],
            length,
            start,
            horizon,
            **compiled(q, v, query_map, key_map, feature, scale, numbers, chosen, columns),
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
    cu_seqlens: Tensor | None,
    reciprocals: Tensor,
    levels: Tensor | None,
    feature: str,
    scale: float,
    start: int,
    horizon: int,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, both maps (empty unless ``learns``) and the initial state; empty for None."""
    sequences, heads = sequences_of(v, cu_seqlens), v.shape[1]
    numbers = arithmetic(q.dtype, arch_of(q))
    v_grad = torch.empty_like(v)
    delta = row_dots(out, out_grad, numbers) if sequences * heads > 0 else None
    before_grad = None
    if initial_state is not None:
        before_grad = q.new_empty(initial_state.shape, dtype=numbers.state)
    initial_level, cu_seqlens = small(initial_level), small(cu_seqlens)

    what = (numbers, feature, (query_map, key_map), learns)
    queries = Parts("queries", *what, q, v, (q, k, v, out_grad), sequences)
    keys = Parts("keys", *what, k, v, (q, k, v, out_grad), sequences)
    maps = operands_of_maps(query_map, key_map, numbers, feature)
    positions = (heads, heads // q.shape[1], v.shape[2], start, horizon)
    if sequences * heads > 0:
        queries_kernel[(sequences * heads * queries.count,)](
            q,
            k,
            v,
            out_grad,
            queries.gradient,
            *maps,
            queries.map_gradient,
            reciprocals,
            delta,
            levels,
            initial_state,
            initial_level,
            cu_seqlens,
            *(number for x in (q, k, v, out_grad) for number in x.stride()),
            *queries.strides,
            *strides(initial_state),
            *positions,
            **compiled(q, v, query_map, key_map, feature, scale, numbers, queries.chosen, queries.columns),
        )
        keys_kernel[(sequences * heads * keys.count,)](
            q,
            k,
            v,
            out_grad,
            keys.gradient,
            *maps,
            keys.map_gradient,
            reciprocals,
            delta,
            levels,
            initial_level,
            state_grad,
            cu_seqlens,
            *(number for x in (q, k, v, out_grad) for number in x.stride()),
            *keys.strides,
            *strides(state_grad),
            *positions,
            **compiled(q, v, query_map, key_map, feature, scale, numbers, keys.chosen, keys.columns),
        )
        chosen = choose("values", *what, (q, k, v, out_grad, v_grad), sequences)
        columns = min(chosen.columns, block(v.shape[-1]))
        values_kernel[(sequences * heads * cdiv(v.shape[-1], columns),)](
            q,
            k,
            out_grad,
            v_grad,
            *maps,
            reciprocals,
            delta,
            levels,
            initial_level,
            state_grad,
            before_grad,
            cu_seqlens,
            *(number for x in (q, k, out_grad, v_grad) for number in x.stride()),
            *strides(state_grad),
            *positions,
            **compiled(q, v, query_map, key_map, feature, scale, numbers, chosen, columns),
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
        maps: tuple[Tensor | None, Tensor | None],
        learns: bool,
        x: Tensor,
        v: Tensor,
        tiles: tuple[Tensor, ...],
        sequences: int,
    ) -> None:
        heads, key_dim = v.shape[1], x.shape[-1]
        self.x, self.whole = x, of_every_head(x, heads)
        self.chosen = choose(kernel, numbers, feature, maps, learns, (*tiles, self.whole), sequences)
        self.columns = min(self.chosen.columns, block(v.shape[-1]))
        self.count = cdiv(v.shape[-1], self.columns)
        self.gradient = self.whole
        if self.count > 1:
            self.gradient = x.new_empty(self.count, *self.whole.shape, dtype=numbers.state)
        part = 0 if self.count == 1 else self.gradient.stride(0)
        self.strides = (*self.gradient.stride()[-4:], part)
        self.map_gradient = None
        if maps[0] is not None and learns:
            shape = (self.count, sequences, heads, key_dim, maps[0].shape[-1])
            made = x.new_empty if self.chosen.depth >= key_dim else x.new_zeros  # parts are added to what is there
            self.map_gradient = made(shape, dtype=numbers.state)

    def summed(self) -> Tensor:
        """The gradient, in the layout and dtype of what it belongs to."""
        if self.count > 1:
            self.whole.copy_(self.gradient.sum(0))
        return of_groups(self.whole, self.x)

    def of_map(self, weight: Tensor | None) -> Tensor:
        """The gradient of W ``[G, D, P]``; empty for None."""
        if weight is None or self.map_gradient is None:
            return self.whole.new_empty(0)
        by_head = self.map_gradient.sum((0, 1))
        return by_head.view(weight.shape[0], -1, *by_head.shape[1:]).sum(1).to(weight.dtype)


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
    batch, heads, value_dim = v.shape
    key_dim, width = q.shape[-1], projections(q, query_map)
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
            query_map if key_map is None else key_map,
            *(number for x in (q, k, v, state) for number in x.stride()),
            *map_strides(query_map, key_map),
            heads,
            heads // q.shape[1],
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
    kernel: str,
    numbers: Arithmetic,
    feature: str,
    maps: tuple[Tensor | None, Tensor | None],
    learns: bool,
    tiles: tuple[Tensor, ...],
    sequences: int,
) -> Tiles:
    """The configuration of a kernel; ``tiles`` begin with q, k, v."""
    q, _, v = tiles[:3]
    operand_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[numbers.operand]
    aligned = all(described(x) for x in tiles)
    number = sum(x is not None for x in maps)
    widths = (q.shape[-1], v.shape[-1], feature, projections(q, maps[0]), number)
    task = Task(kernel, arch_of(q), operand_bytes, *widths, learns and number > 0, aligned)
    chosen = filled(config(task), v.shape[-1], sequences * v.shape[1], multiprocessors_of(v))
    if chosen.tma:
        triton.set_allocator(scratch)
    return chosen


def operands_of_maps(
    query_map: Tensor | None, key_map: Tensor | None, numbers: Arithmetic, feature: str
) -> tuple[Tensor | None, ...]:
    """Wᵀ of queries and keys, each ``[G, P, D]`` as products take it and followed by what rounding took from it.

    The latter is None where it is not multiplied: exponents without a bound need it.
    """
    if query_map is None:
        return None, None, None, None
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[numbers.operand]
    parts: list[Tensor | None] = []
    for weight in (query_map,) if key_map is None else (query_map, key_map):
        high = weight.mT.to(dtype).contiguous()
        lost = numbers.operand == "bf16" and feature in LEVELLED
        parts += [high, (weight.mT - high).to(dtype).contiguous() if lost else None]
    return *parts, *(parts if key_map is None else ())


def map_strides(query_map: Tensor | None, key_map: Tensor | None) -> tuple[int, ...]:
    """The strides of both maps, that of the queries where the keys have none; zeros for none at all."""
    if query_map is None:
        return NO_STRIDES * 2
    return *query_map.stride(), *(query_map if key_map is None else key_map).stride()


def compiled(
    q: Tensor,
    v: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    feature: str,
    scale: float,
    numbers: Arithmetic,
    chosen: Tiles,
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
        "DEPTH": min(chosen.depth, block(key_dim)),
        "SHARED": key_map is None,
        "COLUMNS": columns,
        "CHUNK": chosen.chunk,
        "STAGES": chosen.stages,
        "FEATURE": feature,
        **products(numbers),
        "TMA": chosen.tma,
        "num_warps": chosen.warps,
    }
