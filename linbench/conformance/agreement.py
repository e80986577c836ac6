"""The implementations compute what the reference says, in every dtype and with every setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from linbench.cell import Scalar
from linbench.conformance.finding import Finding, failed, not_applicable, passed, within, worst
from linbench.conformance.subject import Operands, Subject, dtype_name, relative_error
from linbench.errors import UsageError
from linbench.measure.exact import exact_attention, same_dtype_attention

WORST_ROW = 10.0
"""Rows differ in norm, and a few are badly conditioned: one may be off by this many times the bound."""
NARROW_FACTOR = 1.5
"""An output may err by this many times the error of exact attention in the same dtype."""


def forms_agree(subject: Subject) -> Finding:
    """Every size, in fp64 and fp32, against the reference in fp64; the whole and the worst row."""
    return worst(
        compared(subject, subject.draw(size, dtype), f"{dtype_name(dtype)} {size}")
        for size in subject.sizes()
        for dtype in (torch.float64, torch.float32)
    )


def compared(subject: Subject, x: Operands, where: str) -> Finding:
    """An output against the reference's."""
    expected = subject.reference(x)
    found = subject.run(x)
    if found.shape != expected.shape:
        return failed(f"the output is {list(found.shape)}, not {list(expected.shape)}: {where}")
    bound = subject.bound(x, expected)
    return worst(
        [
            within(relative_error(found, expected), bound, where),
            within(worst_row(found, expected) / WORST_ROW, bound, f"{where}, worst row"),
        ]
    )


def worst_row(found: Tensor, expected: Tensor) -> float:
    """The largest norm of one row's difference, over the root mean square norm of a row."""
    rms = expected.norm(dim=-1).square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - expected).norm(dim=-1).max() / rms)


def narrow_dtypes(subject: Subject) -> Finding:
    """bf16 and fp16: the output keeps the dtype, and errs no more than exact attention in it does."""
    findings = []
    for dtype in (torch.bfloat16, torch.float16):
        x = subject.draw(subject.size(1, 2, 150, 64, 32), dtype)
        found = subject.run(x)
        if found.dtype is not dtype:
            return failed(f"the output of {dtype_name(dtype)} inputs is {found.dtype}")
        truth = exact_attention(x.q, x.k, x.v, subject.causal)
        yardstick = relative_error(same_dtype_attention(x.q, x.k, x.v, subject.causal), truth)
        error = relative_error(found, subject.reference(x))
        findings.append(within(error / yardstick, NARROW_FACTOR, f"{dtype_name(dtype)}, × exact attention's error"))
    return worst(findings)


def chosen_rows(subject: Subject) -> Finding:
    """``reference(rows)`` is ``reference()[rows]``, in any order, repeated or not."""
    x = subject.draw(subject.size(2, 3, 50, 8, 5))
    last = x.q.shape[2] - 1
    rows = torch.tensor([last, 0, last // 7, 0], device=x.q.device)
    whole = subject.reference(x)
    chosen = subject.reference(x, rows)
    if chosen.shape != whole[:, :, rows].shape:
        return failed(f"{len(rows)} rows were asked for, and {list(chosen.shape)} came")
    return within(relative_error(chosen, whole[:, :, rows]), 1e-12, "rows last, 0, a seventh, 0")


def every_setting(subject: Subject) -> Finding:
    """Each choice of a hyperparameter and the least of each whole number: right, or refused by ``unsupported``."""
    findings = []
    for name, value in settings(subject):
        tuned = subject.tuned(**{name: value})
        try:
            size = tuned.size(1, 2, 77, 6, 5)
        except UsageError:
            continue
        findings.append(compared(tuned, tuned.draw(size), f"{name}={value}"))
    return worst(findings) if findings else not_applicable("no hyperparameter has a choice or a least value")


def settings(subject: Subject) -> Iterator[tuple[str, Scalar]]:
    """The alternatives of each hyperparameter that was not set by hand."""
    for name, info in subject.cls.hyperparameters().model_fields.items():
        if name in subject.hyperparameters:
            continue
        for value in _alternatives(info.annotation, info.metadata):
            if value != info.default:
                yield name, value


def _alternatives(annotation: Any, metadata: list[Any]) -> tuple[Scalar, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if annotation is bool:
        return (False, True)
    if annotation is int:
        least = [value for item in metadata if (value := getattr(item, "ge", None)) is not None]
        return (max(least),) if least else ()
    return ()


def more_keys_than_queries(subject: Subject) -> Finding:
    """N_q ≠ N_k: right, or refused in a sentence by reference and implementation alike."""
    findings = []
    for queries, keys in ((5, 21), (21, 5)):
        where = f"{queries} queries, {keys} keys"
        try:
            x = subject.draw(subject.size(2, 3, queries, 5, 7), keys=keys)
            if x.q.shape[2] != queries:
                return not_applicable(f"{where} is no shape that it takes")
        except UsageError as error:
            return not_applicable(str(error))
        refusals = [_refused(subject, x, implementation) for implementation in ("reference", subject.implementation)]
        clear = [refusal for refusal in refusals if refusal is not None]
        if not clear:
            findings.append(compared(subject, x, where))
        elif len(clear) < len(refusals):
            findings.append(failed(f"{where}: only one of reference and {subject.implementation} refuses: {clear[0]}"))
        else:
            findings.append(worst(_clarity(refusal, where) for refusal in clear))
    return worst(findings)


def _refused(subject: Subject, x: Operands, implementation: str) -> Exception | None:
    try:
        subject.run(x, implementation)
    except Exception as error:
        return error
    return None


def _clarity(error: Exception, where: str) -> Finding:
    """A refusal on purpose says so; a shape error from the depths of torch does not."""
    if isinstance(error, UsageError | ValueError | NotImplementedError) and str(error):
        return passed(f"refused: {error}")
    return failed(f"{where}: neither computed nor refused in a sentence (UsageError): {type(error).__name__}: {error}")


def kind_is_true(subject: Subject) -> Finding:
    """``exact`` is softmax attention; an ``approximator`` has a limit or a convergence that can be tested."""
    about = subject.cls.description
    if about.kind == "exact":
        findings = []
        for size in subject.sizes():
            x = subject.draw(size)
            truth = exact_attention(x.q, x.k, x.v, subject.causal)
            findings.append(within(relative_error(subject.run(x), truth), 1e-12, f"against softmax, {size}"))
        return worst(findings)
    if about.kind == "approximator":
        if subject.cls.exact_limit(64) is not None or subject.cls.claims.converges is not None:
            return passed("its limit or convergence is claimed")
        if any(True for _ in subject.build(subject.draw(subject.size(1, 2, 70, 6, 5))).parameters()):
            return not_applicable("what it learns decides how close it comes: the measure `fit` shows it")
        return failed("an approximator claims neither an exact_limit nor a convergence, and learns nothing")
    return not_applicable(f"a {about.kind} claims no distance to softmax")


def alone_as_in_a_batch(subject: Subject) -> Finding:
    """An element of the batch is computed as it would be alone."""
    x = subject.draw(subject.size(3, 2, 67, 6, 5))
    whole = subject.run(x)
    findings = []
    for index in range(x.q.shape[0]):
        alone = x.map(lambda tensor, i=index: tensor[i : i + 1] if tensor.ndim >= 3 else tensor)  # type: ignore[misc]
        error = relative_error(subject.run(alone), whole[index : index + 1])
        bound = subject.bound(alone)
        findings.append(within(error, bound, f"element {index} of {x.q.shape[0]} alone"))
    return worst(findings)
