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
from gpt2.compression.storage import TokenStore, precisely
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
        self.torn = False  # whether a change of the stores is on its way, or was cut off
        self.rows_changed = 0  # how often rows were chosen anew, as many times in every layer
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
        with precisely(self._first.sinks):
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
        with precisely(key_states):
            parts = self._parts(key_states, value_states)
            self._check(parts)
            self._begin_change()
            for store, x in zip(self.stores.values(), parts, strict=True):
                store.append(x.detach())
            self.torn = False

    def _begin_change(self) -> None:
        """Before a change of the stores, whose end is `torn = False`: what Ctrl-C or a lack of memory leaves in the
        middle of it can't be used.
        """
        if self.torn:
            raise PluginError(
                f"layer {self.index}: a change of the cache was cut off halfway, so what it holds is of no use: "
                "reset() it"
            )
        self.torn = True

    def _check(self, parts: tuple[Tensor, ...]) -> None:
        """Refuse a batch of another size, another model's heads, and the whole prompt fed again."""
        store, keys = self._first, parts[0]
        if keys.shape[0] != store.sinks.shape[0]:
            raise PluginError(
                f"the cache holds a batch of {store.sinks.shape[0]}, but {keys.shape[0]} sequences came: reset() "
                "it, make a new one, or use batch_repeat_interleave before beam search"
            )
        for held, x in zip(self.stores.values(), parts, strict=True):
            (_, heads, _, width), (_, came, _, wide) = held.sinks.shape, x.shape
            if heads != came or width != wide:
                raise PluginError(
                    f"layer {self.index}: the cache holds {heads} KV heads of {width} channels, but {came} of {wide} "
                    "came: another model filled it, so reset() it or make a new one"
                )
        # In the first layer K depends on a token and its position alone, so the same tokens at the same positions can
        # be recognised. use_cache=False feeds prompt + 1 token at every step to a cache that keeps them all; generate
        # feeds a prompt again, from its first position, of which the cache holds every token. Where K has no positions
        # (ALiBi) a text that is said twice, in two pieces of one length, is refused with it
        held, n = len(store), keys.shape[2]
        if self.index or not held or n not in (held, held + 1) or _alike(keys) or not store.holds(keys[:, :, :held]):
            return
        advice = (
            "as generate does with a prompt that was read to its end: crop(-1) the cache first, as generate needs one "
            "token that it doesn't hold"
            if n == held
            else "as generate(use_cache=False) does: use use_cache=True with this cache, or pass no past_key_values"
        )
        raise PluginError(f"the whole prompt was fed again to a cache that holds it, {advice}")

    def get_seq_length(self) -> int:
        return len(self._first)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for store in self.stores.values():
            store.clear()
        self.is_initialized = self.torn = False
        self.rows_changed = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative number, as transformers has it; 0 does nothing."""
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding of transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise PluginError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if -tokens_to_remove > self.get_seq_length() and self.is_initialized:
            raise PluginError(f"can't crop {-tokens_to_remove} tokens from a cache of {self.get_seq_length()}")
        if tokens_to_remove and self.is_initialized:
            with precisely(self._first.sinks):
                self._begin_change()
                for store in self.stores.values():
                    store.crop(-tokens_to_remove)
                self.torn = False

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        fn(self._first.sinks.new_empty(self._first.sinks.shape[0]))  # rows that there aren't fail here, nothing changed
        self._begin_change()
        for store in self.stores.values():
            store.map_(fn)
        self.torn = False

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._map(fn)
        self.rows_changed += self.is_initialized

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))


def _alike(x: Tensor) -> bool:
    """Whether all tokens of x [B, H, n, d] are the same, as padding is, so that they say nothing of where they were."""
    return bool((x == x[:, :, :1]).all())


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

    @torch.compiler.disable  # a model may be compiled: what is stored, where, is none of its graphs' matter
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """As `CompressedLayer.update`, for one layer of the model."""
        if layer_idx >= len(self.layers):
            raise PluginError(
                f"the model has a layer {layer_idx}, but this cache was made for {len(self.layers)} layers: "
                "its preset or calibration is of another model"
            )
        if layer_idx == 0:
            self._check_layers()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_layers(self) -> None:
        """Refuse what Ctrl-C or an error within a run has left: the first layers hold its tokens, the last don't."""
        if self.layers[0].rows_changed != self.layers[-1].rows_changed:
            raise PluginError("a change of the cache's rows was cut off between layers: reset() the cache")
        first, last = (self.layers[i].get_seq_length() for i in (0, -1))
        if first != last:
            raise PluginError(
                f"the first layer holds {first} tokens and the last {last}: a run was cut off between layers, so crop "
                f"what it left with crop({last - first}), or reset() the cache; or the model has fewer layers than it"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """As `CompressedLayer.crop`, of the first layer's tokens; all hold as many then, also after a run cut off."""
        length = self.get_seq_length() + min(int(tokens_to_remove), 0)
        if shorter := [layer.index for layer in self.layers if layer.get_seq_length() < length]:
            raise PluginError(
                f"layer {shorter[0]} has fewer than the {length} tokens that crop({int(tokens_to_remove)}) would leave "
                "in the first: a run was cut off between layers, crop more or reset() the cache"
            )
        for layer in self.layers:
            layer.crop(max(int(tokens_to_remove), 0) or length - layer.get_seq_length())

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have come: some models take the first for a prefix that sees all of itself."""
        return any(layer.is_initialized for layer in self.layers)

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
