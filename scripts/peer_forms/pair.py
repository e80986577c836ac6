"""What a comparison is: one of our mechanisms and a peer's form of the same operator, on the same tensors.

Projections (q, k, v and output layers) are left out on both sides. Packages are imported only when their row is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import linbench
from linbench.mechanisms.base import Mechanism

BATCH, HEADS, WIDTH = 1, 8, 64
TOKEN_BYTES = 4 * BATCH * HEADS
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Pair:
    """One comparison at one length: the same leaves for both sides."""

    leaves: tuple[Tensor, ...]
    ours: Operator
    peer: Operator
    factor: float = 1.0
    """By which the peer's results are those of ours; applied when they are compared, outside of what is timed."""


@dataclass(frozen=True)
class Comparison:
    """A mechanism of ours and a peer's form of the same operator."""

    mechanism: str
    package: str
    form: str
    """What is called, and what was taken out or set so that both compute the same."""
    make: Callable[[int], Pair]
    tolerance: float
    """Largest relative Frobenius distance of outputs and of gradients, both sides in float32."""
    peer_bytes: Callable[[int, bool], float] = field(default=lambda length, backward: 0)
    """About what the peer allocates at a length, without and with backward: rows that cannot fit are not tried."""
    differentiable: bool = True
    """False for a peer that changes in place what its own graph needs: torch refuses its backward."""

    @property
    def name(self) -> str:
        """Of the mechanism, without the form of it."""
        return self.mechanism.split()[0]


def build(name: str, causal: bool, key_dim: int = WIDTH, **hyperparameters: Any) -> Mechanism:
    """One of ours at the geometry of the comparison."""
    return linbench.build(name, heads=HEADS, key_dim=key_dim, value_dim=WIDTH, causal=causal, **hyperparameters)


def draw(*shape: int) -> Tensor:
    """Standard normal numbers that require a gradient, the same in every call of one length."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def heads_first(length: int) -> tuple[Tensor, ...]:
    """q, k, v in ``[B, H, N, D]``, all different."""
    stacked = draw(3, BATCH, HEADS, length, WIDTH).detach()
    return tuple(operand.clone().requires_grad_() for operand in stacked)


def gated(mechanism: Mechanism, operands: dict[str, Tensor], peer: Operator) -> Pair:
    """A mechanism beside ``peer(q, k, v, **gates)``: q, k, v and the gates of a layer at initialisation are leaves."""
    gates = mechanism.make_extras(*operands.values(), torch.Generator().manual_seed(1))
    leaves = {**operands, **gates}

    def named(operator: Operator) -> Operator:
        return lambda *tensors: operator(**dict(zip(leaves, tensors, strict=True)))

    return Pair(tuple(leaves.values()), named(mechanism), named(peer))


def gated_pair(mechanism: Mechanism, length: int, peer: Operator) -> Pair:
    """:func:`gated` at the geometry of the comparison."""
    return gated(mechanism, dict(zip("qkv", heads_first(length), strict=True)), peer)


def tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[B, H, N, …]`` as ``[B, N, H, …]``, and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def on_hidden_states(mechanism: Mechanism) -> Operator:
    """The mechanism on ``[B, N, H·D]`` with q = k = v, as a module without projections computes it."""

    def attend(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return mechanism(heads, heads, heads).transpose(1, 2).flatten(2)

    return attend
