"""Mechanisms whose past is a sum, S = Σ_j w_j φ(k_j)ᵀ v_j: what linear attention, Performer and retention share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Geometry, Mechanism, streaming_bytes
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
from linbench.mechanisms.cores.pooled import PooledAttention
from linbench.mechanisms.cores.slabs import CHUNK
from linbench.mechanisms.fused import require


class AdditiveState(Mechanism):
    """Features, an optional decay and an optional normaliser; the fast path, the decoder and the costs follow.

    Inputs below fp64 are computed and accumulated in fp32, on every device, and the output is rounded once.
    """

    normalised: ClassVar[bool] = True
    """Whether every row is divided by the sum of its weights."""
    offset: ClassVar[float] = 0.0
    """Added to that sum."""

    def __init__(self, geometry: Geometry, features: int) -> None:
        super().__init__(geometry)
        self.features = features
        """F, the width of φ."""
        self._kernel_decays: dict[tuple[torch.device, torch.dtype], Tensor | None] = {}

    @abstractmethod
    def feature_map(self, like: Tensor) -> FeatureMap:
        """φ on the device and in the dtype of ``like``."""

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What φ is applied to, ``[B, H, N, ·]``, as wide as q and k at most: differentiable maps, learned ones too."""
        return q, k

    def feature_map_for(self, q: Tensor, k: Tensor) -> FeatureMap:
        """φ for a call with these; :meth:`feature_map` where φ does not depend on the number of tokens."""
        return self.feature_map(q.new_empty(0, dtype=compute_dtype(q)))

    def log_decay(self, device: torch.device) -> Tensor | None:
        """Logarithm of the decay per token, fp64 ``[H]``; None without decay."""
        return None

    @property
    def scale(self) -> float:
        """What multiplies the weights where rows are not normalised."""
        return 1.0

    @property
    def chunk(self) -> int:
        """C of the causal form."""
        return CHUNK

    @property
    def pair_width(self) -> int:
        """W: the width of the products inside a chunk: F, or D where φ has weights of pairs."""
        return self.features

    @property
    def value_columns(self) -> int:
        """E: M, and one more for the normaliser."""
        return self.geometry.value_dim + self.normalised

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Chunks with a hand-written backward: memory linear in N, no ``[N, F]`` array of features."""
        self.check(q, k)
        operator, heads = self.chunk_operands(q, k, v)
        form = ChunkedAttention if self.causal else PooledAttention
        out: Tensor = form.apply(*heads, operator)  # type: ignore[no-untyped-call]
        return out.view(*q.shape[:2], *out.shape[1:])

    def chunk_operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Operator, list[Tensor]]:
        """The operator of the fast path, and what φ is applied to with the values, each ``[G, N, ·]``."""
        features = self.feature_map_for(q, k)
        batch, (q, k) = q.shape[0], self.prepared(q, k)
        decay = self.log_decay(q.device) if self.causal else None
        rates, scale = (None, 1.0) if decay is None else (decay.repeat(batch), self.scale)
        operator = Operator(features, self.normalised, rates, scale, self.offset)
        return operator, [x.flatten(0, 1) for x in (q, k, v)]

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Any]:
        """The chunks of the fast path, which have the state at their end."""
        self.require_decoding()
        self.check(q, k)
        operator, heads = self.chunk_operands(q, k, v)
        walked = walk_slabs(heads[0], heads[1], heads[2], operator)
        return walked.out.view(*q.shape[:2], *walked.out.shape[1:]), by_head(walked.after, *q.shape[:2])

    def fused(self, q: Tensor, k: Tensor, v: Tensor, feature: str = "identity") -> Tensor:
        """What ``forward_triton`` of a mechanism is whose φ the kernels have by that name.

        Raises:
            UsageError: they cannot run here, or have no such form.
        """
        self.check(q, k)
        require(q.device.type, self.causal)
        from linbench_kernels.additive import attention

        return attention(q, k, v, **self.kernel_options(q, feature))[0]

    @torch.no_grad()
    def fused_prefill(self, q: Tensor, k: Tensor, v: Tensor, feature: str = "identity") -> tuple[Tensor, Checkpoint]:
        """What ``prefill_triton`` is then; raises as :meth:`fused`."""
        self.check(q, k)
        require(q.device.type, self.causal)
        from linbench_kernels.additive import attention

        out, sums = attention(q, k, v, **self.kernel_options(q, feature), return_state=True)
        assert sums is not None, "it was asked for"
        return out, Checkpoint(sums, None)

    @torch.no_grad()
    def fused_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint, feature: str = "identity"
    ) -> tuple[Tensor, Checkpoint]:
        """What ``step_triton`` is then: the sums are changed in place; raises as :meth:`fused`."""
        require(q.device.type, self.causal)
        from linbench_kernels.additive import step

        return step(q, k, v, state.state, **self.kernel_options(q, feature)), state

    def kernel_options(self, q: Tensor, feature: str) -> dict[str, Any]:
        """What the kernels are told beside q, k and v. The decays are made once: a step launches nothing for them."""
        numbers = q.device, torch.promote_types(q.dtype, torch.float32)
        if numbers not in self._kernel_decays:
            decay = self.log_decay(q.device)
            self._kernel_decays[numbers] = None if decay is None else decay.to(numbers[1])
        decay = self._kernel_decays[numbers]
        return {"log_decay": decay, "scale": self.scale, "feature": feature, "normalised": self.normalised}

    def fused_sums(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature: str,
        *,
        sharpness: float | None = None,
        horizon: int | None = None,
    ) -> Tensor:
        """The form without a mask of what the kernels have by that name: a pass over the keys, one over the queries.

        With ``sharpness`` t the weights are 1 + t φ(q)·φ(k).

        Raises:
            UsageError: they cannot run here.
        """
        self.check(q, k)
        require(q.device.type, self.causal, (False,))
        from linbench_kernels.noncausal import pool, read

        sums = pool(k, v, feature=feature, horizon=horizon)
        if sharpness is not None:
            sums = torch.cat((sums[..., :-1, :] * sharpness, sums[..., -1:, :]), -2)
        return read(q, sums, feature=feature, constant=sharpness is not None, horizon=horizon)

    def fused_features(self, q: Tensor, k: Tensor, v: Tensor, feature: str, **options: Any) -> Tensor:
        """The same for a φ of a map of its own, which the kernels make where they use it; ``options`` are theirs.

        Raises:
            UsageError: they cannot run here.
        """
        self.check(q, k)
        require(q.device.type, self.causal)
        from linbench_kernels.features import attention

        return attention(q, k, v, feature=feature, **options)[0]

    @torch.no_grad()
    def fused_features_prefill(
        self, q: Tensor, k: Tensor, v: Tensor, feature: str, **options: Any
    ) -> tuple[Tensor, Checkpoint]:
        """What ``prefill_triton`` is then; raises as :meth:`fused_features`."""
        self.check(q, k)
        require(q.device.type, self.causal)
        from linbench_kernels.features import attention

        out, state = attention(q, k, v, feature=feature, return_state=True, **options)
        assert state is not None, "it was asked for"
        return out, Checkpoint(*state)

    @torch.no_grad()
    def fused_features_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint, feature: str, **options: Any
    ) -> tuple[Tensor, Checkpoint]:
        """What ``step_triton`` is then: the sums are changed in place; raises as :meth:`fused_features`."""
        require(q.device.type, self.causal)
        from linbench_kernels.features import step
        from linbench_kernels.features.operator import State

        return step(q, k, v, State(state.state, state.largest), feature=feature, **options), state

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
        scaled = self.feature_map(sums).scaled
        return Checkpoint(sums, sums.new_full(sums.shape[:2], -torch.inf) if scaled else None)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Checkpoint, **extras: Tensor) -> tuple[Tensor, Checkpoint]:
        """One token of the causal form: q, k ``[B, H, D]``, v ``[B, H, M]`` -> o ``[B, H, M]`` and the next state."""
        return self.advance(q, k, v, state, features=self.feature_map(state.state))

    def advance(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Checkpoint,
        *,
        features: FeatureMap,
        entering: Tensor | None = None,
    ) -> tuple[Tensor, Checkpoint]:
        """The step with the feature map of its token, and with the weight ``[B, H, 1]`` of the token; None for one."""
        sums, largest = state.state, state.largest
        q, k = self.prepared(q[:, :, None].to(sums.dtype), k[:, :, None].to(sums.dtype))
        q_features = features.features(q)[0].squeeze(2)
        k_features, log_scale = features.features(k)
        values = v.to(sums.dtype)
        if self.normalised:
            values = with_ones(values)
        if entering is not None:
            values = values * entering
        if log_scale is not None and largest is not None:
            log_scale = log_scale.squeeze(2)
            before, largest = largest, torch.maximum(largest, log_scale)
            sums = sums * (before - largest).exp()[..., None, None]
            values = values * (log_scale - largest).exp()[..., None]
        decay = self.log_decay(q.device)
        if decay is not None:
            sums = sums * decay.exp().to(sums.dtype)[:, None, None]
        sums = torch.addcmul(sums, k_features.mT, values[..., None, :])
        out = (q_features[..., None, :] @ sums).squeeze(-2) * self.scale
        if self.normalised:
            out = out[..., :-1] / guarded(out[..., -1:] + self.offset)
        return out.to(v.dtype), Checkpoint(sums, largest)

    def flops(self, cell: Cell) -> int:
        """Matrix products of the pass; exponentials and divisions are not counted.

        Causal: chunks of at most C = :attr:`chunk` tokens, 2C(W + E) + 4FE per token forward and C(6W + 4E) + 10FE
        backward, W being :attr:`pair_width`. Otherwise 4FE and 8FE. The backward computes the features anew.
        """
        forward, backward = 4 * self.features * self.value_columns, 8 * self.features * self.value_columns
        if cell.causal:
            chunk, width = min(self.chunk, cell.length), self.pair_width
            forward += 2 * chunk * (width + self.value_columns)
            backward = chunk * (6 * width + 4 * self.value_columns) + 10 * self.features * self.value_columns
        forward += self.feature_flops()
        backward += 2 * self.feature_flops()
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * cell.length * per_token

    def feature_flops(self) -> int:
        """FLOP per token for the features of a query and a key; their gradient costs as much again."""
        return 0

    def decode_flops(self, cell: Cell) -> int:
        """4FE for writing and reading the sums, and the features of a query and a key."""
        per_head = 4 * self.features * self.value_columns + self.feature_flops()
        return cell.batch * cell.heads * per_head

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v read and o written once, and the like backward; states and features can stay on the chip."""
        return streaming_bytes(cell)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The sums (fp32, or fp64 for fp64) and the running maximum, if any: independent of ``length``."""
        if not self.causal:
            return None
        state = self.initial_state(1, torch.device("cpu"), dtype)
        return sum(x.nbytes for x in (state.state, state.largest) if x is not None)


def by_head(checkpoint: Checkpoint, batch: int, heads: int) -> Checkpoint:
    """``[G, …]`` as the steps have it, ``[B, H, …]``."""
    largest = checkpoint.largest
    return Checkpoint(
        checkpoint.state.view(batch, heads, *checkpoint.state.shape[1:]),
        None if largest is None else largest.view(batch, heads),
    )


def visible(rows: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Causal mask ``[R, N_k]``: which keys the given queries see."""
    positions = torch.arange(queries, device=device) if rows is None else rows
    return torch.arange(keys, device=device) <= positions[:, None]


def chosen(q: Tensor, rows: Tensor | None) -> Tensor:
    """The queries at ``rows``; all of them when None."""
    return q if rows is None else q[..., rows, :]
