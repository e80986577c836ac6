"""The operators of the family for torch: custom operators with shapes for tracing, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linbench_kernels.additive import launch
from linbench_kernels.additive.configs import WIDEST
from linbench_kernels.device import unavailable

FEATURES = ("identity", "relu", "elu_plus_one")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    entering: Tensor | None = None,
    skip: Tensor | None = None,
    scale: float = 1.0,
    feature: str = "identity",
    normalised: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · φ(q_t) S_t + skip · v_t with S_t = exp(log_decay_t) S_{t−1} + entering_t φ(k_t)ᵀ v_t.

    Sums are kept in fp32 (fp64 for fp64). Differentiable in every tensor, once. Tensors are taken in the strides that
    they have, and results come in those of what they belong to.

    Args:
        q: ``[B, G, N, D]``; bf16, fp16, fp32 or fp64, as k ``[B, G, N, D]`` and v ``[B, H, N, M]``; D and M up to 256.
            G divides H: head h of v goes with head h // (H / G) of q and k.
        log_decay: natural logarithm, ≤ 0, ``[H]`` or ``[B, H, N]``; −∞ forgets all.
        entering: ``[B, H, N]``; ones when None.
        skip: ``[H]``; zeros when None.
        feature: φ, by name: ``identity``, ``relu``, ``elu_plus_one``.
        normalised: rows are divided by the sum of their weights, φ(q_t)·z_t with z_t = exp(log_decay_t) z_{t−1} +
            entering_t φ(k_t); a sum of 0 gives a row of 0. Without ``scale`` and ``skip``. States then have a column
            more, z.
        initial_state: S_0 ``[S, H, D, M]``, or ``[S, H, D, M + 1]`` when normalised; zeros when None. S is B, or the
            number of packed sequences.
        return_state: whether S_N is wanted.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: B is 1, and sequence s has the tokens from
            cu_seqlens[s] up to cu_seqlens[s + 1], none perhaps. The numbers stay on the device and are not checked.

    Returns:
        o ``[B, H, N, M]`` in the dtype of v, and S_N ``[S, H, D, M]`` in fp32 (fp64), or None.

    Raises:
        ValueError: shapes, dtypes or options that do not go together, or no device for kernels.
    """
    check(q, k, v, feature, grouped=True)
    batch, heads, length, value_dim = v.shape
    sequences = check_packing(cu_seqlens, batch)
    expect("log_decay", log_decay, (heads,), (batch, heads, length))
    expect("entering", entering, (batch, heads, length))
    expect("skip", skip, (heads,))
    expect("initial_state", initial_state, (sequences, heads, q.shape[-1], value_dim + normalised))
    if normalised and (scale != 1 or skip is not None):
        raise ValueError("normalised rows take neither scale nor skip")
    if not length:
        raise ValueError("N = 0: a token at least is needed")
    operands = (q, k, v, log_decay, entering, skip, initial_state, cu_seqlens)
    options = (float(scale), feature, normalised, return_state)
    if not direct(*operands):
        out, state, _ = attention_op(*operands, *options)
    elif recorded(*operands):
        out, state, _ = _Attention.apply(*operands, options)  # type: ignore[no-untyped-call]
    else:
        out, state, _ = launch.forward(*operands[:-1], *options, cu_seqlens)
    return out, state if return_state else None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    entering: Tensor | None = None,
    skip: Tensor | None = None,
    scale: float = 1.0,
    feature: str = "identity",
    normalised: bool = False,
) -> Tensor:
    """One token of :func:`attention`: o ``[B, H, M]``; ``state`` is changed in place, and read and written once.

    Args:
        q: ``[B, G, D]``, as k; v ``[B, H, M]``.
        state: ``[B, H, D, M]``, or ``[B, H, D, M + 1]`` when normalised; fp32 (fp64 for fp64).
        log_decay: ``[H]`` or ``[B, H]``; ``entering`` ``[B, H]``.

    Raises:
        ValueError: as in :func:`attention`.
    """
    check(q[:, :, None], k[:, :, None], v[:, :, None], feature, grouped=True)
    batch, heads, value_dim = v.shape
    expect("log_decay", log_decay, (heads,), (batch, heads))
    expect("entering", entering, (batch, heads))
    expect("skip", skip, (heads,))
    expect("state", state, (batch, heads, q.shape[-1], value_dim + normalised))
    if normalised and (scale != 1 or skip is not None):
        raise ValueError("normalised rows take neither scale nor skip")
    operands = (q, k, v, state, log_decay, entering, skip)
    options = (float(scale), feature, normalised)
    if not direct(*operands) or recorded(*operands):
        out: Tensor = step_op(*operands, *options)
        return out
    torch.autograd.graph.increment_version(state)
    return launch.step(*operands, *options)


def direct(*operands: Tensor | None) -> bool:
    """Whether launching is all that a call needs, and not the dispatcher of torch, which takes as long again.

    It is needed where something else than a launch is made of operators: under ``torch.compile``, a mode, a transform
    of ``torch.func``, or for tensors that are not plain ones.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    plain = all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in operands)
    return plain and not torch._C._are_functorch_transforms_active()


def recorded(*operands: Tensor | None) -> bool:
    """Whether autograd has to know of a call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def check(q: Tensor, k: Tensor, v: Tensor, feature: str, grouped: bool = False) -> None:
    """Refuse what no kernel takes, in a sentence; ``grouped`` where q and k may have fewer heads than v."""
    shared = grouped and q.ndim == v.ndim == 4 and q.shape[1] > 0 and v.shape[1] % q.shape[1] == 0
    tokens = (q.shape[0], v.shape[1], *q.shape[2:-1]) if shared else q.shape[:-1]
    if q.ndim != 4 or q.shape != k.shape or tokens != v.shape[:-1]:
        found = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        fewer = ", with G that divides H," if grouped else ""
        heads = "G" if grouped else "H"
        raise ValueError(f"{found}: q and k of one shape [B, {heads}, N, D] and v [B, H, N, M]{fewer} are needed")
    check_numbers(q, k, v)
    if feature not in FEATURES:
        raise ValueError(f"unknown feature '{feature}'; choose from {', '.join(FEATURES)}")
    if (reason := unavailable(q.device)) is not None:
        raise ValueError(reason)


def check_numbers(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse dtypes and widths that no kernel takes."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of {DTYPES} for all is needed")
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        raise ValueError(f"D = {q.shape[-1]}, M = {v.shape[-1]}: at most {WIDEST} is supported")


def check_packing(cu_seqlens: Tensor | None, batch: int) -> int:
    """The number of sequences: the batch, or those packed in one; what cannot be borders of them is refused.

    The numbers are not looked at, which would wait for the device.
    """
    if cu_seqlens is None:
        return batch
    if cu_seqlens.ndim != 1 or not cu_seqlens.numel() or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = f"{list(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens is {found}; [S + 1] of int32 or int64 is needed")
    if batch != 1:
        raise ValueError(f"B = {batch}: packed sequences lie in one batch element")
    return cu_seqlens.numel() - 1


def expect(name: str, x: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if x is not None and tuple(x.shape) not in shapes:
        choices = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} is {list(x.shape)}; {choices} is needed")


def given(x: Tensor | None, like: Tensor) -> Tensor:
    """A result of an operator, which has no None: empty for it."""
    return like.new_empty(0) if x is None else x


@torch.library.custom_op("linbench::additive_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.additive.launch.forward` as an operator of torch."""
    tensors = (q, k, v, log_decay, entering, skip, initial_state)
    out, state, divisors = launch.forward(*tensors, scale, feature, normalised, keep_state, cu_seqlens)
    return out, given(state, q), given(divisors, q)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, value_dim = v.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    sequences = launch.sequences_of(v, cu_seqlens)
    shapes = ((sequences, heads, q.shape[-1], value_dim + normalised), (batch, heads, length))
    state, divisors = (
        q.new_empty(shape, dtype=precise) if wanted else q.new_empty(0)
        for shape, wanted in zip(shapes, (keep_state, normalised), strict=True)
    )
    return torch.empty_like(v), state, divisors


@torch.library.custom_op("linbench::additive_attention_backward", mutates_args=())
def backward_op(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    divisors: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`~linbench_kernels.additive.launch.backward` as an operator of torch."""
    weights = (log_decay, entering, skip, initial_state, divisors)
    options = (scale, feature, normalised, decay_grad)
    grads = launch.backward(out_grad, state_grad, q, k, v, out, *weights, *options, cu_seqlens)
    return tuple(given(grad, q) for grad in grads)  # type: ignore[return-value]


@backward_op.register_fake
def _(
    out_grad: Tensor,
    state_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    divisors: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
    decay_grad: bool,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None, wanted: bool = True) -> Tensor:
        return q.new_empty(0) if x is None or not wanted else x.new_empty(x.shape)

    grads = (torch.empty_like(x) for x in (q, k, v))
    return (*grads, like(log_decay, decay_grad), like(entering), like(skip), like(initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _keep(ctx, inputs[:8], inputs[8:], output)


def _keep(
    ctx: Any, tensors: tuple[Any, ...], options: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]
) -> None:
    ctx.options, normalised, keep_state = options[:3], options[2], options[3]
    out, state, divisors = output
    ctx.set_materialize_grads(False)
    fixed = [x for x in (divisors, None if keep_state else state) if x is not None]
    if fixed:
        ctx.mark_non_differentiable(*fixed)
    ctx.decay_grad = tensors[3] is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(*tensors, *((out, divisors) if normalised else (None, None)))


def _backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, entering, skip, initial_state, cu_seqlens, out, divisors = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(v)
    weights = (log_decay, entering, skip, initial_state, cu_seqlens, divisors)
    grads = backward_op(out_grad, state_grad, q, k, v, out, *weights, *ctx.options, ctx.decay_grad)
    there = (True, True, True, ctx.decay_grad, *(x is not None for x in (entering, skip, initial_state)))
    return *(grad if wanted else None for grad, wanted in zip(grads, there, strict=True)), *(None,) * 5


attention_op.register_autograd(_backward, setup_context=_setup)


class _Attention(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tensors, options = inputs[:8], inputs[8]
        operands = (*tensors[:7], *options, tensors[7])
        output = launch.forward(*operands)
        _keep(ctx, tensors, options, output)
        return output

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor | None, state_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # gradients of gradients, which the operator knows to refuse
            return _backward(ctx, out_grad, state_grad, _)[:9]
        q, k, v, log_decay, entering, skip, initial_state, cu_seqlens, out, divisors = ctx.saved_tensors
        if out_grad is None:
            out_grad = torch.zeros_like(v)
        weights = (log_decay, entering, skip, initial_state, divisors)
        operands = (out_grad, state_grad, q, k, v, out, *weights, *ctx.options, ctx.decay_grad, cu_seqlens)
        return *launch.backward(*operands), None, None


@torch.library.custom_op("linbench::additive_step", mutates_args=("state",))
def step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
) -> Tensor:
    """:func:`~linbench_kernels.additive.launch.step` as an operator of torch."""
    return launch.step(q, k, v, state, log_decay, entering, skip, scale, feature, normalised)


@step_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    entering: Tensor | None,
    skip: Tensor | None,
    scale: float,
    feature: str,
    normalised: bool,
) -> Tensor:
    return v.new_empty(v.shape)
