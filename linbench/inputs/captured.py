"""q, k, v captured from a trained model: what attention sees in practice. ``data/README.md`` says where it is from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.inputs.traces import Trace, opened

DATA = Path(__file__).parent / "data"


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
    return stored().read(cell, layer, text)


def stored() -> Trace:
    """The file."""
    return opened(DATA / "minilm.safetensors")


def unsupported(cell: Cell) -> str | None:
    """Why the capture cannot give this cell, in one clause, or None.

    Raises:
        UsageError: ``cell.heads`` does not divide the number of stored heads.
    """
    stored().require_heads(cell, "minilm")
    return stored().lacking(cell, _text(cell), "minilm")


def another_draw(cell: Cell, index: int) -> Cell:
    """The same of another text; see :meth:`Trace.another_text`.

    Raises:
        UsageError: the cell takes several texts.
    """
    text = stored().another_text(cell, _text(cell), index, "minilm")
    return cell.model_copy(update={"inputs_parameters": {**cell.inputs_parameters, "text": text}})


def _text(cell: Cell) -> int:
    return int(cell.inputs_parameters.get("text") or 0)
