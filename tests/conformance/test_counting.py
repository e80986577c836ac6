"""What is counted of a run: operations as a person would count them, and the bytes that are alive at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linbench.conformance.counting import counted_flops, peak_bytes


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def counted(operation: Callable[[], object]) -> tuple[int, int]:
    """Operations of products, and of all."""

    def run(begin: Callable[[], None]) -> object:
        begin()
        return operation()

    return counted_flops(run)


A, B, ROW, WAVE = draw(3, 5, 7), draw(3, 7, 11), draw(1, 1, 13), draw(3, 16)
TOTAL, FLAT_TOTAL = draw(3, 5, 11), draw(5, 11)
MATRIX, RIGHT = draw(6, 6) + 9 * torch.eye(6, dtype=torch.float64), draw(6, 4)
FACTOR = torch.linalg.cholesky(MATRIX @ MATRIX.mT)


@pytest.mark.parametrize(
    ("operation", "products"),
    [
        (lambda: A @ B, 2 * 3 * 5 * 7 * 11),
        (lambda: A[0] @ B[0], 2 * 5 * 7 * 11),
        (lambda: A[0] @ B[0, :, 0], 2 * 5 * 7),
        (lambda: A[0, 0] @ B[0, :, 0], 2 * 7),
        (lambda: torch.einsum("bij,bjk->bik", A, B), 2 * 3 * 5 * 7 * 11),
        (lambda: torch.baddbmm(TOTAL, A, B), 2 * 3 * 5 * 7 * 11),
        (lambda: TOTAL.baddbmm_(A, B), 2 * 3 * 5 * 7 * 11),
        (lambda: FLAT_TOTAL.addmm_(A[0], B[0]), 2 * 5 * 7 * 11),
        (lambda: torch.linalg.solve_triangular(FACTOR, RIGHT, upper=False), 6 * 6 * 4),
        (lambda: torch.linalg.inv(MATRIX), 2 * 6**3),
        (lambda: torch.linalg.cholesky(FACTOR @ FACTOR.mT), 2 * 6**3 + 6**3 // 3),
        (lambda: torch.cholesky_solve(RIGHT, FACTOR), 2 * 6 * 6 * 4),
    ],
)
def test_a_multiply_add_is_two_operations(operation: Callable[[], object], products: int) -> None:
    assert counted(operation)[0] == products


@pytest.mark.parametrize(
    ("operation", "others"),
    [
        (lambda: A + 1, A.numel()),
        (A.exp, A.numel()),
        (lambda: A[:, :, :1] * ROW, 3 * 5 * 13),
        (A.sum, A.numel()),
        (lambda: A.cumsum(1), A.numel()),
        (lambda: A.mT[:, None].unsqueeze(0).expand(2, -1, -1, -1, -1), 0),
        (lambda: torch.fft.rfft(WAVE, dim=1), 5 * 3 * 16 * 4),
    ],
)
def test_elements_count_once_and_views_nothing(operation: Callable[[], object], others: int) -> None:
    assert counted(operation) == (0, others)


def test_fused_attention_counts_both_products_and_five_in_the_backward() -> None:
    q, k, v = (draw(2, 3, tokens, width).float().requires_grad_() for tokens, width in ((17, 8), (23, 8), (23, 8)))
    pairs = 2 * 3 * 17 * 23

    def backward(begin: Callable[[], None]) -> object:
        output = F.scaled_dot_product_attention(q, k, v)
        begin()
        return torch.autograd.grad(output.sum(), (q, k, v))

    assert counted(lambda: F.scaled_dot_product_attention(q, k, v))[0] == 2 * pairs * (8 + 8)
    assert counted_flops(backward)[0] == 2 * pairs * 5 * 8


def test_what_runs_before_the_beginning_is_not_counted() -> None:
    def run(begin: Callable[[], None]) -> None:
        assert (A @ B).sum().isfinite()
        begin()

    assert counted_flops(run) == (0, 0)


def test_the_peak_is_what_is_alive_at_once() -> None:
    """Two arrays live together, then one by itself; what was there before does not count."""
    mebibyte = 2**20
    before = torch.ones(mebibyte, dtype=torch.uint8)

    def run() -> Tensor:
        together = [torch.ones(mebibyte, dtype=torch.uint8) for _ in range(2)]
        del together
        return torch.ones(mebibyte, dtype=torch.uint8) + before[0]

    assert peak_bytes(run, "cpu") == pytest.approx(2 * mebibyte, abs=4096)
