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
from gpt2.models.geometry import Geometry, Shape

SMALLEST_WEIGHT = 1e-6  # of the largest: directions that nothing reads still need a finite way back
LARGEST_FACTOR = 2.0**8  # between coordinates and channels, and its inverse, for which quantizers have steps to spare
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # weights of fewer bits have scales elsewhere
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
        metric = moments.metrics[self.metric][layer]
        if metric is None:
            raise PluginError(
                f"layer {layer}: codec {self.name} has no metric there, because attention doesn't read its K and V as "
                "they are cached: use a codec of another metric"
            )
        return metric


class Attention(MetricBasis):
    """Query-aware K, output-aware V."""

    name = metric = "attention"

    def metric_vectors(self, seen: Seen) -> dict[str, Tensor]:
        if seen.queries is None or seen.queries.shape[-1] != seen.keys.shape[-1]:
            return {}
        q = seen.queries.transpose(0, 1).float()
        return {"k": q.reshape(seen.keys.shape[1], -1, q.shape[-1])}  # [H, Hq/H · T, d]

    def metric_from_weights(self, model: torch.nn.Module, geometry: Geometry) -> dict[str, list[Tensor | None]]:
        return {"v": output_metric(model, geometry)}


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


def output_metric(model: torch.nn.Module, geometry: Geometry) -> list[Tensor | None]:
    """Σ WᵀW of each KV head's part of a layer's output projection, [H, d, d] float64.

    What an error of V weighs in the output of its layer, with all attention on one token. None where the projection
    isn't found, or is quantized.
    """
    found: dict[int, list[tuple[torch.nn.Module, Tensor]]] = {}
    for module in model.modules():
        projection = next((getattr(module, name) for name in OUTPUTS if hasattr(module, name)), None)
        if hasattr(module, "layer_idx") and getattr(projection, "weight", None) is not None:
            w = projection.weight
            w = w.T if type(projection).__name__ == "Conv1D" else w  # [hidden, query heads · d]
            found.setdefault(module.layer_idx, []).append((module, w))
    return [_of_output(found.get(index, []), layer.v) for index, layer in enumerate(geometry.layers)]


def _of_output(found: list[tuple[torch.nn.Module, Tensor]], v: Shape | None) -> Tensor | None:
    """Σ WᵀW of one layer, of modules with their output projections: that of attention, if there is exactly one."""
    if len(found) > 1:  # hybrid layers have another in their recurrent part
        found = [(module, w) for module, w in found if hasattr(module, "is_causal")]
    if v is None or len(found) != 1 or found[0][1].shape[1] % v.size or found[0][1].dtype not in NUMBERS:
        return None
    w = found[0][1].detach().double().cpu()
    w = w.T.reshape(v.heads, -1, v.width, w.shape[0])  # [H, heads that share it, d, hidden]
    return (w @ w.mT).sum(1)
