"""Figures of quality: changes of perplexity, peers, variations of the codec, stability."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter, StrMethodFormatter

from gpt2.report.plots.figure import KL, PERPLEXITY, bar_lengths, blank_figure, color_of, new_figure, spread_labels

FAMILY_STYLES = {
    "baseline": ("black", "*"), "quanto": ("tab:orange", "s"), "hqq": ("tab:green", "D"), "fp8": ("tab:brown", "P"),
    "kivi": ("tab:purple", "^"), "turboquant": ("tab:red", "X"), "lowrank": ("tab:gray", "v"),
    "ours": ("tab:blue", "o"),
}  # fmt: skip


def perplexity_changes(rows: list[dict], title: str) -> Figure:
    """Bars of relative perplexity change with intervals, a color per group.

    rows: dicts with label, group, ppl_delta and ppl_delta_interval.
    """
    figure, axis = new_figure(figsize=(8, 0.27 * len(rows) + 1.4), grid="x")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for y, row in enumerate(rows):
        value = 100 * row["ppl_delta"]
        low, high = (100 * edge for edge in row["ppl_delta_interval"])
        axis.barh(y, value, color=color_of(groups.index(row["group"])), height=0.7)
        axis.plot([low, high], [y, y], color="black", linewidth=1)
        axis.annotate(f" {value:+.2f} %", (max(value, high, 0), y), va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=1)
    axis.set(title=title, xlabel=PERPLEXITY)
    axis.margins(x=0.15, y=0.01)
    return figure


def peers(rows: list[dict], title: str) -> Figure:
    """Bytes per token against loss, a color and a marker per family: perplexity large, KL and top-1 agreement beside.

    rows: as `evaluation.peers.measure` gives them; those that weren't run have no point.
    """
    rows = [row for row in rows if "not_run" not in row]
    figure = blank_figure((15, 8.5))
    axes = figure.subplot_mosaic([["ppl", "kl"], ["ppl", "top1"]], width_ratios=[2.6, 1])
    for family in (name for name in FAMILY_STYLES if name in {row["family"] for row in rows}):
        own = [row for row in rows if row["family"] == family]
        x, y = [row["bytes_per_token"] for row in own], np.array([100 * row["ppl_delta"] for row in own])
        color, marker = FAMILY_STYLES[family]
        style = {"color": color, "marker": marker, "linestyle": "", "markersize": 6}
        bars = bar_lengths(y, 100 * np.array([row["ppl_delta_interval"] for row in own]))
        axes["ppl"].errorbar(x, y, bars, capsize=3, elinewidth=1, label=family, zorder=3, **style)
        if family != "baseline":  # its KL is 0, which a logarithmic axis can't show
            axes["kl"].plot(x, np.clip([row["kl_nats"] for row in own], 1e-6, None), **style)
        axes["top1"].plot(x, [100 * row["top1_agreement"] for row in own], **style)
    axes["ppl"].set_yscale("symlog", linthresh=0.1)
    axes["kl"].set_yscale("log")
    axes["ppl"].set(title=title, ylabel=PERPLEXITY)
    axes["kl"].set_ylabel(KL)
    axes["top1"].set_ylabel("top-1 agreement, %")
    for axis in axes.values():
        _bytes_axis(axis)
        axis.grid(alpha=0.3)
    axes["ppl"].axhline(0, color="black", linewidth=0.8)
    axes["ppl"].legend(loc="upper right")
    points = [(row["bytes_per_token"], 100 * row["ppl_delta"]) for row in rows]
    bars = [(x, 100 * edge) for (x, _), row in zip(points, rows, strict=True) for edge in row["ppl_delta_interval"]]
    spread_labels(axes["ppl"], [row["label"] for row in rows], points, bars)
    return figure


def frontier(records: list[dict]) -> Figure:
    """Bytes of the whole cache against KL, a panel per results file of `peers`, which is one per model.

    A color and a marker per family, the same in all panels; our presets that lie on the frontier of ours are joined.
    """
    across = min(3, len(records))
    down = -(-len(records) // across)
    figure, axes = new_figure(down, across, figsize=(7.2 * across, 5.8 * down), squeeze=False)
    shown = {}
    for axis, record in zip(axes.flat, records, strict=False):
        rows = [row for row in record["rows"] if "not_run" not in row]
        for family in (name for name in FAMILY_STYLES if name in {row["family"] for row in rows}):
            own = [_bytes_and_kl(row) for row in rows if row["family"] == family]
            color, marker = FAMILY_STYLES[family]
            if family == "baseline":  # its KL is 0, which a logarithmic axis can't show
                shown["16-bit cache"] = axis.axvline(own[0][0], color=color, linestyle="--", linewidth=1)
                continue
            style = {"color": color, "marker": marker, "linestyle": "", "markersize": 6, "zorder": 3}
            (shown[family],) = axis.plot(*zip(*own, strict=True), **style)
            if family == "ours":
                axis.plot(*zip(*_best(own), strict=True), color=color, linewidth=1, alpha=0.6)
        _bytes_axis(axis)
        axis.set_yscale("log")
        model = record["model"].rpartition("/")[2]
        axis.set(title=f"{model}, {record['segments'][0] * record['segments'][1]:,} tokens of {record['text']}")
        axis.set_ylabel(KL)
        named = [row for row in rows if row["family"] != "baseline"]
        points = [_bytes_and_kl(row) for row in named]
        spread_labels(axis, [row["label"] for row in named], points, [])
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), frameon=False)
    return figure


def _bytes_and_kl(row: dict) -> tuple[float, float]:
    """A point of the frontier; KL that rounding has made 0 or less is drawn at 1e-6."""
    return row["bytes_per_token"], max(row["kl_nats"], 1e-6)


def _best(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (bytes, KL) for which no other has both fewer bytes and less KL, by bytes."""
    return sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))


def _bytes_axis(axis: Axes) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("bytes per token of one sequence of 2,048, as of a 16-bit model")
    axis.margins(x=0.15, y=0.1)


def codec_variations(rows: list[dict], title: str) -> Figure:
    """KL of every variation by question, a color per bit width; filled dots and lines are the product.

    rows: as `experiments.codec_variations.measure` gives them, with `question`.
    """
    questions = list(dict.fromkeys(row["question"] for row in rows))
    budgets = sorted({row["bits"] for row in rows}, reverse=True)
    lines = list(dict.fromkeys((row["question"], row["label"]) for row in rows))
    # A line's place from above, with room for a heading before each question
    places = {line: i + 1.2 * (questions.index(line[0]) + 1) for i, line in enumerate(lines)}
    figure, axis = new_figure(figsize=(10, 0.24 * (len(lines) + 1.2 * len(questions)) + 1.6), grid="x")
    for index, bits in enumerate(budgets):
        own, color = [row for row in rows if row["bits"] == bits], color_of(index)
        product = next(row["kl_nats"] for row in own if row["product"])
        axis.axvline(product, color=color, linewidth=1, alpha=0.6)
        for ours in (False, True):
            shown = [row for row in own if row["product"] == ours]
            y = [places[row["question"], row["label"]] for row in shown]
            face = color if ours else "white"
            label = f"{bits:g} bits" if ours else None
            axis.scatter(
                [row["kl_nats"] for row in shown], y, s=28, facecolor=face, edgecolor=color, label=label, zorder=3
            )
    for question in questions:
        first = min(place for (own, _), place in places.items() if own == question)
        axis.text(
            0.01, first - 1, question, transform=axis.get_yaxis_transform(), va="center", weight="bold", fontsize=8
        )
    axis.set_yticks(list(places.values()), [label for _, label in lines], fontsize=7)
    axis.set_ylim(max(places.values()) + 0.8, -0.6)
    axis.set_xscale("log")
    axis.set(title=title, xlabel=f"{KL} (filled and lines: the product)")
    figure.legend(loc="outside lower center", ncols=len(budgets), fontsize=8, frameon=False)
    return figure


def stability(rows: list[dict], metrics: dict[str, str], title: str) -> Figure:
    """A panel per metric: every run as a dot in the column of its factor, the mean of all runs as a line.

    rows: as `evaluation.stability.measure` gives them; metrics: record key to label.
    """
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    across = min(3, len(metrics))
    down = -(-len(metrics) // across)
    figure, axes = new_figure(down, across, figsize=(4.2 * across, 3 * down), grid="y", squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, (metric, label) in zip(axes.flat, metrics.items(), strict=False):
        shown = [row for row in rows if row[metric] is not None]
        values = [row[metric] for row in shown]
        places = [factors.index(row["factor"]) for row in shown]
        axis.scatter(places, values, color=[color_of(place) for place in places], s=28, zorder=3)
        if values:
            axis.axhline(np.mean(values), color="tab:gray", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(factors)), factors, fontsize=8)
        axis.set_xlim(-0.5, len(factors) - 0.5)
        axis.margins(y=0.2)
        if values and np.ptp(values) < 1e-12:  # equal values would get an axis of millionths
            axis.set_ylim(values[0] - 0.05, values[0] + 0.05)
        axis.set_title(label, fontsize=10)
        if metric == "ppl_delta":
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    figure.suptitle(f"{title}\n(dots: runs; dashed: mean of all)", fontsize=11)
    return figure
