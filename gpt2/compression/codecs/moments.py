"""What bases are fitted to: running moments of K and V, merged batch by batch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.common.processes import Processes
from gpt2.compression.codecs.transform import Transform
from gpt2.models.geometry import Geometry, Shape


@dataclass(frozen=True)
class Seen:
    """What a pass over a text has of one layer in one segment, without the attention sinks.

    Keys, values and their gradients [1, H, T, d]; queries [1, Hq, T, d], those of one KV head side by side. The forward
    pass has no gradients, and no queries where a model's attention can't be watched or doesn't read keys as they are
    cached; the backward pass has no queries.
    segment: its number among all of the text.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None = None
    key_gradients: Tensor | None = None
    value_gradients: Tensor | None = None
    segment: int = 0


@dataclass
class Moments:
    """Running count, mean and centred scatter Σ(x−mean)(x−mean)ᵀ of K or of V in each layer, in float64 on the CPU.

    count [L]; mean and scatter: for every layer [H, d] and [H, d, d], in its own shape, None where it has no K and V.
    metrics: what squared error weighs, by name, for every layer [H, d, d], or None where nothing tells.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983): unlike Σx and Σxxᵀ it keeps its
    precision for keys whose bias is hundreds of times their spread, and two passes merge the same way.
    """

    count: Tensor
    mean: Sequence[Tensor | None]
    scatter: Sequence[Tensor | None]
    metrics: dict[str, Sequence[Tensor | None]] = field(default_factory=dict)

    @classmethod
    def zeros(cls, geometry: Geometry, side: str = "k") -> Moments:
        """Of no vectors yet, in the shapes of each layer's K or V, `side` "k" or "v"."""
        mean = _zeros(geometry, side, lambda shape: (shape.heads, shape.width))
        return cls(torch.zeros(geometry.num_layers, dtype=torch.float64), mean, _squares(geometry, side))

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
        own, self.count = self.count, processes.total(self.count)
        for layer in (layer for layer, mean in enumerate(self.mean) if mean is not None):
            mean = processes.total(own[layer] * self.mean[layer]) / self.count[layer].clamp_min(1)
            shift = self.mean[layer] - mean
            scatter = self.scatter[layer] + own[layer] * shift[..., None] * shift[..., None, :]
            self.mean[layer], self.scatter[layer] = mean, processes.total(scatter)

    def covariance(self, layer: int) -> Tensor:
        """Centred covariance of every KV head, [H, d, d] float64."""
        return self.scatter[layer] / self.count[layer].clamp_min(1)

    def through(self, transform: Transform, layer: int) -> Moments:
        """Moments of one layer in a transform's coordinates, as those of a model that has this layer alone."""
        E = transform.E.to(self.scatter[layer].dtype)
        mean = ((self.mean[layer] - transform.mean)[:, None] @ E)[:, 0]
        D = transform.D.to(E.dtype)  # the model feels an error of coordinates as what the decoder makes of it
        metrics = {
            name: [D @ metric[layer] @ D.mT] for name, metric in self.metrics.items() if metric[layer] is not None
        }
        return Moments(self.count[layer : layer + 1], [mean], [E.mT @ self.scatter[layer] @ E], metrics)


@dataclass
class SecondMoments:
    """Σ wwᵀ of vectors w in each layer, [H, d, d] float64 or None as in `Moments`, and how many there were, [L]."""

    total: list[Tensor | None]
    count: Tensor
    updated: set[int] = field(default_factory=set)  # layers that got vectors, the same ones in all processes

    @classmethod
    def zeros(cls, geometry: Geometry, side: str = "k") -> SecondMoments:
        return cls(_squares(geometry, side), torch.zeros(geometry.num_layers, dtype=torch.float64))

    def update(self, layer: int, w: Tensor) -> None:
        """Add the vectors w [H, n, d] of one layer. Raises PluginError where one is NaN or infinite."""
        products = (w.mT @ w).double().cpu()
        check_finite(products, layer)
        self.total[layer] += products
        self.count[layer] += w.shape[1]
        self.updated.add(layer)

    def mean(self, processes: Processes) -> list[Tensor | None]:
        """Over the vectors of all processes, for every layer [H, d, d], None for those that got no vectors."""
        count = processes.total(self.count).clamp_min(1)
        return [
            processes.total(total) / count[layer] if layer in self.updated else None
            for layer, total in enumerate(self.total)
        ]


def _squares(geometry: Geometry, side: str) -> list[Tensor | None]:
    return _zeros(geometry, side, lambda shape: (shape.heads, shape.width, shape.width))


def _zeros(geometry: Geometry, side: str, sizes: Callable[[Shape], tuple[int, ...]]) -> list[Tensor | None]:
    """Zeros for every layer of the `sizes` that follow from its K or V, None where it has neither."""
    shapes = (layer.side(side) for layer in geometry.layers)
    return [None if shape is None else torch.zeros(sizes(shape), dtype=torch.float64) for shape in shapes]


def check_finite(products: Tensor, layer: int) -> None:
    """Raise PluginError where sums of a layer's vectors, or of their gradients, aren't numbers."""
    if not torch.isfinite(products).all():
        raise PluginError(
            f"layer {layer}: NaN or infinite activations, nothing was written. Try --dtype float32 or bfloat16, "
            "and check that the weights load"
        )
