"""Mechanisms whose past is a sum, S = Σ_j w_j φ(k_j)ᵀ v_j: what linear attention, Performer and retention share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.chunked import (
    Checkpoint,
    ChunkedAttention,
    Operator,
    compute_dtype,
    guarded,
    with_ones,
)
from linbench.mechanisms.features import FeatureMap
from linbench.mechanisms.pooled import PooledAttention
from linbench.mechanisms.slabs import CHUNK


class AdditiveState(Mechanism):
    """Features, an optional decay and an optional normaliser; the fast path, the decoder and the costs follow.

    Inputs below fp64 are computed and accumulated in fp32, on every device, and the output is rounded once.
    """

    normalised: ClassVar[bool] = True
    """Whether every row is divided by the sum of its weights."""

    def __init__(self, geometry: Geometry, features: int) -> None:
        super().__init__(geometry)
        self.features = features
        """F, the width of φ."""

    @abstractmethod
    def feature_map(self, like: Tensor) -> FeatureMap:
        """φ on the device and in the dtype of ``like``."""

    def log_decay(self, device: torch.device) -> Tensor | None:
        """Logarithm of the decay per token, fp64 ``[H]``; None without decay."""
        return None

    @property
    def scale(self) -> float:
        """What multiplies the weights where rows are not normalised."""
        return 1.0

    @property
    def value_columns(self) -> int:
        """E: M, and one more for the normaliser."""
        return self.geometry.value_dim + self.normalised

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Chunks with a hand-written backward: memory linear in N, no ``[N, F]`` array of features."""
        self.check(q, k)
        features = self.feature_map(q.new_empty(0, dtype=compute_dtype(q)))
        heads = (x.flatten(0, 1) for x in (q, k, v))
        out: Tensor
        if self.causal:
            decay = self.log_decay(q.device)
            rates = None if decay is None else decay.repeat(q.shape[0])
            operator = Operator(features, self.normalised, rates, self.scale)
            out = ChunkedAttention.apply(*heads, operator)  # type: ignore[no-untyped-call]
        else:
            out = PooledAttention.apply(*heads, features)  # type: ignore[no-untyped-call]
        return out.view(*q.shape[:2], *out.shape[1:])

    def check(self, q: Tensor, k: Tensor) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before)."""
        if self.causal not in self.description.causal_forms:
            raise UsageError(f"{type(self).__name__} has no {'causal' if self.causal else 'non-causal'} form")
        if self.causal and q.shape[-2] != k.shape[-2]:
            raise UsageError(
                f"{type(self).__name__}, causal: {q.shape[-2]} queries and {k.shape[-2]} keys, but as many are needed"
            )

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Checkpoint:
        """The state before the first token: zeros ``[B, H, F, E]`` in fp32 or fp64."""
        dtype = torch.promote_types(dtype, torch.float32)
        sums = torch.zeros(batch, self.geometry.heads, self.features, self.value_columns, device=device, dtype=dtype)
        _, log_scale = self.feature_map(sums).features(sums.new_zeros(1, self.geometry.key_dim))
        return Checkpoint(sums, None if log_scale is None else sums.new_full(sums.shape[:2], -torch.inf))

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint) -> tuple[Tensor, Checkpoint]:
        """One token of the causal form: q, k ``[B, H, D]``, v ``[B, H, M]`` -> o ``[B, H, M]`` and the next state."""
        sums, largest = state.state, state.largest
        features = self.feature_map(sums)
        q_features, _ = features.features(q.to(sums.dtype))
        k_features, log_scale = features.features(k.to(sums.dtype))
        values = v.to(sums.dtype)
        if self.normalised:
            values = with_ones(values)
        if log_scale is not None and largest is not None:
            before, largest = largest, torch.maximum(largest, log_scale)
            sums = sums * (before - largest).exp()[..., None, None]
            values = values * (log_scale - largest).exp()[..., None]
        decay = self.log_decay(q.device)
        if decay is not None:
            sums = sums * decay.exp().to(sums.dtype)[:, None, None]
        sums = sums + k_features[..., None] * values[..., None, :]
        out = (q_features[..., None, :] @ sums).squeeze(-2) * self.scale
        if self.normalised:
            out = out[..., :-1] / guarded(out[..., -1:])
        return out.to(v.dtype), Checkpoint(sums, largest)

    def flops(self, cell: Cell) -> int:
        """Matrix products of the pass; exponentials and divisions are not counted.

        Causal: chunks of C = at most :data:`CHUNK` tokens, 2C(F + E) + 4FE per token forward and C(6F + 4E) + 10FE
        backward. Otherwise 4FE and 8FE. The backward computes the features anew.
        """
        forward, backward = 4 * self.features * self.value_columns, 8 * self.features * self.value_columns
        if cell.causal:
            chunk = min(CHUNK, cell.length)
            forward += 2 * chunk * (self.features + self.value_columns)
            backward = chunk * (6 * self.features + 4 * self.value_columns) + 10 * self.features * self.value_columns
        forward += self.feature_flops()
        backward += 2 * self.feature_flops()
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * cell.length * per_token

    def feature_flops(self) -> int:
        """FLOP per token for the features of a query and a key; their gradient costs as much again."""
        return 0

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v read and o written once, and the like backward; states and features can stay on the chip."""
        return streaming_bytes(cell)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The sums (fp32, or fp64 for fp64) and the running maximum, if any: independent of ``length``."""
        if not self.causal:
            return None
        state = self.initial_state(1, torch.device("cpu"), dtype)
        return sum(x.nbytes for x in (state.state, state.largest) if x is not None)


def visible(rows: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Causal mask ``[R, N_k]``: which keys the given queries see."""
    positions = torch.arange(queries, device=device) if rows is None else rows
    return torch.arange(keys, device=device) <= positions[:, None]


def chosen(q: Tensor, rows: Tensor | None) -> Tensor:
    """The queries at ``rows``; all of them when None."""
    return q if rows is None else q[..., rows, :]
