"""Which compressed cache a script was told to use: by preset or by policy, as one thing that evaluation takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.presets.build import compressors_from_preset, preset_for_shape
from gpt2.compression.presets.policies import preset_for_policy
from gpt2.compression.presets.preset_files import resolve_preset
from gpt2.models.loading import LoadedModel


@dataclass(frozen=True)
class CacheChoice:
    """A compressed cache by name. preset: the dict it is made from; make: a fresh cache, sharing its compressors."""

    label: str
    preset: dict
    make: Callable[[], CompressedDynamicCache]

    def record(self) -> dict:
        """What results files say of it: the preset without the search that found it."""
        left_out = {"trials", "refused_on_evaluation_text", "provenance", "folder"}
        return {"label": self.label} | {key: value for key, value in self.preset.items() if key not in left_out}


def from_preset(
    preset: str | dict, loaded: LoadedModel, calibration: Calibration | None = None, **overrides: int
) -> CacheChoice:
    """A --preset value (a file, or the name of a built-in preset of the model) or a preset as a dict.

    A model without weights takes the settings of any preset, for it has none of its own.

    calibration: used in place of the preset's own. overrides: `sink_tokens` or `recent_tokens` other than the preset's.
    Raises PluginError where the preset or its calibration isn't of this model.
    """
    label = str(preset) if not isinstance(preset, dict) else ""
    if not isinstance(preset, dict):
        preset = resolve_preset(preset, loaded)
    preset = preset_for_shape(preset, loaded) if loaded.random_weights else preset
    k, v = compressors_from_preset(preset, loaded.device, model=loaded, calibration=calibration)
    windows = {key: overrides.get(key, preset[key]) for key in ("sink_tokens", "recent_tokens")}
    name = preset.get("name") or label or f"{preset['target']} rank {preset['rank']}, {preset['bits']} bits"
    return CacheChoice(name, preset, partial(CompressedDynamicCache, k, v, **windows))


def from_policy(policy: str, loaded: LoadedModel, **overrides: int) -> CacheChoice:
    """A --policy value: the cache that the policy of that name makes of this model."""
    preset = preset_for_policy(loaded.model.config, loaded.spec, policy, geometry=loaded.geometry)
    return from_preset(preset, loaded, **overrides)
