"""Longformer: the visible pairs, its exact limits, and that the blocks compute what a mask would."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.cores import banded
from linbench.registry import build

# (N, window, global_tokens, dilation): blocks of 64 queries begin, end and straddle what they can
SHAPES = [
    (1, 0, 0, 1),
    (1, 4, 2, 1),
    (64, 16, 0, 1),
    (65, 2, 1, 1),
    (130, 64, 3, 1),
    (200, 128, 0, 1),
    (97, 600, 5, 1),
    (90, 32, 90, 1),
    (70, 8, 100, 1),
    (150, 20, 0, 3),
    (190, 20, 5, 2),
    (3, 4, 0, 5),
]


def operands(length, dtype=torch.float64, seed=0):
    """B=2, H=3, D=5, M=7."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, width, generator=generator, dtype=torch.float64).to(dtype) for width in (5, 5, 7)]


def longformer(causal, window, global_tokens=0, dilation=1, implementation="torch"):
    return build(
        "longformer",
        heads=3,
        key_dim=5,
        value_dim=7,
        causal=causal,
        implementation=implementation,
        window=window,
        global_tokens=global_tokens,
        dilation=dilation,
    )


def seen(length, causal, window, global_tokens, dilation):
    """The oracle: the definition, pair by pair."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1 if causal else length):
            near = abs(i - j) <= dilation * (window // 2) and (i - j) % dilation == 0
            mask[i, j] = near or i < global_tokens or j < global_tokens
    return mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window", "global_tokens", "dilation"), SHAPES)
def test_both_forms_are_masked_attention_with_its_gradients(causal, length, window, global_tokens, dilation):
    mask = seen(length, causal, window, global_tokens, dilation)
    leaves = [operand.requires_grad_() for operand in operands(length)]
    expected = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    toward = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, toward)
    for implementation in ("reference", "torch"):
        output = longformer(causal, window, global_tokens, dilation, implementation)(*leaves)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(output, leaves, toward), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(0, 80), st.integers(0, 9), st.integers(1, 4), st.booleans())
def test_blocks_are_the_reference_for_any_sizes(length, one_side, global_tokens, dilation, causal):
    mechanism = longformer(causal, 2 * one_side, global_tokens, dilation)
    q, k, v = operands(length)
    torch.testing.assert_close(mechanism(q, k, v), mechanism.reference(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("right", [0, 10])
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("length", [1, 70, 131])
def test_the_fused_form_is_the_form_in_blocks(right, shared, length):
    """The form for accelerators, run here."""
    band = banded.Band(10, right)
    flat = [operand.flatten(0, 1).requires_grad_() for operand in operands(length + shared)]
    operand = banded.Operands(*(x[:, shared:] for x in flat), *(x[:, :shared] for x in flat[1:]))
    in_blocks = banded._BlockAttention.apply(band, *operand)
    fused = banded.fused_banded_attention(operand, band, rows=32)
    torch.testing.assert_close(fused, in_blocks, rtol=1e-12, atol=1e-12)
    toward = torch.randn_like(fused)
    for ours, theirs in zip(
        torch.autograd.grad(fused, flat, toward), torch.autograd.grad(in_blocks, flat, toward), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_finite_differences(causal, monkeypatch):
    monkeypatch.setattr(banded, "CPU_ROWS", 3)
    monkeypatch.setattr(banded, "CPU_BLOCK_ELEMENTS", 20)  # one or two heads at a time
    leaves = [operand[:1, :2].requires_grad_() for operand in operands(8)]
    assert torch.autograd.gradcheck(longformer(causal, 4, global_tokens=1), leaves)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [2 * 99, 512])
def test_a_window_over_everything_is_exact_softmax(causal, window):
    q, k, v = operands(100)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(longformer(causal, window)(q, k, v), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_all_tokens_global_is_exact_softmax(causal):
    q, k, v = operands(100)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(longformer(causal, 2, 100)(q, k, v), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_an_empty_window_returns_the_values(causal):
    q, k, v = operands(100)
    torch.testing.assert_close(longformer(causal, 0)(q, k, v), v, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_keys_and_values_outside_the_band_change_nothing(implementation):
    q, k, v = operands(200)
    mechanism = longformer(False, 20, implementation=implementation)
    before = mechanism(q, k, v)
    k[..., 120, :] *= -3
    v[..., 120, :] = 1e6
    changed = (mechanism(q, k, v) != before).any(-1).any(0).any(0).nonzero().flatten()
    assert changed.tolist() == list(range(110, 131))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(("global_tokens", "dilation"), [(0, 1), (4, 1), (3, 2)])
def test_the_future_changes_nothing(implementation, global_tokens, dilation):
    q, k, v = operands(150)
    mechanism = longformer(True, 40, global_tokens, dilation, implementation)
    before = mechanism(q, k, v)[..., :99, :]
    for operand in (q, k, v):
        operand[..., 99:, :] *= -3
    assert torch.equal(mechanism(q, k, v)[..., :99, :], before)


@pytest.mark.parametrize("causal", [False, True])
def test_weights_of_a_row_sum_to_one(causal):
    q, k, _ = operands(150)
    ones = torch.ones(2, 3, 150, 7, dtype=torch.float64)
    torch.testing.assert_close(longformer(causal, 40, 3)(q, k, ones), ones)


@pytest.mark.parametrize("causal", [False, True])
def test_chosen_rows_are_rows_of_the_whole(causal):
    q, k, v = operands(90)
    rows = torch.tensor([89, 0, 41])
    mechanism = longformer(causal, 10, 1)
    torch.testing.assert_close(mechanism.reference(q, k, v, rows), mechanism.reference(q, k, v)[..., rows, :])


def test_error_falls_with_the_window_where_attention_is_local():
    """Keys and queries on a slow spiral: the logit falls with the distance of the positions."""
    angle = torch.arange(300, dtype=torch.float64) / 20
    place = 6 * torch.stack((angle.cos(), angle.sin(), angle, -angle, angle * 0), dim=-1)
    q = k = place.expand(2, 3, 300, 5) - torch.tensor([0, 0, 7.5, -7.5, 0])
    k = k + torch.cat((torch.zeros(300, 4), -k[0, 0].square().sum(-1, keepdim=True) / 2), dim=-1)
    q = q + torch.tensor([0, 0, 0, 0, 1.0])
    v = operands(300)[2]
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = [(longformer(False, window)(q, k, v) - exact).norm() / exact.norm() for window in (2, 8, 16, 32)]
    assert all(after < before / 2 for before, after in pairwise(errors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_narrow_dtypes_is_of_their_rounding(dtype):
    q, k, v = (operand.requires_grad_() for operand in operands(130, dtype))
    mechanism = longformer(True, 40, 3)
    wide = [operand.detach().double().requires_grad_() for operand in (q, k, v)]
    exact, narrow = mechanism.reference(*wide), mechanism(q, k, v)
    assert narrow.dtype == dtype
    assert (narrow.double() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps
    exact.sum().backward()
    narrow.sum().backward()
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < 4 * torch.finfo(dtype).eps


def test_strided_operands_give_the_same():
    q, k, v = (operand.transpose(1, 2).contiguous().transpose(1, 2) for operand in operands(100))
    for mechanism in (longformer(True, 20, 2), longformer(False, 20, 0, 2)):
        torch.testing.assert_close(mechanism(q, k, v), mechanism(*operands(100)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window", "global_tokens", "dilation"), SHAPES)
def test_flops_count_the_visible_pairs(causal, length, window, global_tokens, dilation):
    pairs = seen(length, causal, window, global_tokens, dilation).sum().item()
    mechanism = longformer(causal, window, global_tokens, dilation)
    cell = Cell(mechanism="longformer", length=length, batch=2, heads=3, head_dim=5, value_dim=7, causal=causal)
    assert mechanism.flops(cell) == 2 * 2 * 3 * pairs * (5 + 7)


def test_products_of_the_blocks_are_the_band_and_its_corners():
    """Away from the ends a block of 64 computes window + 64 keys a row, where window + 1 are visible."""
    lengths = (1024, 2048)
    counts = []
    for length in lengths:
        q, k, v = operands(length, torch.float32)
        with FlopCounterMode(display=False) as counter:
            longformer(False, 256)(q, k, v)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 2 * 3 * (lengths[1] - lengths[0]) * (256 + 64) * (5 + 7)


def test_the_state_is_a_ring_of_half_the_window():
    assert longformer(True, 64, 3).state_bytes(1000, torch.float32) == 3 * (32 + 3) * (5 + 7) * 4
    assert longformer(True, 64, 3).state_bytes(10, torch.float32) == 3 * 10 * (5 + 7) * 4
    assert longformer(False, 64).state_bytes(10, torch.float32) is None


def test_what_a_band_cannot_be_is_named():
    with pytest.raises(UsageError, match=r"longformer\.window=3"):
        longformer(False, 3)
    q, k, v = operands(9)
    with pytest.raises(UsageError, match="as many keys as queries"):
        longformer(False, 4)(q[..., :8, :], k, v)
