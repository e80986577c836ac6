"""The attention map that a mechanism implies, beside that of exact softmax: sampled rows of the matrix A with o = A v.

Any operator that is linear in v has one, which is its response to v = I. A part of the ``structure`` measure.

* *Probes.* v is replaced by columns of the identity. Where one matrix serves all channels of a head, M keys are seen by
  one call. Where every channel has a matrix of its own (a decay or a convolution for each channel, a gate on the
  output), a call sees one key in all channels.
* *Check.* A v must be the mechanism's own output at the sampled rows; where it is not, the operator is not linear in v
  or mixes channels, and there is no map.
* *Rows* are the seeded sample of :func:`linbench.measure.error.sample_rows`. Means over rows take its weights, and are
  taken over batch elements, heads and (where they have maps of their own) channels.
* *Distributions.* Entropy and divergence are those of rows without negative weights that sum to one, up to the
  rounding of the cell's dtype; if any row is not so, both are null.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.measure.error import Sample, sample_rows
from linbench.measure.ranks import effective_rank, numerical_rank, singular_values, spectrum
from linbench.record import AttentionMap, MapPicture

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far A v may be from the output, relative: rounding, and errors of the path, but no other operator."""
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far from zero a weight, and from one a sum of weights, may be in a row that is a distribution."""


class NoMapError(ValueError):
    """The operator applies no matrix to the values; says why."""


class Maps(NamedTuple):
    """Rows of A and of softmax, in fp64."""

    found: Tensor
    """``[G, R, N]``: G heads of the batch, or their channels."""
    exact: Tensor
    """``[G, R, N]``, or G without the channels."""
    sample: Sample
    per_channel: bool
    residual: float
    """Relative distance of A v and the output at the sampled rows."""


def measure_attention_map(
    call: Call, output: Tensor, *, rows: int, top: int, channel_tokens: int, picture: int = 0
) -> AttentionMap:
    """Probe, and compare with softmax.

    Args:
        call: the cell with its inputs.
        output: the checked output, ``[B, H, N, M]``.
        rows: query positions in the sample.
        top: k of the overlap of the k largest weights.
        channel_tokens: longest sequence for which maps of single channels are probed, one call a key.
        picture: rows and columns of the picture that is kept; 0 for none.

    Raises:
        NoMapError: the operator is not linear in v, or maps of channels would need too many calls.
    """
    maps = probe(call, output, rows=rows, channel_tokens=channel_tokens)
    found, exact, weights = maps.found, maps.exact, maps.sample.weights
    positions, rounding = maps.sample.positions, ROUNDING[call.v.dtype]
    sums, sizes = found.sum(-1), found.abs().sum(-1)
    negative = found.clamp(max=0).sum(-1).neg() / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    distributed = bool((negative.amax() <= rounding) and (sums - 1).abs().amax() <= 10 * rounding)
    values, exact_values = singular_values(found), singular_values(exact)
    return AttentionMap(
        rows=len(positions),
        rows_total=call.cell.length,
        per_channel=maps.per_channel,
        residual=maps.residual,
        row_sum_mean=_mean(sums, weights),
        row_sum_min=float(sums.min()),
        row_sum_max=float(sums.max()),
        negative_mass=_mean(negative, weights),
        entropy_nats=_mean(_entropy(found), weights) if distributed else None,
        exact_entropy_nats=_mean(_entropy(exact), weights),
        divergence_nats=_mean(_divergence(found, exact), weights) if distributed else None,
        total_variation=_mean(0.5 * (found - _like(exact, found)).abs().sum(-1), weights),
        top=top,
        top_overlap=_overlap(maps, top, causal=call.cell.causal),
        effective_rank=effective_rank(values),
        numerical_rank=numerical_rank(values),
        exact_effective_rank=effective_rank(exact_values),
        exact_numerical_rank=numerical_rank(exact_values),
        distance_tokens=_mean(_distance(found, positions), weights),
        exact_distance_tokens=_mean(_distance(exact, positions), weights),
        singular_values=spectrum(values),
        exact_singular_values=spectrum(exact_values),
        picture=_picture(maps, picture) if picture else None,
    )


def probe(call: Call, output: Tensor, *, rows: int, channel_tokens: int) -> Maps:
    """Rows of the matrix that the cell's mechanism applies to v, and of exact softmax."""
    cell = call.cell
    sample = sample_rows(cell.length, rows, torch.Generator().manual_seed(cell.seed), causal=cell.causal)
    positions = sample.positions.to(call.v.device)
    sample = Sample(positions, sample.weights.to(positions.device))
    wanted, exact = output.detach()[:, :, positions].double(), exact_rows(call, positions)
    found = _shared(call, positions)
    residual = _distance_of(found @ call.v.detach().double(), wanted)
    if residual <= TOLERANCES[call.v.dtype]:
        return Maps(found.flatten(0, 1), exact, sample, False, residual)
    if cell.length > channel_tokens:
        raise NoMapError(
            f"A·v of a map shared by all channels differs from the output by {residual:.2g}; maps of single channels"
            f" are probed up to {channel_tokens} tokens"
        )
    found = _by_channel(call, positions)
    products = torch.einsum("bhmrn,bhnm->bhrm", found, call.v.detach().double())
    own = _distance_of(products, wanted)
    if own > TOLERANCES[call.v.dtype]:
        raise NoMapError(f"it is not linear in v, channel by channel: A·v differs from the output by {own:.2g}")
    return Maps(found.flatten(0, 2), exact, sample, True, own)


def exact_rows(call: Call, positions: Tensor) -> Tensor:
    """Rows of softmax(q·kᵀ/√D) in fp64: ``[B·H, R, N]``."""
    q, k = (x.detach().flatten(0, 1) for x in (call.q, call.k))
    rows = torch.empty(len(q), len(positions), k.shape[1], dtype=torch.float64, device=q.device)
    hidden = torch.arange(k.shape[1], device=q.device) > positions[:, None]
    for head in range(len(q)):  # a copy of all keys in fp64 could fill a GPU
        scores = q[head, positions].double() @ k[head].double().mT * q.shape[-1] ** -0.5
        rows[head] = (scores.masked_fill(hidden, -math.inf) if call.cell.causal else scores).softmax(-1)
    return rows


def _shared(call: Call, positions: Tensor) -> Tensor:
    """``[B, H, R, N]``: column j + c is the response, in channel c, to a one at key j + c."""
    batch, heads, length, width = call.v.shape
    found = torch.empty(batch, heads, len(positions), length, dtype=torch.float64, device=call.v.device)
    values = torch.zeros_like(call.v, requires_grad=False)
    for first in range(0, length, width):
        keys = torch.arange(first, min(first + width, length), device=values.device)
        values[:, :, keys, keys - first] = 1
        found[..., keys] = _respond(call, values)[:, :, positions, : len(keys)].double()
        values[:, :, keys, keys - first] = 0
    return found


def _by_channel(call: Call, positions: Tensor) -> Tensor:
    """``[B, H, M, R, N]``: column j of every channel is its response to ones at key j."""
    batch, heads, length, width = call.v.shape
    found = torch.empty(batch, heads, width, len(positions), length, dtype=torch.float64, device=call.v.device)
    values = torch.zeros_like(call.v, requires_grad=False)
    for key in range(length):
        values[:, :, key] = 1
        found[..., key] = _respond(call, values)[:, :, positions].mT.double()
        values[:, :, key] = 0
    return found


def _respond(call: Call, values: Tensor) -> Tensor:
    with torch.no_grad():
        response: Tensor = call.mechanism(call.q, call.k, values, **call.extras)
    return response


def _distance_of(found: Tensor, wanted: Tensor) -> float:
    distance = float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny))
    return distance if math.isfinite(distance) else math.inf


def _mean(values: Tensor, weights: Tensor) -> float:
    """Of ``[G, R]``, rows weighted."""
    return float((values * weights).sum() / (weights.sum() * len(values)))


def _like(exact: Tensor, found: Tensor) -> Tensor:
    """Softmax of the head of every map: ``[G, R, N]``."""
    return exact.repeat_interleave(len(found) // len(exact), 0)


def _entropy(rows: Tensor) -> Tensor:
    rows = rows.clamp(min=0)
    entropy: Tensor = -torch.special.xlogy(rows, rows).sum(-1)
    return entropy


def _divergence(found: Tensor, exact: Tensor) -> Tensor:
    """KL(A ‖ softmax), whose logarithm exists wherever softmax has not underflowed."""
    found, exact = found.clamp(min=0), _like(exact, found)
    # weights that rounding leaves on keys that softmax does not see
    floor = torch.finfo(torch.float64).tiny
    terms: Tensor = torch.special.xlogy(found, found) - torch.special.xlogy(found, exact.clamp(min=floor))
    return terms.sum(-1)


def _overlap(maps: Maps, top: int, *, causal: bool) -> float | None:
    """Share of softmax's k largest weights that are among the map's, over rows that see 2k keys or more."""
    positions = maps.sample.positions
    visible = positions + 1 if causal else torch.full_like(positions, maps.found.shape[-1])
    rows = visible >= 2 * top
    if not bool(rows.any()):
        return None
    ours, theirs = (
        torch.zeros_like(x).scatter_(-1, x.topk(top, -1).indices, 1.0)
        for x in (maps.found[:, rows], _like(maps.exact, maps.found)[:, rows])
    )
    return _mean((ours * theirs).sum(-1) / top, maps.sample.weights[rows])


def _picture(maps: Maps, size: int) -> MapPicture:
    """The first map and its head's softmax: rows are means over neighbours in the sample, columns sums over keys."""
    length = maps.found.shape[-1]
    rows = torch.arange(len(maps.sample.positions)).tensor_split(min(size, len(maps.sample.positions)))
    keys = torch.arange(length).tensor_split(min(size, length))

    def coarse(matrix: Tensor) -> list[list[float]]:
        blocks = [[matrix[own][:, under].sum(-1).mean() for under in keys] for own in rows]
        return [[float(f"{float(weight):.3g}") for weight in row] for row in blocks]

    return MapPicture(
        queries=[int(maps.sample.positions[own[0]]) for own in rows],
        keys=[int(under[0]) for under in keys],
        weights=coarse(maps.found[0].cpu()),
        exact_weights=coarse(maps.exact[0].cpu()),
    )


def _distance(rows: Tensor, positions: Tensor) -> Tensor:
    """Mean |i − j| under the sizes of the weights."""
    away = (torch.arange(rows.shape[-1], device=rows.device) - positions[:, None]).abs().double()
    sizes = rows.abs()
    return (sizes * away).sum(-1) / sizes.sum(-1).clamp(min=torch.finfo(sizes.dtype).tiny)
