"""The figure of a calibration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from gpt2.report.plots.figure import new_figure


def spectra(variance: dict[str, Sequence[np.ndarray | None]], rank: int, title: str) -> Figure:
    """Share of the variance that each rank loses (1 − what it keeps), a line per layer, mean over KV heads.

    variance: side to [H, d] per layer, cumulative share of the variance; None for layers without K and V.
    """
    figure, axes = new_figure(1, len(variance), figsize=(5.5 * len(variance), 4), sharey=True, squeeze=False)
    for axis, (side, kept) in zip(axes[0], variance.items(), strict=True):
        for layer, share in enumerate(kept):
            if share is None:
                continue
            lost = np.clip(1 - share.mean(0), 1e-5, None)  # [d]
            color = colormaps["viridis"](layer / max(len(kept) - 1, 1))
            axis.semilogy(np.arange(1, len(lost)), lost[:-1], color=color, linewidth=0.9)
        axis.axvline(rank, color="tab:red", linestyle="--", label=f"rank {rank}")
        axis.set(title=f"{side.upper()} cache", xlabel="coordinates kept")
        axis.legend(loc="lower left")
    axes[0][0].set_ylabel("share of variance lost")
    colors = ScalarMappable(Normalize(0, len(kept) - 1), "viridis")
    figure.colorbar(colors, ax=axes, label="layer", fraction=0.05)
    figure.suptitle(title)
    return figure
