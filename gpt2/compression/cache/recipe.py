"""What a cache was made from, so that one like it can be made elsewhere: a preset, its model, and exact tokens.

Presets come after the cache in the order of packages, so what makes a cache of one is given from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Of a preset: what says nothing of how tokens are stored, and the folder on this machine
LEFT_OUT = {"trials", "refused_on_evaluation_text", "provenance", "folder", "figures"}


@dataclass(frozen=True)
class Recipe:
    """preset: its JSON object. model: names the model. fingerprint: of the model, None where it isn't known.

    windows: numbers of exact tokens, `sink_tokens` and `recent_tokens`. rotary: numbers of the model's rotary
    positions, as `probe.rotary` gives them; empty where they aren't known.
    """

    preset: dict
    model: str
    fingerprint: str | None
    windows: dict[str, int]
    rotary: dict[str, float] = field(default_factory=dict)

    def record(self, kept_in: Path) -> dict:
        """As a JSON object of a file in folder `kept_in`, from which a calibration beside the preset is named."""
        preset = {key: value for key, value in self.preset.items() if key not in LEFT_OUT}
        given, folder = preset.get("calibration_file"), self.preset.get("folder")
        if given and folder and not Path(given).is_absolute() and (found := Path(folder) / given).is_file():
            preset["calibration_file"] = os.path.relpath(found.resolve(), kept_in.resolve())
        about = {"preset": preset, "model": self.model, "fingerprint": self.fingerprint, "windows": self.windows}
        return about | ({"rotary": self.rotary} if self.rotary else {})


class _FromPresets:
    create: Callable | None = None  # create_cache_from_preset
    fingerprint_of: Callable | None = None


FROM_PRESETS = _FromPresets()
