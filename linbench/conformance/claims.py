"""What the mechanism says of its operator: rows that sum to one, linearity, symmetries, limits, convergence."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from torch import Tensor

from linbench import inputs
from linbench.cell import Cell
from linbench.conformance.finding import Finding, failed, not_applicable, within, worst
from linbench.conformance.subject import Operands, Size, Subject, relative_error
from linbench.measure.exact import exact_attention
from linbench.mechanisms import fused

EXACT = 1e-12
"""What holds in exact arithmetic holds to this in fp64."""


def rows_sum_to_one(subject: Subject) -> Finding:
    """Constant values come back unchanged."""
    if not subject.cls.claims.row_stochastic:
        return not_applicable("not claimed")
    findings = []
    for size in subject.sizes():
        x = subject.draw(size)
        constant = x._replace(v=x.v[:, :, :1].expand(x.v.shape).contiguous())
        findings.append(within(relative_error(subject.run(constant), constant.v), EXACT, f"constant values, {size}"))
    return worst(findings)


def linear_in_values(subject: Subject) -> Finding:
    """The output of a combination of values is that combination of their outputs."""
    if not subject.cls.claims.linear_in_values:
        return not_applicable("not claimed")
    x = subject.draw(subject.size(1, 2, 70, 6, 5))
    other = x._replace(v=subject.draw(subject.size(1, 2, 70, 6, 5), seed=1).v)
    mixed = x._replace(v=2 * x.v - 3 * other.v)
    expected = 2 * subject.run(x) - 3 * subject.run(other)
    return within(relative_error(subject.run(mixed), expected), subject.bound(x), "2 v − 3 w")


def order_does_not_matter(subject: Subject) -> Finding:
    """All tokens permuted: the output is permuted."""
    if not subject.cls.claims.permutation_equivariant:
        return not_applicable("not claimed")
    if subject.causal:
        return not_applicable("a mask is an order")
    x = subject.draw(subject.size(1, 2, 70, 6, 5))
    order = torch.randperm(x.q.shape[2], generator=torch.Generator().manual_seed(3)).to(x.q.device)
    expected = subject.run(x)[:, :, order]
    found = subject.run(x.tokenwise(lambda tensor: tensor[:, :, order]))
    return within(relative_error(found, expected), subject.bound(x), "70 tokens in another order")


def duplicates_change_nothing(subject: Subject) -> Finding:
    """Every token given twice: the output is given twice."""
    if not subject.cls.claims.duplication_invariant:
        return not_applicable("not claimed")
    if subject.causal:
        return not_applicable("a mask counts tokens")
    x = subject.draw(subject.size(1, 2, 35, 6, 5))
    expected = subject.run(x).repeat_interleave(2, 2)
    findings = []
    for told, twice in (
        ("each beside itself", x.tokenwise(lambda tensor: tensor.repeat_interleave(2, 2))),
        ("all behind themselves", x.tokenwise(lambda tensor: torch.cat([tensor, tensor], 2))),
    ):
        found = subject.run(twice)
        if told == "all behind themselves":
            expected = torch.cat([subject.run(x)] * 2, 2)
        findings.append(within(relative_error(found, expected), subject.bound(x), told))
    return worst(findings)


def exact_limit(subject: Subject) -> Finding:
    """At the settings that ``exact_limit`` names the target comes out: softmax, or the mechanism's own."""
    findings = []
    for tokens in (1, 37, 70) if subject.quick else (1, 13, 37, 70, 150):
        size = subject.size(1, 2, tokens, 6, 5)
        limit = subject.cls.exact_limit(size.tokens)
        if limit is None:
            return not_applicable("not claimed")
        at_limit = subject.tuned(**limit.hyperparameters)
        if (refusal := at_limit.refusal(size)) is not None:
            if kernels_lack(at_limit, size):
                return not_applicable(refusal)
            return failed(f"exact_limit({size.tokens}) names settings that it refuses: {refusal}")
        x = at_limit.draw(size)
        x = x._replace(extras=limit.extras(dict(x.extras)))
        error = relative_error(at_limit.run(x), target(at_limit, x))
        findings.append(within(error, limit.tolerance, f"{size.tokens} tokens, {dict(limit.hyperparameters)}"))
    return worst(findings)


def target(subject: Subject, x: Operands) -> Tensor:
    """What the mechanism approximates, in fp64."""
    wide = x.widened()
    own = subject.build(wide, "reference").double().target(wide.q, wide.k, wide.v, **wide.extras)
    return exact_attention(wide.q, wide.k, wide.v, subject.causal) if own is None else own


def convergence(subject: Subject) -> Finding:
    """The mean error over five seeds falls at every value of the hyperparameter that is named.

    Kernels that lack some of the values are tried at the others, if there are two.
    """
    claim = subject.cls.claims.converges
    if claim is None:
        return not_applicable("not claimed")
    size = subject.size(1, 2, claim.length, 16, 16)
    every = {x: subject.tuned(**claim.hyperparameters, **{claim.hyperparameter: x}) for x in claim.values}
    lacking = {x: tuned for x, tuned in every.items() if kernels_lack(tuned, size)}
    there = {x: tuned for x, tuned in every.items() if x not in lacking}
    if len(there) < 2:
        return not_applicable(f"too few values: {next(iter(lacking.values())).refusal(size)}")
    errors = [sum(_error(tuned, seed) for seed in range(5)) / 5 for tuned in there.values()]
    told = ", ".join(f"{value}: {error:.3g}" for value, error in zip(there, errors, strict=True))
    ratios = [after / before if before else torch.inf for before, after in pairwise(errors)]
    finding = within(max(ratios), 1.0, f"error by {claim.hyperparameter}: {told}")
    return failed(f"the error does not fall: {told}") if max(ratios) >= 1 else finding


def kernels_lack(subject: Subject, size: Size) -> bool:
    """Whether its kernels refuse what the reference takes."""
    if subject.implementation != fused.NAME or subject.refusal(size) is None:
        return False
    return dataclasses.replace(subject, implementation="reference").refusal(size) is None


def _error(subject: Subject, seed: int) -> float:
    claim = subject.cls.claims.converges
    assert claim is not None
    size = subject.size(1, 2, claim.length, 16, 16)
    cell = Cell(
        mechanism=subject.name,
        heads=size.heads,
        length=size.tokens,
        head_dim=size.key_dim,
        value_dim=size.value_dim,
        causal=subject.causal,
        inputs=claim.inputs,
        inputs_parameters=dict(claim.inputs_parameters),
        dtype="float64",
        seed=seed,
    )
    q, k, v = (tensor.to(subject.device) for tensor in inputs.draw(cell))
    x = Operands(q, k, v, subject.extras(q, k, v, seed))
    return relative_error(subject.run(x, seed=seed), target(subject, x))
