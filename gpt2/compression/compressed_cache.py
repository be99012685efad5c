"""A compressed KV cache that drops into `model.generate(past_key_values=cache)`.

    k_comp, v_comp, metadata = load_calibrated_compressors("calibration.pt", quantize_bits=8)
    cache = CompressedDynamicCache(k_comp, v_comp)

The cache is a list of layers, as every transformers cache is; a layer only replaces how K and V are stored. A cache
holds one conversation: make a new one, or `reset()` it, for the next. It can be copied and pickled; a pickle is refused
by any other version than made it, for the same bytes may mean something else there.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from gpt2.compression.codecs import Compressor, IdentityCompressor
from gpt2.compression.plan import load_calibrated_compressors
from gpt2.compression.storage import TokenStore
from gpt2.errors import PluginError

__all__ = ["CompressedDynamicCache", "CompressedLayer", "IdentityCompressor", "load_calibrated_compressors"]


class Sealed:
    """What `update` returns in the place of K and V while a model attends over what is stored.

    Nothing that a tensor can do works on it: a model that looks at K or V before attention does fails at once.
    """

    __slots__ = ("_layer",)

    def __getattr__(self, name: str):
        raise AttributeError(
            f"K and V are sealed while a model attends over what is stored, so they have no {name!r}: call "
            "disable_compressed_attention on the model that last used this cache, and reset() the cache"
        )

    def __init__(self, layer: CompressedLayer):
        self._layer = layer

    def stores(self) -> tuple[TokenStore, TokenStore]:
        """Of K and of V; twice the same where they are stored together."""
        stores = list(self._layer.stores.values())
        return stores[0], stores[-1]

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V, reconstructed."""
        return self._layer.read()


class CompressedLayer(CacheLayerMixin):
    """Storage of one layer. `update` returns reconstructions, so any model and attention works with it."""

    is_sliding = False  # everything is stored; the attention mask applies a sliding window
    is_croppable = True
    is_compileable = False
    supports_early_init = False  # shapes and devices come with the first tokens

    def __init__(self, k: Compressor, v: Compressor, sink_tokens: int, recent_tokens: int, index: int):
        super().__init__()
        compressors = {"KV": k} if k.joint else {"K": k, "V": v}
        self.stores = {side: TokenStore(c, sink_tokens, recent_tokens) for side, c in compressors.items()}
        self.index = index
        self.reader = None  # set by `attention` while a model runs that reads the stores themselves
        if k is not v and (k.joint or v.joint):
            raise PluginError(f"layer {index}: a joint codec is for K and V together, the same object for both")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if "KV" in self.stores and key_states.shape != value_states.shape:
            shapes = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise PluginError(
                f"layer {self.index}: a joint codec needs K and V of one shape, this model has {shapes}: use a codec "
                "of each side"
            )
        for (side, store), x in zip(self.stores.items(), self._parts(key_states, value_states), strict=True):
            store.prepare(x, f"layer {self.index}, {side}")
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new tokens, [B, H, n, d] each; return all tokens, [B, H, T, d] each, as they are stored.

        Or a seal in the place of both, for an attention function that takes the stores.
        """
        self.store(key_states, value_states)
        if self.reader is not None and self.reader.active:
            seal = Sealed(self)
            return seal, seal
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens, [B, H, T, d] each, as they are stored."""
        read = [store.read() for store in self.stores.values()]
        return tuple(read) if len(read) == 2 else read[0].chunk(2, dim=1)

    def _parts(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """K and V as the stores take them: apart, or as one tensor of 2H heads."""
        return (torch.cat((keys, values), dim=1),) if "KV" in self.stores else (keys, values)

    @property
    def _first(self) -> TokenStore:
        """The store that has K, alone or with V."""
        return next(iter(self.stores.values()))

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store new tokens, [B, H, n, d] each, and read nothing back: the cost doesn't depend on what is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        parts = self._parts(key_states, value_states)
        self._check(parts[0])
        for store, x in zip(self.stores.values(), parts, strict=True):
            store.append(x.detach())

    def _check(self, keys: Tensor) -> None:
        """Refuse a batch of another size, and the whole prompt fed again."""
        store = self._first
        if keys.shape[0] != store.sinks.shape[0]:
            raise PluginError(
                f"the cache holds a batch of {store.sinks.shape[0]}, but {keys.shape[0]} sequences came: reset() "
                "it, make a new one, or use batch_repeat_interleave before beam search"
            )
        # use_cache=False feeds prompt + 1 token at every step to a cache that keeps them all. In the first layer K
        # depends on a token and its position alone, so the same tokens at the same positions can be recognised.
        held = len(store)
        if self.index == 0 and held and keys.shape[2] == held + 1 and store.holds(keys[:, :, :held]):
            raise PluginError(
                "the whole prompt was fed again to a cache that holds it, as generate(use_cache=False) does: "
                "use use_cache=True with this cache, or pass no past_key_values"
            )

    def get_seq_length(self) -> int:
        return len(self._first)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for store in self.stores.values():
            store.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative number, as transformers has it; 0 does nothing."""
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding of transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise PluginError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if tokens_to_remove and self.is_initialized:
            for store in self.stores.values():
                store.crop(-tokens_to_remove)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores.values():
            store.map_(fn)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))


class CompressedDynamicCache(Cache):
    """Drop-in for DynamicCache that stores K and V through one compressor per layer and side.

    k_compressors, v_compressors: one per layer. num_layers: checked against them when given.
    sink_tokens: first tokens kept exact; attention sinks carry activations no codec should touch. With left padding
    the padding comes first: add the longest padding to it. recent_tokens: latest tokens kept exact, beside what is
    left of an unfinished block.

    direct: whether a model that attends over what is stored may do so; with False it gets reconstructions all the same.
    """

    direct = True

    def __init__(
        self,
        k_compressors: Sequence[Compressor],
        v_compressors: Sequence[Compressor],
        num_layers: int | None = None,
        *,
        sink_tokens: int = 4,
        recent_tokens: int = 0,
    ):
        counts = {len(k_compressors), len(v_compressors), len(k_compressors) if num_layers is None else num_layers}
        if len(counts) > 1 or not len(k_compressors):
            raise PluginError(
                f"one K and one V compressor per layer: got {len(k_compressors)} and {len(v_compressors)} for "
                f"num_layers={num_layers}"
            )
        if sink_tokens < 0 or recent_tokens < 0:
            raise PluginError(f"sink_tokens={sink_tokens}, recent_tokens={recent_tokens}: neither can be negative")
        pairs = zip(k_compressors, v_compressors, strict=True)
        super().__init__(
            layers=[CompressedLayer(k, v, sink_tokens, recent_tokens, i) for i, (k, v) in enumerate(pairs)]
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"stored_by": _version()}

    def __setstate__(self, state: dict) -> None:
        if state.pop("stored_by", None) != _version():
            raise PluginError("this cache was pickled by another version of the code: run its tokens through the model "
                              "again, into a new one")  # fmt: skip
        self.__dict__.update(state)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """As `CompressedLayer.update`, for one layer of the model."""
        if layer_idx >= len(self.layers):
            raise PluginError(
                f"the model has a layer {layer_idx}, but this cache was made for {len(self.layers)} layers: "
                "its preset or calibration is of another model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def keep_expanded(self) -> CompressedDynamicCache:
        """Hold reconstructions beside the codes, for evaluations that read all of them at every step; returns self.

        What is read is the same; the memory that compression saves is taken again, and counted.
        """
        for layer in self.layers:
            for store in layer.stores.values():
                store.keep_expanded = True
        return self

    @property
    def readable(self) -> bool:
        """Whether attention can read every layer as it is stored; a joint codec's keys it can't."""
        return all(c.foldable for layer in self.layers for c in (s.compressor for s in layer.stores.values()))

    def nbytes(self) -> int:
        """Bytes held for the cached tokens, all of them: exact parts, codes, scales, and allocated room."""
        return sum(store.nbytes() for layer in self.layers for store in layer.stores.values())

    def codec_bytes(self) -> int:
        """Bytes of the transforms, which all sequences share as they share weights."""
        return sum(store.compressor.nbytes() for layer in self.layers for store in layer.stores.values())


@functools.cache
def _version() -> str:
    """Changes with any source that says how tokens are stored."""
    here = Path(__file__).parent
    sources = (Path(__file__), here / "storage.py", *sorted((here / "codecs").glob("*.py")))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def identity_cache(num_layers: int) -> CompressedDynamicCache:
    """A cache of ours that stores everything as it comes: the control for all measurements."""
    identity = [IdentityCompressor() for _ in range(num_layers)]
    return CompressedDynamicCache(identity, identity)
