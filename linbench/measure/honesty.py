"""Whether what was timed computes its result: called as in the timed loop, after it.

Poisoned memory is freed before each call, so that the rows that a kernel does not write are NaN instead of what an
earlier call left there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linbench.cell import BACKWARD_PASSES
from linbench.measure.call import Call
from linbench.measure.check import TOLERANCE

POISONED = 4
"""Blocks of the output's size that are filled with NaN and freed: a mechanism may take some for something else."""
PAIRS, PAIRS_S = 2, 0.05
"""Calls with new values, each beside one with the old ones: so many at least, and as many as so many seconds allow."""
SURE = 10
"""Pairs without which nothing is called a cheat."""
SLOWER = 1.5
"""How many times as long the fastest call with new values may take; honest ones come within a tenth of 1."""
SLACK_MS = 0.005


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


def require_fresh(call: Call, clocks: Callable[[Call], tuple[float, ...]]) -> None:
    """Time calls with values of the other sign each, among calls whose values stay.

    A result that is kept until the inputs change is right whenever it is looked at, and shows in the time alone: the
    same inputs are cheap, new ones are not. Beside a call whose values stay a tensor of the size of v is changed too,
    so that the caches are the same.

    Args:
        clocks: milliseconds of one call by every clock there is. All have to agree: the host's runs on while a call
            waits for a core, and that of the process counts less of a call that waits.

    Raises:
        DishonestTimingError: new values take longer than old ones.
    """
    beside = call.v.detach().clone()
    fresh: list[tuple[float, ...]] = []
    repeated: list[tuple[float, ...]] = []
    started = time.perf_counter()
    while (
        len(fresh) < PAIRS
        or time.perf_counter() - started < PAIRS_S
        or (len(fresh) < SURE and _slower(fresh, repeated))
    ):
        beside.neg_()
        repeated.append(clocks(call))
        _flip(call)
        fresh.append(clocks(call))
    if len(fresh) % 2:
        _flip(call)
    if _slower(fresh, repeated):
        new, old = (min(times)[0] for times in (fresh, repeated))
        raise DishonestTimingError(
            f"a call with new values takes {new:.3g} ms, a repeated one {old:.3g}: it is remembered, not computed"
        )


def _slower(fresh: Sequence[tuple[float, ...]], repeated: Sequence[tuple[float, ...]]) -> bool:
    return all(
        min(new) > SLOWER * min(old) + SLACK_MS
        for new, old in zip(zip(*fresh, strict=True), zip(*repeated, strict=True), strict=True)
    )


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
