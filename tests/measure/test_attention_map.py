"""Implied attention maps against matrices that are known, and operators that have none."""

import math

import pytest
import torch

from linbench import inputs, registry
from linbench.cell import Cell
from linbench.measure.attention_map import NoMapError, exact_rows, measure_attention_map, probe
from linbench.measure.call import Call
from linbench.measure.structure import measure_structure
from linbench.mechanisms.base import Description, Geometry, Mechanism

LIMITS = {"rows": 1000, "channel_tokens": 100}


def call(name="softmax", *, causal=False, dtype="float64", length=37, mechanism=None, **hyperparameters):
    cell = Cell(mechanism=name, length=length, heads=3, head_dim=8, value_dim=5, causal=causal, dtype=dtype)
    if mechanism is None:
        sizes = {"heads": 3, "key_dim": 8, "value_dim": 5}
        mechanism = registry.build(name, **sizes, causal=causal, **hyperparameters)
    q, k, v = inputs.draw(cell)
    extras = mechanism.make_extras(q, k, v, torch.Generator().manual_seed(0))
    return Call(cell, mechanism, q, k, v, extras)


class Known(Mechanism):
    """Whatever is done to v."""

    description = Description("known", "replacement", (False, True), "none", "none", 2026)

    def __init__(self, operation, *, causal=False):
        super().__init__(Geometry(3, 8, 5, causal))
        self.operation = operation

    def reference(self, q, k, v, rows=None):
        out = self.operation(v)
        return out if rows is None else out[:, :, rows]

    def forward_torch(self, q, k, v):
        return self.operation(v)

    def flops(self, cell):
        return 0

    def min_bytes(self, cell):
        return 0


def known(operation, **cell):
    one = call(mechanism=Known(operation, causal=cell.get("causal", False)), **cell)
    return one, one.forward()


def measured(one, output, top=4):
    return measure_attention_map(one, output, top=top, **LIMITS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_map_of_softmax_is_that_of_softmax(causal, dtype):
    one = call(causal=causal, dtype=dtype)
    block = measured(one, one.forward())
    small = 1e-10 if dtype == "float64" else 1e-5
    assert block.residual < small
    assert not block.per_channel
    assert block.row_sum_min == pytest.approx(1, abs=small)
    assert block.row_sum_max == pytest.approx(1, abs=small)
    assert block.negative_mass == 0
    assert block.entropy_nats == pytest.approx(block.exact_entropy_nats, abs=small)
    assert block.divergence_nats == pytest.approx(0, abs=small)
    assert block.total_variation == pytest.approx(0, abs=small)
    assert block.top_overlap == 1
    assert block.effective_rank == pytest.approx(block.exact_effective_rank, rel=1e-3)
    assert block.distance_tokens == pytest.approx(block.exact_distance_tokens, rel=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_linear_attention_are_normalised_products_of_features(causal):
    one = call("linear", causal=causal)
    maps = probe(one, one.forward(), rows=9, channel_tokens=0)
    assert len(maps.sample.positions) == 9
    q, k = (torch.nn.functional.elu(x) + 1 for x in (one.q, one.k))
    weights = q @ k.mT
    weights = weights.tril() if causal else weights
    expected = (weights / weights.sum(-1, keepdim=True)).flatten(0, 1)[:, maps.sample.positions]
    torch.testing.assert_close(maps.found, expected, rtol=1e-9, atol=1e-12)


def test_exact_rows_see_no_future():
    one = call(causal=True)
    rows = exact_rows(one, torch.tensor([0, 20, 36]))
    assert rows[:, 0, 0].eq(1).all()
    assert rows[:, 1, 21:].eq(0).all()
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, 3, dtype=torch.float64))


def test_channels_with_matrices_of_their_own_are_probed_one_by_one():
    matrices = torch.randn(5, 37, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, output = known(lambda v: torch.einsum("mij,bhjm->bhim", matrices, v))
    maps = probe(one, output, **LIMITS)
    assert maps.per_channel
    torch.testing.assert_close(maps.found, matrices.repeat(3, 1, 1))
    block = measured(one, output)
    assert block.per_channel
    assert block.effective_rank > block.exact_effective_rank


def test_a_gate_and_a_convolution_for_each_channel_have_maps():
    block = measure_structure(one := call("rala"), one.forward(), map_rows=11)
    assert block.attention.per_channel
    assert block.attention.rows == 11
    assert block.attention_reason is None


@pytest.mark.parametrize(
    ("operation", "reason"),
    [(lambda v: v.square(), "not linear in v"), (lambda v: v.flip(-1), "not linear in v, channel by channel")],
)
def test_operators_that_apply_no_matrix_say_so(operation, reason):
    one, output = known(operation)
    with pytest.raises(NoMapError, match=reason):
        probe(one, output, **LIMITS)
    block = measure_structure(one, output)
    assert block.attention is None
    assert reason in block.attention_reason


def test_channels_of_long_sequences_are_not_probed():
    one, output = known(lambda v: v * torch.arange(1.0, 6))
    with pytest.raises(NoMapError, match="up to 36 tokens"):
        probe(one, output, rows=5, channel_tokens=36)


def test_a_mean_has_the_entropy_of_all_and_the_distance_of_any():
    one, output = known(lambda v: v.mean(2, keepdim=True).expand_as(v))
    block = measured(one, output)
    assert block.entropy_nats == pytest.approx(math.log(37))
    assert block.entropy_nats > block.exact_entropy_nats
    assert block.divergence_nats > 0
    assert block.effective_rank == pytest.approx(1)
    assert block.numerical_rank == 1
    assert block.distance_tokens == pytest.approx((37**2 - 1) / (3 * 37))  # mean |i − j| of two uniform positions


def test_negative_weights_are_no_distribution():
    weights = torch.eye(37, dtype=torch.float64) * 1.5
    weights[:, 3] -= 0.5
    one, output = known(lambda v: weights @ v)
    block = measured(one, output)
    assert block.entropy_nats is None
    assert block.divergence_nats is None
    assert block.negative_mass == pytest.approx(36 / 37 * 0.25)
    assert (block.row_sum_min, block.row_sum_max) == (pytest.approx(1), pytest.approx(1))


def test_overlap_counts_the_largest_weights_of_softmax():
    one = call(length=40)
    rows = exact_rows(one, torch.arange(40)).view(1, 3, 40, 40)
    largest = rows.topk(4, -1).indices
    half = torch.zeros_like(rows).scatter(-1, largest[..., :2], 1.0)
    one.mechanism = Known(lambda v: half @ v + 1e-3 * rows.lt(rows.median()).double() @ v)
    block = measured(one, one.forward())
    assert block.top_overlap == pytest.approx(0.5)


def test_short_rows_are_left_out_of_the_overlap():
    one = call(causal=True, length=6)
    assert measured(one, one.forward(), top=4).top_overlap is None
    assert measured(one, one.forward(), top=3).top_overlap == 1


@pytest.mark.parametrize(("rows", "size", "causal"), [(37, 5, False), (37, 37, True), (11, 4, True)])
def test_the_picture_holds_every_weight_of_its_rows(rows, size, causal):
    one = call(causal=causal)
    output = one.forward()
    limits = {"rows": rows, "channel_tokens": 100}
    found = measure_attention_map(one, output, top=4, **limits, picture=size).picture
    maps = probe(one, output, **limits)
    weights = torch.tensor(found.weights)
    assert weights.shape == (min(size, rows), size)
    assert weights.sum(-1) == pytest.approx(torch.ones(len(weights)), abs=5e-3)
    assert found.exact_weights == found.weights
    assert (found.queries[0], found.keys[0]) == (int(maps.sample.positions[0]), 0)
    if size == 37:
        assert weights.double().numpy() == pytest.approx(maps.exact[0].numpy(), rel=5e-3, abs=1e-9)
        assert (found.queries, found.keys) == (list(range(37)), list(range(37)))


def test_singular_values_descend_from_one_and_tell_the_rank():
    one, output = known(lambda v: v.mean(2, keepdim=True).expand_as(v))
    block = measured(one, output)
    assert block.singular_values[0] == 1
    assert max(block.singular_values[1:]) < 1e-6
    assert sorted(block.exact_singular_values, reverse=True) == block.exact_singular_values
    assert sum(value > 0.01 for value in block.exact_singular_values) == pytest.approx(
        block.exact_numerical_rank, abs=2
    )
