"""The torch path on one CPU core: every mechanism, in a form that it has, at lengths of milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from linbench import registry
from linbench.cell import Cell


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("pass_", ["forward", "forward_backward"])
@pytest.mark.parametrize("mechanism", sorted(registry.BUILT_IN))
def bench_torch(mechanism: str, pass_: str, length: int, timed: Callable[[Cell], None]) -> None:
    causal = True in registry.load(mechanism).description.causal_forms
    cell = Cell.model_validate(
        {"mechanism": mechanism, "length": length, "heads": 4, "head_dim": 32, "value_dim": 32}
        | {"causal": causal, "pass": pass_}
    )
    if (reason := registry.of_cell(cell).unsupported(cell)) is not None:
        pytest.skip(reason)
    timed(cell)
