"""cosFormer: rectified features and a cosine of the distance (2202.08791)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Checkpoint, compute_dtype, guarded
from linbench.mechanisms.cores.features import FeatureMap, Turned


class CosFormer(AdditiveState):
    """o_i = Σ_j w_ij v_j / Σ_j w_ij with w_ij = relu(q_i)·relu(k_j) cos(π(i − j)/2M) (eq. 10).

    Neither 1/√D nor an ε (the authors' code clamps the sum at 1e-6): rows sum to one, but a query without a positive
    entry in common with a key that it sees gives 0. Weights are not negative because |i − j| < M.

    Args:
        max_length: M, the most tokens there can be. By default that of the call, the longer of queries and keys, as in
            the paper; then every weight depends on the number of tokens, so that no token can be computed before all
            of them are there. Set it to decode.
    """

    description: ClassVar[Description] = Description(
        summary="relu(q)relu(k)ᵀ ∘ cos(π(i − j)/2M) v, rows normalised",
        kind="replacement",
        causal_forms=(False, True),
        paper="cosFormer: Rethinking Softmax in Attention",
        arxiv="2202.08791",
        year=2022,
        time="N",
        memory="N",
    )
    kernel_forms: ClassVar[tuple[bool, ...]] = (False, True)

    def __init__(self, geometry: Geometry, max_length: Annotated[int, Field(ge=1)] | None = None) -> None:
        super().__init__(geometry, 2 * geometry.key_dim)
        self.max_length = max_length

    def horizon(self, queries: int, keys: int) -> int:
        """M for so many tokens."""
        longer = max(queries, keys)
        if self.max_length is not None and longer > self.max_length:
            raise UsageError(f"cosformer: {longer} tokens are more than max_length={self.max_length}")
        return self.max_length or longer

    def unsupported(self, cell: Cell) -> str | None:
        """Also more tokens than ``max_length``."""
        if self.max_length is not None and cell.length > self.max_length:
            return f"{cell.length} tokens are more than max_length={self.max_length}"
        return super().unsupported(cell)

    @property
    def decodes(self) -> bool:
        """Only with M fixed."""
        return super().decodes and self.max_length is not None

    def require_decoding(self) -> None:
        """Says what is missing."""
        if self.causal and self.max_length is None:
            raise UsageError("cosformer decodes only with max_length set: all weights depend on it")
        super().require_decoding()

    @property
    def pair_width(self) -> int:
        """The cosine multiplies products of width D."""
        return self.geometry.key_dim

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The rectified."""
        return q.relu(), k.relu()

    def feature_map(self, like: Tensor) -> FeatureMap:
        """The map of position 0."""
        return self.turned(torch.zeros(1, dtype=torch.float64, device=like.device), self.max_length or 1, like)

    def feature_map_for(self, q: Tensor, k: Tensor) -> FeatureMap:
        """The map of all positions."""
        queries, keys = q.shape[-2], k.shape[-2]
        positions = torch.arange(max(queries, keys), device=q.device, dtype=torch.float64)
        return self.turned(positions, self.horizon(queries, keys), q.new_empty(0, dtype=compute_dtype(q)))

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused: one kernel forward and two backward; without a mask two passes and four. φ is never written."""
        horizon = self.horizon(q.shape[-2], k.shape[-2])
        if not self.causal:
            return self.fused_sums(q, k, v, "turned", horizon=horizon)
        return self.fused_features(q, k, v, "turned", horizon=horizon)

    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
        """The forward, which has the state at its end."""
        self.require_decoding()
        horizon = self.horizon(q.shape[-2], k.shape[-2])
        out, sums = self.fused_features_prefill(q, k, v, "turned", horizon=horizon)
        return out, (sums, q.shape[2])

    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One launch that reads the state and writes it once."""
        sums, position = state
        horizon = self.horizon(position + 1, position + 1)
        out, sums = self.fused_features_step(q, k, v, sums, "turned", horizon=horizon, position=position)
        return out, (sums, position + 1)

    @staticmethod
    def turned(positions: Tensor, horizon: int, like: Tensor) -> Turned:
        """The map of some positions, fp64 ``[L]``."""
        angles = positions * (math.pi / 2 / horizon)
        return Turned(horizon, torch.stack((angles.cos(), angles.sin())).to(like)[..., None])

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full."""
        self.check(q, k)
        positions = torch.arange(q.shape[-2], device=q.device) if rows is None else rows
        distance = (positions[:, None] - torch.arange(k.shape[-2], device=q.device)).to(q.dtype)
        cosines = (math.pi / 2 * distance / self.horizon(q.shape[-2], k.shape[-2])).cos()
        weights = chosen(q, rows).relu() @ k.relu().mT * cosines
        if self.causal:
            weights = weights * visible(rows, q.shape[-2], k.shape[-2], q.device)
        return weights @ v / guarded(weights.sum(-1, keepdim=True))

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The sums, and the position of the next token."""
        self.require_decoding()
        return super().initial_state(batch, device, dtype), 0

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Any]:
        """As for other sums, and the position after the last token."""
        out, sums = super().prefill(q, k, v)
        return out, (sums, q.shape[2])

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Tensor) -> tuple[Tensor, Any]:
        """One token at the position that the state holds."""
        sums, position = state
        horizon = self.horizon(position + 1, position + 1)
        here = torch.full((1,), float(position), dtype=torch.float64, device=q.device)
        out, sums = self.advance(q, k, v, sums, features=self.turned(here, horizon, sums.state))
        return out, (sums, position + 1)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The sums; None where M is that of the call."""
        if not self.decodes:
            return None
        state: Checkpoint = super().initial_state(1, torch.device("cpu"), dtype)
        return state.state.nbytes
