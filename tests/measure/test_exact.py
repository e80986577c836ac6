"""Exact attention: equal to the formula, whatever the blocks, and never larger than it must be."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from linbench.measure.exact import CUDA_BLOCKS, Blocks, exact_attention, same_dtype_attention


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small, and on a busy machine a second thread is waited for longer than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_qkv(length, dtype=torch.float64, *, batch=2, heads=3, head_dim=7, value_dim=5, scale=1.0):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, heads, length, head_dim, generator=generator) * scale
    k = torch.randn(batch, heads, length, head_dim, generator=generator) * scale
    v = torch.randn(batch, heads, length, value_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def naive_attention(q, k, v, causal):
    """The formula in numpy's fp64, matrix and all."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        logits[..., np.triu_indices(q.shape[2], 1)[0], np.triu_indices(q.shape[2], 1)[1]] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True) @ v)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 61, 700])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_formula_in_fp64_on_the_inputs_as_rounded(causal, length, dtype):
    q, k, v = random_qkv(length, dtype)
    result = exact_attention(q, k, v, causal)
    assert result.dtype is torch.float64
    torch.testing.assert_close(result, naive_attention(q, k, v, causal), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "blocks", [Blocks(1, 1, 1), Blocks(7, 13, 91), Blocks(13, 7, 1000), Blocks(89, 11, 1 << 20), CUDA_BLOCKS]
)
def test_block_sizes_do_not_matter(causal, blocks):
    q, k, v = random_qkv(89)
    expected = exact_attention(q, k, v, causal)
    torch.testing.assert_close(exact_attention(q, k, v, causal, blocks=blocks), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [[0], [88], [3, 4, 50], [60, 2, 2, 17]])
def test_rows_are_those_rows_of_the_whole(causal, rows):
    q, k, v = random_qkv(89)
    whole = exact_attention(q, k, v, causal)
    part = exact_attention(q, k, v, causal, torch.tensor(rows), blocks=Blocks(2, 10, 60))
    torch.testing.assert_close(part, whole[:, :, rows], rtol=1e-12, atol=1e-14)


def test_causal_rows_ignore_what_comes_later():
    q, k, v = random_qkv(53)
    before = exact_attention(q, k, v, True)
    k[:, :, 31:], v[:, :, 31:] = 100.0, -100.0
    assert torch.equal(exact_attention(q, k, v, True)[:, :, :31], before[:, :, :31])


def test_keys_may_outnumber_queries_when_not_causal():
    q, k, v = random_qkv(41)
    torch.testing.assert_close(exact_attention(q[:, :, :9], k, v, False), exact_attention(q, k, v, False)[:, :, :9])


@pytest.mark.parametrize("causal", [False, True])
def test_huge_logits_do_not_overflow(causal):
    q, k, v = random_qkv(45, scale=100.0)
    expected = naive_attention(q, k, v, causal)
    torch.testing.assert_close(exact_attention(q, k, v, causal), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-21)]
)
def test_same_dtype_attention_errs_as_much_as_torchs_own(causal, dtype, precision):
    q, k, v = random_qkv(600, dtype, head_dim=32, value_dim=32)
    truth = exact_attention(q, k, v, causal)
    ours = (same_dtype_attention(q, k, v, causal).double() - truth).norm() / truth.norm()
    torchs = (F.scaled_dot_product_attention(q, k, v, is_causal=causal).double() - truth).norm() / truth.norm()
    assert 0 < ours < precision
    # block sizes and orders of summation differ, the roundings are the same
    assert ours / torchs == pytest.approx(1, abs=0.7 if dtype is torch.float32 else 0.1)


def test_same_dtype_attention_in_fp64_is_the_truth():
    q, k, v = random_qkv(57)
    assert torch.equal(same_dtype_attention(q, k, v, True), exact_attention(q, k, v, True))


def test_no_matrix_of_rows_times_keys_is_formed():
    q, k, v = random_qkv(20_011, torch.bfloat16, batch=1, heads=2)
    rows = torch.arange(0, 20_011, 40)
    with LargestTensor() as largest:
        exact_attention(q, k, v, False, rows)
    assert largest.elements <= max(q.numel(), 256 * 512)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("causal", [False, True])
def test_a_gpu_gives_the_same(causal):
    q, k, v = random_qkv(3001, torch.bfloat16, head_dim=64)
    result = exact_attention(q.cuda(), k.cuda(), v.cuda(), causal).cpu()
    torch.testing.assert_close(result, exact_attention(q, k, v, causal), rtol=1e-11, atol=1e-12)
