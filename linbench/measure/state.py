"""The state that a mechanism decodes from: how it comes to be, and the bytes that it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from linbench.measure.call import Call
from linbench.mechanisms.base import extras_at

LONGEST_WALK_TOKENS = 256
"""A state is built token by token; longer sequences are not walked to their end."""


def state_after(call: Call, tokens: int) -> Any:
    """The state after the first ``tokens`` tokens of the call's inputs, for all B elements of its batch.

    Every token is handed over as tensors of its own, so that a state that keeps them keeps no whole sequence alive.
    """
    mechanism = call.mechanism
    state = mechanism.initial_state(call.q.shape[0], call.q.device, call.q.dtype)
    with torch.no_grad():
        for token in range(tokens):
            q, k, v = (x[:, :, token].clone() for x in (call.q, call.k, call.v))
            extras = {name: x.clone() for name, x in extras_at(call.extras, token).items()}
            _, state = mechanism.step(q, k, v, state, **extras)
    return state


def state_bytes(state: Any, constants: Any = ()) -> int:
    """Bytes of the memory behind a state's tensors; what several of them share is counted once.

    Args:
        state: tensors in dataclasses, tuples, lists, mappings and objects with attributes, nested as they are.
        constants: tensors that are there without the state, parameters and tables: their memory is not counted.
    """
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(state)}
    shared = {storage.data_ptr() for storage in _storages(constants)}
    return sum(size for place, size in storages.items() if place not in shared)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in _tensors(value, set()):
        yield tensor.untyped_storage()


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
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
