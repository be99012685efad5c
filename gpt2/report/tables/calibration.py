"""Table of what a calibration found, layer by layer."""

from __future__ import annotations

from torch import Tensor

from gpt2.report.table import Table


def kept_variance(kept: dict[str, list[Tensor | None]], rank: int) -> Table:
    """Share of the variance that the first `rank` coordinates keep, for each side of each layer that has K and V.

    kept: side to cumulative shares, [H, d] per layer, as `Calibration.kept_variance` gives them. A rank is cut to what
    a layer has.
    """
    lines, widths = [], set()
    for layer, sides in enumerate(zip(*kept.values(), strict=True)):
        if any(share is None for share in sides):
            continue
        cells = [str(layer)]
        for share in sides:
            widths.add(share.shape[-1])
            at_rank, for_99 = share[:, min(rank, share.shape[-1]) - 1], int((share < 0.99).sum(-1).max()) + 1
            cells += [f"{at_rank.mean():.2%}", f"{at_rank.min():.2%}", str(for_99)]
        lines.append(cells)
    columns = [f"{side.upper()} {figure}" for side in kept for figure in ("mean", "worst", "r99")]
    width = " or ".join(map(str, sorted(widths)))
    note = (
        f"Share of variance kept at rank {rank} of {width}, mean and worst over heads; r99: the rank that keeps 99 %."
    )
    return Table(["layer", *columns], lines, note)
