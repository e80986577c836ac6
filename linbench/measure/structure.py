"""The ``structure`` measure: ranks of the output of a head, and the attention map that the mechanism implies.

Protocol 3 (2 kept neither singular values nor a picture of the map). Ranks are those of
:mod:`linbench.measure.ranks`, of the rows as they are (nothing is centred), in fp64, beside those of exact softmax. The
map is that of :mod:`linbench.measure.attention_map`; an operator that applies no matrix to the values has none, with
the reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linbench.measure.attention_map import NoMapError, measure_attention_map
from linbench.measure.call import Call
from linbench.measure.error import sample_rows
from linbench.measure.exact import exact_attention
from linbench.measure.ranks import effective_rank, numerical_rank, singular_values, spectrum
from linbench.record import Structure

PROTOCOL = 3


def measure_structure(
    call: Call,
    output: Tensor,
    *,
    rows: int = 2048,
    map_rows: int = 128,
    top: int = 16,
    channel_tokens: int = 1024,
    picture: int = 0,
) -> Structure:
    """Ranks of the checked output and of the truth, and the map.

    Args:
        call: the cell with its inputs.
        output: ``[B, H, N, M]``.
        rows: query positions whose rows make the matrices; all up to this length, beyond it a seeded sample.
        map_rows: query positions whose rows of the map are looked at; 0 for no map.
        top: how many of the largest weights of softmax are looked for among those of the map.
        channel_tokens: longest sequence for which maps of single channels are probed, which takes a call for each key.
        picture: rows and columns of the picture of the map that is kept; 0 for none.
    """
    cell = call.cell
    sample = sample_rows(cell.length, rows, torch.Generator().manual_seed(cell.seed), causal=cell.causal)
    positions = sample.positions.to(output.device)
    truth = exact_attention(call.q.detach(), call.k.detach(), call.v.detach(), cell.causal, positions)
    found, exact = singular_values(output[:, :, positions]), singular_values(truth)
    attention, reason = None, None
    if map_rows:
        try:
            attention = measure_attention_map(
                call, output, rows=map_rows, top=top, channel_tokens=channel_tokens, picture=picture
            )
        except NoMapError as error:
            reason = str(error)
    return Structure(
        protocol=PROTOCOL,
        rows=len(positions),
        rows_total=cell.length,
        largest_rank=min(len(positions), cell.value_dim),
        output_effective_rank=effective_rank(found),
        output_numerical_rank=numerical_rank(found),
        exact_effective_rank=effective_rank(exact),
        exact_numerical_rank=numerical_rank(exact),
        output_singular_values=spectrum(found),
        exact_singular_values=spectrum(exact),
        attention=attention,
        attention_reason=reason,
    )
