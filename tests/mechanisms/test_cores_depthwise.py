"""The depthwise convolution over an image of tokens: against loops over pixels and taps, and against conv2d."""

import pytest
import torch

from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.mechanisms.cores.depthwise import Depthwise

SIZES = [  # B, H, height, width, M, taps
    (1, 1, 1, 1, 1, 5),
    (2, 3, 4, 7, 6, 5),
    (1, 2, 1, 13, 4, 3),
    (2, 1, 9, 2, 5, 7),
    (1, 3, 11, 8, 2, 1),
]


def draw(batch, heads, height, width, channels):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, height * width, channels)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def depthwise(heads, channels, size, height, seed=3):
    return Depthwise(heads, channels, size, height, seed).double()


def oracle(v, kernel, height):
    """Pixel by pixel, tap by tap."""
    size, width = kernel.shape[-1], v.shape[2] // height
    pixels, out = v.unflatten(2, (height, width)), []
    for y in range(height):
        for x in range(width):
            total = torch.zeros_like(v[:, :, 0])
            for a in range(size):
                for b in range(size):
                    row, column = y + a - size // 2, x + b - size // 2
                    if 0 <= row < height and 0 <= column < width:
                        total = total + kernel[:, :, a, b] * pixels[:, :, row, column]
            out.append(total)
    return torch.stack(out, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [False, True])
def test_both_forms_and_their_gradients_are_the_sum_over_taps(size, shared):
    batch, heads, height, width, channels, taps = size
    module = depthwise(1 if shared else heads, channels, taps, height)
    v = draw(batch, heads, height, width, channels).requires_grad_()
    expected = oracle(v, module.kernel, height)
    toward = torch.sin(torch.arange(expected.numel())).view(expected.shape).double()
    expected_grads = torch.autograd.grad(expected, (v, module.kernel), toward)
    for function in (module, module.reference):
        found = function(v)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        for ours, theirs in zip(torch.autograd.grad(found, (v, module.kernel), toward), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_it_is_conv2d_with_a_group_per_head_and_channel():
    module, v = depthwise(3, 6, 5, 4), draw(2, 3, 4, 7, 6)
    streams = v.transpose(2, 3).reshape(2, 18, 4, 7)
    expected = torch.nn.functional.conv2d(streams, module.kernel.flatten(0, 1)[:, None], padding=2, groups=18)
    torch.testing.assert_close(module(v), expected.view(2, 3, 6, 28).transpose(2, 3), rtol=1e-12, atol=1e-13)


def test_gradients_are_those_of_finite_differences():
    module = depthwise(2, 3, 3, 2)
    v = draw(2, 2, 2, 3, 3).requires_grad_()

    def convolved(v, kernel):
        return torch.func.functional_call(module, {"kernel": kernel}, (v,))

    assert torch.autograd.gradcheck(convolved, (v, module.kernel))


@pytest.mark.parametrize(
    ("tokens", "image"), [(1, (1, 1)), (12, (3, 4)), (13, (1, 13)), (64, (8, 8)), (150, (10, 15)), (2048, (32, 64))]
)
def test_an_image_without_a_height_is_the_most_nearly_square(tokens, image):
    assert depthwise(1, 1, 5, None).image(tokens) == image


def test_a_height_has_to_divide_the_tokens():
    module = depthwise(1, 2, 5, 4)
    assert module.image(24) == (4, 6)
    assert module.refusal(24) is None
    assert module.refusal(25) == "25 tokens do not fill an image of 4 rows"
    with pytest.raises(UsageError, match="25 tokens do not fill an image of 4 rows"):
        module(torch.zeros(1, 1, 25, 2).double())


def test_an_even_number_of_taps_has_no_centre():
    with pytest.raises(UsageError, match="take an odd number"):
        depthwise(1, 1, 4, None)


def test_a_tap_in_the_centre_is_the_identity_and_one_beside_it_moves_the_image():
    module, v = depthwise(2, 3, 5, 4), draw(1, 2, 4, 6, 3)
    with torch.no_grad():
        module.kernel.zero_()[:, :, 2, 2] = 1
        assert torch.equal(module(v), v)
        module.kernel.zero_()[:, :, 1, 4] = 1  # one row up, two columns to the right
        moved = module(v).unflatten(2, (4, 6))
    pixels = v.unflatten(2, (4, 6))
    assert torch.equal(moved[:, :, 1:, :4], pixels[:, :, :3, 2:])
    assert moved[:, :, 0].eq(0).all()
    assert moved[:, :, :, 4:].eq(0).all()


def test_chosen_rows_are_rows_of_the_whole():
    module, v = depthwise(2, 3, 5, 4), draw(1, 2, 4, 6, 3)
    rows = torch.tensor([23, 0, 11])
    torch.testing.assert_close(module.reference(v, rows), module(v)[:, :, rows])


def test_any_strides_of_values_and_of_the_gradient_that_arrives():
    module, packed = depthwise(3, 6, 5, 4), draw(2, 3, 4, 7, 6)
    expected = module(packed)
    (exact,) = torch.autograd.grad(module(leaf := packed.clone().requires_grad_()).sum(), leaf)
    for layout in ((1, 2), (2, 3)):
        v = packed.transpose(*layout).contiguous().transpose(*layout).requires_grad_()
        out = module(v)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)
        toward = torch.ones_like(out).transpose(*layout).contiguous().transpose(*layout)
        torch.testing.assert_close(torch.autograd.grad(out, v, toward)[0], exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_dtypes_are_computed_in_fp32(dtype):
    module, v = depthwise(3, 6, 5, 4).float(), draw(2, 3, 4, 7, 6).to(dtype)
    found = module(v)
    assert found.dtype == torch.float32
    exact = module.reference(v.double())
    assert (found - exact).norm() < 1e-6 * exact.norm()


def test_kernels_follow_the_seed_and_start_within_one_over_the_taps_of_a_side():
    first, same, other = (Depthwise(4, 16, 5, None, seed).kernel for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == (4, 16, 5, 5)
    assert 0.19 < first.abs().max() <= 0.2


@pytest.mark.parametrize(("height", "width"), [(1, 13), (4, 7), (30, 40)])
def test_flops_are_those_of_pairs_of_pixels(height, width):
    module, v = depthwise(1, 1, 5, height), draw(1, 1, height, width, 1)
    y, x = (torch.arange(height * width) // width, torch.arange(height * width) % width)
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 2)
    assert module.flops(height * width, "forward") == 2 * near.sum()
    assert module.flops(height * width, "backward") == 4 * near.sum()
    assert module.flops(height * width, "forward_backward") == 6 * near.sum()
    products, _ = counted_flops(lambda begin: module(v))
    assert module.flops(height * width, "forward") <= products == 2 * 25 * height * width
