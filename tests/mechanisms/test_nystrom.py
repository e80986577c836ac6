"""Nyströmformer: the formula from landmarks in loops, when the inverse converges, and where the operator is softmax."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.nystrom import iterated_inverse
from linbench.registry import build


def operands(length, key_length=None, dtype=torch.float64, seed=0, scale=1.0):
    """B=2, H=3, D=5, M=7."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((length, 5), (key_length or length, 5), (key_length or length, 7))
    return [scale * torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def nystrom(landmarks, implementation="torch", seed=0, **hyperparameters):
    return build(
        "nystrom",
        heads=3,
        key_dim=5,
        value_dim=7,
        causal=False,
        seed=seed,
        implementation=implementation,
        landmarks=landmarks,
        **hyperparameters,
    )


def softmax(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def means(x, segments):
    return torch.stack([part.mean(0) for part in x.tensor_split(segments)])


def one_head(q, k, v, landmarks, iterations):
    """The oracle: equations 13 and 14 for a single head, the polynomial multiplied out."""
    scale = q.shape[-1] ** -0.5
    q_means, k_means = means(q, landmarks), means(k, landmarks)
    A = torch.softmax(scale * q_means @ k_means.T, -1)
    Z = A.T / (torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(A, torch.inf))
    for _ in range(iterations):
        X = A @ Z
        Z = Z @ (13 * torch.eye(landmarks).double() - 15 * X + 7 * X @ X - X @ X @ X) / 4
    return torch.softmax(scale * q @ k_means.T, -1) @ Z @ torch.softmax(scale * q_means @ k.T, -1) @ v


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(
    ("length", "key_length", "landmarks", "iterations"),
    [(12, 12, 4, 6), (13, 13, 5, 3), (9, 31, 7, 6), (11, 11, 11, 0)],
)
def test_both_forms_are_the_equations_head_by_head(implementation, length, key_length, landmarks, iterations):
    q, k, v = operands(length, key_length)
    output = nystrom(landmarks, implementation, iterations=iterations)(q, k, v)
    for batch in range(2):
        for head in range(3):
            expected = one_head(q[batch, head], k[batch, head], v[batch, head], landmarks, iterations)
            torch.testing.assert_close(output[batch, head], expected, rtol=1e-11, atol=1e-12)


def test_the_iteration_with_a_landmark_per_token_converges_to_softmax():
    q, k, v = operands(40)
    errors = [relative(nystrom(40, iterations=count)(q, k, v), softmax(q, k, v)) for count in (6, 10, 16, 24)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[0] > 1e-2  # the paper's six are not enough
    assert errors[-1] < 1e-11


def test_the_exact_inverse_with_a_landmark_per_token_is_softmax():
    q, k, v = operands(40)
    torch.testing.assert_close(nystrom(40, inverse="exact")(q, k, v), softmax(q, k, v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(nystrom(64, inverse="exact")(q, k, v), softmax(q, k, v), rtol=1e-9, atol=1e-9)


def test_segments_of_equal_tokens_are_exact():
    """Then the landmarks are the tokens, and what they miss is nothing."""
    q, k, _ = (x.repeat_interleave(6, 2) for x in operands(5, scale=2.0))
    v = operands(30, seed=1)[2]
    torch.testing.assert_close(nystrom(5, inverse="exact")(q, k, v), softmax(q, k, v), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(nystrom(5, iterations=30)(q, k, v), softmax(q, k, v), rtol=1e-9, atol=1e-10)


def test_weights_of_a_row_sum_to_one_when_the_inverse_has_converged():
    q, k, _ = operands(30)
    ones = torch.ones(2, 3, 30, 7, dtype=torch.float64)
    torch.testing.assert_close(nystrom(6, inverse="exact")(q, k, ones), ones, rtol=1e-9, atol=1e-9)
    assert relative(nystrom(6, iterations=1)(q, k, ones), ones) > 1e-2


def test_one_landmark_is_the_mean_query_for_all():
    q, k, v = operands(12)
    expected = softmax(q.mean(2, keepdim=True), k, v).expand(-1, -1, 12, -1)
    torch.testing.assert_close(nystrom(1)(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_stopping_early_is_better_than_the_exact_inverse_at_random_inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, 512, 64, generator=generator).double() for _ in range(3))
    errors = {
        inverse: relative(
            build("nystrom", heads=3, key_dim=64, value_dim=64, causal=False, landmarks=64, inverse=inverse)(q, k, v),
            softmax(q, k, v),
        )
        for inverse in ("iterative", "exact")
    }
    assert errors["iterative"] < 1
    assert errors["exact"] > 3 * errors["iterative"]


def test_iterations_depend_on_no_other_matrix():
    matrices = torch.softmax(torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(0)).double() * 3, -1)
    together = iterated_inverse(matrices, 6)
    alone = torch.stack([iterated_inverse(matrix, 6) for matrix in matrices])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


def test_the_inverse_of_a_matrix_of_rank_one_is_its_pseudo_inverse():
    flat = torch.full((4, 4), 0.25, dtype=torch.float64)
    torch.testing.assert_close(iterated_inverse(flat, 6), torch.linalg.pinv(flat))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(("length", "taps"), [(12, 3), (13, 5), (2, 7), (1, 1)])
def test_the_convolution_adds_each_heads_kernel_over_the_values(implementation, length, taps):
    q, k, v = operands(length)
    mechanism = nystrom(4, implementation, convolution=taps)
    added = mechanism(q, k, v) - nystrom(4, implementation)(q, k, v)
    expected = torch.zeros_like(added)
    for i in range(length):
        for tap in range(taps):
            j = i + tap - taps // 2
            if 0 <= j < length:
                expected[:, :, i] += mechanism.taps.double()[:, tap, None] * v[:, :, j]
    torch.testing.assert_close(added, expected, rtol=1e-11, atol=1e-12)


def test_gradients_with_a_convolution_are_those_of_finite_differences_and_reach_the_kernel():
    mechanism = nystrom(3, convolution=3).double()
    leaves = [operand[:1].requires_grad_() for operand in operands(7)]
    assert torch.autograd.gradcheck(mechanism, leaves)
    taps = dict(mechanism.named_parameters())["taps"]
    (fast,) = torch.autograd.grad(mechanism(*leaves).square().sum(), taps)
    (exact,) = torch.autograd.grad(mechanism.reference(*leaves).square().sum(), taps)
    torch.testing.assert_close(fast, exact, rtol=1e-11, atol=1e-12)
    assert fast.norm() > 0


def test_a_convolution_needs_an_odd_number_of_taps_and_as_many_keys_as_queries():
    with pytest.raises(UsageError, match=r"nystrom\.convolution=4"):
        nystrom(4, convolution=4)
    with pytest.raises(UsageError, match="as many keys as queries, got 9 and 8"):
        nystrom(4, convolution=3)(*operands(8, 9))


@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
def test_flops_are_those_of_its_products(pass_):
    cell = Cell(mechanism="nystrom", length=50, batch=2, heads=3, head_dim=5, value_dim=7, pass_=pass_)
    mechanism, leaves = nystrom(10), [operand.requires_grad_() for operand in operands(50)]
    with FlopCounterMode(display=False) as forward:
        output = mechanism(*leaves)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    # the products that are kept for the backward are counted as computed again; Z₀ has no gradient through a product
    logits_again = 2 * 6 * (2 * 50 * 10 + 100) * 5
    counted = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops() + logits_again}
    counted["forward_backward"] = sum(counted.values())
    assert mechanism.flops(cell) == counted[pass_]
