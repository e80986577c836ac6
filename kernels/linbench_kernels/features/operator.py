"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linbench_kernels.additive.launch import arch_of, sequences_of
from linbench_kernels.additive.operator import check, check_packing, expect
from linbench_kernels.features import launch
from linbench_kernels.features.configs import ELEMENTWISE, FEATURES, LEVELLED, feature_width, widest_map


class State(NamedTuple):
    """What the past contributes: Σ φ(k)ᵀ [v, 1]."""

    sums: Tensor
    """``[S, H, F, M + 1]`` in fp32 (fp64 for fp64), relative to exp(level) for ``positive`` and ``hyperbolic``."""
    level: Tensor | None = None
    """``[S, H]``, the same dtype: the largest level of a key so far, −∞ before the first. Without a gradient: what it
    stands for is in that of the sums."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str,
    query_map: Tensor | None = None,
    key_map: Tensor | None = None,
    sharpness: float = 1.0,
    horizon: int | None = None,
    start: int = 0,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """o_t = Σ_{s≤t} φ(q_t)·φ(k_s) v_s / Σ_{s≤t} φ(q_t)·φ(k_s), with features that never reach memory.

    Sums are kept in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the strides that
    they have, and results come in those of what they belong to. A row whose weights add up to 0 is 0.

    Args:
        q: ``[B, G, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, G, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
            G divides H: head h of v goes with head h // (H / G) of q and k.
        feature: φ, by name, with x̂ = x/‖x‖ and x̃ = D^-1/4 x:
            ``turned``: relu(x) [cos a_t, sin a_t] with a_t = π t / 2 ``horizon`` (cosFormer, 2202.08791);
            ``unit``: [√``sharpness`` x̂, 1] (2007.14902);
            ``positive``: exp(x̃W − ‖x̃‖²/2) (Performer, 2009.14794), relative to the largest level that a row sees;
            ``hyperbolic``: [exp(x̃W), exp(−x̃W)] exp(−‖x̃‖²/2), the same;
            ``softmaxes``: [softmax(xW), softmax(−xW)] (Hedgehog, 2402.04347);
            ``fourier``: [sin(x̂W), cos(x̂W)] (RFA, 2103.02143).
        query_map: W of the queries, ``[G, D, P]``, for all but the first two; P up to 256.
        key_map: W of the keys; that of the queries when None.
        horizon: of ``turned``: the most tokens that there can be.
        start: of ``turned``: the position t of the first token of every sequence.
        initial_state: before the first token; zeros when None. S is B, or the number of packed sequences; F is 2 P,
            P + 1 for ``unit``, P for ``positive``, with P = D where there is no W.
        return_state: whether the state after the last token is wanted.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: B is 1, and sequence s has the tokens from
            cu_seqlens[s] up to cu_seqlens[s + 1], none perhaps. The numbers stay on the device and are not checked.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and the state, or None.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    check(q, k, v, "identity", grouped=True)
    batch, heads, length, _ = v.shape
    sequences = check_packing(cu_seqlens, batch)
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    scale, span = options(q, feature, query_map, key_map, sharpness, horizon, start + length)
    sums, level = (None, None) if initial_state is None else initial_state
    shape = (sequences, heads, feature_width(feature, launch.projections(q, query_map)), v.shape[-1] + 1)
    expect("initial_state", sums, shape)
    expect("level", level, (sequences, heads))
    if sums is not None and (level is None) is (feature in LEVELLED):
        raise ValueError(f"feature '{feature}' has {'a' if level is None else 'no'} level in its state")
    operands = (q, k, v, query_map, key_map, sums, level, cu_seqlens)
    out, state, after, *_ = attention_op(*operands, feature, scale, start, span, return_state)
    if not return_state:
        return out, None
    return out, State(state, after.detach() if feature in LEVELLED else None)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    feature: str,
    query_map: Tensor | None = None,
    key_map: Tensor | None = None,
    sharpness: float = 1.0,
    horizon: int | None = None,
    position: int = 0,
) -> Tensor:
    """One token of :func:`attention`: o ``[B, H, M]``; ``state`` is changed in place, and read and written once.

    Args:
        q: ``[B, G, D]``, as k; v ``[B, H, M]``.
        state: level ``[B, H]``, contiguous.
        position: of ``turned``: t of this token.

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], "identity", grouped=True)
    scale, span = options(q[:, :, None], feature, query_map, key_map, sharpness, horizon, position + 1)
    shape = (*v.shape[:2], feature_width(feature, launch.projections(q, query_map)), v.shape[-1] + 1)
    expect("state", state.sums, shape)
    expect("level", state.level, shape[:2])
    if (state.level is None) is (feature in LEVELLED):
        raise ValueError(f"feature '{feature}' has {'a' if state.level is None else 'no'} level in its state")
    if state.level is not None and not state.level.is_contiguous():
        raise ValueError("the level of a state has to be contiguous")
    out: Tensor = step_op(q, k, v, *state, query_map, key_map, feature, scale, position, span)
    return out


def options(
    q: Tensor,
    feature: str,
    query_map: Tensor | None,
    key_map: Tensor | None,
    sharpness: float,
    horizon: int | None,
    tokens: int,
) -> tuple[float, int]:
    """``scale`` and ``horizon`` of the kernels; refuses what does not go together."""
    if feature not in FEATURES:
        raise ValueError(f"unknown feature '{feature}'; choose from {', '.join(FEATURES)}")
    _, groups, _, key_dim = q.shape
    if feature in ELEMENTWISE:
        if query_map is not None or key_map is not None:
            raise ValueError(f"feature '{feature}' has no map")
    elif query_map is None:
        raise ValueError(f"feature '{feature}' needs query_map")
    else:
        shape = (groups, key_dim, query_map.shape[-1])
        expect("query_map", query_map, shape)
        expect("key_map", key_map, shape)
        widest = widest_map(arch_of(q))
        if not 1 <= shape[-1] <= widest:
            raise ValueError(f"P = {shape[-1]}: 1 to {widest} columns are supported")
    if feature == "turned" and (horizon is None or horizon < tokens):
        raise ValueError(f"horizon = {horizon}: at least the {tokens} tokens are needed")
    if feature == "unit" and sharpness <= 0:
        raise ValueError(f"sharpness = {sharpness}: more than 0 is needed")
    scale = {"unit": sharpness**0.5, "positive": key_dim**-0.25, "hyperbolic": key_dim**-0.25}.get(feature, 1.0)
    return float(scale), horizon if feature == "turned" and horizon is not None else 1


@torch.library.custom_op("linbench::feature_attention", mutates_args=())
def attention_op(
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
    """:func:`~linbench_kernels.features.launch.forward` as an operator of torch."""
    operands = (q, k, v, query_map, key_map, initial_state, initial_level, cu_seqlens)
    return launch.forward(*operands, feature, scale, start, horizon, keep_state)


@attention_op.register_fake
def _(
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
) -> tuple[Tensor, ...]:
    batch, heads, length, _ = v.shape
    sequences = sequences_of(v, cu_seqlens)
    precise = torch.promote_types(q.dtype, torch.float32)
    features = feature_width(feature, launch.projections(q, query_map))
    levelled = feature in LEVELLED
    shapes = (
        ((sequences, heads, features, v.shape[-1] + 1), keep_state),
        ((sequences, heads), keep_state and levelled),
        ((batch, heads, length), True),
        ((batch, heads, length), levelled),
    )
    kept = (q.new_empty(shape if wanted else (0,), dtype=precise if wanted else q.dtype) for shape, wanted in shapes)
    return torch.empty_like(v), *kept


@torch.library.custom_op("linbench::feature_attention_backward", mutates_args=())
def backward_op(
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
    """:func:`~linbench_kernels.features.launch.backward` as an operator of torch."""
    operands = (out_grad, state_grad, q, k, v, out, query_map, key_map, initial_state, initial_level)
    return launch.backward(*operands, cu_seqlens, reciprocals, levels, feature, scale, start, horizon, learns)


@backward_op.register_fake
def _(
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
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None, wanted: bool = True) -> Tensor:
        return q.new_empty(0) if x is None or not wanted else x.new_empty(x.shape)

    grads = (torch.empty_like(x) for x in (q, k, v))
    return (*grads, like(query_map, learns), like(key_map, learns), like(initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, query_map, key_map, initial_state, initial_level, cu_seqlens, *ctx.options, ctx.keep_state = inputs
    out, state, level, reciprocals, levels = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(level, reciprocals, levels, *(() if ctx.keep_state else (state,)))
    ctx.learns = any(ctx.needs_input_grad[3:5])
    kept_levels = levels if ctx.options[0] in LEVELLED else None
    tensors = (q, k, v, out, query_map, key_map, initial_state, initial_level, cu_seqlens)
    ctx.save_for_backward(*tensors, reciprocals, kept_levels)


def _backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(saved[3])
    *grads, query_map_grad, key_map_grad, before_grad = backward_op(
        out_grad, state_grad, *saved, *ctx.options, ctx.learns
    )
    there = (ctx.learns and saved[4] is not None, ctx.learns and saved[5] is not None, saved[6] is not None)
    optional = zip((query_map_grad, key_map_grad, before_grad), there, strict=True)
    return *grads, *(grad if given else None for grad, given in optional), *(None,) * 7


attention_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("linbench::feature_step", mutates_args=("state", "level"))
def step_op(
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
    """:func:`~linbench_kernels.features.launch.step` as an operator of torch."""
    return launch.step(q, k, v, state, level, query_map, key_map, feature, scale, position, horizon)


@step_op.register_fake
def _(
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
    return v.new_empty(v.shape)
