"""Agreement with other people's linear attention, Performer and retention, and where they are known to differ."""

import types
import warnings

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers


def draw(dtype, heads=4, tokens=192, key_dim=16, value_dim=24):
    torch.manual_seed(0)
    return [torch.randn(2, heads, tokens, width, dtype=dtype) for width in (key_dim, key_dim, value_dim)]


def ours(name, q, v, causal, **hyperparameters):
    return build(name, heads=q.shape[1], key_dim=q.shape[-1], value_dim=v.shape[-1], causal=causal, **hyperparameters)


def sequence_first(function):
    """Call a function of ``[B, N, H, ·]`` tensors, fla's layout, with ``[B, H, N, ·]``."""
    return lambda *x, **options: function(*(y.transpose(1, 2) for y in x), **options).transpose(1, 2)


def fast_attention(**options):
    with warnings.catch_warnings():  # distutils, torch.cuda.amp and the like
        warnings.simplefilter("ignore")
        module = pytest.importorskip("performer_pytorch.performer_pytorch", exc_type=ImportError)
        return module.FastAttention(**options).double()


@pytest.mark.parametrize("form", ["naive_recurrent_linear_attn", "naive_chunk_linear_attn"])
def test_linear_agrees_with_fla(form):
    naive = pytest.importorskip("fla.ops.linear_attn.naive", exc_type=ImportError)
    q, k, v = draw(torch.float32)

    def normalised(q, k, v):
        out = getattr(naive, form)(torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v, normalize=True)
        return out[0] if isinstance(out, tuple) else out

    expected = sequence_first(normalised)(q, k, v)
    assert (ours("linear", q, v, True)(q, k, v) - expected).norm() < 1e-6 * expected.norm()


def test_retnet_agrees_with_fla():
    naive = pytest.importorskip("fla.ops.retention.naive", exc_type=ImportError)
    q, k, v = draw(torch.float32)
    expected = naive.naive_retention(q, k, v)
    assert (ours("retnet", q, v, True)(q, k, v) - expected).norm() < 1e-6 * expected.norm()


def test_naive_retention_of_fla_overflows_where_ours_does_not():
    """It raises γ to the negative powers above the diagonal too, and masks by a product: ∞ · 0 from 2,800 tokens on."""
    naive = pytest.importorskip("fla.ops.retention.naive", exc_type=ImportError)
    q, k, v = draw(torch.float32, heads=1, tokens=2900, key_dim=4, value_dim=3)
    assert naive.naive_retention(q, k, v).isnan().any()
    retention = ours("retnet", q, v, True)
    exact = retention.reference(q.double(), k.double(), v.double())
    assert (retention(q, k, v) - exact).norm() < 1e-6 * exact.norm()


def test_retnet_agrees_with_torchscale_after_the_norm_that_follows():
    """Its score normalisers (eq. 7) divide a whole row, and the norm of every head divides them away again."""
    module = pytest.importorskip("torchscale.component.multiscale_retention", exc_type=ImportError)
    q, k, v = draw(torch.float64)
    heads, tokens, value_dim = v.shape[1:]
    options = types.SimpleNamespace(multiway=False, layernorm_eps=0.0)
    peer = module.MultiScaleRetention(options, heads * q.shape[-1], heads * value_dim, heads)
    token = torch.arange(tokens)
    gamma = 1 - torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64))
    mask = gamma[:, None, None] ** (token[:, None] - token).clamp(min=0) * (token[:, None] >= token)
    mask = mask / mask.sum(-1, keepdim=True).sqrt()
    values = v.transpose(1, 2).reshape(len(v), tokens, heads * value_dim)
    theirs = peer.parallel_forward(q, k * peer.scaling, values, mask)
    mine = ours("retnet", q, v, True)(q, k, v).transpose(1, 2)
    assert not torch.allclose(mine, theirs)
    torch.testing.assert_close(peer.group_norm(mine), peer.group_norm(theirs), rtol=1e-6, atol=1e-6)  # it norms in fp32


def without_epsilon(attention, q, k, v):
    """performer-pytorch's non-causal operator, with its own feature function at ε = 0."""
    from performer_pytorch.performer_pytorch import linear_attention, softmax_kernel

    options = {"projection_matrix": attention.projection_matrix, "eps": 0.0}
    return linear_attention(
        softmax_kernel(q, is_query=True, **options), softmax_kernel(k, is_query=False, **options), v
    )


def test_performer_agrees_with_performer_pytorch_for_the_same_projection():
    q, k, v = draw(torch.float64)
    attention, mechanism = fast_attention(dim_heads=16, nb_features=64), ours("performer", q, v, False, features=64)
    attention.projection_matrix.copy_(mechanism.projection)
    torch.testing.assert_close(mechanism(q, k, v), without_epsilon(attention, q, k, v), rtol=1e-10, atol=1e-12)
    # with its default ε = 1e-4 added to every feature the peer is another operator
    default = attention(q, k, v)
    assert (default - mechanism(q, k, v)).norm() > 1e-2 * default.norm()


def test_performer_pytorch_lets_the_future_into_the_past_and_we_do_not():
    q, k, v = draw(torch.float64)
    attention, mechanism = (
        fast_attention(dim_heads=16, nb_features=64, causal=True),
        ours("performer", q, v, True, features=64),
    )
    attention.projection_matrix.copy_(mechanism.projection)
    before, peer_before = mechanism(q, k, v), attention(q, k, v)
    k[:, :, -1] *= 4
    assert torch.equal(mechanism(q, k, v)[:, :, :-1], before[:, :, :-1])
    change = (attention(q, k, v) - peer_before)[:, :, :-1].norm() / peer_before[:, :, :-1].norm()
    assert change > 1e-3
