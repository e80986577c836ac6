"""One colour and mark for each mechanism, one line and filling for each of its series, the same in all figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from linbench.report.settings import Series

T = TypeVar("T")
Fill = Literal["full", "none", "left", "bottom", "right", "top"]

INK = "#1a1a1a"
"""Text, axes and exact attention: dark on light, and light on dark."""
MUTED = "#6b7280"
GRID = "#d9dde3"
PAPER = "#fefefe"
"""The inside of a hollow mark: the page behind the figure."""
# Okabe and Ito's colours, which the colour-blind tell apart; their yellow is too light for lines on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c7a00")
DARK = {
    INK: "#f1f3f5",
    MUTED: "#9aa4b2",
    GRID: "#353b45",
    PAPER: "#14171c",
    "#0072b2": "#3d9be0",
    "#d55e00": "#ff7a33",
    "#009e73": "#19c99a",
    "#cc79a7": "#e295c0",
    "#e69f00": "#f5b335",
    "#56b4e9": "#9ad8ff",
    "#8c7a00": "#c4b02c",
}
"""Colour on a light page -> colour on a dark one."""
VARIABLES = {colour: f"--c{index}" for index, colour in enumerate(DARK)}
"""Colour -> the CSS variable that stands for it in the page."""
MARKERS = ("s", "^", "D", "v", "P", "X", "*", "h", "<", ">", "p")
KNOWN = ("linear", "linformer", "performer", "longformer", "retnet")
"""These keep their colour in every report; other mechanisms take the next ones in alphabetical order."""
FILLS: tuple[Fill, ...] = ("full", "none", "left", "bottom", "right", "top")
Dash = tuple[float, ...]
DASHES: tuple[Dash, ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3), (3, 1, 1, 1, 1, 1))
"""Lengths of dashes and gaps in points; empty for a solid line."""


@dataclass(frozen=True)
class Style:
    """How a series looks."""

    colour: str
    marker: str
    fill: Fill
    dashes: Dash


def make_styles(series: Sequence[Series]) -> dict[Series, Style]:
    """Colour and mark from the mechanism, dashes from the implementation, filling from the hyperparameters."""
    marks = mechanism_marks(one.mechanism for one in series)
    variants: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    implementations: dict[str, list[str]] = defaultdict(list)
    styles = {}
    for one in sorted(series, key=lambda one: one.order):
        variant = _place(variants[one.mechanism], (one.target, one.hyperparameters))
        implementation = _place(implementations[one.mechanism], one.implementation)
        # more variants than fillings: the dashes change as well
        dashes = DASHES[(implementation + variant // len(FILLS)) % len(DASHES)]
        styles[one] = Style(*marks[one.mechanism], FILLS[variant % len(FILLS)], dashes)
    return styles


def mechanism_marks(mechanisms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by mechanism: no two alike up to 77 mechanisms."""
    unknown = sorted(set(mechanisms) - {"softmax", *KNOWN})
    marks = {"softmax": (INK, "o")}
    for index, name in enumerate((*KNOWN, *unknown)):
        # each round through the colours starts one marker further on: every pair comes up before one comes twice
        marker = (index + index // len(COLOURS)) % len(MARKERS)
        marks[name] = (COLOURS[index % len(COLOURS)], MARKERS[marker])
    return marks


def _place(seen: list[T], value: T) -> int:
    if value not in seen:
        seen.append(value)
    return seen.index(value)
