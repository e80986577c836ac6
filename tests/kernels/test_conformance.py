"""Every mechanism in its kernels holds the quick kit, by which ``linbench check`` tries to refute it."""

from __future__ import annotations

import pytest
import torch

from linbench import registry
from linbench.conformance.kit import PROPERTIES, Examination, examine

NAMES = [name for name in sorted(registry.BUILT_IN) if "triton" in registry.load(name).implementations()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_a_mechanism_in_kernels_holds_the_quick_kit(name: str, device: torch.device) -> None:
    asked = Examination(name, implementations=("triton",), quick=True, device=device.type)
    found = {property_: examine(asked, property_) for property_ in PROPERTIES}
    assert {property_: finding.reason for property_, finding in found.items() if finding.failed} == {}
