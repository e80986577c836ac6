"""FLatten (2308.00442): its formula token by token, what focusing does to directions, and where ε is."""

from itertools import pairwise

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.mechanisms.flatten import focused
from linbench.registry import build


def draw(tokens=42, keys=None, *, batch=2, key_dim=6, value_dim=5, scale=1.0):
    """H = 3."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim))
    q, k, v = (torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64) for size in sizes)
    return scale * q, scale * k, v


def flatten(implementation="torch", key_dim=6, value_dim=5, **hyperparameters):
    """With scales that are not all alike."""
    sizes = {"heads": 3, "key_dim": key_dim, "value_dim": value_dim}
    mechanism = build("flatten", **sizes, causal=False, implementation=implementation, **hyperparameters).double()
    with torch.no_grad():
        mechanism.scale.copy_(torch.linspace(-1, 2, 3 * key_dim, dtype=torch.float64).view(3, key_dim))
    return mechanism


def feature(x, scale, power):
    """φ of one token, ``[B, H, D]``."""
    x = (x.clamp(min=0) + 1e-6) / (1 + scale.exp()).log()
    powers = x**power
    return x.square().sum(-1, keepdim=True).sqrt() * powers / powers.square().sum(-1, keepdim=True).sqrt()


def oracle(q, k, v, mechanism, height):
    tokens, keys = q.shape[2], k.shape[2]
    queries, features = (
        [feature(x[:, :, i], mechanism.scale, mechanism.power) for i in range(x.shape[2])] for x in (q, k)
    )
    out = []
    for i in range(tokens):
        weights = [(queries[i] * features[j]).sum(-1, keepdim=True) for j in range(keys)]
        row = sum(weight * v[:, :, j] for j, weight in enumerate(weights)) / sum(weights)
        out.append(row + neighbours(v, mechanism, height, i))
    return torch.stack(out, 2)


def neighbours(v, mechanism, height, i):
    if mechanism.convolution is None:
        return 0
    kernel, width, total = mechanism.convolution.kernel[0], v.shape[2] // height, 0
    around = kernel.shape[-1] // 2
    for j in range(v.shape[2]):
        down, right = j // width - i // width, j % width - i % width
        if abs(down) <= around and abs(right) <= around:
            total = total + kernel[:, around + down, around + right] * v[:, :, j]
    return total


@pytest.mark.parametrize("power", [1.0, 3.0, 2.5])
@pytest.mark.parametrize("shape", [(1, None, 1, 5), (42, None, 6, 5), (42, 3, 3, 3)])  # N, height twice, kernel
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_and_gradients_are_those_of_the_formula(implementation, shape, power):
    tokens, height, image, kernel = shape
    mechanism = flatten(implementation, height=height, kernel=kernel, power=power)
    leaves = [x.requires_grad_() for x in draw(tokens)]
    found, expected = mechanism(*leaves), oracle(*leaves, mechanism, image)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    leaves += [mechanism.convolution.kernel, mechanism.scale]
    toward = torch.sin(torch.arange(expected.numel())).view(expected.shape).double()
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, toward), torch.autograd.grad(expected, leaves, toward), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(("tokens", "keys"), [(4, 19), (19, 4)])
def test_without_a_convolution_there_may_be_more_keys_or_fewer(implementation, tokens, keys):
    q, k, v = draw(tokens, keys)
    mechanism = flatten(implementation, kernel=0)
    torch.testing.assert_close(mechanism(q, k, v), oracle(q, k, v, mechanism, 1))


def test_the_power_one_is_relu_attention():
    q, k, v = draw()
    weights = ((q.relu() + 1e-6) / mechanism_scale(6)) @ ((k.relu() + 1e-6) / mechanism_scale(6)).mT
    expected = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(flatten(power=1.0, kernel=0)(q, k, v), expected, rtol=1e-11, atol=1e-12)


def mechanism_scale(key_dim):
    return torch.nn.functional.softplus(flatten(key_dim=key_dim).scale.detach())[:, None]


@pytest.mark.parametrize("power", [1.0, 3.0, 8.0])
def test_focusing_keeps_the_norm(power):
    q, _, _ = draw(scale=30.0)
    x = q.relu() + 1e-6
    features = focused(q, torch.ones(1, 3, 6).double(), power)
    torch.testing.assert_close(features.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-13)


def test_focusing_turns_a_vector_to_its_largest_entry_the_more_the_larger_the_power():
    x, one = torch.tensor([0.9, 1.0, 0.5]).double().view(1, 1, 1, 3), torch.ones(1, 1, 3).double()
    shares = [(focused(x, one, power)[..., 1] / x.norm()).item() for power in (1.0, 2.0, 3.0, 10.0, 100.0)]
    assert all(after > before for before, after in pairwise(shares))
    assert shares[-1] > 1 - 1e-4


def test_focusing_brings_similar_directions_together_and_others_apart():
    """Two that have their largest entry in common, and two that have not."""
    one = torch.ones(1, 1, 3).double()
    a, b, c = (torch.tensor(x).double().view(1, 1, 1, 3) for x in ([3.0, 2, 1], [3.0, 1, 2], [1.0, 2, 3]))

    def cosine(x, y, power):
        return torch.cosine_similarity(focused(x, one, power), focused(y, one, power), dim=-1).item()

    assert cosine(a, b, 3.0) > cosine(a, b, 1.0)
    assert cosine(a, c, 3.0) < cosine(a, c, 1.0)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_sum_to_one_even_of_queries_and_keys_without_a_positive_entry(implementation, dtype):
    """ε is in the entries and not in the normaliser, which would shrink these rows."""
    q, k, v = (x.to(dtype) for x in draw())
    q[:, :, 7], k[:, :, 3] = -q[:, :, 7].abs(), -k[:, :, 3].abs()
    for keys in (k, -k.abs()):
        found = flatten(implementation, kernel=0).to(dtype)(q, keys, torch.ones_like(v))
        torch.testing.assert_close(found, torch.ones_like(v), rtol=1e-5, atol=1e-5)


def test_lengths_of_queries_do_not_matter_beyond_epsilon():
    q, k, v = draw()
    factors = torch.logspace(0, 4, 42, dtype=torch.float64)[:, None]
    q = 1e3 * q.abs()
    torch.testing.assert_close(flatten()(q * factors, k, v), flatten()(q, k, v), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("power", [3.0, 8.0])
def test_large_and_small_entries_leave_everything_finite_in_fp32(power):
    for scale in (1e-6, 1e6):
        q, k, v = (x.float().requires_grad_() for x in draw(150, scale=scale))
        mechanism = flatten(power=power).float()
        out = mechanism(q, k, v)
        exact = mechanism.double().reference(q.double(), k.double(), v.double())
        assert (out - exact).norm() < 1e-5 * exact.norm()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_a_query_whose_weights_underflow_has_its_neighbours_alone(implementation):
    """Queries and keys along different axes, so that the weights are powers of ε."""
    q, k, v = (torch.zeros_like(x) if index < 2 else x.float() for index, x in enumerate(draw()))
    q, k = q.float(), k.float()
    q[..., 0], k[..., 1] = 100, 100
    mechanism = flatten(implementation, power=16.0).float()
    found = mechanism(q.requires_grad_(), k, v)
    torch.testing.assert_close(found, mechanism.convolution.reference(v))
    assert torch.autograd.grad(found.sum(), q)[0].isfinite().all()


def test_chosen_rows_are_rows_of_the_whole():
    q, k, v = draw()
    rows, mechanism = torch.tensor([41, 0, 13]), flatten()
    found = mechanism.reference(q, k, v, rows)
    torch.testing.assert_close(found, mechanism.reference(q, k, v)[:, :, rows])


def test_scales_start_at_zero_and_heads_share_a_kernel():
    fresh = build("flatten", heads=3, key_dim=6, value_dim=5, causal=False)
    assert fresh.power == 3
    assert fresh.scale.eq(0).all()
    shapes = {name: tuple(x.shape) for name, x in fresh.named_parameters()}
    assert shapes == {"scale": (3, 6), "convolution.kernel": (1, 5, 5, 5)}
    assert [name for name, _ in flatten(kernel=0).named_parameters()] == ["scale"]


@pytest.mark.parametrize("kernel", [0, 5])
def test_flops_are_those_of_the_products_that_run(kernel):
    """Those of the convolution are of pairs inside the image; torch counts those beyond its edges too."""
    q, k, v = draw(192, key_dim=8, value_dim=12)
    mechanism = flatten(key_dim=8, value_dim=12, kernel=kernel)
    cell = Cell(mechanism="flatten", batch=2, heads=3, head_dim=8, value_dim=12, length=192)
    products, _ = counted_flops(lambda begin: mechanism(q, k, v))
    inside = (12 * 5 - 6) * (16 * 5 - 6) if kernel else 0
    beyond = 25 * 192 - inside if kernel else 0
    assert products - 2 * 6 * 12 * beyond == mechanism.flops(cell)
    assert mechanism.flops(cell) == 6 * (192 * (4 * 8 * 12 + 2 * 8) + 2 * 12 * inside)
    assert mechanism.flops(cell.model_copy(update={"pass_": "backward"})) == 2 * mechanism.flops(cell)


def test_what_is_no_image_is_refused():
    q, k, v = draw()
    cell = Cell(mechanism="flatten", length=42)
    assert flatten(height=4).unsupported(cell) == "42 tokens do not fill an image of 4 rows"
    assert flatten(height=6).unsupported(cell) is None
    assert flatten().unsupported(cell.model_copy(update={"causal": True})) == "flatten has no causal form"
    with pytest.raises(UsageError, match="42 tokens do not fill an image of 4 rows"):
        flatten(height=4)(q, k, v)
    with pytest.raises(UsageError, match="as many keys as queries, got 40 and 42"):
        flatten()(q, k[:, :, 2:], v[:, :, 2:])
    with pytest.raises(UsageError, match="take an odd number"):
        flatten(kernel=4)
    for power in (0.5, 17.0):
        with pytest.raises(UsageError, match=r"flatten\.power"):
            flatten(power=power)
