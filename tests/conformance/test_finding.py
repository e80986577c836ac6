"""One verdict from many: a failure beats every number, and the number nearest to its bound beats the others."""

from __future__ import annotations

import itertools
import math

import pytest

from linbench.conformance.finding import Finding, Verdict, failed, not_applicable, passed, within, worst

FAR = within(1e-9, 1.0, "far from its bound")
NEAR = within(1e-13, 2e-13, "near its bound, though the smaller number")
OVER = within(3.0, 1.0, "over")
FURTHER = within(5.0, 1.0, "further over")


def test_a_number_holds_up_to_its_bound() -> None:
    assert within(1.0, 1.0, "here") == Finding(verdict=Verdict.PASSED, measured=1.0, bound=1.0, reason="here")
    assert within(math.nextafter(1.0, 2.0), 1.0, "here").failed


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_fails_and_is_not_kept_as_one(number: float) -> None:
    finding = within(number, 1.0, "here")
    assert finding.failed
    assert finding.measured is None
    assert finding.reason == "NaN or infinity: here"
    assert Finding.model_validate_json(finding.model_dump_json()) == finding


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([FAR, NEAR, passed("no number"), not_applicable("no claim")], NEAR),
        ([passed("no number"), not_applicable("no claim")], passed("no number")),
        ([NEAR, OVER, FURTHER], FURTHER),
        ([FURTHER, failed("no number at all")], failed("no number at all")),
        ([within(0.0, 0.0, "exact"), not_applicable("no claim")], within(0.0, 0.0, "exact")),
        ([within(0.0, 0.0, "exact"), within(1e-300, 0.0, "not exact")], within(1e-300, 0.0, "not exact")),
    ],
)
def test_the_worst_in_any_order(findings: list[Finding], expected: Finding) -> None:
    for order in itertools.permutations(findings):
        assert worst(order) == expected


def test_nothing_to_look_at_does_not_apply() -> None:
    assert worst([]).verdict is Verdict.NOT_APPLICABLE
