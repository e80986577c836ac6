"""Whether what was timed computes its result: called as in the timed loop, after it.

Poisoned memory is freed before each call, so that the rows that a kernel does not write are NaN instead of what an
earlier call left there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from linbench.cell import BACKWARD_PASSES
from linbench.measure.call import Call
from linbench.measure.check import TOLERANCE

POISONED = 4
"""Blocks of the output's size that are filled with NaN and freed: a mechanism may take some for something else."""


class DishonestTimingError(ValueError):
    """What was timed does not compute its result from its inputs; says how."""


def require_honest(call: Call, output: Tensor) -> None:
    """Call the timed part twice more: with values (and an output gradient) of the other sign, and as it was.

    Args:
        call: the cell with its inputs, as they were timed.
        output: the output that the check has passed; a pass with a backward is compared with a call of its own.

    Raises:
        DishonestTimingError: the result is the same for other values (it is remembered), differs from the checked one
            (a part is not written, or written later), or the inputs were changed.
    """
    expected = _own(call, output)
    _flip(call)
    try:
        others = _results(call, output)
    finally:
        _flip(call)
    if any(bool(x.any()) for x in expected) and all(torch.equal(a, b) for a, b in zip(expected, others, strict=True)):
        raise DishonestTimingError("the timed result is the same for other values: it is remembered, not computed")
    for name, found, wanted in zip(_names(call), _results(call, output), expected, strict=True):
        size = max(float(wanted.double().norm()), torch.finfo(torch.float32).tiny)
        distance = float((found.double() - wanted.double()).norm()) / size
        if not distance <= TOLERANCE[call.cell.dtype]:
            said = f"differs by {distance:.2g} from the checked one" if math.isfinite(distance) else "is not finite"
            raise DishonestTimingError(f"the timed {name} {said}: not all of it is written when the call returns")


def _sums(call: Call) -> list[float]:
    return [float(x.detach().sum(dtype=torch.float64)) for x in (call.q, call.k, call.v)]


def _flip(call: Call) -> None:
    with torch.no_grad():
        call.v.neg_()
        if call.cell.pass_ == "decode" and call.cell.length > 1:  # one value of many may vanish in rounding
            call.q.neg_()
        if call.output_gradient is not None:
            call.output_gradient.neg_()


def _own(call: Call, output: Tensor) -> list[Tensor]:
    """What the timed part should give."""
    if call.cell.pass_ not in BACKWARD_PASSES:
        return [output]
    return _present(call.gradients(call.forward()))


def _names(call: Call) -> list[str]:
    return list(call.differentiable) if call.cell.pass_ in BACKWARD_PASSES else ["output"]


def _results(call: Call, output: Tensor) -> list[Tensor]:
    """Of one timed part, in memory that was poisoned.

    Raises:
        DishonestTimingError: the inputs are not what they were.
    """
    part = call.forward if call.cell.pass_ == "decode" else call.timed_part()  # a timed state may have moved on
    before = _sums(call)
    blocks = [torch.full_like(output, math.nan) for _ in range(POISONED)]
    del blocks
    result = part()
    if before != _sums(call):
        raise DishonestTimingError("the timed call changes its inputs")
    if isinstance(result, Tensor):
        return [result.clone()]
    assert isinstance(result, Sequence), "a pass with a backward gives its gradients"
    return _present(result)


def _present(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """A gradient that the operator does not have counts as nothing."""
    return [torch.empty(0) if x is None else x for x in gradients]
