"""The parts of the delta core: products across decays, the triangular inverse, the walk over chunks, runs."""

import math

import pytest
import torch

from linbench.mechanisms.cores import delta, delta_state
from linbench.mechanisms.cores.delta import Operands
from linbench.mechanisms.cores.delta_pairs import channel_products, rate_products
from linbench.mechanisms.cores.delta_scan import Scan, UnitTriangularInverse
from linbench.mechanisms.cores.delta_state import Unit
from linbench.registry import build


def draw(*shapes):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def across(rows, columns, log_decay, upto):
    """Σ_d x_id y_jd exp(g_{j+1,d} + … + g_{upto(i),d}) for j ≤ upto(i), pair by pair."""
    chunks, length, _ = rows.shape
    out = rows.new_zeros(chunks, length, length)
    for i in range(length):
        for j in range(upto(i) + 1):
            decay = log_decay[:, j + 1 : upto(i) + 1].sum(1).exp()
            out[:, i, j] = (rows[:, i] * columns[:, j] * decay).sum(-1)
    return out


@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize("form", ["rate", "channel", "before"])
@pytest.mark.parametrize("strongest", [1.0, 1e3, math.inf])
def test_products_across_decays_are_those_of_every_pair(form, length, strongest):
    query, read, *columns = draw(*[(3, length, 5)] * 4)
    log_decay = -(10.0 ** torch.empty(3, length, 1 if form == "rate" else 5).double().uniform_(-6, 0))
    if strongest > 1:
        log_decay[torch.rand_like(log_decay) < 0.3] = -strongest
    if form == "rate":
        found = rate_products(query, read, log_decay, columns)
    else:
        found = channel_products(query, read, log_decay, columns, before=form == "before")
    close = {"rtol": 1e-10 if form == "rate" else 1e-13, "atol": 1e-14}
    for index, column in enumerate(columns):
        torch.testing.assert_close(found.of_query[index], across(query, column, log_decay, lambda i: i), **close)
        upto = (lambda i: i - 1) if form == "before" else lambda i: i
        torch.testing.assert_close(found.of_read[index], across(read, column, log_decay, upto), **close)
        to_end = torch.stack([log_decay[:, j + 1 :].sum(1).exp() for j in range(length)], 1)
        torch.testing.assert_close(found.columns[index], column * to_end, **close)
    since_start = log_decay.cumsum(1).exp()
    torch.testing.assert_close(found.query, query * since_start, **close)
    if form == "before":
        since_start = torch.cat([torch.ones_like(since_start[:, :1]), since_start[:, :-1]], 1)
    torch.testing.assert_close(found.read, read * since_start, **close)
    torch.testing.assert_close(found.total, log_decay.sum(1, keepdim=True).exp().mT, **close)


@pytest.mark.parametrize("form", ["rate", "channel", "before"])
def test_gradients_of_products_are_those_of_finite_differences(form):
    *operands, log_decay = draw(*[(2, 8, 3)] * 4, (2, 8, 1 if form == "rate" else 3))

    def products(query, read, first, second, log_decay):
        if form == "rate":
            found = rate_products(query, read, log_decay, (first, second))
        else:
            found = channel_products(query, read, log_decay, (first, second), before=form == "before")
        return found.query, found.read, found.total, *found.columns, *found.of_query, *found.of_read

    assert torch.autograd.gradcheck(products, [x.requires_grad_() for x in (*operands, -log_decay.detach().exp())])


def test_the_inverse_reads_below_the_diagonal_alone():
    (a,) = draw((3, 9, 9))
    expected = torch.linalg.inv(torch.eye(9).double() - a.tril(-1))
    torch.testing.assert_close(UnitTriangularInverse.apply(a), expected)
    assert torch.autograd.gradcheck(UnitTriangularInverse.apply, a.requires_grad_())


@pytest.mark.parametrize("decay", [None, 1, 4])
@pytest.mark.parametrize("adds", [False, True])
def test_the_walk_over_chunks(decay, adds):
    state, start, read, write, total, added = draw(
        (2, 4, 3), (5, 2, 6, 3), (5, 2, 6, 4), (5, 2, 6, 4), (5, 2, decay or 1, 1), (5, 2, 4, 3)
    )
    operands = [state, start, read / 4, write / 4, None if decay is None else total, added if adds else None]
    solved, states, last = Scan.apply(*operands)
    for chunk in range(5):
        torch.testing.assert_close(states[chunk], state)
        torch.testing.assert_close(solved[chunk], start[chunk] + read[chunk] @ state / 4)
        state = state * (1 if decay is None else total[chunk]) + write[chunk].mT @ solved[chunk] / 4
        state = state + (added[chunk] if adds else 0)
    torch.testing.assert_close(last, state)
    assert torch.autograd.gradcheck(Scan.apply, [x if x is None else x.requires_grad_() for x in operands])


@pytest.mark.parametrize("kind", ["plain", "rate", "channel", "keys"])
def test_chunks_of_any_length_give_what_single_tokens_give(kind):
    query, read, write, value, keys = draw(*[(32, 3, 4)] * 3, (32, 3, 2), (32, 3, 4))
    read, write = read / 4, write / 4
    log_decay = None if kind == "plain" else -torch.rand(32, 3, 1 if kind == "rate" else 4).double()
    tokens = [query, read, write, value, log_decay, keys if kind == "keys" else None]
    state, outputs = torch.zeros(3, 4, 2).double(), []
    for token in range(32):
        out, state = delta.step(Operands(*(None if x is None else x[token, :, None] for x in tokens)), state)
        outputs.append(out[:, 0])
    for length in (1, 2, 8, 32):
        chunks = [None if x is None else x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in tokens]
        out, last = delta.run(
            Operands(*(None if x is None else x.contiguous() for x in chunks)), torch.zeros_like(state)
        )
        torch.testing.assert_close(out.transpose(1, 2).flatten(0, 1), torch.stack(outputs))
        torch.testing.assert_close(last, state)


def test_rows_of_norm_one():
    (x,) = draw((3, 4, 5))
    torch.testing.assert_close(Unit.apply(x, 0.3), 0.3 * torch.nn.functional.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(lambda x: Unit.apply(x, 0.3), x.requires_grad_())
    rows = torch.tensor([[3e38, -3e38, 0.0], [0.0, 0.0, 0.0], [1e-30, 0.0, 1e-30], [0.0, 1e-44, 0.0]])
    found = Unit.apply(rows.requires_grad_(), 1.0)
    half = 0.5**0.5
    expected = torch.tensor([[half, -half, 0.0], [0.0, 0.0, 0.0], [half, 0.0, half], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found[:, 1].sum(), rows)
    assert grad.isfinite().all()


def inputs(name, batch=3, heads=2, tokens=200):
    mechanism = build(name, heads=heads, key_dim=6, value_dim=5, causal=True)
    q, k, v = (x.requires_grad_() for x in draw(*[(batch, heads, tokens, width) for width in (6, 6, 5)]))
    return mechanism, (q, k, v), mechanism.make_extras(q, k, v, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_runs_and_parts_of_the_batch_change_nothing(name, monkeypatch):
    """Segments of one chunk and one sequence at a time, against everything at once."""
    mechanism, qkv, extras = inputs(name)
    leaves, results = [*qkv, *extras.values(), *mechanism.parameters()], []
    for limit in (1, 2**20):
        monkeypatch.setattr(delta_state, "CORE_TOKENS", limit)
        out = mechanism(*qkv, **extras)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda", "rwkv7"])
def test_a_sequence_may_be_extended_from_its_state(name):
    """Prefill, then more tokens: outputs, state and gradients through the state are those of the whole."""
    mechanism, qkv, extras = inputs(name)
    start = mechanism.initial_state(3, qkv[0].device, torch.float64)
    whole, last = mechanism.extend(*qkv, start, **extras)
    parts, state = [], start
    for tokens in (slice(0, 70), slice(70, 71), slice(71, 200)):
        out, state = mechanism.extend(
            *(x[:, :, tokens] for x in qkv), state, **{name: x[:, :, tokens] for name, x in extras.items()}
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, last)
    found = torch.autograd.grad(torch.cat(parts, 2).square().sum() + state.sum(), [*qkv, *extras.values()])
    expected = torch.autograd.grad(whole.square().sum() + last.sum(), [*qkv, *extras.values()])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
