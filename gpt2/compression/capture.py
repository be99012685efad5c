"""One streaming pass over a model: what later fits need of K, V and Q, in memory that doesn't grow with the text.

Per layer and KV head: count, mean and centred scatter of K and V, and the second moment of the queries that read
that head (all after RoPE, as they are cached). Activations are never kept: O(layers · heads · head_dim²).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpt2.errors import PluginError
from gpt2.models import Geometry, LoadedModel
from gpt2.processes import ALONE, Processes

if TYPE_CHECKING:
    from gpt2.compression.codecs.base import Transform

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # what models call an attention's output projection
CAPTURE_ATTENTION = "kv_plugin_capture"  # names with "flash", "sdpa" or "/" are special to transformers


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

    def through(self, transform: Transform, layer: int) -> Moments:
        """Moments of one layer in a transform's coordinates, as those of a model that has this layer alone."""
        E = transform.E.to(self.scatter.dtype)
        mean = ((self.mean[layer] - transform.mean)[:, None] @ E)[:, 0]
        D = transform.D.to(E.dtype)  # an error of coordinates is felt as what it becomes
        metrics = {name: (D @ metric[layer] @ D.mT)[None] for name, metric in self.metrics.items()}
        return Moments(self.count[layer : layer + 1], mean[None], (E.mT @ self.scatter[layer] @ E)[None], metrics)

    def covariance(self, layer: int) -> Tensor:
        """Centred covariance of every KV head, [H, d, d] float64."""
        return self.scatter[layer] / self.count[layer].clamp_min(1)


@dataclass
class Statistics:
    """Everything a basis may be fitted to. `queries` is Σqqᵀ / n over the query heads of a KV head, [L, H, d, d]."""

    k: Moments
    v: Moments
    queries: Tensor | None
    query_count: int


class Tap(DynamicCache):
    """Hands K and V of each layer to a function and stores nothing: every sequence is one forward pass."""

    def __init__(self, record):
        super().__init__()
        self.record = record

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.record(layer_idx, key_states, value_states)
        return key_states, value_states


def collect(
    loaded: LoadedModel, windows: Iterable[Tensor], sink_tokens: int, *, processes: Processes = ALONE
) -> Statistics:
    """Run token windows [T] through the model, one at a time, and gather statistics of all but the sink tokens.

    processes: each runs windows of its own, and all get the statistics of all windows.

    The first tokens act as attention sinks: their K and V are outliers that would bend the basis, and the cache
    keeps them exact anyway (Xiao et al. 2023).
    """
    model, geometry = loaded.model, loaded.geometry
    k, v = Moments.zeros(geometry), Moments.zeros(geometry)
    queries = _QueryMoments(geometry, sink_tokens)
    newest: int | None = None

    def record(layer: int, keys: Tensor, values: Tensor) -> None:
        nonlocal newest
        newest = layer
        k.update(layer, keys[:, :, sink_tokens:])
        v.update(layer, values[:, :, sink_tokens:])

    def record_queries(q: Tensor) -> None:
        # They read what the cache took last. A module's own layer_idx won't do: it may run for several cache layers
        if newest is not None:
            queries.update(newest, q)

    body = model.base_model  # the statistics need no logits
    with torch.no_grad(), _tapped_queries(model, record_queries) as has_queries:
        for window in windows:
            body(input_ids=window[None].to(loaded.device), past_key_values=Tap(record), use_cache=True)
    for moments in (k, v, queries):
        moments.add_up(processes)
    if not k.count.min():
        raise PluginError(f"no vectors to calibrate on: sequences must be longer than the {sink_tokens} sink tokens")
    if has_queries:
        k.metrics["attention"] = queries.mean()
    if (outputs := output_metric(model, geometry)) is not None:
        v.metrics["attention"] = outputs
    return Statistics(k, v, k.metrics.get("attention"), queries.count)


def output_metric(model, geometry: Geometry) -> Tensor | None:
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


class _QueryMoments:
    """Σqqᵀ per layer and KV head, summed over the query heads that share it."""

    def __init__(self, geometry: Geometry, sink_tokens: int):
        shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.head_dim)
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.count = 0
        self.sink_tokens = sink_tokens

    def update(self, layer: int, q: Tensor) -> None:
        """q [B, Hq, T, d]: query heads of one KV head are neighbours."""
        H = self.total.shape[1]
        q = q[:, :, self.sink_tokens :].transpose(0, 1).float()
        q = q.reshape(H, -1, q.shape[-1])  # [H, Hq/H · B · T, d]
        products = (q.mT @ q).double().cpu()
        refuse_non_finite(products, layer)
        self.total[layer] += products
        self.count += q.shape[1] if layer == 0 else 0

    def add_up(self, processes: Processes) -> None:
        """Take in the queries of all processes."""
        self.total = processes.total(self.total)
        self.count = int(processes.total(torch.tensor(self.count)))

    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


def refuse_non_finite(products: Tensor, layer: int) -> None:
    """Raise PluginError where sums of a layer's vectors, or of their gradients, aren't numbers."""
    if not torch.isfinite(products).all():
        raise PluginError(
            f"layer {layer}: NaN or infinite activations, nothing was written. Try --dtype float32 or bfloat16, "
            "and check that the weights load"
        )


def _tapped_queries(model, record):
    """Let `record(q)` see every layer's queries in turn while the block runs; yields False where the model can't."""

    def tap(attention):
        def attend(module, query, *args, **kwargs):
            record(query)
            return attention(module, query, *args, **kwargs)

        return attend

    return wrapped_attention(model, tap)


@contextmanager
def wrapped_attention(model, wrap: Callable[[Callable], Callable]):
    """Put `wrap(attention function)` in the place of the model's attention function while the block runs.

    Yields False where the model can't: its attention is hard-wired, and nothing was changed.
    """
    if not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        yield False
        return
    previous = model.config._attn_implementation
    # eager attention isn't registered: every modeling file has its own
    eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    AttentionInterface.register(CAPTURE_ATTENTION, wrap(ALL_ATTENTION_FUNCTIONS.get(previous, eager)))
    AttentionMaskInterface.register(CAPTURE_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    model.set_attn_implementation(CAPTURE_ATTENTION)
    try:
        yield True
    finally:
        model.set_attn_implementation(previous)
