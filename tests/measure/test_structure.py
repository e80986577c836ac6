"""Ranks against matrices whose ranks are known."""

import pytest
import torch

from linbench import inputs, registry
from linbench.cell import Cell
from linbench.measure.call import Call
from linbench.measure.ranks import effective_rank, numerical_rank, singular_values
from linbench.measure.structure import measure_structure


def orthogonal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


def test_equal_singular_values_count_themselves():
    torch.manual_seed(0)
    matrix = (orthogonal(9, 4) @ orthogonal(6, 4).mT).expand(2, 3, 9, 6)
    values = singular_values(matrix.float())
    assert effective_rank(values) == pytest.approx(4, rel=1e-5)
    assert numerical_rank(values) == 4


def test_effective_rank_is_exp_of_the_entropy():
    values = torch.tensor([[[3.0, 1.0, 0.0]]], dtype=torch.float64)
    assert effective_rank(values) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


def test_zeros_have_no_rank():
    assert effective_rank(torch.zeros(1, 2, 3)) == 0
    assert numerical_rank(torch.zeros(1, 2, 3)) == 0


def test_constant_output_has_rank_one_beside_the_truth():
    cell = Cell(mechanism="softmax", length=300, heads=2, head_dim=8, value_dim=5)
    mechanism = registry.build("softmax", heads=2, key_dim=8, value_dim=5, causal=False)
    q, k, v = inputs.draw(cell)
    block = measure_structure(Call(cell, mechanism, q, k, v), torch.ones(1, 2, 300, 5), rows=100)
    assert (block.rows, block.rows_total, block.largest_rank) == (100, 300, 5)
    assert block.output_effective_rank == pytest.approx(1, abs=1e-6)
    assert block.exact_numerical_rank == 5
