"""Depthwise convolution of values over an image whose pixels are the tokens, row after row.

What vision models add to linear attention, as its weights are smooth: a small learned kernel for every channel sees the
neighbours of a pixel that attention cannot tell apart. Zeros lie beyond the edges, and there is no bias, so that the
output is linear in the values.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.errors import UsageError
from linbench.mechanisms.cores.chunked import compute_dtype


class Depthwise(torch.nn.Module):
    """``o[y, x] = Σ kernel[a, b] · v[y + a − s//2, x + b − s//2]``, each channel with its own s × s taps.

    Args:
        heads: with kernels of their own, or 1 where all heads share them.
        channels: M.
        size: s, odd.
        height: of the image; None for the most nearly square one that has as many pixels as there are tokens and is
            not higher than wide. A prime number of tokens is a single row.
        seed: of the kernel, which starts uniform within 1/s.

    Raises:
        UsageError: the size is even.
    """

    def __init__(self, heads: int, channels: int, size: int, height: int | None, seed: int) -> None:
        super().__init__()
        if size % 2 == 0:
            raise UsageError(f"kernel={size}: a convolution of {size} × {size} taps has no centre; take an odd number")
        self.size, self.height = size, height
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(heads, channels, size, size, generator=generator, dtype=torch.float64)
        self.kernel = torch.nn.Parameter(((2 * drawn - 1) / size).float())
        """``[H or 1, M, s, s]``."""

    def refusal(self, tokens: int) -> str | None:
        """Why that many tokens are no image; None where they are."""
        if self.height is None or tokens % self.height == 0:
            return None
        return f"{tokens} tokens do not fill an image of {self.height} rows"

    def image(self, tokens: int) -> tuple[int, int]:
        """Height and width of the image of that many tokens.

        Raises:
            UsageError: they do not fill its rows.
        """
        if (refusal := self.refusal(tokens)) is not None:
            raise UsageError(refusal)
        height = self.height or next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
        return height, tokens // height

    def forward(self, v: Tensor) -> Tensor:
        """``[B, H, N, M]`` -> the same, in the dtype of the computation; one head at a time, with as little memory."""
        out: Tensor = _Convolution.apply(v, self.kernel, self.image(v.shape[2]))  # type: ignore[no-untyped-call]
        return out

    def reference(self, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """The sum over taps at the tokens ``rows``, all when None: ``[B, H, R, M]`` in the dtype of v."""
        height, width = self.image(v.shape[2])
        kernel = self.kernel.to(v)
        places = torch.arange(v.shape[2], device=v.device) if rows is None else rows
        out = torch.zeros_like(v[:, :, places])
        for a in range(self.size):
            for b in range(self.size):
                y, x = places // width + a - self.size // 2, places % width + b - self.size // 2
                inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                source = torch.where(inside, y * width + x, 0)
                out = out + kernel[:, None, :, a, b] * v[:, :, source] * inside[:, None]
        return out

    def flops(self, tokens: int, pass_: str) -> int:
        """Per batch element, head and channel: two for every pair of pixels that a kernel spans, and four backward."""
        height, width = self.image(tokens)
        reach = range(-(self.size // 2), self.size // 2 + 1)
        rows, columns = (sum(max(extent - abs(step), 0) for step in reach) for extent in (height, width))
        return rows * columns * {"forward": 2, "backward": 4, "forward_backward": 6}[pass_]


class _Convolution(torch.autograd.Function):
    """``apply(v, kernel, (height, width))``."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, kernel: Tensor, image: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(v, kernel)
        ctx.image = image
        taps = kernel.to(compute_dtype(v))
        out = torch.empty(v.shape, dtype=taps.dtype, device=v.device)
        with _exact(v):
            for head in range(v.shape[1]):
                _pixels(out[:, head], image).copy_(
                    torch.nn.functional.conv2d(
                        _pixels(v[:, head].to(taps.dtype), image),
                        _of_head(taps, head),
                        padding=taps.shape[-1] // 2,
                        groups=taps.shape[1],
                    )
                )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        v, kernel = ctx.saved_tensors
        taps = kernel.to(compute_dtype(v))
        around, channels = taps.shape[-1] // 2, taps.shape[1]
        v_grad, kernel_grad = torch.empty(v.shape, dtype=v.dtype, device=v.device), torch.zeros_like(taps)
        with _exact(v):
            for head in range(v.shape[1]):
                of_pixels, of_taps, _ = torch.ops.aten.convolution_backward(
                    _pixels(grad[:, head], ctx.image),
                    _pixels(v[:, head].to(taps.dtype), ctx.image),
                    _of_head(taps, head),
                    bias_sizes=None,
                    stride=[1, 1],
                    padding=[around, around],
                    dilation=[1, 1],
                    transposed=False,
                    output_padding=[0, 0],
                    groups=channels,
                    output_mask=[True, True, False],
                )
                _pixels(v_grad[:, head], ctx.image).copy_(of_pixels)
                _of_head(kernel_grad, head).add_(of_taps)
        return v_grad, kernel_grad.to(kernel.dtype), None


def _pixels(x: Tensor, image: tuple[int, int]) -> Tensor:
    """``[B, N, M]`` as ``[B, M, height, width]``, whose channels lie beside each other."""
    return x.view(len(x), *image, x.shape[-1]).permute(0, 3, 1, 2)


def _of_head(kernel: Tensor, head: int) -> Tensor:
    """``[M, 1, s, s]`` of ``[H or 1, M, s, s]``."""
    return kernel[head % len(kernel)][:, None]


def _exact(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """On CUDA, the kernels that torch has itself: those of cuDNN round fp32 to ten bits of mantissa by default."""
    return torch.backends.cudnn.flags(enabled=False) if x.is_cuda else contextlib.nullcontext()
