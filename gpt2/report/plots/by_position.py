"""The figure of loss by position."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gpt2.report.plots.figure import KL, color_of, new_figure


def by_position(rows: list[dict], title: str) -> Figure:
    """KL and top-1 agreement against position, a line per cache; bands are intervals over segments.

    rows: as scripts/eval_by_position.py writes them.
    """
    figure, (losses, agreements) = new_figure(1, 2, figsize=(12, 4.2))
    for index, row in enumerate(rows):
        at = [cell["position"] for cell in row["bins"]]
        kl = np.array([cell["kl_nats"] for cell in row["bins"]])
        losses.plot(at, kl, marker=".", color=color_of(index), label=row["cache"])
        if all(cell["kl_nats_interval"] for cell in row["bins"]):
            low, high = np.array([cell["kl_nats_interval"] for cell in row["bins"]]).T
            losses.fill_between(at, low, high, color=color_of(index), alpha=0.15, linewidth=0)
        agreements.plot(at, [100 * cell["top1_agreement"] for cell in row["bins"]], marker=".", color=color_of(index))
    if any(cell["kl_nats"] > 0 for row in rows for cell in row["bins"]):
        losses.set_yscale("log")
    losses.set(xlabel="position, tokens", ylabel=KL)
    agreements.set(xlabel="position, tokens", ylabel="same most likely token, %")
    losses.legend(fontsize=8)
    figure.suptitle(title)
    return figure
