"""A mechanism of another package: the mean of the past, which fades."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims


class FadingMean(Mechanism):
    """o_t = Σ_{j≤t} a^(t−j) v_j / Σ_{j≤t} a^(t−j), whatever the queries and keys."""

    description: ClassVar[Description] = Description(
        "a mean of the past that fades", "replacement", (True,), "none", "none", 2026, time="N^2", memory="N^2"
    )
    claims: ClassVar[Claims] = Claims(row_stochastic=True)

    def __init__(self, geometry: Geometry, kept: Annotated[float, Field(gt=0, le=1)] = 0.9) -> None:
        super().__init__(geometry)
        self.kept = kept

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """Every weight by itself."""
        positions = torch.arange(v.shape[2], device=v.device)
        distance = (positions if rows is None else rows.to(v.device))[:, None] - positions
        weights = torch.where(distance < 0, 0.0, self.kept ** distance.clamp(min=0).to(v.dtype))
        return weights / weights.sum(-1, keepdim=True) @ v

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Powers from a table."""
        tokens = v.shape[2]
        wide = torch.promote_types(v.dtype, torch.float32)
        powers = self.kept ** torch.arange(tokens, dtype=wide, device=v.device)
        weights = torch.nn.functional.pad(powers.flip(0), (0, tokens)).unfold(0, tokens, 1)[:tokens].flip(0)
        return (weights @ v.to(wide) / powers.cumsum(0)[:, None]).to(v.dtype)

    def flops(self, cell: Cell) -> int:
        """One product forward, one backward."""
        passes = {"forward": 1, "backward": 1, "forward_backward": 2}[cell.pass_]
        return 2 * passes * cell.batch * cell.heads * cell.length**2 * cell.value_dim

    def min_bytes(self, cell: Cell) -> int:
        """What enters and leaves."""
        return streaming_bytes(cell)
