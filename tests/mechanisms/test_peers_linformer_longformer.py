"""Agreement with the packages that people use: PyPI linformer, and Longformer of transformers."""

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers

HEADS, WIDTH = 3, 8
TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # both sides in float32


def heads(x):
    """``[B, N, H·D]`` -> ``[B, H, N, D]``."""
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def tokens(x):
    """``[B, H, N, D]`` -> ``[B, N, H·D]``."""
    return x.transpose(1, 2).flatten(2)


def ours(name, **hyperparameters):
    return build(name, heads=HEADS, key_dim=WIDTH, value_dim=WIDTH, causal=False, **hyperparameters)


@pytest.mark.parametrize("length", [1, 40, 50])
def test_linformer_of_pypi_with_the_same_projection(length):
    linformer = pytest.importorskip("linformer")
    torch.manual_seed(0)
    peer = linformer.LinformerSelfAttention(HEADS * WIDTH, seq_len=50, k=10, heads=HEADS)
    mechanism = ours("linformer", rank=10, projection="gaussian")
    x = torch.randn(2, length, HEADS * WIDTH)
    E = mechanism.matrix(heads(x))
    with torch.no_grad():
        peer.proj_k.zero_()[:length] = E.mT
        peer.proj_v.zero_()[:length] = E.mT
    expected = peer(x)
    output = peer.to_out(tokens(mechanism(heads(peer.to_q(x)), heads(peer.to_k(x)), heads(peer.to_v(x)))))
    torch.testing.assert_close(output, expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("global_tokens", [0, 3])
def test_longformer_of_transformers(global_tokens):
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    torch.manual_seed(0)
    config = longformer.LongformerConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        attention_window=[16],
        attention_probs_dropout_prob=0.0,
    )
    peer = longformer.LongformerSelfAttention(config, layer_id=0).eval()
    for local, whole in ((peer.query, peer.query_global), (peer.key, peer.key_global), (peer.value, peer.value_global)):
        whole.load_state_dict(local.state_dict())
    x = torch.randn(2, 64, HEADS * WIDTH, requires_grad=True)
    is_global = (torch.arange(64) < global_tokens).expand(2, 64)
    expected = peer(
        x,
        attention_mask=is_global * 10000.0,
        is_index_masked=torch.zeros(2, 64, dtype=torch.bool),
        is_index_global_attn=is_global,
        is_global_attn=global_tokens > 0,
    )[0]
    mechanism = ours("longformer", window=16, global_tokens=global_tokens)
    output = tokens(mechanism(heads(peer.query(x)), heads(peer.key(x)), heads(peer.value(x))))
    torch.testing.assert_close(output, expected, **TOLERANCE)
    toward = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(side, x, toward)[0] for side in (output, expected)), **TOLERANCE)
