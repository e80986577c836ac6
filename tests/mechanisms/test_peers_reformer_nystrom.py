"""Agreement with other people's Reformer and Nyströmformer, and where they are known to differ."""

from unittest.mock import patch

import pytest
import torch

from linbench.registry import build

pytestmark = pytest.mark.peers


def draw(tokens, dtype=torch.float64, count=3, width=6):
    """B=2, H=3, D=M."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def ours(name, causal=False, width=6, **hyperparameters):
    return build(name, heads=3, key_dim=width, value_dim=width, causal=causal, **hyperparameters)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def hidden(*heads):
    """``[B, H, N, D]`` -> ``[B, N, H·D]``, beside each other."""
    return torch.cat([x.transpose(1, 2).flatten(2) for x in heads], -1)


def in_heads(x):
    return x.unflatten(-1, (3, -1)).transpose(1, 2)


class Part(torch.nn.Module):
    """In the place of a projection: one of the parts that lie beside each other."""

    def __init__(self, index, parts):
        super().__init__()
        self.index, self.parts = index, parts

    def forward(self, x):
        return x.chunk(self.parts, -1)[self.index]


def assert_same_gradients(ours, theirs, operands, tolerance):
    leaves = [x.detach().requires_grad_() for x in operands]
    outputs = ours(*leaves), theirs(*leaves)
    assert relative_error(*outputs) < tolerance
    toward = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=outputs[0].dtype)
    for found, expected in zip(*(torch.autograd.grad(out, leaves, toward) for out in outputs), strict=True):
        assert relative_error(found, expected) < tolerance


def shared(mechanism):
    """Of queries that are keys."""
    return lambda q, v: mechanism(q, q, v)


def rotating(mechanism, tokens):
    """A context in which a peer hashes with our rotations, broadcast to the shape that it asks for."""
    rounds = mechanism.rotations(tokens, torch.device("cpu"))
    R = torch.stack([torch.cat(factors[::-1], -1) for factors in rounds], 1)[None]
    return patch.object(torch, "randn", lambda shape, dtype=None, **_: R.to(dtype).expand(shape))


def reformer_pytorch(tokens, causal=False, rounds=1, chunk=4, **options):
    """Ours with as many buckets as chunks, which is what LSHAttention has, and that: its queries undo its D^-1/2."""
    package = pytest.importorskip("reformer_pytorch.reformer_pytorch", exc_type=ImportError)
    mechanism = ours("reformer", causal, rounds=rounds, chunk=chunk)
    mechanism.factors = lambda length: (length // chunk,)
    peer = package.LSHAttention(bucket_size=chunk, n_hashes=rounds, causal=causal, **options).eval()

    def theirs(q, v):
        with rotating(mechanism, tokens):
            out = peer((q * q.shape[-1] ** 0.5).flatten(0, 1), v.flatten(0, 1))[0]
        return out.view_as(v)

    return mechanism, theirs


def transformers_reformer(tokens, causal=False, rounds=1, chunk=4):
    """LSHSelfAttention without its linear layers. Its first factor of buckets is our last."""
    package = pytest.importorskip("transformers.models.reformer.modeling_reformer", exc_type=ImportError)
    mechanism = ours("reformer", causal, rounds=rounds, chunk=chunk)
    config = package.ReformerConfig(
        hidden_size=18,
        num_attention_heads=3,
        attention_head_size=6,
        num_hashes=rounds,
        num_buckets=list(mechanism.factors(tokens)[::-1]) or 2,
        lsh_attn_chunk_length=chunk,
        is_decoder=causal,
    )
    peer = package.LSHSelfAttention(config).eval()
    peer.query_key, peer.value = Part(0, 2), Part(1, 2)
    if not mechanism.factors(tokens):  # any hash will do where two chunks see everything
        mechanism.rotations(tokens, torch.device("cpu"))[:] = [[axis] for axis in torch.eye(6)[:rounds, :, None]]

    def theirs(q, v):
        with rotating(mechanism, tokens):
            return in_heads(peer(hidden(q, v)).hidden_states)

    return mechanism, theirs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "chunk"), [(48, 4), (240, 8)])
def test_one_round_and_its_gradients_agree_with_reformer_pytorch(tokens, chunk, causal):
    """Its keys have length one, where ours and those of the paper's code are shorter by 10⁻⁶·D of their square."""
    mechanism, theirs = reformer_pytorch(tokens, causal, chunk=chunk)
    assert_same_gradients(shared(mechanism), theirs, draw(tokens, count=2), 1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "chunk", "factors"), [(48, 4, (16,)), (320, 4, (8, 16)), (6, 6, ())])
def test_one_round_and_its_gradients_agree_with_transformers(tokens, chunk, factors, causal):
    mechanism, theirs = transformers_reformer(tokens, causal, chunk=chunk)
    assert mechanism.factors(tokens) == factors
    assert_same_gradients(shared(mechanism), theirs, draw(tokens, count=2), 1e-6)  # its −1e5 and −1e9 are fp32


@pytest.mark.parametrize("causal", [False, True])
def test_the_target_is_full_attention_of_reformer_pytorch_without_its_scale(causal):
    package = pytest.importorskip("reformer_pytorch.reformer_pytorch", exc_type=ImportError)
    q, v = draw(50, count=2)
    peer, target = package.FullQKAttention(causal=causal), ours("reformer", causal).target(q, q, v)
    unscaled, scaled = (peer(x.flatten(0, 1), v.flatten(0, 1))[0].view_as(v) for x in (q * 6**0.5, q))
    assert relative_error(unscaled, target) < 1e-5
    assert relative_error(scaled, target) > 0.1


def test_reformer_pytorch_scales_by_the_root_of_the_width_and_transformers_does_not():
    (mechanism, theirs), (same, transformers) = reformer_pytorch(48), transformers_reformer(48)
    q, v = draw(48, count=2)
    assert relative_error(theirs(q / 6**0.5, v), mechanism(q, q, v)) > 0.1
    assert relative_error(transformers(q, v), same(q, q, v)) < 1e-6


def test_reformer_pytorch_has_half_as_many_buckets_as_the_paper():
    mechanism = ours("reformer", chunk=4)
    asked, drawn, (q, v) = [], torch.randn, draw(64, count=2)
    peer = pytest.importorskip("reformer_pytorch.reformer_pytorch", exc_type=ImportError).LSHAttention(bucket_size=4)
    with patch.object(torch, "randn", lambda shape, **options: asked.append(shape) or drawn(shape, **options)):
        peer(q[0], v[0])
    assert asked == [(1, 6, 8, 16 // 2)]
    assert mechanism.factors(64) == (2 * 16,)


@pytest.mark.parametrize("make", [reformer_pytorch, transformers_reformer])
def test_a_first_chunk_of_theirs_looks_into_another_round_so_that_several_rounds_are_not_exact(make):
    """Two chunks cover all tokens, and ours are exact in any number of rounds; theirs in one only."""
    q, v = draw(16, count=2)
    for rounds in (1, 3):
        mechanism, theirs = make(16, rounds=rounds, chunk=8)
        target = mechanism.target(q, q, v)
        assert relative_error(mechanism(q, q, v), target) < 1e-12
        assert (relative_error(theirs(q, v), target) < 1e-4) == (rounds == 1)
    assert relative_error(theirs(q, v), target) > 0.05


@pytest.mark.parametrize("make", [reformer_pytorch, transformers_reformer])
def test_causal_keys_of_the_future_change_what_is_seen_in_theirs_as_in_ours_and_values_do_not(make):
    mechanism, theirs = make(96, causal=True)
    q, v = draw(96, count=2)
    other_q, other_v = q.clone(), v.clone()
    other_q[:, :, 64:], other_v[:, :, 64:] = q[:, :, 64:].roll(1, -1), 100 * v[:, :, 64:]
    for attend in (shared(mechanism), theirs):
        before = attend(q, v)[:, :, :64]
        torch.testing.assert_close(attend(q, other_v)[:, :, :64], before, rtol=1e-12, atol=1e-12)
        assert relative_error(attend(other_q, v)[:, :, :64], before) > 0.05


def test_counts_of_reformer_pytorch_miss_the_pairs_between_rounds():
    """Told not to count pairs twice, it divides those by 10⁻⁹: more rounds have more of them, and are worse."""
    q, v = draw(128, count=2)
    errors, elsewhere = {}, {}
    for duplicates in (True, False):
        for rounds in (2, 16):
            mechanism, theirs = reformer_pytorch(128, rounds=rounds, chunk=8, allow_duplicate_attention=duplicates)
            out, target = theirs(q, v), mechanism.target(q, q, v)
            errors[duplicates, rounds] = relative_error(out, target)
            places = torch.stack(mechanism.orders(q)).argsort(-1).view(rounds, 2, 3, 128)
            kept = (places >= 8).all(0)  # never in the first chunk of a round
            elsewhere[duplicates, rounds] = relative_error(out[kept], target[kept])
    assert errors[True, 16] < 0.6 * errors[True, 2]
    assert errors[False, 16] > 1.5 * errors[False, 2]
    assert elsewhere[False, 16] < 0.6 * elsewhere[False, 2]


def nystrom_attention(landmarks, **options):
    """NystromAttention without its linear layers."""
    package = pytest.importorskip("nystrom_attention.nystrom_attention", exc_type=ImportError)
    options = {"residual": False, **options}
    peer = package.NystromAttention(18, dim_head=6, heads=3, num_landmarks=landmarks, **options).double().eval()
    peer.to_qkv = peer.to_out = torch.nn.Identity()
    return peer, lambda q, k, v: in_heads(peer(hidden(q, k, v)))


def nystromformer(landmarks, tokens, taps=0):
    """NystromformerSelfAttention without its linear layers; without its convolution for no taps."""
    package = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer", exc_type=ImportError)
    config = package.NystromformerConfig(
        hidden_size=18,
        num_attention_heads=3,
        num_landmarks=landmarks,
        segment_means_seq_len=tokens,
        conv_kernel_size=taps or 1,  # its configuration refuses the None that its code looks for
    )
    peer = package.NystromformerSelfAttention(config).double().eval()
    peer.conv_kernel_size = taps or None
    peer.query, peer.key, peer.value = (Part(index, 3) for index in range(3))
    return peer, lambda q, k, v: in_heads(peer(hidden(q, k, v))[0])


def norms_of_their_own(monkeypatch):
    """Makes nystrom-attention invert every matrix as if it were alone."""
    package = pytest.importorskip("nystrom_attention.nystrom_attention", exc_type=ImportError)
    invert = package.moore_penrose_iter_pinv

    def alone(x, iters):
        matrices = [invert(matrix[None, None], iters) for matrix in x.flatten(0, 1)]
        return torch.cat(matrices).view_as(x)

    monkeypatch.setattr(package, "moore_penrose_iter_pinv", alone)


@pytest.mark.parametrize("iterations", [0, 6])
def test_nystrom_and_its_gradients_agree_with_nystrom_attention_once_norms_are_those_of_each_matrix(
    iterations, monkeypatch
):
    norms_of_their_own(monkeypatch)
    _, theirs = nystrom_attention(8, pinv_iterations=iterations)
    mechanism = ours("nystrom", landmarks=8, iterations=iterations)
    assert_same_gradients(mechanism, theirs, draw(56), 1e-10)


def test_nystrom_and_its_gradients_agree_with_transformers_once_norms_are_those_of_each_matrix():
    """Its option for that cannot be set: the constructor reads another name, of a configuration that has no items."""
    peer, theirs = nystromformer(8, 56)
    package = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer", exc_type=ImportError)
    with pytest.raises(TypeError, match="not subscriptable"):
        package.NystromformerSelfAttention(package.NystromformerConfig(inv_coeff_init_option=True))
    peer.init_option = "exact"
    assert_same_gradients(ours("nystrom", landmarks=8), theirs, draw(56), 1e-10)


def test_the_convolution_is_that_of_nystrom_attention_and_transformers(monkeypatch):
    norms_of_their_own(monkeypatch)
    mechanism = ours("nystrom", landmarks=8, convolution=5)
    one, lucidrains = nystrom_attention(8, residual=True, residual_conv_kernel=5)
    two, transformers = nystromformer(8, 56, taps=5)
    two.init_option = "exact"
    for convolution in (one.res_conv, two.conv):
        convolution.weight.data = mechanism.taps.data.double()[:, None, :, None]
    q, k, v = draw(56)
    for theirs in (lucidrains, transformers):
        torch.testing.assert_close(theirs(q, k, v), mechanism(q, k, v), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: nystrom_attention(8), lambda: nystromformer(8, 56)])
def test_another_head_or_sequence_changes_the_result_of_theirs_and_not_of_ours(make):
    """They start the inverse of every matrix from the largest norm of all."""
    mechanism, (_, theirs) = ours("nystrom", landmarks=8), make()
    q, k, v = draw(56)
    for other in ((0, 2), (1, 0)):
        sharper = q.clone()
        sharper[other] *= 10
        assert relative_error(theirs(sharper, k, v)[0, 0], theirs(q, k, v)[0, 0]) > 1e-3
        torch.testing.assert_close(mechanism(sharper, k, v)[0, 0], mechanism(q, k, v)[0, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("make", [lambda: nystrom_attention(16), lambda: nystromformer(16, 96)])
def test_norms_of_each_matrix_converge_sooner(make):
    """Against the inverse itself, after as many iterations, where matrices differ in their norms."""
    q, k, v = draw(96)
    q = q * torch.tensor([0.5, 1, 8], dtype=torch.float64)[:, None, None]
    exact = ours("nystrom", landmarks=16, inverse="exact")(q, k, v)
    mine, theirs = ours("nystrom", landmarks=16)(q, k, v), make()[1](q, k, v)
    assert relative_error(mine[:, 0], exact[:, 0]) < relative_error(theirs[:, 0], exact[:, 0])


def test_transformers_replaces_the_operator_by_softmax_where_every_token_is_a_landmark():
    """Which hides that six iterations have not converged: the operator itself is not softmax yet."""
    q, k, v = draw(40)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative_error(nystromformer(40, 40)[1](q, k, v), exact) < 1e-12
    for operator in (nystrom_attention(40)[1], ours("nystrom", landmarks=40)):
        assert relative_error(operator(q, k, v), exact) > 1e-2


def test_nystrom_attention_fills_up_with_tokens_of_zeros_that_take_part():
    """Where landmarks do not divide the length; our first segments are one token longer instead."""
    q, k, v = draw(50)
    ones = torch.ones_like(v)
    complete = nystrom_attention(8, pinv_iterations=30)[1](q[:, :, :48], k[:, :, :48], ones[:, :, :48])
    torch.testing.assert_close(complete, ones[:, :, :48], rtol=0, atol=1e-6)
    filled = nystrom_attention(8, pinv_iterations=30)[1](q, k, ones)
    assert (filled - ones).abs().mean() > 1e-2
    torch.testing.assert_close(ours("nystrom", landmarks=8, iterations=30)(q, k, ones), ones, rtol=0, atol=1e-6)
