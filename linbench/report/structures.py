"""What panels of the ``structure`` measure hold: singular values by their number, and pictures of attention maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from linbench.record import AttentionMap, MapPicture, Structure
from linbench.report import units
from linbench.report.axes import Scale, bare, value_axis
from linbench.report.charts import Look, line_options, scale_frame
from linbench.report.names import setting_names
from linbench.report.panel import Chart, Entry, Panel
from linbench.report.points import Point, Points
from linbench.report.style import COLOURS, INK, MUTED, PAPER
from linbench.stats import Estimate

FLOOR = 1e-6
"""Singular values below it are rounding, and drawn there."""
_SCALE = Scale(FLOOR / 1.6, 1.6, "error", FLOOR, f"≤ {units.power_of_ten(FLOOR)}")
_COLUMNS = 4
_PITCH_POINTS = (88.0, 112.0)
"""Width and height of a map with its words in a file."""
_LONGEST_NAME = 22

Values = Callable[[Structure], tuple[list[float], list[float]]]
"""The singular values of a block, and those of exact softmax."""


class Found(NamedTuple):
    """A point with its block."""

    point: Point
    block: Structure


@dataclass(frozen=True)
class Spectrum:
    """A line for each series over the number of the singular value; that of exact softmax thick and grey."""

    kind: ClassVar[str] = "spectrum"
    found: Sequence[Found]
    values: Values
    look: Look

    @cached_property
    def entries(self) -> list[Entry]:
        """A singular value each."""
        return [
            Entry(one.point, _exactly(value), f"number {number}: {value:.3g} of the largest", _exactly(number))
            for one in self.found
            for number, value in enumerate(self.values(one.block)[0], 1)
        ]

    def frame(self) -> dict[str, Any]:
        """Limits, and the values of exact softmax."""
        ticks = self._ticks
        x = {"range": [0, self._longest + 1], "ticks": [ticks, [str(tick) for tick in ticks]], "log": False}
        return {"x": x | {"edge": 0}, "y": scale_frame(_SCALE, 0.0), "exact": self._exact}

    def draw(self, axes: Axes) -> None:
        """With matplotlib."""
        bare(axes)
        axes.set_xlim(0, self._longest + 1)
        axes.set_xticks(self._ticks)
        value_axis(axes, "y", _SCALE)
        numbers = range(1, len(self._exact) + 1)
        axes.plot(numbers, list(map(_SCALE.at, self._exact)), color=MUTED, linewidth=4, alpha=0.45, zorder=1)
        for one in self.found:
            values = self.values(one.block)[0]
            options = line_options(self.look.styles[one.point.series]) | {"markevery": max(1, len(values) // 8)}
            axes.plot(range(1, len(values) + 1), list(map(_SCALE.at, values)), **options)

    @property
    def _exact(self) -> list[float]:
        return self.values(self.found[0].block)[1]

    @property
    def _longest(self) -> int:
        return max(len(self.values(one.block)[0]) for one in self.found)

    @property
    def _ticks(self) -> list[int]:
        step = max(1, 2 ** round(math.log2(self._longest / 6)))
        return [1, *range(step, self._longest + 1, step)] if step > 1 else list(range(1, self._longest + 1))


@dataclass(frozen=True)
class Maps:
    """Tiles, exact softmax first: queries downwards, keys to the right, darker where more weight is."""

    kind: ClassVar[str] = "maps"
    found: Sequence[Found]
    look: Look

    @cached_property
    def entries(self) -> list[Entry]:
        """How far every map is from that of softmax."""
        seen = [(one.point, one.block.attention) for one in self.found if one.block.attention]
        return [
            Entry(
                point,
                _exactly(found.total_variation),
                f"total variation {found.total_variation:.2f}, {', '.join(_told(found))}",
            )
            for point, found in seen
        ]

    def frame(self) -> dict[str, Any]:
        """The pictures with their words."""
        return {
            "tiles": [
                {"series": series, "lines": words, **_pixels(picture, exact=series is None)}
                for series, words, picture in self._tiles
            ]
        }

    def draw(self, axes: Axes) -> None:
        """With matplotlib."""
        axes.set_axis_off()
        width, height = _PITCH_POINTS
        columns, rows = min(_COLUMNS, len(self._tiles)), math.ceil(len(self._tiles) / _COLUMNS)
        axes.set_xlim(0, _COLUMNS * width)
        axes.set_ylim(rows * height, 0)
        axes.set_aspect("auto")
        colours = LinearSegmentedColormap.from_list("weights", [COLOURS[1], PAPER, COLOURS[0]])
        for place, (series, words, picture) in enumerate(self._tiles):
            left, top = place % columns * width, place // columns * height
            shades = shaded(picture.exact_weights if series is None else picture.weights)
            box = (left + 2, left + width - 4, top + height - 4, top + 30)
            axes.imshow(shades, cmap=colours, vmin=-1, vmax=1, extent=box, aspect="auto", interpolation="nearest")
            name = "exact softmax" if series is None else self.look.names[series]
            short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
            for line, (text, size) in enumerate([(short, 7.0), *((word, 5.5) for word in words)]):
                axes.text(left + 2, top + 8 * (line + 1), text, fontsize=size, color=INK if line == 0 else MUTED)

    @cached_property
    def _tiles(self) -> list[tuple[Any, list[str], MapPicture]]:
        """Series (None for exact softmax), words and picture of every tile."""
        seen = [(one.point.series, one.block.attention) for one in self.found]
        tiles: list[tuple[Any, list[str], MapPicture]] = []
        for series, attention in seen:
            assert attention is not None
            assert attention.picture is not None
            if not tiles:
                tiles.append((None, _told_of_exact(attention), attention.picture))
            tiles.append((series, _told(attention), attention.picture))
        return tiles

    def panel(self, title: str) -> Panel:
        """As high as its rows of tiles."""
        point = self.found[0].point
        height = math.ceil(len(self._tiles) / _COLUMNS) * _PITCH_POINTS[1] + 32
        return Panel(title, self, point.setting, point.inputs, height=height, left=4, right=4)


def structure_charts(points: Points, look: Look) -> list[Chart]:
    """Spectra of outputs and of maps, and the maps; some may be without panels."""
    names = setting_names(points.settings)
    groups: dict[str, list[Found]] = {}
    for (setting, inputs, length), own in points.by_table.items():
        found = [Found(point, block) for point in own if (block := _block(point)) is not None]
        if found:
            groups[f"{names[setting]}: {inputs} at {units.tokens(length)} tokens"] = found
    return [_maps(groups, look), *(_spectra(groups, look, matrix) for matrix in _MATRICES)]


def _maps(groups: dict[str, list[Found]], look: Look) -> Chart:
    notes = [
        "Queries run downwards, keys to the right; of the first head, each map in shades of its own largest weight "
        "(the square root, so that small weights are seen), negative weights in orange. Exact softmax of the same "
        "inputs comes first. Below each name: entropy of a row and effective rank of the map, and the share of "
        "softmax's largest weights that are among its own, over all heads."
    ]
    pictured = {
        title: [one for one in found if one.block.attention and one.block.attention.picture]
        for title, found in groups.items()
    }
    panels = [Maps(found, look).panel(title) for title, found in pictured.items() if found]
    return Chart("attention-maps", "Attention maps beside softmax's", notes, panels, [], "total variation")


def _output(block: Structure) -> tuple[list[float], list[float]]:
    return block.output_singular_values, block.exact_singular_values


def _of_map(block: Structure) -> tuple[list[float], list[float]]:
    found = block.attention
    return (found.singular_values, found.exact_singular_values) if found else ([], [])


class _Matrix(NamedTuple):
    slug: str
    heading: str
    words: str
    values: Values


_MATRICES = (
    _Matrix("map-spectrum", "Singular values of the attention map", "the matrix of the sampled rows", _of_map),
    _Matrix("output-spectrum", "Singular values of the output", "the output of a head", _output),
)


def _spectra(groups: dict[str, list[Found]], look: Look, matrix: _Matrix) -> Chart:
    notes = [
        f"Singular values of {matrix.words} over the largest, in descending order, means over heads; the thick grey "
        "line is exact softmax. A line that falls early is of low rank."
    ]
    filled = {title: [one for one in found if matrix.values(one.block)[0]] for title, found in groups.items()}
    kept = {title: found for title, found in filled.items() if found}
    panels = [
        Panel(title, Spectrum(found, matrix.values, look), found[0].point.setting, found[0].point.inputs)
        for title, found in kept.items()
    ]
    shown = {one.point.series for found in kept.values() for one in found}
    legend = sorted(shown, key=lambda series: series.order)
    return Chart(matrix.slug, matrix.heading, notes, panels, legend, "of the largest")


def shaded(weights: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Square roots of the weights over the largest of them, with their signs."""
    matrix = np.asarray(weights, dtype=np.float64)
    return np.asarray(np.sign(matrix) * np.sqrt(np.abs(matrix) / (np.abs(matrix).max() or 1.0)))


def _pixels(picture: MapPicture, *, exact: bool) -> dict[str, Any]:
    weights = picture.exact_weights if exact else picture.weights
    return {"weights": weights, "queries": picture.queries, "keys": picture.keys}


def _told(attention: AttentionMap) -> list[str]:
    """Entropy and rank, and the overlap."""
    entropy = units.MISSING if attention.entropy_nats is None else f"{attention.entropy_nats:.2f} nats"
    overlap = units.MISSING if attention.top_overlap is None else f"{attention.top_overlap:.0%}"
    return [f"entropy {entropy}, rank {attention.effective_rank:.1f}", f"top {attention.top} found {overlap}"]


def _told_of_exact(attention: AttentionMap) -> list[str]:
    return [f"entropy {attention.exact_entropy_nats:.2f} nats, rank {attention.exact_effective_rank:.1f}"]


def _block(point: Point) -> Structure | None:
    return next((record.structure for record in point.measured if record.structure is not None), None)


def _exactly(value: float) -> Estimate:
    return Estimate(value, value, value, 1.0, 1, value)
