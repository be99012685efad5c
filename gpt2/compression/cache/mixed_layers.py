"""Layers of models that don't only attend: beside compressed K and V, transformers' own states stay as they are.

`make_layer` gives each layer of a model its place in the cache: ours where it keeps K and V of tokens, transformers'
own object where it keeps recurrent or convolution states, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from gpt2.common.errors import PluginError
from gpt2.compression.cache.layers import CompressedLayer, CompressedSlidingLayer
from gpt2.compression.codecs import Compressor
from gpt2.models.geometry import FULL, HYBRID, HYBRID_SLIDING, INDEXED, LINEAR, NOTHING, SLIDING, UNUSED, LayerGeometry


class _WithStates:
    """What a layer with linear attention beside its attention does: every operation on both halves."""

    is_compileable = False

    def lazy_initialization(self, *args, **kwargs) -> None:
        if args:  # K and V; the linear half passes its states by name
            super().lazy_initialization(*args, **kwargs)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:
        return LinearAttentionLayer.is_croppable.fget(self)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, int(tokens_to_remove))
        super().crop(tokens_to_remove)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)
        super().offload()

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)
        super().prefetch()

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        map_states(self, fn)
        super()._map_rows(fn)


class CompressedHybridLayer(_WithStates, CompressedLayer, LinearAttentionAndFullAttentionLayer):
    """Compressed attention and linear attention in one layer (Falcon-H1)."""

    def __init__(self, *args, states: int = 1):
        LinearAttentionLayer.__init__(self, number_of_states=states)
        CompressedLayer.__init__(self, *args)


class CompressedHybridSlidingLayer(_WithStates, CompressedSlidingLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Compressed attention with a sliding window, and linear attention, in one layer."""

    def __init__(self, *args, window: int, states: int = 1):
        LinearAttentionLayer.__init__(self, number_of_states=states)
        CompressedSlidingLayer.__init__(self, *args, window=window)


class CompressedIndexedLayer(CompressedLayer):
    """Compressed K and V beside the keys of a sparse attention's indexer, which transformers' own layer keeps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.indexer = cache_utils.DynamicIndexedLayer()  # its K and V stay empty

    def update_indexer(self, *args, **kwargs) -> Tensor:
        """As transformers' layer does it."""
        return self.indexer.update_indexer(*args, **kwargs)

    @property
    def indexer_keys(self) -> Tensor | None:
        return self.indexer.indexer_keys

    @property
    def indexer_position_ids(self) -> Tensor | None:
        return self.indexer.indexer_position_ids

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor | None) -> None:
        self.indexer.indexer_position_ids = positions

    def reset(self) -> None:
        super().reset()
        self.indexer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.indexer.crop(int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.indexer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.indexer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.indexer.batch_repeat_interleave(repeats)

    def offload(self) -> None:
        super().offload()
        self.indexer.offload()

    def prefetch(self) -> None:
        super().prefetch()
        self.indexer.prefetch()


def make_layer(
    geometry: LayerGeometry, index: int, k: Compressor | None, v: Compressor | None, sink_tokens: int,
    recent_tokens: int,
):  # fmt: skip
    """The cache's layer number `index`. Raises PluginError where it keeps K and V and there are no compressors."""
    if not geometry.attends:
        return _own_layer(geometry)
    if k is None or v is None:
        raise PluginError(f"layer {index} ({geometry.kind}) keeps K and V: expected a compressor for each, got none")
    common = (k, v, sink_tokens, recent_tokens, index)
    if geometry.kind == SLIDING:
        return CompressedSlidingLayer(*common, window=geometry.window)
    if geometry.kind == HYBRID:
        return CompressedHybridLayer(*common, states=geometry.states)
    if geometry.kind == HYBRID_SLIDING:
        return CompressedHybridSlidingLayer(*common, window=geometry.window, states=geometry.states)
    return {FULL: CompressedLayer, INDEXED: CompressedIndexedLayer}[geometry.kind](*common)


def _own_layer(geometry: LayerGeometry):
    """transformers' own layer, for states or for nothing."""
    if geometry.kind == LINEAR:
        return LinearAttentionLayer(number_of_states=geometry.states)
    if geometry.kind == UNUSED:
        return DynamicLayer()
    # Older transformers have no layer that keeps nothing: there, an unused one takes its place
    return DYNAMIC_LAYER_TYPE_MAPPING.get(NOTHING, LinearAttentionLayer)()


def map_states(layer, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply `fn` to the recurrent and convolution states of a layer that has any: batch selection."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return
    for states in (layer.conv_states, layer.recurrent_states):
        if isinstance(states, dict):
            states.update({index: fn(state) for index, state in states.items() if state is not None})
