"""The figure of the codec's ablation."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.figure import Figure

from gpt2.report.plots import new_figure


def explored(rows: list[dict], title: str) -> Figure:
    """KL of every row by question, a colour per bit width: dots, with a line where the product is.

    rows: as `evaluation.exploration.measure` gives them, with `question`.
    """
    questions = list(dict.fromkeys(row["question"] for row in rows))
    budgets = sorted({row["bits"] for row in rows}, reverse=True)
    lines = list(dict.fromkeys((row["question"], row["label"]) for row in rows))
    # A line's place from above, with room for a heading before each question
    places = {line: i + 1.2 * (questions.index(line[0]) + 1) for i, line in enumerate(lines)}
    figure, axis = new_figure(figsize=(10, 0.24 * (len(lines) + 1.2 * len(questions)) + 1.6))
    for index, bits in enumerate(budgets):
        own, color = [row for row in rows if row["bits"] == bits], colormaps["tab10"](index % 10)
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
    axis.set(title=title, xlabel="KL from the uncompressed model, nats (filled and lines: the product)")
    figure.legend(loc="outside lower center", ncols=len(budgets), fontsize=8, frameon=False)
    axis.grid(axis="x", alpha=0.3)
    return figure
