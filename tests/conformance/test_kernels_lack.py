"""What kernels do not have is no failure of theirs: it is told, and the rest is tried."""

from __future__ import annotations

import pytest
from torch import Tensor

from linbench.conformance.claims import convergence
from linbench.conformance.finding import Verdict
from linbench.conformance.subject import Subject
from linbench.mechanisms import fused
from linbench.mechanisms.based import Based
from linbench.mechanisms.performer import Performer


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as anybody is asked."""
    monkeypatch.setattr(fused, "unavailable", lambda *_: None)


def test_a_kernel_with_one_value_of_many_cannot_show_convergence() -> None:
    assert Based.claims.converges is not None
    finding = convergence(Subject("based", True, "triton", quick=True))
    assert finding.verdict is Verdict.NOT_APPLICABLE
    assert finding.reason == "too few values: the triton kernels have the polynomial of order 2, not 1"


def test_a_kernel_is_tried_at_the_values_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def forward(self: Performer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tried.append(self.projections)
        return self.forward_torch(q, k, v)

    monkeypatch.setattr(Performer, "forward_triton", forward)
    monkeypatch.setattr(
        Performer,
        "unsupported",
        lambda self, cell: "too wide" if cell.implementation == "triton" and self.projections > 256 else None,
    )
    finding = convergence(Subject("performer", True, "triton", quick=True))
    assert finding.verdict is Verdict.PASSED
    assert sorted(set(tried)) == [16, 64, 256]
