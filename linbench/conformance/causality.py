"""The causal form: no future reaches the past, and one token after the other gives the same."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linbench.conformance.finding import Finding, failed, not_applicable, within, worst
from linbench.conformance.subject import Operands, Size, Subject, dtype_name, relative_error
from linbench.mechanisms.base import extras_at

SCALE = 40.0
"""The future is replaced by numbers of this standard deviation."""
ROUNDINGS = 64
"""How many roundings of the largest number in the output may reach back where a mechanism claims that rounding does."""
BOOKKEEPING_BYTES = 64
"""A position counter or the like, which no cost model mentions."""


def future_changes_nothing(subject: Subject) -> Finding:
    """Another future, forty times as large, changes not a bit of the past; each operand alone, and all together."""
    if not subject.causal:
        return not_applicable("only a causal form has a future")
    findings = []
    for dtype in (torch.float32, torch.float64):
        x = subject.draw(subject.size(1, 2, subject.tokens(150), 6, 5), dtype)
        before = subject.run(x)
        tokens = x.q.shape[2]
        for first in sorted({min(cut, tokens - 1) for cut in (1, 63, 64, 100, 149)}):
            for name, changed in _futures(subject, x, first):
                after = subject.run(changed)
                findings.append(_leak(subject, before, after, first, name))
    return worst(findings)


def _futures(subject: Subject, x: Operands, first: int) -> Iterator[tuple[str, Operands]]:
    """Operands with another future: v alone, then (unless only values are promised) each of the others, and all."""
    size = Size(x.q.shape[0], x.q.shape[1], x.q.shape[2], x.q.shape[3], x.v.shape[3])
    other = subject.draw(size, x.q.dtype, seed=1)
    wild = other._replace(q=SCALE * other.q, k=SCALE * other.k, v=SCALE * other.v)
    wild = wild._replace(extras=_extreme_extras(subject, wild))
    names = ["v"]
    if subject.cls.claims.causality != "values":
        names += ["q", "k", *(name for name, tensor in x.extras.items() if tensor.ndim >= 3)]
        yield "everything", _with_future(x, wild, names, first)
    for name in names:
        yield name, _with_future(x, wild, [name], first)


def _extreme_extras(subject: Subject, x: Operands) -> dict[str, Tensor]:
    """Extras that are as far out as their gates let them be, others drawn anew."""
    mechanism = subject.build(x)
    extras = dict(x.extras)
    for name, gate in mechanism.gates().items():
        if name in extras:
            raw = SCALE * torch.randn(
                extras[name].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
            )
            extras[name] = gate.activation(raw.to(x.q.device)).detach().to(extras[name].dtype)
    return extras


def _with_future(x: Operands, other: Operands, names: list[str], first: int) -> Operands:
    def mixed(name: str, tensor: Tensor, future: Tensor) -> Tensor:
        return torch.cat([tensor[:, :, :first], future[:, :, first:]], 2) if name in names else tensor

    q, k, v = (mixed(name, getattr(x, name), getattr(other, name)) for name in ("q", "k", "v"))
    return Operands(q, k, v, {name: mixed(name, tensor, other.extras[name]) for name, tensor in x.extras.items()})


def _leak(subject: Subject, before: Tensor, after: Tensor, first: int, name: str) -> Finding:
    told = f"{dtype_name(after.dtype)}, another future of {name} from {first}"
    change = float((after - before)[:, :, :first].abs().max())
    bound = 0.0
    if subject.cls.claims.causality == "rounding":  # on the scale of the largest number, wherever it is
        bound = ROUNDINGS * torch.finfo(after.dtype).eps * float(after.abs().max())
    return within(change, bound, told)


def step_is_the_parallel_form(subject: Subject) -> Finding:
    """Token by token from ``initial_state`` gives what the reference gives for the whole."""
    if (lacking := _without_step(subject)) is not None:
        return not_applicable(lacking)
    findings = []
    for tokens in (1, 70) if subject.quick else (1, 70, 200):
        for dtype in (torch.float64, torch.float32):
            x = subject.draw(subject.size(2, 3, tokens, 6, 5), dtype)
            outputs, _ = _decoded(subject, x)
            if outputs.dtype is not dtype:
                return failed(f"a step of {dtype_name(dtype)} inputs gives {outputs.dtype}")
            expected = subject.reference(x)
            where = f"{dtype_name(dtype)}, {x.q.shape[2]} tokens"
            findings.append(within(relative_error(outputs, expected), subject.bound(x, expected), where))
    return worst(findings)


def prefill_is_the_parallel_form(subject: Subject) -> Finding:
    """``prefill`` gives what the reference gives, and a state from which ``step`` goes on, and starts again."""
    if (lacking := _without_step(subject)) is not None:
        return not_applicable(lacking)
    findings = []
    for prompt, rest in ((1, 3), (70, 5)) if subject.quick else ((1, 3), (70, 5), (128, 2), (200, 70)):
        for dtype in (torch.float64, torch.float32):
            x = subject.draw(subject.size(2, 3, prompt + rest, 6, 5), dtype)
            findings.append(_prefilled_and_stepped(subject, x, min(prompt, x.q.shape[2] - 1)))
    x = subject.draw(subject.size(2, 3, 70, 6, 5), torch.bfloat16)
    if (got := _prefilled(subject, x)[0].dtype) is not torch.bfloat16:
        return failed(f"a prefill of bfloat16 inputs gives {dtype_name(got)}")
    return worst(findings)


def _prefilled_and_stepped(subject: Subject, x: Operands, prompt: int) -> Finding:
    """A prefill of the first tokens and steps over the others, the first of them twice from one state."""
    output, state = _prefilled(subject, x.tokenwise(lambda tensor: tensor[:, :, :prompt]))
    mechanism, rows = subject.build(x), [output]
    where = f"{dtype_name(x.q.dtype)}, {prompt} of {x.q.shape[2]} tokens"
    with torch.no_grad():
        again = copy.deepcopy(state) if mechanism.steps_in_place else state
        before, _ = mechanism.step(*_token(x, prompt), again, **extras_at(x.extras, prompt))
        for token in range(prompt, x.q.shape[2]):
            row, state = mechanism.step(*_token(x, token), state, **extras_at(x.extras, token))
            rows.append(row[:, :, None])
    if output.shape != (*x.q.shape[:2], prompt, x.v.shape[3]) or output.dtype is not x.q.dtype:
        return failed(f"a prefill gives {dtype_name(output.dtype)} {list(output.shape)}: {where}")
    if not torch.equal(before, rows[1].squeeze(2)):
        return failed(f"a second step from the state of a prefill gives something else than the first: {where}")
    expected = subject.reference(x)
    return within(relative_error(torch.cat(rows, 2), expected), subject.bound(x, expected), where)


def state_is_as_large_as_stated(subject: Subject) -> Finding:
    """``state_bytes`` is what the state holds after N tokens, per element of the batch."""
    if (lacking := _without_step(subject)) is not None:
        return not_applicable(lacking)
    findings = []
    for tokens in (1, 37, 130):
        for dtype in (torch.float64, torch.bfloat16):
            x = subject.draw(subject.size(2, 3, tokens, 6, 5), dtype)
            for way, decoded in (("steps", _decoded), ("a prefill", _prefilled)):
                held = sum(tensor.nbytes for tensor in tensors_of(decoded(subject, x)[1]))
                stated = subject.build(x).state_bytes(x.q.shape[2], dtype)
                where = f"{dtype_name(dtype)}: the state after {way} of {x.q.shape[2]} tokens holds {held} bytes"
                if stated is None:
                    return failed(f"{where}, and state_bytes gives None")
                told = f"{where} for 2 elements of the batch, state_bytes says 2 × {stated}"
                findings.append(within(abs(held - 2 * stated), BOOKKEEPING_BYTES, told))
    return worst(findings)


def _without_step(subject: Subject) -> str | None:
    if not subject.causal:
        return "only a causal form decodes"
    x = subject.draw(subject.size(1, 1, 2, 6, 5))
    return None if subject.build(x).decodes else "it has no decoding step"


def _decoded(subject: Subject, x: Operands) -> tuple[Tensor, Any]:
    mechanism = subject.build(x)
    state, outputs = mechanism.initial_state(x.q.shape[0], x.q.device, x.q.dtype), []
    with torch.no_grad():
        for token in range(x.q.shape[2]):
            output, state = mechanism.step(*_token(x, token), state, **extras_at(x.extras, token))
            outputs.append(output)
    return torch.stack(outputs, 2), state


def _prefilled(subject: Subject, x: Operands) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return subject.build(x).prefill(x.q, x.k, x.v, **x.extras)


def _token(x: Operands, token: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.q[:, :, token], x.k[:, :, token], x.v[:, :, token]


def tensors_of(state: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists, dictionaries and dataclasses, each once; of ``held()`` where it is."""
    found: dict[int, Tensor] = {}
    waiting = [state]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif hasattr(item, "held"):
            waiting.extend(item.held())
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
        elif dataclasses.is_dataclass(item):
            waiting.extend(getattr(item, field.name) for field in dataclasses.fields(item))
        elif hasattr(item, "__dict__"):
            waiting.extend(vars(item).values())
    return list(found.values())
