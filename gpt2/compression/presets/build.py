"""Presets: everything a compressed cache is made from, as a JSON that people pass around.

    cache = create_cache_from_preset(get_preset_info("smollm2-135m", "int4-vonly"))

`kv8` and `kv4` exist for every model, made from its config alone.

A preset's own keys are the guide's (`GUIDE_KEYS`); further keys have defaults, so that older files load. `layers` has a
setting for all layers' K or V, or a list with one for each layer.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import torch

from gpt2.common.errors import PluginError
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.codecs import Compressor, full_rank
from gpt2.compression.presets.calibration_lookup import calibration_of, check_geometry, made_by
from gpt2.compression.presets.preset_files import load_preset
from gpt2.compression.presets.schema import FIGURES, FORMAT, check_preset, plan_of
from gpt2.compression.settings import Plan, build, needs_calibration_file, plan_record
from gpt2.models.loading import LoadedModel

MOST_SHARED = 8  # presets whose compressors are kept for the next cache
_BUILT: dict[tuple, tuple[Calibration, tuple[list, list]]] = {}
_BUILDING = threading.Lock()  # threads that ask for the same at once share one, and none takes what another lets go


def create_cache_from_preset(
    preset: dict | str | Path,
    device: str | torch.device | None = None,
    *,
    model: LoadedModel | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: int,
) -> CompressedDynamicCache:
    """A fresh cache from a preset, a dict or a path.

    device: where the transforms are put at once; None moves each to its layer's device with the first tokens.
    model: checks that the calibration is of this model. dtype: of the transforms' arithmetic. overrides:
    `sink_tokens` or `recent_tokens` other than the preset's.
    """
    preset = _read(preset)
    k, v = compressors_from_preset(preset, device, model=model, dtype=dtype)
    if unknown := set(overrides) - {"sink_tokens", "recent_tokens"}:
        raise PluginError(f"create_cache_from_preset: unknown {', '.join(sorted(unknown))}")
    windows = {key: overrides.get(key, preset[key]) for key in ("sink_tokens", "recent_tokens")}
    return CompressedDynamicCache(k, v, num_layers=preset["num_layers"], **windows)


def compressors_from_preset(
    preset: dict | str | Path,
    device: str | torch.device | None = None,
    *,
    model: LoadedModel | None = None,
    dtype: torch.dtype = torch.float32,
    calibration: Calibration | None = None,
) -> tuple[list[Compressor], list[Compressor]]:
    """K and V compressors of a preset, to make many caches that share them; arguments as `create_cache_from_preset`.

    calibration: used in place of the preset's file.
    """
    preset = _read(preset)
    if model is not None:
        check_geometry(preset, model)
    plan = plan_of(preset)
    if calibration is None and needs_calibration_file(plan):
        if model is None or not model.random_weights:
            return _shared(plan, preset, model, dtype, device or "cpu")
        calibration = stand_in(model)
    return build(plan, preset["head_dim"], calibration, dtype=dtype, device=device or "cpu")


def _shared(plan: Plan, preset: dict, model: LoadedModel | None, dtype, device) -> tuple[list, list]:
    """Compressors of a preset with a file: those made before, as long as the file is the same.

    A basis may weigh more than a conversation, so that caches made one after another must not have one each.
    """
    with _BUILDING:
        calibration = calibration_of(preset, model)
        key = (id(calibration), json.dumps(plan_record(plan)), dtype, str(device))
        if key not in _BUILT:
            while len(_BUILT) >= MOST_SHARED:
                _BUILT.pop(next(iter(_BUILT)))
            # The calibration stays with what was made of it, so that its id isn't another's
            _BUILT[key] = (calibration, build(plan, preset["head_dim"], calibration, dtype=dtype, device=device))
        k, v = _BUILT[key][1]
    return list(k), list(v)


def preset_for_shape(preset: dict, model: LoadedModel) -> dict:
    """A preset on a model without weights, which has other layers: settings without figures, for speed and memory."""
    head_dim, L = model.geometry.head_dim, model.geometry.num_layers
    layers = preset.get("layers")
    if preset["num_layers"] != L and any(isinstance(settings, list) for settings in (layers or {}).values()):
        raise PluginError(f"preset for {preset['model']} has a setting for each of {preset['num_layers']} layers: "
                          f"it can't be put on {L}")  # fmt: skip

    def scaled(setting: dict) -> dict:
        """All coordinates stay all, a share of them stays that share."""
        old, new = (full_rank(setting["codec"], width) for width in (preset["head_dim"], head_dim))
        rank = old if setting["rank"] is None else setting["rank"]
        return {"rank": new if rank == old else min(max(round(rank * head_dim / preset["head_dim"]), 1), new)}

    shape = {"num_layers": L, "head_dim": head_dim, **scaled(preset)}
    if layers:
        shape["layers"] = {
            side: settings | scaled(settings) if isinstance(settings, dict) else [s and s | scaled(s) for s in settings]
            for side, settings in layers.items()
        }
    measured = (*FIGURES, "figures", "figures_from", "made_by", "trials", "provenance")
    return check_preset({key: value for key, value in preset.items() if key not in measured} | shape)


def new_preset(
    loaded: LoadedModel,
    calibration: Calibration | None,
    calibration_file: str,
    *,
    compression_ratio: float,
    measured: dict,
    **more,
) -> dict:
    """A preset from what a search found.

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
    return check_preset(preset | more, "new preset")


def _read(preset: dict | str | Path) -> dict:
    return load_preset(preset) if isinstance(preset, (str, Path)) else check_preset(preset)
