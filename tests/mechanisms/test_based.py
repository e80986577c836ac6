"""Based (2402.18668): its weights pair by pair, the orders of its polynomial, and how window and past share a row."""

import math

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


def based(causal, implementation="torch", *, key_dim=5, value_dim=7, seed=0, learned=True, **hyperparameters):
    """With projections as if they had been learned: those of queries and of keys differ."""
    geometry = {"heads": 3, "key_dim": key_dim, "value_dim": value_dim, "causal": causal, "seed": seed}
    settings = {"feature_dim": 3, "window": 6, **hyperparameters}
    mechanism = build("based", **geometry, implementation=implementation, **settings)
    if learned and mechanism.key_projection is not None:
        shape, generator = mechanism.key_projection.shape, torch.Generator().manual_seed(5)
        mechanism.key_projection.data += 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return mechanism


def oracle(q, k, v, mechanism):
    """An exponential or a polynomial for every pair, and one normaliser."""
    x, y = q, k
    if mechanism.query_projection is not None:
        x = torch.einsum("bhnd,hde->bhne", q, mechanism.query_projection)
        y = torch.einsum("bhnd,hde->bhne", k, mechanism.key_projection)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[2]):
        total = torch.zeros(q.shape[:2], dtype=torch.float64)
        for j in range(i + 1 if mechanism.causal else k.shape[2]):
            if abs(i - j) < mechanism.window:
                weight = ((q[:, :, i] * k[:, :, j]).sum(-1) / q.shape[-1] ** 0.5).exp()
            else:
                u = (x[:, :, i] * y[:, :, j]).sum(-1) / x.shape[-1] ** 0.5
                weight = sum(u**n / math.factorial(n) for n in range(mechanism.order + 1))
            total = total + weight
            out[:, :, i] += weight[..., None] * v[:, :, j]
        out[:, :, i] /= total[..., None]
    return out


def softmax(q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def implied(mechanism, q, k):
    """The matrix of normalised weights."""
    keys = k.shape[2]
    return mechanism(q, k, torch.eye(keys, dtype=q.dtype).expand(*q.shape[:2], keys, keys))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("order", "window", "feature_dim"),
    [(2, 6, 3), (2, 6, None), (2, 0, 3), (1, 30, 4), (4, 1, 2), (3, 6, 5), (2, 50, 3)],
)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_is_that_of_an_exponential_or_a_polynomial_for_every_pair(
    implementation, order, window, feature_dim, causal
):
    q, k, v = draw()
    mechanism = based(causal, implementation, order=order, window=window, feature_dim=feature_dim)
    # a sum of weights of odd order may come near zero
    torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("window", [0, 3, 9])
def test_more_keys_than_queries_and_the_reverse(implementation, window):
    for tokens, keys in ((4, 19), (19, 4)):
        q, k, v = draw(tokens, keys)
        mechanism = based(False, implementation, window=window)
        torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 3, 11])
def test_gradients_reach_the_projections(window, causal):
    q, k, v = draw(11)
    mechanism = based(causal, window=window)
    leaves = [*(x.requires_grad_() for x in (q, k, v)), mechanism.query_projection, mechanism.key_projection]
    toward = torch.randn(2, 3, 11, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(mechanism(q, k, v), leaves, toward, allow_unused=True)
    expected = torch.autograd.grad(oracle(q, k, v, mechanism), leaves, toward, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:  # all keys are in the window
            assert window == 11
            assert ours is None or ours.eq(0).all()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [70, 71, 1000])
def test_a_window_of_all_tokens_is_softmax(window, causal):
    q, k, v = draw(70)
    torch.testing.assert_close(based(causal, window=window)(q, k, v), softmax(q, k, v, causal))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_features_are_those_of_the_polynomial_each_counted_once(order):
    q, k, _ = draw()
    mechanism = based(True, order=order, feature_dim=None)
    q_features, k_features = (mechanism.feature_map(x).features(x)[0] for x in (q, k))
    u = q @ k.mT / 5**0.5
    expected = sum(u**n / math.factorial(n) for n in range(order + 1))
    torch.testing.assert_close(q_features @ k_features.mT, expected, rtol=1e-11, atol=1e-11)
    assert q_features.shape[-1] == mechanism.features == math.comb(5 + order, order)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_error_against_softmax_falls_as_a_power_of_the_logits_one_above_the_order(causal, order):
    q, k, v = draw(100)
    errors, sizes = [], (0.1, 0.05)
    for size in sizes:
        exact = softmax(size * q, k, v, causal)
        found = based(causal, order=order, window=0, feature_dim=None)(size * q, k, v)
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.3)


def test_the_second_order_has_weights_of_one_half_at_least_and_the_first_negative_ones():
    """1 + u + u²/2 = ½ + (1 + u)²/2, least at u = −1, and not monotone below it."""
    key = torch.zeros(1, 3, 1, 5, dtype=torch.float64)
    key[..., 0] = 1
    u = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0], dtype=torch.float64)
    keys = torch.cat((0 * key, (u[:, None] * key * 5**0.5).expand(1, 3, 5, 5)), 2)

    def weights(order):
        matrix = implied(based(False, order=order, window=0, feature_dim=None, value_dim=6), key, keys)
        return (matrix / matrix[..., :1])[0, 0, 0, 1:]  # relative to a key of zeros, whose weight is one

    torch.testing.assert_close(weights(2), torch.tensor([2.5, 1.0, 0.5, 1.0, 2.5], dtype=torch.float64))
    torch.testing.assert_close(weights(1), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64))
    assert weights(3)[0] < 0 < weights(4).min()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 6])
def test_small_queries_give_the_mean(window, causal):
    q, k, v = draw(70)
    means = v.cumsum(2) / torch.arange(1, 71)[:, None] if causal else v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(based(causal, window=window)(1e-9 * q, k, v), means)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("window", [0, 6])
def test_weights_of_even_order_are_positive_and_sum_to_one(window, implementation, causal):
    q, k, _ = draw(70)
    weights = implied(based(causal, implementation, window=window, value_dim=70), 3 * q, 3 * k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 70, dtype=torch.float64))
    assert weights.min() > -1e-13


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_of_the_window_leave_the_past_behind_and_tiny_ones_leave_it_alone(dtype, causal):
    """exp(±10⁴) has no floating-point number, and both rows are finite with their gradients."""
    q, k, v = (x.to(dtype) for x in draw(70))
    q = torch.zeros_like(q)
    q[..., 0] = 1
    k[..., 0] = 0
    mechanism = based(causal, window=1, feature_dim=None)
    for own in (1e5, -1e5):
        keys = k.clone()
        keys[:, :, 40, 0] = own
        leaves = [x.clone().requires_grad_() for x in (q, keys, v)]
        out = mechanism(*leaves)
        assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.square().sum(), leaves)))
        if own > 0:
            torch.testing.assert_close(out[:, :, 40], v[:, :, 40])
        else:
            others = [j for j in range(40 if causal else 70) if j != 40]
            torch.testing.assert_close(out[:, :, 40], v[:, :, others].mean(2))  # u = 0 for all of them


def test_a_key_changes_its_weight_when_it_leaves_the_window():
    q, k, _ = draw(20)
    near, far = (implied(based(True, window=w, value_dim=20), q, k)[:, :, 19] for w in (8, 7))
    relative = far / far[..., 19:] - near / near[..., 19:]
    assert relative[..., 12].abs().min() > 1e-6
    relative[..., 12] = 0
    torch.testing.assert_close(relative, torch.zeros_like(relative), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("feature_dim", "width"), [(3, 3), (5, 5), (9, 5), (None, 5)])
def test_projections_start_as_one_onto_orthonormal_directions_of_every_head(feature_dim, width):
    mechanism = based(False, feature_dim=feature_dim, learned=False)
    assert mechanism.monomials.variables == width
    if width == 5:
        assert list(mechanism.parameters()) == []
        return
    directions = mechanism.query_projection
    assert directions.shape == (3, 5, 3)
    assert torch.equal(directions, mechanism.key_projection)
    torch.testing.assert_close(directions.mT @ directions, torch.eye(3, dtype=torch.float64).expand(3, 3, 3))
    assert not torch.allclose(directions[0], directions[1])
    assert torch.equal(directions, based(True, learned=False).query_projection)
    assert not torch.equal(directions, based(False, learned=False, seed=1).query_projection)


@pytest.mark.parametrize(("window", "order"), [(0, 2), (1, 3), (6, 2), (64, 2)])
def test_decoding_moves_the_key_that_leaves_the_window_into_the_sums(window, order):
    q, k, v = draw()
    mechanism = based(True, window=window, order=order)
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for t in range(37):
        out, state = mechanism.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        outputs.append(out)
        if window:
            assert bool(state.sums.eq(0).all()) == (t < window)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v), rtol=1e-9, atol=1e-10)
    held = (state.sums, *state.ring.held()) if window else (state.state,)
    assert held[0].shape == (2, 3, math.comb(3 + order, order), 7 + 1)
    assert mechanism.state_bytes(37, torch.float64) == sum(x.nbytes for x in held) // 2
    assert mechanism.state_bytes(37, torch.bfloat16) == sum(x.nbytes for x in held) // 4
    assert based(False, window=window).state_bytes(37, torch.float32) is None


def test_defaults_are_those_of_the_paper():
    mechanism = build("based", heads=3, key_dim=64, value_dim=64, causal=True)
    assert (mechanism.features, mechanism.order, mechanism.window) == (153, 2, 64)
    assert mechanism.query_projection.shape == (3, 64, 16)
    assert mechanism.exact_limit(500).hyperparameters == {"window": 500}


@pytest.mark.parametrize("bad", [{"feature_dim": 0}, {"order": 0}, {"order": 9}, {"window": -1}])
def test_bad_hyperparameters_are_refused(bad):
    with pytest.raises(UsageError, match=rf"based\.{next(iter(bad))}"):
        based(False, **bad)


def test_a_polynomial_with_more_monomials_than_a_state_can_hold_is_refused():
    assert based(True, key_dim=64, feature_dim=None, order=3).features == 47905
    with pytest.raises(UsageError, match="64 numbers have 814385 monomials up to order 4, over 65536"):
        based(True, key_dim=64, feature_dim=None, order=4)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("window", [0, 6])
def test_the_causal_form_needs_as_many_keys_as_queries(window, implementation):
    q, k, v = draw(8)
    with pytest.raises(UsageError, match="8 queries and 7 keys"):
        based(True, implementation, window=window)(q, k[:, :, :7], v[:, :, :7])


def test_causal_flops_without_a_window_are_those_of_its_products():
    """Run besides: the scan over states between chunks. Not run: gradients of the column of ones in the values."""
    cell = Cell(mechanism="based", length=128, batch=2, heads=3, head_dim=5, value_dim=7, causal=True)
    mechanism, leaves = based(True, window=0), [x.requires_grad_() for x in draw(128)]
    scan = 6 * 2 * 3**2 * 10 * 8  # two chunks and the state before them
    products, _ = counted_flops(lambda begin: (begin(), mechanism(*leaves)))
    assert products == mechanism.flops(cell) + scan
    out = mechanism(*leaves)
    products, _ = counted_flops(lambda begin: out.sum().backward())
    ones = 6 * 128 * 2 * (10 + 64)
    assert products == mechanism.flops(cell.model_copy(update={"pass_": "backward"})) + 2 * scan - ones


def test_flops_without_window_and_mask_are_those_of_its_products_and_of_the_normaliser():
    """Which may be summed without a product: 4 operations per feature and token forward, and 8 backward."""
    cell = Cell(mechanism="based", length=128, batch=2, heads=3, head_dim=5, value_dim=7, causal=False)
    mechanism, leaves = based(False, window=0), [x.requires_grad_() for x in draw(128)]
    forward, _ = counted_flops(lambda begin: (begin(), mechanism(*leaves)))
    out = mechanism(*leaves)
    backward, _ = counted_flops(lambda begin: out.sum().backward())
    assert 0 <= mechanism.flops(cell) - forward <= 6 * 128 * 4 * 10
    assert 0 <= mechanism.flops(cell.model_copy(update={"pass_": "backward"})) - backward <= 6 * 128 * 8 * 10


@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 20, 148])
def test_flops_with_a_window_are_those_of_its_pairs_and_of_the_polynomial_of_the_others(length, causal, pass_):
    cell = Cell(mechanism="based", length=length, batch=2, heads=3, head_dim=5, value_dim=7, causal=causal, pass_=pass_)
    pairs = sum(abs(i - j) < 20 for i in range(length) for j in range(i + 1 if causal else length))
    near = {"forward": 2 * (5 + 7), "backward": 2 * (3 * 5 + 2 * 7)}
    near["forward_backward"] = sum(near.values())
    mechanism, expected = based(causal, window=20), 6 * pairs * near[pass_]
    if length > 20:
        past = cell.model_copy(update={"length": length - 20, "causal": True})
        expected += (1 if causal else 2) * based(True, window=0).flops(past)
    assert mechanism.flops(cell) == expected
    if pass_ == "forward":
        products, _ = counted_flops(lambda begin: (begin(), mechanism(*draw(length))))
        assert products >= expected  # whole blocks of queries and keys
