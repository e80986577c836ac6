"""The exponential in place: its error, its limits, and what is left alone."""

import math

import pytest
import torch

from linbench.mechanisms.cores.exponential import exp_


def test_error_is_that_of_an_input_half_a_unit_off():
    x = torch.linspace(-87, 88, 100_003)
    found = exp_(x.clone()).double()
    relative = (found / x.double().exp() - 1).abs()
    assert (relative <= (1.25 * x.double().abs() + 4) * 2**-24).all()


def test_limits_are_those_of_the_exponential():
    x = torch.tensor([-math.inf, -200.0, 0.0, 200.0, math.inf, math.nan])
    expected = torch.tensor([0.0, 0.0, 1.0, math.inf, math.inf, math.nan])
    torch.testing.assert_close(exp_(x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_works_in_place_also_with_gaps(dtype):
    whole = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    before, part = whole.clone(), whole[:, ::3]
    assert exp_(part).data_ptr() == part.data_ptr()
    torch.testing.assert_close(whole[:, ::3], before[:, ::3].exp())
    assert torch.equal(whole[:, 1::3], before[:, 1::3])


def test_fp64_keeps_its_digits():
    x = torch.linspace(-700, 700, 1001, dtype=torch.float64)
    assert torch.equal(exp_(x.clone()), x.exp())
