"""What bases are fitted to: running moments of K and V, merged batch by batch in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.common.processes import Processes
from gpt2.compression.codecs.transform import Transform
from gpt2.models.geometry import Geometry


@dataclass(frozen=True)
class Seen:
    """What a pass over a text has of one layer in one window, without the attention sinks.

    Keys, values and their gradients [1, H, T, d]; queries [1, Hq, T, d], those of one KV head side by side. The forward
    pass has no gradients, and no queries where a model's attention can't be watched; the backward pass has no queries.
    window: its number among all of the text.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None = None
    key_gradients: Tensor | None = None
    value_gradients: Tensor | None = None
    window: int = 0


@dataclass
class Moments:
    """Running count, mean [L, H, d] and centred scatter Σ(x−mean)(x−mean)ᵀ [L, H, d, d], in float64 on the CPU.

    metrics: what squared error weighs, by name, [L, H, d, d] each.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983): unlike Σx and Σxxᵀ it keeps its
    precision for keys whose bias is hundreds of times their spread, and two passes merge the same way.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
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
        check_finite(scatter, layer)
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

    def through(self, transform: Transform, layer: int) -> Moments:
        """Moments of one layer in a transform's coordinates, as those of a model that has this layer alone."""
        E = transform.E.to(self.scatter.dtype)
        mean = ((self.mean[layer] - transform.mean)[:, None] @ E)[:, 0]
        D = transform.D.to(E.dtype)  # the model feels an error of coordinates as what the decoder makes of it
        metrics = {name: (D @ metric[layer] @ D.mT)[None] for name, metric in self.metrics.items()}
        return Moments(self.count[layer : layer + 1], mean[None], (E.mT @ self.scatter[layer] @ E)[None], metrics)


@dataclass
class SecondMoments:
    """Σ wwᵀ of vectors w, [L, H, d, d] float64, and how many there were in each layer, [L]."""

    total: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, geometry: Geometry) -> SecondMoments:
        L, H, d = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
        return cls(torch.zeros(L, H, d, d, dtype=torch.float64), torch.zeros(L, dtype=torch.float64))

    def update(self, layer: int, w: Tensor) -> None:
        """Add the vectors w [H, n, d] of one layer. Raises PluginError where one is NaN or infinite."""
        products = (w.mT @ w).double().cpu()
        check_finite(products, layer)
        self.total[layer] += products
        self.count[layer] += w.shape[1]

    def mean(self, processes: Processes) -> Tensor:
        """Over the vectors of all processes, [L, H, d, d]."""
        return processes.total(self.total) / processes.total(self.count)[:, None, None, None].clamp_min(1)


def check_finite(products: Tensor, layer: int) -> None:
    """Raise PluginError where sums of a layer's vectors, or of their gradients, aren't numbers."""
    if not torch.isfinite(products).all():
        raise PluginError(
            f"layer {layer}: NaN or infinite activations, nothing was written. Try --dtype float32 or bfloat16, "
            "and check that the weights load"
        )
