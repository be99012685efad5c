"""A calibration fitted to noise, for models without weights: the cost of a basis doesn't depend on its values."""

from __future__ import annotations

import torch

from gpt2.compression.calibration.bit_allocation import BitAllocation
from gpt2.compression.calibration.fit import Calibration, fit
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import MultiHead, multi_head_bases
from gpt2.compression.codecs.base import SIDES, UNWEIGHTED
from gpt2.compression.codecs.formats import WIDTHS
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.rope import Rotary
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel


def stand_in(loaded: LoadedModel) -> Calibration:
    """A calibration of every registered basis that takes no metric, or is shared by heads."""
    geometry = loaded.geometry
    moments = [Moments.zeros(geometry) for _ in SIDES]
    generator = torch.Generator().manual_seed(0)
    for side in moments:
        for layer in range(geometry.num_layers):
            side.update(layer, torch.randn(1, geometry.num_kv_heads, 64, geometry.head_dim, generator=generator))
    meta = {"model": loaded.spec, "codec": UNWEIGHTED, "rank": geometry.head_dim, "num_layers": geometry.num_layers}
    meta |= {"num_kv_heads": geometry.num_kv_heads, "head_dim": geometry.head_dim}
    bases = {side: fit(UNWEIGHTED, own) for side, own in zip(SIDES, moments, strict=True)}
    fitted = {name: multi_head_stand_in(basis, geometry) for name, basis in multi_head_bases().items()}
    return Calibration(meta, Statistics(*moments), bases, fitted)


def multi_head_stand_in(basis: MultiHead, geometry: Geometry) -> MultiHeadFit:
    """A basis that heads share, the same random rotation in all layers, with errors that fall along its channels."""
    shape, d = basis.shape(geometry), geometry.head_dim
    N, G, w = shape.num_layers, shape.num_kv_heads, shape.head_dim
    E = torch.linalg.qr(torch.randn(w, w, generator=torch.Generator().manual_seed(0))).Q
    rotary = Rotary(10_000 ** -(torch.arange(0, d // 2 * 2, 2) / d))
    error = torch.logspace(0, -4, w)[:, None] * 0.25 ** torch.tensor(WIDTHS)
    one = BitAllocation.measured([error[None, None]])
    allocation = BitAllocation(error.expand(N, G, w, -1), one.prices, one.demand.expand(-1, N))
    return MultiHeadFit(
        basis, torch.zeros(N, G, w), E.expand(N, G, w, w), torch.ones(N, G, w),
        [rotary] * geometry.num_layers if basis.unrotated else [], allocation,
    )  # fmt: skip
