"""Bases in which squared error is what the model feels: PCA in a metric, eigenvectors of M^½ C M^½.

attention  M of K is E[qqᵀ] over the queries that read the head, so that (q·(k−k̂))² is least; M of V is Σ W_oᵀW_o over
           the query heads that share it, so that the error of the layer's output is least.
fisher     M is E[ggᵀ], the gradient of the loss with respect to K or V with labels that the model itself draws: half of
           the squared error is the change of the loss, in nats, to second order. K, V and all layers in one currency.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.base import Basis
from gpt2.compression.codecs.moments import Moments, Seen
from gpt2.compression.codecs.transform import Transform
from gpt2.models.geometry import Geometry

SMALLEST_WEIGHT = 1e-6  # of the largest: directions that nothing reads still need a finite way back
LARGEST_FACTOR = 2.0**8  # between coordinates and channels, and its inverse, for which quantizers have steps to spare
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # what models call an attention's output projection


class MetricBasis(Basis):
    """PCA in a metric of its own. A subclass has a name, and says what its metric is gathered from.

    Its metric has its name in calibrations, and is what `--metric` of the calibration script takes.
    """

    def fit(self, moments: Moments, layer: int) -> tuple[Transform, Tensor]:
        metric = within_reach(self.metric_of(moments, layer))
        return fit_in_metric(moments.mean[layer], moments.covariance(layer), metric)

    def metric_of(self, moments: Moments, layer: int) -> Tensor:
        """Its metric of one layer, [H, d, d]. Raises PluginError for statistics that lack it."""
        if self.metric not in moments.metrics:
            raise PluginError(
                f"codec {self.name} needs statistics that this calibration doesn't have: calibrate with "
                f"--metric {self.metric}, on a model whose attention can be read"
            )
        return moments.metrics[self.metric][layer]


class Attention(MetricBasis):
    """Query-aware K, output-aware V."""

    name = metric = "attention"

    def metric_vectors(self, seen: Seen) -> dict[str, Tensor]:
        if seen.queries is None:
            return {}
        q = seen.queries.transpose(0, 1).float()
        return {"k": q.reshape(seen.keys.shape[1], -1, q.shape[-1])}  # [H, Hq/H · T, d]

    def metric_from_weights(self, model: torch.nn.Module, geometry: Geometry) -> dict[str, Tensor]:
        weights = output_metric(model, geometry)
        return {} if weights is None else {"v": weights}


class Fisher(MetricBasis):
    """Squared error is loss (the Fisher information of K and V)."""

    name = metric = "fisher"
    gradients = True

    def metric_vectors(self, seen: Seen) -> dict[str, Tensor]:
        return {"k": seen.key_gradients[0], "v": seen.value_gradients[0]}


def fit_in_metric(mean: Tensor, covariance: Tensor, metric: Tensor) -> tuple[Transform, Tensor]:
    """Transform whose coordinates' squared error is the error's M-norm, largest weighted variance first; float64.

    mean [G, w], covariance and metric [G, w, w]. Returns E [G, w, w] = M^½ U, D = Uᵀ M^-½ and the variances [G, w].
    """
    weights, axes = torch.linalg.eigh(metric.double())
    largest = weights.amax(-1, keepdim=True)
    # Where nothing at all was felt every direction counts the same
    weights = torch.where(largest > 0, weights.maximum(SMALLEST_WEIGHT * largest), torch.ones_like(weights))
    root = axes * weights.sqrt()[..., None, :] @ axes.mT
    inverse_root = axes * weights.rsqrt()[..., None, :] @ axes.mT
    variances, vectors = torch.linalg.eigh(root @ covariance.double() @ root)  # ascending
    U = vectors.flip(-1)
    return Transform(root @ U, U.mT @ inverse_root, mean.double()), variances.flip(-1).clamp_min(0)


def within_reach(metric: Tensor) -> Tensor:
    """A metric [G, w, w], scaled by a power of four where its coordinates would be far larger or smaller than channels.

    Gradients may be 1e-8 in every token, and no quantizer has steps that small. Each head has its own factor.
    """
    weight = metric.diagonal(dim1=-2, dim2=-1).mean(-1).double().sqrt()
    outside = (weight > 0) & ((weight < 1 / LARGEST_FACTOR) | (weight > LARGEST_FACTOR))
    unit = torch.where(outside, weight.log2().round().exp2(), torch.ones_like(weight))
    return metric / unit.square()[:, None, None]


def output_metric(model: torch.nn.Module, geometry: Geometry) -> Tensor | None:
    """Σ WᵀW of each KV head's part of the output projections, [L, H, d, d] float64; None where they aren't found.

    What an error of V weighs in the output of its layer, with all attention on one token.
    """
    L, H, d = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
    found = []
    for module in model.modules():
        projection = next((getattr(module, name) for name in OUTPUTS if hasattr(module, name)), None)
        if not hasattr(module, "layer_idx") or getattr(projection, "weight", None) is None:
            continue
        w = projection.weight.detach()
        w = w.T if type(projection).__name__ == "Conv1D" else w  # [hidden, query heads · d]
        if w.shape[1] % (H * d):
            return None
        w = w.double().cpu().T.reshape(H, -1, d, w.shape[0])  # [H, heads that share it, d, hidden]
        found.append((w @ w.mT).sum(1))
    return torch.stack(found) if len(found) == L else None
