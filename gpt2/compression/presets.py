"""Presets: everything a compressed cache is made from, as a JSON that people pass around.

    cache = create_cache_from_preset(get_preset_info("smollm2-135m", "int4-vonly"))

`kv8` and `kv4` exist for every model, made from its config alone.

A preset's own keys are the guide's (`GUIDE_KEYS`); further keys have defaults, so that older files load. `layers` has a
setting for all layers' K or V, or a list with one for each layer.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import threading
from pathlib import Path

import torch

from gpt2 import results
from gpt2.compression.calibration import SIDES, Calibration, stand_in
from gpt2.compression.calibration_free import ANY_MODEL, preset_for_any_model
from gpt2.compression.codecs import BITS, Compressor, bases_in, codec_name, full_rank, needs_calibration, quantizer_of
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.plan import TARGETS, Plan, Setting, build, needs_calibration_file, plan_record, uniform
from gpt2.compression.preset_calibration import calibration_of, check_geometry, made_by
from gpt2.errors import BadArtefact, PluginError, brief
from gpt2.layout import geometry_of
from gpt2.models import LoadedModel, read_config

FORMAT = "kv-plugin-preset/1"
GUIDE_KEYS = {
    "model": str,
    "rank": int,
    "target": str,
    "bits": (int, float),
    "compression_ratio": float,
    "baseline_ppl": float,
    "compressed_ppl": float,
    "ppl_delta": float,
    "calibration_file": str,
    "head_dim": int,
    "num_layers": int,
}
# Figures may be unknown (null); without the rest there is no cache to make
FIGURES = ("compression_ratio", "baseline_ppl", "compressed_ppl", "ppl_delta")
DEFAULTS = {"format": FORMAT, "codec": "pca", "quantizer": None, "sink_tokens": 4, "recent_tokens": 0}
MOST_SHARED = 8  # presets whose compressors are kept for the next cache
_BUILT: dict[tuple, tuple[Calibration, tuple[list, list]]] = {}
_BUILDING = threading.Lock()  # threads that ask for the same at once share one, and none takes what another lets go
# Beyond any model's, and small enough that a preset of a few bytes can't ask for a machine's memory
RANGES = {"num_layers": (1, 1024), "head_dim": (1, 1024), "sink_tokens": (0, 2**31), "recent_tokens": (0, 2**31)}
TEXTS = {"model": 4096, "calibration_file": 4096, "folder": 4096, "name": 200}  # letters
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")  # what isn't read but obeyed
MOST_BYTES = 2**20  # of a preset file; as lists in memory it is twenty times that
LONGEST_CODEC = 200  # letters
# Of all layers together: codecs, each fitted to all statistics; bases joined in one; and numbers in bases that aren't
# calibrated, each as large as head_dim squared and made for every setting
MOST_CODECS, MOST_BASES, MOST_NUMBERS = 8, 4, 2**23
BUILT_IN = (results.ROOT / "configs" / "presets", results.RESULTS / "presets")


def get_preset_info(model: str, name: str) -> dict:
    """A built-in preset as a dict of the caller's own. Raises PluginError, listing what exists, for an unknown name.

    model: as in `built_in_presets`; for `kv8` and `kv4` any folder or hub id, of which only the config is read.
    """
    known = built_in_presets()
    if name in known.get(model, {}):
        return load_preset(known[model][name])
    if name in ANY_MODEL:
        config = read_config(model)
        return check_preset(preset_for_any_model(name, model, geometry_of(config, model)[0], config), name)
    if model not in known:
        raise PluginError(
            f"no built-in presets for model {model!r}{_near(model, known)} (there are some for: {', '.join(known)}), "
            f"only those of any: {', '.join(ANY_MODEL)}; make one with scripts/auto_tune_kv_compression.py"
        )
    raise PluginError(_no_preset(name, f" for {model}", [*known[model], *ANY_MODEL]))


def resolve_preset(preset: str | Path, model: LoadedModel | str) -> dict:
    """A --preset value: a file where there is one or it looks like one, else a built-in preset of the model.

    A model without weights has none of its own: it takes another's of that name, of the same head_dim if there is one.
    """
    if str(preset).endswith(".json") or os.path.isfile(preset):
        return load_preset(preset)
    preset = str(preset)
    if isinstance(model, str):
        return get_preset_info(model, preset)
    known = built_in_presets()
    if preset in ANY_MODEL and preset not in known.get(model.spec, {}):
        return check_preset(preset_for_any_model(preset, model.spec, model.geometry, model.model.config), preset)
    if not model.random_weights:
        return get_preset_info(model.spec, preset)
    named = [load_preset(names[preset]) for names in known.values() if preset in names]
    if not named:
        raise PluginError(_no_preset(preset, "", sorted({*ANY_MODEL, *(name for n in known.values() for name in n)})))
    return min(named, key=lambda found: found["head_dim"] != model.geometry.head_dim)


def _no_preset(name: str, for_model: str, there_are: list[str]) -> str:
    return f"no preset {name!r}{for_model}{_near(name, there_are)} (there are: {', '.join(there_are)})"


def built_in_presets() -> dict[str, dict[str, Path]]:
    """Model to preset name to file: configs/presets has the guide's, results/presets what was measured here."""
    known: dict[str, dict[str, Path]] = {}
    for path in sorted(path for folder in BUILT_IN for path in folder.glob("*.json")):
        preset = load_preset(path)
        known.setdefault(preset["model"], {})[preset.get("name", path.stem)] = path
    return known


def load_preset(path: str | Path) -> dict:
    """Read and check a preset file; its calibration is then also looked for beside it."""
    path = Path(path)
    if not os.path.exists(path):  # which takes any name, a pathlib.Path no long one
        raise PluginError(f"no preset file {path}: make one with scripts/auto_tune_kv_compression.py")
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise BadArtefact(f"{path}: not a readable preset: expected a file of at most {MOST_BYTES:,} bytes")
    try:
        preset = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise BadArtefact(f"{path}: not a readable preset: {error}") from error
    return check_preset(preset, str(path)) | {"folder": str(path.parent)}


def check_preset(preset: dict, where: str = "preset") -> dict:
    """A preset with its defaults filled in. Raises BadArtefact for a missing key or an absurd value, naming it."""
    if not isinstance(preset, dict):
        raise BadArtefact(f"{where}: expected a JSON object, found {type(preset).__name__}")
    preset = DEFAULTS | preset

    def expect(good: bool, key: str, expected: str) -> None:
        if not good:
            raise BadArtefact(f"{where}: key {key!r}: expected {expected}, found {brief(preset.get(key))}")

    for key, kind in GUIDE_KEYS.items():
        value = preset.get(key)
        if key in FIGURES:
            number = type(value) in (int, float) and abs(value) < 1e15  # which NaN isn't
            expect(value is None or (number and value > (-1 if key == "ppl_delta" else 0)), key, kind.__name__)
        elif key != "bits":  # whose kind depends on the quantizer
            expect(type(value) is kind, key, kind.__name__)
    for key, most in TEXTS.items():
        text = preset.get(key, "")
        expect(type(text) is str and len(text) <= most and not CONTROL.search(text), key, f"up to {most} letters")
    expect(isinstance(preset.get("calibrated_with", {}), dict), "calibrated_with", "an object of calibration metadata")
    expect(preset["format"] == FORMAT, "format", repr(FORMAT))
    expect(preset["target"] in TARGETS, "target", "v, k or kv")
    for key, (least, most) in RANGES.items():
        right = type(preset[key]) is int and least <= preset[key] <= most
        expect(right, key, f"a whole number from {least} to {most}")
    _check_setting(preset, preset["head_dim"], where)
    if preset.get("layers") is not None:
        _check_layers(preset, where)
    _check_work(preset, where)
    return preset


def _check_setting(setting: dict, head_dim: int, where: str) -> None:
    """Raise BadArtefact unless codec, rank and bits exist and fit together."""
    most = full_rank_of(setting["codec"], head_dim, where)
    rank, bits, quantizer = setting["rank"], setting.get("bits"), setting.get("quantizer")
    if type(rank) is not int or not 1 <= rank <= most:
        full = f"1 to head_dim {most}" if most == head_dim else f"1 to {most}, as {setting['codec']} has coordinates"
        raise BadArtefact(f"{where}: key 'rank': expected {full}, found {brief(rank)}")
    if quantizer is None and (type(bits) is not int or bits not in BITS):
        raise BadArtefact(f"{where}: key 'bits': expected {' or '.join(map(str, sorted(BITS)))}, found {brief(bits)}")
    if type(bits) not in (int, float):
        raise BadArtefact(f"{where}: key 'bits': expected a number, found {brief(bits)}")
    try:
        quantizer_of(quantizer, bits)
    except (PluginError, TypeError) as error:
        raise BadArtefact(f"{where}: keys 'quantizer' and 'bits': {error}") from error


def full_rank_of(codec, head_dim: int, where: str) -> int:
    """Coordinates of a preset's codec. Raises BadArtefact for a name that isn't one's."""
    if type(codec) is not str or len(codec) > LONGEST_CODEC:
        raise BadArtefact(f"{where}: key 'codec': expected a codec's name, found {brief(codec)}")
    try:
        return full_rank(codec_name(codec), head_dim)
    except PluginError as error:
        raise BadArtefact(f"{where}: key 'codec': {error}") from error


def _check_layers(preset: dict, where: str) -> None:
    """Raise BadArtefact unless `layers` has, for K, V or both, a setting for all layers or a list with one for each."""
    layers, L = preset["layers"], preset["num_layers"]
    if not isinstance(layers, dict) or not layers or set(layers) - set(SIDES):
        raise BadArtefact(f"{where}: key 'layers': expected an object with 'k', 'v' or both, found {brief(layers)}")
    for side, settings in layers.items():
        if isinstance(settings, dict):
            _check_layer(settings, preset["head_dim"], f"{where}: layers.{side}")
            continue
        if not isinstance(settings, list) or len(settings) != L:
            found = len(settings) if isinstance(settings, list) else type(settings).__name__
            raise BadArtefact(f"{where}: key 'layers.{side}': expected a list of {L} entries, found {found}")
        for layer, setting in enumerate(settings):
            if setting is not None:
                _check_layer(setting, preset["head_dim"], f"{where}: layers.{side}[{layer}]")


def _check_layer(setting: dict, head_dim: int, place: str) -> None:
    if not isinstance(setting, dict) or set(setting) - {"quantizer"} != {"codec", "rank", "bits"}:
        raise BadArtefact(f"{place}: expected null or codec, rank and bits, found {brief(setting)}")
    full = full_rank_of(setting["codec"], head_dim, place)
    _check_setting(setting | ({"rank": full} if setting["rank"] is None else {}), head_dim, place)


def _check_work(preset: dict, where: str) -> None:
    """Raise BadArtefact where what a preset asks for is right, but would take minutes or a machine's memory."""
    settings = {setting for side in plan_of(preset).values() for setting in side if setting}
    bases = {setting.codec: len(bases_in(setting.codec)) for setting in settings}
    if sum(map(bool, bases.values())) > MOST_CODECS or max(bases.values(), default=0) > MOST_BASES:
        raise BadArtefact(f"{where}: expected at most {MOST_CODECS} codecs, each of at most {MOST_BASES} bases")
    fixed = [bases[setting.codec] for setting in settings if not needs_calibration(setting.codec)]
    numbers = sum(fixed) * preset["head_dim"] ** 2
    if numbers > MOST_NUMBERS:
        raise BadArtefact(
            f"{where}: its settings ask for bases of {numbers:,} numbers: expected {MOST_NUMBERS:,} at most"
        )


def plan_of(preset: dict) -> Plan:
    """What a preset stores each layer's K and V with: its `layers` where it has them, else one setting for all."""
    L = preset["num_layers"]
    if layers := preset.get("layers"):
        plan = {side: layers.get(side) or [None] * L for side in SIDES}
        plan = {side: [settings] * L if isinstance(settings, dict) else settings for side, settings in plan.items()}
        return {side: [setting and Setting(**setting) for setting in settings] for side, settings in plan.items()}
    return uniform(preset["target"], L, Setting(preset["codec"], preset["rank"], preset["bits"], preset["quantizer"]))


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


def _refuse_constant(word: str):
    raise ValueError(f"{word} is no number that JSON has")


def _near(word: str, words) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
