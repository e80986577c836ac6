"""Performer (2009.14794): its operator for a fixed projection, and how its random features approximate softmax."""

import pytest
import torch

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.performer import random_directions
from linbench.registry import build

SIZES = [(1, 1, 1, 1, 1), (1, 2, 5, 3, 7), (2, 3, 64, 8, 5), (2, 1, 65, 4, 6), (1, 2, 200, 16, 9)]  # B, H, N, D, M


def draw(size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths]


def performer(q, v, causal, implementation="torch", *, seed=0, features=48, **hyperparameters):
    return build(
        "performer",
        heads=q.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        causal=causal,
        implementation=implementation,
        seed=seed,
        features=features,
        **hyperparameters,
    )


def oracle(q, k, v, causal, projection):
    """Softmax over the keys of log Σ_r φ_r(q) φ_r(k), entirely in the log domain."""
    q, k, v = q.double(), k.double(), v.double()

    def logarithms(x):
        x = x / x.shape[-1] ** 0.25
        return torch.einsum("rd,bhnd->bhnr", projection, x) - x.norm(dim=-1, keepdim=True) ** 2 / 2

    out = []
    log_q, log_k = logarithms(q), logarithms(k)
    for token in range(q.shape[2]):
        seen = token + 1 if causal else k.shape[2]
        log_weights = torch.logsumexp(log_q[:, :, token, None] + log_k[:, :, :seen], -1)
        out.append(torch.einsum("bhj,bhjm->bhm", log_weights.softmax(-1), v[:, :, :seen]))
    return torch.stack(out, 2)


def softmax(q, k, v, causal=False):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def kernel_estimates(draws, projections, x, y, **hyperparameters):
    """φ(x)·φ(y) of independent draws, for vectors that need no scaling; blocks of D projections are independent."""
    x, y = (z.double()[None, None, None] * len(z) ** 0.25 for z in (x, y))
    mechanism = performer(x, x, False, features=draws * projections, **hyperparameters)
    products = (mechanism.log_features(x) + mechanism.log_features(y)).exp()
    return products.view(-1, draws, projections).sum((0, 2)) * draws


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("kernel", ["positive", "hyperbolic"])
def test_output_equals_an_oracle_in_the_log_domain(size, causal, implementation, kernel):
    q, k, v = draw(size)
    mechanism = performer(q, v, causal, implementation, kernel=kernel)
    expected = oracle(q, k, v, causal, mechanism.projection)
    torch.testing.assert_close(mechanism(q, k, v), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_fp32_is_within_1e_5(causal):
    q, k, v = draw((1, 2, 150, 64, 32), torch.float32)
    mechanism = performer(q, v, causal, features=256)
    assert relative_error(mechanism(q, k, v), oracle(q, k, v, causal, mechanism.projection)) < 5e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_exact_attention_in_it(causal, dtype):
    q, k, v = draw((1, 2, 150, 64, 32), dtype)
    yardstick = relative_error(softmax(q, k, v, causal), softmax(q.double(), k.double(), v.double(), causal))
    mechanism = performer(q, v, causal, features=256)
    out = mechanism(q, k, v)
    assert out.dtype == dtype
    assert relative_error(out, oracle(q, k, v, causal, mechanism.projection)) <= 1.5 * yardstick


@pytest.mark.parametrize("causal", [False, True])
def test_chosen_rows_of_the_reference_are_those_of_the_whole(causal):
    q, k, v = draw((2, 3, 50, 8, 5))
    mechanism, rows = performer(q, v, causal), torch.tensor([49, 0, 7])
    torch.testing.assert_close(mechanism.reference(q, k, v, rows), mechanism.reference(q, k, v)[:, :, rows])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [3, 70])
def test_gradients_are_those_of_finite_differences(causal, implementation, tokens):
    q, k, v = (x.requires_grad_() for x in draw((1, 2, tokens, 3, 2)))
    mechanism = performer(q, v, causal, implementation, features=5)
    assert torch.autograd.gradcheck(mechanism, (q, k, v), fast_mode=tokens > 10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_equal_those_of_the_reference(causal, dtype, limit):
    inputs = draw((2, 2, 300, 16, 10), dtype)
    output_grad = torch.randn(2, 2, 300, 10, dtype=torch.float64).to(dtype)
    grads = []
    for implementation, precision in (("torch", dtype), ("reference", torch.float64)):
        q, k, v = (x.to(precision).requires_grad_() for x in inputs)
        out = performer(q, v, causal, implementation)(q, k, v)
        grads.append(torch.autograd.grad(out, (q, k, v), output_grad.to(precision)))
    for found, expected in zip(*grads, strict=True):
        assert relative_error(found, expected) < limit


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_the_implied_matrix_sum_to_one(causal):
    q, k, _ = draw((1, 2, 70, 8, 5))
    matrix = performer(q, q.new_empty(1, 70), causal)(q, k, torch.eye(70).double().expand(1, 2, -1, -1))
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 2, 70).double(), rtol=0, atol=1e-13)
    assert (matrix >= 0).all()
    assert not causal or matrix.triu(1).eq(0).all()


@pytest.mark.parametrize("scale", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_future_does_not_leak(scale, dtype):
    """Not a single bit: neither later in a chunk nor in later ones, for small future keys as for huge ones."""
    q, k, v = draw((1, 2, 200, 8, 5), dtype)
    mechanism = performer(q, v, True)
    before = mechanism(scale * q, scale * k, v)
    for factor in (0.0, 1.0, 30.0):
        for x in (q, k, v):
            x[:, :, 150:] = factor * torch.randn_like(x[:, :, 150:])
        assert torch.equal(mechanism(scale * q, scale * k, v)[:, :, :150], before[:, :, :150])


def test_order_of_keys_does_not_matter_without_a_mask():
    q, k, v = draw((2, 3, 90, 8, 5))
    order = torch.randperm(90)
    mechanism = performer(q, v, False)
    torch.testing.assert_close(mechanism(q, k[:, :, order], v[:, :, order]), mechanism(q, k, v))
    torch.testing.assert_close(mechanism(q[:, :, order], k, v), mechanism(q, k, v)[:, :, order])


@pytest.mark.parametrize("scale", [1, 5])
def test_chunk_equals_recurrent(scale):
    q, k, v = draw((2, 3, 130, 8, 5))
    q, k, mechanism = scale * q, scale * k, performer(q, v, True)
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for token in range(130):
        out, state = mechanism.step(q[:, :, token], k[:, :, token], v[:, :, token], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v), rtol=1e-10, atol=1e-10)
    assert mechanism.state_bytes(130, torch.float64) == (state.state.nbytes + state.largest.nbytes) // 2


@pytest.mark.parametrize("causal", [False, True])
def test_layout_of_the_inputs_does_not_matter(causal):
    q, k, v = draw((2, 3, 100, 8, 5))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(performer(q, v, causal)(*strided), performer(q, v, causal)(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_large_inputs_stay_finite(causal, dtype, implementation):
    q, k, v = (x.requires_grad_() for x in draw((1, 2, 200, 64, 8), dtype))
    out = performer(q, v, causal, implementation)(20 * q, 20 * k, v)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("causal", [False, True])
def test_shrinking_keys_do_not_overflow(causal):
    """Small keys after huge ones have features that are larger by hundreds of orders of magnitude."""
    q, k, v = draw((1, 1, 160, 16, 4))
    k *= torch.linspace(30, 0, 160, dtype=torch.float64)[:, None]
    mechanism = performer(q, v, causal)
    expected = oracle(q, k, v, causal, mechanism.projection)
    assert relative_error(mechanism(q, k, v), expected) < 1e-9
    assert mechanism(q.float(), k.float(), v.float()).isfinite().all()


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_features_are_unbiased(kernel, orthogonal):
    x, y = torch.tensor([0.5, -0.3, 0.2, 0.1]), torch.tensor([0.1, 0.4, -0.6, 0.3])
    values = kernel_estimates(4000, 4, x, y, kernel=kernel, orthogonal=orthogonal)
    standard_error = values.std() / len(values) ** 0.5
    assert (values.mean() - (x @ y).exp()).abs() < 4 * standard_error
    assert standard_error < 0.02


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic"])
def test_variance_of_independent_features_is_the_closed_form(kernel):
    """Lemma 2: (1/m) e^{‖x+y‖²} SM² (1 − e^{−‖x+y‖²}); times (1 − e^{−‖x+y‖²})/2 for the hyperbolic kernel."""
    x, y = torch.tensor([0.5, -0.3, 0.2, 0.1]), torch.tensor([0.1, 0.4, -0.1, 0.3])
    norm, projections = (x + y).square().sum(), 16
    expected = norm.exp() * (2 * x @ y).exp() * (1 - (-norm).exp()) / projections
    if kernel == "hyperbolic":
        expected = expected * (1 - (-norm).exp()) / 2
    values = kernel_estimates(6000, projections, x, y, kernel=kernel, orthogonal=False)
    assert values.var().item() == pytest.approx(expected.item(), rel=0.1)


def test_orthogonal_features_beat_independent_ones():
    x, y = torch.tensor([0.5, -0.3, 0.2, 0.1]), torch.tensor([0.4, 0.4, -0.6, 0.3])
    exact = (x @ y).exp()
    errors = {
        orthogonal: (kernel_estimates(6000, 4, x, y, orthogonal=orthogonal) - exact).square().mean()
        for orthogonal in (True, False)
    }
    assert errors[True] < 0.95 * errors[False]


def test_sign_fix_makes_directions_uniform():
    """Raw Householder QR returns the same sign again and again; uniform directions have mean zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_directions(4, 4, True, generator) for _ in range(1500)])
    raw, _ = torch.linalg.qr(torch.randn(1500, 4, 4, dtype=torch.float64, generator=generator))
    standard_error = 0.5 / 1500**0.5
    assert drawn.mean(0).abs().max() < 4.5 * standard_error
    assert raw.mT.mean(0).abs().max() > 10 * standard_error
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(4).double().expand(1500, -1, -1))


@pytest.mark.parametrize(("norms", "spread"), [("chi", True), ("constant", False)])
def test_norms_of_the_projection(norms, spread):
    q, _, v = draw((1, 1, 1, 16, 1))
    lengths = performer(q, v, False, features=640, norms=norms).projection.norm(dim=-1)
    assert lengths.square().mean().item() == pytest.approx(16, rel=0.1)
    assert (lengths.std() > 0.5) == spread


def test_error_falls_with_features():
    """Logits of standard deviation 0.25, five seeds: the error falls as m^-1/2 (2009.14794, theorem 4)."""
    q, k, v = draw((1, 1, 256, 16, 8))
    q, k = q / 2, k / 2
    exact, counts = softmax(q, k, v), torch.tensor([16, 64, 256, 1024])
    errors = torch.tensor(
        [
            [relative_error(performer(q, v, False, seed=s, features=int(m))(q, k, v), exact) for m in counts]
            for s in range(5)
        ]
    )
    mean = errors.mean(0)
    slope = torch.linalg.lstsq(torch.stack([counts.log(), torch.ones(4)], 1), mean.log()[:, None]).solution[0, 0]
    assert (mean.diff() < 0).all()
    assert -0.65 < slope < -0.35
    assert mean[-1] < 0.1


def test_projection_is_fixed_by_the_seed():
    q, _, v = draw((1, 1, 1, 8, 1))
    assert torch.equal(performer(q, v, False).projection, performer(q, v, True).projection)
    assert not torch.equal(performer(q, v, False).projection, performer(q, v, False, seed=1).projection)


def test_flops_include_the_projection():
    """Sheet: 4·D·m per token for the features, then LIN with m features and M + 1 value columns."""
    q, _, v = draw((1, 8, 1, 64, 64))
    cell = Cell(mechanism="performer", length=512)
    assert performer(q, v, False, features=256).flops(cell) == 8 * 512 * (4 * 64 * 256 + 4 * 256 * 65)


@pytest.mark.parametrize("bad", [{"features": 0}, {"kernel": "trig"}, {"norms": "other"}])
def test_bad_hyperparameters_are_refused(bad):
    q, _, v = draw((1, 1, 1, 8, 1))
    with pytest.raises(UsageError, match=next(iter(bad))):
        performer(q, v, False, **bad)
