"""A calibration fitted to noise, for models without weights."""

from __future__ import annotations

import torch

from gpt2.compression.calibration import bit_allocation
from gpt2.compression.calibration.fit import Calibration, fit
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.codecs.moments import Moments
from gpt2.models.loading import LoadedModel


def stand_in(loaded: LoadedModel) -> Calibration:
    """A calibration fitted to noise, for a model without weights: the cost of a basis doesn't depend on its values."""
    geometry = loaded.geometry
    moments = [Moments.zeros(geometry) for _ in SIDES]
    generator = torch.Generator().manual_seed(0)
    for side in moments:
        for layer in range(geometry.num_layers):
            side.update(layer, torch.randn(1, geometry.num_kv_heads, 64, geometry.head_dim, generator=generator))
    meta = {"model": loaded.spec, "codec": "pca", "rank": geometry.head_dim, "num_layers": geometry.num_layers}
    meta |= {"num_kv_heads": geometry.num_kv_heads, "head_dim": geometry.head_dim}
    bases = {side: fit("pca", own) for side, own in zip(SIDES, moments, strict=True)}
    fitted = {name: bit_allocation.stand_in(basis, geometry) for name, basis in multi_head_bases().items()}
    return Calibration(meta, Statistics(*moments), bases, fitted)
