"""Caches made from presets: the preset's settings, its calibration where they need one, and compressors of both.

    cache = create_cache_from_preset(get_preset_info("smollm2-135m", "int4-vonly"))

A preset has the guide's keys (`schema.GUIDE_KEYS`) and keys of ours, which have defaults, so that older files load.
`layers` has one setting for K or V of all layers, or a list with one for each layer.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

import torch

from gpt2.common.errors import PluginError
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import Compressor, full_rank
from gpt2.compression.presets.calibration_lookup import calibration_of, check_geometry, made_by
from gpt2.compression.presets.preset_files import read_preset
from gpt2.compression.presets.schema import FIGURES, FORMAT, Preset, parse
from gpt2.compression.settings import build, needs_calibration_file
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel

_BUILDING = threading.Lock()  # so that threads that ask for the same compressors at the same time share them


def create_cache_from_preset(
    preset: Preset | dict | str | Path,
    device: str | torch.device | None = None,
    *,
    model: LoadedModel | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: int,
) -> CompressedDynamicCache:
    """A fresh cache from a preset: as a JSON object, a path, or validated already.

    device: where the transforms are put at once; None moves each to its layer's device with the first tokens.
    model: checks that the calibration is of this model. dtype: of the transforms' arithmetic. overrides:
    `sink_tokens` or `recent_tokens` other than the preset's.
    """
    preset = as_preset(preset)
    windows = preset.windows(**overrides)
    k, v = compressors_from_preset(preset, device, model=model, dtype=dtype)
    return CompressedDynamicCache(k, v, num_layers=preset.num_layers, **windows)


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
    if model is not None:
        check_geometry(preset, model)
    device = device or "cpu"
    if calibration is None and needs_calibration_file(preset.plan):
        if model is None or not model.random_weights:
            settings = tuple(preset.plan["k"]), tuple(preset.plan["v"])
            with _BUILDING:
                k, v = shared_compressors(calibration_of(preset, model), *settings, dtype, device)
            return list(k), list(v)
        calibration = stand_in(model)
    geometry = calibration.geometry if calibration else Geometry.uniform(preset.num_layers, 1, preset.head_dim)
    return build(preset.plan, geometry, calibration, dtype=dtype, device=device)


@lru_cache(maxsize=8)
def shared_compressors(calibration: Calibration, k: tuple, v: tuple, dtype: torch.dtype, device) -> tuple[list, list]:
    """Compressors of a calibration and settings, made once: caches that are made one after another share them.

    A basis may take more memory than a conversation. A calibration is one object as long as its file is unchanged.
    """
    return build({"k": k, "v": v}, calibration.geometry, calibration, dtype=dtype, device=device)


def preset_for_shape(preset: Preset, model: LoadedModel) -> Preset:
    """A preset on a model without weights, which has other layers: settings without figures, for speed and memory."""
    head_dim, L, record = model.geometry.head_dim, model.geometry.num_layers, preset.record
    layers = record.get("layers")
    if preset.num_layers != L and any(isinstance(settings, list) for settings in (layers or {}).values()):
        raise PluginError(f"preset for {preset.model} has a setting for each of {preset.num_layers} layers: "
                          f"it can't be put on {L}")  # fmt: skip

    def scaled(setting: dict) -> dict:
        """A rank that is all coordinates stays so; any other keeps its share of head_dim."""
        old, new = (full_rank(setting["codec"], width) for width in (preset.head_dim, head_dim))
        rank = old if setting["rank"] is None else setting["rank"]
        return {"rank": new if rank == old else min(max(round(rank * head_dim / preset.head_dim), 1), new)}

    shape = {"num_layers": L, "head_dim": head_dim, **scaled(record)}
    if layers:
        shape["layers"] = {
            side: settings | scaled(settings) if isinstance(settings, dict) else [s and s | scaled(s) for s in settings]
            for side, settings in layers.items()
        }
    measured = (*FIGURES, "figures", "figures_from", "made_by", "trials", "provenance")
    return parse({key: value for key, value in record.items() if key not in measured} | shape)


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
        "head_dim": loaded.geometry.head_dim,
        "num_layers": loaded.geometry.num_layers,
        "format": FORMAT,
        "figures": measured,
    }
    if calibration:
        preset["made_by"] = made_by(calibration.meta, calibration_file)
    return parse(preset | more, "new preset").record
