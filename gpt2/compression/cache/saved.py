"""A cache as a file: what it holds, the preset that it was made from, the model's fingerprint and the tokens' ids.

One safetensors file (`gpt2.common.mapped_file`), which is mapped when it is loaded, and about as large as
`cache.nbytes()`. Calibrated bases aren't in it: they weigh as much as several conversations, all caches of a preset
share them, and the preset names the file. In their place the last tokens of every store are noted as they read, and a
basis that reads them otherwise is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gpt2.common import mapped_file
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import Anything, Default, Nullable, OneOf, Record, String, Whole, parse
from gpt2.compression.cache import contents
from gpt2.compression.cache.held_tokens import HeldTokens, as_ids
from gpt2.compression.cache.recipe import FROM_PRESETS
from gpt2.models.geometry import LAYERS, Geometry, Shape
from gpt2.models.probe import ROTARY, rotary, rotary_difference

FORMAT, KIND = "kv-plugin-cache/1", "saved cache"
MOST_TOKENS = 2**31  # larger than any model's context
RECIPE = Record({
    "preset": Record(others=Anything()), "model": String(), "fingerprint": Nullable(String(64)),
    "windows": Record({name: Whole(0, MOST_TOKENS) for name in ("sink_tokens", "recent_tokens")}),
    "rotary": Default(ROTARY, {}),  # older files have none
})  # fmt: skip
HEADER = Record({
    "format": OneOf((FORMAT,)), "recipe": Nullable(RECIPE), "geometry": LAYERS, "tokens": Whole(0, MOST_TOKENS),
    "rows": Whole(0), "contents": contents.CONTENTS,
})  # fmt: skip
AGAIN = "read the tokens again, with a new cache"


def save(cache, path: str | Path, token_ids, model) -> Path:
    """As `CompressedDynamicCache.save`."""
    if not cache:
        raise PluginError("the cache holds no tokens: fill it before it is saved")
    cache.check_usable()
    cache.check_awake()
    length, recipe = cache.get_seq_length(), cache.recipe
    if recipe is not None and recipe.fingerprint is None and model is None:
        raise PluginError("nothing tells which model filled this cache: give model= here, or to "
                          "create_cache_from_preset")  # fmt: skip
    ids = cache.held_tokens.ids
    if token_ids is not None:
        ids = as_ids(token_ids, cache.rows)
        cache.held_tokens.check(ids)
        ids = ids[:, :length]
    if ids is None or ids.shape[1] != length:
        raise PluginError(
            f"expected token_ids, the ids [{cache.rows}, {length}] of all tokens that the cache holds, got "
            f"{'none' if ids is None else list(ids.shape)}: they tell later whether a prompt continues it"
        )
    cache.held_tokens.ids = ids
    record, tensors = contents.taken_apart(cache)
    tensors["token_ids"] = [ids.to(torch.int32)]
    about = recipe and recipe.record(Path(path).parent)
    if about and model is not None:
        about |= {"fingerprint": FROM_PRESETS.fingerprint_of(model), "rotary": rotary(_config_of(model))}
    header = {
        "format": FORMAT, "recipe": about, "geometry": held_geometry(cache).record(), "tokens": length,
        "rows": cache.rows, "contents": record,
    }  # fmt: skip
    return mapped_file.write(path, header, tensors)


def _config_of(model):
    """Of a LoadedModel or a PreTrainedModel."""
    return (model if hasattr(model, "config") else model.model).config


def held_geometry(cache) -> Geometry:
    """The layers of a cache with the shapes of what they hold: compressors say none, presets may leave out heads."""
    layers = list(cache.geometry.layers)
    for layer in (layer for layer in cache.compressed if layer.is_initialized):
        shapes = [store.sinks.shape for store in layer.stores.values()]
        sides = [Shape(shape[1] // (3 - len(shapes)), shape[3]) for shape in shapes]  # one store has K's heads and V's
        layers[layer.index] = replace(layers[layer.index], k=sides[0], v=sides[-1])
    return replace(cache.geometry, layers=tuple(layers))


def about(path: str | Path) -> tuple[dict, int]:
    """The header of a saved cache, a dict that fits HEADER, and the bytes of its tensors. Raises BadArtefact."""
    header, tensors = mapped_file.read(path, KIND, about_only=True)
    return _checked(header, path), sum(tensor.nbytes for tensor in tensors.values())


def load(path: str | Path, model, config, into, device):
    """As `CompressedDynamicCache.load`."""
    if sum(given is not None for given in (model, config, into)) != 1:
        raise PluginError("give model= or config=, to check that the cache is of this model, or into=, an empty cache "
                          "of the same codecs")  # fmt: skip
    if into is not None and into.is_initialized:
        raise PluginError("into= holds tokens: reset() it, or make a new cache")
    with torch.inference_mode(False):  # else what is appended outside inference mode couldn't be written to it
        header, tensors = mapped_file.read(path, KIND)
        header = _checked(header, path)
        try:
            cache = _empty(header, Path(path), model, config) if into is None else into
            _fill(cache, header, tensors, _device_of(model, device))
        except BadArtefact as error:
            if into is not None:
                into.reset()
            raise BadArtefact(f"{path}: {error}") from error
    return cache


def _checked(header: dict, path: str | Path) -> dict:
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise BadArtefact(f"{path}: field 'format': expected {FORMAT}, found {str(found)!r:.40}: another version of "
                          f"this toolkit saved it, so load it with that one, or {AGAIN}")  # fmt: skip
    return parse(header, HEADER, path)


def _empty(header: dict, path: Path, model, config):
    """An empty cache of the file's preset, for this model. Raises BadArtefact for another model's file."""
    recipe, geometry = header["recipe"], Geometry.from_record(header["geometry"])
    if recipe is None:
        raise PluginError(f"{path}: it was saved from a cache that compressors were given to, not a preset: make an "
                          "empty one like it and load(…, into=it)")  # fmt: skip
    if model is not None and recipe["fingerprint"] is not None:
        found = FROM_PRESETS.fingerprint_of(model)
        if found != recipe["fingerprint"]:
            raise BadArtefact(f"it was filled by {recipe['model']} (fingerprint {recipe['fingerprint']}), not by this "
                              f"model ({found}): load it with that one, or {AGAIN}")  # fmt: skip
    if difference := rotary_difference(recipe["rotary"], rotary(config or _config_of(model))):
        raise BadArtefact(f"it was filled by {recipe['model']} with other rotary positions than this model's "
                          f"({difference}): load it with that one, or {AGAIN}")  # fmt: skip
    preset = recipe["preset"] | {"folder": str(path.parent)}
    cache = FROM_PRESETS.create(preset, model=model, config=config, **recipe["windows"])
    known = all(layer.k is None or layer.k.heads for layer in geometry.layers)
    if known and cache.geometry != geometry == cache.geometry.without_windows():
        # Of a preset that says no layers, made without a model: it keeps what windows forget
        return FROM_PRESETS.create(preset, geometry=geometry, **recipe["windows"])
    if known and (difference := cache.geometry.difference(geometry)):
        raise BadArtefact(f"it is of another model: {difference}: load it with its own, or {AGAIN}")
    return cache


def _fill(cache, header: dict, tensors: dict[str, Tensor], device_of: Callable[[int], torch.device]) -> None:
    ids = tensors.pop("token_ids", None)
    contents.fill(cache, header["contents"], tensors, cache.geometry, device_of)
    shape, held = [header["rows"], header["tokens"]], [cache.rows, cache.get_seq_length()]
    if ids is None or ids.dtype != torch.int32 or list(ids.shape) != shape or shape != held:
        raise BadArtefact(f"it says that it holds tokens {shape}, which it doesn't: {AGAIN}")
    cache.held_tokens = HeldTokens(ids.long())


def _device_of(model, device) -> Callable[[int], torch.device]:
    """The device of each layer: where the model has its weights."""
    model = getattr(model, "model", model) if not hasattr(model, "named_parameters") else model
    if device is not None or model is None:
        return lambda index: torch.device(device or "cpu")
    devices = {}
    text = getattr(model, "get_decoder", lambda: None)() or model  # not the layers of a part that sees images
    for name, weight in text.named_parameters():
        found = re.search(r"\.(\d+)\.", name)  # the first number in a weight's name is its layer's
        if found and not weight.is_meta:
            devices.setdefault(int(found[1]), weight.device)
    return lambda index: devices.get(index, model.device)
