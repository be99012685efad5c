"""Figures of attention over what a cache stores. As gpt2/plots.py: from results records, no window is ever opened."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from gpt2.report.plots import new_figure

STYLES = {"16-bit": "--", "float32": ":", "compressed": "-", "torch.compile": "-."}


def steps(record: dict) -> Figure:
    """Time of a decode step's attention over context, a line per row, with quartiles.

    record: as scripts/benchmarks/attention.py writes it.
    """
    figure, axis = new_figure(figsize=(8.5, 5))
    for index, (label, kind) in enumerate(dict.fromkeys((row["row"], row["kind"]) for row in record["rows"])):
        own = sorted((row for row in record["rows"] if row["row"] == label), key=lambda row: row["context_tokens"])
        y = np.array([row["ms_median"] for row in own])
        low, high = np.array([row["ms_quartiles"] for row in own]).T
        axis.errorbar(
            [row["context_tokens"] for row in own], y, [y - low, high - y], label=label, marker="o", markersize=4,
            capsize=3, linestyle=STYLES[kind], color=colormaps["tab20"](index % 20),
        )  # fmt: skip
    contexts = sorted({row["context_tokens"] for row in record["rows"]})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axis.minorticks_off()
    axis.set(title=title(record), xlabel="context, tokens", ylabel="ms of attention, one layer, one token per sequence")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def title(record: dict) -> str:
    args = record["args"]
    return (
        f"{args['heads']} query heads, {args['kv_heads']} KV heads of {args['head_dim']}, batch {args['batch_size']}\n"
        f"{record['device']}, medians of {args['repeats']} with quartiles"
    )
