"""Exact softmax attention: its identities, and that all implementations are the same operator."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linbench.cell import Cell
from linbench.conformance.counting import peak_bytes
from linbench.errors import UsageError
from linbench.measure.exact import same_dtype_attention
from linbench.mechanisms.softmax import attend
from linbench.registry import build

IMPLEMENTATIONS = ("reference", "torch", "math")


def operands(length, key_length=None, dtype=torch.float64, seed=0):
    """B=2, H=3, D=5, M=7."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((length, 5), (key_length or length, 5), (key_length or length, 7))
    return [torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def softmax(causal=False, implementation="torch", key_dim=5, value_dim=7):
    return build("softmax", heads=3, key_dim=key_dim, value_dim=value_dim, causal=causal, implementation=implementation)


def one_query_at_a_time(q, k, v, causal):
    """The oracle: scalar weights, no matrix product."""
    output = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    shift = k.shape[-2] - q.shape[-2]
    for i in range(q.shape[-2]):
        seen = min(k.shape[-2], i + shift + 1) if causal else k.shape[-2]
        if seen > 0:
            weights = ((q[..., i : i + 1, :] * k[..., :seen, :]).sum(-1) / math.sqrt(q.shape[-1])).exp()
            output[..., i, :] = (weights[..., None] * v[..., :seen, :]).sum(-2) / weights.sum(-1, keepdim=True)
    return output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "key_length"), [(1, 1), (11, 11), (6, 13), (13, 6), (1, 9)])
def test_every_implementation_is_the_formula_with_the_last_query_on_the_last_key(
    implementation, causal, length, key_length
):
    q, k, v = operands(length, key_length)
    output = softmax(causal, implementation)(q, k, v)
    torch.testing.assert_close(output, one_query_at_a_time(q, k, v, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "key_length"), [(9, 9), (4, 7), (7, 4)])
def test_gradients_are_those_of_finite_differences(implementation, causal, length, key_length):
    leaves = [operand[:1, :2].requires_grad_() for operand in operands(length, key_length)]
    assert torch.autograd.gradcheck(softmax(causal, implementation), leaves)


@pytest.mark.parametrize("causal", [False, True])
def test_chosen_rows_are_rows_of_the_whole(causal):
    q, k, v = operands(12)
    rows = torch.tensor([11, 0, 5])
    mechanism = softmax(causal)
    whole = mechanism.reference(q, k, v)
    torch.testing.assert_close(mechanism.reference(q, k, v, rows), whole[..., rows, :], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_future_changes_nothing(implementation):
    q, k, v = operands(14)
    mechanism = softmax(causal=True, implementation=implementation)
    before = mechanism(q, k, v)[..., :9, :]
    for operand in (q, k, v):
        operand[..., 9:, :] *= -3
    assert torch.equal(mechanism(q, k, v)[..., :9, :], before)


def test_weights_of_a_row_sum_to_one():
    q, k, _ = operands(10)
    torch.testing.assert_close(softmax(True)(q, k, torch.ones(2, 3, 10, 7).double()), torch.ones(2, 3, 10, 7).double())


def test_the_order_of_keys_does_not_matter_and_that_of_queries_is_kept():
    q, k, v = operands(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    mechanism = softmax()
    torch.testing.assert_close(mechanism(q, k[..., order, :], v[..., order, :]), mechanism(q, k, v))
    torch.testing.assert_close(mechanism(q[..., order, :], k, v), mechanism(q, k, v)[..., order, :])


def test_a_constant_added_to_the_logits_of_a_row_changes_nothing():
    q, k, v = operands(10)
    shifted = k + torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(softmax()(q, shifted, v), softmax()(q, k, v), rtol=1e-12, atol=1e-12)


def test_two_halves_of_the_keys_merge_by_their_log_sums():
    q, k, v = operands(10)
    parts = [(k[..., :4, :], v[..., :4, :]), (k[..., 4:, :], v[..., 4:, :])]
    log_sums = torch.stack([(q @ keys.mT / math.sqrt(5)).logsumexp(-1, keepdim=True) for keys, _ in parts])
    outputs = torch.stack([softmax()(q, *part) for part in parts])
    merged = (log_sums.softmax(0) * outputs).sum(0)
    torch.testing.assert_close(merged, softmax()(q, k, v), rtol=1e-12, atol=1e-12)


def test_huge_logits_stay_finite():
    q, k, v = operands(10, dtype=torch.float32)
    for implementation in IMPLEMENTATIONS:
        assert softmax(True, implementation)(q * 1e3, k * 1e3, v).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_narrow_dtypes_is_of_their_rounding(dtype):
    q, k, v = operands(33, dtype=dtype)
    exact = softmax(True).reference(q.double(), k.double(), v.double())
    error = (softmax(True)(q, k, v).double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_strided_operands_give_the_same():
    q, k, v = (operand.transpose(1, 2).contiguous().transpose(1, 2) for operand in operands(9))
    assert not q.is_contiguous()
    torch.testing.assert_close(softmax(True)(q, k, v), softmax(True)(*operands(9)))


def counted(function, *leaves):
    with FlopCounterMode(display=False) as counter:
        function(*leaves)
    return counter.get_total_flops()


def test_forward_flops_are_those_of_its_products():
    cell = Cell(mechanism="softmax", length=11, batch=2, heads=3, head_dim=5, value_dim=7)
    assert softmax().flops(cell) == counted(softmax(implementation="reference"), *operands(11))


def test_backward_flops_are_those_of_its_products_and_the_logits_again():
    cell = Cell(mechanism="softmax", length=11, batch=2, heads=3, head_dim=5, value_dim=7, pass_="backward")
    leaves = [operand.requires_grad_() for operand in operands(11)]
    output = softmax(implementation="reference")(*leaves)
    counted_backward = counted(lambda: output.sum().backward())
    assert softmax().flops(cell) == counted_backward + 2 * 2 * 3 * 11 * 11 * 5


def test_causal_flops_are_those_of_the_visible_pairs():
    flops = {
        causal: softmax(causal).flops(Cell(mechanism="softmax", length=11, head_dim=5, value_dim=7, causal=causal))
        for causal in (False, True)
    }
    assert flops[True] * 121 == flops[False] * 66


def test_the_state_is_the_cache_of_keys_and_values():
    assert softmax(causal=True).state_bytes(11, torch.bfloat16) == 3 * 11 * (5 + 7) * 2
    assert softmax(causal=False).state_bytes(11, torch.bfloat16) is None


@pytest.mark.parametrize("value_dim", [64, 24])
@pytest.mark.parametrize("implementation", ["reference", "torch", "math"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_step_errs_no_more_than_exact_attention_in_the_same_dtype(dtype, implementation, value_dim):
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, 3, 301, w, generator=generator, dtype=torch.float64) for w in (64, 64, value_dim))
    q, k, v = ((4 * q).to(dtype), k.to(dtype), v.to(dtype))
    mechanism = build("softmax", heads=3, key_dim=64, value_dim=value_dim, causal=True, implementation=implementation)
    _, state = mechanism.prefill(*(x[:, :, :300] for x in (q, k, v)))
    out, _ = mechanism.step(*(x[:, :, 300] for x in (q, k, v)), state)
    truth = attend(q[:, :, 300:].double(), k.double(), v.double()).squeeze(2)
    yardstick = same_dtype_attention(q[:, :, 300:], k, v, False).squeeze(2)
    assert out.dtype is dtype
    assert (out.double() - truth).norm() <= 1.5 * (yardstick.double() - truth).norm() + 1e-15 * truth.norm()


def test_a_step_reads_the_cache_where_it_lies():
    """One row is written; no copy of the keys and values is made, in whatever dtype."""
    q, k, v = (torch.ones(1, 2, 1000, 32, dtype=torch.bfloat16) for _ in range(3))
    mechanism = build("softmax", heads=2, key_dim=32, value_dim=32, causal=True, implementation="torch")
    _, state = mechanism.prefill(q, k, v)
    row = [x[:, :, 0] for x in (q, k, v)]
    mechanism.step(*row, state)
    assert peak_bytes(lambda: mechanism.step(*row, state), "cpu") < k.nbytes / 2


def test_a_prefill_needs_as_many_queries_as_keys():
    q, k, v = operands(9)
    with pytest.raises(UsageError, match="8 queries and 9 keys"):
        softmax(True).prefill(q[:, :, :8], k, v)
