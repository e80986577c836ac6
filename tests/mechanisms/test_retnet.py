"""Retention (2307.08621) against its recurrence, and the limits of its decay."""

import pytest
import torch

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.registry import build

SIZES = [(1, 1, 1, 1, 1), (1, 2, 5, 3, 7), (2, 3, 64, 8, 5), (2, 1, 65, 4, 6), (1, 4, 333, 16, 9)]  # B, H, N, D, M


def draw(size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths]


def retnet(q, v, implementation="torch", causal=True, **hyperparameters):
    return build(
        "retnet",
        heads=q.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        causal=causal,
        implementation=implementation,
        **hyperparameters,
    )


def oracle(q, k, v):
    """Eq. 6: S_n = γ S_{n−1} + k_nᵀ v_n, o_n = q_n S_n / √D."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(v)
    for head in range(q.shape[1]):
        decay, state = 1 - 2.0 ** (-5 - head), torch.zeros(q.shape[0], q.shape[-1], v.shape[-1]).double()
        for token in range(q.shape[2]):
            state = decay * state + torch.einsum("bd,bm->bdm", k[:, head, token], v[:, head, token])
            out[:, head, token] = torch.einsum("bd,bdm->bm", q[:, head, token], state) / q.shape[-1] ** 0.5
    return out


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_equals_the_recurrence(size, implementation):
    q, k, v = draw(size)
    torch.testing.assert_close(retnet(q, v, implementation)(q, k, v), oracle(q, k, v), rtol=1e-11, atol=1e-12)


def test_fp32_is_within_1e_5():
    q, k, v = draw((1, 8, 1000, 32, 16), torch.float32)
    assert relative_error(retnet(q, v)(q, k, v), oracle(q, k, v)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_exact_attention_in_it(dtype):
    q, k, v = draw((1, 2, 400, 64, 32), dtype)
    exact = torch.nn.functional.scaled_dot_product_attention
    yardstick = relative_error(
        exact(q, k, v, is_causal=True), exact(q.double(), k.double(), v.double(), is_causal=True)
    )
    out = retnet(q, v)(q, k, v)
    assert out.dtype == dtype
    assert relative_error(out, oracle(q, k, v)) <= 1.5 * yardstick


def test_chosen_rows_of_the_reference_are_those_of_the_whole():
    q, k, v = draw((2, 3, 50, 8, 5))
    mechanism, rows = retnet(q, v), torch.tensor([49, 0, 7])
    torch.testing.assert_close(mechanism.reference(q, k, v, rows), mechanism.reference(q, k, v)[:, :, rows])


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(tokens, implementation):
    q, k, v = (x.requires_grad_() for x in draw((1, 2, tokens, 3, 2)))
    assert torch.autograd.gradcheck(retnet(q, v, implementation), (q, k, v), fast_mode=tokens > 10)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_gradients_equal_those_of_the_reference(dtype, limit):
    inputs = draw((2, 3, 300, 16, 10), dtype)
    output_grad = torch.randn(2, 3, 300, 10, dtype=torch.float64).to(dtype)
    grads = []
    for implementation, precision in (("torch", dtype), ("reference", torch.float64)):
        q, k, v = (x.to(precision).requires_grad_() for x in inputs)
        out = retnet(q, v, implementation)(q, k, v)
        grads.append(torch.autograd.grad(out, (q, k, v), output_grad.to(precision)))
    for found, expected in zip(*grads, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, expected) < limit


def test_chunk_equals_recurrent():
    q, k, v = draw((2, 3, 130, 8, 5))
    mechanism = retnet(q, v)
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for token in range(130):
        out, state = mechanism.step(q[:, :, token], k[:, :, token], v[:, :, token], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v), rtol=1e-12, atol=1e-12)
    assert mechanism.state_bytes(130, torch.bfloat16) == 3 * 8 * 5 * 4


def test_gamma_one_is_causal_linear_attention_without_features():
    q, k, v = draw((2, 3, 150, 8, 5))
    expected = (q @ k.mT * 8**-0.5).tril() @ v
    torch.testing.assert_close(retnet(q, v, first_exponent=60.0)(q, k, v), expected)


def test_one_dimension_is_an_exponential_moving_average():
    _, _, v = draw((1, 2, 150, 1, 5))
    ones = torch.ones(1, 2, 150, 1).double()
    out = retnet(ones, v)(ones, ones, v)
    for head, decay in enumerate((1 - 2**-5, 1 - 2**-6)):
        torch.testing.assert_close(out[:, head, 1:], decay * out[:, head, :-1] + v[:, head, 1:])


def test_extreme_decay_stays_finite_and_forgets():
    q, k, v = draw((1, 2, 200, 8, 5), torch.float32)
    out = retnet(q, v, first_exponent=1e-9)(q, k, v)  # γ_0 = 7e-10, and 0.5 for the other head
    assert out.isfinite().all()
    only_itself = (q * k).sum(-1, keepdim=True) * 8**-0.5 * v
    torch.testing.assert_close(out[:, 0], only_itself[:, 0], rtol=1e-5, atol=1e-6)


def test_future_does_not_leak():
    q, k, v = draw((1, 2, 200, 8, 5), torch.float32)
    before = retnet(q, v)(q, k, v)
    for x in (q, k, v):
        x[:, :, 150:] = 40 * torch.randn_like(x[:, :, 150:])
    assert torch.equal(retnet(q, v)(q, k, v)[:, :, :150], before[:, :, :150])


def test_layout_of_the_inputs_does_not_matter():
    q, k, v = draw((2, 3, 100, 8, 5))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(retnet(q, v)(*strided), retnet(q, v)(q, k, v))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_without_a_mask_it_does_not_exist(implementation):
    q, k, v = draw((1, 1, 5, 3, 2))
    mechanism = retnet(q, v, implementation, causal=False)
    assert mechanism.unsupported(Cell(mechanism="retnet", length=5)) == "retnet has no non-causal form"
    assert mechanism.unsupported(Cell(mechanism="retnet", length=5, causal=True)) is None
    with pytest.raises(UsageError, match="no non-causal form"):
        mechanism(q, k, v)


def test_flops_are_those_of_chunks():
    """CHUNK of the sheet with D' = D: 2C(D + M) + 4DM per token forward, C(6D + 4M) + 10DM backward."""
    q, _, v = draw((1, 8, 1, 64, 64))
    cell = Cell.model_validate({"mechanism": "retnet", "length": 512, "causal": True, "pass": "forward_backward"})
    per_token = (2 * 64 * 128 + 4 * 64 * 64) + (64 * 640 + 10 * 64 * 64)
    assert retnet(q, v).flops(cell) == 8 * 512 * per_token
