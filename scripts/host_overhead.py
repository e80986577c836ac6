"""Host time of a call of the additive kernels with launches that do nothing: what Python costs before a device works.

Prints microseconds of CPU time per call, the least of several series. What Triton's own launcher takes is not in it.

    TRITON_INTERPRET=1 PYTHONPATH=kernels python scripts/host_overhead.py
"""

from __future__ import annotations

import contextlib
import os
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: without a device the operators refuse to be called

import torch
from linbench_kernels.additive import attention, launch, step

CALLS, SERIES = 300, 7
KERNELS = ("forward_kernel", "backward_kernel", "row_dots_kernel", "decay_gradient_kernel", "step_kernel")


class Nothing:
    """Stands in for a kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with launching_nothing():
        for name, call in calls():
            call()
            series = timeit.repeat(call, timer=time.process_time, number=CALLS, repeat=SERIES)
            print(f"{name:28} {min(series) / CALLS * 1e6:6.1f} us")


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Every kernel is replaced, and nothing else."""
    with contextlib.ExitStack() as patches:
        for name in KERNELS:
            patches.enter_context(mock.patch.object(launch, name, Nothing()))
        yield


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, by name."""
    q, k, v = (torch.zeros(1, 8, 64, 64, dtype=torch.bfloat16) for _ in range(3))
    decay = torch.zeros(1, 8, 64)
    fixed = torch.zeros(8)
    yield "forward, no decay", lambda: attention(q, k, v)
    yield "forward, decay of heads", lambda: attention(q, k, v, log_decay=fixed, scale=0.125)
    yield "forward, decay of tokens", lambda: attention(q, k, v, log_decay=decay, return_state=True)
    yield "forward, normalised", lambda: attention(q, k, v, feature="elu_plus_one", normalised=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    yield "forward that is recorded", lambda: attention(*leaves, log_decay=fixed)
    out = attention(*leaves, log_decay=fixed)[0]
    toward = torch.zeros_like(out)
    yield "backward", lambda: torch.autograd.grad(out, leaves, toward, retain_graph=True)
    row = [x[:, :, 0] for x in (q, k, v)]
    state = torch.zeros(1, 8, 64, 64)
    yield "step", lambda: step(*row, state, log_decay=fixed)


if __name__ == "__main__":
    main()
