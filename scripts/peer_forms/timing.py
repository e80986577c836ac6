"""One row of the comparison: both sides agree, and are then timed in ABBA order."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from linbench.measure.conditions import Watch
from peer_forms.pair import Comparison, Operator, Pair, draw

GIB = 2**30
PROBE_LENGTHS = (128, 512)
"""Short sequences on which a peer is called first, so that no hopeless call is begun."""


class GivenUpError(Exception):
    """Why a row has no numbers, in one clause."""


@dataclass(frozen=True)
class Limits:
    """How long a row may take."""

    rounds: int
    """At most."""
    budget_s: float
    """After which no round begins; but there are two rounds, where one takes less than three budgets."""
    call_s: float
    """A row whose peer needs more for a call is given up with that as its reason."""


@dataclass
class Forecast:
    """What a call of a peer will take, from what shorter ones took."""

    known: list[tuple[int, float]] = field(default_factory=list)
    """Lengths, rising, and seconds."""

    def add(self, length: int, duration: float) -> None:
        """One more length, the longest so far."""
        self.known.append((length, duration))

    def seconds(self, length: int) -> float:
        """Along the power of N between the last two, which is one at least; 0 where nothing is known."""
        if not self.known:
            return 0.0
        (last, duration), power = self.known[-1], 1.0
        if len(self.known) > 1:
            before, shorter = self.known[-2]
            power = max(math.log(duration / shorter) / math.log(last / before), power)
        return duration * (length / last) ** power


def call(operator: Operator, leaves: tuple[Tensor, ...], toward: Tensor | None) -> tuple[Tensor, ...]:
    """The output, and the gradients of the leaves where there is a ``toward`` to differentiate along."""
    if toward is None:
        with torch.no_grad():
            return (operator(*leaves),)
    output = operator(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, toward)


def seconds(operator: Operator, leaves: tuple[Tensor, ...], toward: Tensor | None) -> float:
    """One call."""
    start = time.perf_counter()
    call(operator, leaves, toward)
    return time.perf_counter() - start


def probed(comparison: Comparison, backward: bool) -> Forecast:
    """A forecast from short sequences; an empty one where the peer refuses them."""
    forecast = Forecast()
    for length in PROBE_LENGTHS:
        try:
            pair = comparison.make(length)
            toward = draw(*call(pair.ours, pair.leaves, None)[0].shape).detach() if backward else None
            forecast.add(length, seconds(pair.peer, pair.leaves, toward))
        except ImportError:
            raise
        except Exception:  # whatever a package raises at a length that it does not take
            return Forecast()
    return forecast


def measure(comparison: Comparison, length: int, backward: bool, forecast: Forecast, limits: Limits) -> dict[str, Any]:
    """Check and time one row: milliseconds per side and round, and the distance of the two results.

    Raises:
        GivenUpError: the peer is too slow, too large, fails, or disagrees.
    """
    if backward and not comparison.differentiable:
        raise GivenUpError("torch refuses the peer's backward")
    needed, free = comparison.peer_bytes(length, backward), psutil.virtual_memory().available
    if needed > free / 2:
        raise GivenUpError(f"the peer needs about {needed / GIB:.0f} GiB, {free / GIB:.0f} are free")
    if forecast.seconds(length) > limits.call_s:
        raise GivenUpError(f"the peer would need about {forecast.seconds(length):.0f} s a call")
    pair = comparison.make(length)
    toward = draw(*call(pair.ours, pair.leaves, None)[0].shape).detach() if backward else None
    distance, first_call_s = compared(pair, toward, comparison.tolerance)
    forecast.add(length, first_call_s)
    if first_call_s > limits.call_s:
        raise GivenUpError(f"the peer needs {first_call_s:.0f} s a call")
    samples = abba(pair, toward, limits)
    return {"distance": distance, "peer_first_call_ms": first_call_s * 1e3, **samples, **summary(samples)}


def compared(pair: Pair, toward: Tensor | None, tolerance: float) -> tuple[float, float]:
    """The largest relative Frobenius distance of outputs and gradients, and seconds of the peer's first call.

    Raises:
        GivenUpError: the peer fails, or is too far away.
    """
    started = time.perf_counter()
    try:
        theirs = call(pair.peer, pair.leaves, toward)
    except Exception as error:  # a bug of theirs, of any kind, is a row that says so
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise GivenUpError(f"the peer fails: {said[:120]}") from error
    first_call_s = time.perf_counter() - started
    if not all(tensor.isfinite().all() for tensor in theirs):
        raise GivenUpError("the peer's result is not finite")
    ours = call(pair.ours, pair.leaves, toward)
    distance = max(((a * pair.factor - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))
    if not distance < tolerance:
        raise GivenUpError(f"disagrees: relative distance {distance:.1e}")
    return distance, first_call_s


def abba(pair: Pair, toward: Tensor | None, limits: Limits) -> dict[str, Any]:
    """Milliseconds per side and round, two a round, in the order ours, peer, peer, ours; and foreign CPU in cores."""
    ours: list[list[float]] = []
    peer: list[list[float]] = []
    load, start = Watch(), time.perf_counter()
    while len(ours) < limits.rounds:
        spent = time.perf_counter() - start
        if ours and spent > (limits.budget_s if len(ours) > 1 else 3 * limits.budget_s):
            break
        gc.collect()
        a, b, c, d = (seconds(side, pair.leaves, toward) * 1e3 for side in (pair.ours, pair.peer, pair.peer, pair.ours))
        ours.append([a, d])
        peer.append([b, c])
    return {"ours_ms": ours, "peer_ms": peer, "foreign_cpu_cores": load.foreign_cores()}


def summary(samples: dict[str, Any]) -> dict[str, Any]:
    """Medians, their ratio peer / ours, and its 95 % bootstrap interval over rounds."""
    ours, peer = np.array(samples["ours_ms"]), np.array(samples["peer_ms"])
    drawn = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    ratios = np.median(peer[drawn], axis=(1, 2)) / np.median(ours[drawn], axis=(1, 2))
    low, high = np.quantile(ratios, [0.025, 0.975])
    medians = {"ours_median_ms": float(np.median(ours)), "peer_median_ms": float(np.median(peer))}
    ratio = medians["peer_median_ms"] / medians["ours_median_ms"]
    return {**medians, "ratio": ratio, "ratio_95": [float(low), float(high)]}
