"""Names at the ends of lines, for panels with more series than a legend can keep apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from linbench.report.settings import Series
from linbench.report.style import INK, Style

CROWDED = 8
"""Panels with more lines than this have their names beside them."""
MARGIN_POINTS = 92.0
"""Right margin that holds the names."""
_ROW_POINTS = 8.6
_SIZE = 7.0
_LONGEST = 20


def crowded_height(lines: int, usual: float) -> float:
    """Height of a panel, in points, at which the names of so many lines fit beside it."""
    return max(usual, lines * _ROW_POINTS + 40)


def label_ends(
    axes: Axes, ends: Mapping[Series, tuple[float, float]], names: Mapping[Series, str], styles: Mapping[Series, Style]
) -> None:
    """Write every series' name to the right of the axes, as near to the height of its end as the others allow.

    Args:
        axes: with their scales and limits set; the margin to the right is free.
        ends: the last point of each line, in data coordinates.
        names: what is written.
        styles: whose colours the thin lines from ends to names have.
    """
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted(
        ((tuple(to_axes.transform(end)), series) for series, end in ends.items()), key=lambda one: one[0][1]
    )
    heights = spread([y for (_, y), _ in placed], _ROW_POINTS / height)
    for ((x, y), series), level in zip(placed, heights, strict=True):
        colour = styles[series].colour
        axes.plot(
            [x, 1.0, 1.03],
            [y, y, level],
            color=colour,
            linewidth=0.5,
            alpha=0.6,
            transform=axes.transAxes,
            clip_on=False,
            zorder=1,
        )
        name = names[series]
        short = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
        axes.text(1.04, level, short, transform=axes.transAxes, fontsize=_SIZE, color=INK, va="center", clip_on=False)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights in [0, 1] in the order of ``wanted``, which is ascending, ``gap`` apart and near to what is wanted.

    Where they do not all fit, they are as far apart as they can be.
    """
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    # blocks of touching names, each at the mean of what its members want
    blocks: list[tuple[float, int]] = []
    for index, want in enumerate(wanted):
        total, members = want - index * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / members:
            before, count = blocks.pop()
            total, members = total + before, members + count
        blocks.append((total, members))
    shifts = [total / members for total, members in blocks for _ in range(members)]
    highest = 1 - (len(wanted) - 1) * gap
    return [min(max(shift, 0.0), highest) + index * gap for index, shift in enumerate(shifts)]
