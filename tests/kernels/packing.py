"""Packed sequences and shared heads, taken apart: what kernels do with all at once, by a recurrence for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def borders(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    """The argument of the operators; none where nothing is packed."""
    if not lengths:
        return {}
    return {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)}


def apart(
    recurrence: Callable[..., tuple[Tensor, Tensor]], x: dict[str, Tensor], lengths: tuple[int, ...], **settings: Any
) -> tuple[Tensor, Tensor]:
    """Outputs and final states, every sequence and every head of v on its own."""
    heads = x["v"].shape[1]
    x = x | {name: x[name].repeat_interleave(heads // x[name].shape[1], 1) for name in ("q", "k")}
    if not lengths:
        return recurrence(**x, **settings)
    initial = x.pop("initial_state", None)
    outs, states, first = [], [], 0
    for number, length in enumerate(lengths):
        part = {name: t[:, :, first : first + length] if t.ndim > 2 else t for name, t in x.items()}
        first += length
        state = None if initial is None else initial[number : number + 1]
        if length:
            out, state = recurrence(**part, **settings, initial_state=state)
            outs.append(out)
        elif state is None:
            state = x["v"].new_zeros(1, heads, x["q"].shape[-1], x["v"].shape[-1])
        states.append(state)
    return torch.cat(outs, 2), torch.cat(states)
