"""The two streaming passes against plain autograd: sums over keys, what queries make of them, and what broadcasts."""

import pytest
import torch

from linbench.mechanisms.cores import walks
from linbench.mechanisms.cores.streams import Keys, Queries, pool, read

BATCH, HEADS, LENGTH, WIDTH, COLUMNS = 2, 3, 53, 4, 5


def normal(*shape, seed=0, dtype=torch.float64):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


@pytest.fixture(params=[7, 40, 10**6], ids=["many slabs", "some slabs", "one slab"])
def slab_size(request, monkeypatch):
    """Tokens of a slab over all of its heads."""
    monkeypatch.setattr(walks, "slab_tokens", lambda width, device: request.param)
    return request.param


def assert_same(found, expected, leaves, limit=1e-11):
    """Results and their gradients towards numbers all different."""
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    toward = [torch.sin(1.0 + torch.arange(x.numel())).view(x.shape).to(x) for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
    grads = (torch.autograd.grad(x, leaves, toward, allow_unused=True) for x in (found, expected))
    for ours, theirs, leaf in zip(*grads, leaves, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(leaf) if theirs is None else theirs, rtol=limit, atol=limit)


def test_sums_are_those_over_all_keys(slab_size):
    k, v = normal(BATCH, HEADS, LENGTH, WIDTH), normal(BATCH, HEADS, LENGTH, COLUMNS, seed=1)
    sums = pool(lambda tokens, shared: Keys(tokens[0].exp(), tokens[1] ** 2), (k, v))
    expected = (k.exp().mT @ v**2, k.exp().sum(2), (v**2).sum(2))
    assert_same(tuple(sums), expected, (k, v))


def test_maps_share_tensors_per_head_and_their_gradients_add_up(slab_size):
    k, v, weight = (
        normal(BATCH, HEADS, LENGTH, WIDTH),
        normal(BATCH, HEADS, LENGTH, COLUMNS),
        normal(1, HEADS, WIDTH, 6),
    )
    shift = normal(BATCH, HEADS, 6, seed=2)

    def keys(tokens, shared):
        return Keys((tokens[0] @ shared[0] + shared[1][..., None, :]).tanh(), tokens[1])

    sums = pool(keys, (k, v), (weight, shift))
    features = (k @ weight + shift[:, :, None]).tanh()
    assert_same(tuple(sums), (features.mT @ v, features.sum(2), v.sum(2)), (k, v, weight, shift))


def test_tokens_of_one_batch_element_or_head_serve_all(slab_size):
    k = normal(BATCH, HEADS, LENGTH, WIDTH)
    place, v = normal(1, 1, LENGTH, WIDTH, seed=1), normal(BATCH, 1, LENGTH, COLUMNS, seed=2)

    def keys(tokens, shared):
        return Keys(tokens[0] * tokens[1], tokens[2].expand(*tokens[0].shape[:3], COLUMNS))

    sums = pool(keys, (k, place, v))
    wide = v.expand(BATCH, HEADS, LENGTH, COLUMNS)
    assert_same(tuple(sums), ((k * place).mT @ wide, (k * place).sum(2), wide.sum(2)), (k, place, v))


@pytest.mark.parametrize("per_channel", [False, True])
def test_ratios_of_sums_do_not_depend_on_log_scales_that_would_overflow(slab_size, per_channel):
    """Exponents from −3000 to 3000, rising and falling; a scale per feature, or one for all of a head."""
    k, v = normal(BATCH, HEADS, LENGTH, WIDTH), normal(BATCH, HEADS, LENGTH, COLUMNS, seed=1)
    slope = torch.linspace(-3000, 3000, LENGTH, dtype=torch.float64)
    slopes = torch.stack([slope, -slope, slope.flip(0).abs(), 0 * slope], -1) if per_channel else slope[:, None]

    def keys(tokens, shared):
        k, v, slopes = tokens
        exponents = k + slopes if per_channel else k.sum(-1, keepdim=True) + slopes
        level = exponents.detach().amax(-2)
        weights = (exponents - level[..., None, :]).exp()
        return Keys(weights if per_channel else weights * k.exp(), v, level)

    sums = pool(keys, (k, v, slopes.expand(1, 1, *slopes.shape)))
    weights = ((k if per_channel else k.sum(-1, keepdim=True)) + slopes).softmax(2)
    weights = weights if per_channel else weights * k.exp()
    expected = (weights.mT @ v) / weights.sum(2)[..., None]
    assert_same(sums.products / sums.features[..., None], expected, (k, v))


def test_values_without_columns_leave_the_sum_of_the_features(slab_size):
    k = normal(BATCH, HEADS, LENGTH, WIDTH)
    sums = pool(lambda tokens, shared: Keys(tokens[0].square(), tokens[0][..., :0]), (k,))
    assert sums.products.shape == (BATCH, HEADS, WIDTH, 0)
    assert_same(sums.features, k.square().sum(2), (k,))


def test_what_needs_no_gradient_gets_none(slab_size):
    k, v = normal(BATCH, HEADS, LENGTH, WIDTH).detach(), normal(BATCH, HEADS, LENGTH, COLUMNS)
    sums = pool(lambda tokens, shared: Keys(tokens[0], tokens[1]), (k, v))
    assert_same(sums.products, k.mT @ v, (v,))
    assert k.grad is None


@pytest.mark.parametrize("added", ["none", "per token", "per head"])
@pytest.mark.parametrize("factor", [False, True])
def test_queries_read_products_with_factor_and_addition(slab_size, factor, added):
    q, products = normal(BATCH, HEADS, LENGTH, WIDTH), normal(BATCH, HEADS, WIDTH, COLUMNS, seed=1)
    gate, shift = normal(BATCH, HEADS, LENGTH, COLUMNS, seed=2), normal(1, HEADS, 1, COLUMNS, seed=3)

    def queries(tokens, shared):
        addition = {"none": None, "per token": tokens[1].sin(), "per head": shared[0].sin()}[added]
        return Queries(tokens[0].exp(), tokens[1].square() if factor else None, addition)

    out = read(queries, (q, gate), products, (shift,), dtype=torch.float64)
    expected = q.exp() @ products
    expected = expected * gate.square() if factor else expected
    expected = expected + {"none": 0, "per token": gate.sin(), "per head": shift.sin()}[added]
    assert_same(out, expected, (q, gate, products, shift))


def test_a_pool_and_a_read_are_differentiated_together(slab_size):
    """A normalised attention, of more queries than keys: the sums take part in features and factors."""
    q, k, v = (normal(BATCH, HEADS, n, w, seed=n) for n, w in ((LENGTH, WIDTH), (31, WIDTH), (31, COLUMNS)))
    sums = pool(lambda tokens, shared: Keys(tokens[0].exp(), tokens[1]), (k, v))

    def queries(tokens, shared):
        features = tokens[0].exp()
        inverse = (features @ shared[0][..., None]).reciprocal()
        return Queries(features, inverse.expand(*features.shape[:3], COLUMNS))

    out = read(queries, (q,), sums.products, (sums.features,), dtype=torch.float64)
    weights = q.exp() @ k.exp().mT
    assert_same(out, weights @ v / weights.sum(-1, keepdim=True), (q, k, v))


def test_finite_differences_of_both(monkeypatch):
    monkeypatch.setattr(walks, "slab_tokens", lambda width, device: 2)
    q, k, v = (normal(1, 2, 3, width, seed=width) for width in (2, 2, 3))

    def both(q, k, v):
        products = pool(lambda tokens, shared: Keys(tokens[0].tanh(), tokens[1]), (k, v)).products
        return read(lambda tokens, shared: Queries(tokens[0].exp()), (q,), products, dtype=torch.float64)

    assert torch.autograd.gradcheck(both, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_summed_in_fp32_and_rounded_once(slab_size, dtype):
    q, k, v = (normal(BATCH, HEADS, LENGTH, width, dtype=dtype) for width in (WIDTH, WIDTH, COLUMNS))
    products = pool(lambda tokens, shared: Keys(*tokens), (k, v)).products
    assert products.dtype == torch.float32
    torch.testing.assert_close(products.double(), k.double().mT @ v.double(), rtol=1e-5, atol=1e-5)
    out = read(lambda tokens, shared: Queries(*tokens), (q,), products, dtype=dtype)
    exact = q.double() @ products.double()
    assert out.dtype == dtype
    assert (out - exact).norm() < 0.6 * torch.finfo(dtype).eps * exact.norm()
    assert [x.dtype for x in torch.autograd.grad(out.sum(), (q, k, v))] == [dtype] * 3


def test_slabs_cover_every_token_of_every_head_once():
    for batch, heads, length, at_most in ((1, 1, 1, 1), (2, 3, 53, 7), (5, 4, 2000, 3000), (3, 2, 10, 10**6)):
        seen = torch.zeros(batch, heads, length, 1)
        for slab in walks.slabs(batch, heads, length, at_most):
            slab.of_tokens(seen).add_(1)
            assert slab.of_tokens(seen).numel() <= at_most
        assert seen.eq(1).all()
