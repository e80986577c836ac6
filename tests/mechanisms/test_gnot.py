"""GNOT's normalised attention (2302.14376): its formula, several input functions, the residual, and what underflows."""

import pytest
import torch

from linbench.cell import Cell
from linbench.conformance.counting import counted_flops
from linbench.errors import UsageError
from linbench.registry import build


def draw(tokens=23, keys=None, *, value_dim=5, batch=2):
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, 6), (keys or tokens, 6), (keys or tokens, value_dim))
    return [torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64) for size in sizes]


def gnot(implementation="torch", *, value_dim=5, causal=False, **hyperparameters):
    geometry = {"heads": 3, "key_dim": 6, "value_dim": value_dim, "causal": causal}
    return build("gnot", **geometry, implementation=implementation, **hyperparameters)


def oracle(q, k, v, lengths, *, residual=False):
    """Query by query and source by source: α Σ_j (q̃·k̃_j) v_j with α = 1 / (q̃·Σ_j k̃_j), their mean, and q̃."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i, logits in enumerate(q[b, h]):
                query, first = logits.exp() / logits.exp().sum(), 0
                for length in lengths:
                    tokens = range(first, first + length)
                    keys = [k[b, h, j].exp() / k[b, h, j].exp().sum() for j in tokens]
                    alpha = 1 / (query @ sum(keys))
                    for j, key in zip(tokens, keys, strict=True):
                        out[b, h, i] += alpha * (query @ key) * v[b, h, j] / len(lengths)
                    first += length
                if residual:
                    out[b, h, i] += query
    return out


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize(
    ("tokens", "keys", "lengths"), [(5, 11, (11,)), (9, 4, (4,)), (5, 11, (4, 4, 3)), (1, 3, (1, 1, 1)), (1, 1, (1,))]
)
def test_output_is_that_of_the_paper_source_by_source(tokens, keys, lengths, implementation):
    q, k, v = draw(tokens, keys)
    found = gnot(implementation, sources=len(lengths))(q, k, v)
    torch.testing.assert_close(found, oracle(q, k, v, lengths), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("lengths", [(11,), (6, 5)])
def test_the_residual_adds_the_softmax_of_the_query(lengths, implementation):
    q, k, v = draw(4, 11, value_dim=6)
    found = gnot(implementation, value_dim=6, sources=len(lengths), residual=True)(q, k, v)
    torch.testing.assert_close(found, oracle(q, k, v, lengths, residual=True), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("lengths", "residual"), [((9,), False), ((5, 4), True)])
def test_gradients_are_those_of_the_formula(lengths, residual):
    leaves = [x.requires_grad_() for x in draw(4, 9, value_dim=6)]
    toward = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mechanism = gnot(value_dim=6, sources=len(lengths), residual=residual)
    found = torch.autograd.grad(mechanism(*leaves), leaves, toward)
    expected = torch.autograd.grad(oracle(*leaves, lengths, residual=residual), leaves, toward)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_many_slabs_agree_with_the_reference():
    q, k, v = draw(4001, 3001, batch=1)
    settings = {"sources": 3}
    torch.testing.assert_close(gnot(**settings)(q, k, v), gnot("reference", **settings)(q, k, v))


def test_the_same_source_three_times_is_one_source():
    q, k, v = draw()
    found = gnot(sources=3)(q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1))
    torch.testing.assert_close(found, gnot()(q, k, v))


def test_sources_of_any_length_weigh_the_same_where_the_code_would_sum_them():
    q, k, v = draw(7, 12)
    found = gnot(sources=2)(q, k, v)
    halves = [gnot()(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(found, sum(halves) / 2)  # the authors' code gives sum(halves)


def test_a_source_with_every_point_twice_gives_the_same():
    q, k, v = draw()
    torch.testing.assert_close(gnot()(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)), gnot()(q, k, v))


def test_constant_values_come_back_beside_the_query():
    q, k, v = draw(value_dim=6)
    v = v[:, :, :1].expand_as(v)
    found = gnot(value_dim=6, sources=2, residual=True)(q, k, v)
    torch.testing.assert_close(found, q.softmax(-1) + v)


def test_an_offset_of_a_query_or_a_key_does_not_matter():
    q, k, v = draw()
    shift = torch.linspace(-30, 30, 23, dtype=torch.float64)[:, None]
    torch.testing.assert_close(gnot()(q + shift, k - 2 * shift, v), gnot()(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_without_any_weight_leave_rows_that_sum_to_one(dtype):
    """A query all on a channel on which no key has weight left: q̃·Σk̃ underflows, what it weighs does not."""
    q = torch.zeros(1, 3, 2, 6, dtype=dtype)
    k, v = q.clone(), torch.ones(1, 3, 2, 5, dtype=dtype)
    q[..., 0], k[..., 1] = 5e3, 5e3
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = gnot()(*leaves)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), leaves))


def test_values_of_another_width_have_no_residual():
    with pytest.raises(UsageError, match="queries of 6 channels to values of 5"):
        gnot(residual=True)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_fewer_keys_than_sources_are_refused(implementation):
    mechanism = gnot(implementation, sources=4)
    assert "3 keys cannot belong to 4 sources" in mechanism.unsupported(Cell(mechanism="gnot", length=3))
    assert mechanism.unsupported(Cell(mechanism="gnot", length=4)) is None
    with pytest.raises(UsageError, match="3 keys cannot belong to 4 sources"):
        mechanism(*draw(5, 3))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_there_is_no_causal_form(implementation):
    with pytest.raises(UsageError, match="no causal form"):
        gnot(implementation, causal=True)(*draw())


@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_flops_are_those_of_the_products(pass_, sources):
    leaves = [x.requires_grad_() for x in draw(510)]
    mechanism = gnot(sources=sources)
    cell = Cell(mechanism="gnot", length=510, batch=2, heads=3, head_dim=6, value_dim=5, **{"pass": pass_})

    def run(begin):
        if pass_ == "forward":
            begin()
            return mechanism(*leaves)
        out = mechanism(*leaves)
        begin()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    products, _ = counted_flops(run)
    assert products == mechanism.flops(cell) == 2 * 3 * 510 * 2 * 6 * 5 * (1 + sources) * (1 + (pass_ == "backward"))
