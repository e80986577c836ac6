"""The Triton kernels on a GPU: every mechanism that has some, bf16, forward, with backward, and a token decoded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from linbench import registry
from linbench.cell import Cell
from linbench.mechanisms import fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are timed on a GPU, and torch sees none")
MECHANISMS = [name for name in sorted(registry.BUILT_IN) if fused.NAME in registry.load(name).implementations()]


@pytest.mark.parametrize("length", [2048, 16384])
@pytest.mark.parametrize("pass_", ["forward", "forward_backward", "decode"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def bench_kernels(mechanism: str, pass_: str, length: int, timed: Callable[[Cell], None]) -> None:
    causal = True in registry.load(mechanism).kernel_forms
    cell = Cell.model_validate(
        {"mechanism": mechanism, "implementation": fused.NAME, "length": length, "batch": 8, "heads": 16}
        | {"dtype": "bfloat16", "causal": causal, "pass": pass_, "device": "cuda"}
    )
    if (reason := registry.of_cell(cell).unsupported(cell)) is not None:
        pytest.skip(reason)
    timed(cell)
