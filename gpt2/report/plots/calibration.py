"""The figure of a calibration."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from gpt2.report.plots.figure import new_figure


def spectra(energy: dict[str, np.ndarray], rank: int, title: str) -> Figure:
    """Share of the variance that each rank loses (1 − energy kept), a line per layer, mean over KV heads.

    energy: side to [L, H, d], cumulative share of the variance.
    """
    figure, axes = new_figure(1, len(energy), figsize=(5.5 * len(energy), 4), sharey=True, squeeze=False)
    for axis, (side, kept) in zip(axes[0], energy.items(), strict=True):
        lost = np.clip(1 - kept.mean(1), 1e-5, None)  # [L, d]
        ranks = np.arange(1, lost.shape[1] + 1)
        for layer, line in enumerate(lost):
            color = colormaps["viridis"](layer / max(len(lost) - 1, 1))
            axis.semilogy(ranks[:-1], line[:-1], color=color, linewidth=0.9)
        axis.axvline(rank, color="tab:red", linestyle="--", label=f"rank {rank}")
        axis.set(title=f"{side.upper()} cache", xlabel="coordinates kept")
        axis.legend(loc="lower left")
    axes[0][0].set_ylabel("share of variance lost")
    colors = ScalarMappable(Normalize(0, len(lost) - 1), "viridis")
    figure.colorbar(colors, ax=axes, label="layer", fraction=0.05)
    figure.suptitle(title)
    return figure
