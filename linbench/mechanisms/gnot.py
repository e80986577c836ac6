"""GNOT's normalised attention: softmax over the channels of queries and of keys (2302.14376)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.cores.additive import chosen
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.streams import Keys, Queries, pool, read
from linbench.mechanisms.cores.walks import Parts
from linbench.mechanisms.fused import require


class GNOT(Mechanism):
    """o_i = (1/L) Σ_l Σ_j (q̃_i·k̃_j) v_j / Σ_j q̃_i·k̃_j over the keys of source l, q̃ = softmax_D(q), k̃ = softmax_D(k).

    No 1/√D; every row of a source sums to one. The keys and values of the L input functions, each with projections of
    its own in a layer, stand behind each other in k and v. A source with few points weighs as much as one with many.

    With s = Σ_j k̃_j of a source and m its channels' weighted means Σ_j k̃_jc v_j / s_c, the row is
    softmax_D(q + log s)·m: no quotient is left that could underflow.

    The authors' code *sums* over the sources, without 1/L. Its gates over experts are no part of the attention.

    Args:
        sources: L. The tokens of k and v are cut into so many runs whose lengths differ by one at most, the longer
            first.
        residual: adds q̃ to the output, as the paper and its code do before their output projection; D = M then.
    """

    description: ClassVar[Description] = Description(
        summary="softmax_D(q)·softmax_D(k)ᵀv, rows normalised, mean over L input functions",
        kind="replacement",
        causal_forms=(False,),
        paper="GNOT: A General Neural Operator Transformer for Operator Learning",
        arxiv="2302.14376",
        year=2023,
    )
    claims: ClassVar[Claims] = Claims(row_stochastic=True, permutation_equivariant=True, duplication_invariant=True)
    kernel_forms: ClassVar[tuple[bool, ...]] = (False,)

    def __init__(self, geometry: Geometry, sources: Annotated[int, Field(ge=1)] = 1, residual: bool = False) -> None:
        super().__init__(geometry)
        if residual and geometry.key_dim != geometry.value_dim:
            raise UsageError(
                f"gnot: residual adds queries of {geometry.key_dim} channels to values of {geometry.value_dim}"
            )
        self.sources, self.residual = sources, residual

    def unsupported(self, cell: Cell) -> str | None:
        """Also fewer keys than sources."""
        if cell.length < self.sources:
            return f"{cell.length} keys cannot belong to {self.sources} sources"
        return super().unsupported(cell)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The weights of the given rows, source by source."""
        self._check(k)
        q = chosen(q, rows).softmax(-1)
        out = q if self.residual else torch.zeros((), dtype=v.dtype, device=v.device)
        for source in self.runs(k.shape[2]):
            weights = q @ k[:, :, source].softmax(-1).mT
            out = out + weights @ v[:, :, source] / weights.sum(-1, keepdim=True) / self.sources
        return out

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Means of every channel source by source, side by side, then one reading of all by the queries."""
        self._check(k)
        means, masses = [], []
        for source in self.runs(k.shape[2]):
            sums = pool(_keys, (k[:, :, source], v[:, :, source]))
            empty = sums.features == 0  # a channel whose weights underflow for every key: it takes part in nothing
            mass = sums.features.masked_fill(empty, 1)
            means.append(sums.products / mass[..., None])
            masses.append(mass.log().masked_fill(empty, -torch.inf))
        products, shared = torch.cat(means, 2) / self.sources, torch.stack(masses, 2)
        return read(self._queries, (q,), products, (shared,), dtype=v.dtype)

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused: a pass over the keys of each source, and one over the queries for each.

        Raises:
            UsageError: the kernels cannot run here, or have no such form.
        """
        self._check(k)
        require(q.device.type, self.causal, self.kernel_forms)
        from linbench_kernels.noncausal import pool as pool_sums
        from linbench_kernels.noncausal import read as read_sums

        rows = []
        for source in self.runs(k.shape[2]):
            sums = pool_sums(k[:, :, source], v[:, :, source], feature="softmax")
            rows.append(read_sums(q, sums, feature="softmax"))
        out = rows[0]
        if len(rows) > 1:
            out = torch.stack(rows).mean(0, dtype=compute_dtype(v)).to(v.dtype)
        return out + q.softmax(-1) if self.residual else out

    def _queries(self, tokens: Parts, shared: Parts) -> Queries:
        (q,), (masses,) = tokens, shared
        features = (q[..., None, :] + masses[:, :, None]).softmax(-1).flatten(-2)
        return Queries(features, added=q.softmax(-1) if self.residual else None)

    def runs(self, keys: int) -> list[slice]:
        """The tokens of each source."""
        least, longer = divmod(keys, self.sources)
        ends = [source * least + min(source, longer) for source in range(self.sources + 1)]
        return [slice(*ends[source : source + 2]) for source in range(self.sources)]

    def _check(self, k: Tensor) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before)."""
        if self.causal:
            raise UsageError("gnot has no causal form")
        if k.shape[2] < self.sources:
            raise UsageError(f"gnot: {k.shape[2]} keys cannot belong to {self.sources} sources")

    def flops(self, cell: Cell) -> int:
        """The products, 2DM a key and 2LDM a query and twice that backward; exponentials are not counted."""
        passes = {"forward": 1, "backward": 2, "forward_backward": 3}[cell.pass_]
        per_token = 2 * cell.head_dim * cell.value_dim * (1 + self.sources)
        return passes * cell.batch * cell.heads * cell.length * per_token

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v read and o written once, and the like backward; means and features can stay on the chip."""
        return streaming_bytes(cell)


def _keys(tokens: Parts, shared: Parts) -> Keys:
    k, v = tokens
    return Keys(k.softmax(-1), v)
