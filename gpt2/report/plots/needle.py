"""The figures of the needle test and of tasks: heat maps of what each cache answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gpt2.report.plots.figure import new_figure


def needles(cells: list[dict], title: str) -> Figure:
    """Heat maps over context length and depth, a row of three per cache. cells: as `evaluation.needle.cells`."""
    return _maps(cells, title, "depth", lambda depth: f"{100 * depth:g}%", "depth of the needle")


def tasks(cells: list[dict], title: str) -> Figure:
    """Heat maps over context length and task, a row of three per cache. cells: as `evaluation.tasks.measure.cells`."""
    return _maps(cells, title, "task", lambda name: name.replace("_", " "), "")


def _maps(cells: list[dict], title: str, key: str, named: Callable[..., str], label: str) -> Figure:
    """For each cache the baseline's exact match, its own, and the change of the answer's log-probability.

    key: of the cells, by which panels have rows; named: what a row's tick says; label: of the axis.
    """
    reference = next(cell["cache"] for cell in cells if "verdict" not in cell)
    names = list(dict.fromkeys(cell["cache"] for cell in cells if "verdict" in cell))
    lengths, kinds = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("context_tokens", key))
    size = (3 * max(1.5 + 0.85 * len(lengths), 3.2), (1.1 + max(0.45 * len(kinds), 1)) * len(names) + 0.6)
    figure, axes = new_figure(len(names), 3, figsize=size, grid="", squeeze=False)
    found = {(cell["cache"], cell[key], cell["context_tokens"]): cell for cell in cells}
    largest = max(1, *(abs(cell.get("logprob_change_nats", 0)) for cell in cells))
    for row, name in zip(axes, names, strict=True):
        panels = ((reference, "exact_match"), (name, "exact_match"), (name, "logprob_change_nats"))
        for axis, (cache, shown) in zip(row, panels, strict=True):
            grid = [[found[cache, kind, length] for length in lengths] for kind in kinds]
            if shown == "exact_match":
                image = _heat_map(axis, grid, shown, "{:.0%}", cmap="viridis", vmin=0, vmax=1)
                figure.colorbar(image, ax=axis, label="prompts answered", format="{x:.0%}")
            else:
                image = _heat_map(axis, grid, shown, "{:+.2f}", cmap="RdBu", vmin=-largest, vmax=largest)
                figure.colorbar(image, ax=axis, label="nats per answer")
            axis.set_title(f"{cache}: {'exact match' if shown == 'exact_match' else 'change of log p'}", fontsize=9)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(kinds)), [named(kind) for kind in kinds])
        row[0].set_ylabel(label)
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
