"""The ``error`` measure as a stage of a cell: the checked output against exact softmax."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.measure.error import measure_error, sample_rows, trivial_prediction
from linbench.mechanisms.base import Mechanism
from linbench.record import Error


def judge_error(call: Call, output: Tensor, *, full_up_to_tokens: int = 4096, rows: int = 512) -> Error:
    """Judge the output that the check has passed; a replacement's figure is a distance, not an error.

    A mechanism that approximates something else than softmax of q·kᵀ/√D is judged against that as well, on the same
    rows.
    """
    cell, (q, k, v) = call.cell, (x.detach() for x in (call.q, call.k, call.v))
    block = measure_error(
        output,
        q,
        k,
        v,
        causal=cell.causal,
        reading="distance" if call.mechanism.description.kind == "replacement" else "error",
        rows=rows,
        full_up_to_tokens=full_up_to_tokens,
        seed=cell.seed,
    )
    return block.model_copy(update=_against_target(call, output, block.rows))


def _against_target(call: Call, output: Tensor, rows: int) -> dict[str, float]:
    """``target_error`` and ``target_trivial_error``; nothing where the target is softmax."""
    mechanism = copy.deepcopy(call.mechanism).double()
    q, k, v = (x.detach() for x in (call.q, call.k, call.v))
    if type(mechanism).target is Mechanism.target:
        return {}
    causal = call.cell.causal
    generator = torch.Generator().manual_seed(call.cell.seed)
    sample = sample_rows(call.cell.length, rows, generator, causal=causal)
    positions, weights = sample.positions.to(q.device), sample.weights.to(q.device)
    extras = {name: x.detach().double() if x.is_floating_point() else x for name, x in call.extras.items()}
    with torch.no_grad():
        truth = mechanism.target(q.double(), k.double(), v.double(), positions, **extras)
    if truth is None:
        return {}
    size = (truth.square().sum(-1) * weights).sum()

    def relative(prediction: Tensor) -> float:
        return float((((prediction - truth).square().sum(-1) * weights).sum() / size).sqrt())

    return {
        "target_error": relative(output[:, :, positions].double()),
        "target_trivial_error": relative(trivial_prediction(v, causal, positions)),
    }
