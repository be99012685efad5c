"""Figures from results records. Matplotlib only, no window is ever opened."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

SIDE_COLORS = {"k": "tab:orange", "v": "tab:blue"}


def spectra(energy: dict[str, np.ndarray], rank: int, title: str) -> Figure:
    """What a rank throws away: 1 − energy kept, per coordinate, a line per layer (mean over KV heads).

    energy: side to [L, H, d], cumulative share of the variance.
    """
    figure, axes = plt.subplots(1, len(energy), figsize=(5.5 * len(energy), 4), sharey=True, layout="constrained")
    for axis, (side, kept) in zip(np.atleast_1d(axes), energy.items(), strict=True):
        lost = np.clip(1 - kept.mean(1), 1e-5, None)  # [L, d]
        ranks = np.arange(1, lost.shape[1] + 1)
        for layer, line in enumerate(lost):
            axis.semilogy(ranks[:-1], line[:-1], color=plt.cm.viridis(layer / max(len(lost) - 1, 1)), linewidth=0.9)
        axis.axvline(rank, color="tab:red", linestyle="--", label=f"rank {rank}")
        axis.set(title=f"{side.upper()} cache", xlabel="coordinates kept")
        axis.legend(loc="lower left")
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("share of variance lost")
    colors = plt.cm.ScalarMappable(plt.Normalize(0, len(lost) - 1), "viridis")
    figure.colorbar(colors, ax=axes, label="layer", fraction=0.05)
    figure.suptitle(title)
    return figure


def frontier(points: list[dict], budget: float, chosen: str | None, title: str) -> Figure:
    """Compression against change of perplexity. points: dicts with label, compression_ratio and ppl_delta."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for point in points:
        x, y = point["compression_ratio"], 100 * point["ppl_delta"]
        picked = point["label"] == chosen
        inside = point["ppl_delta"] <= budget
        color = "tab:red" if picked else "tab:blue" if inside else "tab:gray"
        axis.scatter(x, y, s=70 if picked else 28, marker="*" if picked else "o", color=color, zorder=3)
        axis.annotate(point["label"], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.axhline(100 * budget, color="tab:red", linestyle="--", linewidth=1, label=f"budget {budget:+.1%}")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.margins(x=0.15, y=0.12)
    axis.set(title=title, xlabel="whole-KV compression against a 16-bit cache", ylabel="change of perplexity, %")
    axis.legend(loc="lower left")
    axis.grid(alpha=0.3)
    return figure


def deltas(rows: list[dict], title: str) -> Figure:
    """Bars of relative perplexity change with intervals. rows: label, group, ppl_delta, ppl_delta_interval."""
    figure, axis = plt.subplots(figsize=(8, 0.27 * len(rows) + 1.4), layout="constrained")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for y, row in enumerate(rows):
        value = 100 * row["ppl_delta"]
        low, high = (100 * edge for edge in row["ppl_delta_interval"])
        axis.barh(y, value, color=plt.cm.tab10(groups.index(row["group"]) % 10), height=0.7)
        axis.plot([low, high], [y, y], color="black", linewidth=1)
        axis.annotate(f" {value:+.2f} %", (max(value, high, 0), y), va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=1)
    axis.set(title=title, xlabel="change of perplexity, % (bars: paired bootstrap, 95 %)")
    axis.margins(x=0.15, y=0.01)
    axis.grid(axis="x", alpha=0.3)
    return figure


def appending(tokens: list[int], milliseconds: dict[str, list[float]], title: str) -> Figure:
    """Time to append one token against the tokens held, a line per codec."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, values in milliseconds.items():
        axis.plot(tokens, values, marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel="tokens held", ylabel="ms to append one token, all layers")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure
