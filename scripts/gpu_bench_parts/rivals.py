"""Who computes the same operator: what they are called, how they are called, and why some cannot be asked here.

Each file ``rivals_NAME.py`` has those of one package: it imports the package where a rival is made, and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from linbench.mechanisms.base import Mechanism

Operator = Callable[..., Tensor]
"""``(q, k, v, *extras) -> o``, all ``[B, N, H, ·]``, extras in the order of the mechanism's gates."""
Step = Callable[..., Any]
"""``(q, k, v, state, *extras)`` of one token, ``[B, H, ·]``: o ``[B, H, M]`` first, where it gives more than that."""
SOURCES = ("torch", "fla", "mamba_ssm", "flashinfer", "flash_qla", "helion")
"""Packages by their import names."""


@dataclass(frozen=True)
class Rival:
    """One way of others to compute an operator."""

    mechanism: str
    package: str
    form: str
    """What is called."""
    make: Callable[[Mechanism], Operator]
    """Raises ImportError where the package is missing, and anything else where it does not work here."""
    backward: bool = True
    heads_first: bool = False
    """It wants tensors ``[B, H, N, ·]`` that are contiguous; its operator takes and gives those."""
    unlike: bool = False
    """It computes something else, and is there to be compared in time alone."""

    @property
    def name(self) -> str:
        """Package and form."""
        return f"{self.package} {self.form}"


@dataclass(frozen=True)
class StepRival:
    """One way of others to compute the next token."""

    mechanism: str
    package: str
    form: str
    make: Callable[[Mechanism], Step]
    """As of :class:`Rival`."""

    @property
    def name(self) -> str:
        """Package and form."""
        return f"{self.package} {self.form}"


def rivals() -> tuple[Rival, ...]:
    """All of them, whether or not they can be imported."""
    return tuple(rival for source in SOURCES for rival in _module(source).RIVALS)


def step_rivals() -> tuple[StepRival, ...]:
    """The same for tokens."""
    return tuple(rival for source in SOURCES for rival in getattr(_module(source), "STEP_RIVALS", ()))


def _module(source: str) -> Any:
    return importlib.import_module(f"gpu_bench_parts.rivals_{source}")


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[B, N, H, ·]`` as views ``[B, H, N, ·]``, and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


class Once:
    """What has to be made of arguments that are the same in every call: made in the first one, and not timed again."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._made: tuple[tuple[int, ...], Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Of the same objects the same result."""
        key = tuple(id(x) for x in arguments)
        if self._made is None or self._made[0] != key:
            self._made = key, self._make(*arguments)
        return self._made[1]
