"""Copies of a cache that share what is stored: N continuations of one document hold it once.

Chunks of codes are never written to once a fork has them; sinks and tails are replaced, never changed. What is written
in place is small and copied at once: states of linear layers, and what is known of padded rows.
"""

from __future__ import annotations

import copy

from torch import Tensor

from gpt2.compression.cache.layers import CompressedLayer
from gpt2.compression.cache.padding import OwnSinks, PaddingFinder
from gpt2.compression.cache.token_store import TokenStore


def forked(layer):
    """A layer of a cache with the same contents."""
    if not isinstance(layer, CompressedLayer):
        return copy.deepcopy(layer)  # transformers writes into these
    other = copy.copy(layer)
    other.stores = {side: _store(store) for side, store in layer.stores.items()}
    other.reader = None
    for name, value in vars(layer).items():
        if isinstance(value, dict) and name != "stores":  # states, and marks of them
            setattr(other, name, {i: x.clone() if isinstance(x, Tensor) else x for i, x in value.items()})
    if hasattr(layer, "indexer"):
        other.indexer = copy.copy(layer.indexer)  # which replaces its tensors
    return other


def forked_padding(finder: PaddingFinder) -> PaddingFinder:
    """What is known of padding; some of it is written in place."""
    other = copy.copy(finder)
    other.rows, other.open = (None if x is None else x.clone() for x in (finder.rows, finder.open))
    return other


def _store(store: TokenStore) -> TokenStore:
    other = copy.copy(store)
    other.blocks = {name: stored.fork() for name, stored in store.blocks.items()}
    other.own_sinks = _own_sinks(store.own_sinks)
    return other


def _own_sinks(own: OwnSinks) -> OwnSinks:
    other = copy.copy(own)
    other.tokens, other.kept = (None if x is None else x.clone() for x in (own.tokens, own.kept))
    other._found = other._apart = None
    return other
