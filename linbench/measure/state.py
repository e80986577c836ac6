"""The state that a mechanism decodes from: how it comes to be, and the bytes that it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.mechanisms.base import Mechanism, extras_until

LONGEST_WALK_TOKENS = 256
"""Where a state is built token by token, longer sequences are not walked to their end."""
LONGEST_PROMPT_TOKENS = 2**14
"""Where it comes out of a prefill: a cache of many more tokens would only take memory."""


def state_after(call: Call) -> tuple[Any, int]:
    """The state after the first tokens of the call's inputs, for all B elements of its batch, and their number."""
    mechanism = call.mechanism
    walks = type(mechanism).prefill is Mechanism.prefill
    tokens = min(call.k.shape[2], LONGEST_WALK_TOKENS if walks else LONGEST_PROMPT_TOKENS)
    q, k, v = (x.detach()[:, :, :tokens] for x in (call.q, call.k, call.v))
    extras = {name: x.detach() for name, x in extras_until(call.extras, tokens).items()}
    with torch.no_grad():
        return mechanism.prefill(q, k, v, **extras)[1], tokens


def state_bytes(state: Any, constants: Any = ()) -> int:
    """Bytes of the memory behind a state's tensors; what several of them share is counted once.

    Of a cache, and of whatever else has ``held()``, only what tokens have filled counts: how much room it keeps for
    more is no property of the mechanism.

    Args:
        state: tensors in dataclasses, tuples, lists, mappings and objects with attributes, nested as they are.
        constants: tensors that are there without the state, parameters and tables: their memory is not counted.
    """
    shared = {place for place, _ in _places(constants)}
    return sum(size for place, size in dict(_places(state)).items() if place not in shared)


def _places(value: Any) -> Iterator[tuple[int, int]]:
    """Address and bytes of the memory behind every tensor."""
    for tensor in _tensors(value, set()):
        if isinstance(tensor, _Filled):
            yield tensor.rows.data_ptr(), tensor.rows.nbytes
        else:
            yield tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


@dataclasses.dataclass(frozen=True)
class _Filled:
    """The rows of a buffer that tokens have filled."""

    rows: Tensor


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor | _Filled]:
    if isinstance(value, Tensor):
        yield value
        return
    if hasattr(value, "held"):
        yield from (_Filled(rows) for rows in value.held())
        return
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    for part in _parts(value):
        yield from _tensors(part, seen)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, type) else []
