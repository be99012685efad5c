"""Table of what a calibration found, layer by layer."""

from __future__ import annotations

from torch import Tensor

from gpt2.report.table import Table


def energies(kept: dict[str, Tensor], rank: int) -> Table:
    """Share of the variance that the first `rank` coordinates keep, for each layer and side.

    kept: side to cumulative shares [L, H, d], as `Calibration.energies` gives them.
    """
    width = next(iter(kept.values())).shape[-1]
    lines = []
    for layer, sides in enumerate(zip(*kept.values(), strict=True)):  # [H, d] each
        cells = [str(layer)]
        for share in sides:
            at_rank, for_99 = share[:, rank - 1], int((share < 0.99).sum(-1).max()) + 1
            cells += [f"{at_rank.mean():.2%}", f"{at_rank.min():.2%}", str(for_99)]
        lines.append(cells)
    columns = [f"{side.upper()} {figure}" for side in kept for figure in ("mean", "worst", "r99")]
    note = f"Share of energy kept at rank {rank} of {width}, mean and worst over heads; r99: the rank that keeps 99 %."
    return Table(["layer", *columns], lines, note)
