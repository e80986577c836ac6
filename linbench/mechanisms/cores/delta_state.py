"""Mechanisms whose state is corrected by what it already holds: DeltaNet, its gated descendants, RWKV-7."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.cell import Cell
from linbench.mechanisms.cores import delta
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.delta import Operands
from linbench.mechanisms.cores.recurrence import Recurrence
from linbench.mechanisms.cores.segments import segmented

CORE_TOKENS = 4096
"""Tokens of a run over all its heads, per CPU thread: about 20 arrays of 1 MiB each for D = 64, where the fixed cost of
an operation and the distance to memory were in balance on CPUs."""
DEVICE_TOKENS = 2**17
"""The same for anything else, which has to be filled instead."""
CHUNK, DEVICE_CHUNK = 32, 64
"""C at most on a CPU and elsewhere. At 64 the work in chunks about equals that through the state for D = M = 64; a CPU
does not mind smaller products, and measured fastest with less of the former."""


class DeltaState(Recurrence):
    """Fast path, decoder and costs of S_t = Λ_t S_{t−1} + w_t u_tᵀ (+ k_t v_tᵀ); see :mod:`.delta`."""

    separate_keys: ClassVar[bool] = False
    """Keys are written beside the corrections."""

    @abstractmethod
    def operands(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor], *weights: Tensor) -> Operands:
        """What enters the recurrence, elementwise in tokens.

        Args:
            q: ``[..., B, H, C, D]``, as k; v ``[..., B, H, C, M]``.
            extras: ``[..., B, H, C, ·]``, those of one number per token with a last dimension of one.
            weights: :attr:`weights` in the dtype of q.
        """

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Chunks in runs that are recomputed for the gradient: memory linear in N, one state per run is kept."""
        return self.extend(q, k, v, self.initial_state(q.shape[0], q.device, q.dtype), **extras)[0]

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """Many tokens after a state: q, k, v and extras as in ``forward``.

        Returns:
            o ``[B, H, N, M]`` and the state after the last token. Both are differentiable, in the state too.
        """
        self.check(q, k, extras)
        names, dtype = tuple(extras), compute_dtype(q)
        weights = [x.to(dtype) for x in self.weights]
        length = min(chunk_length(q.device.type), 1 << (q.shape[-2] - 1).bit_length())

        def segment(
            state: tuple[Tensor, ...], tokens: tuple[Tensor, ...], weights: tuple[Tensor, ...]
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            batch, heads, count = tokens[0].shape[:3]
            q, k, v, *rest = (chunked(x, length, dtype) for x in tokens)
            x = self.operands(q, k, v, dict(zip(names, rest, strict=True)), *weights)
            out, after = delta.run(x.grouped(), state[0].flatten(0, 1))
            out = out.view(-1, batch, heads, *out.shape[2:]).movedim(0, 2).flatten(2, 3)[:, :, :count]
            return out.to(tokens[2].dtype), (after.view(batch, heads, *after.shape[1:]),)

        limit = CORE_TOKENS * torch.get_num_threads() if q.device.type == "cpu" else DEVICE_TOKENS
        width = max(limit // (q.shape[1] * length), 1)  # sequences at a time, with one chunk of every head
        run = max(limit // (min(width, q.shape[0]) * q.shape[1] * length), 1) * length
        cut = (torch.split(x, width) for x in (state, q, k, v, *extras.values()))
        parts = [segmented(segment, (before,), tokens, run, weights) for before, *tokens in zip(*cut, strict=True)]
        if len(parts) == 1:
            return parts[0][0], parts[0][1][0]
        return torch.cat([out for out, _ in parts]), torch.cat([after[0] for _, after in parts])

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`extend` from no token."""
        return self.extend(q, k, v, self.initial_state(q.shape[0], q.device, q.dtype), **extras)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One token: q, k ``[B, H, D]``, v ``[B, H, M]``, and the extras of that token."""
        token = {name: x[:, :, None].to(state.dtype) for name, x in extras.items()}
        token = {name: x if x.ndim == 4 else x[..., None] for name, x in token.items()}
        weights = [x.to(state.dtype) for x in self.weights]
        one_q, one_k, one_v = (x[:, :, None].to(state.dtype) for x in (q, k, v))
        out, state = delta.step(self.operands(one_q, one_k, one_v, token, *weights), state)
        return out.squeeze(2).to(v.dtype), state

    def decode_flops(self, cell: Cell) -> int:
        """2DM each for reading what the state holds, writing, and reading for the query, and for keys of their own."""
        products = 8 if self.separate_keys else 6
        return products * cell.batch * cell.heads * cell.head_dim * cell.value_dim

    def flops(self, cell: Cell) -> int:
        """Matrix products of chunks of C tokens and the inverse, C³/3, of a triangular matrix in each.

        Per token forward 2C(3D + 2M) + 6DM + C²/3, and with keys of their own 2C(5D + 4M) + 8DM + C²/3. The backward
        computes this anew, then twice as much for the gradients of the products and 4C² for that of the inverse.
        """
        chunk, key_dim, value_dim = min(chunk_length(cell.device), cell.length), cell.head_dim, cell.value_dim
        if self.separate_keys:
            products = 2 * chunk * (5 * key_dim + 4 * value_dim) + 8 * key_dim * value_dim
        else:
            products = 2 * chunk * (3 * key_dim + 2 * value_dim) + 6 * key_dim * value_dim
        forward = products + chunk**2 // 3
        backward = forward + 2 * products + 4 * chunk**2
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * cell.length * per_token


def chunk_length(device: str) -> int:
    """C at most, by the type of a device."""
    return CHUNK if device == "cpu" else DEVICE_CHUNK


def chunked(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, N, ·]`` or ``[B, H, N]`` -> ``[n, B, H, C, ·]``, with zeros after the last token."""
    x = x[..., None] if x.ndim == 3 else x
    missing = -x.shape[2] % length
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.reshape(*x.shape[:2], -1, length, x.shape[-1]).movedim(2, 0).to(dtype)


def unit(x: Tensor, scale: float = 1.0) -> Tensor:
    """Rows of norm ``scale``; a row of zeros stays, and takes no gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (scale / norm.masked_fill(norm == 0, math.inf))


class Unit(torch.autograd.Function):
    """``apply(x, scale)``: :func:`unit`, for rows of any size: squares neither overflow nor vanish."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Divided by the largest entry before the norm is taken."""
        largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
        row = torch.div(x, largest.masked_fill(largest == 0, 1), out=x.new_empty(x.shape))
        norm = torch.linalg.vector_norm(row, dim=-1, keepdim=True).clamp_(min=1)
        row.mul_(scale / norm)
        ctx.scale = scale
        largest.masked_fill_(largest < torch.finfo(x.dtype).tiny, math.inf)
        ctx.save_for_backward(row, scale / norm / largest)
        return row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """What is at a right angle to the row, over its norm."""
        row, inverse_norm = ctx.saved_tensors
        along = (grad * row).sum(-1, keepdim=True)
        return torch.addcmul(grad, row, along, value=-(ctx.scale**-2)).mul_(inverse_norm), None
