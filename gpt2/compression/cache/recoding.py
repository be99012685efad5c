"""A cache coded anew with other codecs: what it reads is stored again, layer by layer, at the same positions."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from gpt2.common.errors import PluginError
from gpt2.compression.cache.forking import forked_padding
from gpt2.compression.cache.layers import CompressedLayer
from gpt2.compression.cache.mixed_layers import CompressedIndexedLayer
from gpt2.compression.cache.token_store import without_autocast
from gpt2.models.geometry import NOTHING


def recode(source: Cache, target) -> None:
    """Store in an empty CompressedDynamicCache what `source`, one of ours or a DynamicCache, holds of the same layers.

    States are copied. Of a layer whose window forgot tokens, codecs may need whole blocks: copies of the first token
    held stand for those that are gone, and no query sees them. Raises PluginError for caches of other layers.
    """
    # Older transformers leave out the last layers where these read K and V of earlier ones
    without = len(target.layers) - len(source.layers)
    if without < 0 or any(layer.kind != NOTHING for layer in target.geometry.layers[len(source.layers) :]):
        raise PluginError(f"the cache has {len(source.layers)} layers, and the new one {len(target.layers)}: they are "
                          "of different models")  # fmt: skip
    ours = hasattr(source, "padding_finder")
    if ours:
        target.padding_finder = forked_padding(source.padding_finder)
    for index, (old, new) in enumerate(zip(source.layers, target.layers, strict=False)):
        if isinstance(new, CompressedLayer):
            _recode_layer(old, new, target, find_padding=index == 0 and not ours)
            _copy_states(old, new)
        else:
            target.layers[index] = copy.deepcopy(old)


def _recode_layer(old, new: CompressedLayer, target, *, find_padding: bool) -> None:
    if not old.is_initialized:
        return
    k, v, forgotten = held(old)
    if find_padding and not forgotten:
        target.padding_finder.see(k, v)
    new.set_padding(target.padding_finder.found)
    new.lazy_initialization(k, v)
    begin = _begin(new, forgotten)
    if begin < forgotten:
        k, v = (torch.cat((x[:, :, :1].expand(-1, -1, forgotten - begin, -1), x), dim=2) for x in (k, v))
    for store in new.stores.values():
        size = store.compressor.block_tokens
        store.forgotten = begin
        if begin and not store.tail_only:
            store.dropped_blocks = (begin - store.sink_tokens + store.sink_tokens % size) // size
    if hasattr(new, "record_past"):
        new.record_past = getattr(old, "record_past", False)
    with without_autocast(k):
        for store, x in zip(new.stores.values(), new.parts(k, v), strict=True):
            store.append(x)
    new.dtype, new.device, new.begins = old.dtype, old.device, forgotten
    new.forget()


def held(layer) -> tuple[Tensor, Tensor, int]:
    """K and V [B, H, T, d] of all tokens that a layer holds, reconstructed, and how many it forgot before these."""
    if not isinstance(layer, CompressedLayer):
        if not isinstance(layer, DynamicLayer):
            raise PluginError(f"expected a cache of ours or a DynamicCache, got one with a {type(layer).__name__}")
        return layer.keys, layer.values, layer.get_seq_length() - layer.keys.shape[2]
    read = []
    for store in layer.stores.values():
        store = copy.copy(store)
        store.visible = None
        with without_autocast(store.sinks):
            read.append(store.read())
    k, v = read if len(read) == 2 else read[0].chunk(2, dim=1)
    forgotten = layer.first_store.forgotten
    copies = max(layer.begins - forgotten, 0)  # that fill a block, of a cache that was coded anew before
    return k[:, :, copies:], v[:, :, copies:], forgotten + copies


def _begin(layer: CompressedLayer, forgotten: int) -> int:
    """Where the stores of a layer can begin, at `forgotten` or before: K and V hold the same tokens."""
    stores = [store for store in layer.stores.values() if not store.tail_only]
    size = math.lcm(*(store.compressor.block_tokens for store in stores))
    begin = forgotten // size * size
    return begin if all(begin >= store.sink_tokens + store.compressor.block_tokens for store in stores) else 0


def _copy_states(old, new) -> None:
    """States and indexers, which no codec changes."""
    if isinstance(new, LinearAttentionCacheLayerMixin):
        for name, value in vars(old).items():
            if isinstance(value, dict) and name != "stores":
                setattr(new, name, copy.deepcopy(value))
        new.record_past = old.record_past
    if isinstance(new, CompressedIndexedLayer):
        own = getattr(old, "indexer", old)
        positions = getattr(own, "indexer_position_ids", None)
        if own.indexer_keys is not None:
            new.indexer.lazy_initialization_indexer(own.indexer_keys)
            new.indexer.indexer_keys = own.indexer_keys
        if positions is not None:
            new.indexer.indexer_position_ids = positions
