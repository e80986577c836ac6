"""q, k, v captured from a trained model: what attention sees in practice. ``data/README.md`` says where it is from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError

DATA = Path(__file__).parent / "data"
MINILM_TEXTS, MINILM_HEADS, MINILM_TOKENS, MINILM_DIM = 6, 6, 512, 32
"""The shape of each tensor in ``data/minilm.safetensors``; held true by a test."""


def minilm(
    cell: Cell, generator: torch.Generator, *, layer: Literal[0, 3, 5] = 3, text: Literal[0, 1, 2, 3, 4, 5] = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Read what one layer of all-MiniLM-L6-v2 computes on English prose; the seed plays no part.

    The first N tokens of B texts, and H evenly spaced ones of the stored heads. Logits are q·k/√32, as in the
    model. The sharpness is the model's own.

    Args:
        layer: first, middle or last of the model's six layers, counted from 0.
        text: the first of the B texts.
    """
    step = MINILM_HEADS // cell.heads
    with safe_open(DATA / "minilm.safetensors", framework="pt") as file:
        q, k, v = (
            file.get_slice(f"layer{layer}.{name}")[text : text + cell.batch, :, : cell.length].float()[:, ::step]
            for name in "qkv"
        )
    return q.contiguous(), k.contiguous(), v.contiguous()


def unsupported(cell: Cell) -> str | None:
    """Why the capture cannot give this cell, in one clause, or None.

    Raises:
        UsageError: ``cell.heads`` does not divide the number of stored heads.
    """
    if MINILM_HEADS % cell.heads:
        choices = ", ".join(str(heads) for heads in range(1, MINILM_HEADS + 1) if MINILM_HEADS % heads == 0)
        raise UsageError(f"heads={cell.heads}: inputs=minilm holds {MINILM_HEADS} heads; choose from {choices}")
    if cell.length > MINILM_TOKENS:
        return f"minilm holds {MINILM_TOKENS} tokens, not {cell.length}"
    first = int(cell.inputs_parameters.get("text") or 0)
    if first + cell.batch > MINILM_TEXTS:
        return f"minilm holds {MINILM_TEXTS} texts, not {cell.batch}{f' from text {first} on' if first else ''}"
    if cell.head_dim != MINILM_DIM:
        return f"minilm has head_dim {MINILM_DIM}, not {cell.head_dim}"
    if cell.value_dim != MINILM_DIM:
        return f"minilm has value_dim {MINILM_DIM}, not {cell.value_dim}"
    return None


def another_draw(cell: Cell, index: int) -> Cell:
    """The same of another text: 0 is the next one, and the others follow from 1 on, again and again.

    Raises:
        UsageError: the cell takes several texts.
    """
    if cell.batch > 1:
        raise UsageError(f"batch={cell.batch}: other texts of minilm are drawn one at a time; set batch=1")
    own = int(cell.inputs_parameters.get("text") or 0)
    step = 1 if index == 0 else 2 + (index - 1) % (MINILM_TEXTS - 2)
    return cell.model_copy(
        update={"inputs_parameters": {**cell.inputs_parameters, "text": (own + step) % MINILM_TEXTS}}
    )
