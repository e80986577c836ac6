"""Galerkin attention (2105.14995): its formula point by point, what learns, meshes, and coordinates."""

import math
from itertools import pairwise

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build

SIZES = {"heads": 3, "key_dim": 6, "value_dim": 5}


def draw(tokens=23, keys=None, *, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, 6), (keys or tokens, 6), (keys or tokens, 5))
    return [torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def meshes(q, k, coordinates):
    generator = torch.Generator().manual_seed(1)
    shapes = {"query_coordinates": q.shape[2], "key_coordinates": k.shape[2]}
    return {
        name: torch.rand(len(q), 1, tokens, coordinates, generator=generator, dtype=torch.float64)
        for name, tokens in shapes.items()
    }


def galerkin(implementation="torch", *, learned=True, **hyperparameters):
    """With norms and a map of coordinates as if they had been learned, different from head to head."""
    mechanism = build("galerkin", **SIZES, causal=False, implementation=implementation, **hyperparameters)
    if learned:
        generator = torch.Generator().manual_seed(5)
        for parameter in mechanism.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mechanism


def normed(x, norm, head):
    """(x − mean)/√(variance + 1e-5) · weight + bias of one vector."""
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / (variance + 1e-5) ** 0.5 * norm.weight[head] + norm.bias[head]


def oracle(mechanism, q, k, v, *, query_coordinates=None, key_coordinates=None):
    """Point by point: the coordinates behind q, Ln(k) and Ln(v), and a map of those behind the output."""
    out = []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            keys = [normed(x, mechanism.key_norm, h) for x in k[b, h]]
            values = [normed(x, mechanism.value_norm, h) for x in v[b, h]]
            queries = list(q[b, h])
            if key_coordinates is not None:
                keys, values = (
                    [torch.cat(x) for x in zip(y, key_coordinates[b, 0], strict=True)] for y in (keys, values)
                )
                queries = [torch.cat(x) for x in zip(queries, query_coordinates[b, 0], strict=True)]
            for query in queries:
                row = sum((query @ key) * value for key, value in zip(keys, values, strict=True)) / len(keys)
                if key_coordinates is not None:
                    row = row[:5] + row[5:] @ mechanism.coordinate_map[h]
                out.append(row)
    return torch.stack(out).view(*q.shape[:3], 5)


@pytest.mark.parametrize("coordinates", [0, 1, 3])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(("tokens", "keys"), [(11, 11), (4, 13), (13, 4), (1, 1)])
def test_output_is_that_of_the_paper_point_by_point(tokens, keys, implementation, coordinates):
    q, k, v = draw(tokens, keys)
    extras = meshes(q, k, coordinates) if coordinates else {}
    mechanism = galerkin(implementation, coordinates=coordinates)
    found = mechanism(q, k, v, **extras)
    torch.testing.assert_close(found, oracle(mechanism, q, k, v, **extras), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("coordinates", [0, 2])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_gradients_are_those_of_the_formula(tokens_first, coordinates):
    q, k, v = draw(7, 9)
    extras = meshes(q, k, coordinates) if coordinates else {}
    mechanism = galerkin(coordinates=coordinates)
    leaves = [x.requires_grad_() for x in (q, k, v, *extras.values())]
    arranged = [x.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else x for x in (q, k, v)]
    learned = list(mechanism.parameters())
    toward = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    found = torch.autograd.grad(mechanism(*arranged, **extras), [*leaves, *learned], toward)
    expected = torch.autograd.grad(oracle(mechanism, q, k, v, **extras), [*leaves, *learned], toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_slabs_and_both_layouts_agree_with_fp64(dtype):
    q, k, v = (x.repeat(1, 1, 211, 1) + torch.linspace(0, 3, 4853)[:, None] for x in draw())
    q, k, v = (x.to(dtype) for x in (q, k, v))
    mechanism = galerkin()
    expected = galerkin("reference")(q.double(), k.double(), v.double())

    def error(found):
        return ((found.double() - expected).norm() / expected.norm()).item()

    # a sum over all tokens: how much of it is rounding depends on the order that a processor adds them in
    tolerance = min(error(galerkin("reference")(q, k, v)), 4e-3)
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        found = mechanism(*(layout(x) for x in (q, k, v)))
        assert found.dtype is dtype
        assert error(found) < tolerance


def test_the_output_lies_in_memory_as_the_queries_do():
    q, k, v = draw()
    tokens_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert galerkin()(q, k, v).is_contiguous()
    assert galerkin()(tokens_first, k, v).transpose(1, 2).is_contiguous()


def test_it_is_linear_in_the_queries():
    q, k, v = draw()
    other = draw()[0].flip(2)
    mechanism = galerkin()
    mixed = 2 * mechanism(q, k, v) - 3 * mechanism(other, k, v)
    torch.testing.assert_close(mechanism(2 * q - 3 * other, k, v), mixed)


def test_scale_and_offset_of_keys_and_values_do_not_matter():
    q, k, v = draw()
    mechanism = galerkin()
    expected = mechanism(q, 1e3 * k, 1e3 * v)  # so large that what is added to the variance does not show
    torch.testing.assert_close(mechanism(q, 4e3 * k + 7, 2e3 * v - 5), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coordinates", [0, 2])
def test_a_mesh_refined_by_duplication_gives_the_same(coordinates):
    q, k, v = draw()
    extras = meshes(q, k, coordinates) if coordinates else {}
    mechanism = galerkin(coordinates=coordinates)
    expected = mechanism(q, k, v, **extras)
    if coordinates:
        extras["key_coordinates"] = extras["key_coordinates"].repeat_interleave(3, 2)
    found = mechanism(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), **extras)
    torch.testing.assert_close(found, expected)


def test_refined_meshes_of_a_smooth_field_converge_to_the_integral():
    def field(points, width):
        frequencies = torch.arange(1, width + 1, dtype=torch.float64)
        return ((points[:, None] + 1) * frequencies).sin().expand(1, 3, -1, -1).contiguous()

    q, errors = draw(batch=1)[0], []
    for tokens in (50, 100, 200, 20000):
        points = (torch.arange(tokens, dtype=torch.float64) + 0.5) / tokens
        errors.append(galerkin()(q, field(points, 6), field(points, 5)))
    errors = [(x - errors[-1]).norm().item() for x in errors[:-1]]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.1)  # the rule of midpoints


def test_norms_start_as_layer_norms_and_the_map_of_coordinates_at_zero():
    q, k, v = draw()
    extras = meshes(q, k, 2)
    mechanism = galerkin(coordinates=2, learned=False)
    ln = torch.nn.functional.layer_norm
    weights = q @ ln(k, (6,)).mT + extras["query_coordinates"] @ extras["key_coordinates"].mT
    torch.testing.assert_close(mechanism(q, k, v, **extras), weights @ ln(v, (5,)) / 23)
    assert mechanism.coordinate_map.shape == (3, 2, 5)


def test_drawn_meshes_are_the_same_for_queries_and_keys_and_ask_for_no_gradient():
    q, k, v = draw(7, 9, dtype=torch.bfloat16)
    extras = galerkin(coordinates=3).make_extras(q, k, v.requires_grad_(), torch.Generator().manual_seed(0))
    queries, keys = extras["query_coordinates"], extras["key_coordinates"]
    assert queries.shape == (2, 1, 7, 3)
    assert keys.shape == (2, 1, 9, 3)
    assert torch.equal(queries, keys[:, :, :7])
    assert keys.dtype is torch.float32
    assert not keys.requires_grad
    assert galerkin().make_extras(q, k, v, torch.Generator()) == {}


def test_coordinates_of_another_shape_are_refused():
    q, k, v = draw()
    extras = meshes(q, k, 2)
    for wrong in ({}, {**extras, "key_coordinates": extras["key_coordinates"][:, :, 1:]}):
        with pytest.raises(UsageError, match=r"Galerkin needs the extra '\w+' of shape \[2, 1, 23, 2\]"):
            galerkin(coordinates=2)(q, k, v, **wrong)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_there_is_no_causal_form(implementation):
    mechanism = build("galerkin", **SIZES, causal=True, implementation=implementation)
    with pytest.raises(UsageError, match="no causal form"):
        mechanism(*draw())


@pytest.mark.parametrize("coordinates", [0, 2])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_flops_are_those_of_the_products(pass_, coordinates):
    q, k, v = draw(512)
    mechanism = galerkin(learned=False, coordinates=coordinates)
    extras = meshes(q, k, coordinates) if coordinates else {}
    cell = Cell(mechanism="galerkin", length=512, batch=2, heads=3, head_dim=6, value_dim=5, **{"pass": pass_})
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(begin):
        if pass_ == "forward":
            begin()
            return mechanism(*leaves, **extras)
        out = mechanism(*leaves, **extras)
        begin()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    products, _ = counted_flops(run)
    per_token = 2 * (6 + coordinates) * (5 + coordinates + 5)
    assert mechanism.flops(cell) == 2 * 3 * 512 * per_token * (1 if pass_ == "forward" else 2)
    of_small_matrices = 6 * 8 * 64  # what acts on the sums, whatever the number of points
    assert 0 <= products - mechanism.flops(cell) <= of_small_matrices


def test_bytes_include_coordinates_once_for_all_heads():
    cell = Cell(mechanism="galerkin", length=512, batch=2, heads=3, head_dim=6, value_dim=5, dtype="bfloat16")
    operands = 2 * 2 * 3 * 512 * 2 * (6 + 5)
    assert galerkin().min_bytes(cell) == operands
    assert galerkin(coordinates=3).min_bytes(cell) == operands + 2 * 2 * 512 * 3 * 4
