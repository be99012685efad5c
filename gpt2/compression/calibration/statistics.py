"""A forward pass over a model: what later fits need of K, V and queries, in memory that doesn't grow with the text.

Per layer and KV head: count, mean and centred scatter of K and V, and the metrics that registered bases weigh errors by
(all after RoPE, as K is cached). Activations are never kept: O(layers · heads · channels²).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.calibration.stacks import Stacks
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
    for every basis [G, blocks · 64, w] float16, None for layers without K and V.
    """

    basis: MultiHead
    moments: Moments
    rotary: list[Rotary]
    blocks: Sequence[Tensor | None]

    @property
    def sampled(self) -> bool:
        """Whether any block was sampled; none is where segments are shorter than one."""
        return any(blocks is not None and blocks.shape[1] for blocks in self.blocks)


class Tap(DynamicCache):
    """Hands K and V of each layer to a function and stores neither: every sequence is one forward pass.

    config: of the model, needed where layers have states of another kind, which are stored as usual.
    """

    def __init__(self, record, config: PretrainedConfig | None = None):
        super().__init__(config=config)
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
        """Take in one layer of a segment."""
        for name, basis in self._bases.items():
            for side, vectors in basis.metric_vectors(seen).items():
                if (name, side) not in self._sums:
                    self._sums[name, side] = SecondMoments.zeros(self._geometry, side)
                self._sums[name, side].update(layer, vectors)

    def put_into(self, statistics: Statistics, processes: Processes) -> None:
        """Add the metrics, of all processes' segments, to statistics of the same segments."""
        for (name, side), sums in self._sums.items():
            put_metric(statistics, self._geometry, side, name, sums.mean(processes))


def put_metric(
    statistics: Statistics, geometry: Geometry, side: str, name: str, metric: Sequence[Tensor | None]
) -> None:
    """Add a metric of K or V where all layers of one shape have it; a metric that no layer has is left out."""
    metric = Stacks(geometry, side).whole(metric)
    if any(own is not None for own in metric):
        getattr(statistics, side).metrics[name] = metric


def collect(
    loaded: LoadedModel, segments: Iterable[Tensor], sink_tokens: int, *, processes: Processes = ALONE
) -> Statistics:
    """Run token segments [T] through the model, one at a time, and gather statistics of all but the sink tokens.

    processes: each runs segments of its own, and all get the statistics of all segments.

    The first tokens act as attention sinks: their K and V are outliers that would bend the basis, and the cache
    keeps them exact anyway (Xiao et al. 2023).
    """
    model, geometry = loaded.model, loaded.geometry
    statistics = Statistics(Moments.zeros(geometry, "k"), Moments.zeros(geometry, "v"))
    sums = MetricSums(geometry, gradients=False)
    readers = _Readers(geometry)

    def without_sinks(*parts: Tensor) -> list[Tensor]:
        return [part[:, :, sink_tokens:] for part in parts]

    def record(layer: int, keys: Tensor, values: Tensor) -> None:
        readers.taken(layer, keys, values)
        k, v = without_sinks(keys, values)
        statistics.k.update(layer, k)
        statistics.v.update(layer, v)
        if not has_queries:
            sums.add(layer, Seen(k, v))

    def record_queries(module: nn.Module, q: Tensor, key: Tensor, value: Tensor) -> None:
        found = readers.read_by(module, key, value)
        if found is not None:
            layer, k, v, as_cached = found
            k, v, q = without_sinks(k, v, q)
            sums.add(layer, Seen(k, v, queries=q if as_cached else None))

    body = model.base_model  # the statistics need no logits
    with torch.no_grad(), _tapped_queries(model, record_queries) as has_queries:
        for segment in segments:
            body(input_ids=segment[None].to(loaded.device), past_key_values=tapped(model, record), use_cache=True)
            readers.forget()
    for moments in (statistics.k, statistics.v):
        moments.add_up(processes)
    if not statistics.k.count[geometry.attention].min():
        raise PluginError(f"no vectors to calibrate on: sequences must be longer than the {sink_tokens} sink tokens")
    sums.put_into(statistics, processes)
    for name, basis in gathered_metrics(gradients=False).items():
        for side, metric in basis.metric_from_weights(model, geometry).items():
            metric = [own if readers.reads(layer) else None for layer, own in enumerate(metric)]
            put_metric(statistics, geometry, side, name, metric)
    return statistics


class _Readers:
    """Which layer's K and V attention reads, and whether it reads them as they are cached.

    Latent attention caches a latent and a rotary key, which have two shapes, and makes its keys and values of both.
    """

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self._newest: tuple[int, Tensor, Tensor] | None = None
        self._keys: dict[int, weakref.ref[Tensor]] = {}  # of this segment; those that no later layer reads are gone
        self._as_cached: set[int] = set()
        self._changed: set[int] = set()  # of which attention was seen to read other keys

    def taken(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Note that the cache took K and V of a layer."""
        self._newest = layer, keys, values
        self._keys[layer] = weakref.ref(keys)

    def read_by(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[int, Tensor, Tensor, bool] | None:
        """The layer that an attention module reads, its K and V, and whether as they are cached; None if none is known.

        Most hand attention the tensor that the cache returned. Others read what the cache took last: their own
        layer_idx won't do, for a module may run for several cache layers. Layers that read K and V of an earlier one
        are given the earlier one's, or nothing where it can't be told.
        """
        layer = next((layer for layer, keys in self._keys.items() if keys() is key), None)
        if layer is not None:
            self._as_cached.add(layer)
            return layer, key, value, True
        if self._newest is None or getattr(module, "is_kv_shared_layer", False):
            return None
        layer, keys, values = self._newest
        if key.shape[-1] != keys.shape[-1] or value.shape[-1] != values.shape[-1]:
            self._changed.add(layer)
        return layer, keys, values, self.reads(layer)

    def reads(self, layer: int) -> bool:
        """Whether attention reads a layer's K and V as they are cached; where it wasn't seen, their shapes tell."""
        own = self._geometry.layers[layer]
        return layer in self._as_cached or (own.k == own.v and layer not in self._changed)

    def forget(self) -> None:
        """A segment has ended."""
        self._newest = None
        self._keys.clear()


def tapped(model: PreTrainedModel, record) -> Tap:
    """A fresh `Tap` for one forward pass of a model, which hands K and V to `record(layer, keys, values)`."""
    return Tap(record, model.config)


def _tapped_queries(model, record):
    """Let `record(module, q, k, v)` see what every attention gets while the block runs.

    Yields False where the model can't.
    """

    def tap(attention):
        def attend(module, query, key, value, *args, **kwargs):
            record(module, query, key, value)
            return attention(module, query, key, value, *args, **kwargs)

        return attend

    return wrapped_attention(model, tap)
