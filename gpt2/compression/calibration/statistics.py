"""One streaming pass over a model: what later fits need of K, V and Q, in memory that doesn't grow with the text.

Per layer and KV head: count, mean and centred scatter of K and V, and the second moment of the queries that read
that head (all after RoPE, as they are cached). Activations are never kept: O(layers · heads · head_dim²).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.codecs.moments import Moments, refuse_non_finite
from gpt2.models.attention_function import wrapped_attention
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # what models call an attention's output projection


@dataclass
class Statistics:
    """Everything a basis may be fitted to: moments of keys and values, and the metrics that weigh their errors.

    k.metrics["attention"] is Σqqᵀ / n over the query heads that share a KV head, v.metrics["attention"] that of
    `output_metric`; both [L, H, d, d], each missing where the model doesn't show what it is computed from.
    """

    k: Moments
    v: Moments


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
    return Statistics(k, v)


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


def _tapped_queries(model, record):
    """Let `record(q)` see every layer's queries in turn while the block runs; yields False where the model can't."""

    def tap(attention):
        def attend(module, query, *args, **kwargs):
            record(query)
            return attention(module, query, *args, **kwargs)

        return attend

    return wrapped_attention(model, tap)
