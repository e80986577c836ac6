"""Streamed gradients of exact attention against autograd."""

import math

import pytest
import torch

from linbench.measure import exact_gradients as module
from linbench.measure.exact_gradients import exact_gradients


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [2**22, 100])
def test_gradients_are_those_of_autograd_in_any_blocks(causal, scores, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 29, 7), (2, 3, 29, 7), (2, 3, 29, 5), (2, 3, 29, 5))
    q, k, v, toward = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    weights = leaves[0] @ leaves[1].mT / math.sqrt(7)
    if causal:
        weights = weights.masked_fill(torch.ones(29, 29).triu(1).bool(), -math.inf)
    expected = torch.autograd.grad(weights.softmax(-1) @ leaves[2], leaves, toward)
    for ours, theirs in zip(exact_gradients(q, k, v, toward, causal), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_more_keys_than_queries():
    q, k, v, toward = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (5, 11, 11, 5))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad((leaves[0] @ leaves[1].mT / 2).softmax(-1) @ leaves[2], leaves, toward)
    for ours, theirs in zip(exact_gradients(q, k, v, toward, causal=False), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
