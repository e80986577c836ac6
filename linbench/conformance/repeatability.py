"""The same request gives the same bits: whatever is random hangs on the seed, and no call on the one before."""

from __future__ import annotations

import torch
from torch import Tensor

from linbench.conformance.finding import Finding, failed, passed, within
from linbench.conformance.subject import Operands, Subject, relative_error


def same_seed_same_bits(subject: Subject) -> Finding:
    """Built twice, while others draw from the global generator: the same output, parameters, buffers and extras."""
    size = subject.size(1, 2, 70, 6, 5)
    seen = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        x = subject.draw(size)
        mechanism = subject.build(x)
        torch.manual_seed(noise + 10)
        state = {name: tensor.clone() for name, tensor in mechanism.state_dict().items()}
        seen.append((x, state, mechanism(x.q, x.k, x.v, **x.extras).detach()))
    (first, first_state, first_output), (second, second_state, second_output) = seen
    for name, tensor in first.extras.items():
        if not torch.equal(tensor, second.extras[name]):
            return failed(f"extra {name} differs although its generator had the same seed")
    if (unequal := _unequal(first_state, second_state)) is not None:
        return failed(f"{unequal} differs between two builds with the same seed")
    if not torch.equal(first_output, second_output):
        return failed("the output differs between two builds with the same seed")
    return passed()


def other_seed_other_draws(subject: Subject) -> Finding:
    """Another ``geometry.seed`` changes values alone: no shape, no dtype, no cost; nothing where nothing is random."""
    size = subject.size(1, 2, 70, 6, 5)
    x = subject.draw(size)
    one, other = subject.build(x), subject.build(x, seed=1)
    for name, tensor in one.state_dict().items():
        twin = other.state_dict().get(name)
        if twin is None or twin.shape != tensor.shape or twin.dtype != tensor.dtype:
            return failed(f"{name} has another shape or dtype with another seed")
    cell = subject.cell(size)
    if (one.flops(cell), one.min_bytes(cell)) != (other.flops(cell), other.min_bytes(cell)):
        return failed("another seed changes the cost model")
    random_state = _unequal(one.state_dict(), other.state_dict()) is not None
    random_reference = not torch.equal(subject.reference(x), subject.reference(x, seed=1))
    random_output = not torch.equal(subject.run(x), subject.run(x, seed=1))
    if random_output != random_reference:
        told = "changes" if random_output else "does not change"
        return failed(f"another seed {told} the output, and the reference does otherwise")
    if random_output:
        error = relative_error(subject.run(x, seed=7), subject.reference(x, seed=7))
        return within(error, subject.bound(x), "geometry.seed=7, against the reference with that seed")
    return passed("what the seed draws does not show" if random_state else "nothing is random")


def no_memory_between_calls(subject: Subject) -> Finding:
    """A mechanism that has been called before, on other operands and other lengths, gives what a new one gives."""
    sizes = [subject.size(1, 2, 70, 6, 5), subject.size(2, 2, 33, 6, 5), subject.size(1, 2, 70, 6, 5)]
    draws = [subject.draw(size, seed=seed) for seed, size in enumerate(sizes)]
    geometry = {(x.q.shape[1], x.q.shape[3], x.v.shape[3]) for x in draws}
    if len(geometry) > 1:
        draws = [subject.draw(sizes[0], seed=seed) for seed in range(3)]
    mechanism = subject.build(draws[0])
    for x in (*draws, draws[0]):
        leaves = x.leaves()  # as in training: whatever is cached must not hold a graph either
        output = mechanism(leaves.q, leaves.k, leaves.v, **leaves.extras)
        if output.requires_grad:
            torch.autograd.grad(output.sum(), list(leaves.named().values()), allow_unused=True)
        if not torch.equal(output.detach(), _fresh(subject, x)):
            return failed("a mechanism that was called before gives another output than a new one")
    return passed()


def _fresh(subject: Subject, x: Operands) -> Tensor:
    leaves = x.leaves()
    output: Tensor = subject.build(x)(leaves.q, leaves.k, leaves.v, **leaves.extras)
    return output.detach()


def _unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    return next((name for name, tensor in one.items() if not torch.equal(tensor, other[name])), None)
