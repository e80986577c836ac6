"""The check: nothing wrong passes it, rounding does, and sampled rows see what all rows see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linbench
from linbench.cell import Cell
from linbench.measure import check as check_module
from linbench.measure.call import Call
from linbench.measure.check import check, check_rows, sampled_rows
from linbench.mechanisms.base import Description, Geometry, Mechanism


class Faulty(Mechanism):
    """Normalised linear attention without a feature map, with a fault of choice."""

    description = Description("has a fault", "replacement", (False,), "none", "none", 2026)
    fault = "none"

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        chosen = q if rows is None else q[:, :, rows]
        return (chosen @ k.mT).sigmoid() @ v

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = self.reference(q, k, v)
        faults = {
            "none": lambda: output,
            "scale": lambda: output * 1.01,
            "tail": lambda: torch.cat([output[:, :, :-1], torch.zeros_like(output[:, :, -1:])], dim=2),
            "nan": lambda: output * torch.tensor(float("nan")),
            "shape": lambda: output[..., :-1],
            "dtype": output.double,
            "gradient": lambda: output.detach() + 0 * (q.sum() + k.sum() + v.sum()),
            "one gradient": lambda: self.reference(q, k.detach(), v),
        }
        return faults[self.fault]()

    def flops(self, cell: Cell) -> int:
        return 0

    def min_bytes(self, cell: Cell) -> int:
        return 0


def call(fault: str = "none", pass_: str = "forward", dtype: str = "float32", length: int = 37) -> Call:
    cell = Cell(mechanism="faulty", length=length, heads=2, head_dim=4, value_dim=3, dtype=dtype, pass_=pass_)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    kind = getattr(torch, dtype)
    q, k, v, gradient = (torch.randn(1, 2, length, w, generator=generator).to(kind) for w in (4, 4, 3, 3))
    for tensor in (q, k, v):
        tensor.requires_grad_(pass_ != "forward")
    mechanism = Faulty(Geometry(2, 4, 3, False))
    mechanism.fault = fault
    return Call(cell, mechanism, q, k, v, {}, gradient if pass_ != "forward" else None)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
def test_rounding_passes(dtype: str, pass_: str) -> None:
    block, output = check(call(pass_=pass_, dtype=dtype))
    assert block.passed, block.finding
    assert output.shape == (1, 2, 37, 3)
    assert set(block.gradient_errors) == (set() if pass_ == "forward" else {"dq", "dk", "dv"})


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("scale", "output"),
        ("tail", "worst row"),
        ("nan", "not finite"),
        ("shape", "(1, 2, 37, 2)"),
        ("dtype", "float64"),
    ],
)
def test_a_wrong_output_fails_and_says_how(fault: str, word: str) -> None:
    block, _ = check(call(fault))
    assert not block.passed
    assert word in (block.finding or "")


@pytest.mark.parametrize(("fault", "word"), [("gradient", "dq"), ("one gradient", "dk")])
def test_a_wrong_gradient_fails_although_the_output_is_right(fault: str, word: str) -> None:
    assert check(call(fault))[0].passed
    block, _ = check(call(fault, "forward_backward"))
    assert not block.passed
    assert word in (block.finding or "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_zero_in_exact_arithmetic_may_be_rounding_noise(dtype: str) -> None:
    """Over one key the softmax is 1 whatever q and k are."""
    mechanism = linbench.build("softmax", heads=2, key_dim=4, value_dim=3, causal=False)
    timed = call(pass_="backward", dtype=dtype, length=1)
    timed.mechanism = mechanism
    block, _ = check(timed)
    assert block.passed, block.finding


def test_a_wrong_last_row_is_seen_in_a_sample_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "FULL_UP_TO_TOKENS", 8)
    right, _ = check(call(pass_="forward_backward", length=300))
    assert right.passed, right.finding
    assert right.rows == 256 < right.rows_total
    wrong, _ = check(call("tail", length=300))
    assert not wrong.passed


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 5), (9, 9), (100, 7), (100_000, 16)])
def test_sampled_rows_are_sorted_distinct_and_hold_both_ends(length: int, count: int) -> None:
    rows = sampled_rows(length, count, seed=4)
    assert len(rows) == min(length, count)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows[0] == 0
    assert rows[-1] == length - 1
    assert torch.equal(rows, sampled_rows(length, count, seed=4))


def test_the_reference_never_needs_more_than_its_share_of_memory() -> None:
    for heads in (1, 8, 64):
        for length in (1, 100, 2048, 4096, 131_072, 2**20):
            rows = check_rows(length, heads)
            assert 1 <= rows <= length
            assert rows * heads * length <= max(4 * check_module.WEIGHTS_AT_ONCE, 8 * heads * length)
