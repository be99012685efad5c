"""What makes a cache outlive its conversation: files, forks, other codecs, and parking in the CPU's memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gpt2.common.errors import PluginError
from gpt2.compression.cache import held_tokens, recoding, saved
from gpt2.compression.cache.forking import forked, forked_padding
from gpt2.compression.cache.held_tokens import HeldTokens
from gpt2.compression.cache.recipe import FROM_PRESETS, Recipe
from gpt2.compression.cache.storages import bytes_on, storages_of

log = logging.getLogger(__name__)


class Keeping(Cache):
    """The part of CompressedDynamicCache that keeps it: `save`, `load`, `fork`, `to_preset`, `offload`, `prefetch`.

    recipe: what the cache was made from; None where it was given compressors. held_tokens: ids of what it holds.
    """

    recipe: Recipe | None = None
    parked = False  # whether the whole cache was moved to the CPU's memory

    @property
    def rows(self) -> int:
        """Sequences held; 0 where the cache is empty."""
        return next((layer.first_store.sinks.shape[0] for layer in self.compressed if layer.is_initialized), 0)

    @property
    def padding(self) -> Tensor | None:
        """Slots of left padding of each row, [B] on the CPU; None where there is none."""
        stores = (store for layer in self.compressed if layer.is_initialized for store in layer.stores.values())
        known = (store.own_sinks.padding for store in stores)  # None of exact codecs
        stored = next((padding for padding in known if padding is not None), None)
        # The finder knows one slot of padding only by a row that has more, which a selection may have removed
        return self.padding_finder.found if stored is None else stored.cpu()

    @property
    def token_ids(self) -> Tensor | None:
        """Ids [B, n] of the first tokens held, as far as they are known: after `save`, `load` and `inputs`."""
        return self.held_tokens.ids

    def save(self, path: str | Path, *, token_ids=None, model=None) -> Path:
        """Write the cache to a safetensors file, which `load` maps into memory.

        token_ids: [B, T] or [T], of all tokens that the cache holds (more are cut off); may be left out where they are
        known, as of a cache that was loaded. model: the one that filled it, as PreTrainedModel or LoadedModel; needed
        where the cache was made without. The file is complete or isn't there. Raises PluginError where it can't be
        written, where the ids are missing or not those that are known, and for a cache that a run left inconsistent.
        """
        return saved.save(self, path, token_ids, model)

    @classmethod
    def load(cls, path: str | Path, *, model=None, config=None, into=None, device=None):
        """The cache of a file that `save` wrote: its bytes are mapped, and compared with their checksums.

        model: the one that will run, as PreTrainedModel or LoadedModel; its fingerprint must be that of the model which
        filled the cache. config: of a model, where there are no weights: its layers alone are compared. into: an empty
        cache with the same codecs, for one that was made of compressors and not of a preset. device: of the tensors;
        each layer's own in the model when None. The preset's calibration is looked for beside the file too. Raises
        BadArtefact, which names the file and what to do, for another model or version, damage, or another basis.
        """
        return saved.load(path, model, config, into, device)

    def inputs(self, *, new=None, whole=None, mask=None) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` with which `generate` continues this cache.

            model.generate(**cache.inputs(new=ids), past_key_values=cache)

        new: the tokens that follow those held, [n] or [B, n]. whole: all tokens, which must begin with those held.
        mask: 0 where rows are padded, of all tokens, [T] or [B, T]; needed only where texts begin with the padding
        token, which is taken for padding without it.
        generate feeds the model only what the cache doesn't hold. Raises PluginError, naming the first token that
        differs, for another beginning, and where nothing would be left to feed.
        """
        return held_tokens.inputs(self, new, whole, mask)

    def fork(self):
        """A cache with the same contents that shares the stored blocks, so that what is common takes memory once.

        Both go on by themselves: with other tokens, crops, beams. States of recurrent layers are copied, and so is the
        exact tail of each layer as soon as it grows. `size.cache_bytes(cache, *forks)` counts what they hold together.
        """
        self.check_usable()
        self.check_awake()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [forked(layer) for layer in self.layers]
        other.padding_finder = forked_padding(self.padding_finder)
        other.held_tokens = HeldTokens(self.held_tokens.ids)
        return other

    def to_preset(self, preset, *, model=None, config=None):
        """A new cache that holds the same tokens, coded by another preset.

        preset, model, config: as of `create_cache_from_preset`; where neither model nor config is given, the layers are
        this cache's. From an exact cache (identity) the loss is that of the new codec alone. From a lossy one what was
        lost stays lost, and the new codec adds to it: that is logged as a warning.
        """
        self.check_usable()
        self.check_awake()
        geometry = saved.held_geometry(self)
        known = all(layer.k for layer in geometry.layers if layer.attends)  # of compressors, not before a token is held
        target = from_cache(self, preset, model=model, config=config, geometry=geometry if known else None)
        filled_by = self.recipe and self.recipe.fingerprint
        if target.recipe.fingerprint is None and filled_by:
            target.recipe = Recipe(**vars(target.recipe) | {"fingerprint": filled_by, "rotary": self.recipe.rotary})
        target.held_tokens = HeldTokens(self.held_tokens.ids)
        return target

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> int | None:
        """Move the whole cache to the CPU's memory; returns the bytes moved. With `layer_idx` as transformers does it.

        On CUDA the copies are queued and this returns at once: what the stream does next waits for them, and
        `torch.cuda.synchronize` waits here. A parked cache can't be used before `prefetch`. On the CPU nothing moves,
        which is logged.
        """
        if layer_idx is not None:
            return super().offload(layer_idx, only_non_sliding)
        self.check_usable()
        moved = self._move("offload")
        if not moved and not self.parked:
            log.warning("offload: this cache is in the CPU's memory already, nothing was moved")
        self.parked = self.parked or moved > 0
        return moved

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> int | None:
        """Move a parked cache back to the devices of its layers; returns the bytes moved. As `offload`."""
        if layer_idx is not None:
            return super().prefetch(layer_idx, only_non_sliding)
        moved = self._move("prefetch")
        if not moved:
            log.warning("prefetch: this cache isn't parked, nothing was moved")
        self.parked = False
        return moved

    def _move(self, how: str) -> int:
        cpu = torch.device("cpu")
        before = bytes_on(storages_of(self.layers), cpu)
        for layer in self.layers:
            getattr(layer, how)()
        return abs(bytes_on(storages_of(self.layers), cpu) - before)

    def check_usable(self) -> None:
        """Raise PluginError for a cache that a run left inconsistent: layers that hold different numbers of tokens."""
        ours = self.compressed
        if any(layer.inconsistent for layer in ours):
            raise PluginError("a change of the cache was interrupted, so its contents are inconsistent: reset() it")
        self._check_layers()

    def check_awake(self) -> None:
        """Raise PluginError for a parked cache."""
        if self.parked:
            raise PluginError("this cache is parked in the CPU's memory: prefetch() it before it is used")


def from_cache(cache: Cache, preset, *, model=None, config=None, geometry=None):
    """What a cache holds, coded by a preset: of ours, or transformers' DynamicCache, which loses nothing before.

    Arguments as of `create_cache_from_preset`; geometry: of the layers, where neither model nor config is given.
    """
    target = FROM_PRESETS.create(preset, model=model, config=config, geometry=geometry)
    if getattr(cache, "is_exact", True) is False:
        log.warning(
            "the cache that is coded anew is lossy already (%s): what it lost stays lost, and the new codec adds to "
            "it; code from an exact cache, or read the tokens again, for the loss of one", _name_of(cache),
        )  # fmt: skip
    recoding.recode(cache, target)
    return target


def _name_of(cache) -> str:
    recipe = cache.recipe
    return str(recipe.preset.get("name") or recipe.preset["codec"]) if recipe else "made of compressors"
