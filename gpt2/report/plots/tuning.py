"""Figures of what a tuner finds: compression against loss, losses layer by layer, presets by ratio."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gpt2.report.plots.figure import KL, PERPLEXITY, RATIO, bar_lengths, color_of, new_figure, spread_labels


def grid_frontier(points: list[dict], budget: float, chosen: str | None, title: str) -> Figure:
    """Compression against change of perplexity for one codec's grid: red the chosen point, blue those in the budget.

    points: dicts with label, compression_ratio and ppl_delta; those without a finite loss (None) are left out.
    """
    figure, axis = new_figure(figsize=(7, 4.5))
    for point in (point for point in points if point["ppl_delta"] is not None):
        x, y = point["compression_ratio"], 100 * point["ppl_delta"]
        picked = point["label"] == chosen
        inside = point["ppl_delta"] <= budget
        color = "tab:red" if picked else "tab:blue" if inside else "tab:gray"
        axis.scatter(x, y, s=70 if picked else 28, marker="*" if picked else "o", color=color, zorder=3)
        axis.annotate(point["label"], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    _frontier_axes(axis, budget, title)
    axis.legend(loc="lower left")
    return figure


def codec_frontier(points: list[dict], budget: float, chosen: str | None, title: str) -> Figure:
    """Compression against change of perplexity for several codecs: a color per codec family, hollow over the budget.

    Only points that no other beats are labelled. points: as in `grid_frontier`, with `family` as well; those without a
    finite loss (None) are crosses at the upper edge.
    """
    figure, axis = new_figure(figsize=(10.5, 6))
    for index, family in enumerate(sorted({point["family"] for point in points})):
        own, color = [point for point in points if point["family"] == family], color_of(index)
        for point in own:
            x, y = point["compression_ratio"], point["ppl_delta"]
            if y is None:
                axis.plot(x, 0.98, "x", color=color, transform=axis.get_xaxis_transform())
                continue
            picked, inside = point["label"] == chosen, y <= budget
            style = {"marker": "*" if picked else "o", "s": 160 if picked else 30, "zorder": 4 if picked else 3}
            axis.scatter(x, 100 * y, facecolor=color if inside else "none", edgecolor=color, **style)
        axis.scatter([], [], color=color, label=family)
    axis.scatter([], [], marker="*", s=120, color="black", label="chosen")
    axis.scatter([], [], facecolor="none", edgecolor="black", label="over the budget")
    _frontier_axes(axis, budget, title)
    figure.legend(loc="outside right upper", fontsize=8)
    best = [p for p in points if p["ppl_delta"] is not None and not any(_beats(other, p) for other in points)]
    spots = [(p["compression_ratio"], 100 * p["ppl_delta"]) for p in best]
    if best:
        spread_labels(axis, [p["label"] for p in best], spots, [spot for spot in spots for _ in range(2)])
    return figure


def _frontier_axes(axis: Axes, budget: float, title: str) -> None:
    axis.axhline(100 * budget, color="tab:red", linestyle="--", linewidth=1, label=f"budget {budget:+.1%}")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.margins(x=0.15, y=0.12)
    axis.set(title=title, xlabel=RATIO, ylabel="change of perplexity, %")


def _beats(a: dict, b: dict) -> bool:
    """Whether point a compresses more than point b and loses less."""
    return (
        a["ppl_delta"] is not None
        and a["ppl_delta"] < b["ppl_delta"]
        and a["compression_ratio"] > b["compression_ratio"]
    )


def layer_losses(rows: list[dict], title: str) -> Figure:
    """KL divergence when one layer alone is compressed: a line per setting over the layers, a panel per side.

    rows: as `tuning.layer_sensitivity.ablate` gives them. Those without a finite loss are left out.
    """
    rows = [row for row in rows if row["kl_nats"] is not None]
    sides = list(dict.fromkeys(row["side"] for row in rows))
    figure, axes = new_figure(1, len(sides), figsize=(2 + 5.5 * len(sides), 4), sharey=True, squeeze=False)
    for axis, side in zip(axes[0], sides, strict=True):
        own = [row for row in rows if row["side"] == side]
        for rank, bits in sorted({(row["rank"], row["bits"]) for row in own}):
            line = sorted((row["layer"], row["kl_nats"]) for row in own if (row["rank"], row["bits"]) == (rank, bits))
            layers, losses = zip(*line, strict=True)
            label = f"rank {rank}, {bits} bits"
            axis.semilogy(layers, np.clip(losses, 1e-6, None), marker="o", markersize=3, linewidth=1, label=label)
        axis.set(title=f"{side.upper()} cache", xlabel="layer that is compressed")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel(KL)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    return figure


def ratio_presets(record: dict) -> Figure:
    """Presets by ratio over their whole-KV compression: change of perplexity with its interval, and KL.

    record: as scripts/make_presets.py writes it.
    """
    rows, meta = record["rows"], record["calibration"]
    figure, axes = new_figure(1, 2, figsize=(11, 4.5))
    x = [row["compression_ratio_2048"] for row in rows]
    y = 100 * np.array([row["ppl_delta"] for row in rows])
    bars = bar_lengths(y, 100 * np.array([row["ppl_delta_interval"] for row in rows]))
    axes[0].errorbar(x, y, bars, fmt="o-", capsize=3)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel(PERPLEXITY)
    axes[1].semilogy(x, [row["kl_nats"] for row in rows], "o-")
    axes[1].set_ylabel(KL)
    for axis, values in zip(axes, (y, [row["kl_nats"] for row in rows]), strict=True):
        for i, (row, at, value) in enumerate(zip(rows, x, values, strict=True)):
            where = (-6, 7, "right") if i % 2 else (6, -13, "left")  # neighbours on either side of the line
            axis.annotate(row["label"], (at, value), where[:2], textcoords="offset points", ha=where[2], fontsize=8)
        axis.set_xlabel(f"{RATIO} of 2,048 tokens")
        axis.margins(x=0.12, y=0.12)
    figure.suptitle(
        f"{record['model']}: calibrated on {meta['tokens']:,} calibration tokens of {meta['text']},\n"
        f"measured on {rows[0]['tokens']:,} evaluation tokens of {record['text']}"
    )
    return figure
