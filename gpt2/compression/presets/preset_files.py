"""Preset files: read, found by name, listed."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from gpt2.common import files, tensor_file
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import Anything, Record, read_json
from gpt2.common.schema import parse as parse_record
from gpt2.compression.presets.any_model import ANY_MODEL, preset_for_any_model
from gpt2.compression.presets.schema import DEFAULTS, Preset, parse
from gpt2.models.loading import LoadedModel, read_config, slug_of
from gpt2.models.probe import geometry_of

# The guide's presets, then those that were measured here: of two with the same name, the second counts
BUILT_IN = (files.ROOT / "configs" / "presets", files.RESULTS / "presets")


def get_preset_info(model: str, name: str) -> dict:
    """A built-in preset as a dict of the caller's own, which `create_cache_from_preset` validates.

    model: as in `built_in_presets`; for `kv8` and `kv4` any folder or hub id, of which only the config is read.
    Raises PluginError, listing what exists, for an unknown name.
    """
    if preset := _built_in(model, name):
        return preset
    if name in ANY_MODEL:
        config = read_config(model)
        return preset_for_any_model(name, model, geometry_of(config, model)[0])
    known = built_in_presets()
    if model not in known:
        raise PluginError(
            f"no built-in presets for model {model!r}{_near(model, known)} (there are some for: {', '.join(known)}): "
            f"{' and '.join(ANY_MODEL)} work with any model, and scripts/make_presets.py --model {model} makes others"
        )
    raise PluginError(_no_preset(name, f" for {model}", [*known[model], *ANY_MODEL]))


def resolve_preset(preset: str | Path, model: LoadedModel | str) -> Preset:
    """A --preset value: a file where there is one or it looks like one, else a built-in preset of the model.

    A model without weights has no presets of its own: it takes another model's preset of that name, of the same
    head_dim if there is one.
    """
    if str(preset).endswith(".json") or os.path.isfile(preset):
        return read_preset(preset)
    name = str(preset)
    if isinstance(model, str):
        return parse(get_preset_info(model, name), name)
    if name in ANY_MODEL and not _built_in(model.spec, name):
        return parse(preset_for_any_model(name, model.spec, model.geometry), name)
    if not model.random_weights:
        return parse(get_preset_info(model.spec, name), name)
    known = built_in_presets()
    named = [read_preset(names[name]) for names in known.values() if name in names]
    if not named:
        raise PluginError(_no_preset(name, "", sorted({*ANY_MODEL, *(name for n in known.values() for name in n)})))
    return min(named, key=lambda found: found.head_dim != model.geometry.head_dim)


def _built_in(model: str, name: str) -> dict | None:
    """A built-in preset, read from the file that `scripts/make_presets.py` names so; else from any that says it is."""
    for folder in reversed(BUILT_IN):
        path = folder / f"{slug_of(model)}-{name}.json"
        if os.path.isfile(path):
            preset = load_preset(path)
            if preset.get("model") == model and preset.get("name") == name:
                return preset
    path = built_in_presets().get(model, {}).get(name)
    return path and load_preset(path)


def built_in_presets() -> dict[str, dict[str, Path]]:
    """Model to preset name to file, of all that lie in `BUILT_IN`."""
    known: dict[str, dict[str, Path]] = {}
    for path in (path for folder in BUILT_IN for path in sorted(folder.glob("*.json"))):
        preset = load_preset(path)
        known.setdefault(str(preset.get("model")), {})[str(preset.get("name", path.stem))] = path
    return known


def read_preset(path: str | Path) -> Preset:
    """A preset file, validated. Raises PluginError where there is none, BadArtefact where it isn't a valid preset."""
    return parse(load_preset(path), str(path))


def load_preset(path: str | Path) -> dict:
    """A preset file as a dict of the caller's own, which `create_cache_from_preset` validates.

    It has the file's folder as one more key, so that its calibration is also looked for there.
    """
    path = Path(path)
    if not os.path.exists(path):  # which takes any name, a pathlib.Path no long one
        raise PluginError(
            f"no preset file {path}: make one with scripts/auto_tune_kv_compression.py; a built-in preset comes from "
            f"get_preset_info(model, {path.name!r})"
        )
    if path.suffix in tensor_file.SUFFIXES:
        raise BadArtefact(f"{path}: a calibration, not a preset: give the preset's .json file, which names it")
    preset = parse_record(read_json(path, "preset"), Record(others=Anything()), path)
    return DEFAULTS | preset | {"folder": str(path.parent)}


def _no_preset(name: str, for_model: str, there_are: list[str]) -> str:
    return f"no preset {name!r}{for_model}{_near(name, there_are)} (there are: {', '.join(there_are)})"


def _near(word: str, words) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
