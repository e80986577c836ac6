"""The child's side of a frontier: does one length run, and which length is there to be tried?"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator

import torch

from linbench import inputs, registry, worker
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.limits import data_bytes, give_back_at_once, limit_memory
from linbench.measure.levels import (
    UnmeasurableMemoryError,
    private_bytes,
    reset_high_water_mark,
    return_freed_memory,
)
from linbench.protocol import Nearest, NearestRequest, Probed, ProbeRequest
from linbench.record import Status

FEW_TOKENS = 64
"""Next to nothing in time and memory."""


def probe(request: ProbeRequest, enter: Callable[[str], None]) -> Probed:
    """Build the mechanism, draw the inputs, call the pass once. Nothing is checked, nothing is timed.

    The limit is on parameters, inputs and the call together. What drawing the inputs needs for a moment is no part of
    the pass, and has the larger ``drawing_limit_bytes``; nor is the code that a first call loads, so that a few tokens
    go first. ``enter`` is told ``inputs`` and ``call``.
    """
    stage = "start"
    try:
        torch.set_num_threads(request.threads)
        give_back_at_once()
        _load_code(request.cell)
        level = _Level(request)
        enter(stage := "inputs")
        call = worker.prepare(request.cell)
        enter(stage := "call")
        level.begin()
        result = call.timed_part()()
        if call.q.is_cuda:
            torch.cuda.synchronize()
        found = level.peak_bytes()
        del result
        return Probed(status=Status.OK, peak_bytes=found)
    except Exception as error:
        status, why = worker.classify(error)
        if asked := re.search(r"tried to allocate (\d+) bytes", why):
            why = f"an allocation of {int(asked[1]):,} bytes failed"
        return Probed(status=status, reason=f"{why} (stage: {stage})")


def _load_code(cell: Cell) -> None:
    """Call the pass on a few tokens. Whatever is wrong with it is left to the call that counts."""
    few: Cell = cell.model_copy(update={"length": min(cell.length, FEW_TOKENS)})
    with contextlib.suppress(Exception):
        worker.prepare(few).timed_part()()


class _Level:
    """The private memory of this process above that at construction, and the limit on it."""

    def __init__(self, request: ProbeRequest) -> None:
        self._on_cuda = request.cell.device == "cuda"
        self._limit = request.memory_limit_bytes
        self._data = data_bytes()
        self._resident: int | None = None
        if not self._on_cuda:
            with contextlib.suppress(UnmeasurableMemoryError):
                self._resident = private_bytes()
        if self._limit is not None:
            limit_memory(max(self._limit, request.drawing_limit_bytes))

    def begin(self) -> None:
        """From here on the limit holds, and the peak counts.

        Raises:
            MemoryError: what is there already is more than the limit allows.
        """
        return_freed_memory()
        if self._limit is not None:
            held = data_bytes() - self._data
            if held > self._limit:
                raise MemoryError(f"parameters and inputs alone take {held:,} bytes")
            limit_memory(self._limit - held)
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self._resident is not None:
            reset_high_water_mark()

    def peak_bytes(self) -> int | None:
        """None on a CPU whose kernel does not tell."""
        if self._on_cuda:
            return torch.cuda.max_memory_allocated()
        return None if self._resident is None else max(0, private_bytes(peak=True) - self._resident)


def nearest(request: NearestRequest) -> Nearest:
    """The length nearest to ``request.cell.length``, strictly between the two bounds, that can be asked for.

    Looked for among the lengths around the wanted one, as many as a square number is from the next a few times over;
    then where support ends, by bisection between the wanted length and the one that is known to be taken.
    """
    if request.cell.device == "cuda" and not torch.cuda.is_available():
        return Nearest(reason=f"torch {torch.__version__} sees no CUDA device")
    try:
        mechanism = registry.of_cell(request.cell)
    except UsageError as error:
        return Nearest(reason=str(error))
    low, high, wanted = request.above, request.below, request.cell.length

    def refusal(length: int) -> str | None:
        cell: Cell = request.cell.model_copy(update={"length": length})
        return mechanism.unsupported(cell) or inputs.unsupported(cell)

    for target in _targets(wanted, low):
        for length in _around(target, low, high):
            if refusal(length) is None:
                return Nearest(length_tokens=length)
    if low > 0 and (edge := _edge(refusal, low, min(wanted, high - 1))) > low:
        return Nearest(length_tokens=edge)
    return Nearest(reason=refusal(wanted))


def _targets(wanted: int, low: int) -> Iterator[int]:
    """The wanted length; where no length is known to be taken, also its half, its quarter, and so on."""
    yield wanted
    while low == 0 and wanted > 1:
        yield (wanted := wanted // 2)


def _around(target: int, low: int, high: int) -> Iterator[int]:
    """Lengths strictly between the bounds, by their distance to the target; the longer of two comes first."""
    for distance in range(4 * math.isqrt(target) + 64):
        for length in dict.fromkeys((target + distance, target - distance)):
            if low < length < high:
                yield length


def _edge(refusal: Callable[[int], str | None], taken: int, refused: int) -> int:
    """The longest length that is taken, where all up to some length are and none above it."""
    while refused - taken > 1:
        middle = (taken + refused) // 2
        taken, refused = (taken, middle) if refusal(middle) else (middle, refused)
    return taken
