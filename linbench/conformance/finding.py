"""What a property found. Free of torch: the parent reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from pydantic import BaseModel


class Verdict(StrEnum):
    """What became of a property."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


class Finding(BaseModel):
    """A verdict with the number behind it, if there is one."""

    verdict: Verdict
    measured: float | None = None
    bound: float | None = None
    reason: str | None = None
    """What is wrong, or why the property does not apply; where the worst number was seen when it passed."""

    @property
    def failed(self) -> bool:
        """Whether the mechanism does not have the property."""
        return self.verdict is Verdict.FAILED


def passed(reason: str | None = None) -> Finding:
    """It holds, and there is no number to it."""
    return Finding(verdict=Verdict.PASSED, reason=reason)


def failed(reason: str) -> Finding:
    """It does not hold, and there is no number to it."""
    return Finding(verdict=Verdict.FAILED, reason=reason)


def not_applicable(reason: str) -> Finding:
    """The mechanism makes no such claim, or has no such form."""
    return Finding(verdict=Verdict.NOT_APPLICABLE, reason=reason)


def within(measured: float, bound: float, where: str) -> Finding:
    """Holds when ``measured`` is finite and at most ``bound``."""
    if not math.isfinite(measured):
        return Finding(verdict=Verdict.FAILED, bound=bound, reason=f"NaN or infinity: {where}")
    verdict = Verdict.PASSED if measured <= bound else Verdict.FAILED
    return Finding(verdict=verdict, measured=measured, bound=bound, reason=where)


def worst(findings: Iterable[Finding]) -> Finding:
    """One for many: the worst failure, else the number that comes closest to its bound; of equal ones the first.

    A property that applies nowhere does not apply; one that applies somewhere is judged there.
    """
    found = list(findings)
    if not found:
        return not_applicable("nothing to look at")
    return max(found, key=_badness)


def _badness(finding: Finding) -> tuple[int, float]:
    rank = {Verdict.NOT_APPLICABLE: 0, Verdict.PASSED: 1, Verdict.FAILED: 2}[finding.verdict]
    if finding.measured is None or finding.bound is None:
        return rank, math.inf if finding.failed else -1.0
    badness = finding.measured / finding.bound if finding.bound > 0 else finding.measured
    return rank, float(f"{badness:.3g}")  # what differs by rounding alone is equal, and the first of them is told
