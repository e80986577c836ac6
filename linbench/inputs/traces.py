"""q, k, v that ``linbench capture`` stored: what attention sees in a model of one's own, in files of any length.

A file holds ``layerL.q`` ``[texts, H, N, D]``, ``layerL.k`` and ``layerL.v`` ``[texts, H_k, N, ·]``, after positions
are encoded; query head h meets key head h H_k // H. Metadata say where it is from. ``logits`` is always q·k/√D: where a
model scales otherwise, that is in the stored q.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError


@dataclass(frozen=True)
class Trace:
    """What a file holds."""

    path: Path
    layers: tuple[int, ...]
    texts: int
    heads: int
    tokens: int
    key_dim: int
    value_dim: int
    metadata: dict[str, str]

    def lacking(self, cell: Cell, text: int, name: str) -> str | None:
        """Why it cannot give the cell its inputs, in one clause, or None."""
        if cell.length > self.tokens:
            return f"{name} holds {self.tokens} tokens, not {cell.length}"
        if text + cell.batch > self.texts:
            return f"{name} holds {self.texts} texts, not {cell.batch}{f' from text {text} on' if text else ''}"
        if cell.head_dim != self.key_dim:
            return f"{name} has head_dim {self.key_dim}, not {cell.head_dim}"
        if cell.value_dim != self.value_dim:
            return f"{name} has value_dim {self.value_dim}, not {cell.value_dim}"
        return None

    def require_heads(self, cell: Cell, name: str) -> None:
        """Refuse a number of heads that does not divide that of the file.

        Raises:
            UsageError: it does not.
        """
        if self.heads % cell.heads:
            choices = ", ".join(str(heads) for heads in range(1, self.heads + 1) if self.heads % heads == 0)
            raise UsageError(f"heads={cell.heads}: inputs={name} holds {self.heads} heads; choose from {choices}")

    def read(self, cell: Cell, layer: int, text: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first N tokens of B texts, and H evenly spaced ones of the stored heads, in fp32."""
        chosen = torch.arange(0, self.heads, self.heads // cell.heads)
        with safe_open(self.path, framework="pt") as file:
            parts = [file.get_slice(f"layer{layer}.{name}") for name in "qkv"]
            q, k, v = (part[text : text + cell.batch, :, : cell.length].float() for part in parts)
        groups = self.heads // k.shape[1]
        return q[:, chosen].contiguous(), k[:, chosen // groups].contiguous(), v[:, chosen // groups].contiguous()

    def another_text(self, cell: Cell, text: int, index: int, name: str) -> int:
        """0 is the next text, and the others follow from 1 on, again and again.

        Raises:
            UsageError: the cell takes several texts, or there are no three.
        """
        if cell.batch > 1:
            raise UsageError(f"batch={cell.batch}: other texts of {name} are drawn one at a time; set batch=1")
        if self.texts < 3:
            raise UsageError(f"{name} holds {self.texts} texts: one to judge, one to select and one to fit are needed")
        step = 1 if index == 0 else 2 + (index - 1) % (self.texts - 2)
        return (text + step) % self.texts


@lru_cache(maxsize=16)
def opened(path: Path) -> Trace:
    """What the file holds.

    Raises:
        UsageError: there is no such file, or it is no trace.
    """
    if not path.is_file():
        raise UsageError(f"inputs: there is no file {path}; `linbench capture` makes one")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), dict(file.metadata() or {})
            layers = tuple(sorted(int(name.split(".")[0].removeprefix("layer")) for name in names if name[-2:] == ".q"))
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            q, k, v = (shapes[f"layer{layers[0]}.{name}"] for name in "qkv")
    except (SafetensorError, ValueError, IndexError, KeyError) as error:
        raise UsageError(f"inputs: {path} is no file of captured q, k, v: {error}") from error
    if q[1] % k[1] or k[:3] != v[:3] or (q[0], q[2], q[3]) != (k[0], k[2], k[3]):
        raise UsageError(f"inputs: {path} holds q {q}, k {k} and v {v}, which do not belong together")
    return Trace(path, layers, q[0], q[1], q[2], q[3], v[3], metadata)


def trace(
    cell: Cell, generator: torch.Generator, *, file: str = "", layer: int = -1, text: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Read what one layer of a captured model computes; the seed plays no part.

    The first N tokens of B texts, and H evenly spaced ones of the stored heads; keys and values of grouped heads are
    repeated.

    Args:
        file: that ``linbench capture`` wrote.
        layer: of the stored ones; −1 for the last.
        text: the first of the B texts.

    Raises:
        UsageError: the file, the layer or the text does not exist.
    """
    source = opened(Path(file))
    chosen = source.layers[-1] if layer == -1 else layer
    if chosen not in source.layers:
        choices = ", ".join(map(str, source.layers))
        raise UsageError(f"inputs.trace.layer={layer}: {file} holds the layers {choices}")
    return source.read(cell, chosen, text)


def unsupported(cell: Cell) -> str | None:
    """Why the file cannot give this cell, in one clause, or None.

    Raises:
        UsageError: there is no such file, or ``cell.heads`` does not divide its number of heads.
    """
    source, name = _of(cell)
    source.require_heads(cell, name)
    return source.lacking(cell, _text(cell), name)


def another_draw(cell: Cell, index: int) -> Cell:
    """The same of another text; see :meth:`Trace.another_text`."""
    source, name = _of(cell)
    text = source.another_text(cell, _text(cell), index, name)
    return cell.model_copy(update={"inputs_parameters": {**cell.inputs_parameters, "text": text}})


def fingerprint(cell: Cell) -> str:
    """SHA-256 of the file: a cell is measured again when it changes.

    Raises:
        UsageError: there is no such file.
    """
    with _of(cell)[0].path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of(cell: Cell) -> tuple[Trace, str]:
    path = Path(str(cell.inputs_parameters.get("file") or ""))
    if path == Path():
        raise UsageError("inputs=trace needs inputs.trace.file=FILE, which `linbench capture` makes")
    return opened(path), path.name


def _text(cell: Cell) -> int:
    return int(cell.inputs_parameters.get("text") or 0)
