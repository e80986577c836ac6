"""Hyena: long convolutions with implicit filters between gates (2302.10866)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.long_convolution import gated_convolution
from linbench.mechanisms.cores.recurrence import CausalOnly

SLOWEST, FASTEST = math.log(100) / 1.5, math.log(100) / 0.3
"""Rates of the windows: the authors' fall to 1 % at 1.5 and at 0.3 of ``max_length``."""
HIDDEN = 3
"""Layers of the network before its last one."""


class Hyena(CausalOnly):
    """o_t = q_t ∘ (Σ_{j≤t} h_{t−j} ∘ k_j ∘ v_j + d ∘ k_t ∘ v_t): order 2, with one long convolution per channel.

    q and k are the gates x⁰ and x¹, so that D = M; heads only divide the channels. The filter of channel c is
    h_t = e^{−δ_c t/(L−1)} · network(features of t)_c with L = ``max_length``: a network of three sine layers of
    ``width``, sin(ω ∘ (W x + b)), and a last linear one, applied to t/(L−1), cos(2π f t/L) and −sin(2π f t/L) at
    ``bands`` frequencies f. Because L is fixed, a filter does not depend on the number of tokens; more than L there
    cannot be. W, b, ω and d are learned and start as in the authors' code (d normal, the layers as in torch).

    Order 2 as in the authors' code, which realises the first of the two convolutions of the paper's recurrence as the
    short one of its projections. That one, of three tokens, belongs to the layer and is left out. The code also learns
    the features, at a rate of 1e-5; here they are given.

    There is no decoding step: h is no sum of few exponentials, so that a token needs all of the past, O(N).

    Args:
        max_length: L, the most tokens there can be. The nearer to what is used, the more a filter varies there.
        width: of the sine layers.
        bands: frequencies of the features, from 0 to bands − 1 periods in L tokens.
        frequency: every entry of ω before learning.
    """

    description: ClassVar[Description] = Description(
        summary="q ∘ (h ∗ (k ∘ v) + d ∘ k ∘ v): a long convolution with an implicit filter per channel, gated",
        kind="replacement",
        causal_forms=(True,),
        paper="Hyena Hierarchy: Towards Larger Convolutional Language Models",
        arxiv="2302.10866",
        year=2023,
        time="N log N",
    )
    claims: ClassVar[Claims] = Claims(causality="rounding")
    bands: Tensor
    """f, fp64."""
    rates: Tensor
    """δ, fp64 ``[H·M]``: evenly spaced over the channels."""

    def __init__(
        self,
        geometry: Geometry,
        max_length: Annotated[int, Field(ge=2)] = 131072,
        width: Annotated[int, Field(ge=1)] = 64,
        bands: Annotated[int, Field(ge=1)] = 16,
        frequency: Annotated[float, Field(gt=0)] = 14.0,
    ) -> None:
        super().__init__(geometry)
        self.max_length, self.width = max_length, width
        shape = (geometry.heads, geometry.value_dim)
        generator = torch.Generator().manual_seed(geometry.seed)
        widths = (1 + 2 * bands, *(width,) * HIDDEN, math.prod(shape))

        def uniform(inputs: int, *size: int) -> torch.nn.Parameter:
            drawn = torch.rand(size, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter((2 * drawn - 1) * inputs**-0.5)

        pairs = list(pairwise(widths))
        self.weights = torch.nn.ParameterList([uniform(n, m, n) for n, m in pairs])
        self.biases = torch.nn.ParameterList([uniform(n, m) for n, m in pairs[:-1]])
        self.frequency = torch.nn.Parameter(torch.full((width,), frequency, dtype=torch.float64))
        """ω, shared by the sine layers."""
        self.direct = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        """d, ``[H, M]``."""
        self.register_buffer("bands", torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64))
        self.register_buffer("rates", torch.linspace(SLOWEST, FASTEST, math.prod(shape), dtype=torch.float64))

    def unsupported(self, cell: Cell) -> str | None:
        """Also gates and values of different widths, and more tokens than ``max_length``."""
        if cell.head_dim != cell.value_dim:
            return f"queries and keys of {cell.head_dim} channels cannot gate values of {cell.value_dim}"
        if cell.length > self.max_length:
            return f"{cell.length} tokens are more than max_length={self.max_length}"
        return super().unsupported(cell)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """Sum by sum, without a transform."""
        self._check(q, k, v)
        dtype = compute_dtype(v)
        positions = list(range(q.shape[-2])) if rows is None else rows.tolist()
        tokens = max(positions) + 1
        gated = (k.to(dtype) * v.to(dtype))[:, :, :tokens]
        from_last = self.filters(tokens, dtype).flip(-1)
        sums = [torch.einsum("hmj,bhjm->bhm", from_last[..., -t - 1 :], gated[:, :, : t + 1]) for t in positions]
        mixed = torch.stack(sums, 2) + self.direct.to(dtype)[:, None] * gated[:, :, positions]
        return (q[:, :, positions].to(dtype) * mixed).to(v.dtype)

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fourier transforms in fp32 or fp64 with a hand-written backward; see ``cores.long_convolution``."""
        self._check(q, k, v)
        dtype = compute_dtype(v)
        filters = self.filters(q.shape[-2], dtype)
        itself = torch.nn.functional.pad(self.direct.to(dtype)[..., None], (0, q.shape[-2] - 1))
        return gated_convolution(q, k, v, filters + itself)

    def filters(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """The filters' first ``tokens`` elements, ``[H, M, tokens]``.

        In fp64 up to the last layer: three layers of sines at ω = 14 multiply the rounding errors of fp32 by 500.
        """
        position = torch.arange(tokens, dtype=torch.float64, device=self.rates.device)
        time = position / (self.max_length - 1)
        angle = 2 * math.pi / self.max_length * position[:, None] * self.bands
        *weights, last = self.weights  # a slice of a ParameterList would make parameters of what replaces them
        layers = [x.double() for x in (self.frequency, *weights, *self.biases)]
        # made again for the backward: at 64 channels per head or so, its layers take the memory of several heads
        hidden: Tensor = checkpoint(_sines, time, angle, *layers, use_reentrant=False, preserve_rng_state=False)
        window = torch.exp(-self.rates.to(dtype)[:, None] * time.to(dtype))
        filters: Tensor = last.to(dtype) @ hidden.to(dtype).mT * window
        return filters.view(*self.direct.shape, tokens)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before)."""
        self.check(q, k, {})
        if not q.shape == k.shape == v.shape:
            widths = f"{q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}"
            raise UsageError(f"Hyena: q, k and v have as many channels, not {widths}")
        if q.shape[-2] > self.max_length:
            raise UsageError(f"Hyena: {q.shape[-2]} tokens are more than max_length={self.max_length}")

    def flops(self, cell: Cell) -> int:
        """Per channel 2 transforms of 2N real numbers, at 5N log₂ 2N each, and 8N for products; 4 and 17N backward.

        The backward convolves again. Filters and their spectra depend on no token: they are taken as given.
        """
        transform = 5 * math.log2(2 * cell.length)
        forward, backward = 2 * transform + 8, 4 * transform + 17
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return int(cell.batch * cell.heads * cell.value_dim * cell.length * per_token)


def _sines(time: Tensor, angle: Tensor, frequency: Tensor, *layers: Tensor) -> Tensor:
    """The network before its last layer, ``[N, width]``.

    Args:
        time: ``[N]``, from 0 to 1.
        angle: ``[N, bands]``.
        layers: weights of every layer, then biases.
    """
    hidden = torch.cat((time[:, None], angle.cos(), -angle.sin()), -1)
    for weight, bias in zip(layers[:HIDDEN], layers[HIDDEN:], strict=True):
        hidden = torch.sin(frequency * torch.addmm(bias, hidden, weight.mT))
    return hidden
