"""Every mechanism that comes with linbench holds what it is asked for. New names are taken up by themselves."""

from __future__ import annotations

import pytest

from linbench import registry
from linbench.conformance.kit import PROPERTIES, Examination, examine

NAMES = sorted(registry.BUILT_IN)


def refuted(name: str, *, quick: bool) -> dict[str, str | None]:
    """The properties that do not hold: name -> reason, with the number and its bound where there is one."""
    found = {property_: examine(Examination(name, quick=quick), property_) for property_ in PROPERTIES}
    return {
        property_: f"{finding.reason} ({finding.measured} > {finding.bound})" if finding.measured else finding.reason
        for property_, finding in found.items()
        if finding.failed
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_mechanism_holds_the_quick_kit(name: str) -> None:
    assert refuted(name, quick=True) == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_mechanism_holds_the_whole_kit(name: str) -> None:
    assert refuted(name, quick=False) == {}
