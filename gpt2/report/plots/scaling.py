"""The figure of how costs grow."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2.report.plots.figure import new_figure

COLUMNS = 5
LEAST_SPAN = 4  # least ratio of the ends of the vertical axis, so that a cost that doesn't grow looks flat


def growth(record: dict) -> Figure:
    """For each series of costs its points and the power law fitted to them, beside the expected one.

    record: as scripts/benchmarks/scaling.py writes it.
    """
    rows = -(-len(record["slopes"]) // COLUMNS)
    figure, axes = new_figure(rows, COLUMNS, figsize=(2.9 * COLUMNS, 2.3 * rows), squeeze=False)
    for axis in axes.flat[len(record["slopes"]) :]:
        axis.set_axis_off()
    for axis, slope in zip(axes.flat, record["slopes"], strict=False):
        _panel(axis, slope)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"How costs grow: {record['model']} and shapes without weights, {record['device']}")
    return figure


def _panel(axis: Axes, slope: dict) -> None:
    x, values = np.array(slope["x"]), np.array(slope["values"])
    axis.loglog(np.repeat(x, values.shape[1]), values.ravel(), ".", color="tab:gray", label="measured")
    axis.loglog(x, slope["medians"], "o", color="tab:blue", label="median")
    centre = np.exp(np.log(x).mean()), np.exp(np.log(slope["medians"]).mean())  # a point of both lines
    for name, style, color in (("exponent", "-", "tab:blue"), ("expected_exponent", "--", "tab:orange")):
        label = {"exponent": "fitted", "expected_exponent": "expected"}[name]
        axis.loglog(x, centre[1] * (x / centre[0]) ** slope[name], style, color=color, label=label)
    low, high = axis.get_ylim()
    if high / low < LEAST_SPAN:
        axis.set_ylim(centre[1] / LEAST_SPAN**0.5, centre[1] * LEAST_SPAN**0.5)
    axis.set_title(f"{slope['step']}\n{slope['on']}", fontsize=6)
    axis.set_xlabel(f"{slope['against']}: exponent {slope['exponent']:.2f}, {slope['verdict']}", fontsize=6)
    axis.set_ylabel(slope["unit"], fontsize=6)
    axis.tick_params(which="both", labelsize=5)
