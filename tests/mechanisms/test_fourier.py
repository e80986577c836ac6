"""Fourier attention (2105.14995): its formula with the scores in full, what learns, meshes, and coordinates."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.registry import build

SIZES = {"heads": 3, "key_dim": 6, "value_dim": 5}


def draw(tokens=23, keys=None, *, batch=2):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, 6), (keys or tokens, 6), (keys or tokens, 5))
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


def fourier(implementation="torch", *, learned=True, **hyperparameters):
    """With norms and a map of coordinates as if they had been learned, different from head to head."""
    mechanism = build("fourier", **SIZES, causal=False, implementation=implementation, **hyperparameters)
    if learned:
        generator = torch.Generator().manual_seed(5)
        for parameter in mechanism.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mechanism


def oracle(mechanism, q, k, v, *, query_coordinates=None, key_coordinates=None):
    """Score by score: Ln(q_i)·Ln(k_j) + x_i·y_j, over N_k."""

    def normed(x, norm, head):
        mean = sum(x) / len(x)
        variance = sum((x - mean) ** 2) / len(x)
        return (x - mean) / (variance + 1e-5) ** 0.5 * norm.weight[head] + norm.bias[head]

    out = []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            keys = [normed(x, mechanism.key_norm, h) for x in k[b, h]]
            for i, x in enumerate(q[b, h]):
                query, row = normed(x, mechanism.query_norm, h), 0
                for j, key in enumerate(keys):
                    score, value = (query * key).sum(), v[b, h, j]
                    if key_coordinates is not None:
                        score = score + (query_coordinates[b, 0, i] * key_coordinates[b, 0, j]).sum()
                        value = value + key_coordinates[b, 0, j] @ mechanism.coordinate_map[h]
                    row = row + score * value / len(keys)
                out.append(row)
    return torch.stack(out).view(*q.shape[:3], 5)


@pytest.mark.parametrize("coordinates", [0, 2])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(("tokens", "keys"), [(11, 11), (4, 13), (13, 4), (1, 1)])
def test_output_is_that_of_the_scores(tokens, keys, implementation, coordinates):
    q, k, v = draw(tokens, keys)
    mechanism, extras = fourier(implementation, coordinates=coordinates), meshes(q, k, coordinates)
    found = mechanism(q, k, v, **extras)
    torch.testing.assert_close(found, oracle(mechanism, q, k, v, **extras), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("coordinates", [0, 2])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_gradients_are_those_of_the_scores(tokens_first, coordinates):
    q, k, v = draw(7, 9)
    mechanism, extras = fourier(coordinates=coordinates), meshes(q, k, coordinates)
    leaves = [x.requires_grad_() for x in (q, k, v, *extras.values(), *mechanism.parameters())]
    arranged = [x.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else x for x in (q, k, v)]
    toward = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    found = torch.autograd.grad(mechanism(*arranged, **extras), leaves, toward)
    expected = torch.autograd.grad(oracle(mechanism, q, k, v, **extras), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_many_slabs_and_both_layouts_agree_with_fp64():
    q, k, v = (x.repeat(1, 1, 211, 1) + torch.linspace(0, 3, 4853)[:, None] for x in draw())
    expected = fourier("reference")(q, k, v)
    q, k, v = (x.float() for x in (q, k, v))
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        found = fourier()(*(layout(x) for x in (q, k, v)))
        assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-6


def test_scale_and_offset_of_queries_and_keys_do_not_matter():
    q, k, v = draw()
    mechanism = fourier()
    expected = mechanism(1e3 * q, 1e3 * k, v)  # so large that what is added to the variance does not show
    torch.testing.assert_close(mechanism(4e3 * q + 7, 2e3 * k - 5, v), expected, rtol=1e-9, atol=1e-9)


def test_the_scale_of_the_code_fits_into_the_norm_of_the_queries():
    q, k, v = draw()
    plain, scaled = fourier(), fourier()
    for parameter in scaled.query_norm.parameters():
        parameter.data *= 6**-0.5
    torch.testing.assert_close(scaled(q, k, v), plain(q, k, v) / 6**0.5)


@pytest.mark.parametrize("coordinates", [0, 2])
def test_a_mesh_refined_by_duplication_gives_the_same(coordinates):
    q, k, v = draw()
    mechanism, extras = fourier(coordinates=coordinates), meshes(q, k, coordinates)
    expected = mechanism(q, k, v, **extras)
    if coordinates:
        extras["key_coordinates"] = extras["key_coordinates"].repeat_interleave(3, 2)
    found = mechanism(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), **extras)
    torch.testing.assert_close(found, expected)


def test_norms_start_as_layer_norms():
    q, k, v = draw()
    ln = torch.nn.functional.layer_norm
    torch.testing.assert_close(fourier(learned=False)(q, k, v), ln(q, (6,)) @ ln(k, (6,)).mT @ v / 23)


@pytest.mark.parametrize("coordinates", [0, 2])
def test_flops_are_linear_and_those_of_the_products(coordinates):
    q, k, v = draw(512)
    mechanism, extras = fourier(learned=False, coordinates=coordinates), meshes(q, k, coordinates)
    cell = Cell(mechanism="fourier", length=512, batch=2, heads=3, head_dim=6, value_dim=5)

    def run(begin):
        begin()
        return mechanism(q, k, v, **extras)

    products, _ = counted_flops(run)
    assert mechanism.flops(cell) == 2 * 3 * 512 * 2 * (6 + coordinates) * (5 + coordinates + 5)
    assert 0 <= products - mechanism.flops(cell) <= 6 * 8 * 64  # what acts on the sums
