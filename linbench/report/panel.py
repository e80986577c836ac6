"""One set of axes of a figure, before it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes

HEIGHT_POINTS = 262.0
_LEFT, _RIGHT = 54.0, 16.0


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    draw: Callable[[Axes], None]
    height: float = HEIGHT_POINTS
    """Points, margins included."""
    left: float = _LEFT
    """Points of the left margin."""
    right: float = _RIGHT
    """Points of the right one."""
