"""One layer of the compressed cache: what transformers calls, over one or two token stores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from gpt2.common.errors import PluginError
from gpt2.compression.cache.token_store import TokenStore, precisely
from gpt2.compression.codecs import Compressor


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
