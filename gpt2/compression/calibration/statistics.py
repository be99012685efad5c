"""A forward pass over a model: what later fits need of K, V and queries, in memory that doesn't grow with the text.

Per layer and KV head: count, mean and centred scatter of K and V, and the metrics that registered bases weigh errors by
(all after RoPE, as K is cached). Activations are never kept: O(layers · heads · head_dim²).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.codecs import MultiHead, gathered_metrics
from gpt2.compression.codecs.moments import Moments, SecondMoments, Seen
from gpt2.compression.codecs.rope import Rotary
from gpt2.models.attention_function import wrapped_attention
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel


@dataclass
class Statistics:
    """What bases of single heads are fitted to: moments of keys and values, with the metrics that weigh their errors.

    A metric is missing where the model doesn't show what it is computed from.
    """

    k: Moments
    v: Moments


@dataclass
class MultiHeadStatistics:
    """What a basis that heads share is fitted to, by number of the basis and group of heads as `basis.shape` has them.

    moments: with those in the place of layers and heads, and metrics[basis.metric]. rotary: each layer's rotation,
    empty where keys aren't un-rotated. blocks: a sample of whole blocks of neighbouring tokens, to try quantization on,
    [bases, G, blocks · 64, w] float16.
    """

    basis: MultiHead
    moments: Moments
    rotary: list[Rotary]
    blocks: Tensor


class Tap(DynamicCache):
    """Hands K and V of each layer to a function and stores nothing: every sequence is one forward pass."""

    def __init__(self, record):
        super().__init__()
        self.record = record

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.record(layer_idx, key_states, value_states)
        return key_states, value_states


class MetricSums:
    """Running second moments that the registered metrics are made of: those of the backward pass, or of the forward."""

    def __init__(self, geometry: Geometry, gradients: bool):
        self._geometry, self._bases = geometry, gathered_metrics(gradients)
        self._sums: dict[tuple[str, str], SecondMoments] = {}

    def add(self, layer: int, seen: Seen) -> None:
        """Take in one layer of a window."""
        for name, basis in self._bases.items():
            for side, vectors in basis.metric_vectors(seen).items():
                if (name, side) not in self._sums:
                    self._sums[name, side] = SecondMoments.zeros(self._geometry)
                self._sums[name, side].update(layer, vectors)

    def put_into(self, statistics: Statistics, processes: Processes) -> None:
        """Add the metrics, of all processes' windows, to statistics of the same windows."""
        for (name, side), sums in self._sums.items():
            getattr(statistics, side).metrics[name] = sums.mean(processes)


def collect(
    loaded: LoadedModel, windows: Iterable[Tensor], sink_tokens: int, *, processes: Processes = ALONE
) -> Statistics:
    """Run token windows [T] through the model, one at a time, and gather statistics of all but the sink tokens.

    processes: each runs windows of its own, and all get the statistics of all windows.

    The first tokens act as attention sinks: their K and V are outliers that would bend the basis, and the cache
    keeps them exact anyway (Xiao et al. 2023).
    """
    model, geometry = loaded.model, loaded.geometry
    statistics = Statistics(Moments.zeros(geometry), Moments.zeros(geometry))
    sums = MetricSums(geometry, gradients=False)
    newest: tuple[int, Tensor, Tensor] | None = None

    def record(layer: int, keys: Tensor, values: Tensor) -> None:
        nonlocal newest
        newest = layer, keys[:, :, sink_tokens:], values[:, :, sink_tokens:]
        statistics.k.update(layer, newest[1])
        statistics.v.update(layer, newest[2])
        if not has_queries:
            sums.add(layer, Seen(*newest[1:]))

    def record_queries(q: Tensor) -> None:
        # They read what the cache took last. A module's own layer_idx won't do: it may run for several cache layers
        if newest is not None:
            layer, keys, values = newest
            sums.add(layer, Seen(keys, values, queries=q[:, :, sink_tokens:]))

    body = model.base_model  # the statistics need no logits
    with torch.no_grad(), _tapped_queries(model, record_queries) as has_queries:
        for window in windows:
            body(input_ids=window[None].to(loaded.device), past_key_values=Tap(record), use_cache=True)
    for moments in (statistics.k, statistics.v):
        moments.add_up(processes)
    if not statistics.k.count.min():
        raise PluginError(f"no vectors to calibrate on: sequences must be longer than the {sink_tokens} sink tokens")
    sums.put_into(statistics, processes)
    for name, basis in gathered_metrics(gradients=False).items():
        for side, metric in basis.metric_from_weights(model, geometry).items():
            getattr(statistics, side).metrics[name] = metric
    return statistics


def _tapped_queries(model, record):
    """Let `record(q)` see every layer's queries in turn while the block runs; yields False where the model can't."""

    def tap(attention):
        def attend(module, query, *args, **kwargs):
            record(query)
            return attention(module, query, *args, **kwargs)

        return attend

    return wrapped_attention(model, tap)
