"""A figure before it is drawn: panels whose content knows how to draw itself, and what numbers it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from matplotlib.axes import Axes

from linbench.report.points import Point
from linbench.report.settings import Series, Setting
from linbench.stats import Estimate

HEIGHT_POINTS = 262.0
_LEFT, _RIGHT = 54.0, 16.0


class Entry(NamedTuple):
    """One number of a panel, or a failure in its place: what a person sees on pointing at it, and a row of its CSV."""

    point: Point
    value: Estimate | None
    """None where the point failed."""
    text: str
    """The value with its interval, or why there is none."""
    across: Estimate | None = None
    """The horizontal value, where that is not the length."""


class Content(Protocol):
    """What is inside the axes of a panel."""

    kind: ClassVar[str]
    """Which function of the page draws it."""

    def draw(self, axes: Axes) -> None:
        """With matplotlib, for the files."""

    @property
    def entries(self) -> Sequence[Entry]:
        """The numbers, series by series."""

    def frame(self) -> dict[str, Any]:
        """What else the page needs to draw it: limits, ticks, lines that are no series."""


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    content: Content
    setting: Setting
    inputs: str | None = None
    """The family of inputs; None where all of them are pooled."""
    note: str = ""
    """What is to be seen in it, in a sentence."""
    height: float = HEIGHT_POINTS
    """Points, margins included."""
    left: float = _LEFT
    """Points of the left margin."""
    right: float = _RIGHT
    """Points of the right one."""


@dataclass(frozen=True)
class Chart:
    """A figure: panels, the series that they show, and what to see in them."""

    slug: str
    """File name of its PNG, SVG and CSV."""
    heading: str
    notes: list[str]
    panels: list[Panel]
    legend: list[Series]
    unit: str
    """Of the vertical values in its CSV."""
