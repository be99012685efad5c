"""Named caches: a name and a factory, made by preset or by policy. Evaluations compare them without knowing codecs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.presets.build import as_preset, compressors_from_preset, preset_for_shape, recipe_of
from gpt2.compression.presets.calibration_lookup import find_calibration
from gpt2.compression.presets.policies import preset_for_policy
from gpt2.compression.presets.preset_files import resolve_preset
from gpt2.compression.presets.schema import Preset
from gpt2.compression.settings import needs_calibration_file
from gpt2.models.loading import LoadedModel

NOT_RECORDED = {"trials", "refused_on_evaluation_text", "provenance", "folder"}


@dataclass(frozen=True)
class CacheChoice:
    """A compressed cache by name. make: a fresh cache; all of them share their compressors."""

    label: str
    preset: Preset
    make: Callable[[], CompressedDynamicCache]

    def record(self) -> dict:
        """The preset as results files have it: without the search that found it."""
        kept = {key: value for key, value in self.preset.record.items() if key not in NOT_RECORDED}
        return {"label": self.label} | kept

    def identity(self) -> dict:
        """What decides what the cache reads: `record`, and its calibration's digest where it doesn't say which."""
        record = self.record()
        if "calibrated_with" in record or not needs_calibration_file(self.preset.plan):
            return record
        return record | {"calibration_sha256": files.file_sha256(find_calibration(self.preset))}


def from_preset(
    preset: str | dict | Preset, loaded: LoadedModel, calibration: Calibration | None = None, **overrides: int
) -> CacheChoice:
    """A cache by a --preset value (a file, or the name of a built-in preset of the model) or by a preset.

    A model without weights takes the settings of any model's preset, scaled to its own shape.
    calibration: used in place of the preset's own. overrides: `sink_tokens` or `recent_tokens` other than the preset's.
    Raises PluginError where the preset or its calibration isn't of this model.
    """
    if not isinstance(loaded, LoadedModel):
        raise PluginError(f"expected a model as gpt2.models.loading.load returns it, got {type(loaded).__name__}")
    word = preset if isinstance(preset, (str, Path)) else None
    preset = as_preset(preset) if word is None else resolve_preset(word, loaded)
    preset = preset_for_shape(preset, loaded) if loaded.random_weights else preset
    preset, exact = preset.for_model(loaded.geometry, loaded.spec), preset.exact_tokens(**overrides)
    k, v = compressors_from_preset(preset, loaded.device, model=loaded, calibration=calibration)
    own = preset.record
    label = own.get("name") or word or f"{own['target']} rank {own['rank']}, {own['bits']} bits"
    made = {"geometry": preset.geometry, "recipe": recipe_of(preset, exact, loaded.spec, loaded)}
    return CacheChoice(str(label), preset, partial(CompressedDynamicCache, k, v, **made, **exact))


def from_policy(policy: str, loaded: LoadedModel, **overrides: int) -> CacheChoice:
    """A cache by a --policy value: what the policy of that name makes of this model."""
    preset = preset_for_policy(loaded.model.config, loaded.spec, policy, geometry=loaded.geometry)
    return from_preset(preset, loaded, **overrides)
