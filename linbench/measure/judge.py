"""The ``error`` measure as a stage of a cell: the checked output against exact softmax."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from linbench import registry
from linbench.measure.call import Call
from linbench.measure.error import measure_error, relative_error, sample_rows, trivial_prediction
from linbench.measure.exact import exact_attention
from linbench.measure.exact_gradients import exact_gradients
from linbench.mechanisms.base import Mechanism
from linbench.record import Error


def judge_error(
    call: Call,
    output: Tensor,
    *,
    full_up_to_tokens: int = 4096,
    rows: int = 512,
    gradient_tokens: int = 4096,
    seeds: int = 5,
) -> Error:
    """Judge the output that the check has passed; a replacement's figure is a distance, not an error.

    A mechanism that approximates something else than softmax of q·kᵀ/√D is judged against that as well, on the same
    rows.

    Args:
        call: the cell with its inputs.
        output: ``[B, H, N, M]``.
        full_up_to_tokens: longest length that is judged in full.
        rows: positions in the sample of a longer one.
        gradient_tokens: longest length whose gradients are judged, where the pass has them.
        seeds: of the mechanism that are judged where they make a difference, the cell's own among them.
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
    more: dict[str, object] = {**_against_target(call, output, block.rows)}
    if call.output_gradient is not None and cell.length <= gradient_tokens:
        more["gradient_errors"] = _gradient_errors(call)
    if seeds > 1:
        more["seed_errors"] = _seed_errors(call, output, rows, seeds)
    return block.model_copy(update=more)


def _gradient_errors(call: Call) -> dict[str, float]:
    q, k, v, toward = (x.detach() for x in (call.q, call.k, call.v, call.output_gradient) if x is not None)
    exact = exact_gradients(q, k, v, toward, call.cell.causal)._asdict()
    computed = dict(zip(call.differentiable, call.gradients(call.forward()), strict=True))
    found = {}
    for name, truth in exact.items():
        gradient, size = computed[name], float(truth.norm())
        if size:  # a single token: the weights are one, whatever q and k are
            difference = truth if gradient is None else gradient.double() - truth
            found[name] = float(difference.norm()) / size
    return found


def _seed_errors(call: Call, output: Tensor, rows: int, seeds: int) -> list[float]:
    """The errors of ``seeds`` seeds on a sample of rows, or none if the second gives the same output."""
    cell, (q, k, v) = call.cell, (x.detach() for x in (call.q, call.k, call.v))
    extras = {name: x.detach() for name, x in call.extras.items()}
    sample = sample_rows(cell.length, rows, torch.Generator().manual_seed(cell.seed), causal=cell.causal)
    positions, weights = sample.positions.to(q.device), sample.weights.to(q.device)
    judged = [output[:, :, positions]]
    for seed in range(1, seeds):
        mechanism = registry.of_cell(cell, seed=cell.seed + seed).to(q.device)
        with torch.no_grad():
            other = mechanism(q, k, v, **extras)
        if torch.equal(other, output):
            return []
        judged.append(other[:, :, positions])
    truth = exact_attention(q, k, v, cell.causal, positions)
    return [relative_error(one, truth, weights) for one in judged]


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
