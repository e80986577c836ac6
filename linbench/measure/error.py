"""The ``error`` measure: a mechanism's output against exact softmax attention.

Protocol 2 (1 had neither positions, gradients nor seeds, which change no older figure):

* *Truth* is softmax(q·kᵀ/√D)·v with every product and sum in fp64, on q, k, v as they are rounded to the cell's dtype.
* *Rows.* Up to ``full_up_to_tokens`` tokens, every query position is judged, in every batch element and head. Beyond,
  a seeded sample of ``rows`` positions is, the same in all of them: one position from each of as many strata, uniform
  within it, each weighted with its stratum's size. Strata are of equal size; for causal attention half of them are
  spread evenly over the logarithm of the position instead, because the first rows see few values, are larger than the
  others, and would otherwise decide the result by chance. Strata of one position are judged with certainty.
* *Relative error* of a prediction is √(Σ w‖prediction − truth‖² / Σ w‖truth‖²) over the judged rows.
* Its *interval*, only for samples, is the 2.5th to 97.5th percentile of that figure over 2000 seeded bootstrap draws
  of the positions that were not certain.
* *Trivial* is the mean of the values that the query sees, in fp64.
* *Exact* is attention in the cell's dtype as a fused kernel does it: products and sums in fp32 (fp64 for fp64 cells),
  weights rounded to the dtype before they meet v, and the result rounded once. A kernel that rounds less has an
  excess below 1.
* *Skill* is 1 − error / trivial error, *excess* is error / exact error.
* A *row's own error* is ‖prediction − truth‖ / ‖truth‖ of one position, head and batch element; quantiles are the
  smallest errors with at least that share of the weight at or below them, and ``max`` is the largest one judged.
* *By position*, the relative error is given for parts of the sequence: from each power of two to the next for causal
  attention, eighths otherwise.
* *Gradients* (:mod:`linbench.measure.judge`), where the pass has a backward and the sequence is short enough for all of
  exact attention's in fp64: the relative Frobenius error of dq, dk and dv, all towards the same output gradient. Zeros
  have an error of one.
* *Seeds*: where another seed of the mechanism gives another output, the relative error of several.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linbench.measure.exact import exact_attention, same_dtype_attention
from linbench.record import Error, PositionError

PROTOCOL = 2
BOOTSTRAP_DRAWS = 2000
QUANTILES = {"p05": 0.05, "p50": 0.50, "p95": 0.95, "p99": 0.99}


class NonFiniteOutputError(ValueError):
    """The output holds NaN or infinity: it has no error, it is wrong."""


class UndefinedError(ValueError):
    """The truth is zero: there is nothing to be relative to."""


class Sample(NamedTuple):
    """Query positions to judge, and how many positions each one stands for."""

    positions: Tensor
    """int64 ``[R]``, ascending and distinct."""
    weights: Tensor
    """fp64 ``[R]``; they add up to the length. 1 where the position stands for itself."""


def sample_rows(length: int, count: int, generator: torch.Generator, *, causal: bool = False) -> Sample:
    """One position from each of ``count`` strata, or all of them when there are no more than ``count``.

    Args:
        length: N in tokens.
        count: positions to draw.
        generator: on the CPU.
        causal: half of the strata go to the logarithm of the position, as the protocol says.
    """
    if length <= count:
        return Sample(torch.arange(length), torch.ones(length, dtype=torch.float64))
    edges = torch.arange(count + 1) * length // count
    if causal:
        # the share of the strata that lie below each position, and its inverse
        grid = torch.arange(length + 1, dtype=torch.float64)
        share = 0.5 * grid / length + 0.5 * grid.log1p() / torch.log1p(grid[-1])
        inverse = torch.searchsorted(share, torch.arange(count + 1, dtype=torch.float64) / count, right=True) - 1
        # the inverse is convex: it creeps below one position a stratum at first, then exceeds it for good
        edges = torch.maximum(inverse, torch.arange(count + 1)).clamp(max=length)
        edges[-1] = length
    sizes = edges.diff()
    offsets = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes).long()
    return Sample(edges[:-1] + offsets, sizes.double())


def trivial_prediction(v: Tensor, causal: bool, rows: Tensor | None = None) -> Tensor:
    """The mean of the values that each query sees: what is known of the output without looking at q and k.

    Args:
        v: ``[B, H, N, M]``.
        causal: query i sees values 0 … i; all of them otherwise.
        rows: int64 positions ``[R]``; all when None.

    Returns:
        ``[B, H, R, M]`` in fp64.
    """
    positions = torch.arange(v.shape[2], device=v.device) if rows is None else rows.to(v.device)
    if not causal:
        mean = v.mean(2, keepdim=True, dtype=torch.float64)
        return mean.expand(-1, -1, len(positions), -1)
    means = torch.empty(*v.shape[:2], len(positions), v.shape[3], dtype=torch.float64, device=v.device)
    for batch in range(v.shape[0]):
        for head in range(v.shape[1]):  # one at a time, so that the fp64 sums of all tokens stay small
            means[batch, head] = v[batch, head].cumsum(0, dtype=torch.float64)[positions]
    return means.div_((positions + 1)[:, None])


def measure_error(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    reading: Literal["error", "distance"],
    rows: int = 512,
    full_up_to_tokens: int = 4096,
    seed: int = 0,
) -> Error:
    """Judge an output by the protocol above. Memory is linear in N, and nothing of the inputs is changed.

    Args:
        output: what the mechanism gave, ``[B, H, N, M]`` in the cell's dtype.
        q: ``[B, H, N, D]``, on the same device and in the same dtype, as are k and v.
        k: ``[B, H, N, D]``.
        v: ``[B, H, N, M]``.
        causal: whether a query sees only itself and what is before it.
        reading: ``error`` for exact mechanisms and approximators, ``distance`` for a different operator.
        rows: positions in the sample of a length above ``full_up_to_tokens``.
        full_up_to_tokens: longest length that is judged in full.
        seed: of the sample and of the bootstrap.

    Raises:
        NonFiniteOutputError: the output holds NaN or infinity, in any row.
        UndefinedError: the truth is zero.
    """
    _require_finite(output)
    length = q.shape[2]
    generator = torch.Generator().manual_seed(seed)
    sample = sample_rows(length, length if length <= full_up_to_tokens else rows, generator, causal=causal)
    positions, weights = sample.positions.to(q.device), sample.weights.to(q.device)
    prediction = output[:, :, positions].double()
    truth = exact_attention(q, k, v, causal, positions)
    truth_squares = truth.square().sum(-1)
    squares = (prediction - truth).square().sum(-1)
    trivial_squares = (trivial_prediction(v, causal, positions) - truth).square().sum(-1)
    exact_squares = (same_dtype_attention(q, k, v, causal, positions).double() - truth).square().sum(-1)

    relative_error = _relative(squares, truth_squares, weights)
    trivial_error = _relative(trivial_squares, truth_squares, weights)
    exact_error = _relative(exact_squares, truth_squares, weights)
    sampled = len(positions) < length
    return Error(
        protocol=PROTOCOL,
        reading=reading,
        rows=len(positions),
        rows_total=length,
        relative_error=relative_error,
        relative_error_interval=_interval(squares, truth_squares, weights, generator) if sampled else None,
        trivial_error=trivial_error,
        exact_error=exact_error,
        skill=1 - relative_error / trivial_error if trivial_error > 0 else None,
        excess=relative_error / exact_error if exact_error > 0 else None,
        row_cosine_mean=_mean_cosine(prediction, truth, weights),
        row_error_quantiles=_row_quantiles(squares, truth_squares, weights),
        by_position=_by_position(squares, truth_squares, sample, parts(length, causal)),
    )


def parts(length: int, causal: bool) -> list[tuple[int, int]]:
    """First positions of the parts in which errors are given, and those after their last."""
    if causal:
        edges = [0, *(2**power for power in range(length.bit_length()) if 2**power < length), length]
    else:
        edges = sorted({length * eighth // 8 for eighth in range(9)})
    return list(pairwise(edges))


def relative_error(output: Tensor, truth: Tensor, weights: Tensor) -> float:
    """The relative error of the judged rows ``[B, H, R, M]``, for callers who have the truth already."""
    squares = (output.double() - truth).square().sum(-1)
    return _relative(squares, truth.square().sum(-1), weights)


def _require_finite(output: Tensor) -> None:
    bad = ~torch.isfinite(output)
    count = int(bad.sum())
    if count:
        first = int(bad.any(-1).any(0).any(0).nonzero()[0])
        raise NonFiniteOutputError(f"{count} of {output.numel()} elements are NaN or infinite, first at row {first}")


def _relative(squares: Tensor, truth_squares: Tensor, weights: Tensor) -> float:
    """√(Σ w·squares / Σ w·truth), both ``[B, H, R]``."""
    truth = float((truth_squares * weights).sum())
    if truth == 0:
        raise UndefinedError("exact attention is zero on every judged row, so that a relative error is undefined")
    return math.sqrt(float((squares * weights).sum()) / truth)


def _interval(
    squares: Tensor, truth_squares: Tensor, weights: Tensor, generator: torch.Generator
) -> tuple[float, float]:
    """95 % percentile bootstrap over positions; those that are certain (weight 1) belong to every draw."""
    terms = torch.stack([squares.sum((0, 1)), truth_squares.sum((0, 1))]).mul(weights).cpu()  # [2, R]
    certain = weights.cpu() == 1
    drawn = terms[:, ~certain]
    count = drawn.shape[1]
    picks = torch.randint(count, (BOOTSTRAP_DRAWS, count), generator=generator)
    sums = terms[:, certain].sum(-1, keepdim=True) + drawn[:, picks].sum(-1)  # [2, draws]
    low, high = (sums[0] / sums[1]).sqrt().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _by_position(
    squares: Tensor, truth_squares: Tensor, sample: Sample, edges: list[tuple[int, int]]
) -> list[PositionError]:
    """Parts in which no row was judged, or the truth is zero, are left out."""
    found = []
    for first, end in edges:
        inside = (sample.positions >= first) & (sample.positions < end)
        weights = sample.weights[inside].to(squares.device)
        inside = inside.to(squares.device)
        if len(weights) and bool((truth_squares[..., inside] * weights).any()):
            error = _relative(squares[..., inside], truth_squares[..., inside], weights)
            found.append(PositionError(first_token=first, last_token=end - 1, rows=len(weights), relative_error=error))
    return found


def _mean_cosine(prediction: Tensor, truth: Tensor, weights: Tensor) -> float:
    """Weighted mean over rows of the cosine of prediction and truth; 0 for a row where either is zero."""
    norms = prediction.norm(dim=-1) * truth.norm(dim=-1)
    cosines = (prediction * truth).sum(-1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return float((cosines.mean((0, 1)) * weights).sum() / weights.sum())


def _row_quantiles(squares: Tensor, truth_squares: Tensor, weights: Tensor) -> dict[str, float]:
    # a row of zeros would have an infinite error: no row counts as smaller than fp64 can tell from the mean one
    floor = truth_squares.mean() * torch.finfo(torch.float64).eps ** 2
    errors, order = (squares / truth_squares.clamp(min=floor)).sqrt().flatten().sort()
    share = weights.expand_as(squares).flatten()[order].cumsum(0)
    levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64, device=share.device) * share[-1]
    values = errors[torch.searchsorted(share, levels).clamp(max=len(errors) - 1)].tolist()
    return {**dict(zip(QUANTILES, values, strict=True)), "max": float(errors[-1])}
