"""Gated causal convolutions with filters as long as the sequence, by Fourier transforms of some channels at a time.

o_t = q_t Σ_{j≤t} h_{t−j} k_j v_j per channel. Sequences are padded with zeros to a length P ≥ 2N − 1, so that nothing
of the end comes round to the beginning. Only the operands are kept for the backward, which transforms again: spectra
take twice the memory of their sequences.

Transforms: 2 per channel and batch element forward, 4 backward; and 1 of the filter forward, 2 backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.mechanisms.cores.slabs import DEVICE_ELEMENTS

CORE_ELEMENTS = 2**17
"""Padded elements of the channels that are transformed together, per CPU thread: their spectra stay near the core."""
LINE = 16
"""Channels that are transformed together at least: as many as share a line of the cache, for they lie side by side."""
FACTORS = (1, 3, 5, 9, 15)
"""Odd parts of lengths whose transforms are fast."""


def gated_convolution(q: Tensor, k: Tensor, v: Tensor, filters: Tensor) -> Tensor:
    """The operator with memory linear in tokens, forward and backward.

    Args:
        q: ``[B, H, N, M]``.
        k: ``[B, H, N, M]``.
        v: ``[B, H, N, M]``.
        filters: h, ``[H, M, N]``, in the dtype of the computation.

    Returns:
        ``[B, H, N, M]``, in the dtype of v.
    """
    out: Tensor = _GatedConvolution.apply(filters, q, k, v)  # type: ignore[no-untyped-call]
    return out


def padded_length(tokens: int) -> int:
    """P: the shortest even length with one of the :data:`FACTORS` that holds 2N − 1 elements."""
    least = max(2 * tokens - 1, 2)
    return min(odd << max((-(-least // odd) - 1).bit_length(), 1) for odd in FACTORS)


@dataclass(frozen=True)
class Part:
    """Channels of some heads, which are transformed together."""

    heads: slice
    channels: slice
    at_once: int
    """Batch elements."""

    def read(self, x: Tensor, batch: slice, dtype: torch.dtype) -> Tensor:
        """``[B, H, N, M]`` -> ``[b, h, N, m]``."""
        return x[batch, self.heads, :, self.channels].to(dtype)

    def batches(self, batch: int) -> Iterator[slice]:
        """All batch elements, some at once."""
        for first in range(0, batch, self.at_once):
            yield slice(first, min(first + self.at_once, batch))


class _GatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, filters: Tensor, *streams: Tensor) -> Tensor:
        ctx.save_for_backward(filters, *streams)
        out = torch.empty(streams[2].shape, dtype=streams[2].dtype, device=filters.device)
        transform = _Transform(filters)
        for part in _parts(streams[2]):
            spectrum = transform.of_filters(filters[part.heads, part.channels])
            for batch in part.batches(len(out)):
                q, k, v = (part.read(x, batch, filters.dtype) for x in streams)
                mixed = transform.inverse(transform.forward(k, v).mul_(spectrum))
                torch.mul(q, mixed, out=out[batch, part.heads, :, part.channels])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, ...]:
        filters, *streams = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in streams]
        filters_grad, transform = torch.empty_like(filters), _Transform(filters)
        for part in _parts(streams[2]):
            spectrum = transform.of_filters(filters[part.heads, part.channels])
            correlation = torch.zeros_like(spectrum)
            for batch in part.batches(len(out_grad)):
                q, k, v, grad = (part.read(x, batch, filters.dtype) for x in (*streams, out_grad))
                gated, arriving = transform.forward(k, v), transform.forward(q, grad)
                of_gated = transform.inverse(arriving * spectrum.conj())
                correlation += arriving.mul_(gated.conj()).sum(0)
                mixed = transform.inverse(gated.mul_(spectrum))
                for whole, *factors in zip(grads, (grad, of_gated, of_gated), (mixed, v, k), strict=True):
                    torch.mul(*factors, out=whole[batch, part.heads, :, part.channels])
            filters_grad[part.heads, part.channels] = transform.inverse(correlation).mT
        return (filters_grad, *grads)


class _Transform:
    """Between sequences ``[…, N, m]`` and the spectra of them padded to P, ``[…, m, P/2 + 1]``."""

    def __init__(self, filters: Tensor) -> None:
        self.tokens = filters.shape[-1]
        self.length = padded_length(self.tokens)
        self._padded = filters.new_zeros(0)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Of products."""
        shape = (*left.shape[:-2], left.shape[-1], self.length)
        if self._padded.shape != shape:
            self._padded = left.new_zeros(shape)
        self._padded[..., : self.tokens] = (left * right).mT
        spectrum: Tensor = torch.fft.rfft(self._padded)
        return spectrum

    def of_filters(self, filters: Tensor) -> Tensor:
        """Of filters, ``[h, m, N]``."""
        spectrum: Tensor = torch.fft.rfft(filters, n=self.length)
        return spectrum

    def inverse(self, spectrum: Tensor) -> Tensor:
        """The first N elements, ``[…, N, m]``."""
        whole: Tensor = torch.fft.irfft(spectrum, n=self.length)
        return whole[..., : self.tokens].mT


def _parts(v: Tensor) -> list[Part]:
    """All channels, as many together as fit."""
    batch, heads, tokens, channels = v.shape
    elements = CORE_ELEMENTS * torch.get_num_threads() if v.device.type == "cpu" else DEVICE_ELEMENTS
    most = max(elements // padded_length(tokens), LINE)
    together, width = max(min(most // channels, heads), 1), min(most, channels)
    at_once = max(most // (together * width), 1)
    return [
        Part(slice(h, min(h + together, heads)), slice(c, min(c + width, channels)), min(at_once, batch))
        for h in range(0, heads, together)
        for c in range(0, channels, width)
    ]
