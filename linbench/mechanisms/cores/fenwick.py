"""Attention to a hierarchy of the past: query i weighs key j by a number for the level of the pair in a Fenwick tree.

Level 0 is the token itself; a pair of different positions has the level bit_length(i xor j), so that a query sees its
past in at most log₂N + 1 runs of tokens, each twice as long as the one after it or longer. Inside chunks of
:data:`CHUNK` tokens all levels are one masked product. Above, the states of chunks are merged two by two: the second
half of every block reads the state of its first half. O(N log N) time, and memory linear in N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linbench.mechanisms.cores.segments import State, segmented
from linbench.mechanisms.cores.slabs import CHUNK

LEAST_RUN = 16
"""Chunks per run at least: the states at the border of a run are kept."""
RUN_TOKENS = 2**13
"""Tokens of a run over all heads, where the least allows it."""
STRONGEST = -1000.0
"""A log decay below it counts as this: both weigh nothing, and sums stay finite."""


def levels_of(rows: Tensor, columns: Tensor) -> Tensor:
    """bit_length(i xor j) for every pair, int64 ``[R, C]``."""
    differing = rows[:, None] ^ columns
    return torch.frexp(differing.double()).exponent.long()  # 2^(e−1) ≤ x < 2^e, and 0 for 0


def fenwick_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, weights: Tensor) -> Tensor:
    """o_i = Σ_{j≤i} λ_{i, level(i, j)} exp(Σ_{j<t≤i} log_decay_t) (q_i·k_j) v_j.

    Args:
        q: ``[B, H, N, D]`` in the dtype of the computation, as k and weights.
        k: ``[B, H, N, D]``.
        v: ``[B, H, N, M]`` in any dtype, which is that of the output.
        log_decay: at most 0, ``[B, H, N]``.
        weights: λ, ``[B, H, N, L]``; pairs of a level beyond the last one take the last.
    """
    batch, heads, tokens, key_dim = q.shape
    chunks = -(-tokens // CHUNK)
    run = min(max(_power_below(RUN_TOKENS // (CHUNK * batch * heads)), LEAST_RUN), _power_above(chunks))
    slots = (-(-chunks // run) - 1).bit_length()
    state = tuple(q.new_zeros(batch, heads, key_dim, v.shape[-1]) for _ in range(slots))
    position = torch.arange(tokens).view(1, 1, -1)  # stays on the CPU, where reading it waits for nothing

    def segment(state: State, streams: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> tuple[Tensor, State]:
        place = _Place(int(streams[-1][0, 0, 0]) // (run * CHUNK), run)
        out, after = _run(place, state, streams[:-1])
        return out.to(v.dtype), after

    out, _ = segmented(segment, state, (q, k, v, log_decay, weights, position), run * CHUNK)
    return out


def last_states(k: Tensor, v: Tensor, log_decay: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The levels of the last token with what it sees there, Σ_j exp(Σ_{j<t<N} log_decay_t) k_jᵀ v_j ``[B, H, D, M]``.

    Args:
        k: ``[B, H, N, D]`` in the dtype of the computation, as v.
        v: ``[B, H, N, M]``.
        log_decay: at most 0, ``[B, H, N]``.
    """
    last = k.shape[2] - 1
    until = log_decay.double().clamp(min=STRONGEST).cumsum(-1)
    to_end = _weight(until[..., -1:] - until, k)[..., None]
    first = 0
    for bit in range(last.bit_length(), -1, -1):
        if last >> bit & 1:
            seen = slice(first, first + (1 << bit))
            yield bit + 1, (k[:, :, seen] * to_end[:, :, seen]).mT @ v[:, :, seen]
            first += 1 << bit
    yield 0, k[:, :, last, :, None] * v[:, :, last, None, :]


class _Place(NamedTuple):
    """Which run this is, and how many chunks a whole one has."""

    number: int
    chunks: int


class _Chunks(NamedTuple):
    """What the reads of states share: q ``[B, H, n, C, D]``, sums of log decays ``[B, H, n, C]`` and λ."""

    q: Tensor
    until: Tensor
    weights: Tensor


def _run(place: _Place, state: State, streams: tuple[Tensor, ...]) -> tuple[Tensor, State]:
    """The outputs of a run and the states of the blocks of runs after it."""
    q, k, v, log_decay, weights = streams
    length = q.shape[2]
    chunks = _power_above(-(-length // CHUNK))
    q, k, v, weights = (_cut(x, chunks) for x in (q, k, v.to(q.dtype), weights))
    until = _cut(log_decay.double().clamp(min=STRONGEST), chunks).flatten(2).cumsum(-1).view(q.shape[:4])
    level = torch.arange(CHUNK, device=q.device)
    out = _inside(q, k, v, until, _at(weights, levels_of(level, level)))
    to_end = _weight(until[..., -1:] - until, q)
    nodes = (k * to_end[..., None]).mT @ v
    ends = until[..., -1]
    half, rank = 1, CHUNK.bit_length()
    while half < chunks:  # nodes are the states of `half` chunks each, at their ends
        first, second = nodes.view(*nodes.shape[:2], -1, 2, *nodes.shape[3:]).unbind(3)
        out = _read_first_halves(out, first, half, _Chunks(q, until, weights[..., _clamped(rank, weights)]))
        node_ends = ends[:, :, half - 1 :: half].view(*ends.shape[:2], -1, 2)
        carry = _weight(node_ends[..., 1] - node_ends[..., 0], q)
        nodes = first * carry[..., None, None] + second
        half, rank = 2 * half, rank + 1
    whole = out.flatten(2, 3)[:, :, :length]
    return _across(place, state, whole, nodes[:, :, 0], _Chunks(q, until, weights))


def _inside(q: Tensor, k: Tensor, v: Tensor, until: Tensor, weights: Tensor) -> Tensor:
    """The pairs inside chunks; ``weights`` is λ of every pair, ``[B, H, n, C, C]``."""
    above = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu_(1)
    decays = _weight((until[..., :, None] - until[..., None, :]).masked_fill(above, -math.inf), q)
    out: Tensor = (q @ k.mT * weights * decays) @ v
    return out


def _at(weights: Tensor, level: Tensor) -> Tensor:
    """λ of pairs, ``[…, C, L]`` at the levels ``[C, C]``: a product for every row, whose gradient is one as well."""
    kept = min(weights.shape[-1], int(CHUNK).bit_length())
    mask = torch.nn.functional.one_hot(level.clamp(max=kept - 1), kept).mT.to(weights)
    rows = weights[..., :kept].flatten(0, -3).transpose(0, 1)
    spread = torch.bmm(rows, mask).transpose(0, 1)
    return spread.reshape(*weights.shape[:-1], CHUNK)


def _read_first_halves(out: Tensor, first: Tensor, half: int, chunks: _Chunks) -> Tensor:
    """Add what the second halves of blocks of ``2·half`` chunks read of their first halves, with λ of that level."""
    q, until, weight = chunks

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, H, n, C, ·]`` -> two ``[B, H, n / (2·half), half·C, ·]``."""
        one, two = x.reshape(*x.shape[:2], -1, 2, half * CHUNK, *x.shape[4:]).unbind(3)
        return one, two

    before, after = halves(until)
    scale = halves(weight)[1] * _weight(after - before[..., -1:], q)
    one, two = halves(out)
    read = (halves(q)[1] * scale[..., None]) @ first
    return torch.stack((one, two + read), 3).view(out.shape)


def _across(place: _Place, state: State, out: Tensor, new: Tensor, chunks: _Chunks) -> tuple[Tensor, State]:
    """Read the states of earlier runs, of 2^s in slot s where that bit of the index is set; and add ``new``."""
    if not state:
        return out, state
    index, run = place
    q, until, weights = chunks
    length = out.shape[2]
    decays = _weight(until, q).flatten(2)[:, :, :length, None]
    used = [slot for slot in range(len(state)) if index >> slot & 1]
    if used:
        rank = (run * CHUNK).bit_length()
        scales = torch.stack([weights[..., _clamped(rank + slot, weights)] for slot in used], -1)
        scales = scales.flatten(2, 3)[:, :, :length] * decays
        queries = (q.flatten(2, 3)[:, :, :length, None] * scales[..., None]).flatten(3)
        out = out + queries @ torch.cat([state[slot] for slot in used], 2)
    carry = _weight(until[..., -1, -1], q)[..., None, None]
    zeros = torch.zeros_like(new)
    after, gathered = [past * carry for past in state], new
    for slot in range(len(state)):
        if not index >> slot & 1:
            after[slot] = gathered
            break
        gathered, after[slot] = gathered + after[slot], zeros
    return out, tuple(after)


def _weight(exponent: Tensor, like: Tensor) -> Tensor:
    """Exponentials in the dtype of ``like``; below √(smallest normal number), where CPUs are slow, 0."""
    least = math.log(torch.finfo(like.dtype).tiny) / 2
    return exponent.masked_fill(exponent < least, -math.inf).to(like.dtype).exp()


def _cut(x: Tensor, chunks: int) -> Tensor:
    """``[B, H, L, …]`` -> ``[B, H, n, C, …]``, filled up with zeros, which neither add nor decay anything."""
    missing = chunks * CHUNK - x.shape[2]
    if missing:
        x = torch.cat((x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])), 2)
    cut: Tensor = x.reshape(*x.shape[:2], chunks, CHUNK, *x.shape[3:])
    return cut


def _clamped(level: int, weights: Tensor) -> int:
    return min(level, weights.shape[-1] - 1)


def _power_below(number: int) -> int:
    """The largest power of two that is at most ``number``, and at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def _power_above(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
