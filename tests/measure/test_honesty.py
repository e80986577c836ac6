"""Kernels that do not compute what they are timed for, each caught by what it does."""

import itertools
import threading
import time

import pytest
import torch

from linbench.cell import Cell
from linbench.measure.call import Call
from linbench.measure.honesty import DishonestTimingError, require_fresh, require_honest
from linbench.mechanisms.base import Description, Geometry, Mechanism

TOKENS = 64


class Honest(Mechanism):
    """A product of its own, so that memory is taken and given back."""

    description = Description("honest", "replacement", (False,), "none", "none", 2026)

    def reference(self, q, k, v, rows=None):
        out = (q @ k.mT) @ v
        return out if rows is None else out[:, :, rows]

    def forward_torch(self, q, k, v):
        return self.reference(q, k, v)

    def flops(self, cell):
        return 0

    def min_bytes(self, cell):
        return 0


class Remembers(Honest):
    """Its output by the address of its inputs."""

    seen = None

    def forward_torch(self, q, k, v):
        key = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        self.seen = self.seen or {}
        if key not in self.seen:
            self.seen[key] = self.reference(q, k, v)
        return self.seen[key]


class RemembersUntilChanged(Honest):
    """Its output by the address and the version of its inputs; ``computed`` tells what a call did."""

    seen = (None, None)
    computed = False

    def forward_torch(self, q, k, v):
        key = [number for x in (q, k, v) for number in (x.data_ptr(), x._version)]
        self.computed = self.seen[0] != key
        if self.computed:
            self.seen = (key, self.reference(q, k, v))
        return self.seen[1]


class WritesHalf(Honest):
    """And leaves the rest to what the memory held."""

    def forward_torch(self, q, k, v):
        out = torch.empty_like(v)
        half = TOKENS // 2
        out[:, :, :half] = self.reference(q[:, :, :half], k, v)
        return out


class Late(Honest):
    """Returns before it has computed."""

    def forward_torch(self, q, k, v):
        out = torch.zeros_like(v)

        def work():
            time.sleep(0.05)
            out.copy_(self.reference(q, k, v))

        threading.Thread(target=work).start()
        return out


class ChangesInputs(Honest):
    """Normalises q where it lies."""

    def forward_torch(self, q, k, v):
        out = self.reference(q, k, v)
        q.mul_(1 + 1e-6)
        return out


class RemembersGradients(Honest):
    """A backward that gives what it gave before."""

    def forward_torch(self, q, k, v):
        return _Remembering.apply(q, k, v)


class _Remembering(torch.autograd.Function):
    kept = None

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT) @ v

    @staticmethod
    def backward(ctx, grad):
        if _Remembering.kept is None:
            q, k, v = ctx.saved_tensors
            _Remembering.kept = (grad @ v.mT @ k, (grad @ v.mT).mT @ q, (q @ k.mT).mT @ grad)
        return _Remembering.kept


def call(cls, pass_="forward"):
    cell = Cell(mechanism="x", length=TOKENS, heads=2, head_dim=4, value_dim=3, pass_=pass_)
    backward = pass_ != "forward"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, TOKENS, width, generator=generator).requires_grad_(backward) for width in (4, 4, 3))
    toward = torch.randn(v.shape, generator=generator) if backward else None
    return Call(cell, cls(Geometry(2, 4, 3, False)), q, k, v, {}, toward)


@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
def test_what_computes_its_result_passes_and_keeps_its_inputs(pass_):
    one = call(Honest, pass_)
    before = [x.detach().clone() for x in (one.q, one.k, one.v)]
    require_honest(one, one.forward().detach())
    assert all(torch.equal(a, b) for a, b in zip(before, (one.q, one.k, one.v), strict=True))


@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
def test_a_single_token_whose_gradients_are_zero_is_no_cheat(pass_):
    from linbench import inputs, registry

    cell = Cell(mechanism="softmax", length=1, heads=2, head_dim=4, value_dim=3, pass_=pass_)
    q, k, v = (x.requires_grad_(pass_ != "forward") for x in inputs.draw(cell))
    one = Call(cell, registry.of_cell(cell), q, k, v, {}, torch.ones_like(v) if pass_ != "forward" else None)
    require_honest(one, one.forward().detach())


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Remembers, "same for other values: it is remembered"),
        (WritesHalf, "not all of it is written"),
        (Late, "not all of it is written when the call returns"),
        (ChangesInputs, "changes its inputs"),
    ],
)
def test_a_cheat_is_caught_by_name(cls, said):
    one = call(cls)
    checked = Honest.reference(one.mechanism, one.q.clone(), one.k.clone(), one.v.clone())
    one.forward()  # as the timed loop did
    with pytest.raises(DishonestTimingError, match=said):
        require_honest(one, checked)


@pytest.mark.parametrize("pass_", ["backward", "forward_backward"])
def test_remembered_gradients_are_caught(pass_):
    _Remembering.kept = None
    one = call(RemembersGradients, pass_)
    with pytest.raises(DishonestTimingError, match="remembered"):
        require_honest(one, one.forward().detach())


def counted(call):
    """Clocks that know no noise: one for a call that computes, a hundredth for one that remembers."""
    call.timed_part()()
    took = 1.0 if getattr(call.mechanism, "computed", True) else 0.01
    return took, took


def test_a_result_that_is_kept_until_the_inputs_change_shows_in_the_time_alone():
    one = call(RemembersUntilChanged)
    require_honest(one, one.forward().detach())
    with pytest.raises(DishonestTimingError, match=r"new values takes 1 ms, a repeated one 0\.01: it is remembered"):
        require_fresh(one, counted)


@pytest.mark.parametrize("pass_", ["forward", "backward", "forward_backward"])
def test_what_computes_every_time_takes_as_long_for_new_values_and_keeps_them(pass_):
    one = call(Honest, pass_)
    before = [x.detach().clone() for x in (one.q, one.k, one.v)]
    require_fresh(one, counted)
    assert all(torch.equal(a, b) for a, b in zip(before, (one.q, one.k, one.v), strict=True))


def test_a_call_that_only_waited_longer_is_no_cheat():
    waits = itertools.cycle([(1.0, 1.0), (3.0, 1.0)])

    def waiting(call):
        call.timed_part()()
        return next(waits)

    require_fresh(call(Honest), waiting)
