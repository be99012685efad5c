"""The figure of one conversation through several caches."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gpt2.report.plots.figure import RATIO, bar_lengths, color_of, new_figure, spread_labels
from gpt2.report.tables.side_by_side import FEWEST_TOKENS


def side_by_side(record: dict) -> Figure:
    """Bytes of cache and basis, a bar each; beside it, what each compression ratio costs in perplexity.

    record: as scripts/generate_with_preset.py writes it.
    """
    rows = record["rows"]
    figure, (sizes, losses) = new_figure(1, 2, figsize=(12, 4.2))
    for y, row in enumerate(rows):
        held, basis = row["bytes"] / 2**20, row["codec_bytes"] / 2**20
        sizes.barh(y, held, color=color_of(y), height=0.6)
        sizes.barh(y, basis, left=held, color="none", edgecolor=color_of(y), hatch="///", height=0.6)
        sizes.annotate(f" {held:.1f}" + f" + {basis:.1f}" * bool(basis), (held + basis, y), va="center", fontsize=8)
    sizes.bar(0, 0, color="none", edgecolor="gray", hatch="///", label="basis, once for all conversations")
    sizes.set_yticks(range(len(rows)), [row["cache"] for row in rows])
    sizes.invert_yaxis()
    sizes.set_xlim(0, 1.2 * max(row["bytes"] + row["codec_bytes"] for row in rows) / 2**20)
    sizes.set(title=f"{rows[0]['context_tokens']:,} tokens in 16 bits", xlabel="MiB")
    sizes.legend(loc="lower right", fontsize=8)

    figure.suptitle(f"{record['model']}, {record['dtype']} on {record['device']}")
    if rows[0]["tokens"] < FEWEST_TOKENS:  # as in the table
        losses.set_axis_off()
        few = f"{rows[0]['tokens']:,} tokens of the document are too few\n"
        few += f"for a change of perplexity: it takes {FEWEST_TOKENS}"
        losses.text(0.5, 0.5, few, ha="center", va="center", transform=losses.transAxes)
        return figure
    ratios, changes = [row["compression_ratio"] for row in rows], np.array([100 * row["ppl_delta"] for row in rows])
    bounds = 100 * np.array([row["ppl_delta_interval"] for row in rows])
    for i, bar in enumerate(np.array(bar_lengths(changes, bounds)).T):
        losses.errorbar(ratios[i], changes[i], bar[:, None], marker="o", capsize=3, color=color_of(i))
    losses.axhline(0, color="gray", linewidth=0.8)
    losses.margins(x=0.2, y=0.2)
    losses.set(
        title=f"{rows[0]['tokens']:,} tokens of the document, 95 % intervals",
        xlabel=RATIO,
        ylabel="change of perplexity, %",
    )
    ends = [(x, y) for x, pair in zip(ratios, bounds, strict=True) for y in pair]
    spread_labels(losses, [row["cache"] for row in rows], list(zip(ratios, changes, strict=True)), ends)
    return figure
