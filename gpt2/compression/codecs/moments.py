"""Running moments of K and V, merged batch by batch in float64: what bases are fitted to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.common.processes import Processes
from gpt2.models.geometry import Geometry


@dataclass
class Moments:
    """Running count, mean [L, H, d] and centred scatter Σ(x−mean)(x−mean)ᵀ [L, H, d, d], in float64 on the CPU.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983): unlike Σx and Σxxᵀ it keeps its
    precision for keys whose bias is hundreds of times their spread, and two passes merge the same way.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    # What squared error weighs, by name: [L, H, d, d] each
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, geometry: Geometry) -> Moments:
        L, H, d = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
        zeros = [torch.zeros(shape, dtype=torch.float64) for shape in ((L,), (L, H, d), (L, H, d, d))]
        return cls(*zeros)

    def update(self, layer: int, x: Tensor) -> None:
        """Add the vectors x [B, H, T, d] of one layer. Raises PluginError where one is NaN or infinite."""
        x = x.transpose(0, 1).flatten(1, 2).float()  # [H, B·T, d]
        n = x.shape[1]
        if not n:
            return
        mean = x.mean(1)
        centred = x - mean[:, None]
        scatter = (centred.mT @ centred).double().cpu()
        mean = mean.double().cpu()
        refuse_non_finite(scatter, layer)
        total = self.count[layer] + n
        shift = mean - self.mean[layer]
        self.scatter[layer] += scatter + shift[..., None] * shift[..., None, :] * (self.count[layer] * n / total)
        self.mean[layer] += shift * (n / total)
        self.count[layer] = total

    def add_up(self, processes: Processes) -> None:
        """Take in the vectors of all processes: scatters are summed about the mean of all, metrics are left alone."""
        if processes.size == 1:
            return
        own = self.count[:, None, None]
        count = processes.total(self.count)
        mean = processes.total(own * self.mean) / count[:, None, None].clamp_min(1)
        shift = self.mean - mean
        scatter = self.scatter + own[..., None] * shift[..., None] * shift[..., None, :]
        self.count, self.mean, self.scatter = count, mean, processes.total(scatter)

    def covariance(self, layer: int) -> Tensor:
        """Centred covariance of every KV head, [H, d, d] float64."""
        return self.scatter[layer] / self.count[layer].clamp_min(1)


def refuse_non_finite(products: Tensor, layer: int) -> None:
    """Raise PluginError where sums of a layer's vectors, or of their gradients, aren't numbers."""
    if not torch.isfinite(products).all():
        raise PluginError(
            f"layer {layer}: NaN or infinite activations, nothing was written. Try --dtype float32 or bfloat16, "
            "and check that the weights load"
        )
