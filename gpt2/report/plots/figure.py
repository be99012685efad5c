"""What figures share: how they are made, axes of context lengths, error bars, and labels that don't overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

PERPLEXITY = "change of perplexity, % (bars: paired bootstrap, 95 %)"
KL = "KL from the uncompressed model, nats"
RATIO = "whole-KV compression against a 16-bit cache"


def blank_figure(figsize: tuple[float, float]) -> Figure:
    """A figure made without pyplot, which would keep every figure in memory. figsize: inches."""
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)  # the size of text can only be computed with a canvas
    return figure


def new_figure(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], grid: str = "both", **how):
    """A figure and its axes, as pyplot's subplots gives them. grid: lines of both axes, of x, of y, or none."""
    figure = blank_figure(figsize)
    axes = figure.subplots(rows, columns, **how)
    if grid:
        for axis in np.atleast_1d(axes).flat:
            axis.grid(axis=grid, alpha=0.3)
    return figure, axes


def color_of(index: int):
    """The color of the series at an index; there are ten colors."""
    return colormaps["tab10"](index % 10)


def context_axis(axis: Axes, contexts: Sequence[int]) -> None:
    """A logarithmic x axis whose ticks are the measured context lengths."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")


def bar_lengths(values: np.ndarray, bounds: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Lengths of error bars below and above `values` [n] for intervals `bounds` [n, 2].

    A percentile interval may not contain the estimate itself; the bar then has length 0 on that side.
    """
    low, high = np.array(bounds).reshape(-1, 2).T
    return [np.maximum(values - low, 0), np.maximum(high - values, 0)]


def spread_labels(axis: Axes, labels: list[str], points: list[tuple], bars: list[tuple]) -> None:
    """Write labels near their points (x, y), with a thin line to each.

    No label overlaps another label, a point or the legend; bars and the zero line are avoided if there is room. bars:
    the two ends (x, y) of each bar, one after the other.
    """
    axis.figure.canvas.draw()  # positions on the canvas are known only after drawing
    renderer, inside = axis.figure.canvas.get_renderer(), axis.get_window_extent()
    spots, ends = axis.transData.transform(points), axis.transData.transform(bars).reshape(-1, 2, 2)
    linear = axis.get_yscale() != "log"  # which has no zero line
    zero = [axis.transData.transform((points[0][0], 0))[1]] if linear else []
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]
    if axis.get_legend():
        taken.append(axis.get_legend().get_window_extent(renderer))
    lines = [Bbox([low - 2, high + 2]) for low, high in ends]  # may be overlapped if nothing else is free
    lines += [Bbox([(inside.x0, y - 1), (inside.x1, y + 1)]) for y in zero]
    line = {"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    pixels = axis.figure.dpi / 72  # per point, the unit of offsets
    directions = np.radians([0, 30, -30, 60, -60, 180, 150, -150, 120, -120])
    offsets = [radius * np.array([np.cos(a), np.sin(a)]) for radius in range(9, 200, 5) for a in directions]
    for text, point, spot in zip(labels, points, spots, strict=True):
        note = axis.annotate(
            text, point, xytext=(0, 0), textcoords="offset points", fontsize=7, va="center", arrowprops=line
        )
        note.set_in_layout(False)
        width, height = Text.get_window_extent(note, renderer).padded(1.5).size

        def box_at(offset, spot=spot, width=width, height=height) -> Bbox:
            x, y = spot + pixels * offset
            return Bbox.from_bounds(x - 1.5 if offset[0] > 0 else x - width + 1.5, y - height / 2, width, height)

        def clashes(offset, box_at=box_at) -> int:
            box = box_at(offset)
            outside = not all(inside.contains(x, y) for x, y in (box.min, box.max))
            return 1000 * (outside + box.count_overlaps(taken)) + box.count_overlaps(lines)

        best = min(offsets, key=clashes)  # min returns the first of equals, which is the nearest
        note.set(ha="left" if best[0] > 0 else "right", position=best)
        taken.append(box_at(best))
