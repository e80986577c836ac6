"""Lightning attention (2401.04658) against its recurrence, and the slopes of its decay."""

import pytest
import torch

from linbench.errors import UsageError
from linbench.mechanisms.lightning import alibi_slopes
from linbench.registry import build


def draw(*size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths]


def lightning(q, v, implementation="torch", causal=True, **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build("lightning", **sizes, causal=causal, implementation=implementation, **hyperparameters)


def oracle(q, k, v, slopes):
    """kv_t = e^−s kv_{t−1} + k_tᵀ v_t, o_t = q_t kv_t."""
    out, decay = torch.empty_like(v), (-slopes).exp()[:, None, None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    for t in range(q.shape[2]):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out[:, :, t] = torch.einsum("bhd,bhdm->bhm", q[:, :, t], state)
    return out


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 70, 5, 7), (1, 8, 150, 6, 4)])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_output_equals_the_recurrence(size, implementation, depth):
    q, k, v = draw(*size)
    slopes = torch.tensor(alibi_slopes(size[1])).double() * (1 - depth + 1e-5)
    found = lightning(q, v, implementation, depth=depth)(q, k, v)
    torch.testing.assert_close(found, oracle(q, k, v, slopes), rtol=1e-11, atol=1e-12)


def test_slopes_are_those_of_alibi():
    assert alibi_slopes(8) == [2.0**-head for head in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    twelve = [*(2.0**-head for head in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(12) == pytest.approx(twelve, rel=1e-15)
    for heads in range(1, 70):
        slopes = alibi_slopes(heads)
        assert len(set(slopes)) == heads
        assert all(0 < slope < 1 for slope in slopes)


def test_the_last_layer_hardly_forgets():
    q, k, v = draw(1, 4, 100, 6, 4)
    plain = (q @ k.mT).tril() @ v
    last, first = lightning(q, v, depth=1.0)(q, k, v), lightning(q, v)(q, k, v)
    assert (last - plain).norm() < 1e-3 * plain.norm()
    assert (first - plain).norm() > 0.1 * plain.norm()


def test_it_is_the_same_operator_as_gated_linear_attention_with_one_decay():
    q, k, v = draw(2, 4, 150, 6, 4)
    mechanism = lightning(q, v)
    gla = build("gla", heads=4, key_dim=6, value_dim=4, causal=True)
    log_decay = mechanism.log_decay(q.device)[:, None, None].expand(q.shape)
    torch.testing.assert_close(mechanism(q, k, v), gla(q * 6**0.5, k, v, log_decay=log_decay))


def test_long_sequences_stay_exact_in_fp32():
    """Weights of e^−1000 and below belong to the steepest slopes: zeros, not subnormal or infinite numbers."""
    q, k, v = draw(1, 8, 3000, 16, 8, dtype=torch.float32)
    mechanism = lightning(q, v)
    exact = oracle(q.double(), k.double(), v.double(), -mechanism.log_decay(q.device))
    assert (mechanism(q, k, v) - exact).norm() < 1e-6 * exact.norm()


def test_without_a_mask_it_does_not_exist():
    q, k, v = draw(1, 1, 5, 3, 2)
    with pytest.raises(UsageError, match="no non-causal form"):
        lightning(q, v, causal=False)(q, k, v)
