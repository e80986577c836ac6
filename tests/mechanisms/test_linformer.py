"""Linformer: its exact limits, what pooling is, and that the fast form is the formula."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.registry import build


def operands(length, key_length=None, dtype=torch.float64, seed=0):
    """B=2, H=3, D=5, M=7."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((length, 5), (key_length or length, 5), (key_length or length, 7))
    return [torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def linformer(rank, projection="pool", seed=0, implementation="torch"):
    return build(
        "linformer",
        heads=3,
        key_dim=5,
        value_dim=7,
        causal=False,
        seed=seed,
        implementation=implementation,
        rank=rank,
        projection=projection,
    )


def softmax(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def averages(x, blocks):
    """The oracle: a loop over the blocks, the first ones a token longer."""
    return torch.stack([block.mean(-2) for block in x.tensor_split(blocks, dim=-2)], dim=-2)


@pytest.mark.parametrize("projection", ["pool", "gaussian"])
@pytest.mark.parametrize(
    ("length", "key_length", "rank"), [(1, 1, 1), (1, 1, 4), (12, 12, 4), (13, 13, 4), (11, 11, 10), (7, 19, 6)]
)
def test_fast_form_is_the_formula(projection, length, key_length, rank):
    mechanism = linformer(rank, projection)
    leaves = [operand.requires_grad_() for operand in operands(length, key_length)]
    exact, fast = mechanism.reference(*leaves), mechanism(*leaves)
    torch.testing.assert_close(fast, exact, rtol=1e-12, atol=1e-12)
    toward = torch.randn_like(exact)
    for ours, theirs in zip(
        torch.autograd.grad(fast, leaves, toward), torch.autograd.grad(exact, leaves, toward), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("projection", ["pool", "gaussian"])
def test_gradients_are_those_of_finite_differences(projection):
    leaves = [operand[:1, :2].requires_grad_() for operand in operands(7)]
    assert torch.autograd.gradcheck(linformer(3, projection), leaves)


@pytest.mark.parametrize("rank", [11, 12, 256])
def test_rank_of_the_length_or_more_is_exact_softmax(rank):
    q, k, v = operands(11)
    torch.testing.assert_close(linformer(rank)(q, k, v), softmax(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 12])
def test_pooling_is_attention_over_averaged_keys_and_values(rank):
    q, k, v = operands(12)
    expected = softmax(q, averages(k, rank), averages(v, rank))
    for implementation in ("reference", "torch"):
        output = linformer(rank, implementation=implementation)(q, k, v)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_rank_one_is_the_mean_of_the_values():
    q, k, v = operands(11)
    torch.testing.assert_close(linformer(1)(q, k, v), v.mean(-2, keepdim=True).expand(-1, -1, 11, -1))


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_pooled_weights_of_a_row_sum_to_one(rank):
    q, k, _ = operands(11)
    ones = torch.ones(2, 3, 11, 7, dtype=torch.float64)
    torch.testing.assert_close(linformer(rank)(q, k, ones), ones)


def test_chosen_rows_are_rows_of_the_whole():
    q, k, v = operands(12)
    rows = torch.tensor([11, 0, 5])
    mechanism = linformer(5)
    torch.testing.assert_close(mechanism.reference(q, k, v, rows), mechanism.reference(q, k, v)[..., rows, :])


def test_tokens_may_change_places_within_a_block():
    q, k, v = operands(12)
    order = torch.tensor([2, 0, 1, 4, 3, 5, 8, 7, 6, 9, 11, 10])
    mechanism = linformer(4)
    torch.testing.assert_close(mechanism(q, k[..., order, :], v[..., order, :]), mechanism(q, k, v))


def test_error_falls_with_the_rank_on_smooth_inputs():
    """A few sinusoids times random loadings, as in a signal that varies slowly with the position."""
    generator = torch.Generator().manual_seed(3)
    phase = torch.arange(512, dtype=torch.float64)[:, None] / 512 * torch.arange(1, 4) * 2 * torch.pi
    waves = torch.cat((phase.sin(), phase.cos()), dim=-1)
    q, k, v = (waves @ torch.randn(1, 3, 6, width, generator=generator).double() for width in (5, 5, 7))
    exact = softmax(q, k, v)
    errors = [((linformer(rank)(q, k, v) - exact).norm() / exact.norm()).item() for rank in (16, 32, 64, 128)]
    # the mean over a block misses the curvature inside it, which falls with the square of the block
    assert all(after < before / 2 for before, after in pairwise(errors))
    assert errors[-1] < 1e-2


def test_gaussian_entries_have_variance_one_over_rank_and_follow_the_seed():
    k = torch.zeros(1, 1, 500, 5, dtype=torch.float64)
    drawn = linformer(40, "gaussian", seed=1).matrix(k)
    assert drawn.shape == (40, 500)
    assert abs(drawn.var().item() * 40 - 1) < 0.05
    assert torch.equal(drawn, linformer(40, "gaussian", seed=1).matrix(k))
    assert not torch.equal(drawn, linformer(40, "gaussian", seed=2).matrix(k))


def test_one_mechanism_serves_several_lengths_and_dtypes():
    mechanism = linformer(4, "gaussian")
    for length, dtype in ((9, torch.float64), (12, torch.float64), (12, torch.float32), (9, torch.float64)):
        q, k, v = operands(length, dtype=dtype)
        assert mechanism(q, k, v).dtype == dtype
        torch.testing.assert_close(mechanism(q, k, v), mechanism.reference(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_narrow_dtypes_is_of_their_rounding(dtype):
    q, k, v = operands(33, dtype=dtype)
    mechanism = linformer(8)
    exact = mechanism.reference(q.double(), k.double(), v.double())
    assert (mechanism(q, k, v).double() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps


def test_strided_operands_give_the_same():
    q, k, v = (operand.transpose(1, 2).contiguous().transpose(1, 2) for operand in operands(9))
    for projection in ("pool", "gaussian"):
        mechanism = linformer(4, projection)
        torch.testing.assert_close(mechanism(q, k, v), mechanism(*operands(9)))


def test_there_is_no_causal_form():
    cell = Cell(mechanism="linformer", length=8, causal=True)
    assert linformer(4).unsupported(cell) == "linformer has no causal form"
    assert linformer(4).unsupported(cell.model_copy(update={"causal": False})) is None


def test_hyperparameters_out_of_range_are_named():
    with pytest.raises(UsageError, match=r"linformer\.rank=0"):
        linformer(0)
    with pytest.raises(UsageError, match=r"linformer\.projection=max"):
        linformer(4, "max")


@pytest.mark.parametrize("projection", ["pool", "gaussian"])
@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
def test_flops_are_those_of_its_products(projection, pass_):
    cell = Cell(mechanism="linformer", length=12, batch=2, heads=3, head_dim=5, value_dim=7, pass_=pass_)
    leaves = [operand.requires_grad_() for operand in operands(12)]
    tokens = 2 * 3 * 12
    mechanism = linformer(4, projection, implementation="reference")
    with FlopCounterMode(display=False) as forward:
        output = mechanism(*leaves)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    logits_again = 2 * tokens * 4 * 5
    counted = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops() + logits_again}
    counted["forward_backward"] = sum(counted.values())
    # the reference pools by a product of 2·rank operations a number, where one addition is enough
    passes = 2 if pass_ == "forward_backward" else 1
    saved = passes * tokens * (5 + 7) * (2 * 4 - 1) if projection == "pool" else 0
    assert mechanism.flops(cell) == counted[pass_] - saved
