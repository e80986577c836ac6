"""Reformer: hashing, sorting and chunks written as loops over tokens; its exact limits; what its causal form leaks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from linbench import inputs
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.cores import sorted_chunks
from linbench.registry import build


def operands(length, dtype=torch.float64, seed=0, width=5):
    """B=2, H=3, D=5, M=7."""
    generator = torch.Generator().manual_seed(seed)
    widths = (width, width, 7)
    return [torch.randn(2, 3, length, size, generator=generator, dtype=torch.float64).to(dtype) for size in widths]


def reformer(causal, rounds=2, chunk=4, implementation="torch", seed=0):
    return build(
        "reformer",
        heads=3,
        key_dim=5,
        value_dim=7,
        causal=causal,
        seed=seed,
        implementation=implementation,
        rounds=rounds,
        chunk=chunk,
    )


def shared_attention(q, v, causal):
    """The target pair by pair: unit keys, no scale, the token itself only where there is no other."""
    output = torch.zeros_like(v)
    for i in range(q.shape[2]):
        others = [j for j in range(i if causal else q.shape[2]) if j != i] or [i]
        keys = F.normalize(q[:, :, others], dim=-1)
        weights = torch.softmax((q[:, :, i : i + 1] * keys).sum(-1), -1)
        output[:, :, i] = (weights[..., None] * v[:, :, others]).sum(2)
    return output


def one_head(x, v, mechanism, causal):
    """The oracle: buckets, chunks, and one softmax a round, joined by their sums; x ``[N, D]``, v ``[N, M]``."""
    length, chunk = len(x), mechanism.chunk
    sums, total = torch.zeros_like(v), torch.zeros(length, 1, dtype=v.dtype)
    for rotations in mechanism.rotations(length, x.device):
        buckets = [tuple(int(torch.cat((row.float() @ R, -row.float() @ R)).argmax()) for R in rotations) for row in x]
        order = sorted(range(length), key=lambda i: (buckets[i], i))
        chunks = [order[first : first + chunk] for first in range(0, length, chunk)]
        for index, members in enumerate(chunks):
            seen = {*members, *chunks[index - 1]}
            for i in members:
                for j in seen - {i}:
                    if not causal or j < i:
                        weight = (x[i] @ x[j] / math.sqrt(x[j] @ x[j] + 1e-6 * x.shape[1])).exp()
                        sums[i] += weight * v[j]
                        total[i] += weight
    return torch.where(total > 0, sums / total.clamp(min=1e-300), v)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "rounds", "chunk"), [(1, 2, 4), (7, 3, 4), (30, 2, 5), (33, 3, 4), (40, 1, 1)])
def test_both_forms_are_the_sorted_chunks_token_by_token(implementation, causal, length, rounds, chunk):
    q, k, v = operands(length)
    mechanism = reformer(causal, rounds, chunk, implementation)
    output = mechanism(q, k, v)
    for batch, head in ((0, 0), (1, 2)):
        expected = one_head(q[batch, head], v[batch, head], mechanism, causal)
        torch.testing.assert_close(output[batch, head], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (2, 1), (12, 12), (12, 64), (12, 6), (13, 7), (13, 12)])
def test_two_chunks_are_exact_in_any_number_of_rounds(causal, rounds, length, chunk):
    q, k, v = operands(length)
    mechanism = reformer(causal, rounds, chunk)
    exact = shared_attention(q, v, causal)
    # the keys of the paper's code are a little shorter than one: by 10⁻⁶·D of their squared norm
    torch.testing.assert_close(mechanism(q, k, v), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(mechanism.target(q, k, v), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(mechanism(q, k, v), mechanism.target(q, k, v), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_equal_rotations_in_every_round_are_one_round(causal):
    q, k, v = operands(50)
    single, several = reformer(causal, 1), reformer(causal, 3)
    several.rotations(50, q.device)[1:] = [several.rotations(50, q.device)[0]] * 2
    torch.testing.assert_close(several(q, k, v), single(q, k, v), rtol=1e-12, atol=1e-13)


def test_more_rounds_begin_with_the_same_rotations_and_another_seed_has_others():
    few, many, other = reformer(False, 2), reformer(False, 5), reformer(False, 2, seed=1)
    first, longer, differing = (m.rotations(50, torch.device("cpu")) for m in (few, many, other))
    assert torch.equal(first[1][0], longer[1][0])
    assert not torch.equal(first[1][0], differing[1][0])
    assert not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize(
    ("length", "chunk", "factors"),
    [
        (128, 64, ()),  # two chunks see everything
        (129, 64, (4,)),
        (1024, 64, (32,)),
        (2048, 64, (64,)),
        (4096, 64, (8, 16)),
        (65536, 64, (32, 64)),
        (2**20, 64, (32, 32, 32)),
    ],
)
def test_buckets_are_a_power_of_two_near_twice_the_chunks_in_factors(length, chunk, factors):
    assert reformer(False, chunk=chunk).factors(length) == factors


def test_a_bucket_is_the_nearest_of_the_rotated_axes_and_their_opposites():
    mechanism = reformer(False, rounds=1, chunk=4)
    q = operands(24)[0]
    (rotation,) = mechanism.rotations(24, q.device)[0]
    buckets = torch.cat((q.float() @ rotation, -(q.float() @ rotation)), -1).argmax(-1).flatten(0, 1)
    (order,) = mechanism.orders(q)
    key = buckets * 24 + torch.arange(24)
    assert torch.equal(order, key.argsort(-1))
    assert buckets.unique().numel() > 4


def test_tokens_that_are_all_alike_stay_in_the_order_of_their_positions():
    q = operands(1)[0].expand(2, 3, 30, 5)
    assert all(torch.equal(order, torch.arange(30).expand(6, 30)) for order in reformer(False, 3).orders(q))


def test_hashes_are_the_same_in_every_dtype():
    q = operands(300, torch.bfloat16)[0]
    expected = reformer(False, 3).orders(q)
    for dtype in (torch.float32, torch.float64):
        found = reformer(False, 3).double().orders(q.to(dtype))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_only_the_first_token_of_a_causal_sequence_attends_to_itself():
    q, k, v = operands(8)
    mechanism = reformer(True, chunk=4)
    torch.testing.assert_close(mechanism(q, k, v)[:, :, 0], v[:, :, 0], rtol=0, atol=0)
    torch.testing.assert_close(mechanism(q, k, v)[:, :, 1], v[:, :, 0], rtol=1e-12, atol=1e-13)


def test_the_keys_that_are_given_are_not_used():
    q, k, v = operands(30)
    assert torch.equal(reformer(True)(q, k, v), reformer(True)(q, 7 * k + 1, v))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_future_values_change_nothing_and_future_queries_change_what_is_seen(implementation):
    q, k, v = operands(200)
    mechanism = reformer(True, rounds=1, chunk=8, implementation=implementation)
    before = mechanism(q, k, v)[:, :, :120]
    other_v = torch.cat((v[:, :, :120], 100 * v[:, :, 120:]), 2)
    assert torch.equal(mechanism(q, k, other_v)[:, :, :120], before)
    other_q = torch.cat((q[:, :, :120], operands(80, seed=5)[0]), 2)
    assert not torch.allclose(mechanism(other_q, k, v)[:, :, :120], before, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_error_falls_with_the_rounds_on_clustered_inputs(causal):
    cell = Cell(mechanism="reformer", length=1024, heads=2, inputs="clustered", causal=causal)
    q, k, v = (x.double() for x in inputs.draw(cell))
    errors = []
    for rounds in (1, 2, 4, 8):
        mechanism = build("reformer", heads=2, key_dim=64, value_dim=64, causal=causal, rounds=rounds)
        exact = mechanism.target(q, k, v)
        errors.append(((mechanism(q, k, v) - exact).norm() / exact.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("budget", [1, 200, 2**18])
def test_how_much_is_computed_at_once_changes_nothing(causal, budget, monkeypatch):
    monkeypatch.setattr(sorted_chunks, "CPU_LOGITS", budget)
    leaves = [x.requires_grad_() for x in operands(61)]
    fast, exact = reformer(causal, 3)(*leaves), reformer(causal, 3).reference(*leaves)
    torch.testing.assert_close(fast, exact, rtol=1e-11, atol=1e-12)
    toward = torch.randn(exact.shape, dtype=exact.dtype)
    wanted = [leaves[0], leaves[2]]
    for ours, theirs in zip(
        torch.autograd.grad(fast, wanted, toward), torch.autograd.grad(exact, wanted, toward), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [1e-20, 1e4])
def test_tiny_and_huge_queries_stay_finite_with_their_gradients(size):
    leaves = [(size * x if index == 0 else x).requires_grad_() for index, x in enumerate(operands(40, torch.float32))]
    output = reformer(True)(*leaves)
    grads = torch.autograd.grad(output.sum(), [leaves[0], leaves[2]])
    assert all(x.isfinite().all() for x in (output, *grads))


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (7, 4), (8, 4), (9, 4), (33, 4), (40, 8)])
def test_pairs_are_those_of_every_chunk_and_the_one_before_it(length, chunk):
    sizes = [min(chunk, length - first) for first in range(0, length, chunk)]
    expected = sum(size * (size + (sizes[i - 1] if len(sizes) > 1 else 0)) for i, size in enumerate(sizes))
    assert reformer(False, chunk=chunk).pairs(length) == expected


@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
def test_flops_are_those_of_its_products(pass_):
    cell = Cell(mechanism="reformer", length=64, batch=2, heads=3, head_dim=5, value_dim=7, pass_=pass_)
    mechanism, leaves = reformer(False, rounds=3, chunk=8), [x.requires_grad_() for x in operands(64)]
    with FlopCounterMode(display=False) as forward:
        output = mechanism(*leaves)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    counted = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    counted["forward_backward"] = sum(counted.values())
    assert mechanism.flops(cell) == counted[pass_]


def test_it_needs_as_many_keys_as_queries_and_does_not_decode():
    q, k, v = operands(9)
    with pytest.raises(UsageError, match="9 queries and 8 keys"):
        reformer(False)(q, k[:, :, :8], v[:, :, :8])
    assert not reformer(True).decodes
    assert reformer(True).state_bytes(9, torch.float32) is None
