"""Preset files: read, found by name, listed."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from gpt2.common import files
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.presets.any_model import ANY_MODEL, preset_for_any_model
from gpt2.compression.presets.schema import check_preset
from gpt2.models.geometry import geometry_of
from gpt2.models.loading import LoadedModel, read_config

MOST_BYTES = 2**20  # of a preset file; as lists in memory it is twenty times that
BUILT_IN = (files.ROOT / "configs" / "presets", files.RESULTS / "presets")


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


def _refuse_constant(word: str):
    raise ValueError(f"{word} is no number that JSON has")


def _near(word: str, words) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
