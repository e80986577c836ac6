"""The cost model: whole numbers that grow as claimed, and no more work than the implementation is seen to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from linbench.conformance.counting import counted_flops, peak_bytes
from linbench.conformance.finding import Finding, failed, not_applicable, passed, within, worst
from linbench.conformance.subject import Operands, Size, Subject
from linbench.mechanisms import fused
from linbench.mechanisms.base import Mechanism

PASSES = ("forward", "backward", "forward_backward")
LENGTHS = (1, 2, 17, 64, 100, 512, 1000, 4096, 65536)
GROWTH: dict[str, Callable[[float], float]] = {
    "1": lambda n: 1.0,
    "N": lambda n: n,
    "N log N": lambda n: n * math.log2(n),
    "N^1.5": lambda n: n**1.5,
    "N^2": lambda n: n**2,
}
GROWTH_SLACK = 0.15
"""An exponent may differ by this much from the claimed one between the two lengths that are compared."""
CLAIMED_OVER_DONE = {"forward": 1.02, "backward": 1.3}
"""``flops`` is what an ideal implementation does: no implementation does less. An ideal backward computes the weights
anew, where one that has stored them (in quadratic memory) need not: five products for four."""
DONE_OVER_CLAIMED = 10.0
"""A model that leaves out nine tenths of the products that are run leaves out the work."""


def cost_model_is_sane(subject: Subject) -> Finding:
    """Whole numbers, none negative, none falling with N; a backward costs a forward at least; operands are moved."""
    size = subject.size(2, 3, 64, 8, 6)
    mechanism = subject.build(subject.draw(size))
    for pass_ in PASSES:
        previous = (0, 0)
        for tokens in LENGTHS:
            cell = subject.cell(size._replace(tokens=tokens), torch.float32, pass_)
            costs = (mechanism.flops(cell), mechanism.min_bytes(cell))
            if any(isinstance(cost, bool) or not isinstance(cost, int) for cost in costs):
                return failed(f"flops and min_bytes are whole numbers (int), not {costs}")
            if min(costs) < 0:
                return failed(f"a negative cost at N={tokens}, {pass_}: {costs}")
            if mechanism.unsupported(cell) is None:
                if costs[0] < previous[0] or costs[1] < previous[1]:
                    return failed(f"a cost falls as N grows to {tokens}, {pass_}: {previous} to {costs}")
                previous = costs
    return worst(_passes(subject, mechanism, size._replace(tokens=tokens)) for tokens in (64, 512, 4096))


def _passes(subject: Subject, mechanism: Mechanism, size: Size) -> Finding:
    cells = [subject.cell(size, torch.float32, pass_) for pass_ in PASSES]
    if mechanism.unsupported(cells[0]):
        return not_applicable(f"N={size.tokens} is not supported")
    at = f"N={size.tokens}"
    for name in ("flops", "min_bytes"):
        forward, backward, both = (getattr(mechanism, name)(cell) for cell in cells)
        if backward < forward:
            return failed(f"{name} of a backward, {backward}, is below that of a forward, {forward}: {at}")
        if not backward <= both <= forward + backward:
            return failed(f"{name} of forward_backward, {both}, does not lie between {backward} and their sum: {at}")
    moved = cells[0].element_bytes * size.batch * size.heads * size.tokens * 2 * (size.key_dim + size.value_dim)
    if mechanism.min_bytes(cells[0]) < moved:
        return failed(f"min_bytes, {mechanism.min_bytes(cells[0])}, is below q, k, v and o, {moved}: {at}")
    state = mechanism.state_bytes(size.tokens, torch.float32)
    if state is not None and (not isinstance(state, int) or state < 0):
        return failed(f"state_bytes is a whole number, not {state}: {at}")
    return passed()


def work_grows_as_claimed(subject: Subject) -> Finding:
    """The exponent of ``flops`` between 1M and 8M tokens, beyond lesser terms, is that of ``description.time``."""
    claimed = GROWTH[subject.cls.description.time]
    lengths = (2**20, 2**23)
    size = subject.size(1, 2, 64, 8, 6)
    mechanism = subject.build(subject.draw(size))
    flops = [mechanism.flops(subject.cell(size._replace(tokens=tokens), torch.float32)) for tokens in lengths]
    if flops[0] == 0:
        return not_applicable("the cost model counts no work")
    octaves = math.log(lengths[1] / lengths[0])
    found = math.log(flops[1] / flops[0]) / octaves
    expected = math.log(claimed(lengths[1]) / claimed(lengths[0])) / octaves
    told = f"exponent of flops {found:.3f}, of {subject.cls.description.time} {expected:.3f}"
    return within(abs(found - expected), GROWTH_SLACK, told)


def work_is_done(subject: Subject) -> Finding:
    """``flops`` is no more than the operations that run, products and elementwise, nor a tenth of the products."""
    if subject.implementation == fused.NAME:
        return not_applicable("the operations of a kernel cannot be counted from outside")
    size = subject.size(1, 2, 500 if subject.quick else 2000, 16, 12)
    x = subject.draw(size, torch.float32)
    findings = []
    for pass_ in ("forward", "backward"):
        products, all_work = counted_flops(_pass(subject, x, pass_))
        claimed = subject.build(x).flops(subject.cell(size, torch.float32, pass_))
        at = f"{pass_}, N={size.tokens}: {claimed:,} claimed, {products:,} in products and {all_work:,} in all run"
        findings.append(within(claimed / max(all_work, 1), CLAIMED_OVER_DONE[pass_], f"claimed over run; {at}"))
        if products:
            findings.append(within(products / max(claimed, 1), DONE_OVER_CLAIMED, f"products run over claimed; {at}"))
    return worst(findings)


def _pass(subject: Subject, x: Operands, pass_: str) -> Callable[[Callable[[], None]], object]:
    """A function that runs the pass, and calls what it is given where the counting is to begin."""
    mechanism, leaves = subject.build(x), x.leaves()
    tensors = list(leaves.named().values())

    def forward(begin: Callable[[], None]) -> Tensor:
        begin()
        with torch.no_grad():
            output: Tensor = mechanism(x.q, x.k, x.v, **x.extras)
        return output

    def backward(begin: Callable[[], None]) -> object:
        output = mechanism(leaves.q, leaves.k, leaves.v, **leaves.extras)
        toward = torch.ones_like(output)
        begin()
        return torch.autograd.grad(output, tensors, toward, allow_unused=True) if output.requires_grad else None

    return forward if pass_ == "forward" else backward


def memory_grows_as_claimed(subject: Subject) -> Finding:
    """Peak memory, of a forward and of both passes, from one length to four times it: ``description.memory``."""
    if subject.implementation == fused.NAME and subject.device == "cpu":
        return not_applicable("the memory of Triton's interpreter is not that of a kernel")
    claim = subject.cls.description.memory
    short = 1024 if subject.quick else 2048
    sizes = [subject.size(1, 1, tokens, 8, 8) for tokens in (short, 4 * short)]
    ratio = GROWTH[claim](sizes[1].tokens) / GROWTH[claim](sizes[0].tokens)
    octaves = math.log(sizes[1].tokens / sizes[0].tokens)
    findings = []
    for training in (False, True):
        peaks = []
        for size in sizes:
            x = subject.draw(size, torch.float32)
            peaks.append(peak_bytes(partial(_call, subject, x, training), subject.device))
        if peaks[0] == 0:
            continue
        exponent = math.log(peaks[1] / peaks[0]) / octaves
        told = (
            f"{'forward and backward' if training else 'forward'}: {peaks[0]:,} bytes at N={sizes[0].tokens}, "
            f"{peaks[1]:,} at N={sizes[1].tokens}; exponent, claimed {claim}"
        )
        findings.append(within(exponent, math.log(ratio) / octaves + GROWTH_SLACK, told))
    return worst(findings)


def _call(subject: Subject, x: Operands, training: bool) -> object:
    if not training:
        return subject.run(x)
    leaves = x.leaves()
    output = subject.build(x)(leaves.q, leaves.k, leaves.v, **leaves.extras)
    if not output.requires_grad:
        return output
    toward = torch.ones_like(output)
    return torch.autograd.grad(output, list(leaves.named().values()), toward, allow_unused=True)
