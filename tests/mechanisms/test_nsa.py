"""Native Sparse Attention (2502.11089) token by token, and the limits of its branches."""

import pytest
import torch

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.registry import build

SMALL = {"block": 8, "selected": 4, "window": 5, "compressed": 4, "stride": 2}


def draw(batch, heads, tokens, key_dim, value_dim):
    torch.manual_seed(0)
    widths = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float64) for width in widths)
    return (
        q,
        k,
        v,
        {name: torch.rand(batch, heads, tokens, dtype=torch.float64) for name in ("g_cmp", "g_slc", "g_win")},
    )


def nsa(q, v, implementation="torch", **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build("nsa", **sizes, causal=True, implementation=implementation, **hyperparameters)


def attend(q, k, v):
    return torch.softmax(k @ q / len(q) ** 0.5, 0) @ v


def oracle(operands, settings, group):
    """One batch element, one token after the other, blocks as lists of positions."""
    q, k, v, g_cmp, g_slc, g_win = operands
    block, selected, window, length, stride = settings.values()
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        starts = [s for s in range(0, t + 1, stride) if s + length <= t + 1]
        probabilities = {}
        for h in range(len(q)):
            if starts:
                keys = torch.stack([k[h, s : s + length].mean(0) for s in starts])
                values = torch.stack([v[h, s : s + length].mean(0) for s in starts])
                probabilities[h] = torch.softmax(keys @ q[h, t] / q.shape[-1] ** 0.5, 0)
                out[h, t] += g_cmp[h, t] * (probabilities[h] @ values)
        own = t // block
        for h in range(len(q)):
            worth = dict.fromkeys(range(own + 1), 0.0)
            for member in range(h // group * group, h // group * group + group):
                for s, p in zip(starts, probabilities.get(member, []), strict=True):
                    for unit in range(s, s + length, stride):
                        worth[unit // block] += p.item()
            always = {0, own, max(own - 1, 0)}
            others = sorted(set(worth) - always, key=lambda b: -worth[b])
            chosen = always | set(others[: selected - len(always)])
            keys = [j for j in range(t + 1) if j // block in chosen]
            out[h, t] += g_slc[h, t] * attend(q[h, t], k[h, keys], v[h, keys])
            recent = slice(max(0, t + 1 - window), t + 1)
            out[h, t] += g_win[h, t] * attend(q[h, t], k[h, recent], v[h, recent])
    return out


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_equals_the_definition(implementation, group):
    q, k, v, extras = draw(1, 4, 130, 5, 3)
    found = nsa(q, v, implementation, **SMALL, group=group)(q, k, v, **extras)
    expected = oracle([x[0] for x in (q, k, v, *extras.values())], SMALL, group)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("tokens", [150, 517])  # masked, and tiles of sorted pairs beyond 32 blocks
def test_gradients_equal_those_of_the_reference(tokens):
    q, k, v, extras = draw(2, 2, tokens, 5, 3)
    weight, grads = torch.randn_like(v), []
    for implementation in ("torch", "reference"):
        inputs = [x.requires_grad_() for x in (q, k, v, *extras.values())]
        mechanism = nsa(q, v, implementation, **SMALL)
        grads.append(torch.autograd.grad(mechanism(q, k, v, **extras), [*inputs, *mechanism.parameters()], weight))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_all_blocks_selected_are_exact_attention():
    q, k, v, extras = draw(2, 3, 330, 5, 3)
    limit = type(nsa(q, v)).exact_limit(330)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = nsa(q, v, **limit.hyperparameters)(q, k, v, **limit.extras(extras))
    torch.testing.assert_close(found, expected)
    fewer = nsa(q, v, **SMALL)(q, k, v, **limit.extras(extras))
    assert (fewer - expected).norm() > 0.1 * expected.norm()


def test_the_window_alone_is_a_band():
    q, k, v, extras = draw(1, 2, 100, 5, 3)
    extras["g_cmp"], extras["g_slc"] = 0 * extras["g_cmp"], 0 * extras["g_slc"]
    extras["g_win"] = torch.ones_like(extras["g_win"])
    distance = torch.arange(100)[:, None] - torch.arange(100)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 7))
    torch.testing.assert_close(nsa(q, v, window=7)(q, k, v, **extras), expected)


def test_a_compressed_block_is_seen_from_its_last_token_on():
    q, k, v, extras = draw(1, 1, 40, 5, 3)
    closed = torch.zeros_like(extras["g_cmp"])
    out = nsa(q, v, compressed=32, stride=16)(q, k, v, g_cmp=closed + 1, g_slc=closed, g_win=closed)
    assert (out[:, :, :31] == 0).all()
    torch.testing.assert_close(out[:, :, 31], v[:, :, :32].mean(2))


def test_what_cannot_be_is_refused():
    q, k, v, extras = draw(1, 3, 20, 5, 3)
    with pytest.raises(UsageError, match="stride=6 must divide"):
        nsa(q, v, stride=6)
    with pytest.raises(UsageError, match="3 heads are no whole groups of 2"):
        nsa(q, v, group=2)(q, k, v, **extras)


@pytest.mark.parametrize("tokens", [1, 9, 40, 77])
def test_pairs_are_those_that_are_seen(tokens):
    q, _, v, _ = draw(1, 1, 1, 64, 64)
    block, selected, window, length, stride = SMALL.values()
    expected = 0
    for t in range(tokens):
        expected += len([s for s in range(0, tokens, stride) if s + length <= t + 1]) + min(t + 1, window)
        expected += min(t // block, selected - 1) * block + t % block + 1
    mechanism = nsa(q, v, **SMALL)
    assert mechanism.pairs(tokens) == expected
    cell = Cell.model_validate({"mechanism": "nsa", "length": tokens, "causal": True, "heads": 1})
    small = max((tokens - length) // stride + 1, 0)
    assert mechanism.flops(cell) == 256 * expected + 2 * small * length * 128


def test_decoding_selects_the_same_blocks():
    """Far more blocks than are selected, whole groups of heads, compressed blocks that end at every other token."""
    q, k, v, extras = draw(2, 4, 133, 5, 3)
    mechanism = nsa(q, v, **SMALL, group=2)
    state, outputs = mechanism.initial_state(2, q.device, q.dtype), []
    for t in range(133):
        gates = {name: gate[:, :, t] for name, gate in extras.items()}
        out, state = mechanism.step(q[:, :, t], k[:, :, t], v[:, :, t], state, **gates)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v, **extras))
