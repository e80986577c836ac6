"""Random Feature Attention (2103.02143): its weights pair by pair, their law, and what its gate makes of the past."""

import math

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build


def draw(tokens=70, keys=None, *, batch=2, heads=3, key_dim=5, value_dim=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    return [torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def rfa(causal, implementation="torch", *, heads=3, key_dim=5, value_dim=7, seed=0, learned=True, **hyperparameters):
    """With σ as if it had been learned: another one for every head and entry."""
    geometry = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim, "causal": causal, "seed": seed}
    mechanism = build("rfa", **geometry, implementation=implementation, **{"features": 9, **hyperparameters})
    if learned:
        generator = torch.Generator().manual_seed(5)
        factors = torch.rand(mechanism.sigma.shape, generator=generator, dtype=torch.float64) + 0.5
        mechanism.sigma.data *= factors
    return mechanism


def angles(x, mechanism):
    """w_r · (σ ∘ x̂) for every direction, ``[B, H, N, R]``."""
    lengths = x.square().sum(-1, keepdim=True).sqrt()
    return torch.einsum("rd,hd,bhnd->bhnr", mechanism.gaussian, mechanism.sigma[:, 0], x / lengths)


def oracle(q, k, v, mechanism, log_decay=None):
    """Eqs. 4–6 with one cosine per direction; gated, every key has its entering weight and the gates since then."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    q_angles, k_angles = angles(q, mechanism), angles(k, mechanism)
    for i in range(q.shape[2]):
        total = torch.zeros(q.shape[:2], dtype=torch.float64)
        for j in range(i + 1 if mechanism.causal else k.shape[2]):
            weight = (q_angles[:, :, i] - k_angles[:, :, j]).cos().sum(-1)
            if log_decay is not None:
                weight = weight * (1 - log_decay[:, :, j].exp()) * log_decay[:, :, j + 1 : i + 1].sum(-1).exp()
            total = total + weight
            out[:, :, i] += weight[..., None] * v[:, :, j]
        out[:, :, i] /= total[..., None]
    return out


def gate(tokens, *, batch=2, heads=3):
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(batch, heads, tokens, generator=generator, dtype=torch.float64)
    return torch.nn.functional.logsigmoid(raw)


def ratio(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_is_that_of_the_weights_of_the_paper(implementation, causal):
    q, k, v = draw()
    mechanism = rfa(causal, implementation, sigma=0.7)
    torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_gated_output_is_that_of_the_recurrence_of_the_paper(implementation, tokens):
    """S and z are walked token by token; the gate applies to both."""
    q, k, v = draw(tokens)
    log_decay, mechanism = gate(tokens), rfa(True, implementation, gated=True)
    found = mechanism(q, k, v, log_decay=log_decay)
    torch.testing.assert_close(found, oracle(q, k, v, mechanism, log_decay), rtol=1e-10, atol=1e-11)
    phi, psi = (torch.cat((x.sin(), x.cos()), -1) for x in (angles(q, mechanism), angles(k, mechanism)))
    S, z, outputs = 0.0, 0.0, []
    for t in range(tokens):
        g, key = log_decay[:, :, t].exp()[..., None], psi[:, :, t]
        S = g[..., None] * S + (1 - g[..., None]) * key[..., None] * v[:, :, t, None]
        z = g * z + (1 - g) * key
        outputs.append((phi[:, :, t, :, None] * S).sum(-2) / (phi[:, :, t] * z).sum(-1, keepdim=True))
    torch.testing.assert_close(found, torch.stack(outputs, 2), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_more_keys_than_queries_and_the_reverse(implementation):
    for tokens, keys in ((4, 19), (19, 4)):
        q, k, v = draw(tokens, keys)
        mechanism = rfa(False, implementation)
        torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism))


@pytest.mark.parametrize(("causal", "gated"), [(False, False), (True, False), (True, True)])
def test_gradients_reach_sigma_and_the_gate(causal, gated):
    q, k, v = draw(11)
    mechanism = rfa(causal, gated=gated)
    leaves = [*(x.requires_grad_() for x in (q, k, v)), mechanism.sigma]
    extras = {}
    if gated:
        extras["log_decay"] = gate(11).requires_grad_()
        leaves.append(extras["log_decay"])
    toward = torch.randn(2, 3, 11, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(mechanism(q, k, v, **extras), leaves, toward)
    expected = torch.autograd.grad(oracle(q, k, v, mechanism, extras.get("log_decay")), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def estimates(x, y, draws, directions):
    """Independent draws of the mean of φ(x)·φ(y), from the seeded directions of the mechanism itself."""
    mechanism = rfa(False, heads=1, key_dim=len(x), features=draws * directions, learned=False)
    q_features, k_features = (mechanism.feature_map(z).features(z[None])[0][0] for z in (x, y))
    products = (q_features * k_features).view(2, draws, directions)
    return products.sum((0, 2)) / directions


def test_products_of_features_are_unbiased_with_the_variance_of_a_cosine():
    """E cos w·z = e^{−‖z‖²/2} for z = x − y; E cos² = (1 + E cos 2w·z)/2, so that Var = (1 − e^{−‖z‖²})²/2 each."""
    x, y = torch.tensor([0.5, -0.3, 0.8, 0.1]).double(), torch.tensor([0.1, 0.4, -0.6, 0.3]).double()
    values, distance = estimates(x, y, 20000, 3), (x - y).square().sum().item()
    variance = (1 - math.exp(-distance)) ** 2 / 2 / 3
    assert values.mean().item() == pytest.approx(math.exp(-distance / 2), abs=4 * (variance / 20000) ** 0.5)
    assert values.var().item() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("causal", [False, True])
def test_target_is_softmax_with_learned_temperatures_of_unit_vectors(causal):
    q, k, v = draw(23)
    mechanism, expected = rfa(causal), torch.zeros_like(v)
    x, y = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
    for i in range(23):
        seen = i + 1 if causal else 23
        logits = (mechanism.sigma.square() * x[:, :, i, None] * y[:, :, :seen]).sum(-1)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        expected[:, :, i] = (weights[..., None] * v[:, :, :seen]).sum(2)
    torch.testing.assert_close(mechanism.target(q, k, v), expected)
    torch.testing.assert_close(mechanism.target(q, k, v, torch.tensor([20, 0, 7])), expected[:, :, [20, 0, 7]])


@pytest.mark.parametrize("causal", [False, True])
def test_error_against_the_target_falls_as_the_root_of_the_features(causal):
    q, k, v = draw(200, batch=1)
    counts, errors = (16, 64, 256, 1024), []
    for features in counts:
        seeds = [rfa(causal, features=features, seed=seed, learned=False) for seed in range(5)]
        errors.append(sum(ratio(m(q, k, v), m.target(q, k, v)) for m in seeds) / 5)
    slope = math.log(errors[-1] / errors[1]) / math.log(16)
    assert errors == sorted(errors, reverse=True)
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert errors[-1] < 0.06


def test_a_large_temperature_breaks_the_estimate_down():
    """The weight of far keys, e^{−σ²} of the largest, drowns in the noise of the cosines: at σ² = 5 nothing is left."""
    q, k, v = draw(200, batch=1, key_dim=16)
    errors = {}
    for square in (1, 5):
        mechanism = rfa(False, key_dim=16, features=64, sigma=square**0.5, learned=False)
        errors[square] = ratio(mechanism(q, k, v), mechanism.target(q, k, v))
    assert errors[1] < 0.2
    assert errors[5] > 1


@pytest.mark.parametrize("causal", [False, True])
def test_a_vanishing_temperature_gives_the_mean(causal):
    q, k, v = draw()
    means = v.cumsum(2) / torch.arange(1, 71)[:, None] if causal else v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(rfa(causal, sigma=1e-7)(q, k, v), means)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_vectors_do_not_matter(causal):
    q, k, v = draw()
    factors = torch.logspace(-5, 5, 70, dtype=torch.float64)[:, None]
    torch.testing.assert_close(rfa(causal)(q * factors, k * factors.flip(0), v), rfa(causal)(q, k, v))


def test_zero_vectors_have_no_direction_and_no_gradient():
    q, k, v = draw()
    q[:, :, 3], k[:, :, 5] = 0, 0
    q, k = q.requires_grad_(), k.requires_grad_()
    for implementation in ("reference", "torch"):
        grads = torch.autograd.grad(rfa(False, implementation)(q, k, v).square().sum(), (q, k))
        assert grads[0][:, :, 3].eq(0).all()
        assert grads[1][:, :, 5].eq(0).all()
        assert all(grad.isfinite().all() for grad in grads)


def test_a_constant_gate_is_an_exponential_moving_average():
    """Of the keys' weights: the (1 − g) of all cancels, and g = ½ halves a key's weight with every token."""
    q, k, v = draw()
    weights = rfa(True, value_dim=70)(q, k, torch.eye(70, dtype=torch.float64).expand(2, 3, 70, 70))
    age = torch.arange(70)[:, None] - torch.arange(70)
    averaged = weights * torch.where(age >= 0, 0.5 ** age.clamp(min=0).double(), 0)
    expected = averaged @ v / averaged.sum(-1, keepdim=True)
    found = rfa(True, gated=True)(q, k, v, log_decay=torch.full((2, 3, 70), math.log(0.5), dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_an_open_gate_sees_the_whole_past_and_a_closed_one_only_its_token():
    q, k, v = draw()
    gates = torch.ones(2, 3, 70, dtype=torch.float64)
    torch.testing.assert_close(
        rfa(True, gated=True)(q, k, v, log_decay=-1e-13 * gates), rfa(True)(q, k, v), rtol=1e-8, atol=1e-8
    )
    for implementation in ("reference", "torch"):
        closed = rfa(True, implementation, gated=True)(q, k, v, log_decay=-800 * gates)
        torch.testing.assert_close(closed, v, rtol=1e-12, atol=1e-13)


def test_a_token_that_its_gate_shuts_out_is_as_if_it_were_not_there():
    """g = 1 keeps the past as it is and lets nothing in."""
    q, k, v = draw()
    log_decay = gate(70)
    log_decay[:, :, 30] = 0
    kept = [i for i in range(70) if i != 30]
    mechanism = rfa(True, gated=True)
    whole = mechanism(q, k, v, log_decay=log_decay)
    without = mechanism(q[:, :, kept], k[:, :, kept], v[:, :, kept], log_decay=log_decay[:, :, kept])
    torch.testing.assert_close(whole[:, :, kept], without, rtol=1e-9, atol=1e-10)


def test_the_gate_of_a_layer_is_the_logarithm_of_a_sigmoid_per_token_and_head():
    q, k, v = (x.bfloat16() for x in draw())
    assert rfa(True).make_extras(q, k, v, torch.Generator().manual_seed(3)) == {}
    extras = rfa(True, gated=True).make_extras(q, k, v, torch.Generator().manual_seed(3))
    raw = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert list(extras) == ["log_decay"]
    assert extras["log_decay"].dtype == torch.float32
    torch.testing.assert_close(extras["log_decay"].exp().double(), raw.sigmoid(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_the_state_is_two_features_a_direction_for_every_value_and_the_normaliser(gated):
    q, k, v = draw()
    mechanism, extras = rfa(True, gated=gated), {"log_decay": gate(70)} if gated else {}
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for t in range(70):
        out, state = mechanism.step(
            q[:, :, t], k[:, :, t], v[:, :, t], state, **{n: x[:, :, t] for n, x in extras.items()}
        )
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v, **extras), rtol=1e-9, atol=1e-10)
    assert state.state.shape == (2, 3, 2 * 9, 7 + 1)
    assert mechanism.state_bytes(70, torch.float64) == state.state.nbytes // 2
    assert mechanism.state_bytes(70, torch.bfloat16) == 3 * 18 * 8 * 4
    assert rfa(False).state_bytes(70, torch.float32) is None


def test_directions_are_fixed_by_the_seed_and_the_same_in_both_forms():
    assert torch.equal(rfa(False).gaussian, rfa(True).gaussian)
    assert not torch.equal(rfa(False).gaussian, rfa(False, seed=1).gaussian)


def test_defaults_are_those_of_the_paper_before_learning():
    mechanism = build("rfa", heads=3, key_dim=5, value_dim=7, causal=True)
    assert mechanism.gaussian.shape == (128, 5)
    assert mechanism.sigma.eq(1).all()
    assert not mechanism.gated


@pytest.mark.parametrize("gated", [False, True])
def test_causal_flops_are_those_of_its_products(gated):
    """Run besides: the scan over states between chunks. Not run: gradients of the column of ones in the values."""
    cell = Cell(mechanism="rfa", length=128, batch=2, heads=3, head_dim=5, value_dim=7, causal=True)
    mechanism, leaves = rfa(True, gated=gated), [x.requires_grad_() for x in draw(128)]
    extras = {"log_decay": gate(128)} if gated else {}
    scan = 6 * 2 * 3**2 * 18 * 8  # two chunks and the state before them
    products, _ = counted_flops(lambda begin: (begin(), mechanism(*leaves, **extras)))
    probed = 2 * 9 * 5 if gated else 0  # one token, for the number of features
    assert products == mechanism.flops(cell) + scan + probed
    if not gated:
        out = mechanism(*leaves)
        products, _ = counted_flops(lambda begin: out.sum().backward())
        ones = 6 * 128 * 2 * (18 + 64)
        assert products == mechanism.flops(cell.model_copy(update={"pass_": "backward"})) + 2 * scan - ones


def test_flops_without_a_mask_are_those_of_its_products_and_of_the_normaliser():
    """Which may be summed without a product: 4 operations per feature and token forward, and 8 backward."""
    cell = Cell(mechanism="rfa", length=128, batch=2, heads=3, head_dim=5, value_dim=7, causal=False)
    mechanism, leaves = rfa(False), [x.requires_grad_() for x in draw(128)]
    forward, _ = counted_flops(lambda begin: (begin(), mechanism(*leaves)))
    out = mechanism(*leaves)
    backward, _ = counted_flops(lambda begin: out.sum().backward())
    assert 0 <= mechanism.flops(cell) - forward <= 6 * 128 * 4 * 18
    assert 0 <= mechanism.flops(cell.model_copy(update={"pass_": "backward"})) - backward <= 6 * 128 * 8 * 18


def test_a_gate_is_one_more_number_to_read_for_every_token():
    cell = Cell(mechanism="rfa", length=128, batch=2, heads=3, head_dim=5, value_dim=7, causal=True, dtype="float32")
    more = rfa(True, gated=True).min_bytes(cell) - rfa(True).min_bytes(cell)
    assert more == 2 * 3 * 128 * 4


@pytest.mark.parametrize("bad", [{"features": 0}, {"sigma": 0.0}])
def test_bad_hyperparameters_are_refused(bad):
    with pytest.raises(UsageError, match=rf"rfa\.{next(iter(bad))}"):
        rfa(False, **bad)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_the_gated_form_needs_a_mask_and_the_causal_one_as_many_keys(implementation):
    q, k, v = draw(8)
    cell = Cell(mechanism="rfa", length=8, causal=False)
    assert rfa(False, gated=True).unsupported(cell) == "rfa, gated, has no non-causal form"
    assert rfa(True, gated=True).unsupported(cell.model_copy(update={"causal": True})) is None
    with pytest.raises(UsageError, match="no non-causal form"):
        rfa(False, implementation, gated=True)(q, k, v, log_decay=gate(8))
    with pytest.raises(UsageError, match="8 queries and 7 keys"):
        rfa(True, implementation)(q, k[:, :, :7], v[:, :, :7])


def test_the_gated_form_has_no_target():
    assert rfa(True, gated=True).target(*draw(8)) is None
