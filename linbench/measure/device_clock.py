"""Time on a CUDA device by three clocks: events, a replayed graph, and the host's.

Events stand around one call, behind a queue that holds the device until the host has handed everything over, and after
a flush of the second-level cache: kernels alone, on data from memory. A graph replays the same kernels without their
launches. The host's clock runs over many calls and a wait: what a program pays. Where the last exceeds the others, the
cell measures launches and not a mechanism.
"""

from __future__ import annotations

import time

import torch

from linbench.measure.call import Call

LEAST_FLUSH_BYTES = 2**26
HOLD_FACTOR = 2.0
"""The queue is held this many times as long as handing over the last call took."""
FALLBACK_KHZ = 2_000_000
HOST_SAMPLES, HOST_SAMPLE_MS = 20, 5.0
GRAPH_SAMPLES = 30


class DeviceClock:
    """The clocks of one cell. Its flush buffer is no part of any memory figure: those are taken before or after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        flush = max(2 * int(getattr(properties, "L2_cache_size", 0)), LEAST_FLUSH_BYTES)
        self._flush = torch.empty(flush, dtype=torch.int8, device=device)
        self._cycles_per_ms = int(getattr(properties, "clock_rate", 0) or FALLBACK_KHZ)
        self._handover_ms = 1.0

    def events(self, call: Call, _calls: int) -> float:
        """Milliseconds of one call between two events."""
        part = call.timed_part()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        self._flush.zero_()
        torch.cuda._sleep(int(HOLD_FACTOR * self._handover_ms * self._cycles_per_ms))  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        start.record()
        part()
        end.record()
        self._handover_ms = 1e3 * (time.perf_counter() - began)
        end.synchronize()
        return float(start.elapsed_time(end))

    def host(self, call: Call, expected_ms: float) -> list[float]:
        """Milliseconds of one call on the host's clock: samples of as many calls as take ``HOST_SAMPLE_MS``."""
        calls = max(1, int(HOST_SAMPLE_MS / max(expected_ms, 1e-3)))
        samples = []
        for _ in range(HOST_SAMPLES):
            parts = [call.timed_part() for _ in range(calls)]
            torch.cuda.synchronize(self._device)
            start = time.perf_counter_ns()
            for part in parts:
                part()
            torch.cuda.synchronize(self._device)
            samples.append((time.perf_counter_ns() - start) / 1e6 / calls)
        return samples

    def graph(self, call: Call) -> tuple[list[float], str | None]:
        """Milliseconds of one replay as a CUDA graph, or no samples and the reason why there is no graph."""
        if call.cell.pass_ == "backward":
            return [], "the forward would have to be captured with it"
        try:
            replay = self._captured(call)
        except (RuntimeError, NotImplementedError) as error:
            return [], f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return [self._replayed(replay) for _ in range(GRAPH_SAMPLES)], None

    def _captured(self, call: Call) -> torch.cuda.CUDAGraph:
        """Warmed up on a stream of its own, as capture demands."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call.timed_part()()
        torch.cuda.current_stream(self._device).wait_stream(side)
        replay = torch.cuda.CUDAGraph()
        with torch.cuda.graph(replay):
            call.timed_part()()
        return replay

    def _replayed(self, replay: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        self._flush.zero_()
        torch.cuda._sleep(self._cycles_per_ms)  # type: ignore[no-untyped-call]
        start.record()
        replay.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
