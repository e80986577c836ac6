"""PolySketchFormer: sketched polynomial attention with exact blocks (2310.01655)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit
from linbench.mechanisms.cores.additive import AdditiveState, chosen, visible
from linbench.mechanisms.cores.chunked import Operator, compute_dtype, walk_slabs, with_ones
from linbench.mechanisms.cores.features import FeatureMap
from linbench.mechanisms.cores.monomials import Monomials, SketchedPower
from linbench.mechanisms.cores.pooled import PooledAttention
from linbench.mechanisms.cores.sketch import block_corrections, polynomial_sketch, sketch_matrices


@dataclass(frozen=True)
class BlockState:
    """Finished blocks as sums, and the tokens of the block that is being filled."""

    sums: Tensor
    """``[B, H, F, M + 1]``."""
    keys: Tensor
    """Normalised keys of the block ``[B, H, block, D]``, of which ``filled`` are there."""
    values: Tensor
    """With a column of ones, ``[B, H, block, M + 1]``."""
    filled: int = 0


class PolySketch(AdditiveState):
    """o_i = Σ_j w_ij v_j / (1 + Σ_j w_ij), w_ij = (q̄_i·k̄_j)^p in a block and ⟨f(q̄_i), f(k̄_j)⟩² across (algorithm 1).

    q̄, k̄ are layer-normalised without affine parameters, and not scaled. f is a sketch of degree p/2 with r features:
    for p = 4, f(x) = r^-1/2 (x G₁) ∘ (x G₂) with Gaussian G, so that E⟨f(q), f(k)⟩ = (q·k)^{p/2}; for p = 8 the factors
    are such sketches themselves; for p = 2, f(x) = x. The square keeps weights from being negative. The state holds
    each of the r(r + 1)/2 distinct products of f once, where the paper has r². Drawn from the seed of the geometry for
    all heads; the variant with learned networks in the place of G is left out.

    The :meth:`target` is exact polynomial attention, not softmax. Sketches are unbiased but noisy, with a deviation of
    the order of (‖q‖‖k‖)^p: with random keys they are close only at large r.

    Args:
        sketch: r.
        power: p.
        block: tokens of a block inside which the weights are exact; costs block² numbers of memory. 0 for no block.
            N and more is exact. The paper has 256–1024.
    """

    description: ClassVar[Description] = Description(
        summary="(q·k)⁴v/(1 + Σ(q·k)⁴) on normalised q, k: exact in blocks, sketched across",
        kind="approximator",
        causal_forms=(False, True),
        paper="PolySketchFormer: Fast Transformers via Sketching Polynomial Kernels",
        arxiv="2310.01655",
        year=2023,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(converges=Convergence("sketch", (8, 32, 128), hyperparameters={"block": 0}))
    offset: ClassVar[float] = 1.0

    def __init__(
        self,
        geometry: Geometry,
        sketch: Annotated[int, Field(ge=1, le=512)] = 32,
        power: Literal[2, 4, 8] = 4,
        block: Annotated[int, Field(ge=0)] = 256,
    ) -> None:
        width = geometry.key_dim if power == 2 else sketch
        super().__init__(geometry, width * (width + 1) // 2)
        self.sketch, self.power, self.block = sketch, power, block
        self.monomials = Monomials(width, 2, 2, weight=2**0.5)
        generator = torch.Generator().manual_seed(geometry.seed)
        for index, matrix in enumerate(sketch_matrices(geometry.key_dim, sketch, power // 2, generator)):
            self.register_buffer(f"matrix_{index}", matrix)

    def half_power(self, x: Tensor) -> Tensor:
        """f(x), ``[..., r]``."""
        return polynomial_sketch(x, [matrix.to(x) for matrix in self.buffers()], self.power // 2)

    def feature_map(self, like: Tensor) -> FeatureMap:
        """The sketch, squared; pairs of a chunk are exact where there are blocks."""
        matrices = [matrix.to(like) for matrix in self.buffers()]
        return SketchedPower(
            lambda x: polynomial_sketch(x, matrices, self.power // 2), self.monomials, self.power, self.block
        )

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The layer-normalised, in the dtype of the computation."""
        dtype = compute_dtype(q)
        return F.layer_norm(q.to(dtype), q.shape[-1:]), F.layer_norm(k.to(dtype), k.shape[-1:])

    @property
    def chunk(self) -> int:
        """A block."""
        return self.block or super().chunk

    @property
    def pair_width(self) -> int:
        """Exact weights take products of width D."""
        return self.geometry.key_dim if self.block else self.features

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal, chunks that are blocks; otherwise a pool of all keys, corrected inside the blocks."""
        if self.causal:
            return super().forward_torch(q, k, v)
        self.check(q, k)
        q, k = self.prepared(q, k)
        values = with_ones(v.to(q))
        longest = max(q.shape[2], k.shape[2])
        if self.block >= longest:
            sums = block_corrections(q, k, values, power=self.power, block=longest, approximate=None)
        else:
            heads = (x.flatten(0, 1) for x in (q, k, values))
            pooled: Tensor = PooledAttention.apply(*heads, Operator(self.feature_map(q), False))  # type: ignore[no-untyped-call]
            sums = pooled.view(*q.shape[:3], -1)
            if self.block:
                f = self.half_power
                sums = sums + block_corrections(q, k, values, power=self.power, block=self.block, approximate=f)
        return (sums[..., :-1] / (1 + sums[..., -1:])).to(v.dtype)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, in full."""
        self.check(q, k)
        positions = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        x, y = self.prepared(chosen(q, rows), k)
        weights = (self.half_power(x) @ self.half_power(y).mT).square()
        if self.block:
            keys = torch.arange(k.shape[2], device=q.device)
            same_block = positions[:, None] // self.block == keys // self.block
            weights = torch.where(same_block, (x @ y.mT) ** self.power, weights)
        return self._attend(weights, q, k, v, rows)

    def target(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Exact polynomial attention."""
        x, y = self.prepared(chosen(q, rows), k)
        return self._attend((x @ y.mT) ** self.power, q, k, v.to(x), rows)

    def _attend(self, weights: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        if self.causal:
            weights = weights * visible(rows, q.shape[2], k.shape[2], q.device)
        return weights @ v / (1 + weights.sum(-1, keepdim=True))

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """One block."""
        return ExactLimit({"block": length})

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """No finished block, and an empty one; without blocks the sums."""
        if not self.block:
            return super().initial_state(batch, device, dtype)
        sums = super().initial_state(batch, device, dtype).state
        shape = (*sums.shape[:2], self.block)
        return BlockState(sums, sums.new_zeros(*shape, self.geometry.key_dim), sums.new_zeros(*shape, sums.shape[-1]))

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Any]:
        """The chunks of the fast path, which are blocks: their state after the last whole one, and what follows it."""
        if not self.block:
            return super().prefill(q, k, v)
        self.require_decoding()
        self.check(q, k)
        operator, heads = self.chunk_operands(q, k, v)
        walked = walk_slabs(heads[0], heads[1], heads[2], operator)
        state: BlockState = self.initial_state(q.shape[0], q.device, q.dtype)
        filled = q.shape[2] % self.block
        first = q.shape[2] - filled
        state.keys[:, :, :filled] = heads[1].view(k.shape)[:, :, first:]
        state.values[:, :, :filled] = with_ones(v[:, :, first:].to(state.values.dtype))
        sums = walked.after_whole.state.view_as(state.sums)
        return walked.out.view(v.shape), BlockState(sums, state.keys, state.values, filled)

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Tensor) -> tuple[Tensor, Any]:
        """One token, without gradient: the sums by the sketch, its block exactly; a full block is added to the sums."""
        if not self.block:
            out, after = super().step(q, k, v, state)
            return out, after
        sums, dtype, features = state.sums, state.sums.dtype, self.feature_map(state.sums)
        q, k = self.prepared(q[:, :, None].to(dtype), k[:, :, None].to(dtype))
        state.keys[:, :, state.filled] = k[:, :, 0]
        state.values[:, :, state.filled] = with_ones(v.to(dtype))
        filled = state.filled + 1
        keys, values = state.keys[:, :, :filled], state.values[:, :, :filled]
        out = (q @ keys.mT) ** self.power @ values + features.features(q)[0] @ sums
        if filled == self.block:
            sums, filled = sums + features.features(keys)[0].mT @ values, 0
        out = (out[..., :-1] / (1 + out[..., -1:])).squeeze(2).to(v.dtype)
        return out, BlockState(sums, state.keys, state.values, filled)

    def flops(self, cell: Cell) -> int:
        """As :class:`AdditiveState`; the non-causal form has blocks besides, with products of width D and r."""
        total = super().flops(cell)
        if cell.causal or not self.block:
            return total
        block, width = min(self.block, cell.length), self.geometry.key_dim + self.monomials.variables
        forward, backward = 2 * block * (width + self.value_columns), block * (6 * width + 4 * self.value_columns)
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return total + cell.batch * cell.heads * cell.length * per_token

    def feature_flops(self) -> int:
        """The Gaussian products of a query and a key."""
        return sum(4 * matrix.numel() for matrix in self.buffers())

    def decode_flops(self, cell: Cell) -> int:
        """2(D + E) for every key of the block, 2FE for reading the sums; at its end 2FE for each of its keys.

        With the sketch of the query where there are sums, and of all keys of a block at its end.
        """
        if not self.block:
            return super().decode_flops(cell)
        finished, inside = divmod(cell.length - 1, self.block)
        inside += 1
        sums, sketch = 2 * self.features * self.value_columns, self.feature_flops() // 2
        per_head = 2 * inside * (cell.head_dim + self.value_columns) + (sums + sketch if finished else 0)
        per_head += self.block * (sums + sketch) if inside == self.block else 0
        return cell.batch * cell.heads * per_head

    def decode_bytes(self, cell: Cell) -> int:
        """The token, the sums and the keys and values of its block read, and what changes written."""
        if not self.block:
            return super().decode_bytes(cell)
        finished, inside = divmod(cell.length - 1, self.block)
        sums = self.features * self.value_columns * (bool(finished) + (inside + 1 == self.block))
        numbers = sums + (inside + 1) * (self.geometry.key_dim + self.value_columns)
        return self.token_bytes(cell) + cell.batch * cell.heads * numbers * max(cell.element_bytes, 4)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The sums, and the keys and values of a block (with their ones)."""
        if not self.causal:
            return None
        width = self.geometry.key_dim + self.value_columns
        elements = self.features * self.value_columns + self.block * width
        return self.geometry.heads * elements * torch.promote_types(dtype, torch.float32).itemsize
