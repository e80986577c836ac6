"""PolySketchFormer (2310.01655): its weights pair by pair, the law of its sketches, its blocks, and their state."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build


def draw(tokens=37, keys=None, *, batch=2, heads=3, key_dim=5, value_dim=7):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64) for size in sizes]


def polysketch(causal, implementation="torch", *, key_dim=5, value_dim=7, seed=0, **hyperparameters):
    geometry = {"heads": 3, "key_dim": key_dim, "value_dim": value_dim, "causal": causal, "seed": seed}
    settings = {"sketch": 4, "block": 8, **hyperparameters}
    return build("polysketch", **geometry, implementation=implementation, **settings)


def normed(x):
    """Without mean, and of variance one."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def sketched(x, mechanism):
    """f(x), feature by feature: the product of two projections, or of those of two such sketches."""
    matrices = [m for name, m in sorted(mechanism.named_buffers())]

    def pair(x, y, left, right):
        columns = [(x @ left[:, r]) * (y @ right[:, r]) / left.shape[1] ** 0.5 for r in range(left.shape[1])]
        return torch.stack(columns, -1)

    if mechanism.power == 2:
        return x
    if mechanism.power == 4:
        return pair(x, x, *matrices)
    return pair(pair(x, x, *matrices[:2]), pair(x, x, *matrices[2:4]), *matrices[4:])


def oracle(q, k, v, mechanism):
    """Algorithm 1 pair by pair."""
    x, y, block = normed(q), normed(k), mechanism.block
    q_sketch, k_sketch = sketched(x, mechanism), sketched(y, mechanism)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[2]):
        total = torch.ones(q.shape[:2], dtype=torch.float64)
        for j in range(i + 1 if mechanism.causal else k.shape[2]):
            if block and i // block == j // block:
                weight = (x[:, :, i] * y[:, :, j]).sum(-1) ** mechanism.power
            else:
                weight = (q_sketch[:, :, i] * k_sketch[:, :, j]).sum(-1) ** 2
            total = total + weight
            out[:, :, i] += weight[..., None] * v[:, :, j]
        out[:, :, i] /= total[..., None]
    return out


def implied(mechanism, q, k):
    """The matrix of normalised weights."""
    keys = k.shape[2]
    return mechanism(q, k, torch.eye(keys, dtype=q.dtype).expand(*q.shape[:2], keys, keys))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("power", "block"), [(4, 8), (4, 0), (4, 37), (8, 8), (8, 0), (2, 8), (2, 0)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_is_that_of_the_weights_of_the_paper(implementation, power, block, causal):
    q, k, v = draw()
    mechanism = polysketch(causal, implementation, power=power, block=block)
    torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("block", [0, 8, 64])
def test_more_keys_than_queries_and_the_reverse(implementation, block):
    for tokens, keys in ((4, 19), (19, 4)):
        q, k, v = draw(tokens, keys)
        mechanism = polysketch(False, implementation, block=block)
        torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("power", "block"), [(4, 4), (4, 0), (8, 4), (8, 0), (2, 4)])
def test_gradients_are_those_of_the_weights_of_the_paper(power, block, causal):
    leaves = [x.requires_grad_() for x in draw(11)]
    mechanism = polysketch(causal, power=power, block=block)
    toward = torch.randn(2, 3, 11, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(mechanism(*leaves), leaves, toward)
    expected = torch.autograd.grad(oracle(*leaves, mechanism), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def estimates(x, y, draws, sketch, power):
    """⟨f(x), f(y)⟩ of as many seeds."""
    found = []
    for seed in range(draws):
        mechanism = polysketch(False, key_dim=len(x), seed=seed, sketch=sketch, power=power)
        found.append(mechanism.half_power(x) @ mechanism.half_power(y))
    return torch.stack(found)


def test_sketches_of_degree_two_are_unbiased_and_their_squares_too_large_by_the_variance():
    """E (x·g)²(y·g)² = ‖x‖²‖y‖² + 2 (x·y)² for each of the two factors of a feature."""
    x, y = torch.tensor([0.5, -0.3, 0.8, 0.1]).double(), torch.tensor([0.7, 0.4, 0.6, 0.3]).double()
    product = x @ y
    variance = (((x @ x) * (y @ y) + 2 * product**2) ** 2 - product**4).item() / 8
    values = estimates(x, y, 4000, 8, 4)
    assert values.mean().item() == pytest.approx(product.item() ** 2, abs=4 * (variance / 4000) ** 0.5)
    assert values.var().item() == pytest.approx(variance, rel=0.2)
    assert values.square().mean().item() == pytest.approx(product.item() ** 4 + variance, rel=0.2)


def test_sketches_of_degree_four_are_unbiased():
    x, y = torch.tensor([0.5, -0.3, 0.8, 0.1]).double(), torch.tensor([0.7, 0.4, 0.6, 0.3]).double()
    values = estimates(x, y, 4000, 8, 8)
    error = values.std().item() / 4000**0.5
    assert values.mean().item() == pytest.approx((x @ y).item() ** 4, abs=4 * error)
    assert error < 0.2 * (x @ y).item() ** 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [0, 8])
def test_no_weight_is_negative_and_the_one_takes_what_they_leave(block, causal):
    q, k, _ = draw()
    weights = implied(polysketch(causal, block=block, value_dim=37), q, k)
    assert weights.min() > -1e-15
    left = 1 - weights.sum(-1)
    assert left.min() > 0
    exact = 1 / (1 + ((normed(q) @ normed(k).mT) ** 4)[:, :, 0, 0])
    if causal and block:
        torch.testing.assert_close(left[:, :, 0], exact)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("power", [4, 8])
def test_a_block_of_all_tokens_is_polynomial_attention(causal, power):
    q, k, v = draw(70)
    weights = (normed(q) @ normed(k).mT) ** power
    weights = weights.tril() if causal else weights
    expected = weights @ v / (1 + weights.sum(-1, keepdim=True))
    for block in (70, 71, 1000):
        mechanism = polysketch(causal, power=power, block=block)
        torch.testing.assert_close(mechanism(q, k, v), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mechanism.target(q, k, v), expected)
    torch.testing.assert_close(mechanism.target(q, k, v, torch.tensor([69, 0, 8])), expected[:, :, [69, 0, 8]])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [0, 8])
def test_the_square_needs_no_sketch(block, causal):
    q, k, v = draw(70)
    mechanism = polysketch(causal, power=2, block=block)
    assert not list(mechanism.buffers())
    torch.testing.assert_close(mechanism(q, k, v), mechanism.target(q, k, v), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_scale_and_mean_of_a_vector_do_not_matter(causal):
    """Up to the 10⁻⁵ that the norm adds to the variance."""
    q, k, v = draw()
    factors = torch.linspace(1e3, 1e4, 37, dtype=torch.float64)[:, None]
    mechanism = polysketch(causal)
    found = mechanism(q * factors + 3, k * factors.flip(0) - 7, v)
    torch.testing.assert_close(found, mechanism(1e3 * q, 1e3 * k, v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_a_query_without_variation_attends_to_nothing(implementation, causal):
    q, k, v = draw()
    q[:, :, 9], k[:, :, 3] = 2.5, 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = polysketch(causal, implementation)(*leaves)
    assert out[:, :, 9].eq(0).all()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[2][:, :, 3].eq(0).all()


def test_one_token_keeps_the_share_of_its_own_power():
    q, k, v = draw(1)
    weight = (normed(q) * normed(k)).sum(-1, keepdim=True) ** 4
    for causal in (False, True):
        torch.testing.assert_close(polysketch(causal)(q, k, v), weight / (1 + weight) * v)


@pytest.mark.parametrize(("power", "block"), [(4, 8), (4, 0), (4, 1), (4, 64), (8, 8), (2, 8)])
def test_decoding_sketches_a_block_when_it_is_full(power, block):
    q, k, v = draw()
    mechanism = polysketch(True, power=power, block=block)
    width = 5 if power == 2 else 4
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for t in range(37):
        out, state = mechanism.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        outputs.append(out)
        if block:
            assert state.filled == (t + 1) % block
            assert state.sums.eq(0).all() == (t + 1 < block)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v), rtol=1e-10, atol=1e-11)
    held = (state.sums, state.keys, state.values) if block else (state.state,)
    assert held[0].shape == (2, 3, width * (width + 1) // 2, 7 + 1)
    assert mechanism.state_bytes(37, torch.float64) == sum(x.nbytes for x in held) // 2
    assert mechanism.state_bytes(37, torch.bfloat16) == sum(x.nbytes for x in held) // 4
    assert polysketch(False, power=power, block=block).state_bytes(37, torch.float32) is None


@pytest.mark.parametrize("power", [4, 8])
def test_matrices_are_fixed_by_the_seed_and_the_same_in_both_forms(power):
    one, same, other = (
        list(polysketch(c, power=power, seed=s).buffers()) for c, s in ((False, 0), (True, 0), (False, 1))
    )
    assert [tuple(m.shape) for m in one] == [(5, 4)] * (power // 2) + [(4, 4)] * (2 if power == 8 else 0)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def test_defaults_are_those_of_the_paper():
    mechanism = build("polysketch", heads=3, key_dim=64, value_dim=64, causal=True)
    assert (mechanism.sketch, mechanism.power, mechanism.block) == (32, 4, 256)
    assert mechanism.features == 32 * 33 // 2
    assert mechanism.exact_limit(500).hyperparameters == {"block": 500}


@pytest.mark.parametrize("bad", [{"sketch": 0}, {"sketch": 513}, {"power": 6}, {"block": -1}])
def test_bad_hyperparameters_are_refused(bad):
    with pytest.raises(UsageError, match=rf"polysketch\.{next(iter(bad))}"):
        polysketch(False, **bad)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_the_causal_form_needs_as_many_keys_as_queries(implementation):
    q, k, v = draw(8)
    with pytest.raises(UsageError, match="8 queries and 7 keys"):
        polysketch(True, implementation)(q, k[:, :, :7], v[:, :, :7])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [0, 16])
def test_flops_are_those_of_its_products(block, causal):
    """Run besides: scans over states between chunks, and sketches once more for every core that needs them again.

    Not run: gradients of the column of ones in the values of the causal form.
    """
    cell = Cell(mechanism="polysketch", length=128, batch=2, heads=3, head_dim=5, value_dim=7, causal=causal)
    mechanism, leaves = polysketch(causal, block=block), [x.requires_grad_() for x in draw(128)]
    features, columns, sketches, chunk = 10, 8, 4 * 2 * 5 * 4, block or 64
    forward = backward = 0
    if causal:
        scan = 2 * (128 // chunk + 1) ** 2 * features * columns
        forward, backward = scan, 128 * (sketches - 2 * features - 2 * chunk) + 2 * scan
    elif block:
        forward, backward = 128 * sketches, 128 * (3 * sketches + 2 * block * columns)  # a segment runs again
    else:
        backward = 128 * sketches
    products, _ = counted_flops(lambda begin: (begin(), mechanism(*leaves)))
    assert products == mechanism.flops(cell) + 6 * forward
    out = mechanism(*leaves)
    products, _ = counted_flops(lambda begin: out.sum().backward())
    assert products == mechanism.flops(cell.model_copy(update={"pass_": "backward"})) + 6 * backward
