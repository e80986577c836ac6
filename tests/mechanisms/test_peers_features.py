"""Agreement with other people's feature maps: Based, Hedgehog and sketches, and where they are known to differ."""

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers
of_checkpoint = pytest.mark.filterwarnings(
    "ignore:torch.utils.checkpoint", "ignore:None of the inputs have requires_grad"
)


def draw(tokens=150, dtype=torch.float64, key_dim=12, value_dim=10):
    """B=2, H=3."""
    generator = torch.Generator().manual_seed(0)
    sizes = (key_dim, key_dim, value_dim)
    return [torch.randn(2, 3, tokens, size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def ours(name, causal=True, key_dim=12, value_dim=10, **hyperparameters):
    return build(name, heads=3, key_dim=key_dim, value_dim=value_dim, causal=causal, **hyperparameters)


def taylor_layer():
    """Based without a window and without projections: the layer that fla has."""
    return ours("based", window=0, feature_dim=None)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def feature_maps():
    return pytest.importorskip("fla.modules.feature_map", exc_type=ImportError)


@pytest.mark.parametrize(("form", "options"), [("naive_parallel_based", {}), ("naive_chunk_based", {"chunk_size": 30})])
def test_based_and_its_gradients_agree_with_fla(form, options):
    naive = pytest.importorskip("fla.ops.based.naive", exc_type=ImportError)
    leaves = [x.requires_grad_() for x in draw()]
    outputs = taylor_layer()(*leaves), getattr(naive, form)(*leaves, **options)
    # its ε of 10⁻⁶ stands beside a sum of weights, of which every one is ½ at least
    assert relative_error(*outputs) < 2e-6
    toward = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, expected in zip(*(torch.autograd.grad(out, leaves, toward) for out in outputs), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_weights_of_based_are_those_of_fla_before_they_are_normalised():
    naive = pytest.importorskip("fla.ops.based.naive", exc_type=ImportError)
    q, k, v = draw()
    features = taylor_layer().feature_map(q)
    weights = (features.features(q)[0] @ features.features(k)[0].mT).tril()
    torch.testing.assert_close(weights @ v, naive.naive_parallel_based(q, k, v, use_norm=False), rtol=1e-11, atol=1e-11)


def test_epsilon_of_based_in_fla_takes_from_every_row_and_ours_has_none():
    naive = pytest.importorskip("fla.ops.based.naive", exc_type=ImportError)
    q, k, v = draw()
    ones = torch.ones_like(v)
    torch.testing.assert_close(taylor_layer()(q, k, ones), ones, rtol=0, atol=1e-13)
    missing = 1 - naive.naive_parallel_based(q, k, ones)
    assert missing.min() > 0
    assert 1e-7 < missing[:, :, 0].max() < 2e-6


@of_checkpoint
def test_features_of_based_are_those_of_fla_in_another_order():
    q, k, _ = draw()
    theirs = feature_maps().TaylorFeatureMap(12)
    mine = taylor_layer().feature_map(q).features(q)[0]
    assert mine.shape[-1] == theirs(q).shape[-1] == 91
    torch.testing.assert_close(mine.sort(-1).values, theirs(q).sort(-1).values, rtol=1e-12, atol=1e-12)
    features = taylor_layer().feature_map(q)
    torch.testing.assert_close(
        features.features(q)[0] @ features.features(k)[0].mT, theirs(q) @ theirs(k).mT, rtol=1e-11, atol=1e-11
    )


def test_hedgehog_of_fla_has_one_softmax_over_both_halves_and_doubles_its_map():
    """Paper and LoLCATs take one of each half: theirs is ours of 2W, with the halves weighed by their exponentials."""
    x = draw()[0]
    peer, mechanism = feature_maps().HedgehogFeatureMap(12).double(), ours("hedgehog")
    peer.layer.weight.data = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mapped = x @ peer.layer.weight.mT
    features = mechanism.feature_map(x)
    theirs, mine = peer(x), features.features(mapped)[0]
    torch.testing.assert_close(theirs.sum(-1), torch.ones(2, 3, 150, dtype=torch.float64))
    torch.testing.assert_close(mine.sum(-1), 2 * torch.ones(2, 3, 150, dtype=torch.float64))
    assert relative_error(mine / 2, theirs) > 0.3
    positive, negative = ((sign * 2 * mapped).exp().sum(-1, keepdim=True) for sign in (1, -1))
    share = torch.cat((positive, negative), -1).repeat_interleave(12, -1) / (positive + negative)
    torch.testing.assert_close(features.features(2 * mapped)[0] * share, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_hedgehog_is_the_linear_attention_of_fla_on_the_features_of_the_paper(causal):
    naive = pytest.importorskip("fla.ops.linear_attn.naive", exc_type=ImportError)
    q, k, v = draw(dtype=torch.float32)
    mechanism = ours("hedgehog", causal)
    q_features, k_features = (torch.cat((x.softmax(-1), (-x).softmax(-1)), -1) for x in (q, k))
    if causal:
        tokens_first = [x.transpose(1, 2) for x in (q_features, k_features, v)]
        expected = naive.naive_recurrent_linear_attn(*tokens_first, normalize=True)[0].transpose(1, 2)
    else:
        sums = k_features.mT @ v
        expected = q_features @ sums / (q_features @ k_features.sum(2)[..., None])
    assert relative_error(mechanism(q, k, v), expected) < 1e-6


def sketches_of_fla(mechanism, monkeypatch):
    """Its learned sketch of degree 4, with our Gaussian matrices; its norm has only a kernel for GPUs."""
    module = feature_maps()
    monkeypatch.setattr(
        module, "layer_norm", lambda x, gamma, beta: torch.nn.functional.layer_norm(x, x.shape[-1:], gamma, beta)
    )
    peer = module.LearnablePolySketchNonNegativeFeatureMap(12, mechanism.sketch, degree=4).double()
    peer.sketches1[0].weight.data, peer.sketches2[0].weight.data = (matrix.mT for matrix in mechanism.buffers())
    return peer


@of_checkpoint
def test_polysketch_of_fla_counts_a_product_of_two_features_once_where_the_square_has_it_twice(monkeypatch):
    """What it takes the product of is our sketch, but for D in the place of r in the scale."""
    q, k, _ = draw()
    mechanism = ours("polysketch", sketch=7, block=0)
    peer = sketches_of_fla(mechanism, monkeypatch)
    x, y = mechanism.prepared(q, k)
    f, g = ((7 / 12) ** 0.5 * mechanism.half_power(z) for z in (x, y))
    square = (f @ g.mT).square()
    theirs = peer(q) @ peer(k).mT
    torch.testing.assert_close(theirs, (square + f.square() @ g.square().mT) / 2, rtol=1e-10, atol=1e-10)
    assert relative_error(theirs, square) > 0.1
    features = mechanism.feature_map(x)
    mine = features.features(x)[0] @ features.features(y)[0].mT
    torch.testing.assert_close((7 / 12) ** 2 * mine, square, rtol=1e-10, atol=1e-10)
