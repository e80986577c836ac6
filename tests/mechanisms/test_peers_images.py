"""Agreement with other people's Efficient Attention, and where they differ. Of RALA and FLatten there is no package."""

import warnings

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers


def draw(tokens=192, keys=None, *, key_dim=16, value_dim=16):
    torch.manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    return [torch.randn(2, 4, *size, dtype=torch.float64).requires_grad_() for size in sizes]


def ours(q, v, causal=False):
    return build("efficient", heads=4, key_dim=q.shape[-1], value_dim=v.shape[-1], causal=causal)


def imported(name):
    with warnings.catch_warnings():  # distutils, torch.cuda.amp and the like
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def assert_same(found, expected, leaves):
    toward = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    grads = (torch.autograd.grad(side, leaves, toward) for side in (found, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_efficient_is_linear_attn_of_linear_attention_transformer_without_its_scale():
    """It divides queries by √D after their softmax, so that its rows sum to D^-1/2."""
    peer = imported("linear_attention_transformer.linear_attention_transformer")
    q, k, v = draw()
    assert_same(ours(q, v)(q, k, v), peer.linear_attn(q, k, v) * 16**0.5, (q, k, v))


def test_efficient_is_performer_pytorch_without_projection():
    """Both softmaxes, then linear attention, whose normaliser is one: the softmax of the keys sums to one."""
    peer = imported("performer_pytorch.performer_pytorch")
    q, k, v = draw(50, 80, value_dim=24)
    attend = peer.FastAttention(16, no_projection=True).double()
    assert_same(ours(q, v)(q, k, v), attend(q, k, v), (q, k, v))


def test_the_causal_form_of_linear_attention_transformer_divides_by_one_sum_for_all_channels():
    """Its rows sum to one as well, and are others: a channel of large keys has more weight in all of them."""
    peer = imported("linear_attention_transformer.linear_attention_transformer")
    q, k, v = (x.detach() for x in draw())
    theirs = peer.causal_linear_attn(q.clone(), k.clone(), v.clone(), bucket_size=1)
    shared = (q.softmax(-1) @ k.exp().mT).tril()
    torch.testing.assert_close(theirs, shared @ v / shared.sum(-1, keepdim=True), rtol=1e-10, atol=1e-11)
    mine = ours(q, v, causal=True)(q, k, v)
    assert (theirs - mine).norm() > 0.05 * mine.norm()
