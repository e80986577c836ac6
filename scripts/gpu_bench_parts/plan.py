"""What there is to do, and how much of it: all on a GPU, a little in the interpreter, where the script is tried."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import linbench_kernels

from linbench import registry
from linbench.cell import digest
from linbench.provenance import source_hash

SHARES = {
    "correctness": 0.35,
    "peaks": 0.1,
    "side_by_side": 0.3,
    "decode": 0.1,
    "kernel_tests": 0.1,
    "tuning": 0.05,
}
"""Of the time of a run for which no part is named. What is left of it goes to the parts in their order."""
PARTS = tuple(SHARES)
"""In the order of their value: a wrong kernel has no time, and a time needs the peaks of its device beside it."""
FIRST = ("retnet", "linear", "mamba2", "gla", "deltanet", "gated_deltanet", "lightning", "hgrn2", "rwkv6")
"""Mechanisms that stand for their families come first, all others by name."""
CENTRE = 128
"""B·H of the shapes in the middle: about as many programs as a large GPU has multiprocessors."""


@dataclass(frozen=True)
class Shape:
    """B·H heads of N tokens, D = M wide."""

    heads: int
    tokens: int
    width: int

    @property
    def split(self) -> tuple[int, int]:
        """B and H."""
        of_one = min(16, self.heads)
        return self.heads // of_one, of_one

    @property
    def tensor_bytes(self) -> int:
        """Of q in bf16."""
        return 2 * self.heads * self.tokens * self.width

    def __str__(self) -> str:
        return f"BH={self.heads} N={self.tokens} D={self.width}"


@dataclass(frozen=True)
class Item:
    """One thing to do: it is on the disk, or still to be done."""

    part: str
    key: str
    """What it is, in words that no other item of the part has."""
    values: dict[str, Any] = field(default_factory=dict, compare=False)
    modules: tuple[str, ...] = ()
    """Whose source makes the numbers, all kernels when none is named: with changed code an item is still to be done."""
    files: tuple[Path, ...] = ()
    """The same for what is no module."""
    expected_s: float = 5.0
    """It does not begin when there is less time than this, or than one of its part has taken so far."""
    limit_s: float = 120.0
    """After which it is given up."""

    @property
    def code(self) -> str:
        """Hash of the source behind it."""
        return _code(self.modules or kernel_modules(), self.files)


@dataclass(frozen=True)
class Extent:
    """How much there is to do."""

    device: str
    mechanisms: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Of times, in the order of their value."""
    widths: tuple[tuple[int, int], ...]
    """D and M whose results are checked."""
    dtypes: tuple[str, ...]
    tokens: int
    """N of the checks: several chunks and a part of one."""
    long_tokens: int
    """N of the checks of long sequences."""
    tests: tuple[str, ...] = ()
    """Files of tests/kernels, all when empty."""

    @property
    def rehearsal(self) -> bool:
        """Whether there is no device: everything is called, and nothing is timed."""
        return self.device == "cpu"


@functools.cache
def _code(modules: tuple[str, ...], files: tuple[Path, ...]) -> str:
    return digest([source_hash(modules), *(path.read_text() for path in files)])


@functools.cache
def kernel_modules() -> tuple[str, ...]:
    """All of ``linbench_kernels``."""
    root = Path(linbench_kernels.__path__[0])
    names = (path.relative_to(root.parent).with_suffix("") for path in sorted(root.rglob("*.py")))
    return tuple(".".join(name.parts) for name in names if name.name != "__init__")


def fused_mechanisms() -> tuple[str, ...]:
    """Those with kernels of the causal form, which is what is timed side by side."""
    loaded = {name: registry.load(name) for name in sorted(registry.BUILT_IN)}
    names = [name for name, one in loaded.items() if "triton" in one.implementations() and True in one.kernel_forms]
    return (*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST))


def shapes(largest_bytes: int = 2**32) -> tuple[Shape, ...]:
    """The grid of times: what most people have, then few and many heads, short and long sequences, then all else.

    Args:
        largest_bytes: of one tensor of q's size; a training step holds a dozen of them and more.
    """
    first = [
        Shape(CENTRE, 8192, 128),
        Shape(CENTRE, 2048, 64),
        Shape(8, 32768, 128),
        Shape(512, 2048, 64),
        Shape(CENTRE, 512, 64),
        Shape(8, 131072, 64),
        Shape(32, 8192, 128),
    ]
    grid = [
        Shape(heads, tokens, width)
        for tokens in (8192, 2048, 32768, 512, 131072)
        for width in (64, 128)
        for heads in (CENTRE, 32, 8, 512)
    ]
    return tuple(shape for shape in dict.fromkeys([*first, *grid]) if shape.tensor_bytes <= largest_bytes)


def of_options(options: argparse.Namespace) -> Extent:
    """What the command line asks for."""
    return extent(options.device, tuple(options.mechanisms) if options.mechanisms else None)


def extent(device: str, mechanisms: tuple[str, ...] | None = None) -> Extent:
    """All that there is on a device, or for ``cpu`` a little of each part.

    Args:
        device: ``cuda`` or ``cpu``.
        mechanisms: of those with kernels; all when None.
    """
    if device == "cpu":
        chosen = mechanisms or ("retnet", "gla")
        return Extent(device, chosen, (Shape(2, 40, 16),), ((16, 20),), ("float32",), 40, 70, ("test_step.py",))
    widths = ((128, 128), (64, 64), (20, 24), (256, 256), (96, 48), (32, 192))
    dtypes = ("bfloat16", "float32", "float16", "float64")
    return Extent(device, mechanisms or fused_mechanisms(), shapes(), widths, dtypes, 200, 8192)
