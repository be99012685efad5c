"""Caches made from presets: the preset's settings, its calibration where they need one, and compressors of both.

    cache = create_cache_from_preset(get_preset_info("smollm2-135m", "int4-vonly"))

A preset has the guide's keys (`schema.GUIDE_KEYS`) and keys of ours, which have defaults, so that older files load.
`layers` has one setting for K or V of all layers, or a list with one for each layer. `cache_layers` says what each
layer of the cache is: presets without it, as the guide's, are for full attention in all, unless a model or config
tells.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from gpt2.common.errors import PluginError, brief, first_line
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.cache.recipe import FROM_PRESETS, Recipe
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import Compressor, full_rank
from gpt2.compression.presets.any_model import shape_keys
from gpt2.compression.presets.calibration_lookup import calibration_of, made_by
from gpt2.compression.presets.preset_files import read_preset
from gpt2.compression.presets.schema import FIGURES, FORMAT, Preset, parse
from gpt2.compression.settings import TARGETS, build, needs_calibration_file
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel, described
from gpt2.models.probe import fingerprint, geometry_of, rotary
from gpt2.models.support import warn_of_drop, warn_of_positions

EXPECTED = {
    "model": "a loaded model, not its name or folder: from_pretrained gives one",
    "config": "a model's config, such as model.config",
    "geometry": "the layers of a cache, such as those of loading.load(...).geometry",
    "dtype": "a dtype of PyTorch, such as torch.float32",
}  # arguments of create_cache_from_preset, for errors
_BUILDING = threading.Lock()  # so that threads that ask for the same compressors at the same time share them


def create_cache_from_preset(
    preset: Preset | dict | str | Path,
    device: str | torch.device | None = None,
    *,
    model: LoadedModel | PreTrainedModel | None = None,
    config: PretrainedConfig | None = None,
    geometry: Geometry | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: int,
) -> CompressedDynamicCache:
    """A fresh cache from a preset: as a JSON object, a path, or validated already.

    device: where the transforms are put at once; None moves each to its layer's device with the first tokens.
    model: checks that preset and calibration are of this model, and tells the layers where the preset doesn't. config:
    of a model, for the layers alone; or geometry, these layers. dtype: of the transforms' arithmetic. overrides:
    `sink_tokens` or `recent_tokens` other than the preset's. Raises BadArtefact for a preset of other layers, naming
    the first, and PluginError for an argument of another kind and a device that isn't there.
    """
    for name, value, kinds in (
        ("model", model, (LoadedModel, PreTrainedModel)), ("config", config, PretrainedConfig),
        ("geometry", geometry, Geometry), ("dtype", dtype, torch.dtype),
    ):  # fmt: skip
        if value is not None and not isinstance(value, kinds):
            found = brief(value) if isinstance(value, str) else type(value).__name__
            raise PluginError(f"{name}: expected {EXPECTED[name]}, got {found}")
    preset = as_preset(preset)
    exact = preset.exact_tokens(**overrides)
    spec = getattr(model, "spec", None)
    if isinstance(model, PreTrainedModel):
        spec = model.config.name_or_path or model.config.model_type
        model = described(model, model.config.name_or_path or preset.model)
    if model is None and config is not None:
        spec = config.name_or_path or config.model_type
        warn_of_positions(config)
        preset = preset.for_model(geometry_of(config, spec)[0], spec)
    elif model is not None:
        preset = preset.for_model(model.geometry, spec)
    elif geometry is not None:
        preset = preset.for_model(geometry, preset.model)
    else:
        warn_of_drop(preset.model, preset.geometry.drops_at)
    k, v = compressors_from_preset(preset, device, model=model, dtype=dtype)
    recipe = recipe_of(preset, exact, spec or preset.model, model)
    return CompressedDynamicCache(k, v, geometry=preset.geometry, recipe=recipe, **exact)


def check_device(device: str | torch.device | None) -> None:
    """Raise PluginError unless tensors can be put on a device; None means that it is chosen later."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch raises each of them for some devices
        raise PluginError(f"device {brief(device)} can't be used ({first_line(error)}): give 'cpu', a GPU of this "
                          "machine such as 'cuda:0', or None") from error  # fmt: skip


def recipe_of(preset: Preset, exact: dict[str, int], spec: str, model: LoadedModel | None) -> Recipe:
    """What a cache of a preset is made from, as a file of it says it."""
    known = None if model is None or model.random_weights else model.fingerprint
    return Recipe(preset.record, spec, known, exact, rotary(model.model.config) if known else {})


def fingerprint_of(model: LoadedModel | PreTrainedModel) -> str:
    """The hash that tells a model from others."""
    return fingerprint(model) if isinstance(model, PreTrainedModel) else model.fingerprint


def as_preset(preset: Preset | dict | str | Path) -> Preset:
    """A preset in any form that callers have, validated unless it is already."""
    if isinstance(preset, Preset):
        return preset
    return read_preset(preset) if isinstance(preset, (str, Path)) else parse(preset)


def compressors_from_preset(
    preset: Preset,
    device: str | torch.device | None = None,
    *,
    model: LoadedModel | None = None,
    dtype: torch.dtype = torch.float32,
    calibration: Calibration | None = None,
) -> tuple[list[Compressor], list[Compressor]]:
    """K and V compressors of a preset, to make many caches that share them; arguments as `create_cache_from_preset`.

    calibration: used in place of the preset's file.
    """
    check_device(device)
    if model is not None:
        preset = preset.for_model(model.geometry, model.spec)
    device = device or "cpu"
    if calibration is None and needs_calibration_file(preset.plan):
        if model is None or not model.random_weights:
            settings = tuple(preset.plan["k"]), tuple(preset.plan["v"])
            with _BUILDING:
                k, v = shared_compressors(
                    calibration_of(preset, model), *settings, preset.geometry, preset.context_length, dtype, device
                )
            return list(k), list(v)
        calibration = stand_in(model)
    return build(
        preset.plan, preset.geometry, calibration, context_length=preset.context_length, dtype=dtype, device=device
    )


@lru_cache(maxsize=8)
def shared_compressors(
    calibration: Calibration, k: tuple, v: tuple, geometry: Geometry, context_length: int | None, dtype: torch.dtype,
    device,
) -> tuple[list, list]:  # fmt: skip
    """Compressors of a calibration and settings, made once: caches that are made one after another share them.

    A basis may take more memory than a conversation. A calibration is one object as long as its file is unchanged.
    """
    plan = {"k": k, "v": v}
    return build(plan, geometry, calibration, context_length=context_length, dtype=dtype, device=device)


def preset_for_shape(preset: Preset, model: LoadedModel) -> Preset:
    """A preset on a model without weights, which has other layers: settings without figures, for speed and memory."""
    head_dim, L, uneven = model.geometry.head_dim, model.geometry.num_layers, not model.geometry.alike
    measured = (*FIGURES, "figures", "figures_from", "made_by", "trials", "provenance")
    record = {key: value for key, value in preset.record.items() if key not in measured}
    layers = record.get("layers")
    if preset.geometry == model.geometry:
        return parse(record)
    if preset.num_layers != L and any(isinstance(settings, list) for settings in (layers or {}).values()):
        raise PluginError(f"preset for {preset.model} has a setting for each of {preset.num_layers} layers: "
                          f"it can't be put on {L}")  # fmt: skip

    def scaled(setting: dict) -> int:
        """A rank that is all coordinates stays so; any other keeps its share of head_dim."""
        old, new = (full_rank(setting["codec"], width) for width in (preset.head_dim, head_dim))
        rank = old if setting["rank"] is None else setting["rank"]
        return new if rank == old else min(max(round(rank * head_dim / preset.head_dim), 1), new)

    def put(setting: dict) -> dict:
        """A layer's setting. All coordinates are no number where layers, or K and V, differ in it."""
        rank = scaled(setting)
        whole = uneven and rank == full_rank(setting["codec"], head_dim)
        return setting | {"rank": None if whole else rank}

    shape = {"cache_layers": None, "drops_at": None, **shape_keys(model.geometry), "rank": scaled(record)}
    if uneven and not layers:
        own = {key: record[key] for key in ("codec", "rank", "bits", "quantizer")}
        layers = dict.fromkeys(TARGETS[record["target"]], own)
    if layers:
        shape["layers"] = {
            side: put(settings) if isinstance(settings, dict) else [s and put(s) for s in settings]
            for side, settings in layers.items()
        }
    return parse(record | shape)


def new_preset(
    loaded: LoadedModel,
    calibration: Calibration | None,
    calibration_file: str,
    *,
    compression_ratio: float,
    measured: dict,
    **more,
) -> dict:
    """A preset from what a search found, as the JSON object to be written.

    measured: as `perplexity.compare` gives it. more: target, rank, bits, codec, sink_tokens and any further key.
    """
    preset = {
        "model": loaded.spec,
        "compression_ratio": round(compression_ratio, 4),
        "baseline_ppl": round(measured["baseline_ppl"], 4),
        "compressed_ppl": round(measured["ppl"], 4),
        "ppl_delta": round(measured["ppl_delta"], 6),
        "calibration_file": calibration_file,
        **shape_keys(loaded.geometry),
        "format": FORMAT,
        "figures": measured,
    }
    if calibration:
        preset["made_by"] = made_by(calibration.meta, calibration_file)
    return parse(preset | more, "new preset").record


FROM_PRESETS.create, FROM_PRESETS.fingerprint_of = create_cache_from_preset, fingerprint_of
