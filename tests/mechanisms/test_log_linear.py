"""Log-linear attention (2506.04761) against the definition of its levels, and the limits of its weights."""

import pytest
import torch

from linbench.cell import Cell
from linbench.mechanisms.log_linear import set_bits
from linbench.registry import build


def draw(size, levels=17, decay=0.01):
    torch.manual_seed(0)
    batch, heads, tokens, key_dim, value_dim = size
    widths = (key_dim, key_dim, value_dim)
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float64) for width in widths)
    extras = {
        "log_decay": -decay * torch.rand(batch, heads, tokens, dtype=torch.float64),
        "level_weights": torch.rand(batch, heads, tokens, levels, dtype=torch.float64),
    }
    return q, k, v, extras


def log_linear(q, v, implementation="torch", **hyperparameters):
    sizes = {"heads": q.shape[1], "key_dim": q.shape[-1], "value_dim": v.shape[-1]}
    return build("log_linear", **sizes, causal=True, implementation=implementation, **hyperparameters)


def oracle(q, k, v, log_decay, level_weights):
    """The Fenwick tree itself: before i lie runs as long as the lowest set bit of what is left."""
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        level, end, runs = 0, i, [(0, i, i + 1)]
        while end:
            length = end & -end
            level = length.bit_length()
            runs.append((level, end - length, end))
            end -= length
        for level, start, stop in runs:
            for j in range(start, stop):
                decay = log_decay[:, :, j + 1 : i + 1].sum(-1).exp()
                weight = level_weights[:, :, i, min(level, level_weights.shape[-1] - 1)] * decay
                out[:, :, i] += (weight * (q[:, :, i] * k[:, :, j]).sum(-1))[..., None] * v[:, :, j]
    return out


@pytest.mark.parametrize("levels", [1, 3, 17])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_output_equals_the_fenwick_tree(implementation, levels):
    q, k, v, extras = draw((2, 1, 75, 3, 2), levels)
    found = log_linear(q, v, implementation, levels=levels)(q, k, v, **extras)
    torch.testing.assert_close(found, oracle(q, k, v, **extras))


@pytest.mark.parametrize("levels", [5, 17])
def test_states_above_chunks_and_runs_equal_the_definition(levels):
    """4500 tokens are 71 chunks in 5 runs of 16, the last of which is not whole; decays are weak enough to see it."""
    q, k, v, extras = draw((1, 1, 4500, 3, 2), levels, decay=1e-4)
    inputs = [x.requires_grad_() for x in (q, k, v, *extras.values())]
    grads, weight = [], torch.randn_like(v)
    outs = [log_linear(q, v, name, levels=levels)(q, k, v, **extras) for name in ("torch", "reference")]
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(out, inputs, weight) for out in outs]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_weights_of_one_are_a_decaying_linear_attention():
    q, k, v, extras = draw((1, 2, 700, 4, 3))
    until = extras["log_decay"].cumsum(-1)
    decay = (until[..., :, None] - until[..., None, :]).exp().tril()
    found = log_linear(q, v)(q, k, v, **{**extras, "level_weights": torch.ones_like(extras["level_weights"])})
    torch.testing.assert_close(found, (q @ k.mT * decay) @ v)


def test_level_0_alone_is_the_diagonal():
    q, k, v, extras = draw((1, 2, 300, 4, 3))
    extras["level_weights"][..., 1:] = 0
    expected = extras["level_weights"][..., :1] * (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(log_linear(q, v)(q, k, v, **extras), expected)


def test_a_decoder_keeps_a_state_per_set_bit():
    q, k, v, extras = draw((1, 1, 140, 3, 2), 6)
    mechanism = log_linear(q, v, levels=6)
    state, outputs = mechanism.initial_state(1, q.device, q.dtype), []
    for t in range(140):
        out, state = mechanism.step(
            q[:, :, t], k[:, :, t], v[:, :, t], state, **{n: x[:, :, t] for n, x in extras.items()}
        )
        outputs.append(out)
        assert sum(x.nbytes for x in state.held()) == mechanism.state_bytes(t + 1, torch.float64)
        assert len(state.held()) <= t.bit_count() + 1
    torch.testing.assert_close(torch.stack(outputs, 2), mechanism(q, k, v, **extras))


@pytest.mark.parametrize("decay", [1e3, 1e30])
def test_total_decay_leaves_the_token_itself(decay):
    q, k, v, extras = draw((1, 2, 300, 4, 3))
    q, k, v, weights = (x.float() for x in (q, k, v, extras["level_weights"]))
    found = log_linear(q, v)(q, k, v, log_decay=torch.full(q.shape[:3], -decay), level_weights=weights)
    torch.testing.assert_close(found, weights[..., :1] * (q * k).sum(-1, keepdim=True) * v)


def test_flops_count_the_reads_of_states():
    """64 chunks of 64: 2C(D + M) + 2DM a token, and 2DM for each of 3 set bits on average."""
    assert [set_bits(n) for n in (0, 1, 2, 3, 4, 13)] == [
        sum(i.bit_count() for i in range(n)) for n in (0, 1, 2, 3, 4, 13)
    ]
    q, _, v, _ = draw((1, 8, 1, 64, 64))
    cell = Cell.model_validate({"mechanism": "log_linear", "length": 4096, "causal": True})
    assert log_linear(q, v).flops(cell) == 8 * 4096 * (2 * 64 * 128 + (2 + 2 * 3) * 64 * 64)
