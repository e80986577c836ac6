"""Segments give the loop's outputs, states and gradients, whatever their length, and keep no graph of the inside."""

import pytest
import torch

from linbench.mechanisms.cores.segments import recurrent, segmented


def draw():
    torch.manual_seed(0)
    decay, x = torch.rand(2, 3, 11, dtype=torch.float64), torch.randn(2, 3, 11, 4, dtype=torch.float64)
    gain, state = torch.randn(4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (decay, x, gain, state)]


def step(state, decay, x, gain):
    after = decay[..., None] * state[0] + x
    return after * gain, (after,)


def segment(state, tokens, shared):
    outputs = []
    for decay, x in zip(*(tensor.unbind(2) for tensor in tokens), strict=True):
        out, state = step(state, decay, x, *shared)
        outputs.append(out)
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("length", [1, 3, 4, 11, 40])
def test_outputs_states_and_gradients_are_those_of_one_segment(length):
    decay, x, gain, state = draw()
    expected, (last,) = segment((state,), (decay, x), (gain,))
    out, (after,) = segmented(segment, (state,), (decay, x), length, (gain,))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, last)
    out_grad, after_grad = torch.randn_like(out), torch.randn_like(after)
    found = torch.autograd.grad([out, after], [decay, x, gain, state], [out_grad, after_grad])
    wanted = torch.autograd.grad([expected, last], [decay, x, gain, state], [out_grad, after_grad])
    torch.testing.assert_close(found, wanted)


def test_recurrent_is_the_loop_and_differentiable():
    decay, x, gain, state = draw()
    assert torch.autograd.gradcheck(
        lambda decay, x, gain, state: recurrent(step, (state,), (decay, x), (gain,))[0], (decay, x, gain, state)
    )
    torch.testing.assert_close(
        recurrent(step, (state,), (decay, x), (gain,))[0], segment((state,), (decay, x), (gain,))[0]
    )


def test_only_what_needs_a_gradient_gets_one():
    decay, x, gain, state = draw()
    out, _ = segmented(segment, (state.detach(),), (decay.detach(), x), 4, (gain.detach(),))
    expected, _ = segment((state.detach(),), (decay.detach(), x), (gain.detach(),))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_a_state_that_nothing_changes_comes_back_with_its_gradient():
    _, x, _, state = draw()
    out, (after,) = segmented(lambda state, tokens, _: (tokens[0] * 2, state), (state,), (x,), 4)
    (grad,) = torch.autograd.grad(after.sum() + out.sum(), state)
    torch.testing.assert_close(grad, torch.ones_like(state))
