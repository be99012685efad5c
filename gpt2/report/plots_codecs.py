"""The figures of the codec search and of bytes by context length."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.figure import Figure

from gpt2.report.plots import new_figure, spread_labels


def frontier(points: list[dict], budget: float, chosen: str | None, title: str) -> Figure:
    """Compression against change of perplexity: a colour per codec family, hollow outside the budget.

    Only what nothing beats is named. points: as in `plots.frontier`, with `family` as well; those without a finite
    loss (None) stand as crosses at the upper edge.
    """
    figure, axis = new_figure(figsize=(10.5, 6))
    for index, family in enumerate(sorted({point["family"] for point in points})):
        own, color = [point for point in points if point["family"] == family], colormaps["tab10"](index % 10)
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
    axis.axhline(100 * budget, color="tab:red", linestyle="--", linewidth=1, label=f"budget {budget:+.1%}")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.margins(x=0.15, y=0.12)
    axis.set(title=title, xlabel="whole-KV compression against a 16-bit cache", ylabel="change of perplexity, %")
    figure.legend(loc="outside right upper", fontsize=8)
    axis.grid(alpha=0.3)
    best = [p for p in points if p["ppl_delta"] is not None and not any(_beats(other, p) for other in points)]
    spots = [(p["compression_ratio"], 100 * p["ppl_delta"]) for p in best]
    if best:
        spread_labels(axis, [p["label"] for p in best], spots, [spot for spot in spots for _ in range(2)])
    return figure


def ratios_by_context(rows: list[dict], title: str) -> Figure:
    """Whole-KV compression against context length, a line per cache; dashed with the basis counted as well.

    rows: as scripts/benchmarks/cache_bytes.py has them.
    """
    figure, axis = new_figure(figsize=(8, 4.5))
    for index, cache in enumerate(dict.fromkeys(row["cache"] for row in rows)):
        own, color = [row for row in rows if row["cache"] == cache], colormaps["tab10"](index % 10)
        tokens = [row["context_tokens"] for row in own]
        axis.plot(tokens, [row["compression_ratio"] for row in own], marker="o", color=color, label=cache)
        if own[0]["codec_bytes"]:
            axis.plot(tokens, [row["ratio_with_codec"] for row in own], linestyle="--", color=color)
    axis.plot([], [], linestyle="--", color="black", label="with the basis, one conversation")
    axis.set_xscale("log", base=2)
    axis.set(title=title, xlabel="tokens held", ylabel="bytes of a 16-bit cache / bytes held")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _beats(a: dict, b: dict) -> bool:
    """Whether a point compresses more than another and loses less."""
    return (
        a["ppl_delta"] is not None
        and a["ppl_delta"] < b["ppl_delta"]
        and a["compression_ratio"] > b["compression_ratio"]
    )
