"""The backward of q, k, v, extras and parameters, against autograd of the reference and finite differences."""

from __future__ import annotations

import copy

import torch
import torch.fx.experimental.symbolic_shapes  # torch imports it in the first backward: 1 s in every child without
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from linbench.conformance.finding import Finding, failed, not_applicable, passed, within, worst
from linbench.conformance.subject import (
    Operands,
    Size,
    Subject,
    dtype_name,
    relative_error,
    rounding_bound,
)
from linbench.mechanisms.base import Mechanism

NEGLIGIBLE = 0.1
"""A gradient smaller than this share of all together is judged on that scale: what is zero in exact arithmetic is
rounding noise in any other."""
ZERO = 1e-9
"""One that is smaller than this share in fp64 is zero in exact arithmetic, a difference of equal sums: it is judged on
the scale of all together, because what is left of it is the rounding of those sums, whose order is the processor's."""
ROUNDING_FACTOR = 4
NARROW_BOUND = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
IN_FULL = 500
"""Learned numbers that are perturbed one by one; more of them along random directions only."""


def gradients_agree(subject: Subject) -> Finding:
    """Against autograd of the reference in fp64, in fp64, fp32, bf16 and fp16."""
    sizes = [size for size in subject.sizes() if size.tokens <= 500 or not subject.cls.sequential_reference]
    # the worst of all sizes: of a single token a gradient may be zero, and the reference's exactly so
    own_error = max(_own_error(subject, size) for size in sizes)
    findings = []
    for size in sizes:
        for dtype in (torch.float64, torch.float32):
            bound = rounding_bound(own_error, dtype)
            findings.append(_compared(subject, subject.draw(size, dtype), str(size), bound))
    tokens = 70 if subject.quick and subject.cls.sequential_reference else 150
    for dtype, bound in NARROW_BOUND.items():
        x = subject.draw(subject.size(1, 2, tokens, 16, 10), dtype)
        findings.append(_compared(subject, x, f"{tokens} tokens", bound))
    return worst(findings)


def _own_error(subject: Subject, size: Size) -> float:
    """Of the reference's gradients in fp32: what rounding does to them."""
    x = subject.draw(size, torch.float32)
    own, exact = (gradients(subject, operands, "reference")[1] for operands in (x, x.widened()))
    return max(gradient_errors(own, exact).values())


def _compared(subject: Subject, x: Operands, where: str, bound: float) -> Finding:
    dtype = x.q.dtype
    told = f"{dtype_name(dtype)} {where}"
    expected_output, expected = gradients(subject, x.widened(), "reference")
    output, found = gradients(subject, x, subject.implementation)
    if relative_error(output, expected_output) > 0.05:
        return not_applicable("the outputs differ already")
    if not output.requires_grad:
        return failed(f"the output has no graph behind it: {told}")
    errors = gradient_errors(found, expected)
    return worst(within(error, bound, f"gradient of {name}, {told}") for name, error in errors.items())


def gradients(subject: Subject, x: Operands, implementation: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and the gradients of a random direction by name, parameters included."""
    mechanism = subject.build(x, implementation)
    if x.q.dtype is torch.float64:
        mechanism = copy.deepcopy(mechanism).double()
    leaves = x.leaves()
    inputs = {**leaves.named(), **dict(mechanism.named_parameters())}
    output = mechanism(leaves.q, leaves.k, leaves.v, **leaves.extras)
    if not output.requires_grad:
        return output, dict.fromkeys(inputs)
    generator = torch.Generator().manual_seed(5)
    toward = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().to(output)
    found = torch.autograd.grad(output, list(inputs.values()), toward, allow_unused=True)
    return output, dict(zip(inputs, found, strict=True))


def gradient_errors(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> dict[str, float]:
    """Relative error of each gradient that the reference has; a missing one counts as zero."""
    norms = {name: 0.0 if x is None else float(x.double().norm()) for name, x in expected.items()}
    joint = sum(norm**2 for norm in norms.values()) ** 0.5
    errors = {}
    for name, exact in expected.items():
        gradient = found[name]
        if gradient is not None and not bool(gradient.isfinite().all()):
            errors[name] = torch.inf
            continue
        share = 1.0 if norms[name] <= ZERO * joint else NEGLIGIBLE
        scale = max(norms[name], share * joint, torch.finfo(torch.float64).tiny)
        if gradient is None or exact is None:
            present = gradient if exact is None else exact
            errors[name] = 0.0 if present is None else float(present.double().norm()) / scale
        else:
            errors[name] = float((gradient.double() - exact.double()).norm()) / scale
    return errors


def finite_differences(subject: Subject) -> Finding:
    """``gradcheck`` in fp64 at 3 tokens in full (parameters up to 500 numbers), and at 70 along a random direction."""
    findings = []
    for tokens, fast in ((3, False), (3, True), (70, True)):
        x = subject.draw(subject.size(1, 2, tokens, 3, 2))
        findings.append(_gradcheck(subject, x, fast))
    return worst(findings)


def _gradcheck(subject: Subject, x: Operands, fast: bool) -> Finding:
    mechanism = copy.deepcopy(subject.build(x)).double()
    learned_numbers = sum(p.numel() for p in mechanism.parameters())
    learns = fast or learned_numbers <= IN_FULL
    parameters = {name: p.detach().clone().requires_grad_(learns) for name, p in mechanism.named_parameters()}
    operands = {name: tensor.clone() for name, tensor in x.leaves().named().items()}
    operands = {name: tensor.detach().requires_grad_() for name, tensor in operands.items()}
    names = [*operands, *parameters]

    def operator(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        extras = {name: given.get(name, tensor) for name, tensor in x.extras.items()}
        fresh: Mechanism = copy.deepcopy(mechanism)
        learned = {name: given[name] for name in parameters}
        output: Tensor = torch.func.functional_call(fresh, learned, (given["q"], given["k"], given["v"]), extras)
        return output

    where = f"{x.q.shape[2]} tokens"
    try:
        gradcheck(operator, (*operands.values(), *parameters.values()), fast_mode=fast)
    except GradcheckError as error:
        return failed(f"{where}: {str(error).strip().splitlines()[0]}")
    return passed(where)
