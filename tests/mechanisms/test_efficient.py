"""Efficient Attention (1812.01243): its two products in loops, what cannot matter to them, and the past of a token."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build

BOTH = ["softmax", "scaling"]


def draw(tokens=70, keys=None, *, batch=2, heads=3, key_dim=6, value_dim=5, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    q, k, v = (torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64) for size in sizes)
    return scale * q, scale * k, v


def efficient(q, v, causal, implementation="torch", **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build("efficient", **sizes, causal=causal, implementation=implementation, **hyperparameters)


def one_row(q, k, v, normalization):
    """A query ``[B, H, D]`` that sees all of k, channel by channel."""
    out = torch.zeros_like(v[:, :, 0])
    for c in range(q.shape[-1]):
        if normalization == "softmax":
            own = q[..., c].exp() / q.exp().sum(-1)
            weights = k[..., c].exp() / k[..., c].exp().sum(-1, keepdim=True)
        else:
            own, weights = q[..., c] / k.shape[2] ** 0.5, k[..., c] / k.shape[2] ** 0.5
        for j in range(k.shape[2]):
            out = out + (own * weights[..., j])[..., None] * v[:, :, j]
    return out


def oracle(q, k, v, causal, normalization):
    seen = [(k[:, :, : i + 1], v[:, :, : i + 1]) if causal else (k, v) for i in range(q.shape[2])]
    return torch.stack([one_row(q[:, :, i], *past, normalization) for i, past in enumerate(seen)], 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalization", BOTH)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_output_is_that_of_the_two_products_channel_by_channel(tokens, implementation, normalization, causal):
    q, k, v = draw(tokens)
    found = efficient(q, v, causal, implementation, normalization=normalization)(q, k, v)
    torch.testing.assert_close(found, oracle(q, k, v, causal, normalization), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("normalization", BOTH)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_more_keys_than_queries_and_the_reverse(implementation, normalization):
    for tokens, keys in ((4, 19), (19, 4)):
        q, k, v = draw(tokens, keys)
        found = efficient(q, v, False, implementation, normalization=normalization)(q, k, v)
        torch.testing.assert_close(found, oracle(q, k, v, False, normalization))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalization", BOTH)
def test_gradients_are_those_of_the_two_products(normalization, causal):
    leaves = [x.requires_grad_() for x in draw(19)]
    toward = torch.randn(2, 3, 19, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mechanism = efficient(leaves[0], leaves[2], causal, normalization=normalization)
    found = torch.autograd.grad(mechanism(*leaves), leaves, toward)
    expected = torch.autograd.grad(oracle(*leaves, causal, normalization), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("normalization", BOTH)
def test_a_causal_row_is_what_the_last_token_of_its_prefix_sees_without_a_mask(normalization):
    q, k, v = draw(150)
    whole = efficient(q, v, True, normalization=normalization)(q, k, v)
    for length in (1, 2, 64, 65, 150):
        prefix = efficient(q, v, False, normalization=normalization)(*(x[:, :, :length] for x in (q, k, v)))
        torch.testing.assert_close(whole[:, :, length - 1], prefix[:, :, -1], rtol=1e-11, atol=1e-12)


def test_scaling_is_dot_product_attention_over_the_number_of_keys():
    q, k, v = draw(40, 90)
    found = efficient(q, v, False, normalization="scaling")(q, k, v)
    torch.testing.assert_close(found, (q @ k.mT) @ v / 90, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_positive_of_rank_d_and_sum_to_one(causal):
    q, k, _ = draw(40)
    v = torch.eye(40, dtype=torch.float64).expand(2, 3, 40, 40)
    weights = efficient(q, v, causal)(q, k, v)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 40, dtype=torch.float64))
    assert weights.min() >= 0
    if causal:
        assert weights.triu(1).eq(0).all()
    else:
        assert torch.linalg.matrix_rank(weights).eq(6).all()


@pytest.mark.parametrize("causal", [False, True])
def test_constants_per_query_and_per_channel_of_the_keys_do_not_matter(causal):
    q, k, v = draw(90)
    of_query = torch.linspace(-300, 300, 90, dtype=torch.float64)[:, None]
    of_channel = torch.linspace(-900, 900, 6, dtype=torch.float64)
    mechanism = efficient(q, v, causal)
    torch.testing.assert_close(mechanism(q + of_query, k + of_channel, v), mechanism(q, k, v), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_one_channel_is_one_map_of_weights_for_every_query(implementation):
    q, k, v = draw(50, key_dim=1)
    expected = (k.softmax(2) * v).sum(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(efficient(q, v, False, implementation)(q, k, v), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_equal_keys_give_the_mean(causal):
    q, k, v = draw(70)
    means = v.cumsum(2) / torch.arange(1, 71)[:, None] if causal else v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(efficient(q, v, causal)(q, k[:, :, :1].expand_as(k), v), means)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("slope", [-40.0, 40.0])
def test_keys_that_rise_or_fall_by_more_than_any_exponential_holds(slope, causal):
    """Over 200 tokens e^k spans 10^3474: weights that overflow in sums of exponentials, and in quotients of them."""
    q, k, v = draw(200)
    k = (k + slope * torch.arange(200)[:, None]).requires_grad_()
    q, v = q.requires_grad_(), v.requires_grad_()
    mechanism = efficient(q, v, causal)
    exact = mechanism(q, k, v)
    visible = torch.ones(200, 200).tril().bool() if causal else torch.ones(200, 200).bool()
    maps = k.mT[..., None, :].masked_fill(~visible, -torch.inf).softmax(-1)  # [B, H, D, N, N]
    expected = torch.einsum("bhic,bhcij,bhjm->bhim", q.softmax(-1), maps, v)
    torch.testing.assert_close(exact, expected, rtol=1e-11, atol=1e-12)
    toward = torch.sin(torch.arange(exact.numel())).view(exact.shape).double()
    exact_grads = torch.autograd.grad(exact, (q, k, v), toward)
    for ours, theirs in zip(exact_grads, torch.autograd.grad(expected, (q, k, v), toward), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    narrow = [x.detach().float().requires_grad_() for x in (q, k, v)]
    assert all(x.isfinite().all() for x in torch.autograd.grad(mechanism(*narrow), narrow, toward.float()))


@pytest.mark.parametrize("causal", [False, True])
def test_sums_over_many_tokens_keep_the_digits_of_fp32(causal):
    q, k, v = (x.float() for x in draw(20000, batch=1, heads=1))
    found = efficient(q, v, causal)(q, k, v + 1)
    exact = efficient(q, v, causal)(q.double(), k.double(), v.double() + 1)
    # without a mask all tokens make one sum, whose rounding depends on the order that a processor adds them in
    tolerance = 1e-6 * exact.norm() if causal else (efficient(q, v, causal).reference(q, k, v + 1) - exact).norm()
    assert (found - exact).norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_that_need_no_level_give_what_those_do_that_need_one(dtype):
    """Exponentials of keys up to twenty are summed as they are, others relative to the largest of the channel."""
    q, k, v = (x.to(dtype) for x in draw(700))
    k = k * (19 / k.abs().max())
    lowered = k.clone()
    lowered[..., 0] -= 40
    tolerance = 1e-6 if dtype is torch.float32 else 1e-13
    for keys in (k, lowered):
        exact = efficient(q, v, False, "reference")(q.double(), keys.double(), v.double())
        assert (efficient(q, v, False)(q, keys, v) - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("normalization", BOTH)
def test_chosen_rows_are_rows_of_the_whole(normalization):
    q, k, v = draw(30)
    rows = torch.tensor([21, 0, 5])
    for causal in (False, True):
        mechanism = efficient(q, v, causal, normalization=normalization)
        found = mechanism.reference(q, k, v, rows)
        torch.testing.assert_close(found, mechanism.reference(q, k, v)[:, :, rows])


@pytest.mark.parametrize(("normalization", "elements"), [("softmax", 3 * 6 * (5 + 2)), ("scaling", 3 * 6 * 5 + 1)])
def test_steps_follow_the_whole_from_a_state_of_fixed_size(normalization, elements):
    q, k, v = draw(40, scale=20.0)
    mechanism = efficient(q, v, True, normalization=normalization)
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for t in range(40):
        out, state = mechanism.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v), rtol=1e-11, atol=1e-12)
    assert mechanism.state_bytes(10, torch.bfloat16) == mechanism.state_bytes(10**6, torch.float32) == 4 * elements
    assert efficient(q, v, False).state_bytes(10, torch.float32) is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalization", BOTH)
def test_flops_are_those_of_the_products_that_run(normalization, causal):
    q, k, v = (x.requires_grad_() for x in draw(192, key_dim=8, value_dim=12))
    mechanism = efficient(q, v, causal, normalization=normalization)

    def claimed(pass_):
        sizes = {"batch": 2, "heads": 3, "head_dim": 8, "value_dim": 12, "length": 192}
        return mechanism.flops(
            Cell.model_validate({"mechanism": "efficient", **sizes, "causal": causal, "pass": pass_})
        )

    products, _ = counted_flops(lambda begin: mechanism(q, k, v))
    # states are carried from chunk to chunk by a product with the 4 × 4 matrix of three chunks
    carry = 6 * 2 * 4 * 4 * 8 * 12 if causal and normalization == "scaling" else 0
    assert products - carry == claimed("forward")
    out = mechanism(q, k, v)
    products, _ = counted_flops(lambda begin: begin() or out.sum().backward())
    # of blocks of one and two tokens the gradients are multiplied elementwise
    elementwise = 6 * 192 * 2 * (1 + 2) * 8 if causal and normalization == "softmax" else 0
    assert products + elementwise - 2 * carry == claimed("backward")
    assert claimed("forward_backward") == claimed("forward") + claimed("backward")


def test_unequal_numbers_of_tokens_and_unknown_normalizations_are_refused():
    q, k, v = draw(8, 9)
    with pytest.raises(UsageError, match="8 queries and 9 keys"):
        efficient(q, v, True)(q, k, v)
    with pytest.raises(UsageError, match=r"efficient\.normalization"):
        efficient(q, v, False, normalization="sum")
