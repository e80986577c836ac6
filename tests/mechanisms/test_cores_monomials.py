"""Monomials against their definition one by one, and the maps that are made of them against autograd."""

import itertools
import math

import pytest
import torch

from linbench.mechanisms.cores.monomials import (
    Monomials,
    SketchedPower,
    TaylorFeatures,
    number_of_monomials,
    truncated_exp,
)

RANGES = [(5, 0, 1), (5, 0, 2), (3, 0, 4), (5, 2, 2), (4, 1, 3), (3, 2, 4), (1, 0, 3)]  # variables, lowest, highest


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def one_by_one(x, lowest, highest, weight=1.0):
    """x^α / √α! by degree, then by first variable, ``[..., d, L]`` -> ``[..., F, L]``."""
    rows = []
    for degree in range(lowest, highest + 1):
        for chosen in itertools.combinations_with_replacement(range(x.shape[-2]), degree):
            factorials = math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
            row = torch.full_like(x[..., 0, :], weight / factorials**0.5)
            for i in chosen:
                row = row * x[..., i, :]
            rows.append(row)
    return torch.stack(rows, -2)


@pytest.mark.parametrize(("variables", "lowest", "highest"), RANGES)
def test_every_monomial_is_there_once_with_its_coefficient(variables, lowest, highest):
    x = draw(2, 3, variables, 7)
    found = Monomials(variables, lowest, highest, weight=1.5).expand(x)
    expected = one_by_one(x, lowest, highest, 1.5)
    assert found.shape[-2] == sum(number_of_monomials(variables, n) for n in range(lowest, highest + 1))

    def ordered(rows):
        """Sorted at every token, as within a degree and a first variable the order is free; and their sum."""
        return rows[0, 0].gather(0, rows[0, 0].argsort(0)), rows.sum(-2)

    for one, other in zip(ordered(found), ordered(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("variables", "lowest", "highest"), RANGES)
def test_products_of_expansions_are_powers_over_factorials(variables, lowest, highest):
    x, y = draw(2, 3, variables, 7), draw(3, 2, variables, 7).view(2, 3, variables, 7).flip(0)
    monomials = Monomials(variables, lowest, highest)
    u = (x * y).sum(-2)
    expected = sum(u**n / math.factorial(n) for n in range(lowest, highest + 1))
    torch.testing.assert_close((monomials.expand(x) * monomials.expand(y)).sum(-2), expected)


@pytest.mark.parametrize("variables", [1, 2, 5])
def test_blocks_of_products_cover_a_degree_and_take_the_monomials_below_that_do_not_begin_earlier(variables):
    monomials = Monomials(variables, 0, 3)
    for degree in (1, 2, 3):
        blocks = monomials.products(degree)
        covered = [row for _, _, place in blocks for row in range(place.start, place.stop)]
        assert covered == list(range(number_of_monomials(variables, degree)))
        below = list(itertools.combinations_with_replacement(range(variables), degree - 1))
        for i, tail, _ in blocks:
            assert sum(all(j >= i for j in chosen) for chosen in below) == tail.stop - tail.start


@pytest.mark.parametrize(("variables", "lowest", "highest"), RANGES)
def test_gradient_is_that_of_autograd(variables, lowest, highest):
    x = draw(2, 3, variables, 7).requires_grad_()
    monomials = Monomials(variables, lowest, highest, weight=0.7)
    u = draw(2, 3, variables, 7).roll(1, -1)
    whole = monomials.expand(x.detach())
    # the loss Σ ⟨φ(x), φ(u)⟩, whose gradient for φ(x) is φ(u)
    found = monomials.gradient(x.detach(), whole.clone(), monomials.expand(u))
    loss = (one_by_one(x, lowest, highest, 0.7) * one_by_one(u, lowest, highest, 0.7)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_the_truncated_exponential_is_its_sum(order):
    u = draw(4, 7)
    expected = sum(u**n / math.factorial(n) for n in range(order + 1))
    torch.testing.assert_close(truncated_exp(u.clone(), order), expected)


def assert_gradient_of_features_is_that_of_finite_differences(features, x):
    """For a loss that is linear in the features, with coefficients that differ."""
    values, _ = features.features(x)
    toward = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).view_as(values)
    found = features.gradient(x, values.clone(), toward.clone(), of_keys=True)
    expected, step = torch.zeros_like(x), 1e-5
    for entry in itertools.product(*(range(size) for size in x.shape)):
        up, down = x.clone(), x.clone()
        up[entry] += step
        down[entry] -= step
        difference = features.features(up)[0] - features.features(down)[0]
        expected[entry] = (difference * toward).sum() / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def assert_pair_gradient_is_that_of_autograd(features, expected_weights):
    products = draw(2, 6, 6).requires_grad_()
    weights = expected_weights(products)
    torch.testing.assert_close(features.pair_weights(products.detach()), weights)
    toward = draw(2, 6, 6).flip(1)
    (expected,) = torch.autograd.grad(weights, products, toward)
    torch.testing.assert_close(features.pair_gradient(products.detach(), toward.clone()), expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_features_have_the_gradients_of_their_values_and_of_their_pairs(order):
    features = TaylorFeatures(Monomials(4, 0, order))
    assert_gradient_of_features_is_that_of_finite_differences(features, draw(2, 3, 4))
    assert_pair_gradient_is_that_of_autograd(
        features, lambda products: sum((products / 2) ** n / math.factorial(n) for n in range(order + 1))
    )


def test_a_state_of_many_features_has_longer_chunks():
    few, many = (TaylorFeatures(Monomials(d, 0, 2)).chunk for d in (16, 64))
    assert few < many


@pytest.mark.parametrize("block", [0, 6])
def test_sketched_powers_have_the_gradients_of_their_values_and_of_their_pairs(block):
    matrix = draw(4, 3)
    features = SketchedPower(lambda x: (x @ matrix) ** 2, Monomials(3, 2, 2, weight=2**0.5), 4, block)
    x, y = draw(2, 5, 4), draw(2, 5, 4).flip(0)
    products = features.features(x)[0] @ features.features(y)[0].mT
    torch.testing.assert_close(products, ((x @ matrix) ** 2 @ ((y @ matrix) ** 2).mT) ** 2)
    assert_gradient_of_features_is_that_of_finite_differences(features, draw(2, 3, 4))
    assert_pair_gradient_is_that_of_autograd(features, lambda products: products**4)
    assert features.paired == bool(block)
    assert features.width(4) == 6
