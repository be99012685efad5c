"""Presets by ratio: one measured codec, a preset for every compression ratio that people ask for.

    calibration = compact_calibration(loaded, text, path, codec="joint", samples=48)
    presets = [make_ratio_preset(loaded, calibration, ratio) for ratio in RATIOS]

A codec of several heads says what its presets are called: kv-4x is of joint, which loses least, and fast-4x of grouped,
which attention reads as it is stored.

All presets share one compact calibration file; they differ in bits alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.cache import size
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.calibrate import calibrate, calibration_key
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.reuse import find_reusable
from gpt2.compression.codecs import BASES, adjustable_quantizers
from gpt2.compression.presets.build import new_preset
from gpt2.compression.settings import compressors_for
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.models.loading import LoadedModel
from gpt2.text.windows import Text

RATIOS = (2.0, 3.5, 4.0, 4.6, 5.3, 6.4, 8.0)
TOKENS = 2048  # of the sequence at which the ratio is meant
MADE_FROM = ("fingerprint", "text_sha256", "samples", "seq_len", "seed", "sink_tokens")  # a preset's figures hold for
STEP = 0.01  # bits by which a preset gives way until its ratio holds


@dataclass(frozen=True)
class RatioPreset:
    """A cache of at least `ratio`. compression_ratio: what it has; bits: per coordinate; make: fresh caches."""

    codec: str
    quantizer: str
    sink_tokens: int
    ratio: float
    bits: float
    compression_ratio: float
    make: CacheFactory

    @property
    def name(self) -> str:
        return f"{BASES[self.codec].preset_prefix}-{self.ratio:g}x"

    def row(self, measured: dict) -> dict:
        """What a results file says of it. measured: as `perplexity.compare` gives it."""
        sizes = {"target_ratio": self.ratio, "compression_ratio_2048": self.compression_ratio, "bits": self.bits}
        return {"label": self.name, "quantizer": self.quantizer, **sizes, **measured}

    def preset(self, loaded: LoadedModel, calibration: Calibration, calibration_file: str, **more) -> dict:
        """It as a preset. calibration_file: as a preset names it; more: measured, made_by and any further key."""
        return new_preset(
            loaded, None, calibration_file, compression_ratio=self.compression_ratio, name=self.name, target="kv",
            rank=loaded.geometry.head_dim, bits=self.bits, codec=self.codec, quantizer=self.quantizer,
            sink_tokens=self.sink_tokens, calibrated_with={key: calibration.meta[key] for key in MADE_FROM}, **more,
        )  # fmt: skip


def compact_calibration(
    loaded: LoadedModel, text: Text, path: Path, *, codec: str, samples: int, seq_len: int, seed: int, sink_tokens: int,
    checkpointing: bool = False, progress=iter, processes: Processes = ALONE,
) -> Calibration:  # fmt: skip
    """The compact calibration at `path` where it was made in the same way, else a new one that is written there.

    Arguments as `calibrate`; of several processes the first one reads and writes.
    """
    made_from = {"samples": samples, "seq_len": seq_len, "seed": seed, "sink_tokens": sink_tokens}
    files.check_writable(path)
    key = calibration_key(loaded, text, **made_from) | {"compact": True, "codec": codec}
    found = load_calibration(path) if processes.first and find_reusable(key, [path]) else None
    if found := processes.agreed(found):
        print(f"calibration: using {path}", flush=True)
        return found
    if path.exists():
        print(f"note: {path} was made otherwise: it will be replaced, and presets that name it then read the new one; "
              "another --tag or --calibration-file keeps it", flush=True)  # fmt: skip
    calibration = calibrate(
        loaded, text, rank=loaded.geometry.head_dim, codec=codec, compact=True, checkpointing=checkpointing,
        progress=progress, processes=processes, **made_from,
    )  # fmt: skip
    if processes.first:
        save_calibration(calibration, path)
    return calibration


def make_ratio_preset(
    loaded: LoadedModel, calibration: Calibration, ratio: float, *, quantizer: str | None = None,
    sink_tokens: int = 4,
) -> RatioPreset:  # fmt: skip
    """The most bits at which a sequence of `TOKENS` still takes 1 / `ratio` of a 16-bit cache, everything counted.

    quantizer: an adjustable one; the first of them when None.
    """
    quantizer = quantizer or adjustable_quantizers()[0]
    exact = 16 * sink_tokens / TOKENS  # bits per coordinate that sinks take
    bits = round(16 / ratio - exact, 4)  # as presets say it, so that what is measured is what they make
    while True:
        try:
            make = factory(loaded, calibration, bits, quantizer, sink_tokens)
        except PluginError as error:
            raise PluginError(
                f"ratio {ratio:g} is out of range, it means about 16 / {ratio:g} bits with {sink_tokens} exact sinks "
                f"counted; {error}"
            ) from error
        held = size.compression_ratio(make, loaded.geometry, TOKENS, config=loaded.model.config)
        if held >= ratio:
            return RatioPreset(calibration.meta["codec"], quantizer, sink_tokens, ratio, bits, held, make)
        # In one go as far as bytes in proportion to bits would ask for: models with sliding layers are far off at first
        bits = round(bits - max(int((1 - held / ratio) * bits / STEP), 1) * STEP, 4)


def factory(
    loaded: LoadedModel, calibration: Calibration, bits: float, quantizer: str, sink_tokens: int
) -> CacheFactory:
    """Caches of so many bits per coordinate, which share their compressors."""
    L = loaded.geometry.num_layers
    k, v = compressors_for("kv", bits, L, calibration, quantizer=quantizer, device=loaded.device)
    return partial(CompressedDynamicCache, k, v, sink_tokens=sink_tokens)
