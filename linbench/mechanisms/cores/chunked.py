"""Causal attention with an additive state, o_i = Σ_{j≤i} w_ij φ(q_i)·φ(k_j) v_j, in chunks that fit the cache.

Letters as in :mod:`~linbench.mechanisms.cores.slabs`; E = M + 1 value columns when rows are normalised (the last one is
all ones, so that the normaliser is one more output) and E = M otherwise.

Within a chunk o = ((φ(Q)φ(K)ᵀ) ∘ intra) V; the past enters through the state S = Σ to_state_j φ(k_j)ᵀ v_j. Features
exist for one slab at a time, forward and backward; the backward keeps one state ``[F, E]`` per slab and recomputes the
rest. FLOP per token: 2C(F + E) + 4FE forward, C(6F + 4E) + 10FE backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.features import FeatureMap
from linbench.mechanisms.cores.slabs import (
    Memory,
    Slab,
    Weights,
    decay_weights,
    head_groups,
    plain_weights,
    scan,
    scan_gradient,
    slab_tokens,
    slabs,
    stable_weights,
    times,
)


@dataclass(frozen=True)
class Operator:
    """Which causal attention: its features, its weights, and whether rows are divided by their sum."""

    features: FeatureMap
    normalised: bool
    log_decay: Tensor | None = None
    """fp64 ``[G]``: the logarithm of the decay per token of every head."""
    scale: float = 1.0
    """Multiplies the weights of an operator with decay."""
    offset: float = 0.0
    """Added to the sum by which rows are divided."""


@dataclass(frozen=True)
class Checkpoint:
    """What the past contributes to a slab."""

    state: Tensor
    """``[g, F, E]``."""
    largest: Tensor | None
    """``[g]``: the largest log scale of the keys so far, relative to which ``state`` is stored."""


@dataclass(frozen=True)
class Block:
    """The forward quantities of one slab, in the dtype of the computation."""

    features: FeatureMap
    """φ at the slab."""
    q: Tensor
    k: Tensor
    q_features: Tensor
    k_features: Tensor
    v: Tensor
    """``[P, C, E]``: the values, and a column of ones when rows are normalised."""
    v_to_state: Tensor
    """``v`` weighted for the state at the end of its chunk."""
    weights: Weights
    products: Tensor | None
    """``[P, C, C]``: q·kᵀ, where φ has weights of pairs."""
    scores: Tensor
    """``[P, C, C]``: the weights of values within the chunk."""
    states: Tensor
    """``[P, F, E]``: the state before every chunk."""
    after: Checkpoint


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays; everything else is accumulated in fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def with_ones(v: Tensor) -> Tensor:
    """``v`` with a last column of ones."""
    return torch.nn.functional.pad(v, (0, 1), value=1.0)


def guarded(normaliser: Tensor) -> Tensor:
    """``normaliser``, and infinity where its terms have underflowed: such a row becomes 0 instead of NaN.

    The limit, smallest normal number over machine epsilon (1e-31 in fp32), is where a sum of underflowing terms loses
    its relative precision, and leaves gradients a factor 1e7 of room below overflow.
    """
    limits = torch.finfo(normaliser.dtype)
    return normaliser.masked_fill(normaliser.abs() < limits.tiny / limits.eps, torch.inf)


def add_product(total: Tensor, weight: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total += weight · (left @ right)`` in place."""
    if weight is None:
        return total.baddbmm_(left, right)
    return total.addcmul_(weight, torch.bmm(left, right))


class Weighing:
    """Makes the :class:`Weights` of slabs; those that depend on the slab's shape alone are made once.

    Also has the memory for features of a slab.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.made: dict[tuple[int, int, int, int], Weights] = {}
        self.query_memory, self.key_memory = Memory(), Memory()

    def __call__(
        self, slab: Slab, log_scale: Tensor | None, before: Tensor | None, like: Tensor
    ) -> tuple[Weights, Tensor | None]:
        """The weights of a slab, and the largest log scale after it (see :func:`stable_weights`)."""
        if log_scale is not None:
            # before the first key any reference will do: the state is zero
            return stable_weights(slab, log_scale, log_scale[:: slab.chunks, 0] if before is None else before)
        decay = self.operator.log_decay
        heads = slab.heads
        key = (0 if decay is None else heads.start, heads.stop - heads.start, slab.chunks, slab.length)
        if key not in self.made:
            self.made[key] = (
                plain_weights(slab, like) if decay is None else decay_weights(slab, decay, self.operator.scale, like)
            )
        return self.made[key], None


def make_block(slab: Slab, inputs: tuple[Tensor, Tensor, Tensor], past: Checkpoint, weigh: Weighing) -> Block:
    """Everything that the output of a slab and its gradient share."""
    operator, dtype = weigh.operator, past.state.dtype
    q, k, v = (slab.read(x, dtype) for x in inputs)
    if operator.normalised:
        v = with_ones(v)
    features = operator.features.at(slab)
    q_features, _ = features.features(q, weigh.query_memory)
    k_features, log_scale = features.features(k, weigh.key_memory)
    weights, largest = weigh(slab, log_scale, past.largest, v)
    products = torch.bmm(q, k.mT) if features.paired else None
    scores = torch.bmm(q_features, k_features.mT) if products is None else features.pair_weights(products)
    scores.mul_(weights.intra)
    v_to_state = times(v, weights.to_state)
    states, last = scan(weights.carry, past.state, torch.bmm(k_features.mT, v_to_state))
    after = Checkpoint(last, largest)
    return Block(features, q, k, q_features, k_features, v, v_to_state, weights, products, scores, states, after)


@dataclass(frozen=True)
class Walked:
    """What a walk over all slabs leaves behind."""

    out: Tensor
    """``[G, N, M]``."""
    inverse: Tensor
    """``[G, N, 1]``: one over the sum of every row; empty where rows are not normalised."""
    slabs: list[tuple[Slab, Checkpoint]]
    """With the state before each."""
    after: Checkpoint
    """After the last token of every head."""
    after_whole: Checkpoint
    """After the last token that fills a chunk of its head."""


def walk_slabs(q: Tensor, k: Tensor, v: Tensor, operator: Operator) -> Walked:
    """The causal form without its gradient: q, k ``[G, N, D]`` and v ``[G, N, M]``."""
    heads, tokens, value_dim = v.shape
    dtype, weigh = compute_dtype(q), Weighing(operator)
    features = operator.features.width(q.shape[-1])
    at_most = slab_tokens(features, q.device)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    inverse = v.new_empty((heads, tokens, 1) if operator.normalised else 0, dtype=dtype)
    walk: list[tuple[Slab, Checkpoint]] = []
    ends: list[tuple[Checkpoint, Checkpoint]] = []
    for group in head_groups(heads, tokens, at_most):
        state = v.new_zeros(group.stop - group.start, features, value_dim + operator.normalised, dtype=dtype)
        past = whole = Checkpoint(state, None)
        for slab in slabs(group, tokens, operator.features.chunk, at_most):
            block = make_block(slab, (q, k, v), past, weigh)
            output = torch.bmm(block.scores, block.v)
            add_product(output, block.weights.from_state, block.q_features, block.states)
            if operator.normalised:
                row_inverse = guarded(output[..., value_dim:] + operator.offset).reciprocal()
                slab.write(inverse, row_inverse)
                output = output[..., :value_dim] * row_inverse
            slab.write(out, output)
            walk.append((slab, past))
            past = block.after
            if slab.length == operator.features.chunk:
                whole = past
        ends.append((past, whole))
    return Walked(out, inverse, walk, *(concatenated(checkpoints) for checkpoints in zip(*ends, strict=True)))


def concatenated(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Those of consecutive heads as one."""
    largest = [x.largest for x in checkpoints if x.largest is not None]
    return Checkpoint(torch.cat([x.state for x in checkpoints]), torch.cat(largest) if largest else None)


class ChunkedAttention(torch.autograd.Function):
    """``apply(q, k, v, operator)`` with q, k ``[G, N, D]`` and v ``[G, N, M]``; returns ``[G, N, M]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, operator: Operator) -> Tensor:
        """Walk the slabs of every head from the left."""
        walked = walk_slabs(q, k, v, operator)
        ctx.save_for_backward(q, k, v, walked.out, walked.inverse)
        ctx.walk = walked.slabs if any(ctx.needs_input_grad) else []
        ctx.operator = operator
        return walked.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Walk the slabs of every head from the right, with the gradient of the state after each."""
        q, k, v, out, inverse = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        weigh = Weighing(ctx.operator)
        state_grad = torch.empty(0)
        for slab, past in reversed(ctx.walk):
            if slab.tokens.stop == q.shape[1]:  # the last slab of its heads: nothing follows
                state_grad = torch.zeros_like(past.state)
            block = make_block(slab, (q, k, v), past, weigh)
            output_grad = slab.read(grad, past.state.dtype)
            if ctx.operator.normalised:
                output_grad = normaliser_gradient(
                    output_grad, slab.read(out, past.state.dtype), slab.read(inverse, past.state.dtype)
                )
            *block_grads, state_grad = block_gradient(block, output_grad, state_grad, ctx.operator)
            for whole, part in zip(grads, block_grads, strict=True):
                slab.write(whole, part)
        q_grad, k_grad, v_grad = grads
        return q_grad, k_grad, v_grad, None


def normaliser_gradient(grad: Tensor, out: Tensor, inverse: Tensor) -> Tensor:
    """The gradient ``[..., M + 1]`` for numerator and normaliser of out = numerator / normaliser."""
    grad = grad * inverse
    return torch.cat([grad, torch.linalg.vecdot(grad, out).neg_()[..., None]], -1)


def block_gradient(
    block: Block, grad: Tensor, state_grad: Tensor, operator: Operator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v of a slab and for the state before it.

    Args:
        grad: ``[P, C, E]``, of the unnormalised output.
        state_grad: ``[g, F, E]``, of the state after the slab.
    """
    weights, features = block.weights, block.features
    value_dim = block.v.shape[-1] - operator.normalised
    grad_from_state = times(grad, weights.from_state)
    added_grad, before_grad = scan_gradient(weights.carry, state_grad, torch.bmm(block.q_features.mT, grad_from_state))
    score_grad = torch.bmm(grad, block.v.mT).mul_(weights.intra)
    q_pair: Tensor | None = None
    k_pair: Tensor | None = None
    if block.products is None:
        q_grad = torch.bmm(score_grad, block.k_features).baddbmm_(grad_from_state, block.states.mT)
        k_grad = torch.bmm(score_grad.mT, block.q_features).baddbmm_(block.v_to_state, added_grad.mT)
    else:
        q_grad, k_grad = torch.bmm(grad_from_state, block.states.mT), torch.bmm(block.v_to_state, added_grad.mT)
        product_grad = features.pair_gradient(block.products, score_grad)
        q_pair, k_pair = torch.bmm(product_grad, block.k), torch.bmm(product_grad.mT, block.q)
    v_grad = torch.bmm(block.scores.mT, grad[..., :value_dim])
    add_product(v_grad, weights.to_state, block.k_features, added_grad[..., :value_dim])
    q_grad = features.gradient(block.q, block.q_features, q_grad, of_keys=False)
    k_grad = features.gradient(block.k, block.k_features, k_grad, of_keys=True)
    if q_pair is not None and k_pair is not None:
        q_grad, k_grad = q_pair.add_(q_grad), k_pair.add_(k_grad)
    return q_grad, k_grad, v_grad, before_grad
