"""OFormer's attention (2205.13671): norms over the domain, rotations by coordinates, and what they leave unchanged."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build

D, M = 12, 5


def draw(tokens=23, keys=None, *, batch=2):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, D), (keys or tokens, D), (keys or tokens, M))
    return [torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64) for size in sizes]


def meshes(q, k, coordinates):
    if not coordinates:
        return {}
    generator = torch.Generator().manual_seed(1)
    shapes = {"query_coordinates": q.shape[2], "key_coordinates": k.shape[2]}
    return {
        name: torch.rand(len(q), 1, tokens, coordinates, generator=generator, dtype=torch.float64)
        for name, tokens in shapes.items()
    }


def oformer(implementation="torch", *, causal=False, **hyperparameters):
    geometry = {"heads": 3, "key_dim": D, "value_dim": M, "causal": causal}
    return build("oformer", **geometry, implementation=implementation, **hyperparameters)


def oracle(q, k, v, *, attention, norm, coordinates, frequency=64.0, **extras):
    """Norms with torch's own layers, pairs as complex numbers, scores in full."""

    def normed(x):
        if norm == "point":
            return torch.nn.functional.layer_norm(x, x.shape[-1:])
        channels_second = x.flatten(0, 1).mT  # of an instance norm: [B·H, D, N]
        return torch.nn.functional.instance_norm(channels_second).mT.reshape(x.shape)

    def turned(x, points):
        groups = []
        for group, along in zip(x.chunk(coordinates, -1), points.unbind(-1), strict=True):
            first, second = group.chunk(2, -1)
            pairs = first.shape[-1]
            angles = torch.stack([along * frequency / 10000 ** (2 * c / (2 * pairs)) for c in range(pairs)], -1)
            pair = (first + 1j * second) * (1j * angles).exp()
            groups += [pair.real, pair.imag]
        return torch.cat(groups, -1)

    many = {"query": q, "key": k, "value": v}
    for name in ("key", "value") if attention == "galerkin" else ("query", "key"):
        many[name] = normed(many[name])
    if coordinates:
        many["query"] = turned(many["query"], extras["query_coordinates"])
        many["key"] = turned(many["key"], extras["key_coordinates"])
    return torch.einsum("bhid,bhjd,bhjm->bhim", *many.values()) / k.shape[2]


@pytest.mark.parametrize("coordinates", [0, 1, 3])
@pytest.mark.parametrize("norm", ["domain", "point"])
@pytest.mark.parametrize("attention", ["galerkin", "fourier"])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_is_that_of_the_paper(implementation, attention, norm, coordinates):
    settings = {"attention": attention, "norm": norm, "coordinates": coordinates}
    for tokens, keys in ((11, 11), (4, 13), (13, 4)):
        q, k, v = draw(tokens, keys)
        extras = meshes(q, k, coordinates)
        found = oformer(implementation, **settings)(q, k, v, **extras)
        torch.testing.assert_close(found, oracle(q, k, v, **settings, **extras), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("coordinates", [0, 2])
@pytest.mark.parametrize("norm", ["domain", "point"])
@pytest.mark.parametrize("attention", ["galerkin", "fourier"])
def test_gradients_are_those_of_the_formula(attention, norm, coordinates):
    settings = {"attention": attention, "norm": norm, "coordinates": coordinates}
    q, k, v = draw(7, 9)
    extras = meshes(q, k, coordinates)
    leaves = [x.requires_grad_() for x in (q, k, v, *extras.values())]
    toward = torch.randn(2, 3, 7, M, dtype=torch.float64)
    found = torch.autograd.grad(oformer(**settings)(q, k, v, **extras), leaves, toward)
    expected = torch.autograd.grad(oracle(q, k, v, **settings, **extras), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_many_slabs_agree_with_fp64_even_far_from_zero():
    q, k, v = (x.repeat(1, 1, 211, 1) + torch.linspace(30, 33, 4853)[:, None] for x in draw(batch=1))
    extras = meshes(q, k, 1)
    q, k, v = (x.float() for x in (q, k, v))
    extras = {name: x.float() for name, x in extras.items()}
    wide = {name: x.double() for name, x in extras.items()}
    expected = oformer("reference")(*(x.double() for x in (q, k, v)), **wide)
    found = oformer()(q, k, v, **extras).double()
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


def test_another_frequency():
    q, k, v = draw()
    settings = {"attention": "galerkin", "norm": "domain", "coordinates": 2, "frequency": 5.0}
    extras = meshes(q, k, 2)
    torch.testing.assert_close(oformer(**settings)(q, k, v, **extras), oracle(q, k, v, **settings, **extras))


def test_only_differences_of_coordinates_matter():
    q, k, v = draw(7, 9)
    extras = meshes(q, k, 2)
    moved = {name: x + torch.tensor([0.7, -3.0]) for name, x in extras.items()}
    mechanism = oformer(coordinates=2)
    torch.testing.assert_close(mechanism(q, k, v, **moved), mechanism(q, k, v, **extras))
    extras["query_coordinates"] = moved["query_coordinates"]
    assert not torch.allclose(mechanism(q, k, v, **extras), mechanism(q, k, v, **moved))


def test_scale_and_offset_of_every_channel_do_not_matter():
    q, k, v = draw()
    extras = meshes(q, k, 1)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0] * 3, dtype=torch.float64)
    expected = oformer()(q, 1e3 * k, 1e3 * v, **extras)  # so large that what is added to the variance does not show
    found = oformer()(q, 1e3 * k * scale[:D] + 7, 1e3 * v * scale[:M] - scale[:M], **extras)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_mesh_refined_by_duplication_gives_the_same():
    q, k, v = draw()
    extras = meshes(q, k, 1)
    expected = oformer()(q, k, v, **extras)
    extras["key_coordinates"] = extras["key_coordinates"].repeat_interleave(3, 2)
    found = oformer()(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), **extras)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_a_single_point_leaves_nothing_of_the_domain(implementation):
    q, k, v = draw(4, 1)
    extras = meshes(q, k, 1)
    assert oformer(implementation)(q, k, v, **extras).eq(0).all()
    assert oformer(implementation, norm="point")(q, k, v, **extras).abs().min() > 0


def test_the_norm_of_points_is_what_the_code_computes():
    """An instance norm of [B·H, N, D] takes the N points for channels: a layer norm of every point."""
    q, k, v = draw()
    q_code, k_code = (torch.nn.functional.instance_norm(x.flatten(0, 1)).view_as(x) for x in (q, k))
    found = oformer(attention="fourier", norm="point", coordinates=0)(q, k, v)
    torch.testing.assert_close(found, q_code @ k_code.mT @ v / 23)
    domain = oformer(attention="fourier", norm="domain", coordinates=0)(q, k, v)
    assert ((domain - found).norm() / found.norm()).item() > 0.1


def test_channels_that_are_no_pairs_for_each_coordinate_are_refused():
    with pytest.raises(UsageError, match="12 channels are no pairs for each of 4 coordinates"):
        oformer(coordinates=4)
    cell = Cell(mechanism="oformer", length=8, head_dim=10)
    assert "10 channels are no pairs" in oformer(coordinates=3).unsupported(cell)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_coordinates_and_a_mask_are_asked_about(implementation):
    q, k, v = draw()
    with pytest.raises(UsageError, match=r"needs the extra 'query_coordinates' of shape \[2, 1, 23, 1\]"):
        oformer(implementation)(q, k, v)
    with pytest.raises(UsageError, match="no causal form"):
        oformer(implementation, causal=True)(q, k, v, **meshes(q, k, 1))


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_flops_are_those_of_the_products(pass_):
    leaves, mechanism = [x.requires_grad_() for x in draw(510)], oformer()
    extras = meshes(*leaves[:2], 1)
    options = {"batch": 2, "heads": 3, "head_dim": D, "value_dim": M, "pass": pass_}
    cell = Cell(mechanism="oformer", length=510, **options)

    def run(begin):
        if pass_ == "forward":
            begin()
            return mechanism(*leaves, **extras)
        out = mechanism(*leaves, **extras)
        begin()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    products, _ = counted_flops(run)
    assert products == mechanism.flops(cell) == 2 * 3 * 510 * 4 * D * M * (1 + (pass_ == "backward"))


def test_bytes_include_coordinates_once_for_all_heads():
    cell = Cell(mechanism="oformer", length=510, batch=2, heads=3, head_dim=D, value_dim=M, dtype="bfloat16")
    assert oformer(coordinates=2).min_bytes(cell) == 2 * 2 * 3 * 510 * 2 * (D + M) + 2 * 2 * 510 * 2 * 4
