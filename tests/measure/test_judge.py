"""Errors of gradients, by position and over seeds, against figures that are known."""

import math

import pytest
import torch

from linbench import inputs, registry
from linbench.cell import Cell
from linbench.measure.call import Call
from linbench.measure.error import measure_error, parts
from linbench.measure.exact import exact_attention
from linbench.measure.judge import judge_error


def call(name, *, length=45, pass_="forward", causal=False, seed=3, **hyperparameters):
    cell = Cell(
        mechanism=name, hyperparameters=hyperparameters, length=length, heads=2, head_dim=8, value_dim=5,
        causal=causal, pass_=pass_, seed=seed,
    )  # fmt: skip
    mechanism = registry.of_cell(cell)
    backward = pass_ != "forward"
    q, k, v = (x.requires_grad_(backward) for x in inputs.draw(cell))
    generator = torch.Generator().manual_seed(0)
    toward = torch.randn(v.shape, generator=generator) if backward else None
    return Call(cell, mechanism, q, k, v, mechanism.make_extras(q, k, v, generator), toward)


def judged(one, **options):
    return judge_error(one, one.forward().detach(), **options)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_has_exact_gradients(causal):
    errors = judged(call("softmax", pass_="forward_backward", causal=causal)).gradient_errors
    assert set(errors) == {"dq", "dk", "dv"}
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_errors_are_those_of_autograd_through_both_formulas(causal):
    one = call("linear", pass_="backward", causal=causal)
    leaves = [x.detach().double().requires_grad_() for x in (one.q, one.k, one.v)]
    q, k, v = leaves
    features = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    scores = q @ k.mT / math.sqrt(8)
    if causal:
        hidden = torch.ones(45, 45).triu(1).bool()
        features, scores = features.tril(), scores.masked_fill(hidden, -math.inf)
    toward = one.output_gradient.double()
    ours = torch.autograd.grad(features / features.sum(-1, keepdim=True) @ v, leaves, toward)
    exact = torch.autograd.grad(scores.softmax(-1) @ v, leaves, toward)
    expected = {
        name: float((a - b).norm() / b.norm()) for name, a, b in zip(("dq", "dk", "dv"), ours, exact, strict=True)
    }
    assert judged(one).gradient_errors == pytest.approx(expected, rel=1e-4)


def test_gradients_are_judged_only_where_there_are_any_and_up_to_a_length():
    assert judged(call("linear")).gradient_errors == {}
    assert judged(call("linear", pass_="backward"), gradient_tokens=44).gradient_errors == {}
    single = judged(call("linear", pass_="backward", length=1)).gradient_errors
    assert set(single) == {"dv"}  # the weight of a single token is one, whatever q and k are


def test_parts_cover_every_position_once():
    assert parts(20, causal=True) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 20)]
    assert parts(16, causal=True)[-1] == (8, 16)
    assert parts(20, causal=False) == [(0, 2), (2, 5), (5, 7), (7, 10), (10, 12), (12, 15), (15, 17), (17, 20)]
    assert parts(3, causal=False) == [(0, 1), (1, 2), (2, 3)]
    assert parts(1, causal=True) == parts(1, causal=False) == [(0, 1)]


@pytest.mark.parametrize("rows", [4096, 64])
def test_an_error_of_late_tokens_is_found_late(rows):
    one = call("softmax", length=2000, causal=True)
    q, k, v = one.q, one.k, one.v
    output = exact_attention(q, k, v, True)
    output[:, :, 1024:] *= 1.5
    block = measure_error(output, q, k, v, causal=True, reading="error", rows=rows, full_up_to_tokens=rows)
    errors = {part.first_token: part.relative_error for part in block.by_position}
    assert errors.pop(1024) == pytest.approx(0.5)
    assert max(errors.values()) < 1e-12
    assert sum(part.rows for part in block.by_position) == block.rows == min(rows, 2000)
    assert block.by_position[-1].last_token == 1999


def test_random_features_have_an_error_for_every_seed():
    one = call("performer", features=16)
    block = judged(one, seeds=4)
    assert len(set(block.seed_errors)) == 4
    assert block.seed_errors[0] == pytest.approx(block.relative_error, rel=1e-6)
    again = judged(call("performer", features=16, seed=3), seeds=4)
    assert again.seed_errors == block.seed_errors
    one.mechanism = registry.of_cell(one.cell, seed=4)
    assert judged(one).relative_error == pytest.approx(block.seed_errors[1], rel=1e-6)


def test_seeds_that_make_no_difference_are_not_judged():
    assert judged(call("linear")).seed_errors == []
    assert judged(call("performer"), seeds=1).seed_errors == []
