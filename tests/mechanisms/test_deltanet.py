"""DeltaNet (2406.06484) against products of its transition matrices, and what a state that corrects itself can do."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build

SIZES = [(1, 1, 1, 1, 1), (1, 2, 5, 3, 7), (2, 3, 64, 8, 5), (2, 1, 131, 4, 6)]  # B, H, N, D, M


def draw(size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    q, k, v = (torch.randn(batch, heads, tokens, x, dtype=dtype) for x in (key_dim, key_dim, value_dim))
    return q, k, v, torch.rand(batch, heads, tokens, dtype=dtype)


def deltanet(q, v, **hyperparameters):
    return build(
        "deltanet", heads=q.shape[1], key_dim=q.shape[-1], value_dim=v.shape[-1], causal=True, **hyperparameters
    )


def oracle(q, k, v, beta):
    """The state unrolled: S_t = Σ_i [Π_{j=t…i+1} (I − β_j k_j k_jᵀ)] β_i k_i v_iᵀ (section 2.2, transposed)."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    out, identity = torch.zeros_like(v), torch.eye(q.shape[-1]).to(q)
    for token in range(q.shape[2]):
        later = identity.expand(*q.shape[:2], -1, -1)
        for earlier in reversed(range(token + 1)):
            key, rate = k[:, :, earlier, :, None], beta[:, :, earlier, None, None]
            weight = (q[:, :, token, None] @ later @ (rate * key)).squeeze(-1)
            out[:, :, token] += weight * v[:, :, earlier] / q.shape[-1] ** 0.5
            later = later @ (identity - rate * key * key.mT)
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["forward", "reference"])
def test_output_is_a_sum_over_products_of_transitions(size, form):
    q, k, v, beta = draw(size)
    found = getattr(deltanet(q, v), form)(q, k, v, beta=beta)
    torch.testing.assert_close(found, oracle(q, k, v, beta), rtol=1e-11, atol=1e-13)


def test_orthonormal_keys_leave_nothing_to_correct():
    """Then it is linear attention."""
    q, k, v, beta = draw((2, 3, 16, 16, 5))
    k = torch.linalg.qr(k)[0]
    expected = (torch.nn.functional.normalize(q, dim=-1) @ k.mT / 4).tril() @ v
    torch.testing.assert_close(deltanet(q, v)(q, k, v, beta=torch.ones_like(beta)), expected)


def test_a_repeated_key_brings_back_its_last_value():
    """Eight orthogonal keys over and over, longer than a chunk: at β = 1 the state is a table that is overwritten."""
    _, k, v, beta = draw((1, 2, 200, 8, 5))
    table = torch.linalg.qr(k[:, :, :8])[0]
    key = torch.randint(8, (200,))
    asked = torch.randint(8, (200,))
    mechanism = deltanet(k, v)
    found = mechanism(table[:, :, asked], table[:, :, key], v, beta=torch.ones_like(beta)) * 8**0.5
    for token in range(200):
        seen = (key[: token + 1] == asked[token]).nonzero()
        expected = v[:, :, seen[-1].item()] if len(seen) else torch.zeros_like(v[:, :, 0])
        torch.testing.assert_close(found[:, :, token], expected, rtol=1e-11, atol=1e-12)


def test_beta_zero_writes_nothing():
    q, k, v, beta = draw((1, 2, 150, 8, 5))
    beta[:, :, 70:] = 0
    found = deltanet(q, v)(q[:, :, 69:70].expand(q.shape), k, v, beta=beta)
    assert (found[:, :, 69:] - found[:, :, 69:70]).abs().max() < 1e-14
    assert not deltanet(q, v)(q, k, v, beta=0 * beta).any()


def test_negative_eigenvalues_count_parity_and_others_cannot():
    """The same key at 2β = 2 turns the sign of what is stored, for as long as one likes."""
    q, k, v, beta = draw((1, 1, 301, 4, 3))
    k = k[:, :, :1].expand(k.shape)
    v[:, :, 1:] = 0
    ones = torch.ones_like(beta)
    flipping = deltanet(q, v, negative_eigenvalues=True)(k, k, v, beta=ones) * 4**0.5
    signs = (-1.0) ** torch.arange(301, dtype=torch.float64)
    torch.testing.assert_close(flipping, 2 * v[:, :, :1] * signs[:, None])
    assert not deltanet(q, v)(k, k, v, beta=ones)[:, :, 1:].any()


def test_twice_beta_is_all_that_negative_eigenvalues_change():
    q, k, v, beta = draw((2, 2, 70, 6, 5))
    found = deltanet(q, v, negative_eigenvalues=True)(q, k, v, beta=beta / 2)
    torch.testing.assert_close(found, deltanet(q, v)(q, k, v, beta=beta))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_length_of_queries_and_keys_does_not_matter(size):
    """Squares of these are zero or infinite in fp32."""
    q, k, v, beta = draw((1, 2, 100, 8, 5), torch.float32)
    mechanism = deltanet(q, v)
    torch.testing.assert_close(mechanism(size * q, size * k, v, beta=beta), mechanism(q, k, v, beta=beta))


def test_a_key_of_zeros_writes_nothing_and_gradients_stay_finite():
    q, k, v, beta = (x.requires_grad_() for x in draw((1, 2, 70, 6, 5), torch.float32))
    some = torch.ones(70, 1)
    some[::3] = 0
    mechanism = deltanet(q, v)
    out = mechanism(q * some, k * some, v, beta=beta)
    kept = (some[:, 0] == 1).nonzero()[:, 0]
    expected = mechanism(*(x[:, :, kept] for x in (q, k, v)), beta=beta[:, :, kept])
    torch.testing.assert_close(out[:, :, kept], expected)
    for grad in torch.autograd.grad(out.sum(), (q, k, v, beta)):
        assert grad.isfinite().all()


def test_keys_almost_alike_cost_few_digits():
    """The hard case of the triangular system: every correction depends on all that came before."""
    q, k, v, beta = draw((1, 2, 500, 16, 8))
    k = k[:, :, :1] + 1e-3 * k
    exact = deltanet(q, v).reference(q, k, v, beta=torch.ones_like(beta))
    single = [x.float() for x in (q, k, v)]
    found = deltanet(q, v)(*single, beta=torch.ones_like(beta).float())
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_what_it_needs_is_asked_for():
    q, k, v, beta = draw((1, 2, 5, 3, 7))
    mechanism = deltanet(q, v)
    with pytest.raises(UsageError, match=r"DeltaNet needs the extra 'beta' of shape \[1, 2, 5\]"):
        mechanism(q, k, v)
    with pytest.raises(UsageError, match="5 queries and 4 keys"):
        mechanism(q, k[:, :, 1:], v[:, :, 1:], beta=beta)
    with pytest.raises(UsageError, match="no non-causal form"):
        build("deltanet", heads=2, key_dim=3, value_dim=7, causal=False)(q, k, v, beta=beta)


def test_flops_are_those_of_chunks():
    """2C(3D + 2M) + 6DM + C²/3 per token forward; backward that again, the products twice more, and 4C²."""
    q, _, v, _ = draw((1, 8, 1, 64, 32))
    cell = Cell.model_validate(
        {"mechanism": "deltanet", "length": 512, "head_dim": 64, "value_dim": 32, "causal": True, "pass": "forward"}
    )
    products = 2 * 32 * (3 * 64 + 2 * 32) + 6 * 64 * 32
    assert deltanet(q, v).flops(cell) == 8 * 512 * (products + 341)
    backward = cell.model_copy(update={"pass_": "backward"})
    assert deltanet(q, v).flops(backward) == 8 * 512 * (3 * products + 341 + 4 * 32**2)


def test_counted_products_are_those_of_the_formula():
    q, k, v, beta = draw((1, 2, 256, 48, 40), torch.float32)
    found, _ = counted_flops(lambda reset: deltanet(q, v)(q, k, v, beta=beta))
    inverse = 32**2  # the library does not know that the right-hand side is triangular, too
    assert found == 2 * 256 * (2 * 32 * (3 * 48 + 2 * 40) + 6 * 48 * 40 + inverse)
