"""The ``error`` measure as a stage of a cell: the checked output against exact softmax."""

from __future__ import annotations

from torch import Tensor

from linbench.measure.call import Call
from linbench.measure.error import measure_error
from linbench.record import Error


def judge_error(call: Call, output: Tensor, *, full_up_to_tokens: int = 4096, rows: int = 512) -> Error:
    """Judge the output that the check has passed; a replacement's figure is a distance, not an error."""
    return measure_error(
        output,
        call.q.detach(),
        call.k.detach(),
        call.v.detach(),
        causal=call.cell.causal,
        reading="distance" if call.mechanism.description.kind == "replacement" else "error",
        rows=rows,
        full_up_to_tokens=full_up_to_tokens,
        seed=call.cell.seed,
    )
