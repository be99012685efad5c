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
        clear_states(self)
        super().reset()

    def check_crop(self, tokens_to_remove: int) -> int:
        removed = super().check_crop(tokens_to_remove)
        check_states_crop(self, removed, self.get_seq_length() - removed, self.index)
        return removed

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if has_states(self):
            LinearAttentionLayer.crop(self, int(tokens_to_remove))

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
        """[B, T, width]"""
        return self.indexer.indexer_keys

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """[dimensions, B, T] where a model's indexer keeps positions."""
        return self.indexer.indexer_position_ids

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor | None) -> None:
        self.indexer.indexer_position_ids = positions

    def reset(self) -> None:
        super().reset()
        self.indexer = cache_utils.DynamicIndexedLayer()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if removed := -int(tokens_to_remove):
            self._set_indexer(*[None if x is None else x[..., :-removed, :] for x in self._indexer()])

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        super()._map(fn)
        self._set_indexer(*[None if x is None else fn(x) for x in self._indexer()])

    def _indexer(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys [B, T, width] and positions, rows first: [B, T, dimensions]."""
        positions = getattr(self.indexer, "indexer_position_ids", None)  # older transformers have none
        return self.indexer.indexer_keys, None if positions is None else positions.permute(1, 2, 0)

    def _set_indexer(self, keys: Tensor | None, positions: Tensor | None) -> None:
        self.indexer.indexer_keys = keys
        if positions is not None:
            self.indexer.indexer_position_ids = positions.permute(2, 0, 1)


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
    for states, _ in _states(layer):
        states.update({index: fn(state) for index, state in states.items() if state is not None})


def clear_states(layer) -> None:
    """Drop the states of a layer that has any, so that the next may be of another batch size, and keep no past ones.

    transformers only sets them to zero, and goes on recording after an answer that was speculated.
    """
    for states, initialized in _states(layer):
        layer.record_past = False
        for index in states:
            states[index], initialized[index], layer.has_previous_state[index] = None, False, False


def check_states_crop(layer, removed: int, left: int, index: int) -> None:
    """Raise RuntimeError, as transformers does, where a layer's past wasn't recorded, so that `left` tokens can't stay.

    Raises PluginError for recurrent states, which transformers leaves as they are after the tokens that it removes.
    """
    if not has_states(layer):
        return
    sizes = layer.conv_kernel_size
    held = [(s.shape[-1], sizes[i]) for i, s in layer.conv_states.items() if s is not None and sizes[i] is not None]
    if not layer.record_past or (removed and any(length - removed < min(size, left) for length, size in held)):
        raise RuntimeError(
            f"crop of layer {index}: it hasn't kept past states; call activate_past_recording on the cache before it "
            "is filled"
        )
    if removed and any(state is not None for state in layer.recurrent_states.values()):
        raise PluginError(
            f"crop of layer {index}: its recurrent states can't be put back to what they were {removed} tokens before: "
            "copy the cache before what may have to be removed, or reset() it"
        )


def has_states(layer) -> bool:
    """Whether a layer holds recurrent or convolution states."""
    return any(state is not None for states, _ in _states(layer) for state in states.values())


def _states(layer) -> list[tuple[dict[int, Tensor | None], dict[int, bool]]]:
    """Convolution and recurrent states of a layer by their number, and which of them it has; none of other layers."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return []
    return [
        (layer.conv_states, layer.is_conv_states_initialized),
        (layer.recurrent_states, layer.is_recurrent_states_initialized),
    ]
