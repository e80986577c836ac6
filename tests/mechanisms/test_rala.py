"""Rank-augmented linear attention (2411.07635): its formula token by token, its ablations, and what raises ranks."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build


def draw(tokens=42, keys=None, *, batch=2, key_dim=6, value_dim=5, scale=1.0):
    """H = 3, and a gate."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, key_dim), (keys or tokens, key_dim), (keys or tokens, value_dim), (tokens, value_dim))
    q, k, v, gate = (torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64) for size in sizes)
    return scale * q, scale * k, v, gate


def rala(implementation="torch", key_dim=6, value_dim=5, **hyperparameters):
    sizes = {"heads": 3, "key_dim": key_dim, "value_dim": value_dim}
    return build("rala", **sizes, causal=False, implementation=implementation, **hyperparameters).double()


def oracle(q, k, v, gate, mechanism, height):  # noqa: PLR0917
    """The formula, one sum after the other; the convolution pixel by pixel."""
    tokens, keys = q.shape[2], k.shape[2]
    queries, features = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    global_query = sum(queries[:, :, i] for i in range(tokens)) / tokens
    logits = [(global_query * features[:, :, j]).sum(-1) / q.shape[-1] ** 0.5 for j in range(keys)]
    total = sum(logit.exp() for logit in logits)
    alpha = [keys * logit.exp() / total if mechanism.augment_keys else torch.ones_like(total) for logit in logits]
    out = []
    for i in range(tokens):
        weights = [alpha[j] * (queries[:, :, i] * features[:, :, j]).sum(-1) for j in range(keys)]
        row = sum(weights[j][..., None] * v[:, :, j] for j in range(keys)) / sum(weights)[..., None]
        out.append(gate[:, :, i] * (row + neighbours(v, mechanism, height, i)))
    return torch.stack(out, 2)


def neighbours(v, mechanism, height, i):
    if mechanism.convolution is None:
        return 0
    kernel, width, total = mechanism.convolution.kernel, v.shape[2] // height, 0
    around = kernel.shape[-1] // 2
    for j in range(v.shape[2]):
        down, right = j // width - i // width, j % width - i % width
        if abs(down) <= around and abs(right) <= around:
            total = total + kernel[:, :, around + down, around + right] * v[:, :, j]
    return total


@pytest.mark.parametrize("augment_keys", [False, True])
@pytest.mark.parametrize("shape", [(1, None, 1, 5), (42, None, 6, 5), (42, 3, 3, 3)])  # N, height twice, kernel
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_and_gradients_are_those_of_the_formula(implementation, shape, augment_keys):
    tokens, height, image, kernel = shape
    mechanism = rala(implementation, height=height, kernel=kernel, augment_keys=augment_keys)
    leaves = [x.requires_grad_() for x in draw(tokens)]
    found, expected = mechanism(*leaves[:3], gate=leaves[3]), oracle(*leaves, mechanism, image)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    leaves.append(mechanism.convolution.kernel)
    toward = torch.sin(torch.arange(expected.numel())).view(expected.shape).double()
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, toward), torch.autograd.grad(expected, leaves, toward), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(("tokens", "keys"), [(4, 19), (19, 4)])
def test_without_a_convolution_there_may_be_more_keys_or_fewer(implementation, tokens, keys):
    q, k, v, gate = draw(tokens, keys)
    mechanism = rala(implementation, kernel=0)
    torch.testing.assert_close(mechanism(q, k, v, gate=gate), oracle(q, k, v, gate, mechanism, 1))


def test_without_its_three_parts_it_is_linear_attention():
    q, k, v, _ = draw()
    linear = build("linear", heads=3, key_dim=6, value_dim=5, causal=False)
    found = rala(kernel=0, augment_keys=False)(q, k, v, gate=torch.ones_like(v))
    torch.testing.assert_close(found, linear(q, k, v), rtol=1e-12, atol=1e-13)


def test_equal_keys_are_equally_informative():
    q, k, v, gate = draw()
    k = k[:, :, :1].expand_as(k)
    plain, augmented = (rala(augment_keys=choice)(q, k, v, gate=gate) for choice in (False, True))
    torch.testing.assert_close(augmented, plain, rtol=1e-12, atol=1e-13)


def test_a_key_along_the_global_query_outweighs_the_others():
    q, k, v, _ = draw()
    k[:, :, 17] = 40
    found = rala(kernel=0)(q, k, v, gate=torch.ones_like(v))
    torch.testing.assert_close(found, v[:, :, 17:18].expand_as(v), rtol=1e-10, atol=1e-11)


def test_constant_values_come_back_through_the_gate():
    q, k, v, gate = draw()
    v = v[:, :, :1].expand_as(v)
    torch.testing.assert_close(rala(kernel=0)(q, k, v, gate=gate), gate * v, rtol=1e-12, atol=1e-13)


def test_the_gate_and_the_convolution_raise_the_rank_of_the_outputs_beyond_the_width_of_the_keys():
    """The attention mixes D vectors: without a gate and a convolution the outputs of a head have rank D at most."""
    q, k, v, gate = draw(196, batch=1, key_dim=6, value_dim=48)
    ones = torch.ones_like(gate)
    options = {"core": (0, ones), "gated": (0, gate), "convolved": (5, ones)}
    ranks = {
        name: torch.linalg.matrix_rank(rala(value_dim=48, kernel=kernel)(q, k, v, gate=gate), rtol=1e-8)
        for name, (kernel, gate) in options.items()
    }
    assert ranks["core"].eq(6).all()
    assert ranks["gated"].eq(48).all()
    assert ranks["convolved"].eq(48).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_of_thousands_leave_everything_finite(dtype):
    q, k, v, gate = (x.to(dtype).requires_grad_() for x in draw(150, scale=60.0))
    mechanism = rala().to(dtype)
    with torch.no_grad():
        assert (torch.nn.functional.elu(q) + 1).mean(2).mul((torch.nn.functional.elu(k) + 1).mean(2)).max() > 500
    out = mechanism(q, k, v, gate=gate)
    torch.testing.assert_close(out, mechanism.reference(q, k, v, gate=gate), rtol=1e-4, atol=1e-4)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, gate)))


def test_a_query_whose_weights_underflow_has_its_neighbours_alone():
    q, k, v, gate = (x.float() for x in draw())
    mechanism = rala().float()
    q[:, :, 11] = -200
    found = mechanism(q.requires_grad_(), k, v, gate=gate)
    expected = gate * mechanism.convolution.reference(v)
    torch.testing.assert_close(found[:, :, 11], expected[:, :, 11])
    assert torch.autograd.grad(found.sum(), q)[0].isfinite().all()


def test_chosen_rows_are_rows_of_the_whole():
    q, k, v, gate = draw()
    rows, mechanism = torch.tensor([41, 0, 13]), rala()
    found = mechanism.reference(q, k, v, rows, gate=gate)
    torch.testing.assert_close(found, mechanism.reference(q, k, v, gate=gate)[:, :, rows])


def test_gates_start_as_they_are_drawn_and_kernels_are_learned_for_every_head():
    q, k, v, _ = draw()
    mechanism = rala()
    gate = mechanism.make_extras(q, k, v, torch.Generator().manual_seed(1))["gate"]
    assert gate.shape == v.shape
    assert gate.min() < -1 < 1 < gate.max()
    assert {name: x.shape for name, x in mechanism.named_parameters()} == {"convolution.kernel": (3, 5, 5, 5)}
    assert not list(rala(kernel=0).parameters())


@pytest.mark.parametrize("augment_keys", [False, True])
@pytest.mark.parametrize("kernel", [0, 5])
def test_flops_are_those_of_the_products_that_run(kernel, augment_keys):
    """Those of the convolution are of pairs inside the image; torch counts those beyond its edges too."""
    q, k, v, gate = draw(192, key_dim=8, value_dim=12)
    mechanism = rala(key_dim=8, value_dim=12, kernel=kernel, augment_keys=augment_keys)
    cell = Cell(mechanism="rala", batch=2, heads=3, head_dim=8, value_dim=12, length=192)
    products, _ = counted_flops(lambda begin: mechanism(q, k, v, gate=gate))
    inside = (12 * 5 - 6) * (16 * 5 - 6) if kernel else 0
    beyond = 25 * 192 - inside if kernel else 0
    assert products - 2 * 6 * 12 * beyond == mechanism.flops(cell)
    assert mechanism.flops(cell) == 6 * (192 * (4 * 8 * 12 + (4 if augment_keys else 2) * 8) + 2 * 12 * inside)
    assert mechanism.flops(cell.model_copy(update={"pass_": "backward"})) == 2 * mechanism.flops(cell)


def test_what_is_no_image_or_has_no_gate_is_refused():
    q, k, v, gate = draw()
    cell = Cell(mechanism="rala", length=42)
    assert rala(height=4).unsupported(cell) == "42 tokens do not fill an image of 4 rows"
    assert rala(height=6).unsupported(cell) is None
    assert rala(height=4, kernel=0).unsupported(cell) is None
    assert rala().unsupported(cell.model_copy(update={"causal": True})) == "rala has no causal form"
    with pytest.raises(UsageError, match="42 tokens do not fill an image of 4 rows"):
        rala(height=4)(q, k, v, gate=gate)
    with pytest.raises(UsageError, match=r"'gate' of shape \[2, 3, 42, 5\]"):
        rala()(q, k, v, gate=gate[..., 0])
    with pytest.raises(UsageError, match="as many keys as queries, got 40 and 42"):
        rala()(q, k[:, :, 2:], v[:, :, 2:], gate=gate)
    with pytest.raises(UsageError, match="take an odd number"):
        rala(kernel=4)
    with pytest.raises(UsageError, match=r"rala\.height"):
        rala(height=0)
