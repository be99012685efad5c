"""The preset format: which keys a preset has, which values they take, and the settings of each layer that follow."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpt2.common.errors import BadArtefact, PluginError, brief
from gpt2.compression.codecs import BITS, bases_in, codec_name, full_rank, needs_calibration, quantizer_of
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.settings import TARGETS, Plan, Setting, uniform

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
# Figures may be unknown (null); every other key is needed to make a cache
FIGURES = ("compression_ratio", "baseline_ppl", "compressed_ppl", "ppl_delta")
DEFAULTS = {"format": FORMAT, "codec": "pca", "quantizer": None, "sink_tokens": 4, "recent_tokens": 0}
# Larger than any model's, and small enough that a short preset can't ask for all of a machine's memory
RANGES = {"num_layers": (1, 1024), "head_dim": (1, 1024), "sink_tokens": (0, 2**31), "recent_tokens": (0, 2**31)}
TEXTS = {"model": 4096, "calibration_file": 4096, "folder": 4096, "name": 200}  # longest, in characters
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")  # characters that a terminal obeys
LONGEST_CODEC = 200  # characters
# Of all layers together: codecs, each fitted to all statistics; bases joined in one; and numbers in bases that aren't
# calibrated, each as large as head_dim squared and made for every setting
MOST_CODECS, MOST_BASES, MOST_NUMBERS = 8, 4, 2**23


@dataclass(frozen=True)
class Preset:
    """A valid preset. Only `parse` makes one, so no code that is given one has to check it again.

    folder: of the preset's file, where its calibration may lie too; None for a preset that isn't from a file.
    plan: the setting of each layer's K and V. record: the JSON object that it was made from, with defaults filled in
    and unknown keys kept.
    """

    model: str
    num_layers: int
    head_dim: int
    sink_tokens: int
    recent_tokens: int
    calibration_file: str
    folder: str | None
    plan: Plan
    record: dict

    def windows(self, **overrides: int) -> dict[str, int]:
        """Numbers of exact tokens, as a cache takes them. Raises PluginError for an override of another name."""
        windows = {"sink_tokens": self.sink_tokens, "recent_tokens": self.recent_tokens}
        if unknown := sorted(set(overrides) - set(windows)):
            raise PluginError(f"unknown {', '.join(unknown)}: a cache takes {' and '.join(windows)}")
        return windows | overrides


def parse(preset: dict, where: str = "preset") -> Preset:
    """A JSON object as a preset. Raises BadArtefact with `where` and the key for a missing key or an invalid value."""
    if not isinstance(preset, dict):
        raise BadArtefact(f"{where}: expected a JSON object, found {type(preset).__name__}")
    record = DEFAULTS | preset
    _check_keys(record, where)
    plan = _plan(record, where)
    _check_work(plan, record["head_dim"], where)
    same = ("model", "num_layers", "head_dim", "sink_tokens", "recent_tokens", "calibration_file")
    return Preset(**{key: record[key] for key in same}, folder=record.get("folder"), plan=plan, record=record)


def _check_keys(preset: dict, where: str) -> None:
    """Raise BadArtefact unless all keys but those of settings have values of their kind and range."""

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


def _plan(preset: dict, where: str) -> Plan:
    """Settings of each layer: those of `layers` where a preset has them, else its own in all layers of its target."""
    L, head_dim = preset["num_layers"], preset["head_dim"]
    setting = _setting({key: preset.get(key) for key in ("codec", "rank", "bits", "quantizer")}, head_dim, where)
    layers = preset.get("layers")
    if layers is None:
        return uniform(preset["target"], L, setting)
    if not isinstance(layers, dict) or not layers or set(layers) - set(SIDES):
        raise BadArtefact(f"{where}: key 'layers': expected an object with 'k', 'v' or both, found {brief(layers)}")
    plan = {side: [None] * L for side in SIDES}
    return plan | {side: _side(settings, L, head_dim, where, f"layers.{side}") for side, settings in layers.items()}


def _side(settings, num_layers: int, head_dim: int, where: str, key: str) -> list[Setting | None]:
    """One side of `layers`: a setting for all layers, or a list with a setting or null for each layer."""
    if isinstance(settings, dict):
        return [_layer_setting(settings, head_dim, f"{where}: {key}")] * num_layers
    if not isinstance(settings, list) or len(settings) != num_layers:
        found = len(settings) if isinstance(settings, list) else type(settings).__name__
        raise BadArtefact(f"{where}: key {key!r}: expected a list of {num_layers} entries, found {found}")
    places = (f"{where}: {key}[{layer}]" for layer in range(num_layers))
    pairs = zip(settings, places, strict=True)
    return [None if setting is None else _layer_setting(setting, head_dim, place) for setting, place in pairs]


def _layer_setting(setting, head_dim: int, where: str) -> Setting:
    if not isinstance(setting, dict) or set(setting) - {"quantizer"} != {"codec", "rank", "bits"}:
        raise BadArtefact(f"{where}: expected null or codec, rank and bits, found {brief(setting)}")
    return _setting({"quantizer": None} | setting, head_dim, where, whole=True)


def _setting(setting: dict, head_dim: int, where: str, whole: bool = False) -> Setting:
    """codec, rank, bits and quantizer as a Setting; whole: whether null is a rank, that of all coordinates.

    Raises BadArtefact unless they exist and fit together.
    """
    codec, rank, bits, quantizer = (setting[key] for key in ("codec", "rank", "bits", "quantizer"))
    most = full_rank_of(codec, head_dim, where)
    if not (whole and rank is None) and (type(rank) is not int or not 1 <= rank <= most):
        full = f"1 to head_dim {most}" if most == head_dim else f"1 to {most}, as {codec} has coordinates"
        raise BadArtefact(f"{where}: key 'rank': expected {full}, found {brief(rank)}")
    if quantizer is None and (type(bits) is not int or bits not in BITS):
        raise BadArtefact(f"{where}: key 'bits': expected {' or '.join(map(str, sorted(BITS)))}, found {brief(bits)}")
    if type(bits) not in (int, float):
        raise BadArtefact(f"{where}: key 'bits': expected a number, found {brief(bits)}")
    try:
        quantizer_of(quantizer, bits)
    except (PluginError, TypeError) as error:
        raise BadArtefact(f"{where}: keys 'quantizer' and 'bits': {error}") from error
    return Setting(**setting)


def full_rank_of(codec, head_dim: int, where: str) -> int:
    """Coordinates of a preset's codec. Raises BadArtefact for a name that isn't one's."""
    if type(codec) is not str or len(codec) > LONGEST_CODEC:
        raise BadArtefact(f"{where}: key 'codec': expected a codec's name, found {brief(codec)}")
    try:
        return full_rank(codec_name(codec), head_dim)
    except PluginError as error:
        raise BadArtefact(f"{where}: key 'codec': {error}") from error


def _check_work(plan: Plan, head_dim: int, where: str) -> None:
    """Raise BadArtefact where what a preset asks for is right, but would take minutes or a machine's memory."""
    settings = {setting for side in plan.values() for setting in side if setting}
    bases = {setting.codec: len(bases_in(setting.codec)) for setting in settings}
    if sum(map(bool, bases.values())) > MOST_CODECS or max(bases.values(), default=0) > MOST_BASES:
        raise BadArtefact(f"{where}: expected at most {MOST_CODECS} codecs, each of at most {MOST_BASES} bases")
    fixed = [bases[setting.codec] for setting in settings if not needs_calibration(setting.codec)]
    numbers = sum(fixed) * head_dim**2
    if numbers > MOST_NUMBERS:
        raise BadArtefact(
            f"{where}: its settings ask for bases of {numbers:,} numbers: expected {MOST_NUMBERS:,} at most"
        )
