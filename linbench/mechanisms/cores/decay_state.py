"""Mechanisms whose state fades by what every token says: gated linear attention, HGRN2, Mamba-2, RWKV-6."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.decay import decayed_attention
from linbench.mechanisms.cores.recurrence import Recurrence
from linbench.mechanisms.cores.segments import State
from linbench.mechanisms.cores.slabs import CHUNK
from linbench.mechanisms.fused import require


@dataclass(frozen=True)
class Operands:
    """What enters :func:`~linbench.mechanisms.cores.decay.decayed_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    entering: Tensor | None = None
    bonus: Tensor | None = None
    skip: Tensor | None = None
    scale: float = 1.0


class DecayState(Recurrence):
    """Fast path, decoder and costs of S_t = diag(α_t) S_{t−1} + k_tᵀ v_t; a subclass writes the recurrence itself."""

    per_channel: ClassVar[bool] = True
    """α has a number for every channel of the keys, and not one for all."""

    @abstractmethod
    def advance(self, state: State, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, State]:
        """One token of the recurrence, as the paper writes it.

        Args:
            state: ``[B, H, D, M]``.
            q: ``[B, H, D]``, as k; v ``[B, H, M]``.
            rest: the extras of the token in the order of :meth:`gates`, then :attr:`weights`.
        """

    @abstractmethod
    def operands(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Operands:
        """What the fast path is given, elementwise in tokens and differentiable."""

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The recurrence, one token after the other, up to the last row."""
        self.check(q, k, extras)
        return self.walked(self.advance, None, rows, q, k, v, *(extras[name] for name in self.gates()))

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Chunks with a hand-written backward and one state per slab; see :mod:`~linbench.mechanisms.cores.decay`."""
        return self._whole(q, k, v, extras)[0]

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The chunks of the fast path, which have the state at their end."""
        return self._whole(q, k, v, extras)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The fast path and its last state."""
        self.check(q, k, extras)
        x = self.operands(q, k, v, **extras)
        options = {"entering": x.entering, "bonus": x.bonus, "skip": x.skip}
        return decayed_attention(x.q, x.k, x.v, x.log_decay, scale=x.scale, **options)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """What ``forward_triton`` of a mechanism with a decay for every channel is; keys in the dtype of the values.

        Raises:
            UsageError: the kernels cannot run here.
        """
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.channel_decay import attention

        return attention(**self.kernel_operands(q, k, v, extras))[0]

    @torch.no_grad()
    def fused_prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """What ``prefill_triton`` is then; raises as :meth:`fused`."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.channel_decay import attention

        out, state = attention(**self.kernel_operands(q, k, v, extras), return_state=True)
        assert state is not None, "it was asked for"
        return out, state

    @torch.no_grad()
    def fused_step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """What ``step_triton`` is then: the state is changed in place; raises as :meth:`fused`."""
        require(q.device.type)
        from linbench_kernels.channel_decay import step

        return step(**self.kernel_operands(q, k, v, extras), state=state), state

    def kernel_operands(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor]) -> dict[str, Any]:
        """:meth:`operands` by the names that the kernels have for them, of a sequence or of a token."""
        x = self.operands(q, k, v, **extras)
        bonus = None if x.bonus is None else x.bonus.to(compute_dtype(v))
        return {"q": x.q, "k": x.k.to(v.dtype), "v": x.v, "log_decay": x.log_decay, "bonus": bonus, "scale": x.scale}

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One token: q, k ``[B, H, D]``, v ``[B, H, M]``, and the extras of that token."""
        inputs = (q, k, v, *(extras[name] for name in self.gates()), *self.weights)
        out, (state,) = self.advance((state,), *(x.to(state.dtype) for x in inputs))
        return out.to(v.dtype), state

    def decode_flops(self, cell: Cell) -> int:
        """4DM for writing and reading the state."""
        return 4 * cell.batch * cell.heads * cell.head_dim * cell.value_dim

    def flops(self, cell: Cell) -> int:
        """Matrix products of chunks of at most C tokens.

        Per token forward C(2D + 2M) + 4DM and backward C(6D + 4M) + 10DM. With a decay for every channel only pairs of
        different tokens are multiplied, in blocks: half of the products with D.
        """
        chunk, key_dim, value_dim = min(CHUNK, cell.length), cell.head_dim, cell.value_dim
        pairs = (chunk - 1 if self.per_channel else 2 * chunk) * key_dim
        forward = pairs + 2 * chunk * value_dim + 4 * key_dim * value_dim
        backward = 3 * pairs + 4 * chunk * value_dim + 10 * key_dim * value_dim
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * cell.length * per_token
