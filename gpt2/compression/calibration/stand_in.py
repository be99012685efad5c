"""A calibration fitted to noise, for models without weights: the cost of a basis doesn't depend on its values."""

from __future__ import annotations

import torch

from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.fit import Calibration, fit, geometry_record
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import MultiHead, multi_head_bases
from gpt2.compression.codecs.base import SIDES, UNWEIGHTED
from gpt2.compression.codecs.formats import WIDTHS
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.rope import NONE, Rotary
from gpt2.models.geometry import Geometry, Shape
from gpt2.models.loading import LoadedModel


def stand_in(loaded: LoadedModel) -> Calibration:
    """A calibration of every registered basis that takes no metric, or is shared by heads."""
    geometry = loaded.geometry
    moments = {side: Moments.zeros(geometry, side) for side in SIDES}
    generator = torch.Generator().manual_seed(0)
    for side, own in moments.items():
        for layer in geometry.attention:
            shape = geometry.layers[layer].side(side)
            own.update(layer, torch.randn(1, shape.heads, 64, shape.width, generator=generator))
    widest = max(shape.width for _, _, shape in geometry.sides())
    meta = {"model": loaded.spec, "codec": UNWEIGHTED, "rank": widest, **geometry_record(geometry)}
    bases = {side: fit(UNWEIGHTED, own) for side, own in moments.items()}
    fitted = {
        name: multi_head_stand_in(basis, geometry)
        for name, basis in multi_head_bases().items()
        if not basis.misfit(geometry)
    }
    return Calibration(meta, Statistics(**moments), bases, fitted)


def multi_head_stand_in(basis: MultiHead, geometry: Geometry) -> MultiHeadFit:
    """A basis that heads share, the same random rotation in all layers, with errors that fall along its channels.

    Raises PluginError where a layer can't have such a basis.
    """
    shapes = [layer.k for layer in basis.shape(geometry).layers]
    widths = sorted({shape.width for shape in shapes if shape})
    rotations = {w: torch.linalg.qr(torch.randn(w, w, generator=torch.Generator().manual_seed(0))).Q for w in widths}
    error = {w: torch.logspace(0, -4, w)[:, None] * 0.25 ** torch.tensor(WIDTHS) for w in widths}
    each = BitAllocation.measured([error[w][None, None] for w in widths])
    columns = [
        each.demand[:, widths.index(shape.width)] if shape else torch.zeros(len(each.prices)) for shape in shapes
    ]
    errors = [shape and error[shape.width].expand(shape.heads, -1, -1) for shape in shapes]
    return MultiHeadFit(
        basis,
        mean=[shape and torch.zeros(shape.heads, shape.width) for shape in shapes],
        E=[shape and rotations[shape.width].expand(shape.heads, -1, -1) for shape in shapes],
        spectrum=[shape and torch.ones(shape.heads, shape.width) for shape in shapes],
        rotary=[_rotary(layer.k) for layer in geometry.layers] if basis.unrotated else [],
        allocation=BitAllocation(errors, each.prices, torch.stack(columns, dim=1)),
    )


def _rotary(k: Shape | None) -> Rotary:
    return Rotary(10_000 ** -(torch.arange(0, k.width // 2 * 2, 2) / k.width)) if k else NONE
