"""Sketches of powers feature by feature, and corrections inside blocks pair by pair, with their gradients."""

import pytest
import torch

from linbench.mechanisms.cores import sketch
from linbench.mechanisms.cores.sketch import block_corrections, polynomial_sketch, sketch_matrices


def draw(tokens, keys=None, *, batch=2, heads=3, key_dim=5, value_dim=7):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64) for size in sizes]


def matrices(degree, width=5, size=4):
    return sketch_matrices(width, size, degree, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("degree", "shapes"), [(1, []), (2, [(5, 4)] * 2), (4, [(5, 4)] * 4 + [(4, 4)] * 2)])
def test_a_sketch_of_a_degree_has_two_of_half_of_it_and_two_matrices_more(degree, shapes):
    assert [tuple(matrix.shape) for matrix in matrices(degree)] == shapes


def test_a_sketch_of_degree_eight_is_a_tree_of_products():
    x, given = draw(6)[0], matrices(8)
    assert len(given) == 14

    def tree(degree, own):
        if degree == 1:
            return x
        half = (len(own) - 2) // 2
        left, right = tree(degree // 2, own[:half]), tree(degree // 2, own[half : 2 * half])
        columns = [(left @ own[-2][:, r]) * (right @ own[-1][:, r]) / 2 for r in range(4)]
        return torch.stack(columns, -1)

    torch.testing.assert_close(polynomial_sketch(x, given, 8), tree(8, given))


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_a_sketch_is_homogeneous_of_its_degree(degree):
    x, given = draw(6)[0], matrices(degree)
    found = polynomial_sketch(-1.5 * x, given, degree)
    torch.testing.assert_close(found, (-1.5) ** degree * polynomial_sketch(x, given, degree))


def oracle(q, k, v, block, approximate):
    """For the power 4."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            if i // block == j // block:
                weight = (q[:, :, i] * k[:, :, j]).sum(-1) ** 4
                if approximate is not None:
                    weight = weight - (approximate(q[:, :, i]) * approximate(k[:, :, j])).sum(-1) ** 2
                out[:, :, i] += weight[..., None] * v[:, :, j]
    return out


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (13, 13), (9, 21), (21, 9), (8, 8)])
@pytest.mark.parametrize("at_once", [1, 10**6])
def test_corrections_are_those_of_the_pairs_of_a_block(tokens, keys, sketched, at_once, monkeypatch):
    """One block at a time, and all of them."""
    monkeypatch.setattr(sketch, "slab_tokens", lambda *_: at_once)
    given = matrices(2)
    approximate = (lambda x: polynomial_sketch(x, given, 2)) if sketched else None
    leaves = [x.requires_grad_() for x in draw(tokens, keys)]
    found = block_corrections(*leaves, power=4, block=4, approximate=approximate)
    expected = oracle(*leaves, 4, approximate)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, toward), torch.autograd.grad(expected, leaves, toward), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
