"""What linear attention on images shares: one pass over keys, one over queries, and a convolution of the values."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Geometry, Mechanism
from linbench.mechanisms.cores.depthwise import Depthwise


class ImageAttention(Mechanism):
    """Tokens are the pixels of an image, row after row, and rows of weights add :class:`Depthwise` of the values.

    There is no causal form, since the convolution sees tokens of the future.

    Args:
        kernel: taps of a side of the convolution, odd; 0 for none.
        height: of the image, which must divide N; None for the most nearly square image of N pixels.
        kernels: how many heads have taps of their own; 1 where all share them.
    """

    def __init__(self, geometry: Geometry, kernel: int, height: int | None, kernels: int) -> None:
        super().__init__(geometry)
        self.convolution: Depthwise | None = None
        if kernel:
            self.convolution = Depthwise(kernels, geometry.value_dim, kernel, height, geometry.seed)

    def unsupported(self, cell: Cell) -> str | None:
        """Also tokens that are no image of that height."""
        refusal = None if self.convolution is None else self.convolution.refusal(cell.length)
        return super().unsupported(cell) or refusal

    def check(self, q: Tensor, k: Tensor) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before).

        Raises:
            UsageError: causal, or a convolution and other keys than queries.
        """
        name = type(self).__name__.lower()
        if self.causal:
            raise UsageError(f"{name} has no causal form")
        if self.convolution is not None and q.shape[-2] != k.shape[-2]:
            raise UsageError(
                f"{name} with a convolution needs as many keys as queries, got {k.shape[-2]} and {q.shape[-2]}"
            )

    @abstractmethod
    def token_flops(self, cell: Cell) -> int:
        """Of the matrix products of a token and a head, forward."""

    def flops(self, cell: Cell) -> int:
        """Those of the tokens, twice as many backward, and the convolution."""
        passes = {"forward": 1, "backward": 2, "forward_backward": 3}[cell.pass_]
        total = cell.length * self.token_flops(cell) * passes
        if self.convolution is not None and self.unsupported(cell) is None:
            total += cell.value_dim * self.convolution.flops(cell.length, cell.pass_)
        return cell.batch * cell.heads * total
