"""The figure of the needle test."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gpt2.report.plots.figure import new_figure


def needles(cells: list[dict], title: str) -> Figure:
    """Heat maps over context length and depth, a row of three per cache.

    They show the baseline's exact match, the cache's, and the change of the answer's log-probability. cells: as
    `evaluation.needle.cells` makes them.
    """
    reference = next(cell["cache"] for cell in cells if "verdict" not in cell)
    names = list(dict.fromkeys(cell["cache"] for cell in cells if "verdict" in cell))
    lengths, depths = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("context_tokens", "depth"))
    size = (3 * max(1.5 + 0.85 * len(lengths), 3.2), (1.1 + max(0.45 * len(depths), 1)) * len(names) + 0.6)
    figure, axes = new_figure(len(names), 3, figsize=size, grid="", squeeze=False)
    found = {(cell["cache"], cell["depth"], cell["context_tokens"]): cell for cell in cells}
    largest = max(1, *(abs(cell.get("logprob_change_nats", 0)) for cell in cells))
    for row, name in zip(axes, names, strict=True):
        panels = ((reference, "exact_match"), (name, "exact_match"), (name, "logprob_change_nats"))
        for axis, (cache, key) in zip(row, panels, strict=True):
            grid = [[found[cache, depth, length] for length in lengths] for depth in depths]
            if key == "exact_match":
                image = _heat_map(axis, grid, key, "{:.0%}", cmap="viridis", vmin=0, vmax=1)
                figure.colorbar(image, ax=axis, label="prompts answered", format="{x:.0%}")
            else:
                image = _heat_map(axis, grid, key, "{:+.2f}", cmap="RdBu", vmin=-largest, vmax=largest)
                figure.colorbar(image, ax=axis, label="nats per answer")
            axis.set_title(f"{cache}: {'exact match' if key == 'exact_match' else 'change of log p'}", fontsize=9)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
        row[0].set_ylabel("depth of the needle")
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    figure.suptitle(title)
    return figure


def _heat_map(axis: Axes, grid: list[list[dict]], key: str, form: str, **colors):
    """One panel with the figure of every cell in it; cells whose baseline fails say so and are hatched."""
    values = np.array([[cell[key] for cell in row] for row in grid])
    image = axis.imshow(values, aspect="auto", **colors)
    for (y, x), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        color = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
        words = form.format(round(value, 2) + 0.0)  # no "-0.00"
        if not grid[y][x]["baseline_works"]:
            box = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor=color, linewidth=0, alpha=0.2)
            axis.add_patch(box)
            words += "\nbaseline fails"
        axis.text(x, y, words, ha="center", va="center", fontsize=7, color=color)
    return image
