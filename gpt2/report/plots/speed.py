"""Figures of time and memory: appending, attention, whole decode steps, bytes by context length."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2.common import machine
from gpt2.report.plots.figure import bar_lengths, color_of, context_axis, new_figure

LINE_STYLES = {"16-bit": "--", "float32": ":", "compressed": "-", "torch.compile": "-."}
STEP_COLORS = {"compress": "tab:red", "expand": "tab:orange", "copies": "tab:olive", "folding": "tab:purple"}
STEP_COLORS |= {"kernels": "tab:cyan", "attention": "tab:blue", "matmuls": "tab:green", "sampling": "tab:pink"}
STEP_COLORS |= {"rest": "lightgray"}


def append_times(tokens: list[int], milliseconds: dict[str, list[float]], title: str) -> Figure:
    """Time to append one token against the tokens held, a line per codec."""
    figure, axis = new_figure(figsize=(7, 4))
    for label, values in milliseconds.items():
        axis.plot(tokens, values, marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel="tokens held", ylabel="ms to append one token, all layers")
    axis.legend()
    return figure


def attention_times(record: dict) -> Figure:
    """Time of a decode step's attention over context length, a line per row, with quartiles.

    record: as scripts/benchmarks/attention.py writes it.
    """
    figure, axis = new_figure(figsize=(8.5, 5))
    for index, (label, kind) in enumerate(dict.fromkeys((row["row"], row["kind"]) for row in record["rows"])):
        own = sorted((row for row in record["rows"] if row["row"] == label), key=lambda row: row["context_tokens"])
        y = np.array([row["ms_median"] for row in own])
        bars = bar_lengths(y, [row["ms_quartiles"] for row in own])
        axis.errorbar(
            [row["context_tokens"] for row in own], y, bars, label=label, marker="o", markersize=4,
            capsize=3, linestyle=LINE_STYLES[kind], color=colormaps["tab20"](index % 20),
        )  # fmt: skip
    context_axis(axis, sorted({row["context_tokens"] for row in record["rows"]}))
    axis.set_yscale("log")
    axis.minorticks_off()
    args = record["args"]
    axis.set_ylabel("ms of attention, one layer, one token per sequence")
    axis.set_title(
        f"{args['heads']} query heads, {args['kv_heads']} KV heads of {args['head_dim']}, batch {args['batch_size']}\n"
        f"{machine.short(record)}\nmedians of {args['repeats']} with quartiles", fontsize=10,
    )  # fmt: skip
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def profiles(rows: list[dict], title: str) -> Figure:
    """Throughput and cache size over context length, and where a decode step's time goes; a row of panels per batch.

    rows: as `evaluation.timing.measure_cell` gives them; those that ran out of memory are left out.
    """
    rows = [row for row in rows if not row.get("out_of_memory")]
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    bars = max((sum(row["batch_size"] == batch for row in rows) for batch in batches), default=1)
    height = max(3.2, 0.24 * bars + 1.2)
    figure, grid = new_figure(
        max(len(batches), 1), 3, figsize=(15, height * max(len(batches), 1) + 0.6), grid="", squeeze=False,
        gridspec_kw={"width_ratios": [1, 1, 1.3]},
    )  # fmt: skip
    for axes, batch in zip(grid, batches, strict=False):
        cells = [row for row in rows if row["batch_size"] == batch]
        for index, cache in enumerate(caches):
            own = sorted((row for row in cells if row["cache"] == cache), key=lambda row: row["context_tokens"])
            _profile_lines(axes[:2], own, cache, color_of(index))
        _step_bars(axes[2], cells)
        contexts = sorted({row["context_tokens"] for row in cells})
        for axis, label in zip(axes[:2], ("tokens per second, whole batch", "MiB of cache, whole batch"), strict=True):
            context_axis(axis, contexts)
            axis.set_xlim(contexts[0] / 1.2, contexts[-1] * 1.2)
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
            axis.set(title=f"batch {batch}", ylabel=label)
            axis.grid(alpha=0.3)
        axes[2].set_title(f"batch {batch}: where a decode step's time goes")
    for axis, side in ((grid[0][0], "left"), (grid[0][2], "right")):
        handles, labels = axis.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc=f"outside lower {side}", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def _profile_lines(axes: list[Axes], rows: list[dict], label: str, color) -> None:
    contexts = [row["context_tokens"] for row in rows]
    speed = np.array([row["tokens_per_s_median"] for row in rows])
    bars = bar_lengths(speed, [row["tokens_per_s_quartiles"] for row in rows])
    style = {"marker": "o", "markersize": 4, "label": label, "color": color}
    axes[0].errorbar(contexts, speed, bars, capsize=3, **style)
    axes[1].plot(contexts, [row["cache_bytes"] / 2**20 for row in rows], **style)


def _step_bars(axis: Axes, rows: list[dict]) -> None:
    """A stacked bar per context length and cache, the caches of a context length together."""
    rows = sorted(rows, key=lambda row: row["context_tokens"])
    contexts = list(dict.fromkeys(row["context_tokens"] for row in rows))
    places = [index + 0.6 * contexts.index(row["context_tokens"]) for index, row in enumerate(rows)]
    left = np.zeros(len(rows))
    for part, color in STEP_COLORS.items():
        widths = np.array([100 * row["share_of_step"].get(part, 0) for row in rows])
        measured = any(part in row["share_of_step"] for row in rows)  # older results have fewer parts
        axis.barh(places, widths, left=left, color=color, label=part if measured else "_", height=0.75)
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


def ratios_by_context(rows: list[dict], title: str) -> Figure:
    """Whole-cache compression against context length, a line per cache.

    Dashed lines count a calibrated basis as well; dotted ones, in models that cache more than K and V, are of K and V
    alone. A basis of less than a tenth of the shortest cache isn't drawn.
    rows: as scripts/benchmarks/cache_bytes.py writes them.
    """
    figure, axis = new_figure(figsize=(8, 4.5))
    others, basis = any(row["uncompressed_bytes"] for row in rows), False
    for index, cache in enumerate(dict.fromkeys(row["cache"] for row in rows)):
        own, color = [row for row in rows if row["cache"] == cache], color_of(index)
        tokens = [row["context_tokens"] for row in own]
        axis.plot(tokens, [row["compression_ratio"] for row in own], marker="o", color=color, label=cache)
        if own[0]["codec_bytes"] > own[0]["bytes"] / 10:
            basis = True
            axis.plot(tokens, [row["ratio_with_codec"] for row in own], linestyle="--", color=color)
        if others:
            axis.plot(tokens, [row["attention_ratio"] for row in own], linestyle=":", color=color)
    if basis:
        axis.plot([], [], linestyle="--", color="black", label="with the basis, one conversation")
    if others:
        axis.plot([], [], linestyle=":", color="black", label="K and V alone, without states")
    contexts = sorted({row["context_tokens"] for row in rows})
    apart = [n for n, before in zip(contexts, [0, *contexts], strict=False) if n > 1.4 * before]
    context_axis(axis, apart)  # ticks of lengths that are close would overlap
    axis.set(title=title, xlabel="tokens held", ylabel="bytes of a 16-bit cache / bytes held")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
