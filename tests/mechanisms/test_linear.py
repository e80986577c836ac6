"""Linear attention (2006.16236) against a loop over tokens, and the properties that follow from its formula."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.registry import build

SIZES = [(1, 1, 1, 1, 1), (1, 2, 5, 3, 7), (2, 3, 64, 8, 5), (2, 1, 65, 4, 6), (1, 2, 333, 16, 9)]  # B, H, N, D, M


def draw(size, dtype=torch.float64):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64).to(dtype) for width in widths]


def linear(q, v, causal, implementation="torch"):
    return build(
        "linear",
        heads=q.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        causal=causal,
        implementation=implementation,
    )


def oracle(q, k, v, causal):
    """The paper's eqs. 5 and 9, one query at a time."""

    def phi(x):
        return x + 1 if x > 0 else np.exp(x)

    q, k, v = (x.double().numpy() for x in (q, k, v))
    q, k = np.vectorize(phi, otypes=[float])(q), np.vectorize(phi, otypes=[float])(k)
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for batch, head, token in np.ndindex(*q.shape[:3]):
        seen = token + 1 if causal else k.shape[2]
        weights = k[batch, head, :seen] @ q[batch, head, token]
        out[batch, head, token] = weights @ v[batch, head, :seen] / weights.sum()
    return torch.from_numpy(out)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_equals_a_loop_over_tokens(size, causal, implementation):
    q, k, v = draw(size)
    out = linear(q, v, causal, implementation)(q, k, v)
    torch.testing.assert_close(out, oracle(q, k, v, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_fp32_is_within_1e_5(causal):
    q, k, v = draw((1, 2, 400, 64, 32), torch.float32)
    assert relative_error(linear(q, v, causal)(q, k, v), oracle(q, k, v, causal)) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_exact_attention_in_it(causal, dtype):
    q, k, v = draw((1, 2, 400, 64, 32), dtype)
    exact = torch.nn.functional.scaled_dot_product_attention
    yardstick = relative_error(
        exact(q, k, v, is_causal=causal), exact(q.double(), k.double(), v.double(), is_causal=causal)
    )
    out = linear(q, v, causal)(q, k, v)
    assert out.dtype == dtype
    assert relative_error(out, oracle(q, k, v, causal)) <= 1.5 * yardstick


@pytest.mark.parametrize("causal", [False, True])
def test_chosen_rows_of_the_reference_are_those_of_the_whole(causal):
    q, k, v = draw((2, 3, 50, 8, 5))
    mechanism, rows = linear(q, v, causal), torch.tensor([49, 0, 7])
    torch.testing.assert_close(mechanism.reference(q, k, v, rows), mechanism.reference(q, k, v)[:, :, rows])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [3, 70])
def test_gradients_are_those_of_finite_differences(causal, tokens):
    q, k, v = (x.requires_grad_() for x in draw((1, 2, tokens, 3, 2)))
    assert torch.autograd.gradcheck(linear(q, v, causal), (q, k, v), fast_mode=tokens > 10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_gradients_equal_those_of_the_reference(causal, dtype, limit):
    inputs = draw((2, 2, 300, 16, 10), dtype)
    output_grad = torch.randn(2, 2, 300, 10, dtype=torch.float64).to(dtype)
    grads = []
    for implementation, precision in (("torch", dtype), ("reference", torch.float64)):
        q, k, v = (x.to(precision).requires_grad_() for x in inputs)
        out = linear(q, v, causal, implementation)(q, k, v)
        grads.append(torch.autograd.grad(out, (q, k, v), output_grad.to(precision)))
    for found, expected in zip(*grads, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, expected) < limit


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_the_implied_matrix_sum_to_one(causal, implementation):
    q, k, _ = draw((1, 2, 70, 8, 5))
    matrix = linear(q, q.new_empty(1, 70), causal, implementation)(q, k, torch.eye(70).double().expand(1, 2, -1, -1))
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 2, 70).double(), rtol=0, atol=1e-13)
    assert (matrix >= 0).all()
    assert not causal or matrix.triu(1).eq(0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_constant_value_is_reproduced(causal):
    q, k, v = draw((1, 2, 70, 8, 5))
    v = v[:, :, :1].expand(-1, -1, 70, -1)
    torch.testing.assert_close(linear(q, v, causal)(q, k, v), v, rtol=1e-14, atol=0)


def test_future_does_not_leak():
    q, k, v = draw((1, 2, 200, 8, 5), torch.float32)
    before = linear(q, v, True)(q, k, v)
    for x in (q, k, v):
        x[:, :, 150:] = 40 * torch.randn_like(x[:, :, 150:])
    assert torch.equal(linear(q, v, True)(q, k, v)[:, :, :150], before[:, :, :150])


def test_order_of_keys_does_not_matter_without_a_mask():
    q, k, v = draw((2, 3, 90, 8, 5))
    order = torch.randperm(90)
    mechanism = linear(q, v, False)
    torch.testing.assert_close(
        mechanism(q[:, :, order], k[:, :, order], v[:, :, order]), mechanism(q, k, v)[:, :, order]
    )
    torch.testing.assert_close(mechanism(q, k[:, :, order], v[:, :, order]), mechanism(q, k, v))


def test_chunk_equals_recurrent():
    q, k, v = draw((2, 3, 130, 8, 5))
    mechanism = linear(q, v, True)
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for token in range(130):
        out, state = mechanism.step(q[:, :, token], k[:, :, token], v[:, :, token], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v), rtol=1e-12, atol=1e-12)
    assert mechanism.state_bytes(130, torch.float64) == state.state.nbytes // 2 == 3 * 8 * 6 * 8


@pytest.mark.parametrize("causal", [False, True])
def test_layout_of_the_inputs_does_not_matter(causal):
    q, k, v = draw((2, 3, 100, 8, 5))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(linear(q, v, causal)(*strided), linear(q, v, causal)(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_inputs_stay_finite(causal, dtype):
    q, k, v = (x.requires_grad_() for x in draw((1, 2, 200, 16, 8), dtype))
    out = linear(q, v, causal)(20 * q, 20 * k, v)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_flops_are_those_of_the_matrix_products_run(causal, name):
    """All products are counted by torch as run; ours also runs the scan over chunks, a product of [n + 1, n + 1]."""
    q, k, v = (x.requires_grad_() for x in draw((1, 2, 2048, 64, 64), torch.float32))
    mechanism = linear(q, v, causal)
    cell = Cell.model_validate({"mechanism": "linear", "heads": 2, "length": 2048, "causal": causal, "pass": name})
    in_place = {torch.ops.aten.baddbmm_: lambda total, left, right, **_: 2 * math.prod(left) * right[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        out = mechanism(q, k, v)
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        torch.autograd.grad(out.sum(), (q, k, v))
    run = {"forward": forward, "backward": backward}[name].get_total_flops()
    assert mechanism.flops(cell) <= run * 1.01
    assert run <= 1.45 * mechanism.flops(cell)


def test_costs_of_both_passes_add_up():
    q, _, v = draw((1, 2, 8, 64, 64))
    mechanism = linear(q, v, True)
    cells = [
        Cell.model_validate({"mechanism": "linear", "length": 512, "causal": True, "pass": name})
        for name in ("forward", "backward", "forward_backward")
    ]
    for cost in (mechanism.flops, mechanism.min_bytes):
        forward, backward, both = map(cost, cells)
        assert forward + backward == both
    # LIN of the literature: 4·F·(M + 1) per token
    assert linear(q, v, False).flops(Cell(mechanism="linear", length=512)) == 8 * 512 * 4 * 64 * 65


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_causal_form_needs_as_many_queries_as_keys(implementation):
    q, k, v = draw((1, 2, 9, 8, 5))
    with pytest.raises(UsageError, match="4 queries and 9 keys"):
        linear(q, v, True, implementation)(q[:, :, :4], k, v)
    assert linear(q, v, False, implementation)(q[:, :, :4], k, v).shape == (1, 2, 4, 5)
