"""Based: exact softmax in a small window, and its Taylor polynomial everywhere else (2402.18668)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.cache import Ring
from linbench.mechanisms.cores.chunked import (
    Checkpoint,
    ChunkedAttention,
    Operator,
    compute_dtype,
    guarded,
    walk_slabs,
    with_ones,
)
from linbench.mechanisms.cores.features import FeatureMap
from linbench.mechanisms.cores.monomials import Monomials, TaylorFeatures, taylor_chunk
from linbench.mechanisms.cores.window import window_sums
from linbench.mechanisms.fused import NAME, unavailable
from linbench.mechanisms.softmax import attention_flops

LARGEST = 1 << 16
"""Features; a head of 64 value columns then has a state of 16 MiB in fp32."""


@dataclass(frozen=True)
class WindowState:
    """The keys that have left the window as sums, and those inside."""

    sums: Tensor
    """``[B, H, F, M + 1]``."""
    ring: Ring
    """The last ``window`` tokens, values with a column of ones, in the dtype of the sums."""


class Based(AdditiveState):
    """o_i = Σ_j w_ij v_j / Σ_j w_ij: w_ij = exp(q_i·k_j/√D) in the window, Σ_{n ≤ order} u_ij^n/n! outside of it.

    u_ij = (P_q q_i)·(P_k k_j)/√d with d = ``feature_dim`` (section 4.1); i − window < j ≤ i is the window, and
    |i − j| < window without a mask. The polynomial has C(d + order, order) distinct features: 153 for d = 16 and order
    2. Of even order it is positive; of odd order a sum of weights may come near zero. No ε: rows sum to one.

    The paper alternates layers of Taylor attention with layers of window attention. One operator has to join them, and
    here they share the normaliser: near keys have their exact weight, far ones the approximate, so that a window of N
    is softmax. ``window=0`` is the paper's Taylor layer. Its short convolutions are not part of the operator.

    Args:
        feature_dim: d. The paper's layers project to 16 numbers per head; here P_q and P_k are learned per head and
            start as one random projection onto d orthonormal directions. None, or D and more: q and k as they are.
        order: of the polynomial.
        window: keys with exact weights, the query's own among them. The paper has 64 and 128.
    """

    description: ClassVar[Description] = Description(
        summary="softmax in a window, 1 + u + u²/2 of u = q·k/√d outside, one normaliser",
        kind="hybrid",
        causal_forms=(False, True),
        paper="Simple linear attention language models balance the recall-throughput tradeoff",
        arxiv="2402.18668",
        year=2024,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(
        row_stochastic=True,
        converges=Convergence(
            "order",
            (1, 2, 3, 4),
            inputs_parameters={"sharpness": 0.5},
            hyperparameters={"window": 0, "feature_dim": None},
        ),
    )

    def __init__(
        self,
        geometry: Geometry,
        feature_dim: Annotated[int, Field(ge=1)] | None = 16,
        order: Annotated[int, Field(ge=1, le=8)] = 2,
        window: Annotated[int, Field(ge=0)] = 64,
    ) -> None:
        projected = feature_dim is not None and feature_dim < geometry.key_dim
        width = feature_dim if projected and feature_dim is not None else geometry.key_dim
        features = math.comb(width + order, order)
        if features > LARGEST:
            raise UsageError(f"based: {width} numbers have {features} monomials up to order {order}, over {LARGEST}")
        super().__init__(geometry, features)
        self.order, self.window = order, window
        self.monomials = Monomials(width, 0, order)
        self.query_projection: torch.nn.Parameter | None = None
        self.key_projection: torch.nn.Parameter | None = None
        if projected:
            generator = torch.Generator().manual_seed(geometry.seed)
            gaussian = torch.randn(geometry.heads, geometry.key_dim, width, dtype=torch.float64, generator=generator)
            directions = torch.linalg.qr(gaussian)[0]
            self.query_projection = torch.nn.Parameter(directions)
            self.key_projection = torch.nn.Parameter(directions.clone())

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What the polynomial is of: P_q q and P_k k ``[B, H, N, d]``."""
        if self.query_projection is None or self.key_projection is None:
            return q, k
        dtype = compute_dtype(q)
        return q.to(dtype) @ self.query_projection.to(dtype), k.to(dtype) @ self.key_projection.to(dtype)

    def feature_map(self, like: Tensor) -> FeatureMap:
        """The monomials."""
        return TaylorFeatures(self.monomials)

    @property
    def chunk(self) -> int:
        """Longer where the state is large."""
        return taylor_chunk(self.features)

    @property
    def pair_width(self) -> int:
        """The polynomial of products of width d."""
        return self.monomials.variables

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The window block by block, far keys in chunks, and one division."""
        if self.window == 0:
            return super().forward_torch(q, k, v)
        self.check(q, k)
        values = with_ones(v.to(compute_dtype(q)))
        near, reference = self._near_sums(q, k, values)
        return self._divided(near, reference, self._far_sums(*self.prepared(q, k), values), v.dtype)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused, the causal form of order 2: far keys as a state in registers, whose rows join those of the window.

        Raises:
            UsageError: the kernels cannot run here, or have no such form.
        """
        return self._fused(q, k, v)[0]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, return_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """The output, and the sums over the keys outside the window where they are wanted and there are any."""
        self.check(q, k)
        self._require_kernels(q)
        from linbench_kernels import second_order, window

        beside = logs = sums = None
        if q.shape[2] > self.window:
            queries, keys = (x.to(v.dtype) for x in self.prepared(q, k))
            options = {"scale": self.monomials.variables**-0.5, "delay": self.window}
            beside, logs, sums = second_order.attention(queries, keys, v, **options, return_state=return_state)
            if self.window == 0:
                return beside, sums
        return window.attention(q, k, v, window=self.window, beside=beside, beside_logs=logs), sums

    def _require_kernels(self, q: Tensor) -> None:
        reason = unavailable(q.device.type, self.causal) or self._without_kernels()
        if reason is not None:
            raise UsageError(reason)

    @torch.no_grad()
    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
        """The forward, whose sums over far keys end in the state, and the window of the last token.

        Raises:
            UsageError: as in :meth:`forward_triton`.
        """
        self.require_decoding()
        out, sums = self._fused(q, k, v, return_state=True)
        state = self.initial_state(q.shape[0], q.device, q.dtype)
        if self.window == 0:
            assert sums is not None, "it was asked for"
            return out, Checkpoint(sums, None)
        return out, WindowState(state.sums if sums is None else sums, state.ring.extended(k, with_ones(v)))

    @torch.no_grad()
    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Two launches: the key that leaves the window joins the sums in place, and the query reads window and sums.

        Raises:
            UsageError: as in :meth:`forward_triton`.
        """
        self._require_kernels(q)
        from linbench_kernels import second_order, window

        scale = self.monomials.variables**-0.5
        if self.window == 0:
            queries, keys = (x.squeeze(2).to(v.dtype) for x in self.prepared(q[:, :, None], k[:, :, None]))
            return second_order.step(queries, keys, v, state.state, scale=scale)[0], state
        ring = state.ring.append(k, with_ones(v))
        keys, values = ring.key_rows[:, :, : ring.filled], ring.value_rows[:, :, : ring.filled, :-1]
        wide, leaving, beside, logs = q.to(keys.dtype), None, None, None
        if state.ring.count >= self.window:
            leaving = ring.row(state.ring.count - self.window)
            far = self.prepared(wide[:, :, None], keys[:, :, leaving, None])
            query, key = (x.squeeze(2) for x in far)
            beside, logs = second_order.step(query, key, values[:, :, leaving], state.sums, scale=scale)
        out = window.step(wide, keys, values, without=leaving, beside=beside, beside_logs=logs)
        return out.to(v.dtype), WindowState(state.sums, ring)

    def unsupported(self, cell: Cell) -> str | None:
        """Besides what nobody can run: polynomials that no kernel has."""
        reason = super().unsupported(cell)
        return self._without_kernels() if reason is None and cell.implementation == NAME else reason

    def _without_kernels(self) -> str | None:
        """Why no kernel has this polynomial, in one clause, or None."""
        from linbench_kernels.second_order.configs import WIDEST_KEY

        if self.order != 2:
            return f"the triton kernels have the polynomial of order 2, not {self.order}"
        if self.monomials.variables > WIDEST_KEY:
            return f"the triton kernels have a polynomial of at most {WIDEST_KEY} numbers"
        return None

    def _near_sums(self, q: Tensor, k: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_j w_ij v_j over the keys in the window, ``[B, H, N, E]``, relative to e^reference ``[B, H, N, 1]``."""
        scaled = q.to(values.dtype) * self.geometry.key_dim**-0.5
        return window_sums(scaled, k.to(values.dtype), values, self.window, causal=self.causal)

    @staticmethod
    def _divided(near: Tensor, reference: Tensor, far: Tensor, dtype: torch.dtype) -> Tensor:
        """Both sums as one output."""
        sums = joined(near, reference, far)
        return (sums[..., :-1] / guarded(sums[..., -1:])).to(dtype)

    def _far_sums(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Σ_j w_ij v_j over the keys outside the window, ``[B, H, N, E]``."""
        sums = self._earlier_sums(q, k, v)
        if self.causal:
            return sums
        # keys after the window are keys before it when both are read backwards from the same token
        longest = max(q.shape[2], k.shape[2])
        backwards = (F.pad(x, (0, 0, 0, longest - x.shape[2])).flip(2) for x in (q, k, v))
        return sums + self._earlier_sums(*backwards).flip(2)[:, :, : q.shape[2]]

    def _earlier_sums(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same over the keys j ≤ i − window: causal attention of later queries to earlier keys."""
        if q.shape[2] <= self.window:
            return v.new_zeros(*q.shape[:3], v.shape[-1])
        sums: Tensor = ChunkedAttention.apply(*self._apart(q, k, v))  # type: ignore[no-untyped-call]
        return self._delayed(sums, q)

    def _apart(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Operator]:
        """What makes causal attention of this: query i + window stands at the place of key i."""
        length = q.shape[2] - self.window
        # past the last key there are values of zero
        late = [F.pad(x[:, :, :length], (0, 0, 0, max(length - x.shape[2], 0))) for x in (k, v)]
        queries, keys, values = (x.flatten(0, 1) for x in (q[:, :, self.window :], *late))
        return queries, keys, values, Operator(self.feature_map(q), normalised=False)

    def _delayed(self, sums: Tensor, q: Tensor) -> Tensor:
        """``[G, N − window, E]`` at the places of its queries, ``[B, H, N, E]``."""
        return F.pad(sums.view(*q.shape[:2], *sums.shape[1:]), (0, 0, self.window, 0))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full, relative to the largest of the window."""
        self.check(q, k)
        positions = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        distance = positions[:, None] - torch.arange(k.shape[2], device=q.device)
        near = (distance if self.causal else distance.abs()) < self.window
        seen = visible(rows, q.shape[2], k.shape[2], q.device) if self.causal else torch.ones_like(near)
        queries = chosen(q, rows)
        x, y = self.prepared(queries, k)
        u = x @ y.mT * self.monomials.variables**-0.5
        polynomial = torch.stack([u**n / math.factorial(n) for n in range(self.order + 1)]).sum(0)
        logits = (queries @ k.mT * self.geometry.key_dim**-0.5).masked_fill(~(near & seen), -torch.inf)
        far = seen & ~near
        largest = logits.detach().amax(-1, keepdim=True)
        largest = torch.where(far.any(-1, keepdim=True), largest.clamp(min=0), largest)
        weights = (logits - largest).exp() + polynomial * (-largest.clamp(min=0)).exp() * far
        out: Tensor = weights @ v / guarded(weights.sum(-1, keepdim=True))
        return out

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """A window of everything."""
        return ExactLimit({"window": length})

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """No token; without a window the sums."""
        state = super().initial_state(batch, device, dtype)
        if self.window == 0:
            return state
        like, shape = state.state, (batch, self.geometry.heads, self.window + 1)
        keys, values = like.new_zeros(*shape, self.geometry.key_dim), like.new_zeros(*shape, self.value_columns)
        return WindowState(like, Ring(keys, values, self.window))

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Any]:
        """The fast path, whose sums over far keys end in the state, and the window of the last token."""
        if self.window == 0:
            return super().prefill(q, k, v)
        self.require_decoding()
        self.check(q, k)
        dtype, values = compute_dtype(q), with_ones(v.to(compute_dtype(q)))
        near, reference = self._near_sums(q, k, values)
        state = self.initial_state(q.shape[0], q.device, q.dtype)
        far, sums = torch.zeros_like(near), state.sums
        if q.shape[2] > self.window:
            walked = walk_slabs(*self._apart(*self.prepared(q, k), values))
            far, sums = self._delayed(walked.out, q), walked.after.state.view_as(sums)
        out = self._divided(near, reference, far, v.dtype)
        return out, WindowState(sums, state.ring.extended(k.to(dtype), values))

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Tensor) -> tuple[Tensor, Any]:
        """One token, without gradient: the key that leaves the window joins the sums."""
        if self.window == 0:
            out, after = super().step(q, k, v, state)
            return out, after
        sums, before = state.sums, state.ring
        dtype, features = sums.dtype, self.feature_map(sums)
        q, ring = q[:, :, None].to(dtype), before.append(k.to(dtype), with_ones(v.to(dtype)))
        row = before.row(max(before.count - self.window, 0))
        leaving = slice(row, row + 1)
        projected, left = self.prepared(q, ring.key_rows[:, :, leaving])
        keys, values = ring.key_rows[:, :, : ring.filled], ring.value_rows[:, :, : ring.filled]
        logits = q @ keys.mT * self.geometry.key_dim**-0.5
        if before.count >= self.window:
            sums = sums + features.features(left)[0].mT @ values[:, :, leaving]
            logits[..., leaving] = -torch.inf
        reference = logits.amax(-1, keepdim=True)
        near = (logits - reference).exp() @ values
        out = self._divided(near, reference, features.features(projected)[0] @ sums, v.dtype)
        return out.squeeze(2), WindowState(sums, ring)

    def flops(self, cell: Cell) -> int:
        """Exact pairs in the window, and far keys as :class:`AdditiveState`: in one direction or in both."""
        if self.window == 0:
            return super().flops(cell)
        width = min(self.window, cell.length)
        past = cell.length * width - width * (width - 1) // 2
        near = attention_flops(cell, past if cell.causal else 2 * past - cell.length)
        if cell.length <= self.window:
            return near
        far = super().flops(cell.model_copy(update={"length": cell.length - self.window, "causal": True}))
        return near + far * (1 if cell.causal else 2)

    def feature_flops(self) -> int:
        """P_q q and P_k k."""
        return 0 if self.query_projection is None else 4 * self.geometry.key_dim * self.monomials.variables

    def decode_flops(self, cell: Cell) -> int:
        """2(D + M) for every key in the window, and for the far ones as :class:`AdditiveState`."""
        near = 2 * min(self.window, cell.length) * (cell.head_dim + cell.value_dim)
        far = super().decode_flops(cell) if cell.length > self.window else 0
        return cell.batch * cell.heads * near + far

    def decode_bytes(self, cell: Cell) -> int:
        """The token, the sums read and written where keys are far, the window read, and one row of it written."""
        if self.window == 0:
            return super().decode_bytes(cell)
        numbers = (min(self.window, cell.length - 1) + 1) * (self.geometry.key_dim + self.value_columns)
        if cell.length > self.window:
            numbers += 2 * self.features * self.value_columns
        return self.token_bytes(cell) + cell.batch * cell.heads * numbers * max(cell.element_bytes, 4)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The sums, and the keys and values that are in the window (with their ones)."""
        if not self.causal:
            return None
        ring = min(self.window, length) * (self.geometry.key_dim + self.value_columns)
        elements = self.features * self.value_columns + ring
        return self.geometry.heads * elements * torch.promote_types(dtype, torch.float32).itemsize


def joined(near: Tensor, reference: Tensor, far: Tensor) -> Tensor:
    """``near · e^reference + far``, up to a positive factor per row that keeps both finite.

    Args:
        near: sums ``[..., E]`` relative to e^reference.
        reference: ``[..., 1]``, without gradient.
        far: sums, the last column being that of the weights.
    """
    total = far[..., -1:].detach()
    largest = torch.maximum(reference, total.abs().log())
    # where there is no far key, the factor could be infinite
    return near * (reference - largest).exp() + far * (-largest).exp().masked_fill(total == 0, 0)
