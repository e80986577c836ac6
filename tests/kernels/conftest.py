"""Kernels are tested on a GPU where there is one, else on the CPU in Triton's interpreter.

The interpreter has to be switched on before triton is imported, and would then be on for every other test of the
process and for the commands that they start. ``scripts/test_kernels`` runs these tests in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
from linbench_kernels import device as kernel_device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = kernel_device.unavailable()
    for item in items:
        if reason is not None and item.path.parent.name == "kernels":
            item.add_marker(pytest.mark.skip(reason=f"{reason}; scripts/test_kernels does that"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if kernel_device.INTERPRETED else "cuda")
