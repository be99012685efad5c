"""Figures from results records. Matplotlib only, no window is ever opened."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

SIDE_COLORS = {"k": "tab:orange", "v": "tab:blue"}


def new_figure(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **how):
    """A figure and its axes, as pyplot's subplots gives them. figsize: width and height in inches."""
    figure = _blank(figsize)
    return figure, figure.subplots(rows, columns, **how)


def _blank(figsize: tuple[float, float]) -> Figure:
    """A figure of nobody's: pyplot keeps every one that it makes for ever."""
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)  # which knows how large words are
    return figure


def spectra(energy: dict[str, np.ndarray], rank: int, title: str) -> Figure:
    """What a rank throws away: 1 − energy kept, per coordinate, a line per layer (mean over KV heads).

    energy: side to [L, H, d], cumulative share of the variance.
    """
    figure, axes = new_figure(1, len(energy), figsize=(5.5 * len(energy), 4), sharey=True)
    for axis, (side, kept) in zip(np.atleast_1d(axes), energy.items(), strict=True):
        lost = np.clip(1 - kept.mean(1), 1e-5, None)  # [L, d]
        ranks = np.arange(1, lost.shape[1] + 1)
        for layer, line in enumerate(lost):
            axis.semilogy(
                ranks[:-1], line[:-1], color=colormaps["viridis"](layer / max(len(lost) - 1, 1)), linewidth=0.9
            )
        axis.axvline(rank, color="tab:red", linestyle="--", label=f"rank {rank}")
        axis.set(title=f"{side.upper()} cache", xlabel="coordinates kept")
        axis.legend(loc="lower left")
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("share of variance lost")
    colors = ScalarMappable(Normalize(0, len(lost) - 1), "viridis")
    figure.colorbar(colors, ax=axes, label="layer", fraction=0.05)
    figure.suptitle(title)
    return figure


def frontier(points: list[dict], budget: float, chosen: str | None, title: str) -> Figure:
    """Compression against change of perplexity. points: dicts with label, compression_ratio and ppl_delta.

    Those without a finite loss (None) have no place.
    """
    figure, axis = new_figure(figsize=(7, 4.5))
    for point in (point for point in points if point["ppl_delta"] is not None):
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


def ratio_presets(record: dict) -> Figure:
    """Presets by ratio: change of perplexity with its interval, and KL beside, over the whole-KV compression.

    record: as scripts/make_presets.py writes it.
    """
    rows, meta = record["rows"], record["calibration"]
    figure, axes = new_figure(1, 2, figsize=(11, 4.5))
    x = [row["compression_ratio_2048"] for row in rows]
    y = 100 * np.array([row["ppl_delta"] for row in rows])
    low, high = 100 * np.array([row["ppl_delta_interval"] for row in rows]).T
    axes[0].errorbar(x, y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], fmt="o-", capsize=3)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("change of perplexity, % (bars: paired bootstrap, 95 %)")
    axes[1].semilogy(x, [row["kl_nats"] for row in rows], "o-")
    axes[1].set_ylabel("KL from the uncompressed model, nats")
    for axis, values in zip(axes, (y, [row["kl_nats"] for row in rows]), strict=True):
        for i, (row, at, value) in enumerate(zip(rows, x, values, strict=True)):
            where = (-6, 7, "right") if i % 2 else (6, -13, "left")  # neighbours on either side of the line
            axis.annotate(row["label"], (at, value), where[:2], textcoords="offset points", ha=where[2], fontsize=8)
        axis.set_xlabel("whole-KV compression against a 16-bit cache of 2,048 tokens")
        axis.margins(x=0.12, y=0.12)
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"{record['model']}: calibrated on {meta['tokens']:,} calibration tokens of {meta['text']},\n"
        f"measured on {rows[0]['tokens']:,} evaluation tokens of {record['text']}"
    )
    return figure


FAMILY_STYLES = {
    "baseline": ("black", "*"), "quanto": ("tab:orange", "s"), "hqq": ("tab:green", "D"), "fp8": ("tab:brown", "P"),
    "kivi": ("tab:purple", "^"), "lowrank": ("tab:gray", "v"), "ours": ("tab:blue", "o"),
}  # fmt: skip


def peers(rows: list[dict], title: str) -> Figure:
    """Bytes per token against what they cost, a colour and a marker per family: perplexity large, KL and top-1 beside.

    rows: as `evaluation.peers.measure` gives them; what wasn't run has no point.
    """
    rows = [row for row in rows if "not_run" not in row]
    figure = _blank((15, 8.5))
    axes = figure.subplot_mosaic([["ppl", "kl"], ["ppl", "top1"]], width_ratios=[2.6, 1])
    for family in (name for name in FAMILY_STYLES if name in {row["family"] for row in rows}):
        own = [row for row in rows if row["family"] == family]
        x, y = [row["bytes_per_token"] for row in own], np.array([100 * row["ppl_delta"] for row in own])
        low, high = 100 * np.array([row["ppl_delta_interval"] for row in own]).T
        color, marker = FAMILY_STYLES[family]
        style = {"color": color, "marker": marker, "linestyle": "", "markersize": 6}
        # A percentile interval may leave out its own estimate, which a bar's length can't
        bars = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
        axes["ppl"].errorbar(x, y, bars, capsize=3, elinewidth=1, label=family, zorder=3, **style)
        if family != "baseline":  # it has no distance from itself, and log axes no zero
            axes["kl"].plot(x, np.clip([row["kl_nats"] for row in own], 1e-6, None), **style)
        axes["top1"].plot(x, [100 * row["top1_agreement"] for row in own], **style)
    axes["ppl"].set_yscale("symlog", linthresh=0.1)
    axes["kl"].set_yscale("log")
    axes["ppl"].set(title=title, ylabel="change of perplexity, % (bars: paired bootstrap, 95 %)")
    axes["kl"].set_ylabel("KL from the uncompressed model, nats")
    axes["top1"].set_ylabel("top-1 agreement, %")
    for axis in axes.values():
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("bytes per token of one sequence of 2,048, as of a 16-bit model")
        axis.margins(x=0.15, y=0.1)
        axis.grid(alpha=0.3)
    axes["ppl"].axhline(0, color="black", linewidth=0.8)
    axes["ppl"].legend(loc="upper right")
    points = [(row["bytes_per_token"], 100 * row["ppl_delta"]) for row in rows]
    bars = [(x, 100 * edge) for (x, _), row in zip(points, rows, strict=True) for edge in row["ppl_delta_interval"]]
    spread_labels(axes["ppl"], [row["label"] for row in rows], points, bars)
    return figure


def spread_labels(axis, labels: list[str], points: list[tuple], bars: list[tuple]) -> None:
    """Write labels near their points (x, y), with a thin line to each, so that none lies on another label, a point, the
    legend, and where there is room a bar or the zero line. bars: their ends, two of each after another."""
    axis.figure.canvas.draw()  # only now is it known where on the canvas a point lies
    renderer, inside = axis.figure.canvas.get_renderer(), axis.get_window_extent()
    spots, ends = axis.transData.transform(points), axis.transData.transform(bars).reshape(-1, 2, 2)
    zero = axis.transData.transform((points[0][0], 0))[1]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]
    if axis.get_legend():
        taken.append(axis.get_legend().get_window_extent(renderer))
    lines = [Bbox([low - 2, high + 2]) for low, high in ends]  # where a label must lie on something, then on these
    lines.append(Bbox([(inside.x0, zero - 1), (inside.x1, zero + 1)]))
    line = {"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    pixels = axis.figure.dpi / 72  # per point, in which offsets are given
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

        best = min(offsets, key=clashes)  # the first of equals, so the nearest
        note.set(ha="left" if best[0] > 0 else "right", position=best)
        taken.append(box_at(best))


def deltas(rows: list[dict], title: str) -> Figure:
    """Bars of relative perplexity change with intervals. rows: label, group, ppl_delta, ppl_delta_interval."""
    figure, axis = new_figure(figsize=(8, 0.27 * len(rows) + 1.4))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for y, row in enumerate(rows):
        value = 100 * row["ppl_delta"]
        low, high = (100 * edge for edge in row["ppl_delta_interval"])
        axis.barh(y, value, color=colormaps["tab10"](groups.index(row["group"]) % 10), height=0.7)
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
    figure, axis = new_figure(figsize=(7, 4))
    for label, values in milliseconds.items():
        axis.plot(tokens, values, marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel="tokens held", ylabel="ms to append one token, all layers")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


STEP_COLORS = {"compress": "tab:red", "expand": "tab:orange", "copies": "tab:olive", "attention": "tab:blue"}
STEP_COLORS |= {"rest": "lightgray"}


def profiles(rows: list[dict], title: str) -> Figure:
    """Throughput and cache size over context length, and where a decode step's time goes; a line of panels per batch.

    rows: as `timing.measure_cell` gives them. Caches that ran out of memory have no point and no bar.
    """
    rows = [row for row in rows if not row.get("out_of_memory")]
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    bars = max((sum(row["batch_size"] == batch for row in rows) for batch in batches), default=1)
    height = max(3.2, 0.24 * bars + 1.2)
    figure, grid = new_figure(
        max(len(batches), 1), 3, figsize=(15, height * max(len(batches), 1) + 0.6), squeeze=False,
        gridspec_kw={"width_ratios": [1, 1, 1.3]},
    )  # fmt: skip
    for axes, batch in zip(grid, batches, strict=False):
        cells = [row for row in rows if row["batch_size"] == batch]
        for index, cache in enumerate(caches):
            own = sorted((row for row in cells if row["cache"] == cache), key=lambda row: row["context_tokens"])
            _profile_lines(axes[:2], own, cache, colormaps["tab10"](index % 10))
        _step_bars(axes[2], cells)
        contexts = sorted({row["context_tokens"] for row in cells})
        for axis, label in zip(axes[:2], ("tokens per second, whole batch", "MiB of cache, whole batch"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_xticks(contexts, [f"{n:,}" for n in contexts])
            axis.set_xlim(contexts[0] / 1.2, contexts[-1] * 1.2)
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
            axis.set(title=f"batch {batch}", xlabel="context, tokens", ylabel=label)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[2].set_title(f"batch {batch}: where a decode step's time goes")
    for axis, side in ((grid[0][0], "left"), (grid[0][2], "right")):
        handles, labels = axis.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc=f"outside lower {side}", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def _profile_lines(axes, rows: list[dict], label: str, color) -> None:
    contexts = [row["context_tokens"] for row in rows]
    speed = np.array([row["tokens_per_s_median"] for row in rows])
    low, high = np.array([row["tokens_per_s_quartiles"] for row in rows]).reshape(-1, 2).T
    style = {"marker": "o", "markersize": 4, "label": label, "color": color}
    axes[0].errorbar(contexts, speed, [speed - low, high - speed], capsize=3, **style)
    axes[1].plot(contexts, [row["cache_bytes"] / 2**20 for row in rows], **style)


def _step_bars(axis, rows: list[dict]) -> None:
    """A stacked bar per context and cache, the caches of a context together."""
    rows = sorted(rows, key=lambda row: row["context_tokens"])
    contexts = list(dict.fromkeys(row["context_tokens"] for row in rows))
    places = [index + 0.6 * contexts.index(row["context_tokens"]) for index, row in enumerate(rows)]
    left = np.zeros(len(rows))
    for part, color in STEP_COLORS.items():
        widths = np.array([100 * row["share_of_step"].get(part, 0) for row in rows])
        axis.barh(places, widths, left=left, color=color, label=part, height=0.75)
        left += widths
    for y, row in zip(places, rows, strict=True):
        ms = row["token_ms_median"]
        axis.annotate(f" {ms:,.0f} ms" if ms >= 100 else f" {ms:.3g} ms", (100, y), va="center", fontsize=7)
    names = [row["cache"] if len(row["cache"]) <= 28 else "…" + row["cache"][-27:] for row in rows]
    labels = [f"{name}, {row['context_tokens']:,}" for name, row in zip(names, rows, strict=True)]
    axis.set_yticks(places, labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel("share of an instrumented step, % (at the end: ms of one that isn't)")


def layer_losses(rows: list[dict], title: str) -> Figure:
    """KL divergence when one layer alone is compressed: a line per setting over the layers, a panel per side.

    rows: as `sensitivity.ablate` gives them.
    """
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
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("KL from the uncompressed model, nats")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    return figure


def stability(rows: list[dict], metrics: dict[str, str], title: str) -> Figure:
    """A panel per metric: every run as a dot in its factor's column, and the mean of all runs as a line.

    rows: as `stability.measure` gives them; metrics: record key to label.
    """
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    across = min(3, len(metrics))
    down = -(-len(metrics) // across)
    figure, axes = new_figure(down, across, figsize=(4.2 * across, 3 * down), squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, (metric, label) in zip(axes.flat, metrics.items(), strict=False):
        shown = [row for row in rows if row[metric] is not None]
        values = [row[metric] for row in shown]
        places = [factors.index(row["factor"]) for row in shown]
        axis.scatter(places, values, color=[colormaps["tab10"](place) for place in places], s=28, zorder=3)
        if values:
            axis.axhline(np.mean(values), color="tab:gray", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(factors)), factors, fontsize=8)
        axis.set_xlim(-0.5, len(factors) - 0.5)
        axis.margins(y=0.2)
        if values and np.ptp(values) < 1e-12:  # all the same: no axis of millionths of nothing
            axis.set_ylim(values[0] - 0.05, values[0] + 0.05)
        axis.set_title(label, fontsize=10)
        if metric == "ppl_delta":
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{title}\n(dots: runs; dashed: mean of all)", fontsize=11)
    return figure


def needles(cells: list[dict], title: str) -> Figure:
    """Heat maps over context length and depth, a row per cache: the baseline's exact match, its own, and the change of
    the answer's log-probability. cells: as `evaluation.needle.cells` makes them."""
    reference = next(cell["cache"] for cell in cells if "verdict" not in cell)
    names = list(dict.fromkeys(cell["cache"] for cell in cells if "verdict" in cell))
    lengths, depths = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("context_tokens", "depth"))
    size = (3 * max(1.5 + 0.85 * len(lengths), 3.2), (1.1 + max(0.45 * len(depths), 1)) * len(names) + 0.6)
    figure, axes = new_figure(len(names), 3, figsize=size, squeeze=False)
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


def _heat_map(axis, grid: list[list[dict]], key: str, form: str, **colors):
    """One panel, every cell's figure in it; a cell whose baseline fails says so and is struck out."""
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
