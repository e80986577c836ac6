"""Agreement with the authors' package of Galerkin and Fourier attention, and what its dropout does in evaluation."""

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers

HEADS, WIDTH = 3, 8


def attention(kind, *, coordinates=0, dropout=False):
    """Their layer in evaluation, with norms as if learned; its dropout taken out, or at a rate of 0."""
    layers = pytest.importorskip("galerkin_transformer.layers")
    torch.manual_seed(0)
    options = {"pos_dim": coordinates, "attention_type": kind, "norm": True, "xavier_init": 1.0, "dropout": 0.0}
    peer = layers.SimpleAttention(HEADS, HEADS * WIDTH, **options).eval().double()
    if not dropout:
        peer.dropout = None
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.startswith("norm"):
                parameter.normal_()
    return peer


def ours(kind, peer, **hyperparameters):
    """With their norms."""
    mechanism = build(kind, heads=HEADS, key_dim=WIDTH, value_dim=WIDTH, causal=False, **hyperparameters)
    others = ("key", "value") if kind == "galerkin" else ("key", "query")
    for name in others:
        theirs, norm = getattr(peer, f"norm_{name[0].upper()}"), getattr(mechanism, f"{name}_norm")
        norm.weight.data = torch.stack([one.weight.detach() for one in theirs])
        norm.bias.data = torch.stack([one.bias.detach() for one in theirs])
    return mechanism


def operands(peer, x):
    """``[B, N, H·D]`` through their projections: q, k and v of every head."""
    return [layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in peer.linears]


def columns(x):
    """``[B, H, N, ·]`` -> ``[B, N, H·]``."""
    return x.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["galerkin", "fourier"])
@pytest.mark.parametrize("length", [1, 40, 1000])
def test_output_and_gradients_without_dropout(length, kind):
    peer = attention(kind)
    mechanism, x = ours(kind, peer), torch.randn(2, length, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    expected = peer(x, x, x)[0]
    scale = 1 if kind == "galerkin" else WIDTH**-0.5  # their scores have 1/√D
    found = columns(mechanism(*operands(peer, x))) * scale
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    toward = torch.randn_like(expected)
    gradients = (torch.autograd.grad(side, x, toward)[0] for side in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["galerkin", "fourier"])
def test_their_layer_on_columns_of_coordinates_is_a_map_of_ours(kind):
    """Their layer maps H(p + D) columns: ours with a part of that map for the coordinates, and then the rest."""
    peer = attention(kind, coordinates=2)
    mechanism, x = ours(kind, peer, coordinates=2), torch.randn(2, 40, HEADS * WIDTH, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    mechanism.coordinate_map.data = torch.randn(HEADS, 2, WIDTH, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 40, 2, dtype=torch.float64)
    rest = torch.randn(HEADS, WIDTH, HEADS * WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        behind = mechanism.coordinate_map @ rest
        peer.fc.weight.copy_(torch.cat((behind, rest), 1).flatten(0, 1).mT)
        expected = peer(x, x, x, pos=points)[0] - peer.fc.bias
        meshes = dict.fromkeys(("query_coordinates", "key_coordinates"), points[:, None])
        found = columns(mechanism(*operands(peer, x), **meshes)) @ rest.flatten(0, 1)
    scale = 1 if kind == "galerkin" else (WIDTH + 2) ** -0.5
    torch.testing.assert_close(found * scale, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["galerkin", "fourier"])
def test_their_dropout_drops_half_even_at_rate_zero_in_evaluation(kind):
    peer, x = attention(kind, dropout=True), torch.randn(2, 40, HEADS * WIDTH, dtype=torch.float64)
    assert not peer.training
    assert peer.dropout.p == 0
    first, second = (peer(x, x, x)[0] for _ in range(2))
    assert ((first - second).norm() / second.norm()).item() > 0.5
    assert peer(x, x, x)[1].eq(0).float().mean().item() == pytest.approx(0.5, abs=0.1)
